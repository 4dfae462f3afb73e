"""Adapters: they pass the latent state z of the pre-trained dynamics to the action-specific dynamics (DRP, Eq. 3 and Fig. 13)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localmotion.errors import unknown_name


class AttentionAdapter(nn.Module):
    """Learned queries cross-attend to the parts of z, its categoricals and slices of deter. A gate adds the result to a linear map of z.

    The gate starts at zero, so learning starts from the linear map.
    """

    feed_forward = True  # --compile compiles it

    def __init__(
        self,
        *,
        deter: int,
        stoch: int,
        classes: int,
        out_dim: int,
        width: int = 128,
        queries: int = 8,
        layers: int = 2,
        slices: int = 16,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if deter % slices:
            raise ValueError(f"deter={deter} is not a multiple of {slices} slices")
        self.stoch, self.classes, self.slices, self.heads = stoch, classes, slices, heads
        self.linear = nn.Linear(stoch * classes + deter, out_dim)
        self.stoch_embed, self.deter_embed = nn.Linear(classes, width), nn.Linear(deter // slices, width)
        self.position = nn.Parameter(torch.randn(stoch + slices, width) * 0.02)
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.key_norm = nn.LayerNorm(width)
        self.to_query = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.to_key_value = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.to_out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(layers)
        )
        self.project = nn.Linear(queries * width, out_dim)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, feat: Tensor) -> Tensor:
        """(..., S*C + D) -> (..., out_dim)."""
        lead = feat.shape[:-1]
        flat = feat.reshape(-1, feat.shape[-1])
        stoch, deter = flat.split([self.stoch * self.classes, flat.shape[-1] - self.stoch * self.classes], -1)
        tokens = torch.cat(
            [
                self.stoch_embed(stoch.unflatten(-1, (self.stoch, -1))),
                self.deter_embed(deter.unflatten(-1, (self.slices, -1))),
            ],
            1,
        )
        tokens = self.key_norm(tokens + self.position)  # (N, S + slices, width)
        x = self.query.expand(len(flat), -1, -1)
        for index in range(len(self.mlps)):
            q = self.to_query[index](self.norms[2 * index](x))
            k, v = self.to_key_value[index](tokens).chunk(2, -1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            weights = ((q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5).softmax(-1)
            attended = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
            x = x + self.to_out[index](attended)
            x = x + self.mlps[index](self.norms[2 * index + 1](x))
        out = self.linear(flat) + self.gate * self.project(x.flatten(1))
        return out.view(*lead, -1)


def make_adapter(kind: str, *, deter: int, stoch: int, classes: int, out_dim: int) -> nn.Module:
    """attention (default), mlp (the paper's ablation) or linear (a baseline). Raises ConfigError for another kind."""
    inputs = stoch * classes + deter
    if kind == "attention":
        width = 128 if deter >= 512 else 64
        slices = 16 if deter >= 256 else 4
        return AttentionAdapter(deter=deter, stoch=stoch, classes=classes, out_dim=out_dim, width=width, slices=slices)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(inputs, out_dim), nn.ELU(), nn.Linear(out_dim, out_dim))
    if kind == "linear":
        return nn.Linear(inputs, out_dim)
    raise unknown_name("adapter", kind, ("attention", "mlp", "linear"))
