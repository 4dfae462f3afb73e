"""Long videos become several clips: what they are, how they are split, and that no more than a few are in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import localmotion.perception.extract as extract_module
from localmotion.cli import main
from localmotion.errors import ConfigError
from localmotion.perception import Recipe
from localmotion.perception.clips import ClipExtractor
from localmotion.perception.extract import ExtractSummary, extract_folder, extract_many, in_this_process
from localmotion.perception.unfinished import Task, VideoDone
from localmotion.video import Clip, ClipStore, WindowSampler, decode, find_videos, video_ref
from localmotion.video.history import Limits, clip_id
from localmotion.video.sample import is_heldout
from localmotion.video.shards import check_id
from video_files import encode, moving_square, save_pictures

FAST = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0)


def run(videos: Path, out: Path, **options: Any) -> ExtractSummary:
    return extract_folder(videos, out, FAST, **({"workers": 0, "min_frames": 5, "max_frames": 20} | options))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (folder := tmp_path / "in").mkdir()
    encode(folder / "exact.mp4", moving_square(40))
    encode(folder / "film.mp4", moving_square(46, seed=1))
    encode(folder / "rest.mp4", moving_square(23, seed=2))
    encode(folder / "short.mp4", moving_square(12, seed=3))
    return folder


def clips(out: Path) -> dict[str, int]:
    store = ClipStore(out)
    return dict(zip(store.ids, store.lengths.tolist(), strict=True))


def test_a_film_becomes_clips_of_all_its_frames(videos: Path, tmp_path: Path) -> None:
    summary = run(videos, tmp_path / "s")
    assert clips(tmp_path / "s") == {
        "exact.mp4": 20,
        "exact.mp4#000020-000040": 20,
        "film.mp4": 20,
        "film.mp4#000020-000040": 20,
        "film.mp4#000040-000046": 6,
        "rest.mp4": 20,
        "short.mp4": 12,
    }
    assert (summary.left_out, summary.left_out_of, summary.limited) == (3, 1, [])
    assert any("left out 3 frames at the ends of 1 videos, rests shorter than --min-frames" in line for line in summary.lines())
    store = ClipStore(tmp_path / "s")
    for number, name in enumerate(store.ids):
        check_id(name)
        clip = store.clip(number)
        assert clip.source == {"video": store.videos[number], "start": clip.source["start"], "stop": clip.source["stop"]}
        whole = decode(video_ref(videos / store.videos[number]), 32)
        np.testing.assert_array_equal(clip.frames, whole[clip.source["start"] : clip.source["stop"]])
        assert not clip.flow[-1].any()
        assert clip.info["cut_short"] == (name == "rest.mp4")
        # As from a file that decodes to these frames and has this name: the draws follow from it.
        alone = ClipExtractor(FAST).extract(np.ascontiguousarray(clip.frames), name)
        np.testing.assert_array_equal(clip.flow, alone.flow)
        np.testing.assert_array_equal(clip.tracks, alone.tracks)


def test_the_number_of_clips_of_a_video_can_be_limited_and_the_rest_is_reported(videos: Path, tmp_path: Path) -> None:
    with (videos / "torn.mkv").open("wb") as file:
        file.write(encode(tmp_path / "torn.mkv", moving_square(60, seed=4)).read_bytes()[:-300])
    whole = run(videos, tmp_path / "whole")
    assert whole.rejected == {"truncated": 1}  # damage anywhere rejects the video
    summary = run(videos, tmp_path / "s", max_clips=1)
    assert set(clips(tmp_path / "s")) == {"exact.mp4", "film.mp4", "rest.mp4", "short.mp4", "torn.mkv"}
    assert summary.limited == ["exact.mp4", "film.mp4", "rest.mp4", "torn.mkv"]
    assert any("4 videos: left out the rest, --max-clips: exact.mp4, film.mp4, rest.mp4, ..." in x for x in summary.lines())
    summary = run(videos, tmp_path / "s", max_clips=2)  # more of them now
    assert summary.again == dict.fromkeys(("exact.mp4", "film.mp4", "rest.mp4", "torn.mkv"), "limits")
    assert (summary.limited, summary.left_out) == (["film.mp4", "torn.mkv"], 3)
    summary = run(videos, tmp_path / "s")
    assert summary.again == dict.fromkeys(("film.mp4", "torn.mkv"), "limits")
    assert clips(tmp_path / "s") == clips(tmp_path / "whole")
    with pytest.raises(ConfigError, match="max_clips=0"):
        run(videos, tmp_path / "s", max_clips=0)


def test_every_limit_cuts_as_it_says() -> None:
    for frames in range(60):
        for limits in (Limits(5, 20), Limits(0, 7), Limits(20, 20), Limits(5, 20, 2)):
            spans = limits.spans(frames)
            assert all(limits.least <= stop - start <= limits.max_frames for start, stop in spans)
            assert [start for start, _ in spans] == [limits.max_frames * n for n in range(len(spans))]
            left = frames - (spans[-1][1] if spans else 0)
            assert left < limits.least or limits.max_clips == len(spans)
            kept = replace(limits, keep_rest=True).spans(frames)
            assert kept[:-1] == spans[:-1]
            assert not spans or kept[-1] == (spans[-1][0], spans[-1][1] if limits.max_clips == len(spans) else frames)
    names = [clip_id("a.mp4", n * 300, (n + 1) * 300) for n in range(400)]
    assert names == sorted(names)
    assert len(set(names)) == 400


def test_workers_give_the_same_bytes_and_an_interruption_keeps_the_clips_of_a_film(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(out: Path) -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    run(videos, tmp_path / "one")
    run(videos, tmp_path / "two", workers=2)
    run(videos, tmp_path / "three", together=3)
    want = files(tmp_path / "one")
    assert files(tmp_path / "two") == want
    assert files(tmp_path / "three") == want

    class StopError(Exception):
        pass

    looked: list[str] = []
    real = ClipExtractor.extract_many

    def watch(self: ClipExtractor, asked: list[tuple[NDArray[np.uint8], str]]) -> Any:
        looked.extend(name for _, name in asked)
        if looked[-1] == stop:
            raise StopError
        return real(self, asked)

    monkeypatch.setattr(ClipExtractor, "extract_many", watch)
    for stop in ("film.mp4#000020-000040", "film.mp4#000040-000046", ""):
        looked.clear()
        if stop:
            with pytest.raises(StopError):
                run(videos, tmp_path / "again")
        else:
            run(videos, tmp_path / "again")
    assert looked == ["film.mp4#000040-000046", "rest.mp4", "short.mp4"]  # what was finished is not looked at again
    assert files(tmp_path / "again") == want


def test_an_hour_is_not_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in frames: of those decoded no more than three clips are alive while the next is made."""
    ref = find_videos(encode(tmp_path / "film.mp4", moving_square(30)))[0]
    alive, most = 0, 0

    class Frame(np.ndarray):  # type: ignore[type-arg]
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def endless(*_: Any, **__: Any) -> Iterator[NDArray[np.uint8]]:
        nonlocal alive, most
        for number in range(400):
            alive += 1
            most = max(most, alive)
            yield np.full((32, 32, 3), number % 251, np.uint8).view(Frame)

    stacks: list[int] = []
    monkeypatch.setattr(extract_module, "iter_frames", endless)
    messages = in_this_process(extract_many([Task(ref)], FAST, Limits(5, 10)))
    got = 0
    for message in messages:
        if isinstance(message, Clip):
            got += 1
            stacks.append(alive)
            assert message.source["start"] == 10 * (got - 1)
        else:
            assert isinstance(message, VideoDone)
            assert (message.frames, message.left_out, message.more) == (400, 0, False)
    assert got == 40
    assert most <= 21
    assert max(stacks) <= 21


