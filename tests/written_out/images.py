"""Image encoders, decoders and their loss, written out. Shapes: N pictures, S side, E embedding, F features; maps are (N, C, h, w)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from written_out.core import Weights, elu, linear


def pixels(image: Tensor) -> Tensor:
    """(B, T, S, S, 3) uint8 -> (B*T, 3, S, S) in [-0.5, 0.5]."""
    return image.flatten(0, 1).permute(0, 3, 1, 2).double() / 255 - 0.5


def cnn_encoder(w: Weights, prefix: str, x: Tensor) -> Tensor:
    """Four convolutions of kernel 4 and stride 2 with ELU (DreamerV2, appendix): (N, 3, 64, 64) -> (N, E)."""
    for index in range(4):
        name = f"{prefix}net.{2 * index}"
        x = elu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2))
    return x.flatten(1)


def cnn_decoder(w: Weights, prefix: str, feat: Tensor) -> Tensor:
    """Linear, then four transposed convolutions of kernels 5, 5, 6, 6 and stride 2, ELU between: (N, F) -> (N, 3, 64, 64)."""
    x = linear(w, f"{prefix}linear", feat)[:, :, None, None]
    for index in range(4):
        name = f"{prefix}net.{2 * index}"
        x = F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
        x = elu(x) if index < 3 else x
    return x


def image_loss(decoded: Tensor, truth: Tensor) -> Tensor:
    """-ln N(truth; decoded, 1) without its constant: half the squared error summed over a picture, mean over pictures."""
    return (0.5 * (decoded - truth) ** 2).flatten(1).sum(1).mean()
