"""The clip store: decoded clips with their motion on disk, as raw memory-mapped shards.

    store.json                    format, version, size, tracks, shard_clips, recipe, recipe_hash, arrays
    shards/00000/
        frames.u8                 (sum of T, S, S, 3)  uint8
        flow.f16                  (sum of T, S, S, 2)  float16, flow[t]: pixels from frame t to t+1, the last of a clip is zero
        tracks.f32                (sum of T, N, 2)     float32, x, y in pixels
        visible.u8                (sum of T, N)        0 or 1
        track_id.i32              (sum of T, N)        int32
        shard.json                clips: id, label, offset, frames, source, info; size and SHA-256 of each array file
        rejected.jsonl            what was offered for this shard and refused, one JSON object a line

All numbers are little-endian. A shard is written beside its place and renamed into it, so it is there whole or not at
all. Which clip goes into which shard follows from the sorted ids alone, and nothing in the files depends on the clock
or on the machine: the same input and recipe give the same bytes, whatever the number of workers, their order, or
interruptions. Ids never become file names.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import StoreError
from localmotion.files import one_line, parse_json, read_bytes, read_json, refuse_links

FORMAT, VERSION = "localmotion-clips", 1
_MEND = "delete that shard folder and run the same extract again"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LARGEST, _MAX_INDEX = 4096, 1 << 28  # side or number of tracks that a store may claim; bytes of a shard's index
_OPEN_FILES = 512  # memory maps held at once by a reader: each keeps a file descriptor, of which 1024 is the usual limit


@dataclass(frozen=True)
class Clip:
    """One clip of T frames of side S with N track slots. `source` and `info` are JSON-able."""

    id: str
    frames: NDArray[np.uint8]  # (T, S, S, 3) RGB
    flow: NDArray[np.float16]  # (T, S, S, 2) from frame t to t+1, pixels; the last one is zero
    tracks: NDArray[np.float32]  # (T, N, 2) x, y in pixels, in frame t
    visible: NDArray[np.bool_]  # (T, N)
    track_id: NDArray[np.int32]  # (T, N) changes when a slot is given a new point
    label: int | str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArraySpec:
    """One array of a shard: its file, element type and the shape of one frame's entry."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def frame_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def array_specs(size: int, tracks: int) -> dict[str, ArraySpec]:
    """The arrays of a store whose frames have side `size` and whose clips have `tracks` track slots."""
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


# -------------------------------------------------------------------------------------------------------------- writer


