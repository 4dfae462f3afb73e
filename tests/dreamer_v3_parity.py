"""A tiny DreamerV3, its weights and a batch, all made by rule, so that numbers of another implementation can be compared with ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from localmotion.config import update
from localmotion.methods.base import Counters, total
from localmotion.methods.dreamer_v3 import DreamerV3, DreamerV3Config
from localmotion.models import policies, rssm_block
from localmotion.training.optimizers import LaProp, clip_adaptive_

SETTINGS: dict[str, Any] = {
    "deter": 32,
    "hidden": 12,
    "stoch": 4,
    "classes": 5,
    "depth": 2,
    "units": 10,
    "blocks": 4,
    "imag_length": 4,
    "contdisc": False,
    "unimix": 0.0,
}
B, T, A, V = 2, 5, 2, 7
RANGE = (-0.2, 9.0)
"""Start of the moving range of returns."""


def numbers(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Normal numbers of numpy's legacy generator, whose stream is frozen."""
    return np.random.RandomState(seed).standard_normal(tuple(shape))


def noise(shape: Sequence[int]) -> Tensor:
    """The same noise for every call of a shape; what comes before the last three dimensions repeats it."""
    tail = tuple(shape)[-3:]
    return torch.from_numpy(numbers(sum(tail), tail)).float().expand(*shape)


def fill_(model: DreamerV3) -> None:
    """Weights of the size they start with, biases and scales off their start, two-hot heads that believe in small numbers."""
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if name.startswith("slow_critic."):
            continue
        values = numbers(index, parameter.shape)
        if parameter.ndim == 1:
            values = 0.1 * values + float(name.endswith("scale"))
        else:
            fan = {2: parameter.shape[-1], 3: parameter.shape[1], 4: parameter[0].numel()}[parameter.ndim]
            values = values / np.sqrt(fan)
        if parameter.shape == (255,):
            values = 3 * values - 0.5 * np.abs(np.arange(255) - 127)
        parameter.data.copy_(torch.from_numpy(values))
    model.slow_critic.load_state_dict(model.critic.state_dict())
    for index, parameter in enumerate(model.slow_critic.parameters()):
        parameter.data.mul_(1 + 0.1 * float(np.sin(index)))
    model.return_range.low.fill_(RANGE[0])
    model.return_range.high.fill_(RANGE[1])


def build(**settings: Any) -> DreamerV3:
    """The model in training mode; what it samples after this is decided too."""
    model = DreamerV3(update(DreamerV3Config(), {**SETTINGS, **settings}), image_size=64, action_dim=A)
    fill_(model)
    torch.manual_seed(0)
    return model.train()


def make_batch() -> dict[str, Tensor]:
    """Two sequences of five; in the second a new episode begins at position 3, the first ends at its last."""
    state = np.random.RandomState(99)
    image = state.randint(0, 256, (B, T, 64, 64, 3)).astype(np.uint8)
    is_first = torch.zeros(B, T, dtype=torch.bool)
    is_first[:, 0] = is_first[1, 3] = True
    is_terminal = torch.zeros(B, T, dtype=torch.bool)
    is_terminal[0, 4] = True
    action = torch.from_numpy(1.5 * state.standard_normal((B, T, A))).float()
    return {
        "image": torch.from_numpy(image),
        "action": action,
        "reward": torch.from_numpy(3 * state.standard_normal((B, T))).float(),
        "is_first": is_first,
        "is_terminal": is_terminal,
        "vector": torch.from_numpy(4 * state.standard_normal((B, T, V))).float(),
    }


def fix_noise(patch: pytest.MonkeyPatch) -> None:
    """All sampling of the model takes `noise`."""
    patch.setattr(rssm_block, "gumbel", lambda shape, like, generator=None: noise(shape))
    patch.setattr(policies, "normal", lambda like, generator=None: noise(like.shape))


class Update(NamedTuple):
    """What one update computed, and the model after it."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    model: DreamerV3

    def norm(self, part: str) -> float:
        """Of the gradient of a child module's parameters."""
        squares = [g.double().square().sum() for name, g in self.gradients.items() if name.startswith(f"{part}.")]
        return float(torch.stack(squares).sum().sqrt())


UPDATES, LR = 3, 1e-3


def updates(**settings: Any) -> Iterator[Update]:
    """`UPDATES` of them, with the reference's clipping and optimiser. For within `fix_noise`."""
    model, batch = build(**settings), make_batch()
    optimiser = LaProp([p for p in model.parameters() if p.requires_grad], lr=LR)
    for _ in range(UPDATES):
        losses, _, _ = model.world_model_losses(batch)
        total(losses, model.loss_scales("train")).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        clip_adaptive_(model.parameters(), 0.3)
        optimiser.step()
        optimiser.zero_grad()
        model.after_update(Counters("train", 1, 0.0))
        yield Update({key: float(value.detach()) for key, value in losses.items()}, gradients, model)
