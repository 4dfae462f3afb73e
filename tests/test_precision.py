"""Which precision is faster: measured thoroughly where it is close, and given up soon where it is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from localmotion import compute


@pytest.mark.parametrize(("bf16", "calls"), [(0.25, 73), (0.9, 73), (3.0, 73), (60.0, 7)])
def test_a_slow_precision_is_not_measured_for_long(bf16: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bf16``: how long a product takes against one in fp32, which takes a second of this clock."""
    clock, asked = [0.0], []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        asked.append(a.dtype)
        clock[0] += bf16 if a.dtype == torch.bfloat16 else 1.0
        return a

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(compute, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    fast, slow = compute.bf16_speedup(size=4)
    assert slow / fast == pytest.approx(bf16)
    assert asked.count(torch.bfloat16) == calls
