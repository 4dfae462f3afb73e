"""Tables of the rows that `toy.py` and `planar.py` wrote: markdown on the standard output.

python studies/latent_actions/table.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PROBES = ("nmse", "actions", "links", "background")


def rows(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(HERE.glob(pattern)) for line in file.read_text().splitlines()]


def cell(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def table(head: list[str], lines: list[list[str]]) -> None:
    print("\n".join(["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines)]))


def main() -> None:
    toy = sorted(rows("toy.jsonl"), key=lambda row: (row["latent"], row["loss"], row["seed"]))
    table(
        ["z", "loss", "seed", "action", "texture"],
        [[str(row["latent"]), row["loss"], str(row["seed"]), f"{row['action']:.2f}", f"{row['texture']:.2f}"] for row in toy],
    )
    by_task: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows("rows/first/probes-*.jsonl"):
        by_task[row["task"]][row["arm"]].append(row)
    for task, arms in by_task.items():
        exact = next(iter(arms.values()))[0]["exact flow"]
        lines = [["exact flow, 8 x 8 grid", "", *(f"{exact[name]:.2f}" for name in PROBES)]]
        lines += [[arm, str(len(found)), *(cell([row[name] for row in found]) for name in PROBES)] for arm, found in arms.items()]
        table([task, "seeds", *PROBES], lines)


if __name__ == "__main__":
    main()
