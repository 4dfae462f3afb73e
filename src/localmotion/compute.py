"""Device, precision and threads. They are chosen by measurement at the start of a run and printed."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from localmotion import machine, ranks
from localmotion.config import RunConfig
from localmotion.errors import ConfigError
from localmotion.files import one_line

LOOK_EVERY = 10.0
"""Seconds between two measurements of the free cores."""
FEW = 16
"""A policy's step uses one thread for at most this many environments, because its products are too small to split."""


class Threads:
    """Number of torch threads of a CPU run with ``threads=0``: as many as cores are free.

    It follows the load during the run. If one thread has no core, the others wait for it, which costs more than the
    additional thread gains. Another number of threads sums in another order and rounds differently, so runs that must
    repeat bit for bit set ``threads``.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.free = machine.measure_free_cores() if most > 1 else float(most)
        self.now = min(most, max(1, round(self.free)))
        self._seen = machine.load() if most > 1 else None

    def look(self) -> str:
        """Set the number of threads to the number of free cores, at most every `LOOK_EVERY` seconds.

        The free cores are a mean over the time since the last measurement. Returns a line for the console if the number
        changes, else "".
        """
        before = self._seen
        if before is None or time.monotonic() - before.wall < LOOK_EVERY:
            return ""
        self._seen = after = machine.load()
        if after is None:
            return ""
        self.free = machine.free_cores(before, after)
        # Between the two thresholds nothing changes, so that the number does not alternate if the load is near one of
        # them.
        slack = max(0.5, self.now / 16)
        wanted = min(self.most, max(1, round(self.free)))
        if self.now - slack <= self.free < self.now + slack + 0.25 or wanted == self.now:
            return ""
        line = f"{self.free:.1f} of {self.most} cores were free for this run: {wanted} thread(s) from now on, {self.now} before"
        self.now = wanted
        _set_threads(wanted)
        return line


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes."""

    device: torch.device
    bf16: bool
    threads: int
    note: str
    adaptive: Threads | None = None
    """Set if the number of threads follows the load of the machine."""

    def look_again(self) -> str:
        """Adapt the number of threads to the free cores; call it between updates.

        Returns a line if it changes, else "".
        """
        return self.adaptive.look() if self.adaptive else ""

    def record(self) -> dict[str, Any]:
        """Entries for environment.json: device, precision, threads, and how they were chosen."""
        precision = "bf16" if self.bf16 else "fp32"
        return {"compute": self.note, "device": self.device.type, "precision": precision, "threads": self.threads}

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on the device, without a copy if it is already there.

        The copy goes through pinned memory, because the host would wait for any other copy.
        """
        if all(value.device.type == self.device.type for value in batch.values()):
            return batch
        if self.device.type == "cuda":
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def own_randomness(self) -> AbstractContextManager[None]:
        """Context with its own random generators, so that measuring does not change a run."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast to bf16 if it was measured to be faster. Parameters stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def acting(self, environments: int = 1) -> Iterator[None]:
        """Context for a policy's step with ``environments`` environments. On a GPU it is `autocast`.

        On a CPU it disables autocast, because casting the weights costs more than the few products gain, and it uses
        one thread for few environments.
        """
        cpu, threads = self.device.type == "cpu", torch.get_num_threads()
        alone = cpu and threads > 1 and environments <= FEW
        if alone:
            torch.set_num_threads(1)  # takes only 0.2 microseconds
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and not cpu):
                yield
        finally:
            if alone:
                torch.set_num_threads(threads)


