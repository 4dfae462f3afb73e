"""Optimisers by name, and gradient clipping relative to the norm of the parameter.

LaProp is Adam with its two steps in reverse order: it first divides the gradient by its root mean square, then takes
momentum of the result (Ziyin et al., arXiv 2002.04839). DreamerV3 uses LaProp with adaptive gradient clipping (Brock et
al., arXiv 2102.06171).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localmotion.config import OptimConfig
from localmotion.errors import unknown_name
from localmotion.methods.base import Group


@torch.no_grad()
def clip_adaptive_(parameters: Sequence[nn.Parameter], clip: float, least: float = 1e-3) -> Tensor:
    """Scale each gradient down to norm ``clip * max(least, |parameter|)``.

    Returns the global gradient norm before scaling. Both norms are over the whole tensor, not over each unit, as in
    DreamerV3's reference code (danijar/dreamerv3, embodied/jax/opt.py).
    """
    with_grad: list[Tensor] = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    grads = [p.grad for p in with_grad if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    sizes = torch.stack(torch._foreach_norm(with_grad))
    scales = 1 / (norms / (clip * sizes.clamp(min=least))).clamp(min=1.0)
    torch._foreach_mul_(grads, list(scales.unbind(0)))
    return torch.linalg.vector_norm(norms)


class LaProp(torch.optim.Optimizer):
    """nu <- b2 nu + (1 - b2) g^2;  mu <- b1 mu + (1 - b1) g / (sqrt(nu / (1 - b2^t)) + eps);  p <- p - lr mu / (1 - b1^t).

    The constants are those of DreamerV3's reference code. Each parameter's state is ``exp_avg`` (mu), ``exp_avg_sq``
    (nu) and ``step`` (t).

    With ``capturable`` the counts t are on the device and a step reads no value from it, so a CUDA graph can record the
    step. The learning rate may then be a tensor. If the tensor attribute ``found_inf`` is 1, such a step leaves
    parameters and moments unchanged and only increases t. torch's fused Adam does the same.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float | Tensor = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        *,
        capturable: bool = False,
    ) -> None:
        """Raises ValueError for a negative rate or epsilon, or betas outside [0, 1)."""
        if (not torch.is_tensor(lr) and lr < 0) or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"LaProp: lr={lr} and eps={eps} must not be negative, betas={betas} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "capturable": capturable})

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
                    number = torch.zeros((), device=p.device if group["capturable"] else None)
                    self.state[p] = {"step": number, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            states = [self.state[p] for p in params]
            constants = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"]}
            if group["capturable"]:
                if params:
                    _laprop_on_device(params, states, found_inf=self.found_inf, **constants)
                continue
            counts: dict[float, list[int]] = {}  # number of updates -> parameters; usually all have the same number
            for index, state in enumerate(states):
                state["step"] += 1
                counts.setdefault(float(state["step"]), []).append(index)
            for count, chosen in counts.items():
                _laprop([params[i] for i in chosen], [states[i] for i in chosen], count=count, **constants)


def _laprop(
    params: list[Tensor], states: list[dict[str, Tensor]], *, count: float, lr: float, betas: tuple[float, float], eps: float
) -> None:
    """The three formulas of `LaProp` for lists of tensors. ``count``: number of updates, including this one."""
    first, second = betas
    grads = [p.grad for p in params if p.grad is not None]
    mean, square = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    torch._foreach_mul_(square, second)
    torch._foreach_addcmul_(square, grads, grads, 1 - second)
    scale = list(torch._foreach_sqrt(square))
    torch._foreach_mul_(scale, (1 - second**count) ** -0.5)
    torch._foreach_add_(scale, eps)
    torch._foreach_mul_(mean, first)
    torch._foreach_addcdiv_(mean, grads, scale, 1 - first)
    torch._foreach_add_(params, mean, alpha=-lr / (1 - first**count))


def _laprop_on_device(
    params: list[Tensor],
    states: list[dict[str, Tensor]],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    found_inf: Tensor | None,
) -> None:
    """As `_laprop`, but the counts, the bias corrections and the decision to step are on the device.

    If ``found_inf`` is 1, gradients become zero and factors become one, so nothing changes.
    """
    first, second = betas
    grads = [p.grad for p in params if p.grad is not None]
    counts, mean, square = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
    torch._foreach_add_(counts, 1)
    good = torch.ones((), device=params[0].device) if found_inf is None else 1 - found_inf
    if found_inf is not None:
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(grads, good)
    torch._foreach_mul_(square, 1 - (1 - second) * good)
    torch._foreach_addcmul_(square, grads, grads, 1 - second)
    scale = list(torch._foreach_sqrt(square))
    times = torch.stack(counts)
    # expm1 computes 1 - b^t: a plain difference loses four of seven digits in the first steps with b2 = 0.999.
    torch._foreach_mul_(scale, list((-torch.expm1(times * math.log(second))).rsqrt().unbind(0)))
    torch._foreach_add_(scale, eps)
    torch._foreach_mul_(mean, 1 - (1 - first) * good)
    torch._foreach_addcdiv_(mean, grads, scale, 1 - first)
    torch._foreach_addcmul_(params, mean, list((good * lr / torch.expm1(times * math.log(first))).unbind(0)))


def _adam(
    group: Group, settings: OptimConfig, lr: float | Tensor, kind: type[torch.optim.Adam] = torch.optim.Adam
) -> torch.optim.Optimizer:
    # torch accepts `capturable` on a GPU only; the fused kernel keeps its counts on the device in any case.
    graphs = torch.is_tensor(lr) and lr.device.type == "cuda"
    decay = settings.weight_decay if group.weight_decay is None else group.weight_decay
    return kind(group.parameters, lr=lr, eps=settings.eps, weight_decay=decay, betas=group.betas, fused=True, capturable=graphs)


def _make_laprop(group: Group, settings: OptimConfig, lr: float | Tensor) -> torch.optim.Optimizer:
    return LaProp(group.parameters, lr=lr, capturable=torch.is_tensor(lr))


_OPTIMIZERS: dict[str, Callable[[Group, OptimConfig, float | Tensor], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": partial(_adam, kind=torch.optim.AdamW),
    "laprop": _make_laprop,
}


def make(group: Group, settings: OptimConfig, *, on_device: bool = False) -> torch.optim.Optimizer:
    """Make the optimiser of a group. Adam uses ``settings``; LaProp has fixed constants.

    Raises ConfigError for an unknown name. ``on_device``: the learning rate is a tensor on the parameters' device, and
    a step reads no value from the device.
    """
    if group.optimizer not in _OPTIMIZERS:
        raise unknown_name("optimizer", group.optimizer, _OPTIMIZERS)
    lr = torch.tensor(group.lr, device=group.parameters[0].device) if on_device else group.lr
    return _OPTIMIZERS[group.optimizer](group, settings, lr)
