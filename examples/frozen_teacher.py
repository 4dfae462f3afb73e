"""An example of a method with a frozen teacher: the encoder of pre-training becomes the teacher of a smaller one.
`python examples/frozen_teacher.py` checks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localmotion.methods.base import Batch, Group, Losses, Method, Metrics, Pass, Rates, Source, images
from localmotion.methods.sizes import budgets


@dataclass(frozen=True)
class FrozenTeacherConfig:
    """Settings of the example."""

    width: int = 64
    """Width of the teacher's code of a frame."""


class FrozenTeacher(Method):
    """A student predicts the teacher's code; actions that were followed by a high reward become more likely."""

    name = "frozen_teacher"
    paper = "none: an example"
    Config = FrozenTeacherConfig
    PRESETS = budgets()
    stages = {"pretrain": Source.CLIPS, "finetune": Source.REPLAY}
    transfers = {"encoder": "teacher"}  # in the checkpoint -> here

    def __init__(self, config: FrozenTeacherConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)

        def encoder(side: int) -> nn.Module:
            cells = nn.AvgPool2d(image_size // side)
            return nn.Sequential(cells, nn.Flatten(), nn.Linear(3 * side**2, config.width), nn.ELU())

        if action_dim is None:
            self.encoder, self.decoder = encoder(8), nn.Linear(config.width, 192)
            return
        self.teacher = encoder(8).requires_grad_(False)  # in no group: no optimiser steps it
        self.student, self.actor = encoder(4), nn.Linear(config.width, action_dim)

    def video_losses(self, batch: Batch, _: Any) -> tuple[Losses, Metrics, None]:
        small = nn.functional.avg_pool2d(images(batch), self.image_size // 8).flatten(1)
        return {"image": (self.decoder(self.encoder(images(batch))) - small).square().mean()}, {}, None

    def online_losses(self, batch: Batch, _: Any) -> tuple[Losses, Metrics, None]:
        with torch.no_grad():
            wanted = self.teacher(images(batch))
        code = self.student(images(batch))
        mean = torch.tanh(self.actor(code.unflatten(0, batch["image"].shape[:2])[:, :-1]))  # the action at t led to frame t + 1
        weight = torch.exp(batch["reward"][:, 1:]) * ~batch["is_first"][:, 1:]
        actor = (weight * (mean - batch["action"][:, 1:]).square().mean(-1)).mean()
        return {"distil": (code - wanted).square().mean(), "actor": actor}, {}, None

    def passes(self, stage: str) -> tuple[Pass, ...]:
        if stage == "pretrain":
            return (Pass(self.video_losses, {"image": 1.0}, ("model",)),)
        return (Pass(self.online_losses, {"distil": 1.0, "actor": 1.0}, ("model",)),)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        return [Group("model", [p for p in self.parameters() if p.requires_grad], rates.lr)]

    def initial_carry(self, batch_size: int) -> None:
        return None

    def act(self, obs: Batch, carry: None, *, explore: bool, window: int) -> tuple[Tensor, None]:
        action = torch.tanh(self.actor(self.student(images(obs))))
        return (action + 0.3 * torch.randn_like(action) * explore).clamp(-1, 1), None


if __name__ == "__main__":
    from localmotion.testing import check_method

    print(*check_method(FrozenTeacher), sep="\n")
