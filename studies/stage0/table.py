"""Tables of the rows that `measure.py` wrote: mean over seeds, and the mean difference from the published form on the same seed.

python studies/stage0/table.py            # markdown on the standard output
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ROWS = Path(__file__).parent / "rows"
COLUMNS = {
    "finetune": ("z_kl", "s_kl", "image", "reward_ridge_r2", "pose_r2", "open_pose_r2", "open_db", "agg_links_r2"),
    "pretrain": ("z_kl", "image", "masked", "agg_links_r2", "grid_links_r2", "z_real_db", "z_shuffled_db", "z_zero_db"),
}
BASE = {"finetune": "published", "pretrain": "published", "transfer": "scratch"}
FOLLOWED = ("image", "pose_r2", "reward_ridge_r2", "open_pose_r2")
"""Figures shown along the updates of transferred models."""


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(ROWS.glob("*.jsonl")) for line in file.read_text().splitlines()]


def shown(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def difference(found: dict[int, float], base: dict[int, float]) -> str:
    """Mean paired difference, and on how many seeds it is above zero."""
    seeds = sorted(found.keys() & base.keys())
    if not seeds:
        return ""
    apart = [found[seed] - base[seed] for seed in seeds]
    return f" ({np.mean(apart):+.2f}, {sum(d > 0 for d in apart)}/{len(apart)})"


def table(kind: str, task: str, motion: str, columns: tuple[str, ...], found: list[dict[str, Any]]) -> list[str]:
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in found:
        for column in columns:
            values[row["arm"]][column][row["seed"]] = row[column]
    lines = [
        "",
        f"### {kind}, {task}, {motion} motion",
        "",
        f"| arm | seeds | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for arm, by_column in values.items():
        cells = [
            shown(list(by_column[column].values()))
            + ("" if arm == BASE[kind] else difference(by_column[column], values[BASE[kind]][column]))
            for column in columns
        ]
        lines.append(f"| {arm} | {len(by_column[columns[0]])} | {' | '.join(cells)} |")
    return lines


def curves(task: str, motion: str, found: list[dict[str, Any]]) -> list[str]:
    points = sorted({int(at) for row in found for at in row["curve"]})
    lines: list[str] = []
    for name in FOLLOWED:
        flat = [{**row, **{f"at {at}": row["curve"][str(at)][name] for at in points}} for row in found]
        lines += [
            part.replace("### transfer", f"### transfer, {name}")
            for part in table("transfer", task, motion, tuple(f"at {at}" for at in points), flat)
        ]
    return lines


def main() -> None:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows():
        groups[row["kind"], row["task"], row["motion"]].append(row)
    for (kind, task, motion), found in sorted(groups.items()):
        print("\n".join(curves(task, motion, found) if kind == "transfer" else table(kind, task, motion, COLUMNS[kind], found)))


if __name__ == "__main__":
    main()
