"""Measure a replay of a million DRP transitions: size on disk, memory, and speed of sampling.

    python -m soak.replay --records 1000000 --out DIR

The program fills a replay with ``storage="disk"`` from random pictures and flow, closes it, opens it again as a resumed
run does, and samples. It writes DIR/replay.json. It exits with code 1 if a million records would take more than 25 GB
on disk, or if the process takes more than 2 GB of memory. The episodes are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.perception.companding import Companding
from localmotion.replay import Replay
from localmotion.runs.rundir import versions
from soak.memory import proc_status

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
STEPS = 500
BATCHES = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    folder = args.out / "replay"
    shutil.rmtree(folder, ignore_errors=True)
    settings: dict[str, Any] = {"capacity": args.records, "length": 50, "coders": {"flow": Companding(64)}, "folder": folder}
    replay = Replay(SPEC, **settings, storage="disk")
    rng = np.random.default_rng(0)
    pool = [
        {
            key: (rng.standard_normal(shape) * 3).astype(dtype) if dtype != "bool" else rng.random(shape) < 0.5
            for key, (shape, dtype) in SPEC.items()
        }
        for _ in range(64)
    ]
    try:
        began = time.perf_counter()
        while len(replay) + STEPS + 1 <= args.records:
            for t in range(STEPS + 1):
                replay.add(pool[int(rng.integers(64))], last=t == STEPS)
        filled = time.perf_counter() - began
        state = json.loads(json.dumps(replay.state()))
        began = time.perf_counter()
        replay = Replay(SPEC, **settings, storage="disk")
        replay.load(state)
        opened = time.perf_counter() - began
        took = []
        for _ in range(BATCHES):
            began = time.perf_counter()
            replay.sample(16)
            took.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in folder.iterdir())
        now, highest = (proc_status("self")[key] * 1024 for key in ("VmRSS", "VmHWM"))
        found = {
            "command": f"python -m soak.replay --records {args.records}",
            "versions": versions(),
            "records": len(replay),
            "episodes": len(replay.episodes),
            "gigabytes_on_disk": round(size / 1e9, 3),
            "gigabytes_a_million": round(size / len(replay) * 1e6 / 1e9, 3),
            "resident_gigabytes": round(now / 1e9, 3),
            "resident_gigabytes_highest": round(highest / 1e9, 3),
            "fill_records_a_second": round(len(replay) / filled),
            "open_seconds": round(opened, 2),
            "batch_16x50_ms_median": round(float(np.median(took)) * 1e3, 2),
            "batch_16x50_ms_p99": round(float(np.percentile(took, 99)) * 1e3, 2),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(found, indent=1)
    (args.out / "replay.json").write_text(text + "\n")
    print(text)
    return int(size / len(replay) * 1e6 > 25e9 or highest > 2e9)


if __name__ == "__main__":
    sys.exit(main())
