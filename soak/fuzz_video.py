"""Run `scan` and `extract` on thousands of hostile videos. No file may crash them, hang them or silently change a run.

    python -m soak.fuzz_video --files 10000 --out DIR --seed 0 [--videos FOLDER] [--workers 2]

The corpus is made in parts. Each part runs in a separate process that decodes with one worker, so that time and memory
can be measured for each file. The files of a part are removed at its end. The program prints a table by family, writes
DIR/fuzz_video.json, and exits with code 1 if a promise is broken (`soak.part.PROMISES`). The same seed and sources make
the same files, byte for byte. After an interruption (Ctrl-C or SIGTERM) the result covers the finished parts, and the
same command continues.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

import localmotion
from localmotion.errors import LocalmotionError
from localmotion.machine import cores
from soak.part import PROMISES, RECIPE, Limits, run_part, scratch
from soak.sources import Source, make_sources

SHOWN = 20  # the summary names at most this many broken cases of a promise


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = _parser().parse_args(argv)
    if args.part is not None:
        return _one_part(args)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        _check_settings(args)
        sources = make_sources(args.out / "sources", args.seed, RECIPE.size, args.videos)
    except LocalmotionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (args.out / "sources.json").write_text(json.dumps([{**asdict(s), "path": str(s.path)} for s in sources], indent=1))
    count = -(-args.files // args.part_files)
    parts = _run_parts(args, count)
    summary = summarise(parts, asdict(Limits(seconds=args.timeout)))
    summary = {
        "command": f"python -m soak.fuzz_video --files {args.files} --seed {args.seed}"
        + (" --videos FOLDER" if args.videos else ""),
        "seed": args.seed,
        "sources": len(sources),
        "parts": f"{len(parts)} of {count}",
        "versions": versions(),
        **summary,
    }
    (args.out / "fuzz_video.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary)
    return 1 if not summary["kept"] else 0 if len(parts) == count else 130


def _check_settings(args: argparse.Namespace) -> None:
    """Raise LocalmotionError if the folder holds parts of another corpus."""
    names = ("files", "seed", "part_files", "timeout", "family", "videos")
    settings = {**{name: str(getattr(args, name)) for name in names}, **versions()}
    file = args.out / "settings.json"
    if file.exists() and (have := json.loads(file.read_text())) != settings:
        other = ", ".join(name for name in settings if have.get(name) != settings[name])
        raise LocalmotionError(f"{args.out}: holds a run of other settings ({other}); give another folder")
    file.write_text(json.dumps(settings, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m soak.fuzz_video", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=10_000, help="files of the corpus (default 10000)")
    parser.add_argument("--out", type=Path, required=True, help="folder for sources, parts and the result; some 100 MB at a time")
    parser.add_argument("--seed", type=int, default=0, help="decides every file (default 0)")
    parser.add_argument(
        "--videos", type=Path, help="any folder of clips of 24 frames or more to make sources of; default: rendered ones"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="parts at work at a time, each with one decoding worker (default 1)"
    )
    parser.add_argument("--part-files", type=int, default=250, help="files of one part (default 250)")
    parser.add_argument("--timeout", type=float, default=Limits.seconds, help="seconds one file may take (default 60)")
    parser.add_argument("--family", help="make files of this family only")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return parser


def _one_part(args: argparse.Namespace) -> int:
    """Body of a part's process.

    It writes its findings to DIR/part_00000.json and touches DIR/part_00000.beat for each file.
    """
    cv2.setNumThreads(1)
    sources = [Source(**{**entry, "path": Path(entry["path"])}) for entry in json.loads((args.out / "sources.json").read_text())]
    stem = args.out / f"part_{args.part:05d}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its worker ends too
    plan = [
        (number, args.family) for number in range(args.part * args.part_files, min(args.files, (args.part + 1) * args.part_files))
    ]
    limits = Limits(seconds=args.timeout)
    with scratch(stem) as folder:
        beat = stem.with_suffix(".beat")
        found = run_part(plan, args.seed, sources, folder, limits, both=args.part == 0, beat=beat.touch)
        (folder / "manifest.jsonl").replace(args.out / f"manifest_{args.part:05d}.jsonl")
    partial = stem.with_suffix(".partial")
    partial.write_text(json.dumps(found.to_json()))
    partial.replace(stem.with_suffix(".json"))
    return 0


def _run_parts(args: argparse.Namespace, total: int) -> list[dict[str, Any]]:
    """Run parts as processes, `--workers` at a time. A part that dies or hangs breaks the last promise.

    Results of parts that an earlier call finished are reused. After an interruption, the results of the finished parts
    are returned.
    """
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
    done = {number: file for number in range(total) if (file := args.out / f"part_{number:05d}.json").exists()}
    results: dict[int, dict[str, Any]] = {number: json.loads(file.read_text()) for number, file in done.items()}
    left = [number for number in range(total) if number not in results]
    options = [
        "--files",
        args.files,
        "--out",
        args.out,
        "--seed",
        args.seed,
        "--part-files",
        args.part_files,
        "--timeout",
        args.timeout,
    ]
    options += ["--family", args.family] if args.family else []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while left or running:
            while left and len(running) < args.workers:
                number = left.pop(0)
                command = [sys.executable, "-m", "soak.fuzz_video", "--part", str(number), *map(str, options)]
                with (args.out / f"part_{number:05d}.log").open("wb") as log:
                    running[number] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), time.time()
            time.sleep(0.2)
            for number, (process, since) in list(running.items()):
                stuck = time.time() - max(since, _beat(args, number)) > 5 * args.timeout + 120
                if process.poll() is None and not stuck:
                    continue
                process.kill()
                code = process.wait()
                del running[number]
                results[number] = _result(args.out / f"part_{number:05d}", number, code, stuck)
                state = results[number].get("died") or f"{sum(map(len, results[number]['broken'].values()))} broken"
                print(f"part {number}, {len(results)} of {total} done: {state}", flush=True)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()
    return [results[number] for number in sorted(results)]


def _beat(args: argparse.Namespace, number: int) -> float:
    """Time of a part's last sign of life."""
    file = args.out / f"part_{number:05d}.beat"
    return file.stat().st_mtime if file.exists() else 0.0


