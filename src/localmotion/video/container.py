"""Information of a container about its stream: how to rotate the pictures, and whether the stream is complete."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.errors import VideoError


def quarter_turns(path: Path, frame: Any) -> tuple[int, bool]:
    """How to show a decoded picture: number of quarter turns counter-clockwise, after swapping left and right if True.

    The display matrix puts a point (x, y) at (ax + cy, bx + dy); scales are ignored (they express the pixel aspect).
    Raises VideoError "odd_rotation" if the matrix is none of the eight.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
    right, down = complex(a, b), complex(c, d)  # images of the picture's two directions
    if right and down:
        right, down = right / abs(right), down / abs(down)
        turns = round(np.angle(down / 1j) / (np.pi / 2))  # clockwise, as y points down
        mirrored = (right.conjugate() * down).imag < 0
        straight = 1j**turns
        if abs(down / 1j - straight) < 0.02 and abs(right * (-1 if mirrored else 1) - straight) < 0.02:
            return -turns % 4, mirrored
    detail = f"is to be shown under the display matrix ({a}, {b}; {c}, {d}), which is no quarter turn; encode it again"
    raise VideoError(path, "odd_rotation", detail)


def check_complete(path: Path, container: Any, stream: Any, packets: int) -> None:
    """Raise "truncated" if the data end before the length in the container; decoders accept an early end."""
    kind = container.format.name
    if "mov" in kind:
        # The index, not stream.frames: an edit list may leave samples out on purpose.
        expected = len(stream.index_entries)
        if packets < expected:
            raise VideoError(path, "truncated", f"data end behind {packets} of {expected} frames")
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        if kind == "gif":
            file.seek(max(0, size - 16))
            if not file.read().rstrip(b"\0\r\n ").endswith(b"\x3b"):  # every GIF closes with this byte
                raise VideoError(path, "truncated", f"ends without its closing byte behind frame {packets}")
            return
        head = file.read(4096)
        file.seek(max(0, size - 1024))
        tail = file.read()
    # Matroska's demuxer reports zeros itself; raw black pictures consist of zeros.
    if head[:4] == b"RIFF" and not any(tail) and stream.codec_context.name != "rawvideo":
        detail = f"ends in {len(tail)} or more zero bytes, as a copy does that was not finished"
        raise VideoError(path, "truncated", f"{detail}, behind {packets} frames")
    promised = _riff_end(head) if head[:4] == b"RIFF" else _matroska_end(head)
    if promised is not None and size < promised:
        raise VideoError(path, "truncated", f"has {size} of {promised} bytes, data end behind {packets} frames")


def _riff_end(head: bytes) -> int | None:
    """Size of an AVI file by its header (of the first part if it has several); None if not stated."""
    return int.from_bytes(head[4:8], "little") + 8 if any(head[4:8]) else None


def _matroska_end(head: bytes) -> int | None:
    """End of the segment of a Matroska or WebM file by its header (RFC 8794); None if not stated."""

    def number(at: int) -> tuple[int | None, int]:
        """The variable-size integer at `at` and its end. The number of leading zero bits is the number of further bytes."""
        width = 9 - head[at].bit_length() if at < len(head) else 9
        raw = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
        return (None if width > 8 or raw == (1 << 7 * width) - 1 else raw), at + width

    if head[:4] != b"\x1a\x45\xdf\xa3":
        return None
    size, at = number(4)
    if size is None or head[at + size : at + size + 4] != b"\x18\x53\x80\x67":
        return None
    length, start = number(at + size + 4)
    return None if length is None else start + length
