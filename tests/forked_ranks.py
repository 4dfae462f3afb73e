"""Ranks as processes that are forked from the test, so that they need not import torch again. They exchange through gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path


def start(world: int, work: Callable[[int], object], folder: Path) -> list[BaseProcess]:
    """Start ``world`` processes that do ``work(rank)``. What they print goes to files in ``folder`` (`said`)."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def run(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        file = (folder / f"rank{rank}.txt").open("w", buffering=1)  # open to the end: multiprocessing prints a traceback there
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        warnings.simplefilter("default")  # of libraries, in what they print
        work(rank)

    folder.mkdir(parents=True, exist_ok=True)
    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        for process in processes:
            process.start()
    return processes


def codes(processes: list[BaseProcess]) -> list[int | None]:
    """Their exit codes, when all have ended."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def said(folder: Path, rank: int) -> str:
    """What a rank has printed."""
    return (folder / f"rank{rank}.txt").read_text()
