"""Whole updates of the latent action models and their baselines against the same updates written out, for every stage."""

from __future__ import annotations

from typing import Any

import pytest

from localmotion.methods.bc import BC
from localmotion.methods.laom import LAOM
from localmotion.methods.lapo import LAPO
from localmotion.methods.masklam import MaskLAM
from localmotion.testing.written import Case, check_update
from written_out import latent, reward

NETS: dict[str, Any] = {"widths": (2, 3), "forward_widths": (2, 3), "head_widths": (5, 4), "decay": 0.2}
VQ: dict[str, Any] = {**NETS, "latent": 64, "hidden": 6, "base": 2, "codes": 5, "code_decay": 0.7, "warmup": 2, "clone_warmup": 3}
FREE: dict[str, Any] = {**NETS, "latent": 7, "form": "continuous", "warmup": 0, "clone_warmup": 0}
MASKED: dict[str, Any] = {**NETS, "latent": 7, "offset": 3}
WIDE: dict[str, Any] = {"latent": 7, "widths": (2, 3), "units": 6, "offset": 2, "tau": 0.2, "augmented": False, "action_pad": 3}
LABELS: dict[str, Any] = {"policy_widths": (2, 3), "widths": (2, 3), "units": 6, "latent": 7, "head_widths": (5, 4)}
WIDE |= {"policy_widths": (2, 3), "head_widths": (5, 4), "warmup": 3, "action_weight": 0.3}
REWARD = {"discount": 0.9, "lambda_": 0.8, "ratio_clip": 0.3, "value_weight": 0.7, "entropy": 0.2, "reward_scale": 0.6}
REWARD |= {"head_share": 0.3, "decoder_lr": 2e-3, "decoder_until": 0.5}


def settled(method: Any) -> None:
    """Codes with counts, as after a while of training."""
    if getattr(getattr(method, "inverse", None), "quantizer", None) is not None:
        method.inverse.quantizer.count.abs_().add_(0.5)


def case(method: Any, stage: str, written: Any, model: dict[str, Any], label: str = "", updates: int = 2, **more: Any) -> Case:
    run = {
        "optim": {"clip": 0.5, "eps": 1e-3},
        "pretrain": {"lr": 3e-3, "updates": 4, "lr_decay": 1.0},
        "online": {"lr": 3e-3, "updates": 4, "lr_decay": 1.0, "freeze_updates": 1, "pretrained_lr_factor": 0.3},
    }
    batch = {"batch": 2, "time": 8, "side": 16, "actions": 2}
    return Case(
        method, stage, written, model={**model, **more}, run=run, batch=batch, prepare=settled, updates=updates, label=label
    )


CASES = [
    case(LAPO, "pretrain", latent.lapo_pretrain, VQ, updates=3),
    case(LAPO, "pretrain", latent.lapo_pretrain, FREE, "continuous-flow", flow_weight=0.3),
    case(LAPO, "clone", latent.lapo_clone, VQ),
    case(LAPO, "clone", latent.lapo_clone, FREE, "continuous"),
    case(LAPO, "decode", latent.decode(1, latent.lapo_rate), VQ),
    case(LAPO, "decode", latent.decode(3, latent.lapo_rate), FREE, "continuous"),
    case(MaskLAM, "pretrain", latent.masklam_pretrain, MASKED, floor=0.1, mask_grow=1),
    case(MaskLAM, "pretrain", latent.masklam_pretrain, MASKED, "loss-only", mask_channel=False),
    case(MaskLAM, "pretrain", latent.masklam_pretrain, MASKED, "input-mask", input_mask=True, loss_mask=False, mask_dropout=0.4),
    case(MaskLAM, "pretrain", latent.masklam_pretrain, MASKED, "unet", forward_model="unet", base=2),
    case(MaskLAM, "clone", latent.masklam_clone, MASKED),
    case(MaskLAM, "clone", latent.masklam_clone, MASKED, "input-mask", input_mask=True, mask_channel=False),
    case(MaskLAM, "decode", latent.decode(3, latent.masklam_rate), MASKED),
    case(LAOM, "pretrain", latent.laom_pretrain, WIDE, updates=3),
    case(LAOM, "pretrain", latent.laom_pretrain, WIDE, "supervised", supervised=True),
    case(LAOM, "clone", latent.laom_clone, WIDE),
    case(LAOM, "decode", latent.laom_decode, WIDE),
    case(BC, "decode", latent.bc, LABELS),
    case(BC, "decode", latent.bc, LABELS, "relabel", updates=3, relabel=True, policy="impala", head_start=1),
    case(LAPO, "finetune", reward.lapo, VQ, ppo=REWARD),
    case(LAPO, "finetune", reward.continuous, FREE, "continuous", ppo=REWARD),
    case(MaskLAM, "finetune", reward.masklam, MASKED, ppo=REWARD, mask_channel=False),
    case(LAOM, "finetune", reward.laom, WIDE, ppo=REWARD),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_are_what_the_papers_equations_give(case: Case) -> None:
    check_update(case)
