"""Image encoders: DreamerV2's plain CNN and IPV's 13-layer ResNet (arXiv 2305.18499), whose pre-pool maps are the context.

Images (N, 3, S, S) float in [-0.5, 0.5]. Widths double from stage to stage, the resolution halves.

With ``stem="unshuffle"`` pictures are in blocks, with 4x4 pixels as channels, (N, 48, S/4, S/4). Then nothing is computed at full
resolution, not even the loss, because full resolution is slowest on a CPU.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.models.batch_norm import BatchNorm2d


def xavier(layer: nn.Module) -> nn.Module:
    """The layer with Xavier-uniform weight and zero bias, as IPV's release initialises layers outside residual blocks."""
    nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def xavier_all_(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in all linear layers and convolutions of a module, also those in residual blocks."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


BLOCK = 4  # side of the pixel blocks that become channels


def to_blocks(image: Tensor) -> Tensor:
    """(N, S, S, 3) -> (N, 48, S/4, S/4), channels last in memory; channel order is row, column, colour within a block."""
    count, height, width, _ = image.shape
    x = image.view(count, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(count, height // BLOCK, width // BLOCK, BLOCK * BLOCK * 3).permute(0, 3, 1, 2)


def from_blocks(blocks: Tensor) -> Tensor:
    """Inverse of `to_blocks`, as pictures (N, 3, S, S)."""
    count, _, height, width = blocks.shape
    x = blocks.permute(0, 2, 3, 1).reshape(count, height, width, BLOCK, BLOCK, 3).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(count, 3, height * BLOCK, width * BLOCK)


class ResidualLayer(nn.Module):
    """ReLU(skip(x) + conv-norm-ReLU-conv-norm(y)); y is x by default (cross-attention changes only the main path)."""

    def __init__(self, inputs: int, outputs: int, norm: str = "batch") -> None:
        super().__init__()

        def block(a: int, b: int, kernel: int) -> nn.Sequential:
            plain = norm == "none"
            conv = nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=plain)
            return nn.Sequential(conv) if plain else nn.Sequential(conv, BatchNorm2d(b))

        self.main = nn.Sequential(block(inputs, outputs, 3), nn.ReLU(), block(outputs, outputs, 3))
        self.skip: nn.Module = nn.Identity() if inputs == outputs else block(inputs, outputs, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return F.relu(self.skip(x) + self.main(x if y is None else y))


class CNNEncoder(nn.Module):
    """Four convolutions, kernel 4, stride 2, ELU: 64 -> 31 -> 14 -> 6 -> 2 (DreamerV2). ``colours``: values of a pixel."""

    feed_forward = True  # --compile compiles it

    def __init__(self, *, depth: int = 48, image_size: int = 64, colours: int = 3) -> None:
        super().__init__()
        widths = [colours, depth, 2 * depth, 4 * depth, 8 * depth]
        parts: list[nn.Module] = []
        side = image_size
        for a, b in itertools.pairwise(widths):
            parts += [xavier(nn.Conv2d(a, b, 4, 2)), nn.ELU()]
            side = (side - 4) // 2 + 1
        self.net = nn.Sequential(*parts)
        self.embed_dim = widths[-1] * side * side

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image).flatten(1)


class ResNetEncoder(nn.Module):
    """IPV's residual encoder. `maps` returns the pre-pool features of each stage, which are the context of the decoder.

    ``stem="conv"``: a stride-2 convolution, then three stages of two residual layers (paper). ``stem="unshuffle"``: input in
    blocks, two stages of one residual layer. ``colours``: values of a pixel.
    """

    feed_forward = True  # --compile compiles it

    def __init__(
        self, *, depth: int = 48, image_size: int = 64, stem: str = "conv", norm: str = "batch", colours: int = 3
    ) -> None:
        super().__init__()
        self.unshuffle = stem == "unshuffle"
        if self.unshuffle:
            self.stem = xavier(nn.Conv2d(BLOCK * BLOCK * colours, depth, 3, padding=1))
            stages, layers, side = 2, 1, image_size // 4
        else:
            self.stem = xavier(nn.Conv2d(colours, depth, 3, stride=2, padding=1))
            stages, layers, side = 3, 2, image_size // 2
        self.stages = nn.ModuleList()
        width = depth
        self.map_shapes: list[tuple[int, int]] = []
        for stage in range(stages):
            out = depth * 2**stage
            blocks = [ResidualLayer(width if i == 0 else out, out, norm) for i in range(layers)]
            self.stages.append(nn.ModuleList(blocks))
            self.map_shapes.append((out, side))
            width, side = out, side // 2
        self.embed_dim = width * side * side

    def maps(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embedding (N, E) and the pre-pool maps, finest first."""
        x = F.elu(self.stem(image))
        found = []
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x = layer(x)
            found.append(x)
            x = F.avg_pool2d(x, 2)
        return x.flatten(1), found

    def forward(self, image: Tensor) -> Tensor:
        return self.maps(image)[0]


def random_erasing(frame: Tensor, probability: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Context augmentation of IPV's release: in half of the pictures a rectangle of 2-33 % of the area becomes mid-grey.

    (B, S, S, 3) uint8 -> the same. The aspect ratio is from U(0.3, 1) or U(1, 3.3), each with probability 1/2.
    """
    batch, height, width, _ = frame.shape
    u = torch.rand(batch, 6, device=frame.device, generator=generator)
    ratio = torch.where(u[:, 0] < 0.5, 0.3 + 0.7 * u[:, 1], 1 + 2.3 * u[:, 1])
    area = (0.02 + 0.31 * u[:, 2]) * height * width
    tall, wide = (area * ratio).sqrt().clamp(max=height), (area / ratio).sqrt().clamp(max=width)
    top, left = u[:, 3] * (height - tall), u[:, 4] * (width - wide)
    ys = torch.arange(height, device=frame.device)[None, :, None]
    xs = torch.arange(width, device=frame.device)[None, None, :]
    inside = (ys >= top[:, None, None]) & (ys < (top + tall)[:, None, None])
    inside = inside & (xs >= left[:, None, None]) & (xs < (left + wide)[:, None, None])
    erase = inside & (u[:, 5] < probability)[:, None, None]
    return frame.masked_fill(erase[..., None], 128)
