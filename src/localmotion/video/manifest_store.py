"""The manifest of a store: which one it is made from, and so which shards it will have. `STORE/manifest.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localmotion.errors import StoreError
from localmotion.files import read_json
from localmotion.video.manifest import Manifest
from localmotion.video.shards import dump, read_header, shard_indices, write_atomic, write_error

FILE = "manifest.json"
SHARD, LARGE_SHARD, LARGE = 32, 1024, 320_000
_FIX = "run extract --manifest again, or extract into a new folder"


def shard_size(store: Path, manifest: Manifest, given: int | None = None) -> int:
    """Videos of a shard: ``given``, those of an existing store, or 32, and 1,024 above 320,000 videos, which are 10,000 shards of 32."""
    if given is None and (store / "store.json").exists():
        return int(read_header(store, links=False)["shard_clips"])
    return given or (SHARD if manifest.videos <= LARGE else LARGE_SHARD)


def keep_manifest(store: Path, manifest: Manifest, size: int) -> None:
    """Write `FILE` into a new store. Raises StoreError for a store of another manifest, or of none."""
    want = manifest.header
    now = {"manifest": want, "shards": -(-manifest.videos // size)}
    path = store / FILE
    if not path.exists():
        if shard_indices(store):
            raise StoreError(f"{store}: was extracted without a manifest; use another folder")
        try:
            write_atomic(path, dump(now, indent=1) + "\n")
        except OSError as error:
            raise write_error(store, FILE, error) from error
    have = read_json(path, StoreError, _FIX).get("manifest")
    if not isinstance(have, dict):
        raise StoreError(f"{path}: is damaged; {_FIX}")
    for key in want:
        if have.get(key) != want[key]:
            raise StoreError(
                f"{store}: was begun with another manifest, {key} {have.get(key)!r:.80}, {manifest.path} has "
                f"{want[key]!r:.80}; use that one or another folder"
            )


def planned_shards(store: Path) -> int | None:
    """Number of shards that a store will have; None for one without a manifest. Raises StoreError."""
    if not (store / FILE).exists():
        return None
    count: Any = read_json(store / FILE, StoreError, _FIX).get("shards")
    if type(count) is not int or not 0 <= count < 1 << 31:
        raise StoreError(f"{store / FILE}: is damaged; {_FIX}")
    return count


def missing_line(missing: Sequence[int], present: int) -> str:
    """Which shards are missing, on one line; empty if none is."""
    if not missing:
        return ""
    names = ", ".join(f"{index:05d}" for index in missing[:5]) + (", ..." if len(missing) > 5 else "")
    return f"{len(missing)} of {len(missing) + present} shards are missing ({names})"
