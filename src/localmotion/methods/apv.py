"""APV: an action-free world model is pre-trained on videos; then one with actions is stacked on it. A video-based bonus explores.

Paper: "Reinforcement Learning with Action-Free Pre-Training from Videos", arXiv 2203.13880. IPV (methods/ipv.py) adds a context frame and
a second reward head. IPV's baseline "plain WM" is this method with `world.encoder=resnet` and `beta_z=1`.

    pre-training    q(z_t | z_{t-1}, o_t), no action; image from z_t, KL weighed by beta_z
    fine-tuning     the action-conditioned model observes phi_t = feat(z_t): q(s_t | s_{t-1}, a_{t-1}, phi_t);
                    E[ -ln p(o_t | s_t) - ln p(r_t + lambda r_int_t | s_t) + beta_z KL_z + beta_s KL_s ]

Where paper and released code differ, the default is the paper's and a setting gives the code's: `beta_z_finetune` (0 in the release).
Two details of the release are left out. Its weight decay multiplies every variable by 1 - 1e-6 at every update; here weight decay is an
L2 term in Adam's gradient. Its pre-training loader draws the ends of episodes more often; a store of videos has no episodes.
There is no preset of its DMC pre-training block (a narrower model, KL weight 1, 1 free nat), because its own fine-tuning cannot load
the result.

Shapes: B sequences, T positions, E embedding, S categoricals, C classes, F features of z or s, A actions.
A state of a model is (B, T, S, C) logits, (B, T, S, C) sample and (B, T, D) deter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from localmotion.config import BehaviourConfig, WorldModelConfig
from localmotion.limits import Limits, at_least
from localmotion.methods.base import (
    FROM_VIDEO,
    Batch,
    Counters,
    Group,
    Method,
    Pass,
    Rates,
    behaviour_groups,
    imagination_passes,
    same,
    stacked_groups,
    video_pass,
)
from localmotion.methods.sizes import presets
from localmotion.models import stacked
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.bonus import WINDOW, IntrinsicBonus, behavioural_loss
from localmotion.models.continuation import continuation_losses, continuation_scales, make_continuation
from localmotion.models.heads import MLP
from localmotion.models.image import ImageModel
from localmotion.models.rssm import RSSM, RSSMState, kl_loss
from localmotion.models.stacked import Carry
from localmotion.suites import DMC_SUITES, ENDS


@dataclass(frozen=True)
class APVConfig:
    """Settings of APV. Defaults are the paper's."""

    world: WorldModelConfig = field(default_factory=lambda: WorldModelConfig(encoder="cnn", context=False))
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    embed_input: bool = False
    """The posterior of s observes the image embedding and phi, [e, phi], instead of phi: on for DMC, off for Meta-World."""
    action_pad: int = 50
    """Columns of both models' action input. Columns beyond the actions are zero; in the action-free model all are."""
    beta_z: float = 0.1
    """KL weight of the action-free model in pre-training; 1 in IPV's plain WM."""
    beta_z_finetune: float = 0.1
    """KL weight of the action-free model in fine-tuning: 0.1 as in the paper's objective, 0 in the released code."""
    beta_s: float = 1.0
    """KL weight of the action-conditioned model."""
    intrinsic_weight: float = 1.0
    """Weight lambda of the bonus: 1.0 Meta-World, 0.1 DMC."""
    free_nats: float = 0.0
    """Free nats of both KLs in fine-tuning: 0 Meta-World, 1 DMC."""
    LIMITS: ClassVar[Limits] = {
        **at_least(0, "action_pad", "beta_z", "beta_z_finetune", "beta_s", "intrinsic_weight", "free_nats")
    }


