"""Effect of torch's threads on an idle and on a busy machine: DRP `small` and `tiny`, world-model update and policy step.

Each row is a separate process, because OpenMP reads how its threads wait when torch is loaded. "Beside" is the number of computing
processes that this benchmark starts. It does not know about other processes, so the rows with 0 need an idle machine.

    python -m benchmarks threads
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch

from benchmarks.bench_update import ACTIONS, setup, time_parts
from localmotion.acting.policy import to_batch
from localmotion.machine import SPINS, WAITING, cores, measure_free_cores

OURS = "short spin (ours)"
WAYS = {
    "spinning (libgomp's default)": {"GOMP_SPINCOUNT": "300000"},
    "sleeping": {"OMP_WAIT_POLICY": "passive"},
    OURS: {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS},
}
BUSY = "while True: sum(range(1000))"


@contextlib.contextmanager
def beside(processes: int) -> Iterator[None]:
    """Context in which ``processes`` other processes compute."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(threads: int, updates: int, steps: int) -> dict[str, float]:
    """Median and slowest seconds of a world-model update and of a policy step, all with ``threads`` threads."""
    found = {}
    for preset in ("small", "tiny"):
        found |= {f"{preset} {name}": seconds for name, seconds in _measure(preset, threads, updates, steps).items()}
    return found


def _measure(preset: str, threads: int, updates: int, steps: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    updater, batch = setup("drp", "finetune", preset, f"threads={threads}", "precision=fp32")
    parts = [time_parts(updater, batch) for _ in range(updates + 1)][1:]
    learned = [part["forward"] + part["backward"] + part["optimiser"] for part in parts]
    method = updater.method.eval()
    record = {key: batch[key][0, 1].numpy() for key in batch if key not in ("is_first", "reward", "is_terminal")}
    record["action"] = np.zeros(ACTIONS, np.float32)
    carry, acted = method.initial_carry(1), []
    with torch.inference_mode():
        for step in range(steps):
            began = time.perf_counter()
            given = to_batch([record], first=step == 0, device=updater.compute.device)
            _, carry = method.act(given, carry, explore=True, window=32)  # not in `Compute.acting`, which uses one thread
            acted.append(time.perf_counter() - began)
    names = ("update", "update, slowest", "act", "act, slowest")
    values = (np.median(learned), np.max(learned), np.median(acted), np.max(acted))
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def run(updates: int = 3, steps: int = 60) -> list[dict[str, object]]:
    """A row per load, number of threads and way of waiting. Rows are printed at once, because each takes minutes on a busy machine."""
    rows: list[dict[str, object]] = []
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    counts = sorted({1, cores()})
    for others, threads, (way, variables) in product((0, 1, cores()), counts, WAYS.items()):
        if threads == 1 and way != OURS:
            continue  # one thread never waits
        with beside(others):
            free = measure_free_cores()
            command = [sys.executable, "-m", "benchmarks.bench_threads", str(threads), str(updates), str(steps)]
            done = subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            {
                "processes beside": others,
                "cores free": round(free, 1),
                "threads": threads,
                "waiting": way if threads > 1 else "-",
                **{f"{name} ms": 1e3 * seconds for name, seconds in found.items()},
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(*(int(text) for text in sys.argv[1:]))))
