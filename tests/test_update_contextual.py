"""Whole updates of IPV and DRP against the same updates written out: losses, gradients, rates, stepped weights, and what else changes.

Each case runs the product's own update on a tiny batch with weights of which none is zero, and then the written-out one with the same
weights, batch and random numbers. Both compute in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from localmotion import methods
from localmotion.config import RunConfig, Stage, compose
from localmotion.training.update import Updater
from method_batches import ACTIONS, CPU
from written_out import dynamics, stages
from written_out.product import Draws, in_float64, shaken

SMALL = (
    "model.world.depth=4",
    "model.world.deter=16",
    "model.world.hidden=12",
    "model.world.stoch=3",
    "model.world.units=10",
    "model.behaviour.horizon=3",
    "model.behaviour.entropy=0.3",
    "model.world.image_weight=0.8",
    "model.world.kl_balance=0.7",
    "optim.weight_decay=0.01",
)
DAE = (
    "model.dae.patch=4",
    "model.dae.keypoints=3",
    "model.dae.dim=8",
    "model.dae.blocks=1",
    "model.dae.flow_clip=1.5",
    "model.dae.flow_scale=0.7",
    "model.dae.mask_ratio=0.4",
)
WEIGHTS = (
    "model.beta_s=0.7",
    "model.beta_r=0.3",
    "model.intrinsic_weight=0.6",
    "model.world.context_dropout=0.1",
    "online.freeze_updates=0",
    "online.actor_lr=2e-4",
    "online.critic_lr=5e-4",
)
PAPER = (
    "model.world.stem=conv",
    "model.world.norm=batch",
    "model.world.context_copy=false",
    "model.world.context_side=4",
)


@dataclass(frozen=True)
class Case:
    """Settings of an update; ``updates`` in a row, a checkpoint ``loaded`` or none, pictures of ``side`` pixels."""

    method: str
    stage: Stage
    settings: tuple[str, ...] = ()
    updates: int = 1
    loaded: bool = True
    load: str = ""
    side: int = 16


FINE = (*SMALL, *WEIGHTS)
CASES = {
    "ipv pretrain": Case(
        "ipv", "pretrain", (*SMALL, "model.beta_z=0.4", "pretrain.updates=2", "pretrain.lr_decay=1.0"), updates=2
    ),
    "ipv pretrain, the paper's pictures": Case("ipv", "pretrain", (*SMALL, *PAPER), updates=2),
    "ipv finetune": Case("ipv", "finetune", (*FINE, "model.beta_z_finetune=0.4", "online.freeze_updates=1"), updates=2),
    "ipv finetune, the paper's pictures": Case("ipv", "finetune", (*FINE, *PAPER, "online.pretrained_lr_factor=0.3")),
    "ipv finetune, on DMC": Case(
        "ipv", "finetune", (*FINE, "model.embed_input=true", "model.free_nats=0.3", "model.action_pad=2")
    ),
    "ipv finetune, erased context": Case("ipv", "finetune", (*FINE, "model.context_erasing=true", "optim.clip=0.5")),
    "ipv finetune, pictures loaded": Case("ipv", "finetune", (*FINE, "online.freeze_updates=1"), load="image"),
    "ipv finetune, dynamics loaded": Case("ipv", "finetune", (*FINE, "online.freeze_updates=1"), load="latent"),
    "ipv finetune, nothing loaded": Case("ipv", "finetune", (*FINE, "online.pretrained_lr_factor=0.3"), loaded=False),
    "drp pretrain": Case("drp", "pretrain", (*SMALL, *DAE, "model.beta_z=0.4", "model.world.context_dropout=0.1")),
    "drp pretrain, apart": Case("drp", "pretrain", (*SMALL, *DAE, "model.joint_gradient=false", "model.recompose_weight=0.4")),
    "drp pretrain, global flow": Case("drp", "pretrain", (*SMALL, "model.dae.dim=8", "model.motion_encoder=global"), side=32),
    "drp finetune": Case(
        "drp",
        "finetune",
        (*FINE, *DAE, "model.beta_z=0.4", "online.freeze_updates=1", "model.behaviour.slow_critic_every=2"),
        updates=2,
    ),
    "drp finetune, on DMC": Case(
        "drp", "finetune", (*FINE, *DAE, "model.embed_input=true", "model.free_nats=0.3", "model.adapter=mlp")
    ),
    "drp finetune, erased context, rebuilt from the code": Case(
        "drp", "finetune", (*FINE, *DAE, "model.context_erasing=true", "model.recompose_weight=0.4", "optim.clip=0.5")
    ),
    "drp finetune, global flow": Case("drp", "finetune", (*FINE, "model.dae.dim=8", "model.motion_encoder=global"), side=32),
    "drp finetune, apart, motion loaded": Case(
        "drp", "finetune", (*FINE, *DAE, "model.joint_gradient=false", "online.freeze_updates=1"), load="motion"
    ),
    "drp finetune, pictures loaded": Case("drp", "finetune", (*FINE, *DAE, "online.freeze_updates=1"), load="image"),
    "drp finetune, nothing loaded": Case("drp", "finetune", (*FINE, *DAE, "model.adapter=linear"), loaded=False),
}


@pytest.fixture(autouse=True)
def precise() -> Iterator[None]:
    with in_float64():
        yield


def batch_of(side: int, seed: int, batch: int = 2, time: int = 7, tracks: int = 4) -> dict[str, Tensor]:
    """A batch of which the second sequence has an episode's end in it, as the house convention has it."""
    g = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    is_first[:, 0] = True
    is_first[1, 4] = True
    goes_on = ~is_first[..., None]
    return {
        "image": torch.randint(0, 256, (batch, time, side, side, 3), generator=g, dtype=torch.uint8),
        "action": (torch.rand(batch, time, ACTIONS, generator=g) * 2 - 1) * goes_on,
        "reward": torch.rand(batch, time, generator=g) * 2,
        "is_terminal": torch.zeros(batch, time, dtype=torch.bool),
        "is_first": is_first,
        "flow": torch.randn(batch, time, side, side, 2, generator=g) * goes_on[..., None, None],
        "tracks": torch.rand(batch, time, tracks, 2, generator=g) * torch.tensor([side + 2.0, side / 2]) - 1,
        "visible": (torch.rand(batch, time, tracks, generator=g) < 0.8) & goes_on,
        "track_id": (torch.rand(batch, time, tracks, generator=g) < 0.15).int().cumsum(1),
    }


