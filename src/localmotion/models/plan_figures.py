"""Held-out figures of tokens and plans: what the tokenizer draws, how well plans predict, and what z holds.

Of tokens:

    psnr                of the pictures that tokens draw
    change              how much these pictures change in a sequence: their variance at a pixel over time, divided by the true one.
                        Near 0 they show what stays alone, and all plans look alike. PSNR does not tell: a still scene has a high one
    codes_used          share of the codes that a batch uses

Of plans, and the first m + n frames of each sequence:

    kl_nats, active     KL of the posterior from the prior, and how many numbers of z have one
    ce, shuffled        cross-entropy with z of the posterior; how much more it is with that of another sequence
    accuracy, copied    share of tokens that a plan with the posterior's mean gets right; that a copy of the last frame does
    mse_tokens          squared error of the pictures (range 1) of the true tokens, the least that a plan can have
    mse_copy            of a copy of the last true frame. Plans with a larger error are worse than to expect no motion
    mse_posterior       of plans with the posterior's mean
    mse_mean            of plans with the prior's mean
    mse_one, mse_best   of plans with a sample of the prior, and with the best of 16 samples
    best_of_one         mse_best / mse_one

Shapes: B sequences, T positions, S side, K plans, m context, n horizon, N cells, Z numbers of z.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from localmotion.models.plan_cvae import Posterior, Prior, divergence, sample
from localmotion.models.tokenizer import Tokenizer, decibels

ACTIVE = 0.05
"""A number of z is active where its KL is above this, in nats."""
SAMPLES = 16
"""Plans of which the best is measured."""
DRAWN = 16
"""Sequences of a batch whose plans are drawn."""
STILL = 0.1
"""Pictures of tokens whose `change` is below this are those of a tokenizer that missed what moves."""


class PlanModel(Protocol):
    """What is measured."""

    before: int
    ahead: int
    posterior: Posterior
    prior: Prior

    def surprise(self, past: Tensor, future: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy of the future's tokens (B, n, N), given the context (B, m, N) and latents (B, K, Z): (K,)."""

    def plans(self, past: Tensor, z: Tensor) -> Tensor:
        """Tokens (B, K, n, N) of plans, from the context (B, m, N) and latents (B, K, Z)."""

    def drawn(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, N) -> pictures (B, T, 3, S, S)."""


def token_figures(tokenizer: Tokenizer, truth: Tensor, drawn: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Figures () by name, of true pictures and those that tokens draw, (B, T, 3, S, S) each, and the tokens (B, T, N)."""
    change, true = (x.var(1, correction=0).mean() for x in (drawn, truth))
    return {
        "psnr": decibels((drawn - truth).square().flatten(2).mean(2)).mean(),
        "change": (change + 1e-8) / (true + 1e-8),  # 1 where nothing moves
        "codes_used": tokenizer.used(tokens),
    }


def about_tokens(figures: Mapping[str, float]) -> str:
    """A warning if the tokenizer draws what stays alone. "": none."""
    if (change := figures.get("figure/change", 1.0)) >= STILL:
        return ""
    return (
        f"the tokenizer misses what moves: its pictures of held-out clips change {change:.2g} times as much as the clips do, "
        "so plans cannot show motion. Try more --updates, a later --quantise_from or a larger --mse_weight"
    )


def plan_figures(model: PlanModel, truth: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Figures () by name, of pictures (B, T, 3, S, S) and their tokens (B, T, N)."""
    window = tokens[:, : model.before + model.ahead]
    past, future = window.split([model.before, model.ahead], 1)
    posterior, prior = model.posterior(window), model.prior(past)[:2]
    each, z = divergence(*posterior, *prior).mean(0), sample(*posterior)
    ce, other = model.surprise(past, future, torch.stack([z, z.roll(1, 0)], 1))
    out = {"kl_nats": each.sum(), "active": (each > ACTIVE).float().sum(), "ce": ce, "shuffled": other - ce}
    plan = model.plans(past, posterior[0].unsqueeze(1)).squeeze(1)
    out |= {"accuracy": (plan == future).float().mean(), "copied": (past[:, -1:] == future).float().mean()}
    past, mean, log_variance = past[:DRAWN], *(x[:DRAWN] for x in prior)
    last, true = truth[:DRAWN, : model.before + model.ahead].split([model.before, model.ahead], 1)

    def error(plan: Tensor) -> Tensor:
        return (model.drawn(plan) - true).square().flatten(1).mean(1)  # (B,)

    samples = [sample(mean, log_variance) for _ in range(SAMPLES)]
    errors = torch.stack([error(model.plans(past, z.unsqueeze(1)).squeeze(1)) for z in samples])  # (K, B)
    one, best = errors.mean(), errors.amin(0).mean()  # the mean over samples: that of one, with less noise
    out |= {"mse_tokens": error(future[:DRAWN]).mean(), "mse_posterior": error(plan[:DRAWN]).mean()}
    out["mse_copy"] = (last[:, -1:] - true).square().mean()
    out["mse_mean"] = error(model.plans(past, mean.unsqueeze(1)).squeeze(1)).mean()
    return out | {"mse_one": one, "mse_best": best, "best_of_one": best / one.clamp(min=1e-12)}
