"""Goal pictures of environments: the episode's task solved, drawn once a reset, and the same episode with and without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from localmotion.envs import make_env, metaworld
from localmotion.envs.base import PixelEnv, area_average
from localmotion.envs.goals import check_goals, list_goals
from localmotion.envs.vector import VectorEnv
from localmotion.errors import ConfigError

Make = Callable[..., Any]
ONE_EACH = ("acrobot_swingup", "cartpole_three_poles", "finger_turn_hard", "hopper_stand", "pendulum_swingup", "reacher_hard",
            "swimmer_swimmer6", "walker_stand", "tree-0004_reach", "tree-0012_reach")  # fmt: skip


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[PixelEnv] = []

    def build(name: str, **settings: Any) -> PixelEnv:
        opened.append(make_env(name, **{"size": 32, "quality": "fast", **settings}))
        return opened[-1]

    yield build
    for env in opened:
        env.close()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("toy:dot", {}),
        ("toy:reach", {}),
        ("toy:moving_background_lagged", {"percept_size": 64}),
        ("planar:tree-0004_reach", {}),
        ("planar:finger_turn_hard", {"observed": "both"}),
        ("planar:reacher_easy", {"background": "twin"}),
        ("distracting:cartpole_swingup", {"difficulty": "hard"}),
        ("metaworld:window-close", {"size": 8}),
        ("dmw:drawer-open", {"size": 8}),
    ],
)
def test_an_episode_is_the_same_with_and_without_goals(make: Make, name: str, settings: dict[str, Any]) -> None:
    plain, goals = make(name, **settings), make(name, goal=True, **settings)
    goals.reset(seed=8)
    goals.step(goals.action_space.sample())
    (before, _), (now, info) = plain.reset(seed=1), goals.reset(seed=1)
    first = now["goal"]
    assert info["goal_solved"] == 1
    for action in np.random.default_rng(0).uniform(-1, 1, (4, *plain.action_space.shape)).astype(np.float32):
        assert now.keys() == before.keys() | {"goal"}
        for key, value in before.items():
            np.testing.assert_array_equal(now[key], value)
        np.testing.assert_array_equal(goals.state(), plain.state())
        np.testing.assert_array_equal(now["goal"], first)  # constant in an episode
        (before, expected, *_), (now, reward, *_) = plain.step(action), goals.step(action)
        assert reward == expected
    assert goals.observation_space.contains(now)
    assert not np.array_equal(goals.reset(seed=2)[0]["goal"], first)
    np.testing.assert_array_equal(goals.reset(seed=1)[0]["goal"], first)  # a function of the seed, whatever went before


@pytest.mark.parametrize("task", ONE_EACH)
def test_the_pose_of_a_planar_goal_has_the_whole_reward(make: Make, task: str) -> None:
    env = make(f"planar:{task}", size=16)
    from localmotion.envs.planar_tree_tasks import lowest  # imports MuJoCo

    for seed in range(4):
        env.reset(seed=seed)
        assert env._solve(seed)
        assert env._task.get_reward(env.physics) > 0.99
        assert (env.physics.data.qvel == 0).all()
        if task.endswith("_stand"):
            assert abs(lowest(env.physics)) < 1e-9


def test_the_finger_does_not_stay_where_the_spinner_goes(make: Make) -> None:
    env = make("planar:finger_turn_hard", size=16)
    moved = 0
    for seed in (0, 27):  # only in the second episode it is in the way
        env.reset(seed=seed)
        before = float(env.physics.data.qpos[0])
        env._solve(seed)
        moved += float(env.physics.data.qpos[0]) != before
        assert env.physics.data.ncon == 0
    assert moved == 1


def test_a_goal_picture_is_the_solved_state_at_the_agents_size(make: Make) -> None:
    env = make("planar:tree-0004_reach", percept_size=96, supersample=2, goal=True)
    goal = env.reset(seed=3)[0]["goal"]
    env._solve(0)
    np.testing.assert_array_equal(goal, area_average(env.render_frame(96), 32))
    assert goal.shape == (32, 32, 3)


def test_toys_are_at_their_goal_in_front_of_the_resets_background(make: Make) -> None:
    env = make("toy:moving_background", size=64, goal=True)
    seen = env.reset(seed=5)[0]
    agent = np.stack([env.true_mask(), env.layers(64).ident == 1]).any(0)
    changed = (seen["goal"] != seen["image"]).any(-1)
    env._solve(0)
    assert changed.any()
    assert not (changed & ~agent & ~env.true_mask()).any()
    assert env._control(np.zeros(2))[0] == 1


def test_backgrounds_and_cameras_are_those_of_the_reset(make: Make) -> None:
    """Corners show no part of the arm."""
    for name, options in (("planar:reacher_easy", {"background": "leaky"}), ("distracting:reacher_hard", {"difficulty": "hard"})):
        env = make(name, size=64, goal=True, **options)
        for seed in range(3):
            seen = env.reset(seed=seed)[0]
            for corner in (np.s_[:6, :6], np.s_[-6:, -6:]):
                np.testing.assert_array_equal(seen["goal"][corner], seen["image"][corner])


def test_meta_worlds_goals_are_successes_of_the_scripted_policy(make: Make) -> None:
    env = make("metaworld:reach", size=8, time_limit=20, goal=True)  # shorter than the policy needs
    left = []
    for seed in range(3):
        env._begin(seed)
        assert env._solve(seed)
        inner = env.inner
        assert np.linalg.norm(inner.tcp_center - inner._target_pos) < 0.05
        left.append(np.linalg.norm(inner.get_endeff_pos() - inner._target_pos))
    assert np.mean(left) < 0.03  # it goes on after the first success; there the hand is still 0.043 away


def test_if_the_policy_fails_the_nearest_state_is_shown(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot reach the target in the steps that it has, and then it moves away."""
    monkeypatch.setattr(metaworld, "EXPERT_STEPS", 12)
    monkeypatch.setattr(metaworld, "EXPERT_TRIES", 2)
    env = make("metaworld:reach", size=8, goal=True)
    near, there = np.inf, np.zeros(3)
    policy, played = env.expert_action, 0

    def act() -> np.ndarray:
        nonlocal played, near, there
        distance = float(np.linalg.norm(env.inner.tcp_center - env.inner._target_pos))
        if distance < near:
            near, there = distance, env.inner.tcp_center.copy()
        played += 1
        return policy() if played % 12 < 8 else -policy()

    monkeypatch.setattr(env, "expert_action", act)
    assert env.reset(seed=0)[1]["goal_solved"] == 0
    assert played == 24
    env._begin(5)
    near, played = np.inf, 0
    assert not env._solve(5)
    np.testing.assert_allclose(env.inner.tcp_center, there, atol=1e-6)


