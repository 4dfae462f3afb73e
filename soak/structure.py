"""Positions of the parts inside video files, as far as the mutations need them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_ATOMS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"mvex", b"moof", b"traf", b"udta", b"stsd"})
_EBML = frozenset({0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0x1C53BB6B, 0xBB, 0xB7, 0x114D9B74, 0x4DBB, 0xA0, 0x1A45DFA3})


@dataclass(frozen=True)
class Part:
    """One atom, element or chunk: its kind, where it begins and ends, and where its content begins."""

    kind: str
    start: int
    body: int
    end: int


def parts(data: bytes) -> list[Part]:
    """All parts of a file, outer ones before inner ones. For GIF: its fixed header fields.

    Empty for unknown formats.
    """
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return list(_ebml(data, 0, len(data)))
    if data[:4] == b"RIFF":
        return list(_riff(data, 12, len(data)))
    if data[:3] == b"GIF":
        return [Part("screen", 6, 6, 13), Part("palette", 13, 13, min(len(data), 13 + 96)), Part("rest", 13, 13, len(data))]
    return list(_atoms(data, 0, len(data))) if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free") else []


def _atoms(data: bytes, at: int, end: int) -> Iterator[Part]:
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        size = end - at if size < 8 or at + size > end else size
        yield Part(kind.decode("latin-1"), at, at + 8, at + size)
        if kind in _ATOMS:
            yield from _atoms(data, at + (16 if kind == b"stsd" else 8), at + size)
        at += size


def _ebml(data: bytes, at: int, end: int) -> Iterator[Part]:
    while at < end and data[at]:
        wide = 9 - data[at].bit_length()
        ident, body = int.from_bytes(data[at : at + wide], "big"), at + wide
        if body >= end or not data[body]:
            return
        wide = 9 - data[body].bit_length()
        size = int.from_bytes(data[body : body + wide], "big") & ((1 << 7 * wide) - 1)
        body += wide
        stop = min(end, body + size)
        yield Part(f"{ident:X}", at, body, stop)
        if ident in _EBML:
            yield from _ebml(data, body, stop)
        at = stop


def _riff(data: bytes, at: int, end: int) -> Iterator[Part]:
    while at + 8 <= end:
        kind, size = struct.unpack_from("<4sI", data, at)
        stop = min(end, at + 8 + size)
        yield Part(kind.decode("latin-1"), at, at + 8, stop)
        if kind == b"LIST":
            yield from _riff(data, at + 12, stop)
        at = stop + (size & 1)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with a correct checksum."""
    import zlib

    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, content: bytes) -> bytes:
    """A PNG file with any claims in its header. `content`: compressed bytes in place of the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", content) + png_chunk(b"IEND", b"")
