"""Toys of moving layers: exact flow, masks and tracks, and backgrounds that know the action exactly as much as they should."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from localmotion.envs import make_env
from localmotion.envs.toy import MIXING, DotEnv, LayeredEnv, MovingBackgroundEnv, PairsEnv, make_toy, optimal_action
from localmotion.envs.truth import motion_truth, pixel_grid
from localmotion.errors import ConfigError, EnvError
from property_examples import examples

NAMES = [
    "toy:block",
    "toy:reach",
    "toy:moving_background",
    "toy:moving_background_lagged",
    "toy:moving_background_twin",
    "toy:moving_background_leaky",
    "toy:pairs",
]


def layered(name: str, **changes: object) -> LayeredEnv:
    env = make_env(name, **changes)  # type: ignore[arg-type]
    assert isinstance(env, LayeredEnv)
    return env


def actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)


def warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    at = (pixel_grid(len(flow)).reshape(*flow.shape) + flow).astype(np.float32)
    return np.asarray(cv2.remap(picture, at[..., 0], at[..., 1], cv2.INTER_CUBIC)).astype(float)


def test_the_dot_is_what_it_always_was_bit_for_bit() -> None:
    env, digest = DotEnv(size=32, percept_size=64), hashlib.sha256()
    for seed in (0, 5):
        obs, _ = env.reset(seed=seed)
        for action in np.random.default_rng(seed).uniform(-1, 1, (20, 2)).astype(np.float32):
            parts = (obs["image"], obs["percept"], env.state(), env.true_motion())
            digest.update(b"".join(part.tobytes() for part in parts))
            obs, reward, *_ = env.step(action)
            digest.update(np.float64(reward).tobytes())
    assert digest.hexdigest()[:16] == "f9d236c5af8b46db"


@pytest.mark.parametrize("name", NAMES)
def test_passes_the_checker_of_gymnasium(name: str) -> None:
    env = layered(name, size=32, percept_size=64, time_limit=50)
    check_env(env, skip_render_check=True)
    assert env.describe()["name"] == name == env.name


@pytest.mark.parametrize("name", ["toy:dot", *NAMES])
def test_a_seed_gives_the_same_episode_whatever_went_before(name: str) -> None:
    first, second = layered(name), layered(name, seed=9)
    second.reset()
    second.step(actions(1)[0])
    runs = []
    for env in (first, second):
        obs, _ = env.reset(seed=7)
        after = env.step(actions(1, seed=3)[0])[0]
        runs.append([obs["image"], after["image"], env.state(), *env.true_flow()])
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)


@examples(15)
@given(seed=st.integers(0, 10_000), action=st.tuples(*[st.floats(-1, 1, width=32)] * 2))
def test_dot_flow_is_its_true_motion_on_the_patch_and_zero_elsewhere(seed: int, action: tuple[float, float]) -> None:
    env = DotEnv(size=32, percept_size=64)
    env.reset(seed=seed)
    before = env.true_mask()
    env.step(np.array(action, np.float32))
    flow, valid = env.true_flow()
    np.testing.assert_allclose(flow[before], np.broadcast_to(2 * env.true_motion(), (before.sum(), 2)))
    assert not flow[~before].any()
    assert valid[before].all()
    assert not valid[~before & env.true_mask()].any()


@examples(10)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", NAMES)
def test_the_later_picture_warped_back_is_the_earlier_one(name: str, seed: int) -> None:
    env = layered(
        name, size=256
    )  # many pixels a cell of the texture: its kinks, which no interpolation moves exactly, weigh little
    first = env.reset(seed=seed)[0]["image"].astype(float)
    assert np.abs(env.true_flow()[0]).max() < 1e-9
    clear = ~cv2.dilate((env.layers(256).ident > 0).astype(np.uint8), np.ones((3, 3))).astype(bool)
    second = env.step(actions(1, seed)[0])[0]["image"].astype(float)
    flow, valid = env.true_flow()
    clear &= ~cv2.dilate((~valid).astype(np.uint8), np.ones((5, 5))).astype(bool)
    still, warped = np.abs(second - first)[clear].mean(), np.abs(warp(second, flow) - first)[clear].mean()
    assert warped < min(1.0, 0.5 + 0.2 * still)  # rounding to whole grey levels alone is a third of one


def test_flow_of_agent_and_background_are_their_displacements() -> None:
    env = MovingBackgroundEnv(source="leaky", correlation=1.0, size=32, percept_size=128)
    env.reset(seed=2)
    env.agent = np.array([0.4, 0.6])
    env.reset(seed=2)
    before, agent = env.offset.copy(), env.agent.copy()
    action = actions(1, 8)[0]
    env.step(action)
    shift = 2 * (0.9 * before + 2 * MIXING @ np.tanh(np.sqrt(3) * action.astype(float)) - before)
    flow, _ = env.true_flow()
    whole = env.true_mask()
    assert whole.any()
    np.testing.assert_allclose(flow[0, 0], shift, rtol=1e-5)
    corner = np.round(agent * 112 + 8).astype(int)
    np.testing.assert_allclose(flow[corner[1], corner[0]], (env.agent - agent) * 112, atol=1e-4)
    np.testing.assert_allclose(4 * env.true_motion(), (env.agent - agent) * 112, rtol=1e-5)


def test_masks_have_the_area_of_the_patch() -> None:
    env = MovingBackgroundEnv()
    env.reset(seed=0)
    env.agent = np.array([0.5, 0.5]) + 0.25 / 56  # a quarter of a pixel off
    assert env.true_mask().sum() == 81  # 8 x 8 pixels and the partly covered ones
    assert motion_truth(env).foreground(env.layers(64)).sum() == 64
    pairs = PairsEnv()
    pairs.reset(seed=1)
    pairs.place = np.array([5.0, 6.0])
    assert pairs.true_mask().sum() == 25
    assert pairs.true_mask()[6:11, 5:10].all()


def test_tracks_follow_the_layers_and_know_when_they_are_covered() -> None:
    env = MovingBackgroundEnv(source="twin")
    env.reset(seed=4)
    truth = motion_truth(env)
    shots = [truth.snapshot()]
    for _ in range(12):
        env.step(optimal_action(env))
        shots.append(truth.snapshot())
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 63, (200, 2))
    tracks, visible = truth.tracks(shots, points)
    ident = shots[0].ident[np.round(points[:, 1]).astype(int), np.round(points[:, 0]).astype(int)]
    for number in (0, 1, 2):
        path = np.array([s.origin[number] - shots[0].origin[number] for s in shots])
        np.testing.assert_allclose(tracks[:, ident == number], (points[ident == number] + path[:, None]), atol=1e-3)
    assert visible[0].all()
    last = np.round(tracks[-1]).astype(int)
    inside = ((last >= 0) & (last < 64)).all(1)
    covered = inside & (ident == 0)
    covered[inside] &= cv2.erode((shots[-1].ident == 2).astype(np.uint8), np.ones((3, 3)))[last[inside, 1], last[inside, 0]] > 0
    assert not visible[-1, covered].any()
    assert visible[-1, ident == 2].all()


def correlation(env: MovingBackgroundEnv, lag: int) -> float:
    """Largest absolute correlation of the background's drive at t with an action coordinate at t - lag."""
    taken, drive = [], []
    for seed in range(20):
        env.reset(seed=seed)
        for action in actions(40, 100 + seed):
            before = env.offset
            env.step(action)
            taken.append(action)
            drive.append(env.offset - 0.9 * before)
    a, b = np.array(taken)[: len(taken) - lag], np.array(drive)[lag:]
    return float(np.abs(np.corrcoef(a.T, b.T)[:2, 2:]).max())


