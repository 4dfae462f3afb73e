"""Whole updates of IPV and DRP against the same updates written out. The cases differ in the settings that change what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

from localmotion import config
from localmotion.config import RunConfig
from localmotion.methods.drp import DRP
from localmotion.methods.ipv import IPV
from localmotion.testing.written import Case, check_update, fill_, make_batch
from written_out import drp, ipv

PLAIN = {"depth": 4, "deter": 16, "hidden": 12, "stoch": 3, "classes": 4, "units": 10, "layers": 2}
WORLD = {
    **PLAIN,
    "stem": "unshuffle",
    "norm": "none",
    "context_copy": True,
    "context_side": 8,
    "image_weight": 0.3,
    "reward_weight": 1.7,
    "kl_balance": 0.7,
}
PAPER = {**PLAIN, "context_side": 4, "image_weight": 0.3, "reward_weight": 0.6, "kl_balance": 0.7}
"""The paper's residual networks: convolutions on pixels, batch normalisation, no copying."""
CNN = {**WORLD, "depth": 1, "encoder": "cnn", "context": False}
"""DreamerV2's plain networks, which take 64 pixels and no context."""
BEHAVIOUR = {"horizon": 3, "discount": 0.9, "lambda_": 0.8, "entropy": 0.3, "slow_critic_every": 2}
ENDING = {**BEHAVIOUR, "continuation": True}
DAE = {"patch": 4, "keypoints": 3, "dim": 8, "heads": 2, "blocks": 1, "flow_clip": 1.5, "flow_scale": 0.7, "mask_ratio": 0.4}
SHARES = {"beta_s": 0.7, "beta_r": 0.4, "intrinsic_weight": 0.6}
RATES = {"lr": 3e-3, "actor_lr": 2e-3, "critic_lr": 1e-3, "pretrained_lr_factor": 0.3, "freeze_updates": 1}


def remembers(method: Any) -> None:
    """A bonus that has seen something: more than the neighbours that it looks for."""
    method.bonus.queue.mul_(0.3)
    method.bonus.filled.fill_(30)


def case(
    method: Any,
    stage: Any,
    label: str = "",
    *,
    world: Mapping[str, Any] = WORLD,
    load: str = "",
    pretrained: bool = True,
    **more: Any,
) -> Case:
    """A case of one of the two methods; ``more``: the method's settings, and `clip`, `decay`, `side`, `updates` of the run."""
    side, updates = more.pop("side", 16), more.pop("updates", 1)
    optim = {"clip": more.pop("clip", 100.0), "weight_decay": 1e-2, "eps": 1e-3}
    run: dict[str, Any] = {"optim": optim, "load": load, "online": RATES}
    run["pretrain"] = {"lr": 3e-3, "updates": 2, "lr_decay": more.pop("decay", 0.0)}
    # Of three context frames the noise erases two, of two none: so pre-training, which must not erase, has three as well.
    model: dict[str, Any] = {"world": world, **({"beta_z": 0.45} if method is DRP or stage == "pretrain" else {})}
    if method is DRP:
        model["dae"] = DAE
    if stage == "finetune":
        model |= {"behaviour": BEHAVIOUR, **SHARES}
    written = {"pretrain": {IPV: ipv.pretrain, DRP: drp.pretrain}, "finetune": {IPV: ipv.finetune, DRP: drp.finetune}}[stage][
        method
    ]
    return Case(
        method,
        stage,
        written if pretrained else partial(written, pretrained=False),
        model={**model, **more},
        run=run,
        batch={"batch": 3 if stage == "pretrain" or more.get("context_erasing") else 2, "time": 7, "side": side, "actions": 3},
        prepare=remembers if stage == "finetune" else None,
        updates=updates,
        pretrained=pretrained,
        tolerance=1e-6 if stage == "finetune" else 1e-9,  # the bonus takes distances as products, which costs half of the digits
        label=label,
    )


CASES = [
    case(IPV, "pretrain", "decay", updates=2, decay=1.0, clip=1.0),
    case(IPV, "pretrain", "paper", world={**PAPER, "context_dropout": 0.2}),
    case(IPV, "finetune", updates=2, beta_z_finetune=0.45, action_pad=5),
    case(IPV, "finetune", "paper", world=PAPER, updates=2),
    case(IPV, "finetune", "dmc", embed_input=True, free_nats=50.0, action_pad=2),
    case(IPV, "finetune", "ends", behaviour=ENDING),
    case(IPV, "finetune", "erasing", context_erasing=True, clip=1.0),
    case(IPV, "finetune", "pictures-loaded", load="image"),
    case(IPV, "finetune", "dynamics-loaded", load="latent"),
    case(IPV, "finetune", "nothing-loaded", pretrained=False),
    case(IPV, "pretrain", "cnn", world=CNN, side=64),
    case(IPV, "finetune", "cnn", world=CNN, side=64),
    case(DRP, "pretrain", world={**WORLD, "context_dropout": 0.2}, clip=1.0),
    case(DRP, "pretrain", "apart", joint_gradient=False, recompose_weight=0.35),
    case(DRP, "pretrain", "global", motion_encoder="global", side=32),
    case(DRP, "pretrain", "cnn-placed-mats", world=CNN, side=64, dae={**DAE, "mats": 4, "mats_placed": True, "agg_dim": 6}),
    case(DRP, "finetune", updates=2),
    case(DRP, "finetune", "cnn-mats", world=CNN, side=64, dae={**DAE, "mats": 2}),
    case(DRP, "finetune", "dmc", embed_input=True, free_nats=50.0, adapter="mlp"),
    case(DRP, "finetune", "ends", behaviour=ENDING),
    case(DRP, "finetune", "erasing-recompose", context_erasing=True, recompose_weight=0.35, clip=1.0),
    case(DRP, "finetune", "own-weight-of-z", beta_z_finetune=0.25),
    case(DRP, "finetune", "global", motion_encoder="global", side=32),
    case(DRP, "finetune", "apart-motion-loaded", joint_gradient=False, load="motion"),
    case(DRP, "finetune", "pictures-loaded", load="image"),
    case(DRP, "finetune", "nothing-loaded", adapter="linear", pretrained=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_are_what_the_papers_equations_give(case: Case) -> None:
    check_update(case)


@pytest.mark.parametrize("method", [IPV, DRP])
def test_imagination_starts_from_states_of_s_without_their_past(method: Any) -> None:
    """A start that kept its graph would hold the world model's whole backward pass in memory until the actor's step is done."""
    settings = case(method, "finetune").model
    run = RunConfig(method=method.name, stage="finetune", model=config.update(method.Config(), settings))
    made = method(run.model, image_size=16, action_dim=3)
    fill_(made)
    batch = {
        key: value.float() if value.dtype == torch.float64 else value for key, value in make_batch(side=16, actions=3).items()
    }
    _, _, start = made.world_model_losses(batch)
    assert not any(part.requires_grad for part in start)
