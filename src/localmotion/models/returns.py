"""lambda-returns (DRP, Eq. 10; with predicted discounts DreamerV2, arXiv 2010.02193, Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_return(reward: Tensor, next_value: Tensor, bootstrap: Tensor, *, discount: float | Tensor, lambda_: float) -> Tensor:
    """G_i = r_i + discount [(1 - lambda) v_{i+1} + lambda G_{i+1}], G_H = bootstrap; reward and next_value (H, ...) -> (H, ...).

    A tensor of discounts (H, ...) has one for each i: it multiplies all that comes after r_i.
    """
    inputs = reward + discount * (1 - lambda_) * next_value  # (H, ...)
    carried = discount * lambda_  # one number, or (H, ...)
    out, last = [], bootstrap
    for step in range(len(reward) - 1, -1, -1):
        last = inputs[step] + (carried[step] if isinstance(carried, Tensor) else carried) * last
        out.append(last)
    return torch.stack(out[::-1])
