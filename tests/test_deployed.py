"""A trained agent on a robot: the same actions as in evaluation, from a camera's pictures alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import localmotion
from deployed_runs import MOVING, saved
from localmotion.acting.episodes import episode_seed
from localmotion.acting.observer import Observer
from localmotion.envs.spaces import actions_of, read_actions
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.perception.stream import StreamingExtractor
from localmotion.recipe import Recipe
from localmotion.runs.push import write_shared

STEPS = 9
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def played(run: Path, monkeypatch: pytest.MonkeyPatch, env: str = "") -> tuple[list[Any], list[Any]]:
    """The pictures of an evaluation episode as they are drawn, and the actions taken after each."""
    frames, actions = [], []
    record = Observer._record

    def kept(self: Observer, obs: dict[str, Any], action: Any, *rest: Any, first: bool) -> dict[str, Any]:
        frames.append(obs.get("percept", obs["image"]))
        actions.extend([] if first else [action])
        return record(self, obs, action, *rest, first=first)

    monkeypatch.setattr(Observer, "_record", kept)
    evaluate_run(run, episodes=1, env=env, env_options={"time_limit": STEPS})
    return frames[:-1], actions


@pytest.mark.parametrize(
    ("name", "stage", "env"),
    [("dreamer_v2", "train", "toy:dot"), ("dreamer_v3", "train", "toy:dot"), ("drp", "train", "toy:dot"), ("bc", "decode", "")],
)
def test_actions_are_those_of_an_evaluation_to_the_bit(
    name: str, stage: str, env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DRP perceives motion at 64 pixels and sees 32; bc learned from logged episodes, without an environment."""
    run = saved(tmp_path / "run", name, stage, env=env, **({} if env else {"data": "somewhere/store"}))
    frames, actions = played(run, monkeypatch, "" if env else "toy:dot")
    assert len(actions) == STEPS
    assert len(frames[0]) == (64 if name == "drp" else 32)
    policy = localmotion.load_policy(run, device="cpu")
    before = torch.get_rng_state()
    for _ in range(2):  # a reset forgets the episode before
        policy.reset(seed=0)
        assert np.array_equal([policy.act(frame.copy()) for frame in frames], actions)
    assert torch.equal(torch.get_rng_state(), before)
    if name == "dreamer_v3":  # its latents and actions are drawn
        policy.reset(seed=1)
        assert not np.array_equal([policy.act(frame) for frame in frames], actions)


def test_pictures_of_a_camera_are_resized_as_in_training(tmp_path: Path) -> None:
    """Averaged over areas to the side of perception, then to that of the agent. 64 x 128 becomes 64, then 32."""
    policy = localmotion.load_policy(saved(tmp_path / "run", "drp"), device="cpu", deterministic=True)
    assert policy.observation_space["image"].shape == (64, 64, 3)
    wide = np.repeat(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), 2, 1)
    policy.reset()
    record = policy._record({"image": wide})
    blocks = wide[:, ::2].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert record["image"].shape == (32, 32, 3)
    assert np.abs(record["image"] - blocks).max() <= 0.5
    assert record["flow"].shape == (32, 32, 2)


def test_points_are_drawn_as_in_the_evaluation_with_the_seed(tmp_path: Path) -> None:
    policy = localmotion.load_policy(saved(tmp_path / "run", "drp"), device="cpu")
    frame = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = []
    for seed in (3, 4):
        policy.reset(seed)
        found.append(policy._record(frame)["tracks"])
        assert np.array_equal(found[-1], StreamingExtractor(MOVING, episode_seed(seed, "eval", 0)).reset(frame).tracks)
    assert not np.array_equal(*found)


def test_without_random_numbers(tmp_path: Path) -> None:
    """The likeliest latents and actions do not depend on the seed, and differ from drawn ones."""
    run = saved(tmp_path / "run", "dreamer_v3")
    found = []
    for deterministic, seed in ((True, 0), (True, 5), (False, 0)):
        policy = localmotion.load_policy(run, device="cpu", deterministic=deterministic)
        policy.reset(seed)
        found.append([policy.act(PICTURE), policy.act(PICTURE[::-1])])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))


