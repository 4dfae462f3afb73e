"""Find the videos below a folder: files, folders of numbered pictures, or the entries of a list file.

Ids are paths relative to the root, with `/` and with the file's extension, so `a.mp4` and `a.webm` never collide and
an id does not change when another file appears.
"""

from __future__ import annotations

import codecs
import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from localmotion.errors import VideoError
from localmotion.video.lists import select
from localmotion.video.refs import (
    ARCHIVES,
    IMAGE_SUFFIXES,
    OTHER_IMAGES,
    OTHER_VIDEOS,
    UNFINISHED,
    VIDEO_SUFFIXES,
    VideoRef,
    shown,
)
from localmotion.video.series import arrange

__all__ = ["IMAGE_SUFFIXES", "MAX_DEPTH", "VIDEO_SUFFIXES", "VideoRef", "find_videos", "frame_files", "shown", "usable_videos"]

MAX_DEPTH = 64
"""Folders nested deeper than this below the root are refused ("unreadable"). No collection is that deep, and the walk must end."""
SERIES = 25
"""A series with this many pictures beside one video counts as the data and the video as its preview; a shorter series counts as stills
of the video. This is the default minimum length of a clip."""

_PSEUDO = (Path("/proc"), Path("/sys"))  # a link into these would list the state of the machine, without end
_SOURCE_CODE = (".ts", ".mts")  # also the suffixes of TypeScript


def find_videos(root: Path, list_file: Path | None = None) -> list[VideoRef]:
    """All videos below `root`, sorted by id; with `list_file`, exactly the listed ones, with label and promised length.

    For list files see `localmotion.video.lists`. Symbolic links are followed, also out of `root` (never into /proc
    and /sys), and each real folder is read once. Names that begin with a dot are skipped. `root` may also be a single
    video file.

    Every file that looks like a video or a picture is either used or listed with `fault`, so that it is rejected with a
    reason and never vanishes:

    - series of pictures: "mixed_frames" (several in one folder), "duplicate_numbers", "gap" (see `series.GAP`);
    - pictures in no series, one entry a folder: "single_picture", "loose_pictures"; "unsupported_picture" for other formats;
    - a series and videos in the same folder: "shadowed" for the one that is taken for a copy. Beside one video, a series
      of `SERIES` pictures or more is used and the video is shadowed; a shorter series is shadowed itself. Beside several
      videos the series is shadowed. If a list file names a shadowed entry, it is used;
    - "unsupported_container" for archives and other containers, "unfinished" for parts of a download;
    - "unreadable" for folders that cannot be listed, are nested deeper than `MAX_DEPTH`, or have the name of a video file
      and contain none; "bad_name" for names that are not UTF-8; "missing" for entries of a list that do not exist.

    Raises VideoError: "missing" (no such folder or list), "empty" (nothing that looks like a video), "bad_list" (a
    list that cannot be parsed, has an ambiguous or repeated line, or names no existing video).
    """
    root = Path(root)
    if not root.exists():
        raise VideoError(root, "missing", "no such folder; give the folder that holds the videos")
    if root.is_file():
        if root.suffix.lower() not in VIDEO_SUFFIXES:
            raise VideoError(root, "empty", f"not a video file; known are {_known(VIDEO_SUFFIXES)}")
        refs = [VideoRef(root.name, root, "file")]
    else:
        refs = _walk(root)
    if not refs:
        kinds = f"{_known(VIDEO_SUFFIXES)} file and no folder of numbered {_known(IMAGE_SUFFIXES)} pictures"
        raise VideoError(root, "empty", f"no video found: no {kinds}")
    return refs if list_file is None else select(root, refs, Path(list_file))


def usable_videos(root: Path) -> list[VideoRef]:
    """`find_videos` without the videos that the listing rejects. Raises VideoError as it does, and the first fault if none remains."""
    refs = find_videos(root)
    good = [ref for ref in refs if ref.fault is None]
    if not good:
        refs[0].check()
    return good


def frame_files(folder: Path) -> list[Path]:
    """The numbered pictures of a frame folder in the order of their numbers.

    Raises VideoError with the faults of a series that `find_videos` lists ("mixed_frames", "duplicate_numbers", "gap"), because any
    choice or order would be a guess; "unreadable" if the folder cannot be listed or has no series.
    """
    try:
        with os.scandir(folder) as listing:
            arranged = arrange(entry.name for entry in listing if not _is_folder(entry))
    except OSError as error:
        raise VideoError(folder, "unreadable", f"cannot list the frame folder: {error.strerror}") from error
    if arranged.fault:
        raise VideoError(folder, *arranged.fault)
    if not arranged.files:
        raise VideoError(folder, "unreadable", "holds no series of at least two numbered pictures")
    return [folder / name for name in arranged.files]


def _walk(root: Path) -> list[VideoRef]:
    """Entries below `root`, sorted. Links to folders are visited after all real folders, so a real path has priority over a linked
    one."""
    seen: set[tuple[int, int]] = set()
    queue = deque([root])
    found: list[VideoRef] = []
    while queue:
        _visit(queue.popleft(), root, seen, queue, found)
    # Pictures in the root itself have its name as id; a folder in it may have the same name.
    below = {ref.id for ref in found if ref.path != root}
    found = [replace(ref, id=f"./{ref.id}") if ref.path == root and ref.id in below else ref for ref in found]
    return sorted(found, key=lambda ref: ref.id)


