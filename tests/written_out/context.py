"""IPV's context written out: one frame of a sequence, which the decoder attends to, and the loss of a picture.

Written from arXiv 2305.18499 (section 3 and its appendix; DRP takes it over, arXiv 2607.00808 Eq. 4) and from what each weight means, in
float64, with no function of the product. `context_copy` is the project's own: the context frame's pixels are added to the drawn picture
by a share that the decoder predicts.

N pictures, B sequences, T positions, S side. Maps are (N, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from written_out import images
from written_out.motion import Weights, linear, under

HEADS = 4


class Context(NamedTuple):
    """A sequence's context: which ``frame`` (B,) it is, its ``pixels`` as the network sees them, and its ``maps``, finest first."""

    frame: list[int]
    pixels: Tensor
    maps: list[Tensor]


def observe(
    state: Any, w: Weights, batch: Mapping[str, Tensor], world: Any, noise: Any, *, erase: bool
) -> tuple[Tensor, Context | None, Tensor]:
    """Embeddings (B,T,E), the context, which is a frame of each sequence, and the pictures as the network sees them."""
    image = batch["image"]
    embed, truth = images.encode(state, w, image, world)
    if not world.context or world.encoder == "cnn":  # DreamerV2's plain networks have no context
        return embed, None, truth
    frame = [int(position) for position in noise.integers(image.shape[1], (len(image),))]
    pictures = [image[b, position] for b, position in enumerate(frame)]
    if erase:
        pictures = [
            erased(picture, noise_row.tolist())
            for picture, noise_row in zip(pictures, noise.uniform((len(image), 6)), strict=True)
        ]
    seen = images.pixels(torch.stack(pictures)[:, None], unshuffle=world.stem == "unshuffle")
    return embed, Context(frame, seen, images.resnet_encoder(state, w, "image.context_encoder.", seen)[1]), truth


def losses(
    state: Any, w: Weights, feats: Sequence[Tensor], context: Context | None, truth: Tensor, world: Any, noise: Any
) -> list[Tensor]:
    """Of each feature (B,T,F): half the squared error, summed over a picture, mean over pictures. One call decodes them all."""
    if world.encoder == "cnn":
        return [images.image_loss(images.decode(state, w, feat, world), truth) for feat in feats]
    copies, given = context is not None and world.context_copy, []
    for feat in feats:
        for b, row in enumerate(feat):
            given.append(torch.cat([row, row[context.frame[b]] - row], -1) if context is not None and copies else row)
    maps = [] if context is None else [torch.cat([x] * len(feats)) for x in context.maps]

    def attend(stage: int, x: Tensor) -> Tensor | None:
        if context is None or x.shape[-1] > world.context_side:
            return None
        return attention(state, w, f"image.decoder.attention.{stage}", x, maps[::-1][stage], world, noise)

    stages = 2 if world.stem == "unshuffle" else 3
    side = truth.shape[-1] // (1 if world.stem == "unshuffle" else 2) // 2**stages
    drawn = images.resnet_decoder(state, w, "image.decoder.", torch.cat(given), side, attend)
    pictures = drawn.chunk(len(feats))
    if context is not None and copies:
        pictures = [composite(picture, context.pixels) for picture in pictures]
    return [images.image_loss(picture, truth) for picture in pictures]


def attention(state: Any, w: Weights, name: str, x: Tensor, context: Tensor, world: Any, noise: Any) -> Tensor:
    """relu(x + norm(cross attention)): each frame's tokens ask a random quarter of its context's tokens, drawn anew per frame."""
    weights = under(w, name)
    frames, channels, height, width = x.shape
    each, cells = frames // len(context), height * width
    keep = int(cells * (1 - world.context_mask))
    numbers = noise.uniform((frames, cells))
    to_query, to_key, to_value = weights["attention.in_proj_weight"].chunk(3)
    query_bias, key_bias, value_bias = weights["attention.in_proj_bias"].chunk(3)
    scores, values = [], []
    for frame in range(frames):
        tokens = context[frame // each].flatten(1).T + weights["key_position"]
        order = sorted((-float(number), cell) for cell, number in enumerate(numbers[frame]))
        chosen = tokens[[cell for _, cell in order[:keep]]]
        query = (x[frame].flatten(1).T + weights["query_position"]) @ to_query.T + query_bias
        key, value = chosen @ to_key.T + key_bias, chosen @ to_value.T + value_bias
        score = [
            (q @ k.T / math.sqrt(channels / HEADS)).softmax(1)
            for q, k in zip(query.chunk(HEADS, 1), key.chunk(HEADS, 1), strict=True)
        ]
        scores.append(torch.stack(score))
        values.append(torch.stack(value.chunk(HEADS, 1)))
    share = noise.dropout(torch.stack(scores), world.context_dropout)  # (frames, heads, cells, keep)
    picked = torch.cat((share @ torch.stack(values)).unbind(1), -1)  # (frames, cells, channels)
    out = noise.dropout(linear(weights, "attention.out_proj", picked), world.context_dropout)
    change = out.transpose(1, 2).reshape(frames, channels, height, width)
    if world.norm == "batch":
        change = images.batch_norm(state, w, f"{name}.norm.", change)
    return (x + change).relu()


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
