"""Rewards and values of any scale: symlog, two-hot regression over symexp bins, returns with predicted ends, percentile normalisation.

Source: DreamerV3 (Hafner et al., Nature 2025) and its reference implementation (danijar/dreamerv3, commit e3f0224). T positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion import ranks


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|), element-wise."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1), the inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


def symexp_bins(count: int = 255) -> Tensor:
    """(count,) fp32: symexp of evenly spaced points in [-20, 20]. One half mirrors the other, so they are exactly symmetric.

    Raises ValueError for an even count, which would have no bin at zero.
    """
    if count < 3 or count % 2 == 0:
        raise ValueError(f"bins={count}: two-hot needs an odd number of at least 3, so one bin is zero")
    half = symexp(torch.linspace(-20, 0, count // 2 + 1))
    return torch.cat([half, -half[:-1].flip(0)])


class TwoHot:
    """Distribution over bins that represents a number: logits (..., K), bins (K,) ascending, symmetric, zero in the middle."""

    def __init__(self, logits: Tensor, bins: Tensor) -> None:
        self.logits, self.bins = logits.float(), bins
        self._log_probs: Tensor | None = None

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities (..., K), computed once."""
        if self._log_probs is None:
            self._log_probs = F.log_softmax(self.logits, -1)
        return self._log_probs

    @torch.no_grad()
    def pred(self) -> Tensor:
        """Expected value (...), without a gradient, because it is only used as a target.

        It sums opposite bins as (p_k - p_-k) b_k, so with uniform probabilities the sum is exactly zero. A sum from the left would have
        rounding errors from bins as large as 5e8. The value is that of the reference's symmetric sum, with one rounding less.
        """
        probs, middle = F.softmax(self.logits, -1), len(self.bins) // 2  # (..., K)
        difference = probs[..., middle + 1 :] - probs[..., :middle].flip(-1)  # (..., K // 2)
        return (difference * self.bins[middle + 1 :]).sum(-1)

    def loss(self, target: Tensor) -> Tensor:
        """Cross-entropy (...) with the two bins next to ``target`` (...), weighted by distance. Beyond the range it is the outermost bin.

        The target gets no gradient. A NaN target gives a NaN loss.
        """
        target = target.detach().float()
        low = (torch.searchsorted(self.bins, target.contiguous(), right=True) - 1).clamp(0, len(self.bins) - 2)
        below, above = self.bins[low], self.bins[low + 1]
        weight = ((target - below) / (above - below)).clamp(0, 1)  # (...)
        picked = self.log_probs.gather(-1, torch.stack([low, low + 1], -1))  # (..., 2)
        return -torch.lerp(picked[..., 0], picked[..., 1], weight)


def bootstrapped_return(
    last: Tensor, terminal: Tensor, reward: Tensor, value: Tensor, *, discount: float, lambda_: float
) -> Tensor:
    """lambda-returns with termination and truncation; time is the first axis, (T, ...) -> (T - 1, ...).

        R_t = r_{t+1} + d_{t+1} [(1 - c_{t+1}) v_{t+1} + c_{t+1} R_{t+1}],  R_{T-1} = v_{T-1}
        d = discount (1 - terminal),  c = lambda (1 - last)

    ``terminal`` may be a probability. ``last`` marks the last position of an episode. ``reward[t]`` belongs to the step that led to
    position t (docs/decisions/0001). ``value`` bootstraps; in replayed data it is the imagined return from each position.
    """
    live = (1 - terminal[1:]) * discount  # (T - 1, ...)
    carry = (1 - last[1:]) * lambda_
    constant = (reward[1:] + (1 - carry) * live * value[1:]).unbind(0)  # T - 1 times (...)
    factor, following, out = (live * carry).unbind(0), value[-1], []
    for t in reversed(range(len(constant))):
        following = torch.addcmul(constant[t], factor[t], following)
        out.append(following)
    return torch.stack(out[::-1])


class ReturnRange(nn.Module):
    """Moving range of returns, by which advantages are divided: averages of their 5th and 95th percentile.

    In training mode a call first updates the averages with its returns, as in the reference. They start at 0 without bias correction. A
    batch with non-finite returns does not change them.
    """

    low: Tensor
    high: Tensor

    def __init__(self, *, rate: float = 0.01, limit: float = 1.0, percentiles: tuple[float, float] = (5.0, 95.0)) -> None:
        """``rate`` of the averages; ``limit``: the minimum range, so small returns are not amplified."""
        super().__init__()
        self.rate, self.limit = rate, limit
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("quantiles", torch.tensor(percentiles) / 100, persistent=False)

    @torch.no_grad()
    def forward(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale, both (), of returns of any shape."""
        if self.training:
            found = torch.quantile(ranks.gather(returns.float().flatten()), self.quantiles)  # type: ignore[arg-type]
            rate = torch.where(torch.isfinite(found).all(), self.rate, 0.0)
            found = torch.nan_to_num(found)
            self.low.lerp_(found[0], rate)
            self.high.lerp_(found[1], rate)
        return self.low.clone(), (self.high - self.low).clamp(min=self.limit)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """Move every parameter of ``slow`` by ``rate`` of its distance to ``fast``: slow <- (1 - rate) slow + rate fast."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)
