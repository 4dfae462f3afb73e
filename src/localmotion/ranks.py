"""The processes ("ranks") that learn one run together, one for each GPU, and the numbers that they exchange.

`torchrun` starts them (docs/several_gpus.md). Each rank computes its rows of a batch. Gradients are averaged over ranks before they
are clipped, so a loss must be a mean over the rows of the batch. Three functions cover what is not such a mean:

    mean     a statistic of the batch that a loss is a nonlinear function of, e.g. a KL before free nats
    weighed  the sum of weights that a weighted mean is divided by
    gather   rows of all ranks, for percentiles, queues and the like

With one process no function here does anything: numbers are returned as they are. Errors of a collective are RankError.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch import distributed as dist

from localmotion import console
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.machine import launched

TIMEOUT = datetime.timedelta(minutes=10)
"""A rank that waits longer than this for the others ends with an error."""
PATIENCE = datetime.timedelta(days=1)
"""The same, while rank 0 evaluates or saves."""
BUCKET = 25 << 20
"""Bytes of gradients that are averaged in one call."""


class RankError(LocalmotionError):
    """A rank has lost the others, because one of them has ended or does not answer."""


class Alone:
    """The exchange of a process without others."""

    rank, world, local, local_world = 0, 1, 0, 1

    def sum_(self, x: Tensor) -> None:
        """Replace ``x`` by its sum over ranks."""

    def stack(self, x: Tensor) -> Tensor:
        """``x`` of all ranks, (world, ...)."""
        return x.unsqueeze(0)

    def first_(self, x: Tensor) -> None:
        """Replace ``x`` by that of rank 0."""

    def most(self, value: int, *, patient: bool = False) -> int:
        """The largest ``value`` of all ranks. ``patient``: another rank may take long to get here."""
        return value


class Processes(Alone):
    """The exchange of the default process group of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def sum_(self, x: Tensor) -> None:
        self._try(lambda: dist.all_reduce(x))

    def stack(self, x: Tensor) -> Tensor:
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world)]
        self._try(lambda: dist.all_gather(found, x.contiguous()))
        return torch.stack(found)

    def first_(self, x: Tensor) -> None:
        self._try(lambda: dist.broadcast(x, 0))

    def most(self, value: int, *, patient: bool = False) -> int:
        found = torch.tensor([value])
        group = self.patient if patient else None
        self._try(lambda: dist.all_reduce(found, dist.ReduceOp.MAX, group=group))
        return int(found)

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:  # of gloo and nccl: a connection was closed, or the time is over
            cause = " ".join(str(error).split())[:160]
            raise RankError(
                f"rank {self.rank} of {self.world} has lost the other ranks ({cause}); see which rank ended first and why."
                " The same command goes on from the newest checkpoint"
            ) from error


_here: Alone = Alone()


def rank() -> int:
    """Number of this process among those of the run, from 0."""
    return _here.rank


def world() -> int:
    """Number of processes of the run."""
    return _here.world


def local() -> tuple[int, int]:
    """Number of this process among those of the run on this machine, and how many these are."""
    return _here.local, _here.local_world


def alone() -> bool:
    """Whether the run has one process."""
    return _here.world == 1


def leads() -> bool:
    """Whether this is rank 0, which writes and evaluates."""
    return _here.rank == 0


# Batches ------------------------------------------------------------------------------------------------------------------


def rows(count: int, what: str = "batch_size") -> slice:
    """Rows of a batch of ``count`` that this rank computes: equal and contiguous parts, in the order of ranks.

    Raises ConfigError if ``count`` is not a multiple of the number of ranks. ``what``: name of the setting.
    """
    if count % _here.world:
        raise ConfigError(f"{what}={count}: {_here.world} processes cannot share it equally; choose a multiple of {_here.world}")
    share = count // _here.world
    return slice(_here.rank * share, (_here.rank + 1) * share)


