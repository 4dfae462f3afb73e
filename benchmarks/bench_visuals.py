"""Cost of visual variation: agent steps per second compared with the plain environment in the same process, and resets per second.

The environments are measured alternately, in short bursts. "of plain" is the ratio to the plain environment within a round, as the median
over rounds, so it is reliable on a busy machine, too. The other figures are of the best burst.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from localmotion.envs import make_env
from localmotion.envs.base import PixelEnv

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dmcr", {}),
    ("distracting", {"difficulty": "low"}),
    ("distracting", {"difficulty": "hard"}),
    ("diswm", {}),
    ("masklam", {}),
)
TASKS = ("walker_run", "hopper_stand", "cheetah_run")
BURST, ROUNDS = 10, 50


def run() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for task in TASKS:
        kinds: list[tuple[str, dict[str, Any]]] = [
            (f"dmc:{task}", {}),
            *((f"{suite}:{task}", options) for suite, options in CASES),
        ]
        rows += _compare(kinds, rebuild=True)
    return rows + _compare([("metaworld:drawer-open", {}), ("dmw:drawer-open", {})], rebuild=False)


def _compare(kinds: list[tuple[str, dict[str, Any]]], *, rebuild: bool) -> list[dict[str, object]]:
    """Rows of environments measured alternately; the others are compared with the first."""
    envs = [make_env(name, quality="fast", **options) for name, options in kinds]
    for env in envs:
        for seed in range(ROUNDS):  # pictures and clips are read or drawn once
            env.reset(seed=seed)
    took = np.array([[(_reset(env, turn), _burst(env, turn)) for env in envs] for turn in range(ROUNDS)])
    ratio = np.median(took[:, :1, 1] / took[:, :, 1], axis=0)
    best = took.min(axis=0)
    names = [f"{name} {options.get('difficulty', '')}".strip() for name, options in kinds]
    rows: list[dict[str, object]] = [
        {
            "env": name,
            "fps": 1 / step,
            "of plain": float(share),
            "resets/s": 1 / reset,
        }
        for name, (reset, step), share in zip(names, best, ratio, strict=True)
    ]
    if rebuild:
        anew = min(_rebuild(kinds[0][0], turn) for turn in range(4))
        rows.append({"env": f"{kinds[0][0]} built anew", "fps": "", "of plain": "", "resets/s": 1 / anew})
    for env in envs:
        env.close()
    return rows


def _reset(env: PixelEnv, seed: int) -> float:
    began = time.perf_counter()
    env.reset(seed=seed)
    return time.perf_counter() - began


def _burst(env: PixelEnv, seed: int) -> float:
    shape = env.action_space.shape
    assert shape is not None
    actions = np.random.default_rng(seed).uniform(-1, 1, (BURST, *shape)).astype(np.float32)
    began = time.perf_counter()
    for action in actions:
        env.step(action)
    return (time.perf_counter() - began) / BURST


def _rebuild(name: str, seed: int) -> float:
    """Seconds of the reference's reset: a new model and a new context."""
    began = time.perf_counter()
    env = make_env(name, quality="fast")
    env.reset(seed=seed)
    took = time.perf_counter() - began
    env.close()
    return took
