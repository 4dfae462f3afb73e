"""Shares of the time of a run in an environment: a real run of DRP `small` on Meta-World, stopped when enough updates are logged."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ENV = "metaworld:door-lock"
EVERY = 25
"""Updates between lines of the log."""
LIMIT = 1200
"""Maximum seconds of a run."""
PARTS = ("update", "env", "act", "perception", "replay")
SETTINGS = {
    "method": "drp",
    "env": ENV,
    "preset": "small",
    "action_repeat": 2,
    "set": 'recipe={"percept_size": 128}',
    "online.prefill": 1000,
    "online.warmup_updates": 1,
    "online.env_steps": 50_000,
    "online.eval_every": 1_000_000,
    "online.log_every": EVERY,
}


def shares(lines: list[dict[str, float]]) -> list[dict[str, object]]:
    """Rows of the table from log lines of kind "train": milliseconds per update and share of each part."""
    whole = sum(line["seconds/all"] for line in lines)
    spent = {part: sum(line[f"seconds/{part}"] for line in lines) for part in PARTS}
    spent["everything else"] = whole - sum(spent.values())
    updates = EVERY * len(lines)
    rows: list[dict[str, object]] = [
        {"part": part, "ms an update": 1e3 * seconds / updates, "share": seconds / whole} for part, seconds in spent.items()
    ]
    return [*rows, {"part": "whole", "ms an update": 1e3 * whole / updates, "share": 1.0}]


def run(lines: int = 6, skipped: int = 1) -> list[dict[str, object]]:
    """Leaves out the first ``skipped`` lines of the log, in which kernels are built. Raises RuntimeError if the run ends early."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = {**SETTINGS, "threads": torch.get_num_threads(), "run": out}
        given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "localmotion", "train", *given]
        began = time.monotonic()
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                while len(found := _logged(out / "metrics.jsonl")) < lines + skipped:
                    if process.poll() is not None or time.monotonic() - began > LIMIT:
                        raise RuntimeError(f"{' '.join(command)}: {(Path(folder) / 'log').read_text()[-2000:]}")
                    time.sleep(0.5)
            finally:
                process.terminate()
                process.wait()
    rows = shares(found[skipped : skipped + lines])
    per_update = float(rows[-1]["ms an update"])  # type: ignore[arg-type]
    # 50,000 environment steps are 25,000 agent steps, with an update every 5, except the 1,250 of the preset's random prefill.
    minutes = per_update / 1e3 * (25_000 - 1_250) / 5 / 60
    return [*rows, {"part": "50,000 env steps, minutes without evaluations", "ms an update": minutes, "share": ""}]


def _logged(path: Path) -> list[dict[str, float]]:
    """Complete lines of kind "train"."""
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if line["kind"] == "train"]
