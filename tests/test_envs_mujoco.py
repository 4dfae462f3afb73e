"""DeepMind Control and Meta-World through our interface: the suites' own numbers, reproducible, and separate from each other."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from localmotion.envs import list_envs, make_env
from localmotion.envs.base import PixelEnv
from localmotion.errors import ConfigError, EnvError

Make = Callable[..., PixelEnv]


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[PixelEnv] = []

    def build(name: str, **settings: Any) -> PixelEnv:
        opened.append(make_env(name, **{"quality": "fast", **settings}))
        return opened[-1]

    yield build
    for env in opened:
        env.close()


def actions(env: PixelEnv, count: int, seed: int = 0) -> np.ndarray:
    shape = env.action_space.shape
    assert shape is not None
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


@pytest.mark.parametrize("name", ["dmc:cartpole_swingup", "metaworld:reach"])
def test_passes_the_checker_of_gymnasium(make: Make, name: str) -> None:
    check_env(make(name, percept_size=128), skip_render_check=True)


@pytest.mark.parametrize("name", ["dmc:ball_in_cup_catch", "dmc:quadruped_escape", "metaworld:door-lock", "metaworld:reach"])
def test_a_seed_gives_the_same_episode_whatever_went_before(make: Make, name: str) -> None:
    first, second = make(name), make(name, seed=9)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    second.reset()
    for action in actions(second, 4, seed=1):
        second.step(action)
    states, pictures = [], []
    for env in (first, second):
        obs, _ = env.reset(seed=7)
        run = [(env.step(action), env.state())[0] for action in actions(env, 3)]
        states.append([env.state(), [r[1] for r in run]])
        pictures.append([obs["image"], *(r[0]["image"] for r in run)])
    np.testing.assert_array_equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert not np.array_equal(first.reset(seed=8)[0]["image"], pictures[0][0])
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_environments_stepped_in_turn_do_not_disturb_each_other(make: Make) -> None:
    kinds = [
        ("dmc:walker_walk", {"size": 64}),
        ("dmc:cheetah_run", {"size": 96, "quality": "reference"}),
        ("metaworld:reach", {"size": 32, "camera": "corner2"}),
        ("metaworld:drawer-open", {"size": 64}),
    ]

    def begin(env: PixelEnv) -> list[np.ndarray]:
        return [env.reset(seed=3)[0]["image"]]

    alone = []
    for name, settings in kinds:
        env = make(name, **settings)
        alone.append(begin(env) + [env.step(a)[0]["image"] for a in actions(env, 2)])
        env.close()
    envs = [make(name, **settings) for name, settings in kinds]
    together = [begin(env) for env in envs]
    for t in range(2):
        for env, seen in zip(envs, together, strict=True):
            seen.append(env.step(actions(env, 2)[t])[0]["image"])
            env.render_frame(160)  # another size in between must not matter
    for name, one, other in zip(kinds, alone, together, strict=True):
        np.testing.assert_array_equal(np.stack(one), np.stack(other), err_msg=name[0])
    envs[0].close()
    np.testing.assert_array_equal(begin(envs[1])[0], alone[1][0])


_FRESH = """
import hashlib, json, numpy as np
from localmotion.envs import make_env
out = []
for name in ("dmc:walker_walk", "metaworld:lever-pull"):
    env = make_env(name, quality="fast"); obs, _ = env.reset(seed=11)
    obs = env.step(np.full(env.action_space.shape, 0.3, np.float32))[0]
    out += [hashlib.sha256(env.state().tobytes()).hexdigest(), hashlib.sha256(obs["image"].tobytes()).hexdigest()]
