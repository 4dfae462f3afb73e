"""Whole updates of every method and stage against the same updates written out from the papers' equations."""

from __future__ import annotations

from typing import Any

import pytest

from localmotion.methods.dreamer_v2 import DreamerV2
from update_check import Case, check_update
from written_out import dreamer_v2

WORLD = {"depth": 1, "deter": 5, "hidden": 6, "stoch": 3, "classes": 4, "units": 5, "layers": 2, "image_weight": 0.3}
BEHAVIOUR = {"horizon": 4, "discount": 0.9, "lambda_": 0.8, "entropy": 0.3, "slow_critic_every": 2}
RATES = {"lr": 3e-3, "actor_lr": 2e-3, "critic_lr": 1e-3}
OPTIM = {"clip": 1.0, "weight_decay": 1e-2, "eps": 1e-3}


def settings(**model: Any) -> dict[str, Any]:
    """Arguments of a case of the DreamerV2 family: no two numbers alike, so that none can stand in for another."""
    return {
        "model": {"world": WORLD, "behaviour": BEHAVIOUR, **model},
        "run": {"online": {**RATES, "batch_size": 2, "length": 6}, "optim": OPTIM},
    }


CASES = [
    Case(DreamerV2, "train", dreamer_v2.train, **settings(beta=0.7)),
    Case(DreamerV2, "train", dreamer_v2.train, **settings(beta=0.7, free_nats=50.0), label="free-nats"),
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
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_are_what_the_papers_equations_give(case: Case) -> None:
    check_update(case)
