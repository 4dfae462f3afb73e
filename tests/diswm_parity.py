"""A small DisWM by the rules of ipv_parity.py for weights, batches and noise, so that the release's numbers can be compared with ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ipv_parity as rules
from localmotion import methods
from localmotion.config import RunConfig, Stage
from localmotion.runs.settings import compose
from localmotion.testing.rules import CPU

B, T, A = rules.B, rules.T, rules.A
UPDATES = rules.UPDATES
SIZES: dict[str, Any] = {"code": 6, "deter": 16, "hidden": 12, "stoch": 4, "units": 10}
"""Small widths. The depth of every part is the paper's, and the encoder's channels are, which the release does not let choose."""
ETA = 0.095
"""Weight of the distillation in the release: 0.1 (1 - 2500 / 50000) for the whole run."""
TAUGHT = {"distillation": ETA, "distillation_steps": 0, "distillation_frames": float(T)}
"""The release sums the distillation over the frames of a sequence."""
CASES: dict[str, tuple[Stage, dict[str, Any]]] = {
    "pre-training": ("pretrain", {}),
    "pre-training, no free nats": ("pretrain", {"kl_free": 0.0}),
    "fine-tuning": ("finetune", TAUGHT),
    "fine-tuning, no free nats": ("finetune", TAUGHT | {"kl_free": 0.0}),
    "without a teacher": ("train", {"kl_free": 0.0}),
}
"""Stage, and settings of the model on top of the preset `paper`, before `SIZES`."""
PARTS = ("encoder", "decoder", "dynamics", "reward")


def run_of(case: str) -> RunConfig:
    """Settings of the preset `paper` with small widths, fp32."""
    stage, settings = CASES[case]
    flags: dict[str, Any] = {"precision": "fp32", "model": SIZES | settings}
    if stage == "pretrain":
        return compose("diswm", stage, preset="paper", flags=flags)
    return compose("diswm", stage, preset="paper", env="diswm:walker_walk", flags=flags)


def normal(shape: Any) -> Tensor:
    """Normal numbers, the same for every call of a shape (..., N, S) or (..., N, S, 1); what comes before N repeats them."""
    inner = tuple(shape[:-1] if shape[-1] == 1 else shape)
    found = torch.as_tensor(rules.numbers(sum(inner[-2:]), inner[-2:]), dtype=torch.get_default_dtype())
    return found.expand(inner).reshape(tuple(shape))


def fix_noise(patch: pytest.MonkeyPatch) -> None:
    """All that the method samples follows the rules."""
    rules.fix_noise(patch)
    patch.setattr(torch, "randn", lambda *shape, **_: normal(shape[0] if len(shape) == 1 else shape))


def build(case: str) -> tuple[RunConfig, Any]:
    """Settings and the model in training mode."""
    run = run_of(case)
    model = methods.get("diswm")(run.model, image_size=64, action_dim=None if run.stage == "pretrain" else A)
    rules.fill_(model)
    return run, model.train()


def make_batch(update: int) -> dict[str, Tensor]:
    """A batch whose sequences begin without an action. The release does not clear the first one."""
    batch = rules.make_batch(update)
    batch["action"][:, 0] = 0
    return batch


def updates(case: str) -> Iterator[rules.Update]:
    """`UPDATES` of them by the library's own updater. For within `fix_noise`."""
    run, model = build(case)
    updater = rules.Recorder(model, run, CPU, pretrained=run.stage == "finetune")
    for update in range(UPDATES):
        updater.gradients = {}
        found = updater.learn(make_batch(update))
        losses = {key.removeprefix("loss/"): float(x) for key, x in found.items() if key.startswith("loss/")}
        kept = {key: x for key, x in updater.gradients.items() if not key.startswith("behaviour.")}
        yield rules.Update(losses, kept, model)


def changes(case: str, model: Any) -> dict[str, float]:
    """Norm of what all updates so far changed in each part."""
    before = dict(build(case)[1].named_parameters())
    return rules.norms({name: p.detach() - before[name].detach() for name, p in model.named_parameters()}, PARTS)


def act(case: str, model: Any) -> Tensor:
    """Actions (3, B, A) without exploration. The actor is as it began, because it learns otherwise than in the release."""
    model.behaviour.load_state_dict(build(case)[1].behaviour.state_dict())
    return rules.act(model, explore=False)
