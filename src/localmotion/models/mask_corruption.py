"""Masks of the agent made worse on purpose: smaller, larger, missing, hidden. For studies of how good masks must be.

The kinds of damage are those of MaskLAM's ablations (arXiv 2602.02259). All are pure functions: the same arguments, with the same seed,
give the same masks on any device. Shapes: B sequences of T frames, H by W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Masks (..., H, W) bool grown by ``radius`` pixels in all directions, diagonals included. Raises ValueError for a negative radius."""
    if radius < 0:
        raise ValueError(f"radius {radius}: at least 0")
    if not radius:
        return mask
    *_, height, width = mask.shape
    flat = mask.reshape(-1, 1, height, width).float()
    grown = F.max_pool2d(flat, 2 * radius + 1, stride=1, padding=radius)
    return (grown > 0).reshape(mask.shape)


def erode(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Masks (..., H, W) bool shrunk by ``radius`` pixels. The edge of the picture takes nothing away. Raises ValueError as `dilate`."""
    return ~dilate(~mask, radius)


def grow(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Masks (..., H, W) bool dilated by ``radius`` pixels, or eroded by its size if it is negative."""
    return dilate(mask, radius) if radius > 0 else erode(mask, -radius)


def drop(mask: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Masks (..., H, W) bool, each replaced with probability ``share`` by a full one: without a mask, every pixel counts.

    Raises ValueError for a share outside 0..1.
    """
    _check_share(share)
    generator = torch.Generator().manual_seed(seed)
    lost = torch.rand(mask.shape[:-2], generator=generator) < share
    return mask | lost.to(mask.device)[..., None, None]


def occlude(image: torch.Tensor, mask: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cover part of the agent by a rectangle that stands still for the sequence: black in the image, absent from the mask.

    Args:
        image: (B, T, H, W, C), any type; covered pixels become 0.
        mask: (B, T, H, W) bool.
        share: of the agent's bounding box over the sequence that the rectangle covers, 0..1. The rectangle lies inside the box. Its
            sides, relative to the box's, have a ratio of exp(u), u uniform in -0.5..0.5.
        seed: of ratio and place.

    Returns:
        New image and mask; sequences without any mask are unchanged. Raises ValueError for a share outside 0..1.
    """
    _check_share(share)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(mask), 3, generator=generator).tolist()
    image, mask = image.clone(), mask.clone()
    for row, (ratio, down, right) in enumerate(draws):
        seen = mask[row].any(0)
        if not seen.any():
            continue
        (top, bottom), (left, end) = (_extent(seen.any(dim)) for dim in (1, 0))
        height, width = bottom - top, end - left
        tall = round(min(max(height * (share * math.exp(ratio - 0.5)) ** 0.5, height * share), height))
        wide = min(round(share * height * width / tall), width) if tall else 0
        y, x = top + round(down * (height - tall)), left + round(right * (width - wide))
        rows, columns = slice(y, y + tall), slice(x, x + wide)
        image[row, :, rows, columns] = 0
        mask[row, :, rows, columns] = False
    return image, mask


def _extent(line: torch.Tensor) -> tuple[int, int]:
    """First true position of (n,) bool, and one after the last."""
    places = line.nonzero()
    return int(places[0]), int(places[-1]) + 1


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: between 0 and 1")
