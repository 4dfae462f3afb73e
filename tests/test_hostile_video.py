"""Hostile video: nothing a folder may contain crashes, hangs or silently changes a run. The long form is `make fuzz`."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from soak.fuzz_video import show, summarise
from soak.mutations import FAMILIES, make
from soak.part import PROMISES, Entry, Findings, Limits, _check_agreement, _check_entry, run_part
from soak.sources import FORMATS, make_sources
from soak.sources import encode as encode_source
from soak.structure import png

from localmotion.errors import VideoError
from localmotion.machine import cores
from localmotion.perception.extract import extract_folder, in_this_process
from localmotion.recipe import Recipe
from localmotion.video import ClipStore, decode, find_videos, iter_frames, probe, video_ref
from localmotion.video.listing import MAX_DEPTH, shown
from localmotion.video.pictures import jpeg_size, png_size
from localmotion.video.scan import scan
from localmotion.video.workers import MEMORY_LIMIT, TIME_LIMIT, Lost, map_isolated
from property_examples import examples
from video_files import encode, moving_square, save_pictures, set_display_matrix
from waiting import jump_when_hanging
from worker_acts import act

DECODE = sys.modules["localmotion.video.decode"]  # the package's `decode` is the function
FAST = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")


def reason_of(path: Path, **options: int) -> VideoError:
    with pytest.raises(VideoError) as caught:
        decode(video_ref(path), 32, **options)
    assert "\n" not in caught.value.detail
    return caught.value


# -------------------------------------------------------------------------------------------------------- the short fuzz


def test_four_files_of_every_family_keep_every_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = make_sources(tmp_path / "sources", 0, 64, clips=1)
    assert len({source.path.suffix for source in sources}) == 6
    plan = list(enumerate([*FAMILIES] * 4))
    found = run_part(plan, 0, sources, tmp_path / "part", Limits(seconds=1800), both=True)
    assert {name: cases for name, cases in found.broken.items() if cases} == {}
    families = [entry.family for entry in found.entries.values()]
    assert {name: families.count(name) >= 4 for name in FAMILIES} == dict.fromkeys(FAMILIES, True)
    accepted = [entry for entry in found.entries.values() if entry.extracted == ""]
    assert len(accepted) > 12
    assert len(accepted) < len(plan) - 12
    assert all(found.checked[name] >= 10 for name in PROMISES[:-1])
    lines = (tmp_path / "part" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [*found.entries]
    assert sorted(os.listdir(tmp_path / "part")) == ["manifest.jsonl", "scan.jsonl", "scan.jsonl.offsets", "scan.summary.json"]
    summary = summarise([found.to_json()], {})
    assert summary["kept"]
    assert summary["files"] == len(found.entries)
    show(summary)
    assert "BROKEN" not in capsys.readouterr().out
    assert not summarise([found.to_json(), {"died": "part 1 ended with exit code -11"}], {})["kept"]


def test_the_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "sources", 0, 64, clips=1)
    made = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        done = [make(number, 3, sources, tmp_path / run, 64) for number in range(0, 60, 2 if run == "a" else 1)]
        made.append(done if run == "a" else done[::2])  # whatever else is made
    assert made[0] == made[1]
    for path in (p for p in (tmp_path / "a").rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size < 2**24):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


def test_the_harness_notices_broken_promises() -> None:
    entry = Entry("x.mp4", "control", "whole", "s", None, True, scanned="", extracted="", seconds=1.0, memory=2**20)
    wrong = {
        PROMISES[0]: replace(entry, scanned=None),
        PROMISES[2]: replace(entry, seconds=1000.0),
        PROMISES[3]: replace(entry, memory=2**40),
        PROMISES[7]: entry,
    }
    for promise, case in wrong.items():
        findings = Findings({case.id: case})
        _check_entry(findings, replace(case, reject=promise == PROMISES[7]), Limits())
        assert [name for name, cases in findings.broken.items() if cases] == [promise]
    findings = Findings({})
    for scanned, extracted in (("", ""), ("static", ""), ("truncated", "unreadable"), ("decoder_timeout", "")):
        _check_agreement(findings, replace(entry, scanned=scanned, extracted=extracted), False)
    assert not any(findings.broken.values())
    assert sum(findings.differences.values()) == 3
    _check_agreement(findings, replace(entry, scanned="truncated", extracted=""), False)
    _check_agreement(findings, replace(entry, scanned="", extracted="truncated"), False)
    assert len(findings.broken[PROMISES[4]]) == 2


# ----------------------------------------------------------------------------------------------------------------- limits


@linux
def test_a_worker_killed_out_of_memory_or_hanging_costs_its_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = ["a", "killed", "memory", "modest", f"hang {jump_when_hanging(monkeypatch, tmp_path)}", "segfault", "b"]
    found = {items[index].partition(" ")[0]: result for index, result in map_isolated(act, items, 1, timeout=2.0)}
    assert {name: value for name, value in found.items() if isinstance(value, str)} == {"a": "A", "b": "B", "modest": str(2**24)}
    lost = {name: value.reason for name, value in found.items() if isinstance(value, Lost)}
    assert lost == {
        "killed": "decoder_memory",
        "memory": "decoder_memory",
        "hang": "decoder_timeout",
        "segfault": "decoder_crash",
    }
    assert all(isinstance(v, str) or (v.detail and "\n" not in v.detail) for v in found.values())
    assert multiprocessing.active_children() == []


@linux
def test_the_memory_limit_is_for_the_block_alone() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    code = (
        "import numpy as np, resource\n"
        "from localmotion.video.workers import limited_memory\n"
        "try:\n"
        "    with limited_memory(2**24): np.ones(2**28, np.uint8)\n"
        "except MemoryError: print('refused')\n"
        "with limited_memory(None): np.ones(2**28, np.uint8)\n"
        "print(len(np.ones(2**28, np.uint8)), resource.getrlimit(resource.RLIMIT_DATA)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"refused\n{2**28} {before[0]}\n"


@linux
def test_decoding_that_wants_too_much_memory_is_rejected_with_that_reason(tmp_path: Path) -> None:
    large = np.zeros((2, 3000, 3000, 3), np.uint8)
    save_pictures(tmp_path / "in" / "pictures", large, "{}.png")
    encode(tmp_path / "in" / "large.avi", large, codec="mjpeg", pix_fmt="yuvj420p")
    encode(tmp_path / "in" / "small.mp4", moving_square(30))
    found = {v.id: v.reason for v in scan(tmp_path / "in", min_frames=2, memory=2**23).videos}
    assert found == {"large.avi": "decoder_memory", "pictures": "decoder_memory", "small.mp4": ""}
    summary = extract_folder(tmp_path / "in", tmp_path / "store", FAST, min_frames=2, max_frames=30, memory=2**23)
    assert (summary.clips, summary.rejected) == (1, {"decoder_memory": 2})
    assert {v.reason for v in scan(tmp_path / "in", min_frames=2, workers=0).videos} == {"", "static"}


def test_decoding_is_not_done_in_the_calling_process_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in" / "a.mp4", moving_square(30))
    children: list[int] = []

    def watch(*_: object) -> None:
        children.append(len(multiprocessing.active_children()))

    scan(tmp_path / "in", progress=watch)
    scan(tmp_path / "in", progress=watch, workers=0)
    assert children == [1, 0]
    children.clear()
    extract_folder(tmp_path / "in", tmp_path / "one", FAST, progress=watch)
    extract_folder(tmp_path / "in", tmp_path / "none", FAST, progress=watch, workers=0)
    assert children == [0, 1, 0, 0]
    one, none = ((tmp_path / name / "shards/00000/frames.u8").read_bytes() for name in ("one", "none"))
    assert one == none


def test_the_time_limit_reaches_the_workers_and_what_is_lost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a worker that hangs on one video of two, whatever the video."""
    for seed, name in enumerate(("good.mp4", "long.mp4")):
        encode(tmp_path / name, moving_square(30, seed=seed))
    limits: list[float] = []

    def hung(
        function: Callable[[object], object], items: list[object], workers: int, timeout: float
    ) -> Iterator[tuple[int, object]]:
        limits.append(timeout)
        items = list(items)
        if items:
            yield 1, Lost("decoder_timeout", f"decoding took more than {timeout:g} seconds")
            result = function(items[0])
            yield 0, list(in_this_process(result)) if isinstance(result, Generator) else result

    monkeypatch.setattr("localmotion.video.scan.map_isolated", hung)
    monkeypatch.setattr("localmotion.perception.extract.stream_isolated", hung)
    told = ("decoder_timeout", "decoding took more than 7 seconds")
    found = {v.id: (v.reason, v.detail) for v in scan(tmp_path, timeout=7, memory=None).videos}
    assert found == {"good.mp4": ("", ""), "long.mp4": told}
    summary = extract_folder(tmp_path, tmp_path / ".store", FAST, timeout=7, memory=None)
    assert (summary.clips, summary.rejected, limits) == (1, {"decoder_timeout": 1}, [7, 7, 7])
    assert [(entry["id"], entry["reason"], entry["detail"]) for entry in ClipStore(tmp_path / ".store").rejected] == [
        ("long.mp4", *told)
    ]


