"""Points: drawn by weight and spread out, moved to what moves, scenes told apart, slots that continue exactly."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError
from localmotion.perception import Recipe, make_backend
from localmotion.perception.base import recipe_backends
from localmotion.perception.points import SPREAD, CutDetector, Slots, draw_points, texture_weight
from localmotion.perception.saliency import MotionSaliency, residual_flow
from localmotion.perception.stream import StreamingExtractor
from perception_scenes import SIDE, scene, texture
from property_examples import examples


def grey_of(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)


@examples(60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 32), st.integers(0, 60), st.integers(0, 32))
def test_every_draw_is_whole(seed: int, count: int, pixels: int, others: int) -> None:
    """Whatever the weight: the number asked for, no pixel twice, only pixels of weight while there are enough."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((12, 20), np.float32)
    weight.ravel()[rng.choice(weight.size, pixels, replace=False)] = rng.uniform(0.01, 1, pixels)
    near = rng.uniform(0, 12, (others, 2)).astype(np.float32)
    points = draw_points(weight, count, np.random.default_rng(seed), near)
    np.testing.assert_array_equal(points, draw_points(weight, count, np.random.default_rng(seed), near))
    assert points.shape == (count, 2)
    assert points.dtype == np.float32
    pixel = np.floor(points + 0.5 - 1e-4).astype(int).clip(0)
    assert (points >= -0.5).all()
    assert (points <= (19.5, 11.5)).all()
    if pixels >= count:
        assert (weight[pixel[:, 1], pixel[:, 0]] > 0).mean() > 0.9  # a jitter of exactly half a pixel may round away
    assert len(np.unique(pixel, axis=0)) >= count - 1


@examples(60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 32), st.integers(0, 32), st.floats(0, 0.99))
def test_draws_are_those_of_gumbel_noise(seed: int, count: int, others: int, empty: float) -> None:
    """The order of drawing, and the generator's state, that stores extracted earlier rest on; and how points are spread."""
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random((40, 33)) >= empty, rng.random((40, 33)) ** 4, 0).astype(np.float32)
    near = rng.uniform(0, 33, (others, 2)).astype(np.float32)
    once, again = np.random.default_rng(seed), np.random.default_rng(seed)
    flat = weight.ravel().astype(np.float64)
    flat = flat + 1e-6 if np.count_nonzero(flat) < count else flat
    pixels = np.flatnonzero(flat > 0)
    order = np.argsort(-(np.log(flat[pixels]) + again.gumbel(size=len(pixels))), kind="stable")[: 8 * count]
    points = np.stack(np.divmod(pixels[order], 33)[::-1], 1).astype(np.float32)
    distance = SPREAD * float(np.sqrt(float(flat.sum() ** 2 / (flat**2).sum()) / (count + others)))
    own = ((points[:, None] - points[None]) ** 2).sum(-1)
    taken = np.zeros(len(points), bool) if len(points) > count else np.ones(count, bool)
    while distance > 1 and taken.sum() < count:
        free = (
            ~taken & ~(((points[:, None] - near[None]) ** 2).sum(-1) < distance**2).any(1) & ~(own[:, taken] < distance**2).any(1)
        )
        while free.any() and taken.sum() < count:
            blocked = np.tril((own < distance**2) & free[None], -1).any(1)
            fresh = np.flatnonzero(free & ~blocked)[: count - int(taken.sum())]
            taken[fresh] = True
            free &= ~(own[:, fresh] < distance**2).any(1)
        distance /= 2
    taken[np.flatnonzero(~taken)[: count - int(taken.sum())]] = True
    expected = points[taken] + again.uniform(-0.5, 0.5, (count, 2)).astype(np.float32)
    np.testing.assert_array_equal(draw_points(weight, count, once, near), expected)
    assert once.bit_generator.state == again.bit_generator.state


