"""The scan: every fault is found and told, whatever the number of workers, and a dying decoder costs one video."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from localmotion.cli import main
from localmotion.errors import LocalmotionError, VideoError
from localmotion.video import workers
from localmotion.video.scan import ScanReport, VideoReport, scan
from localmotion.video.workers import Lost, map_isolated
from video_files import encode, encode_sound, moving_square, remux, save_pictures, set_display_matrix
from worker_acts import act


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    good = encode(root / "good.mp4", moving_square(30), muxer={"movflags": "faststart"})
    (root / "sub").mkdir()
    shutil.copy(good, root / "sub/copy.mp4")
    remux(good, root / "remuxed.mkv")
    (root / "text.mp4").write_text("no video")
    (root / "zero.webm").write_bytes(b"")
    (root / "cut.mp4").write_bytes(good.read_bytes()[:-300])
    encode_sound(root / "sound.mp4")
    encode(root / "short.gif", moving_square(8))
    encode(root / "tiny.mp4", moving_square(30, 8, 8))
    still = np.repeat(moving_square(1, seed=3), 30, 0)
    encode(root / "static.mp4", still)
    noise = np.random.default_rng(0).integers(-2, 3, (30, 192, 256, 3))
    save_pictures(root / "static_noise", (90 + noise).astype(np.uint8), "{}.png")
    insect = np.full((30, 48, 64, 3), 90, np.uint8)
    for t in range(30):
        insect[t, 20:24, 8 + t : 12 + t] = 255
    encode(root / "small_motion.mp4", insect)
    save_pictures(root / "frames", moving_square(27, seed=2))
    set_display_matrix(encode(root / "a.mp4", moving_square(28, seed=4)), root / "turned.mp4", 0, 1, -1, 0)
    (root / "a.mp4").unlink()
    encode(root / "ten_bit.mp4", moving_square(28, 96, 64, seed=5), pix_fmt="yuv420p10le")
    encode(root / "odd.mp4", moving_square(28, 61, 47), pix_fmt="yuv444p")
    encode(root / "vfr.mkv", moving_square(28, seed=6), times=[*range(14), *range(30, 44)])
    doubled = np.repeat(moving_square(15, seed=7), 2, 0)
    encode(root / "doubled.mkv", doubled, options={"crf": "0"})
    flash = moving_square(30, seed=8)
    flash[15:] = 255 - flash[15:]
    encode(root / "scene.mp4", flash)
    return root


EXPECTED = {
    "cut.mp4": "truncated",
    "doubled.mkv": "",
    "frames": "",
    "good.mp4": "",
    "odd.mp4": "",
    "remuxed.mkv": "duplicate",
    "scene.mp4": "",
    "short.gif": "too_short",
    "small_motion.mp4": "",
    "sound.mp4": "no_video_stream",
    "static.mp4": "static",
    "static_noise": "static",
    "sub/copy.mp4": "duplicate",
    "ten_bit.mp4": "",
    "text.mp4": "unreadable",
    "tiny.mp4": "too_small",
    "turned.mp4": "",
    "vfr.mkv": "",
    "zero.webm": "unreadable",
}
WARNINGS = {
    "doubled.mkv": ["repeated_frames"],
    "odd.mp4": ["odd_size"],
    "scene.mp4": ["scene_cut"],
    "ten_bit.mp4": ["high_bit_depth"],
    "turned.mp4": ["rotation"],
    "vfr.mkv": ["vfr"],
}


@pytest.fixture(scope="module")
def report(folder: Path) -> ScanReport:
    return scan(folder)


def test_every_fault_is_found_with_its_reason(report: ScanReport) -> None:
    assert {video.id: video.reason for video in report.videos} == EXPECTED
    assert all(video.usable == (video.reason == "") for video in report.videos)
    assert all(video.detail for video in report.rejected)
    found = {v.id: [w.partition(":")[0] for w in v.warnings] for v in report.usable if v.warnings}
    assert found == WARNINGS
    by_id = {video.id: video for video in report.videos}
    assert "good.mp4" in by_id["sub/copy.mp4"].detail
    assert "8 frames, 25 needed" in by_id["short.gif"].detail
    assert by_id["frames"].info is not None
    assert by_id["frames"].info.frames == 27
    assert by_id["good.mp4"].content == by_id["remuxed.mkv"].content
    assert len({video.content for video in report.usable}) == len(report.usable)
    # A cut inside a video is told with its place.
    assert "first at frame 15" in by_id["scene.mp4"].warnings[0]


def test_workers_change_nothing(folder: Path, report: ScanReport) -> None:
    calls: list[tuple[int, int]] = []
    assert scan(folder, workers=2, progress=lambda *args: calls.append(args)) == report
    assert calls == [(n + 1, len(EXPECTED)) for n in range(len(EXPECTED))]


def test_manifest_and_table(report: ScanReport, tmp_path: Path) -> None:
    report.save(tmp_path / "out/found.jsonl")
    header, *lines = [json.loads(line) for line in (tmp_path / "out/found.jsonl").read_text().splitlines()]
    assert (header["videos"], header["min_frames"], header["max_frames"]) == (19, 25, 300)
    assert {line["id"]: line["reason"] for line in lines} == EXPECTED
    assert all(line.keys() >= VideoReport("x", True).__dict__.keys() for line in lines)
    good = next(line for line in lines if line["id"] == "good.mp4")
    assert (good["frames"], good["mtime_ns"] > 0) == (good["info"]["frames"], True)
    assert next(line for line in lines if line["id"] == "turned.mp4")["info"]["rotation"] == 270
    summary = json.loads((tmp_path / "out/found.summary.json").read_text())
    assert summary == report.summary()
    assert (summary["videos"], summary["usable"]) == (19, 9)
    assert summary["rejected"]["unreadable"] == 2
    assert summary["frames"] == sum(v.info.frames for v in report.usable if v.info)
    assert sorted(os.listdir(tmp_path / "out")) == ["found.jsonl", "found.jsonl.offsets", "found.summary.json"]
    table = report.table()
    assert table[0].startswith("9 of 19 videos usable")
    assert any("duplicate" in line and " 2 " in line and "remuxed.mkv" in line for line in table)
    report.save(tmp_path / "folder")
    assert (tmp_path / "folder/manifest.jsonl").read_text() == (tmp_path / "out/found.jsonl").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalmotionError, match="cannot write the manifest"):
        report.save(tmp_path / "file/x.jsonl")


def test_min_frames_and_list_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("short 8 1\nframes 99 push\ngood 31 2\n")
    found = {v.id: v for v in scan(folder, min_frames=5, list_file=tmp_path / "list.txt").videos}
    assert {i: v.usable for i, v in found.items()} == {"short.gif": True, "frames": True, "good.mp4": True}
    assert [found[i].label for i in ("frames", "good.mp4", "short.gif")] == ["push", 2, 1]
    assert found["good.mp4"].warnings == ("list_mismatch: the list says 31 frames, the file has 30",)
    with pytest.raises(VideoError) as caught:
        scan(tmp_path / "nowhere")
    assert caught.value.reason == "missing"


def test_an_empty_report_has_a_table() -> None:
    report = ScanReport("x", 25, (VideoReport("a", False, "static", "no motion"),))
    assert report.table()[0] == "0 of 1 videos usable, 0 frames"
    assert report.summary()["frames_min_median_max"] == []


def test_a_folder_without_anything_usable_is_an_error_behind_table_and_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from localmotion.cli import main

    good = encode(tmp_path / "good.mp4", moving_square(30))
    (tmp_path / "in/folder.mp4").mkdir(parents=True)
    (tmp_path / "in/text.mp4").write_text("no video")
    (tmp_path / "in/cut.mp4").write_bytes(good.read_bytes()[:-300])
    (tmp_path / "in/films.zip").write_bytes(b"PK")
    command = ["scan", str(tmp_path / "in"), "--workers", "0", "--manifest", str(tmp_path / "manifest.jsonl")]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert "0 of 4 videos usable, 0 frames" in out
    assert "\n4 rejected\n" in out
    error = " ".join(err.split("error: ")[1].split())
    assert "none of 4 videos is usable" in error
    assert "unsupported_container" in error
    assert "cut.mp4" in error
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()[1:]]
    assert {line["id"]: line["reason"] for line in lines} == {
        "cut.mp4": "unreadable",
        "films.zip": "unsupported_container",
        "folder.mp4": "unreadable",
        "text.mp4": "unreadable",
    }
    shutil.copy(good, tmp_path / "in/good.mp4")
    main(command)
    out, err = capsys.readouterr()
    assert "1 of 5 videos usable" in out
    assert "\n4 rejected\n" in out
    assert "films.zip (is an archive" in " ".join(out.split())
    assert "error" not in err


def test_faults_and_warnings_of_the_listing_are_in_the_report(tmp_path: Path) -> None:
    frames = moving_square(31, 96, 64)
    save_pictures(tmp_path / "frames", frames)
    (tmp_path / "frames/000007.jpg").unlink()
    encode(tmp_path / "frames/preview.mp4", frames)
    save_pictures(tmp_path / "sizes", moving_square(20, seed=1))
    save_pictures(tmp_path / "sizes", moving_square(20, 96, 64), first=21)
    (tmp_path / "list.txt").write_text("frames 31 1\nsizes 40 2\nnowhere 3 3\n")
    found = scan(tmp_path, workers=0).videos
    assert {v.id: v.reason for v in found} == {"frames": "", "frames/preview.mp4": "shadowed", "sizes": "mixed_sizes"}
    assert found[0].warnings == ("skipped_numbers: in 1 places, first behind 000006.jpg",)
    listed = scan(tmp_path, workers=0, list_file=tmp_path / "list.txt").videos
    assert {v.id: (v.reason, v.label) for v in listed} == {
        "frames": ("", 1),
        "nowhere": ("missing", 3),
        "sizes": ("mixed_sizes", 2),
    }
    assert listed[0].warnings[1] == "list_mismatch: the list says 31 frames, the folder has 30"


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize(("order", "count"), [("a abort b hang exit c d", 2), ("a b c d abort exit hang", 1)])
def test_dying_and_hanging_workers_cost_their_own_item(monkeypatch: pytest.MonkeyPatch, order: str, count: int) -> None:
    items = order.split()
    results: dict[int, str | Lost] = {}
    # The time limit passes when nothing is left but what hangs, however busy the machine is. From then on each look at the clock is an
    # hour later: what hangs may be given to its worker only then.
    hours = itertools.count(1)
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * next(hours) if len(results) == len(items) - 1 else 0.0)
    monkeypatch.setattr(workers, "time", clock)
    for index, result in map_isolated(act, items, count, timeout=2.0):
        results[index] = result
    assert sorted(results) == list(range(len(items)))
    assert {items[i]: r for i, r in results.items() if isinstance(r, str)} == {"a": "A", "b": "B", "c": "C", "d": "D"}
    lost = {items[i]: r for i, r in results.items() if isinstance(r, Lost)}
    assert {item: r.reason for item, r in lost.items()} == {
        "abort": "decoder_crash",
        "hang": "decoder_timeout",
        "exit": "decoder_crash",
    }
    assert "SIGABRT" in lost["abort"].detail
    assert "exit code 3" in lost["exit"].detail


def test_a_defect_of_the_function_is_raised_and_workers_end() -> None:
    import multiprocessing

    with pytest.raises(RuntimeError, match="a defect"):
        list(map_isolated(act, ["a", "raise"], 1))
    assert multiprocessing.active_children() == []
    assert list(map_isolated(act, [], 4)) == []


def test_decoding_workers_do_not_load_torch() -> None:
    code = "import sys, localmotion.video.scan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("decode", [[], ["--no-decode"]])
def test_a_manifest_without_extension_is_a_folder_each_time(
    decode: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scan that was cut off goes on with the same command; extract takes the same name."""
    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos" / "a.mp4", moving_square(30))
    for _ in range(2):
        main(["scan", str(tmp_path / "videos"), "--manifest", str(tmp_path / "list"), "--workers", "1", *decode])
    assert (tmp_path / "list" / "manifest.jsonl").is_file()
    shards = ["--size", "16", "--percept-size", "32", "--workers", "1"]
    main(["extract", "--manifest", str(tmp_path / "list"), "--out", str(tmp_path / "store"), *shards])
    for flag, said in (("--max-frames", "max_frames 0"), ("--shard-clips", "--shard-clips 0")):
        with pytest.raises(SystemExit):
            main(["extract", str(tmp_path / "videos"), "--out", str(tmp_path / "other"), flag, "0"])
        assert said in capsys.readouterr().err
