"""Rates of the planar suite on one core, in CPU time: drawing alone (picture, parts, exact flow) and whole agent steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from localmotion.envs import make_env
from localmotion.envs.planar import TASKS, VIEWS

FIRST = ("walker_run", "cheetah_run", "hopper_hop")
CASES = (*FIRST, *(next(task for task in TASKS if task.startswith(body)) for body in VIEWS if not f"{FIRST}".count(body)))
TREES = ("tree-0000_run", "tree-0004_run", "tree-0000_reach", "tree-0004_reach")  # 2 and 7 links
BURSTS, BURST = 10, 0.05  # the fastest of so many bursts of so many CPU seconds: other programs on the machine slow down some


def run() -> list[dict[str, object]]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        rows = [_row(name, size) for name in CASES for size in ((64, 32) if name in FIRST else (64,))]
        rows += [_row(name, 64) for name in TREES]
        return rows + [_row(name, 64, background="lagged") for name in FIRST]
    finally:
        cv2.setNumThreads(threads)


def _row(name: str, size: int, **options: Any) -> dict[str, object]:
    env: Any = make_env(f"planar:{name}", size=size, time_limit=10**6, **options)
    shape = env.action_space.shape
    assert shape is not None
    actions = np.random.default_rng(0).uniform(-1, 1, (256, *shape)).astype(np.float32)
    env.reset(seed=0)
    before, painter, count = env.pose(), env.painter, 0
    env.step(actions[0])

    def draw() -> None:
        now = painter.pose()
        painter.picture(now, size)
        painter.codes(now, size)
        painter.flow(before, now, size)

    def step() -> None:
        nonlocal count
        env.step(actions[count % 256])
        count += 1

    def step_with_motion() -> None:
        step()
        env.exact_flow()

    return {
        "env": f"planar:{name}",
        "size": size,
        "background": options.get("background", "none"),
        "parts": len(painter.numbers),
        "frames/s": _rate(draw),
        "steps/s": _rate(step),
        "steps/s, motion": _rate(step_with_motion),
    }


def _rate(work: Callable[[], None]) -> float:
    """Calls per CPU second of this process."""
    best = 0.0
    for _ in range(BURSTS):
        began, count = time.process_time(), 0
        while (spent := time.process_time() - began) < BURST:
            work()
            count += 1
        best = max(best, count / spent)
    return best
