"""LAPO: latent actions from videos without actions, a policy over latent actions, and a decoder that a few labels train.

Paper: "Learning to Act without Actions", arXiv 2312.10812. `form=continuous` is the LAPO of the MaskLAM study (arXiv 2602.02259).

    pretrain   z_t = IDM(o_{t-1}, o_t, o_{t+1});  o^_{t+1} = FDM(o_{t-1}, o_t, q(z_t));  E |o^ - o|^2 + commitment loss of q
    clone      E |pi(o_t) - z_t|^2, z_t of the frozen IDM, before quantisation
    decode     E |head(pi(o_t)) - a_t|^2 on labelled transitions, pi frozen. a_t leads from o_t to o_{t+1}
    finetune   PPO of a_t ~ N(0.5 (head(pi(o_t)) + rl(f_t)), std), f_t the features of pi; and E |head(z_t) - a_t|^2 on the same rollouts,
               z_t of the frozen IDM (`models.ppo`, `methods.latent_stages`)

Position t of a batch has the action that LED TO frame t (docs/decisions/0001), so a_t above is ``action[t + 1]``.

What the paper and its release leave open, or what differs here:

* The release acts in Procgen, with discrete actions: their logits are the mean of the decoder's and of a new head's. Here actions are
  continuous, so the two give the mean of a normal distribution, and its deviation is learned. Actions are clipped to [-1, 1], and their
  probability is that of the clipped action. The learning rate is 3e-4 (release: 1e-2).
* The release trains the decoder from scratch at intervals. Here it learns in every update, in a pass of its own after PPO's, on the steps
  of the minibatch: a pass has no memory of earlier rollouts, and a decoder that goes on needs none. PPO does not change it.
* `finetune` has two rates in place of the release's schedules: the policy is frozen for `freeze_updates` and then learns at
  `pretrained_lr_factor` of the rate of the new heads.
* A minibatch has whole rollouts of some environments, and the gradients of the policy, of the new heads and of the decoder are clipped
  separately. The first steps of a rollout whose stacks reach back before it have no loss. The value of a last frame, which nothing acted
  on, is that of the network now. Values have no clipped loss, and rewards are scaled by a fixed number.
* The stage `decode` is not LAPO's: it trains the decoder on logged episodes, as in the MaskLAM study. `finetune` may start from it.
* The optimiser: AdamW with weight decay 0.01 in all stages. The learning rate rises from 0 (release: from a tenth) and falls linearly
  to 0 (release: to a hundredth in the first stage).
* The quantiser's counts begin at one (`models.latent_actions.Quantizer` says why).
* `flow_weight` is not LAPO's: a second decoder has to give the optical flow between the two frames from z and the frames before, so
  z codes motion, not change of light.

Shapes: B sequences, T positions, n windows of a sequence, N = B * n, S side, Z numbers of z, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from localmotion.errors import ConfigError
from localmotion.limits import Limits, at_least, shares
from localmotion.methods.base import (
    LATENT_ACTIONS,
    MOTION,
    NO_AGENT_RATES,
    Batch,
    Group,
    Losses,
    Method,
    Metrics,
    Pass,
    Rates,
    same,
    trained,
)
from localmotion.methods.latent_stages import latent_origins, latent_passes, latent_scales, reward_groups
from localmotion.methods.sizes import latent_presets
from localmotion.models.latent_actions import (
    ActionHead,
    InverseModel,
    LatentEncoder,
    Quantizer,
    ResidualForward,
    UNet,
    orthogonal_,
)
from localmotion.models.latent_windows import (
    action_error,
    decoding_error,
    every,
    frozen,
    futures,
    newest,
    pictures,
    played_steps,
    r_squared,
    roll_out,
    stacks,
    starts,
)
from localmotion.models.ppo import EXTRAS, DecoderPPOConfig, RewardHeads, rollout_losses

MOTION_SCALE = 1 / 16
"""Flow is measured in this share of the picture's side: 4 pixels of 64."""


