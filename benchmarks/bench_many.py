"""Several seeds at once on one machine: updates per hour of several processes together, compared with one process.

On a CPU the processes share the threads; on a GPU the processes share the device, with eager updates and with CUDA graphs.
"""

from __future__ import annotations

import multiprocessing
import time
from itertools import product
from multiprocessing.connection import Connection

import torch

from localmotion.compute import keep_buffers
from localmotion.machine import cores

CASE = ("drp", "finetune", "small")


def _serve(pipe: Connection, threads: int, updates: int, device: str, graph: bool) -> None:
    """Body of a process: build, warm up, report ready, wait for a message, make the updates, send the seconds."""
    from benchmarks.bench_update import setup  # not at the top: only the processes that update need these imports
    from localmotion.training.graphs import WARMUP, CudaGraph, Replayed

    torch.set_num_threads(threads)
    keep_buffers()
    updater, batch = setup(*CASE, f"device={device}", f"precision={'auto' if device == 'cpu' else 'bf16'}")
    updater.graph = Replayed(CudaGraph()) if graph else None
    batch = {key: value.to(device) for key, value in batch.items()}
    for _ in range(WARMUP + 1 if graph else 2):
        updater.learn(batch)
    updater.check()
    pipe.send(True)
    pipe.recv()
    began = time.perf_counter()
    for _ in range(updates):
        updater.learn(batch)
    updater.check()  # waits for a GPU
    pipe.send(time.perf_counter() - began)


def together(processes: int, threads: int, updates: int, device: str, graph: bool = False) -> float:
    """Updates per second of all processes together, from the time of the slowest."""
    spawn = multiprocessing.get_context("spawn")
    pipes, running = [], []
    for _ in range(processes):
        near, far = spawn.Pipe()
        running.append(spawn.Process(target=_serve, args=(far, threads, updates, device, graph), daemon=True))
        running[-1].start()
        pipes.append(near)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(True)
    slowest = max(pipe.recv() for pipe in pipes)
    for process in running:
        process.join()
    return processes * updates / slowest


def run(updates: int = 12) -> list[dict[str, object]]:
    """Rates on the wall clock; they are not reliable while the machine has other work."""
    gpu, count_of_cores = torch.cuda.is_available(), cores()
    counts = (1, 2, 4, 8) if gpu else tuple(n for n in (1, 2, 4, 8) if n <= count_of_cores)
    rows: list[dict[str, object]] = []
    first = 0.0
    for graph, count in product((False, True) if gpu else (False,), counts):
        threads = 1 if gpu else max(count_of_cores // count, 1)
        rate = together(count, threads, 10 * updates if gpu else updates, "cuda" if gpu else "cpu", graph)
        first = first or rate
        how = ("GPU, CUDA graphs" if graph else "GPU, eager") if gpu else f"CPU, {threads} thread(s) each"
        what = {"runs at once": count, "device": how}
        # 50,000 environment steps with action repeat 2 and an update every 5 agent steps: 5,000 updates.
        rows.append(
            {**what, "updates/s of all": rate, "runs of 5,000 updates/h": 3600 * rate / 5000, "against one by one": rate / first}
        )
    return rows
