"""Counts the operations of a block of code: by name, products and convolutions by the layout of their arguments, FLOPs, and memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default: "matmul",
    aten.addmm.default: "matmul",
    aten.bmm.default: "batched matmul",
    aten.baddbmm.default: "batched matmul",
    aten.convolution.default: "convolution",
    aten.convolution_backward.default: "convolution, backward",
}
# Views, uninitialised memory and markers: no work of their own.
FREE = re.compile(
    r"(_unsafe_)?view|_reshape_alias|t|transpose|permute|expand|unbind|slice|select|split(_with_sizes)?|(un)?squeeze|alias|detach"
    r"|as_strided|(new_)?empty(_like|_strided)?|_record_function_.*"
)


@dataclass(frozen=True)
class Like:
    """A tensor's layout, to make another like it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if all(self.shape) else 0
        return torch.randn(span).to(self.dtype).as_strided(self.shape, self.stride)


class Recorder(TorchDispatchMode):
    """Counts the operations inside the context: products and convolutions by the layouts of their arguments, all others by name."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[Any, Any, Any]] = Counter()
        self.others: Counter[str] = Counter()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            # Not FlopCounterMode: its module hooks fail if a learned module is called without gradient.
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            like = tree_map(_like, (args, kwargs or {}))
            self.products[func, _frozen(like[0]), _frozen(tuple(sorted(like[1].items())))] += 1
        elif not FREE.fullmatch(name := func.__name__.split(".")[0]):
            self.others[name] += 1
        return out


class Allocations(NamedTuple):
    """Memory allocated on the CPU."""

    count: int
    total: int
    """Bytes in total."""
    peak: int
    """Maximum of bytes held at the same time."""


def allocations(work: Callable[[], object]) -> Allocations:
    """Allocations of ``work()`` by torch's allocator, without memory held before. They do not depend on the machine's load."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = [size for size in sizes if size > 0]
    return Allocations(len(taken), sum(taken), max(accumulate(sizes), default=0))


def _like(x: Any) -> Any:
    return Like(tuple(x.shape), tuple(x.stride()), x.dtype) if isinstance(x, Tensor) else x


def _frozen(x: Any) -> Any:
    return tuple(_frozen(y) for y in x) if isinstance(x, (list, tuple)) else x
