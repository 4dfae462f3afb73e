"""The mutations of the fuzz corpus. Each writes one hostile file, folder or node and returns its description."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np

from soak.bench import Bench, Made, Mutation, write
from soak.nodes import frame_folders, links_and_nodes, names
from soak.sources import FORMATS, Source, encode, encode_sound, rendered
from soak.structure import Part, parts, png

EXTREMES = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 60000, 0x00FFFFFF, 100_000_000)


# ------------------------------------------------------------------------------------------------------ bytes of a file


def truncation(bench: Bench) -> Made:
    source, rng = bench.source(), bench.rng
    data = source.path.read_bytes()
    kind = ("end", "last_bytes", "start", "hole", "zero_tail", "first_bytes")[rng.integers(6)]
    cut = int(rng.integers(1, len(data)))
    some = int(rng.integers(1, 64))
    data = {
        "end": data[:cut],
        "last_bytes": data[:-some],
        "start": data[cut:],
        "hole": data[: cut // 2] + data[cut:],
        "zero_tail": data[:cut] + bytes(len(data) - cut),
        "first_bytes": data[:some],
    }[kind]
    return write(bench, data, source.path.suffix, kind, source.key)


def bit_flips(bench: Bench) -> Made:
    source, rng = bench.source(), bench.rng
    data = bytearray(source.path.read_bytes())
    kind = ("one", "many", "head", "tail", "burst", "zeros", "swap", "ones")[rng.integers(8)]
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 2000))
    if kind in ("one", "many"):
        for place in rng.integers(0, len(data), 1 if kind == "one" else int(rng.integers(2, 200))):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind in ("head", "tail"):
        for place in rng.integers(0, min(1024, len(data)), int(rng.integers(1, 12))):
            data[place if kind == "head" else -1 - place] ^= 1 << int(rng.integers(8))
    elif kind == "swap":
        other = int(rng.integers(len(data)))
        data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    else:
        fill = {"burst": rng.bytes(length), "zeros": bytes(length), "ones": b"\xff" * length}[kind]
        data[at : at + length] = fill[: len(data) - at]
    return write(bench, bytes(data), source.path.suffix, kind, source.key)


def structure(bench: Bench) -> Made:
    """Atoms, elements and chunks deleted, doubled, renamed, moved, or with another length; extreme numbers in their fields."""
    source, rng = bench.source(), bench.rng
    data = bytearray(source.path.read_bytes())
    found = [part for part in parts(bytes(data)) if part.kind not in ("mdat", "rest")] or [Part("file", 0, 0, len(data))]
    part = found[rng.integers(len(found))]
    kind = ("delete", "double", "rename", "length", "field", "field", "field")[rng.integers(7)]
    inside = bytes(data[part.start : part.end])
    if kind == "delete":
        del data[part.start : part.end]
    elif kind == "double":
        data[part.end : part.end] = inside
    elif kind == "rename":
        data[part.start + 4 * (part.body - part.start >= 8)] ^= int(rng.integers(1, 256))
    elif kind == "length":
        at = part.start if part.body - part.start >= 8 else max(part.body - 1, 0)
        data[at : at + 4] = struct.pack(">I", bench.pick(EXTREMES))[: len(data) - at]
    else:
        room = max(1, min(part.end - part.body, 96))
        at = part.body + int(rng.integers(room)) // 2 * 2
        wide = 2 if rng.random() < 0.3 else min(4, max(1, part.end - at))
        data[at : at + wide] = bench.pick(EXTREMES).to_bytes(4, ("big", "little")[int(rng.integers(2))])[-wide:]
    return write(bench, bytes(data), source.path.suffix, f"{kind}:{part.kind}", source.key)


def grown(bench: Bench) -> Made:
    """Additional bytes after the end or before the beginning."""
    source, other, rng = bench.source(), bench.source(), bench.rng
    data = source.path.read_bytes()
    kind = ("noise", "zeros", "other_file", "itself", "noise_before", "text")[rng.integers(6)]
    noise = rng.bytes(int(rng.integers(1, 5000)))
    data = {
        "noise": data + noise,
        "zeros": data + bytes(len(noise)),
        "other_file": data + other.path.read_bytes(),
        "itself": data + data,
        "noise_before": noise[:64] + data,
        "text": data + b"\n<html>404</html>\n",
    }[kind]
    return write(bench, data, source.path.suffix, kind, source.key)


def wrong_headers(bench: Bench) -> Made:
    source, other, rng = bench.source(), bench.source(), bench.rng
    data = source.path.read_bytes()
    suffix = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")[rng.integers(6)]
    clip = str(source.path.resolve())
    texts = {
        "text": "this is a text file\n" * 200,
        "html": "<!doctype html><title>404</title>" * 20,
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n",
        "m3u8_file": "#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{clip}'\n",
        "concat_url": "ffconcat version 1.0\nfile 'http://127.0.0.1:9/x.mp4'\n",
        "mpd": "<?xml version='1.0'?><MPD><Period><BaseURL>http://127.0.0.1:9/</BaseURL></Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "svg": "<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        "subtitles": "1\n00:00:00,000 --> 00:10:00,000\nhello\n",
        "script": "#!/bin/sh\ntouch /tmp/owned\n",
        "json": '{"frames": [1, 2, 3]}',
    }
    blobs = {
        "zip": b"PK\x03\x04" + rng.bytes(500),
        "pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
        "noise": rng.bytes(int(rng.integers(100, 20000))),
        "zeros": bytes(5000),
        "wav": b"RIFF\x24\x08\0\0WAVEfmt \x10\0\0\0\x01\0\x02\0\x22\x56\0\0\x88\x58\x01\0\x04\0\x10\0data\0\x08\0\0"
        + bytes(2048),
        "elf": b"\x7fELF\x02\x01\x01" + rng.bytes(900),
        "png": png(32, 32, 8, 2, zlib.compress(bytes(32 * 97))),
        "transport_stream": (b"\x47\x40\x00\x10" + rng.bytes(184)) * 30,
        "magic_only": data[:12],
        "id3": b"ID3\x04\0\0\0\0\x10\0" + rng.bytes(3000),
    }
    kinds = (*texts, *blobs, "renamed", "renamed", "renamed", "head_of_other", "head_of_other", "brand")
    kind = kinds[rng.integers(len(kinds))]
    if kind in texts:
        return write(bench, texts[kind].encode(), suffix, kind, reject=True)
    if kind in blobs:
        return write(bench, blobs[kind], suffix, kind, reject=True)
    if kind == "renamed":
        return write(bench, data, suffix, kind, source.key)
    if kind == "brand":
        return write(
            bench, data.replace(b"isom", b"\0\xff\0\xff").replace(b"webm", b"doc!"), source.path.suffix, kind, source.key
        )
    length = int(rng.integers(4, 64))
    return write(bench, other.path.read_bytes()[:length] + data[length:], source.path.suffix, kind, source.key)


def zero_frames(bench: Bench) -> Made:
    rng = bench.rng
    form = FORMATS[rng.integers(len(FORMATS))]
    kind = ("nothing", "header_only", "no_samples", "one_frame", "few_frames")[rng.integers(5)]
    path = bench.root / f"{bench.stem}{form.suffix}"
    if kind == "nothing":
        return write(bench, b"", form.suffix, kind, reject=True)
    source = bench.source()
    data = source.path.read_bytes()
    found = {part.kind: part for part in parts(data)}
    if kind == "no_samples" and "stsz" in found:
        blank = bytearray(data)
        for name, offset in (("stsz", 8), ("stts", 4), ("stsc", 4), ("stco", 4)):
            if name in found:
                blank[found[name].body + offset : found[name].body + offset + 4] = bytes(4)
        return write(
            bench, bytes(blank), source.path.suffix, kind, source.key, reject="moof" not in found
        )  # fragments have their own header
    if kind in ("header_only", "no_samples"):
        end = next((p.start for p in parts(data) if p.kind in ("mdat", "1F43B675", "00dc", "rest")), 20)
        return write(bench, data[:end], source.path.suffix, "header_only", source.key, reject=True)
    frames = rendered(int(rng.integers(5)), int(rng.integers(100)))[: 1 if kind == "one_frame" else int(rng.integers(2, 8))]
    usable = [form for form in FORMATS if form.codec in ("mpeg4", "libx264", "gif", "mjpeg") and form.family == "control"]
    form = usable[rng.integers(len(usable))]
    path = encode(path.with_suffix(form.suffix), frames, form)
    return Made(kind, (path.name,), form.name, reject=True)


def huge_claims(bench: Bench) -> Made:
    """Small files that claim to be enormous: sides, numbers of frames, lengths of parts, durations."""
    rng = bench.rng
    kind = ("side", "side", "count", "count", "duration", "part_length", "sparse", "mp4_samples")[rng.integers(8)]
    source = bench.source(*((".mp4", ".mov") if kind in ("count", "mp4_samples") else ()))
    data = bytearray(source.path.read_bytes())
    found: dict[str, Part] = {part.kind: part for part in parts(bytes(data))}
    big = int(bench.pick((60000, 65535, 32767, 16384, 8193, 0x7FFF)))

    def put(name: str, offset: int, value: bytes) -> None:
        if name in found and found[name].body + offset + len(value) <= found[name].end:
            at = found[name].body + offset
            data[at : at + len(value)] = value

    if kind == "side":
        for coding in ("avc1", "hev1", "mp4v", "png ", "apcn", "rle "):
            put(coding, 24, struct.pack(">HH", big, big))
        put("tkhd", 76, struct.pack(">II", min(big, 32767) << 16, min(big, 32767) << 16))
        for element in ("B0", "BA"):
            if element in found:
                put(element, 0, big.to_bytes(4, "big")[-(found[element].end - found[element].body) :])
        put("strf", 4, struct.pack("<ii", big, big))
        put("avih", 32, struct.pack("<ii", big, big))
        put("screen", 0, struct.pack("<HH", big, big))
    elif kind == "count":
        number = struct.pack(">I", int(bench.pick((0x7FFFFFFF, 0xFFFFFFFF, 100_000_000, 3_000_000))))
        put(("stsz", "stts", "stsc", "stco")[rng.integers(4)], 8 if rng.random() < 0.5 else 4, number)
    elif kind == "mp4_samples":
        # One size for all samples, because a table of sizes would limit their number.
        put("stsz", 4, struct.pack(">II", int(rng.integers(1, 100)), int(bench.pick((1_000_000, 20_000_000, 0x7FFFFFFF)))))
        put("stts", 8, struct.pack(">II", 0x7FFFFFFF, 1))
        put("stsc", 8, struct.pack(">III", 1, 0x7FFFFFFF, 1))
    elif kind == "duration":
        for name, offset in (("mvhd", 16), ("mdhd", 16), ("tkhd", 20)):
            put(name, offset, struct.pack(">I", 0xFFFFFFFE))
        put("stts", 12, struct.pack(">I", 0x7FFFFFF0))
        put("4489", 0, struct.pack(">d", 1e300))
        put("avih", 0, struct.pack("<I", 0xFFFFFFFF))
        put("mdhd", 12, struct.pack(">I", int(bench.pick((0, 1, 0xFFFFFFFF)))))
    elif kind == "part_length":
        part = list(found.values())[rng.integers(len(found))] if found else Part("file", 0, 0, len(data))
        data[part.start : part.start + 4] = struct.pack(">I", bench.pick((0x7FFFFFFF, 0xFFFFFFFF, 1)))
    if kind == "sparse":
        path = bench.root / f"{bench.stem}{source.path.suffix}"
        path.write_bytes(data[: int(rng.integers(8, len(data)))])
        # A sparse file uses no disk. FFmpeg searches Matroska and AVI byte by byte for the next part: seconds per GB.
        sizes = (2**24, 2**26) if source.path.suffix in (".mkv", ".webm", ".avi") else (2**31, 2**33)
        os.truncate(path, int(bench.pick(sizes)) + 7)
        return Made(kind, (path.name,), source.key)
    return write(bench, bytes(data), source.path.suffix, kind, source.key)


def odd_rotations(bench: Bench) -> Made:
    source, rng = bench.source(".mp4", ".mov"), bench.rng
    data = bytearray(source.path.read_bytes())
    at = data.index(b"tkhd") + 44
    kind = ("quarter", "quarter", "mirror", "angle", "zero", "extreme", "scaled", "noise")[rng.integers(8)]
    one = 1 << 16
    angle = float(rng.uniform(0.1, 1.4))
    cosine, sine = int(np.cos(angle) * one), int(np.sin(angle) * one)
    quarters = ((0, one, -one, 0), (-one, 0, 0, -one), (0, -one, one, 0))
    mirrors = ((-one, 0, 0, one), (one, 0, 0, -one), (0, one, one, 0), (0, -one, -one, 0))
    a, b, c, d = {
        "quarter": quarters[rng.integers(3)],
        "mirror": mirrors[rng.integers(4)],
        "angle": (cosine, sine, -sine, cosine),
        "zero": (0, 0, 0, 0),
        "extreme": (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1),
        "scaled": (3 * one, 0, 0, one // 7),
        "noise": tuple(int(x) for x in rng.integers(-(2**31), 2**31, 4)),
    }[kind]
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return write(bench, bytes(data), source.path.suffix, kind, source.key, reject=kind == "angle")


def variable_rate(bench: Bench) -> Made:
    rng = bench.rng
    usable = [
        form
        for form in FORMATS
        if form.suffix in (".mkv", ".mp4", ".webm") and form.family == "control" and form.codec != "libsvtav1"
    ]
    form = usable[rng.integers(len(usable))]
    frames = rendered(int(rng.integers(5)), int(rng.integers(1000)))
    kind = ("jitter", "gap", "slow", "late_start", "bursts")[rng.integers(5)]
    steps = {
        "jitter": rng.integers(1, 6, len(frames)),
        "gap": np.where(np.arange(len(frames)) == 10, 100_000, 1),
        "slow": np.full(len(frames), 3600 * 30),
        "late_start": np.where(np.arange(len(frames)) == 0, 1_000_000, 1),
        "bursts": np.where(np.arange(len(frames)) % 6 == 0, 50, 1),
    }[kind]
    path = encode(bench.root / f"{bench.stem}{form.suffix}", frames, form, np.cumsum(steps).tolist())
    return Made(f"{kind}:{form.name}", (path.name,), form.name)


def no_pictures(bench: Bench) -> Made:
    codec, suffix = (
        ("aac", ".mp4"),
        ("aac", ".mov"),
        ("libopus", ".mkv"),
        ("libopus", ".webm"),
        ("pcm_s16le", ".avi"),
        ("aac", ".mkv"),
    )[bench.rng.integers(6)]
    path = encode_sound(bench.root / f"{bench.stem}{suffix}", codec)
    if bench.rng.random() < 0.3:
        data = bytearray(path.read_bytes())
        data[int(bench.rng.integers(len(data)))] ^= 1 << int(bench.rng.integers(8))
        path.write_bytes(data)
    return Made(codec, (path.name,), codec, reject=True)


def _of_family(family: str) -> Mutation:
    def mutate(bench: Bench) -> Made:
        """An undamaged file of the family, or one with a few flipped bits."""
        source = bench.source(family=family)
        data = bytearray(source.path.read_bytes())
        whole = bench.rng.random() < 0.3
        for place in bench.rng.integers(0, len(data), 0 if whole else int(bench.rng.integers(1, 20))):
            data[place] ^= 1 << int(bench.rng.integers(8))
        made = write(bench, bytes(data), source.path.suffix, "whole" if whole else "flips", source.key)
        return Made(made.kind, made.ids, made.source, source.digest if whole else None)

    return mutate


def control(bench: Bench) -> Made:
    """An unchanged file. Its frames must be extracted unchanged."""
    source = bench.source()
    name = f"{bench.stem}{source.path.suffix}"
    (bench.root / name).write_bytes(source.path.read_bytes())
    return Made("whole", (name,), source.key, source.digest)


FAMILIES: dict[str, tuple[int, Mutation]] = {
    "truncation": (12, truncation),
    "bit_flips": (16, bit_flips),
    "structure": (20, structure),
    "grown": (4, grown),
    "wrong_headers": (6, wrong_headers),
    "zero_frames": (4, zero_frames),
    "huge_claims": (8, huge_claims),
    "odd_rotations": (4, odd_rotations),
    "variable_rate": (2, variable_rate),
    "no_pictures": (2, no_pictures),
    "deep_colour": (5, _of_family("deep_colour")),
    "palette": (4, _of_family("palette")),
    "names": (5, names),
    "links_and_nodes": (5, links_and_nodes),
    "frame_folders": (6, frame_folders),
    "control": (3, control),
}
"""Every family with its share of the corpus and its mutation."""


def make(index: int, seed: int, sources: list[Source], root: Path, size: int, family: str | None = None) -> tuple[str, Made]:
    """Write file number `index` of the corpus of `seed` below `root`. Returns its family and description.

    The bytes do not depend on other files.
    """
    rng = np.random.default_rng([seed, index])
    if family is None:
        order = [name for name, (share, _) in FAMILIES.items() for _ in range(share)]
        family = order[np.random.default_rng([seed, index // len(order)]).permutation(len(order))[index % len(order)]]
    return family, FAMILIES[family][1](Bench(rng, sources, root, f"{family}_{index:05d}", size))
