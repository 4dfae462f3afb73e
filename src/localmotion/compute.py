"""Device, precision and threads, chosen by measurement at start and said aloud."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from localmotion import machine
from localmotion.config import RunConfig
from localmotion.errors import ConfigError
from localmotion.files import one_line

LOOK_EVERY = 10.0
"""Seconds between two looks at the cores that are free."""
FEW = 16
"""Up to this many environments a policy's step takes one thread: its products are too small to share out."""


class Threads:
    """Threads of torch of a run on a CPU that sets none (``threads=0``): as many as cores are free, looked at again while it runs.

    Threads that wait for one without a core cost more than they bring. Sums in another order round otherwise, so runs that have to repeat
    bit for bit set ``threads``.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.free = machine.measure_free_cores() if most > 1 else float(most)
        self.now = min(most, max(1, round(self.free)))
        self._seen = machine.load() if most > 1 else None

    def look(self) -> str:
        """At most every `LOOK_EVERY` seconds: set the threads that the cores free since the last look call for.

        Returns a line for people when the number changes, else "".
        """
        before = self._seen
        if before is None or time.monotonic() - before.wall < LOOK_EVERY:
            return ""
        self._seen = after = machine.load()
        if after is None:
            return ""
        self.free = machine.free_cores(before, after)
        # Between the two thresholds nothing changes, so that a load near one of them does not move the number to and fro.
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
    """Where the number of threads follows the load of the machine."""

    def look_again(self) -> str:
        """Between updates: fit the number of threads to the cores that are free. A line for people when it changes, else ""."""
        return self.adaptive.look() if self.adaptive else ""

    def record(self) -> dict[str, Any]:
        """What environment.json keeps: device, precision, threads, and how they were found."""
        precision = "bf16" if self.bf16 else "fp32"
        return {"compute": self.note, "device": self.device.type, "precision": precision, "threads": self.threads}

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on the device (no copy of what is there). From pinned memory: the copy of any other makes the host wait."""
        if all(value.device.type == self.device.type for value in batch.values()):
            return batch
        if self.device.type == "cuda":
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def own_randomness(self) -> AbstractContextManager[None]:
        """Within, random numbers are drawn without moving on the generators outside: measuring does not change what is measured."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast to bf16 where it was found to be faster; parameters stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def acting(self, environments: int = 1) -> Iterator[None]:
        """Settings for a policy's step in ``environments``. On a GPU autocast as above.

        On a CPU no autocast, because casting the weights costs more than the few products with them, and one thread for few environments.
        """
        cpu, threads = self.device.type == "cpu", torch.get_num_threads()
        alone = cpu and threads > 1 and environments <= FEW
        if alone:
            torch.set_num_threads(1)  # a fifth of a microsecond
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and not cpu):
                yield
        finally:
            if alone:
                torch.set_num_threads(threads)


def uncompiled(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """Within, a method's parts run as they are, also if `training.compiled` has compiled them: acting has shapes of its own."""
    return torch.compiler.set_stance("force_eager") if getattr(module, "compiled", False) else nullcontext()


PLAIN = Compute(torch.device("cpu"), False, 0, "cpu, fp32")
"""The CPU as it is, for work that is no run's."""


def bf16_speedup(size: int = 512, rounds: int = 12) -> tuple[float, float]:
    """(bf16 FLOP/s, fp32 FLOP/s) of one thread of this CPU.

    One thread, the two types in turn, and the best of each: with other work on the machine several threads wait for each other, one of the
    two more than the other by chance, and a wrong answer here would cost the whole run. A CPU without bf16 arithmetic takes some 60 times
    as long as with fp32: the measurement then ends after one round, or it would cost every run seven seconds at its start.
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


_SET: tuple[int, int] | None = None  # (threads set here last, those that torch had before)


def _set_threads(count: int) -> None:
    global _SET
    _SET = (count, _threads_of_torch())
    torch.set_num_threads(count)


def _threads_of_torch() -> int:
    """Threads that torch has of its own accord or by its user's word: what an earlier run of this process set does not count."""
    now = torch.get_num_threads()
    return _SET[1] if _SET and _SET[0] == now else now


def devices() -> list[str]:
    """Devices of this machine that torch can compute on, as `--device` takes them."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.xpu.is_available():
        found += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    return found


def find_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA's first one if there is one, else the CPU.

    Raises ConfigError for a device that is not here, or that cannot compute; the message names those that are.
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
    """Decide device, precision and threads of a run. Raises ConfigError for a device that is not there, or not fit for `cuda_graph`.

    ``earlier``: environment.json of a run that goes on. What was measured to be faster when it began holds to its end, on the same kind of
    device: another day's measurement must not make it another run.

    ``run.threads`` of 0 takes as many threads as cores are free, at most torch's own choice and `machine.cores`, and on a CPU the result
    goes on to follow the load (`Compute.look_again`). With ``OMP_NUM_THREADS`` in the environment, or ``run.compile`` (compiled code holds
    its number of threads), the number is fixed.
    """
    device = find_device(run.device)
    if run.cuda_graph and device.type != "cuda":
        raise ConfigError(f"cuda_graph needs a CUDA device, and this run computes on {device.type}; leave it off here")
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may add in another order
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
        bf16 = fast > 1.3 * slow
        note = f"bf16 {fast / 1e9:.0f} against fp32 {slow / 1e9:.0f} GFLOP/s a thread: {'bf16' if bf16 else 'fp32'}"
    return Compute(device, bf16, threads, f"{device.type}, {threads} thread(s){of}, {note}", adaptive)


def _choose_threads(run: RunConfig, device: torch.device) -> tuple[int, Threads | None, str]:
    """Set torch's threads: (their number, what makes it follow the load, a word on the choice)."""
    if run.threads:
        _set_threads(run.threads)
        return run.threads, None, ""
    most = min(_threads_of_torch(), machine.cores())
    adaptive, of = None, ""
    if device.type == "cpu" and most > 1 and "OMP_NUM_THREADS" not in os.environ and not run.compile:
        adaptive = Threads(most)
        most, of = adaptive.now, f" ({adaptive.free:.1f} of {adaptive.most} cores are free)"
    _set_threads(most)
    return most, adaptive, of
