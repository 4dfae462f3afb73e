"""Updates that can be recorded and replayed, and that never wait for the device. What a GPU does with them: tests marked gpu."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from localmotion.compute import Compute, choose
from localmotion.config import Stage
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.runs.settings import compose
from localmotion.testing import RecordedGraph
from localmotion.training import graphs, optimizers
from localmotion.training.graphs import CudaGraph, Replayed
from localmotion.training.update import Updater
from method_batches import CASES, CPU, make, make_batch

# Clocks that a recording would stop if they were part of it.
CLOCKS = ("warmup=4", "freeze_updates=3", "slow_critic_every=2")


def settings_of(name: str, stage: Stage) -> tuple[str, ...]:
    """Those of `CLOCKS` that this method and stage know."""
    known = []
    for text in CLOCKS:
        with contextlib.suppress(ConfigError):
            compose(name, stage, preset="debug", env="" if stage == "pretrain" else "toy:dot", settings=(text,))
            known.append(text)
    return tuple(known)


def trained(
    name: str, stage: Stage, graph: Replayed | None, updates: int, spoilt: int = -1
) -> tuple[Updater, list[dict[str, Tensor]]]:
    """``updates`` updates on a batch each; the one numbered ``spoilt`` has a reward that is not finite."""
    run, method = make(name, stage, *settings_of(name, stage))
    updater = Updater(method, run, CPU, pretrained=stage == "finetune", deferred=True, graph=graph)
    torch.manual_seed(0)
    found = []
    for index in range(updates):
        batch = make_batch(seed=index)
        if index == spoilt:
            batch["reward"][0, 3] = torch.nan
        found.append({key: value.clone() for key, value in updater.learn(batch).items()})
    return updater, found


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_replayed_update_is_the_update(name: str, stage: Stage) -> None:
    """Bit for bit: weights, moments, metrics, with fresh random numbers, moving learning rates and slow copies."""
    graph = Replayed(RecordedGraph(), warmup=2)
    plain, wanted = trained(name, stage, None, 6)
    replayed, found = trained(name, stage, graph, 6)
    assert graph.replays == 4
    for index, (want, have) in enumerate(zip(wanted, found, strict=True)):
        assert want.keys() == have.keys()
        for key in want:
            assert torch.equal(want[key], have[key]) or (want[key].isnan() and have[key].isnan()), (index, key)
    assert not torch.equal(found[-1]["grad/" + plain.groups[0].name], found[-2]["grad/" + plain.groups[0].name])
    for key, value in plain.method.state_dict().items():
        assert torch.equal(value, replayed.method.state_dict()[key]), key
    moments = replayed.state()
    for key, value in plain.state().items():
        assert torch.equal(value, moments[key]), key


@pytest.mark.parametrize("name", ["dreamer_v2", "dreamer_v3"])
def test_a_replayed_update_that_is_not_finite_changes_nothing(name: str) -> None:
    plain, _ = trained(name, "train", None, 5, spoilt=3)
    replayed, _ = trained(name, "train", Replayed(RecordedGraph(), warmup=2), 5, spoilt=3)
    assert plain.check() == replayed.check() == 1
    assert replayed.healthy
    for key, value in plain.method.state_dict().items():
        assert torch.equal(value, replayed.method.state_dict()[key]), key
        assert value.isfinite().all()


def test_a_batch_of_another_shape_is_not_replayed() -> None:
    graph = Replayed(RecordedGraph(), warmup=1)
    updater, _ = trained("dreamer_v2", "train", graph, 3)
    updater.learn(make_batch(time=6))
    assert graph.replays == 2
    assert updater.update == 4
    updater.learn(make_batch())
    assert graph.replays == 3


def test_what_cannot_be_recorded_is_said() -> None:
    graph = Replayed(RecordedGraph(), warmup=0)
    with pytest.raises(LocalmotionError, match=r"cannot be recorded as a CUDA graph.*cuda_graph false"):
        graph(lambda batch: {"loss": batch["image"] * float(batch["image"].sum())}, {"image": torch.ones(2)})


def test_a_cuda_graph_needs_a_gpu() -> None:
    run = compose("dreamer_v3", "train", preset="debug", env="toy:dot", settings=("cuda_graph=true", "device=cpu"))
    with pytest.raises(ConfigError, match="cuda_graph needs a CUDA device"):
        choose(run)
    assert graphs.wanted(compose("dreamer_v3", "train", preset="debug", env="toy:dot")) is None


class _Meta(Compute):
    def autocast(self) -> Any:
        return contextlib.nullcontext()


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_an_update_never_waits_for_the_device(name: str, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta`, where tensors have no values: reading one, or mixing in a tensor of the CPU, is an error there."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: contextlib.nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and enabled(*kind))
    monkeypatch.setitem(optimizers._OPTIMIZERS, "adam", optimizers._OPTIMIZERS["laprop"])  # fused Adam has no kernel there
    run, method = make(name, stage)
    meta = _Meta(torch.device("meta"), False, 1, "test")
    updater = Updater(method.to("meta"), run, meta, pretrained=stage == "finetune", deferred=True)
    batch = {key: value.to("meta") for key, value in make_batch().items()}
    metrics = updater._run(tuple(range(len(updater.passes))), batch)  # slow copies keep a clock on the host
    assert {value.device.type for value in metrics.values()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_cuda_graph_learns_what_the_update_learns(name: str, stage: Stage) -> None:
    found = []
    for graph in (None, Replayed(CudaGraph())):
        run, method = make(name, stage, "device=cuda", "precision=fp32")
        updater = Updater(method.to("cuda"), run, choose(run), pretrained=stage == "finetune", graph=graph)
        torch.manual_seed(0)
        for index in range(8):
            batch = {key: value.cuda() for key, value in make_batch(seed=index).items()}
            updater.learn(batch)
        assert updater.check() == 0
        found.append({key: value.cpu() for key, value in method.state_dict().items()})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=1e-3, rtol=1e-2, msg=key)
