"""Episodes shorter than a training sequence are learned from, in every storage and method; a run that cannot learn is refused or fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localmotion.cli import main
from localmotion.config import RunConfig
from localmotion.errors import ConfigError
from localmotion.models.bonus import IntrinsicBonus, behavioural_loss
from localmotion.runs import checkpoint
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.training.interrupt import Interrupted, StopRequest
from localmotion.training.study import load_study
from method_batches import AGENTS, make, make_batch

FLAGS = {"precision": "fp32", "device": "cpu", "threads": 1}
FEW = ("env_steps=80", "prefill=30", "warmup_updates=1", "online.eval_every=100000", "online.log_every=1", "eval_episodes=1")


def run_of(name: str, *settings: str, env: str = "toy:dot") -> RunConfig:
    return compose(name, "train", preset="debug", env=env, flags=FLAGS, settings=(*FEW, *settings))


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in row.items() if k != "wall" and not k.startswith("seconds/")} for row in found if row["kind"] == kind
    ]


def packed(count: int = 2, time: int = 12, second: int = 5) -> dict[str, torch.Tensor]:
    """A batch whose sequences hold an episode of ``second`` records and the beginning of another."""
    batch = make_batch(count, time)
    for key, value in {"is_first": True, "action": 0, "visible": False, "flow": 0}.items():
        batch[key][:, second] = value
    return batch


@pytest.mark.parametrize("name", AGENTS)
def test_nothing_of_one_episode_reaches_the_next_in_a_sequence(name: str) -> None:
    """The states of the second piece are the same whatever stands in the first."""
    _, method = make(name, "train")
    other = packed()
    for key in ("image", "action", "reward", "flow", "tracks"):
        other[key][:, :5] = make_batch(2, 12, seed=1)[key][:, :5]
    states = []
    for batch in (packed(), other):
        torch.manual_seed(0)
        start = method.world_model_losses(batch)[2]
        states.append(start.deter.view(2, 12, -1))
    assert not torch.equal(states[0][:, 1:5], states[1][:, 1:5])
    torch.testing.assert_close(states[0][:, 5:], states[1][:, 5:])


def test_a_bonus_window_ends_where_its_episode_ends() -> None:
    torch.manual_seed(0)
    bonus, plain = (IntrinsicBonus(6, size=400, neighbours=3) for _ in range(2))
    plain.load_state_dict(bonus.state_dict())
    feat, first = torch.randn(2, 12, 6), torch.zeros(2, 12, dtype=torch.bool)
    first[:, 0] = True
    assert torch.equal(bonus(feat, first), plain(feat))  # nothing changes where no episode starts within
    first[0, 5] = first[0, 7] = True
    bonus(feat, first)
    members = bonus.queue[:8]  # the first sequence's windows
    for t, end in enumerate((5, 5, 5, 5, 5, 7, 7, 12)):
        expected = feat[0, t : min(t + 5, end)].mean(0) @ bonus.projection
        torch.testing.assert_close(members[t], expected, atol=1e-5, rtol=1e-4)


def test_the_actor_learns_of_rewards_at_the_end_of_an_episode() -> None:
    """Only if the sequence shows the end: elsewhere the last positions have no window, as in the releases."""
    time, first = 9, torch.zeros(3, 9, dtype=torch.bool)
    first[:, 0] = first[2, 7] = True
    terminal = torch.zeros(3, time, dtype=torch.bool)
    terminal[1, -1] = True
    batch = {"reward": torch.zeros(3, time), "is_first": first, "is_terminal": terminal}
    predicted = torch.ones(3, time, requires_grad=True)
    behavioural_loss(predicted, batch, torch.zeros(3, 5), weight=0.1).backward()
    assert predicted.grad is not None
    learned = [(row > 0).nonzero().flatten().tolist() for row in predicted.grad]
    assert learned == [list(range(5)), list(range(9)), list(range(7))]  # goes on; ends by the task; another follows


@pytest.mark.parametrize("name", AGENTS)
def test_every_method_learns_from_episodes_shorter_than_its_sequences(name: str, tmp_path: Path) -> None:
    out = finetune(run_of(name, "env_options={time_limit: 4}", "env_steps=60"), tmp_path / "run")
    trained = rows(out, "train")
    assert len(trained) >= 5
    assert all(value == value for row in trained for value in row.values())  # no NaN
    assert trained[-1]["skipped"] == 0
    assert {row["length"] for row in rows(out, "episode")} == {4}


@pytest.mark.parametrize("storage", ["memory", "disk", "device"])
def test_a_run_of_short_episodes_goes_on_where_it_stopped(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("dreamer_v2", "env_options={time_limit: 3}", f"replay_storage={storage}", "replay_capacity=50", "env_steps=60")
    if storage == "device":  # on this machine the CPU stands for the device
        monkeypatch.setattr("localmotion.training.online.device_memory", lambda device: 10**9)
    whole = finetune(run, tmp_path / "whole")
    calls, check = iter(range(10**6)), StopRequest.check

    def stop(self: StopRequest) -> None:
        if next(calls) == 57:
            raise Interrupted(15)
        check(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", stop)
        with pytest.raises(Interrupted):
            finetune(run, tmp_path / "pieces")
    finetune(run, tmp_path / "pieces")
    assert rows(whole, "train") == rows(tmp_path / "pieces", "train")
    weights = [checkpoint.read(checkpoint.newest(path), "weights") for path in (whole, tmp_path / "pieces")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("dreamer_v2", "prefill=80", "prefill=80 env steps of random exploration leave nothing of online.env_steps=80"),
        ("dreamer_v2", "env_steps=0", "lower prefill or raise env_steps"),
        ("dreamer_v2", "train_every=81 warmup_updates=0", "no update falls between prefill=30 and env_steps=80"),
        ("dreamer_v2", "replay_capacity=5", "replay_capacity=5 is less than one sequence, online.length=8"),
        ("dreamer_v2", "online.length=1", "sequences of at least 2 positions"),
        ("ipv", "online.length=4", "sequences of at least 5 positions"),
        ("drp", "online.length=65", "sequences of 5 to 64"),
    ],
)
def test_settings_that_can_never_update_are_refused_before_anything_is_written(
    name: str, settings: str, said: str, tmp_path: Path
) -> None:
    run = run_of(name, *settings.split())
    with pytest.raises(ConfigError, match=said):
        finetune(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_study_refuses_a_run_that_could_never_update(tmp_path: Path) -> None:
    text = "preset: debug\nsettings: {{online: {{env_steps: 100, prefill: {}}}, env_options: {}}}\n"
    text += "tasks: [toy:dot]\nseeds: [0]\nvariants: {{A: {{method: dreamer_v2}}}}\n"
    for prefill, options, said in (
        (100, "{}", "prefill=100"),
        (50, "{seed: 3}", "option seed=3 of toy:dot: it is set by --seed"),
    ):
        (tmp_path / "study.yaml").write_text(text.format(prefill, options))
        with pytest.raises(ConfigError, match=f"A-toy_dot-0: .*{said}"):
            load_study(tmp_path / "study.yaml")


def test_a_run_without_an_update_fails_and_goes_on_with_more_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The random episode ends two agent steps before the budget, and no update is due in these."""
    command = ["train", "--method", "dreamer_v2", "--preset", "debug", "--env", "toy:dot", "--run", str(tmp_path / "run")]
    command += ["--threads", "1", "--precision", "fp32", "--device", "cpu", "--prefill", "30", "--warmup_updates", "0"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--env_steps", "52"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no update was made in 52 env steps" in line
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    main([*command, "--env_steps", "60"])
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["update"] > 0


def test_a_random_episode_longer_than_the_run_ends_with_the_prefill(tmp_path: Path) -> None:
    out = finetune(run_of("dreamer_v2", "env_options={time_limit: 1000}"), tmp_path / "run")
    assert [(row["random"], row["length"]) for row in rows(out, "episode")] == [(True, 30), (False, 50)]
    assert rows(out, "train")[-1]["update"] == 11  # one of the warm-up, ten of 50 agent steps


def test_the_last_update_is_logged_whenever_the_log_is_due(tmp_path: Path) -> None:
    """Updates after agent steps 35, 40, ..., 80; after a warm-up of four that nothing follows, its last."""
    long = ("env_options={time_limit: 100}", "online.log_every=4")
    assert [row["update"] for row in rows(finetune(run_of("dreamer_v2", *long), tmp_path / "a"), "train")] == [4, 8, 11]
    few = finetune(run_of("dreamer_v2", *long, "train_every=50", "prefill=55", "warmup_updates=3"), tmp_path / "b")
    assert [row["update"] for row in rows(few, "train")] == [3]


def test_an_episode_of_a_reset_alone_is_counted_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from localmotion.envs import make_env

    cls: Any = type(make_env("toy:dot"))
    step, calls = cls.step, iter(range(10**6))

    def fails(env: Any, action: Any) -> Any:
        if next(calls) == 50:  # the first step of the second episode
            raise RuntimeError("no context")
        return step(env, action)

    monkeypatch.setattr(cls, "step", fails)
    out = finetune(run_of("dreamer_v2", "prefill=55", "env_steps=110"), tmp_path / "run")
    (fault,) = rows(out, "fault")
    assert (fault["agent_step"], fault["dropped"]) == (50, 1)


@pytest.mark.parametrize("name", AGENTS)
def test_a_method_takes_the_shortest_sequence_it_names(name: str) -> None:
    run, method = make(name, "train")
    shortest, _ = type(method).lengths(run.model, "train")
    losses = method.world_model_losses(make_batch(2, shortest))[0]
    assert all(torch.isfinite(value) for value in losses.values())