def made(case: Case) -> tuple[RunConfig, Any]:
    env = "" if case.stage == "pretrain" else "toy:dot"
    run = compose(
        case.method, case.stage, preset="debug", env=env, settings=[*case.settings, *([f"load={case.load}"] if case.load else [])]
    )
    torch.manual_seed(3)
    actions = None if case.stage == "pretrain" else ACTIONS
    method = shaken(methods.get(case.method)(run.model, image_size=case.side, action_dim=actions)).double()
    if actions:  # a bonus that has seen something
        method.bonus.queue[:30] = 0.1 * torch.randn(30, 128)
        method.bonus.filled.fill_(30)
        method.bonus.mean.fill_(0.7)
    return run, method


class Written:
    """The written-out update; it keeps weights, buffers and the optimisers' moments from one update to the next."""

    def __init__(self, case: Case, run: RunConfig, method: Any) -> None:
        self.case, self.run, self.count = case, run, 0
        self.state = {name: value.clone() for name, value in method.state_dict().items()}
        self.learned = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
        self.optimisers: dict[str, dynamics.Adam] = {}

    def update(self, batch: dict[str, Tensor], draws: Draws) -> tuple[dict[str, Tensor], dict[str, float], Any]:
        """Losses and gradient norms; the state becomes what the update leaves behind."""
        run, case, norms = self.run, self.case, {}
        weights = self.leaves()
        stacked = {"ipv": stages.IPV, "drp": stages.DRP}[case.method](weights, batch, run, draws.uniform, draws.pick, case.side)
        world = stacked.pretrain() if case.stage == "pretrain" else stacked.finetune()
        total = torch.stack([world.losses[name] * world.scales[name] for name in world.losses]).sum()
        if case.stage == "pretrain":
            left = min(1.0, (run.pretrain.updates - self.count) / max(run.pretrain.lr_decay * run.pretrain.updates, 1e-9))
            groups = {"model": stages.Learns(("",), run.pretrain.lr * left)}
        else:
            groups = stacked.groups(case.loaded)
        for name, group in groups.items():
            if name not in ("actor", "critic"):
                norms[name] = self.step(name, group, weights, total)
        losses = dict(world.losses)
        if world.start is not None:
            weights = self.leaves()  # imagination is in the world model as it is now
            behaviour = dynamics.behaviour(weights, world.start, run.model, ACTIONS, draws.uniform)
            for name, loss in behaviour.items():
                norms[name] = self.step(name, groups[name], weights, loss)
            losses |= behaviour
        self.state |= stacked.buffers | stacked.picture.statistics
        self.count += 1
        for name in [name for name in self.state if name.endswith("num_batches_tracked")]:
            self.state[name] += 1
        if world.start is not None:
            self.state["behaviour.updates"] += 1
            if self.count % run.model.behaviour.slow_critic_every == 0:
                for name in [name for name in self.state if name.startswith("behaviour.slow_critic.")]:
                    self.state[name] = self.state[name.replace("slow_critic", "critic")].clone()
        return losses, norms, stacked

    def leaves(self) -> dict[str, Tensor]:
        return {name: value.detach().clone().requires_grad_(name in self.learned) for name, value in self.state.items()}

    def step(self, name: str, group: stages.Learns, weights: dict[str, Tensor], loss: Tensor) -> float:
        mine = [key for key in weights if key in self.learned and key.startswith(group.prefixes)]
        found = torch.autograd.grad(loss, [weights[key] for key in mine], retain_graph=True, allow_unused=True)
        gradients = {key: gradient for key, gradient in zip(mine, found, strict=True) if gradient is not None}
        rate = group.rate if self.count >= group.frozen else 0.0
        norm, stepped = self.optimisers.setdefault(name, dynamics.Adam(self.run.optim)).step(weights, gradients, rate)
        self.state |= stepped
        return norm


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_the_written_out_one(name: str) -> None:
    case = CASES[name]
    run, method = made(case)
    updater, written = Updater(method, run, CPU, pretrained=case.loaded), Written(case, run, method)
    for number in range(case.updates):
        batch, draws = batch_of(case.side, number), Draws()
        with draws.recorded():
            found = updater.pretrain(batch) if case.stage == "pretrain" else updater.online(batch)
        losses, norms, stacked = written.update(batch, draws)
        assert not draws.kept
        assert {key for key in found if key.startswith("loss/")} == {f"loss/{key}" for key in losses}
        assert {key for key in found if key.startswith("grad/")} == {f"grad/{key}" for key in norms}
        wanted = {f"loss/{key}": float(loss.detach()) for key, loss in losses.items()}
        wanted |= {f"grad/{key}": norm for key, norm in norms.items()}
        wanted |= {key: float(value) for key, value in stacked.metrics.items() if key in found}
        for key, value in wanted.items():
            assert float(found[key]) == pytest.approx(value, rel=1e-6, abs=1e-9), key
        state = method.state_dict()
        assert state.keys() == written.state.keys()
        for key, value in written.state.items():
            torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
        if run.stage == "finetune" and run.model.context_erasing:
            assert stacked.picture.erased


@pytest.mark.parametrize("name", ["ipv finetune", "drp finetune"])
def test_imagination_starts_from_states_of_s_without_their_past(name: str) -> None:
    """A start that kept its graph would hold the world model's whole backward pass in memory until the actor's step is done."""
    case = CASES[name]
    _, method = made(case)
    _, _, start = method.world_model_losses(batch_of(case.side, 0))
    assert not any(part.requires_grad for part in start)
