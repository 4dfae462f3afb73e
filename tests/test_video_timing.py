"""Pictures in time: interlaced fields, a given frame rate, and what extraction says about rates."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.filter import Graph
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from localmotion.cli import main
from localmotion.errors import ConfigError, StoreError, VideoError
from localmotion.perception import Recipe
from localmotion.perception.extract import extract_folder, extract_one
from localmotion.runs.settings import recipe_of
from localmotion.video import ClipStore, ClipStoreWriter, Decoding, decode, iter_frames, probe, timing, video_ref
from localmotion.video.scan import scan
from localmotion.video.timing import Picture, resampled
from property_examples import examples
from video_files import encode, moving_square, save_pictures

SMALL = {"size": 32, "percept_size": 32, "tracks": 4, "redraw_rounds": 0}

# ---------------------------------------------------------------------------------------------------------- interlaced

INTERLACED = {
    "h264.mp4": ("libx264", "tff", {"crf": "4"}),
    "h264_bottom_first.mkv": ("libx264", "bff", {"crf": "4"}),
    "mpeg2.avi": ("mpeg2video", "tff", {"b": "8000000"}),
}


def moments(count: int) -> NDArray[np.uint8]:
    """(T, 96, 128) grey: a bright textured bar walks right by four pixels a moment."""
    rng = np.random.default_rng(0)
    ground = cv2.GaussianBlur(rng.integers(0, 120, (96, 128), np.uint8), (0, 0), 3)
    bar = cv2.GaussianBlur(rng.integers(150, 256, (60, 30), np.uint8), (0, 0), 2)
    out = np.repeat(ground[None], count, 0)
    for t in range(count):
        out[t, 20:80, 4 + 4 * t % 80 : 34 + 4 * t % 80] = bar
    return out


def encode_interlaced(path: Path, video: NDArray[np.uint8], codec: str, order: str, options: dict[str, str]) -> Path:
    """Two moments a picture: the earlier in the even lines ("tff", top field first) or in the odd ones ("bff")."""
    late = {"tff": 1, "bff": 0}[order]
    pictures = video[::2].copy()
    pictures[:, late::2] = video[1::2, late::2]
    graph = Graph()
    nodes = [graph.add("buffer", "video_size=128x96:pix_fmt=yuv420p:time_base=1/10")]
    nodes += [graph.add("setfield", f"mode={order}"), graph.add("buffersink")]  # encoders go by what a frame is marked as
    graph.link_nodes(*nodes).configure()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"flags": "+ildct+ilme", **options})
        stream.height, stream.width = video.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.repeat(picture[..., None], 3, 2), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            graph.vpush(frame)
            marked = graph.vpull()
            marked.pts, marked.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(marked))
        container.mux(stream.encode(None))
    return path


def combing(frames: NDArray[np.uint8]) -> float:
    """Mean difference of lines from the mean of those above and below."""
    grey = frames[..., 1].astype(float)
    return float(np.abs(grey[:, 1:-1] - (grey[:, :-2] + grey[:, 2:]) / 2).mean())


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_pictures_show_one_moment(tmp_path: Path, name: str) -> None:
    video = moments(24)
    path = encode_interlaced(tmp_path / name, video, *INTERLACED[name])
    assert probe(video_ref(path)).interlaced
    found = Decoding()
    frames = np.stack(list(iter_frames(video_ref(path), None, found=found)))
    woven = decode(video_ref(path), None, legacy=True)
    progressive = np.repeat(video[::2, ..., None], 3, 3)
    assert frames.shape == woven.shape == progressive.shape
    assert combing(woven) > 1.8 * combing(progressive)
    assert combing(frames) < 1.2 * combing(progressive)
    assert np.abs(frames.astype(float) - progressive).mean() < 0.5 * np.abs(woven.astype(float) - progressive).mean()
    assert found.take() == {"fps": 10.0, "interlaced": 12}
    few = list(iter_frames(video_ref(path), 32, 2, start=3, max_frames=2))
    np.testing.assert_array_equal(few, decode(video_ref(path), 32)[3:7:2])
    (report,) = scan(tmp_path, min_frames=2, workers=0).videos
    assert "interlaced" in [text.partition(":")[0] for text in report.warnings]


def test_only_interlaced_videos_pay_for_the_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a filter for a progressive video")

    monkeypatch.setattr(timing, "_bwdif", refuse)
    path = encode(tmp_path / "progressive.mp4", moving_square(5))
    assert len(decode(video_ref(path), 32)) == 5
    assert not probe(video_ref(path)).interlaced


def test_interlaced_frames_before_damage_can_be_had(tmp_path: Path) -> None:
    path = encode_interlaced(tmp_path / "whole.mkv", moments(40), "libx264", "tff", {"crf": "4", "bf": "0"})
    whole = decode(video_ref(path), 32)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    got = []
    with pytest.raises(VideoError) as caught:
        got.extend(iter_frames(video_ref(path), 32))
    assert caught.value.reason == "truncated"
    got = got or list(iter_frames(video_ref(path), 32, max_frames=5))
    np.testing.assert_array_equal(got[:5], whole[:5])


# --------------------------------------------------------------------------------------------------------- frame rates


def clock(path: Path, times: list[float], tick: Fraction = Fraction(1, 1000)) -> Path:
    """A video that shows at each of these times a plain grey of 200 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "4"})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = tick
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), round(200 * time), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown_times(path: Path, **options: Any) -> NDArray[np.floating]:
    return np.array([frame.mean() / 200 for frame in iter_frames(video_ref(path), 16, **options)])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rate", [15, 25, 29.97, 60])
