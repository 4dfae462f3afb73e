"""Goal pictures in training: observations, replays, rollouts and logged episodes have them where the method wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from localmotion import methods
from localmotion.acting import observer as observing
from localmotion.acting.episodes import episode_seed
from localmotion.acting.observer import Observer, make_observer
from localmotion.config import RunConfig
from localmotion.envs import make_env
from localmotion.errors import ConfigError
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs.settings import compose
from localmotion.testing import check_acts, check_plans
from localmotion.training.finetune import finetune
from localmotion.training.playing import Playing
from localmotion.training.update import Updater
from localmotion.video.store import ClipStore
from small_planner import LoggedPlanner, OnPolicyPlanner, Planner
from test_resume import Stops, assert_same, in_pieces

Batches = list[dict[str, torch.Tensor]]
FLAGS: dict[str, Any] = {"precision": "fp32", "device": "cpu", "threads": 1, "recipe": {"size": 32, "percept_size": 32}}
FEW = ("eval_episodes=1", "online.batch_size=3", "online.length=9", "warmup_updates=1", "prefill=14", "train_every=4")
ROLLOUTS = ("rollout.environments=2", "rollout.workers=1", "rollout.steps=8", "rollout.epochs=1", "rollout.minibatches=1")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    for cls in (Planner, OnPolicyPlanner, LoggedPlanner):
        methods.register(cls.name, "small_planner", cls.__name__)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Batches that are learned from, copied."""
    found: Batches = []
    learn = Updater.learn

    def looked(self: Updater, batch: dict[str, torch.Tensor]) -> Any:
        found.append({key: value.clone() for key, value in batch.items()})
        return learn(self, batch)

    monkeypatch.setattr(Updater, "learn", looked)
    return found


def settings(*texts: str, name: str = "planner", env: str = "toy:dot", **flags: Any) -> RunConfig:
    more = ROLLOUTS if name == "on_policy_planner" else ()
    stage = next(iter(methods.get(name).stages))
    given = {**FLAGS, "env_options": {"time_limit": 6} if env else {}, **flags}
    return compose(name, stage, preset="debug", env=env, flags=given, settings=(*FEW, *more, *texts))


def goals_of(seeds: list[int]) -> dict[bytes, bytes]:
    """First picture -> goal picture of episodes."""
    env = make_env("toy:dot", size=32, goal=True)
    return {seen["image"].tobytes(): seen["goal"].tobytes() for seen in (env.reset(seed=seed)[0] for seed in seeds)}


def test_small_planners_keep_the_rules() -> None:
    assert check_plans(Planner)
    assert check_acts(Planner)


@pytest.mark.parametrize("name", ["planner", "on_policy_planner"])
def test_batches_have_the_goals_of_their_episodes(name: str, tmp_path: Path, batches: Batches) -> None:
    finetune(settings("env_steps=48", "online.eval_every=100000", name=name), tmp_path)
    goals = goals_of([episode_seed(0, "train", number) for number in range(12)])
    found = 0
    for batch in batches:
        assert batch["goal"].shape == batch["image"].shape
        for row, first in enumerate(batch["is_first"].tolist()):
            for t in range(1, len(first)):
                if not first[t]:
                    assert torch.equal(batch["goal"][row, t], batch["goal"][row, t - 1])  # constant in an episode
                    continue
                wanted = goals.get(batch["image"][row, t].numpy().tobytes())  # None in a replay's window from within an episode
                found += wanted is not None
                assert wanted in (None, batch["goal"][row, t].numpy().tobytes())
    assert found > 1


@pytest.mark.parametrize("name", ["planner", "on_policy_planner"])
def test_a_run_with_goals_in_pieces_is_the_whole_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = settings("env_steps=48", "online.eval_every=100000", "online.save_every=20", name=name)
    whole = finetune(run, tmp_path / "whole")
    Stops(monkeypatch, 17)  # longer than an evaluation, which is made anew after a stop
    assert in_pieces(finetune, run, tmp_path / "pieces") >= 1
    assert_same(whole, tmp_path / "pieces")


