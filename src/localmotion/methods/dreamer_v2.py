"""DreamerV2: a world model learned from scratch in the environment. The baseline without pre-training and without motion.

Paper: "Mastering Atari with Discrete World Models" (arXiv 2010.02193). Settings for continuous control: those of the baseline in IPV's
release (thuml/ContextWM): plain CNN, one RSSM, no intrinsic bonus, no context, no representative reward head.

    E[ -ln p(o_t | s_t) - ln p(r_t | s_t) + beta KL[q(s_t | s_{t-1}, a_{t-1}, o_t) || p(s_t | s_{t-1}, a_{t-1})] ]

Shapes: B sequences, T positions, E embedding, S categoricals, C classes, F features, A actions.
A state is (B, T, S, C) logits, (B, T, S, C) sample and (B, T, D) deter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from localmotion.config import BehaviourConfig, WorldModelConfig
from localmotion.limits import Limits, at_least
from localmotion.methods.base import (
    FROM_SCRATCH,
    HELD_RATES,
    Batch,
    Counters,
    Group,
    Method,
    Pass,
    Rates,
    behaviour_groups,
    imagination_passes,
)
from localmotion.methods.sizes import presets
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.continuation import continuation_losses, continuation_scales, make_continuation
from localmotion.models.heads import MLP
from localmotion.models.image import ImageModel
from localmotion.models.rssm import RSSM, Carry, RSSMState, beginning, kl_loss
from localmotion.suites import ENDS


@dataclass(frozen=True)
class DreamerV2Config:
    """Settings of DreamerV2. Defaults are those of the baseline in IPV's repository."""

    world: WorldModelConfig = field(default_factory=lambda: WorldModelConfig(encoder="cnn", context=False))
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    beta: float = 1.0
    """KL weight."""
    free_nats: float = 0.0
    """Free nats of the KL: 0 Meta-World, 1 DMC."""
    LIMITS: ClassVar[Limits] = {**at_least(0, "beta", "free_nats")}


class DreamerV2(Method):
    """DreamerV2 for continuous control from pixels."""

    name = "dreamer_v2"
    paper = "arXiv 2010.02193"
    Config = DreamerV2Config
    stages = FROM_SCRATCH
    unread = dict.fromkeys(stages, HELD_RATES)
    SUITES = ENDS
    PRESETS = presets(world={"encoder": "resnet", "context": False}, pretrain=False)

    def __init__(self, config: DreamerV2Config, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        if action_dim is None:
            raise NotImplementedError("dreamer_v2 has no pre-training stage")
        self.config = config
        world = config.world
        self.image = ImageModel(world, image_size=image_size)
        self.dynamics = RSSM.configured(world, embed_dim=self.image.embed_dim, action_dim=action_dim)
        self.reward = MLP(self.dynamics.feat_dim, 1, units=world.units, layers=world.layers)
        self.behaviour = ActorCritic.configured(self.dynamics.feat_dim, action_dim, world, config.behaviour)
        self.continuation = make_continuation(config.behaviour, self.dynamics.feat_dim, units=world.units, layers=world.layers)

    # 1. Learning --------------------------------------------------------------------------------------------------------------

    def world_model_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], RSSMState]:
        """Losses of the objective above, metrics, and the posterior states (B*T, ...)."""
        truth = self.image.pixels(batch["image"])  # (B*T, ...)
        embed, context = self.image.encode(truth, batch["image"])  # (B, T, E)
        state, prior = self.dynamics.observe(embed, batch["action"], batch["is_first"])  # state, (B, T, S, C)
        feat = self.dynamics.feat(state)  # (B, T, F)
        kl, metrics = kl_loss(state.logits, prior, balance=self.config.world.kl_balance, free=self.config.free_nats)
        reward = self.reward(feat).squeeze(-1).float()  # (B, T)
        losses = {
            "image": self.image.losses([feat], context, truth)[0],
            "kl": kl,
            "reward": 0.5 * (reward - batch["reward"]).square().mean(),
            **continuation_losses(self.continuation, feat, batch),
        }
        metrics = {f"dynamics/{key}": value for key, value in metrics.items()}
        return losses, metrics, state.starts()

    def behaviour_losses(self, start: RSSMState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.behaviour.losses(start, self.dynamics, lambda feat: self.reward(feat).squeeze(-1), self.continuation)

    def loss_scales(self, stage: str) -> dict[str, float]:
        config, world = self.config, self.config.world
        scales = {"image": world.image_weight, "kl": config.beta, "reward": world.reward_weight}
        return scales | continuation_scales(config.behaviour)

    def passes(self, stage: str) -> tuple[Pass, ...]:
        return imagination_passes(self, self.loss_scales(stage), ("model",))

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        parts = (self.image, self.dynamics, self.reward, self.continuation)
        model = [p for module in parts if module for p in module.parameters()]
        return [Group("model", model, rates.lr), *behaviour_groups(self.behaviour, rates)]

    def after_update(self, counters: Counters) -> None:
        self.behaviour.after_update()

    # 2. Acting and looking ----------------------------------------------------------------------------------------------------

    def initial_carry(self, batch_size: int) -> Carry:
        return beginning(self.dynamics, batch_size, self.action_dim)

    def act(self, obs: Batch, carry: Carry, *, explore: bool, window: int = 0) -> tuple[Tensor, Carry]:
        embed = self.image.embed(obs["image"])
        state = self.dynamics.obs_step(carry.state, carry.action, embed, obs["is_first"][:, 0])
        action = self.behaviour.act(self.dynamics.feat(state), explore=explore)
        return action, Carry(state, action)

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Prior rolled out after ``context`` frames with the real actions."""
        truth = self.image.pixels(batch["image"])
        embed, maps = self.image.encode(truth, batch["image"], frame=context - 1)  # the last frame that is observed
        post, _ = self.dynamics.observe(embed[:, :context], batch["action"][:, :context], batch["is_first"][:, :context])
        feat = self.dynamics.open_loop(post, batch["action"][:, context:])  # (B, T, F)
        return {"action": self.image.pictures(feat, maps)}
