"""Multi-layer heads: reward, critic, actor, with the sizes of IPV's release (thuml/ContextWM)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from localmotion.models.distributions import TruncatedNormal


class MLP(nn.Module):
    """``layers`` times [Linear, ELU], then a linear output; Xavier-uniform weights, zero biases. (..., in) -> (..., out)."""

    feed_forward = True  # --compile compiles it

    def __init__(self, inputs: int, outputs: int, *, units: int = 400, layers: int = 4) -> None:
        super().__init__()
        widths = [inputs, *[units] * layers]
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            parts += [nn.Linear(a, b), nn.ELU()]
        self.net = nn.Sequential(*parts, nn.Linear(widths[-1], outputs))
        for module in self.net:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def begin_as_torch_(module: nn.Module) -> None:
    """PyTorch's own initial values in all linear layers of a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


def actor_distribution(out: Tensor) -> TruncatedNormal:
    """Truncated normal on [-1, 1] from the actor's (..., 2A) output: mean tanh(m), deviation 2 sigmoid(s / 2) + 0.1."""
    mean, std = out.float().chunk(2, -1)
    return TruncatedNormal(torch.tanh(mean), 2 * torch.sigmoid(std / 2) + 0.1)
