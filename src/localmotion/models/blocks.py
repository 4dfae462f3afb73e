"""Layers of DreamerV3: RMSNorm with SiLU, block-linear layers, their initialisation, and multi-layer networks of them.

Source: danijar/dreamerv3, commit e3f0224, embodied/jax/nets.py: winit trunc_normal_in, norm rms with epsilon 1e-4, act silu.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-4


def init_(weight: Tensor, fan_in: int, scale: float = 1.0) -> Tensor:
    """Fill with a normal of variance scale^2 / fan_in, truncated at two standard deviations (the factor 1.1368 compensates for it)."""
    std = 1.1368 * fan_in**-0.5
    with torch.no_grad():
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std).mul_(scale)


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """Linear layer, weights by `init_` times ``scale``, zero bias."""
    layer = nn.Linear(inputs, outputs)
    init_(layer.weight, inputs, scale)
    nn.init.zeros_(layer.bias)
    return layer


CHUNK = 1 << 16
"""Values per thread and piece of an elementwise operation on a CPU, so intermediate results stay in the caches."""


def spans(x: Tensor, dim: int = 0, *, times: int = 1) -> list[slice]:
    """Slices along a dimension of a tensor: on a CPU ``times`` `CHUNK` values per thread each; elsewhere and when compiled, one slice."""
    length = x.shape[dim]
    count = max(1, length)
    if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
        count = max(1, times * CHUNK * torch.get_num_threads() * length // x.numel())
    return [slice(begin, begin + count) for begin in range(0, length, count)]


class _NormSiLU(torch.autograd.Function):
    """silu(x / rms(x) * scale) over the last dimension; for large maps it keeps the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, inverse = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for span in spans(rows):
            wide = rows[span].float()
            torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(EPS), out=inverse[span])
            out[span] = F.silu((wide * inverse[span]).mul_(scale), inplace=True)
        ctx.save_for_backward(rows, inverse, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows, inverse, scale = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape)
        out, to_scale, share = torch.empty_like(rows), torch.zeros_like(scale), scale / len(scale)
        for span in spans(rows):
            normed = rows[span].float().mul(inverse[span])
            slope = torch.ops.aten.silu_backward(grad[span].float(), normed * scale)
            along = slope * normed
            to_scale += along.sum(0)
            mean = torch.mv(along, share).unsqueeze(-1)
            out[span] = slope.mul_(scale).addcmul_(normed, mean, value=-1).mul_(inverse[span])
        return out.view(grads[0].shape), to_scale


class NormSiLU(nn.Module):
    """RMSNorm over the last dimension with a learned scale, then SiLU; computed in fp32, returned in the precision of the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _NormSiLU.apply(x, self.scale)
        return out


class BlockLinear(nn.Module):
    """G linear layers side by side: (..., G*I) -> (..., G*O), kernel (G, I, O), bias (G*O)."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        """``inputs`` and ``outputs`` are those of all blocks together. Raises ValueError if they are not divisible by ``blocks``."""
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(f"{inputs} inputs and {outputs} outputs are not divisible by {blocks} blocks")
        self.blocks = blocks
        self.kernel = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        init_(self.kernel, inputs)  # fan-in of all inputs, not of one block, as in the reference

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.blocks, self.kernel.shape[1]).transpose(0, 1)  # (G, N, I)
        out = torch.bmm(rows, self.kernel).transpose(0, 1)  # (N, G, O)
        return out.reshape(*x.shape[:-1], -1) + self.bias.to(out.dtype)


class NormMLP(nn.Sequential):
    """``layers`` times [Linear, RMSNorm, SiLU], then a linear output unless ``outputs`` is None: (..., in) -> (..., out or units).

    ``outscale`` multiplies the initial weights of the output; with 0 the head first predicts 0.
    """

    def __init__(self, inputs: int, outputs: int | None, *, units: int, layers: int, outscale: float = 1.0) -> None:
        parts: list[nn.Module] = []
        for index in range(layers):
            parts += [linear(units if index else inputs, units), NormSiLU(units)]
        if outputs is not None:
            parts.append(linear(units if layers else inputs, outputs, outscale))
        super().__init__(*parts)
