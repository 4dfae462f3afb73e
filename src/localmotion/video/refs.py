"""`VideoRef`, the reference to one video used everywhere, and the file names that look like videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from numpy.typing import NDArray

from localmotion.errors import VideoError

VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".webm", ".mkv", ".avi", ".divx", ".gif", ".ts", ".mts", ".m2ts",
    ".mpg", ".mpeg", ".vob", ".wmv", ".asf", ".flv", ".ogv", ".ogg", ".mjpeg", ".mjpg",
})  # fmt: skip
"""Suffixes of files that are used. Content, not name, decides how they are read."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
"""Pictures that a numbered series may consist of."""
OTHER_VIDEOS = frozenset({
    ".264", ".265", ".amv", ".apng", ".av1", ".dv", ".h264", ".h265", ".hevc", ".insv", ".ivf", ".lrv", ".m1v", ".m2v",
    ".mj2", ".mpv", ".mxf", ".nut", ".obu", ".ogm", ".rm", ".rmvb", ".swf", ".wtv", ".y4m", ".yuv",
})  # fmt: skip
"""Suffixes of videos that are listed but not used: they do not show whether they are complete, or FFmpeg's wheels cannot read them."""
OTHER_IMAGES = frozenset({
    ".arw", ".avif", ".cr2", ".dng", ".dpx", ".exr", ".hdr", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".nef", ".pbm",
    ".pgm", ".pnm", ".ppm", ".tga",
})  # fmt: skip
ARCHIVES = frozenset({".7z", ".bz2", ".gz", ".rar", ".tar", ".tbz2", ".tgz", ".txz", ".xz", ".zip", ".zst"})
UNFINISHED = frozenset({".crdownload", ".download", ".filepart", ".part", ".partial"})


class Part(NamedTuple):
    """The pictures of a file that make a video. Picture i is shown `start + i / fps` seconds after the beginning of the file."""

    start: float
    frames: int
    fps: float
    alone: bool
    """Whether the file has no other pictures."""


class Rows(Protocol):
    """What a table holds of a video beside its pictures."""

    @property
    def file(self) -> Path:
        """The table."""

    def read(self, stride: int) -> dict[str, NDArray[Any]]:
        """Arrays (T, ...) by name, of the frames 0, stride, 2 stride, ... Raises VideoError, also if the rows do not fit the video."""

    def pictures(self) -> Iterator[bytes]:
        """The encoded pictures of a video of kind "stored". Raises VideoError."""


@dataclass(frozen=True)
class VideoRef:
    """One video that may be decoded. `path` is a file (kind "file"), a folder of numbered pictures (kind "frames"), or a table
    that holds encoded pictures (kind "stored")."""

    id: str
    """Relative POSIX path below the searched root, extension included; stable and unique."""
    path: Path
    kind: Literal["file", "frames", "stored"]
    label: int | str | None = None
    """Class of the video from the list file; None without one."""
    frames_hint: int | None = None
    """Number of frames by the list file or the folder's content; only compared, never trusted."""
    fault: tuple[str, str] | None = None
    """Reason code and detail if the listing already shows that it cannot be used; decoding it raises VideoError with them."""
    warning: str = ""
    """`code: detail` of something unusual in the listing that does not reject the video; empty for none."""
    part: Part | None = None
    """The pictures of the file, if they are not all of them or must be a known number."""
    rows: Rows | None = None

    def check(self) -> None:
        """Raise VideoError when there is a `fault`."""
        if self.fault is not None:
            raise VideoError(self.path, *self.fault)


def shown(text: str) -> str:
    """`text` on one line; characters that a terminal or UTF-8 file may not accept are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
