"""Whole updates of PVDR's video stages against the same updates written out."""

from __future__ import annotations

from typing import Any

import pytest

from localmotion.methods.pvdr import PVDR
from localmotion.testing.written import Case, check_update
from written_out import pvdr

TOKENIZER: dict[str, Any] = {
    "widths": (4, 8),
    "blocks": 1,
    "codes": 7,
    "code_dim": 5,
    "code_decay": 0.8,
    "restart": 0.3,
    "quantise_from": 0,
}
PLAN: dict[str, Any] = {"context": 2, "horizon": 3, "latent": 3, "dim": 12, "heads": 3}
LAYERS = {"posterior_layers": 2, "prior_layers": 2, "decoder_layers": 2}
MODEL: dict[str, Any] = {"beta": 15.0, "beta_warmup": 2, "warmup": 2, "decay": 0.2}


def settled(method: Any) -> None:
    """Codes with counts as after a while of training, and one that is nearly unused; half of beta."""
    book = method.tokenizer.codebook
    book.count.abs_().add_(30.0)
    book.count[2] = 0.1
    method.warm.fill_(0.5)
    method.tokenizer.quantising.fill_(1.0)


def case(stage: str, written: Any, label: str = "", tokenizer: Any = {}, plan: Any = {}, **more: Any) -> Case:  # noqa: B006
    run = {"optim": {"clip": 0.5, "eps": 1e-3}, "pretrain": {"lr": 3e-3, "updates": 4, "lr_decay": float(stage == "pretrain")}}
    model = {**MODEL, **more, "tokenizer": {**TOKENIZER, **tokenizer}, "plan": {**PLAN, **LAYERS, **plan}}
    batch = {"batch": 3, "time": 7, "side": 16}
    return Case(PVDR, stage, written, model=model, run=run, batch=batch, prepare=settled, label=label)


CASES = [
    case("tokenize", pvdr.tokenize),
    case("tokenize", pvdr.tokenize, "other-weights", {"mse_weight": 0.2, "mae_weight": 0.7, "commitment": 0.7, "blocks": 2}),
    case("pretrain", pvdr.pretrain),
    case("pretrain", pvdr.pretrain, "frame_ar", plan={"decode": "frame_ar"}),
    case("pretrain", pvdr.pretrain, "balance-free-nats", kl_balance=0.8, free_nats_each=0.4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_are_what_the_equations_give(case: Case) -> None:
    check_update(case)
