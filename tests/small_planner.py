"""Small methods that plan: they know how `toy:block` moves, and go to where a goal picture shows the block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localmotion.envs.toy import BlockEnv
from localmotion.methods.base import GOAL, Batch, Group, Losses, Method, Metrics, Pass, Rates, Source, images
from localmotion.methods.sizes import budgets

AHEAD, CANDIDATES = 3, 5


@dataclass(frozen=True)
class PlannerConfig:
    """Settings."""

    width: int = 4
    """Width of what it learns, which is nothing useful."""


class Planner(Method):
    """Imagines `CANDIDATES` plans of `AHEAD` pictures, each of one constant action, and takes the one whose end is nearest to the goal."""

    name = "planner"
    paper = "none: a test"
    Config: type = PlannerConfig
    PRESETS = budgets(pretrain=False)
    stages: Mapping[str, Source] = {"train": Source.REPLAY}
    wants = GOAL

    def __init__(self, config: PlannerConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.code = nn.Linear(3, config.width)

    def losses(self, batch: Batch, _: Any) -> tuple[Losses, Metrics, None]:
        here, there = (self.code(images({"image": batch[key]}).mean((2, 3))) for key in ("image", "goal"))
        return {"apart": (here - there).square().mean()}, {}, None

    def passes(self, stage: str) -> tuple[Pass, ...]:
        return (Pass(self.losses, {"apart": 1.0}, ("model",)),)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        return [Group("model", list(self.parameters()), rates.lr)]

    def initial_carry(self, batch_size: int) -> Any:
        picture = torch.zeros(batch_size, 3, self.image_size, self.image_size)
        return picture, torch.zeros(batch_size, CANDIDATES, self.action_dim), torch.zeros(batch_size, dtype=torch.int64)

    def futures(self, picture: Tensor, actions: Tensor) -> Tensor:
        """(B, K, AHEAD, 3, S, S): the picture (B, 3, S, S), moved by 1 to AHEAD times the actions (B, K, A)."""
        pixels = actions * BlockEnv.speed * (1 - BlockEnv.patch) * self.image_size
        ground = picture[:, :, :1, :1].expand_as(picture)
        found = []
        for row in range(len(picture)):
            for x, y in pixels[row, :, :2].tolist():
                for step in range(1, AHEAD + 1):
                    moved = torch.roll(picture[row] - ground[row], (round(step * y), round(step * x)), (1, 2))
                    found.append(ground[row] + moved)
        return torch.stack(found).unflatten(0, (len(picture), CANDIDATES, AHEAD))

    def act(self, obs: Batch, carry: Any, *, explore: bool, window: int) -> Any:
        now, goal = images({"image": obs["image"]}), images({"image": obs["goal"]})
        actions = 2 * torch.rand(len(now), CANDIDATES, self.action_dim) - 1
        ends = self.futures(now, actions)[:, :, -1]
        chosen = (ends - goal[:, None]).square().flatten(2).mean(-1).argmin(1)
        return actions[torch.arange(len(now)), chosen], (now, actions, chosen)

    def panels(self, carry: Any) -> dict[str, Tensor]:
        now, actions, chosen = carry
        candidates = self.futures(now, actions)
        return {"plan": candidates[torch.arange(len(now)), chosen], "ends": candidates[:, :, -1], "chosen": chosen}


class OnPolicyPlanner(Planner):
    """The same method on rollouts."""

    name = "on_policy_planner"
    stages = {"train": Source.ROLLOUT}


class LoggedPlanner(Planner):
    """The same method on logged episodes."""

    name = "logged_planner"
    stages = {"clone": Source.LOGGED}
    acts_after = frozenset({"clone"})
