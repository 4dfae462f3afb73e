"""The files of a clip store: layout, clips, and reading the index of a shard.

    store.json                    format, version, size, tracks, shard_clips, recipe, recipe_hash, arrays
    shards/00000/
        frames.u8                 (sum of T, S, S, 3)  uint8
        flow.f16                  (sum of T, S, S, 2)  float16, flow[t]: pixels from frame t to t+1, the last of a clip is zero
        tracks.f32                (sum of T, N, 2)     float32, x, y in pixels
        visible.u8                (sum of T, N)        0 or 1
        track_id.i32              (sum of T, N)        int32
        NAME.KIND                 (sum of T, ...)      further arrays per frame, listed in store.json; none in most stores
        shard.json                clips: id, label, offset, frames, source, info; size and SHA-256 of each array file;
                                  replaces: videos whose entries in shards of lower numbers are obsolete (left out if none)
        rejected.jsonl            videos of this shard that were refused, one JSON object per line
        videos.jsonl              the videos of the shard: size and time of each, and the limits used to cut it,
                                  one JSON object per line (missing in stores of earlier versions and in collections)
    unfinished/                   results of unfinished shards, the plan and the locks of the running processes; removed at the end

All numbers are little-endian. `source` of a clip holds `video`, the id of the video it was cut from, and `start` and
`stop`, its frames there, counted in kept frames. A clip at the beginning of a video has the video's id; the id of a
later one ends in `#START-STOP`.

A shard is written to a temporary folder and renamed, so it is either complete or absent, and it never changes. A video
that is extracted again goes to a new shard, which replaces the older entries. The sorted ids alone determine the shard of
each video. Only the times in videos.jsonl depend on the clock or on the machine: the same input and recipe give the same
bytes for any number of workers, in any order, with any interruptions. Ids are never used as file names.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import StoreError
from localmotion.files import one_line, parse_json, read_bytes, read_json, refuse_links

FORMAT, VERSION = "localmotion-clips", 1
FIX = "delete that shard folder and run the same extract again"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LARGEST, _MAX_INDEX = 4096, 1 << 28  # largest side or number of tracks of a store; largest index of a shard, bytes
_MAX_VALUES = 1 << 25  # most values in a shard's index: a clip has about a hundred, an hour of film has 360 clips


@dataclass(frozen=True)
class Clip:
    """One clip of T frames of side S with N track slots. `source` and `info` are JSON-able."""

    id: str
    frames: NDArray[np.uint8]  # (T, S, S, 3) RGB
    flow: NDArray[np.float16]  # (T, S, S, 2) from frame t to t+1, pixels; the last one is zero
    tracks: NDArray[np.float32]  # (T, N, 2) x, y in pixels, in frame t
    visible: NDArray[np.bool_]  # (T, N)
    track_id: NDArray[np.int32]  # (T, N) changes when a slot gets a new point
    label: int | str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # further arrays (T, ...) by name, those of `Extra`

    def array(self, name: str) -> NDArray[Any]:
        """One of its arrays, by the name it has in a store."""
        found: NDArray[Any] = self.extra[name] if name in self.extra else getattr(self, name)
        return found


@dataclass(frozen=True)
class ArraySpec:
    """One array of a shard: its file, element type and the shape of one frame's entry."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def frame_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


Extra = Mapping[str, tuple[str, tuple[int, ...]]]
"""Further arrays of a store by name: element type, one of `KINDS`, and the shape of one frame's entry."""
KINDS = {"|u1": "u8", "<i4": "i32", "<f2": "f16", "<f4": "f32"}
_MAX_EXTRA, _LARGEST_ENTRY = 16, 1 << 24  # most further arrays of a store; most values of one frame's entry


def array_specs(size: int, tracks: int, extra: Extra | None = None) -> dict[str, ArraySpec]:
    """The arrays of a store with frames of side `size` and clips with `tracks` track slots, the further ones last."""
    more = {name: ArraySpec(f"{name}.{KINDS[dtype]}", dtype, tuple(shape)) for name, (dtype, shape) in (extra or {}).items()}
    return _plain_specs(size, tracks) | more


def _plain_specs(size: int, tracks: int) -> dict[str, ArraySpec]:
    return {
        "frames": ArraySpec("frames.u8", "|u1", (size, size, 3)),
        "flow": ArraySpec("flow.f16", "<f2", (size, size, 2)),
        "tracks": ArraySpec("tracks.f32", "<f4", (tracks, 2)),
        "visible": ArraySpec("visible.u8", "|u1", (tracks,)),
        "track_id": ArraySpec("track_id.i32", "<i4", (tracks,)),
    }


def check_id(clip_id: str) -> None:
    """Raise StoreError unless `clip_id` is a plain relative name: not empty, not absolute, without `..` and NUL."""
    if not clip_id or clip_id.startswith("/") or ".." in clip_id.split("/") or "\0" in clip_id:
        raise StoreError(f"clip id {clip_id!r} is not a plain relative name; rename the video")


def arrays_json(size: int, tracks: int, extra: Extra | None = None) -> dict[str, Any]:
    specs = array_specs(size, tracks, extra)
    return {name: {"file": s.file, "dtype": s.dtype, "shape": list(s.shape)} for name, s in specs.items()}


def dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False)


