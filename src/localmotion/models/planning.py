"""Plans in pictures: their distance to a goal, the choice among K plans, and rewards for following a plan and for coming nearer.

Used by PVDR (arXiv 2411.03169). It draws a batch of plans and takes the one nearest to the goal. Rewards are for adherence to the plan
and progress to the goal. The formulas are ours, because the paper's could not be read.

Shapes: B rows, K plans, T positions, N cells of a picture (side x side), D numbers of a cell's features. Features are those of a frozen
tokenizer, before quantisation for pictures and after it for plans.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion import ranks
from localmotion.models.latent_windows import starts, whole

Metric = Literal["cosine", "squared"]


def blur_kernel(side: int, width: float) -> Tensor:
    """Weights (N, N) with which a cell of a side x side grid averages all cells: normal, deviation ``width`` cells. Rows sum to 1."""
    place = torch.arange(side, dtype=torch.float64)
    along = torch.exp(-0.5 * ((place[:, None] - place) / width).square())
    along = along / along.sum(1, keepdim=True)
    return torch.kron(along, along).float()


class GoalDistance(nn.Module):
    """Distance between two pictures by their features (..., N, D), a mean over cells.

    cosine: 1 - cosine of the two vectors of a cell, 0 to 2. squared: mean squared difference of their numbers.

    Cells are compared in place. Two positions of an object that share no cell are then equally far, however near they are. ``blur``, in
    cells, averages the features of neighbouring cells first, so that the distance falls while an object comes nearer. 0: no blur.
    """

    kernel: Tensor

    def __init__(self, side: int, metric: Metric, blur: float) -> None:
        super().__init__()
        self.metric: Metric = metric
        kernel = blur_kernel(side, blur) if blur > 0 else torch.zeros(0, 0)
        self.register_buffer("kernel", kernel, persistent=False)  # follows from the settings

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """(..., N, D), (..., N, D) -> (...), in float32."""
        u, v = u.float(), v.float()
        if self.kernel.numel():
            with torch.autocast(u.device.type, enabled=False):
                u, v = self.kernel @ u, self.kernel @ v
        if self.metric == "cosine":
            return 1 - F.cosine_similarity(u, v, dim=-1).mean(-1)
        return (u - v).square().mean((-2, -1))


def nearest_plan(distance: Tensor, random: float) -> Tensor:
    """Index (B,) of the plan with the smallest distance (B, K); a random one with probability ``random``, for exploration."""
    best = distance.argmin(1)
    if random <= 0:
        return best
    any_plan = torch.randint(distance.shape[1], best.shape, device=best.device)
    return torch.where(torch.rand(best.shape, device=best.device) < random, any_plan, best)


def plan_rewards(
    distance: GoalDistance, seen: Tensor, goal: Tensor, plan: Tensor, is_first: Tensor, gain: bool = False
) -> tuple[Tensor, Tensor]:
    """Rewards (B, T - 1) of the steps to positions 1 to T - 1: for following the plan, and for progress to the goal.

        follow_t = -d(o_{t+1}, first frame of the plan made at t),    progress_t = d(o_t, g) - d(o_{t+1}, g)

    With ``gain``, following is what the step gained, too: follow_t = d(o_t, first frame) - d(o_{t+1}, first frame). Standing still has 0.

    ``seen`` and ``goal`` (B, T, N, D) are the features of the frames and of their episodes' goals; ``plan`` (B, T, N, D) at position t + 1
    those of the first frame of the plan that chose the step to it. Both are 0 where an episode begins instead of a step. The sum of
    progress over an episode is d(o_0, g) - d(o_T, g), so nothing is gained by going back and forth.
    """
    inside = ~is_first[:, 1:]
    follow = -distance(seen[:, 1:], plan[:, 1:])
    if gain:
        follow = follow + distance(seen[:, :-1], plan[:, 1:])
    far = distance(seen, goal)
    return torch.where(inside, follow, 0.0), torch.where(inside, far[:, :-1] - far[:, 1:], 0.0)


class RunningDeviation(nn.Module):
    """Divides a reward by its running standard deviation, which is kept with the weights and changes only in training.

    ``centred``: it subtracts the running mean first. Not ``scaled``: it does not divide.
    """

    KEEP = 0.99
    SMALLEST = 1e-4
    first: Tensor
    second: Tensor
    weight: Tensor

    def __init__(self, centred: bool = False, scaled: bool = True) -> None:
        super().__init__()
        self.centred, self.scaled = centred, scaled
        for name in ("first", "second", "weight"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def forward(self, reward: Tensor, known: Tensor) -> Tensor:
        """``reward`` (...) over the deviation of the rewards so far, these included; those with ``known`` (...) false do not count."""
        if self.training:
            share = known.to(reward.dtype)
            number = ranks.total(share.sum())
            gained = (1 - self.KEEP) * (number > 0)
            for kept, power in ((self.first, reward), (self.second, reward.square())):
                kept.lerp_(ranks.total((power * share).sum()) / number.clamp(min=1), gained)
            self.weight.lerp_(torch.ones_like(self.weight), gained)
        if self.centred:
            reward = reward - self.mean()
        return reward / self.deviation() if self.scaled else reward

    def mean(self) -> Tensor:
        """What is subtracted from a reward, (). 0 before the first reward."""
        return self.first / self.weight.clamp(min=1e-12)

    def deviation(self) -> Tensor:
        """What a reward is divided by, (). 1 before the first reward."""
        weight = self.weight.clamp(min=1e-12)
        variance = self.second / weight - (self.first / weight).square()
        return torch.where(self.weight > 0, variance.clamp(min=0).sqrt().clamp(min=self.SMALLEST), 1.0)


def choose_windows(is_first: Tensor, before: int, ahead: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` random windows of ``before`` frames up to a present one and ``ahead`` frames after it, all of one episode.

    An episode's first windows begin with copies of its first frame, as the agent saw them. ``is_first`` (B, T); it is false at a
    sequence's first position if its episode began before. Windows are drawn with replacement, each with equal probability. Returns
    rows (n,), positions (n, before + ahead), and known (n,): all false if there is no such window, and all true otherwise. T must be
    above ``ahead``.
    """
    breaks = is_first[:, 1:].unfold(1, ahead, 1).any(-1)  # (B, T - ahead): an episode begins after the present frame
    known = (~breaks & whole(is_first, before)[:, :-ahead]).flatten()
    weight = torch.where(known.any(), known.float(), torch.ones_like(known, dtype=torch.float32))
    index = torch.multinomial(weight, count, replacement=True)
    row, now = index // breaks.shape[1], (index % breaks.shape[1]).unsqueeze(-1)
    place = now + torch.arange(1 - before, ahead + 1, device=index.device)
    return row, torch.maximum(place, starts(is_first)[row].gather(1, now)), known[index]


