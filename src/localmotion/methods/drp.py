"""DRP: Deconstruct-Recompose pre-training from videos and fine-tuning with the learned motion.

Paper: "Local Motion Matters: A Deconstruct-Recompose Paradigm for Reinforcement Learning Pre-training from Videos",
arXiv 2607.00808; equation numbers are the paper's. Where it is silent it says it follows IPV (arXiv 2305.18499).

    pre-training    Atomic Actions -> DAE (Eqs. 13-19) -> masked autoencoding (Eq. 5)
                    [MAT] -> a^agg -> latent dynamics z (Eq. 1) -> image and KL (Eqs. 2, 6)
    fine-tuning     the same two (Eqs. 7, 8), Adapter(z) -> action-specific dynamics s (Eq. 3) -> image, reward, KL (Eqs. 4, 9),
                    actor and critic in imagination over s (Eqs. 10-12)

The paper leaves these choices open:

* `joint_gradient`: the latent dynamics loss also trains [MAT] and the DAE, because section 4.3 says that it "enriches" them. Off: only
  Eq. 5 trains the DAE.
* `world.context`: Eq. 4 conditions the decoder on a context frame; Eq. 2 does not show one. On by default for both, as in IPV.
* `embed_input`: in Eq. 3 the posterior of s observes Adapter(z) alone. On, and so by default in the suites of DeepMind Control: it also
  observes the image embedding, as in IPV's release there. With Eq. 3 to the letter s learns less of the pose (studies/stage0).
* `beta_z_finetune`: Eq. 8 has the KL of z with weight beta_z. In the suites of DeepMind Control its default weight is 0, as in IPV's
  release: with 1 z often says nothing that the motion and the context frame do not say already (studies/stage0).
* One decoder reconstructs from z and from s, because both equations write p_theta. It decodes both in one batched call.
* `motion_encoder`: Atomic Actions. "global" is the paper's ablation, one code of the whole flow field (Fig. 5b).
* `adapter`: the paper says only that an MLP is worse (Fig. 13). The default attends over the parts of z (models/adapters.py).
* "Slowly fine-tuned" (section 4.4) has no number: `online.pretrained_lr_factor` multiplies the learning rate of the DAE and of the
  latent dynamics.

Shapes: B sequences, T positions, K parts, P patch side, M width of a^agg, E embedding, S categoricals, C classes,
F features of z or s, A actions. A state of a model is (B, T, S, C) logits, (B, T, S, C) sample and (B, T, D) deter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from localmotion.config import BehaviourConfig, WorldModelConfig
from localmotion.errors import ConfigError
from localmotion.limits import Limits, at_least
from localmotion.methods.base import (
    FROM_VIDEO,
    MOTION,
    Batch,
    Counters,
    Group,
    Method,
    Pass,
    Rates,
    behaviour_groups,
    imagination_passes,
    same,
    video_pass,
)
from localmotion.methods.sizes import presets
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.adapters import make_adapter
from localmotion.models.bonus import WINDOW, IntrinsicBonus, dual_reward_losses
from localmotion.models.continuation import continuation_losses, continuation_scales, make_continuation
from localmotion.models.dae import DAECache, DAEConfig, MaskedMotion, Motion, atomic_actions, random_mask
from localmotion.models.global_flow import GlobalFlow
from localmotion.models.heads import MLP
from localmotion.models.image import ImageModel
from localmotion.models.rssm import RSSM, RSSMState, kl_loss
from localmotion.suites import DMC_SUITES, ENDS


@dataclass(frozen=True)
class DRPConfig:
    """Settings of DRP. Defaults are the paper's."""

    motion_encoder: Literal["atomic", "global"] = "atomic"
    """atomic: Atomic Actions through the DAE; global: one convolutional code of the whole flow field (the ablation of Fig. 5b)."""
    dae: DAEConfig = field(default_factory=DAEConfig)
    world: WorldModelConfig = field(default_factory=WorldModelConfig)
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    adapter: Literal["attention", "mlp", "linear"] = "attention"
    """Module between z and the action-specific dynamics; mlp is the ablation of Fig. 13."""
    embed_input: bool = False
    """The posterior of s also observes the image embedding (IPV's release on DMC; the default there). Off: Eq. 3."""
    joint_gradient: bool = True
    """The latent dynamics loss trains [MAT] and the DAE."""
    recompose_weight: float = 0.0
    """Weight of a loss that is not in the paper: it rebuilds all patches from a^agg and their coordinates alone. Without it [MAT]
    learns only what helps to draw the next frame (studies/probes)."""
    beta_z: float = 1.0
    """KL weight beta_z of the latent dynamics (Table 5)."""
    beta_z_finetune: float | None = None
    """KL weight of the latent dynamics in fine-tuning; None: `beta_z`, as in the paper. IPV's released code uses 0, and so do the suites
    of DeepMind Control by default."""
    free_nats_z: float = 0.0
    """Free nats of the latent dynamics' KL, in pre-training and fine-tuning. Not in the paper."""
    beta_s: float = 1.0
    """Action-conditional KL weight beta_s (Table 5)."""
    beta_r: float = 1.0
    """Representative reward predictor weight beta_r (Table 5)."""
    intrinsic_weight: float = 1.0
    """Intrinsic reward weight lambda: 1.0 Meta-World, 0.1 DMC (Table 5)."""
    free_nats: float = 0.0
    """Free nats of the action-conditional KL: 0 Meta-World, 1 DMC (IPV's release)."""
    slow_image: bool = False
    """In fine-tuning the image encoder and decoder learn as slowly as the rest of theta (Algorithm 2). Off: at the full rate."""
    context_erasing: bool = False
    """Random erasing on the context frame in fine-tuning (IPV's release: on for Meta-World except drawer-open)."""
    LIMITS: ClassVar[Limits] = {
        **at_least(0, "recompose_weight", "beta_z", "free_nats_z", "beta_s", "beta_r", "intrinsic_weight", "free_nats")
    }


