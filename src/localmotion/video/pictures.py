"""Sizes of picture files from their headers, read before anything is allocated, and whether the files are complete.

Decoders allocate the size in the header, and fill the missing part of a cut-off picture with grey. PNG is checked to its last
checksum. The other formats have none: a missing part is detected, but damage inside may not be.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

PNG = b"\x89PNG\r\n\x1a\n"
_MAX_MARKERS = 2**17  # maximum number of parts of a picture file: twice as many as the largest file has at the usual 8 KiB


def picture_size(data: bytes, suffix: str) -> tuple[int, int]:
    """Width and height of a picture. `suffix`: of its file, in lower case. The format must match the suffix, except that PNG and
    JPEG are distinguished by content.

    Raises ValueError with the reason: incomplete, another format, several pictures in one, or an unsupported kind.
    """
    if suffix == ".bmp":
        size, name = bmp_size(data), "BMP"
    elif suffix in (".tif", ".tiff"):
        size, name = tiff_size(data), "TIFF"
    elif suffix == ".webp":
        size, name = webp_size(data), "WebP"
    else:
        size, name = png_size(data) if data[:8] == PNG else jpeg_size(data), "JPEG or PNG"
    if size is None:
        raise ValueError(f"is not a whole {name} picture")
    return size


def png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG picture; None unless every chunk up to the last one exists with the right checksum."""
    at = 8
    size: tuple[int, int] | None = None
    for _ in range(_MAX_MARKERS):
        if at + 12 > len(data):
            return None
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data) or zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        if kind == b"IHDR" and length >= 8:
            size = struct.unpack_from(">II", data, at + 8)
        if kind == b"IEND":
            return size
        at = end + 4
    return None


def has_alpha(data: bytes) -> bool:
    """Whether a PNG or WebP picture has an alpha channel according to its header."""
    if data[:8] == PNG:
        return data[25:26] in (b"\x04", b"\x06")  # colour types of the PNG specification: grey and alpha, RGB and alpha
    if data[8:16] == b"WEBPVP8X":
        return len(data) > 20 and bool(data[20] & 0x10)
    return data[8:16] == b"WEBPVP8L" and len(data) > 24 and bool(data[24] & 0x10)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG picture; None if it is not one, or its data end before the end marker."""
    if data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"):
        return None
    at = 2
    for _ in range(_MAX_MARKERS):
        if at + 9 > len(data) or data[at] != 0xFF:
            return None
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # start of frame, of any coding
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        # Fill bytes and markers without content have no length.
        at += (
            1 if kind == 0xFF else 2 if kind == 0x01 or 0xD0 <= kind <= 0xD8 else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        )
    return None


def bmp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a BMP picture with all its rows; None for any other. Raises ValueError for a compressed one."""
    if len(data) < 34 or data[:2] != b"BM":
        return None
    start, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        coding = 0
    else:
        width, height, _, bits, coding = struct.unpack_from("<iiHHI", data, 18)
    if coding not in (0, 3, 6):  # plain, or with bit masks
        raise ValueError("is a compressed BMP, which is not read; save it as PNG")
    height = abs(height)  # negative: from the top down
    if width <= 0 or height <= 0 or bits not in (1, 4, 8, 16, 24, 32) or start < 14 + header:
        return None
    return (width, height) if start + (width * bits + 31) // 32 * 4 * height <= len(data) else None


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP picture (RFC 9649) with all its chunks; None for any other. Raises ValueError for an animation."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        return None
    at, size, whole = 12, None, False
    for _ in range(_MAX_MARKERS):
        if at + 8 > end:
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 18]
        if at + 8 + length > end:
            return None
        if kind in (b"ANIM", b"ANMF"):
            raise ValueError("is an animation, not one picture; save its pictures one by one")
        if kind == b"VP8X" and length >= 10:
            size = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif kind == b"VP8 " and length >= 10 and body[3:6] == b"\x9d\x01\x2a":
            width, height = struct.unpack_from("<HH", body, 6)
            size, whole = size or (width & 0x3FFF, height & 0x3FFF), True
        elif kind == b"VP8L" and length >= 5 and body[:1] == b"\x2f":
            packed = int.from_bytes(body[1:5], "little")
            size, whole = size or (1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)), True
        at += 8 + length + length % 2
    return size if whole else None


_TIFF_TYPES = {1: "B", 3: "H", 4: "I"}


def tiff_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a TIFF picture (TIFF 6.0) with all its strips or tiles; None for any other.

    Raises ValueError for several pages, and for pixels that are not integers of 8 or 16 bits.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return None
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    if at + 2 > len(data):
        return None
    (count,) = struct.unpack_from(f"{order}H", data, at)
    if at + 2 + 12 * count + 4 > len(data):
        return None
    tags: dict[int, list[int]] = {}
    for number in range(count):
        place = at + 2 + 12 * number
        tag, kind, values = struct.unpack_from(f"{order}HHI", data, place)
        code = _TIFF_TYPES.get(kind)
        if code is None:
            continue
        width = struct.calcsize(code) * values
        start = place + 8 if width <= 4 else struct.unpack_from(f"{order}I", data, place + 8)[0]
        if start + width > len(data):
            return None
        tags[tag] = np.frombuffer(data, np.dtype(f"{order}{code}"), values, start).tolist()
    if struct.unpack_from(f"{order}I", data, at + 2 + 12 * count)[0]:
        raise ValueError("holds several pictures (pages); save each in a file of its own")
    size = [tags.get(tag, [0])[:1] for tag in (256, 257)]
    if not all(side and side[0] > 0 for side in size):
        return None
    if set(tags.get(258, [1])) not in ({8}, {16}) or set(tags.get(339, [1])) != {1}:
        raise ValueError("is a TIFF whose pixels are not whole numbers of 8 or 16 bits; save it as PNG")
    starts, lengths = (tags[273], tags.get(279)) if 273 in tags else (tags.get(324), tags.get(325))
    if not starts or not lengths or len(starts) != len(lengths):
        return None
    if not all(length and start + length <= len(data) for start, length in zip(starts, lengths, strict=True)):
        return None
    (width,), (height,) = size
    plain = 273 in tags and tags.get(259, [1]) == [1] and tags.get(262) != [6]  # neither compressed nor with subsampled chroma
    bits = tags.get(258, [8])[0] * tags.get(277, [1])[0]
    return (width, height) if not plain or sum(lengths) >= (width * bits + 7) // 8 * height else None
