"""Run `scan` and `extract` on one part of the corpus and check the promises."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from localmotion.perception.extract import extract_folder
from localmotion.recipe import Recipe
from localmotion.video import ClipStore, VideoRef, decode, find_videos
from localmotion.video.libav import LENIENT_METADATA
from localmotion.video.scan import scan
from localmotion.video.workers import Lost, map_isolated
from soak.mutations import make
from soak.sources import Source, digest

_SCALING = 0x20 | 0x2000 | 0x4000 | 0x40000 | 0x80000  # swscale.h: area, full chroma, accurate, bit-exact
RECIPE = Recipe(size=64, percept_size=64, tracks=4, redraw_rounds=0)
MIN_FRAMES = 8
PROMISES = (
    "every file is usable or rejected with a reason",
    "every reason has a detail on one line",
    "no file takes longer than the limit",
    "no worker takes more memory than the limit",
    "scan and extract agree about what is usable",
    "stored frames are those of the file decoded alone",
    "undamaged files come out as they went in",
    "files that hold no video are rejected",
    "the number of workers changes nothing",
    "the process that called lives",
)
ONLY_SCAN = ("static", "duplicate")
"""Reasons that only the scan reports. Such a video can be decoded, and extraction accepts it."""


@dataclass(frozen=True)
class Limits:
    """Limits for one file in its worker: seconds, bytes for decoding, and bytes of the idle process."""

    seconds: float = 60.0
    memory: int = 512 * 2**20
    idle: int = 512 * 2**20


@dataclass
class Entry:
    """One id of the corpus and its results."""

    id: str
    family: str
    kind: str
    source: str
    accept: str | None
    reject: bool
    scanned: str | None = None
    """The scan's reason for rejection. Empty if usable, None if the scan did not list the file."""
    extracted: str | None = None
    detail: str = ""
    seconds: float = 0.0
    memory: int = 0
    """Highest resident memory of the worker that processed the file, in bytes."""


@dataclass
class Findings:
    """Findings of a part: its entries, the number of checks of each promise, and the broken cases."""

    entries: dict[str, Entry]
    checked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROMISES, 0))
    broken: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in PROMISES})
    differences: dict[str, int] = field(default_factory=dict)
    """Allowed differences between scan and extraction, with their counts."""

    def check(self, promise: str, holds: bool, text: str) -> None:
        self.checked[promise] += 1
        if not holds:
            self.broken[promise].append(text)

    def to_json(self) -> dict[str, Any]:
        return {
            "entries": [asdict(entry) for entry in self.entries.values()],
            "checked": self.checked,
            "broken": self.broken,
            "differences": self.differences,
        }


class Meter:
    """Measures seconds and highest memory of the one worker between two calls.

    Videos come in the order of their ids.
    """

    def __init__(self, findings: Findings, ids: list[str], beat: Callable[[], None]) -> None:
        self.findings, self.ids, self.beat = findings, ids, beat
        self.last: float | None = None

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        now = time.monotonic()
        peak = max((_peak(child.pid) for child in multiprocessing.active_children()), default=0)
        if done and (entry := self.findings.entries.get(self.ids[done - 1])):
            entry.memory = max(entry.memory, peak)
            if self.last is not None:  # the first time includes the start of the worker
                entry.seconds = max(entry.seconds, now - self.last)
        self.last = now
        self.beat()


