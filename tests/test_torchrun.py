"""A run of several processes: what it computes, what it does with faults, and what it is refused for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from forked_ranks import codes, said, start
from localmotion import methods, ranks
from localmotion.cli import main
from localmotion.config import RunConfig
from localmotion.errors import CheckpointError, ConfigError
from localmotion.machine import launched
from localmotion.runs import checkpoint
from localmotion.runs.settings import compose
from localmotion.training.checks import check_ranks
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain
from localmotion.training.update import Updater
from test_resume import assert_same, lines, weights

FLAGS: dict[str, Any] = {"precision": "fp32", "device": "cpu", "threads": 1}


def settings(name: str, store: Path, updates: int, *texts: str) -> RunConfig:
    shape = ("batch_size=16", "pretrain.length=4" if name == "lapo" else "pretrain.length=8")
    few = (*shape, f"pretrain.updates={updates}", "heldout_fraction=0.4", "pretrain.log_every=1", "eval_batches=1")
    return compose(name, "pretrain", preset="debug", flags={**FLAGS, "data": str(store)}, settings=(*few, *texts))


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """Weights, and losses of each update, agree."""
    expected = weights(one)
    for name, value in weights(other).items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    pairs = list(zip(lines(one), lines(other), strict=True))
    assert pairs
    for mine, theirs in pairs:
        losses = [key for key in mine if key.startswith(("loss/", "grad/", "psnr/")) and isinstance(mine[key], float)]
        assert mine["kind"] == theirs["kind"]
        assert losses
        assert [mine[key] for key in losses] == pytest.approx([theirs[key] for key in losses], rel=tolerance, abs=tolerance)


def test_two_processes_learn_what_one_learns(store: Path, tmp_path: Path) -> None:
    """2 x 8 sequences and 1 x 16: batch norm, codebooks, gradients and their clipping, held-out figures. To 1e-4 after three updates.

    With its usual eps Adam takes a whole step for gradients of the size of rounding errors, in either direction.
    """
    run = settings("lapo", store, 3, "optim.eps=1e-4")
    pretrain(run, tmp_path / "one")  # first: what it imports, the others need not
    assert codes(start(2, lambda rank: pretrain(run, tmp_path / "two"), tmp_path)) == [0, 0]
    assert_close(tmp_path / "one", tmp_path / "two", 1e-4)
    assert said(tmp_path, 1) == ""
    assert "in each of 2 processes" in said(tmp_path, 0)
    assert (checkpoint.newest(tmp_path / "two") / "rank1.safetensors").exists()


# What is refused ----------------------------------------------------------------------------------------------------------


def test_torchrun_is_known_by_its_variables() -> None:
    assert launched({}) == (0, 1)
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1)
    assert launched({"RANK": "2", "WORLD_SIZE": "4"}) == (2, 4)
    assert launched({"WORLD_SIZE": "4"}) == (0, 1)


@pytest.mark.parametrize(
    ("stage", "texts", "why"),
    [
        ("pretrain", ("batch_size=9",), "batch_size=9: 2 processes cannot share it equally"),
        ("pretrain", ("compile=true",), "cuda_graph and compile are for a run of one process"),
        ("pretrain", ("device=cuda:1",), "takes a GPU of its own"),
        ("train", ("replay_capacity=99", "online.length=50"), "replay_capacity=99: each of 2 processes has a part of it"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    stage: Any, texts: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compose("ipv", stage, preset="debug", env="" if stage == "pretrain" else "toy:dot", settings=texts)
    check_ranks(run)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=why):
        check_ranks(run)


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        main(["info"])
    assert left.value.code == 2
    assert "rank 1: error: info runs in one process, and torchrun started 2" in capsys.readouterr().err


# Faults -------------------------------------------------------------------------------------------------------------------


def at_update(rank: int, here: int, update: int, act: Callable[[Updater], None]) -> None:
    """In the process of ``rank``, do ``act`` before update ``update``."""
    if rank != here:
        return
    learn = Updater.learn

    def learned(self: Updater, batch: Any) -> Any:
        if self.update == update:
            act(self)
        return learn(self, batch)

    Updater.learn = learned  # type: ignore[method-assign]


def exits(work: Callable[[], Any]) -> None:
    """As the command line: an error is printed, and its exit code is that of the process."""
    from unittest import mock

    with mock.patch("localmotion.commands.train", side_effect=lambda args: work()):
        main(["pretrain"])


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(store: Path, tmp_path: Path) -> None:
    """On two processes with the same bits as without the kill, random states included; on one with the same data."""
    run = settings("ipv", store, 10, "pretrain.save_every=4", "pretrain.eval_every=5")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert codes(start(2, lambda rank: pretrain(run, whole), tmp_path)) == [0, 0]

    def dies(rank: int) -> None:
        at_update(rank, 1, 6, lambda updater: os.kill(os.getpid(), signal.SIGKILL))
        exits(lambda: pretrain(run, killed))

    assert codes(start(2, dies, tmp_path)) == [2, -signal.SIGKILL]
    assert "rank 0: error: rank 0 of 2 has lost the other ranks" in said(tmp_path, 0)
    status = json.loads((killed / "status.json").read_text())
    assert status["state"] == "failed"
    assert checkpoint.read_state(checkpoint.newest(killed))["update"] == 4
    shutil.copytree(killed, tmp_path / "single")
    assert codes(start(2, lambda rank: pretrain(run, killed), tmp_path)) == [0, 0]
    assert_same(whole, killed)
    pretrain(run, tmp_path / "single")  # rank 0's random states go on, with other noise for half of the rows
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "single"))["update"] == 10
    assert [row["update"] for row in lines(tmp_path / "single")] == [row["update"] for row in lines(whole)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_run_goes_on_with_another_number_of_ranks(world: int, store: Path, tmp_path: Path) -> None:
    """LAPO's updates draw no random numbers: the run on other ranks is the whole run, up to rounding."""
    run = settings("lapo", store, 6, "pretrain.save_every=3")
    pretrain(run, tmp_path / "whole")
    short = replace(run, pretrain=replace(run.pretrain, updates=3))
    assert codes(start(2, lambda rank: pretrain(short, tmp_path / "parts"), tmp_path)) == [0, 0]
    assert codes(start(world, lambda rank: pretrain(run, tmp_path / "parts"), tmp_path)) == [0] * world
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)
    assert ("process(es) before" in said(tmp_path, 0)) == (world != 2)


