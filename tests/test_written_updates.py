"""Whole updates of DreamerV2, APV, IPV and DRP against the same written out: losses, gradients, rates, weights, and what else changes.

Each case takes a tiny batch and weights of which none is zero. The cases differ in the settings that change what is computed.
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
from method_batches import ACTIONS
from written_out import stages
from written_out.compare import check_update
from written_out.product import in_float64, shaken

SMALL = (
    "model.world.depth=4",
    "model.world.deter=16",
    "model.world.hidden=12",
    "model.world.stoch=3",
    "model.world.units=10",
    "model.behaviour.horizon=3",
    "model.behaviour.entropy=0.3",
    "model.world.image_weight=0.8",
    "model.world.reward_weight=1.7",
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
BONUS = ("model.beta_s=0.7", "model.intrinsic_weight=0.6")
RATES = ("online.actor_lr=2e-4", "online.critic_lr=5e-4")
WEIGHTS = (*BONUS, *RATES, "model.beta_r=0.3", "model.world.context_dropout=0.1", "online.freeze_updates=0")
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
    "apv pretrain": Case("apv", "pretrain", (*SMALL, "model.beta_z=0.4"), updates=2),
    "apv pretrain, the paper's pictures": Case("apv", "pretrain", (*SMALL, *PAPER)),
    "apv finetune": Case(
        "apv", "finetune", (*SMALL, *BONUS, *RATES, "model.beta_z_finetune=0.4", "online.freeze_updates=1"), updates=2
    ),
    "apv finetune, on DMC": Case(
        "apv", "finetune", (*SMALL, *BONUS, *RATES, "model.embed_input=true", "model.free_nats=0.3", "model.action_pad=2")
    ),
    "apv finetune, dynamics loaded": Case(
        "apv", "finetune", (*SMALL, *BONUS, *RATES, "online.freeze_updates=1", "online.pretrained_lr_factor=0.3"), load="latent"
    ),
    "dreamer_v2": Case(
        "dreamer_v2", "train", (*SMALL, *RATES, "model.beta=0.7", "model.behaviour.slow_critic_every=2"), updates=3, loaded=False
    ),
    "dreamer_v2, free nats": Case("dreamer_v2", "train", (*SMALL, *PAPER, "model.free_nats=1.5", "optim.clip=0.5"), loaded=False),
    "drp pretrain": Case("drp", "pretrain", (*SMALL, *DAE, "model.beta_z=0.4", "model.world.context_dropout=0.1")),
    "drp pretrain, apart": Case("drp", "pretrain", (*SMALL, *DAE, "model.joint_gradient=false", "model.recompose_weight=0.4")),
    "drp pretrain, global flow": Case("drp", "pretrain", (*SMALL, "model.dae.dim=8", "model.motion_encoder=global"), side=32),
    "drp finetune": Case(
        "drp",
        "finetune",
        (*FINE, *DAE, "model.beta_z=0.4", "online.freeze_updates=1", "model.behaviour.slow_critic_every=2"),
        updates=2,
    ),
    "drp finetune, the latent dynamics' own weight": Case("drp", "finetune", (*FINE, *DAE, "model.beta_z_finetune=0.2")),
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


WRITTEN_OUT = {"apv": stages.APV, "dreamer_v2": stages.DreamerV2, "drp": stages.DRP, "ipv": stages.IPV}


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
    if hasattr(method, "bonus"):  # a bonus that has seen something
        method.bonus.queue[:30] = 0.1 * torch.randn(30, 128)
        method.bonus.filled.fill_(30)
        method.bonus.mean.fill_(0.7)
    return run, method


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_the_written_out_one(name: str) -> None:
    case = CASES[name]
    run, method = made(case)
    batches = [batch_of(case.side, number) for number in range(case.updates)]
    last = check_update(method, run, WRITTEN_OUT[case.method], batches, loaded=case.loaded)
    assert bool(last.picture.erased) == getattr(run.model, "context_erasing", False)  # the numbers erase something


@pytest.mark.parametrize("name", ["ipv finetune", "drp finetune"])
def test_imagination_starts_from_states_of_s_without_their_past(name: str) -> None:
    """A start that kept its graph would hold the world model's whole backward pass in memory until the actor's step is done."""
    case = CASES[name]
    _, method = made(case)
    _, _, start = method.world_model_losses(batch_of(case.side, 0))
    assert not any(part.requires_grad for part in start)
