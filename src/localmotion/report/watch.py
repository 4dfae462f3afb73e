"""Serve the report of running runs on this machine: a page that shows what is new by itself.

The server answers four addresses: the page, its version, and the pictures and films that the page names by their SHA-256.
No address leads to a file. The page is built when somebody looks at it and a run has changed.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from localmotion.console import duration, errors, say
from localmotion.errors import ConfigError
from localmotion.files import one_line
from localmotion.report.alive import Watched, find_runs, progress, seconds_left
from localmotion.report.build import sections_of
from localmotion.report.memory import Memory
from localmotion.report.page import Age, Notice, Section, Table, build_page
from localmotion.report.results import Gathered
from localmotion.report.style import short
from localmotion.runs.read import names

PORT = 8600
TRIES = 20
"""Ports that are tried after `PORT` if it is in use."""
LOCAL = ("127.0.0.1", "localhost", "::1")
SHARE = 0.1
"""Largest share of one core for building pages: a page that takes long is built less often."""

# Only the page's own script runs, and it asks this server only.
_POLICY = (
    "default-src 'none'; img-src 'self'; media-src 'self'; connect-src 'self'; style-src 'unsafe-inline';"
    " script-src 'sha256-SCRIPT'; base-uri 'none'; form-action 'none'"
)

_SCRIPT = """
const every = EVERY;
let version = "VERSION", parts = [...document.querySelector("main").children].map(e => e.outerHTML), offset = 0, busy = false;
const note = document.createElement("p");
note.className = "notice"; note.hidden = true; note.id = "live";
document.querySelector("header").append(note);
const ages = () => {
  for (const e of document.querySelectorAll("time[data-at]")) {
    const s = Math.max(Date.now() / 1000 - offset - e.dataset.at, 0);
    const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([n]) => s >= n) || [1, "s"];
    e.textContent = `${Math.floor(s / size)} ${unit} ago`;
  }
};
const opened = e => [...e.querySelectorAll("details")].map(d => d.open ? d.querySelector("summary").textContent : "");
const swap = async text => {
  const fresh = new DOMParser().parseFromString(text, "text/html"), main = document.querySelector("main");
  const now = [...fresh.querySelector("main").children], html = now.map(e => e.outerHTML), ready = [];
  for (let i = 0; i < now.length; i++) {
    if (html[i] === parts[i]) continue;
    const e = ready[i] = document.importNode(now[i], true), open = new Set(main.children[i] ? opened(main.children[i]) : []);
    for (const d of e.querySelectorAll("details")) d.open = open.has(d.querySelector("summary").textContent);
    await Promise.allSettled([...e.querySelectorAll("img")].map(x => x.decode()));
  }
  const top = e => e.getBoundingClientRect().top;
  const at = [...main.children].find(e => e.getBoundingClientRect().bottom > 0), title = at && at.querySelector("h2").textContent;
  const before = at && top(at), moved = scrollY > 0;
  ready.forEach((e, i) => main.children[i] ? main.children[i].replaceWith(e) : main.append(e));
  while (main.children.length > now.length) main.lastChild.remove();
  for (const part of ["h1", "header > p", "nav"]) {
    const [a, b] = [document.querySelector(part), fresh.querySelector(part)];
    if (a && b && a.innerHTML !== b.innerHTML) a.replaceWith(document.importNode(b, true));
  }
  document.title = fresh.title; parts = html;
  const same = [...main.children].find(e => e.querySelector("h2").textContent === title);
  if (moved && same) scrollBy({top: top(same) - before, behavior: "instant"});
};
const look = async () => {
  if (document.hidden || busy) return;
  busy = true;
  try {
    const state = await (await fetch("version")).json();
    offset = Date.now() / 1000 - state.now;
    if (state.version !== version) {
      const answer = await fetch("./");
      await swap(await answer.text());
      version = answer.headers.get("X-Version");
    }
    note.hidden = true;
  } catch { note.hidden = false; note.textContent = "localmotion watch does not answer; this is its last page."; }
  busy = false; ages();
};
setInterval(ages, 1000); setInterval(look, every * 1000); document.addEventListener("visibilitychange", look);
"""


@dataclass(frozen=True)
class Built:
    """A page with its pictures and films by their SHA-256: (bytes, MIME type)."""

    page: bytes
    policy: str
    version: str
    media: dict[str, tuple[bytes, str]]


@dataclass
class Watcher:
    """Builds pages of the runs at some places (`find_runs`).

    Args:
        every: seconds between two looks of the page.
    """

    places: Sequence[str]
    every: float = 5.0
    runs: dict[str, Watched] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)

    def changed(self) -> bool:
        """Whether a run has changed, begun or gone since the last call."""
        known = self.runs
        self.runs = {str(path): known.get(str(path)) or Watched(path) for path in find_runs(self.places)}
        looked = [run.look() for run in self.runs.values()]
        return any(looked) or self.runs.keys() != known.keys()

    def build(self) -> Built:
        """The page of the runs as they are now. A run or a chart that cannot be shown becomes a sentence."""
        now, runs = time.time(), list(self.runs.values())
        for run, name in zip(runs, names([run.path for run in runs]), strict=True):
            run.name = name
            run.read()
        sections = [self._live(runs, now)]
        title = "localmotion"
        data = [run.data for run in runs if run.data is not None and run.data.lines]
        if data:
            try:
                with self.memory.used():
                    title, shown = sections_of(Gathered(data))
                sections += shown
            except Exception as error:  # damage that the report does not know must not end the page
                sections.append(Section("Report", [Notice(f"The report cannot be drawn: {one_line(error)}.")]))
        media: dict[str, tuple[bytes, str]] = {}

        def uri(content: bytes, mime: str) -> str:
            name = hashlib.sha256(content).hexdigest()
            media[name] = content, mime
            return f"media/{name}"

        count = f"{len(runs)} run{'s' * (len(runs) != 1)}, watched by localmotion"
        foot = "Served by localmotion watch from the files of the run directories."
        slot = secrets.token_hex(16)  # what is put in last depends on the page
        page = build_page(title, sections, subtitle=count, footer=foot, uri=uri, policy=f"{slot}policy", script=f"{slot}script")
        version = hashlib.sha256(re.sub(r"(<time[^>]*>)[^<]*", r"\1", page).replace(slot, "").encode()).hexdigest()[:16]
        script = _SCRIPT.replace("EVERY", f"{self.every:g}").replace("VERSION", version)
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = _POLICY.replace("SCRIPT", allowed)
        page = page.replace(f"{slot}policy", policy).replace(f"{slot}script", script)
        return Built(page.encode(), policy, version, media)

    def _live(self, runs: Sequence[Watched], now: float) -> Section:
        rows = []
        for run in sorted(runs, key=lambda run: run.state not in ("running", "begins")):
            found = progress(run.data) if run.data else None
            left = seconds_left(run.data) if run.data and run.state == "running" else None
            rows.append(
                [
                    run.name,
                    run.state,
                    f"{short(found[0])}/{short(found[1])} {found[2]}" if found else "–",
                    f"about {duration(left)}" if left else "–",
                    Age(run.newest, now) if run.newest else "–",
                ]
            )
        if not rows:
            return Section("Live", [Notice(f"No run yet in {', '.join(self.places)}. This page shows runs as they begin.")])
        causes = [Notice(run.cause) for run in runs if run.cause]
        return Section("Live", [Table(["run", "state", "progress", "to go", "newest line"], rows), *causes])


def watch(places: Sequence[str], *, host: str = "127.0.0.1", port: int | None = None, every: float = 5.0) -> None:
    """Serve the page of some runs until Ctrl-C. ``port``: None for `PORT` or the next free one.

    Raises ConfigError if the port is in use or the host is not one of this machine.
    """
    if not 0.5 <= every <= 3600:
        raise ConfigError(f"--every {every:g}: seconds in 0.5..3600")
    watcher = Watcher(places, every)
    server = Server(watcher, host, port)
    if host not in LOCAL:
        errors.print(f"warning: {host} may be reached from other machines; whoever does sees these runs", markup=False)
    watcher.changed()
    say(f"{len(watcher.runs)} runs at {server.address} (Ctrl-C ends it)")
    try:
        server.start()
        threading.Event().wait()
    except KeyboardInterrupt:
        say("no longer watched; the runs go on")
    finally:
        server.close()


class Server:
    """Answers requests, and builds pages while somebody looks."""

    def __init__(self, watcher: Watcher, host: str, port: int | None) -> None:
        self.watcher, self.host = watcher, host
        self.built: Built | None = None
        self.asked = threading.Event()
        """Set when somebody looks at the page."""
        self.first = threading.Event()
        self.http = _listen(host, port, self)
        where = f"[{host}]" if ":" in host else host
        self.address = f"http://{where}:{self.http.server_address[1]}/"
        self._serving = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    def start(self) -> None:
        """Serve and build in threads of their own: so Ctrl-C, which Python hands to the main thread, never waits for a chart."""
        self._serving.start()
        threading.Thread(target=self._build, daemon=True).start()

    def _build(self) -> None:
        """Build pages while somebody looks."""
        while True:
            self.asked.wait()
            self.asked.clear()
            began = time.perf_counter()
            try:
                if self.watcher.changed() or self.built is None:
                    self.built = self.watcher.build()
            except Exception as error:  # the disk, the memory: the page stays, and is tried again
                say(f"the page could not be built: {one_line(error)}")
            spent = time.perf_counter() - began if self.first.is_set() else 0.0  # the first page draws everything
            self.first.set()
            time.sleep(max(min(0.5, self.watcher.every / 2), spent / SHARE - spent))

    def close(self) -> None:
        if self._serving.is_alive():
            self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, host: str) -> tuple[int, str, bytes, dict[str, str]]:
        """Status, MIME type, body and further headers for a request of ``path`` whose header names ``host``."""
        name = re.sub(r":\d+$", "", host).strip("[]")
        if self.host in LOCAL and name not in LOCAL:  # a page from elsewhere whose name leads to this machine
            return 403, "text/plain", b"only for this machine\n", {}
        if path in ("/", "/version"):
            self.asked.set()
            self.first.wait(60)
        built = self.built
        if built is None:
            return 503, "text/plain", b"the first page is being built\n", {}
        if path == "/":
            return (
                200,
                "text/html; charset=utf-8",
                built.page,
                {"X-Version": built.version, "Content-Security-Policy": built.policy},
            )
        if path == "/version":
            return 200, "application/json", f'{{"version": "{built.version}", "now": {time.time():.3f}}}'.encode(), {}
        found = built.media.get(path.removeprefix("/media/")) if path.startswith("/media/") else None
        if found is None:
            return 404, "text/plain", b"not found\n", {}
        return 200, found[1], found[0], {"Cache-Control": "private, max-age=31536000, immutable", "Accept-Ranges": "bytes"}


def _listen(host: str, port: int | None, server: Server) -> Any:
    """An HTTP server on the port, or on the first free one from `PORT` on."""
    import http.server
    import socket

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10
        server_version, sys_version = "localmotion", ""

        def do_GET(self) -> None:
            status, mime, body, more = server.answer(self.path.partition("?")[0], self.headers.get("Host", ""))
            length = len(body)
            if status == 200 and (part := re.fullmatch(r"bytes=(\d{1,12})-(\d{0,12})", self.headers.get("Range", ""))):
                first, last = int(part[1]), min(int(part[2] or length), length - 1)
                if first <= last:  # films are played in parts
                    status, body = 206, body[first : last + 1]
                    more = {**more, "Content-Range": f"bytes {first}-{last}/{length}"}
            self.send_response(status)
            base = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
            base |= {"X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin"}
            for name, value in {"Content-Type": mime, "Content-Length": str(len(body)), **base, **more}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    class Threads(http.server.ThreadingHTTPServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, *_: Any) -> None:
            pass  # the browser went away

    for number in [port] if port is not None else range(PORT, PORT + TRIES):
        try:
            return Threads((host, number), Handler)
        except OverflowError as error:
            raise ConfigError(f"--port {number}: is not in 0..65535") from error
        except OSError as error:
            if isinstance(error, socket.gaierror) or "in use" not in str(error):
                raise ConfigError(f"{host}:{number}: cannot be served ({one_line(error.strerror or error)})") from error
    used = f"port {port} is" if port is not None else f"ports {PORT} to {PORT + TRIES - 1} are"
    raise ConfigError(f"{used} in use; choose another --port (0: any that is free)")