class APV(Method):
    """Action-free pre-training from videos."""

    name = "apv"
    paper = "arXiv 2203.13880"
    Config = APVConfig
    stages = FROM_VIDEO
    rehearses = frozenset({"finetune", "train"})
    transfers = same("image", "latent")
    # Pre-trained parts learn at the full rate. `small`, `tiny` and `debug` have the residual encoder, as in DreamerV2, because the plain
    # CNN is the slowest encoder on a CPU.
    PRESETS = presets(
        paper={"online": {"pretrained_lr_factor": 1.0}},
        world={"encoder": "resnet", "context": False},
        online={"pretrained_lr_factor": 1.0},
    )
    # On DMC, APV plays 1000 random agent steps first, each of 2 env steps.
    SUITES = {**ENDS, **{suite: {"model": {"embed_input": True}, "online": {"prefill": 2_000}} for suite in DMC_SUITES}}

    def __init__(self, config: APVConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        world = config.world
        self.image = ImageModel(world, image_size=image_size)
        pad = config.action_pad
        self.latent = RSSM.configured(world, embed_dim=self.image.embed_dim, action_dim=0, action_pad=pad, action_free=True)
        if action_dim is None:
            return
        feat = self.latent.feat_dim
        observed = feat + (self.image.embed_dim if config.embed_input else 0)
        self.dynamics = RSSM.configured(world, embed_dim=observed, action_dim=action_dim, action_pad=max(pad, action_dim))
        self.reward = MLP(feat, 1, units=world.units, layers=world.layers)  # r + lambda r_int
        self.bonus = IntrinsicBonus(feat)
        self.behaviour = ActorCritic.configured(feat, action_dim, world, config.behaviour)
        self.continuation = make_continuation(config.behaviour, feat, units=world.units, layers=world.layers)

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        return (2 if stage == "pretrain" else WINDOW), None

    # 1. Pre-training on videos ------------------------------------------------------------------------------------------------

    def pretrain_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """-ln p(o_t | z_t) and KL_z on video segments."""
        return stacked.video_losses(self.image, self.latent, batch, balance=self.config.world.kl_balance)

    # 2. Fine-tuning in the environment ----------------------------------------------------------------------------------------

    def world_model_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], RSSMState]:
        """Losses of the objective above, metrics, and the posterior states (B*T, ...) of s."""
        config, is_first = self.config, batch["is_first"]
        balance, free = config.world.kl_balance, config.free_nats
        truth = self.image.pixels(batch["image"])  # (B*T, ...)
        embed, context = self.image.encode(truth, batch["image"])  # (B, T, E)
        latent, latent_prior = self.latent.observe(embed, None, is_first)  # state, (B, T, S, C)
        phi = self.latent.feat(latent)  # (B, T, F)
        latent_kl, latent_metrics = kl_loss(latent.logits, latent_prior, balance=balance, free=free)
        # No gradient is stopped: through phi the losses of s also train z's model and the encoder.
        observed = stacked.observed(embed, phi, config.embed_input)  # (B, T, F), or (B, T, E + F)
        state, prior = self.dynamics.observe(observed, batch["action"], is_first)  # state, (B, T, S, C)
        feat = self.dynamics.feat(state)  # (B, T, F)
        kl, metrics = kl_loss(state.logits, prior, balance=balance, free=free)
        bonus = self.bonus(phi.detach().float(), is_first)  # (B, T - 4): where a window of 5 fits
        reward = self.reward(feat).squeeze(-1)  # (B, T)
        losses = {
            "image": self.image.losses([feat], context, truth)[0],
            "kl": kl,
            "latent_kl": latent_kl,
            "reward": behavioural_loss(reward, batch, bonus, weight=config.intrinsic_weight),
            **continuation_losses(self.continuation, feat, batch),
        }
        metrics = {f"dynamics/{key}": value for key, value in metrics.items()} | {"bonus/mean": bonus.mean()}
        metrics |= {f"latent/{key}": value for key, value in latent_metrics.items()}
        return losses, metrics, state.starts()

    def behaviour_losses(self, start: RSSMState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.behaviour.losses(start, self.dynamics, lambda feat: self.reward(feat).squeeze(-1), self.continuation)

    def loss_scales(self, stage: str) -> dict[str, float]:
        config, world = self.config, self.config.world
        if stage == "pretrain":
            return {"image": world.image_weight, "kl": config.beta_z}
        return {
            "image": world.image_weight,
            "kl": config.beta_s,
            "latent_kl": config.beta_z_finetune,
            "reward": world.reward_weight,
            **continuation_scales(config.behaviour),
        }

    def passes(self, stage: str) -> tuple[Pass, ...]:
        if stage == "pretrain":
            return video_pass(self, self.loss_scales(stage))
        return imagination_passes(self, self.loss_scales(stage), ("encoder", "model"))

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        if stage == "pretrain":
            return [Group("model", list(self.parameters()), rates.lr)]
        new = (self.dynamics, self.reward, self.continuation)
        return [*stacked_groups(self.image, self.latent, new, rates), *behaviour_groups(self.behaviour, rates)]

    def after_update(self, counters: Counters) -> None:
        if counters.stage in self.acts_after:
            self.behaviour.after_update()

    # 3. Acting and looking ----------------------------------------------------------------------------------------------------

    def initial_carry(self, batch_size: int) -> Carry:
        return stacked.initial(self.latent, self.dynamics, batch_size)

    def act(self, obs: Batch, carry: Carry, *, explore: bool, window: int = 0) -> tuple[Tensor, Carry]:
        """One agent step. Latents are sampled, also in evaluation."""
        is_first, embed = obs["is_first"][:, 0], self.image.embed(obs["image"])
        latent = self.latent.obs_step(carry.latent, None, embed, is_first)
        observed = stacked.observed(embed, self.latent.feat(latent), self.config.embed_input)
        state = self.dynamics.obs_step(carry.state, carry.action, observed, is_first)
        action = self.behaviour.act(self.dynamics.feat(state), explore=explore)
        return action, Carry(latent, state, action)

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Prior rolled out after ``context`` frames: of z, or after fine-tuning of s with the real actions."""
        if not self.acts:
            return {"prior": stacked.open_loop(self.image, self.latent, batch, context)}
        # Fine-tuning has trained the decoder to read s.
        return {"action": stacked.open_loop(self.image, self.latent, batch, context, self.dynamics, self.config.embed_input)}

    def motion_code(self, batch: Batch) -> Tensor:
        """Features of z, (B,T,F). The probes compare them with DRP's a^agg."""
        return stacked.video_code(self.image, self.latent, batch)