def test_the_background_knows_of_the_action_what_its_source_says() -> None:
    def env(source: str, c: float | None = None) -> MovingBackgroundEnv:
        made = make_toy(f"moving_background_{source}" if source else "moving_background", correlation=c, size=8)
        assert isinstance(made, MovingBackgroundEnv)
        return made

    assert correlation(env(""), 0) < 0.12
    assert correlation(env("twin", 1.0), 0) < 0.12
    assert correlation(env("lagged"), 0) < 0.12
    assert correlation(env("lagged"), 3) > 0.2
    assert correlation(env("leaky", 0.0), 0) < 0.12
    assert 0.2 < correlation(env("leaky", 0.5), 0) < correlation(env("leaky", 1.0), 0)
    assert correlation(env("leaky", 1.0), 0) > 0.6


def test_a_twin_moves_as_the_actions_that_were_given() -> None:
    twin, leaky = (MovingBackgroundEnv(source=source, correlation=1.0) for source in ("twin", "leaky"))
    taken = actions(6)
    twin.twin_actions = taken
    for env, played in ((twin, np.zeros_like(taken)), (leaky, taken)):
        env.reset(seed=3)
        for action in played:
            env.step(action)
    np.testing.assert_allclose(twin.offset, leaky.offset)


def test_pairs_have_the_geometry_of_the_notes() -> None:
    env = PairsEnv(time_limit=1)
    places, windows = [], []
    for seed in range(200):
        env.reset(seed=seed)
        place, window = env.place, env.window
        places.append(place)
        windows.append(window)
        action = actions(1, seed)[0]
        _, reward, terminated, truncated, _ = env.step(action)
        assert (reward, terminated, truncated) == (0.0, False, True)
        np.testing.assert_allclose(env.place, place + 3.5 * action)
        np.testing.assert_allclose(env.window, window + 4 * env.nuisance)
    for drawn, low, high in ((np.array(places), 4, 7), (np.array(windows), 0, 2)):
        assert low <= drawn.min() < low + 0.1
        assert high - 0.1 < drawn.max() <= high
    env.reset(seed=0)
    env.place = np.array([4.0, 4.0])
    np.testing.assert_array_equal(env.render_frame(16)[6, 6], np.rint((np.array([0.25, -0.25, 0.25]) + 0.5) * 255))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "leeky"}, "leaky"),
        ({"source": "leaky", "correlation": 1.5}, "from 0 to 1"),
        ({"correlation": 0.5}, "independent of the action"),
        ({"source": "lagged", "lag": 0}, "lag=0"),
    ],
)
def test_impossible_backgrounds_are_errors(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MovingBackgroundEnv(**changes)  # type: ignore[arg-type]


def test_flow_before_a_reset_is_an_error() -> None:
    with pytest.raises(EnvError, match=r"call reset\(\) before true_flow"):
        DotEnv().true_flow()
