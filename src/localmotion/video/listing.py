"""Find the videos below a folder: files, folders of numbered pictures, or what a list file names.

Ids are paths relative to the root, with `/` and with the file's extension, so `a.mp4` and `a.webm` never collide and
an id does not change when another file appears.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from localmotion.errors import VideoError

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
MAX_DEPTH = 64
"""Folders nested deeper than this below the root are refused ("unreadable"): no collection is, and the walk must end."""

_NUMBERED = re.compile(r"^(.*?)(\d+)(\.[A-Za-z]+)", re.DOTALL)
_PSEUDO = (Path("/proc"), Path("/sys"))  # a link there would list the machine's own state, without end


@dataclass(frozen=True)
class VideoRef:
    """One video that may be decoded. `path` is a file (kind "file") or a folder of numbered pictures (kind
    "frames")."""

    id: str
    """Relative POSIX path below the searched root, extension included; stable and unique."""
    path: Path
    kind: Literal["file", "frames"]
    label: int | str | None = None
    """Class of the video from the list file; None without one."""
    frames_hint: int | None = None
    """Number of frames the list file or the folder's content promises; never trusted, only compared."""
    fault: tuple[str, str] | None = None
    """Reason code and detail when the listing already shows that it cannot be used; decoding it raises VideoError with them."""

    def check(self) -> None:
        """Raise VideoError when there is a `fault`."""
        if self.fault is not None:
            raise VideoError(self.path, *self.fault)


def shown(text: str) -> str:
    """`text` on one line and in characters that every terminal and UTF-8 file takes: the rest as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def find_videos(root: Path, list_file: Path | None = None) -> list[VideoRef]:
    """All videos below `root`, sorted by id; with `list_file`, exactly the listed ones, with label and promised length.

    A list file has one video a line, `id n_frames class_id` separated by white space (Something-Something V2 in IPV's
    layout, IPV 1.1). An id names a file (with or without its extension, with or without its folders) or a frame
    folder. Symbolic links are followed, also those that lead out of `root`, each real folder once (never into /proc
    and /sys); names that begin with a dot are skipped. `root` may also be a single video file.

    What cannot be used is listed all the same, with `fault` where the listing knows why, so that it is rejected with
    a reason and never vanishes: folders that cannot be listed or are nested deeper than `MAX_DEPTH`, names that are
    not UTF-8 ("bad_name"), folders with the name of a video file.

    Raises VideoError: "missing" (no such folder or list), "empty" (nothing that looks like a video), "bad_list" (a
    line that does not parse, is ambiguous or doubled, or names videos that do not exist).
    """
    root = Path(root)
    if not root.exists():
        raise VideoError(root, "missing", "no such folder; give the folder that holds the videos")
    if root.is_file():
        if root.suffix.lower() not in VIDEO_SUFFIXES:
            raise VideoError(root, "empty", f"not a video file; known are {_known(VIDEO_SUFFIXES)}")
        refs = [VideoRef(root.name, root, "file")]
    else:
        refs = sorted(_walk(root), key=lambda ref: ref.id)
    if not refs:
        kinds = f"{_known(VIDEO_SUFFIXES)} file and no folder of numbered {_known(IMAGE_SUFFIXES)} pictures"
        raise VideoError(root, "empty", f"no video found: no {kinds}")
    return refs if list_file is None else _select(root, refs, Path(list_file))


def frame_files(folder: Path) -> list[Path]:
    """The numbered pictures of a frame folder in the order of their numbers.

    Raises VideoError "mixed_frames" when the folder holds more than one numbered series (say rgb_001.png beside
    depth_001.png), because any choice between them would be a guess; "unreadable" when the folder cannot be listed or
    holds no series.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise VideoError(folder, "unreadable", f"cannot list the frame folder: {error.strerror}") from error
    series = _series(names)
    if not series:
        raise VideoError(folder, "unreadable", "holds no series of at least two numbered pictures")
    if len(series) > 1:
        some = shown(", ".join(f"{prefix}N{suffix}" for prefix, suffix in sorted(series)[:3]))
        raise VideoError(folder, "mixed_frames", f"holds {len(series)} series of pictures ({some}); keep one in a folder")
    return [folder / name for _, name in sorted(next(iter(series.values())))]


