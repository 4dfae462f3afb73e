"""Write the results of run directories as JSON: per-seed curves, settings, commands and versions.

    python studies/collect.py OUT.json RUN [RUN ...]

Curves are in the field's format: a list of {task, method, seed, xs (env steps), ys (return or success rate)}.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any


def rows(run: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl."""
    out = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        try:
            out.append(json.loads(text))
        except ValueError:
            continue
    return out


def collect(run: Path) -> dict[str, Any]:
    """All results of one run that a reader needs to judge it."""
    config = json.loads((run / "config.json").read_text())
    found = rows(run)
    kept: dict[str, Any] = {
        "run": run.name,
        "method": config["method"],
        "stage": config["stage"],
        "task": config["env"],
        "seed": config["seed"],
        "from_checkpoint": bool(config["checkpoint"]),
        "status": json.loads((run / "status.json").read_text())["state"],
        "command": sorted(set((run / "command.txt").read_text().splitlines())),
        "versions": json.loads((run / "environment.json").read_text())["versions"],
        "config": {k: v for k, v in config.items() if k not in ("data", "checkpoint")},
    }
    evals = [r for r in found if r["kind"] == "eval"]
    if evals:
        score = "success_rate" if "success_rate" in evals[0] else "return_mean"
        kept |= {"score": score, "xs": [r["env_step"] for r in evals], "ys": [r[score] for r in evals]}
        kept["returns"] = [r["returns"] for r in evals]
        kept["training_episodes"] = [[r["env_step"], round(r["return"], 2)] for r in found if r["kind"] == "episode"]
    heldout = [{k: v for k, v in r.items() if k not in ("kind", "wall")} for r in found if r["kind"] == "heldout"]
    if heldout:
        kept["heldout"] = heldout
    last = [r for r in found if r["kind"] in ("train", "pretrain")][-1:]
    kept["last_metrics"] = {k: v for r in last for k, v in r.items()}
    if (run / "random.json").exists():
        kept["random_policy"] = json.loads((run / "random.json").read_text())
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    kept = [collect(run) for run in given.runs]
    # Keep only the last part of an absolute path: folders of the machine mean nothing to a reader.
    given.out.write_text(re.sub(r"(?<![\w.])/(?:[\w.-]+/)+", "", json.dumps(kept, indent=1)) + "\n")
    for item in kept:
        tail = item.get("ys", [None])[-1]
        print(item["run"], item["status"], item.get("xs", [0])[-1], tail)


if __name__ == "__main__":
    main()