def test_points_are_spread_also_from_those_that_are_kept() -> None:
    weight = np.ones((64, 64), np.float32)
    kept = np.array([[32.0, 32.0]], np.float32)
    least = SPREAD * 64 / np.sqrt(17)
    for seed in range(5):
        points = np.concatenate([kept, draw_points(weight, 16, np.random.default_rng(seed), kept)])
        apart = np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(17, 1)]
        assert apart.min() > least - np.sqrt(2)  # jitter within the pixels
    with pytest.raises(LocalmotionError, match="fewer tracks"):
        draw_points(np.ones((4, 4), np.float32), 17, np.random.default_rng(0))


def test_likelier_pixels_are_drawn_more_often() -> None:
    weight = np.ones((32, 32), np.float32)
    weight[:, 16:] = 9
    points = np.concatenate([draw_points(weight, 4, np.random.default_rng(seed)) for seed in range(200)])
    assert (points[:, 0] > 15.5).mean() == pytest.approx(0.9, abs=0.04)


def test_texture_weight_prefers_what_can_be_followed() -> None:
    frame = np.full((64, 64), 90, np.uint8)
    frame[:, 32:] = grey_of(texture(3, 64))[:, 32:]
    weight = texture_weight(frame)
    assert weight[:, 40:].mean() > 5 * weight[:, :24].mean()
    assert weight.min() > 0  # a picture without texture still gives points
    assert (texture_weight(np.zeros((32, 32), np.uint8)) == 1).all()


def cuts_of(frames: list[NDArray[np.uint8]]) -> list[int]:
    detector = CutDetector()
    return [t for t, frame in enumerate(frames) if detector.step(grey_of(frame))]


def test_cuts_are_told_from_fast_motion() -> None:
    room, other = texture(4, 4 * SIDE), texture(5)
    for picture in (room, other):
        picture[::2] //= 2  # coarse structure differs too
    blocks = cv2.resize(
        np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8), (512, 512), interpolation=cv2.INTER_LINEAR
    )
    speeds = np.cumsum([0, 2, 6, 12, 18, 24, 24, 24, 24])  # a pan that builds up to a fifth of the picture per frame
    pan = [np.ascontiguousarray(blocks[:SIDE, x : x + SIDE]) for x in speeds]
    assert cuts_of(pan) == []
    dark = [np.full((SIDE, SIDE, 3), 60 + 5 * t, np.uint8) for t in range(8)]
    assert cuts_of(dark) == []  # a light that is turned up
    still = [np.full((SIDE, SIDE, 3), 60, np.uint8)] * 3
    flash = np.full((SIDE, SIDE, 3), 95, np.uint8)  # 35 grey levels: below CUT, but out of nothing
    assert cuts_of([*still, flash, *still]) == [3, 4]
    assert cuts_of([*still, np.full((SIDE, SIDE, 3), 160, np.uint8), *pan]) == [3, 4]


def test_a_static_camera_explains_nothing_and_a_slow_one_all() -> None:
    flow = np.zeros((128, 128, 2), np.float32)
    flow[20:70, 30:100] = (3.0, -1.0)  # a quarter of the picture
    left, camera = residual_flow(flow)
    np.testing.assert_array_equal(left, flow)
    assert not camera.any()
    moved = flow + np.array([0.3, 0.1], np.float32)
    left, camera = residual_flow(moved)
    np.testing.assert_allclose(camera, np.broadcast_to([0.3, 0.1], camera.shape), atol=0.05)
    np.testing.assert_allclose(left, flow, atol=0.05)


def test_a_field_seen_before_weighs_the_same() -> None:
    frames, _ = scene(frames=6, camera=(1.0, 0.5))
    fields = list(make_backend("flow", "dis").flow(frames[:-1], frames[1:]))
    segment = MotionSaliency()
    for newest in range(3, 6):
        recent = fields[newest - 3 : newest][::-1]
        fresh = MotionSaliency().weight(frames[:1], np.stack(recent))
        np.testing.assert_array_equal(segment.weight(frames[:1], recent), fresh)
    assert segment.weight(frames[:1], fields[:4]).any()  # other numbers of fields than three


