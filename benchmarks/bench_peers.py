"""One update of our DreamerV3 and of a peer's, with the same model size, batch, precision and threads, measured alternately.

The user provides checkouts of the peers (`benchmarks/peers.py`): r2dreamer (github.com/NM512/r2dreamer, PyTorch) and the reference
(github.com/danijar/dreamerv3, JAX). If a package that a peer needs is missing, the message names it.

    python -m benchmarks peers --r2dreamer PATH/TO/r2dreamer --dreamerv3 PATH/TO/dreamerv3
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.bench_machine import clock
from benchmarks.bench_update import setup
from benchmarks.peers import BATCH, LENGTH, NEEDS, PEERS, SETTINGS
from localmotion.compute import keep_buffers


def ours(bf16: bool) -> tuple[Callable[[], object], int]:
    """(one update, number of learned parameters) of DreamerV3 12M."""
    updater, batch = setup("dreamer_v3", "train", "paper", f"precision={'bf16' if bf16 else 'fp32'}", *SETTINGS)
    return lambda: updater.learn(batch), sum(p.numel() for group in updater.groups for p in group.parameters)


def _serve(pipe: Connection, what: str, path: str, bf16: bool, threads: int, keep: bool) -> None:
    """Body of a process: build one of the two, then make one update per message and send the seconds."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as the process may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    warnings.simplefilter("ignore")
    if keep:
        keep_buffers()
    try:
        step, size = ours(bf16) if what == "ours" else PEERS[what](Path(path).resolve(), bf16)
        step()
    except Exception as error:
        pipe.send(f"{path}: {type(error).__name__}: {error}")
        return
    pipe.send(size)
    while pipe.recv():
        began = clock()
        step()
        pipe.send(clock() - began)


def run(
    r2dreamer_path: str = "", dreamerv3_path: str = "", rounds: int = 5, precisions: tuple[bool, ...] = (True, False)
) -> list[dict[str, object]]:
    """Each runs in its own process, alternately. Seconds are the median of ``rounds``, the ratio is the median of the rounds' ratios.

    r2dreamer runs unchanged, and once more with our setting of the C library's allocator (`compute.keep_buffers`), which makes it about
    twice as fast. The reference is compiled by XLA, which has its own buffers.
    """
    paths = {"r2dreamer": r2dreamer_path, "dreamerv3": dreamerv3_path}
    if not any(paths.values()):
        return [{"peer": "none given: --r2dreamer PATH, --dreamerv3 PATH"}]
    seats = {"ours": ("ours", True)}
    if r2dreamer_path:
        seats |= {"r2dreamer, eager": ("r2dreamer", False), "the same, with our allocator setting": ("r2dreamer", True)}
    if dreamerv3_path:
        seats["dreamerv3, JAX"] = ("dreamerv3", False)
    spawn = multiprocessing.get_context("spawn")
    rows: list[dict[str, object]] = []
    failures: dict[str, dict[str, object]] = {}
    for bf16 in precisions:
        pipes: dict[str, Connection] = {}
        sizes: dict[str, int] = {}
        times: dict[str, list[float]] = {}
        for name, (what, keep) in seats.items():
            pipe, far = spawn.Pipe()
            arguments = (far, what, paths.get(what, ""), bf16, torch.get_num_threads(), keep)
            spawn.Process(target=_serve, args=arguments, daemon=True).start()
            far.close()
            try:
                answer = pipe.recv()
            except EOFError:
                answer = "its process died"
            if isinstance(answer, str):  # the reason why it cannot run; the others continue
                if what == "ours":
                    raise RuntimeError(answer)
                failures[what] = {"update": f"{what} cannot be run: {answer}; it needs: {NEEDS[what]}"}
                continue
            pipes[name], sizes[name], times[name] = pipe, answer, []
        for _ in range(rounds if len(pipes) > 1 else 0):
            for name, pipe in pipes.items():
                pipe.send(True)
                times[name].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        middle = {name: sorted(values)[len(values) // 2] for name, values in times.items() if values}
        for name in list(middle)[1:]:
            ratios = sorted(b / a for a, b in zip(times["ours"], times[name], strict=True))
            rows.append(
                {
                    "update": f"DreamerV3 12M, {BATCH} x {LENGTH}, pictures",
                    "precision": "bf16" if bf16 else "fp32",
                    "threads": torch.get_num_threads(),
                    "peer": name,
                    "parameters, ours": sizes["ours"],
                    "peer's": sizes[name],
                    "ours s": middle["ours"],
                    "peer s": middle[name],
                    "ratio": ratios[len(ratios) // 2],
                    "ratios": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                }
            )
    return [*rows, *failures.values()]
