"""Compare the time of an update with a lower bound: the time of its matrix products and convolutions alone.

The floor of an update adds up the time that each product and convolution takes alone, with warm caches, in the layout that the update
uses. The rest of an update is elementwise operations, copies, Python and waiting. A `peak floor` is the time of all FLOPs at the rate of
one product of two 1024 x 1024 matrices in the same precision; some products of an update are faster than this rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from benchmarks.bench_machine import clock, peak
from benchmarks.bench_update import setup
from benchmarks.recorder import PRODUCTS, Like, Recorder


def _alone(func: Any, args: Any, kwargs: Any, seconds: float) -> tuple[float, float]:
    """(seconds, FLOPs) of one call, the fastest of those that fit into ``seconds`` (at least three)."""
    real = tree_map(
        lambda x: x.make() if isinstance(x, Like) else x, (list(args), dict(kwargs)), is_leaf=lambda x: isinstance(x, Like)
    )
    arguments = [list(x) if isinstance(x, tuple) else x for x in real[0]]
    with torch.no_grad():
        with Recorder() as counter:
            func(*arguments, **real[1])
        best, began, calls = float("inf"), clock(), 0
        while calls < 3 or clock() - began < seconds:
            start = clock()
            func(*arguments, **real[1])
            best, calls = min(best, clock() - start), calls + 1
    return best, counter.flops


def measure(
    step: Callable[[], object], repeats: int = 5, alone: float = 0.05
) -> tuple[float, list[dict[str, Any]], Counter[str]]:
    """(seconds of a step, its products by kind with time alone and FLOPs, counts of its other operations).

    Each product is repeated for ``alone`` seconds.
    """
    step()
    recorder = Recorder()
    with recorder:
        step()
    times = []
    for _ in range(repeats):
        began = clock()
        step()
        times.append(clock() - began)
    kinds: dict[str, dict[str, Any]] = {}
    for (func, args, kwargs), count in recorder.products.items():
        kind = kinds.setdefault(PRODUCTS[func], {"kind": PRODUCTS[func], "calls": 0, "alone ms": 0.0, "GFLOP": 0.0})
        seconds, flops = _alone(func, args, kwargs, alone)
        kind["calls"] += count
        kind["alone ms"] += 1e3 * seconds * count
        kind["GFLOP"] += flops * count / 1e9
    return min(times), list(kinds.values()), recorder.others


CASES: tuple[tuple[str, ...], ...] = (
    ("dreamer_v3", "train", "paper", "size=size12m"),
    ("dreamer_v3", "train", "small"),
    ("dreamer_v2", "train", "small"),
    ("drp", "pretrain", "small"),
    ("drp", "finetune", "small"),
)


def run(cases: tuple[tuple[str, ...], ...] = CASES) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for method, stage, preset, *settings in cases:
        updater, batch = setup(method, stage, preset, *settings)
        step = updater.learn
        seconds, kinds, others = measure(lambda step=step, batch=batch: step(batch))  # type: ignore[misc]
        bf16 = updater.compute.bf16
        top = peak(torch.bfloat16 if bf16 else torch.float32)
        floor = sum(kind["alone ms"] for kind in kinds) / 1e3
        flops = sum(kind["GFLOP"] for kind in kinds)
        common = {
            "case": f"{method} {stage} {preset}",
            "threads": torch.get_num_threads(),
            "precision": "bf16" if bf16 else "fp32",
        }
        for kind in kinds:
            rows.append(
                {
                    **common,
                    **kind,
                    "GFLOP/s": kind["GFLOP"] / kind["alone ms"] * 1e3,
                    "of update": kind["alone ms"] / seconds / 1e3,
                }
            )
        rows.append(
            {
                **common,
                "kind": f"whole: {1e3 * seconds:.0f} ms, {seconds / floor:.2f} floors, {seconds * top / flops / 1e9:.2f} peak floors",
                "calls": sum(others.values()),
                "alone ms": 1e3 * floor,
                "GFLOP": flops,
                "GFLOP/s": flops / seconds,
                "of update": floor / seconds,
            }
        )
    return rows
