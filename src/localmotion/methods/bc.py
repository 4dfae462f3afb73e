"""Behaviour cloning from labelled steps alone: what a latent action model has to beat with the same labels.

Paper: "Latent Action Learning Requires Supervision in the Presence of Distractors" (LAOM), arXiv 2502.00379, supervised baselines.

    decode     E |pi(o_{t-2..t}) - a_t|^2 on labelled transitions
    decode with `relabel`:
               E |IDM(o_{t-2..t}, o_{t-1..t+1}) - a_t|^2 on labelled transitions
               E |pi(o_{t-2..t}) - sg(IDM(o_{t-2..t}, o_{t-1..t+1}))|^2 on all video: the inverse model labels it

Position t of a batch has the action that LED TO frame t (docs/decisions/0001), so a_t above is ``action[t + 1]``. sg stops the
gradient. There are no latent actions, so there is one stage. It is called `decode` as in latent action models, so that one study compares
them at the same label budgets (`--labels`).

What the paper leaves open, or what differs here:

* The release trains the inverse model first (10,000 updates) and the policy on its labels afterwards (10 epochs of all video). Here each
  update trains both. `head_start` holds the policy for the first updates. The paper's budget with `relabel` is
  ``--updates 107656 --head_start 10000``; the preset `paper` has 10,000 updates, for labels alone.
* Labelled actions are clipped to [-1, 1], and so are the inverse model's labels.
* `policy=impala` is not the paper's: the policy of LAPO and MaskLAM with MaskLAM's action head. It keeps places in the picture, which the
  paper's policy averages away. Compare like with like.

Shapes: B sequences, T positions, n windows of a sequence, N = B * n, S side, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from localmotion import ranks
from localmotion.limits import Limits, at_least
from localmotion.methods.base import AGENT_RATES, HELD_RATES, VIDEO, Batch, Group, Losses, Method, Metrics, Pass, Rates, Source
from localmotion.methods.sizes import latent_presets
from localmotion.models.latent_actions import ActionHead, LatentEncoder, LatentHead, PooledEncoder, StridedEncoder, orthogonal_
from localmotion.models.latent_windows import decoding_error, every, newest, noisy, pictures, r_squared, stacks, starts

STACK = 3
"""Frames that a model sees at once."""


@dataclass(frozen=True)
class BCConfig:
    """Settings of behaviour cloning. Defaults are those of the LAOM paper's baselines."""

    relabel: bool = False
    """Train an inverse model on the labelled transitions and the policy on the labels that it gives to all video."""
    head_start: int = 0
    """With `relabel`: the policy is held for this many first updates, in which the inverse model learns."""
    policy: Literal["pooled", "impala"] = "pooled"
    """Form of the policy. pooled: LAOM's, which averages over places. impala: that of LAPO and MaskLAM."""
    policy_widths: tuple[int, ...] = (512, 1024, 1024)
    """Channels of the stages of the policy."""
    latent: int = 128
    """With `policy=impala`: numbers between the encoder and the action head."""
    head_widths: tuple[int, ...] = (256, 256)
    """With `policy=impala`: hidden layers of the action head."""
    widths: tuple[int, ...] = (192, 384, 384)
    """Channels of the stages of the inverse model."""
    units: int = 1024
    """Width of the inverse model's head."""
    noise: float = 0.1
    """Standard deviation of the noise on actions while exploring."""
    LIMITS: ClassVar[Limits] = {**at_least(1, "latent", "units"), **at_least(0, "head_start", "noise")}


