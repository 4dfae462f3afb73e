"""Image encoder, decoder and context of a world model in one place, so that methods read in terms of embed, decode, context.

IPV (arXiv 2305.18499), spec facts in models/encoders.py and models/decoders.py. B sequences, T positions, E embedding, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localmotion.config import WorldModelConfig
from localmotion.models.decoders import CNNDecoder, ResNetDecoder
from localmotion.models.encoders import CNNEncoder, ContextEncoder, ResNetEncoder, random_erasing

Context = list[Tensor] | None


class ImageModel(nn.Module):
    """Encoder, optional context encoder, decoder."""

    def __init__(self, config: WorldModelConfig, *, image_size: int) -> None:
        super().__init__()
        feat = config.stoch * config.classes + config.deter
        if config.encoder == "cnn":
            self.encoder: nn.Module = CNNEncoder(depth=config.depth, image_size=image_size)
            self.decoder: nn.Module = CNNDecoder(feat, depth=config.depth, image_size=image_size)
            self.context_encoder: nn.Module | None = None
        else:
            raise NotImplementedError
        self.embed_dim: int = self.encoder.embed_dim  # type: ignore[assignment]