def test_the_command_line_decodes_in_workers_and_takes_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import localmotion.perception.extract
    import localmotion.video.scan
    from localmotion.cli import main
    from localmotion.perception.extract import ExtractSummary
    from localmotion.video.scan import ScanReport

    seen: list[dict[str, object]] = []
    monkeypatch.setattr(localmotion.video.scan, "scan", lambda *_, **given: seen.append(given) or ScanReport("x", 25, ()))
    monkeypatch.setattr(
        localmotion.perception.extract, "extract_folder", lambda *_, **given: seen.append(given) or ExtractSummary(tmp_path)
    )
    for command in (["scan", "in"], ["extract", "in", "--out", "out"]):
        main(command)
        main([*command, "--workers", "0", "--timeout", "5", "--memory", "0.5"])
        main([*command, "--memory", "0"])
        for wrong in (["--timeout", "0"], ["--memory", "-1"], ["--memory", "nan"]):
            with pytest.raises(SystemExit) as left:
                main([*command, *wrong])
            assert left.value.code == 2
    found = [(given["workers"], given["timeout"], given["memory"]) for given in seen]
    count = cores()
    assert found == [(count, TIME_LIMIT, MEMORY_LIMIT), (0, 5.0, 2**29), (count, TIME_LIMIT, None)] * 2


