"""Batches per second out of the replay, and windows per second out of a clip store is in bench_extract."""

from __future__ import annotations

import numpy as np

from benchmarks.bench_machine import best
from localmotion.replay import Replay

SPEC: dict[str, tuple[tuple[int, ...], str]] = {
    "image": ((64, 64, 3), "uint8"),
    "action": ((6,), "float32"),
    "reward": ((), "float32"),
    "is_terminal": ((), "bool"),
    "flow": ((64, 64, 2), "float16"),
    "tracks": ((32, 2), "float32"),
    "visible": ((32,), "bool"),
    "track_id": ((32,), "int32"),
}


def run() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    replay = Replay(SPEC, capacity=100_000, length=50)
    record = {key: np.zeros(shape, dtype) for key, (shape, dtype) in SPEC.items()}
    for _ in range(4):
        for t in range(501):
            replay.add(record, last=t == 500)
    for batch in (8, 16, 50):
        seconds = best(lambda batch=batch: replay.sample(batch))  # type: ignore[misc]
        rows.append({"batch": f"{batch} x 50", "ms": seconds * 1e3, "windows/s": batch / seconds})
    return rows
