"""The manifest: the videos of an extraction, listed once, so that any number of parts extract them without walking a folder.

    m.jsonl            a header line, then one JSON object for each video, sorted by id
    m.jsonl.offsets    where each line of a video begins, and the end: int64. It is made again if it is missing.
    m.jsonl.partial    an unfinished listing; the same scan continues it

The header holds the folder, the list, the camera, the limits by which videos are cut into clips, the number of videos and the SHA-256 of
their lines. A store that was begun with a manifest refuses another one. A line holds `id`, `bytes` and `mtime_ns`, and if they apply
`path` (below the folder, or absolute; else the id), `kind`, `label`, `warning`, `frames` (by a list or a decoded picture count) and
`fault` (reason and detail). Scan adds what it found while decoding. Nothing of that is used by an extraction.

Videos are cut into clips while they are decoded, because the number of kept frames depends on the recipe. So a manifest lists videos, and
shard i of an extraction holds the clips of the videos i N to (i + 1) N, in the order of the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError
from localmotion.files import Lock, one_line, parse_json
from localmotion.video.history import Limits, size_and_time, unambiguous
from localmotion.video.lerobot import PREFIX, DataSet, is_lerobot, read_data_set
from localmotion.video.refs import VideoRef
from localmotion.video.sources import open_videos

FORMAT, VERSION = "localmotion-manifest", 1
_HEADER = 1 << 16  # maximum bytes of the header line
_CHUNK = 256  # videos whose size and time one thread reads
_FIX = "make it again with localmotion scan VIDEOS --manifest FILE"


@dataclass(frozen=True)
class Listed:
    """A video of a manifest, and its size in bytes when it was listed (None: it could not be read, or is a data set's episode)."""

    ref: VideoRef
    bytes: int | None


class Manifest:
    """A manifest on disk. It reads the lines that are asked for."""

    def __init__(self, path: str | Path) -> None:
        """Open it and read its header. Raises ConfigError if it is missing, not a manifest, or damaged."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                line = file.readline(_HEADER)
                self._begin, self._end = file.tell(), file.seek(0, os.SEEK_END)
            header = parse_json(line)
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ValueError("is not a manifest of localmotion")
            if header.get("version") != VERSION:
                raise ValueError(f"is of version {header.get('version')!r:.40}, this program reads {VERSION}")
            self.header: dict[str, Any] = header
            self.limits = Limits.from_json(header)
            self.videos: int = header["videos"]
            self.source: str = header["source"]
            self.camera: str = header["camera"]
            kinds = {self.videos: int, header["sha256"]: str, self.source: str, self.camera: str}
            if any(type(value) is not kind for value, kind in kinds.items()):
                raise TypeError("a value of its header has another type")
            check_limits(self.limits)
            self._offsets = self._find_offsets()
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise ConfigError(f"{self.path}: cannot be read as a manifest ({one_line(error)}); {_FIX}") from error

    def _find_offsets(self) -> NDArray[np.int64]:
        beside = offsets_file(self.path)
        if beside.is_file() and beside.stat().st_size == 8 * (self.videos + 1):
            found: NDArray[np.int64] = np.memmap(beside, np.int64, "r")
        else:
            found = _offsets(self.path, self._begin)
        if len(found) != self.videos + 1 or found[0] != self._begin or found[-1] != self._end:
            raise ValueError(f"has not the {self.videos} lines that its header promises")
        return found

    def listed(self, start: int, stop: int) -> list[Listed]:
        """The videos ``start`` to ``stop`` by their numbers. Raises ConfigError for a damaged line."""
        stop = min(stop, self.videos)
        if start >= stop:
            return []
        known = self._episodes
        offset = int(self._offsets[start])
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                lines = file.read(int(self._offsets[stop]) - offset).splitlines()
            if len(lines) != stop - start:
                raise ValueError("offsets do not fit")
            return [self._read(line, known) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"videos {start} to {stop}: {one_line(error)}"
            raise ConfigError(f"{self.path}: cannot be read as a manifest ({what}); {_FIX}") from error

    def _read(self, line: bytes, episodes: Mapping[str, VideoRef]) -> Listed:
        entry = parse_json(line)
        if is_lerobot(self.source):
            return Listed(episodes[entry["id"]], None)
        fault, kind = entry.get("fault"), entry.get("kind", "file")
        if kind not in ("file", "frames"):
            raise ValueError(f"{entry['id']!r:.100} is of kind {kind!r:.40}")
        path = os.path.join(self.source, entry.get("path", entry["id"]))
        ref = VideoRef(
            entry["id"],
            Path(path),
            kind,
            entry.get("label"),
            entry.get("frames"),
            tuple(fault) if fault else None,
            entry.get("warning", ""),
        )
        return Listed(ref, entry["bytes"])

    @cached_property
    def data_set(self) -> DataSet | None:
        """The LeRobot data set that it lists, if it lists one."""
        return read_data_set(self.source, self.camera) if is_lerobot(self.source) else None

    @cached_property
    def _episodes(self) -> dict[str, VideoRef]:
        """The episodes of a data set. Its own metadata say where each lies, so they are read there and not repeated."""
        return {ref.id: ref for ref in self.data_set.refs} if self.data_set else {}


def check_limits(limits: Limits) -> None:
    """Raise ConfigError for limits by which no video can be cut."""
    least, most, clips = limits.min_frames, limits.max_frames, limits.max_clips
    if clips is not None and clips < 1:
        raise ConfigError(f"max_clips={clips}: at least one clip of a video")
    if not 2 <= max(least, 2) <= most:
        raise ConfigError(f"min_frames {least} and max_frames {most}: at least 2 frames, and no more than max_frames")


def offsets_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.offsets")


def write_manifest(
    path: Path,
    source: str | Path,
    refs: Sequence[VideoRef],
    limits: Limits,
    *,
    list_file: Path | None = None,
    camera: str = "",
    details: Callable[[VideoRef], Mapping[str, Any]] = lambda ref: {},
    threads: int = 16,
    progress: Callable[[int, int], Any] | None = None,
) -> Manifest:
    """Write the manifest of the videos ``refs`` of ``source`` (see `open_videos`). Continues an unfinished one.

    Of a data set's episodes the rest is kept (`Limits.keep_rest`). Sizes and times are read by ``threads`` threads, because a file system
    in the network answers slowly, but many at once. ``details``: further values of a line. Raises ConfigError for invalid limits,
    LocalmotionError if it cannot be written or another process writes it.
    """
    limits = replace(limits, keep_rest=is_lerobot(source))
    check_limits(limits)
    refs = sorted(unambiguous(refs), key=lambda ref: ref.id)
    root = str(source) if is_lerobot(source) else str(Path(source).resolve())
    if is_lerobot(source):
        root = PREFIX + str(Path(root.removeprefix(PREFIX)).resolve())
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "source": root,
        "list": list_file and str(Path(list_file).resolve()),
        "camera": camera,
        **limits.to_json(),
    }
    base = os.path.dirname(root) if os.path.isfile(root) else root
    header["source"] = root if is_lerobot(source) else base
    partial = path.with_name(f"{path.name}.partial")
    lock: Lock | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(path.with_name(f"{path.name}.lock"))
        if not lock.taken:
            raise LocalmotionError(f"{path}: another scan writes it ({lock.holder()}); wait until it ends")
        _write(partial, header, _lines(refs, base, Path(source), details, threads), [ref.id for ref in refs], progress)
        os.replace(offsets_file(partial), offsets_file(path))
        os.replace(partial, path)
    except OSError as error:
        raise LocalmotionError(f"{path}: cannot write the manifest ({error.strerror})") from error
    finally:
        if lock is not None:
            lock.path.unlink(missing_ok=True)
            lock.release()
    return Manifest(path)


def list_videos(path: Path, source: Path, limits: Limits, *, list_file: Path | None, camera: str, progress: Any) -> list[str]:
    """Write the manifest of a folder or data set (see `open_videos`) without decoding anything. Returns printable lines."""
    refs, _ = open_videos(source, list_file, camera)
    written = write_manifest(path, source, refs, limits, list_file=list_file, camera=camera, progress=progress)
    faults = Counter(ref.fault[0] for ref in refs if ref.fault)
    lines = [f"manifest: {path}, {written.videos} videos, {written.videos - faults.total()} of them to be decoded"]
    return [*lines, *(f"  rejected  {reason:<18}{count:>6}" for reason, count in sorted(faults.items()))]


Lines = Callable[[int], Iterator[bytes]]


def _lines(
    refs: Sequence[VideoRef], base: str, source: Path, details: Callable[[VideoRef], Mapping[str, Any]], threads: int
) -> Lines:
    """A function that yields the lines from a number on."""

    def chunk(start: int) -> list[bytes]:
        return [_line(ref, base, str(source), details(ref)) for ref in refs[start : start + _CHUNK]]

    def lines(first: int) -> Iterator[bytes]:
        with ThreadPoolExecutor(threads) as pool:
            ahead = threads * 4 * _CHUNK
            for begin in range(first, len(refs), ahead):  # `map` would take all chunks at once
                for found in pool.map(chunk, range(begin, min(begin + ahead, len(refs)), _CHUNK)):
                    yield from found

    return lines


def _line(ref: VideoRef, base: str, source: str, details: Mapping[str, Any]) -> bytes:
    entry: dict[str, Any] = {"id": ref.id, **size_and_time(ref)} if ref.fault is None else {"id": ref.id, "bytes": None}
    place = os.fspath(ref.path)
    relative = place.removeprefix(f"{source}{os.sep}")
    if place == source:  # one file, or the pictures of the folder itself
        relative = os.path.relpath(os.path.realpath(place), base)
    if relative != ref.id and ref.rows is None:
        entry["path"] = relative if relative != place or os.path.isabs(place) else os.path.abspath(place)
    optional = {
        "label": ref.label,
        "frames": details.get("frames", ref.frames_hint),
        "fault": ref.fault,
        "warning": ref.warning or None,
    }
    optional["kind"] = ref.kind if ref.kind != "file" else None
    entry |= {key: value for key, value in optional.items() if value is not None}
    return json.dumps({**details, **entry}, sort_keys=True).encode() + b"\n"


def _write(
    partial: Path,
    header: dict[str, Any],
    lines: Lines,
    ids: Sequence[str],
    progress: Callable[[int, int], Any] | None,
) -> None:
    """Write header and lines into ``partial``, and the offsets beside it. The header is complete only at the end."""
    draft = json.dumps(header, sort_keys=True).encode()
    room = len(draft) + 200
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        kept, digest = _kept(file, draft.ljust(room) + b"\n", ids)
        file.seek(0)
        file.truncate(kept[-1])
        file.write(draft.ljust(room) + b"\n")
        file.seek(kept[-1])
        offsets = np.zeros(len(ids) + 1, np.int64)
        offsets[: len(kept)] = kept
        for number, line in enumerate(lines(len(kept) - 1), len(kept)):
            file.write(line)
            digest.update(line)
            offsets[number] = offsets[number - 1] + len(line)
            if progress and (number % 1000 == 0 or number == len(ids)):
                progress(number, len(ids))
        full = json.dumps({**header, "videos": len(ids), "sha256": digest.hexdigest()}, sort_keys=True).encode()
        file.seek(0)
        file.write(full.ljust(room) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    offsets.tofile(offsets_file(partial))


def _kept(file: IO[bytes], first: bytes, ids: Sequence[str]) -> tuple[list[int], Any]:
    """Offsets (with the end) of the lines of an unfinished manifest that still fit, and their hash."""
    offsets, digest = [len(first)], hashlib.sha256()
    if file.readline() == first:
        for line, name in zip(file, ids, strict=False):
            try:
                if not line.endswith(b"\n") or json.loads(line)["id"] != name:
                    break
            except (ValueError, KeyError, TypeError):
                break
            digest.update(line)
            offsets.append(offsets[-1] + len(line))
    return offsets, digest


def _offsets(path: Path, begin: int) -> NDArray[np.int64]:
    """Where each line after the header begins, and the end."""
    found = [np.array([begin], np.int64)]
    with path.open("rb") as file:
        file.seek(begin)
        at = begin
        while block := file.read(1 << 24):
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10).astype(np.int64) + at + 1)
            at += len(block)
    return np.concatenate(found)
