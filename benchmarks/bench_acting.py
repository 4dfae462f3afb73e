"""One policy step at batch 1, streaming perception apart: what stands between a frame and an action."""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.bench_update import ACTIONS, setup
from localmotion.evaluation.rollout import MethodPolicy
from localmotion.perception.base import Recipe
from localmotion.perception.stream import StreamingExtractor


def run(steps: int = 200) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    rng = np.random.default_rng(0)
    for percept in (64, 128):
        stream = StreamingExtractor(Recipe(percept_size=percept, redraw_rounds=0), 0)
        base = rng.integers(0, 256, (percept + 32, percept + 32, 3), dtype=np.uint8)
        base = np.repeat(np.repeat(base[::4, ::4], 4, 0), 4, 1)
        stream.reset(np.ascontiguousarray(base[:percept, :percept]))
        times = []
        for t in range(steps):
            dx = (t * 1) % 32
            frame = np.ascontiguousarray(base[:percept, dx : dx + percept])
            began = time.perf_counter()
            stream.step(frame)
            times.append(time.perf_counter() - began)
        rows.append(
            {
                "what": f"perception {percept} px",
                "median ms": 1e3 * float(np.median(times)),
                "p99 ms": 1e3 * float(np.quantile(times, 0.99)),
            }
        )
    for method in ("drp", "dreamer_v2"):
        updater, batch = setup(method, "train", "small")
        updater.method.eval()
        policy = MethodPolicy(updater.method, updater.compute, explore=True, window=32)
        record = {key: batch[key][0, 1].numpy() for key in batch if key not in ("is_first", "reward", "is_terminal")}
        record["action"] = np.zeros(ACTIONS, np.float32)
        times = []
        for t in range(steps):
            began = time.perf_counter()
            policy([record], t == 0)
            times.append(time.perf_counter() - began)
        rows.append(
            {
                "what": f"{method} small act, {torch.get_num_threads()} thread(s)",
                "median ms": 1e3 * float(np.median(times)),
                "p99 ms": 1e3 * float(np.quantile(times, 0.99)),
            }
        )
    return rows