# Numbers within a loss ----------------------------------------------------------------------------------------------------


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        whole = x.detach().clone()
        _here.sum_(whole)
        return whole.div_(_here.world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def mean(x: Tensor) -> Tensor:
    """Mean of ``x`` over ranks. Its gradient goes to this rank's ``x`` as it is.

    That is right for a loss which is the same function of this mean on all ranks, because gradients are averaged afterwards.
    """
    if alone():
        return x
    out: Tensor = _Mean.apply(x)
    return out


def weighed(weight: Tensor) -> Tensor:
    """What a weighted sum over this rank's rows is divided by: the sum of the weights, at least 1 in the whole batch, ().

    With several ranks it is the mean of their sums. The mean over ranks of the quotients is then the weighted mean of all rows.
    """
    return mean(weight.detach().sum()).clamp(min=1.0 / _here.world)


def total(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, without a gradient."""
    if alone():
        return x
    x = x.detach().clone()
    _here.sum_(x)
    return x


def gather(x: Tensor) -> Tensor:
    """Rows (n, ...) of all ranks, (world * n, ...), in the order of the whole batch. Without a gradient."""
    return x if alone() else _here.stack(x.detach()).flatten(0, 1)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _here.stack(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        _here.sum_(grad)
        return grad[_here.rank]


def stack(x: Tensor) -> Tensor:
    """``x`` of all ranks, (world, ...), with gradients across ranks: each rank gets the sum of those that all ranks compute for its x."""
    out: Tensor = _Stack.apply(x)
    return out


def first(x: Tensor) -> Tensor:
    """``x`` of rank 0."""
    if alone():
        return x
    x = x.detach().clone()
    _here.first_(x)
    return x


# Gradients, weights, decisions --------------------------------------------------------------------------------------------


@torch.no_grad()
def average_(tensors: Sequence[Tensor], fine: Tensor) -> Tensor:
    """Replace gradients by their means over ranks. Returns whether ``fine`` () is true on all ranks.

    The flag travels with the gradients, as a number that is NaN where it is false.
    """
    flag = torch.where(fine, 0.0, torch.nan).to(torch.float32).reshape(1)
    for part in _buckets([*tensors, flag]):
        flat = torch.cat([tensor.flatten() for tensor in part]) if len(part) > 1 else part[0].flatten().clone()
        _here.sum_(flat)
        flat.div_(_here.world)
        pieces = flat.split([tensor.numel() for tensor in part])
        torch._foreach_copy_(part, [piece.view(tensor.shape) for piece, tensor in zip(pieces, part, strict=True)])
    return torch.isfinite(flag).squeeze(0)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups of one type and of about `BUCKET` bytes."""
    found: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not found or size >= BUCKET or found[-1][0].dtype != tensor.dtype:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.numel() * tensor.element_size()
    return found


@torch.no_grad()
def align_(tensors: Mapping[str, Tensor]) -> list[str]:
    """Give all ranks the tensors of rank 0. Returns the names of those that differed on any rank."""
    if alone():
        return []
    names = list(tensors)
    sums = torch.stack([tensors[name].double().sum().cpu() for name in names])
    differ = total((first(sums) != sums).double())  # of those that are NaN too: they are the same NaN afterwards
    for name in (found := [name for name, count in zip(names, differ.tolist(), strict=True) if count]):
        whole = first(tensors[name].contiguous())
        tensors[name].copy_(whole)
    return found


def agree(value: float) -> float:
    """``value`` of rank 0, on all ranks. For decisions of the host."""
    return float(first(torch.tensor(value, dtype=torch.float64)))


def tell(values: Sequence[float]) -> list[list[float]]:
    """The ``values`` of all ranks, in the order of ranks. All give equally many."""
    return _here.stack(torch.tensor(values, dtype=torch.float64)).tolist()


def most(value: int, *, patient: bool = False) -> int:
    """The largest ``value`` of all ranks. ``patient``: another rank may take long to get here, because it evaluates or saves."""
    return _here.most(value, patient=patient)


def collect(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """``tensors`` of all ranks, in the order of ranks. Shapes and names may differ."""
    if alone():
        return [dict(tensors)]
    data = safetensors.torch.save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    size = most(len(data))
    padded = torch.zeros(8 + size, dtype=torch.uint8)
    padded[:8] = torch.tensor(list(len(data).to_bytes(8, "little")), dtype=torch.uint8)
    padded[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = [bytes(row.numpy()) for row in _here.stack(padded)]
    return [safetensors.torch.load(row[8 : 8 + int.from_bytes(row[:8], "little")]) for row in found]


# Beginning and end --------------------------------------------------------------------------------------------------------


@contextmanager
def apart() -> Iterator[None]:
    """Context of work that rank 0 does without the others. The functions above then do nothing."""
    global _here
    kept, _here = _here, Alone()
    try:
        yield
    finally:
        _here = kept


@contextmanager
def joined() -> Iterator[None]:
    """Context of a run that this process learns together with the other ranks that torchrun started.

    Does nothing in a process that torchrun did not start, or started alone. Only rank 0 prints.
    """
    global _here
    number, count = launched()
    if count == 1:
        yield
        return
    both = torch.cuda.is_available() and dist.is_nccl_available()
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            cause = " ".join(str(error).split())[:160]
            raise RankError(
                f"rank {number} of {count} cannot reach the others ({cause}); start all ranks with torchrun"
            ) from error
    _here = Processes()
    console.console.quiet = _here.rank > 0
    try:
        yield
        _here.most(0, patient=True)  # rank 0 may hold the store that the others end their connections with
        dist.destroy_process_group()
    finally:  # after an error the connections end with the process, so that no rank waits for another one
        _here = Alone()
        console.console.quiet = False
