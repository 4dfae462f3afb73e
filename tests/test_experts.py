"""Experts: what an update computes, that it finds the best action, files, and videos of an expert."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.numpy import load_file, save_file

from localmotion import foreign
from localmotion.acting.episodes import EvaluationError, Rollout
from localmotion.acting.expert import Expert, load_expert, save_expert
from localmotion.acting.observer import Observer
from localmotion.cli import main
from localmotion.envs import make_env
from localmotion.errors import CheckpointError, ConfigError, EnvError
from localmotion.recording.collect import collect
from localmotion.training import experts as module
from localmotion.training.experts import Learner, Memory, Settings, train_expert

TINY = Settings(width=8, batch=8, envs=2, every=2, begin=20)


def test_windows_end_where_an_episode_ends() -> None:
    memory, rng = Memory(9, 2, 1, 1), np.random.default_rng(0)
    rewards = rng.normal(size=(9, 2)).astype(np.float32)
    ended, terminal = np.zeros((9, 2), bool), np.zeros((9, 2), bool)
    ended[4, 0] = ended[3, 1] = terminal[3, 1] = True  # one episode is cut, the other ends
    for t in range(9):
        place = np.array([[t], [t + 100]], np.float32)
        memory.add(vector=place, after=place + 0.5, action=-place, reward=rewards[t], ended=ended[t], terminal=terminal[t])
    vector, action, total, after, factor = (x.numpy() for x in memory.sample(rng, 400, 3, 0.9))
    assert {int(x) % 100 for x in vector[:, 0]} == set(range(7))
    np.testing.assert_array_equal(action, -vector)
    for number, begin in enumerate(vector[:, 0].astype(int).tolist()):
        env, t = divmod(begin, 100)
        stop = min(t + 3, next((k + 1 for k in range(t, 9) if ended[k, env]), 9))
        assert total[number] == pytest.approx(sum(0.9 ** (k - t) * rewards[k, env] for k in range(t, stop)), rel=1e-5)
        assert after[number, 0] == 100 * env + stop - 0.5
        assert factor[number] == pytest.approx(0.0 if terminal[stop - 1, env] else 0.9 ** (stop - t))


def test_log_probability_is_that_of_a_squashed_normal() -> None:
    torch.manual_seed(0)
    learner, normal = Learner(3, 2, TINY), torch.randn(50, 3)
    action, log = learner.sampled(normal)
    mean, log_std = learner.actor(normal)
    mean, deviation, action = mean.double(), log_std.double().exp(), action.double()
    z = (torch.atanh(action) - mean) / deviation
    density = (-0.5 * z**2).exp() / (deviation * (2 * torch.pi) ** 0.5) / (1 - action**2)
    torch.testing.assert_close(log.double(), density.log().sum(-1), rtol=1e-3, atol=1e-3)
    assert (action.abs() < 1).all()


def test_vectors_are_normalised_by_all_that_were_seen() -> None:
    learner, rng = Learner(2, 1, TINY), np.random.default_rng(0)
    seen = rng.normal([5, -3], [2, 0.1], (3, 40, 2)).astype(np.float32)
    for vectors in seen:
        learner.saw(vectors)
    learner.normalise()
    normal = learner.actor.normal(torch.from_numpy(seen.reshape(-1, 2)))
    torch.testing.assert_close(normal.mean(0), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    assert learner.actor.normal(torch.full((1, 2), 1e9)).max() == 10


def test_critics_learn_the_return_and_the_actor_the_best_action() -> None:
    """The best action of a state x is x / 2, worth 1; its value with a discount of a half is 2."""
    torch.manual_seed(0)
    learner = Learner(1, 1, Settings(width=32, rate=5e-3, slow=0.05))
    for number in range(300):
        x, a = torch.rand(64, 1) * 2 - 1, torch.rand(64, 1) * 2 - 1
        reward = 1 - 4 * (a - x / 2).square()[:, 0]
        learner.update(x, a, reward, torch.rand(64, 1) * 2 - 1, torch.full((64,), 0.5))
        if not number:  # a fresh policy is more random than it should stay
            assert learner.log_temperature.item() < np.log(0.1)
    x = torch.linspace(-0.9, 0.9, 7)[:, None]
    np.testing.assert_allclose(learner.actor.act(x.numpy()), x / 2, atol=0.15)
    with torch.no_grad():
        torch.testing.assert_close(learner.critics(x, x / 2).mean(0), torch.full((7,), 2.0), atol=0.3, rtol=0)
    before = [parameter.clone() for parameter in learner.slow.parameters()]
    learner.update(x, x / 2, x[:, 0], x, torch.zeros(7))
    for old, new, fast in zip(before, learner.slow.parameters(), learner.critics.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.05 * (fast - old))


def test_a_training_is_repeatable_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: Any = {"env_steps": 200, "seed": 3, "episodes": 2, "settings": TINY, "time_limit": 40}
    about = train_expert("planar:pendulum_swingup", tmp_path / "a", **settings)
    assert (about["env_steps"], about["updates"]) == (200, 40)  # 100 agent steps, the first 20 random
    assert len(about["returns"]) == 2
    assert about["curve"][-1][0] == 160  # four pairs of episodes of 40 env steps
    kept = json.loads((tmp_path / "a" / "expert.json").read_text())
    assert {name: kept[name] for name in about} == json.loads(json.dumps(about))
    weights = load_file(tmp_path / "a" / "expert.safetensors")
    torch.manual_seed(7)
    train_expert("planar:pendulum_swingup", tmp_path / "b", **settings)
    again = load_file(tmp_path / "b" / "expert.safetensors")
    assert all((weights[name] == again[name]).all() for name in weights)


class Slope(gymnasium.Env[Any, Any]):
    """Its vector counts 100 for each reset and 1 for each step. An episode has 4 steps. It fails at the steps of ``fails``, over all."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)
    resets = 0
    steps = 0

    def __init__(self, fails: set[int]) -> None:
        self.fails, self.broken = fails, False

    def reset(self, **_: Any) -> Any:
        assert not self.broken
        Slope.resets += 1
        self.at = 100 * Slope.resets
        return {"vector": np.array([self.at], np.float32)}, {}

    def step(self, action: Any) -> Any:
        assert not self.broken
        Slope.steps += 1
        if Slope.steps in self.fails:
            self.broken = True
            raise RuntimeError("down the slope")
        self.at += 1
        return {"vector": np.array([self.at], np.float32)}, 1.0, False, self.at % 100 == 4, {"env_steps": 1}