@pytest.mark.slow
def test_a_stop_asked_of_one_rank_stops_all(store: Path, tmp_path: Path) -> None:
    run = settings("lapo", store, 1000)

    def asked(rank: int) -> None:
        at_update(rank, 1, 3, lambda updater: signal.raise_signal(signal.SIGTERM))
        exits(lambda: pretrain(run, tmp_path / "run"))

    assert codes(start(2, asked, tmp_path)) == [143, 143]
    assert "interrupted at update 4, saved" in said(tmp_path, 0)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["update"] == 4


@pytest.mark.slow
def test_a_stop_during_an_evaluation_of_rank_0_stops_all(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from localmotion.training import pretrain as module
    from localmotion.training.interrupt import Interrupted

    run = settings("lapo", store, 6, "pretrain.eval_every=2")

    def stopped(*args: Any) -> Any:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(module, "measure_heldout", stopped)
    assert codes(start(2, lambda rank: exits(lambda: pretrain(run, tmp_path / "run")), tmp_path)) == [143, 143]
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["update"] == 2


@pytest.mark.slow
def test_ten_bad_updates_of_one_rank_end_all(store: Path, tmp_path: Path) -> None:
    """Each rank writes its batch, and names it."""
    run = settings("lapo", store, 100)

    def bad(rank: int) -> None:
        cls = methods.get("lapo")
        losses = cls.pretrain_losses  # type: ignore[attr-defined]

        def wrong(self: Any, batch: Any) -> Any:
            found, metrics = losses(self, batch)
            return {**found, "image": found["image"] * torch.nan}, metrics

        if rank == 1:
            cls.pretrain_losses = wrong  # type: ignore[attr-defined]
        exits(lambda: pretrain(run, tmp_path / "run"))

    assert codes(start(2, bad, tmp_path)) == [2, 2]
    assert "was not finite in 10 updates in a row" in said(tmp_path, 1)
    for name in ("diverged", "diverged-1"):
        assert len(checkpoint.read(tmp_path / "run" / name, "batch")["image"]) == 8


# Environments -------------------------------------------------------------------------------------------------------------

ROLLOUT = (
    "environments=4",
    "rollout.workers=1",
    "rollout.steps=8",
    "epochs=1",
    "minibatches=1",
    "online.log_every=1",
    "eval_episodes=1",
    "online.save_every=1",
    "online.eval_every=100000",
)


@pytest.mark.slow
def test_rollouts_are_spread_over_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four environments play the same episodes as in one process, all are logged, and a killed run plays them again."""
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    methods.register("act_extras", "examples.act_extras", "ActExtras")
    flags = {**FLAGS, "recipe": {"size": 32, "percept_size": 32}, "env_options": {"time_limit": 6}}
    run = compose("act_extras", "train", preset="debug", env="toy:block", flags=flags, settings=(*ROLLOUT, "env_steps=96"))
    first: dict[str, Any] = {}

    def record(self: Updater, batch: dict[str, torch.Tensor], learn: Any = Updater.learn) -> Any:
        torch.save(dict(batch), tmp_path / f"{first['name']}_{ranks.rank()}_{self.update}.pt")
        return learn(self, batch)

    monkeypatch.setattr(Updater, "learn", record)
    first["name"] = "one"
    finetune(run, tmp_path / "one")
    first["name"] = "two"
    assert codes(start(2, lambda rank: finetune(run, tmp_path / "two"), tmp_path)) == [0, 0]
    parts = [torch.load(tmp_path / f"two_{rank}_0.pt") for rank in (0, 1)]
    whole = torch.load(tmp_path / "one_0_0.pt")
    assert torch.equal(torch.cat([part["image"][:, 0] for part in parts]), whole["image"][:, 0])  # as the episodes begin
    ended = [row for row in lines(tmp_path / "two") if row["kind"] == "episode"]
    assert len(ended) == len([row for row in lines(tmp_path / "one") if row["kind"] == "episode"])
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()

    def dies(rank: int) -> None:
        at_update(rank, 1, 2, lambda updater: os.kill(os.getpid(), signal.SIGKILL))
        exits(lambda: finetune(run, tmp_path / "killed"))

    assert codes(start(2, dies, tmp_path)) == [2, -signal.SIGKILL]
    shutil.copytree(tmp_path / "killed", tmp_path / "single")
    assert codes(start(2, lambda rank: finetune(run, tmp_path / "killed"), tmp_path)) == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "killed")
    finetune(run, tmp_path / "single")
    assert lines(tmp_path / "single")[-1]["agent_step"] == lines(tmp_path / "two")[-1]["agent_step"]


@pytest.mark.slow
def test_ranks_play_into_replays_of_their_own(tmp_path: Path) -> None:
    """Other episodes on each rank, the updates of the whole run, and the same bits after a kill."""
    few = ("env_steps=120", "prefill=40", "warmup_updates=2", "train_every=5", "online.batch_size=4", "online.length=8")
    clocks = ("online.save_every=10", "online.eval_every=100000", "eval_episodes=1", "online.log_every=1")
    flags = {**FLAGS, "recipe": {"percept_size": 64}, "env_options": {"time_limit": 20}}
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags=flags, settings=(*few, *clocks))
    assert codes(start(2, lambda rank: finetune(run, tmp_path / "whole"), tmp_path)) == [0, 0]
    rows = lines(tmp_path / "whole")
    ended = [row for row in rows if row["kind"] == "episode"]
    steps = rows[-1]["agent_step"]
    assert sum(row["length"] for row in ended) == steps
    assert rows[-1]["episode"] == len(ended)
    played = [checkpoint.read_state(checkpoint.newest(tmp_path / "whole"))["replay"]["episodes"]]
    assert len(list((tmp_path / "whole" / "replay").glob("*.safetensors"))) == len(played[0])
    assert len(list((tmp_path / "whole" / "replay-1").glob("*.safetensors"))) == len(ended) - len(played[0])
    first = [
        next((tmp_path / "whole" / name).glob("episode_0000000.safetensors")).read_bytes() for name in ("replay", "replay-1")
    ]
    assert first[0] != first[1]
    begun = next(row for row in rows if row["kind"] == "train")
    assert rows[-1]["update"] == 2 + steps // 5 - begun["agent_step"] // 5  # the warm-up, then one for five steps of both ranks

    def dies(rank: int) -> None:
        at_update(rank, 1, rows[-1]["update"] - 2, lambda updater: os.kill(os.getpid(), signal.SIGKILL))
        exits(lambda: finetune(run, tmp_path / "killed"))

    assert codes(start(2, dies, tmp_path)) == [2, -signal.SIGKILL]
    with pytest.raises(CheckpointError, match="saved by 2 process"):
        finetune(run, tmp_path / "killed")
    assert codes(start(2, lambda rank: finetune(run, tmp_path / "killed"), tmp_path)) == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "killed")


# The real command ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_of_the_docs(store: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "localmotion"]
    run = ["--method", "lapo", "--preset", "debug", "--data", str(store), "--run", str(tmp_path / "run"), "--device", "cpu"]
    few = ["--pretrain.updates", "2", "--heldout_fraction", "0.4", "--precision", "fp32"]
    done = subprocess.run([*torchrun, "pretrain", *run, *few], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters policy") == 1
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
