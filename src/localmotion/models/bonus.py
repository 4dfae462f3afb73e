"""Video-based intrinsic bonus of APV (arXiv 2203.13880): distance of a window's mean feature to its nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from localmotion import ranks

WINDOW = 5
"""Positions per window. A sequence must have at least as many."""


class IntrinsicBonus(nn.Module):
    """k-nearest-neighbour novelty of mean-pooled windows under a fixed random projection, normalised by a running mean."""

    queue: Tensor
    filled: Tensor
    mean: Tensor
    projection: Tensor

    def __init__(self, feat_dim: int, *, window: int = WINDOW, width: int = 128, size: int = 4096, neighbours: int = 16) -> None:
        super().__init__()
        self.window, self.neighbours = window, neighbours
        self.register_buffer("projection", torch.randn(feat_dim, width) / width)
        self.register_buffer("queue", torch.zeros(size, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.ones(()))

    @torch.no_grad()
    def forward(self, feat: Tensor, is_first: Tensor | None = None) -> Tensor:
        """Bonus (B, T - window + 1) of features (B, T, F). The windows enter the queue first, as in IPV's release.

        If ``is_first`` (B, T) starts another episode within a window, the mean is over the positions before that start.
        """
        batch, time, width = feat.shape
        sums = feat.float().cumsum(1)  # (B, T, F)
        sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)  # (B, T + 1, F)
        if is_first is None:
            means = (sums[:, self.window :] - sums[:, : -self.window]) / self.window  # (B, T - window + 1, F)
        else:
            same = (~is_first[:, 1:]).unfold(1, self.window - 1, 1)  # (B, T - window + 1, window - 1)
            members = 1 + same.to(torch.uint8).cumprod(-1).sum(-1, keepdim=True)  # (B, T - window + 1, 1)
            end = torch.arange(time - self.window + 1, device=feat.device)[:, None] + members  # (B, T - window + 1, 1)
            means = (sums.gather(1, end.expand(-1, -1, width)) - sums[:, : -self.window]) / members
        with torch.autocast(feat.device.type, enabled=False):  # nearby windows differ by less than the resolution of bf16
            points = means.flatten(0, 1) @ self.projection  # (N, width), N = B * (T - window + 1)
        seen = ranks.gather(points)
        count = min(len(seen), len(self.queue))
        self.queue.copy_(torch.cat([seen[:count], self.queue[: len(self.queue) - count]]))
        self.filled.add_(count).clamp_(max=len(self.queue))
        # The product form |x|^2 - 2 x.y + |y|^2 loses digits if the points share an offset, so subtract that first.
        centre = points.mean(0)  # (width,)
        with torch.autocast(feat.device.type, enabled=False):
            distance = torch.cdist(points - centre, self.queue - centre, compute_mode="use_mm_for_euclid_dist")  # (N, size)
        empty = torch.arange(len(self.queue), device=feat.device) >= self.filled
        distance = distance.masked_fill(empty, float("inf"))
        near = distance.topk(self.neighbours, largest=False).values  # (N, neighbours)
        missing = near.isinf()  # until the queue holds as many windows as there are neighbours, the mean is over those it holds
        raw = near.masked_fill(missing, 0.0).sum(1) / (~missing).sum(1)  # (N,)
        return self.normalise(raw).view(batch, time - self.window + 1)

    def normalise(self, raw: Tensor) -> Tensor:
        """``raw`` divided by the running mean of its size, which starts at 1 and is updated first (momentum 0.99)."""
        self.mean.mul_(0.99).add_(0.01 * ranks.mean(raw.abs().mean()))
        return raw / (self.mean + 1e-8)


def behavioural_loss(predicted: Tensor, batch: Mapping[str, Tensor], bonus: Tensor, *, weight: float) -> Tensor:
    """Half the mean squared error of the behavioural reward head: ``predicted`` (B, T) learns reward plus ``weight`` times the bonus.

    ``batch`` has reward, is_first and, if episodes can end, is_terminal, (B, T); ``bonus`` is (B, T - window + 1). Positions count if they
    have a window, as in IPV's release. Not as there: if an episode ends after the last window has begun, its positions up to the end count
    too, with the bonus of that window. Otherwise the actor would never learn of a reward at the end of an episode. An end is a new start
    within the sequence, or is_terminal at its last position.
    """
    reward, windows = batch["reward"], bonus.shape[1]
    after = batch["is_first"][:, windows:]  # (B, window - 1)
    ends = after.any(1, keepdim=True)  # (B, 1)
    if "is_terminal" in batch:
        ends = ends | batch["is_terminal"][:, -1:]
    same = after.to(torch.uint8).cumsum(1) == 0  # (B, window - 1)
    counts = torch.cat([torch.ones_like(bonus, dtype=torch.bool), same & ends], 1)  # (B, T)
    target = reward + weight * torch.cat([bonus, bonus[:, -1:].expand_as(after)], 1)  # (B, T)
    errors = (predicted.float() - target).square() * counts
    return 0.5 * errors.sum() / ranks.mean(counts.sum().float())  # ranks may have other numbers of positions that count


def dual_reward_losses(
    behavioural: Tensor, representative: Tensor, batch: Mapping[str, Tensor], bonus: Tensor, *, weight: float
) -> dict[str, Tensor]:
    """Losses "reward" and "reward_representative" of two reward heads, half the mean squared error (IPV, arXiv 2305.18499; DRP, Eq. 9).

    The representative head (B, T) learns the reward at all positions. The behavioural one (B, T): `behavioural_loss`.
    """
    return {
        "reward": behavioural_loss(behavioural, batch, bonus, weight=weight),
        "reward_representative": 0.5 * (representative.float() - batch["reward"]).square().mean(),
    }
