"""IPV's picture model written out: encoders, the context frame, the decoder that attends to it, and the loss of a picture.

Written from arXiv 2305.18499 (section 3 and its appendix; DRP takes it over, arXiv 2607.00808 Eq. 4) and from what each weight means, in
float64, with no function of the product. `stem="unshuffle"` and `context_copy` are the project's own: 4x4 pixels as channels, and the
context frame's pixels added to the drawn picture by a share that the decoder predicts.

Weights are a dict of names without the module's prefix. N pictures, B sequences, T positions, S side. Maps are (N, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from written_out.motion import Weights, linear, under

Draw = Callable[..., Tensor]
"""``draw(*shape)``: the uniform numbers of that shape that the update drew at this place."""


def pixels(pictures: Tensor, world: Any) -> Tensor:
    """What the network sees of (N,S,S,3) bytes: values from -0.5 to 0.5, colours first; 4x4 pixels as channels with that stem."""
    x = pictures.double() / 255 - 0.5
    if world.encoder == "resnet" and world.stem == "unshuffle":
        return torch.stack([x[:, row::4, column::4, colour] for row in range(4) for column in range(4) for colour in range(3)], 1)
    return torch.stack([x[..., colour] for colour in range(3)], 1)


def elu(x: Tensor) -> Tensor:
    """x above zero, exp(x) - 1 below."""
    return torch.where(x > 0, x, x.clamp(max=0).exp() - 1)


def convolution(weights: Weights, name: str, x: Tensor, *, stride: int = 1, border: int = 0) -> Tensor:
    """Weight (out, in, k, k) over windows of x, ``border`` zeros around; bias is optional."""
    return functional.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride, border)


class Norm:
    """Batch normalisation while training; keeps the running statistics that an update leaves behind."""

    def __init__(self) -> None:
        self.statistics: dict[str, Tensor] = {}

    def __call__(self, weights: Weights, name: str, x: Tensor, prefix: str) -> Tensor:
        """x with mean 0 and variance 1 per channel, times weight, plus bias; x itself where the layer has no weights."""
        if f"{name}.weight" not in weights:
            return x
        count = x.numel() / x.shape[1]
        mean = x.mean((0, 2, 3))
        centred = x - mean[:, None, None]
        variance = centred.square().mean((0, 2, 3))
        for key, now in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
            self.statistics[f"{prefix}.{name}.{key}"] = 0.9 * weights[f"{name}.{key}"] + 0.1 * now.detach()
        batches = f"{name}.num_batches_tracked"
        self.statistics[f"{prefix}.{batches}"] = weights[batches] + 1
        out = centred / (variance + 1e-5).sqrt()[:, None, None]
        return out * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


class Picture:
    """The picture model with its weights; ``statistics`` are the running statistics after the calls that were made."""

    def __init__(self, weights: Weights, world: Any, image_size: int, prefix: str = "image") -> None:
        self.weights, self.world, self.side, self.prefix = weights, world, image_size, prefix
        self.norm, self.erased = Norm(), 0
        self.copies = world.context and world.context_copy

    @property
    def statistics(self) -> dict[str, Tensor]:
        return self.norm.statistics

    def residual(self, name: str, x: Tensor, inner: Tensor | None = None) -> Tensor:
        """relu(skip(x) + conv relu conv (inner)): ``inner`` is x unless attention changed it."""
        weights, prefix = under(self.weights, name), f"{self.prefix}.{name}"
        y = x if inner is None else inner
        for step in ("main.0", "main.2"):
            y = self.norm(weights, f"{step}.1", convolution(weights, f"{step}.0", y, border=1), prefix)
            y = y.clamp(min=0) if step == "main.0" else y
        if "skip.0.weight" in weights:
            x = self.norm(weights, "skip.1", convolution(weights, "skip.0", x), prefix)
        return (x + y).clamp(min=0)

    def encode(self, name: str, seen: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embedding (N, E) and each stage's map before it is pooled."""
        blocks = self.world.stem == "unshuffle"
        x = elu(convolution(self.weights, f"{name}.stem", seen, stride=1 if blocks else 2, border=1))
        maps = []
        for stage in range(2 if blocks else 3):
            for layer in range(1 if blocks else 2):
                x = self.residual(f"{name}.stages.{stage}.{layer}", x)
            maps.append(x)
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        return x.flatten(1), maps

    def attention(self, name: str, x: Tensor, context: Tensor, draw: Draw) -> Tensor:
        """relu(x + norm(cross attention)): each frame's tokens ask a random quarter of its context's tokens, drawn anew per frame."""
        weights, world = under(self.weights, name), self.world
        frames, channels, height, width = x.shape
        each, cells = frames // len(context), height * width
        keep = int(cells * (1 - world.context_mask))
        noise = draw(frames, cells)
        to_query, to_key, to_value = weights["attention.in_proj_weight"].chunk(3)
        query_bias, key_bias, value_bias = weights["attention.in_proj_bias"].chunk(3)
        heads, scores, values = 4, [], []
        for frame in range(frames):
            tokens = context[frame // each].flatten(1).T + weights["key_position"]
            order = sorted((-float(number), cell) for cell, number in enumerate(noise[frame]))
            chosen = tokens[[cell for _, cell in order[:keep]]]
            query = (x[frame].flatten(1).T + weights["query_position"]) @ to_query.T + query_bias
            key, value = chosen @ to_key.T + key_bias, chosen @ to_value.T + value_bias
            score = [
                (q @ k.T / math.sqrt(channels / heads)).softmax(1)
                for q, k in zip(query.chunk(heads, 1), key.chunk(heads, 1), strict=True)
            ]
            scores.append(torch.stack(score))
            values.append(torch.stack(value.chunk(heads, 1)))
        share = self.dropped(torch.stack(scores), draw)  # (frames, heads, cells, keep)
        picked = torch.cat((share @ torch.stack(values)).unbind(1), -1)  # (frames, cells, channels)
        out = self.dropped(linear(weights, "attention.out_proj", picked), draw)
        change = out.transpose(1, 2).reshape(frames, channels, height, width)
        return (x + self.norm(weights, "norm", change, f"{self.prefix}.{name}")).clamp(min=0)

    def dropped(self, x: Tensor, draw: Draw) -> Tensor:
        """Dropout: a value whose number is below the rate becomes zero, the others grow to keep the mean."""
        rate = self.world.context_dropout
        return x * (draw(*x.shape) >= rate) / (1 - rate) if rate else x

    def decode(self, feat: Tensor, maps: list[Tensor] | None, draw: Draw) -> Tensor:
        """Decoder output (N, C, h, w) of features (N, F), before the context's pixels are added."""
        blocks = self.world.stem == "unshuffle"
        stages = 2 if blocks else 3
        width = self.world.depth * 2 ** (stages - 1)
        side = self.side // (4 if blocks else 2) // 2**stages
        x = linear(self.weights, "decoder.linear", feat).reshape(-1, width, side, side)
        for stage in range(stages):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            for layer in range(1 if blocks else 2):
                inner = None
                if layer == 0 and maps is not None and x.shape[-1] <= self.world.context_side:
                    inner = self.attention(f"decoder.attention.{stage}", x, maps[stages - 1 - stage], draw)
                x = self.residual(f"decoder.stages.{stage}.{layer}", x, inner)
        weights = under(self.weights, "decoder")
        return (
            convolution(weights, "out", x, border=1)
            if blocks
            else functional.conv_transpose2d(x, weights["out.weight"], weights["out.bias"], 2, 1, 1)
        )

    def losses(self, feats: list[Tensor], context: Context | None, truth: Tensor, draw: Draw) -> list[Tensor]:
        """Of each feature (B,T,F): half the squared error, summed over a picture, mean over pictures. One call decodes them all."""
        given = []
        for feat in feats:
            rows = []
            for b in range(len(feat)):
                there = feat[b, context.frame[b]] - feat[b] if context is not None and self.copies else None
                rows.append(feat[b] if there is None else torch.cat([feat[b], there], -1))
            given.append(torch.cat(rows))
        maps = None if context is None else [torch.cat([x] * len(feats)) for x in context.maps]
        drawn = self.decode(torch.cat(given), maps, draw)
        count = len(truth)
        out = []
        for group in range(len(feats)):
            picture = drawn[group * count : (group + 1) * count]
            if context is not None and self.copies:
                picture = composite(picture, context.pixels)
            out.append(0.5 * (picture - truth).square().sum() / count)
        return out


class Context:
    """A sequence's context: which ``frame`` (B,) it is, its ``pixels`` as the network sees them, and its ``maps``."""

    def __init__(self, frame: list[int], seen: Tensor, maps: list[Tensor]) -> None:
        self.frame, self.pixels, self.maps = frame, seen, maps


def composite(drawn: Tensor, context: Tensor) -> Tensor:
    """drawn + share * context: the last quarter of the channels are the share's logits, one a pixel for its three colours."""
    pixel_count = drawn.shape[1] // 4
    colours, logits = drawn[:, : 3 * pixel_count], drawn[:, 3 * pixel_count :]
    share = 1 / (1 + (-logits).exp())
    each = len(drawn) // len(context)
    out = []
    for channel in range(3 * pixel_count):
        seen = torch.stack([context[n // each, channel] for n in range(len(drawn))])
        out.append(colours[:, channel] + share[:, channel // 3] * seen)
    return torch.stack(out, 1)


def erased(picture: Tensor, u: list[float]) -> Tensor:
    """A copy of (S,S,3) bytes in which a rectangle became mid-grey, if the sixth number is below a half.

    Its area is 2 to 33 % of the picture; its height over its width lies in (0.3, 1) or in (1, 3.3), with the same probability.
    """
    side = len(picture)
    ratio = 0.3 + 0.7 * u[1] if u[0] < 0.5 else 1 + 2.3 * u[1]
    area = (0.02 + 0.31 * u[2]) * side * side
    tall, wide = min(math.sqrt(area * ratio), side), min(math.sqrt(area / ratio), side)
    top, left = u[3] * (side - tall), u[4] * (side - wide)
    out = picture.clone()
    if u[5] < 0.5:
        for row in range(side):
            for column in range(side):
                if top <= row < top + tall and left <= column < left + wide:
                    out[row, column] = 128
    return out


def observe(
    model: Picture, batch: Mapping[str, Tensor], draw: Draw, pick: Callable[[int, int], list[int]], *, erase: bool
) -> tuple[Tensor, Context | None, Tensor]:
    """Embeddings (B,T,E), the context of one frame of each sequence, and the pictures as the network sees them.

    ``pick(time, count)``: the frames that the update drew.
    """
    image = batch["image"]
    truth = pixels(image.flatten(0, 1), model.world)
    embed = model.encode("encoder", truth)[0].unflatten(0, image.shape[:2])
    if not model.world.context:
        return embed, None, truth
    frame = pick(image.shape[1], len(image))
    pictures = [image[b, frame[b]] for b in range(len(image))]
    if erase:
        noise = draw(len(image), 6).tolist()
        whole, pictures = pictures, [erased(picture, u) for picture, u in zip(pictures, noise, strict=True)]
        model.erased += sum(not torch.equal(*pair) for pair in zip(whole, pictures, strict=True))
    seen = pixels(torch.stack(pictures), model.world)
    return embed, Context(frame, seen, model.encode("context_encoder", seen)[1]), truth
