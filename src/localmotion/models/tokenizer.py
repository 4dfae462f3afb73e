"""A tokenizer of pictures: a convolutional VQ-VAE whose codebook follows moving averages.

    psi = encoder(o)      maps of side S / 2^stages, one feature of D numbers a cell
    s = argmin_k |psi - code_k|      one token of V a cell
    o^ = decoder(psi + sg(code_s - psi))
    losses      mse_weight E |o^ - o|^2 + mae_weight E |o^ - o| + commitment E |psi - sg(code_s)|^2, with pictures in [-1, 1]

Papers: VQ-VAE arXiv 1711.00937 (the losses; codes that follow averages: its appendix A.1), VQGAN arXiv 2012.09841 (the networks, which are
smaller here, and the optional losses of `models.vqgan_losses`), Jukebox arXiv 2005.00341, section 3.1 (restart of unused codes).

Shapes: B pictures, S side, N cells, D numbers of a feature, V codes, C channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion import ranks
from localmotion.errors import ConfigError
from localmotion.limits import Limits, at_least, shares


@dataclass(frozen=True)
class TokenizerConfig:
    """Settings of the tokenizer."""

    widths: tuple[int, ...] = (64, 128, 256)
    """Channels of the stages. Each stage halves the side: three make 8x8 tokens of 64 pixels."""
    blocks: int = 2
    """Residual blocks of a stage, and after the attention."""
    codes: int = 1024
    """Codes V of the codebook."""
    code_dim: int = 256
    """Numbers D of a code."""
    code_decay: float = 0.99
    """Decay of the averages that codes follow."""
    restart: float = 0.01
    """A code that is used less often than this share of the mean of all codes becomes a random feature of the batch."""
    quantise_from: int = 2_000
    """Update from which pictures pass through the codes. Before it the tokenizer is an autoencoder without codes, and then all codes begin
    as features. From the start, codes of untrained features are nearly equal: some runs then never draw a small object."""
    commitment: float = 0.25
    """Weight of the loss that keeps features near their codes."""
    mse_weight: float = 5.0
    """Weight of the squared error of pictures in [-1, 1]."""
    mae_weight: float = 0.0
    """Weight of the absolute error. VQGAN has it, beside the perceptual loss. Alone it asks for the median of each pixel, and of a pixel
    that a thin arm rarely covers this is the background: on planar:reacher_easy the tokenizer then drew no arm."""
    perceptual: str = ""
    """File of VGG16's weights (safetensors, names of torchvision) for VQGAN's perceptual loss. Empty: none."""
    perceptual_weight: float = 1.0
    """Weight of that loss."""
    adversarial: float = 0.0
    """Weight of VQGAN's adversarial loss. 0: none, and no discriminator."""
    adversarial_from: int = 50_000
    """Update with which it begins."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "codes", "code_dim"),
        **at_least(
            0,
            "blocks",
            "restart",
            "quantise_from",
            "commitment",
            "mse_weight",
            "mae_weight",
            "perceptual_weight",
            "adversarial",
            "adversarial_from",
        ),
        **shares("code_decay"),
    }


def group_norm(width: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or with two channels a group where there are fewer than 64."""
    return nn.GroupNorm(math.gcd(32, max(width // 2, 1)), width)


class NormResidual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3, the same number of channels outside and inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(group_norm(width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            out = conv(F.silu(norm(out)))
        return x + out


class CellAttention(nn.Module):
    """x + attention over all cells of x (B, C, side, side), with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.out = group_norm(width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)  # (B, N, C) each
        found = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(found.transpose(1, 2).reshape(x.shape))


class _Up(nn.Module):
    """Side times two by repetition, then a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _middle(width: int, blocks: int) -> list[nn.Module]:
    return [CellAttention(width), *(NormResidual(width) for _ in range(blocks))]


class Encoder(nn.Sequential):
    """3x3 convolution; per stage residual blocks and a convolution of stride 2; attention, residual blocks, norm, SiLU, convolution."""

    feed_forward = True  # --compile compiles it

    def __init__(self, widths: Sequence[int], blocks: int, dim: int) -> None:
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for a, b in zip(widths, (*widths[1:], widths[-1]), strict=True):
            parts += [*(NormResidual(a) for _ in range(blocks)), nn.Conv2d(a, b, 3, 2, 1)]
        parts += [*_middle(widths[-1], blocks), group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], dim, 3, padding=1)]
        super().__init__(*parts)


class Decoder(nn.Sequential):
    """Mirror of `Encoder`, with upsampling by repetition. Its pictures are not bounded."""

    feed_forward = True  # --compile compiles it

    def __init__(self, widths: Sequence[int], blocks: int, dim: int) -> None:
        back = widths[::-1]
        parts: list[nn.Module] = [nn.Conv2d(dim, back[0], 3, padding=1), *_middle(back[0], blocks)]
        for a, b in itertools.pairwise((back[0], *back)):
            parts += [_Up(a, b), *(NormResidual(b) for _ in range(blocks))]
        parts += [group_norm(back[-1]), nn.SiLU(), nn.Conv2d(back[-1], 3, 3, padding=1)]
        super().__init__(*parts)


class Codebook(nn.Module):
    """V codes of D numbers. Each follows the mean of the features that are nearest to it, averaged over updates.

        count <- decay count + (1 - decay) number of its features,   total <- decay total + (1 - decay) sum of its features
        code = total / count

    A code whose count is below ``restart`` of the mean count becomes a random feature of the batch and gets the mean count. Counts begin
    at zero, so the first update takes all codes that no feature was near to from the batch.
    """

    embedding: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, codes: int, dim: int, decay: float, restart: float) -> None:
        super().__init__()
        self.decay, self.restart = decay, restart
        self.register_buffer("embedding", torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))  # as in VQGAN
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("total", torch.zeros(codes, dim))

    def nearest(self, features: Tensor) -> Tensor:
        """Features (..., D) -> numbers of their nearest codes (...), int64. In full precision also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            flat = features.detach().float().flatten(0, -2)
            distance = torch.addmm(self.embedding.square().sum(-1), flat, self.embedding.T, alpha=-2.0)  # (rows, V), + |flat|^2
            return distance.argmin(-1).view(features.shape[:-1])

    @torch.no_grad()
    def follow(self, features: Tensor, tokens: Tensor, begin: Tensor) -> None:
        """Move the codes towards their features (..., D) of numbers ``tokens`` (...). With ``begin`` () all become random features."""
        rows, share = features.detach().float().flatten(0, -2), 1 - self.decay  # (R, D)
        number = torch.arange(len(self.count), device=tokens.device)
        chosen = (tokens.flatten().unsqueeze(1) == number).to(rows.dtype)  # (R, V), one-hot: one order of sums on every device
        with torch.autocast(rows.device.type, enabled=False):
            self.count.mul_(self.decay).add_(ranks.total(chosen.sum(0)), alpha=share)
            self.total.mul_(self.decay).add_(ranks.total(chosen.T @ rows), alpha=share)
        mean = self.count.mean()
        fresh = ranks.first(rows[torch.randint(len(rows), (len(self.count),), device=rows.device)])  # (V, D)
        idle = begin | (self.count < self.restart * mean)
        self.count.copy_(torch.where(idle, mean, self.count))
        self.total.copy_(torch.where(idle.unsqueeze(-1), fresh * mean, self.total))
        self.embedding.copy_(self.total / self.count.unsqueeze(-1))


class Tokenizer(nn.Module):
    """VQ-VAE. Codes move only in `learn`, in training mode."""

    quantising: Tensor

    def __init__(self, config: TokenizerConfig, image_size: int) -> None:
        """Raises ConfigError for pictures that the stages cannot halve, and for shares outside of (0, 1)."""
        super().__init__()
        halved = 1 << len(config.widths)
        if not config.widths or image_size % halved:
            raise ConfigError(f"pictures of side {image_size}: {len(config.widths)} stages need a multiple of {halved}")
        if not 0 < config.restart < 1 or not 0 < config.code_decay < 1:
            raise ConfigError(f"code_decay={config.code_decay:g}, restart={config.restart:g}: both are between 0 and 1")
        self.config = config
        self.side, self.dim, self.codes = image_size // halved, config.code_dim, config.codes
        self.cells = self.side**2
        self.encoder = Encoder(config.widths, config.blocks, config.code_dim)
        self.decoder = Decoder(config.widths, config.blocks, config.code_dim)
        self.codebook = Codebook(config.codes, config.code_dim, config.code_decay, config.restart)
        self.register_buffer("quantising", torch.tensor(float(config.quantise_from == 0)))  # 1: pictures pass through the codes
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-0.5, 0.5] -> psi (B, N, D), before quantisation, float32."""
        maps: Tensor = self.encoder(2 * image)
        return maps.flatten(2).transpose(1, 2).float()

    def tokens(self, features: Tensor) -> Tensor:
        """psi (B, N, D) -> numbers of the nearest codes (B, N), int64."""
        return self.codebook.nearest(features)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (..., N) -> their codes (..., N, D)."""
        return F.embedding(tokens, self.codebook.embedding)

    def decode(self, embeddings: Tensor) -> Tensor:
        """Codes (B, N, D) -> pictures (B, 3, S, S), near [-0.5, 0.5] but not bounded, float32."""
        maps = embeddings.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, D, side, side)
        image: Tensor = self.decoder(maps.contiguous(memory_format=torch.channels_last))
        return image.float() / 2

    def learn(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Losses of pictures (B, 3, S, S): their reconstruction (B, 3, S, S), the losses "image" and "commitment", and metrics.

        In training mode it also moves the codes, after their use.
        """
        features = self.features(image)
        tokens = self.tokens(features)
        nearest = self.embed(tokens)
        found = self.decode(features + self.quantising * (nearest - features).detach())
        error = 2 * (found - image)
        squared = error.square().mean()
        losses = {
            "image": self.config.mse_weight * squared + self.config.mae_weight * error.abs().mean(),
            "commitment": self.quantising * (features - nearest).square().mean(),
        }
        metrics = {"image/psnr": decibels(squared.detach() / 4), "codes/used": self.used(tokens)}
        if self.training:
            self.codebook.follow(features, tokens, self.quantising == 0)
        return found, losses, metrics

    def used(self, tokens: Tensor) -> Tensor:
        """Share of the codes that is among some tokens (...)."""
        seen = torch.zeros_like(self.codebook.count).index_fill_(0, tokens.flatten(), 1.0)
        return seen.mean()


def decibels(error: Tensor) -> Tensor:
    """PSNR of a mean squared error (...) of pictures whose values span 1."""
    return -10 * error.clamp(min=1e-10).log10()