class BC(Method):
    """Behaviour cloning."""

    name = "bc"
    paper = "arXiv 2502.00379"
    Config = BCConfig
    stages = {"decode": Source.LOGGED}
    unread = {"decode": AGENT_RATES | HELD_RATES}
    acts_after = frozenset({"decode"})
    wants = VIDEO
    PRESETS = latent_presets(
        paper={
            "optim": {"eps": 1e-8, "clip": 1e9},
            "online": {"updates": 10_000, "batch_size": 512, "length": 4, "lr": 1e-4, "lr_decay": 1.0},
            "stages": {"decode": {"labels": 128_000}},
        },
        online={
            "small": {"updates": 25_000},
            "tiny": {"updates": 3_000},
        },  # of a latent action model's `clone` and `decode` together
        small={"policy_widths": (32, 64, 64), "widths": (32, 64, 64), "units": 256},
        tiny={"policy_widths": (16, 32, 32), "widths": (16, 32, 32), "units": 128, "latent": 64},
        debug={"policy_widths": (4, 4, 8), "widths": (4, 4, 8), "units": 16, "latent": 16, "head_widths": (8,)},
    )

    def __init__(self, config: BCConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        actions = self.action_dim
        if config.policy == "pooled":
            self.policy: nn.Module = PooledEncoder(STACK * 3, config.policy_widths, image_size, actions)
        else:
            encoder = LatentEncoder(STACK * 3, config.policy_widths, image_size, config.latent)
            self.policy = nn.Sequential(encoder, ActionHead(config.latent, config.head_widths, actions))
        if config.relabel:
            self.encoder = StridedEncoder(STACK * 3, config.widths, image_size)
            code = 2 * self.encoder.embed_dim
            self.inverse = LatentHead(code, code, config.units, actions)
        orthogonal_(self)

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        return STACK + 1, None

    @classmethod
    def lead(cls, config: Any, stage: str) -> int:
        return STACK - 1

    @classmethod
    def needs(cls, config: Any, stage: str) -> frozenset[str]:
        return VIDEO if config.relabel else frozenset()

    # 1. Labelled steps ----------------------------------------------------------------------------------------------------------

    def _chosen(self, stack: Tensor) -> Tensor:
        """The policy's actions for stacks (N, 9, S, S) in [-0.5, 0.5], (N, A), not clipped."""
        action: Tensor = self.policy(2 * stack)
        return action.float()

    def clone_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The policy learns the logged actions from the frames before the step."""
        return decoding_error(lambda stack: stack, self._chosen, batch, STACK)

    def _between(self, now: Tensor, later: Tensor) -> Tensor:
        """The inverse model's actions for stacks (N, 9, S, S) before and after a step, (N, A)."""
        both = torch.cat([self.encoder(2 * now).flatten(1), self.encoder(2 * later).flatten(1)], 1)
        action: Tensor = self.inverse(both, both)
        return action.float()

    def label_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The inverse model learns the logged actions from the frames before and after, over steps whose frames are of one episode."""
        frames = pictures(batch["image"])
        ends = every(frames, STACK - 1, frames.shape[1] - 2)  # (B, n)
        begin = starts(batch["is_first"])[:, STACK:]  # of the frame after the step
        known = (ends - begin >= STACK - 1).flatten().float()  # (N,)
        found = self._between(stacks(frames, ends, STACK), stacks(frames, ends + 1, STACK))
        true = batch["action"][:, STACK:].flatten(0, 1).float().clamp(-1, 1)  # (N, A)
        loss = (known * (found - true).square().mean(-1)).sum() / ranks.weighed(known)
        return {"label": loss}, {"label/r2": r_squared(found, true, known)}

    # 2. All video ---------------------------------------------------------------------------------------------------------------

    def video_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The policy learns the inverse model's labels of all video. No logged action is read."""
        frames = pictures(batch["video_image"])
        ends = every(frames, STACK - 1, frames.shape[1] - 2)
        now = stacks(frames, ends, STACK)
        with torch.no_grad():
            target = self._between(now, stacks(frames, ends + 1, STACK)).clamp(-1, 1)  # (N, A)
        found = self._chosen(now)
        return {"action": (found - target).square().mean()}, {"action/r2": r_squared(found, target)}

    # Acting ---------------------------------------------------------------------------------------------------------------------

    def initial_carry(self, batch_size: int) -> Tensor:
        shape = (batch_size, STACK, self.image_size, self.image_size, 3)
        return torch.zeros(shape, dtype=torch.uint8, device=next(self.policy.parameters()).device)

    def act(self, obs: Batch, carry: Tensor, *, explore: bool, window: int) -> tuple[Tensor, Tensor]:
        carry = newest(carry, obs)
        return noisy(self._chosen(pictures(carry).flatten(1, 2)), self.config.noise, explore), carry

    # Stages ---------------------------------------------------------------------------------------------------------------------

    def loss_scales(self, stage: str) -> dict[str, float]:
        return {"label": 1.0, "action": 1.0} if self.config.relabel else {"action": 1.0}

    def passes(self, stage: str) -> tuple[Pass, ...]:
        if not self.config.relabel:
            return (Pass(lambda batch, _: (*self.clone_losses(batch), None), {"action": 1.0}, ("policy",)),)
        return (
            Pass(lambda batch, _: (*self.label_losses(batch), None), {"label": 1.0}, ("inverse",)),
            Pass(lambda batch, _: (*self.video_losses(batch), None), {"action": 1.0}, ("policy",)),
        )

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        held = self.config.head_start if self.config.relabel else 0
        policy = list(self.policy.parameters())
        groups = [Group("policy", policy, rates.lr, held, optimizer="adamw", weight_decay=0.01)]
        if self.config.relabel:
            groups.append(Group("inverse", [*self.encoder.parameters(), *self.inverse.parameters()], rates.lr, weight_decay=0.0))
        return groups
