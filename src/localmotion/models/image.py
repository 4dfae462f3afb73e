"""Image encoder, decoder and context of a world model in one place, so that methods read in terms of embed, decode, context.

B sequences, T positions, E embedding width, F feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localmotion.config import WorldModelConfig
from localmotion.models.decoders import CNNDecoder, ResNetDecoder
from localmotion.models.encoders import CNNEncoder, ResNetEncoder, random_erasing

Context = list[Tensor] | None


def image_loss(decoded: Tensor, truth: Tensor) -> Tensor:
    """Half the squared error summed over a picture's values, mean over frames (IPV spec 0.4). (N,3,S,S) twice -> scalar."""
    return 0.5 * (decoded.float() - truth).square().sum((1, 2, 3)).mean()


class ImageModel(nn.Module):
    """Encoder, optional context encoder (separate weights), decoder."""

    def __init__(self, config: WorldModelConfig, *, image_size: int) -> None:
        super().__init__()
        feat = config.stoch * config.classes + config.deter
        self.context_encoder: ResNetEncoder | None = None
        if config.encoder == "cnn":
            self.encoder: CNNEncoder | ResNetEncoder = CNNEncoder(depth=config.depth, image_size=image_size)
            self.decoder: CNNDecoder | ResNetDecoder = CNNDecoder(feat, depth=config.depth, image_size=image_size)
        else:
            shape = {"depth": config.depth, "image_size": image_size, "stem": config.stem, "norm": config.norm}
            encoder = ResNetEncoder(**shape)  # type: ignore[arg-type]
            self.encoder = encoder
            if config.context:
                self.context_encoder = ResNetEncoder(**shape)  # type: ignore[arg-type]
            self.decoder = ResNetDecoder(
                feat, encoder.map_shapes, stem=config.stem, norm=config.norm, context=config.context, mask=config.context_mask
            )
        self.embed_dim = self.encoder.embed_dim
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embed(self, image: Tensor) -> Tensor:
        """(N,3,S,S) -> (N,E)."""
        return self.encoder(image)

    def encode(self, image: Tensor, like: Tensor, erase: bool = False) -> tuple[Tensor, Context]:
        """Embeddings (B,T,E) of (B*T,3,S,S) pictures and the context maps of one random frame of each sequence.

        ``like`` is any (B,T,...) tensor; ``erase`` applies random erasing to the context frame.
        """
        batch, time = like.shape[:2]
        embed = self.encoder(image).view(batch, time, -1)
        if self.context_encoder is None:
            return embed, None
        pick = torch.randint(time, (batch,), device=image.device) + torch.arange(batch, device=image.device) * time
        frame = image[pick]
        return embed, self.context_encoder.maps(random_erasing(frame) if erase else frame)[1]

    @staticmethod
    def repeat_context(context: Context, times: int) -> Context:
        """The context for ``times`` stacked batches."""
        return None if context is None else [torch.cat([x] * times) for x in context]

    def decode(self, feat: Tensor, context: Context) -> Tensor:
        """(B,T,F) -> (B*T,3,S,S)."""
        return self.decoder(feat.flatten(0, 1), context)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Encoder and context encoder."""
        context = list(self.context_encoder.parameters()) if self.context_encoder is not None else []
        return [*self.encoder.parameters(), *context]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """Decoder."""
        return list(self.decoder.parameters())
