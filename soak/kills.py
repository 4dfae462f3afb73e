"""Kill extraction, pre-training and fine-tuning at random moments (kill -9).

The resumed work must have the same result.

    python -m soak.kills --kills 50 --out DIR --seed 0 [--stages extract pretrain finetune]

Each stage runs once undisturbed. Then it runs many times in processes that are killed at random moments of their whole
life, including their start and the writing of checkpoints. The same command is repeated until it finishes. After every
kill, each complete checkpoint must be readable, with every replay episode that it names. At the end, the clip store
must have the same bytes, and the run the same weights, bit by bit, and the same metrics except for times. The program
writes DIR/kills.json and exits with code 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np

# Imported here, because children are forked and must not spend seconds on imports.
import localmotion.perception.extract
import localmotion.training.finetune
import localmotion.training.pretrain  # noqa: F401
from localmotion.cli import main as localmotion_main
from localmotion.runs import checkpoint
from localmotion.runs.rundir import versions
from localmotion.video.store import ClipStore
from localmotion.video.write import write_video

STAGES = ("extract", "pretrain", "finetune")
EXACT = ["--precision", "fp32", "--threads", "1", "--device", "cpu"]


@dataclass
class Found:
    """Result of the kills of one stage."""

    kills: int = 0
    finished: int = 0
    """Number of times that the work reached its end. Each result was compared with the undisturbed one."""
    undisturbed_seconds: float = 0.0
    resumed: int = 0
    """Number of kills that left something to resume from."""
    broken: list[str] = field(default_factory=list)
    """Broken promises, one sentence each."""


@dataclass(frozen=True)
class Stage:
    """One kind of work: its command for an output folder, the check after a kill, and the result to compare."""

    command: Callable[[Path], list[str]]
    check: Callable[[Path], bool]
    """Raises an error for a damaged file. Returns whether there is something to resume from."""
    result: Callable[[Path], dict[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--length", type=int, default=120, help="updates of pre-training; fine-tuning takes 4 agent steps for each"
    )
    parser.add_argument("--videos", type=int, default=12, help="clips to extract")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args(argv)
    shutil.rmtree(args.out / "work", ignore_errors=True)
    work = args.out / "work"
    work.mkdir(parents=True)
    rng = np.random.default_rng(args.seed)
    make_videos(work / "videos", args.seed, args.videos)
    summary: dict[str, Any] = {}
    for name, stage in stages(work, args.length).items():
        if STAGES.index(name) > max(map(STAGES.index, args.stages)):
            break  # later stages need the results of earlier ones, so those run undisturbed if they are not requested
        found = torment(name, stage, work, args.kills if name in args.stages else 0, rng)
        summary[name] = asdict(found)
        broken = "; ".join(found.broken) or "nothing broken"
        print(f"{name}: {found.kills} kills, {found.resumed} resumed, finished {found.finished} times: {broken}", flush=True)
    summary = {
        "command": f"python -m soak.kills --kills {args.kills} --seed {args.seed} --length {args.length}",
        "versions": versions(),
        "stages": summary,
    }
    (args.out / "kills.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(found["broken"] for found in summary["stages"].values()))


def torment(name: str, stage: Stage, work: Path, kills: int, rng: np.random.Generator) -> Found:
    """Run a stage undisturbed, then with ``kills`` kills. After the last kill the work runs to its end."""
    found = Found()
    whole = work / f"{name}_whole"
    began = time.monotonic()
    code = wait_for(start(stage.command(whole), work / f"{name}_whole.log"))
    found.undisturbed_seconds = round(time.monotonic() - began, 2)
    if code:
        found.broken.append(f"the undisturbed run ended with {code}, see {name}_whole.log")
        return found
    expected = stage.result(whole)
    number = 0
    while found.kills < kills and not found.broken:
        victim = work / f"{name}_{number}"
        number += 1
        while True:
            # A random moment of the whole work: some processes die at their start, some late, and some finish.
            moment = float(rng.uniform(0, found.undisturbed_seconds)) if found.kills < kills else float("inf")
            child = start(stage.command(victim), work / f"{name}_{number - 1}.log")
            code = wait_for(child, moment)
            if code is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                found.kills += 1
                try:
                    found.resumed += stage.check(victim)
                except Exception as error:  # any error of a reader breaks the promise
                    found.broken.append(f"after kill {found.kills}: {type(error).__name__}: {error}")
                    break
            elif code:
                found.broken.append(f"after kill {found.kills} the same command ended with {code}, see {victim.name}.log")
                break
            else:
                found.finished += 1
                mine = stage.result(victim)
                different = sorted(key for key in expected.keys() | mine.keys() if expected.get(key) != mine.get(key))
                if different:
                    found.broken.append(f"{victim.name} differs from the undisturbed one in {', '.join(different[:5])}")
                else:
                    shutil.rmtree(victim)
                break
    return found


def start(command: list[str], log: Path) -> int:
    """Run a localmotion command in a forked child. Returns its process id."""
    child = os.fork()
    if not child:
        _live(command, log)
    return child


def _live(command: list[str], log: Path) -> NoReturn:
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv[1:] = command
        localmotion_main(command)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


def wait_for(child: int, seconds: float = float("inf")) -> int | None:
    """Exit code of a child, or None if it still runs after ``seconds``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def stages(work: Path, length: int) -> dict[str, Stage]:
    """The three kinds of work. Later ones use the results of the undisturbed earlier ones."""
    store, pre = work / "extract_whole", work / "pretrain_whole"

    def extract(out: Path) -> list[str]:
        return ["extract", str(work / "videos"), "--out", str(out), "--percept-size", "64", "--tracks", "8", "--workers", "2"]

    def pretrain(out: Path) -> list[str]:
        clocks = [
            "--updates",
            str(length),
            "--pretrain.save_every",
            "6",
            "--pretrain.log_every",
            "3",
            "--pretrain.eval_every",
            "25",
        ]
        few = ["--method", "drp", "--preset", "debug", "--heldout_fraction", "0.3"]
        return ["pretrain", "--data", str(store), "--run", str(out), *few, *clocks, *EXACT]

    def finetune(out: Path) -> list[str]:
        clocks = ["--env_steps", str(4 * length), "--prefill", "40", "--online.save_every", "20", "--online.log_every", "3"]
        few = ["--method", "drp", "--preset", "debug", "--env", "toy:dot", "--online.eval_every", "120", "--eval_episodes", "1"]
        kept = ["--replay_capacity", "180", "--replay_storage", "disk" if out.name[-1] in "02468" else "memory"]
        return ["finetune", "--checkpoint", str(pre), "--run", str(out), *few, *clocks, *kept, *EXACT]

    return {
        "extract": Stage(extract, check_store, files_of),
        "pretrain": Stage(pretrain, check_run, result_of_run),
        "finetune": Stage(finetune, check_run, result_of_run),
    }


