"""Encoder and decoder of DreamerV3 for pictures, vectors or both.

Source: danijar/dreamerv3, commit e3f0224, dreamerv3/rssm.py (classes Encoder and Decoder with their defaults: kernel 5, convolution then
2x2 maximum, nearest-neighbour upsampling then convolution, block-linear projection of the state to the decoder's map).

Shapes: N = B*T pictures, S side, E embedding, D deter, Z flat latent, V vector. Maps are kept with channels last, (N, h, w, C).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.errors import ConfigError
from localmotion.models.blocks import BlockLinear, NormMLP, NormSiLU, init_, linear, spans
from localmotion.models.values import symlog

KERNEL = 5
MULTIPLIERS = (2, 3, 4, 4)
BLOCK = 4  # side of the pixel blocks of stem "blocks"


def to_patches(x: Tensor, side: int) -> Tensor:
    """(N, h, w, C) -> (N, h/side, w/side, side*side*C), rows first."""
    count, height, width, _ = x.shape
    x = x.unflatten(2, (width // side, side)).unflatten(1, (height // side, side))
    return x.transpose(2, 3).reshape(count, height // side, width // side, -1)


def from_patches(x: Tensor, side: int) -> Tensor:
    """Inverse of `to_patches`."""
    count, height, width, channels = x.shape
    x = x.view(count, height, width, side, side, channels // side**2).transpose(2, 3)
    return x.reshape(count, height * side, width * side, -1)


def shapes(stem: str, depth: int, image_size: int) -> tuple[list[int], int]:
    """Widths of the stages, and side of the coarsest map. Raises ConfigError for a side below 3 or above 16, as the reference does.

    Stem "blocks", which is not in the reference, also accepts pictures of 32 pixels.
    """
    skip = 2 if stem == "blocks" else 0
    least = 2 if stem == "blocks" else 3
    side = image_size // 2 ** len(MULTIPLIERS)
    if image_size % 2 ** len(MULTIPLIERS) or not least <= side <= 16:
        raise ConfigError(f"image_size={image_size}: dreamer_v3 with stem={stem} takes multiples of 16 from {16 * least} to 256")
    return [depth * m for m in MULTIPLIERS[skip:]], side


class Conv(nn.Module):
    """5x5 convolution of maps with channels last, zeros around: (N, h, w, I) -> (N, h, w, O)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = init_(torch.empty(outputs, inputs, KERNEL, KERNEL), inputs * KERNEL**2)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=KERNEL // 2).permute(0, 2, 3, 1)