def _result(stem: Path, number: int, code: int, stuck: bool) -> dict[str, Any]:
    file = stem.with_suffix(".json")
    if code == 0 and file.exists():
        return dict(json.loads(file.read_text()))
    return {"died": f"part {number} {'stood still' if stuck else f'ended with exit code {code}'}; see {stem.name}.log"}


def summarise(parts: list[dict[str, Any]], limits: dict[str, Any]) -> dict[str, Any]:
    """The table by family and the promises of all parts. A part is a `Findings.to_json` or {"died": reason}."""
    families: dict[str, dict[str, Any]] = {}
    checked: Counter[str] = Counter()
    differences: Counter[str] = Counter()
    broken: dict[str, list[str]] = {name: [] for name in PROMISES}
    for part in parts:
        checked[PROMISES[-1]] += 1
        if "died" in part:
            broken[PROMISES[-1]].append(part["died"])
            continue
        checked.update(part["checked"])
        differences.update(part["differences"])
        for name, cases in part["broken"].items():
            broken[name] += cases
        for entry in part["entries"]:
            row = families.setdefault(
                entry["family"], {"files": 0, "accepted": 0, "rejected": Counter(), "seconds": 0.0, "memory_mib": 0}
            )
            row["files"] += 1
            if entry["extracted"] == "":
                row["accepted"] += 1
            else:
                row["rejected"][entry["extracted"] or "not listed"] += 1
            row["seconds"] = round(max(row["seconds"], entry["seconds"]), 2)
            row["memory_mib"] = max(row["memory_mib"], entry["memory"] // 2**20)
    for row in families.values():
        row["rejected"] = dict(row["rejected"].most_common())
    return {
        "kept": not any(broken.values()),
        "files": sum(row["files"] for row in families.values()),
        "limits": limits,
        "families": dict(sorted(families.items())),
        "promises": {
            name: {"checked": checked[name], "broken": len(broken[name]), "cases": broken[name][:SHOWN]} for name in PROMISES
        },
        "differences_that_are_right": dict(differences.most_common()),
    }


def versions() -> dict[str, str]:
    """Versions of the system and of the packages that decode."""
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items() if name in _LIBRARIES}
    return {
        "localmotion": localmotion.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {cores()} cores",
        "av": av.__version__,
        **libraries,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
    }


_LIBRARIES = ("libavcodec", "libavformat", "libswscale")


def show(summary: dict[str, Any]) -> None:
    """Print the table by family, then the promises."""
    console = Console(width=190, highlight=False)
    table = Table("family", "files", "accepted", "rejected", "slowest, s", "highest memory, MiB")
    for family, row in summary["families"].items():
        rejected = ", ".join(f"{reason} {number}" for reason, number in row["rejected"].items())
        table.add_row(family, *map(str, (row["files"], row["accepted"], rejected, row["seconds"], row["memory_mib"])))
    console.print(table, markup=False)
    for promise, result in summary["promises"].items():
        console.print(f"{'BROKEN' if result['broken'] else 'kept  '}  {promise} ({result['checked']} checks)", markup=False)
        for case in result["cases"]:
            console.print(f"        {case}", markup=False, soft_wrap=True)
    for why, number in summary["differences_that_are_right"].items():
        console.print(f"differ  {number}: {why}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
