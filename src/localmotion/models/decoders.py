"""Image decoders: DreamerV2's plain CNN and IPV's ResNet with cross-attention to context maps (arXiv 2305.18499, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.models.batch_norm import BatchNorm2d
from localmotion.models.encoders import ResidualLayer, xavier


class CNNDecoder(nn.Module):
    """Linear, then four transposed convolutions, stride 2, kernels 5, 5, 6, 6: 1 -> 5 -> 13 -> 30 -> 64."""

    feed_forward = True  # --compile compiles it

    def __init__(self, inputs: int, *, depth: int = 48, image_size: int = 64) -> None:
        super().__init__()
        if image_size != 64:
            raise ValueError(f"the plain CNN decoder outputs 64x64 pictures, not {image_size}")
        self.linear = xavier(nn.Linear(inputs, 32 * depth))
        widths = [32 * depth, 4 * depth, 2 * depth, depth, 3]
        parts: list[nn.Module] = []
        for index, kernel in enumerate((5, 5, 6, 6)):
            parts += [xavier(nn.ConvTranspose2d(widths[index], widths[index + 1], kernel, 2)), nn.ELU()]
        self.net = nn.Sequential(*parts[:-1])

    def forward(self, feat: Tensor, context: list[Tensor] | None = None, source: Tensor | None = None) -> Tensor:
        return self.net(self.linear(feat)[:, :, None, None])


class ContextAttention(nn.Module):
    """Cross-attention of decoder features to the context map of the same resolution, on a random quarter of its tokens (IPV)."""

    def __init__(
        self, channels: int, side: int, *, mask: float = 0.75, heads: int = 4, norm: str = "batch", dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.keep, self.heads, self.dropout = int(side * side * (1 - mask)), heads, dropout
        self.query_position = nn.Parameter(torch.zeros(side * side, channels))
        self.key_position = nn.Parameter(torch.zeros(side * side, channels))
        # This module only holds the weights, in PyTorch's layout and initialisation. `forward` writes the product out.
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm: nn.Module = BatchNorm2d(channels) if norm == "batch" else nn.Identity()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B*T, C, h, w), context (B, C, h, w) -> (B*T, C, h, w). Each frame attends to a new random subset, also in evaluation.

        Keys and values are projected once per sequence. Each frame uses a subset of them.
        """
        frames, channels, height, width = x.shape
        batch, count = len(context), height * width
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        tokens = context.flatten(2).transpose(1, 2) + self.key_position  # (B, hw, C)
        key_value = F.linear(tokens, weight[channels:], bias[channels:]).flatten(0, 1)  # (B*hw, 2C)
        pick = torch.rand(frames, count, device=x.device).topk(self.keep, 1).indices  # (B*T, keep)
        base = torch.arange(batch, device=x.device).repeat_interleave(frames // batch) * count
        picked = F.embedding(pick + base[:, None], key_value)  # (B*T, keep, 2C)
        query = F.linear(x.flatten(2).transpose(1, 2) + self.query_position, weight[:channels], bias[:channels])
        q = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(q.dtype) for y in picked.chunk(2, -1))
        weights = ((q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        if self.dropout and self.training:
            weights = F.dropout(weights, self.dropout)
        out = self.attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if self.dropout and self.training:
            out = F.dropout(out, self.dropout)
        image = out.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # channels last, like x
        return F.relu(x + self.norm(image))


class ResNetDecoder(nn.Module):
    """IPV's residual decoder, the mirror of `ResNetEncoder`. It cross-attends to context maps of at most ``finest`` cells per side.

    ``map_shapes`` are the encoder's (channels, side) pairs, finest first.
    """

    feed_forward = True  # --compile compiles it

    def __init__(
        self,
        inputs: int,
        map_shapes: list[tuple[int, int]],
        *,
        stem: str = "conv",
        norm: str = "batch",
        context: bool = True,
        mask: float = 0.75,
        dropout: float = 0.1,
        finest: int = 16,
        copy: bool = False,
    ) -> None:
        super().__init__()
        self.unshuffle, self.copy = stem == "unshuffle", copy
        shapes = map_shapes[::-1]  # coarsest first
        self.width, self.side = shapes[0][0], shapes[0][1] // 2
        self.linear = xavier(nn.Linear(inputs, self.width * self.side**2))
        self.stages, self.attention = nn.ModuleList(), nn.ModuleDict()
        for index, (channels, side) in enumerate(shapes):
            out = shapes[index + 1][0] if index + 1 < len(shapes) else channels // 2
            if self.unshuffle:
                out = channels if index + 1 == len(shapes) else out
                layers = [ResidualLayer(channels, out, norm)]
            else:
                layers = [ResidualLayer(channels, channels, norm), ResidualLayer(channels, out, norm)]
            self.stages.append(nn.ModuleList(layers))
            if context and side <= finest:
                self.attention[str(index)] = ContextAttention(channels, side, mask=mask, norm=norm, dropout=dropout)
        # With `copy`, one more value per pixel: the share of the context frame.
        if self.unshuffle:
            self.out = xavier(nn.Conv2d(shapes[-1][0], 64 if copy else 48, 3, padding=1))
        else:
            outputs = 4 if copy else 3
            self.out = xavier(nn.ConvTranspose2d(shapes[-1][0] // 2, outputs, 3, stride=2, padding=1, output_padding=1))

    def forward(self, feat: Tensor, context: list[Tensor] | None = None, source: Tensor | None = None) -> Tensor:
        """feat (B*T, F), context maps (B, C, h, w) finest first -> (B*T, 3, S, S), or (B*T, 48, S/4, S/4) in blocks.

        ``source`` (B, ...): the context frame's pixels, added through a predicted mask if the decoder has ``copy``.
        """
        x = self.features(feat, context)
        if not self.copy:
            return x
        if source is None:
            raise ValueError("this decoder needs the context frame's pixels")
        return composite(x, source)

    def features(self, feat: Tensor, context: list[Tensor] | None = None) -> Tensor:
        """The output of `forward` before the composite. With ``copy`` it has a third more channels, the logits of the mask."""
        x = self.linear(feat).view(-1, self.width, self.side, self.side)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = context[::-1] if context is not None else None
        for index, stage in enumerate(self.stages):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            for number, layer in enumerate(list(stage.children())):
                attend = number == 0 and str(index) in self.attention
                if attend and maps is None:
                    raise ValueError("this decoder needs context maps")
                x = layer(x, self.attention[str(index)](x, maps[index])) if attend else layer(x)  # type: ignore[index]
        out: Tensor = self.out(x)
        return out


def composite(x: Tensor, source: Tensor) -> Tensor:
    """mask * source + drawn, with one mask value per pixel for all colours. (B*T, 4P, h, w), (B, 3P, h, w) -> (B*T, 3P, h, w).

    CDNA (arXiv 1605.07157) multiplies ``drawn`` by 1 - mask. Then a mask that copies leaves no gradient for the latent: on real
    clips the mask closed within 300 updates and the latent stayed empty (decision 0004).
    """
    pixels = x.shape[1] // 4
    rows = x.permute(0, 2, 3, 1).unflatten(0, (len(source), -1))  # (B, T, h, w, 4P), channels last
    share = torch.sigmoid(rows[..., 3 * pixels :]).repeat_interleave(3, -1)
    seen = source.permute(0, 2, 3, 1).unsqueeze(1).to(x.dtype)
    return (rows[..., : 3 * pixels] + share * seen).flatten(0, 1).permute(0, 3, 1, 2)
