"""The product made comparable with what is written out: it computes in float64, and what it draws at random is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn


@contextmanager
def in_float64() -> Iterator[None]:
    """The product in float64: `float()` and what is made by default. Two computations then agree to nine digits on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


class Draws:
    """Keeps what the product draws, in its order, and gives it to the written-out side."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """While this lasts, draws are kept. Dropout draws a uniform number for each value, so that it can be repeated."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rand", "randint"):
                patch.setattr(torch, name, self._kept(getattr(torch, name)))
            patch.setattr(functional, "dropout", lambda x, rate: x * (torch.rand(x.shape) >= rate) / (1 - rate))
            yield

    def _kept(self, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*args: Any, **kwargs: Any) -> Tensor:
            numbers = draw(*args, **kwargs)
            self.kept.append(numbers.clone())  # the product may go on in place
            return numbers

        return drawn

    def uniform(self, *shape: int) -> Tensor:
        """The next numbers, which must have this shape."""
        first = self.kept.pop(0)
        assert first.shape == shape, f"the update drew {tuple(first.shape)} where {shape} were due"
        return first.double()

    def pick(self, time: int, count: int) -> list[int]:
        """The next draw: a position below ``time`` for each of ``count`` sequences."""
        first = self.kept.pop(0)
        assert first.shape == (count,)
        assert set(first.tolist()) <= set(range(time))
        return [int(frame) for frame in first]


def shaken(module: nn.Module) -> Any:
    """The module with weights of which none stays zero or one by its initialisation."""
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return module
