"""Time from a frame to an action on one core, batch 1: streaming perception, one policy step, and both together.

Seconds are CPU time of the process, so other work on the machine does not count.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch

from benchmarks.bench_machine import clock
from benchmarks.bench_update import ACTIONS, setup
from localmotion.acting.policy import MethodPolicy
from localmotion.compute import Compute
from localmotion.methods.pvdr import PVDR
from localmotion.perception.stream import StreamingExtractor
from localmotion.recipe import Recipe
from localmotion.runs.settings import compose

EDGES_MS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 50.0, float("inf"))
"""Bounds of the latency histogram, milliseconds."""


def histogram(times_ms: np.ndarray) -> str:
    """Shares of steps by latency, empty ranges left out: "4-5: 82 %, 5-6: 17 %"."""
    counts, _ = np.histogram(times_ms, EDGES_MS)
    parts = []
    for low, high, count in zip(EDGES_MS, EDGES_MS[1:], counts, strict=False):
        if count:
            name = f"{low:g}-{high:g}" if np.isfinite(high) else f"over {low:g}"
            parts.append(f"{name}: {100 * count / len(times_ms):.3g} %")
    return ", ".join(parts)


def row(what: str, seconds: list[float]) -> dict[str, object]:
    """Median, 90th and 99th percentile and histogram of a step's latency in milliseconds."""
    times = 1e3 * np.array(seconds)
    quantiles = {f"{name} ms": float(np.quantile(times, q)) for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {"what": what, **quantiles, "histogram ms": histogram(times)}


def perception(percept: int, steps: int) -> list[float]:
    """Seconds of each step of streaming perception on a picture that moves by a pixel per frame."""
    rng = np.random.default_rng(0)
    stream = StreamingExtractor(Recipe(percept_size=percept, redraw_rounds=0), 0)
    base = rng.integers(0, 256, (percept + 32, percept + 32, 3), dtype=np.uint8)
    base = np.repeat(np.repeat(base[::4, ::4], 4, 0), 4, 1)
    stream.reset(np.ascontiguousarray(base[:percept, :percept]))
    times = []
    for t in range(steps):
        frame = np.ascontiguousarray(base[:percept, t % 32 : t % 32 + percept])
        began = clock()
        stream.step(frame)
        times.append(clock() - began)
    return times


def acting(method: str, steps: int) -> list[float]:
    """Seconds of each policy step, the first of an episode included."""
    updater, batch = setup(method, "train", "small")
    updater.method.eval()
    policy = MethodPolicy(updater.method, updater.compute, explore=True, window=32)
    record = {key: batch[key][0, 1].numpy() for key in batch if key not in ("is_first", "reward", "is_terminal")}
    record["action"] = np.zeros(ACTIONS, np.float32)
    times = []
    for t in range(steps):
        began = clock()
        policy([record], t == 0)
        times.append(clock() - began)
    return times


def planning(steps: int) -> tuple[list[float], list[float]]:
    """Seconds of decoding eight plans of PVDR `tiny`, and of whole policy steps with as many."""
    run = compose("pvdr", "finetune", preset="tiny", env="toy:reach")
    torch.manual_seed(0)
    method = PVDR(run.model, image_size=32, action_dim=2).eval()
    assert run.model.align.plans == 8
    policy = MethodPolicy(method, Compute(torch.device("cpu"), False, 1, ""), explore=True, window=32)
    picture = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    past = torch.randint(method.tokenizer.codes, (1, method.before, method.tokenizer.cells))
    z, decoded, acted = torch.randn(1, 8, run.model.plan.latent), [], []
    for t in range(steps):
        began = clock()
        policy([{"image": picture[t % 2], "goal": picture[0]}], t == 0)
        acted.append(clock() - began)
        began = clock()
        with torch.inference_mode():
            method.plans(past, z)
        decoded.append(clock() - began)
    return decoded, acted


def run(steps: int = 300) -> list[dict[str, object]]:
    threads, theirs = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        seen = {percept: perception(percept, steps) for percept in (64, 128)}
        acted = {method: acting(method, steps) for method in ("drp", "ipv", "dreamer_v2", "dreamer_v3")}
        plans = planning(steps)
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(theirs)
    return [
        *(row(f"perception, {percept} px", times) for percept, times in seen.items()),
        *(row(f"{method} small, policy step", times) for method, times in acted.items()),
        *(
            row(
                f"drp small, perception at {percept} px and policy step (goal 8)",
                [a + b for a, b in zip(times, acted["drp"], strict=True)],
            )
            for percept, times in seen.items()
        ),
        row("pvdr tiny, eight plans decoded (goal 30)", plans[0]),
        row("pvdr tiny, policy step with eight plans", plans[1]),
    ]
