"""The alignment module: from a representation of visual dynamics to an action, and the critic of the same shape.

Used by PVDR (arXiv 2411.03169). Its critic is the alignment module's network with another last layer (the paper's second footnote).

Shapes: R rows, Z numbers of z, C numbers of the context feature, N cells of a picture, D numbers of a cell's features, A actions.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from localmotion.models.ppo import clipped_log_prob

MIN_LOG_STD, MAX_LOG_STD = -5.0, 1.0


class AlignmentNet(nn.Module):
    """Three layers [Linear, LayerNorm, ELU] and a linear output that begins small: (R, inputs) -> (R, outputs)."""

    feed_forward = True  # --compile compiles it

    def __init__(self, inputs: int, outputs: int, width: int, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise((inputs, *[width] * layers)):
            parts += [nn.Linear(a, b), nn.LayerNorm(b), nn.ELU()]
        self.body = nn.Sequential(*parts)
        self.last = nn.Linear(width, outputs)
        nn.init.orthogonal_(self.last.weight, 0.01)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.body(x)).float()
        return out


class Alignment(nn.Module):
    """Normal distribution of actions, given z and the context feature. Its deviation is one learned number for each dimension.

    The mean is not squashed. Samples are clipped to [-1, 1], and their probability is that of the clipped action (`models.ppo`).
    """

    def __init__(self, latent: int, context: int, actions: int, width: int, log_std: float) -> None:
        super().__init__()
        self.net = AlignmentNet(latent + context, actions, width)
        self.spread = nn.Parameter(torch.full((actions,), log_std))

    @property
    def log_std(self) -> Tensor:
        """(A,) logarithm of the deviation, in -5..1."""
        return self.spread.clamp(MIN_LOG_STD, MAX_LOG_STD)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """Mean actions (R, A) of z (R, Z) and context features (R, C)."""
        out: Tensor = self.net(torch.cat([z, context], -1))
        return out

    def act(self, z: Tensor, context: Tensor, explore: bool) -> tuple[Tensor, Tensor]:
        """Actions (R, A) in [-1, 1] and their log-probabilities (R,); without ``explore`` the mean."""
        mean, log_std = self(z, context), self.log_std
        action = (mean + log_std.exp() * torch.randn_like(mean) if explore else mean).clamp(-1, 1)
        return action, clipped_log_prob(action, mean, log_std)


class Critic(nn.Module):
    """Value of a plan's z in its context.

    It also sees the goal, as ``goal_units`` numbers that are linear in its features. The paper's critic has the inputs of the alignment
    module, but the value of a z depends on the goal where goals vary.
    """

    def __init__(self, latent: int, context: int, goal: int, width: int, goal_units: int = 64) -> None:
        super().__init__()
        self.goal = nn.Linear(goal, goal_units)
        self.net = AlignmentNet(latent + context + goal_units, 1, width)

    def forward(self, z: Tensor, context: Tensor, goal: Tensor) -> Tensor:
        """Values (R,) of z (R, Z), context features (R, C) and the goal's features (R, N, D)."""
        out: Tensor = self.net(torch.cat([z, context, self.goal(goal.flatten(1))], -1)).squeeze(-1)
        return out
