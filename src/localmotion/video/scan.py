"""Examine a folder of videos before anything is computed: which are usable, and why the others are not.

Every video is decoded once to 64x64. It is rejected if it cannot be decoded completely, is too short, shows no motion,
or repeats another one. Unusual encodings that decode well (rotation, variable frame rate, more than 8 bits, odd sizes,
pixels that are not square, cuts, repeated frames) are warnings.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError, VideoError
from localmotion.files import parse_json
from localmotion.video.decode import VideoInfo, iter_frames, memory_fault, probe
from localmotion.video.history import Limits, size_and_time
from localmotion.video.listing import VideoRef, shown
from localmotion.video.manifest import write_manifest
from localmotion.video.sources import open_videos
from localmotion.video.workers import MEMORY_LIMIT, TIME_LIMIT, Lost, limited_memory, map_isolated

SCAN_SIZE = 64
STATIC_RANGE = 8.0
"""A clip is static if 99.5 % of its 64x64 grey pixels stay within this range (0..255) from its first to its last picture.
Unlike the mean difference of successive pictures, this measure ignores sensor noise and detects slow or small motion.
Measured on 884 real clips: the one clip of a resting arm has 3, all others 46 or more (median 232)."""
CUT_CHANGE = 25.0
"""A cut is suspected if the mean difference of two pictures is above this and above six times the clip's median."""
REPEATED = 0.3
"""The warning "repeated_frames" is given above this share of pictures equal to the one before (frame rate raised by
doubling frames)."""


@dataclass(frozen=True)
class VideoReport:
    """Result of the scan for one video."""

    id: str
    usable: bool
    reason: str = ""
    """Reason code if not usable: those of `find_videos` and `probe`, and too_short, mixed_sizes, static, duplicate,
    decoder_crash, decoder_timeout, decoder_memory."""
    detail: str = ""
    warnings: tuple[str, ...] = ()
    """`code: detail` each: rotation, mirrored, interlaced, hdr, vfr, high_bit_depth, odd_size, pixel_aspect, scene_cut, repeated_frames,
    list_mismatch, skipped_numbers."""
    kind: str = "file"
    label: int | str | None = None
    bytes: int = 0
    info: VideoInfo | None = None
    motion: float | None = None
    """Mean absolute difference of successive 64x64 grey pictures, grey levels."""
    content: str | None = None
    """Hash of the decoded 64x64 pictures: equal for copies and for the same stream in another container."""