print(json.dumps(out))
"""


def test_a_fresh_process_sees_the_same_states_and_pictures(make: Make) -> None:
    done = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr, "OpenGL is not left in order when a process ends"
    here = []
    for name in ("dmc:walker_walk", "metaworld:lever-pull"):
        env = make(name)
        env.reset(seed=11)
        obs = env.step(np.full(env.action_space.shape, 0.3, np.float32))[0]
        here += [hashlib.sha256(x.tobytes()).hexdigest() for x in (env.state(), obs["image"])]
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_percept_and_image_are_one_rendering(make: Make) -> None:
    env = make("dmc:hopper_hop", percept_size=128)
    obs, _ = env.reset(seed=0)
    means = obs["percept"].reshape(64, 2, 64, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(obs["image"] - means).max() <= 0.5 + 1e-9
    assert env.observation_space.contains(obs)


@pytest.mark.parametrize("name", ["dmc:walker_walk", "dmc:quadruped_escape", "metaworld:hammer"])
def test_reference_pictures_are_those_of_mujocos_own_renderer(make: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env: Any = make(name, quality="reference")
    obs, _ = env.reset(seed=1)
    from mujoco import MjvOption, Renderer, gl_context, mjtVisFlag

    from localmotion.envs.gl import choose_gl

    if choose_gl().backend != "egl":
        pytest.skip("compares with MuJoCo's EGL context")
    from mujoco.egl import GLContext

    monkeypatch.setattr(gl_context, "GLContext", GLContext, raising=False)  # MuJoCo may have been imported without OpenGL
    physics = env.physics if hasattr(env, "physics") else env.inner
    model, data = (physics.model.ptr, physics.data.ptr) if hasattr(env, "physics") else (physics.model, physics.data)
    options = MjvOption()
    options.flags[mjtVisFlag.mjVIS_RANGEFINDER] = False
    renderer = Renderer(model, 64, 64)
    renderer.update_scene(data, camera=env.camera, scene_option=options)
    theirs = renderer.render()
    renderer.close()
    if name.startswith("metaworld"):
        theirs = theirs[::-1, ::-1]
    np.testing.assert_array_equal(obs["image"], theirs)
    np.testing.assert_array_equal(env.render_frame(64), theirs)  # and theirs did not disturb ours


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("dmc:walker_walk", 2.0),
        ("dmc:reacher_easy", 2.0),
        ("dmc:cheetah_run", 2.0),
        ("metaworld:reach", 4.5),
        ("dmc:dog_run", 2.5),
    ],
)
def test_fast_pictures_stay_close_to_reference(make: Make, name: str, bound: float) -> None:
    seen = []
    for quality in ("reference", "fast"):
        env = make(name, quality=quality)
        obs, _ = env.reset(seed=2)
        assert env.describe()["quality"] == quality
        seen.append(obs["image"].astype(float))
    difference = np.abs(seen[0] - seen[1]).mean()
    assert 0 < difference < bound  # mean grey levels of 255; without shadows reacher differs by 30


@pytest.mark.parametrize("name", ["metaworld:reach", "metaworld:door-lock", "metaworld:drawer-open"])
def test_simplified_meshes_change_the_picture_by_less_than_two_grey_levels(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from localmotion.envs import meshes

    pictures = []
    for cell in (meshes.CELL, 1e-9):
        monkeypatch.setattr(meshes, "CELL", cell)
        pictures.append(make(name).reset(seed=0)[0]["image"].astype(float))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 2


def test_rewards_are_those_of_dm_control(make: Make) -> None:
    env: Any = make("dmc:walker_walk", time_limit=40)
    env.reset(seed=4)
    from dm_control import suite

    theirs = suite.load("walker", "walk", task_kwargs={"random": 0})
    theirs.reset()
    with theirs.physics.reset_context():
        theirs.physics.set_state(env.physics.get_state())
    for t, action in enumerate(actions(env, 20)):
        _, reward, terminated, truncated, info = env.step(action)
        assert reward == sum(theirs.step(action).reward for _ in range(2))
        assert (terminated, truncated, info["env_steps"]) == (False, t == 19, 2)
        assert "success" not in info
    np.testing.assert_array_equal(env.physics.get_state(), theirs.physics.get_state())


def test_actions_are_mapped_to_the_range_of_the_task(make: Make) -> None:
    env: Any = make("dmc:manipulator_bring_ball")
    env.reset(seed=0)
    low, high = env._centre - env._half, env._centre + env._half
    np.testing.assert_array_equal([low, high], [env.physics.model.actuator_ctrlrange[:, k] for k in (0, 1)])
    lqr: Any = make("dmc:lqr_lqr_2_1")  # unbounded in the suite
    np.testing.assert_array_equal(lqr._half, np.ones(1))
    lqr.reset(seed=0)
    assert np.isfinite(lqr.step(np.ones(1, np.float32))[1])


@pytest.mark.filterwarnings("ignore:Constant")  # the expert's own remark on its gains
def test_expert_of_metaworld_succeeds_and_the_episode_goes_on(make: Make) -> None:
    env: Any = make("metaworld:reach", size=16, time_limit=120)
    env.reset(seed=0)
    from metaworld.policies import SawyerReachV3Policy

    policy, successes, over = SawyerReachV3Policy(), [], False
    while not over:
        action = np.clip(policy.get_action(env.inner._get_obs()), -1, 1).astype(np.float32)
        _, reward, terminated, over, info = env.step(action)
        assert not terminated
        successes.append(info["success"])
    assert len(successes) == 120
    assert successes[0] == 0.0
    assert successes[-1] == 1.0
    assert reward > 9
    assert env.reset(seed=1)[1] == {"env_steps": 0, "success": 0.0}


def test_the_ten_tasks_of_mt10_have_names_and_experts() -> None:
    from metaworld.env_dict import MT10_V3
    from metaworld.policies import ENV_POLICY_MAP

    from localmotion.envs.metaworld import MT10

    assert [f"{task}-v3" for task in MT10] == list(MT10_V3)
    assert {f"{suite}:{task}" for suite in ("metaworld", "dmw") for task in MT10} <= set(list_envs())
    assert {f"{task}-v3" for task in MT10} <= set(ENV_POLICY_MAP)


@pytest.mark.filterwarnings("ignore:Constant")
def test_an_episode_can_end_on_success(make: Make) -> None:
    env: Any = make("metaworld:drawer-close", size=16, observed="vectors", end_on_success=True)
    env.reset(seed=0)
    found = [env.step(env.expert_action())]
    while not (found[-1][2] or found[-1][3]):
        found.append(env.step(env.expert_action()))
    assert [x[4]["success"] for x in found] == [0.0] * (len(found) - 1) + [1.0]
    assert (found[-1][2], found[-1][3]) == (True, False)
    assert env.describe()["end_on_success"] is True
    env.end_on_success = False
    assert "end_on_success" not in env.describe()  # so that collections of earlier versions go on


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_corner_cameras_stand_upright(make: Make, camera: str) -> None:
    env: Any = make("metaworld:reach", camera=camera)
    env.reset(seed=0)

    # The hand hangs from the arm above the table: in an upright picture a raised mocap moves it up.
    def hand_row() -> float:
        picture = env.render_frame(128).astype(int)
        white_cyan = (picture[..., 2] > 180) & (picture[..., 1] > 150) & (picture[..., 0] < 60)  # the cyan finger
        rows = np.nonzero(white_cyan)[0]
        assert rows.size
        return float(rows.mean())

    before = hand_row()
    for _ in range(15):
        env.step(np.array([0, 0, 1, 0], np.float32))
    assert hand_row() < before - 1


@pytest.mark.parametrize("name", ["dmc:cheetah_run", "metaworld:reach", "toy:dot"])
def test_supersampling_averages_a_larger_drawing(make: Make, name: str) -> None:
    env = make(name, percept_size=128, supersample=2)
    obs, _ = env.reset(seed=3)
    large = env._draw(256).astype(np.float64)
    np.testing.assert_allclose(obs["percept"], large.reshape(128, 2, 128, 2, 3).mean((1, 3)), atol=0.5001)
    assert obs["image"].shape == (64, 64, 3)
    np.testing.assert_array_equal(env.render_frame(128), obs["percept"])
    assert env.describe()["supersample"] == 2
    plain = make(name, percept_size=128).reset(seed=3)[0]["percept"]
    assert np.abs(plain.astype(float) - obs["percept"]).mean() < 3
    assert (plain != obs["percept"]).any()
    with pytest.raises(ConfigError, match="supersample=0"):
        make(name, supersample=0)


def test_wrong_cameras_name_the_right_ones(make: Make) -> None:
    with pytest.raises(ConfigError, match="did you mean corner"):
        make("metaworld:reach", camera="corner9")
    with pytest.raises(ConfigError, match="camera 5 of dmc:walker_walk"):
        make("dmc:walker_walk", camera=5)
    assert make("dmc:quadruped_walk").describe()["camera"] == 2


def test_description_can_be_stored_and_says_what_drew(make: Make) -> None:
    facts = json.loads(json.dumps(make("metaworld:reach-v3", percept_size=128).describe()))
    assert facts["name"] == "metaworld:reach"
    assert (facts["action_repeat"], facts["time_limit"], facts["camera"], facts["percept_size"]) == (1, 500, "corner", 128)
    assert facts["versions"]["metaworld"] == "3.1.1"
    assert facts["versions"]["mujoco"] == "3.3.0"
    assert facts["gl"]["renderer"]


def test_closed_environments_say_so(make: Make) -> None:
    env = make("dmc:pendulum_swingup")
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(EnvError, match="closed"):
        env.step(np.zeros(1, np.float32))


def test_another_thread_may_not_draw(make: Make) -> None:
    from concurrent.futures import ThreadPoolExecutor

    env = make("dmc:pendulum_swingup")
    with ThreadPoolExecutor(1) as pool, pytest.raises(EnvError, match="thread that made it"):
        pool.submit(env.reset).result()


@pytest.mark.parametrize(
    "task", ["dog_fetch", "dog_run", "quadruped_fetch", "fish_swim", "point_mass_easy", "manipulator_bring_ball"]
)
def test_the_default_camera_shows_the_agent(task: str) -> None:
    env: Any = make_env(f"dmc:{task}")
    env.reset(seed=1)
    assert env.agent_mask().any()
    env.close()
