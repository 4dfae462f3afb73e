"""Ranks as threads of this process: what they compute together is compared with one process in milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from localmotion import ranks
from localmotion.models.distributions import likeliest


class Threads(ranks.Alone):
    """The exchange of threads. On a CPU a backward pass runs in the thread that calls it, so a thread always knows its number."""

    def __init__(self, world: int) -> None:
        self.world = self.local_world = world  # type: ignore[misc]
        self._mine = threading.local()
        self._meet = threading.Barrier(world, timeout=120)
        self._given: list[Any] = [None] * world

    @property
    def rank(self) -> int:  # type: ignore[override]
        return getattr(self._mine, "rank", 0)

    def _all(self, value: Any) -> list[Any]:
        self._given[self.rank] = value
        self._meet.wait()
        found = list(self._given)
        self._meet.wait()
        return found

    def sum_(self, x: Tensor) -> None:
        x.copy_(torch.stack(self._all(x.clone())).sum(0))

    def stack(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x.clone()))

    def first_(self, x: Tensor) -> None:
        x.copy_(self._all(x.clone())[0])

    def most(self, value: int, *, patient: bool = False) -> int:
        return max(self._all(value))


def together(world: int, work: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Results of ``work(rank)`` in ``world`` threads. The first error of a thread is raised."""
    exchange, found, wrong = Threads(world), [None] * world, []

    def run(rank: int) -> None:
        exchange._mine.rank = rank
        try:
            with likeliest():
                found[rank] = work(rank)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            wrong.append(error)
            exchange._meet.abort()

    with monkeypatch.context() as patch:
        patch.setattr(ranks, "_here", exchange)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if wrong:
        raise wrong[0]
    return found


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers become constants, because rows of two ranks would otherwise get other numbers than rows of one."""

    def shape_of(size: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(size[0]) if size and not isinstance(size[0], int) else tuple(size)

    monkeypatch.setattr(torch, "rand", lambda *size, generator=None, **more: torch.full(shape_of(size), 0.37, **more))
    monkeypatch.setattr(torch, "randn", lambda *size, generator=None, **more: torch.full(shape_of(size), 0.2, **more))
    monkeypatch.setattr(torch, "randn_like", lambda x, **more: torch.full_like(x, 0.2))
    monkeypatch.setattr(torch, "randint", lambda *args, generator=None, **more: torch.zeros(args[-1], dtype=torch.int64))
    monkeypatch.setattr(F, "dropout", lambda x, *args, **more: x)
