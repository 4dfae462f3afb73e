"""A complete example of a method: a world model without memory. docs/add_a_method.md explains it.

python examples/add_a_method.py                   # checks the method
localmotion train --plugin examples.add_a_method:Flat --method flat --env toy:dot --preset debug --run runs/flat
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from localmotion.config import BehaviourConfig, WorldModelConfig
from localmotion.methods.base import FROM_VIDEO, Batch, Counters, Group, Method, Pass, Rates, imagination_passes, same, video_pass
from localmotion.methods.sizes import presets
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.heads import MLP
from localmotion.models.image import ImageModel
from localmotion.models.rssm import RSSMState


@dataclass(frozen=True)
class FlatConfig:
    """Settings of the example."""

    world: WorldModelConfig = field(default_factory=lambda: WorldModelConfig(context=False))
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    reward_scale: float = 100.0
    """Weight of the reward's error. It is large because the picture's error sums 12,288 values."""


class Flat(Method):
    """Encodes a frame as a code x_t, predicts x_{t+1} = f(x_t, a), and trains the actor on codes predicted by f."""

    name = "flat"
    paper = "none: the example of docs/add_a_method.md"
    Config = FlatConfig
    stages = FROM_VIDEO
    transfers = same("image", "code")
    PRESETS = presets(world={"context": False})

    def __init__(self, config: FlatConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        world = config.world
        width = world.stoch * world.classes + world.deter  # input of the decoder
        self.image = ImageModel(world, image_size=image_size)
        self.code = nn.Linear(self.image.embed_dim, width)
        if action_dim is None:  # pre-training: no actions, no rewards
            return
        self.change = MLP(width + action_dim, width, units=world.units, layers=world.layers)
        self.reward = MLP(width, 1, units=world.units, layers=world.layers)
        self.behaviour = ActorCritic.configured(width, action_dim, world, config.behaviour)

    def pretrain_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        truth = self.image.pixels(batch["image"])
        code = self.codes(self.image.encode(truth, batch["image"])[0])  # (B, T, F)
        return {"image": self.image.losses([code], None, truth)[0]}, {}

    def world_model_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], RSSMState]:
        truth = self.image.pixels(batch["image"])
        code = self.codes(self.image.encode(truth, batch["image"])[0])  # (B, T, F)
        error = self.ahead(code[:, :-1], batch["action"][:, 1:]) - code[:, 1:].detach()  # action[t] led to frame t
        inside = ~batch["is_first"][:, 1:]
        losses = {
            "image": self.image.losses([code], None, truth)[0],
            "ahead": (error.float().square().sum(-1) * inside).mean(),
            "reward": 0.5 * (self.reward(code).squeeze(-1).float() - batch["reward"]).square().mean(),
        }
        flat = code.detach().flatten(0, 1)
        return losses, {"code/std": flat.float().std()}, RSSMState(flat[:, :0], flat[:, :0], flat)

    def behaviour_losses(self, start: RSSMState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.behaviour.losses(start, self, lambda code: self.reward(code).squeeze(-1))

    def codes(self, embed: Tensor) -> Tensor:
        return torch.tanh(self.code(embed))

    def ahead(self, code: Tensor, action: Tensor) -> Tensor:
        return torch.tanh(self.change(torch.cat([code, action], -1)))  # bounded like the codes, so imagination stays near them

    def feat(self, state: RSSMState) -> Tensor:  # imagination calls only this and img_step
        return state.deter

    def img_step(self, state: RSSMState, action: Tensor) -> RSSMState:
        return state._replace(deter=self.ahead(state.deter, action))

    def loss_scales(self, stage: str) -> dict[str, float]:
        return {"image": 1.0} | ({} if stage == "pretrain" else {"ahead": 1.0, "reward": self.config.reward_scale})

    def passes(self, stage: str) -> tuple[Pass, ...]:
        if stage == "pretrain":
            return video_pass(self, self.loss_scales(stage))
        return imagination_passes(self, self.loss_scales(stage), ("model",))

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        if stage == "pretrain":
            return [Group("model", list(self.parameters()), rates.lr)]
        model = [p for part in (self.image, self.code, self.change, self.reward) for p in part.parameters()]
        return [
            Group("model", model, rates.lr),
            Group("actor", list(self.behaviour.actor.parameters()), rates.actor_lr),
            Group("critic", list(self.behaviour.critic.parameters()), rates.critic_lr),
        ]

    def after_update(self, counters: Counters) -> None:
        if counters.stage in self.acts_after:
            self.behaviour.after_update()

    def initial_carry(self, batch_size: int) -> None:
        return None  # the model has no memory

    def act(self, obs: Batch, carry: Any, *, explore: bool, window: int = 0) -> tuple[Tensor, None]:
        policy = self.behaviour.policy(self.codes(self.image.embed(obs["image"])))
        return policy.rsample() if explore else policy.mode, None


if __name__ == "__main__":
    from localmotion.testing import check_method

    print(*check_method(Flat), sep="\n")
