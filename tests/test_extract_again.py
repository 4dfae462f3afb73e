"""Extracting again after videos, limits or the machine have changed: what is done again, what stays, and what is reported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import localmotion.perception.extract as extract_module
from localmotion.cli import main
from localmotion.errors import StoreError, VideoError
from localmotion.perception import Recipe
from localmotion.perception.extract import ExtractSummary, extract_folder
from localmotion.video import ClipStore, WindowSampler, decode, video_ref
from localmotion.video.spool import Spool
from localmotion.video.workers import Lost
from video_files import encode, moving_square, save_pictures

FAST = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0)


def run(videos: Path, out: Path, **options: Any) -> ExtractSummary:
    return extract_folder(videos, out, FAST, **({"workers": 0, "shard_clips": 2, "min_frames": 5} | options))


def lengths(out: Path) -> dict[str, int]:
    store = ClipStore(out)
    store.verify()
    return dict(zip(store.ids, store.lengths.tolist(), strict=True))


def shards(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "shards").rglob("*")) if path.is_file()}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    encode(folder / "a.mp4", moving_square(8))
    encode(folder / "b.mp4", moving_square(9, seed=1))
    encode(folder / "short.mp4", moving_square(4))
    (folder / "torn.mp4").write_text("not a video")
    return folder


def changed(path: Path) -> Path:
    """The file with a newer time."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    return path


