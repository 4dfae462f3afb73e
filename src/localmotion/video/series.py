"""Find which pictures of a folder are the frames of a video, and their order, only by their names; no picture is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from localmotion.video.refs import IMAGE_SUFFIXES, shown

GAP = 5
"""A step between two numbers of more than this many times the usual step (the median) is a gap: a jump to another scene, not a
dropped frame."""

_NUMBER_LAST = re.compile(r"^(.*?)(\d+)(\.[A-Za-z]+)", re.DOTALL)
_TIME_LAST = re.compile(r"^(.*?)(\d+)\.(\d+)(\.[A-Za-z]+)", re.DOTALL)
_FIRST_CHOICE = (".jpg", ".png")
_ALIASES = {".jpeg": ".jpg", ".tiff": ".tif"}

Groups = dict[tuple[str, ...], list[tuple[int, str]]]
"""Text around the number -> numbers and names; at least two."""


@dataclass(frozen=True)
class Arranged:
    """The pictures of one folder. `files` are the frames in order; empty if there is no series, or more than one."""

    files: tuple[str, ...] = ()
    count: int = 0
    """Number of pictures of the longest series; 0 if there is none."""
    fault: tuple[str, str] | None = None
    """Why the series cannot be used: mixed_frames, duplicate_numbers, gap."""
    warning: str = ""
    loose: tuple[str, ...] = ()
    """Pictures that belong to no series, sorted."""


def arrange(names: Iterable[str]) -> Arranged:
    """Find the one numbered series among file names of a folder.

    The number is directly before the extension (`frame_0001.png`), or is a time there (`1305031102.175304.png`). If no
    JPEG or PNG pictures are numbered so, it may be anywhere (`frame_0001_rgb.png`), and BMP, TIFF and WebP count, too. The
    text around the number must be the same for all; jpg and jpeg are one extension.
    """
    pictures = sorted(name for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
    series = _number_last(name for name in pictures if _suffix(name) in _FIRST_CHOICE) or _number_anywhere(pictures)
    if not series:
        return Arranged(loose=tuple(pictures))
    members = {name for group in series.values() for _, name in group}
    loose = tuple(name for name in pictures if name not in members)
    count = max(len(group) for group in series.values())
    if len(series) > 1:
        some = shown(", ".join("N".join(key[:-1]) + key[-1] for key in sorted(series)[:3]))
        detail = f"holds {len(series)} series of pictures ({some}); keep one in a folder"
        return Arranged((), count, ("mixed_frames", detail), loose=loose)
    ordered = sorted(next(iter(series.values())))
    fault, warning = _uneven(ordered)
    return Arranged(tuple(name for _, name in ordered), count, fault, warning, loose)


def _suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return _ALIASES.get(suffix, suffix)


def _number_last(names: Iterable[str]) -> Groups:
    times: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    rest: list[str] = []
    for name in names:
        match = _TIME_LAST.fullmatch(name)
        if match is None:
            rest.append(name)
        else:
            times.setdefault((match[1], _suffix(name)), []).append((match[2], match[3], name))
    groups: Groups = {}
    for (prefix, suffix), found in times.items():
        wholes, widths = {whole for whole, _, _ in found}, {len(part) for _, part, _ in found}
        # Seconds and their fraction, or two numbers, of which the first is the number of a scene.
        seconds = min(map(len, wholes)) >= 9 or (len(wholes) > 1 and len(widths) == 1 and min(widths) >= 3)
        if seconds:
            width = max(widths)
            groups[(prefix, ".", "", suffix)] = [(int(whole + part.ljust(width, "0")), name) for whole, part, name in found]
        else:
            rest += [name for _, _, name in found]
    for name in rest:
        match = _NUMBER_LAST.fullmatch(name)
        if match is not None:
            groups.setdefault((match[1], "", _suffix(name)), []).append((int(match[2]), name))
    return {key: members for key, members in groups.items() if len(members) >= 2}


def _number_anywhere(names: Iterable[str]) -> Groups:
    """Series by the number that changes; if several change, by the last one."""
    alike: dict[tuple[str, ...], list[tuple[list[str], str]]] = {}
    for name in names:
        parts: list[str] = re.split(r"(\d+)", os.path.splitext(name)[0])
        if len(parts) > 1:
            alike.setdefault((*parts[::2], _suffix(name)), []).append((parts, name))
    groups: Groups = {}
    for form, found in alike.items():
        columns = range(1, 2 * (len(form) - 1) - 1, 2)
        changing = [at for at in columns if len({parts[at] for parts, _ in found}) > 1]
        if not changing:
            continue
        at = changing[-1]
        for parts, name in found:
            key = ("".join(parts[:at]), "".join(parts[at + 1 :]), form[-1])
            groups.setdefault(key, []).append((int(parts[at]), name))
    return {key: members for key, members in groups.items() if len(members) >= 2}


def _uneven(ordered: Sequence[tuple[int, str]]) -> tuple[tuple[str, str] | None, str]:
    """Fault and warning for numbers that are repeated or skipped."""
    steps = [after[0] - before[0] for before, after in pairwise(ordered)]
    for step, (before, after) in zip(steps, pairwise(ordered), strict=True):
        if step == 0:
            return ("duplicate_numbers", shown(f"{before[1]} and {after[1]} have the same number; keep one of them")), ""
    usual = sorted(steps)[(len(steps) - 1) // 2]
    jumps = [at for at, step in enumerate(steps) if step > GAP * usual]
    if jumps:
        (_, here), (_, there) = ordered[jumps[0] : jumps[0] + 2]
        more = f" and in {len(jumps) - 1} more places" if len(jumps) > 1 else ""
        detail = shown(f"nothing between {here} and {there}{more}; move each part into a folder of its own")
        return ("gap", detail), ""
    skipped = [at for at, step in enumerate(steps) if step >= 2 * usual]
    if skipped:
        return None, shown(f"skipped_numbers: in {len(skipped)} places, first behind {ordered[skipped[0]][1]}")
    return None, ""
