"""The running size of a stream of flow. Not in any paper: videos of slow and of fast motion then give inputs of one size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localmotion import ranks


class RunningRMS(nn.Module):
    """Divides flow by its running root mean square, so that the streams of pre-training and of a task give inputs of one size.

    The statistic is kept with the weights. Only batches in training change it; acting and evaluation use it as it is.
    """

    KEEP = 0.99
    SMALLEST = 1e-3
    """Pixels. A stream without any motion is not blown up."""
    square: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("square", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, flow: Tensor, seen: Tensor) -> Tensor:
        """flow (..., P, P, 2) over the root mean square of the fields where ``seen`` (...) is true; before any, over 1."""
        if self.training:
            with torch.no_grad():
                fields = flow.detach().float().square().flatten(-3).mean(-1)  # (...)
                number = ranks.total(seen.float().sum())
                gained = (1 - self.KEEP) * (number > 0)
                self.square.lerp_(ranks.total((fields * seen).sum()) / number.clamp(min=1), gained)
                self.weight.lerp_(torch.ones_like(self.weight), gained)
        return flow / self.scale()

    def scale(self) -> Tensor:
        """What flow is divided by, in the unit of the given flow; ()."""
        known = torch.where(self.weight > 0, self.square / self.weight.clamp(min=1e-12), 1.0)
        return known.sqrt().clamp(min=self.SMALLEST)
