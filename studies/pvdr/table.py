"""Rows and table of a reach study.

    python studies/pvdr/table.py toy_reach --runs toy       # adds rows of finished runs to toy_reach.jsonl; rows that are there stay
    python studies/pvdr/table.py toy_reach                  # the table of README.md, from the rows alone

A row is one run: arm, seed, the returns of all evaluation episodes and their success rate, before learning and at the end. An episode of
planar:reacher_easy is a success if it has a return: the task pays in the target alone. A contrast is
PVDR less another arm, over the seeds that both have: difference of success rates, its interval (bootstrap over seeds), and p of a paired
sign-flip test. `localmotion study` makes the same from run folders; rows outlive them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.evaluation.contrasts import hierarchical_bootstrap, holm, sign_flip_test

HERE = Path(__file__).parent
LEAST = 5
"""Seeds of a contrast: an interval of fewer says too little."""


def finished(study: Path) -> Iterator[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """Folder, settings and log of the agents that have learned to their end."""
    for config in sorted((study / "runs").glob("*/config.json")):
        run = json.loads(config.read_text())
        metrics = config.parent / "metrics.jsonl"
        if run["stage"] != "finetune" or not metrics.exists():
            continue
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        if any(line["kind"] == "eval" and line["final"] for line in lines):
            yield config.parent, run, lines


def rows(study: Path) -> Iterator[dict[str, Any]]:
    """Rows of the finished runs in a study's folder."""
    for folder, run, lines in finished(study):
        found = [line for line in lines if line["kind"] == "eval"]
        commit = json.loads((folder / "environment.json").read_text()).get("commit")
        row: dict[str, Any] = {"arm": run["label"], "task": run["env"], "seed": run["seed"]}
        row |= {"env_steps": found[-1]["env_step"], "commit": commit}
        for name, line in (("start", found[0]), ("end", found[-1])):
            reached = float(np.mean(np.array(line["returns"]) > 0))  # planar: pays only in the target
            row |= {f"return, {name}": line["returns"], f"success, {name}": line.get("success_rate", reached)}
        yield row


def shown(known: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: means over seeds, then contrasts of success rates."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for row in known:
        arms.setdefault(row["arm"], {})[row["seed"]] = row
    yield "| arm | seeds | return: start | end | success: start | end | end, by seed |\n|---|---|---|---|---|---|---|"
    for arm, seeds in arms.items():
        cells = [arm, str(len(seeds))]
        for what in ("return, start", "return, end", "success, start", "success, end"):
            values = [float(np.mean(row[what])) for row in seeds.values()]
            digits = 1 if what.startswith("return") else 2
            cells.append(f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""))
        cells.append(", ".join(f"{seeds[seed]['success, end']:.2f}" for seed in sorted(seeds)))
        yield "| " + " | ".join(cells) + " |"
    pairs = {arm: sorted(set(seeds) & set(arms.get("PVDR", {}))) for arm, seeds in arms.items() if arm != "PVDR"}
    pairs = {arm: seeds for arm, seeds in pairs.items() if len(seeds) >= LEAST}
    if not pairs:
        return
    differences = {
        arm: [arms["PVDR"][s]["success, end"] - arms[arm][s]["success, end"] for s in seeds] for arm, seeds in pairs.items()
    }
    p = [sign_flip_test(x) for x in differences.values()]
    yield "\n| PVDR against | seeds | difference of success | 95 % interval | p | p, Holm |\n|---|---|---|---|---|---|"
    for (arm, x), one, adjusted in zip(differences.items(), p, holm(p), strict=True):
        interval = hierarchical_bootstrap(x)
        ends = f"{interval.low:+.2f} to {interval.high:+.2f}"
        yield f"| {arm} | {len(x)} | {interval.point:+.2f} | {ends} | {one:.4f} | {adjusted:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", help="of the study file, e.g. toy_reach")
    parser.add_argument("--runs", type=Path, help="folder of `localmotion study --out`")
    args = parser.parse_args()
    file = HERE / f"{args.name}.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if args.runs:
        there = {(row["arm"], row["seed"]) for row in known}
        known += [row for row in rows(args.runs) if (row["arm"], row["seed"]) not in there]
        file.write_text("".join(json.dumps(row) + "\n" for row in known))
    print("\n".join(shown(known)))


if __name__ == "__main__":
    main()
