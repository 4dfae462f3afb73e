"""Rules for points: which are kept, lost and redrawn, and what a clip stores of them. Tracker and segmenter are stubs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from localmotion.perception import Recipe, clips, points, saliency
from localmotion.perception.clips import ClipExtractor
from localmotion.perception.lk import LKTracks
from localmotion.perception.points import CutDetector, Slots, texture_weight
from localmotion.perception.saliency import MotionSaliency, residual_flow
from localmotion.perception.stream import StreamingExtractor
from perception_scenes import texture

SIDE, COUNT = 32, 12
RECIPE = Recipe(size=16, percept_size=SIDE, tracks=COUNT, min_motion=0.3)


class Stub:
    """A tracker and a segmenter that answer what the test has set."""

    name, licence, uses_motion, causal = "told", "none", True, True

    def __init__(self) -> None:
        self.moved: NDArray[np.float32] = np.zeros((0, 2), np.float32)
        self.found: NDArray[np.bool_] = np.zeros(0, bool)
        self.map: NDArray[np.float32] = np.zeros((SIDE, SIDE), np.float32)
        self.asked: list[tuple[NDArray[np.uint8], list[Any]]] = []

    def step(self, previous: Any, current: Any, points: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        return self.moved.copy(), self.found.copy()

    def weight(self, frames: NDArray[np.uint8], flows: Any) -> NDArray[np.float32]:
        self.asked.append((frames, list(flows)))
        return self.map


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[NDArray[np.float32], Any, NDArray[np.float32]]]:
    """Each draw: the chances, the points to keep away from, and what was drawn."""
    calls: list[Any] = []
    draw = points.draw_points

    def spied(weight: Any, count: int, rng: np.random.Generator, near: Any = None) -> NDArray[np.float32]:
        found = draw(weight, count, rng, near)
        calls.append((weight.copy(), None if near is None else near.copy(), found.copy()))
        return found

    monkeypatch.setattr(points, "draw_points", spied)
    monkeypatch.setattr(clips, "draw_points", spied)
    return calls


def test_slots_are_kept_lost_and_drawn_again_by_the_rules(drawn: Any) -> None:
    """Forty steps of slots that are followed, lost, hidden before and idle, beside the same rules slot by slot."""
    rng, told = np.random.default_rng(5), Stub()
    slots = Slots(RECIPE, told, told, np.random.default_rng(1))
    frames = texture(3, SIDE)[None] + np.arange(41, dtype=np.uint8)[:, None, None, None] % 7
    grey = frames[..., 0].copy()
    slots.reset(frames[0], grey[0])
    place = [tuple(point) for point in drawn[-1][2]]
    identity, age, mean, variance = list(range(COUNT)), [0] * COUNT, [np.array(p, float) for p in place], [0.0] * COUNT
    issued, flows, redrawn, idled = COUNT, [], 0, 0
    for t in range(1, 41):
        # Half of the points stand nearly still, a quarter moves a little. Some are lost; at times one was hidden before and is found.
        speed = np.array([0.05, 1.5, 0.05, 0.5])[np.arange(COUNT) % 4, None]
        told.moved = (np.array(place) + speed * rng.normal(size=(COUNT, 2))).clip(1, SIDE - 2).astype(np.float32)
        told.found = rng.random(COUNT) > (0.06 if t % 3 else 0.3)
        told.map = (rng.random((SIDE, SIDE)) * (rng.random((SIDE, SIDE)) < 0.6) * (t % 5 != 0)).astype(np.float32)
        seen = np.ones(COUNT, bool)
        if t % 7 == 0:
            seen[t % COUNT] = False
            slots.visible = seen.copy()
        flow = np.full((SIDE, SIDE, 2), t, np.float32)
        draws, asks = len(drawn), len(told.asked)
        step = slots.step(frames[t - 1], frames[t], grey[t - 1], grey[t], flow)

        good = [bool(seen[i] and told.found[i]) for i in range(COUNT)]
        np.testing.assert_array_equal(step.points, np.array(place, np.float32))
        assert step.visible.tolist() == good
        assert step.track_id.tolist() == identity
        flows = [t, *flows][:3]
        for i in range(COUNT):
            place[i] = tuple(told.moved[i]) if good[i] else place[i]
            age[i] += 1
            off = np.array(place[i], float) - mean[i]
            mean[i] = mean[i] + 0.1 * off
            variance[i] = 0.9 * (variance[i] + 0.1 * float(off @ off))
        lost = [i for i in range(COUNT) if not good[i]]
        still = [i for i in range(COUNT) if good[i] and age[i] >= 3 and variance[i] ** 0.5 < 0.3 * 2]
        assert (len(told.asked) > asks) == bool(lost or still)
        if lost or still:
            shown, given = told.asked[-1]
            np.testing.assert_array_equal(shown, frames[[t, t - 1]])
            assert [field[0, 0, 0] for field in given] == flows
        moving = bool(told.map.any())
        idle = [i for i in still if moving and told.map[round(float(place[i][1])), round(float(place[i][0]))] < 0.2]
        idle = sorted(idle, key=lambda i: variance[i])[: max(COUNT // 4 - len(lost), 0)]
        again = sorted([*lost, *idle])
        assert len(drawn) - draws == bool(again)
        if again:
            chance, near, fresh = drawn[-1]
            np.testing.assert_array_equal(chance, texture_weight(grey[t]) * (told.map if moving else 1))
            np.testing.assert_array_equal(near, np.array([place[i] for i in range(COUNT) if i not in again], np.float32))
            for i, point in zip(again, fresh, strict=True):
                place[i], identity[i], age[i], mean[i], variance[i] = tuple(point), issued, 0, np.array(point, float), 0.0
                issued += 1
        redrawn, idled = redrawn + len(lost), idled + len(idle)
        np.testing.assert_array_equal(slots.points, np.array(place, np.float32))
        np.testing.assert_allclose(slots.variance, variance, rtol=1e-4, atol=1e-6)
        assert slots.track_id.tolist() == identity
        assert slots.visible.all()
    assert redrawn > 20
    assert idled > 8
    slots.reset(frames[0], grey[0])
    told.found[:] = False
    slots.step(frames[0], frames[1], grey[0], grey[1], flow)
    assert len(told.asked[-1][1]) == 1  # fields of before a reset are forgotten


# --- clips ------------------------------------------------------------------------------------------------------------------


class Script:
    """Backends of a clip extractor. Frames tell their number in a corner pixel; flow from a to b is (b - a) pixels to the right.

    Each call of `track` answers with the next of ``rounds``: a path's x is ``10 k + i`` of point i of call k, moved by ``size`` to
    either side in turn, and ``seen`` says in which frames.
    """

    name, licence, uses_motion = "script", "none", True

    causal = False

    def __init__(self, *rounds: tuple[list[float], NDArray[np.bool_]]) -> None:
        self.rounds, self.calls = list(rounds), 0
        self.flows: list[tuple[int, int]] = []
        self.ahead: list[list[float]] = []
        self.map = np.zeros((SIDE, SIDE), np.float32)
        self.map[8:24, 4:28] = 0.5

    def flow(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        pairs = [(int(a[0, 0, 0]), int(b[0, 0, 0])) for a, b in zip(first, second, strict=True)]
        self.flows += pairs
        out = np.zeros((len(pairs), SIDE, SIDE, 2), np.float32)
        out[..., 0] = np.array([b - a for a, b in pairs], np.float32)[:, None, None]
        return out

    def weight(self, frames: NDArray[np.uint8], flows: Any) -> NDArray[np.float32]:
        self.ahead.append([float(field[0, 0, 0]) for field in flows])
        return self.map

    def track(self, frames: NDArray[np.uint8], points: NDArray[np.float32], start: int = 0) -> tuple[Any, Any]:
        sizes, seen = self.rounds.pop(0)
        assert len(sizes) == len(points)
        call, self.calls = self.calls, self.calls + 1
        tracks = np.zeros((len(frames), len(points), 2), np.float32)
        tracks[..., 1] = 10
        for i, size in enumerate(sizes):
            tracks[:, i, 0] = 10 * call + i + size * np.where(np.arange(len(frames)) % 2, -1, 1)
        tracks[~seen] = 31  # where it is not seen, its position means nothing
        return tracks, seen

    def step(self, previous: Any, current: Any, points: NDArray[np.float32]) -> tuple[Any, Any]:
        return points.copy(), np.ones(len(points), bool)


def numbered(count: int, *cuts: int) -> NDArray[np.uint8]:
    """Frames that tell their number; at ``cuts`` the scene turns dark or bright."""
    wall = texture(3, SIDE) // 4
    dark = np.cumsum(np.isin(np.arange(count), cuts)) % 2
    frames = np.stack([wall + (160 * (1 - dark[t])).astype(np.uint8) for t in range(count)])
    frames[:, 0, 0] = np.arange(count, dtype=np.uint8)[:, None]
    return frames


def extractor_of(script: Script, **settings: Any) -> ClipExtractor:
    recipe = Recipe(**{"size": 16, "percept_size": SIDE, "tracks": 4, "segment_frames": 8, "min_motion": 0.5} | settings)
    extractor = ClipExtractor(recipe)
    extractor.flow = extractor.segment = extractor.track = script  # type: ignore[assignment]
    return extractor


def everywhere(frames: int, count: int) -> NDArray[np.bool_]:
    return np.ones((frames, count), bool)


def test_the_choice_keeps_the_most_mobile_of_all_draws(drawn: Any) -> None:
    """Scores are standard deviations over the frames in which a point is seen, in pixels of the stored picture (half of those here)."""
    seen = everywhere(8, 4)
    seen[5:, 0] = False  # mobile, and seen in five of eight frames
    seen[3:, 1] = False  # mobile, but lost in the first half: counts as standing still
    first = ([3.0, 4.0, 0.9, 2.0], seen)
    second = ([0.4, 0.95], everywhere(8, 2))  # for points 1 (better than nothing) and 2 (0.95 is better than 0.9)
    third = ([0.2, 1.5], everywhere(8, 2))  # for the same two: worse than 0.4; better than 0.95
    script = Script(first, second, third)
    motion = extractor_of(script, redraw_rounds=2).extract(numbered(8), "clip")
    assert not script.rounds
    whole = np.array([3.0, 2.0, 1.5, 0.4])
    names = np.array([0, 3, 21, 10])  # most mobile first
    np.testing.assert_allclose(motion.tracks[0, :, 0], (names + whole + 0.5) / 2 - 0.5, rtol=1e-6)
    (part,) = motion.info["segments"]
    assert part == {"start": 0, "salient": 3, "foreground": True}
    chances = [draw[0] for draw in drawn]
    assert all(np.array_equal(chance, chances[0]) for chance in chances)
    assert (chances[0] > 0).any()
    assert not chances[0][script.map == 0].any()
    assert len(np.unique(chances[0][script.map > 0])) > 10  # foreground and texture
    near = [draw[1] for draw in drawn]
    assert near[0] is None
    np.testing.assert_allclose(near[1], [(0 + 3.0, 10), (3 + 2.0, 10)])
    np.testing.assert_allclose(near[2], near[1])


@pytest.mark.parametrize("rounds", [1, 3])
def test_points_are_drawn_again_as_often_as_the_recipe_says(rounds: int) -> None:
    script = Script(*[([0.1 * k] * 4, everywhere(8, 4)) for k in range(rounds + 1)])
    extractor_of(script, redraw_rounds=rounds).extract(numbered(8), "clip")
    assert not script.rounds
    assert script.calls == rounds + 1


def test_flow_ahead_is_per_frame_and_stays_within_its_segment() -> None:
    script = Script(*[([3.0] * 4, everywhere(8, 4))] * 2, ([3.0] * 4, everywhere(3, 4)))
    extractor_of(script, redraw_rounds=1).extract(numbered(19), "clip")
    assert script.ahead == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0]]  # over 1, 2 and 4 frames; of three frames over 1 and 2
    assert {(0, 4), (8, 12), (16, 18)} <= set(script.flows)
    assert (16, 20) not in script.flows


@pytest.mark.parametrize("span", [1, 3])
def test_numbers_of_a_clip_are_per_frame_and_of_usable_frames(span: int) -> None:
    script = Script(([3.0] * 4, everywhere(8, 4)))
    motion = extractor_of(script, redraw_rounds=1, flow_span=span).extract(numbered(8), "clip")
    spans = [min(t + 1, span) for t in range(7)]
    np.testing.assert_allclose(motion.flow[:-1, 4, 4, 0], np.array(spans) / 2)
    assert motion.info["followed"] == 1.0  # the last frame has no next one: it does not count
    assert not motion.visible[-1].any()
    assert motion.info["camera"] == pytest.approx(np.mean(spans) / 2 / span, rel=0.02)  # all pixels move alike: the camera


def test_an_offline_tracks_points_end_at_a_cut() -> None:
    """Also where the choice's segment ends there, and where a point was hidden in the last frame it is not found afterwards."""
    hidden = everywhere(8, 4)
    hidden[7, 2] = False
    script = Script(([3.0] * 4, everywhere(8, 4)), ([3.0, 2.9, 2.8, 2.7], hidden))
    motion = extractor_of(script, redraw_rounds=1).extract(numbered(18, 8), "clip")
    assert motion.info["cuts"] == [8]
    assert motion.visible[6].all()
    assert not motion.visible[7].any()
    assert motion.visible[8:14].all()
    # From frame 16 on no choice is made: points go on step by step.
    assert motion.visible[15].tolist() == [True, True, False, True]
    assert (motion.track_id[16] != motion.track_id[15]).tolist() == [False, False, True, False]
    assert motion.info["lost"] == 1


