"""Distributions in closed form, fp32, without the overhead of torch.distributions objects.

Categorical latents: (..., S, C) logits or log-probabilities of S independent categoricals with C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


_likeliest: ContextVar[bool] = ContextVar("likeliest", default=False)


@contextmanager
def likeliest() -> Iterator[None]:
    """Context in which `gumbel` and `normal` give zeros, so that a draw is the likeliest class or the mean, without random numbers."""
    token = _likeliest.set(True)
    try:
        yield
    finally:
        _likeliest.reset(token)


def gumbel(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise in fp32 on the device of ``like``."""
    if _likeliest.get():
        return torch.zeros(tuple(shape), device=like.device)
    uniform = torch.rand(tuple(shape), device=like.device, dtype=torch.float32, generator=generator)
    return uniform.clamp_(1e-20, 1.0 - 1e-7).log_().neg_().log_().neg_()


def normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape of ``like``, fp32."""
    if _likeliest.get():
        return torch.zeros(like.shape, device=like.device)
    return torch.randn(like.shape, device=like.device, generator=generator)


class _StraightThrough(torch.autograd.Function):
    """One-hot forward, softmax backward: sample + p - sg(p) in two kernels and exactly one-hot."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, one_hot: Tensor) -> Tensor:
        ctx.save_for_backward(F.softmax(logits, -1))
        return one_hot.view_as(one_hot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (probs,) = ctx.saved_tensors
        weighted = grads[0] * probs
        return torch.addcmul(weighted, probs, weighted.sum(-1, keepdim=True), value=-1), None


def straight_through(logits: Tensor, noise: Tensor | None) -> Tensor:
    """One-hot sample (Gumbel-argmax) or mode (noise None) of (..., S, C) logits with the gradient of the probabilities. fp32."""
    logits = logits.float()
    with torch.no_grad():
        index = (logits if noise is None else logits + noise).argmax(-1, keepdim=True)
        one_hot = torch.zeros_like(logits).scatter_(-1, index, 1.0)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return one_hot
    out: Tensor = _StraightThrough.apply(logits, one_hot)
    return out


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities (..., S, C), summed over the S categoricals: (...)."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def categorical_entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities (..., S, C), summed over the S categoricals: (...)."""
    return -(log_p.exp() * log_p).sum((-2, -1))


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL in nats of N(mean, std^2) from N(other_mean, other_std^2), (..., S) each, summed over S: (...)."""
    ratio, shift = std / other_std, (mean - other_mean) / other_std
    return 0.5 * (ratio.square() + shift.square() - 1 - 2 * ratio.log()).sum(-1)


def gaussian_entropy(std: Tensor) -> Tensor:
    """Differential entropy in nats of Gaussians of deviation ``std`` (..., S), summed over S: (...)."""
    return (std.log() + (0.5 + _LOG_SQRT_2PI)).sum(-1)


def _phi(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square() - _LOG_SQRT_2PI)


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * (1 / math.sqrt(2))))


class TruncatedNormal:
    """Normal(mean, std) truncated to [-1, 1], element-wise, as in IPV's release. ``mean`` in [-1, 1], ``std`` > 0, fp32."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std
        self.low, self.high = (-1 - mean) / std, (1 - mean) / std
        self.cdf_low = _cdf(self.low)
        self.mass = (_cdf(self.high) - self.cdf_low).clamp(min=1e-8)

    def rsample(self, generator: torch.Generator | None = None) -> Tensor:
        """Reparameterised sample by the inverse CDF, clipped straight-through to +-(1 - 1e-6)."""
        uniform = torch.rand(self.mean.shape, device=self.mean.device, dtype=self.mean.dtype, generator=generator)
        quantile = (self.cdf_low + uniform * self.mass).clamp(1e-6, 1 - 1e-6)
        x = self.mean + self.std * (math.sqrt(2) * torch.erfinv(2 * quantile - 1))
        return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()

    @property
    def mode(self) -> Tensor:
        """Clamped mean."""
        return self.mean.clamp(-1, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Element-wise log density at x in [-1, 1]."""
        return -0.5 * ((x - self.mean) / self.std).square() - _LOG_SQRT_2PI - self.std.log() - self.mass.log()

    def entropy(self) -> Tensor:
        """Element-wise differential entropy, closed form."""
        edge = (self.low * _phi(self.low) - self.high * _phi(self.high)) / (2 * self.mass)
        return _LOG_SQRT_2PI + 0.5 + (self.std * self.mass).log() + edge