def test_clips_of_one_film_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    for number in range(6):
        encode(folder / f"clip{number}.mp4", moving_square(40, seed=number))
    run(folder, tmp_path / "s")
    store = ClipStore(tmp_path / "s")
    assert len(store) == 12
    sides = {
        split: {store.videos[i] for i in WindowSampler(store, 4, 2, 0, split=split, heldout_fraction=0.5, prefetch=False).clips}  # type: ignore[arg-type]
        for split in ("train", "heldout")
    }
    assert sides["train"] | sides["heldout"] == {f"clip{n}.mp4" for n in range(6)}
    assert not sides["train"] & sides["heldout"]
    assert sides["heldout"] == {name for name in store.videos if is_heldout(name, 0.5)}
    # their ids alone would tear them apart
    assert {is_heldout(name, 0.5) == is_heldout(video, 0.5) for name, video in zip(store.ids, store.videos, strict=True)} == {
        True,
        False,
    }


def test_a_video_with_the_name_of_a_part_of_another_is_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    encode(folder / "film.mp4", moving_square(40))
    save_pictures(folder / "film.mp4#000020-000040", moving_square(20), "{:03d}.png")
    run(folder, tmp_path / "s")
    store = ClipStore(tmp_path / "s")
    assert store.ids == ["film.mp4", "film.mp4#000020-000040"]
    assert store.videos == ["film.mp4"] * 2
    assert [(entry["id"], entry["reason"]) for entry in store.rejected] == [("film.mp4#000020-000040", "bad_name")]


def test_the_command_has_the_limits(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workers", "0", "--size", "32", "--percept-size", "32", "--min-frames", "5"]
    main(["extract", str(videos), "--out", str(tmp_path / "s"), *flags, "--max-frames", "20", "--max-clips", "2"])
    shown = capsys.readouterr().out
    assert "6 clips, 112 frames" in shown
    assert "1 videos: left out the rest, --max-clips: film.mp4" in " ".join(shown.split())
    assert sorted(os.listdir(tmp_path / "s")) == ["flow.json", "shards", "store.json"]
