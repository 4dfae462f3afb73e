"""A server on this machine that answers what huggingface_hub asks of the Hub: make, fill and fetch a repository of a model, fetch a
data set."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"


@dataclass
class Repository:
    """Its commits: for each hash the content of its files. ``refs``: branches and tags."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """A new commit of the branch main, with these files."""
        text = repr((len(self.commits), sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())))
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs["main"] = name
        return name


@dataclass
class StandIn:
    """The server's state. ``asked``: each request that came, as "METHOD path"."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut: str = ""
    """Files whose name ends so are sent without their last bytes."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: StandIn

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, code: int = 200, **headers: str) -> None:
        """JSON, or bytes as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        length = headers.pop("Content_Length", str(len(body)))
        for name, text in {**headers, "Content-Length": length}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, kind: str) -> None:
        self.answer({"error": kind}, code, X_Error_Code=kind, X_Error_Message=kind)

    @property
    def owner(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def content(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def found(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit. Answers itself if there is none."""
        repository = self.state.repositories.get(name)
        if repository is None or (repository.private and not self.owner):
            self.refuse(404 if self.owner else 401, "RepoNotFound")
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return repository, commit

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(f"{self.command} {path}")
        parts = path.removeprefix("/datasets").strip("/").split("/")
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            name, kind, revision = "/".join(parts[2:4]), *[*parts[4:6], "", "main"][:2]
            revision = parts[5] if len(parts) > 5 else "main"
            if found := self.found(name, revision):
                repository, commit = found
                files = repository.commits[commit]
                if kind == "tree":
                    self.answer([{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in files.items()])
                else:
                    known = [{"rfilename": p} for p in files]
                    self.answer({"id": name, "sha": commit, "private": repository.private, "siblings": known, "tags": []})
        elif parts[2:3] == ["resolve"]:
            if found := self.found("/".join(parts[:2]), parts[3]):
                data = found[0].commits[found[1]].get("/".join(parts[4:]))
                if data is None:
                    self.refuse(404, "EntryNotFound")
                    return
                tag = hashlib.sha256(data).hexdigest()
                start = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                data, part = data[start:], {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
                size = len(data)
                if self.state.cut and path.endswith(self.state.cut) and self.command == "GET":
                    data = data[: size // 2]
                    size = len(data)
                self.answer(data, 206 if part else 200, X_Repo_Commit=found[1], ETag=f'"{tag}"', Content_Length=str(size), **part)
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.state.uploaded[self.path.rsplit("/", 1)[-1]] = self.content()
        self.answer({})

    def do_POST(self) -> None:
        path, content = unquote(urlsplit(self.path).path), self.content()
        self.state.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif not self.owner:
            self.refuse(401, "")
        elif path == "/api/repos/create":
            given = json.loads(content)
            name = f"{given['organization']}/{given['name']}"
            if name in self.state.repositories:
                self.answer({"error": "exists", "url": f"{self.state.url}/{name}"}, 409)
            else:
                hidden = given.get("visibility") == "private" or bool(given.get("private"))
                self.state.repositories[name] = Repository(hidden)
                self.state.repositories[name].commit({".gitattributes": b""})
                self.answer({"url": f"{self.state.url}/{name}"})
        elif "preupload" in parts:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(content)["objects"]
            put = [{**o, "actions": {"upload": {"href": f"{self.state.url}/lfs/{o['oid']}"}}} for o in wanted]
            self.answer({"transfer": "basic", "objects": put})
        elif "commit" in parts:
            repository = self.state.repositories["/".join(parts[2:4])]
            files = dict(repository.commits[repository.refs["main"]])
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.state.uploaded[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            commit = repository.commit(files)
            self.answer(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.state.url}/{parts[2]}/{parts[3]}/commit/{commit}"}
            )
        else:
            self.refuse(404, "RepoNotFound")


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """The server, on a free port of this machine, while the context is open."""
    state = StandIn()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