def test_logged_episodes_have_their_last_picture_as_goal(tmp_path: Path, batches: Batches) -> None:
    collect("toy:dot", tmp_path / "store", policy="random", episodes=3, time_limit=6, recipe=Recipe(32, 32, tracks=4))
    few = ("online.updates=2", "online.eval_every=100000")
    finetune(settings(*few, name="logged_planner", data=str(tmp_path / "store")), tmp_path / "run")
    store = ClipStore(tmp_path / "store")
    assert "goal" not in store.extra
    clips = [store.window("frames", clip) for clip in range(3)]
    for batch in batches:
        for picture, goal in zip(batch["image"].flatten(0, 1).numpy(), batch["goal"].flatten(0, 1).numpy(), strict=True):
            (clip,) = {number for number, clip in enumerate(clips) if (clip == picture).all((1, 2, 3)).any()}
            np.testing.assert_array_equal(goal, clips[clip][-1])


def test_an_environment_without_goals_is_refused_before_a_run_starts(tmp_path: Path) -> None:
    for name in ("planner", "on_policy_planner", "logged_planner"):
        data = {"data": str(tmp_path)} if name == "logged_planner" else {}
        run = settings(name=name, env="planar:cheetah_run", **data)
        with pytest.raises(
            ConfigError, match=r"planar:cheetah_run: has no goal pictures; these environments have them: .*toy: dot"
        ):
            finetune(run, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_methods_without_goals_get_none() -> None:
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags=FLAGS)
    assert "goal" not in make_observer(run, None).spec()
    assert "goal" in make_observer(settings(), None).spec()
    assert "goal" not in make_observer(settings(), None, goal=False).spec()


def test_an_agent_is_evaluated_and_filmed_with_goals_and_random_actions_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expert of an environment need not play for random actions."""
    path = finetune(settings("env_steps=24", "online.eval_every=100000", env="toy:block"), tmp_path / "run")
    asked: list[bool] = []

    def made(name: str, **options: Any) -> Any:
        asked.append(options["goal"])
        return make_env(name, **options)

    monkeypatch.setattr("localmotion.envs.make_env", made)
    agent = evaluate_run(path, episodes=6, env_options={"time_limit": 30})
    floor = evaluate_run(path, episodes=6, env_options={"time_limit": 30}, policy="random", video=tmp_path / "random.mp4")
    assert asked == [True] * 5 + [False] * 5
    assert agent["return_mean"] > 22 > floor["return_mean"] + 5  # it looks at the goal
    collect("toy:block", tmp_path / "store", policy=str(path), episodes=1, steps=3, recipe=Recipe(32, 32, tracks=4))
    assert set(ClipStore(tmp_path / "store").extra) == {"action", "reward", "is_terminal"}


class Own(gymnasium.Env[Any, Any]):
    """Somebody's environment, whose observation has a goal."""

    def __init__(self) -> None:
        picture = spaces.Box(0, 255, (16, 16, 3), np.uint8)
        self.observation_space = spaces.Dict({"image": picture, "goal": picture})
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def _seen(self) -> dict[str, Any]:
        return {"image": np.full((16, 16, 3), self.level, np.uint8), "goal": np.full((16, 16, 3), 200, np.uint8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.level = 10
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.level += 1
        return self._seen(), 0.0, False, False, {}


def test_an_environment_of_ones_own_gives_its_goal_in_the_observation() -> None:
    observer = Observer(Own(), None)
    assert observer.spec()["goal"] == ((16, 16, 3), "uint8")
    asked: list[Any] = []

    def policy(records: Any, first: bool) -> Any:
        asked.append(records[0]["goal"])
        return np.zeros((1, 2), np.float32)

    playing = Playing(observer, policy, 0, learning=False)
    playing.take(playing.choose())
    assert playing.record["image"][0, 0, 0] == 11
    assert (playing.record["goal"] == 200).all()
    assert (asked[0] == 200).all()
    assert "goal" in observing.SHOWN