class Carry(NamedTuple):
    """What acting keeps between agent steps."""

    motion: DAECache | None  # of the window's Atomic Actions; None for global flow, which encodes each frame separately
    latent: RSSMState  # z
    state: RSSMState  # s
    action: Tensor  # (B, A), the one that leads to the next frame


class DRP(Method):
    """Deconstruct-Recompose Paradigm."""

    name = "drp"
    paper = "arXiv 2607.00808"
    Config = DRPConfig
    stages = FROM_VIDEO
    wants = MOTION
    rehearses = frozenset({"finetune", "train"})
    transfers = same("motion", "image", "latent")
    # As in IPV, which the paper follows where it is silent.
    SUITES = {
        **ENDS,
        **{suite: {"model": {"embed_input": True, "beta_z_finetune": 0.0}} for suite in DMC_SUITES},
        "metaworld:drawer-open": {"model": {"context_erasing": False}},
    }
    PRESETS = presets(
        own={
            "small": {"dae": {"keypoints": 16, "blocks": 2, "dim": 64}},
            "tiny": {"dae": {"keypoints": 8, "patch": 8, "blocks": 1, "dim": 32, "heads": 2}},
            "debug": {"dae": {"keypoints": 4, "patch": 8, "blocks": 2, "dim": 16, "heads": 2}},
        }
    )

    def __init__(self, config: DRPConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        world = config.world
        # Deconstruct (zeta), recompose (theta)
        self.motion: MaskedMotion | GlobalFlow
        if config.motion_encoder == "global":
            if not config.joint_gradient:
                raise ConfigError(
                    "joint_gradient=false leaves motion_encoder=global without any loss; only Atomic Actions have their own"
                )
            self.motion = GlobalFlow(config.dae)
        else:
            self.motion = MaskedMotion(config.dae, from_code=config.recompose_weight > 0)
        self.image = ImageModel(world, image_size=image_size)
        self.latent = RSSM.configured(world, embed_dim=self.image.embed_dim, action_dim=config.dae.code_dim)
        if action_dim is None:
            return
        # Adapter (omega), action-specific dynamics (phi), rewards (varphi), actor (psi), critic (xi)
        feat = self.latent.feat_dim
        self.adapter = make_adapter(config.adapter, deter=world.deter, stoch=world.stoch, classes=world.classes, out_dim=feat)
        embed = feat + (self.image.embed_dim if config.embed_input else 0)
        self.dynamics = RSSM.configured(world, embed_dim=embed, action_dim=action_dim)
        self.reward = MLP(feat, 1, units=world.units, layers=world.layers)  # behavioural: r + lambda r_int
        self.reward_representative = MLP(feat, 1, units=world.units, layers=world.layers)  # r
        self.bonus = IntrinsicBonus(feat)
        self.behaviour = ActorCritic.configured(feat, action_dim, world, config.behaviour)
        self.continuation = make_continuation(config.behaviour, feat, units=world.units, layers=world.layers)

    @classmethod
    def lengths(cls, config: DRPConfig, stage: str) -> tuple[int, int | None]:
        return (2 if stage == "pretrain" else WINDOW), None if config.motion_encoder == "global" else config.dae.max_length

    # 1. Pre-training on videos (Algorithm 1) ----------------------------------------------------------------------------------

    def pretrain_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of Eqs. 5 and 6 on video segments."""
        truth = self.image.pixels(batch["image"])  # (B*T, ...)
        embed, context = self.image.encode(truth, batch["image"])  # (B, T, E)
        agg, motion_losses = self._recompose(batch)  # (B, T, M)
        post, prior_logits = self.latent.observe(embed, agg, batch["is_first"])  # state, (B, T, S, C)
        (image,) = self.image.losses([self.latent.feat(post)], context, truth)
        kl, metrics = kl_loss(post.logits, prior_logits, balance=self.config.world.kl_balance, free=self.config.free_nats_z)
        metrics = {**{f"latent/{key}": value for key, value in metrics.items()}, "agg/std": agg.detach().float().std()}
        return {**motion_losses, "image": image, "kl": kl}, metrics

    def _recompose(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """a^agg (B,T,M), and the losses of the module `motion`: "masked" (Eqs. 5 and 7) for Atomic Actions, none for global flow."""
        if isinstance(self.motion, GlobalFlow):
            return self.motion(batch["flow"]), {}
        atomic = self._atomic_actions(batch)
        agg, _, masked = self.motion(atomic, batch["is_first"].cumsum(1))
        losses = {"masked": masked}
        if self.config.recompose_weight:
            losses["recompose"] = self.motion.loss_from_code(agg, atomic)
        return agg if self.config.joint_gradient else agg.detach(), losses

    def _atomic_actions(self, batch: Batch) -> Motion:
        """Atomic Actions of a batch: patches (B,T,K,P,P,2), coordinates (B,T,K,2), visibility and track (B,T,K)."""
        assert isinstance(self.motion, MaskedMotion)
        return self.motion.scaled(
            atomic_actions(batch["flow"], batch["tracks"], batch["visible"], batch["track_id"], self.config.dae)
        )

    # 2. Fine-tuning in the environment (Algorithm 2) --------------------------------------------------------------------------

    def world_model_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], RSSMState]:
        """Losses of Eqs. 7 to 9, metrics, and the posterior states (B*T, ...) of s."""
        config, is_first = self.config, batch["is_first"]
        truth = self.image.pixels(batch["image"])  # (B*T, ...)
        # Deconstruct (Eq. 7), recompose (Eq. 8)
        embed, context = self.image.encode(truth, batch["image"], erase=config.context_erasing)  # (B, T, E)
        agg, motion_losses = self._recompose(batch)  # (B, T, M)
        latent, latent_prior = self.latent.observe(embed, agg, is_first)  # state, (B, T, S, C)
        latent_feat = self.latent.feat(latent)  # (B, T, F)
        latent_kl, _ = kl_loss(latent.logits, latent_prior, balance=config.world.kl_balance, free=config.free_nats_z)
        # Action-specific dynamics (Eq. 9)
        observed = self.adapter(latent_feat)  # (B, T, F)
        if config.embed_input:
            observed = torch.cat([embed, observed], -1)  # (B, T, E + F)
        state, prior = self.dynamics.observe(observed, batch["action"], is_first)  # state, (B, T, S, C)
        feat = self.dynamics.feat(state)  # (B, T, F)
        kl, metrics = kl_loss(state.logits, prior, balance=config.world.kl_balance, free=config.free_nats)
        latent_image, image = self.image.losses([latent_feat, feat], context, truth)  # from z (Eq. 8) and s (Eq. 9), one call
        # The representative head learns r at all T, the behavioural one r + lambda r_int: where a bonus window fits, and at an end.
        bonus = self.bonus(latent_feat.detach().float(), is_first)  # (B, T - 4)
        behavioural = self.reward(feat).squeeze(-1)  # (B, T)
        representative = self.reward_representative(feat).squeeze(-1)  # (B, T)
        losses = {
            **motion_losses,
            "latent_image": latent_image,
            "latent_kl": latent_kl,
            "image": image,
            "kl": kl,
            **dual_reward_losses(behavioural, representative, batch, bonus, weight=config.intrinsic_weight),
            **continuation_losses(self.continuation, feat, batch),
        }
        metrics = {**{f"dynamics/{key}": value for key, value in metrics.items()}, "bonus/mean": bonus.mean()}
        return losses, metrics, state.starts()

    def behaviour_losses(self, start: RSSMState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.behaviour.losses(start, self.dynamics, lambda feat: self.reward(feat).squeeze(-1), self.continuation)

    def loss_scales(self, stage: str) -> dict[str, float]:
        config, world = self.config, self.config.world
        motion_scales = {} if isinstance(self.motion, GlobalFlow) else {"masked": 1.0}
        if motion_scales and config.recompose_weight:
            motion_scales["recompose"] = config.recompose_weight
        if stage == "pretrain":
            return {**motion_scales, "image": world.image_weight, "kl": config.beta_z}
        return {
            **motion_scales,
            "latent_image": world.image_weight,
            "latent_kl": config.beta_z if config.beta_z_finetune is None else config.beta_z_finetune,
            "image": world.image_weight,
            "kl": config.beta_s,
            "reward": world.reward_weight,
            "reward_representative": config.beta_r * world.reward_weight,
            **continuation_scales(config.behaviour),
        }

    def passes(self, stage: str) -> tuple[Pass, ...]:
        if stage == "pretrain":
            return video_pass(self, self.loss_scales(stage))
        return imagination_passes(self, self.loss_scales(stage), ("motion", "encoder", "model"))

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        if stage == "pretrain":
            return [Group("model", list(self.parameters()), rates.lr)]
        slow: list[nn.Parameter] = []
        new: list[nn.Parameter] = []
        held = rates.loads("image")
        slowly = self.config.slow_image and held
        (slow if slowly else new).extend(self.image.decoder_parameters())
        for name in ("motion", "latent"):  # a part that no checkpoint gives learns at the full rate
            (slow if rates.loads(name) else new).extend(getattr(self, name).parameters())
        for module in (self.adapter, self.dynamics, self.reward, self.reward_representative, self.continuation):
            new.extend(module.parameters() if module else ())
        factor = rates.slow if slowly else 1.0
        return [
            *([Group("motion", slow, rates.lr * rates.slow, rates.freeze_updates)] if slow else []),
            Group("encoder", self.image.encoder_parameters(), rates.lr * factor, rates.freeze_updates if held else 0),
            Group("model", new, rates.lr),
            *behaviour_groups(self.behaviour, rates),
        ]

    def after_update(self, counters: Counters) -> None:
        if counters.stage in self.acts_after:
            self.behaviour.after_update()

    # 3. Acting and looking ----------------------------------------------------------------------------------------------------

    def initial_carry(self, batch_size: int) -> Carry:
        device = next(self.parameters()).device
        return Carry(
            self.motion.encoder.start(batch_size, device) if isinstance(self.motion, MaskedMotion) else None,
            self.latent.initial(batch_size),
            self.dynamics.initial(batch_size),
            torch.zeros(batch_size, self.action_dim, device=device),
        )

    def act(self, obs: Batch, carry: Carry, *, explore: bool, window: int = 32) -> tuple[Tensor, Carry]:
        """One agent step. It computes the tokens of the newest frame only; ``window`` is the training length."""
        is_first = obs["is_first"][:, 0]
        agg, cache = self._recompose_step(obs, carry.motion, window)
        embed = self.image.embed(obs["image"])
        latent = self.latent.obs_step(carry.latent, agg, embed, is_first)
        observed = self.adapter(self.latent.feat(latent))
        if self.config.embed_input:
            observed = torch.cat([embed, observed], -1)
        state = self.dynamics.obs_step(carry.state, carry.action, observed, is_first)
        action = self.behaviour.act(self.dynamics.feat(state), explore=explore)
        return action, Carry(cache, latent, state, action)

    def _recompose_step(self, obs: Batch, cache: DAECache | None, window: int) -> tuple[Tensor, DAECache | None]:
        """a^agg (B,M) of the newest frame, and the cache for the next agent step."""
        if isinstance(self.motion, GlobalFlow):
            return self.motion(obs["flow"])[:, 0], None
        assert cache is not None
        return self.motion.encoder.step(cache, self._atomic_actions(obs), window)

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Prior rolled out after ``context`` frames with the real motion (paper, Fig. 8), and a second time with a^agg = 0.

        "motion" knows how the tracked points move after the context. "zero_motion" has no information from the future.
        """
        truth = self.image.pixels(batch["image"])  # (B*T, ...)
        embed, maps = self.image.encode(truth, batch["image"], frame=context - 1)  # the last frame that is observed
        agg = self.motion_code(batch)  # (B, T, M)
        post, _ = self.latent.observe(embed[:, :context], agg[:, :context], batch["is_first"][:, :context])
        out = {}
        for name, actions in (("motion", agg), ("zero_motion", torch.zeros_like(agg))):
            feat = self.latent.open_loop(post, actions[:, context:])  # (B, T, F)
            out[name] = self.image.pictures(feat, maps)
        return out

    def masked_reconstruction(self, batch: Batch, generator: torch.Generator) -> tuple[Motion, Tensor, Tensor] | None:
        if isinstance(self.motion, GlobalFlow):
            return None
        atomic = self._atomic_actions(batch)
        masked = random_mask(atomic.visible, self.config.dae.mask_ratio, generator)  # (B, T, K)
        return atomic, masked, self.motion.reconstruct(atomic, masked, batch["is_first"].cumsum(1))

    def motion_code(self, batch: Batch) -> Tensor:
        if isinstance(self.motion, GlobalFlow):
            return self.motion(batch["flow"])
        return self.motion.encode(self._atomic_actions(batch), batch["is_first"].cumsum(1))[0]
