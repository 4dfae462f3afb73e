"""Find the videos below a folder: files, folders of numbered pictures, or what a list file names.

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
"""Folders nested deeper than this below the root are refused ("unreadable"): no collection is, and the walk must end."""
SERIES = 25
"""Pictures from which on a series beside one video is taken for the data and the video for its preview; below, the pictures are
taken for stills of the video. As many as a clip needs by default."""

_PSEUDO = (Path("/proc"), Path("/sys"))  # a link there would list the machine's own state, without end
_SOURCE_CODE = (".ts", ".mts")  # TypeScript, too


def find_videos(root: Path, list_file: Path | None = None) -> list[VideoRef]:
    """All videos below `root`, sorted by id; with `list_file`, exactly the listed ones, with label and promised length.

    For list files see `localmotion.video.lists`. Symbolic links are followed, also those that lead out of `root`, each
    real folder once (never into /proc and /sys); names that begin with a dot are skipped. `root` may also be a single
    video file.

    Every file that looks like a video or a picture is either used or listed with `fault`, so that it is rejected with a
    reason and never vanishes:

    - series of pictures: "mixed_frames" (several in one folder), "duplicate_numbers", "gap" (see `series.GAP`);
    - pictures in no series, one entry a folder: "single_picture", "loose_pictures"; "unsupported_picture" for other formats;
    - a series and videos in the same folder: "shadowed" for what is taken to show the same again. Beside one video a series
      of `SERIES` pictures or more is used and the video is shadowed, a shorter one is shadowed itself; beside several
      videos the series is. A list file that names the shadowed one has it used;
    - "unsupported_container" for archives and other containers, "unfinished" for parts of a download;
    - "unreadable" for folders that cannot be listed, are nested deeper than `MAX_DEPTH`, or have the name of a video file
      and hold none; "bad_name" for names that are not UTF-8; "missing" for what a list names and is not there.

    Raises VideoError: "missing" (no such folder or list), "empty" (nothing that looks like a video), "bad_list" (a
    list that does not parse, has an ambiguous or doubled line, or of which nothing exists).
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
    """`find_videos` without those that the listing rejects. Raises VideoError as it does, and the first fault when none is left."""
    refs = find_videos(root)
    good = [ref for ref in refs if ref.fault is None]
    if not good:
        refs[0].check()
    return good


def frame_files(folder: Path) -> list[Path]:
    """The numbered pictures of a frame folder in the order of their numbers.

    Raises VideoError with the faults of a series that `find_videos` lists ("mixed_frames", "duplicate_numbers", "gap"), because any
    choice or order would be a guess; "unreadable" when the folder cannot be listed or holds no series.
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
    """Entries below `root`, sorted. Links to folders wait until every real folder is seen, so a real path wins over a linked
    one."""
    seen: set[tuple[int, int]] = set()
    queue = deque([root])
    found: list[VideoRef] = []
    while queue:
        _visit(queue.popleft(), root, seen, queue, found)
    # Pictures in the root itself have its name for an id, which a folder in it may have, too.
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
            raise OSError(0, "is not of a disk but of the system's own files")
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
        return  # what else the folder above holds may still be used
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
    """Entries for the videos and the pictures of one folder: which of them are used, and which show the same again."""
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
    """Why a file that may hold videos is not used; None for a file that is nothing of the kind."""
    stem, suffix = os.path.splitext(name.lower())
    inner = os.path.splitext(stem)[1]
    if suffix in OTHER_VIDEOS:
        return "unsupported_container", f"{suffix} files are not read; convert it to .mp4, say with ffmpeg"
    if suffix in ARCHIVES and (suffix not in (".gz", ".bz2", ".xz", ".zst") or inner in VIDEO_SUFFIXES | {".tar"}):
        return "unsupported_container", "is an archive, which is not looked into; unpack it"
    if suffix in UNFINISHED and inner in VIDEO_SUFFIXES:
        return "unfinished", "is a download that was not finished; finish or remove it"
    return None


def _is_text(entry: os.DirEntry[str]) -> bool:
    """Whether a file begins as source code does, and no stream of pictures: readable text without zeros."""
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
    except OSError:  # links in a circle, or to where this user may not look: as a file it is refused with the reason
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
    except UnicodeEncodeError:  # bytes that are no text, as Python keeps them: no page, console or list could show them
        fault = "bad_name", f"the name {shown(name)} is not UTF-8; rename it"
    return VideoRef(name, path, kind, frames_hint=hint, fault=fault, warning=warning)


def _known(suffixes: Iterable[str]) -> str:
    return ", ".join(sorted(suffixes))
