"""Mutations of the fuzz corpus that do not change a file's bytes: odd names, links and nodes, folders of pictures."""

from __future__ import annotations

import errno
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from soak.bench import Bench, Made
from soak.sources import digest, rendered
from soak.structure import png

_NAMES = (
    "it's", 'say "hi"', "a\nb", "a\tb", "a\rb", "ünïcödé", "日本語の動画", "видео", "🐈 jumps", "e\u0301 combining", "\u202etxt.4pm",
    " leading", "trailing ", "-rf", "--help", "%s%n%d", "[red]bold[green]", "$(touch owned)", "`id`", "a;b", "a|b&c", "back\\slash",
    "a:b", "file:x", "http:__x", "concat:a|b", "CON", "x" * 200, "..hidden..", "a..b", "~", "*?", "{0}", "\x1b[31mred", "\x07bell",
    "null\\0", "#hash", "a%20b", "é" * 60, "\u200bzero width", "data,with,commas", "<b>html<br>", "a=b", "@file", "!bang",
)  # fmt: skip


def names(bench: Bench) -> Made:
    """An undamaged file with an odd name, or in a folder with one. Names that are not UTF-8 must be rejected."""
    source, rng = bench.source(), bench.rng
    odd = _NAMES[rng.integers(len(_NAMES))]
    data = source.path.read_bytes()
    if rng.random() < 0.15:
        name = os.fsdecode(
            f"{bench.stem} caf".encode() + bytes(rng.integers(0x80, 0xC0, 2, np.uint8)) + source.path.suffix.encode()
        )
        (bench.root / name).write_bytes(data)
        return Made("not_utf8", (name,), source.key, reject=True)
    if rng.random() < 0.3:
        folder = f"{bench.stem} {odd}"
        (bench.root / folder).mkdir()
        (bench.root / folder / f"clip{source.path.suffix}").write_bytes(data)
        return Made(f"folder:{odd[:20]}", (f"{folder}/clip{source.path.suffix}",), source.key, source.digest)
    name = f"{bench.stem} {odd}{source.path.suffix.upper() if rng.random() < 0.1 else source.path.suffix}"
    (bench.root / name).write_bytes(data)
    return Made(odd[:20], (name,), source.key, source.digest)


LINKS = (
    "fifo",
    "device",
    "socket",
    "link_to_itself",
    "link_circle",
    "dangling",
    "link_to_good",
    "folder_circle",
    "empty_folder",
    "text_folder",
    "no_rights",
    "no_rights_folder",
    "deep",
    "hard_link",
    "proc_file",
    "proc_folder",
    "link_to_text",
    "good_in_folder",
)


def links_and_nodes(bench: Bench) -> Made:
    rng, root, stem = bench.rng, bench.root, bench.stem
    source = bench.source()
    name = f"{stem}{source.path.suffix}"
    path = root / name
    kind = LINKS[rng.integers(len(LINKS))]
    ids: tuple[str, ...] = (name,)
    accept, reject = None, True
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(("/dev/zero", "/dev/null", "/dev/random", "/dev/full")[rng.integers(4)])
    elif kind == "socket":
        _bind(path)
    elif kind == "link_to_itself":
        path.symlink_to(name)
    elif kind == "link_circle":
        other = root / f"{stem}_b{source.path.suffix}"
        path.symlink_to(other.name)
        other.symlink_to(name)
        ids = (name, other.name)
    elif kind == "dangling":
        path.symlink_to("nowhere" + source.path.suffix)
    elif kind in ("link_to_good", "hard_link"):
        path.symlink_to(source.path.resolve()) if kind == "link_to_good" else os.link(source.path, path)
        accept, reject = source.digest, False
    elif kind == "folder_circle":
        (root / stem / "inner").mkdir(parents=True)
        (root / stem / "inner" / "loop.mp4").symlink_to(root / stem, target_is_directory=True)
        (root / stem / f"clip{source.path.suffix}").write_bytes(source.path.read_bytes())
        ids, accept, reject = (f"{stem}/clip{source.path.suffix}",), source.digest, False
    elif kind in ("empty_folder", "text_folder", "good_in_folder"):
        path.mkdir()
        if kind == "text_folder":
            (path / "readme.txt").write_text("nothing here")
        if kind == "good_in_folder":
            (path / f"clip{source.path.suffix}").write_bytes(source.path.read_bytes())
            ids, accept, reject = (f"{name}/clip{source.path.suffix}",), source.digest, False
    elif kind == "no_rights":
        path.write_bytes(source.path.read_bytes())
        path.chmod(0)
        if os.access(path, os.R_OK):  # the superuser can read everything
            accept, reject = source.digest, False
    elif kind == "no_rights_folder":
        (root / stem).mkdir()
        (root / stem / f"clip{source.path.suffix}").write_bytes(source.path.read_bytes())
        (root / stem).chmod(0)
        ids = (stem,)
        if os.access(root / stem, os.R_OK):
            ids, accept, reject = (f"{stem}/clip{source.path.suffix}",), source.digest, False
    elif kind == "deep":
        folder = root / stem / "/".join("d" * 80)
        folder.mkdir(parents=True)
        (folder / f"clip{source.path.suffix}").write_bytes(source.path.read_bytes())
        ids = ("/".join([stem, *"d" * 64]),)
    elif kind == "proc_file":
        path.symlink_to(("/proc/self/mem", "/proc/kmsg", "/proc/self/maps", "/proc/self/environ")[rng.integers(4)])
    elif kind == "proc_folder":
        (root / stem).symlink_to("/proc/self", target_is_directory=True)
        ids = (stem,)
    else:
        path.symlink_to("/etc/hostname")
    return Made(kind, ids, source.key, accept, reject)


