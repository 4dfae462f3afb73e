"""An example of a method whose `act` returns extras: a policy gradient needs the log-probability and value of each action.
`python examples/act_extras.py` checks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from localmotion.methods.base import Batch, Group, Losses, Method, Metrics, Pass, Rates, Source, images
from localmotion.methods.sizes import budgets


@dataclass(frozen=True)
class ActExtrasConfig:
    """Settings of the example."""

    width: int = 64
    """Width of the code of a frame."""
    discount: float = 0.99
    """Discount of the return."""
    clip: float = 0.2
    """How far the probability of an action may move from that with which it was taken."""


class ActExtras(Method):
    """A clipped policy gradient (PPO, arXiv 1707.06347, Eq. 7) with one-step returns, on the agent's newest steps."""

    name = "act_extras"
    paper = "arXiv 1707.06347"
    Config = ActExtrasConfig
    PRESETS = budgets(pretrain=False)
    stages = {"train": Source.ROLLOUT}
    extras = {"log_prob": (), "value": ()}  # per step; in a batch extras[t] belong to action[t], as `act` returned them together

    def __init__(self, config: ActExtrasConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        self.encoder = nn.Sequential(nn.AvgPool2d(image_size // 8), nn.Flatten(), nn.Linear(192, config.width), nn.ELU())
        self.actor, self.critic = nn.Linear(config.width, self.action_dim), nn.Linear(config.width, 1)

    def policy(self, code: Tensor) -> Normal:
        return Normal(torch.tanh(self.actor(code)).float(), 0.3, validate_args=False)  # validation would read values back

    def losses(self, batch: Batch, _: Any) -> tuple[Losses, Metrics, None]:
        code = self.encoder(images(batch)).unflatten(0, batch["image"].shape[:2])
        value = self.critic(code).squeeze(-1).float()  # (B, T)
        inside = ~batch["is_first"][:, 1:]
        target = batch["reward"] + self.config.discount * value.detach() * ~batch["is_terminal"]
        advantage = target[:, 1:] - batch["value"][:, 1:]  # the stored value is of the frame at which action[t] was taken: t - 1
        log_prob = self.policy(code[:, :-1]).log_prob(batch["action"][:, 1:]).sum(-1)
        ratio = torch.exp((log_prob - batch["log_prob"][:, 1:]).clamp(-20, 20))
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - self.config.clip, 1 + self.config.clip) * advantage)
        error = (value[:, :-1] - target[:, 1:]).square()
        return {"policy": -(gain * inside).mean(), "value": (error * inside).mean()}, {}, None

    def passes(self, stage: str) -> tuple[Pass, ...]:
        return (Pass(self.losses, {"policy": 1.0, "value": 0.5}, ("model",)),)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        return [Group("model", list(self.parameters()), rates.lr)]

    def initial_carry(self, batch_size: int) -> None:
        return None

    def act(self, obs: Batch, carry: None, *, explore: bool, window: int) -> tuple[Tensor, None, dict[str, Tensor]]:
        policy = self.policy(code := self.encoder(images(obs)))
        action = (policy.sample() if explore else policy.mean).clamp(-1, 1)
        return action, None, {"log_prob": policy.log_prob(action).sum(-1), "value": self.critic(code).squeeze(-1).float()}


if __name__ == "__main__":
    from localmotion.testing import check_method

    print(*check_method(ActExtras), sep="\n")
