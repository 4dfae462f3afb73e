"""Global Flow: the whole optical-flow field as one code. The ablation without DRP's Atomic Actions.

Paper: "Local Motion Matters" (arXiv 2607.00808), section 5.3 and Fig. 5b. A convolutional encoder maps the entire flow field to one
embedding, which conditions the dynamics instead of the deconstruction. The paper does not state its layers; these are DreamerV2's image
encoder's.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.models.dae import DAEConfig, RunningRMS

SIDE = 64
"""Side of the flow field at the convolutions, in pixels; other sizes are averaged or interpolated to it."""


class GlobalFlow(nn.Module):
    """Flow field (B,T,S,S,2) in pixels -> a^agg (B,T,code_dim). Each frame is encoded separately; only the dynamics model has memory.

    Width (mats times dim, agg_dim), flow scale and flow clip are those of the DAE's settings, so a comparison changes nothing else.
    """

    feed_forward = True  # --compile compiles it

    def __init__(self, config: DAEConfig) -> None:
        super().__init__()
        self.config = config
        depth = max(config.dim // 8, 1)
        widths = [2, *(depth * 2**i for i in range(4))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inside, outside, 4, 2) for inside, outside in itertools.pairwise(widths)
        )  # 64 -> 31 -> 14 -> 6 -> 2
        if config.flow_norm:
            self.rms = RunningRMS()
        wide = config.mats * config.dim
        self.out = nn.Sequential(nn.Linear(widths[-1] * 4, wide), nn.LayerNorm(wide))
        self.project: nn.Module = nn.Linear(wide, config.agg_dim) if config.agg_dim else nn.Identity()

    def forward(self, flow: Tensor) -> Tensor:
        """a^agg (B,T,code_dim) of (B,T,S,S,2)."""
        config = self.config
        x = flow.flatten(0, 1).permute(0, 3, 1, 2).float().clamp(-config.flow_clip, config.flow_clip) / config.flow_scale
        if x.shape[-1] != SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="area" if x.shape[-1] > SIDE else "bilinear")
        if config.flow_norm:
            x = self.rms(x.movedim(1, -1), torch.ones_like(x[:, 0, 0, 0])).movedim(-1, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        for convolution in self.convolutions:
            x = F.silu(convolution(x))
        code: Tensor = self.project(self.out(x.flatten(1)))
        return code.unflatten(0, flow.shape[:2])