class ClipStoreWriter:
    """Writes a clip store shard by shard. Make it with `open`; several processes may hold one on the same folder."""

    def __init__(self, path: Path, size: int, tracks: int, shard_clips: int) -> None:
        self.path, self.size, self.tracks, self.shard_clips = path, size, tracks, shard_clips
        self.specs = array_specs(size, tracks)

    @classmethod
    def open(
        cls,
        path: str | Path,
        size: int,
        recipe: dict[str, Any],
        recipe_hash: str,
        tracks: int,
        shard_clips: int = 64,
    ) -> ClipStoreWriter:
        """Create a store, or open one for continuation; leftovers of interrupted shards are removed.

        Raises StoreError when the folder holds something else, or a store of another recipe, size or number of tracks
        (both are named), or cannot be written.
        """
        path = Path(path)
        if size < 1 or tracks < 1 or shard_clips < 1:
            raise StoreError(f"{path}: size {size}, tracks {tracks} and shard_clips {shard_clips} must be at least 1")
        header = {
            "format": FORMAT,
            "version": VERSION,
            "size": size,
            "tracks": tracks,
            "shard_clips": shard_clips,
            "recipe": recipe,
            "recipe_hash": recipe_hash,
            "arrays": _arrays_json(size, tracks),
        }
        text = _dump(header, indent=1)
        try:
            if (path / "store.json").exists():
                have = _read_header(path)
                for key in ("recipe_hash", "recipe", "size", "tracks", "shard_clips"):
                    if have[key] != json.loads(text)[key]:
                        raise StoreError(_other_recipe(path, key, have, json.loads(text)))
            else:
                if path.exists() and not all(".partial-" in entry.name for entry in path.iterdir()):
                    raise StoreError(f"{path}: is not empty and no clip store; give a new or empty folder")
                path.mkdir(parents=True, exist_ok=True)
                _write_atomic(path / "store.json", text)
            (path / "shards").mkdir(exist_ok=True)
            writer = cls(path, size, tracks, shard_clips)
            writer._remove_leftovers()
        except OSError as error:
            raise write_error(path, "the store", error) from error
        return writer

    def done_ids(self) -> set[str]:
        """Ids of all clips and rejected videos in whole shards."""
        done: set[str] = set()
        for index in _shard_indices(self.path):
            shard = _read_shard(self.path, index, self.specs)
            done.update(entry["id"] for entry in shard["clips"])
            done.update(entry["id"] for entry in _read_rejected(self.path, index))
        return done

    def indices(self) -> list[int]:
        """Numbers of the shards that are there."""
        return _shard_indices(self.path)

    def pending(self, ids: Iterable[str]) -> list[tuple[int, list[str]]]:
        """What is left to do: (shard index, ids) pairs, `shard_clips` ids each, in the order of the sorted ids.

        Ids not yet done are cut into runs of `shard_clips` and given the free indices in ascending order. For an
        unchanged list of ids this is the same assignment whatever was finished before, in whatever order; ids added
        later go to further shards. Hand every pair to `write_shard` with each id either among the clips or among the
        rejected.
        """
        done = self.done_ids()
        rest = sorted(set(ids) - done)
        taken = set(_shard_indices(self.path))
        runs = [rest[i : i + self.shard_clips] for i in range(0, len(rest), self.shard_clips)]
        free = [index for index in range(len(taken) + len(runs)) if index not in taken]
        return list(zip(free, runs, strict=False))

    def write_shard(self, index: int, clips: Sequence[Clip], rejected: Sequence[dict[str, Any]] = ()) -> None:
        """Write one shard whole or not at all; a shard already there (another process was faster) is kept.

        Each entry of `rejected` is a JSON-able dict with at least "id" and "reason". Both are stored sorted by id.
        Raises StoreError for a clip of wrong shape or type or with a value that is not finite, and when the disk is
        full; earlier shards stay as they are.
        """
        clips = sorted(clips, key=lambda clip: clip.id)
        rejected = sorted(rejected, key=lambda entry: str(entry.get("id", "")))
        ids = [clip.id for clip in clips] + [str(entry.get("id", "")) for entry in rejected]
        for clip_id in ids:
            check_id(clip_id)
        if len(set(ids)) != len(ids):
            raise StoreError(f"{self.path}: shard {index:05d} was given an id twice; ids must be unique")
        for clip in clips:
            self._check(clip)
        final = self.path / "shards" / f"{index:05d}"
        partial = final.with_name(f"{final.name}.partial-{socket.gethostname()}-{os.getpid()}")
        if final.exists():
            return
        try:
            need = sum(len(clip.frames) for clip in clips) * sum(s.frame_bytes for s in self.specs.values())
            if shutil.disk_usage(self.path).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            self._write_files(partial, clips, rejected)
            _sync_folder(partial)
            try:
                os.rename(partial, final)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            _sync_folder(final.parent)
        except OSError as error:
            raise write_error(self.path, f"shard {index:05d}", error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write_files(self, folder: Path, clips: Sequence[Clip], rejected: Sequence[dict[str, Any]]) -> None:
        files: dict[str, dict[str, Any]] = {}
        for name, spec in self.specs.items():
            digest, total = hashlib.sha256(), 0
            with (folder / spec.file).open("wb") as file:
                for clip in clips:
                    block = np.ascontiguousarray(getattr(clip, name), spec.dtype).data
                    file.write(block)
                    digest.update(block)
                    total += block.nbytes
                _sync(file)
            files[spec.file] = {"bytes": total, "sha256": digest.hexdigest()}
        entries: list[dict[str, Any]] = []
        offset = 0
        for clip in clips:
            entry = {"id": clip.id, "label": clip.label, "offset": offset, "frames": len(clip.frames)}
            entries.append(entry | {"source": clip.source, "info": clip.info})
            offset += len(clip.frames)
        _write(folder / "rejected.jsonl", "".join(_dump(entry) + "\n" for entry in rejected))
        _write(folder / "shard.json", _dump({"files": files, "clips": entries}, indent=1))

    def _check(self, clip: Clip) -> None:
        frames = len(clip.frames)
        kinds = {"frames": "u1", "flow": "f2", "tracks": "f4", "visible": "b1", "track_id": "i4"}
        for name, spec in self.specs.items():
            array: NDArray[Any] = getattr(clip, name)
            if frames < 1 or array.shape != (frames, *spec.shape) or array.dtype != np.dtype(kinds[name]):
                want = f"({max(frames, 1)}, {', '.join(map(str, spec.shape))}) {np.dtype(kinds[name])}"
                raise StoreError(f"{self.path}: clip {clip.id}: {name} is {array.shape} {array.dtype}, not {want}")
        for name in ("flow", "tracks"):
            if not np.isfinite(getattr(clip, name)).all():
                raise StoreError(f"{self.path}: clip {clip.id}: {name} holds values that are not finite")
        if clip.flow[-1].any():
            raise StoreError(f"{self.path}: clip {clip.id}: the flow of the last frame is not zero")

    def _remove_leftovers(self) -> None:
        """Drop what dead processes of this machine left half-written; processes of other machines may be alive."""
        for leftover in [*self.path.glob("*.partial-*"), *(self.path / "shards").glob("*.partial-*")]:
            host, _, pid = leftover.name.partition(".partial-")[2].rpartition("-")
            if host == socket.gethostname() and pid.isdigit() and not _alive(int(pid)):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)


