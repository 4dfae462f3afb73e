"""What a video is to everything else (`VideoRef`), and which file names look like one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from localmotion.errors import VideoError

VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".webm", ".mkv", ".avi", ".divx", ".gif", ".ts", ".mts", ".m2ts",
    ".mpg", ".mpeg", ".vob", ".wmv", ".asf", ".flv", ".ogv", ".ogg", ".mjpeg", ".mjpg",
})  # fmt: skip
"""Files that are used. Their content decides how they are read, not their name."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
"""Pictures that a numbered series may consist of."""
OTHER_VIDEOS = frozenset({
    ".264", ".265", ".amv", ".apng", ".av1", ".dv", ".h264", ".h265", ".hevc", ".insv", ".ivf", ".lrv", ".m1v", ".m2v",
    ".mj2", ".mpv", ".mxf", ".nut", ".obu", ".ogm", ".rm", ".rmvb", ".swf", ".wtv", ".y4m", ".yuv",
})  # fmt: skip
"""Videos that are listed but not used: nothing in them shows that they are whole, or FFmpeg's wheels lack what reads them."""
OTHER_IMAGES = frozenset({
    ".arw", ".avif", ".cr2", ".dng", ".dpx", ".exr", ".hdr", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".nef", ".pbm",
    ".pgm", ".pnm", ".ppm", ".tga",
})  # fmt: skip
ARCHIVES = frozenset({".7z", ".bz2", ".gz", ".rar", ".tar", ".tbz2", ".tgz", ".txz", ".xz", ".zip", ".zst"})
UNFINISHED = frozenset({".crdownload", ".download", ".filepart", ".part", ".partial"})


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
    warning: str = ""
    """`code: detail` of something odd that the listing shows and that is no reason to reject it; empty for none."""

    def check(self) -> None:
        """Raise VideoError when there is a `fault`."""
        if self.fault is not None:
            raise VideoError(self.path, *self.fault)


def shown(text: str) -> str:
    """`text` on one line and in characters that every terminal and UTF-8 file takes: the rest as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