def test_foreground_fades_where_the_picture_stays_as_it_is() -> None:
    """Flow given for a whole plain picture, one spot of which changes: the weight stays within a few pixels of the spot."""
    frames = np.full((2, 64, 64, 3), 90, np.uint8)
    frames[1, 20:30, 20:30, 1] += 2  # two grey levels of one channel: between noise and certainty
    frames[1, 40:50, 40:50] = 200
    flow = np.zeros((1, 64, 64, 2), np.float32)
    flow[:, 10:60, 10:60, 0] = 1.0
    plain = MotionSaliency(change=0.0).weight(frames, flow)
    gated = MotionSaliency().weight(frames, flow)
    assert plain[15, 55] > 0.5
    assert gated[15, 55] == 0
    np.testing.assert_allclose(gated[23:27, 23:27], plain[23:27, 23:27] * 2 / 3, rtol=0.02)
    np.testing.assert_allclose(gated[42:48, 42:48], plain[42:48, 42:48])
    np.testing.assert_array_equal(MotionSaliency().weight(frames[:1], flow), plain)  # nothing to compare with


def test_a_recipe_stored_before_the_gate_goes_on_without_it() -> None:
    old = {key: value for key, value in Recipe().to_json().items() if key != "algorithm"}
    assert Recipe.from_json(old).algorithm == 1
    assert recipe_backends(Recipe.from_json(old))[1].change == 0
    assert recipe_backends(Recipe())[1].change > 0
    assert Recipe.from_json(Recipe().to_json()) == Recipe()
    assert Recipe.from_json({"flow_span": 2}) == Recipe(flow_span=2)  # a few settings, written by hand today
    with pytest.raises(ConfigError, match="algorithm=9"):
        Recipe(algorithm=9)


def test_idle_points_move_a_few_at_a_time_and_only_if_something_moves() -> None:
    recipe = Recipe(percept_size=SIDE, tracks=16)
    frames, _ = scene(frames=12, velocity=(2.0, 0.0))
    stream = StreamingExtractor(recipe, 0)
    stream.reset(frames[0])
    moved = []
    for frame in frames[1:]:
        step = stream.step(frame)
        moved.append(int(((stream.slots.track_id != step.track_id) & step.visible).sum()))
    assert moved[:2] == [0, 0]  # patience
    assert 0 < max(moved) <= 4  # a quarter of the slots
    still = StreamingExtractor(recipe, 0)
    before = still.reset(frames[0]).track_id
    for _ in range(8):
        step = still.step(frames[0])
    np.testing.assert_array_equal(step.track_id, before)
    assert step.visible.all()


class Picture:
    """A segmenter that looks at the picture, and counts how often it was asked."""

    name, licence, uses_motion = "picture", "none", False

    def __init__(self) -> None:
        self.asked = 0

    def weight(self, frames: NDArray[np.uint8], flows: object) -> NDArray[np.float32]:
        self.asked += 1
        weight = np.zeros(frames.shape[1:3], np.float32)
        weight[20:40, 60:90] = 1
        return weight


def test_a_costly_segmenter_is_asked_once_a_segment() -> None:
    recipe = Recipe(percept_size=SIDE, tracks=8, segment_frames=6)
    frames, _ = scene(frames=13)
    grey = [grey_of(frame) for frame in frames]
    segment, track = Picture(), make_backend("track", "lk")
    slots = Slots(recipe, segment, track, np.random.default_rng(0))
    slots.reset(frames[0], grey[0])
    at = slots.points
    assert ((at >= (59.5, 19.5)) & (at <= (89.5, 39.5))).all()
    field = np.zeros((SIDE, SIDE, 2), np.float32)
    for t in range(1, 13):
        slots.points[0] = (-50, -50)  # always one to draw again
        slots.step(frames[t - 1], frames[t], grey[t - 1], grey[t], field)
    assert segment.asked == 3  # at frames 0, 6 and 12