@dataclass(frozen=True)
class ScanReport:
    """Results for all videos of a folder, sorted by id."""

    root: str
    min_frames: int
    videos: tuple[VideoReport, ...]
    refs: tuple[VideoRef, ...] = field(default=(), repr=False)
    """The videos themselves, in the same order."""
    list_file: Path | None = None
    camera: str = ""

    @property
    def usable(self) -> list[VideoReport]:
        return [video for video in self.videos if video.usable]

    @property
    def rejected(self) -> list[VideoReport]:
        return [video for video in self.videos if not video.usable]

    def summary(self) -> dict[str, Any]:
        """Counts: videos, usable, frames of the usable ones, rejected per reason, warnings per code; quantiles of
        the frames."""
        lengths = [video.info.frames for video in self.usable if video.info]
        quantiles = [int(q) for q in np.quantile(lengths, (0, 0.5, 1), method="nearest")] if lengths else []
        return {
            "root": self.root,
            "min_frames": self.min_frames,
            "videos": len(self.videos),
            "usable": len(self.usable),
            "frames": sum(lengths),
            "frames_min_median_max": quantiles,
            "rejected": dict(sorted(Counter(video.reason for video in self.rejected).items())),
            "warnings": dict(sorted(Counter(text.partition(":")[0] for video in self.usable for text in video.warnings).items())),
        }

    def table(self, examples: int = 3) -> list[str]:
        """Printable lines: totals, then one line per reason and per warning with its count and the first few videos."""
        rejected = self.rejected
        found = self.summary()
        lines = [f"{found['usable']} of {found['videos']} videos usable, {found['frames']} frames"]
        if found["frames_min_median_max"]:
            lines[0] += " ({} to {} a video, median {})".format(*(found["frames_min_median_max"][i] for i in (0, 2, 1)))
        if rejected:
            lines.append(f"{len(rejected)} rejected")
        for reason, count in found["rejected"].items():
            which = [f"{shown(v.id)} ({v.detail})" for v in rejected if v.reason == reason][:examples]
            lines.append(f"  rejected  {reason:<18}{count:>6}  {'; '.join(which)}{' ...' if count > examples else ''}")
        for code, count in found["warnings"].items():
            texts = [(v.id, w.partition(": ")) for v in self.usable for w in v.warnings]
            which = [f"{shown(name)} ({text[2]})" for name, text in texts if text[0] == code][:examples]
            lines.append(f"  warning   {code:<18}{count:>6}  {'; '.join(which)}{' ...' if count > examples else ''}")
        return lines

    def nothing_usable(self) -> str | None:
        """One line if no video of the folder is usable (number, reasons, first video); else None."""
        rejected = self.rejected
        if not rejected or len(rejected) < len(self.videos):
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.summary()["rejected"].items())
        first = rejected[0]
        return f"{self.root}: none of {len(rejected)} videos is usable ({reasons}); the first: {shown(first.id)}: {first.detail}"

    def save(self, path: str | Path, *, max_frames: int = 300, max_clips: int | None = None) -> None:
        """Write the manifest `path` and the summary beside it (`x.jsonl` -> `x.summary.json`), each atomically.

        A line of the manifest (see `video.manifest`) also has the values of `VideoReport`. ``max_frames`` and ``max_clips``: how an
        extraction with this manifest cuts videos. A path without extension is a folder, see `manifest_path`.
        """
        path = manifest_path(path)
        reports = {video.id: video for video in self.videos}

        def details(ref: VideoRef) -> dict[str, Any]:
            report = reports[ref.id]
            return asdict(report) | ({"frames": report.info.frames} if report.info else {})

        limits = Limits(self.min_frames, max_frames, max_clips)
        write_manifest(path, self.root, self.refs, limits, list_file=self.list_file, camera=self.camera, details=details)
        try:
            _write(path.with_suffix(".summary.json"), json.dumps(self.summary(), indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise LocalmotionError(f"{path}: cannot write the manifest ({error.strerror})") from error


def manifest_path(path: str | Path) -> Path:
    """The manifest that `path` names: a file, or manifest.jsonl in a folder, which is a path without extension."""
    return Path(path) if Path(path).suffix else Path(path) / "manifest.jsonl"


def scan(
    root: Path,
    *,
    min_frames: int = 25,
    list_file: Path | None = None,
    camera: str = "",
    workers: int = 1,
    progress: Callable[[int, int], Any] | None = None,
    timeout: float = TIME_LIMIT,
    memory: int | None = MEMORY_LIMIT,
    journal: Path | None = None,
) -> ScanReport:
    """Examine every video of `root` (see `open_videos`) in `workers` worker processes.

    `progress(done, total)` is called after each video. If a decoder crashes, takes more than `timeout` seconds, or needs
    more than `memory` bytes (None: no limit), only its own video is rejected ("decoder_crash", "decoder_timeout",
    "decoder_memory"). The report does not depend on the number of workers. `workers=0` decodes in this process, which
    starts faster but has no such limits; use it for videos that you trust.

    `journal`: a file with the results so far. The same scan after an interruption examines only the other videos and those whose
    size or time has changed. Remove it when the report is saved. Raises VideoError only for errors of the folder or the list as a
    whole, LocalmotionError if the journal cannot be written.
    """
    refs, _ = open_videos(Path(root), list_file, camera)
    refs = sorted(refs, key=lambda ref: ref.id)
    with closing(Journal(journal, min_frames)) if journal else nullcontext() as kept:
        reports = [report for ref in refs if (report := kept.get(ref))] if kept else []
        have = {report.id for report in reports}
        rest = {ref.id: ref for ref in refs if ref.id not in have}
        for done, report in enumerate(_examine_all(list(rest.values()), min_frames, workers, timeout, memory), len(reports) + 1):
            reports.append(report)
            if kept:
                kept.put(rest[report.id], report)
            if progress is not None:
                progress(done, len(refs))
    ordered = sorted(reports, key=lambda video: video.id)
    return ScanReport(str(root), min_frames, tuple(_mark_duplicates(ordered)), tuple(refs), list_file, camera)


def examine(ref: VideoRef, min_frames: int, memory: int | None = None) -> VideoReport:
    """Result for one video, without the check for duplicates; `memory` as in `limited_memory`."""
    report = VideoReport(ref.id, True, kind=ref.kind, label=ref.label)
    try:
        with limited_memory(memory):
            report = replace(report, bytes=_bytes(ref))
            report = replace(report, info=(info := probe(ref)))
            if ref.rows:
                ref.rows.read(1)
            motion = _Motion()
            for frame in iter_frames(ref, SCAN_SIZE):
                motion.add(frame)
        info = replace(info, frames=motion.frames)
        warnings = (*_encoding_warnings(ref, info), *motion.warnings())
        report = replace(
            report, info=info, motion=round(motion.mean, 4), content=motion.digest.hexdigest()[:32], warnings=warnings
        )
        if info.frames < min_frames:
            raise VideoError(ref.path, "too_short", f"{info.frames} frames, {min_frames} needed")
        if motion.range < STATIC_RANGE:
            detail = f"no motion: 99.5 % of the pixels stay within {motion.range:.0f} of 255 grey levels"
            raise VideoError(ref.path, "static", detail)
    except MemoryError:
        return replace(report, usable=False, reason=(fault := memory_fault(ref.path)).reason, detail=fault.detail)
    except VideoError as error:
        return replace(report, usable=False, reason=error.reason, detail=error.detail)
    return report


class Journal:
    """The results of an unfinished scan, one JSON line each."""

    def __init__(self, path: Path, min_frames: int) -> None:
        self.path, self.min_frames = path, min_frames
        self._found: dict[str, tuple[Any, dict[str, Any]]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._file.seek(0)
            for line in self._file:
                with suppress(ValueError, KeyError, TypeError):  # the last line of a killed scan
                    entry = parse_json(line)
                    self._found[entry["report"]["id"]] = entry["stamp"], entry["report"]
            self._file.write(b"\n" if self._found else b"")
        except OSError as error:
            raise LocalmotionError(f"{path}: cannot write the results of the scan ({error.strerror})") from error

    def _stamp(self, ref: VideoRef) -> dict[str, Any]:
        return {**size_and_time(ref), "min_frames": self.min_frames, "label": ref.label, "fault": list(ref.fault or ())}

    def get(self, ref: VideoRef) -> VideoReport | None:
        """The result of a video that has not changed."""
        stamp, values = self._found.get(ref.id, (None, {}))
        if stamp != self._stamp(ref):
            return None
        try:
            info = VideoInfo(**values["info"]) if values["info"] else None
            return VideoReport(**{**values, "info": info, "warnings": tuple(values["warnings"])})
        except (KeyError, TypeError):
            return None

    def put(self, ref: VideoRef, report: VideoReport) -> None:
        """Keep a result."""
        try:
            self._file.write(json.dumps({"stamp": self._stamp(ref), "report": asdict(report)}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise LocalmotionError(f"{self.path}: cannot write the results of the scan ({error.strerror})") from error

    def close(self) -> None:
        self._file.close()


class _Motion:
    """Running statistics of a clip's pictures, in bounded memory."""

    def __init__(self) -> None:
        self.frames = 0
        self.digest = hashlib.sha256()
        self.changes: list[float] = []
        self._last = self._low = self._high = np.zeros((SCAN_SIZE, SCAN_SIZE), np.uint8)

    def add(self, frame: NDArray[np.uint8]) -> None:
        self.digest.update(frame.tobytes())
        grey = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)
        if self.frames:
            self.changes.append(float(cv2.absdiff(grey, self._last).mean()))
            self._low, self._high = np.minimum(self._low, grey), np.maximum(self._high, grey)
        else:
            self._low = self._high = grey
        self._last = grey
        self.frames += 1

    @property
    def mean(self) -> float:
        return float(np.mean(self.changes)) if self.changes else 0.0

    @property
    def range(self) -> float:
        """Range of grey levels within which 99.5 % of the pixels stay."""
        return float(np.percentile(self._high - self._low, 99.5))

    def warnings(self) -> Iterator[str]:
        changes = np.asarray(self.changes or [0.0])
        cuts = np.flatnonzero((changes > CUT_CHANGE) & (changes > 6 * np.median(changes))) + 1
        if len(cuts):
            yield f"scene_cut: {len(cuts)} suspected, first at frame {cuts[0]}"
        if (share := float((changes == 0).mean())) > REPEATED:
            yield f"repeated_frames: {share:.0%} of the pictures equal the one before"


def _encoding_warnings(ref: VideoRef, info: VideoInfo) -> Iterator[str]:
    if info.rotation:
        yield f"rotation: shown rotated by {info.rotation} degrees"
    if info.mirrored:
        yield "mirrored: shown with left and right swapped"
    if info.interlaced:
        yield "interlaced: a picture has lines of two moments; deinterlaced"
    if info.hdr:
        yield f"hdr: {info.hdr.upper()}, mapped to standard range"
    if info.vfr:
        yield "vfr: variable frame rate; pictures are used as if equally spaced, unless an fps is given"
    if info.bits > 8:
        yield f"high_bit_depth: {info.bits} bits, reduced to 8"
    if info.width % 2 or info.height % 2:
        yield f"odd_size: {info.width}x{info.height}"
    if abs(info.pixel_aspect - 1) > 0.01:
        yield f"pixel_aspect: pixels of {info.pixel_aspect:.3f}:1"
    if ref.warning:
        yield ref.warning
    if ref.frames_hint not in (None, info.frames):
        yield f"list_mismatch: the list says {ref.frames_hint} frames, the {'file' if ref.kind == 'file' else 'folder'} has {info.frames}"


def _examine_all(
    refs: Sequence[VideoRef], min_frames: int, workers: int, timeout: float, memory: int | None
) -> Iterator[VideoReport]:
    if workers <= 0:
        yield from map(partial(examine, min_frames=min_frames), refs)
        return
    function = partial(examine, min_frames=min_frames, memory=memory)
    for index, result in map_isolated(function, refs, workers, timeout):
        if isinstance(result, Lost):
            ref = refs[index]
            yield VideoReport(ref.id, False, result.reason, result.detail, kind=ref.kind, label=ref.label)
        else:
            yield result


def _mark_duplicates(reports: list[VideoReport]) -> Iterator[VideoReport]:
    """The first usable video of equal content stays usable."""
    first: dict[str, str] = {}
    for report in reports:
        original = first.setdefault(report.content, report.id) if report.usable and report.content else report.id
        if original != report.id:
            report = replace(report, usable=False, reason="duplicate", detail=f"shows the same frames as {shown(original)}")
        yield report


def _bytes(ref: VideoRef) -> int:
    ref.check()
    try:
        files = [ref.path] if ref.kind != "frames" else [Path(entry.path) for entry in os.scandir(ref.path)]
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError as error:
        raise VideoError(ref.path, "unreadable", f"cannot be read: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    partial_path = path.with_name(f"{path.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        partial_path.write_text(text, encoding="utf-8")
        os.replace(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)
