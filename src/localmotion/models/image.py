"""Image encoder, decoder and context of a world model in one place, so that methods read in terms of pixels, embed, decode, context.

B sequences, T positions, E embedding width, F feature width. "pixels" is what the networks see and the loss compares: pictures
(N,3,S,S) or, for the CPU-friendly stem, the same values in blocks (N,48,S/4,S/4); in [-0.5, 0.5] (Table 5: linear rescaling).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.config import WorldModelConfig
from localmotion.models.decoders import CNNDecoder, ResNetDecoder
from localmotion.models.encoders import CNNEncoder, ResNetEncoder, from_blocks, random_erasing, to_blocks


class Context(NamedTuple):
    """What the decoder knows of a sequence's context frame."""

    maps: list[Tensor]  # (B, C, h, w), finest first, to attend to
    pixels: Tensor  # (B, ...) as the decoder makes them, to copy from
    frame: Tensor  # (B,) its position in the sequence


def image_loss(decoded: Tensor, truth: Tensor) -> Tensor:
    """Half the squared error summed over a picture's values, mean over frames (IPV spec 0.4). Pixels twice -> scalar."""
    return F.mse_loss(decoded.float(), truth, reduction="sum") * (0.5 / len(truth))


class ImageModel(nn.Module):
    """Encoder, optional context encoder (separate weights), decoder."""

    def __init__(self, config: WorldModelConfig, *, image_size: int) -> None:
        super().__init__()
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
        """Pixels back as pictures (N, 3, S, S)."""
        return from_blocks(pixels) if self.blocks else pixels

    def embed(self, image: Tensor) -> Tensor:
        """(..., S, S, 3) uint8 -> (N, E)."""
        return self.encoder(self.pixels(image))

    def encode(
        self, pixels: Tensor, image: Tensor, *, erase: bool = False, frame: int | None = None
    ) -> tuple[Tensor, Context | None]:
        """Embeddings (B,T,E) of the pixels of ``image`` (B,T,S,S,3) uint8, and the context of one frame a sequence.

        ``frame`` is that frame's position; a random one by default, as IPV trains. A prediction must name one it has observed.
        ``erase`` applies random erasing to the context frame (IPV spec 1.5).
        """
        batch, time = image.shape[:2]
        embed = self.encoder(pixels).view(batch, time, -1)
        if self.context_encoder is None:
            return embed, None
        rows = torch.arange(batch, device=image.device)
        pick = torch.randint(time, (batch,), device=image.device) if frame is None else torch.full_like(rows, frame)
        seen = image[rows, pick]  # (B, S, S, 3)
        chosen = self.pixels(random_erasing(seen) if erase else seen)
        return embed, Context(self.context_encoder.maps(chosen)[1], chosen, pick)

    @staticmethod
    def repeat_context(context: Context | None, times: int) -> Context | None:
        """The context for ``times`` stacked batches."""
        if context is None:
            return None
        pixels, frame = (torch.cat([x] * times) for x in (context.pixels, context.frame))
        return Context([torch.cat([x] * times) for x in context.maps], pixels, frame)

    def decode(self, feat: Tensor, context: Context | None) -> Tensor:
        """(B,T,F) -> pixels of (B*T) frames. ``feat`` covers the sequence that `encode` saw.

        A decoder that copies is also told how the feature differs from the context frame's: what to copy depends on both.
        """
        if context is None:
            return self.decoder(feat.flatten(0, 1))
        if self.copies:
            there = feat[torch.arange(len(feat), device=feat.device), context.frame].unsqueeze(1)
            feat = torch.cat([feat, there - feat], -1)
        return self.decoder(feat.flatten(0, 1), context.maps, context.pixels)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Encoder and context encoder."""
        context = list(self.context_encoder.parameters()) if self.context_encoder is not None else []
        return [*self.encoder.parameters(), *context]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """Decoder."""
        return list(self.decoder.parameters())
