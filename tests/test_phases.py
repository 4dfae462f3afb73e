"""Environments that change to their next phase during a run: when, which ones, and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from localmotion.config import RunConfig
from localmotion.envs.colours import DisWMEnv
from localmotion.envs.toy import DotEnv
from localmotion.errors import ConfigError
from localmotion.methods.lapo import LAPO
from localmotion.runs.settings import compose
from localmotion.training.checks import check_phases, check_rollout
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain
from test_resume import SHORT, Stops, assert_same, in_pieces, lines
from test_resume import weights as read_weights

PHASES = {"online": {"phase_at": 0.7}}
"""Of 80 agent steps in episodes of 20: the change waits from 56 to 60."""


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """toy: environments with two phases, the second of which is darker. Seed and phase of each episode that begins."""
    episodes: list[tuple[int, int]] = []
    reset, draw = DotEnv.reset, DotEnv._draw

    def begin(env: Any, *, seed: int | None = None, options: Any = None) -> Any:
        assert seed is not None
        episodes.append((seed, env.phase))
        env.shown = env.phase
        return reset(env, seed=seed, options=options)

    monkeypatch.setattr(DotEnv, "phases", 2, raising=False)
    monkeypatch.setattr(DotEnv, "phase", 1, raising=False)
    monkeypatch.setattr(DotEnv, "set_phase", lambda env, phase: setattr(env, "phase", phase), raising=False)
    monkeypatch.setattr(DotEnv, "reset", begin)
    monkeypatch.setattr(DotEnv, "_draw", lambda env, size: draw(env, size) // env.shown)
    return episodes


def run_config(*texts: str, **flags: Any) -> RunConfig:
    few = ("env_steps=80", "prefill=25", "warmup_updates=2", "online.eval_every=30", "online.save_every=1000", "length=4", *texts)
    return compose("diswm", "train", preset="debug", env="toy:dot", flags=SHORT | flags, settings=few)


def test_episodes_are_of_the_next_phase_from_the_share_on(played: list[tuple[int, int]], tmp_path: Path) -> None:
    run = run_config(**PHASES)
    path = finetune(run, tmp_path / "run")
    (line,) = [row for row in lines(path) if row["kind"] == "phase"]
    assert (line["agent_step"], line["phase"]) == (60, 2)
    # Three training episodes and the evaluation at 40 are of the first phase. The environment of that evaluation changes too: those at
    # 60 and at the end (ten episodes) and the last training episode are of the second one.
    assert [row["agent_step"] for row in lines(path) if row["kind"] == "eval"] == [40, 60, 80]
    assert [phase for _, phase in played] == [1] * 4 + [2] * 12


def test_without_the_setting_nothing_changes(played: list[tuple[int, int]], tmp_path: Path) -> None:
    path = finetune(run_config(), tmp_path / "run")
    assert {phase for _, phase in played} == {1}
    assert not [row for row in lines(path) if row["kind"] == "phase"]


def test_a_run_in_pieces_changes_where_the_whole_run_does(
    played: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An episode that began before the change is played again in its own phase."""
    run = run_config("online.eval_every=1000", **{"online": {"phase_at": 0.4}})
    whole = finetune(run, tmp_path / "whole")
    known = dict(played)
    played.clear()
    Stops(monkeypatch, 9, 47, 23)
    assert in_pieces(finetune, run, tmp_path / "pieces") >= 3
    assert_same(whole, tmp_path / "pieces")
    assert {phase for _, phase in played} == {1, 2}
    assert all(known[seed] == phase for seed, phase in played)


def test_an_environment_without_the_phase_is_refused_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="toy:dot has no phases"):
        finetune(run_config(**PHASES), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    env = type("Env", (), {"phase": 2, "phases": DisWMEnv.phases})()
    with pytest.raises(ConfigError, match="begins with its last phase, 2"):
        check_phases(run_config(**PHASES), env)
    env.phase = 1
    check_phases(run_config(**PHASES), env)
    with pytest.raises(ConfigError, match=r"in 0\.\.1"):
        run_config("phase_at=1.5")
    rollouts = compose("lapo", "finetune", preset="debug", env="toy:dot", flags=PHASES)
    with pytest.raises(ConfigError, match="rollouts stay in one phase"):
        check_rollout(LAPO, rollouts)
    assert run_config("phase_at=null", **PHASES).online.phase_at is None


def test_the_weight_of_the_distillation_falls_with_the_agent_steps_of_a_run(store: Path, tmp_path: Path) -> None:
    """DisWM's weight follows the counter that the loop gives it; a run in pieces has the same log, `assert_same` above."""
    flags = {"device": "cpu", "threads": 1, "precision": "fp32"}
    video = compose("diswm", "pretrain", preset="debug", flags=flags | {"data": str(store), "pretrain": {"updates": 2}})
    before = pretrain(video, tmp_path / "pre")
    few = ("env_steps=80", "prefill=25", "warmup_updates=2", "online.eval_every=1000", "log_every=1", "distillation_steps=100")

    def settings(*texts: str) -> RunConfig:
        start = {"checkpoint": str(before), "env_options": {"time_limit": 20}}
        return compose("diswm", "finetune", preset="debug", env="toy:dot", flags=flags | start, settings=(*few, *texts))

    assert settings().model.distillation_after_random
    late = finetune(settings(), tmp_path / "late")
    rows = [row for row in lines(late) if row["kind"] == "train"]
    # 40 random steps and two updates of the warm-up, then an update every five steps.
    assert [row["distillation/weight"] for row in rows] == pytest.approx([0.1] * 3 + [0.1 - 0.005 * n for n in range(1, 8)])
    run = settings("distillation_after_random=false")
    rows = [row for row in lines(finetune(run, tmp_path / "fine")) if row["kind"] == "train"]
    weights = [row["distillation/weight"] for row in rows]
    # The weight of an update is that of the agent steps at the update before: 40 in the warm-up, then every five.
    assert weights == pytest.approx([0.1, 0.06, 0.06, 0.055, 0.05, 0.045, 0.04, 0.035, 0.03, 0.025])
    teacher = {k: v for k, v in read_weights(tmp_path / "fine").items() if k.startswith("teacher.")}
    assert teacher
    for key, value in read_weights(before).items():
        if key.startswith("encoder."):
            assert torch.equal(teacher[key.replace("encoder", "teacher", 1)], value)