def uncompiled(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """Context in which a method's compiled parts run without compilation.

    Acting has other shapes and would recompile them.
    """
    return torch.compiler.set_stance("force_eager") if getattr(module, "compiled", False) else nullcontext()


PLAIN = Compute(torch.device("cpu"), False, 0, "cpu, fp32")
"""The CPU with torch's current settings, for work outside a run."""


def bf16_speedup(size: int = 512, rounds: int = 12) -> tuple[float, float]:
    """(bf16 FLOP/s, fp32 FLOP/s) of one thread of this CPU.

    The measurement uses one thread, alternates the two types, and takes the best of each. Other work on the machine
    would make several threads wait for each other, by chance more for one type, and a wrong choice slows the whole run.
    A CPU without bf16 arithmetic takes about 60 times as long as with fp32. The measurement then ends after one round;
    otherwise every run would start seven seconds later.
    """
    pairs = {
        dtype: (torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)) for dtype in (torch.bfloat16, torch.float32)
    }
    best = dict.fromkeys(pairs, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for a, b in pairs.values():
            torch.mm(a, b)  # warm-up: the first call builds the kernel
        for done in range(rounds):
            if done and best[torch.bfloat16] > 4 * best[torch.float32]:
                break
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
    """Make glibc keep the memory of freed tensors for later tensors.

    New pages cost more than the arithmetic on them. This saves 8 % of the time of an update of small models and 21 %
    for DreamerV3 12M (400,000 page faults per update become none). It needs 8 % more memory. Large buffers then come
    from the heap instead of separate mappings, and stay there. It has no effect with another C library.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of <malloc.h>
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    except (OSError, AttributeError):
        return


_SET: tuple[int, int] | None = None  # (number of threads that this module set last, number before that)


def _set_threads(count: int) -> None:
    global _SET
    _SET = (count, _threads_of_torch())
    torch.set_num_threads(count)


def _threads_of_torch() -> int:
    """Number of torch's threads, by default or set by the user.

    A number that an earlier run of this process set is ignored.
    """
    now = torch.get_num_threads()
    return _SET[1] if _SET and _SET[0] == now else now


def devices() -> list[str]:
    """Devices of this machine on which torch can compute, in the form of `--device`."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.xpu.is_available():
        found += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    return found


def find_device(name: str) -> torch.device:
    """The device ``name``. "auto" is the first CUDA device if there is one, else the CPU.

    Raises ConfigError for a device that does not exist or cannot compute. The message names the available devices.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = devices()
    kind, _, index = name.partition(":")
    known = {device.partition(":")[0] for device in here}
    cause = ""
    if kind == "cpu" and index in ("", "0"):
        name = "cpu"
    elif name not in here and (index or kind not in known):
        cause = "there is no such device"
        if kind == "cuda" and "cuda" not in known:
            cause = "torch finds no GPU; does nvidia-smi?" if torch.version.cuda else "this torch is built without CUDA"
    if not cause:
        try:
            device = torch.device(name)
            torch.zeros(1, device=device)
            return device
        except (RuntimeError, AssertionError) as error:
            cause = one_line(error, 200)
    raise ConfigError(f"device {name!r} cannot be used here ({cause}); devices here: {', '.join(here)}; choose one with --device")


def choose(run: RunConfig, earlier: Mapping[str, Any] | None = None) -> Compute:
    """Choose device, precision and threads of a run.

    Raises ConfigError for a missing device, or one without `cuda_graph`. ``earlier``: environment.json of a run that
    continues. On the same kind of device the run keeps the precision that was measured to be faster at its start,
    because a new measurement could change the results.

    With ``run.threads=0`` the number of threads is the number of free cores, at most torch's default and
    `machine.cores`. On a CPU it then follows the load (`Compute.look_again`). The number is fixed if
    ``OMP_NUM_THREADS`` is set, or with ``run.compile``, because compiled code has a fixed number of threads.
    """
    device = find_device(run.device) if ranks.alone() else _device_of_rank(run.device)
    if run.cuda_graph and device.type != "cuda":
        raise ConfigError(f"cuda_graph needs a CUDA device, and this run computes on {device.type}; leave it off here")
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise cuBLAS may sum in another order
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    threads, adaptive, of = _choose_threads(run, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        bf16 = run.precision != "fp32" and torch.cuda.is_bf16_supported()
        return Compute(device, bf16, threads, f"{torch.cuda.get_device_name(device)}, {'bf16' if bf16 else 'fp32'}")
    keep_buffers()
    if run.precision != "auto":
        bf16, note = run.precision == "bf16", f"{run.precision} as asked"
    elif device.type != "cpu":
        bf16, note = False, "fp32"
    elif earlier and earlier.get("device") == "cpu" and earlier.get("precision") in ("bf16", "fp32"):
        bf16, note = earlier["precision"] == "bf16", f"{earlier['precision']} as when the run began"
    else:
        fast, slow = bf16_speedup()
        bf16 = bool(ranks.agree(fast > 1.3 * slow))
        note = f"bf16 {fast / 1e9:.0f} against fp32 {slow / 1e9:.0f} GFLOP/s a thread: {'bf16' if bf16 else 'fp32'}"
    return Compute(device, bf16, threads, f"{device.type}, {threads} thread(s){of}, {note}", adaptive)


def _device_of_rank(name: str) -> torch.device:
    """The device of this rank: a GPU of its own, or the CPU. Raises ConfigError if this machine has more ranks than GPUs."""
    local, count = ranks.local()
    if find_device(name).type != "cuda":
        return find_device(name)
    if torch.cuda.device_count() < count:
        raise ConfigError(
            f"{count} processes on this machine, but torch finds {torch.cuda.device_count()} GPU(s); start one for each GPU:"
            f" torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local)
    return find_device(f"cuda:{local}")


def _choose_threads(run: RunConfig, device: torch.device) -> tuple[int, Threads | None, str]:
    """Set torch's threads. Returns (number, `Threads` if it follows the load, text for the note)."""
    each = "" if ranks.alone() else f" in each of {ranks.world()} processes"
    if run.threads:
        _set_threads(run.threads)
        return run.threads, None, each
    most = min(_threads_of_torch(), machine.cores())
    if not ranks.alone():  # a fixed number, the same on all ranks, so that all round in the same way
        most = int(ranks.agree(max(1, min(_threads_of_torch(), machine.cores() // ranks.local()[1]))))
        _set_threads(most)
        return most, None, each
    adaptive, of = None, ""
    if device.type == "cpu" and most > 1 and "OMP_NUM_THREADS" not in os.environ and not run.compile:
        adaptive = Threads(most)
        most, of = adaptive.now, f" ({adaptive.free:.1f} of {adaptive.most} cores are free)"
    _set_threads(most)
    return most, adaptive, of