def test_one_time_step_is_one_time_whatever_the_recorded_rate(tmp_path: Path, rate: float, suffix: str) -> None:
    path = clock(tmp_path / f"clock{suffix}", [n / rate for n in range(int(rate))])
    found = Decoding()
    times = shown_times(path, fps=15, found=found)
    assert len(times) == 15
    assert np.abs(times - np.arange(15) / 15).max() <= 0.5 / rate + 0.01
    assert found.take() == {"fps": 15.0}
    assert found.take() == {"fps": 15.0}  # of the frames since: none
    list(iter_frames(video_ref(path), 16, 3, found=found))
    assert found.take()["fps"] == pytest.approx(rate / 3, rel=0.01)


def test_variable_frame_rate_is_made_even(tmp_path: Path) -> None:
    times = [0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.7, 1.0, 1.1]
    path = clock(tmp_path / "vfr.mkv", times)
    found = Decoding()
    assert len(shown_times(path, found=found)) == 10
    assert found.take() == {"fps": pytest.approx(9 / 1.1, abs=0.01), "vfr": True}
    want = [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.7, 0.7, 0.7, 1.0, 1.0, 1.1]
    np.testing.assert_allclose(shown_times(path, fps=10, found=found), want, atol=0.012)
    assert found.take() == {"fps": 10.0, "repeated": 4}


def test_repeated_frames_are_counted_and_their_own(tmp_path: Path) -> None:
    path = clock(tmp_path / "slow.mp4", [n / 10 for n in range(10)])
    found = Decoding()
    frames = list(iter_frames(video_ref(path), 16, fps=20, found=found))
    assert len(frames) == 20
    assert found.take() == {"fps": 20.0, "repeated": 10}
    frames[0][:] = 255
    assert frames[1].max() < 20


def test_start_stride_and_limit_count_resampled_frames(tmp_path: Path) -> None:
    path = clock(tmp_path / "clock.mp4", [n / 30 for n in range(30)])
    every = list(iter_frames(video_ref(path), 16, fps=12))
    found = Decoding()
    some = list(iter_frames(video_ref(path), 16, 3, start=1, max_frames=3, fps=12, found=found))
    np.testing.assert_array_equal(some, every[1::3][:3])
    assert found.take() == {"fps": 4.0}
    assert len(decode(video_ref(path), 16, fps=12, stride=3)) == 4


def test_pictures_of_a_folder_are_taken_to_be_at_the_given_rate(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "frames", moving_square(6))
    found = Decoding()
    assert len(list(iter_frames(video_ref(folder), 16, fps=10, found=found))) == 6
    assert found.take() == {"fps": 10.0}
    list(iter_frames(video_ref(folder), 16, found=found))
    assert found.take() == {}


@pytest.mark.parametrize("fps", [-1.0, math.nan])
def test_impossible_rates_are_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match="fps"):
        next(iter_frames(video_ref(tmp_path), 16, fps=fps))
    with pytest.raises(ConfigError, match="fps"):
        Recipe(fps=fps)


def pictures(times: list[float]) -> list[Picture]:
    return [Picture(number, time, False) for number, time in enumerate(times)]


def test_times_that_jump_or_go_back_are_refused_and_missing_ones_made_up() -> None:
    for times, word in (([0, 0.1, 1000], "1000 seconds"), ([5, 5.1, 2], "-3 seconds")):
        with pytest.raises(VideoError, match=word) as caught:
            list(resampled(iter(pictures(times)), 10, Path("x"), 10, 0.001))
        assert caught.value.reason == "odd_times"
    unknown = pictures([math.nan] * 6)
    assert [p.frame for p in resampled(iter(unknown), 5, Path("x"), 10, 0.001)] == [0, 2, 4]
    with pytest.raises(VideoError, match="no times"):
        list(resampled(iter(unknown), 5, Path("x"), None, 0.001))
    assert [p.frame for p in resampled(iter(pictures([3.0])), 5, Path("x"), None, 0.001)] == [0]


