"""Device, precision and threads, chosen by measurement at start and said aloud."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from localmotion.config import RunConfig
from localmotion.errors import ConfigError


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes."""

    device: torch.device
    bf16: bool
    threads: int
    note: str

    def record(self) -> dict[str, Any]:
        """What environment.json keeps: device, precision, threads, and how they were found."""
        precision = "bf16" if self.bf16 else "fp32"
        return {"compute": self.note, "device": self.device.type, "precision": precision, "threads": self.threads}

    def own_randomness(self) -> AbstractContextManager[None]:
        """Within, random numbers are drawn without moving on the generators outside: measuring does not change what is measured."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast to bf16 where it was found to be faster; parameters stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def acting(self) -> AbstractContextManager[None]:
        """The same for single steps of a policy, but none on a CPU: casting the weights costs more than the few products with them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and self.device.type != "cpu")


PLAIN = Compute(torch.device("cpu"), False, 0, "cpu, fp32")
"""The CPU as it is, for work that is no run's."""


def bf16_speedup(size: int = 512, rounds: int = 12) -> tuple[float, float]:
    """(bf16 FLOP/s, fp32 FLOP/s) of one thread of this CPU.

    One thread, the two types in turn, and the best of each: with other work on the machine several threads wait for each other, one of the
    two more than the other by chance, and a wrong answer here would cost the whole run.
    """
    pairs = {
        dtype: (torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)) for dtype in (torch.bfloat16, torch.float32)
    }
    best = dict.fromkeys(pairs, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for a, b in pairs.values():
            torch.mm(a, b)  # builds the kernel
        for _ in range(rounds):
            for dtype, (a, b) in pairs.items():
                for _ in range(6):
                    began = time.perf_counter()
                    torch.mm(a, b)
                    best[dtype] = min(best[dtype], time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    flops = 2 * size**3
    return flops / best[torch.bfloat16], flops / best[torch.float32]


def keep_buffers() -> None:
    """Let glibc keep what tensors free for those that follow: fresh pages cost more than the arithmetic done on them.

    Measured 8 % of an update of small models, 21 % of DreamerV3 12M (400,000 page faults an update to none) for 8 % more memory. Without
    mappings of their own even the largest buffers come from the heap and stay there. No effect where the C library is another.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of <malloc.h>
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    except (OSError, AttributeError):
        return


def choose(run: RunConfig, earlier: Mapping[str, Any] | None = None) -> Compute:
    """Decide device, precision and threads of a run. Raises ConfigError for a device that is not there, or not fit for `cuda_graph`.

    ``earlier``: environment.json of a run that goes on. What was measured to be faster when it began holds to its end, on the same kind of
    device: another day's measurement must not make it another run.
    """
    if run.threads:
        torch.set_num_threads(run.threads)
    name = run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; use --device cpu") from error
    if run.cuda_graph and device.type != "cuda":
        raise ConfigError(f"cuda_graph needs a CUDA device, and this run computes on {device.type}; leave it off here")
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may add in another order
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        bf16 = run.precision != "fp32" and torch.cuda.is_bf16_supported()
        return Compute(
            device, bf16, torch.get_num_threads(), f"{torch.cuda.get_device_name(device)}, {'bf16' if bf16 else 'fp32'}"
        )
    keep_buffers()
    if run.precision != "auto":
        bf16, note = run.precision == "bf16", f"{run.precision} as asked"
    elif earlier and earlier.get("device") == "cpu" and earlier.get("precision") in ("bf16", "fp32"):
        bf16, note = earlier["precision"] == "bf16", f"{earlier['precision']} as when the run began"
    else:
        fast, slow = bf16_speedup()
        bf16 = fast > 1.3 * slow
        note = f"bf16 {fast / 1e9:.0f} against fp32 {slow / 1e9:.0f} GFLOP/s a thread: {'bf16' if bf16 else 'fp32'}"
    return Compute(device, bf16, torch.get_num_threads(), f"cpu, {torch.get_num_threads()} thread(s), {note}")
