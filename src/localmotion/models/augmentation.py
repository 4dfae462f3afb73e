"""Random shifts, rotations and changes of perspective of pictures, as LAOM draws them (arXiv 2502.00379).

All are one homography for each picture, which maps a place of the output to a place of the input. Places are (x, y) in [-1, 1] over
the picture. What lies outside the picture has the colour of the nearest border.

Shapes: N pictures (or stacks of pictures), C channels, S side.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHOICES = ((0, 0), (1, 0), (2, 0), (3, 0), (1, 2), (2, 1), (2, 3), (3, 2))
"""First and second change: 0 none, 1 shift, 2 rotation, 3 perspective. All pairs are equally likely."""


SIGNS = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
"""Of the corners of a picture, in the order of `perspectives`."""


@functools.cache
def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of fixed values. It is made once, because a copy from the host lets an update wait for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def shifts(x: Tensor, y: Tensor) -> Tensor:
    """Homographies (N, 3, 3) that move pictures by x to the right and by y down, each (N,) in units of half a picture."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack([one, zero, -x, zero, one, -y, zero, zero, one], -1).unflatten(-1, (3, 3))


def rotations(angle: Tensor) -> Tensor:
    """Homographies (N, 3, 3) that turn pictures by an angle (N,), in radians, clockwise."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, torch.ones_like(angle)], -1).unflatten(-1, (3, 3))


def perspectives(corners: Tensor, reach: float = 1.0) -> Tensor:
    """Homographies (N, 3, 3) that move the corners of the square of half side ``reach`` to ``corners`` (N, 4, 2).

    Corners in the order (-, -), (+, -), (+, +), (-, +). The map of a unit square onto a quadrangle in closed form (Heckbert 1989),
    then its inverse by the adjugate, since a homography is defined up to a factor.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (corners[:, i].unbind(-1) for i in range(4))
    dx1, dx2, sx = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, sy = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    whole = dx1 * dy2 - dx2 * dy1
    g, h = (sx * dy2 - dx2 * sy) / whole, (dx1 * sy - sx * dy1) / whole
    rows = [x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h, torch.ones_like(g)]
    onto = torch.stack(rows, -1).unflatten(-1, (3, 3))  # (u, v) in [0, 1]^2 -> a place of the output
    a, b, c = onto.unbind(1)
    back = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -1)  # adjugate
    place = ((2 * reach, 0.0, -reach), (0.0, 2 * reach, -reach), (0.0, 0.0, 1.0))  # (u, v) -> a place of the input
    return constant(place, back.dtype, back.device) @ back


def warped(image: Tensor, homography: Tensor) -> Tensor:
    """Pictures (N, C, S, S) under homographies (N, 3, 3), bilinear."""
    side = image.shape[-1]
    line = (torch.arange(side, device=image.device, dtype=homography.dtype) + 0.5) * (2 / side) - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], -1).view(1, -1, 3) @ homography.transpose(1, 2)  # (N, S * S, 3)
    grid = (places[..., :2] / places[..., 2:]).view(-1, side, side, 2)
    return F.grid_sample(image, grid.to(image.dtype), mode="bilinear", padding_mode="border", align_corners=False)


def augment(image: Tensor, pad: int = 14, edge: int = 30, distortion: float = 0.5) -> Tensor:
    """Change each picture (N, C, S, S) by one of `CHOICES`, drawn for each.

    A shift is by -``pad`` to ``pad`` whole pixels of 64 in both directions. A rotation is by -90 to 90 degrees. In a change of
    perspective each corner of the picture, made larger by ``edge`` pixels of 64 on all sides, moves inwards by up to ``distortion``
    of half a side.
    """
    count, side = len(image), image.shape[-1]
    drawn = torch.rand(count, 11, device=image.device)
    most = round(pad * side / 64)
    moved = torch.floor(drawn[:, :2] * (2 * most + 1)) - most
    reach = 1 + 2 * edge / 64
    inwards = 1 - distortion * drawn[:, 3:].view(count, 4, 2)
    signs = constant(SIGNS, drawn.dtype, drawn.device)
    changes = torch.stack(
        [
            torch.eye(3, device=image.device).expand(count, 3, 3).to(drawn.dtype),
            shifts(moved[:, 0] * (2 / side), moved[:, 1] * (2 / side)),
            rotations((2 * drawn[:, 2] - 1) * (math.pi / 2)),
            perspectives(reach * inwards * signs, reach),
        ],
        1,
    )  # (N, 4, 3, 3)
    choice = constant(CHOICES, torch.long, image.device)[torch.randint(len(CHOICES), (count,), device=image.device)]  # (N, 2)
    rows = torch.arange(count, device=image.device)
    return warped(image, changes[rows, choice[:, 0]] @ changes[rows, choice[:, 1]])
