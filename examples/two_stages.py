"""A method with two offline stages: it learns pictures from video, then actions from logged episodes. To check it, run this file.

localmotion pretrain --plugin examples.two_stages:TwoStages --method two_stages --data store --run runs/two
localmotion decode --plugin examples.two_stages:TwoStages --method two_stages --data logs --checkpoint runs/two --run runs/2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localmotion.methods.base import Batch, Group, Losses, Method, Metrics, Pass, Rates, Source, images, same
from localmotion.methods.sizes import budgets


@dataclass(frozen=True)
class TwoStagesConfig:
    """Settings of the example."""

    width: int = 64
    """Width of the code of a frame."""


class TwoStages(Method):
    """Stage `pretrain` predicts the next small picture; stage `decode` learns which action was taken at a frame."""

    name = "two_stages"
    paper = "none: an example"
    Config = TwoStagesConfig
    PRESETS = budgets()
    stages = {"pretrain": Source.CLIPS, "decode": Source.LOGGED}
    acts_after = frozenset({"decode"})
    transfers = same("encoder")

    def __init__(self, config: TwoStagesConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.encoder = nn.Sequential(nn.AvgPool2d(image_size // 8), nn.Flatten(), nn.Linear(192, config.width), nn.ELU())
        if action_dim is None:
            self.decoder = nn.Linear(config.width, 192)
        else:
            self.head = nn.Linear(config.width, action_dim)

    def codes(self, batch: Batch) -> Tensor:
        return self.encoder(images(batch)).unflatten(0, batch["image"].shape[:2])  # (B, T, F)

    def video_losses(self, batch: Batch, _: Any) -> tuple[Losses, Metrics, None]:
        small = nn.functional.avg_pool2d(images(batch), self.image_size // 8).flatten(1)
        truth = small.unflatten(0, batch["image"].shape[:2])  # (B, T, 192)
        return {"next": (self.decoder(self.codes(batch)[:, :-1]) - truth[:, 1:]).square().mean()}, {}, None

    def action_losses(self, batch: Batch, _: Any) -> tuple[Losses, Metrics, None]:
        predicted = torch.tanh(self.head(self.codes(batch)[:, :-1]))  # action[t] led to frame t: it was taken at frame t - 1
        inside = ~batch["is_first"][:, 1:]  # where an episode begins there is no action
        error = (predicted - batch["action"][:, 1:]).square().mean(-1)
        return {"action": (error * inside).mean()}, {}, None

    def passes(self, stage: str) -> tuple[Pass, ...]:
        if stage == "pretrain":
            return (Pass(self.video_losses, {"next": 1.0}, ("model",)),)
        return (Pass(self.action_losses, {"action": 1.0}, ("model",)),)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        return [Group("model", list(self.parameters()), rates.lr)]

    def initial_carry(self, batch_size: int) -> None:
        return None

    def act(self, obs: Batch, carry: None, *, explore: bool, window: int) -> tuple[Tensor, None]:
        action = torch.tanh(self.head(self.codes(obs)[:, 0]))
        return (action + 0.1 * torch.randn_like(action) * explore).clamp(-1, 1), None


if __name__ == "__main__":
    from localmotion.testing import check_method

    print(*check_method(TwoStages), sep="\n")