def test_actions_are_in_the_range_of_the_environment(tmp_path: Path) -> None:
    """As recorded by the run, also once it is shared, or as given for the robot."""
    recorded = {"actions": read_actions(BOX).to_json()}
    run = saved(tmp_path / "run", "dreamer_v3", env="mine:Own", described=recorded)
    write_shared(saved(tmp_path / "plain", "dreamer_v3", described=recorded), tmp_path / "shared", name="x")
    plain = localmotion.load_policy(saved(tmp_path / "toy", "dreamer_v3"), device="cpu", deterministic=True)
    plain.reset()
    numbers = plain.act(PICTURE)
    assert plain.action_space == spaces.Box(-1, 1, (2,), np.float32)
    assert np.abs(numbers).max() <= 1
    given: Any
    for name, given in ((run, None), (tmp_path / "shared", None), (tmp_path / "toy", BOX)):
        policy = localmotion.load_policy(name, device="cpu", deterministic=True, action_space=given)
        policy.reset()
        action = policy.act(PICTURE)
        assert policy.action_space == BOX
        assert action == pytest.approx([2 * numbers[0], 5 + 5 * numbers[1]], abs=1e-6)
        assert BOX.contains(action)


def test_choices_and_vectors(tmp_path: Path) -> None:
    model = {"discrete": True, "vector_dim": 3, "pixels": False}
    described = {"actions": {"n": 3, "start": 5}}
    run = saved(tmp_path / "run", "dreamer_v3", actions=3, env="mine:Own", model=model, described=described)
    policy = localmotion.load_policy(run, device="cpu")
    policy.reset()
    assert list(policy.observation_space.spaces) == ["vector"]
    actions = [policy.act({"vector": np.full(3, x)}) for x in range(9)]
    assert all(policy.action_space.contains(action) for action in actions)
    assert {5, 6, 7} >= {int(action) for action in actions}
    for wrong in (np.zeros(4), np.full(3, np.nan), np.array(["a"] * 3)):
        with pytest.raises(LocalmotionError, match=r"vector is .* it takes \(3,\) finite numbers"):
            policy.act({"vector": wrong})


def test_misuse_says_what_to_do(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "dreamer_v2")
    policy = localmotion.load_policy(run, device="cpu")
    with pytest.raises(LocalmotionError, match=r"act before reset; call reset\(\)"):
        policy.act(PICTURE)
    policy.reset()
    with pytest.raises(LocalmotionError, match="lacks image; give a dict with image"):
        policy.act({"pixels": PICTURE})
    for wrong in (PICTURE / 255, PICTURE[..., 0], PICTURE[..., :1], PICTURE[:4], PICTURE.tolist()):
        with pytest.raises(LocalmotionError, match=r"policy: image is"):
            policy.act(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"does not fit .*gives 2 numbers"):
        localmotion.load_policy(run, device="cpu", action_space=spaces.Discrete(2))
    with pytest.raises(CheckpointError, match="has no best checkpoint"):
        localmotion.load_policy(run, which="best")
    with pytest.raises(CheckpointError, match="is a run of stage pretrain and has no actor; fine-tune it first"):
        localmotion.load_policy(saved(tmp_path / "pre", "drp", "pretrain", env="", actions=None))
    exact = Recipe(**{**vars(MOVING), "flow": "exact", "segment": "exact", "track": "exact"})
    with pytest.raises(ConfigError, match=r"simulator's state; fine-tune it with --motion perceived"):
        localmotion.load_policy(saved(tmp_path / "exact", "drp", recipe=exact), device="cpu")


@pytest.mark.parametrize(
    "values",
    [{"n": 3}, {"n": 10**30, "start": 0}, {"low": [0], "high": [1], "dtype": "object"}, {"low": [0]}, 7, {"n": 1, "start": 0}],
)
def test_a_damaged_action_space_is_refused(values: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        actions_of(values)


def test_an_action_space_of_another_size_is_refused(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "dreamer_v2", described={"actions": {"low": [0.0], "high": [1.0], "dtype": "float32"}})
    with pytest.raises(ConfigError, match="is not that of the weights"):
        localmotion.load_policy(run, device="cpu")


def test_an_environment_of_ones_own_records_its_range() -> None:
    from localmotion.envs.gym_env import GymEnv
    from own_envs import Walk, picture

    env = GymEnv("mine:Own", Walk(picture(32, 32, 3), BOX))
    assert actions_of(json.loads(json.dumps(env.describe()))["actions"]).space == BOX


def test_the_import_of_the_package_stays_light() -> None:
    code = "import sys, localmotion; assert 'torch' not in sys.modules; localmotion.load_policy; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        localmotion.nothing  # noqa: B018