@pytest.mark.parametrize("name", ["planar:cheetah_run", "planar:tree-0003_run", "toy:pairs", "dmc:humanoid_walk"])
def test_environments_without_goals_are_refused_with_the_names_of_those_that_have_them(name: str) -> None:
    wanted = f"{name}: has no goal pictures; .*metaworld: dmw: all tasks; planar: acrobot.*toy: dot"
    with pytest.raises(ConfigError, match=wanted):
        check_goals(name)
    with pytest.raises(ConfigError, match=wanted):
        make_env(name, goal=True)
    assert name not in list_goals()


def test_the_list_of_environments_with_goals_is_true(make: Make) -> None:
    listed = list_goals()
    for name in ("toy:dot", "toy:pairs", "planar:walker_stand", "planar:walker_walk", "planar:finger_spin", "dmc:reacher_easy"):
        assert make(name, size=16).has_goals == (name in listed)
    assert len(list_goals("metaworld")) == len(list_goals("dmw")) == 50
    assert {"planar:tree-0000_reach", "dmcr:pendulum_swingup", "masklam:cartpole_swingup"} <= set(listed)
    check_goals("metaworld:reach-v3")
    check_goals("planar:tree-0020_reach")  # sealed ones, too


def test_goals_are_off_by_default_and_can_be_switched(make: Make) -> None:
    env = make("toy:dot", observed="both")
    assert "goal" not in env.describe()
    env.show_goal()
    assert set(env.reset(seed=0)[0]) == set(env.observation_space.spaces) == {"image", "vector", "goal"}
    env.show("vectors")
    assert set(env.reset(seed=0)[0]) == set(env.observation_space.spaces) == {"vector", "goal"}
    assert env.describe()["goal"] is True
    env.show_goal(False)
    seen, info = env.reset(seed=0)
    assert set(seen) == set(env.observation_space.spaces) == {"vector"}
    assert "goal_solved" not in info


def test_passes_the_checker_of_gymnasium(make: Make) -> None:
    check_env(make("toy:dot", percept_size=64, goal=True), skip_render_check=True)


def test_environments_in_workers_have_goals() -> None:
    env = VectorEnv("toy:dot", 2, seed=1, workers=2, size=16, goal=True)
    try:
        seen, _ = env.reset(seed=[4, 9])
        after = env.step(np.zeros((2, 2), np.float32))[0]
    finally:
        env.close()
    alone = make_env("toy:dot", size=16, goal=True)
    for index, seed in enumerate((4, 9)):
        np.testing.assert_array_equal(seen["goal"][index], alone.reset(seed=seed)[0]["goal"])
    np.testing.assert_array_equal(after["goal"], seen["goal"])