@dataclass(frozen=True)
class LAPOConfig:
    """Settings of LAPO. Defaults are those of the release."""

    form: Literal["vq", "continuous"] = "vq"
    """vq: the release (2 frames before a step, quantised latent actions, U-Net). continuous: the baseline of the MaskLAM study
    (3 frames, latent actions without quantiser, residual forward model, policy on 3 frames)."""
    latent: int = 128
    """Numbers of a latent action. With `form=vq` it is codebooks x positions x 16, so a multiple of 16 * codebooks."""
    widths: tuple[int, ...] = (64, 128, 128)
    """Channels of the stages of the inverse model and the policy."""
    hidden: int = 256
    """Width of their hidden layer. With `form=continuous` there is none."""
    base: int = 24
    """Channels of the U-Net's first level; each level doubles them."""
    forward_widths: tuple[int, ...] = (96, 192, 192)
    """Channels of the stages of the residual forward model (`form=continuous`, and the flow decoder)."""
    codebooks: int = 2
    """Number of codebooks of the quantiser."""
    codes: int = 64
    """Vectors of a codebook."""
    code_decay: float = 0.999
    """Decay of the averages that codes follow."""
    commitment: float = 0.05
    """Weight of the loss that keeps latent actions near their codes."""
    flow_weight: float = 0.0
    """Weight of the flow decoder's loss; 0: no flow decoder. Above 0, clips need flow."""
    head_widths: tuple[int, ...] = (192, 128, 64)
    """Hidden layers of the decoder from latent actions to actions."""
    warmup: int = 50
    """Updates over which the learning rate of the first stage rises."""
    clone_warmup: int = 1_000
    """The same in the stage `clone`."""
    decay: float = 0.01
    """Weight decay of AdamW."""
    noise: float = 0.1
    """Standard deviation of the noise on actions while exploring, before `finetune`."""
    ppo: DecoderPPOConfig = field(default_factory=DecoderPPOConfig)
    """Settings of the stage `finetune`."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "latent", "hidden", "base", "codebooks", "codes"),
        **at_least(0, "commitment", "flow_weight", "warmup", "clone_warmup", "decay", "noise"),
        **shares("code_decay"),
    }


class LAPO(Method):
    """Latent action policies."""

    name = "lapo"
    paper = "arXiv 2312.10812"
    Config = LAPOConfig
    stages = LATENT_ACTIONS
    unread = NO_AGENT_RATES
    acts_after = frozenset({"decode", "finetune"})
    begins = {"clone": "pretrain", "decode": "clone", "finetune": "clone"}
    extras = EXTRAS
    wants = MOTION
    transfers = same("inverse", "dynamics", "policy", "head")
    PRESETS = latent_presets(
        paper={
            "optim": {"eps": 1e-8, "clip": 2.0},
            "pretrain": {"updates": 50_000, "batch_size": 128, "length": 3, "lr": 3e-4, "lr_decay": 1.0},
            "stages": {"clone": {"pretrain": {"updates": 60_000, "lr": 2e-4}}},
        },
        pretrain={"small": {"length": 8}, "tiny": {"length": 8, "batch_size": 8}},  # as many windows as MaskLAM has
        small={"clone_warmup": 50, "widths": (32, 64, 64), "base": 12, "forward_widths": (32, 64, 64)},
        tiny={"clone_warmup": 50, "widths": (16, 32, 32), "hidden": 128, "base": 8, "forward_widths": (16, 32, 32), "latent": 64},
        debug={
            "warmup": 2,
            "clone_warmup": 2,
            "widths": (4, 4, 8),
            "hidden": 16,
            "base": 2,
            "forward_widths": (4, 4, 8),
            "latent": 32,
            "head_widths": (8,),
        },
    )

    def __init__(self, config: LAPOConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        quantised = config.form == "vq"
        self.before = 2 if quantised else 3
        """Frames before a step that the forward model sees; the inverse model also sees the one after it."""
        self.seen = 1 if quantised else 3
        """Frames that the policy sees."""
        hidden = config.hidden if quantised else 0
        encoder = LatentEncoder(3 * (self.before + 1), config.widths, image_size, config.latent, hidden)
        self.policy = LatentEncoder(3 * self.seen, config.widths, image_size, config.latent, hidden)
        if quantised:
            if config.latent % (16 * config.codebooks) or not config.latent:
                raise ConfigError(f"latent={config.latent}: must be a multiple of 16 * codebooks, {16 * config.codebooks}")
            self.dynamics: UNet | ResidualForward = UNet(3 * self.before, config.latent, image_size, config.base)
            positions = config.latent // (16 * config.codebooks)
            quantizer = Quantizer(config.codebooks, positions, 16, config.codes, config.code_decay, config.commitment)
            self.inverse = InverseModel(encoder, quantizer)
        else:
            self.inverse = InverseModel(encoder)
            self.dynamics = ResidualForward(3 * self.before, config.forward_widths, config.latent, image_size)
            for module in (self.inverse, self.policy, self.dynamics):
                orthogonal_(module)
        if config.flow_weight > 0:
            self.flow = ResidualForward(3 * self.before, config.forward_widths, config.latent, image_size, 2, bounded=False)
        if action_dim is not None:
            self.head, ppo = ActionHead(config.latent, config.head_widths, action_dim), config.ppo
            self.heads = RewardHeads(self.policy.features, action_dim, log_std=ppo.log_std, noise=config.noise)

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        frames = 2 if config.form == "vq" else 3  # those before a step
        return (2 if stage == "decode" and config.form == "vq" else frames + 1), None

    @classmethod
    def lead(cls, config: Any, stage: str) -> int:
        # The first step of a sequence of the least length then begins with an episode's first frame.
        return cls.lengths(config, stage)[0] - 2

    @classmethod
    def needs(cls, config: Any, stage: str) -> frozenset[str]:
        return MOTION if stage == "pretrain" and config.flow_weight > 0 else frozenset()

    @classmethod
    def origins(cls, config: Any, stage: str) -> tuple[str, ...]:
        return latent_origins(stage, config.ppo)

    # 1. Latent actions ----------------------------------------------------------------------------------------------------------

    def _step(self, frames: Tensor, ends: Tensor, begin: Tensor | None = None) -> Tensor:
        """What the inverse model sees of the steps from frames ``ends`` (B, n): stacks (N, 3 * (before + 1), S, S)."""
        return stacks(frames, ends + 1, self.before + 1, begin)

    def pretrain_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """Losses of the inverse and the forward model on every window of ``before`` + 1 frames."""
        frames = pictures(batch["image"])
        ends = every(frames, self.before - 1, frames.shape[1] - 2)  # (B, n)
        past, target = stacks(frames, ends, self.before), stacks(frames, ends + 1, 1)  # (N, 3 * before, S, S), (N, 3, S, S)
        code, losses, metrics = self.inverse.code(self.inverse(self._step(frames, ends)))  # (N, Z)
        losses["image"] = (self.dynamics(past, code).float() - target).square().mean()
        if self.config.flow_weight > 0:
            flow = batch["flow"].permute(0, 1, 4, 2, 3).float() / (MOTION_SCALE * self.image_size)  # (B, T, 2, S, S)
            losses["flow"] = (self.flow(past, code).float() - stacks(flow, ends + 1, 1)).square().mean()
        still = (past[:, -3:] - target).square().mean()
        return losses, {"image/of_copy": losses["image"].detach() / still.clamp(min=1e-8), **metrics}

    # 2. A policy over latent actions --------------------------------------------------------------------------------------------

    def clone_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The policy learns the latent actions of the frozen inverse model from the frames before the step."""
        frames = pictures(batch["image"])
        ends = every(frames, self.before - 1, frames.shape[1] - 2)
        target = frozen(self.inverse, self._step(frames, ends))  # (N, Z)
        found = self.policy(stacks(frames, ends, self.seen)).float()
        return {"latent": (found - target).square().mean()}, {"latent/r2": r_squared(found, target)}

    # 3. A decoder to actions, and acting ----------------------------------------------------------------------------------------

    def decode_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The head learns the logged actions from the frozen policy's latent actions."""
        return decoding_error(self.policy, self.head, batch, self.seen)

    def initial_carry(self, batch_size: int) -> Tensor:
        shape = (batch_size, self.seen, self.image_size, self.image_size, 3)
        return torch.zeros(shape, dtype=torch.uint8, device=self.policy.project.weight.device)

    def act(self, obs: Batch, carry: Tensor, *, explore: bool, window: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        carry = newest(carry, obs)
        features, z = self.policy.both(pictures(carry).flatten(1, 2))
        action, extras = self.heads.act(self.head(z), features, explore)
        return action, carry, extras

    # 4. Learning by reward ------------------------------------------------------------------------------------------------------

    def reward_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """PPO's losses of a rollout, through the frozen decoder and the policy."""
        return rollout_losses(self.policy.both, self.head, self.heads, batch, self.seen, self.config.ppo)

    def pair_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The decoder learns the actions of a rollout from the latent actions of the frozen inverse model."""
        frames = pictures(batch["image"])
        ends, begin, known = played_steps(batch["is_first"], self.before)
        losses, metrics = action_error(self.head, frozen(self.inverse, self._step(frames, ends, begin)), batch, known)
        return losses, metrics

    # Stages ---------------------------------------------------------------------------------------------------------------------

    def loss_scales(self, stage: str) -> dict[str, float]:
        first = {"image": 1.0} | ({"commitment": 1.0} if self.config.form == "vq" else {})
        first |= {"flow": self.config.flow_weight} if self.config.flow_weight > 0 else {}
        return latent_scales(stage, first, self.config.ppo)

    def passes(self, stage: str) -> tuple[Pass, ...]:
        return latent_passes(self, stage, self.loss_scales(stage), self.config.ppo.decoder_until)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        config = self.config
        if stage == "finetune":
            return reward_groups(self, config.ppo, rates)
        video = ("inverse", "dynamics", *(("flow",) if config.flow_weight > 0 else ()))
        parts = {"pretrain": video, "clone": ("policy",), "decode": ("head",)}[stage]
        warmup = {"pretrain": config.warmup, "clone": config.clone_warmup}.get(stage, 0)
        return [Group("model", trained(self, *parts), rates.lr, optimizer="adamw", weight_decay=config.decay, warmup=warmup)]

    # Looking --------------------------------------------------------------------------------------------------------------------

    def motion_code(self, batch: Batch) -> Tensor:
        """The latent action that led to each frame, before quantisation, (B, T, Z)."""
        frames = pictures(batch["image"])
        ends = every(frames, 0, frames.shape[1] - 1)
        begin = starts(batch["is_first"])
        return frozen(self.inverse, self._step(frames, ends - 1, begin)).unflatten(0, ends.shape)

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """The forward model given latent actions: the rows of `futures`."""
        frames, codes = pictures(batch["image"]), self.motion_code(batch)
        rows = futures(self.inverse.code(codes.flatten(0, 1))[0].view_as(codes), context)
        return {name: roll_out(self.dynamics, frames, latents, context, self.before) for name, latents in rows.items()}