@examples(60)
@given(gaps=st.lists(st.floats(0.001, 0.5), min_size=1, max_size=20), fps=st.floats(1, 60), start=st.floats(-5, 5))
def test_each_time_gets_the_nearest_picture(gaps: list[float], fps: float, start: float) -> None:
    times = np.cumsum([start, *gaps])
    have = [p.frame for p in resampled(iter(pictures(times.tolist())), fps, Path("x"), None, 0.0)]
    for number, frame in enumerate(have):
        distance = np.abs(times - (start + number / fps))
        assert distance[frame] <= distance.min() + 1e-6
    assert abs(len(have) / fps - (times[-1] - start + gaps[-1] / 2)) <= 1 / fps + 1e-3


# ------------------------------------------------------------------------------------------------- recipes and extraction

OLD = """{"algorithm": 2, "backend_options": {}, "flow": "dis", "flow_span": 1, "frame_stride": 1, "min_motion": 0.05, "percept_size": 128,
"prompt": "person. hand. robot arm.", "redraw_rounds": 2, "seed": 0, "segment": "saliency", "segment_frames": 25, "size": 64,
"track": "lk", "tracks": 32}"""


def test_recipes_of_before_read_as_they_were_meant_and_keep_their_hash() -> None:
    old = json.loads(OLD)
    recipe = Recipe.from_json(old)
    assert (recipe.fps, recipe.algorithm, recipe.legacy_decoding) == (0, 2, True)
    assert recipe.to_json() == old
    assert recipe.hash() == "b985b18afce3"  # of a store made before there was an fps
    assert recipe_of(old, "here") == recipe
    del old["algorithm"]
    assert Recipe.from_json(old).algorithm == 1
    assert not Recipe().legacy_decoding
    assert Recipe(fps=30).hash() == Recipe(fps=30.0).hash() != Recipe().hash()
    for fps in (0, 12.5):
        assert recipe_of(Recipe(fps=fps).to_json(), "here") == Recipe(fps=fps)
    with pytest.raises(ConfigError, match="fps"):
        recipe_of({**Recipe().to_json(), "fps": "15"}, "here")


def test_a_store_of_before_goes_on_with_its_own_recipe_and_refuses_another(tmp_path: Path) -> None:
    old = json.loads(OLD)
    recipe = Recipe.from_json(old)
    ClipStoreWriter.open(tmp_path / "store", 64, old, "b985b18afce3", 32, 4)
    ClipStoreWriter.open(tmp_path / "store", 64, recipe.to_json(), recipe.hash(), 32, 4)
    with pytest.raises(StoreError, match="algorithm 2 -> 3"):
        ClipStoreWriter.open(tmp_path / "store", 64, Recipe().to_json(), Recipe().hash(), 32, 4)


def test_extraction_decodes_as_the_recipe_says(tmp_path: Path) -> None:
    ref = video_ref(encode(tmp_path / "square.mp4", moving_square(12)))
    for algorithm, legacy in ((2, True), (3, False)):
        clip: Any = extract_one(ref, Recipe(**SMALL, algorithm=algorithm), 2, 100)
        np.testing.assert_array_equal(clip.frames, decode(ref, 32, legacy=legacy))
        assert clip.info["fps"] == 10


def test_extraction_tells_of_mixed_rates_and_makes_them_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for rate in (15, 60):
        clock(tmp_path / "in" / f"{rate}.mp4", [n / rate for n in range(rate)])
    clock(tmp_path / "in" / "vfr.mp4", [0, 0.1, 0.15, 0.2, 0.5, 1.0])
    mixed = extract_folder(tmp_path / "in", tmp_path / "mixed", Recipe(**SMALL), min_frames=5, workers=0)
    line = "clips of variable frame rate: 1; --fps N makes one time step the same time in all videos"
    assert f"rates 5 to 60 fps are mixed, {line}" in "\n".join(mixed.lines())
    even = extract_folder(tmp_path / "in", tmp_path / "even", Recipe(**SMALL, fps=15), min_frames=5, workers=0)
    store = ClipStore(tmp_path / "even")
    assert store.lengths.tolist()[:2] == [15, 15]
    assert [info["fps"] for info in store.infos] == [15, 15, 15]
    assert store.recipe["fps"] == 15
    text = "\n".join(even.lines())
    assert "are mixed" not in text
    assert "clips with repeated frames: 1;" in text


def test_the_flag_reaches_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["extract", str(tmp_path), "--out", str(tmp_path / "out"), "--fps", "-2"])
    assert "fps=-2.0 is out of range" in " ".join(capsys.readouterr().err.split())
