"""The toy environment is exact: states, pictures and motion follow from the seed and the actions."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from localmotion.envs import make_env, toy
from localmotion.envs.base import area_average
from localmotion.envs.toy import BlockEnv, DotEnv, ReachEnv
from localmotion.errors import EnvError
from property_examples import examples

ACTION = np.array([0.7, -0.4], np.float32)


def _episode(env: DotEnv, policy: str) -> float:
    total, over = 0.0, False
    while not over:
        action = toy.optimal_action(env) if policy == "optimal" else env.action_space.sample()
        _, reward, terminated, truncated, _ = env.step(action)
        total, over = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize("kind", [DotEnv, BlockEnv, ReachEnv])
def test_passes_the_checker_of_gymnasium(kind: type[DotEnv]) -> None:
    check_env(kind(size=32, percept_size=64), skip_render_check=True)


@pytest.mark.parametrize(
    ("env", "random", "optimal"),
    [
        (DotEnv(), toy.RANDOM_RETURN, toy.OPTIMAL_RETURN),
        (BlockEnv(), toy.BLOCK_RANDOM, toy.BLOCK_OPTIMAL),
        (ReachEnv(), toy.REACH_RANDOM, toy.REACH_OPTIMAL),
    ],
)
def test_optimal_and_random_returns_are_as_documented(env: DotEnv, random: float, optimal: float) -> None:
    means = {}
    for policy in ("random", "optimal"):
        scores = []
        for seed in range(300):
            env.reset(seed=seed)
            scores.append(_episode(env, policy))
        means[policy] = float(np.mean(scores))
    assert means["random"] == pytest.approx(random, abs=2.5)
    assert means["optimal"] == pytest.approx(optimal, abs=0.5)


@examples(50)
@given(
    kind=st.sampled_from([DotEnv, BlockEnv]),
    seed=st.integers(0, 1000),
    size=st.sampled_from([32, 64]),
    action=st.tuples(st.floats(-1, 1, width=32), st.floats(-1, 1, width=32)),
)
def test_no_policy_beats_the_optimal_one_in_a_step(kind: type[DotEnv], seed: int, size: int, action: tuple[float, float]) -> None:
    env, other = kind(size=size), kind(size=size)
    env.reset(seed=seed)
    other.reset(seed=seed)
    best = env.step(toy.optimal_action(env))[1]
    assert other.step(np.array(action, np.float32))[1] <= best + 1e-6


@examples(25)
@given(seed=st.integers(0, 1000), actions=st.lists(st.tuples(*[st.floats(-1, 1, width=32)] * 2), min_size=1, max_size=6))
def test_true_motion_moves_the_patch_of_one_picture_onto_the_next(seed: int, actions: list[tuple[float, float]]) -> None:
    env = DotEnv()
    before = env.reset(seed=seed)[0]["image"]
    assert (env.true_motion() == 0).all()
    for action in actions:
        left, top, right, bottom = env.agent_box()
        after = env.step(np.array(action, np.float32))[0]["image"]
        dx, dy = (int(v) for v in env.true_motion())
        np.testing.assert_array_equal(after[top + dy : bottom + dy, left + dx : right + dx], before[top:bottom, left:right])
        before = after


def test_motion_is_in_pixels_of_the_image_whatever_the_percept_size() -> None:
    small, large = DotEnv(size=32), DotEnv(size=32, percept_size=128)
    for env in (small, large):
        env.reset(seed=3)
        env.agent = np.array([0.5, 0.5])
        env.step(np.array([1.0, 0.0], np.float32))
    assert small.true_motion()[0] == pytest.approx(large.true_motion()[0], abs=1.0)
    assert large.true_motion()[0] == pytest.approx(toy.SPEED * 28, abs=0.2)


def test_percept_and_image_are_one_drawing() -> None:
    env = DotEnv(size=16, percept_size=64)
    obs, _ = env.reset(seed=1)
    blocks = obs["percept"].reshape(16, 4, 16, 4, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(obs["image"] - blocks).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(area_average(obs["percept"], 16), obs["image"])


def test_repeat_sums_rewards_and_the_limit_counts_env_steps() -> None:
    one, three = DotEnv(time_limit=8), DotEnv(time_limit=8, action_repeat=3)
    one.reset(seed=5)
    three.reset(seed=5)
    rewards = [one.step(ACTION)[1] for _ in range(8)]
    results = [three.step(ACTION) for _ in range(3)]
    assert [r[4]["env_steps"] for r in results] == [3, 3, 2]
    assert [r[3] for r in results] == [False, False, True]
    np.testing.assert_allclose([r[1] for r in results], [sum(rewards[:3]), sum(rewards[3:6]), sum(rewards[6:])])
    np.testing.assert_array_equal(one.state(), three.state())


def test_resets_without_a_seed_go_on_in_the_environments_own_generator() -> None:
    first, second = DotEnv(seed=4), DotEnv(seed=4)
    global_before = np.random.get_state()[1].copy()  # type: ignore[index]
    states = []
    for env in (first, second):
        states.append([(env.reset(), env.state())[1] for _ in range(3)])
    np.testing.assert_array_equal(states[0], states[1])
    assert not np.array_equal(states[0][0], states[0][1])
    assert not np.array_equal(DotEnv(seed=5).state(), (first.reset(), first.state())[1])
    np.testing.assert_array_equal(np.random.get_state()[1], global_before)  # type: ignore[index]


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ([np.nan, 0.0], "not finite"),
        ([np.inf, 0.0], "not finite"),
        ([1.01, 0.0], r"outside \[-1, 1\]"),
        ([0.0], "shape"),
    ],
)
def test_wrong_actions_are_errors(action: list[float], said: str) -> None:
    env = DotEnv()
    env.reset(seed=0)
    with pytest.raises(EnvError, match=said):
        env.step(np.array(action, np.float32))


def test_rounding_beyond_one_is_clipped() -> None:
    env, other = DotEnv(), DotEnv()
    env.reset(seed=0)
    other.reset(seed=0)
    env.step(np.array([1.0005, -1.0005], np.float32))
    other.step(np.array([1.0, -1.0], np.float32))
    np.testing.assert_array_equal(env.state(), other.state())


def test_step_outside_an_episode_is_an_error() -> None:
    env = make_env("toy:dot", time_limit=1)
    with pytest.raises(EnvError, match=r"call reset\(\) before step"):
        env.step(ACTION)
    with pytest.raises(EnvError, match="before render"):
        env.render()
    env.reset(seed=0)
    env.step(ACTION)
    with pytest.raises(EnvError, match="episode is over"):
        env.step(ACTION)
    assert env.render_frame(96).shape == (96, 96, 3)


def test_the_picture_of_reach_does_not_show_its_goal() -> None:
    """Two episodes with one start and two goals look the same. The goal picture shows the block at the goal."""
    env = ReachEnv(size=32)
    env.show_goal()
    obs, _ = env.reset(seed=3)
    start, env.goal = env.agent.copy(), np.array([1.0, 0.0])
    np.testing.assert_array_equal(env.render_frame(32), obs["image"])
    env.agent = np.array([0.9, 0.0])
    assert env._success() == 1.0
    env.agent = start
    env.goal = start + np.array([0.2, 0.0])
    assert env._success() == 0.0
    again, _ = env.reset(seed=3)
    env.agent = env.goal
    np.testing.assert_array_equal(again["goal"], env.render_frame(32))
    assert not np.array_equal(again["goal"], again["image"])