class ClipStore:
    """Read a clip store through memory maps opened when first needed. Safe to use from several threads."""

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        """Open a store and check its files' sizes. `partial` allows shards that are not there (yet).

        Raises StoreError when it is missing, no clip store, damaged (names the shard and the mend) or has a gap in
        its shards.
        """
        self.path = Path(path)
        header = _read_header(self.path)
        self.size: int = header["size"]
        self.tracks: int = header["tracks"]
        self.recipe: dict[str, Any] = header["recipe"]
        self.recipe_hash: str = header["recipe_hash"]
        self.specs = array_specs(self.size, self.tracks)
        self.ids: list[str] = []
        self.labels: list[int | str | None] = []
        self.infos: list[dict[str, Any]] = []
        self.sources: list[dict[str, Any]] = []
        lengths, shards, offsets = [], [], []
        indices = _shard_indices(self.path)
        if not partial and indices != list(range(len(indices))):
            gap = next(i for i in range(len(indices)) if i not in set(indices))
            raise StoreError(f"{self.path}: shard {gap:05d} is missing; run the same extract again to complete the store")
        for index in indices:
            shard = _read_shard(self.path, index, self.specs)
            for entry in shard["clips"]:
                self.ids.append(entry["id"])
                self.labels.append(entry["label"])
                self.infos.append(entry["info"])
                self.sources.append(entry["source"])
                lengths.append(entry["frames"])
                shards.append(index)
                offsets.append(entry["offset"])
        if len(set(self.ids)) != len(self.ids):
            twice = next(i for n, i in enumerate(self.ids) if i in self.ids[:n])
            raise StoreError(f"{self.path}: clip {twice!r} is stored twice; extract into a new folder")
        self.lengths: NDArray[np.int64] = np.asarray(lengths, np.int64)
        self._shards = shards
        self._offsets = offsets
        self._shard_indices = indices
        self._maps: OrderedDict[tuple[int, str], NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return int(self.lengths.sum()) * sum(spec.frame_bytes for spec in self.specs.values())

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """What extraction refused, with "id" and "reason" in each."""
        return [entry for index in self._shard_indices for entry in _read_rejected(self.path, index)]

    def window(self, name: str, i: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Frames `start:stop` of array `name` ("frames", "flow", "tracks", "visible", "track_id") of clip `i`, a
        read-only view."""
        length = int(self.lengths[i])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise StoreError(f"{self.path}: clip {self.ids[i]} has {length} frames, asked for {start}:{stop}")
        offset = self._offsets[i]
        return self._map(self._shards[i], name)[offset + start : offset + stop]

    def clip(self, i: int) -> Clip:
        """Clip `i`; its arrays are read-only views of the files (copy before changing or handing to
        torch.from_numpy)."""
        arrays = {name: self.window(name, i) for name in self.specs}
        return Clip(self.ids[i], **arrays, label=self.labels[i], source=self.sources[i], info=self.infos[i])

    def verify(self) -> None:
        """Read everything and compare with the stored SHA-256. Raises StoreError naming the first damaged shard."""
        for index in self._shard_indices:
            files = _read_shard(self.path, index, self.specs)["files"]
            for name in (spec.file for spec in self.specs.values()):  # never a name out of the file
                with (self.path / "shards" / f"{index:05d}" / name).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != files[name].get("sha256"):
                    raise StoreError(f"{self.path}: shard {index:05d} is damaged ({name} has changed); {_MEND}")

    def _map(self, shard: int, name: str) -> NDArray[Any]:
        with self._lock:
            have = self._maps.get((shard, name))
            if have is not None:
                self._maps.move_to_end((shard, name))
                return have
            spec = self.specs[name]
            file = self.path / "shards" / f"{shard:05d}" / spec.file
            dtype = np.dtype(bool) if name == "visible" else np.dtype(spec.dtype)
            try:
                flat = np.memmap(file, dtype, "r")
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.path}: shard {shard:05d} is damaged ({spec.file}: {error}); {_MEND}") from error
            array = np.asarray(flat).reshape(-1, *spec.shape)
            self._maps[shard, name] = array
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)
            return array


# ------------------------------------------------------------------------------------------------------- files and JSON


def _arrays_json(size: int, tracks: int) -> dict[str, Any]:
    specs = array_specs(size, tracks)
    return {name: {"file": s.file, "dtype": s.dtype, "shape": list(s.shape)} for name, s in specs.items()}


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False)


def _read_header(path: Path) -> dict[str, Any]:
    file = path / "store.json"
    if not file.exists():
        raise StoreError(f"{path}: no clip store there (no store.json); run extract first")
    refuse_links(path, StoreError)
    header = read_json(file, StoreError, "extract into a new folder")
    if header.get("format") != FORMAT:
        raise StoreError(f"{file}: is not a clip store of localmotion")
    if header.get("version") != VERSION:
        raise StoreError(f"{file}: is of version {header.get('version')!r:.40}, this program reads {VERSION}; extract it again")
    want = {"size": int, "tracks": int, "shard_clips": int, "recipe": dict, "recipe_hash": str}
    bad = [key for key, kind in want.items() if type(header.get(key)) is not kind]
    fits = not bad and all(1 <= header[key] <= _LARGEST for key in ("size", "tracks"))
    if not fits or header.get("arrays") != _arrays_json(header["size"], header["tracks"]):
        raise StoreError(f"{file}: is damaged ({', '.join(bad) or 'size, tracks or arrays'}); extract into a new folder")
    return header


def _shard_indices(path: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(path / "shards") if re.fullmatch(r"[0-9]{5,9}", name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_shard(path: Path, index: int, specs: dict[str, ArraySpec]) -> dict[str, Any]:
    """A shard's index, checked against the sizes of its files."""
    folder = path / "shards" / f"{index:05d}"
    try:
        shard = parse_json(read_bytes(folder / "shard.json", _MAX_INDEX))
        total = 0
        for entry in shard["clips"]:
            if type(entry["frames"]) is not int or entry["frames"] < 1 or entry["offset"] != total:
                raise ValueError(f"offsets do not add up at clip {entry['id']!r}")
            check_id(entry["id"])
            label = entry.setdefault("label")
            if type(entry["info"]) is not dict or type(entry["source"]) is not dict or not isinstance(label, int | str | None):
                raise ValueError(f"entry of clip {entry['id']!r} lacks info or source, or its label is neither number nor text")
            total += entry["frames"]
        for spec in specs.values():
            status, want = (folder / spec.file).stat(), total * spec.frame_bytes
            if not stat.S_ISREG(status.st_mode) or status.st_size != want or shard["files"][spec.file]["bytes"] != want:
                raise ValueError(f"{spec.file} has {status.st_size} bytes, not {want}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(f"{path}: shard {index:05d} is damaged ({one_line(error)}); {_MEND}") from error
    return dict(shard)


def _read_rejected(path: Path, index: int) -> list[dict[str, Any]]:
    try:
        lines = read_bytes(path / "shards" / f"{index:05d}" / "rejected.jsonl", _MAX_INDEX).decode().splitlines()
        entries = [parse_json(line) for line in lines]
        for entry in entries:
            check_id(entry["id"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(f"{path}: shard {index:05d} is damaged (rejected.jsonl: {one_line(error)}); {_MEND}") from error
    return entries


def _other_recipe(path: Path, key: str, have: dict[str, Any], want: dict[str, Any]) -> str:
    if key in ("recipe", "recipe_hash"):
        old, new = have["recipe"], want["recipe"]
        keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        what = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys[:4]) or "hash only"
        return (
            f"{path}: holds a store of recipe {have['recipe_hash']}, asked for {want['recipe_hash']} ({what}); "
            "use the same recipe or another folder"
        )
    return f"{path}: holds a store with {key} {have[key]}, asked for {want[key]}; use the same setting or another folder"


def _write(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        _sync(file)


def _write_atomic(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        _write(partial, text)
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # nothing of this process is under way when a store is opened
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