def make_videos(folder: Path, seed: int, count: int) -> None:
    """Write short clips of a textured square that moves over a textured background."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        ground = cv2.GaussianBlur(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8), (0, 0), 3)
        patch = cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (28, 28), interpolation=cv2.INTER_NEAREST)
        phase, speed = rng.uniform(0, 6, 2), rng.uniform(0.1, 0.3, 2)
        frames = np.repeat(ground[None], 40, 0)
        for t, (x, y) in enumerate((34 + 28 * np.sin(phase + speed * np.arange(40)[:, None])).round().astype(int)):
            frames[t, y : y + 28, x : x + 28] = patch
        write_video(folder / f"clip{number:02d}.mp4", frames, fps=12)


def check_store(path: Path) -> bool:
    """Check that a finished store opens. Shards of an unfinished store are complete or absent.

    Returns whether any exist.
    """
    if (path / "store.json").exists() and json.loads((path / "store.json").read_text()).get("complete"):
        ClipStore(path)
    return path.exists() and any(path.iterdir())


def check_run(path: Path) -> bool:
    """Check that every complete checkpoint is readable, with its episodes and its lines of metrics.

    Returns whether there is a checkpoint.
    """
    found = checkpoint.complete(path / "checkpoints")
    for each in found:
        state = checkpoint.read_state(each)
        for file in each.glob("*.safetensors"):
            checkpoint.read(each, file.stem)
        for serial in state.get("replay", {}).get("episodes", []):
            checkpoint.load_file(path / "replay" / f"episode_{serial:07d}.safetensors")
        lines = (path / "metrics.jsonl").read_bytes()[: state["metrics_offset"]].decode().splitlines()
        assert len(lines) > 0 or state["metrics_offset"] == 0
        [json.loads(line) for line in lines]
    for name in ("config.json", "status.json", "environment.json"):
        if (path / name).exists():
            json.loads((path / name).read_text())
    return bool(found)


def files_of(store: Path) -> dict[str, str]:
    """Hash of every file of a clip store."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in store.rglob("*") if path.is_file()
    }


def result_of_run(run: Path) -> dict[str, str]:
    """Weights (as hashes) and metrics of a run, without measured times."""
    weights = checkpoint.read(checkpoint.newest(run), "weights")
    out = {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in weights.items()}
    for number, text in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        row = {
            k: v for k, v in json.loads(text).items() if k not in ("wall", "updates_per_second") and not k.startswith("seconds/")
        }
        out[f"metrics line {number}"] = json.dumps(row, sort_keys=True)
    return out


if __name__ == "__main__":
    sys.exit(main())