def _visit(
    folder: Path, root: Path, seen: set[tuple[int, int]], links: deque[Path], found: list[VideoRef], depth: int = 0
) -> None:
    """Collect the entries of a folder and those below it into `found`."""
    try:
        status = os.stat(folder)
        if any(place in (real := folder.resolve()).parents or place == real for place in _PSEUDO):
            raise OSError(0, "is not on a disk but in the system's own files")
        if (status.st_dev, status.st_ino) in seen:
            return
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
        return  # other entries of the parent folder may still be used
    videos: list[Path] = []
    pictures: list[str] = []
    others: list[str] = []
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
            _visit(path, root, seen, links, found, depth + 1)
            if suffix in VIDEO_SUFFIXES and len(found) == before:
                fault = "unreadable", "is a folder, and without videos or numbered pictures; rename or remove it"
                found.append(_ref(path, root, "file", fault))
        elif suffix in VIDEO_SUFFIXES:
            if not (suffix in _SOURCE_CODE and _is_text(entry)):
                videos.append(path)
        elif suffix in IMAGE_SUFFIXES:
            pictures.append(entry.name)
        elif suffix in OTHER_IMAGES:
            others.append(entry.name)
        elif (unused := _unused(entry.name)) is not None:
            found.append(_ref(path, root, "file", unused))
    found += _entries(folder, root, videos, pictures)
    if others:
        kinds = _known({os.path.splitext(name)[1].lower() for name in others})
        detail = f"{len(others)} of {kinds}, which are not read; convert to PNG or JPEG"
        found.append(_ref(folder / others[0], root, "file", ("unsupported_picture", detail)))


def _entries(folder: Path, root: Path, videos: Sequence[Path], pictures: Sequence[str]) -> Iterable[VideoRef]:
    """Entries for the videos and pictures of one folder: which are used, and which are taken for copies."""
    arranged = arrange(pictures)
    fault, shadow = arranged.fault, None
    if arranged.files and fault is None and videos:
        if len(videos) == 1 and arranged.count >= SERIES:
            what = f"lies beside a series of {arranged.count} pictures and is taken for its preview"
            shadow = "shadowed", f"{what}; move it to a folder of its own, or name it in a list, to use it"
        else:
            where = f"beside {shown(videos[0].name)}" + (f" and {len(videos) - 1} more videos" if len(videos) > 1 else "")
            what = f"{arranged.count} pictures {where} are taken for stills of it"
            fault = "shadowed", f"{what}; move them to a folder of their own, or name the folder in a list, to use them"
    for video in videos:
        yield _ref(video, root, "file", shadow)
    if arranged.count:
        yield _ref(folder, root, "frames", fault, arranged.count, arranged.warning)
    if arranged.loose:
        first = folder / arranged.loose[0]
        if len(arranged.loose) == 1:
            alone = "single_picture", "is one picture, in no series of numbered ones; a video needs at least two"
        else:
            some = shown(", ".join(arranged.loose[:3]))
            what = f"{len(arranged.loose)} pictures are in no series of numbered ones ({some})"
            alone = "loose_pictures", f"{what}; number them in the order of time, or remove them"
        yield _ref(first, root, "file", alone)


def _unused(name: str) -> tuple[str, str] | None:
    """Why a file that may contain videos is not used; None for a file of another kind."""
    stem, suffix = os.path.splitext(name.lower())
    inner = os.path.splitext(stem)[1]
    if suffix in OTHER_VIDEOS:
        return "unsupported_container", f"{suffix} files are not read; convert it to .mp4, say with ffmpeg"
    if suffix in ARCHIVES and (suffix not in (".gz", ".bz2", ".xz", ".zst") or inner in VIDEO_SUFFIXES | {".tar"}):
        return "unsupported_container", "is an archive, and archives are not read; unpack it"
    if suffix in UNFINISHED and inner in VIDEO_SUFFIXES:
        return "unfinished", "is a download that was not finished; finish or remove it"
    return None


def _is_text(entry: os.DirEntry[str]) -> bool:
    """Whether a file begins like source code (readable text without zeros) and not like a video."""
    try:
        if not entry.is_file():
            return False
        with open(entry.path, "rb") as file:
            start = file.read(4096)
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except (OSError, UnicodeDecodeError):
        return False
    return bool(start) and b"\0" not in start


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # circular links, or links without permission: treated as a file, which is refused with the reason
        return False


def _ref(
    path: Path,
    root: Path,
    kind: Literal["file", "frames"],
    fault: tuple[str, str] | None = None,
    hint: int | None = None,
    warning: str = "",
) -> VideoRef:
    name = relative if (relative := path.relative_to(root).as_posix()) != "." else path.resolve().name
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are not text: no page, console or list could show them
        fault = "bad_name", f"the name {shown(name)} is not UTF-8; rename it"
    return VideoRef(name, path, kind, frames_hint=hint, fault=fault, warning=warning)


def _known(suffixes: Iterable[str]) -> str:
    return ", ".join(sorted(suffixes))
