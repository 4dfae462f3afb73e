"""What worker processes are given to do in tests. A module of its own: each worker imports it, and torch would take seconds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.perception.unfinished import Task, VideoDone
from localmotion.video.workers import limited_memory


def act(item: str) -> str:
    """Do what the item says: die in a way of its own, "hang FILE" (see `waiting.jump_when_hanging`), or answer in upper case."""
    word, _, hanging = item.partition(" ")
    if word == "abort":
        os.abort()
    if word == "exit":
        os._exit(3)
    if word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "raise":
        raise KeyError("a defect")
    if word == "hang":
        if hanging:
            with Path(hanging).open("a") as file:
                file.write(".")
        while True:
            time.sleep(100)
    if word == "memory":
        with limited_memory(2**26):
            return str(np.ones(2**30, np.uint8)[0])
    if word == "modest":
        with limited_memory(2**26):
            return str(np.ones(2**24, np.uint8).sum())
    return item.upper()


def act_on_tasks(tasks: Sequence[Task]) -> Generator[list[Any], None, list[Any]]:
    """The same for the ids of a group of videos, as extraction gives them to a worker; each then counts as one of seven frames."""
    for task in tasks:
        act(task.ref.id)
    yield []
    return [VideoDone(task.ref.id, frames=7) for task in tasks]
