"""Speed of this machine: matrix products and convolutions in fp32 and bf16. Updates are compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn


def clock() -> float:
    """CPU seconds of this process with one thread, so other work on the machine does not count; wall-clock seconds with more."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def best(call: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of a few calls, after one warm-up call."""
    call()
    found = float("inf")
    for _ in range(repeats):
        began = clock()
        call()
        found = min(found, clock() - began)
    return found


def peak(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product with torch's current number of threads."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / best(lambda: a @ b)


def run() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    threads = torch.get_num_threads()
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        for dtype in (torch.float32, torch.bfloat16):
            rows.append({"threads": count, "operation": "matmul 1024", "type": str(dtype)[6:], "GFLOP/s": peak(dtype) / 1e9})
            x = torch.randn(256, 48, 16, 16).to(dtype).contiguous(memory_format=torch.channels_last)
            conv = nn.Conv2d(48, 96, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)
            with torch.no_grad():
                seconds = best(lambda conv=conv, x=x: conv(x))  # type: ignore[misc]
            flops = 2 * 256 * 16 * 16 * 9 * 48 * 96
            rows.append(
                {
                    "threads": count,
                    "operation": "conv 3x3 48-96 at 16x16",
                    "type": str(dtype)[6:],
                    "GFLOP/s": flops / seconds / 1e9,
                }
            )
    torch.set_num_threads(threads)
    return rows
