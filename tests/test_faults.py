"""What goes wrong in the middle of a run: losses that are not numbers, simulators that fail. Nothing that was done is lost."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from localmotion.acting.episodes import FAULTS
from localmotion.acting.observer import make_observer
from localmotion.cli import main
from localmotion.config import RunConfig, Stage
from localmotion.envs.base import PixelEnv
from localmotion.errors import CheckpointError, EnvError, LocalmotionError, SimulationError
from localmotion.files import write_json
from localmotion.methods.dreamer_v2 import DreamerV2
from localmotion.methods.drp import DRP
from localmotion.runs import checkpoint, rundir
from localmotion.runs.rundir import RunDir
from localmotion.runs.settings import compose
from localmotion.training import optimizers
from localmotion.training.finetune import finetune
from localmotion.training.playing import Playing
from localmotion.training.pretrain import VideoLoop, pretrain
from localmotion.training.update import BAD_LIMIT, DivergedError, Updater
from method_batches import AGENTS, CASES, CPU, make, make_batch

FLAGS = {"precision": "fp32", "device": "cpu", "threads": 1}


# --- losses and gradients that are not finite ---------------------------------------------------------------------------


def weights_of(method: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.named_parameters()}


def spoil(method: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    """Multiply one loss of the world model by ``value``."""
    losses = method.world_model_losses

    def spoiled(batch: Any) -> Any:
        found, metrics, start = losses(batch)
        return {**found, name: found[name] * value}, metrics, start

    monkeypatch.setattr(method, "world_model_losses", spoiled)


class Burst(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float("inf")


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("deferred", [False, True])
def test_an_update_that_is_not_finite_changes_nothing(name: str, deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = make(name, "train")
    updater = Updater(method, run, CPU, deferred=deferred)
    updater.learn(make_batch())
    before, moments = weights_of(method), {k: v.clone() for k, v in updater.state().items()}
    with monkeypatch.context() as patch:
        spoil(method, patch, "reward", float("nan"))
        if len(method.passes("train")) > 1:
            behaviour = method.behaviour_losses
            patch.setattr(
                method, "behaviour_losses", lambda start: ({k: v * torch.nan for k, v in behaviour(start)[0].items()}, {})
            )
        updater.learn(make_batch(seed=1))
    slow = {key for key in before if "slow" in key}  # follows by its own clock
    assert all(torch.equal(value, before[key]) for key, value in weights_of(method).items() if key not in slow)
    assert all(torch.equal(value, moments[key]) for key, value in updater.state().items() if not key.endswith(".step"))
    assert updater.check() == 1
    assert not updater.healthy
    assert updater.update == 2
    updater.learn(make_batch(seed=2))
    assert updater.healthy
    assert updater.check() == 1
    assert any(not torch.equal(value, before[key]) for key, value in weights_of(method).items())


@pytest.mark.parametrize(("name", "stage"), CASES)
@pytest.mark.parametrize("deferred", [False, True])
def test_a_batch_that_is_not_finite_leaves_running_means_as_they_were(name: str, stage: Stage, deferred: bool) -> None:
    """A NaN in a running mean, a queue or a codebook would spoil all later updates, or acting alone."""
    run, method = make(name, stage)
    updater = Updater(method, run, CPU, pretrained=stage == "finetune", deferred=deferred)
    updater.learn(make_batch())
    before = {key: value.clone() for key, value in method.named_buffers()}
    batch = make_batch(seed=1)
    for key in ("reward", "flow", "action"):
        if key in batch:
            batch[key] = torch.full_like(batch[key], torch.nan)
    spoiled = next(iter(updater.groups[0].parameters))  # for methods that read pictures alone
    weight = spoiled.detach().clone()
    with torch.no_grad():
        spoiled.fill_(torch.nan)
    updater.learn(batch)
    with torch.no_grad():
        spoiled.copy_(weight)
    assert updater.check() == 1
    own = {key for key in before if key.endswith(("updates", "agent_steps"))}  # clocks, which go on
    for key, value in method.named_buffers():
        assert key in own or torch.equal(value, before[key]), key
    updater.learn(make_batch(seed=2))
    assert updater.healthy
    assert all(value.isfinite().all() for _, value in method.named_buffers() if value.is_floating_point())


@pytest.mark.parametrize("deferred", [False, True])
def test_a_gradient_that_is_not_finite_is_not_applied(deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = make("dreamer_v2", "train")
    updater = Updater(method, run, CPU, deferred=deferred)
    before = weights_of(method)
    losses = method.world_model_losses
    monkeypatch.setattr(
        method,
        "world_model_losses",
        lambda batch: (lambda x: ({**x[0], "reward": Burst.apply(x[0]["reward"])}, *x[1:]))(losses(batch)),
    )
    metrics = updater.learn(make_batch())
    assert torch.isfinite(metrics["loss/reward"])
    changed = {key.split(".")[0] for key, value in weights_of(method).items() if not torch.equal(value, before[key])}
    assert changed <= {"behaviour"}
    assert updater.check() == 1


def test_deferred_and_immediate_decisions_learn_the_same() -> None:
    for name in ("dreamer_v2", "dreamer_v3"):  # fused Adam, LaProp
        found = []
        for deferred in (False, True):
            run, method = make(name, "train")
            updater = Updater(method, run, CPU, deferred=deferred)
            torch.manual_seed(0)
            for seed in range(3):
                updater.learn(make_batch(seed=seed))
            found.append(weights_of(method))
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_run_of_bad_updates_stops_with_the_first_bad_term(deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = make("drp", "train")
    updater = Updater(method, run, CPU, deferred=deferred)
    spoil(method, monkeypatch, "reward", float("inf"))
    batch = make_batch()

    def go() -> None:
        for _ in range(BAD_LIMIT):
            updater.learn(batch)
        updater.check()

    with pytest.raises(
        DivergedError, match=rf"'reward' was not finite in {BAD_LIMIT} updates in a row \(update {BAD_LIMIT}\)"
    ) as caught:
        go()
    assert caught.value.first == "reward"
    assert np.isfinite(caught.value.terms["image"])
    assert caught.value.batch is batch


def test_laprop_refuses_as_exactly_as_it_steps() -> None:
    params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = optimizers.LaProp(params, lr=0.1, capturable=True)
    for found in (0.0, 1.0, 0.0):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.full_like(p, torch.nan) if found else torch.randn_like(p)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        assert all(torch.equal(p, old) == bool(found) for p, old in zip(params, before, strict=True))
        assert all(torch.isfinite(v).all() for state in optimizer.state.values() for v in state.values())


def test_a_diverged_run_leaves_its_batch_and_its_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = (
        "env_steps=280",
        "prefill=60",
        "warmup_updates=4",
        "online.eval_every=10000",
        "online.save_every=60",
        "online.log_every=5",
    )
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags=FLAGS, settings=few)
    losses: Callable[..., Any] = DreamerV2.world_model_losses
    calls: list[int] = []

    def after_a_while(self: DreamerV2, batch: Any) -> Any:
        found, metrics, start = losses(self, batch)
        calls.append(1)
        if len(calls) in (7, 8) or len(calls) > 30:
            found["image"] = found["image"] * torch.nan
        return found, metrics, start

    monkeypatch.setattr(DreamerV2, "world_model_losses", after_a_while)
    out = tmp_path / "run"
    with pytest.raises(
        LocalmotionError,
        match=r"'image' was not finite in 10 updates in a row \(update 40\).*diverged; the last good checkpoint stays",
    ):
        finetune(run, out)
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    dump = json.loads((out / "diverged" / "state.json").read_text())
    assert dump["first"] == "image"
    assert dump["terms"]["image"] == "nan"
    batch = checkpoint.read(out / "diverged", "batch")
    assert batch["image"].shape[:2] == (run.online.batch_size, run.online.length)
    assert all(torch.isfinite(v).all() for v in checkpoint.read(out / "diverged", "weights").values() if v.is_floating_point())
    assert checkpoint.read_state(checkpoint.newest(out))["update"] <= 30
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if row["kind"] == "train"][:3] == [0, 2, 2]
    monkeypatch.setattr(DreamerV2, "world_model_losses", losses)
    finetune(run, out)  # the cause mended, the same command goes on
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


def test_a_run_whose_last_update_is_skipped_ends_with_a_checkpoint(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("pretrain.updates=6", "pretrain.save_every=4")
    run = compose("drp", "pretrain", preset="debug", flags={**FLAGS, "data": str(store)}, settings=settings)
    losses: Callable[..., Any] = DRP.pretrain_losses
    calls: list[int] = []

    def spoiled(self: DRP, batch: Any) -> Any:
        calls.append(1)
        found, metrics = losses(self, batch)
        return {**found, "image": found["image"] * (torch.nan if len(calls) == 6 else 1.0)}, metrics

    monkeypatch.setattr(DRP, "pretrain_losses", spoiled)
    monkeypatch.setattr(VideoLoop, "measure", lambda *_: None)
    pretrain(run, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    newest = checkpoint.newest(tmp_path / "run")
    assert checkpoint.read_state(newest)["update"] == 6
    assert all(value.isfinite().all() for value in checkpoint.read(newest, "weights").values() if value.is_floating_point())


def test_times_are_those_of_the_updates_since_the_line_before() -> None:
    loop = object.__new__(VideoLoop)
    loop._lined, loop._begun = 0, (0, 0)
    for update, rate in ((100, 50.0), (120, 10.0)):  # the last line of a run of 120 updates
        loop.updater = SimpleNamespace(update=update)  # type: ignore[assignment]
        found = loop.times({"data": 1.0, "update": 1.0}, 2.0)
        assert found["updates_per_second"] == rate
        assert found["seconds/update"] == 1 / (2 * rate)
    loop._lined, loop._begun = 0, (120, 120)  # resumed
    loop.updater = SimpleNamespace(update=130)  # type: ignore[assignment]
    assert loop.times({"data": 1.0, "update": 1.0}, 2.0)["updates_per_second"] == 5.0


def test_a_diverged_pretraining_leaves_its_batch(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose(
        "drp",
        "pretrain",
        preset="debug",
        flags={**FLAGS, "data": str(store)},
        settings=("pretrain.updates=30", "pretrain.save_every=4"),
    )
    losses: Callable[..., Any] = DRP.pretrain_losses
    calls: list[int] = []

    def after_a_while(self: DRP, batch: Any) -> Any:
        found, metrics = losses(self, batch)
        calls.append(1)
        return ({**found, "image": found["image"] * torch.inf} if len(calls) > 9 else found), metrics

    monkeypatch.setattr(DRP, "pretrain_losses", after_a_while)
    with pytest.raises(LocalmotionError, match=r"'image' was not finite"):
        pretrain(run, tmp_path / "run")
    assert (tmp_path / "run" / "diverged" / "COMPLETE").exists()
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["update"] == 8


def test_a_run_without_a_checkpoint_does_not_say_that_one_stays(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses are bad from the first update on."""
    settings = ("pretrain.eval_every=100", "pretrain.save_every=4")
    run = compose("drp", "pretrain", preset="debug", flags={**FLAGS, "data": str(store)}, settings=settings)
    losses: Callable[..., Any] = DRP.pretrain_losses
    monkeypatch.setattr(
        DRP, "pretrain_losses", lambda self, batch: ({k: v * torch.nan for k, v in losses(self, batch)[0].items()}, {})
    )
    with pytest.raises(LocalmotionError, match=r"diverged; no checkpoint was written yet$"):
        pretrain(run, tmp_path / "run")
    assert "not saved: the newest update was not finite; no checkpoint was written yet" in capsys.readouterr().out


