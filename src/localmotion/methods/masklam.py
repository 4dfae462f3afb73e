"""MaskLAM: a latent action model whose reconstruction counts at the pixels of the agent, so a moving background does not fill z.

Paper: "Segment to Focus: Guiding Latent Action Models in the Presence of Distractors", arXiv 2602.02259. It builds on LAPO
(methods/lapo.py, arXiv 2312.10812).

    x_t = [o_t, M_t]                                                 a frame with its mask as fourth channel (`mask_channel`)
    pretrain   z_t = IDM(x_{t-2..t}, x_{t+k-2..t+k}), k uniform in 1..offset;  o^_{t+1} = FDM(x_{t-2..t}, z_t)
               sum_p w_p |o^_{t+1} - o_{t+1}|^2_p / (3 max(sum_p w_p, 1)),  w = floor + (1 - floor) M_{t+1},  sums over a whole batch
    clone      E |pi(o_{t-2..t}) - z_t|^2, z_t of the frozen IDM with k = 1. The policy sees no mask, so acting needs none
    decode     E |head(pi(o_{t-2..t})) - a_t|^2 on labelled transitions, pi frozen
    finetune   PPO from the decoded policy, as in LAPO (methods/lapo.py)

Position t of a batch has the action that LED TO frame t (docs/decisions/0001), so a_t above is ``action[t + 1]``.
The cells of the paper's ablation are settings: (mask_channel, loss_mask, input_mask, offset), where (false, false, false, 1) leaves
LAPO's loss.

What the paper leaves open, or what differs here:

* The paper says that the loss alone is changed; the code that was seen also gives the masks to both models. Both switches are on.
* That code sums the error over colours and divides by the pixels of the agent, which is three times the loss above. It has no `floor`.
* Windows never cross the end of an episode. In that code some do.
* `finetune` is LAPO's. A rollout has no masks. So the decoder stays as `decode` left it; where the inverse model sees no masks
  (`mask_channel=false`), `decoder_until` above 0 lets it learn from rollouts, and the stage may start from a `clone` run.
* The labels are the first transitions in a seeded order of the episodes (`recording.logs.label_set`), not the first of the store.

Shapes: B sequences, T positions, n windows of a sequence, N = B * n, C channels of a frame (3 or 4), S side, Z numbers of z.
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
    MASK,
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
    ResidualForward,
    UNet,
    masked_error,
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
from localmotion.models.mask_corruption import grow
from localmotion.models.ppo import EXTRAS, DecoderPPOConfig, RewardHeads, rollout_losses

STACK = 3
"""Frames that a model sees at once."""


@dataclass(frozen=True)
class MaskLAMConfig:
    """Settings of MaskLAM. Defaults are the paper's for the Distracting Control Suite."""

    loss_mask: bool = True
    """Weigh the reconstruction by the mask of the frame that is predicted."""
    mask_channel: bool = True
    """Give the masks to the inverse and the forward model as a fourth channel."""
    input_mask: bool = False
    """Multiply the colours that these two models see by the masks."""
    floor: float = 0.0
    """Weight of the background in the reconstruction, in 0..1. 1 is the plain mean squared error."""
    offset: int = 9
    """Largest distance k from the current frame to the newest one that the inverse model sees. 1: always the next frame."""
    mask_grow: int = 0
    """Pixels by which masks are dilated (above 0) or eroded (below 0)."""
    mask_dropout: float = 0.0
    """Share of frames whose mask is all ones instead, in the first stage: for masks that are often missing when used."""
    latent: int = 128
    """Numbers of a latent action."""
    widths: tuple[int, ...] = (64, 128, 128)
    """Channels of the stages of the inverse model and the policy."""
    forward_model: Literal["residual", "unet"] = "residual"
    """residual: the paper's. unet: LAPO's, whose skips copy what stays as it is, so pictures of many scenes need fewer updates."""
    forward_widths: tuple[int, ...] = (96, 192, 192)
    """Channels of the stages of the residual forward model."""
    base: int = 24
    """Channels of the U-Net's first level; each level doubles them."""
    head_widths: tuple[int, ...] = (256, 256)
    """Hidden layers of the decoder from latent actions to actions."""
    decay: float = 0.01
    """Weight decay of AdamW."""
    noise: float = 0.1
    """Standard deviation of the noise on actions while exploring, before `finetune`."""
    ppo: DecoderPPOConfig = field(default_factory=lambda: DecoderPPOConfig(decoder_until=0.0))
    """Settings of the stage `finetune`. A rollout has no masks, so with masks in the inverse model's input the decoder stays as a `decode`
    run left it (`decoder_until=0`)."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "offset", "latent", "base"),
        **at_least(0, "decay", "noise"),
        **shares("floor", "mask_dropout"),
    }


class MaskLAM(Method):
    """Latent actions of the masked agent."""

    name = "masklam"
    paper = "arXiv 2602.02259"
    Config = MaskLAMConfig
    stages = LATENT_ACTIONS
    unread = NO_AGENT_RATES
    acts_after = frozenset({"decode", "finetune"})
    begins = {"clone": "pretrain", "decode": "clone", "finetune": "clone"}
    extras = EXTRAS
    wants = MASK
    transfers = same("inverse", "dynamics", "policy", "head")
    PRESETS = latent_presets(
        paper={
            "optim": {"eps": 1e-8, "clip": 1e9},
            "pretrain": {"updates": 35_156, "batch_size": 512, "length": 12, "lr": 6e-4, "lr_decay": 1.0},
            "online": {"updates": 25_000, "batch_size": 512, "length": 4, "lr": 1e-3, "lr_decay": 1.0},
            "stages": {"clone": {"pretrain": {"length": 4, "lr": 4e-4}}, "decode": {"labels": 128_000, "optim": {"clip": 1.0}}},
        },
        pairs=False,
        small={"widths": (32, 64, 64), "forward_widths": (32, 64, 64), "base": 12},
        tiny={"widths": (16, 32, 32), "forward_widths": (16, 32, 32), "base": 8, "latent": 64},
        debug={"widths": (4, 4, 8), "forward_widths": (4, 4, 8), "base": 2, "latent": 16, "head_widths": (8,), "offset": 3},
    )

    def __init__(self, config: MaskLAMConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        if 2 * abs(config.mask_grow) >= image_size:
            raise ConfigError(f"mask_grow={config.mask_grow} must be less than half a picture of {image_size} pixels")
        channels = STACK * (4 if config.mask_channel else 3)
        self.inverse = InverseModel(LatentEncoder(2 * channels, config.widths, image_size, config.latent))
        self.dynamics: UNet | ResidualForward
        if config.forward_model == "unet":
            self.dynamics = UNet(channels, config.latent, image_size, config.base)
        else:
            self.dynamics = ResidualForward(channels, config.forward_widths, config.latent, image_size)
        self.policy = LatentEncoder(STACK * 3, config.widths, image_size, config.latent)
        if action_dim is not None:
            self.head = ActionHead(config.latent, config.head_widths, action_dim)
        orthogonal_(self)
        if action_dim is not None:
            ppo = config.ppo
            self.heads = RewardHeads(self.policy.features, action_dim, log_std=ppo.log_std, noise=config.noise)

    @classmethod
    def about_open_loop(cls, config: MaskLAMConfig) -> str:
        if not config.loss_mask or config.floor >= 1:
            return ""
        what = (
            "Only the agent's pixels are learned"
            if config.floor == 0
            else f"Pixels of the background are learned with weight {config.floor:g}"
        )
        return f"{what} (loss_mask, floor). PSNR and SSIM are over whole pictures, so they also count the background."

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        return STACK + (config.offset if stage == "pretrain" else 1), None

    @classmethod
    def lead(cls, config: Any, stage: str) -> int:
        return STACK - 1

    @classmethod
    def needs(cls, config: Any, stage: str) -> frozenset[str]:
        seen = config.mask_channel or config.input_mask  # by the inverse model
        needed = {"pretrain": seen or config.loss_mask, "clone": seen, "finetune": seen and config.ppo.decoder_until > 0}
        return MASK if needed.get(stage) else frozenset()

    @classmethod
    def origins(cls, config: Any, stage: str) -> tuple[str, ...]:
        return latent_origins(stage, config.ppo)

    # 1. Latent actions ----------------------------------------------------------------------------------------------------------

    def _masks(self, batch: Batch, stage: str = "clone") -> Tensor:
        """Masks (B, T, S, S) as 0 and 1; all ones where ``stage`` needs none. Raises KeyError if it needs masks that are not there."""
        if "mask" not in batch and not self.needs(self.config, stage):
            return torch.ones(batch["image"].shape[:-1], device=batch["image"].device)
        return grow(batch["mask"].bool(), self.config.mask_grow).float()

    def _inputs(self, frames: Tensor, mask: Tensor) -> Tensor:
        """What the two models see: frames (..., 3, S, S) and masks (..., S, S) -> (..., C, S, S)."""
        mask = mask.unsqueeze(-3)
        frames = frames * mask if self.config.input_mask else frames
        return torch.cat([frames, mask], -3) if self.config.mask_channel else frames

    def _steps(self, seen: Tensor, ends: Tensor, later: Tensor, begin: Tensor | None = None) -> Tensor:
        """The inverse model's input: the stacks that end at ``ends`` and at ``later`` (B, n), (N, 2 * STACK * C, S, S)."""
        return torch.cat([stacks(seen, ends, STACK, begin), stacks(seen, later, STACK, begin)], 1)

    def pretrain_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The masked reconstruction of the next frame, for every window of STACK + offset frames."""
        config, frames, mask = self.config, pictures(batch["image"]), self._masks(batch, "pretrain")
        if config.mask_dropout > 0:
            missing = torch.rand(mask.shape[:2], device=mask.device) < config.mask_dropout
            mask = torch.where(missing[:, :, None, None], 1.0, mask)
        seen = self._inputs(frames, mask)
        ends = every(frames, STACK - 1, frames.shape[1] - 1 - config.offset)  # (B, n)
        later = ends + 1 + torch.randint(config.offset, tuple(ends.shape), device=ends.device)
        z = self.inverse(self._steps(seen, ends, later))  # (N, Z)
        target, past = stacks(frames, ends + 1, 1), stacks(seen, ends, STACK)  # (N, 3, S, S), (N, STACK * C, S, S)
        agent = stacks(mask.unsqueeze(2), ends + 1, 1).squeeze(1)  # (N, S, S)
        weight, floor = agent if config.loss_mask else None, config.floor
        loss = masked_error((self.dynamics(past, z).float() - target).square(), weight, floor)
        still = masked_error((stacks(frames, ends, 1) - target).square(), weight, floor)
        return {"image": loss}, {"image/of_copy": loss.detach() / still.clamp(min=1e-8), "mask/share": agent.mean()}

    # 2. A policy over latent actions --------------------------------------------------------------------------------------------

    def clone_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The policy learns the latent actions of the frozen inverse model from the frames before the step, without masks."""
        frames = pictures(batch["image"])
        ends = every(frames, STACK - 1, frames.shape[1] - 2)
        target = frozen(self.inverse, self._steps(self._inputs(frames, self._masks(batch)), ends, ends + 1))  # (N, Z)
        found = self.policy(stacks(frames, ends, STACK)).float()
        return {"latent": (found - target).square().mean()}, {"latent/r2": r_squared(found, target)}

    # 3. A decoder to actions, and acting ----------------------------------------------------------------------------------------

    def decode_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The head learns the logged actions from the frozen policy's latent actions."""
        return decoding_error(self.policy, self.head, batch, STACK)

    def initial_carry(self, batch_size: int) -> Tensor:
        shape = (batch_size, STACK, self.image_size, self.image_size, 3)
        return torch.zeros(shape, dtype=torch.uint8, device=self.policy.project.weight.device)

    def act(self, obs: Batch, carry: Tensor, *, explore: bool, window: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        carry = newest(carry, obs)
        features, z = self.policy.both(pictures(carry).flatten(1, 2))
        action, extras = self.heads.act(self.head(z), features, explore)
        return action, carry, extras

    # 4. Learning by reward ------------------------------------------------------------------------------------------------------

    def reward_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """PPO's losses of a rollout, through the frozen decoder and the policy."""
        return rollout_losses(self.policy.both, self.head, self.heads, batch, STACK, self.config.ppo)

    def pair_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The decoder learns the actions of a rollout from the latent actions of the frozen inverse model."""
        seen = self._inputs(pictures(batch["image"]), self._masks(batch))
        ends, begin, known = played_steps(batch["is_first"], STACK)
        z = frozen(self.inverse, self._steps(seen, ends, ends + 1, begin))  # (N, Z)
        losses, metrics = action_error(self.head, z, batch, known)
        return losses, metrics

    # Stages ---------------------------------------------------------------------------------------------------------------------

    def loss_scales(self, stage: str) -> dict[str, float]:
        return latent_scales(stage, {"image": 1.0}, self.config.ppo)

    def passes(self, stage: str) -> tuple[Pass, ...]:
        return latent_passes(self, stage, self.loss_scales(stage), self.config.ppo.decoder_until)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        if stage == "finetune":
            return reward_groups(self, self.config.ppo, rates)
        parts = {"pretrain": ("inverse", "dynamics"), "clone": ("policy",), "decode": ("head",)}[stage]
        decay = self.config.decay
        return [Group("model", trained(self, *parts), rates.lr, optimizer="adamw", weight_decay=decay, decay="cosine")]

    # Looking --------------------------------------------------------------------------------------------------------------------

    def motion_code(self, batch: Batch) -> Tensor:
        """The latent action that led to each frame, with k = 1, (B, T, Z)."""
        seen = self._inputs(pictures(batch["image"]), self._masks(batch))
        now = every(seen, 0, seen.shape[1] - 1)
        return frozen(self.inverse, self._steps(seen, now - 1, now, starts(batch["is_first"]))).unflatten(0, now.shape)

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """The forward model given latent actions: the rows of `futures`. A predicted frame has the last observed mask."""
        frames, masks, codes = pictures(batch["image"]), self._masks(batch), self.motion_code(batch)

        def see(picture: Tensor, t: int) -> Tensor:
            return self._inputs(picture, masks[:, t])

        rows = futures(codes, context)
        return {name: roll_out(self.dynamics, frames, latents, context, STACK, see) for name, latents in rows.items()}
