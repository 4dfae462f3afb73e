"""Agent steps per second of the environments with pictures, in both rendering qualities, in one process and in two."""

from __future__ import annotations

import time

import numpy as np

from localmotion.envs import OWN_DRAWING, make_env
from localmotion.envs.vector import VectorEnv

CASES = (
    "dmc:walker_walk",
    "dmc:cheetah_run",
    "dmc:cartpole_swingup",
    "dmc:reacher_easy",
    "dmcr:walker_run",
    "dmcr:hopper_stand",
    "dmcr:cheetah_run",
    "metaworld:reach",
    "metaworld:door-lock",
    "metaworld:drawer-open",
    "planar:walker_run",
    "planar:cheetah_run",
    "planar:hopper_hop",
    "toy:dot",
)
SIZES: tuple[tuple[int, int | None], ...] = ((64, None), (64, 128))
BUDGET = 1.5  # seconds per row


def run() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name in CASES:
        for size, percept in SIZES:
            for quality in ("reference", "fast") if percept is None else ("fast",):
                fps, p50 = measure(name, size, percept, quality)
                rows.append(
                    {
                        "env": name,
                        "quality": quality,
                        "size": size if percept is None else f"{size} of {percept}",
                        "fps": fps,
                        "ms (median)": p50,
                        "fps, two processes": measure_two(name, size, percept, quality),
                    }
                )
                if name.partition(":")[0] in OWN_DRAWING:
                    break
    return rows


def measure(name: str, size: int, percept: int | None, quality: str) -> tuple[float, float]:
    """Agent steps per second over the budget, without resets, and the median milliseconds of one agent step."""
    env = make_env(name, size=size, percept_size=percept, quality=quality)  # type: ignore[arg-type]
    shape = env.action_space.shape
    assert shape is not None
    actions = np.random.default_rng(0).uniform(-1, 1, (256, *shape)).astype(np.float32)
    env.reset(seed=0)
    for action in actions[:5]:
        env.step(action)
    spent: list[float] = []
    while sum(spent) < BUDGET:
        began = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(actions[len(spent) % 256])
        spent.append(time.perf_counter() - began)
        if terminated or truncated:
            env.reset()
    env.close()
    return len(spent) / sum(spent), float(np.median(spent)) * 1e3


def measure_two(name: str, size: int, percept: int | None, quality: str) -> float:
    """Agent steps per second of two environments in two worker processes, added together."""
    env = VectorEnv(name, 2, seed=0, workers=2, size=size, percept_size=percept, quality=quality)
    actions = np.random.default_rng(0).uniform(-1, 1, (256, 2, *env.single_action_space.shape)).astype(np.float32)  # type: ignore[misc]
    env.reset(seed=0)
    for action in actions[:5]:
        env.step(action)
    count, spent = 0, 0.0
    while spent < BUDGET:
        began = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(actions[count % 256])
        spent += time.perf_counter() - began
        count += 1
        if (over := terminated | truncated).any():
            env.reset(options={"reset_mask": over})
    env.close()
    return 2 * count / spent
