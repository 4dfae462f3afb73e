"""Image encoders, decoders and their loss, written out. Shapes: N pictures, S side, E embedding, F features; maps are (N, C, h, w)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from written_out.core import Weights, elu, linear


def pixels(image: Tensor, *, unshuffle: bool = False) -> Tensor:
    """(B, T, S, S, 3) uint8 -> (B*T, 3, S, S) in [-0.5, 0.5]; with ``unshuffle`` in blocks of 4x4, (B*T, 48, S/4, S/4).

    A block's channels are in the order row, column, colour.
    """
    x = image.flatten(0, 1).double() / 255 - 0.5  # (N, S, S, 3)
    if not unshuffle:
        return x.permute(0, 3, 1, 2)
    corners = [x[:, row::4, column::4] for row in range(4) for column in range(4)]
    return torch.cat(corners, -1).permute(0, 3, 1, 2)


def image_loss(decoded: Tensor, truth: Tensor) -> Tensor:
    """-ln N(truth; decoded, 1) without its constant: half the squared error summed over a picture, mean over pictures."""
    return (0.5 * (decoded - truth) ** 2).flatten(1).sum(1).mean()


# 1. DreamerV2's plain networks ------------------------------------------------------------------------------------------------


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


# 2. IPV's residual networks (arXiv 2305.18499, appendix) ------------------------------------------------------------------------


def batch_norm(state: Any, w: Weights, prefix: str, x: Tensor) -> Tensor:
    """Batch normalisation (arXiv 1502.03167) in training: statistics of the batch, epsilon 1e-5.

    The running statistics in ``state.weights`` move by a tenth of the way to the batch's, the variance with N - 1.
    """
    mean = x.mean((0, 2, 3))
    variance = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
    count = x.numel() / x.shape[1]
    for name, value in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
        state.weights[prefix + name] = 0.9 * state.weights[prefix + name] + 0.1 * value.detach()
    state.weights[f"{prefix}num_batches_tracked"] = state.weights[f"{prefix}num_batches_tracked"] + 1
    normed = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
    return normed * w[f"{prefix}weight"][:, None, None] + w[f"{prefix}bias"][:, None, None]


def _convolve(state: Any, w: Weights, prefix: str, x: Tensor) -> Tensor:
    """Convolution of stride 1 that keeps the size, then batch normalisation where its weights are there: {prefix}0., {prefix}1. ."""
    kernel = w[f"{prefix}0.weight"]
    x = F.conv2d(x, kernel, w.get(f"{prefix}0.bias"), padding=kernel.shape[-1] // 2)
    return batch_norm(state, w, f"{prefix}1.", x) if f"{prefix}1.weight" in w else x


def residual_layer(state: Any, w: Weights, prefix: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    """ReLU(skip(x) + convolve(ReLU(convolve(y)))), y = x unless given; the skip is a 1x1 convolution where the width changes."""
    main = _convolve(state, w, f"{prefix}main.0.", x if y is None else y).relu()
    main = _convolve(state, w, f"{prefix}main.2.", main)
    skip = _convolve(state, w, f"{prefix}skip.", x) if f"{prefix}skip.0.weight" in w else x
    return (skip + main).relu()


def _count(w: Weights, prefix: str) -> int:
    """How many numbered parts a network has under a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in w if name.startswith(prefix)})


def resnet_encoder(state: Any, w: Weights, prefix: str, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(N, 3, S, S), or in blocks (N, 48, S/4, S/4) -> embedding (N, E), and the map of each stage before its pooling, finest first.

    A convolution with ELU (stride 2 on pictures, 1 on blocks), then stages of residual layers, each pooled to half by its mean.
    """
    stride = 1 if x.shape[1] % 16 == 0 else 2  # blocks of 16 pixels, or pixels
    x = elu(F.conv2d(x, w[f"{prefix}stem.weight"], w[f"{prefix}stem.bias"], stride=stride, padding=1))
    maps = []
    for stage in range(_count(w, f"{prefix}stages.")):
        for layer in range(_count(w, f"{prefix}stages.{stage}.")):
            x = residual_layer(state, w, f"{prefix}stages.{stage}.{layer}.", x)
        maps.append(x)
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.flatten(1), maps


def resnet_decoder(
    state: Any, w: Weights, prefix: str, feat: Tensor, side: int, attend: Callable[[int, Tensor], Tensor] | None = None
) -> Tensor:
    """(N, F) -> (N, 3, S, S), or blocks: the encoder's mirror, from a map of ``side`` cells; stages double it by repetition.

    ``attend(stage, x)``: what the first layer of a stage has in its main path in place of x (cross-attention to the context).
    """
    x = linear(w, f"{prefix}linear", feat)
    x = x.reshape(len(x), -1, side, side)
    for stage in range(_count(w, f"{prefix}stages.")):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for layer in range(_count(w, f"{prefix}stages.{stage}.")):
            y = attend(stage, x) if attend is not None and layer == 0 else None
            x = residual_layer(state, w, f"{prefix}stages.{stage}.{layer}.", x, y)
    kernel, bias = w[f"{prefix}out.weight"], w[f"{prefix}out.bias"]
    if bias.shape[0] % 16 == 0:  # blocks
        return F.conv2d(x, kernel, bias, padding=1)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1, output_padding=1)


# 3. Either of them ------------------------------------------------------------------------------------------------------------


def encode(state: Any, w: Weights, image: Tensor, world: Any) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, E) of pictures (B, T, S, S, 3), and the pixels (B*T, ...) as the networks see and make them."""
    unshuffle = world.encoder == "resnet" and world.stem == "unshuffle"
    truth = pixels(image, unshuffle=unshuffle)
    if world.encoder == "cnn":
        embed = cnn_encoder(w, "image.encoder.", truth)
    else:
        embed, _ = resnet_encoder(state, w, "image.encoder.", truth)
    return embed.unflatten(0, image.shape[:2]), truth


def decode(state: Any, w: Weights, feat: Tensor, world: Any, side: int = 4) -> Tensor:
    """Features (B, T, F) -> pixels (B*T, ...), without context. ``side``: cells of the coarsest map, a sixteenth of the picture's side."""
    flat = feat.flatten(0, 1)
    if world.encoder == "cnn":
        return cnn_decoder(w, "image.decoder.", flat)
    return resnet_decoder(state, w, "image.decoder.", flat, side)
