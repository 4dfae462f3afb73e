"""Resources of this process: its cores, the number of free ones, and variables to set before torch is loaded.

This module does not import torch. Only Linux is measured completely; on other systems all cores count as free.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how OpenMP's threads wait."""


SPINS = "2000"
"""Rounds that a waiting thread of libgomp spins before it sleeps: some 30 to 100 microseconds (docs/performance.md)."""


def wait_passively() -> None:
    """Make waiting threads of torch spin briefly and then sleep.

    This has an effect only if torch is not loaded yet and the user has set nothing.

    By default OpenMP's threads spin at the end of each parallel part. If another process uses one of the cores, the
    other threads spin while that process runs, and an update takes up to ten times as long. Sleeping at
    once is not a solution: small models reach the end of a parallel part every few microseconds, and waking a thread
    takes longer than the part. So threads spin for a moment and then sleep. The OpenMP library reads the variables when
    torch is loaded, so a program that imports torch before localmotion must set them itself. Child processes inherit
    them. Only libgomp, which torch's wheels for Linux contain, knows the second one; other libraries sleep at once.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS}


def waiting() -> str:
    """How OpenMP's threads wait in this process, by its environment variables."""
    given = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    return ", ".join(given) or f"spinning: torch was loaded first; set OMP_WAIT_POLICY=passive GOMP_SPINCOUNT={SPINS}"


def cores(root: Path = ROOT) -> int:
    """CPU cores that this process may use, at least 1.

    The minimum of: the cores of its affinity (taskset, cpusets, Slurm), the CPU quota of its control groups (containers, systemd)
    rounded up, and ``SLURM_CPUS_PER_TASK`` if Slurm sets no affinity.

    Args:
        root: folder in which ``proc`` and ``sys`` are looked up.
    """
    count, whole = len(_cpus()), os.cpu_count() or 1
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if count == whole and slurm.isdecimal() and "SLURM_JOB_ID" in os.environ:
        count = min(count, int(slurm))
    group = _tightest(root)
    if group:
        count = min(count, math.ceil(group.quota - 1e-6))
    return max(count, 1)


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Number of this process among those that learn one run together, and how many these are: (0, 1) for a single process.

    `torchrun` sets the variables ``RANK`` and ``WORLD_SIZE``.
    """
    rank, world = (environment.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(rank), int(world)) if rank.isdecimal() and world.isdecimal() and int(world) > 1 else (0, 1)


def _cpus() -> list[int]:
    """Numbers of the CPUs in this process's affinity."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    counted: Callable[[], int | None] = getattr(os, "process_cpu_count", os.cpu_count)  # Python 3.13 has the first
    return list(range(counted() or 1))


# -- control groups -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """A control group with a CPU quota: its cores, and the file with the CPU time of its processes, in ``unit`` seconds."""

    quota: float
    usage: Path
    unit: float


def _read(path: Path) -> str:
    """Text of a small system file, "" if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):  # a directory, missing, no permission, not text
        return ""


def _groups(root: Path) -> Iterator[_Group]:
    """Control groups that limit this process, of version 1 and 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and "cpu" not in names.split(","):
            continue
        mounts = ("cpu", "cpu,cpuacct", "cpuacct,cpu") if names else ("", "unified")
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            parts = [part for part in path.split("/") if part not in ("", "..")]
            # A container may see its path on the host, with its own group mounted at the top, so missing folders are skipped.
            for depth in range(len(parts), -1, -1):
                folder = top.joinpath(*parts[:depth])
                found = _quota_v1(folder) if names else _quota_v2(folder)
                if found is not None:
                    yield found


def _quota_v2(folder: Path) -> _Group | None:
    words = _read(folder / "cpu.max").split()
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
        return _Group(int(words[0]) / int(words[1]), folder / "cpu.stat", 1e-6)
    return None


def _quota_v1(folder: Path) -> _Group | None:
    quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdecimal() and period.isdecimal() and int(period):  # -1: no quota
        return _Group(int(quota) / int(period), folder / "cpuacct.usage", 1e-9)
    return None


def _tightest(root: Path) -> _Group | None:
    return min(_groups(root), key=lambda group: group.quota, default=None)


def _used(group: _Group) -> float | None:
    """CPU seconds of all processes of a group, None if they are not counted."""
    for line in _read(group.usage).splitlines():
        words = line.split()
        if len(words) == 1 or words[0] == "usage_usec":
            return int(words[-1]) * group.unit
    return None


# -- free cores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """CPU seconds up to one moment, see `load`."""

    wall: float
    own: float
    """CPU seconds of this process."""
    busy: float
    """CPU seconds of all processes on the CPUs that this process may use."""
    group: float | None
    """CPU seconds of all processes that share this process's smallest CPU quota."""


def load(root: Path = ROOT) -> Load | None:
    """The current load counters; None if the system has none. Processes of low priority count as idle, because they give way."""
    ours = {f"cpu{number}" for number in _cpus()}
    seen, busy = 0, 0.0
    for line in _read(root / "proc/stat").splitlines():
        name, *rest = line.split()
        if name in ours and len(rest) >= 8:
            user, nice, system, _, _, irq, softirq, steal = (int(word) for word in rest[:8])
            busy += user + system + irq + softirq + steal
            busy += nice if os.nice(0) > 0 else 0  # this process is one of them
            seen += 1
    if seen < len(ours):
        return None
    group = _tightest(root)
    ticks = os.sysconf("SC_CLK_TCK")
    return Load(time.monotonic(), time.process_time(), busy / ticks, _used(group) if group else None)


def free_cores(before: Load, after: Load, root: Path = ROOT) -> float:
    """Mean number of cores that other processes left idle between two moments: 0 up to `cores`.

    Cores used by this process count as free.
    """
    wall = max(after.wall - before.wall, 1e-9)
    own = after.own - before.own
    free = len(_cpus()) - max(after.busy - before.busy - own, 0.0) / wall
    group = _tightest(root)
    if group and before.group is not None and after.group is not None:
        free = min(free, group.quota - max(after.group - before.group - own, 0.0) / wall)
    return min(max(free, 0.0), float(cores(root)))


def measure_free_cores(seconds: float = 0.3) -> float:
    """Cores that are free now, measured while this process sleeps for ``seconds``. `cores` if this cannot be measured."""
    before = load()
    if before is None:
        return float(cores())
    time.sleep(seconds)
    after = load()
    return free_cores(before, after) if after else float(cores())
