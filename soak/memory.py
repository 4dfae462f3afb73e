"""Check for leaks over hours: slopes of a command's resident memory, file descriptors, threads and GPU memory.

    python -m soak.memory --hours 2 --out DIR [-- localmotion arguments ...]

Without arguments it trains DRP (`debug`) on DMC's walker, with the replay on disk, evaluations and checkpoints. The
slope is that of a straight line through the samples after the first fifth. In the first fifth, buffers fill and the
environments for evaluation are made. A replay in memory grows until it is full, so use ``--replay_storage disk``. The
program writes DIR/memory.json. It exits with code 1 if memory grows by more than 20 MB per hour, or if the number of
file descriptors or threads grows at all.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localmotion.runs.rundir import versions

MOST = 20.0
"""MB per hour."""


def default_command(run: Path) -> list[str]:
    """A run that is small enough for many updates, episodes, evaluations and checkpoints per hour."""
    clocks = ["--env_steps", "100000000", "--replay_capacity", "20000", "--replay_storage", "disk", "--prefill", "2000"]
    clocks += ["--online.eval_every", "2000", "--online.save_every", "1000", "--eval_episodes", "1"]
    return [
        "train",
        "--method",
        "drp",
        "--preset",
        "debug",
        "--env",
        "dmc:walker_walk",
        "--threads",
        "1",
        "--run",
        str(run),
        *clocks,
    ]


def proc_status(pid: int | str) -> dict[str, int]:
    """The numbers of /proc/PID/status: kB, or counts."""
    pairs = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: int(value.split()[0]) for key, value in pairs if value.split() and value.split()[0].isdecimal()}


def sample(pid: int) -> tuple[float, int, int]:
    """Resident memory in MB, open file descriptors, threads."""
    status = proc_status(pid)
    return status["VmRSS"] * 1.024 / 1e3, len(list(Path(f"/proc/{pid}/fd").iterdir())), status["Threads"]


def gpu_megabytes(pid: int) -> float:
    """Memory of a process on NVIDIA GPUs; 0 without one."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0.0
    return sum(
        float(used) for owner, used in (line.split(",") for line in found.splitlines() if "," in line) if int(owner) == pid
    )


def slope(seconds: Sequence[float], values: Sequence[float]) -> float:
    """Slope, in units per hour, of the straight line through the samples after the first fifth."""
    first = len(seconds) // 5
    hours = np.asarray(seconds[first:]) / 3600
    return float(np.polyfit(hours, np.asarray(values[first:]), 1)[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("arguments", nargs="*", help="of localmotion")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    command = args.arguments or default_command(args.out / "run")
    rows: list[tuple[float, float, int, int, float]] = []
    with (args.out / "console.log").open("a") as log:
        process = subprocess.Popen([sys.executable, "-m", "localmotion", *command], stdout=log, stderr=log)
        began = time.monotonic()
        try:
            while time.monotonic() - began < args.hours * 3600 and process.poll() is None:
                time.sleep(args.every)
                if process.poll() is None:
                    rows.append((time.monotonic() - began, *sample(process.pid), gpu_megabytes(process.pid)))
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(300)
    if len(rows) < 10 or code not in (0, 143):
        print(f"error: {len(rows)} samples, exit code {code}; see {args.out / 'console.log'}", file=sys.stderr)
        return 2
    seconds, resident, descriptors, threads, gpu = zip(*rows, strict=True)
    first = len(rows) // 5
    found = {
        "command": "localmotion " + " ".join(command).replace(str(args.out), "OUT"),
        "versions": versions(),
        "hours": round(seconds[-1] / 3600, 3),
        "samples": len(rows),
        "resident_mb": {"after_a_fifth": resident[first], "end": resident[-1], "highest": max(resident)},
        "resident_mb_an_hour": round(slope(seconds, resident), 2),
        "descriptors": {"after_a_fifth": descriptors[first], "highest": max(descriptors[first:])},
        "threads": {"after_a_fifth": threads[first], "highest": max(threads[first:])},
        "gpu_mb": {"after_a_fifth": gpu[first], "highest": max(gpu[first:]), "an_hour": round(slope(seconds, gpu), 2)},
        "curve": [[round(s), round(r, 1)] for s, r, *_ in rows[:: max(len(rows) // 100, 1)]],
    }
    (args.out / "memory.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in ("curve", "versions")}, indent=1))
    grows = found["resident_mb_an_hour"] > MOST or max(gpu[first:]) > 1.02 * gpu[first] + 1
    more = max(descriptors[first:]) > descriptors[first] + 2 or max(threads[first:]) > threads[first]
    return int(grows or more)


if __name__ == "__main__":
    sys.exit(main())
