"""Action distributions of DreamerV3 in closed form (reference: danijar/dreamerv3, commit e3f0224). A action dimensions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from localmotion.models.distributions import gumbel, normal, straight_through


class BoundedNormal:
    """Normal with mean tanh(m) and deviation between ``low`` and ``high``, (high - low) sigmoid(s + 2) + low; out (..., 2A) is [m, s].

    Samples may be outside [-1, 1]. Their density is that of the unclipped sample. The user of an action clips it; the dynamics divides it
    by max(1, |a|).
    """

    def __init__(self, out: Tensor, low: float = 0.1, high: float = 1.0) -> None:
        mean, std = out.float().chunk(2, -1)
        self.mean, self.std = torch.tanh(mean), (high - low) * torch.sigmoid(std + 2.0) + low
        self.low, self.high = low, high

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(..., A), without a gradient."""
        return (self.mean + self.std * normal(self.mean, generator)).detach()

    @property
    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """Log density (...) of actions (..., A), summed over dimensions."""
        score = ((action - self.mean) / self.std).square()
        return (-0.5 * score - self.std.log()).sum(-1) - 0.5 * math.log(2 * math.pi) * action.shape[-1]

    def entropy(self) -> Tensor:
        """Differential entropy (...) in nats, summed over dimensions."""
        return self.std.log().sum(-1) + 0.5 * (1 + math.log(2 * math.pi)) * self.std.shape[-1]

    def randomness(self) -> Tensor:
        """Entropy (...) scaled so that the smallest possible value is 0 and the largest is 1."""
        return (self.std / self.low).log().mean(-1) / math.log(self.high / self.low)


class OneHotPolicy:
    """One of A actions as a one-hot vector, logits (..., A).

    ``unimix`` of the probability is uniform (0.01 in the reference's configs.yaml).
    """

    def __init__(self, out: Tensor, unimix: float = 0.0) -> None:
        log_probs = F.log_softmax(out.float(), -1)
        if unimix:
            log_probs = ((1 - unimix) * log_probs.exp() + unimix / out.shape[-1]).log()
        self.log_probs = log_probs

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(..., A) one-hot, without a gradient."""
        logits = self.log_probs.detach()
        return straight_through(logits, gumbel(logits.shape, logits, generator))

    @property
    def mode(self) -> Tensor:
        """(..., A), the likeliest action."""
        return straight_through(self.log_probs.detach(), None)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log probability (...) of one-hot actions (..., A)."""
        return (self.log_probs * action).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def randomness(self) -> Tensor:
        """Entropy (...) as a share of that of the uniform distribution."""
        return self.entropy() / math.log(self.log_probs.shape[-1])