# --- simulators that fail -----------------------------------------------------------------------------------------------


class Faulty:
    """Makes toy environments fail at chosen steps, counted over all environments of training (or of evaluation)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: dict[int, Any], *, training: bool = True) -> None:
        self.steps, self.fails, self.inside = 0, fails, False
        step, advance = toy().step, Playing.take

        def stepped(env: Any, action: Any) -> Any:
            self.steps += self.inside == training
            fault = self.fails.get(self.steps) if self.inside == training else None
            if isinstance(fault, Exception):
                raise fault
            found = step(env, action)
            return (found[0], fault, *found[2:]) if fault is not None else found

        def advanced(playing: Any, *args: Any) -> bool:
            self.inside = True
            try:
                return advance(playing, *args)
            finally:
                self.inside = False

        monkeypatch.setattr(toy(), "step", stepped)
        monkeypatch.setattr(Playing, "take", advanced)


def toy() -> type[PixelEnv]:
    from localmotion.envs import make_env

    return type(make_env("toy:dot"))


def few_steps(**more: str) -> RunConfig:
    few = ("env_steps=200", "prefill=60", "warmup_updates=2", "online.eval_every=100000", "online.save_every=60")
    return compose(
        "dreamer_v2", "train", preset="debug", env="toy:dot", flags=FLAGS, settings=(*few, *(f"{k}={v}" for k, v in more.items()))
    )


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


@pytest.mark.parametrize("fault", [RuntimeError("an OpenGL context was lost"), float("nan"), float("inf")])
def test_a_simulator_that_fails_costs_the_rest_of_its_episode(
    fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Faulty(monkeypatch, {25: fault, 90: fault})
    out = finetune(few_steps(), tmp_path / "run")
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    faults = rows_of(out, "fault")
    assert [row["agent_step"] for row in faults] == [24, 88]
    assert "toy:dot" in faults[0]["error"]
    state = checkpoint.read_state(checkpoint.newest(out))
    assert state["agent_step"] == 200
    # Both episodes are kept up to the failure: all records of the run are in the replay, one more than steps in each episode.
    lengths = [checkpoint.load_file(p)["reward"].shape[0] for p in sorted((out / "replay").iterdir())]
    assert sum(lengths) == 200 + state["episode"]
    assert lengths[0] == 25


def test_a_simulator_that_fails_again_and_again_stops_the_run_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Faulty(monkeypatch, {step: RuntimeError("no context") for step in (110, 115, 121)})
    run = few_steps()
    with pytest.raises(EnvError, match=rf"no context.*{FAULTS} failures without a complete episode.*saved"):
        finetune(run, tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["agent_step"] == status["agent_step"] == 118
    faulty.fails = {}
    finetune(run, tmp_path / "run")
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["agent_step"] == 200
    assert len(rows_of(tmp_path / "run", "fault")) == FAULTS


def test_an_evaluation_goes_on_after_a_failure_and_three_in_a_row_stop_the_run_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation at agent step 62, and one of ten episodes at the end. Environments fail in the last one."""
    whole = finetune(few_steps(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        Faulty(patch, {230: RuntimeError("no context")}, training=False)
        out = finetune(few_steps(), tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"no context in episode \d of 10 \(seed \d+\); it is played again with another seed", said)
    (last, before) = (rows_of(path, "eval")[-1] for path in (out, whole))
    assert (last["faults"], before["faults"]) == (1, 0)
    assert last["episodes"] == 10
    assert sum(one != other for one, other in zip(last["returns"], before["returns"], strict=True)) == 1
    assert not rows_of(out, "fault")
    with monkeypatch.context() as patch:
        Faulty(patch, dict.fromkeys(range(230, 9999), RuntimeError("no context")), training=False)
        with pytest.raises(
            EnvError, match=r"no context .*: 5 failures without a complete episode between them; \d of 10 episodes"
        ):
            finetune(few_steps(), tmp_path / "always")
    assert json.loads((tmp_path / "always" / "status.json").read_text())["state"] == "failed"
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "always"))["agent_step"] == 200
    finetune(few_steps(), tmp_path / "always")
    assert rows_of(tmp_path / "always", "eval")[-1]["returns"] == before["returns"]