# ---------------------------------------------------------------------------------------------------------- claimed sizes


def test_claimed_sizes_are_refused_before_anything_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pictures(tmp_path / "frames", moving_square(3), "{}.png")
    (tmp_path / "frames" / "2.png").write_bytes(png(60000, 60000, 8, 2, zlib.compress(bytes(100))))
    error = reason_of(tmp_path / "frames")
    assert (error.reason, "60000x60000" in error.detail) == ("too_large", True)
    (tmp_path / "frames" / "2.png").write_bytes(
        b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", 65500, 65500) + bytes(40) + b"\xff\xd9"
    )
    assert reason_of(tmp_path / "frames").reason == "too_large"
    with (tmp_path / "frames" / "2.png").open("wb") as sparse:
        sparse.truncate(2**33)
    monkeypatch.setattr(DECODE, "MAX_PICTURE_BYTES", 1000)
    assert reason_of(tmp_path / "frames").reason == "too_large"
    for name in ("a.mp4", "a.avi", "a.webm", "a.gif"):
        path = encode(tmp_path / name, moving_square(3, 640, 480))
        monkeypatch.setattr(DECODE, "MAX_PIXELS", 640 * 480)
        assert len(decode(video_ref(path), 16)) == 3
        monkeypatch.setattr(DECODE, "MAX_PIXELS", 640 * 480 - 1)
        assert reason_of(path).reason == "too_large", name


