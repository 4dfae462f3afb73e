"""Embedded perception against scenes of known motion; batch and streaming agree; folders survive what they contain."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmotion.errors import ConfigError, LocalmotionError, StoreError, VideoError
from localmotion.perception import Recipe, backends, make_backend
from localmotion.perception.clips import ClipExtractor, seed_of
from localmotion.perception.extract import extract_folder
from localmotion.perception.points import Slots, draw_points
from localmotion.perception.saliency import residual_flow
from localmotion.perception.stream import Magnitudes, StreamingExtractor, shrink_flow, shrink_points
from localmotion.video.spool import Spool
from localmotion.video.store import Clip, ClipStore
from localmotion.video.write import write_video
from perception_scenes import SIDE, scene, share_on, texture
from property_examples import examples


def test_flow_is_in_pixels_x_then_y() -> None:
    frames, masks = scene()
    flow = make_backend("flow", "dis").flow(frames[:1], frames[1:2])[0]
    inside = cv2.erode(masks[0].astype(np.uint8), np.ones((9, 9))) > 0
    assert np.abs(flow[inside] - (2.0, 1.0)).mean() < 0.15
    outside = cv2.dilate((masks[0] | masks[1]).astype(np.uint8), np.ones((15, 15))) == 0
    assert np.abs(flow[outside]).mean() < 0.1


def test_flow_is_averaged_and_divided_when_stored_smaller() -> None:
    frames, masks = scene(frames=8)
    motion = ClipExtractor(Recipe(percept_size=SIDE, size=64)).extract(frames, "clip")
    inside = cv2.erode(masks[3].astype(np.uint8), np.ones((17, 17)))[::2, ::2] > 0
    assert motion.flow.shape == (8, 64, 64, 2)
    np.testing.assert_allclose(motion.flow[3][inside].mean(0), (1.0, 0.5), atol=0.06)
    assert not motion.flow[-1].any()
    field = np.random.default_rng(0).normal(size=(8, 8, 2)).astype(np.float32)
    np.testing.assert_allclose(shrink_flow(field, 4)[0, 1], field[:4, 4:].mean((0, 1)) / 4, rtol=2e-3)


@given(st.floats(0, 127, width=32), st.integers(1, 4))
def test_pixel_centres_keep_their_place(x: float, ratio: int) -> None:
    small = float(shrink_points(np.array([[x, 0]], np.float32), ratio)[0, 0])
    assert (small + 0.5) * ratio - 0.5 == pytest.approx(x, abs=1e-3)


def test_tracks_follow_the_object_and_losses_are_told() -> None:
    frames, _ = scene(frames=10)
    start = np.array([[35.0, 45.0], [50.0, 60.0], [100.0, 20.0], [126.0, 126.0]], np.float32)
    tracks, visible = make_backend("track", "lk").track(frames, start)
    assert visible[:, :3].all()
    np.testing.assert_allclose(tracks[-1, :2], start[:2] + np.array([18, 9]), atol=0.7)
    np.testing.assert_allclose(tracks[-1, 2], start[2], atol=0.5)
    # what a picture no longer holds is lost, not guessed
    cut = frames.copy()
    cut[5:] = texture(9)
    assert make_backend("track", "lk").track(cut, start)[1][-1].sum() <= 1


@pytest.mark.parametrize("camera", [(0.0, 0.0), (-3.0, 1.5)])
def test_foreground_is_what_the_camera_does_not_explain(camera: tuple[float, float]) -> None:
    """Also when the camera moves more than the object."""
    frames, masks = scene(frames=6, velocity=(1.5, 1.0), camera=camera)
    backend = make_backend("flow", "dis")
    flows = np.concatenate([backend.flow(frames[:1], frames[k : k + 1]) / k for k in (1, 2, 4)])
    weight = make_backend("segment", "saliency").weight(frames[[0, 1, 2, 4]], flows)
    near = cv2.dilate(masks[0].astype(np.uint8), np.ones((11, 11))) > 0
    assert weight[near].sum() / weight.sum() > 0.75  # the object and its rim cover 18 % of the picture
    assert weight.min() >= 0
    assert weight.max() <= 1


def test_camera_motion_is_a_homography() -> None:
    ys, xs = np.mgrid[0:64, 0:64].astype(np.float32)
    flow = np.stack([0.02 * xs + 1.0, 0.02 * ys - 0.5], -1).astype(np.float32)
    left, camera = residual_flow(flow)
    assert np.abs(left).max() < 0.05
    np.testing.assert_allclose(camera, flow, atol=0.05)


def test_points_are_drawn_by_weight_without_repetition() -> None:
    weight = np.zeros((32, 32), np.float32)
    weight[8:12, 20:28] = 1.0
    points = draw_points(weight, 32, np.random.default_rng(0))
    pixels = {tuple(p) for p in np.round(points - 1e-4).astype(int)}
    assert len(pixels) >= 30  # jitter may round two neighbours together at a border
    assert (points >= (19.4, 7.4)).all()
    assert (points <= (27.6, 11.6)).all()
    more = draw_points(weight, 40, np.random.default_rng(0))
    assert len(more) == 40  # fewer pixels than points: the rest comes from anywhere


@pytest.mark.parametrize("span", [1, 3])
def test_batch_without_look_ahead_is_the_streaming_form_bit_for_bit(span: int) -> None:
    recipe = Recipe(percept_size=SIDE, redraw_rounds=0, segment_frames=5, flow_span=span, tracks=12)
    first, _ = scene(frames=9, velocity=(4.0, 2.5))
    frames = np.concatenate([first, 255 - texture(5)[None] // 2, scene(frames=4)[0] // 3])  # with scene cuts
    batch = ClipExtractor(recipe).extract(frames, "clip")
    stream = StreamingExtractor(recipe, seed_of("clip", recipe.seed))
    stream.reset(frames[0])
    for t in range(1, len(frames)):
        step = stream.step(frames[t])
        np.testing.assert_array_equal(step.flow, batch.flow[t - 1])
        np.testing.assert_array_equal(step.tracks, batch.tracks[t - 1])
        np.testing.assert_array_equal(step.visible, batch.visible[t - 1])
        np.testing.assert_array_equal(step.track_id, batch.track_id[t - 1])


def test_flow_agrees_between_forms_also_with_look_ahead() -> None:
    frames, _ = scene(frames=8)
    recipe = Recipe(percept_size=SIDE, tracks=8)
    batch = ClipExtractor(recipe).extract(frames, "clip")
    stream = StreamingExtractor(recipe, 0)
    stream.reset(frames[0])
    np.testing.assert_array_equal(np.stack([stream.step(f).flow for f in frames[1:]]), batch.flow[:-1])


def test_scene_cut_ends_all_tracks() -> None:
    frames, _ = scene(frames=6)
    other = np.full_like(frames, 20)
    other[:, 30:60, 30:60] = 240
    recipe = Recipe(percept_size=SIDE, tracks=6)
    motion = ClipExtractor(recipe).extract(np.concatenate([frames, other]), "clip")
    assert motion.info["cuts"] == [6]
    assert not motion.flow[5].any()
    assert not motion.visible[5].any()
    assert not set(motion.track_id[5]) & set(motion.track_id[6])
    # look-ahead chooses points in the new scene at once, not at the next multiple of segment_frames
    assert [part["start"] for part in motion.info["segments"]] == [0, 6]


def test_paper_choice_finds_salient_points() -> None:
    """Look-ahead keeps points that move; without motion it says that none is salient and still gives points."""
    frames, masks = scene(frames=12, velocity=(1.5, 0.5))
    recipe = Recipe(percept_size=SIDE, tracks=16, segment_frames=12)
    motion = ClipExtractor(recipe).extract(frames, "clip")
    assert motion.info["segments"][0]["salient"] >= 12
    assert share_on(masks[0], motion.tracks[0] * 2 + 0.5) > 0.7
    still = ClipExtractor(recipe).extract(np.repeat(frames[:1], 6, 0), "clip")
    assert still.info["segments"] == [{"start": 0, "salient": 0, "foreground": False}]
    assert still.visible[:-1].all()
    assert not still.flow.any()


def test_streaming_points_move_to_what_moves() -> None:
    frames, masks = scene(frames=20, velocity=(1.5, 0.5))
    stream = StreamingExtractor(Recipe(percept_size=SIDE, tracks=16), 0)
    stream.reset(frames[0])
    for frame in frames[1:]:
        step = stream.step(frame)
    assert share_on(masks[18], step.tracks * 2 + 0.5) > 0.7


def test_lost_slots_get_a_new_identity() -> None:
    recipe = Recipe(percept_size=SIDE, tracks=4)
    slots = Slots(recipe, make_backend("segment", "saliency"), make_backend("track", "lk"), np.random.default_rng(0))
    frames, _ = scene(frames=2)
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    slots.reset(frames[0], grey[0])
    slots.points[1] = (-40, -40)
    before = slots.track_id.copy()
    step = slots.step(frames[0], frames[1], grey[0], grey[1], np.zeros((SIDE, SIDE, 2), np.float32))
    assert not step.visible[1]
    assert slots.track_id[1] > before.max()
    assert slots.visible.all()


@examples(20)
@given(st.lists(st.floats(0, 30), min_size=8, max_size=60))
def test_magnitude_quantiles_are_close(values: list[float]) -> None:
    flow = np.repeat(np.array([[v, 0.0] for v in values], np.float32), Magnitudes.every, 0)
    found = Magnitudes()
    found.add(flow)
    exact = float(np.quantile(values, 0.9, method="inverted_cdf"))
    assert found.quantiles()["p90"] == pytest.approx(exact, rel=0.08, abs=2e-3)
    assert found.quantiles()["mean"] == pytest.approx(float(np.mean(values)), rel=1e-4, abs=1e-5)


def make_folder(folder: Path) -> None:
    for number in range(3):
        write_video(folder / f"clip{number}.mp4", scene(frames=28, velocity=(1.0 + number, 0.5))[0], fps=12)
    write_video(folder / "short.mp4", scene(frames=3)[0], fps=12)
    (folder / "text.mp4").write_text("this is no video")
    whole = (folder / "clip0.mp4").read_bytes()
    (folder / "torn.mp4").write_bytes(whole[: len(whole) // 2])


SMALL = Recipe(size=32, percept_size=64, tracks=8, redraw_rounds=1)


def test_folder_is_extracted_with_reasons_and_continued(tmp_path: Path) -> None:
    make_folder(tmp_path / "videos")
    seen: list[int] = []
    summary = extract_folder(
        tmp_path / "videos", tmp_path / "a", SMALL, shard_clips=2, progress=lambda done, total, note: seen.append(done)
    )
    assert (summary.clips, sum(summary.rejected.values())) == (3, 3)
    assert summary.rejected["too_short"] == 1
    assert seen[-1] == 6
    store = ClipStore(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "flow.json").read_text())["p99"] > 0
    assert {entry["id"] for entry in store.rejected} == {"short.mp4", "text.mp4", "torn.mp4"}

    # stopped after the first shard, then continued: the same bytes
    class StopError(Exception):
        pass

    def stop(done: int, total: int | None, note: str) -> None:
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        extract_folder(tmp_path / "videos", tmp_path / "b", SMALL, shard_clips=2, progress=stop)
    third = Spool(tmp_path / "b").get("clip2.mp4")  # finished, though its shard is not complete
    assert isinstance(third, Clip)
    assert third.frames.shape == (28, 32, 32, 3)
    summary = extract_folder(tmp_path / "videos", tmp_path / "b", SMALL, shard_clips=2)
    assert (summary.clips, summary.new) == (3, 0)
    assert not (tmp_path / "b" / "unfinished").exists()
    for file in sorted((tmp_path / "a").rglob("*")):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file.name
    with pytest.raises(StoreError, match="recipe"):
        extract_folder(tmp_path / "videos", tmp_path / "a", dataclasses.replace(SMALL, seed=1))


def test_folder_errors_are_clear(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="nowhere"):
        extract_folder(tmp_path / "nowhere", tmp_path / "out", SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty"):
        extract_folder(tmp_path / "empty", tmp_path / "out", SMALL)


def test_recipe_and_backend_names_are_checked() -> None:
    assert {"dis", "sea_raft"} <= set(backends("flow"))
    with pytest.raises(ConfigError, match="dis"):
        make_backend("flow", "dsi")
    with pytest.raises(ConfigError, match="percept_size"):
        Recipe(size=64, percept_size=100)
    with pytest.raises(ConfigError, match="tracks"):
        Recipe(tracks=33)
    with pytest.raises(ConfigError, match="flow_span"):
        Recipe.from_json({"flow_spam": 2})
    assert Recipe().hash() != Recipe(flow_span=2).hash()
    assert Recipe.from_json(json.loads(json.dumps(Recipe().to_json()))) == Recipe()
    with pytest.raises(LocalmotionError, match="uint8 frames"):
        StreamingExtractor(Recipe(), 0).reset(np.zeros((64, 64, 3), np.uint8))


@examples(40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 4]), st.integers(-9, 5))
def test_shrunk_flow_is_rounded_as_numpy_rounds(seed: int, ratio: int, power: int) -> None:
    """Sums in the order of rows, then float16: the bytes of clip stores rest on it. Also of values float16 has few bits for, or none."""
    rng = np.random.default_rng(seed)
    flow = (rng.normal(size=(2, 24, 36, 2)) * 10.0**power).astype(np.float32)
    flow.ravel()[rng.integers(0, flow.size, 99)] = -0.0
    total = np.zeros((2, 24 // ratio, 36 // ratio, 2), np.float32)
    for y in range(ratio):
        for x in range(ratio):
            total += flow[:, y::ratio, x::ratio]
    with np.errstate(over="ignore"):
        expected = (total * np.float32(1 / ratio**3) if ratio > 1 else flow).astype(np.float16)
    assert shrink_flow(flow, ratio).tobytes() == expected.tobytes()


def test_settings_of_dis() -> None:
    """The preset's written out give its bytes; cheaper ones stay near the truth; refinement at full size helps one that ends below."""
    frames, masks = scene()
    inner = cv2.erode(masks[0].astype(np.uint8), np.ones((9, 9))) > 0

    def found(**options: int) -> Any:
        return make_backend("flow", "dis", **options).flow(frames[:1], frames[1:2])[0]

    usual = found()
    np.testing.assert_array_equal(found(finest_scale=0, patch_stride=3, descents=25, refinements=5), usual)
    rough, refined = found(finest_scale=1), found(finest_scale=1, last_refinements=5)
    cheap = found(patch_stride=4, descents=12, refinements=3)
    for flow in (cheap, refined):
        assert not np.array_equal(flow, usual)
        np.testing.assert_allclose(flow[inner].mean(0), (2, 1), atol=0.1)
    edge = np.linalg.norm(np.stack([rough, refined]) - usual, axis=-1).mean((1, 2))
    assert edge[1] < edge[0]
    for bad in (
        {"patch_stride": 0},
        {"patch_stride": 9},
        {"descents": 0},
        {"refinements": -1},
        {"last_refinements": -1},
        {"finest_scale": -1},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            make_backend("flow", "dis", **bad)


def test_lost_points_stay_where_they_were_lost() -> None:
    """Following fewer points changes nothing for the rest, and a lost one is not followed on."""
    rng = np.random.default_rng(3)
    frames = np.stack([texture(9 if k >= 4 else 1) for k in range(8)])
    start = rng.uniform(4, SIDE - 4, (24, 2)).astype(np.float32)
    backend = make_backend("track", "lk")
    tracks, visible = backend.track(frames, start)
    lost = ~visible[4]
    assert lost.any()
    assert not visible[5:, lost].any()
    np.testing.assert_array_equal(tracks[5:, lost], np.repeat(tracks[4:5, lost], 3, 0))
    alone, seen = backend.track(frames, start[7:8])
    np.testing.assert_array_equal(alone[:, 0], tracks[:, 7])
    np.testing.assert_array_equal(seen[:, 0], visible[:, 7])