class WindowMemory(nn.Module):
    """The newest windows of tokens, each with an action and with numbers that stay true, for learning from earlier rollouts.

    It is saved with the weights.
    """

    tokens: Tensor
    action: Tensor
    kept: Tensor
    count: Tensor

    def __init__(self, size: int, frames: int, cells: int, actions: int, kept: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(size, frames, cells, dtype=torch.int16))
        self.register_buffer("action", torch.zeros(size, actions))
        self.register_buffer("kept", torch.zeros(size, kept))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # windows added so far

    def add(self, tokens: Tensor, action: Tensor, numbers: Tensor, known: Tensor) -> None:
        """Add windows (R, frames, N), actions (R, A) and numbers (R, c) in place of the oldest. All are ``known`` (R,), or none is.

        With several ranks those of all ranks are added, so that all ranks have the same memory.
        """
        tokens, action, numbers, known = (ranks.gather(x) for x in (tokens, action, numbers, known))
        size, number = len(self.tokens), len(tokens)
        place = (self.count + torch.arange(number, device=tokens.device)) % size
        for kept, new in ((self.tokens, tokens.short()), (self.action, action), (self.kept, numbers)):
            keep = known.view(-1, *[1] * (new.dim() - 1))
            kept.index_copy_(0, place, torch.where(keep, new, kept[place]))
        self.count.add_(number * known.all())

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Places (n,) of random windows, with replacement, and whether there is any, (n,) bool."""
        filled = self.count.clamp(max=len(self.tokens))
        place = (torch.rand(number, device=self.tokens.device) * filled).long().clamp(max=len(self.tokens) - 1)
        return place, (filled > 0).expand(number)
