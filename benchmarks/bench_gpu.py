"""Milliseconds per update on a GPU: eager, as a CUDA graph, as a CUDA graph with compiled parts, and of peers; and milliseconds per batch.

    python -m benchmarks gpu --r2dreamer PATH/TO/r2dreamer --dreamerv3 PATH/TO/dreamerv3

Reports median and quartiles of `repeats` updates after `warmup`, on a fixed batch on the device, and waits for each update. It
also measures a batch of DRP `paper`, 50 x 50, from a replay in memory (gathered, pinned, copied) and from one on the device. If
ptlflow is installed, it measures the extraction of 16 clips with the flow of SEA-RAFT (untrained weights, which take the same
time), one clip at a time and together.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from soak.replay import SPEC

from benchmarks.bench_update import setup
from benchmarks.peers import NEEDS, SETTINGS, dreamerv3, r2dreamer
from benchmarks.recorder import Recorder
from localmotion.compute import Compute
from localmotion.errors import MissingExtraError
from localmotion.perception.clips import ClipExtractor
from localmotion.perception.companding import Companding
from localmotion.recipe import Recipe
from localmotion.replay import Replay, Storage
from localmotion.training.graphs import CudaGraph, Replayed

CASES = {
    "DreamerV3 12M, 16 x 64, pictures": ("dreamer_v3", "train", "paper", *SETTINGS),
    "DRP paper, fine-tuning": ("drp", "finetune", "paper"),
    "DRP paper, pre-training": ("drp", "pretrain", "paper"),
}
GOALS_MS = {"DreamerV3 12M, 16 x 64, pictures": 25.0, "DRP paper, fine-tuning": 60.0}


def timed(step: Callable[[], object], warmup: int, repeats: int) -> tuple[float, float, float]:
    """First quartile, median and third quartile in milliseconds."""
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    times.sort()
    return times[len(times) // 4], times[len(times) // 2], times[3 * len(times) // 4]


def batches(add: Callable[..., None], device: torch.device, batch: int = 50) -> None:
    """Measure sampling from memory and from the device; ``add`` is that of `run`."""
    compute = Compute(device, True, 1, "")
    rng = np.random.default_rng(0)
    record = {key: rng.integers(0, 100, shape).astype(dtype) for key, (shape, dtype) in SPEC.items()}
    storages: tuple[Storage, ...] = ("memory", "device")
    with tempfile.TemporaryDirectory() as folder:
        for storage in storages:
            replay = Replay(SPEC, capacity=2_004, length=50, coders={"flow": Companding(64)}, folder=Path(folder))
            replay.place(storage, 2_004, device)
            for t in range(4 * 501):
                replay.add(record, last=t % 501 == 500)
            sample = partial(replay.sample, batch)
            add(f"a batch of {batch} x 50 from the replay", storage, lambda sample=sample: compute.to_device(sample()), 0)


def extraction(device: str = "auto", clips: int = 16, frames: int = 25) -> dict[str, Callable[[], object]]:
    """Extraction of moving clips, one at a time and together. Raises MissingExtraError without ptlflow."""
    rng = np.random.default_rng(0)
    options = {"sea_raft": {"checkpoint": "random", "device": device}}
    extractor = ClipExtractor(Recipe(flow="sea_raft", backend_options=options))
    side = extractor.recipe.percept_size
    moving = []
    for clip in range(clips):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        texture = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        moving.append((np.stack([np.roll(texture, (t, 2 * t), (0, 1)) for t in range(frames)]), str(clip)))
    return {
        "one clip at a time": lambda: [extractor.extract(*clip) for clip in moving],
        f"{clips} clips together": lambda: extractor.extract_many(moving),
    }


def run(r2dreamer_path: str = "", dreamerv3_path: str = "", warmup: int = 10, repeats: int = 50) -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return [{"update": "no CUDA device here"}]
    rows: list[dict[str, object]] = []

    def add(case: str, how: str, step: Callable[[], object], launches: int, fewer: int = 1) -> None:
        torch.cuda.reset_peak_memory_stats()
        low, middle, high = timed(step, warmup // fewer, repeats // fewer)
        times = {"median ms": middle, "quartiles": f"{low:.1f} to {high:.1f}", "goal ms": GOALS_MS.get(case, "")}
        memory = torch.cuda.max_memory_allocated() / 2**30
        rows.append({"update": case, "how": how, **times, "operations": launches, "GiB": memory})

    for case, (method, stage, *settings) in CASES.items():
        for how in ("eager", "CUDA graph", "compiled, CUDA graph"):
            compiled = f"compile={str(how.startswith('compiled')).lower()}"
            updater, batch = setup(method, stage, *settings, "device=cuda", compiled)
            updater.graph = None if how == "eager" else Replayed(CudaGraph())
            batch = {key: value.cuda() for key, value in batch.items()}
            step = updater.learn
            launches = 0
            if updater.graph is None:
                step(batch)
                with Recorder() as counter:
                    step(batch)
                launches = sum(counter.products.values()) + sum(counter.others.values())
            add(case, how, lambda step=step, batch=batch: step(batch), launches or 1)  # type: ignore[misc]
    batches(add, torch.device("cuda"))
    try:
        for how, extract in extraction().items():
            add("extraction of 16 clips at 128 px, SEA-RAFT S", how, extract, 0, fewer=10)
    except MissingExtraError as error:
        rows.append({"update": f"no extraction with SEA-RAFT: {error}"})
    ways: dict[str, Callable[[], tuple[Callable[[], object], int]]] = {}
    if r2dreamer_path:
        there = Path(r2dreamer_path).resolve()
        ways["r2dreamer, eager"] = lambda: r2dreamer(there, bf16=True, device="cuda")
        ways["r2dreamer, compiled"] = lambda: r2dreamer(there, bf16=True, device="cuda", compiled=True)
    if dreamerv3_path:
        ways["dreamerv3, JAX"] = lambda: dreamerv3(Path(dreamerv3_path).resolve(), bf16=True, device="cuda")
    for how, make in ways.items():
        try:
            step, _ = make()
        except Exception as error:  # an error of the peer's code, of any type; keep what was measured
            rows.append({"update": f"{how} cannot be run: {type(error).__name__}: {error}; it needs: {NEEDS[how.split(',')[0]]}"})
        else:
            add("DreamerV3 12M, 16 x 64, pictures", how, step, 0)
    return rows
