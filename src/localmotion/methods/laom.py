"""LAOM: a latent action model with wide latent actions that predicts codes instead of pictures, for videos with distractors.

Paper: "Latent Action Learning Requires Supervision in the Presence of Distractors", arXiv 2502.00379.

    pretrain   x = E(aug(o_{t-2..t})),  x_k = E(aug(o_{t+k-2..t+k})), k uniform in 1..offset;  z_t = IDM(x, x_k)
               E |FDM(sg(x), z_t) - sg(E'(aug(o_{t-1..t+1})))|^2, E' a slow copy of E:  E' <- (1 - tau) E' + tau E
               with `supervised`: + action_weight * E |W z - a|^2 on a second batch, of labelled transitions
    clone      E |pi(o_{t-2..t}) - z_t|^2, z_t of the frozen models with k = 1, no augmentation
    decode     E |head(pi(o_{t-2..t})) - a_t|^2 on labelled transitions, pi frozen
    finetune   PPO from the cloned policy, while the decoder learns from the latent actions of rollouts, as in LAPO (methods/lapo.py)

Position t of a batch has the action that LED TO frame t (docs/decisions/0001), so a_t above is ``action[t + 1]``. sg stops the
gradient: E learns through the inverse model only.

What the paper leaves open, or what differs here:

* Sequences may begin with copies of an episode's first frame (docs/decisions/0019), as the release pads stacks. A clip that is cut out of
  a longer video counts as an episode.
* `supervised` labels the first transitions in a seeded order of the episodes (`recording.logs.label_set`); the release labels whole
  trajectories of a random choice. A budget that ends with an episode gives the same.
* Labelled actions are clipped to [-1, 1]. The linear layer W has `action_pad` outputs; those beyond the actions learn nothing.
* `finetune` is LAPO's; the paper has no such stage.
* It predicts no pictures, so `localmotion predict` cannot show it.

Shapes: B sequences, T positions, n windows of a sequence, N = B * n, S side, E numbers of a code, Z numbers of z, A actions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from localmotion import ranks
from localmotion.errors import ConfigError
from localmotion.limits import Limits, at_least, shares
from localmotion.methods.base import (
    LABELS,
    LATENT_ACTIONS,
    NO_AGENT_RATES,
    Batch,
    Counters,
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
from localmotion.models.augmentation import augment
from localmotion.models.latent_actions import ActionHead, LatentHead, PooledEncoder, StridedEncoder, orthogonal_
from localmotion.models.latent_windows import (
    action_error,
    decoding_error,
    every,
    newest,
    pictures,
    played_steps,
    r_squared,
    stacks,
    starts,
)
from localmotion.models.ppo import EXTRAS, DecoderPPOConfig, RewardHeads, rollout_losses

STACK = 3
"""Frames that a model sees at once."""


@dataclass(frozen=True)
class LAOMConfig:
    """Settings of LAOM. Defaults are the paper's."""

    latent: int = 8192
    """Numbers of a latent action, without quantiser."""
    widths: tuple[int, ...] = (96, 192, 192)
    """Channels of the stages of the encoder."""
    units: int = 1024
    """Width of the inverse and the forward model."""
    offset: int = 10
    """Largest distance k from the current frame to the newest one that the inverse model sees."""
    tau: float = 0.001
    """Share by which the slow copy of the encoder follows it in an update."""
    augmented: bool = True
    """Shift, turn or distort pictures in the first stage."""
    supervised: bool = False
    """Learn actions from labelled transitions (`labels`) in the first stage too. The clip store then needs logged episodes."""
    action_weight: float = 0.001
    """Weight of that loss."""
    action_pad: int = 64
    """Outputs of its linear layer: the largest number of actions."""
    policy_widths: tuple[int, ...] = (512, 1024, 1024)
    """Channels of the stages of the policy."""
    head_widths: tuple[int, ...] = (256, 256)
    """Hidden layers of the decoder from latent actions to actions."""
    warmup: int = 0
    """Updates over which the learning rate of the first stage rises; the paper: 3 of 10 epochs (preset `paper`)."""
    noise: float = 0.1
    """Standard deviation of the noise on actions while exploring, before `finetune`."""
    ppo: DecoderPPOConfig = field(default_factory=DecoderPPOConfig)
    """Settings of the stage `finetune`."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "latent", "units", "offset"),
        **at_least(0, "action_weight", "action_pad", "warmup", "noise"),
        **shares("tau"),
    }


class LAOM(Method):
    """Latent action model in the space of codes."""

    name = "laom"
    paper = "arXiv 2502.00379"
    Config = LAOMConfig
    stages = LATENT_ACTIONS
    unread = NO_AGENT_RATES
    acts_after = frozenset({"decode", "finetune"})
    begins = {"clone": "pretrain", "decode": "clone", "finetune": "clone"}
    extras = EXTRAS
    wants = LABELS
    transfers = same("encoder", "target", "inverse", "dynamics", "policy", "head")
    PRESETS = latent_presets(
        paper={
            "optim": {"eps": 1e-8, "clip": 1e9},
            "model": {"warmup": 29_297},
            "pretrain": {"updates": 97_656, "batch_size": 512, "length": 13, "lr": 1e-4, "lr_decay": 0.7},
            "online": {"updates": 2_500, "batch_size": 512, "length": 4, "lr": 3e-4, "lr_decay": 1.0},
            "stages": {"clone": {"pretrain": {"length": 4, "lr_decay": 1.0}}, "decode": {"labels": 128_000}},
        },
        small={"latent": 1024, "widths": (32, 64, 64), "units": 256, "policy_widths": (32, 64, 64)},
        tiny={"latent": 256, "widths": (16, 32, 32), "units": 128, "policy_widths": (16, 32, 32), "head_widths": (128, 128)},
        debug={
            "latent": 16,
            "widths": (4, 4, 8),
            "units": 16,
            "policy_widths": (4, 4, 8),
            "head_widths": (8,),
            "offset": 3,
        },
    )

    def __init__(self, config: LAOMConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        latent, units = config.latent, config.units
        self.encoder = StridedEncoder(STACK * 3, config.widths, image_size)
        code = self.encoder.embed_dim
        self.inverse = LatentHead(2 * code, 2 * code, units, latent)
        self.dynamics = LatentHead(code + latent, latent, units, code)
        self.policy = PooledEncoder(STACK * 3, config.policy_widths, image_size, latent)
        if config.supervised:
            self.labels = nn.Linear(latent, config.action_pad)
        if action_dim is not None:
            self.head = ActionHead(latent, config.head_widths, action_dim, nn.ReLU6, first=False)
        orthogonal_(self)
        if action_dim is not None:
            ppo = config.ppo
            self.heads = RewardHeads(self.policy.features, action_dim, log_std=ppo.log_std, noise=config.noise)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        return STACK + (config.offset if stage == "pretrain" else 1), None

    @classmethod
    def lead(cls, config: Any, stage: str) -> int:
        return STACK - 1

    @classmethod
    def needs(cls, config: Any, stage: str) -> frozenset[str]:
        return LABELS if stage == "pretrain" and config.supervised else frozenset()

    @classmethod
    def origins(cls, config: Any, stage: str) -> tuple[str, ...]:
        return latent_origins(stage, config.ppo)

    # 1. Latent actions ----------------------------------------------------------------------------------------------------------

    def _seen(self, stack: Tensor) -> Tensor:
        """Stacks (N, 9, S, S), in the first stage each changed at random."""
        return augment(stack) if self.config.augmented else stack

    def _latents(self, now: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """Stacks (N, 9, S, S) before and after -> the code of the first (N, E) and the latent action between them (N, Z)."""
        code, after = self.encoder(now).flatten(1), self.encoder(later).flatten(1)
        both = torch.cat([code, after], 1)
        return code, self.inverse(both, both)

    def _later(self, ends: Tensor) -> Tensor:
        """Positions 1 to ``offset`` after ``ends`` (B, n), at random."""
        return ends + 1 + torch.randint(self.config.offset, tuple(ends.shape), device=ends.device)

    def pretrain_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The error of the predicted code, and with `supervised` that of the actions, for every window of STACK + offset frames."""
        frames = 2 * pictures(batch["image"])  # in [-1, 1]
        ends = every(frames, STACK - 1, frames.shape[1] - 1 - self.config.offset)  # (B, n)
        now, later = stacks(frames, ends, STACK), stacks(frames, self._later(ends), STACK)
        code, z = self._latents(self._seen(now), self._seen(later))
        with torch.no_grad():
            target = self.target(self._seen(stacks(frames, ends + 1, STACK))).flatten(1).float()
        found = self.dynamics(torch.cat([code.detach(), z], 1), z).float()
        losses, metrics = {"code": (found - target).square().mean()}, {"code/r2": r_squared(found, target)}
        if self.config.supervised:
            losses["action"], metrics["action/r2"] = self._action_error(batch)
        return losses, metrics

    def _action_error(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Error of the actions that a linear layer reads from latent actions, over steps whose frames are of one episode; R^2."""
        if batch["labelled_action"].shape[-1] > self.config.action_pad:
            raise ConfigError(
                f"action_pad={self.config.action_pad}: the episodes have {batch['labelled_action'].shape[-1]} actions"
            )
        frames = 2 * pictures(batch["labelled_image"])
        ends = every(frames, STACK - 1, frames.shape[1] - 1 - self.config.offset)
        later, begin = self._later(ends), starts(batch["labelled_is_first"])
        rows = torch.arange(len(frames), device=frames.device)[:, None]
        known = (begin[rows, later] == begin[rows, ends - STACK + 1]).flatten().float()  # (N,)
        _, z = self._latents(self._seen(stacks(frames, ends, STACK)), self._seen(stacks(frames, later, STACK)))
        true = batch["labelled_action"][rows, ends + 1].flatten(0, 1).float().clamp(-1, 1)  # (N, A)
        found = self.labels(z).float()[:, : true.shape[1]]
        loss = (known * (found - true).square().mean(-1)).sum() / ranks.weighed(known)
        return loss, r_squared(found, true, known)

    def after_update(self, counters: Counters) -> None:
        if counters.stage == "pretrain":
            with torch.no_grad():
                for slow, fast in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
                    slow.lerp_(fast, self.config.tau)

    # 2. A policy over latent actions --------------------------------------------------------------------------------------------

    def clone_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The policy learns the latent actions of the frozen models from the frames before the step."""
        frames = 2 * pictures(batch["image"])
        ends = every(frames, STACK - 1, frames.shape[1] - 2)
        now = stacks(frames, ends, STACK)
        with torch.no_grad():
            target = self._latents(now, stacks(frames, ends + 1, STACK))[1].float()  # (N, Z)
        found = self.policy(now).float()
        return {"latent": (found - target).square().mean()}, {"latent/r2": r_squared(found, target)}

    # 3. A decoder to actions, and acting ----------------------------------------------------------------------------------------

    def _chosen(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """For stacks (N, 9, S, S) in [-0.5, 0.5] the policy's features (N, F) and its latent action (N, Z)."""
        return self.policy.both(2 * stack)

    def decode_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The head learns the logged actions from the frozen policy's latent actions."""
        return decoding_error(lambda stack: self._chosen(stack)[1], self.head, batch, STACK)

    def initial_carry(self, batch_size: int) -> Tensor:
        shape = (batch_size, STACK, self.image_size, self.image_size, 3)
        return torch.zeros(shape, dtype=torch.uint8, device=self.policy.project.weight.device)

    def act(self, obs: Batch, carry: Tensor, *, explore: bool, window: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        carry = newest(carry, obs)
        features, z = self._chosen(pictures(carry).flatten(1, 2))
        action, extras = self.heads.act(self.head(z), features, explore)
        return action, carry, extras

    # 4. Learning by reward ------------------------------------------------------------------------------------------------------

    def reward_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """PPO's losses of a rollout, through the frozen decoder and the policy."""
        return rollout_losses(self._chosen, self.head, self.heads, batch, STACK, self.config.ppo)

    def pair_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The decoder learns the actions of a rollout from the latent actions of the frozen inverse model."""
        frames = 2 * pictures(batch["image"])
        ends, begin, known = played_steps(batch["is_first"], STACK)
        with torch.no_grad():
            z = self._latents(stacks(frames, ends, STACK, begin), stacks(frames, ends + 1, STACK, begin))[1].float()  # (N, Z)
        losses, metrics = action_error(self.head, z, batch, known)
        return losses, metrics

    # Stages ---------------------------------------------------------------------------------------------------------------------

    def loss_scales(self, stage: str) -> dict[str, float]:
        first = {"code": 1.0} | ({"action": self.config.action_weight} if self.config.supervised else {})
        return latent_scales(stage, first, self.config.ppo)

    def passes(self, stage: str) -> tuple[Pass, ...]:
        return latent_passes(self, stage, self.loss_scales(stage), self.config.ppo.decoder_until)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        if stage == "finetune":
            return reward_groups(self, self.config.ppo, rates)
        if stage == "pretrain":
            parts = ("encoder", "inverse", "dynamics", *(("labels",) if self.config.supervised else ()))
            return [Group("model", trained(self, *parts), rates.lr, warmup=self.config.warmup, weight_decay=0.0)]
        part = "policy" if stage == "clone" else "head"
        return [Group("model", trained(self, part), rates.lr, optimizer="adamw", weight_decay=0.01)]

    # Looking --------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def motion_code(self, batch: Batch) -> Tensor:
        """The latent action that led to each frame, with k = 1, (B, T, Z)."""
        frames, begin = 2 * pictures(batch["image"]), starts(batch["is_first"])
        now = every(frames, 0, frames.shape[1] - 1)
        z = self._latents(stacks(frames, now - 1, STACK, begin), stacks(frames, now, STACK, begin))[1]
        return z.float().unflatten(0, now.shape)
