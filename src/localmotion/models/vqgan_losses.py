"""VQGAN's losses of pictures: a discriminator of patches, and distances of VGG16's features. Both are optional for `models.tokenizer`.

Sources: VQGAN arXiv 2012.09841; PatchGAN arXiv 1611.07004; hinge loss arXiv 1705.02894; distances of unit features: LPIPS arXiv 1801.03924.

Shapes: B pictures, S side, C channels, h, w side of a map. Pictures (B, 3, S, S) in [-0.5, 0.5].
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from localmotion.errors import ConfigError
from localmotion.files import one_line

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Channels of VGG16's 3x3 convolutions; 0: max pooling."""
TAPS = (1, 4, 8, 12, 16)
"""Those of `VGG16` after whose ReLU pictures are compared: the last ones before a pooling, and the last."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours in [0, 1], which VGG16's inputs are scaled by."""


class PatchDiscriminator(nn.Sequential):
    """Three 4x4 convolutions of stride 2 with ``width`` x (1, 2, 4) channels, one of stride 1 with 8 ``width``, and one to a score a patch.

    Normalisation is within a picture (GroupNorm) instead of BatchNorm, so that true and decoded pictures never share statistics.
    """

    feed_forward = True  # --compile compiles it

    def __init__(self, width: int) -> None:
        """``width`` is a multiple of 4."""
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for (a, b), stride in zip(itertools.pairwise((width, 2 * width, 4 * width, 8 * width)), (2, 2, 1), strict=True):
            parts += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.GroupNorm(8, b), nn.LeakyReLU(0.2)]
        super().__init__(*parts, nn.Conv2d(8 * width, 1, 4, 1, 1))


def hinge(true: Tensor, decoded: Tensor) -> Tensor:
    """The discriminator's loss from its scores of true and decoded pictures, of any shape."""
    return 0.5 * (F.relu(1 - true.float()).mean() + F.relu(1 + decoded.float()).mean())


class Perceptual(nn.Module):
    """Squared distance of VGG16's features at five depths, each divided by its length over channels. Without LPIPS's learned weights.

    The weights are no part of a checkpoint.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, path: Path) -> None:
        """``path``: VGG16's weights as safetensors, with the names of torchvision (``features.0.weight``, ...).

        Raises ConfigError if it cannot be read, or if a convolution is missing or has another shape.
        """
        super().__init__()
        try:
            found = load_file(path)
        except Exception as error:  # safetensors has errors of its own
            raise ConfigError(
                f"perceptual={path}: cannot be read ({one_line(error)}); give VGG16's weights as safetensors"
            ) from error
        place, channels = 0, 3  # a convolution and its ReLU are two layers of torchvision's, a pooling is one
        for width in VGG16:
            for kind, shape in (("weight", (width, channels, 3, 3)), ("bias", (width,))) if width else ():
                name = f"features.{place}.{kind}"
                if name not in found or tuple(found[name].shape) != shape:
                    has = tuple(found[name].shape) if name in found else "missing"
                    raise ConfigError(f"perceptual={path}: {name} is {has}, VGG16 of torchvision has {shape}")
                self.register_buffer(f"{kind}_{place}", found[name].float(), persistent=False)
            place, channels = (place + 2, width) if width else (place + 1, channels)
        for name, colour in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(colour)[:, None, None], persistent=False)

    def features(self, image: Tensor) -> list[Tensor]:
        """Pictures (B, 3, S, S) -> features (B, C, h, w) of length 1 at each of `TAPS`."""
        x, place, out = (image + 0.5 - self.mean) / self.deviation, 0, []
        for number, width in enumerate(VGG16):
            if not width:
                x, place = F.max_pool2d(x, 2), place + 1
                continue
            x = F.relu(F.conv2d(x, self.get_buffer(f"weight_{place}"), self.get_buffer(f"bias_{place}"), padding=1))
            place += 2
            if number in TAPS:
                out.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return out

    def forward(self, decoded: Tensor, true: Tensor) -> Tensor:
        """Mean over pictures and places, summed over channels and depths."""
        with torch.no_grad():
            wanted = self.features(true)
        pairs = zip(self.features(decoded), wanted, strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()