class UpConv(Conv):
    """`Conv` after doubling the picture by repetition, (N, h, w, I) -> (N, h, w, 4*O): `to_patches` of side 2 of (N, 2h, 2w, O).

    The five taps of a doubled row fall on three pixels of the small row, different ones for even and odd outputs. So sums of taps give
    four 3x3 kernels, which need a third of the products, and the doubled map is never computed.
    """

    TAPS = ((0, 0, 1, 1, 2), (0, 1, 1, 2, 2))  # small pixel (left, same, right) of each tap, even and odd outputs

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        taps = F.one_hot(torch.tensor(self.TAPS), 3).float()  # (parity, tap, pixel)
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        taps: Tensor = self.taps  # type: ignore[assignment]
        with torch.autocast(x.device.type, enabled=False):
            small = torch.einsum("pka,qlb,oikl->pqoiab", taps, taps, self.weight).flatten(0, 2)
        small = small.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x.permute(0, 3, 1, 2), small, self.bias.repeat(4), padding=1).permute(0, 2, 3, 1)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _PoolCorners(torch.autograd.Function):
    """Maximum over 2x2 of (N, H, W, C), for CPUs. torch's own takes 0.9 s forward and backward in bf16 for the first map of DreamerV3 12M.

    On a CPU, comparing and selecting bf16 is slow and integer operations are fast. A difference shifted right to its sign bit is a mask of
    zeros or ones, and `and` selects gradients. The backward pass needs three of these masks, one byte each (right one of the upper two,
    right one of the lower two, lower row). Of equal values the first is chosen, as in torch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        out = x.new_empty(n, h // 2, w // 2, c)
        ctx.shape = x.shape
        learns, bits = ctx.needs_input_grad[0], _BITS[x.element_size()]
        masks = [out.new_empty(out.shape, dtype=torch.int8) for _ in range(3)] if learns else []
        for span in spans(out, times=4):
            corners = x[span].view(-1, h // 2, 2, w // 2, 2, c)
            pairs = [(corners[:, :, row, :, 0], corners[:, :, row, :, 1]) for row in (0, 1)]
            upper, lower = (torch.maximum(*pair) for pair in pairs)
            torch.maximum(upper, lower, out=out[span])
            for mask, (first, second) in zip(masks, (*pairs, (upper, lower)), strict=False):
                mask[span] = (first - second).view(bits) >> (8 * x.element_size() - 1)
        ctx.save_for_backward(*masks)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad, (n, h, w, c) = grads[0].contiguous(), ctx.shape
        bits = _BITS[grad.element_size()]
        out = grad.new_empty(n, h // 2, 2, w // 2, 2, c)
        for span in spans(grad, times=4):
            share, into = grad[span].view(bits), out[span].view(bits)
            right, lower_right, lower = (mask[span].to(bits) for mask in ctx.saved_tensors)
            down = share & lower
            for row, part, mask in ((0, share ^ down, right), (1, down, lower_right)):
                # The operations write directly to every other pixel. A copy would take four times as long.
                torch.bitwise_and(part, mask, out=into[:, :, row, :, 1])
                torch.bitwise_and(part, mask.bitwise_not_(), out=into[:, :, row, :, 0])
        return out.view(ctx.shape)


def pool(x: Tensor) -> Tensor:
    """Maximum over 2x2 of (N, H, W, C), H and W even -> (N, H/2, W/2, C)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        out: Tensor = _PoolCorners.apply(x.contiguous())
        return out
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class ImageEncoder(nn.Module):
    """(N, S, S, 3) uint8 -> (N, E): stages of convolution, maximum over 2x2, RMSNorm, SiLU.

    ``stem="pool"`` has the reference's four stages. ``stem="blocks"`` is for CPUs: 4x4 pixels become channels, which replaces the first
    two stages and with them nearly all of the arithmetic.
    """

    feed_forward = True  # --compile compiles it

    def __init__(self, *, stem: Literal["pool", "blocks"], depth: int, image_size: int) -> None:
        super().__init__()
        widths, side = shapes(stem, depth, image_size)
        self.blocks = stem == "blocks"
        inputs = 3 * BLOCK**2 if self.blocks else 3
        self.convs = nn.ModuleList(Conv(a, b) for a, b in itertools.pairwise([inputs, *widths]))
        self.norms = nn.ModuleList(NormSiLU(width) for width in widths)
        self.embed_dim = side * side * widths[-1]

    def forward(self, image: Tensor) -> Tensor:
        x = (to_patches(image, BLOCK) if self.blocks else image).float().mul_(1 / 255).sub_(0.5)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(pool(conv(x)))
        return x.flatten(1)


