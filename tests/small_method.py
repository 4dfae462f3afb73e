"""A small method with every capability: it keeps all rules, and test_testing.py breaks them in it one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.methods.base import Batch, Group, Losses, Method, Metrics, Pass, Rates, Source, images
from localmotion.methods.sizes import budgets

Found = tuple[Losses, Metrics, Any]


@dataclass(frozen=True)
class SmallConfig:
    """Settings."""

    width: int = 16
    """Width of everything."""


class Small(Method):
    """Codes pictures of 8 x 8 cells, remembers them, predicts the next one, learns from a teacher, and acts towards a goal."""

    name = "small"
    paper = "none: a test"
    Config: type = SmallConfig
    PRESETS = budgets()
    stages = {"pretrain": Source.CLIPS, "decode": Source.LOGGED, "finetune": Source.REPLAY}
    acts_after = frozenset({"decode", "finetune"})
    wants = frozenset({"goal", "labelled"})
    transfers = {"encoder": "teacher", "memory": "memory"}
    extras = {"code": (16,), "value": ()}

    def __init__(self, config: SmallConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        width = config.width
        self.encoder, self.memory, self.decoder = self.made(width), nn.GRUCell(width, width), nn.Linear(width, 192)
        if action_dim is not None:
            self.teacher = self.made(width).requires_grad_(False)
            self.actor, self.critic = nn.Linear(2 * width, action_dim), nn.Linear(width, 1)

    def made(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(192, width), nn.Tanh())

    def small(self, batch: Batch, key: str = "image") -> Tensor:
        """(B, T, 192)"""
        return F.avg_pool2d(images({"image": batch[key]}), 8).flatten(1).unflatten(0, batch[key].shape[:2])

    def states(self, batch: Batch) -> Tensor:
        code, state, found = self.encoder(self.small(batch)), torch.zeros(len(batch["image"]), 16), []
        for t in range(code.shape[1]):
            state = self.memory(code[:, t], state * ~batch["is_first"][:, t : t + 1])
            found.append(state)
        return torch.stack(found, 1)

    def video_losses(self, batch: Batch, _: Any) -> Found:
        state = self.states(batch)
        inside = ~batch["is_first"][:, 1:]
        error = (self.decoder(state[:, :-1]) - self.small(batch)[:, 1:]).square().sum(-1)
        return {"next": (error * inside).mean()}, {"state/std": state.detach().float().std()}, state.detach()

    def action_losses(self, batch: Batch, state: Tensor) -> Found:
        mean = self.mean(state, batch)[:, :-1]
        known = batch.get("labelled", ~batch["is_first"])[:, 1:] & ~batch["is_first"][:, 1:]
        error = torch.where(known[..., None], mean - batch["action"][:, 1:], 0.0)
        distil = (self.encoder(self.small(batch)) - self.teacher(self.small(batch))).square().mean()
        value = (self.critic(state).squeeze(-1) - batch.get("reward", 0.0)).square().mean()
        return {"action": error.square().mean(), "distil": distil, "value": value}, {}, None

    def mean(self, state: Tensor, batch: Batch) -> Tensor:
        return torch.tanh(self.actor(torch.cat([state, self.encoder(self.small(batch, "goal"))], -1)))

    def passes(self, stage: str) -> tuple[Pass, ...]:
        video = Pass(self.video_losses, {"next": 1.0}, ("model",))
        if stage == "pretrain":
            return (video,)
        return video, Pass(self.action_losses, {"action": 1.0, "distil": 1.0, "value": 1.0}, ("model", "actor"), every=2)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        model = [p for part in (self.encoder, self.memory, self.decoder) for p in part.parameters()]
        actor = [] if stage == "pretrain" else [Group("actor", [*self.actor.parameters(), *self.critic.parameters()], rates.lr)]
        return [Group("model", model, rates.lr), *actor]

    def initial_carry(self, batch_size: int) -> Any:
        return torch.zeros(batch_size, 16)

    def act(self, obs: Batch, carry: Any, *, explore: bool, window: int) -> Any:
        state = self.memory(self.encoder(self.small(obs))[:, 0], carry * ~obs["is_first"])
        action = self.mean(state[:, None], obs)[:, 0]
        action = (action + 0.1 * torch.randn_like(action) * explore).clamp(-1, 1)
        return action, state, {"code": state, "value": self.critic(state).squeeze(-1)}

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        state = self.states({key: batch[key][:, :context] for key in ("image", "is_first")})
        later = state[:, -1:].expand(-1, batch["image"].shape[1] - context, -1)
        small = self.decoder(torch.cat([state, later], 1)).unflatten(-1, (3, 8, 8))
        return {"prior": small.repeat_interleave(8, -1).repeat_interleave(8, -2)}

    def motion_code(self, batch: Batch) -> Tensor:
        return self.states(batch)
