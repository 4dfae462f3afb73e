"""Image encoder, decoder and context of a world model in one place, so methods use the terms pixels, embed, decode, context.

B sequences, T positions, E embedding width, F feature width. "pixels" are the input of the networks and the target of the loss:
pictures (N,3,S,S) or, for the stem for CPUs, the same values in blocks (N,48,S/4,S/4); in [-0.5, 0.5] (Table 5: linear rescaling).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from localmotion.config import WorldModelConfig
from localmotion.errors import ConfigError
from localmotion.models.decoders import CNNDecoder, ResNetDecoder
from localmotion.models.encoders import CNNEncoder, ResNetEncoder, from_blocks, random_erasing, to_blocks


class Context(NamedTuple):
    """The context frame of a sequence, as the decoder gets it."""

    maps: list[Tensor]  # (B, C, h, w), finest first, to attend to
    pixels: Tensor  # (B, ...) in the decoder's output layout, to copy from
    frame: Tensor  # (B,) its position in the sequence


class _ImageLoss(torch.autograd.Function):
    """Image losses (G,) of G stacked decodings (G*N, ...) of the same N pictures, with the copied context (N = B*T) or without.

    The decoded maps are the largest of an update, and autograd would read them about twenty times (slices padded with zeros, a gradient
    for each factor of the composite, fp32 copies). This function computes the gradient with the loss, on a CPU one sequence at a time,
    so intermediate results stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, decoded: Tensor, truth: Tensor, source: Tensor | None) -> Tensor:
        count = len(truth)
        groups = len(decoded) // count
        time = count * groups // len(source) if source is not None else min(count, 32)
        span = time if decoded.device.type == "cpu" else count
        # Rows (N, h, w, C): channels last, as in memory
        given, wanted = decoded.permute(0, 2, 3, 1), truth.permute(0, 2, 3, 1)
        gradient = torch.empty_like(decoded) if ctx.needs_input_grad[0] else None
        losses = []
        for begin in range(0, groups * count, count):
            parts = []
            for first in range(0, count, span):
                last = min(first + span, count)
                here = slice(begin + first, begin + last)
                seen = None if source is None else source[here.start // time : here.stop // time]
                to = None if gradient is None else gradient.permute(0, 2, 3, 1)[here]
                parts.append(_piece(given[here], wanted[first:last], seen, to, 1.0 / count))
            losses.append(torch.stack(parts).sum())
        ctx.save_for_backward(gradient)
        return torch.stack(losses) * (0.5 / count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = grads[0].to(gradient.dtype).view(-1, 1, 1, 1, 1)
        return (gradient.unflatten(0, (len(scale), -1)) * scale).flatten(0, 1), None, None


def _piece(rows: Tensor, wanted: Tensor, source: Tensor | None, gradient: Tensor | None, scale: float) -> Tensor:
    """Summed squared error of rows (N, h, w, C) against ``wanted``, fp32; writes ``scale`` times the gradient of its half."""
    colours, dtype = wanted.shape[-1], rows.dtype
    if source is None:
        error = rows.float() - wanted
    else:
        # `composite`. A broadcast over a last dimension of three is very slow on a CPU, so products with a 0/1 matrix copy a pixel's
        # share to its three colours and sum over these in the backward pass.
        spread = torch.eye(colours // 3, device=rows.device, dtype=dtype).repeat_interleave(3, 1)
        seen = source.permute(0, 2, 3, 1).unsqueeze(1).to(dtype)  # (B, 1, h, w, 3P)
        share = rows[..., colours:].contiguous().sigmoid_()  # (N, h, w, P)
        copied = ((share @ spread).unflatten(0, (len(source), -1)) * seen).flatten(0, 1)  # (N, h, w, 3P)
        error = rows[..., :colours].add(copied).float().sub_(wanted)  # (N, h, w, 3P)
    if gradient is not None:
        torch.mul(error, scale, out=gradient[..., :colours])
        if source is not None:
            to_copied = (gradient[..., :colours].unflatten(0, (len(source), -1)) * seen).flatten(0, 1)  # (N, h, w, 3P)
            gradient[..., colours:] = (to_copied @ spread.t()) * (share * (1 - share))
    return torch.linalg.vector_norm(error).square()


def image_losses(decoded: Tensor, truth: Tensor, source: Tensor | None = None) -> Tensor:
    """Image losses (G,) of G stacked decodings, fp32: half the squared error of a picture (unit-variance Gaussian), mean over frames.

    ``decoded`` (G*N, C, h, w) is the output of `ResNetDecoder.features` or of a plain decoder, ``truth`` (N, ...) the pixels, ``source``
    (G*B, ...) the pixels of the context frames if the decoder copies. Differentiable in ``decoded`` only.
    """
    losses: Tensor = _ImageLoss.apply(decoded, truth, source)
    return losses


class ImageModel(nn.Module):
    """Encoder, optional context encoder (separate weights), decoder. Raises ConfigError for a context with plain networks."""

    def __init__(self, config: WorldModelConfig, *, image_size: int) -> None:
        super().__init__()
        if config.encoder == "cnn" and config.context:
            raise ConfigError("world.encoder=cnn has no context frame: add world.context=false, or keep world.encoder=resnet")
        feat = config.stoch * config.classes + config.deter
        self.blocks = config.encoder == "resnet" and config.stem == "unshuffle"
        self.context_encoder: ResNetEncoder | None = None
        self.copies = False
        if config.encoder == "cnn":
            self.encoder: CNNEncoder | ResNetEncoder = CNNEncoder(depth=config.depth, image_size=image_size)
            self.decoder: CNNDecoder | ResNetDecoder = CNNDecoder(feat, depth=config.depth, image_size=image_size)
        else:
            shape = {"depth": config.depth, "image_size": image_size, "stem": config.stem, "norm": config.norm}
            encoder = ResNetEncoder(**shape)  # type: ignore[arg-type]
            self.encoder = encoder
            if config.context:
                self.context_encoder = ResNetEncoder(**shape)  # type: ignore[arg-type]
            self.copies = config.context and config.context_copy
            self.decoder = ResNetDecoder(
                2 * feat if self.copies else feat,
                encoder.map_shapes,
                stem=config.stem,
                norm=config.norm,
                context=config.context,
                mask=config.context_mask,
                dropout=config.context_dropout,
                finest=config.context_side,
                copy=self.copies,
            )
        self.embed_dim = self.encoder.embed_dim
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def pixels(self, image: Tensor) -> Tensor:
        """(..., S, S, 3) uint8 -> pixels (N, ...), channels last in memory."""
        flat = image.flatten(0, -4)
        arranged = to_blocks(flat) if self.blocks else flat.permute(0, 3, 1, 2)
        return arranged.float().mul_(1.0 / 255.0).sub_(0.5)

    def picture(self, pixels: Tensor) -> Tensor:
        """Convert pixels to pictures (N, 3, S, S)."""
        return from_blocks(pixels) if self.blocks else pixels

    def embed(self, image: Tensor) -> Tensor:
        """(..., S, S, 3) uint8 -> (N, E)."""
        return self.encoder(self.pixels(image))

    def encode(
        self, pixels: Tensor, image: Tensor, *, erase: bool = False, frame: int | None = None
    ) -> tuple[Tensor, Context | None]:
        """Embeddings (B,T,E) of the pixels of ``image`` (B,T,S,S,3) uint8, and the context from one frame per sequence.

        ``frame`` is the position of the context frame; None: a random one, as in IPV's training. A prediction must choose a frame that it
        observes. ``erase`` applies random erasing to the context frame, as in IPV's release.
        """
        batch, time = image.shape[:2]
        embed = self.encoder(pixels).view(batch, time, -1)  # (B*T, E) -> (B, T, E)
        if self.context_encoder is None:
            return embed, None
        rows = torch.arange(batch, device=image.device)
        pick = torch.randint(time, (batch,), device=image.device) if frame is None else torch.full_like(rows, frame)  # (B,)
        seen = image[rows, pick]  # (B, S, S, 3)
        chosen = self.pixels(random_erasing(seen) if erase else seen)
        return embed, Context(self.context_encoder.maps(chosen)[1], chosen, pick)

    def losses(self, feats: Sequence[Tensor], context: Context | None, truth: Tensor) -> Tensor:
        """Image loss of each of G features (B,T,F) of the same pictures, decoded in one call: (G,). ``truth``: their pixels."""
        feat = torch.cat([self._conditioned(feat, context) for feat in feats])  # (G*B*T, F or 2F)
        if context is None or isinstance(self.decoder, CNNDecoder):
            return image_losses(self.decoder(feat), truth)
        maps = [torch.cat([x] * len(feats)) for x in context.maps]  # (G*B, C, h, w) each
        source = torch.cat([context.pixels] * len(feats)) if self.copies else None
        return image_losses(self.decoder.features(feat, maps), truth, source)

    def decode(self, feat: Tensor, context: Context | None) -> Tensor:
        """Pixels (B*T, ...) of features (B,T,F). ``context`` is that of the same sequences."""
        flat = self._conditioned(feat, context)
        return self.decoder(flat) if context is None else self.decoder(flat, context.maps, context.pixels)

    def pictures(self, feat: Tensor, context: Context | None) -> Tensor:
        """Pictures (B,T,3,S,S) in [-0.5, 0.5] of features (B,T,F). ``context`` is that of the same sequences."""
        return self.picture(self.decode(feat, context)).unflatten(0, feat.shape[:2])

    def _conditioned(self, feat: Tensor, context: Context | None) -> Tensor:
        """(B*T, F). For a decoder that copies, (B*T, 2F) with the difference from the context frame's feature: copying depends on both."""
        if context is not None and self.copies:
            there = feat[torch.arange(len(feat), device=feat.device), context.frame].unsqueeze(1)  # (B, 1, F)
            feat = torch.cat([feat, there - feat], -1)  # (B, T, 2F)
        return feat.flatten(0, 1)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Encoder and context encoder."""
        context = list(self.context_encoder.parameters()) if self.context_encoder is not None else []
        return [*self.encoder.parameters(), *context]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """Decoder."""
        return list(self.decoder.parameters())
