"""Whole updates of every method and stage against the same updates written out from the papers' equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import method_batches
import test_diswm
import test_prelar
import test_written_updates
from localmotion.methods.apv import APV
from localmotion.methods.base import Counters
from localmotion.methods.dreamer_v2 import DreamerV2
from localmotion.methods.dreamer_v3 import DreamerV3
from localmotion.testing.written import Case, check_update
from written_out import apv, dreamer_v2, dreamer_v3

WORLD = {
    "depth": 1,
    "deter": 5,
    "hidden": 6,
    "stoch": 3,
    "classes": 4,
    "units": 5,
    "layers": 2,
    "image_weight": 0.3,
    "reward_weight": 1.7,
    "kl_balance": 0.7,
}
BEHAVIOUR = {"horizon": 4, "discount": 0.9, "lambda_": 0.8, "entropy": 0.3, "slow_critic_every": 2}
ENDING = {**BEHAVIOUR, "continuation": True}
RATES = {"lr": 3e-3, "actor_lr": 2e-3, "critic_lr": 1e-3, "pretrained_lr_factor": 0.2, "freeze_updates": 1}
OPTIM = {"clip": 1.0, "weight_decay": 1e-2, "eps": 1e-3}


def settings(run: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """Arguments of a case of the DreamerV2 family: no two numbers alike, so that none can stand in for another."""
    return {
        "model": {"world": WORLD, "behaviour": BEHAVIOUR, **model},
        "run": {"online": RATES, "pretrain": {"lr": 4e-3, "lr_decay": 0.6, "updates": 4}, "optim": OPTIM, **(run or {})},
    }


def half_filled(method: Any) -> None:
    """The bonus has seen more windows than it takes neighbours."""
    method.bonus.filled.fill_(40)


def wide_range(method: Any) -> None:
    """Returns range over more than 1, so that advantages are divided."""
    method.return_range.low.fill_(-0.2)
    method.return_range.high.fill_(9.0)


V3_SIZES = {
    "deter": 8,
    "hidden": 6,
    "stoch": 3,
    "classes": 4,
    "depth": 2,
    "units": 5,
    "blocks": 2,
    "imag_length": 3,
    "horizon": 20,
}
V3 = {
    **V3_SIZES,
    "lambda_": 0.8,
    "entropy": 0.3,
    "slow_reg": 0.6,
    "slow_rate": 0.1,
    "unimix": 0.03,
    "kl_free": 0.5,
    "warmup": 2,
    "agc": 0.02,
}
V3_SCALES = {"dyn": 0.9, "rep": 0.2, "recon": 0.05, "reward": 1.1, "cont": 1.2, "policy": 1.3, "value": 1.4, "repval": 0.4}


def v3(**model: Any) -> dict[str, Any]:
    """Arguments of a case of DreamerV3."""
    return {
        "model": {**V3, "scales": V3_SCALES, "vector_dim": 3, **model},
        "run": {"online": {"lr": 2e-3}},
        "prepare": wide_range,
    }


ROUGH = 1e-6  # of distances that the product takes in the form |x|^2 - 2xy + |y|^2
APV_MODEL = {"beta_z": 0.7, "beta_z_finetune": 0.4, "beta_s": 0.6, "action_pad": 5}


CASES = [
    Case(DreamerV2, "train", dreamer_v2.train, **settings(beta=0.7)),
    Case(DreamerV2, "train", dreamer_v2.train, **settings(beta=0.7, free_nats=0.18), label="free-nats"),
    Case(DreamerV2, "train", dreamer_v2.train, **settings(behaviour=ENDING), label="ends"),
    Case(
        DreamerV2,
        "train",
        dreamer_v2.train,
        **settings(world={**WORLD, "encoder": "resnet", "stem": "unshuffle"}),
        updates=1,
        label="residual",
    ),
    Case(
        DreamerV2,
        "train",
        dreamer_v2.train,
        **settings(world={**WORLD, "encoder": "resnet", "depth": 2}),
        updates=1,
        label="residual-paper",
    ),
    Case(
        DreamerV2,
        "train",
        dreamer_v2.train,
        **settings(world={**WORLD, "encoder": "resnet", "norm": "none", "depth": 2}),
        updates=1,
        label="residual-plain",
    ),
    Case(APV, "pretrain", apv.pretrain, **settings(**APV_MODEL)),
    Case(APV, "finetune", apv.online, **settings(**APV_MODEL, intrinsic_weight=0.8), prepare=half_filled, tolerance=ROUGH),
    Case(APV, "finetune", apv.online, **settings(**APV_MODEL, behaviour=ENDING), updates=1, tolerance=ROUGH, label="ends"),
    Case(
        APV,
        "finetune",
        apv.online,
        **settings({"load": "latent"}, **APV_MODEL),
        updates=1,
        tolerance=ROUGH,
        label="latent-loaded",
    ),
    Case(
        APV,
        "train",
        apv.online,
        **settings(**APV_MODEL, intrinsic_weight=0.8, embed_input=True, free_nats=0.19),
        updates=1,
        tolerance=ROUGH,
        label="free-nats",
    ),
    Case(
        APV,
        "finetune",
        apv.online,
        **settings({"load": "image"}, **APV_MODEL, intrinsic_weight=0.8),
        updates=2,
        tolerance=ROUGH,
        label="image-loaded",
    ),
    Case(DreamerV3, "train", dreamer_v3.train, **v3(stem="blocks", kl_free=1.1)),
    Case(
        DreamerV3,
        "train",
        dreamer_v3.train,
        **{**v3(vector_dim=0, imag_last=3, contdisc=False), "prepare": None},  # returns range over less than 1
        updates=1,
        label="pool",
    ),
    Case(
        DreamerV3, "train", dreamer_v3.train, **v3(pixels=False, discrete=True, kl_free=0.45), updates=1, label="vectors-discrete"
    ),
    Case(DreamerV3, "train", dreamer_v3.train, **v3(pixels=False), updates=3, deferred=True, label="deferred"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_are_what_the_papers_equations_give(case: Case) -> None:
    check_update(case)


def test_every_method_and_stage_is_written_out() -> None:
    """Training from scratch is fine-tuning at other rates: one of the two is enough."""
    written = {
        (case.method.name, case.stage) for case in (*CASES, *test_written_updates.CASES, *test_prelar.CASES, *test_diswm.CASES)
    }
    for name, stage in method_batches.CASES:
        alike = ("pretrain",) if stage == "pretrain" else ("train", "finetune")
        assert any((name, other) in written for other in alike), (name, stage)


def test_a_wrong_update_is_reported_with_what_differs() -> None:
    """The check of the check: one weight a millionth off, one loss forgotten, noise of another source."""
    case = CASES[0]

    def off(state: Any, batch: Any, noise: Any, run: Any) -> dict[str, Any]:
        found = dreamer_v2.train(state, batch, noise, run)
        state.weights["reward.net.0.weight"][0, 0] *= 1 + 1e-6
        del found["loss/kl"]
        return found

    with pytest.raises(AssertionError) as caught:
        check_update(replace(case, written_out=off))
    first, *lines = str(caught.value).splitlines()
    assert first == "dreamer_v2-train, update 0: 2 differences"
    assert [line.split(":")[0] for line in lines] == ["loss, metric or norm loss/kl", "weight reward.net.0.weight"]

    class Drawing(DreamerV2):
        def after_update(self, counters: Counters) -> None:
            torch.randperm(3)
            super().after_update(counters)

    with pytest.raises(AssertionError, match="does not hold fixed"):
        check_update(replace(case, method=Drawing, updates=1))