def test_a_stream_cannot_grow_behind_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container says 64x48 and the pictures are: what the decoder is told bounds pictures that come later."""
    small, large = (
        encode(tmp_path / f"{side[0]}.avi", moving_square(4, *side), codec="mjpeg", pix_fmt="yuvj420p")
        for side in ((64, 48), (640, 480))
    )
    pictures = _jpegs(large)
    data = small.read_bytes()
    at = data.index(b"movi") + 4
    chunks = b"".join(b"00dc" + struct.pack("<I", len(p)) + p + b"\0" * (len(p) % 2) for p in [*_jpegs(small)[:2], *pictures])
    (tmp_path / "grows.avi").write_bytes(
        data[:4] + bytes(4) + data[8 : at - 8] + struct.pack("<I", len(chunks) + 4) + b"movi" + chunks
    )
    assert len(decode(video_ref(tmp_path / "grows.avi"), 16)) == 6
    monkeypatch.setattr(DECODE, "MAX_PIXELS", 64 * 64)
    error = reason_of(tmp_path / "grows.avi")
    assert error.reason in ("truncated", "too_large")
    assert len(decode(video_ref(tmp_path / "grows.avi"), 16, max_frames=2)) == 2


def _jpegs(path: Path) -> list[bytes]:
    import av

    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


# -------------------------------------------------------------------------------------------------------- what is shown


# By QuickTime's rule a point (x, y) is shown at (ax + cy, bx + dy).
@pytest.mark.parametrize(
    ("matrix", "turns", "mirrored"),
    [
        ((-1, 0, 0, 1), 0, True),
        ((1, 0, 0, -1), 2, True),
        ((0, 1, 1, 0), 1, True),
        ((0, -1, -1, 0), 3, True),
        ((0, 1, -1, 0), 3, False),
        ((2, 0, 0, 3), 0, False),
    ],
)
def test_mirrored_pictures_are_shown_mirrored(
    tmp_path: Path, matrix: tuple[int, int, int, int], turns: int, mirrored: bool
) -> None:
    plain = encode(tmp_path / "plain.mp4", moving_square(4))
    path = set_display_matrix(plain, tmp_path / "shown.mp4", *matrix)
    info = probe(video_ref(path))
    assert (info.rotation, info.mirrored) == (90 * turns, mirrored)
    native = decode(video_ref(plain), None)
    a, b, c, d = np.sign(matrix)
    want = native if a else native.transpose(0, 2, 1, 3)
    want = want[:, :: d or b, :: a or c]
    np.testing.assert_array_equal(decode(video_ref(path), None), want)


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 1, -1, 1), (1, 0, 1, 0), (3, 1, -1, 3)])
def test_pictures_to_be_shown_aslant_are_refused(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = set_display_matrix(encode(tmp_path / "plain.mp4", moving_square(4)), tmp_path / "shown.mp4", *matrix)
    assert reason_of(path).reason == "odd_rotation"
    with pytest.raises(VideoError, match="quarter turn"):
        probe(video_ref(path))


def test_damage_that_ffv1_tells_its_log_alone_is_noticed(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), np.uint8)
    path = encode(tmp_path / "whole.mkv", noise, codec="ffv1", pix_fmt="bgr0", options={"slicecrc": "1", "level": "3"})
    np.testing.assert_array_equal(decode(video_ref(path), None), noise)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    error = reason_of(path)
    assert (error.reason, "CRC" in error.detail) == ("truncated", True)
    assert len(decode(video_ref(path), 32, max_frames=2)) == 2


def test_what_is_found_in_one_file_does_not_depend_on_the_file_before(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libav keeps a message that repeats and gives it out with the next one, which may be of another file."""
    sources = [s for s in make_sources(tmp_path / "sources", 0, 64, clips=1) if s.path.suffix in (".mkv", ".webm", ".mp4")]
    (tmp_path / "in").mkdir()
    for number in range(90):
        make(number, 1, sources, tmp_path / "in", 64, "structure")
    capfd.readouterr()

    def result(path: Path) -> str:
        try:
            return f"{len(decode(video_ref(path), 16))} frames"
        except VideoError as error:
            return error.detail

    paths = sorted((tmp_path / "in").iterdir())
    forwards = {path.name: result(path) for path in paths}
    assert {path.name: result(path) for path in paths[::-1]} == forwards
    assert sum("damaged (" in text for text in forwards.values()) >= 5
    assert capfd.readouterr() == ("", "")