def _peak(pid: int | None) -> int:
    """Highest resident memory of a process since the last call, in bytes. 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def alone(item: tuple[VideoRef, str], size: int) -> str:
    """Digest of a video's frames from a plain decoder, for comparison with the library's decoder.

    Rotated files and folders use the library's decoder. ``item`` is (video, expected digest).

    Returns "undefined" if two things hold: the plain decoder returns other pictures when frames are kept longer or read
    more often, and the library returns the expected pictures again. The codec then does not detect the damage. It shows
    older pictures of the same file instead, and which ones depends on the buffers that are free.
    """
    ref, expected = item
    if ref.kind == "frames":
        return digest(decode(ref, size))
    plain = _plain(ref.path, size)
    if plain in (None, expected):
        return plain or digest(decode(ref, size))
    others = {_plain(ref.path, size, held, look) for held, look in ((0, True), (1, False), (6, False), (6, True))}
    return "undefined" if others != {plain} and digest(decode(ref, size)) == expected else str(plain)


def _plain(path: Path, size: int, held: int = 0, look: bool = False) -> str | None:
    """Digest of all frames, decoded by av alone. None if the library rotates, deinterlaces or maps them from HDR.

    ``held``: number of decoded frames to keep. ``look``: whether to read each frame's side data.
    """
    frames: list[NDArray[np.uint8]] = []
    recent: deque[Any] = deque(maxlen=held)
    reformatter = VideoReformatter()
    with av.open(str(path.absolute()), **LENIENT_METADATA) as container:
        stream = next(s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic)
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if look or not frames:
                turned = frame.side_data.get("DISPLAYMATRIX")
                if turned and struct.unpack("=9i", bytes(turned))[:5] != (1 << 16, 0, 0, 0, 1 << 16):
                    return None
            if frame.interlaced_frame or frame.color_trc in (16, 18):  # the library changes these frames
                return None
            small = reformatter.reformat(frame, size, size, "gbrp", interpolation=_SCALING, threads=1)
            frames.append(np.asarray(small.to_ndarray(), np.uint8))
            recent.append(frame)
    return digest(np.stack(frames))


def run_part(
    plan: Iterable[tuple[int, str | None]],
    seed: int,
    sources: list[Source],
    folder: Path,
    limits: Limits,
    *,
    both: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> Findings:
    """Make the files of `plan` below `folder`, scan and extract them with one worker, and check the promises.

    `plan` has (number, family) for each file; for family None the number selects it. `both`: also scan with two workers
    and compare. Writes `manifest.jsonl` and removes the files that it made.
    """
    root, store = folder / "corpus", folder / "store"
    root.mkdir(parents=True)
    findings = Findings({})
    for number, family in plan:
        name, made = make(number, seed, sources, root, RECIPE.size, family)
        for each in made.ids:
            findings.entries[each] = Entry(each, name, made.kind, made.source, made.accept, made.reject)
        beat()
    lines = (json.dumps({k: v for k, v in asdict(entry).items() if k in _MANIFEST}) for entry in findings.entries.values())
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    try:
        _examine(findings, root, store, limits, both, beat)
    finally:
        remove(root)
        remove(store)
    return findings


_MANIFEST = ("id", "family", "kind", "source", "accept", "reject")


def _examine(findings: Findings, root: Path, store: Path, limits: Limits, both: bool, beat: Callable[[], None]) -> None:
    entries = findings.entries
    ids = [ref.id for ref in find_videos(root)]
    limit: dict[str, Any] = {"timeout": limits.seconds, "memory": limits.memory}
    report = scan(root, min_frames=MIN_FRAMES, workers=1, progress=Meter(findings, ids, beat), **limit)
    for video in report.videos:
        if video.id in entries:
            entries[video.id].scanned, entries[video.id].detail = video.reason, video.detail
    _check_text(findings, report.table() + [f"{v.reason}: {v.detail}" for v in report.rejected])
    report.save(store.with_name("scan.jsonl"))
    if both:
        again = scan(root, min_frames=MIN_FRAMES, workers=2, progress=lambda *_: beat(), **limit)
        for one, two in zip(report.videos, again.videos, strict=True):
            late = "decoder_timeout" in (one.reason, two.reason)
            findings.check("the number of workers changes nothing", one == two or late, f"{one.id!r}: {one} and {two}")
    extract_folder(root, store, RECIPE, min_frames=MIN_FRAMES, workers=1, progress=Meter(findings, sorted(ids), beat), **limit)
    clips = ClipStore(store)
    for rejection in clips.rejected:
        entry = entries.get(rejection["id"])
        if entry is not None:
            entry.extracted, entry.detail = rejection["reason"], rejection["detail"]
        _check_text(findings, [f"{rejection['reason']}: {rejection['detail']}"])
    for name in clips.videos:
        if name in entries:
            entries[name].extracted = ""
    unexpected = (set(ids) | set(clips.videos)) - entries.keys()
    findings.check(PROMISES[0], not unexpected, f"listed but never made: {sorted(unexpected)[:3]!r}")
    for entry in entries.values():
        _check_entry(findings, entry, limits)
    _check_frames(findings, clips, root, limits, beat)
    cut_short = _cut_short(clips)
    for entry in entries.values():
        _check_agreement(findings, entry, entry.id in cut_short)


def _check_text(findings: Findings, lines: list[str]) -> None:
    for line in lines:
        reason, _, detail = line.partition(":")
        good = line.isprintable() and reason.strip() and detail.strip() if ":" in line else line.isprintable()
        findings.check("every reason has a detail on one line", bool(good), repr(line))


def _check_entry(findings: Findings, entry: Entry, limits: Limits) -> None:
    text = f"{entry.id!r} ({entry.kind}): scan {entry.scanned!r}, extract {entry.extracted!r}, {entry.seconds:.1f} s"
    findings.check("every file is usable or rejected with a reason", None not in (entry.scanned, entry.extracted), text)
    findings.check(
        "no file takes longer than the limit", entry.seconds < limits.seconds + 15, text
    )  # + 15: a new worker may start in this time
    memory = f"{text}, {entry.memory / 2**20:.0f} MiB"
    findings.check("no worker takes more memory than the limit", entry.memory < limits.memory + limits.idle, memory)
    if entry.reject:
        findings.check("files that hold no video are rejected", bool(entry.scanned and entry.extracted), text)


def _check_frames(findings: Findings, clips: ClipStore, root: Path, limits: Limits, beat: Callable[[], None]) -> None:
    """Compare the clips of every video with a second decoding of its file (`alone`).

    The order is reversed, so that remains of the previous video cannot be equal in both.
    """
    refs = {ref.id: ref for ref in find_videos(root)}
    stored: dict[str, list[int]] = {}
    for number, name in enumerate(clips.videos):
        stored.setdefault(name, []).append(number)
    cut_short = _cut_short(clips)
    order = [*stored][::-1]
    items = [(refs[name], digest(np.concatenate([clips.clip(number).frames for number in stored[name]]))) for name in order]
    found: dict[str, str | Lost] = {}
    for position, value in map_isolated(partial(alone, size=RECIPE.size), items, 1, limits.seconds):
        found[order[position]] = value
        beat()
    for name, (_, have) in zip(order, items, strict=True):
        entry, want = findings.entries[name], found[name]
        if want == "undefined":
            why = "damage that the codec does not detect; it shows older pictures of the file"
            findings.differences[why] = findings.differences.get(why, 0) + 1
        elif name not in cut_short:
            other = want if isinstance(want, Lost) else f"other frames ({have[:8]}, not {want[:8]})"
            text = f"{name!r} ({entry.kind} of {entry.source}): {other}"
            findings.check("stored frames are those of the file decoded alone", have == want, text)
    for entry in findings.entries.values():
        if entry.accept is not None:
            holds = entry.extracted == "" and found.get(entry.id) == entry.accept and entry.scanned in ("", *ONLY_SCAN)
            text = f"{entry.id!r} ({entry.kind} of {entry.source}): scan {entry.scanned!r}, extract {entry.extracted!r} {entry.detail}"
            findings.check("undamaged files come out as they went in", holds, text)


def _cut_short(clips: ClipStore) -> set[str]:
    """Names of videos with frames that are in no clip."""
    return {name for name, info in zip(clips.videos, clips.infos, strict=True) if info.get("cut_short")}


def _check_agreement(findings: Findings, entry: Entry, cut_short: bool) -> None:
    text = f"{entry.id!r} ({entry.kind}): scan {entry.scanned!r}, extract {entry.extracted!r}"
    scanned, extracted = entry.scanned, entry.extracted
    if scanned in ONLY_SCAN and extracted == "":
        why = f"{scanned}: only the scan looks for it"
    elif scanned and extracted == "" and cut_short:
        why = f"{scanned} behind the frames that extraction takes"
    elif "decoder_timeout" in (scanned, extracted):
        why = "decoder_timeout: the time depends on the machine"
    elif scanned and extracted and scanned != extracted:
        why = f"rejected by both, as {scanned} and as {extracted}"
    else:
        findings.check("scan and extract agree about what is usable", bool(scanned) == bool(extracted), text)
        return
    findings.checked["scan and extract agree about what is usable"] += 1
    findings.differences[why] = findings.differences.get(why, 0) + 1


def remove(folder: Path) -> None:
    """Remove a folder of the corpus, including files without permissions."""
    for where, names, _ in os.walk(folder):
        for name in names:
            if not (path := Path(where) / name).is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=False) if folder.exists() else None


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder that is removed after the context. After an error it stays, for inspection."""
    remove(folder)
    folder.mkdir(parents=True)
    yield folder
    remove(folder)
