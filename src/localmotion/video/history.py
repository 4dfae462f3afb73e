"""Records of the videos that a store was made from, and the choice of videos that must be processed again."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from localmotion.files import read_bytes
from localmotion.video.listing import IMAGE_SUFFIXES, VideoRef, shown
from localmotion.video.writer import Known

MACHINE = ("decoder_timeout", "decoder_memory")
"""Reasons of rejection that the machine may have caused. Every extraction tries such videos again."""
_SAMPLE = 1 << 24  # bytes hashed at each end of a file, to detect a plain copy: enough for any index of frames
_PICTURE = 1 << 16  # bytes hashed at the start of each picture


@dataclass(frozen=True)
class Limits:
    """How videos are cut into clips, in kept frames."""

    min_frames: int
    max_frames: int
    max_clips: int | None = None
    """Maximum number of clips per video; None for all."""
    keep_rest: bool = False
    """Whether a rest below `min_frames` becomes a part of the clip before it, so that no reward and no end of a logged episode is lost."""

    @property
    def least(self) -> int:
        """Fewest frames of a clip."""
        return max(self.min_frames, 2)

    def spans(self, frames: int) -> list[tuple[int, int]]:
        """(start, stop) of the clips of a video with ``frames`` frames: `max_frames` each. A rest below `min_frames` is left out, or
        with `keep_rest` it belongs to the clip before it."""
        starts = list(range(0, frames, self.max_frames))[: self.max_clips]
        spans = [(start, min(start + self.max_frames, frames)) for start in starts]
        found = [(start, stop) for start, stop in spans if stop - start >= self.least]
        if self.keep_rest and found and len(found) < len(spans):
            found[-1] = found[-1][0], spans[-1][1]
        return found

    def to_json(self) -> dict[str, int | bool | None]:
        return {key: value for key, value in asdict(self).items() if key != "keep_rest" or value}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Limits:
        """The limits of a record or header by `to_json`. Those of earlier versions never kept a rest."""
        return cls(found["min_frames"], found["max_frames"], found["max_clips"], found.get("keep_rest", False))


def clip_id(video: str, start: int, stop: int) -> str:
    """Id of a clip of a video. The first clip has the video's id."""
    return video if start == 0 else f"{video}#{start:06d}-{stop:06d}"


SPAN = re.compile(r"(.+)#[0-9]{6,}-[0-9]{6,}", re.DOTALL)
"""Pattern of the ids that `clip_id` makes. A video with such a name would be confused with a part of the video it names."""


def unambiguous(refs: Iterable[VideoRef]) -> Iterator[VideoRef]:
    """The videos. A video with the name of a part of another video gets a fault."""
    refs = list(refs)
    names = {ref.id for ref in refs}
    for ref in refs:
        part = SPAN.fullmatch(ref.id)
        if part and part[1] in names:
            ref = replace(ref, fault=("bad_name", f"has the name of a part of {shown(part[1])}; rename it"))
        yield ref


def size_and_time(ref: VideoRef) -> dict[str, int | None]:
    """`bytes` and `mtime_ns` of a video; for a frame folder the sum and the newest of its pictures. None if it cannot be reached."""
    try:
        found = [path.stat() for path in _files(ref)]
        if not found or not all(stat.S_ISREG(status.st_mode) for status in found):
            raise OSError("is no regular file")
        return {"bytes": sum(s.st_size for s in found), "mtime_ns": max(s.st_mtime_ns for s in found)}
    except (OSError, ValueError):
        return {"bytes": None, "mtime_ns": None}


def content(ref: VideoRef) -> str | None:
    """Hash of the first and last 16 MiB of a file, or of the start of each picture; None if it cannot be read.

    It distinguishes a video that was copied or touched from one whose content changed without a change of size.
    """
    digest = hashlib.sha256()
    try:
        for path in _files(ref):
            size = path.stat().st_size
            if ref.kind == "frames":
                digest.update(f"{path.name}:{size}:".encode("utf-8", "surrogateescape"))
                digest.update(read_bytes(path, size)[:_PICTURE] if size <= _PICTURE else _ends(path, _PICTURE, 0))
            else:
                digest.update(_ends(path, _SAMPLE, _SAMPLE if size > _SAMPLE else 0))
    except (OSError, ValueError):
        return None
    return digest.hexdigest()[:32]


def outdated(known: Known, ref: VideoRef, limits: Limits) -> str:
    """Why a video must be processed again: "changed", "limits" or "machine"; empty if the store holds its current result.

    Entries of earlier versions without a record of their video are kept, except rejections that the machine may have caused and videos
    that are long enough now.
    """
    if known.reason in MACHINE:
        return "machine"
    record = known.record
    if record is None:
        frames = re.match(r"has (\d{1,9}) frames", known.detail) if known.reason == "too_short" else None
        return "limits" if frames and limits.spans(int(frames[1])) else ""
    if ref.fault is not None:
        return "" if known.reason == ref.fault[0] else "changed"
    if record.get("fault") or _changed(record, ref, known.reason == "unreadable"):
        return "changed"
    before = Limits.from_json(record)
    if known.reason not in ("", "too_short"):
        return "limits" if before.max_clips != limits.max_clips else ""
    if record["more"] and (limits.max_clips is None or limits.max_clips > known.clips):
        return "limits"
    return "limits" if before.spans(record["frames"]) != limits.spans(record["frames"]) else ""


def check_record(record: dict[str, Any]) -> bool:
    """Whether a line of `videos.jsonl` is one that this version understands."""
    numbers = all(type(record.get(key)) is int and record[key] >= 0 for key in ("frames", "min_frames", "max_frames", "left_out"))
    optional = all(type(record.get(key)) in (int, type(None)) for key in ("bytes", "mtime_ns", "max_clips"))
    kinds = type(record.get("more")) is type(record.get("keep_rest", False)) is bool and type(record.get("content")) in (
        str,
        type(None),
    )
    return numbers and optional and kinds and record["max_frames"] > 0


def _changed(record: dict[str, Any], ref: VideoRef, unreadable: bool) -> bool:
    now = size_and_time(ref)
    if record["bytes"] != now["bytes"]:
        return True
    closed = unreadable and record["content"] is None  # permissions may have changed, with the same size and time
    if record["mtime_ns"] == now["mtime_ns"] and not closed:
        return False
    return record["content"] != content(ref)  # only copied or touched?


def _files(ref: VideoRef) -> list[Path]:
    if ref.kind != "frames":
        return [ref.path, *({ref.rows.file} - {ref.path} if ref.rows else ())]
    names = sorted(os.listdir(ref.path))
    return [ref.path / name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]


def _ends(path: Path, head: int, tail: int) -> bytes:
    """The first and last bytes of a regular file."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        first = file.read(head)
        file.seek(max(status.st_size - tail, len(first)))
        return first + file.read(tail)