def test_misuse_is_not_taken_for_a_failure() -> None:
    run = few_steps()
    observer = make_observer(run, None)
    observer.reset(0)
    with pytest.raises(EnvError, match="not finite") as caught:
        observer.step(np.full(observer.action_dim, np.nan, np.float32))
    assert not isinstance(caught.value, SimulationError)


def test_a_simulator_whose_renderer_is_gone_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing: what OpenGL holds for the environment is freed under its feet in the middle of an episode."""
    few = ("action_repeat=20", "env_steps=1200", "prefill=400", "warmup_updates=1", "online.eval_every=100000", "eval_episodes=1")
    run = compose("dreamer_v2", "train", preset="debug", env="dmc:cartpole_balance", flags=FLAGS, settings=few)
    advance = Playing.take
    steps = [0]

    def advanced(playing: Any, *args: Any) -> bool:
        steps[0] += 1
        if steps[0] == 30:
            playing.observer.env._renderer._context.free()
        return advance(playing, *args)

    monkeypatch.setattr(Playing, "take", advanced)
    out = finetune(run, tmp_path / "run")
    (fault,) = rows_of(out, "fault")
    assert fault["agent_step"] == 29
    assert "FatalError" in fault["error"]
    assert checkpoint.read_state(checkpoint.newest(out))["agent_step"] == 60


# --- checkpoints of something else --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("world.0.exp_avg", torch.zeros(2, 2, 2, 2, 2), "does not fit"),
        ("nobody.0.exp_avg", torch.zeros(()), "does not fit"),
        ("actor.99999.step", torch.zeros(()), "does not fit"),
        ("actor.-1.step", torch.zeros(()), "does not fit"),
        ("actor.0.__class__", torch.zeros(()), "does not fit"),
        ("actor", torch.zeros(()), "does not fit"),
        ("actor.0.exp_avg", None, "lacks parts of parameter 0"),
    ],
)
def test_optimizer_state_of_something_else_is_refused(key: str, value: Tensor | None, said: str) -> None:
    run, method = make("dreamer_v2", "train")
    updater = Updater(method, run, CPU)
    updater.learn(make_batch())
    state = dict(updater.state())
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(CheckpointError, match=said):
        Updater(method, run, CPU).load_state(state)


# --- a full disk --------------------------------------------------------------------------------------------------------


def small_state() -> dict[str, Any]:
    return {"tensors": {"weights": {"w": torch.ones(3)}}, "state": {"stage": "train"}}


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    kept = checkpoint.save(tmp_path / "checkpoints", 1, **small_state())
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=400_000))
    with pytest.raises(CheckpointError, match=r"needs 1 MB, 0 MB are free; the previous one is kept"):
        checkpoint.save(tmp_path / "checkpoints", 2, **small_state())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [kept.name]
    assert checkpoint.newest(tmp_path) == kept
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=r"needs 1 MB, 0 MB are free$"):  # nothing is kept
        checkpoint.save(tmp_path / "run", 1, **small_state())


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_none_that_is_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    kept = [checkpoint.save(tmp_path / "checkpoints", update, **small_state()) for update in (1, 2)]

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path == kept[0]:
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "checkpoints", 3, **small_state())
    found = checkpoint.complete(tmp_path / "checkpoints")
    assert [checkpoint.read_state(path)["update"] for path in found] == [2, 3]
    checkpoint.save(tmp_path / "checkpoints", 4, **small_state())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0000000003", "0000000004"]


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int, error: Exception | None = None) -> None:
    """Files of tensors can be written so many times; from then on a part of them can."""
    error = error or OSError(28, "No space left on device")
    write, count = checkpoint.save_file, [0]

    def limited(tensors: Any, path: Path) -> None:
        count[0] += 1
        if count[0] > after:
            path.write_bytes(b"a part of it")
            raise error
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", limited)


@pytest.mark.parametrize("after", [2, 3])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device (os error 28)")]
)
def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_leaves_the_one_before(
    error: Exception, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    full_disk(monkeypatch, after, error)
    kept = checkpoint.save(tmp_path / "checkpoints", 1, **small_state())
    with pytest.raises(CheckpointError, match=r"0000000002.*No space left on device.*previous one is kept"):
        checkpoint.save(tmp_path / "checkpoints", 2, **small_state())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [kept.name]
    assert torch.equal(checkpoint.read(kept, "weights")["w"], torch.ones(3))


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = finetune(few_steps(), tmp_path / "whole")
    command = ["train", "--method", "dreamer_v2", "--preset", "debug", "--env", "toy:dot", "--run", str(tmp_path / "run")]
    command += ["--precision", "fp32", "--device", "cpu", "--threads", "1", "--env_steps", "200", "--prefill", "60"]
    command += ["--warmup_updates", "2", "--online.eval_every", "100000", "--online.save_every", "60"]
    with monkeypatch.context() as patch:
        full_disk(patch, 6)  # weights of the first evaluation, a whole checkpoint, and one file of the second
        with pytest.raises(SystemExit) as left:
            main(command)
    assert left.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in said
    assert "previous one is kept" in said
    assert len(checkpoint.complete(tmp_path / "run" / "checkpoints")) == 1
    main(command)
    ours, theirs = (checkpoint.read(checkpoint.newest(path), "weights") for path in (tmp_path / "run", whole))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, a file that is always full")
def test_a_log_on_a_full_disk_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--method", "dreamer_v2", "--preset", "debug", "--env", "toy:dot", "--run", str(tmp_path / "run")]
    command += ["--precision", "fp32", "--device", "cpu", "--threads", "1", "--env_steps", "200", "--prefill", "60"]
    command += ["--warmup_updates", "2", "--online.eval_every", "100000", "--online.save_every", "60", "--online.log_every", "1"]
    log, write, count = RunDir.log, rundir.write_json, [0]

    def full(out: RunDir, kind: str, **values: Any) -> None:
        count[0] += 1
        out.metrics_path = Path("/dev/full") if count[0] > 20 else out.metrics_path
        log(out, kind, **values)

    def unwritten(path: Path, value: Any) -> None:
        if count[0] > 20:
            raise OSError(28, "No space left on device")
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "log", full)
        patch.setattr(rundir, "write_json", unwritten)
        with pytest.raises(SystemExit) as left:
            main(command)
    assert left.value.code == 2
    warning, error = capsys.readouterr().err.strip().splitlines()[-2:]
    assert "status.json: cannot be written (No space left on device)" in warning  # it does not hide what ended the run
    assert error.startswith("error: /dev/full: cannot be written (No space left on device); what was complete is kept")
    main(command)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_a_run_that_could_not_begin_on_a_full_disk_begins_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_json", full)
        with pytest.raises(CheckpointError, match=r"run/config.json: cannot be written \(No space left on device\)"):
            RunDir(tmp_path / "run", few_steps())
    for name in ("media", "checkpoints"):  # as a kill or an earlier version leaves them
        (tmp_path / "run" / name).mkdir(exist_ok=True)
    (tmp_path / "run" / "config.json.tmp").write_text("{")
    RunDir(tmp_path / "run", few_steps())
    assert (tmp_path / "run" / "config.json").exists()
    (tmp_path / "other" / "media").mkdir(parents=True)
    (tmp_path / "other" / "media" / "mine.mp4").write_text("")
    with pytest.raises(CheckpointError, match="not empty and not a run"):
        RunDir(tmp_path / "other", few_steps())


def test_a_failed_write_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(path: Path, text: str) -> int:
        path.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "a.json", {"kept": True})
    monkeypatch.setattr(Path, "write_text", part)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"kept": False})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"kept": True}


@pytest.mark.parametrize("number", [28, 30, 122])
def test_any_write_on_a_full_disk_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: Any) -> None:
        raise OSError(number, os.strerror(number), "/data/film.mp4")

    monkeypatch.setattr("localmotion.commands.info", full)
    with pytest.raises(SystemExit) as left:
        main(["info"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: /data/film.mp4: cannot be written ({os.strerror(number)}); what was")
