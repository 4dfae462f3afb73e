"""A tiny PreLAR by the rules of ipv_parity.py for weights, batches and noise, so that the release's numbers can be compared with ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ipv_parity as rules
from localmotion import methods
from localmotion.config import RunConfig, Stage
from localmotion.runs.settings import compose
from localmotion.testing.rules import CPU

B, T, A = 3, rules.T, rules.A
"""Three sequences: the rule's permutation of them is a cycle, so that it differs from its inverse and no sequence keeps its action."""
UPDATES = rules.UPDATES
SIZES: dict[str, Any] = {
    "world": rules.SIZES["world"] | {"hidden": rules.SIZES["world"]["deter"]},
    "behaviour": rules.SIZES["behaviour"],
    **{"action_width": 6, "action_hidden": 11, "action_codes": 3, "action_classes": 4},
}
"""Small widths. In the release hidden layers must be as wide as the RSSM's state. The depth of every part and the bonus's window,
neighbours, projection and queue are the paper's."""
RELEASED: dict[str, Any] = {"consistency": "sign", "action_prior_std": 2 / (1 + math.exp(-0.5))}
"""What the released code computes: the consistency without a gradient, and a prior of the deviation 2 sigmoid(1 / 2) = 1.2449."""
WITHOUT_LOSS = RELEASED | {"consistency": "none"}
CASES: dict[str, tuple[Stage, dict[str, Any]]] = {
    "pre-training": ("pretrain", RELEASED),
    "pre-training, w/o CL": ("pretrain", WITHOUT_LOSS),
    "pre-training, w/o AL & CL": ("pretrain", {"consistency": "none", "action_output": "deterministic"}),
    "pre-training, discrete": ("pretrain", RELEASED | {"action_output": "discrete", "beta_action": 0.0}),
    "pre-training, diff": ("pretrain", RELEASED | {"action_input": "diff"}),
    "pre-training, catdiff": ("pretrain", RELEASED | {"action_input": "catdiff"}),
    "fine-tuning": ("finetune", {}),
    "fine-tuning, RSSM not frozen": ("finetune", {"free_latent": True}),
    "naive fine-tuning": ("finetune", {"intrinsic_weight": 0.0, "beta_r": 0.0}),
}
"""Stage, and settings of the model on top of the preset `paper`, before `SIZES`. Fine-tuning is that of Meta-World."""
PARTS = ("image.encoder", "image.decoder", "latent", "inverse", "mapping", "reward", "reward_representative")
PARTS += ("behaviour.actor", "behaviour.critic")


def run_of(case: str) -> RunConfig:
    """Settings of the preset `paper` with small widths, fp32. Encoder and RSSM are frozen for one update, in place of 100."""
    stage, settings = CASES[case]
    flags: dict[str, Any] = {"precision": "fp32", "model": SIZES | settings}
    if stage == "pretrain":
        return compose("prelar", stage, preset="paper", flags=flags)
    return compose("prelar", stage, preset="paper", env="metaworld:reach", flags=flags | {"online": {"freeze_updates": 1}})


def normal(shape: Any) -> Tensor:
    """Normal numbers (..., T, Z), the same for every call of a shape."""
    return torch.as_tensor(rules.numbers(sum(shape), shape), dtype=torch.get_default_dtype())


def fix_noise(patch: pytest.MonkeyPatch) -> None:
    """All that the method samples follows the rules."""
    rules.fix_noise(patch)
    patch.setattr(torch, "randn", lambda *shape, **_: normal(shape[0] if len(shape) == 1 else shape))


def build(case: str) -> tuple[RunConfig, Any]:
    """Settings and the model in training mode."""
    run = run_of(case)
    model = methods.get("prelar")(run.model, image_size=64, action_dim=None if run.stage == "pretrain" else A)
    rules.fill_(model)
    return run, model.train()


class Update(NamedTuple):
    """What one update computed, and the model after it."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]  # before clipping
    model: Any


def updates(case: str) -> Iterator[Update]:
    """`UPDATES` of them by the library's own updater. For within `fix_noise`."""
    run, model = build(case)
    updater = rules.Recorder(model, run, CPU, pretrained=True)
    for update in range(UPDATES):
        updater.gradients = {}
        found = updater.learn(rules.make_batch(update, B))
        losses = {key.removeprefix("loss/"): float(x) for key, x in found.items() if key.startswith("loss/")}
        yield Update(losses, updater.gradients, model)


def changes(case: str, model: Any) -> dict[str, float]:
    """Norm of what all updates so far changed in each part."""
    before = dict(build(case)[1].named_parameters())
    return rules.norms({name: p.detach() - before[name].detach() for name, p in model.named_parameters()}, PARTS)