def test_nothing_is_done_again_for_nothing(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(videos, tmp_path / "s")
    before = shards(tmp_path / "s")
    assert first.rejected == {"too_short": 1, "unreadable": 1}
    for name in os.listdir(videos):  # copied or touched, but the same
        changed(videos / name)
    copy = shutil.copytree(videos, tmp_path / "copy", copy_function=shutil.copy)
    monkeypatch.setattr(extract_module, "iter_frames", None)  # would be called
    for folder in (videos, copy):
        summary = run(folder, tmp_path / "s")
        assert (summary.new, summary.again, summary.vanished, summary.clips) == (0, {}, [], 2)
    assert shards(tmp_path / "s") == before


def test_other_limits_try_again_what_they_decide(videos: Path, tmp_path: Path) -> None:
    run(videos, tmp_path / "s")
    summary = run(videos, tmp_path / "s", min_frames=4)
    assert (summary.new, summary.again) == (1, {"short.mp4": "limits"})
    assert any("done again 1 that the new limits cut in another way: short.mp4" in line for line in summary.lines())
    assert lengths(tmp_path / "s") == {"a.mp4": 8, "b.mp4": 9, "short.mp4": 4}
    assert [entry["id"] for entry in ClipStore(tmp_path / "s").rejected] == ["torn.mp4"]
    summary = run(videos, tmp_path / "s", min_frames=9)  # and the other way
    assert set(summary.again) == {"a.mp4", "short.mp4"}
    assert lengths(tmp_path / "s") == {"b.mp4": 9}
    assert summary.rejected == {"too_short": 2, "unreadable": 1}
    with pytest.raises(
        StoreError, match="was extracted with max_frames 300, this command has 50; use the same setting or another folder"
    ):
        run(videos, tmp_path / "s", max_frames=50)


@pytest.mark.parametrize("repair", ["another size", "same size", "unreadable", "pictures"])
def test_a_repaired_video_is_extracted(repair: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = videos / "torn.mp4"
    good = encode(tmp_path / "good.mp4", moving_square(7, seed=3)).read_bytes()
    if repair == "same size":
        broken.write_bytes(bytes(len(good)))
    if repair == "pictures":
        broken.unlink()
        broken = save_pictures(videos / "torn", moving_square(7, seed=3), "{:03d}.png")
        (whole := (broken / "004.png")).write_bytes((good_picture := whole.read_bytes())[:-30])
    if repair == "unreadable":  # as after chmod: neither size nor time change
        broken.write_bytes(good)
        monkeypatch.setattr(extract_module, "iter_frames", refuse_reading("torn.mp4"))
        monkeypatch.setattr(extract_module, "content_of", lambda ref: None)
    assert "torn.mp4" not in lengths_after(videos, tmp_path / "s")
    monkeypatch.undo()
    if repair == "pictures":
        whole.write_bytes(good_picture)
    elif repair != "unreadable":
        broken.write_bytes(good)
    summary = run(videos, tmp_path / "s")
    assert (summary.new, summary.again) == (1, {broken.name: "changed"})
    assert lengths(tmp_path / "s")[broken.name] == 7
    assert "unreadable" not in summary.rejected
    assert run(videos, tmp_path / "s").new == 0


def lengths_after(videos: Path, out: Path) -> dict[str, int]:
    run(videos, out)
    return lengths(out)


def refuse_reading(name: str) -> Callable[..., Any]:
    real = extract_module.iter_frames

    def frames(ref: Any, *args: Any, **options: Any) -> Any:
        if ref.id == name:
            raise VideoError(ref.path, "unreadable", "cannot be reached: Permission denied")
        return real(ref, *args, **options)

    return frames


def test_a_replaced_video_is_extracted_again_and_a_removed_one_named(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    run(videos, out)
    before = shards(out)
    encode(videos / "a.mp4", moving_square(12, seed=5))
    (videos / "b.mp4").unlink()
    encode(videos / "new.mp4", moving_square(6, seed=6))
    summary = run(videos, out)
    assert (summary.new, summary.again, summary.vanished) == (2, {"a.mp4": "changed"}, ["b.mp4"])
    assert any("1 videos: no longer in the folder or list, their clips stay: b.mp4" in line for line in summary.lines())
    assert lengths(out) == {"a.mp4": 12, "b.mp4": 9, "new.mp4": 6}
    assert {name: data for name, data in shards(out).items() if name in before} == before  # nothing that was there is touched
    store = ClipStore(out)
    np.testing.assert_array_equal(store.clip(store.ids.index("a.mp4")).frames, decode(video_ref(videos / "a.mp4"), 32))
    encode(videos / "a.mp4", moving_square(10, seed=6))  # and once more
    assert run(videos, out).new == 1
    assert lengths(out)["a.mp4"] == 10
    (videos / "a.mp4").write_text("spoilt")  # the store follows, as with a new one
    summary = run(videos, out)
    assert "a.mp4" not in lengths(out)
    assert summary.rejected["unreadable"] == 2


def test_what_was_replaced_stays_so_when_a_damaged_shard_is_made_anew(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    run(videos, out)
    encode(videos / "a.mp4", moving_square(12, seed=5))
    run(videos, out)
    want = lengths(out)
    assert sorted(os.listdir(out / "shards")) == ["00000", "00001", "00002"]
    shutil.rmtree(out / "shards/00000")  # a.mp4 and b.mp4, the former replaced by shard 2
    run(videos, out)
    assert lengths(out) == want
    shutil.rmtree(out / "shards/00002")
    run(videos, out)
    assert lengths(out) == want
    shutil.rmtree(out / "shards/00001")
    (videos / "short.mp4").unlink()
    (videos / "torn.mp4").unlink()
    run(videos, out)  # the shard's videos are gone: its number must not stay free
    assert lengths(out) == want


def test_what_the_machine_refused_is_tried_again(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(call: Any, tasks: Any, workers: int, timeout: float, together: int) -> Any:
        for task in tasks:
            yield task, Lost(reasons[task.ref.id], "as told")  # type: ignore[arg-type]

    reasons = {"a.mp4": "decoder_timeout", "b.mp4": "decoder_memory", "short.mp4": "decoder_crash", "torn.mp4": "decoder_crash"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract_module, "results_of", weak)
        with pytest.raises(VideoError, match="none of 4 videos is usable"):
            run(videos, tmp_path / "s")
    summary = run(videos, tmp_path / "s")
    assert summary.again == {"a.mp4": "machine", "b.mp4": "machine"}
    assert lengths(tmp_path / "s") == {"a.mp4": 8, "b.mp4": 9}


def test_unfinished_clips_of_a_replaced_video_are_not_used(videos: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int | None, note: str) -> None:
        if done:
            raise StopError

    out = tmp_path / "s"
    with pytest.raises(StopError):
        run(videos, out, progress=stop)
    assert Spool(out).has("a.mp4")
    encode(videos / "a.mp4", moving_square(11, seed=5))
    assert run(videos, out).new == 2
    assert lengths(out) == {"a.mp4": 11, "b.mp4": 9}
    assert sorted(os.listdir(out)) == ["flow.json", "shards", "store.json"]


def forget(out: Path) -> None:
    """Make a store as earlier versions wrote it."""
    for shard in (out / "shards").iterdir():
        (shard / "videos.jsonl").unlink()
        index = json.loads((shard / "shard.json").read_text())
        for entry in index["clips"]:
            entry["source"] = {}
        (shard / "shard.json").write_text(json.dumps(index, indent=1, sort_keys=True))


def test_a_store_of_an_earlier_version_is_continued(videos: Path, tmp_path: Path) -> None:
    encode(videos / "film.mp4", moving_square(40, seed=2))
    out = tmp_path / "s"
    run(videos, out, max_frames=15, max_clips=1)
    forget(out)
    before = shards(out)
    summary = run(videos, out, max_frames=15)
    assert (summary.new, summary.again, summary.cut_before) == (0, {}, ["film.mp4"])
    assert any("stored by an earlier version up to their first clip" in line for line in summary.lines())
    assert shards(out) == before
    summary = run(videos, out, max_frames=15, min_frames=4)  # it says how long the short one was
    assert summary.again == {"short.mp4": "limits"}
    assert WindowSampler(ClipStore(out), 4, 2, 0, split="all", prefetch=False).batch(0)["image"].shape[1] == 4


def test_labels_of_an_earlier_list_are_reported(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a.mp4 8 1\nb.mp4 9 2\n")
    (tmp_path / "two.txt").write_text("a.mp4 8 7\nb.mp4 9 2\n")
    run(videos, tmp_path / "s", list_file=tmp_path / "one.txt")
    summary = run(videos, tmp_path / "s", list_file=tmp_path / "two.txt")
    assert (summary.new, summary.relabeled) == (0, ["a.mp4"])


@pytest.mark.parametrize("line", [{"id": "a.mp4"}, {"frames": -1}, {"max_frames": "x"}, {"more": 3}, {"bytes": []}])
def test_a_forged_memory_is_refused(line: dict[str, Any], videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    run(videos, out)
    file = out / "shards/00000/videos.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(line if "id" in line else json.loads(first) | line), *rest]))
    with pytest.raises(StoreError, match=r"shard 00000 is damaged \(videos.jsonl: a.mp4\); delete that shard folder"):
        run(videos, out)
    assert lengths(out) == {"a.mp4": 8, "b.mp4": 9}


def test_a_folder_without_usable_videos_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "y.mp4").mkdir(parents=True)
    (tmp_path / "in" / "x.mp4").write_text("text")
    command = [
        "extract",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "s"),
        "--workers",
        "0",
        "--size",
        "32",
        "--percept-size",
        "32",
    ]
    for _ in range(2):  # the second time from memory
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "none of 2 videos is usable: 2 unreadable: x.mp4, y.mp4; the first: is not a readable video" in told
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(tmp_path / "s"), "--out", str(tmp_path / "p.png")])
    assert left.value.code == 2
    assert "holds no clips; all 2 videos were rejected (2 unreadable: x.mp4, y.mp4)" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(StoreError, match=r"holds no clips; all 2 videos were rejected"):
        WindowSampler(ClipStore(tmp_path / "s"), 8, 2, 0)
    encode(tmp_path / "in" / "good.mp4", moving_square(30))
    main([*command, "--memory", "0"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 clips, 30 frames" in shown
    assert "rejected 2: unreadable (x.mp4, y.mp4)" in shown


def test_the_memory_of_a_shard_is_what_it_was_made_from(videos: Path, tmp_path: Path) -> None:
    run(videos, tmp_path / "s")
    first = json.loads((tmp_path / "s/shards/00000/videos.jsonl").read_text().splitlines()[0])
    status = (videos / "a.mp4").stat()
    assert first.pop("content")
    assert first == {
        "id": "a.mp4", "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "label": None, "frames": 8, "left_out": 0,
        "more": False, "min_frames": 5, "max_frames": 300, "max_clips": None,
    }  # fmt: skip