def _bind(path: Path) -> None:
    """Make a socket node. Its path may be too long for a socket, so the path goes through the folder's handle."""
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as node:
            node.bind(f"/proc/self/fd/{handle}/{path.name}")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        path.write_bytes(b"")
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------- pictures


FOLDERS = (
    "whole",
    "whole",
    "mixed_sizes",
    "cut",
    "flips",
    "huge_png",
    "bomb_png",
    "fifo",
    "device",
    "two_series",
    "empty",
    "text",
    "dangling",
    "gif_inside",
    "tiff_inside",
    "grey",
    "deep16",
    "palette",
    "alpha",
    "no_end",
    "tiny",
    "folder_as_picture",
    "huge_jpeg",
    "sparse",
    "gap",
    "odd_names",
    "bad_checksum",
    "many_markers",
    "link_to_itself",
)


def frame_folders(bench: Bench) -> Made:
    """Folders of numbered pictures, one of them faulty."""
    rng = bench.rng
    folder = bench.root / bench.stem
    folder.mkdir()
    frames = rendered(int(rng.integers(5)), int(rng.integers(1000)))
    suffix = (".png", ".jpg")[rng.integers(2)]
    kind = FOLDERS[rng.integers(len(FOLDERS))]
    if kind in ("whole", "bad_checksum", "palette", "deep16", "alpha"):
        suffix = ".png"
    prefix = "it's \n" if kind == "odd_names" else "f"
    files = [folder / f"{prefix}{n}{suffix}" for n in range(len(frames))]
    for file, frame in zip(files, frames, strict=True):
        file.write_bytes(cv2.imencode(suffix, frame[..., ::-1])[1].tobytes())
    which = int(rng.integers(len(files)))
    victim, frame = files[which], frames[which]
    data = bytearray(victim.read_bytes())
    reject = True

    def packed(image: np.ndarray) -> bytes:
        return bytes(cv2.imencode(suffix, image)[1].tobytes())

    if kind in ("fifo", "device", "dangling", "folder_as_picture", "link_to_itself"):
        victim.unlink()
        if kind == "fifo":
            os.mkfifo(victim)
        elif kind == "folder_as_picture":
            victim.mkdir()
            reject = False  # a folder is no picture, so the series has a gap
        else:
            victim.symlink_to({"device": "/dev/zero", "dangling": "nowhere.png", "link_to_itself": victim.name}[kind])
    elif kind == "two_series":
        for number in range(3):
            (folder / f"depth{number}{suffix}").write_bytes(data)
    elif kind == "sparse":
        os.truncate(victim, 2**33)
    elif kind == "gap":
        victim.unlink()
        reject = False
    else:
        flipped = bytearray(data)
        for place in rng.integers(8, len(data), 4):
            flipped[place] ^= 1 << int(rng.integers(8))
        wrong = bytearray(data)
        wrong[-20] ^= 255
        big = int(rng.integers(8193, 60000))
        contents: dict[str, Callable[[], bytes]] = {
            "whole": lambda: bytes(data),
            "odd_names": lambda: bytes(data),
            "mixed_sizes": lambda: packed(cv2.resize(frame, (40 + which, 30)[:: 1 if which % 2 else -1])),
            "cut": lambda: bytes(data[: int(rng.integers(1, len(data) - 30))]),
            "flips": lambda: bytes(flipped),
            "huge_png": lambda: png(60000, 60000, 8, 2, zlib.compress(bytes(1000))),
            "bomb_png": lambda: png(big, big, 8, 0, zlib.compress(bytes(1_000_000), 9)),
            "empty": lambda: b"",
            "text": lambda: b"no picture IEND",
            "gif_inside": lambda: bench.source(".gif").path.read_bytes() + b"IEND",
            "tiff_inside": lambda: bytes(cv2.imencode(".tiff", frame)[1].tobytes()) + b"IEND",
            "grey": lambda: packed(frame[..., 0]),
            "deep16": lambda: packed(frame.astype(np.uint16) * 257),
            "palette": lambda: png(64, 64, 8, 3, zlib.compress(bytes(64 * 65))),  # without a palette
            "alpha": lambda: packed(np.concatenate([frame, frame[..., :1]], 2)),
            "no_end": lambda: bytes(data[:-12]),
            "tiny": lambda: packed(frame[:2, :2]),
            "huge_jpeg": lambda: b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 65500, 65500) + bytes(40) + b"\xff\xd9",
            "bad_checksum": lambda: bytes(wrong),
            "many_markers": lambda: b"\xff\xd8" + b"\xff" * 3_000_000 + b"\xff\xd9",
        }
        victim.write_bytes(contents[kind]())
        reject = kind not in ("whole", "odd_names", "mixed_sizes", "flips", "grey", "deep16", "alpha")
    accept = None
    if kind == "whole":
        side = (bench.size, bench.size)
        accept = digest(
            np.stack([x if x.shape[:2] == side else cv2.resize(x, side, interpolation=cv2.INTER_AREA) for x in frames])
        )
    return Made(f"{kind}{suffix}", (bench.stem,), "rendered", accept, reject)