def _series(names: Iterable[str]) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """Numbered pictures grouped by what surrounds the number; groups of at least two."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is None or name.startswith(".") or match[3].lower() not in IMAGE_SUFFIXES:
            continue
        suffix = match[3].lower().replace(".jpeg", ".jpg")
        groups.setdefault((match[1], suffix), []).append((int(match[2]), name))
    return {key: members for key, members in groups.items() if len(members) >= 2}


def _walk(root: Path) -> Iterable[VideoRef]:
    """Videos below `root`. Links to folders wait until every real folder is seen, so a real path wins over a linked
    one."""
    seen: set[tuple[int, int]] = set()
    queue = deque([root])
    while queue:
        found: list[VideoRef] = []
        _visit(queue.popleft(), root, seen, queue, found)
        yield from found


def _visit(
    folder: Path, root: Path, seen: set[tuple[int, int]], links: deque[Path], found: list[VideoRef], depth: int = 0
) -> bool:
    """Collect the videos of a folder and those below it into `found`; True when there are any."""
    try:
        status = os.stat(folder)
        if any(place in (real := folder.resolve()).parents or place == real for place in _PSEUDO):
            raise OSError(0, "is not of a disk but of the system's own files")
        if (status.st_dev, status.st_ino) in seen:
            return False
        if depth > MAX_DEPTH:
            raise OSError(0, f"nested deeper than {MAX_DEPTH} folders")
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        detail = f"cannot list the folder: {error.strerror}"
        if folder == root:
            raise VideoError(folder, "unreadable", detail) from error
        found.append(_ref(folder, root, "frames", ("unreadable", detail)))
        return False  # what else the folder above holds may still be used
    any_video = False
    pictures: list[str] = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        suffix = os.path.splitext(entry.name)[1].lower()
        if _is_folder(entry):
            if entry.is_symlink():
                links.append(path)
                continue
            before = len(found)
            any_video |= _visit(path, root, seen, links, found, depth + 1)
            if suffix in VIDEO_SUFFIXES and len(found) == before:
                fault = "unreadable", "is a folder, and without videos or numbered pictures; rename or remove it"
                found.append(_ref(path, root, "file", fault))
        elif suffix in VIDEO_SUFFIXES:
            found.append(_ref(path, root, "file"))
            any_video = True
        elif suffix in IMAGE_SUFFIXES:
            pictures.append(entry.name)
    series = {} if any_video else _series(pictures)
    if series:
        found.append(_ref(folder, root, "frames", hint=max(len(group) for group in series.values())))
    return any_video or bool(series)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle, or to where this user may not look: as a file it is refused with the reason
        return False


def _ref(
    path: Path, root: Path, kind: Literal["file", "frames"], fault: tuple[str, str] | None = None, hint: int | None = None
) -> VideoRef:
    name = relative if (relative := path.relative_to(root).as_posix()) != "." else path.resolve().name
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no text, as Python keeps them: no page, console or list could show them
        fault = "bad_name", f"the name {shown(name)} is not UTF-8; rename it"
    return VideoRef(name, path, kind, frames_hint=hint, fault=fault)


def _select(root: Path, refs: list[VideoRef], list_file: Path) -> list[VideoRef]:
    """The videos a list file names, with label and promised length, sorted by id."""
    try:
        lines = list_file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise VideoError(list_file, "missing", f"cannot read the list of videos: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise VideoError(list_file, "bad_list", "is not a text file; expected lines of `id n_frames class_id`") from error
    names: dict[str, list[VideoRef]] = {}
    for ref in refs:
        spellings = {ref.id, ref.path.name}
        if ref.kind == "file":
            spellings |= {str(Path(ref.id).with_suffix("").as_posix()), ref.path.stem}
        for name in spellings:
            names.setdefault(name, []).append(ref)
    chosen: dict[str, VideoRef] = {}
    missing: list[str] = []
    total = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        total += 1
        parts = line.rsplit(None, 2)
        if len(parts) != 3 or not re.fullmatch(r"[0-9]{1,18}", parts[1]):
            raise VideoError(list_file, "bad_list", f"line {number} is not `id n_frames class_id`: {line.strip()[:80]!r}")
        name, label = parts[0].strip(), int(parts[2]) if re.fullmatch(r"-?[0-9]{1,18}", parts[2]) else parts[2]
        matches = names.get(name, [])
        if not matches:
            missing.append(name)
        elif len(matches) > 1:
            both = f"{matches[0].id} and {matches[1].id}"
            detail = f"line {number}: {name!r} fits {both}; write the id with folder and extension"
            raise VideoError(list_file, "bad_list", detail)
        elif matches[0].id in chosen:
            raise VideoError(list_file, "bad_list", f"line {number}: {name!r} is listed twice; remove one of the lines")
        else:
            chosen[matches[0].id] = replace(matches[0], label=label, frames_hint=int(parts[1]))
    if missing:
        detail = f"{len(missing)} of {total} listed videos are not below {root}, first {missing[0]!r}"
        raise VideoError(list_file, "bad_list", f"{detail}; correct the list or the folder")
    if not chosen:
        raise VideoError(list_file, "empty", "lists no video; expected lines of `id n_frames class_id`")
    return [chosen[name] for name in sorted(chosen)]


def _known(suffixes: Iterable[str]) -> str:
    return ", ".join(sorted(suffixes))
