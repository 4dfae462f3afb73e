"""lambda-returns (DRP, Eq. 10)."""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_return(reward: Tensor, next_value: Tensor, bootstrap: Tensor, *, discount: float, lambda_: float) -> Tensor:
    """G_i = r_i + discount [(1 - lambda) v_{i+1} + lambda G_{i+1}], G_H = bootstrap; reward and next_value (H, ...) -> (H, ...)."""
    inputs = reward + discount * (1 - lambda_) * next_value  # (H, ...)
    out, last = [], bootstrap
    for step in range(len(reward) - 1, -1, -1):
        last = inputs[step] + discount * lambda_ * last
        out.append(last)
    return torch.stack(out[::-1])
