"""Stores in object storage, `PROTOCOL://...`, through fsspec: s3://, gs://, memory:// and others.

A shard is uploaded as files, shard.json last: a shard counts when its shard.json exists. Object storage has no rename, and needs none,
because a second process that made the same shard writes the same bytes. Reading goes through a local folder, into which a shard is
downloaded when it is first used: $LOCALMOTION_CACHE, or `.cache/localmotion` in the home folder. It is never emptied by this program.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from localmotion.errors import ConfigError, StoreError
from localmotion.files import one_line
from localmotion.foreign import needs

SMALL = ("store.json", "manifest.json", "lerobot.json", "index.bin")
"""Files at the top of a store that opening needs."""


def is_remote(place: str | Path) -> bool:
    """Whether a store's place is an address and not a path."""
    return isinstance(place, str) and re.match(r"[a-z][a-z0-9+.-]*://", place) is not None


def place_of(text: str) -> Path | str:
    """A store's place from the command line: an address stays a text."""
    return text if is_remote(text) else Path(text)


class Remote:
    """A store at an address. Every method raises StoreError if the storage fails."""

    def __init__(self, address: str) -> None:
        """Raises MissingExtraError without fsspec, ConfigError for a protocol that it does not know."""
        needs("remote", "fsspec", who=address)
        import fsspec

        self.address = address.rstrip("/")
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.address)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{address}: cannot be opened ({one_line(error)})") from error
        self._lock = threading.Lock()

    def cache(self) -> Path:
        """The local folder for reading. Another one for each state of the store's top files."""
        state = [f"{name} {self._call('ukey', f'{self.root}/{name}')}" for name in SMALL if self.has(name)]
        digest = hashlib.sha256("\n".join([self.address, *state]).encode()).hexdigest()[:32]
        return _home() / "stores" / digest

    def making(self) -> Path:
        """The local folder in which shards are made, with the store's top files."""
        folder = _home() / "making" / hashlib.sha256(self.address.encode()).hexdigest()[:32]
        if not self.has("store.json"):
            for name in SMALL:  # of a store that was removed
                (folder / name).unlink(missing_ok=True)
        self.get(SMALL[:-1], folder)
        return folder

    def has(self, name: str) -> bool:
        return bool(self._call("exists", f"{self.root}/{name}"))

    def shards(self) -> list[int]:
        """Numbers of the complete shards."""
        self._call("invalidate_cache")
        found = self._call("glob", f"{self.root}/shards/*/shard.json")
        numbers = (path.rsplit("/", 2)[1] for path in found)
        return sorted(int(number) for number in numbers if re.fullmatch(r"[0-9]{5,9}", number))

    def sizes(self, index: int) -> dict[str, int]:
        """Bytes of the files of a shard, by name."""
        found = self._call("ls", f"{self.root}/shards/{index:05d}", detail=True)
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in found}

    def get(self, names: Iterable[str], folder: Path) -> None:
        """Download those of the files that exist there and not yet here, each whole or not at all."""
        for name in names:
            local = folder / name
            if local.exists() or not self.has(name):
                continue
            partial = local.with_name(f"{local.name}.partial-{os.getpid()}-{threading.get_ident()}")
            try:
                local.parent.mkdir(parents=True, exist_ok=True)
                self._call("get_file", f"{self.root}/{name}", str(partial))
                os.replace(partial, local)
            except OSError as error:
                raise StoreError(f"{self.address}: {name} cannot be written to {local} ({one_line(error)})") from error
            finally:
                partial.unlink(missing_ok=True)

    def get_shard(self, index: int, folder: Path) -> None:
        """Download a shard into the store ``folder``. Does nothing if it is there."""
        place = f"shards/{index:05d}"
        with self._lock:
            if not (folder / place / "shard.json").exists():
                names = sorted(self.sizes(index), key=lambda name: name == "shard.json")
                self.get([f"{place}/{Path(name).name}" for name in names], folder)

    def put(self, file: Path, name: str) -> None:
        """Upload a file."""
        self._call("makedirs", f"{self.root}/{name}".rsplit("/", 1)[0], exist_ok=True)
        self._call("put_file", str(file), f"{self.root}/{name}")

    def put_shard(self, index: int, folder: Path) -> bool:
        """Move a shard of the store ``folder`` to the storage. False if it was there; it is removed here either way."""
        local, place = folder / "shards" / f"{index:05d}", f"shards/{index:05d}"
        first = not self.has(f"{place}/shard.json")
        if first:
            for file in sorted(local.iterdir(), key=lambda path: path.name == "shard.json"):
                self.put(file, f"{place}/{file.name}")
        shutil.rmtree(local, ignore_errors=True)
        return first

    def share(self, folder: Path) -> None:
        """Upload the top files of the store ``folder`` that are not there. Raises StoreError if another process has put others there."""
        for name in SMALL[:-1]:
            if not (folder / name).exists():
                continue
            if not self.has(name):
                self.put(folder / name, name)
            if self._call("cat_file", f"{self.root}/{name}") != (folder / name).read_bytes():
                raise StoreError(
                    f"{self.address}: another process has just begun a store of another {name} there; use another place"
                )

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        try:
            return getattr(self.files, name)(*args, **options)
        except Exception as error:  # each protocol has errors of its own
            raise StoreError(f"{self.address}: {name} failed ({one_line(error)})") from error


def _home() -> Path:
    return Path(os.environ.get("LOCALMOTION_CACHE") or Path.home() / ".cache" / "localmotion")
