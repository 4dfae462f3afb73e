"""Optimisers by name, and gradient clipping by the size of the parameter.

LaProp is Adam with the two halves in the other order: gradients are divided by their root mean square first, momentum is taken of the
result (Ziyin et al., arXiv 2002.04839). DreamerV3 uses it with adaptive gradient clipping (Brock et al., arXiv 2102.06171).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from localmotion.config import OptimConfig
from localmotion.errors import unknown_name
from localmotion.methods.base import Group


@torch.no_grad()
def clip_adaptive_(parameters: Iterable[nn.Parameter], clip: float, least: float = 1e-3) -> Tensor:
    """Scale each gradient down to ``clip * max(least, |parameter|)``, both norms over the whole tensor; returns their global norm before.

    As in the reference of DreamerV3 (danijar/dreamerv3, embodied/jax/opt.py), whose norm is of the tensor, not of each unit.
    """
    with_grad: list[Tensor] = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(())
    grads = [p.grad for p in with_grad if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    sizes = torch.stack(torch._foreach_norm(with_grad))
    scales = 1 / (norms / (clip * sizes.clamp(min=least))).clamp(min=1.0)
    torch._foreach_mul_(grads, list(scales.unbind(0)))
    return torch.linalg.vector_norm(norms)


class LaProp(torch.optim.Optimizer):
    """nu <- b2 nu + (1 - b2) g^2;  mu <- b1 mu + (1 - b1) g / (sqrt(nu / (1 - b2^t)) + eps);  p <- p - lr mu / (1 - b1^t).

    Constants are those of DreamerV3's reference. State of each parameter: ``exp_avg`` (mu), ``exp_avg_sq`` (nu), ``step`` (t).

    As torch's fused Adam it skips a step on the device where the attribute ``found_inf``, a tensor, is 1: parameters and moments stay
    as they are, only t goes on.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 4e-5, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-20
    ) -> None:
        """Raises ValueError for a negative rate or epsilon, or betas outside [0, 1)."""
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"LaProp: lr={lr} and eps={eps} must not be negative, betas={betas} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("LaProp takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                    self.state[p] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            states = [self.state[p] for p in params]
            counts: dict[float, list[int]] = {}  # parameters by how often they were updated: as a rule there is one number
            for index, state in enumerate(states):
                state["step"] += 1
                counts.setdefault(float(state["step"]), []).append(index)
            for count, chosen in counts.items():
                some = [params[i] for i in chosen]
                _laprop(
                    some,
                    [p.grad for p in some],
                    [states[i]["exp_avg"] for i in chosen],
                    [states[i]["exp_avg_sq"] for i in chosen],
                    count=count,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    found_inf=self.found_inf,
                )


def _laprop(
    params: list[Tensor],
    grads: list[Tensor],
    mean: list[Tensor],
    square: list[Tensor],
    *,
    count: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    found_inf: Tensor | None = None,
) -> None:
    """The three lines of `LaProp` over lists of tensors, updated ``count`` times including this one.

    Where ``found_inf`` is 1 nothing changes, without asking the device which it is: gradients become zero, factors one.
    """
    first, second = betas
    keep_square: Any = second
    keep_mean: Any = first
    rate: Any = -lr / (1 - first**count)
    if found_inf is not None:
        good = 1 - found_inf
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(grads, good)
        keep_square, keep_mean, rate = 1 - (1 - second) * good, 1 - (1 - first) * good, rate * good
    torch._foreach_mul_(square, keep_square)
    torch._foreach_addcmul_(square, grads, grads, 1 - second)
    scale = list(torch._foreach_sqrt(square))
    torch._foreach_mul_(scale, (1 - second**count) ** -0.5)
    torch._foreach_add_(scale, eps)
    torch._foreach_mul_(mean, keep_mean)
    torch._foreach_addcdiv_(mean, grads, scale, 1 - first)
    if found_inf is None:
        torch._foreach_add_(params, mean, alpha=rate)
    else:  # a rate on the device is no alpha
        torch._foreach_addcmul_(params, mean, [rate] * len(params))


def _adam(group: Group, settings: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(group.parameters, lr=group.lr, eps=settings.eps, weight_decay=settings.weight_decay, fused=True)


def _make_laprop(group: Group, settings: OptimConfig) -> torch.optim.Optimizer:
    return LaProp(group.parameters, lr=group.lr)


_OPTIMIZERS: dict[str, Callable[[Group, OptimConfig], torch.optim.Optimizer]] = {"adam": _adam, "laprop": _make_laprop}


def make(group: Group, settings: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a group. Adam takes ``settings``; LaProp's constants are its own. Raises ConfigError for an unknown name."""
    if group.optimizer not in _OPTIMIZERS:
        raise unknown_name("optimizer", group.optimizer, _OPTIMIZERS)
    return _OPTIMIZERS[group.optimizer](group, settings)