class ImageDecoder(nn.Module):
    """Mirror of the encoder: deter (N, D), flat latent (N, Z) -> logits of pixels, in the patch layout of the last convolution.

    A block-linear layer maps deter to the coarsest map, each block to its own channels. Two layers map the latent.
    """

    feed_forward = True  # --compile compiles it

    def __init__(
        self, deter: int, latent: int, *, stem: Literal["pool", "blocks"], depth: int, units: int, blocks: int, image_size: int
    ) -> None:
        super().__init__()
        widths, self.side = shapes(stem, depth, image_size)
        self.blocks = stem == "blocks"
        if widths[-1] % blocks:
            raise ConfigError(f"depth={depth}: 4 times it must be a multiple of blocks={blocks}")
        size = self.side**2 * widths[-1]
        self.from_deter = BlockLinear(deter, size, blocks)
        self.from_stoch = nn.Sequential(linear(latent, 2 * units), NormSiLU(2 * units), linear(2 * units, size))
        self.norm = NormSiLU(widths[-1])
        outputs = 3 * BLOCK**2 if self.blocks else 3
        self.convs = nn.ModuleList(UpConv(a, b) for a, b in itertools.pairwise([*widths[::-1], outputs]))
        self.norms = nn.ModuleList(NormSiLU(width) for width in widths[-2::-1])

    def forward(self, deter: Tensor, latent: Tensor) -> Tensor:
        """Logits (N, h, w, P), in the layout of `patches`."""
        side, groups = self.side, self.from_deter.blocks
        x = self.from_deter(deter).view(-1, groups, side, side, self.norm.scale.numel() // groups)
        x = x.permute(0, 2, 3, 1, 4).flatten(3) + self.from_stoch(latent).view(-1, side, side, self.norm.scale.numel())
        x = self.norm(x)
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = norm(from_patches(conv(x), 2))
        out: Tensor = self.convs[-1](x)
        return out

    def patches(self, image: Tensor) -> Tensor:
        """Pictures (N, S, S, 3), any type, in the layout of `forward`'s output."""
        return to_patches(to_patches(image, BLOCK) if self.blocks else image, 2)

    def picture(self, logits: Tensor) -> Tensor:
        """`forward`'s output as pictures (N, S, S, 3) in [0, 1]."""
        x = from_patches(torch.sigmoid(logits.float()), 2)
        return from_patches(x, BLOCK) if self.blocks else x


class _PixelLoss(torch.autograd.Function):
    """Squared error of sigmoid(logits) to uint8 pixels, summed over a picture: (N,). The gradient is computed with the loss."""

    @staticmethod
    def forward(ctx: object, logits: Tensor, truth: Tensor) -> Tensor:
        slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        losses = []
        for here in spans(logits):
            share = torch.sigmoid(logits[here].float())  # (n, h, w, P)
            error = share - truth[here].float().mul_(1 / 255)
            losses.append(error.square().flatten(1).sum(1))  # (n,)
            if slope is not None:
                slope[here] = torch.ops.aten.sigmoid_backward(error, share).mul_(2)
        ctx.save_for_backward(slope)  # type: ignore[attr-defined]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return slope * grads[0].to(slope.dtype).view(-1, 1, 1, 1), None


def pixel_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Squared error (N,) between sigmoid of logits (N, h, w, P) and uint8 pixels of the same layout scaled to [0, 1], summed."""
    out: Tensor = _PixelLoss.apply(logits, truth)
    return out


class ObservationModel(nn.Module):
    """Encoder and decoder of observations: pictures (B,T,S,S,3) uint8, vectors (B,T,V), or both."""

    def __init__(
        self,
        *,
        deter: int,
        latent: int,
        image_size: int,
        vector_dim: int,
        stem: Literal["pool", "blocks"],
        depth: int,
        units: int,
        blocks: int,
        layers: int = 3,
    ) -> None:
        """``image_size`` 0: no pictures; ``vector_dim`` 0: no vectors. Raises ConfigError for neither."""
        super().__init__()
        if not image_size and not vector_dim:
            raise ConfigError("dreamer_v3 observes nothing: set model.pixels=true or model.vector_dim to the vector's length")
        self.deter, self.vector_dim = deter, vector_dim
        self.embed_dim = 0
        self.image_encoder: ImageEncoder | None = None
        self.image_decoder: ImageDecoder | None = None
        self.vector_encoder: NormMLP | None = None
        self.vector_decoder: NormMLP | None = None
        if vector_dim:
            self.vector_encoder = NormMLP(vector_dim, None, units=units, layers=layers)
            self.vector_decoder = NormMLP(deter + latent, vector_dim, units=units, layers=layers)
            self.embed_dim += units
        if image_size:
            self.image_encoder = ImageEncoder(stem=stem, depth=depth, image_size=image_size)
            self.image_decoder = ImageDecoder(
                deter, latent, stem=stem, depth=depth, units=units, blocks=blocks, image_size=image_size
            )
            self.embed_dim += self.image_encoder.embed_dim

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, T, E), with the vector's part first."""
        parts = []
        if self.vector_encoder is not None:
            parts.append(self.vector_encoder(symlog(batch["vector"].float())))
        if self.image_encoder is not None:
            image = batch["image"]
            parts.append(self.image_encoder(image.flatten(0, 1)).unflatten(0, image.shape[:2]))
        return torch.cat([part.to(parts[0].dtype) for part in parts], -1) if len(parts) > 1 else parts[0]

    def losses(self, feat: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruction losses (B, T) by name: squared error of pixels in [0, 1], and of symlog vectors, summed over each observation."""
        out = {}
        if self.vector_decoder is not None:
            error = self.vector_decoder(feat).float() - symlog(batch["vector"].float())  # (B, T, V)
            out["vector"] = error.square().sum(-1)  # (B, T)
        if self.image_decoder is not None:
            truth = self.image_decoder.patches(batch["image"].flatten(0, 1))  # (B*T, h, w, P)
            out["image"] = pixel_loss(self._decode(feat), truth).view(feat.shape[:2])  # (B*T,) -> (B, T)
        return out

    def _decode(self, feat: Tensor) -> Tensor:
        """Logits (B*T, h, w, P) of features (B, T, F)."""
        assert self.image_decoder is not None
        flat = feat.flatten(0, 1)
        logits: Tensor = self.image_decoder(flat[:, : self.deter], flat[:, self.deter :])
        return logits

    def pictures(self, feat: Tensor) -> Tensor:
        """Pictures (B, T, 3, S, S) in [0, 1] of features (B, T, F). Raises ConfigError without pictures."""
        if self.image_decoder is None:
            raise ConfigError("dreamer_v3 was built without pictures (model.pixels=false) and cannot draw")
        return self.image_decoder.picture(self._decode(feat)).permute(0, 3, 1, 2).unflatten(0, feat.shape[:2])