def test_a_copy_that_ends_in_zeros_is_not_taken_for_a_shorter_video(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    for name in ("a.mkv", "a.avi", "a.webm", "a.gif", "a.mp4"):
        data = encode(tmp_path / name, noise).read_bytes()
        for share in (3, 5, 8):
            (tmp_path / name).write_bytes(data[: len(data) * share // 10] + bytes(len(data) - len(data) * share // 10))
            assert reason_of(tmp_path / name).reason in ("truncated", "unreadable"), (name, share)
    whole = encode(tmp_path / "void.mkv", noise)
    with whole.open("ab") as file:  # an element that holds nothing, by right
        file.write(b"\xec\x01\0\0\0\0\0\x0f\xf0" + bytes(4080))
    assert len(decode(video_ref(whole), 32)) == 30
    for name, options in (("live.webm", {"live": "1"}), ("clusters.mkv", {"cluster_time_limit": "500"})):
        assert len(decode(video_ref(encode(tmp_path / name, noise, muxer=options)), 32)) == 30


# -------------------------------------------------------------------------------------------------- names, links, nodes


def test_names_of_all_kinds_are_used_and_shown_on_one_line(tmp_path: Path) -> None:
    names = ["it's.mp4", 'a "b".mp4', "a\nb.mp4", "видео.mp4", "日本.mp4", "[red]x.mp4", "a:b.mp4", "%s.mp4", "\u202etxt.mp4"]
    for seed, name in enumerate(names):
        encode(tmp_path / "plain.mp4", moving_square(26, seed=seed)).rename(tmp_path / name)
    bad = os.fsdecode(b"caf\xe9.mp4")
    encode(tmp_path / "plain.mp4", moving_square(26)).rename(tmp_path / bad)
    report = scan(tmp_path, workers=0)
    assert {v.id for v in report.usable} == set(names)
    assert [(v.id, v.reason) for v in report.rejected] == [(bad, "bad_name")]
    report.save(tmp_path / ".out" / "manifest.jsonl")
    assert all(line.isprintable() for line in report.table())
    store = tmp_path / ".store"
    extract_folder(tmp_path, store, FAST, workers=0, shard_clips=4)
    clips = ClipStore(store)
    assert sorted(clips.ids) == sorted(names)
    for number, name in enumerate(clips.ids):
        np.testing.assert_array_equal(clips.clip(number).frames, decode(video_ref(tmp_path / name), 32))
    assert [(entry["id"], entry["reason"]) for entry in clips.rejected] == [(bad, "bad_name")]
    assert extract_folder(tmp_path, store, FAST, workers=0, shard_clips=4).new == 0
    assert shown("a\nb\udce9\u202e é") == "a\\nb\\udce9\\u202e é"


def test_what_is_no_file_is_rejected_and_what_loops_ends(tmp_path: Path) -> None:
    good = encode(tmp_path / "good.mp4", moving_square(30))
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    (tmp_path / "one.mp4").symlink_to("two.mp4")
    (tmp_path / "two.mp4").symlink_to("one.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.avi")
    (tmp_path / "empty.mp4").mkdir()
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "again").symlink_to(tmp_path)
    (tmp_path / "proc").symlink_to("/proc/self")
    deep = tmp_path / "deep" / "/".join("d" * (MAX_DEPTH + 5))
    deep.mkdir(parents=True)
    (deep / "lost.mp4").write_bytes(good.read_bytes())
    found = {v.id: (v.reason, v.detail) for v in scan(tmp_path, workers=0).videos}
    assert found.pop("good.mp4") == ("", "")
    assert {reason for reason, _ in found.values()} == {"unreadable"}
    assert found.keys() == {
        "self.mp4",
        "one.mp4",
        "two.mp4",
        "zero.mp4",
        "pipe.avi",
        "empty.mp4",
        "proc",
        "/".join(["deep", *"d" * MAX_DEPTH]),
    }
    assert "symbolic links" in found["self.mp4"][1]
    assert "deeper" in found["/".join(["deep", *"d" * MAX_DEPTH])][1]
    assert "is a folder" in found["empty.mp4"][1]


def test_folders_that_cannot_be_listed_are_told_and_cost_only_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(tmp_path / "good.mp4", moving_square(30))
    save_pictures(tmp_path / "frames", moving_square(4), "{}.png")
    for place in ("secret", "frames/secret"):
        (tmp_path / place).mkdir()
    real = os.scandir

    def scandir(folder: Path) -> object:
        if Path(folder).name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr("localmotion.video.listing.os.scandir", scandir)
    found = {ref.id: ref.fault for ref in find_videos(tmp_path)}
    assert found.keys() == {"good.mp4", "frames", "secret", "frames/secret"}
    assert found["secret"] == found["frames/secret"] == ("unreadable", "cannot list the folder: Permission denied")
    assert found["good.mp4"] is found["frames"] is None
    secret = next(ref for ref in find_videos(tmp_path) if ref.id == "secret")
    for use in (probe, lambda ref: next(iter_frames(ref, 32))):
        with pytest.raises(VideoError, match="Permission denied"):
            use(secret)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert reason_of_ref(tmp_path / "good.mp4") == ("unreadable", "cannot be reached: Permission denied")


def reason_of_ref(path: Path) -> tuple[str, str]:
    from localmotion.video import VideoRef

    with pytest.raises(VideoError) as caught:
        decode(VideoRef(path.name, path, "file"), 32)
    return caught.value.reason, caught.value.detail


def test_lists_with_numbers_of_other_scripts_are_refused(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", moving_square(3))
    for number in ("²", "9" * 5000):
        (tmp_path / "list.txt").write_text(f"a {number} 1\n")
        with pytest.raises(VideoError) as caught:
            find_videos(tmp_path, tmp_path / "list.txt")
        assert caught.value.reason == "bad_list"


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("node", ["fifo", "/dev/zero", "nowhere", "3.png"])
def test_nodes_among_the_pictures_neither_hang_nor_fill_the_memory(tmp_path: Path, node: str) -> None:
    folder = save_pictures(tmp_path / "frames", moving_square(5), "{}.png")
    (folder / "3.png").unlink()
    os.mkfifo(folder / "3.png") if node == "fifo" else (folder / "3.png").symlink_to(node)
    error = reason_of(folder)
    assert (error.reason, "3.png" in error.detail) == ("truncated", True)


def test_pictures_of_other_formats_and_wrong_checksums_are_refused(tmp_path: Path) -> None:
    import cv2

    folder = save_pictures(tmp_path / "frames", moving_square(3), "{}.png")
    whole = (folder / "2.png").read_bytes()
    wrong = bytearray(whole)
    wrong[-20] ^= 1
    tiff = cv2.imencode(".tiff", moving_square(1)[0])[1].tobytes()
    for content in (bytes(wrong), tiff + b"IEND", b"", b"\xff\xd8" + b"\xff" * 3_000_000 + b"\xff\xd9", whole[:8] * 1000):
        (folder / "2.png").write_bytes(content)
        assert reason_of(folder).reason == "truncated"
    (folder / "2.png").write_bytes(whole + b"more behind the end")
    assert len(decode(video_ref(folder), 32)) == 3
    (folder / "2.png").write_bytes(cv2.imencode(".png", moving_square(1, 8, 8)[0])[1].tobytes())
    assert reason_of(folder).reason == "too_small"


@examples(60)
@given(data=st.data())
def test_a_png_with_any_byte_changed_is_never_taken_for_whole(data: st.DataObject) -> None:
    import cv2

    content = bytearray(cv2.imencode(".png", moving_square(1)[0])[1].tobytes())
    assert png_size(bytes(content)) == (64, 48)
    content[data.draw(st.integers(8, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert png_size(bytes(content)) is None


@examples(200)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"]))
def test_picture_headers_of_any_bytes_are_read_without_errors(noise: bytes, head: bytes) -> None:
    for size in (png_size(head + noise), jpeg_size(head + noise + b"\xff\xd9")):
        assert size is None or all(0 <= side < 2**32 for side in size)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no scheduling policies")
def test_an_encoder_leaves_no_real_time_priority_behind(tmp_path: Path) -> None:
    form = next(form for form in FORMATS if form.codec == "libsvtav1")
    encode_source(tmp_path / "x.mkv", moving_square(4), form)
    policies = {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}
    assert policies == {os.SCHED_OTHER}
