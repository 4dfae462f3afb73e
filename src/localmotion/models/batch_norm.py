"""Batch normalisation over the whole batch, also if several processes share it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localmotion import ranks


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, with the statistics of the rows of all ranks. torch's SyncBatchNorm is the same, but computes on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). All ranks have the same N."""
        if ranks.alone() or not self.training:
            return super().forward(x)
        flat = x.float().transpose(0, 1).flatten(1)  # (C, n), n = N * H * W
        variance, mean = torch.var_mean(flat, 1, correction=0)  # (C,) each
        means, variances = ranks.stack(torch.stack([mean, variance])).unbind(1)  # (world, C) each
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        with torch.no_grad():
            count = flat.shape[1] * ranks.world()
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr,arg-type]  # they are there by default
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # type: ignore[union-attr,arg-type]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        scale = self.weight * (variance + self.eps).rsqrt()  # (C,)
        out = x.float() * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return out.to(x.dtype)
