"""Vectorised environments: the same episodes as in one process, and what happens when a worker dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from localmotion.envs import make_env
from localmotion.envs.vector import VectorEnv, env_seed
from localmotion.errors import ConfigError, EnvError


@pytest.fixture
def four() -> Iterator[VectorEnv]:
    env = VectorEnv("toy:dot", 4, seed=3, workers=2, size=16, time_limit=6)
    yield env
    env.close()


def actions(step: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(step).uniform(-1, 1, (count, 2)).astype(np.float32)


def kill(env: VectorEnv, worker: int) -> None:
    process = env._workers[worker].process
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_equals_environments_stepped_one_by_one(four: VectorEnv) -> None:
    """Pictures, rewards and flags over two episodes, whatever the division into workers."""
    single = [make_env("toy:dot", seed=env_seed(3, i), size=16, time_limit=6) for i in range(4)]
    for episode in range(2):
        seeds = [10 + episode, None, 12, None]
        observed, _ = four.reset(seed=seeds)
        expected = [env.reset(seed=seed)[0]["image"] for env, seed in zip(single, seeds, strict=True)]
        np.testing.assert_array_equal(observed["image"], np.stack(expected))
        for step in range(6):
            observed, reward, terminated, truncated, info = four.step(actions(step))
            alone = [env.step(action) for env, action in zip(single, actions(step), strict=True)]
            np.testing.assert_array_equal(observed["image"], np.stack([one[0]["image"] for one in alone]))
            np.testing.assert_array_equal(reward, [one[1] for one in alone])
            np.testing.assert_array_equal(truncated, [step == 5] * 4)
            assert not terminated.any()
            assert not info["crashed"].any()
            assert (info["env_steps"] == 1).all()


def test_only_the_masked_are_reset_and_the_finished_wait(four: VectorEnv) -> None:
    first, _ = four.reset(seed=1)
    for step in range(6):
        last, *_ = four.step(actions(step))
    mask = np.array([True, False, False, True])
    begun, _ = four.reset(seed=1, options={"reset_mask": mask})
    np.testing.assert_array_equal(begun["image"][mask], first["image"][mask])
    np.testing.assert_array_equal(begun["image"][~mask], last["image"][~mask])
    after, reward, _, truncated, info = four.step(actions(0))
    np.testing.assert_array_equal(after["image"][~mask], last["image"][~mask])
    assert (reward[~mask] == 0).all()
    assert (reward[mask] > 0).all()
    np.testing.assert_array_equal(truncated, ~mask)
    np.testing.assert_array_equal(info["env_steps"], mask)


def test_spaces_and_description(four: VectorEnv) -> None:
    assert four.single_observation_space["image"].shape == (16, 16, 3)
    assert four.action_space.shape == (4, 2)
    assert four.observation_space["image"].shape == (4, 16, 16, 3)
    assert four.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert four.description["name"] == "toy:dot"
    observed, _ = four.reset(seed=0)
    assert four.observation_space.contains(observed)


def test_a_dead_worker_costs_its_episodes_once_then_is_an_error(four: VectorEnv) -> None:
    before, _ = four.reset(seed=1)
    kill(four, 0)
    observed, reward, terminated, truncated, info = four.step(actions(0))
    np.testing.assert_array_equal(info["crashed"], [True, True, False, False])
    np.testing.assert_array_equal(truncated, [True, True, False, False])
    assert not terminated.any()
    assert (reward[:2] == 0).all()
    assert (reward[2:] > 0).all()
    np.testing.assert_array_equal(observed["image"][:2], before["image"][:2])
    four.reset(options={"reset_mask": truncated})
    _, reward, _, truncated, info = four.step(actions(1))
    assert (reward > 0).all()
    assert not truncated.any()
    assert not info["crashed"].any()
    kill(four, 0)
    with pytest.raises(EnvError, match=r"toy:dot: the worker of environments 0, 1 died of signal SIGKILL, 2 times"):
        four.step(actions(2))


def test_a_worker_that_dies_in_a_reset_takes_the_episodes_of_its_other_environments_with_it(four: VectorEnv) -> None:
    four.reset(seed=1)
    kill(four, 1)  # of environments 2 and 3
    before, info = four.reset(seed=5, options={"reset_mask": [True, False, True, False]})
    assert info["crashed"].tolist() == [False, False, True, True]
    assert four.running.tolist() == [True, True, False, False]
    assert "worker of environments 2, 3 died of signal SIGKILL" in info["faults"][2]
    assert info["faults"][2] == info["faults"][3]
    observed, info = four.reset(seed=1, options={"reset_mask": info["crashed"]})
    assert not info["crashed"].any()
    assert four.running.all()
    fresh = make_env("toy:dot", size=16)
    np.testing.assert_array_equal(observed["image"][3], fresh.reset(seed=env_seed(1, 3))[0]["image"])
    np.testing.assert_array_equal(observed["image"][:2], before["image"][:2])


def test_a_hanging_worker_counts_as_dead() -> None:
    env = VectorEnv("toy:dot", 2, workers=2, size=16)
    env.reset(seed=0)
    os.kill(env._workers[1].process.pid or 0, signal.SIGSTOP)
    env.step_async(actions(0, 2))
    env._workers[1].deadline = 0.0  # the time limit of this worker alone has passed, however busy the machine is
    *_, info = env.step_wait()
    np.testing.assert_array_equal(info["crashed"], [False, True])
    env.close()


def test_misuse(four: VectorEnv) -> None:
    with pytest.raises(EnvError, match="call reset"):
        four.step(actions(0))
    four.reset(seed=0)
    bad = actions(0)
    bad[2, 1] = np.nan
    with pytest.raises(EnvError, match=r"environment 2: toy:dot: action .* is not finite"):
        four.step(bad)
    with pytest.raises(EnvError, match=r"shape \(3, 2\), expected \(4, 2\)"):
        four.step(actions(0, 3))
    with pytest.raises(EnvError, match="no step is under way"):
        four.step_wait()
    four.step_async(actions(0))
    with pytest.raises(EnvError, match="step_wait"):
        four.step_async(actions(0))
    with pytest.raises(EnvError, match="3 seeds for 4 environments"):
        four.reset(seed=[1, 2, 3])
    with pytest.raises(EnvError, match="reset_mask"):
        four.reset(options={"reset_mask": [True]})


def test_what_make_env_refuses_is_refused_here() -> None:
    with pytest.raises(ConfigError, match="toy:dot"):
        VectorEnv("toy:dott", 2)
    with pytest.raises(ConfigError, match="at least 1"):
        VectorEnv("toy:dot", 0)


@pytest.mark.parametrize("name", ["dmc:cartpole_swingup"])
def test_pictures_of_workers_are_bit_equal_to_those_of_this_process(name: str) -> None:
    env = VectorEnv(name, 2, seed=5, workers=2, size=32, quality="fast")
    alone = make_env(name, seed=0, size=32, quality="fast")
    observed, _ = env.reset(seed=7)
    act = np.full((2, 1), 0.3, np.float32)
    observed, reward, *_ = env.step(act)
    for index in range(2):
        alone.reset(seed=env_seed(7, index))
        picture, expected, *_ = alone.step(act[index])
        np.testing.assert_array_equal(observed["image"][index], picture["image"])
        assert reward[index] == expected
    env.close()
