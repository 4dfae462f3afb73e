"""Batches per second from the replay. (bench_extract measures windows per second from a clip store.)"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from soak.replay import SPEC

from benchmarks.bench_machine import best
from localmotion.perception.companding import Companding
from localmotion.replay import Replay


def run() -> list[dict[str, object]]:
    """Batches from memory and from files, with flow as perceived and with one byte per component."""
    rows: list[dict[str, object]] = []
    rng = np.random.default_rng(0)
    record = {key: rng.integers(0, 100, shape).astype(dtype) for key, (shape, dtype) in SPEC.items()}
    with tempfile.TemporaryDirectory() as folder:
        for storage in ("memory", "disk"):
            for flow, coders in (("float16", {}), ("int8", {"flow": Companding(64)})):
                place = Path(folder) / f"{storage}_{flow}"
                replay = Replay(SPEC, capacity=100_000, length=50, coders=coders, folder=place, storage=storage)  # type: ignore[arg-type]
                for _ in range(4):
                    for t in range(501):
                        replay.add(record, last=t == 500)
                for batch in (8, 16, 50):
                    seconds = best(lambda batch=batch, replay=replay: replay.sample(batch))  # type: ignore[misc]
                    row = {"storage": storage, "flow": flow, "batch": f"{batch} x 50"}
                    rows.append({**row, "ms": seconds * 1e3, "windows/s": batch / seconds})
    return rows