def test_a_step_that_fails_is_not_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 3 and 4 of all fail, then 12 and 13: two of one episode, and two of the episode after a complete one."""
    monkeypatch.setattr(Slope, "resets", 0)
    monkeypatch.setattr(Slope, "steps", 0)
    players, memory = module._Players(lambda: Observer(Slope({3, 4, 12, 13}), None), 1, 0), Memory(12, 1, 1, 1)
    for number in range(11):
        assert players.step(np.full((1, 1), number / 20, np.float32), memory) == 1
    assert memory.vector[:11, 0, 0].tolist() == [100, 101, 300, 301, 302, 303, 400, 401, 402, 600, 601]
    assert memory.after[:11, 0, 0].tolist() == [101, 102, 301, 302, 303, 304, 401, 402, 403, 601, 602]
    assert np.flatnonzero(memory.ended[:11, 0]).tolist() == [1, 5, 8]
    assert not memory.terminal.any()
    assert memory.reward[:11, 0].tolist() == [1.0] * 11
    assert players.returns == [4.0]  # of the complete episode
    assert (players.faults, players.failures) == (4, [2])
    players = module._Players(lambda: Observer(Slope({17, 18, 19}), None), 1, 0)
    players.step(np.zeros((1, 1), np.float32), memory)
    with pytest.raises(EnvError, match=r"down the slope \(3 failures of one environment"):
        players.step(np.zeros((1, 1), np.float32), memory)


@pytest.fixture
def shaky(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(foreign, "_trusted", ["own_envs:shaky"])
    return "own_envs:shaky"


@pytest.mark.parametrize("at", ["step", "reset"])
def test_an_expert_learns_on_after_failures(shaky: str, at: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = train_expert(shaky, tmp_path, env_steps=120, episodes=6, settings=TINY, at=at, every=9)
    said = " ".join(capsys.readouterr().out.split())
    cause = "through the wall" if at == "step" else "no floor"
    assert said.count("a fresh environment begins another") == about["training_faults"] > 0
    assert said.count(cause) == about["training_faults"] + about["faults"]
    assert (about["env_steps"], about["updates"], len(about["returns"])) == (120, 50, 6)
    assert json.loads((tmp_path / "expert.json").read_text())["training_faults"] == about["training_faults"]


def test_an_environment_that_keeps_failing_ends_the_training_saved(
    shaky: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(TINY, begin=4)
    with pytest.raises(EnvError, match=r"through the wall.*3 failures.*; .*/one has the expert of this moment"):
        train_expert(shaky, tmp_path / "one", env_steps=120, episodes=2, settings=few, every=1)
    about = json.loads((tmp_path / "one" / "expert.json").read_text())
    assert about["updates"] > 0
    assert about["training_faults"] >= 3
    assert "returns" not in about
    assert load_file(tmp_path / "one" / "expert.safetensors")
    with pytest.raises(EnvError, match="3 failures"):  # among the random steps
        train_expert(shaky, tmp_path / "none", env_steps=120, settings=TINY, every=1)
    assert not (tmp_path / "none").exists()

    def ends(*_: Any, **__: Any) -> Rollout:
        raise EvaluationError("no floor", Rollout([3.0], [6]))

    monkeypatch.setattr(module, "evaluate", ends)
    with pytest.raises(EnvError, match=r"^no floor; .*/played has the expert"):
        train_expert(shaky, tmp_path / "played", env_steps=40, settings=TINY, every=10**9)
    about = json.loads((tmp_path / "played" / "expert.json").read_text())
    assert (about["returns"], about["env_steps"]) == ([3.0], 40)

    def none(*_: Any, **__: Any) -> Rollout:
        raise EnvError("cannot make: no licence")

    monkeypatch.setattr(module, "evaluate", none)
    with pytest.raises(EnvError, match=r"^cannot make: no licence; .*/unplayed has the expert"):
        train_expert(shaky, tmp_path / "unplayed", env_steps=40, settings=TINY, every=10**9)
    assert "returns" not in json.loads((tmp_path / "unplayed" / "expert.json").read_text())


def test_a_stop_saves_the_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Stops(module.StopRequest):
        calls = 0

        def check(self) -> None:
            self.calls += 1
            self.signum = 2 if self.calls == 30 else 0
            super().check()

    monkeypatch.setattr(module, "StopRequest", Stops)
    monkeypatch.setattr(module, "Settings", lambda: TINY)
    command = ["expert", "toy:dot", "--out", str(tmp_path), "--env-steps", "4000", "--episodes", "1"]
    with pytest.raises(SystemExit, match="130"):
        main(command)
    kept = (tmp_path / "expert.json").read_text()
    assert json.loads(kept)["env_steps"] == 60  # 30 agent steps of 2 environments
    assert "has the expert of this moment" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "holds an expert already" in capsys.readouterr().err
    assert (tmp_path / "expert.json").read_text() == kept


def test_videos_of_an_expert(tmp_path: Path) -> None:
    """In another suite of the same task, too; each action is the tanh of the mean, with noise if asked for."""
    torch.manual_seed(0)
    env: Any = make_env("planar:pendulum_swingup", time_limit=12)
    expert = Expert(3, 1, 8)
    path = save_expert(tmp_path / "one", expert, {"env": "dmc:pendulum_swingup"})
    settings: Any = {"policy": f"expert:{tmp_path / 'one'}", "episodes": 1, "size": 32, "time_limit": 12}
    for noise in (0.0, 0.1):
        out = tmp_path / f"videos{noise}"
        entry = collect("planar:pendulum_swingup", out, noise=noise, **settings).episodes[0]
        actions = np.load(out / "actions" / f"{entry['id']}.npy")
        env.reset(seed=entry["seed"])
        meant = []
        for action in actions[1:]:
            meant.append(expert.act(env.vector()[None])[0])
            env.step(action)
        assert np.allclose(actions[1:], meant, atol=1e-6) == (not noise)
        assert np.abs(actions[1:] - meant).max() < 0.5
    assert entry["id"] == "planar_pendulum_swingup-expert-0-000000"
    expert.net[0].bias.data += 1
    save_expert(tmp_path / "one", expert, {"env": "dmc:pendulum_swingup"})
    with pytest.raises(ConfigError, match="collected with policy expert:"):
        collect("planar:pendulum_swingup", out, noise=0.1, **settings)
    assert path.stat().st_size < 1500


def test_what_is_no_expert_of_the_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_expert(tmp_path, Expert(3, 1, 8), {"env": "planar:pendulum_swingup"})
    assert load_expert(file, "dmc:pendulum_swingup", 3, 1).about["env"] == "planar:pendulum_swingup"
    with pytest.raises(ConfigError, match="an expert of planar:pendulum_swingup, not of planar:walker_run"):
        load_expert(tmp_path, "planar:walker_run", 24, 6)
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_expert(tmp_path, "planar:pendulum_swingup", 4, 1)
    weights = load_file(file)
    save_file({**weights, "net.0.bias": np.zeros(10**6, np.float32)}, file)
    with pytest.raises(CheckpointError, match="layers do not fit"):
        load_expert(tmp_path, "planar:pendulum_swingup", 3, 1)
    file.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be read as an expert"):
        load_expert(tmp_path, "planar:pendulum_swingup", 3, 1)
    with pytest.raises(SystemExit, match="2"):
        main(["collect", "planar:pendulum_swingup", "--policy", f"expert:{tmp_path / 'none'}", "--out", str(tmp_path / "v")])
    assert "localmotion expert" in capsys.readouterr().err


def test_the_command_prints_the_return(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["expert", "planar:pendulum_swingup", "--out", str(tmp_path), "--env-steps", "20", "--episodes", "1"])
    about = json.loads((tmp_path / "expert.json").read_text())
    assert (about["env_steps"], about["updates"], about["action_repeat"]) == (32, 0, 2)
    said = capsys.readouterr().out
    assert f"return {about['return_mean']:.1f} +- 0.0 in 1 episodes after 32 env steps" in said
    assert "it learned nothing; the first 8,000 env steps are random" in said
    assert "videos of it" not in said


@pytest.mark.slow
def test_an_expert_learns_to_swing_up(tmp_path: Path) -> None:
    """Random actions have 57 of 1000; this seed had 525 when the test was written."""
    settings = Settings(width=64, batch=64, every=2, rate=1e-3)
    about = train_expert("planar:cartpole_swingup", tmp_path, env_steps=48_000, episodes=5, settings=settings)
    assert about["return_mean"] > 300
