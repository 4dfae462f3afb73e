"""Check whether a file is complete, for containers without a stated length: MPEG streams, ASF, FLV, Ogg, Motion JPEG.

Their demuxers skip damaged data without an error. This module follows the parts of a file from its first byte to its last. It cannot
detect two faults: an MPEG stream cut between two parts, because nothing in it announces more data, and damage inside a part that the
decoder does not notice.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.errors import VideoError

FORMATS = "mpegts,mpeg,asf,flv,ogg,mjpeg"
"""FFmpeg's names of the containers that `check_stream` knows."""

_KINDS = FORMATS.split(",")
Data = mmap.mmap | bytes


def check_packet(path: Path, kind: str, packet: Any, count: int) -> None:
    """Raise VideoError "truncated" if a packet of container `kind`, after `count` others, is damaged according to its demuxer, or, in
    Motion JPEG, is not exactly one complete picture. Packets of other kinds are not checked."""
    if kind not in _KINDS or not packet.size:
        return
    damaged = packet.is_corrupt
    if kind == "mjpeg" and not damaged:
        data = bytes(packet)
        damaged = b"\xff\xd9\xff\xd8" in data or not data.endswith(b"\xff\xd9")
    if damaged:
        raise VideoError(path, "truncated", f"is damaged behind {count} packets; copy it again or convert it to .mp4")


def check_stream(path: Path, kind: str) -> None:
    """Raise VideoError "truncated" if the parts of a file of container `kind` do not end with the file. Other kinds are not checked."""
    walk = _WALKS.get(kind)
    if walk is None:
        return
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = walk(data)
            size = len(data)
    except (OSError, ValueError) as error:
        raise VideoError(path, "unreadable", f"cannot be read: {error}") from error
    if at is not None:
        raise VideoError(path, "truncated", f"is cut off or damaged at byte {at} of {size}; copy it again or convert it to .mp4")


def _transport_stream(data: Data) -> int | None:
    """MPEG-TS (ISO 13818-1, 2.4): packets of 188 bytes (M2TS has four more before; some have sixteen more after) that begin with
    0x47 and are counted per stream."""
    for size, before in ((188, 0), (192, 4), (204, 0)):
        if len(data) >= size and data[before] == 0x47 and (len(data) < 2 * size or data[before + size] == 0x47):
            break
    else:
        return 0
    whole = len(data) // size
    packets = np.frombuffer(data, np.uint8, whole * size).reshape(whole, size)[:, before:]
    wrong = np.flatnonzero(packets[:, 0] != 0x47).tolist()
    stream = (packets[:, 1].astype(np.uint16) & 0x1F) << 8 | packets[:, 2]
    restarts = (packets[:, 3] & 0x20 != 0) & (packets[:, 4] > 0) & (packets[:, 5] & 0x80 != 0)
    for number in np.unique(stream[:: max(1, whole // 100_000)]):
        if number != 0x1FFF:  # padding
            (at,) = np.nonzero((stream == number) & (packets[:, 3] & 0x10 != 0))
            step = np.diff(packets[at, 3]) & 15
            wrong += at[1:][(step > 1) & ~restarts[at[1:]]].tolist()  # a packet may be repeated
    if wrong:
        return min(wrong) * size
    return None if len(data) % size == 0 else whole * size


def _program_stream(data: Data) -> int | None:
    """MPEG-PS (ISO 13818-1, 2.5): packs and packets, each with its start code and length, to the end code or the end."""
    at = 0
    while at < len(data):
        code = data[at : at + 4]
        if code == b"\0\0\1\xb9":
            return None
        if len(code) < 4 or code[:3] != b"\0\0\1" or code[3] < 0xBA:
            return at
        head = data[at : at + 14]
        if code[3] == 0xBA:
            length = 14 + (head[13] & 7) if len(head) == 14 and head[4] >> 6 == 1 else 12  # MPEG-2 or MPEG-1
        elif len(head) < 6:
            return at
        else:
            length = 6 + int.from_bytes(head[4:6], "big")
        if at + length > len(data):
            return at
        at += length
    return None


_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _asf(data: Data) -> int | None:
    """ASF: the header has the size of the file and of a packet; no packet begins with a zero."""
    header = int.from_bytes(data[16:24], "little")
    place = data[: min(header, 2**20)].find(_ASF_FILE)
    if place < 0 or place + 104 > len(data) or header + 50 > len(data):
        return 0
    promised, _, packets = struct.unpack_from("<QQQ", data, place + 40)
    flags, packet = struct.unpack_from("<II", data, place + 88)
    live = flags & 1
    if data[header : header + 16] != _ASF_DATA or packet == 0 or packet > len(data):
        return header
    if not live and promised > len(data):
        return len(data)
    start = header + 50
    whole = (len(data) - start) // packet
    if not live:
        if packets > whole:
            return start + whole * packet
        whole = packets
    first = np.frombuffer(data, np.uint8, whole * packet, start).reshape(whole, packet)[:, 0]
    wrong = np.flatnonzero(first == 0)
    return start + int(wrong[0]) * packet if len(wrong) else None


def _flv(data: Data) -> int | None:
    """FLV: tags, each followed by its own length, to the end."""
    at = int.from_bytes(data[5:9], "big") + 4
    place = data[:4096].find(b"\0\x08filesize\0")
    if place >= 0 and place + 19 <= len(data) and struct.unpack_from(">d", data, place + 11)[0] > len(data):
        return len(data)
    while at < len(data):
        head = data[at : at + 11]
        length = 11 + int.from_bytes(head[1:4], "big")
        end = at + length + 4
        if len(head) < 11 or end > len(data) or head[0] & 31 not in (8, 9, 18):
            return at
        if int.from_bytes(data[end - 4 : end], "big") not in (length, 0):  # some writers omit it
            return at
        at = end
    return None


def _ogg(data: Data) -> int | None:
    """Ogg (RFC 3533): pages, numbered in each stream, and the last page of a stream is marked."""
    at = 0
    numbers: dict[bytes, int] = {}
    ended: set[bytes] = set()
    while at < len(data):
        head = data[at : at + 27]
        if len(head) < 27 or head[:4] != b"OggS":
            return at
        stream, number = head[14:18], int.from_bytes(head[18:22], "little")
        table = data[at + 27 : at + 27 + head[26]]
        end = at + 27 + head[26] + sum(table)
        if len(table) < head[26] or end > len(data) or number != numbers.get(stream, number):
            return at
        numbers[stream] = number + 1
        if head[5] & 4:
            ended.add(stream)
        at = end
    return None if ended == numbers.keys() else len(data)


_WALKS: dict[str, Callable[[Data], int | None]] = {
    "mpegts": _transport_stream,
    "mpeg": _program_stream,
    "asf": _asf,
    "flv": _flv,
    "ogg": _ogg,
}
