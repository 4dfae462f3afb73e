"""The beta-VAE of DisWM (arXiv 2503.08751; sizes: its release): an encoder to a code of few numbers, and a decoder.

Shapes: N pictures, S side of a picture, Z numbers of a code, F numbers of a feature. Pictures (N, 3, S, S) in [-0.5, 0.5].
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from localmotion.models.distributions import gaussian_kl, normal


class Code(NamedTuple):
    """Distribution of a code, Gaussian with independent numbers: mean (N, Z), std (N, Z). fp32."""

    mean: Tensor
    std: Tensor

    def sample(self) -> Tensor:
        """Reparameterised sample (N, Z)."""
        return self.mean + self.std * normal(self.mean)

    def kl(self) -> Tensor:
        """KL(self || N(0, I)) in nats, summed over Z: (N,)."""
        return gaussian_kl(self.mean, self.std, torch.zeros_like(self.mean), torch.ones_like(self.std))


def _widths(depth: int, image_size: int) -> list[int]:
    """Channels after each convolution of stride 2, down to 4 x 4 cells: ``depth``, twice that in the last two. 64: d, d, 2d, 2d.

    Raises ValueError for a side that is not 8 times a power of 2.
    """
    count = image_size.bit_length() - 3
    if count < 1 or image_size != 4 << count:
        raise ValueError(f"the beta-VAE takes pictures of side 8, 16, 32, ..., not {image_size}")
    return [depth if index < count - 2 else 2 * depth for index in range(count)]


def _kaiming(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    nn.init.kaiming_normal_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class BetaVAEEncoder(nn.Module):
    """Convolutions of stride 2 down to 4 x 4 cells, one over these, then a linear layer to mean and log variance; ELU between.

    64 pixels: 64 -> 32 -> 16 -> 8 -> 4 -> 1 with ``depth`` x (1, 1, 2, 2, 8) channels.
    """

    feed_forward = True  # --compile compiles it

    def __init__(self, code: int, *, depth: int = 32, image_size: int = 64) -> None:
        super().__init__()
        widths = [3, *_widths(depth, image_size)]
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            parts += [_kaiming(nn.Conv2d(a, b, 4, 2, 1)), nn.ELU()]
        parts += [_kaiming(nn.Conv2d(widths[-1], 8 * depth, 4)), nn.ELU(), nn.Flatten(), _kaiming(nn.Linear(8 * depth, 2 * code))]
        self.net = nn.Sequential(*parts)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Code:
        mean, log_variance = self.net(image).float().chunk(2, -1)
        return Code(mean, torch.exp(0.5 * log_variance))


class BetaVAEDecoder(nn.Module):
    """Mirror of `BetaVAEEncoder`, from a feature (N, F) through ``code`` numbers: linear, linear, transposed convolutions; ELU between.

    64 pixels: 1 -> 4 -> 8 -> 16 -> 32 -> 64. Transposed convolutions begin as PyTorch's (release).
    """

    feed_forward = True  # --compile compiles it

    def __init__(self, feature: int, code: int, *, depth: int = 32, image_size: int = 64) -> None:
        super().__init__()
        widths = [*reversed(_widths(depth, image_size)), 3]
        parts: list[nn.Module] = [_kaiming(nn.Linear(feature, code)), nn.ELU(), _kaiming(nn.Linear(code, 8 * depth)), nn.ELU()]
        parts += [nn.Unflatten(-1, (8 * depth, 1, 1)), nn.ConvTranspose2d(8 * depth, widths[0], 4)]
        for a, b in itertools.pairwise(widths):
            parts += [nn.ELU(), nn.ConvTranspose2d(a, b, 4, 2, 1)]
        self.net = nn.Sequential(*parts)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, feat: Tensor) -> Tensor:
        out: Tensor = self.net(feat)
        return out
