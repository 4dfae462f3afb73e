"""Extraction where clips are awkward: short, static, empty, cut, left by their points; offline trackers; folders and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError
from localmotion.perception import Recipe
from localmotion.perception.clips import ClipExtractor, _Choice, seed_of
from localmotion.perception.extract import extract_folder, flow_distribution
from localmotion.perception.stream import Magnitudes, StreamingExtractor
from localmotion.video.store import ClipStore
from localmotion.video.write import write_video
from perception_scenes import SIDE, scene, share_on, texture

RECIPE = Recipe(percept_size=SIDE, tracks=12, segment_frames=8)


def check(frames: NDArray[np.uint8], recipe: Recipe = RECIPE) -> dict[str, object]:
    """What holds for every clip; its info."""
    motion = ClipExtractor(recipe).extract(frames, "clip")
    length = len(frames)
    assert motion.flow.shape == (length, recipe.size, recipe.size, 2)
    assert motion.tracks.shape == (length, recipe.tracks, 2)
    assert np.isfinite(motion.flow).all()
    assert np.isfinite(motion.tracks).all()
    assert not motion.flow[-1].any()
    assert not motion.visible[-1].any()
    # a usable point lies in the picture, and where it keeps its identity it is found where the next frame has it
    at = motion.tracks[motion.visible]
    assert (at >= -0.75).all()
    assert (at <= recipe.size - 0.25).all()
    # a slot's identities only grow: a track that has ended never comes back
    assert (np.diff(motion.track_id, axis=0) >= 0).all()
    json.dumps(motion.info)
    return motion.info


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 10, 17])
@pytest.mark.parametrize("rounds", [0, 1])
def test_any_length(length: int, rounds: int) -> None:
    info = check(scene(frames=length)[0], Recipe(percept_size=SIDE, tracks=12, segment_frames=8, redraw_rounds=rounds))
    starts = [part["start"] for part in info["segments"]]  # type: ignore[attr-defined]
    assert starts == ([t for t in range(0, length, 8) if length - t > 2] if rounds else [])


def test_pictures_without_anything_to_follow() -> None:
    blank = np.full((10, SIDE, SIDE, 3), 127, np.uint8)
    info = check(blank)
    assert info["flow"]["mean"] == 0  # type: ignore[index]
    assert all(part["salient"] == 0 and not part["foreground"] for part in info["segments"])  # type: ignore[attr-defined]
    noise = np.random.default_rng(0).integers(0, 256, blank.shape, dtype=np.uint8)
    assert check(noise)["followed"] < 0.8  # type: ignore[operator]


def test_points_that_leave_are_lost_and_drawn_again() -> None:
    """The object is gone after ten frames: its points end, new ones lie in the picture."""
    frames, masks = scene(frames=16, velocity=(11.0, 0.0))
    assert not masks[-1].any()
    for rounds in (0, 2):
        recipe = Recipe(percept_size=SIDE, tracks=12, segment_frames=16, redraw_rounds=rounds)
        motion = ClipExtractor(recipe).extract(frames, "clip")
        check(frames, recipe)
        assert motion.info["lost"] >= 4
        assert motion.visible[-2].mean() > 0.6
        assert len(np.unique(motion.track_id)) > 12


def test_points_lie_on_the_object_though_the_camera_moves_more() -> None:
    frames, masks = scene(frames=10, velocity=(1.5, 1.0), camera=(-3.0, 1.5))
    motion = ClipExtractor(Recipe(percept_size=SIDE, tracks=16, segment_frames=10)).extract(frames, "clip")
    assert share_on(masks[0], motion.tracks[0] * 2 + 0.5) > 0.7  # 15 % of the picture
    assert motion.info["camera"] == pytest.approx(np.hypot(3.0, 1.5) / 2, rel=0.15)


def test_what_choosing_has_followed_is_not_followed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """... and gives the same bytes as if it were."""
    frames, _ = scene(frames=20, velocity=(5.0, 2.0))
    short = ClipExtractor(RECIPE).extract(frames, "clip")
    monkeypatch.setattr(_Choice, "known", lambda *_: None)
    whole = ClipExtractor(RECIPE).extract(frames, "clip")
    for name in ("flow", "tracks", "visible", "track_id"):
        np.testing.assert_array_equal(getattr(short, name), getattr(whole, name))
    assert short.info == whole.info
    assert short.info["lost"] > 0


def test_the_key_decides_the_draw() -> None:
    frames, _ = scene(frames=6)
    one, same, other = (ClipExtractor(RECIPE).extract(frames, key) for key in ("a", "a", "b"))
    np.testing.assert_array_equal(one.tracks, same.tracks)
    assert not np.array_equal(one.tracks, other.tracks)
    assert seed_of("a", 0) != seed_of("a", 1)


class Offline:
    """A tracker that wants whole clips: points move by (2, 1) a frame, and the first one is hidden in one frame of three."""

    name, licence, causal = "offline", "none", False

    def __init__(self) -> None:
        self.steps = 0

    def track(self, frames: NDArray[np.uint8], points: NDArray[np.float32], start: int = 0) -> tuple[NDArray, NDArray]:
        time = np.arange(len(frames), dtype=np.float32)[:, None, None]
        seen = np.ones((len(frames), len(points)), bool)
        seen[2::3, 0] = False
        return points[None] + time * np.array([2, 1], np.float32), seen

    def step(
        self, previous: NDArray[np.uint8], current: NDArray[np.uint8], points: NDArray[np.float32]
    ) -> tuple[NDArray, NDArray]:
        self.steps += 1
        return points + np.array([2, 1], np.float32), np.ones(len(points), bool)


def test_an_offline_tracker_keeps_its_own_tracks() -> None:
    frames, _ = scene(frames=18)
    frames = np.concatenate([frames, 255 - texture(5)[None] // 2, np.repeat(frames[:1], 4, 0) // 4])
    extractor = ClipExtractor(RECIPE)
    extractor.track = tracker = Offline()
    motion = extractor.extract(frames, "clip")
    starts = [part["start"] for part in motion.info["segments"]]
    assert motion.info["cuts"] == [18, 19]
    assert starts == [0, 8, 19]  # 16 and 18 are too near to a cut for a choice
    assert tracker.steps == 2  # 15 to 16 and 16 to 17; everything else comes from whole segments
    for start, end in ((0, 8), (8, 16)):
        np.testing.assert_allclose(np.diff(motion.tracks[start:end], axis=0), np.broadcast_to([1, 0.5], (7, 12, 2)), atol=1e-5)
        assert (motion.track_id[start:end] == motion.track_id[start]).all()
        np.testing.assert_array_equal(motion.visible[start : end - 1, 0], [True, False, False, True, False, False, True])
        assert motion.visible[start : end - 1, 1:].all()
    assert motion.visible[7, 1:].all()  # the motion into the next segment still belongs to the old points
    assert not motion.visible[17].any()
    assert not motion.visible[18].any()
    assert (motion.track_id[8] > motion.track_id[7]).all()


def test_streaming_keeps_its_own_frames() -> None:
    frames, _ = scene(frames=5)
    recipe = Recipe(percept_size=SIDE, tracks=6)
    stream, other = StreamingExtractor(recipe, 0), StreamingExtractor(recipe, 0)
    buffer = frames[0].copy()
    stream.reset(buffer)
    other.reset(frames[0])
    for frame in frames[1:]:
        buffer[:] = frame  # a renderer that writes into the same memory
        np.testing.assert_array_equal(stream.step(buffer).flow, other.step(frame).flow)
    assert stream.magnitudes.number == 4 * -(-64 * 64 // Magnitudes.every)
    with pytest.raises(LocalmotionError, match="reset"):
        StreamingExtractor(recipe, 0).step(frames[0])
    # a second episode: nothing of the first one is left but the count of identities
    last = int(stream.slots.track_id.max())
    first = stream.reset(frames[0])
    assert not first.visible.any()
    assert not first.flow.any()
    assert (first.track_id > last).all()


SMALL = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=1)


def test_limited_videos_are_cut_short_and_strides_kept(tmp_path: Path) -> None:
    frames, _ = scene(frames=40, velocity=(1.0, 0.5))
    write_video(tmp_path / "in" / "long.mp4", frames, fps=12)
    write_video(tmp_path / "in" / "short.mp4", frames[:10], fps=12)
    summary = extract_folder(tmp_path / "in", tmp_path / "a", SMALL, min_frames=5, max_frames=30, max_clips=1)
    store = ClipStore(tmp_path / "a")
    assert dict(zip(store.ids, store.lengths.tolist(), strict=True)) == {"long.mp4": 30, "short.mp4": 10}
    assert [info["cut_short"] for info in store.infos] == [True, False]
    assert summary.flow == {key: round(value, 6) for key, value in flow_distribution(store).items()}
    assert summary.flow == json.loads((tmp_path / "a" / "flow.json").read_text())
    assert any("mean" in line for line in summary.lines())
    # exactly as long as allowed is not cut short; of every second frame there are half as many, and they move twice as far
    strided = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=1, frame_stride=2)
    extract_folder(tmp_path / "in", tmp_path / "b", strided, min_frames=5, max_frames=20)
    double = ClipStore(tmp_path / "b")
    assert double.lengths.tolist() == [20, 5]
    assert [info["cut_short"] for info in double.infos] == [False, False]
    ratio = double.infos[0]["flow"]["p99"] / store.infos[0]["flow"]["p99"]
    assert 1.4 < ratio < 2.6
    with pytest.raises(ConfigError, match="max_frames"):
        extract_folder(tmp_path / "in", tmp_path / "c", SMALL, min_frames=25, max_frames=10)


def test_the_whole_distribution_is_of_all_frames_alike(tmp_path: Path) -> None:
    """A long still clip and a short lively one: the pooled mean is the mean over frames, not over clips."""
    still = np.repeat(texture(3, 64)[None], 60, 0)
    still[1::2, 0, 0] ^= 1  # not static to the byte
    write_video(tmp_path / "in" / "still.mp4", still, fps=12)
    write_video(tmp_path / "in" / "lively.mp4", scene(frames=10, velocity=(4.0, 0.0), side=64)[0], fps=12)
    extract_folder(tmp_path / "in", tmp_path / "out", SMALL, min_frames=5)
    store = ClipStore(tmp_path / "out")
    size = [np.linalg.norm(store.clip(i).flow[:-1].astype(np.float32), axis=-1).ravel() for i in range(2)]
    found = flow_distribution(store)
    assert found["mean"] == pytest.approx(float(np.concatenate(size).mean()), rel=0.1)
    assert found["p99"] == pytest.approx(float(np.quantile(np.concatenate(size), 0.99)), rel=0.2)


def test_workers_give_the_same_bytes_and_errors_stay_one_line(tmp_path: Path) -> None:
    for number in range(4):
        write_video(tmp_path / "in" / f"{number}.mp4", scene(frames=8, velocity=(1.0 + number, 0.5), side=64)[0], fps=12)
    extract_folder(tmp_path / "in", tmp_path / "one", SMALL, min_frames=5, shard_clips=2)
    extract_folder(tmp_path / "in", tmp_path / "two", SMALL, min_frames=5, shard_clips=2, workers=2)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 2 * 8 + 2
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    options = {"cotracker3": {"accept_licence": True, "source": "local", "repository": str(tmp_path)}}
    broken = Recipe(size=32, percept_size=32, track="cotracker3", backend_options=options)
    for workers in (1, 2):
        with pytest.raises(LocalmotionError, match="hubconf"):
            extract_folder(tmp_path / "in", tmp_path / "three", broken, min_frames=5, workers=workers)
    assert not list((tmp_path / "three" / "shards").iterdir())