# --- points and borders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [(-2.0, 20.0), (20.0, -2.0), (41.0, 20.0), (20.0, 41.0)])
def test_a_point_outside_is_not_found_though_nothing_moves(point: tuple[float, float]) -> None:
    frame = texture(3, 40)
    moved, found = LKTracks().step(frame, frame, np.array([point, (20, 20)], np.float32))
    assert found.tolist() == [False, True]
    np.testing.assert_array_equal(moved[0], np.array(point, np.float32))


@pytest.mark.parametrize("side", [64, 200])
def test_a_tracked_point_is_found_by_the_rules(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends lie in the picture, wider than high here, and tracking back ends within 0.01 side + 0.3 pixels, x and y together."""
    wide, near = 2 * side, 0.01 * side + 0.3
    rows = [  # start, where it went, how far off tracking back ends, found there and back; whether it is found
        ((5, 5), (9, 7), (0, 0), (1, 1), True),
        ((5, 5), (9, 7), (0.99 * near, 0), (1, 1), True),
        ((5, 5), (9, 7), (0, 1.01 * near), (1, 1), False),
        ((5, 5), (9, 7), (0.8 * near, 0.8 * near), (1, 1), False),
        ((5, 5), (9, 7), (0, 0), (0, 1), False),
        ((5, 5), (9, 7), (0, 0), (1, 0), False),
        ((side + 9, 5), (side + 7, 9), (0, 0), (1, 1), True),
        ((5, side + 9), (5, side + 7), (0, 0), (1, 1), False),
        ((wide - 0.6, side - 0.6), (wide - 0.6, side - 0.6), (0, 0), (1, 1), True),
        ((-0.4, -0.4), (-0.4, -0.4), (0, 0), (1, 1), True),
        *(((5, 5), end, (0, 0), (1, 1), False) for end in ((wide - 0.4, 5), (5, side - 0.4), (-0.6, 5), (5, -0.6))),
        *((begin, (5, 5), (0, 0), (1, 1), False) for begin in ((wide - 0.4, 5), (5, side - 0.4), (-0.6, 5), (5, -0.6))),
    ]
    start, moved, off, both, found = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    answers = [(moved, both[:, 0]), (start + off, both[:, 1])]

    def follow(first: Any, second: Any, points: Any, *_: Any, **__: Any) -> tuple[Any, Any, None]:
        np.testing.assert_array_equal(points[:, 0], start if len(answers) == 2 else moved)
        ends, status = answers.pop(0)
        return ends[:, None].copy(), status[:, None].astype(np.uint8), None

    monkeypatch.setattr("localmotion.perception.lk.cv2.calcOpticalFlowPyrLK", follow)
    frame = np.zeros((side, wide), np.uint8)
    points, seen = LKTracks().step(frame, frame, start)
    assert seen.tolist() == found.astype(bool).tolist()
    np.testing.assert_array_equal(points, np.where(seen[:, None], moved, start))


# --- cuts -------------------------------------------------------------------------------------------------------------------


def flat(level: float) -> NDArray[np.uint8]:
    return np.full((SIDE, SIDE), level, np.uint8)


@pytest.mark.parametrize(
    ("levels", "cuts"),
    [
        ([0, 26], [1]),  # 25 out of nothing
        ([0, 24], []),
        ([0, 10, 37], []),  # less than three times as much as before
        ([0, 10, 42], [2]),
        ([0, 20, 66], [2]),  # 45, whatever came before
        ([0, 20, 64], []),
        ([0, 50, 50, 76], [1, 3]),
        ([0, 90, 116], [1, 2]),  # what follows a cut is not held against it
    ],
)
def test_cuts_are_told_by_the_change_and_the_change_before(levels: list[int], cuts: list[int]) -> None:
    detector = CutDetector()
    assert [t for t, level in enumerate(levels) if detector.step(flat(level))] == cuts


def test_the_first_frame_of_an_episode_is_no_cut_and_no_change() -> None:
    detector = CutDetector()
    found = [detector.step(flat(level), first=first) for level, first in ((0, True), (90, True), (70, True), (96, False))]
    assert found == [False, False, False, True]


# --- foreground -------------------------------------------------------------------------------------------------------------


def moving_block(*blocks: tuple[slice, slice, float], side: int = 64) -> NDArray[np.float32]:
    flow = np.zeros((side, side, 2), np.float32)
    for rows, columns, speed in blocks:
        flow[rows, columns, 0] = speed
    return flow


BLOCK, SPOT, SLOW = (slice(5, 20), slice(5, 20)), (slice(40, 44), slice(10, 14)), (slice(40, 60), slice(30, 50))


def test_small_parts_weigh_less_and_slow_ones_nothing() -> None:
    flow = moving_block((*BLOCK, 2.0), (*SPOT, 2.0), (*SLOW, 0.04))
    weight = MotionSaliency().weight(np.zeros((1, 64, 64, 3), np.uint8), flow[None])
    assert weight[12, 12] == 1
    assert 0.05 < weight[42, 12] < 0.11
    assert weight[50, 40] == 0
    slow = MotionSaliency().weight(np.zeros((1, 64, 64, 3), np.uint8), moving_block((*SLOW, 0.04))[None])
    assert not slow.any()
    tiny = moving_block((slice(40, 42), slice(10, 12), 1.0))  # less than half a per cent of the picture
    assert not MotionSaliency().weight(np.zeros((1, 64, 64, 3), np.uint8), tiny[None]).any()


def test_the_foreground_is_what_moves_in_most_fields() -> None:
    one, both = moving_block((*BLOCK, 2.0)), moving_block((*BLOCK, 3.0), (*SLOW, 9.0))
    weight = MotionSaliency().weight(np.zeros((1, 64, 64, 3), np.uint8), [one, both, one])
    assert weight[12, 12] == 1
    assert weight[50, 40] == 0


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_a_change_against_any_other_frame_counts(changed: int) -> None:
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    frames[changed, 5:20, 5:20] = 90
    weight = MotionSaliency().weight(frames, [moving_block((*BLOCK, 2.0))])
    assert weight[12, 12] == 1


def test_noise_is_no_camera_and_an_impossible_camera_none(monkeypatch: pytest.MonkeyPatch) -> None:
    still = np.full((64, 64, 2), 0.04, np.float32)
    left, camera = residual_flow(still)
    np.testing.assert_array_equal(left, still)
    assert not camera.any()
    for matrix in (np.array([[1.0, 0, 999], [0, 1, 0], [0, 0, 1]]), np.diag([-9.0, 1, 1]), None):
        monkeypatch.setattr(saliency.cv2, "findHomography", lambda *_, found=matrix, **__: (found, None))
        left, camera = residual_flow(still + 1)
        np.testing.assert_array_equal(left, still + 1)
        assert not camera.any()


# --- streams ----------------------------------------------------------------------------------------------------------------


def stream_of(script: Any, **settings: Any) -> StreamingExtractor:
    stream = StreamingExtractor(Recipe(**{"size": 16, "percept_size": SIDE, "tracks": 4} | settings), 1)
    stream.flow_backend = stream.slots.segment = stream.slots.tracker = script
    return stream


def test_a_stream_asks_for_flow_over_its_span_and_follows_from_the_frame_before() -> None:
    class Asked(Script):
        def step(self, previous: Any, current: Any, points: NDArray[np.float32]) -> tuple[Any, Any]:
            self.steps = [*getattr(self, "steps", []), (int(previous[0, 0, 0]), int(current[0, 0, 0]))]
            return super().step(previous, current, points)

    script = Asked()
    stream, frames = stream_of(script, flow_span=3), numbered(9, 6)
    first = stream.reset(frames[0])
    assert not first.visible.any()
    assert not first.flow.any()
    np.testing.assert_array_equal(first.tracks, (stream.slots.points + 0.5) / 2 - 0.5)
    steps = [stream.step(frame) for frame in frames[1:]]
    assert script.flows == [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (6, 7), (6, 8)]
    assert script.steps == [(t - 1, t) for t in (1, 2, 3, 4, 5, 7, 8)]
    assert [float(step.flow[8, 8, 0]) for step in steps] == [0.5, 1, 1.5, 1.5, 1.5, 0, 0.5, 1]  # zero across the cut
    assert [bool(step.visible.any()) for step in steps] == [True] * 5 + [False] + [True] * 2
    script.flows.clear()
    stream.reset(frames[0])
    stream.step(frames[1])
    assert script.flows == [(0, 1)]


def test_a_new_episode_is_not_held_against_the_one_before() -> None:
    frames = [np.full((SIDE, SIDE, 3), level, np.uint8) for level in (0, 20, 46)]
    stream = stream_of(Script(), tracks=4)
    stream.reset(frames[0])
    stream.reset(frames[1])
    before = stream.slots.track_id.copy()
    stream.step(frames[2])
    assert (stream.slots.track_id != before).all()  # 26 out of nothing: a cut


def test_the_seed_draws_the_points() -> None:
    one, other = (StreamingExtractor(RECIPE, seed) for seed in (1, 2))
    frame = texture(3, SIDE)
    assert (one.reset(frame).tracks != other.reset(frame).tracks).any(1).all()
    np.testing.assert_array_equal(StreamingExtractor(RECIPE, 1).reset(frame).tracks, shrunk(one))


def shrunk(stream: StreamingExtractor) -> NDArray[np.float32]:
    small: NDArray[np.float32] = (stream.slots.points + 0.5) / 2 - 0.5
    return small