def read_header(path: Path, links: bool = True) -> dict[str, Any]:
    """Content of store.json. ``links``: refuse links out of the store anywhere in it; else only at its top."""
    file = path / "store.json"
    if not file.exists():
        raise StoreError(f"{path}: no clip store there (no store.json); run extract first")
    refuse_links(path, StoreError, deep=links)
    header = read_json(file, StoreError, "extract into a new folder")
    if header.get("format") != FORMAT:
        raise StoreError(f"{file}: is not a clip store of localmotion")
    if header.get("version") != VERSION:
        raise StoreError(f"{file}: is of version {header.get('version')!r:.40}, this program reads {VERSION}; extract it again")
    want = {"size": int, "tracks": int, "shard_clips": int, "recipe": dict, "recipe_hash": str}
    bad = [key for key, kind in want.items() if type(header.get(key)) is not kind]
    fits = not bad and all(1 <= header[key] <= _LARGEST for key in ("size", "tracks"))
    if not fits or header.get("arrays") != arrays_json(header["size"], header["tracks"], extra_of(header)):
        raise StoreError(f"{file}: is damaged ({', '.join(bad) or 'size, tracks or arrays'}); extract into a new folder")
    return header


def extra_of(header: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The further arrays of a store's header. One that is not well described is left out, so that the header does not match."""
    listed = header.get("arrays")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in (listed if isinstance(listed, dict) else {}).items():
        if name in _plain_specs(1, 1) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) or not isinstance(entry, dict):
            continue
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not isinstance(dtype, str) or dtype not in KINDS or not isinstance(shape, list) or len(shape) > 4:
            continue
        if all(type(n) is int and 1 <= n <= _LARGEST_ENTRY for n in shape) and math.prod(shape) <= _LARGEST_ENTRY:
            found[name] = (dtype, tuple(shape))
    return found if len(found) <= _MAX_EXTRA else {}


def shard_indices(path: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(path / "shards") if re.fullmatch(r"[0-9]{5,9}", name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_shard(path: Path, index: int, specs: dict[str, ArraySpec], sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A shard's index, checked against the sizes of its files; ``sizes``: those of files that are elsewhere."""
    folder = path / "shards" / f"{index:05d}"
    try:
        shard = parse_json(read_bytes(folder / "shard.json", _MAX_INDEX), _MAX_VALUES)
        total = 0
        for video in shard.setdefault("replaces", []):
            check_id(video)
        for entry in shard["clips"]:
            if type(entry["frames"]) is not int or entry["frames"] < 1 or entry["offset"] != total:
                raise ValueError(f"offsets do not add up at clip {entry['id']!r}")
            check_id(entry["id"])
            check_id(video_of(entry))
            label = entry.setdefault("label")
            if type(entry["info"]) is not dict or type(entry["source"]) is not dict or not isinstance(label, int | str | None):
                raise ValueError(f"entry of clip {entry['id']!r} lacks info or source, or its label is neither number nor text")
            total += entry["frames"]
        for spec in specs.values():
            want = total * spec.frame_bytes
            size = _size(folder / spec.file) if sizes is None else sizes.get(spec.file, -1)
            if size != want or shard["files"][spec.file]["bytes"] != want:
                raise ValueError(f"{spec.file} has {size} bytes, not {want}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(f"{path}: shard {index:05d} is damaged ({one_line(error)}); {FIX}") from error
    return dict(shard)


def _size(file: Path) -> int:
    """Bytes of a regular file; -1 for another."""
    status = file.stat()
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def video_of(entry: dict[str, Any]) -> str:
    """Id of the video that a clip of a shard's index was cut from: the clip's id if no other is stated."""
    video: str = entry["source"].get("video", entry["id"])
    return video


def read_rejected(path: Path, index: int) -> list[dict[str, Any]]:
    """Entries of the videos that were refused for a shard."""
    return _read_lines(path, index, "rejected.jsonl")


def read_videos(path: Path, index: int) -> list[dict[str, Any]]:
    """Records of the videos of a shard; empty for shards of earlier versions and of collections."""
    if not (path / "shards" / f"{index:05d}" / "videos.jsonl").exists():
        return []
    return _read_lines(path, index, "videos.jsonl")


def _read_lines(path: Path, index: int, name: str) -> list[dict[str, Any]]:
    try:
        lines = read_bytes(path / "shards" / f"{index:05d}" / name, _MAX_INDEX).decode().splitlines()
        entries = [parse_json(line) for line in lines]
        for entry in entries:
            check_id(entry["id"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(f"{path}: shard {index:05d} is damaged ({name}: {one_line(error)}); {FIX}") from error
    return entries


def other_recipe(path: Path, key: str, have: dict[str, Any], want: dict[str, Any]) -> str:
    if key == "arrays":
        old, new = (", ".join(sorted(extra_of(header))) or "none" for header in (have, want))
        return f"{path}: holds a store with further arrays {old}, this command writes {new}; use another folder"
    if key in ("recipe", "recipe_hash"):
        old, new = have["recipe"], want["recipe"]
        keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        what = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys[:4]) or "hash only"
        return (
            f"{path}: holds a store of recipe {have['recipe_hash']}, this command has {want['recipe_hash']} ({what}); "
            "use the same recipe or another folder"
        )
    return f"{path}: holds a store with {key} {have[key]}, this command has {want[key]}; use the same setting or another folder"


def write(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        sync(file)


def write_atomic(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        write(partial, text)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process has no unfinished work when it opens a store
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_error(path: Path, what: str, error: OSError) -> StoreError:
    """The error to raise when ``what`` could not be written to the store at ``path``."""
    if error.errno in _FULL:
        return StoreError(
            f"{path}: disk full while writing {what} ({error.strerror}); finished shards are kept, "
            "free some space and run the same command again"
        )
    return StoreError(f"{path}: cannot write {what} ({error.strerror or error})")
