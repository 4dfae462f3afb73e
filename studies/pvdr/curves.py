"""Returns while the agents of the reach studies learn: one panel per study, one line per arm.

    python studies/pvdr/curves.py toy_reach --runs toy       # adds the curves of finished runs to curves.jsonl; those that are there stay
    python studies/pvdr/curves.py                            # curves.png, from the rows alone

A row is one run: the mean return of its training episodes in each tenth of its env steps. These episodes have the noise of exploration, so
their returns are not those of the evaluations in README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from table import finished

from localmotion.report.style import GRID, PALETTE

HERE = Path(__file__).parent
ROWS = HERE / "curves.jsonl"
STUDIES = {"toy_reach": "toy:reach", "planar_reach": "planar:reacher_easy", "metaworld_tiny": "metaworld:reach"}
PARTS = 10


def rows(name: str, study: Path) -> Iterator[dict[str, Any]]:
    """Curves of the finished runs in a study's folder."""
    for _, run, lines in finished(study):
        played = [(line["env_step"], line["return"]) for line in lines if line["kind"] == "episode"]
        steps, returns = map(np.array, zip(*played, strict=True))
        last = max(line["env_step"] for line in lines if "env_step" in line)
        part = np.minimum(steps * PARTS // last, PARTS - 1)
        means = [round(float(returns[part == k].mean()), 2) if (part == k).any() else None for k in range(PARTS)]
        yield {"study": name, "arm": run["label"], "seed": run["seed"], "env_steps": int(last), "returns": means}


def drawn(known: list[dict[str, Any]]) -> Figure:
    """The curves: lines are means over seeds, bands span the seeds."""
    found = [name for name in STUDIES if any(row["study"] == name for row in known)]
    figure = Figure(figsize=(4.2 * len(found), 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(found)))
    arms = list(dict.fromkeys(row["arm"] for row in known))
    colours = {arm: PALETTE[index % len(PALETTE)] for index, arm in enumerate(arms)}
    for axis, name in zip(axes, found, strict=True):
        of_study = [row for row in known if row["study"] == name]
        for arm in dict.fromkeys(row["arm"] for row in of_study):
            runs = [row for row in of_study if row["arm"] == arm]
            values = np.array([row["returns"] for row in runs], float)  # (seeds, PARTS)
            x = (np.arange(PARTS) + 0.5) / PARTS * runs[0]["env_steps"] / 1000
            axis.plot(x, values.mean(0), color=colours[arm], linewidth=1.8, label=arm)
            axis.fill_between(x, values.min(0), values.max(0), color=colours[arm], alpha=0.12, linewidth=0)
        seeds = len({row["seed"] for row in of_study})
        axis.set_title(f"{STUDIES[name]} ({seeds} seeds)", fontsize=10, loc="left")
        axis.set_xlabel("env steps, thousands", fontsize=9)
        axis.grid(color=GRID)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("return of training episodes", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?", choices=STUDIES)
    parser.add_argument("--runs", type=Path, help="folder of `localmotion study --out`")
    args = parser.parse_args()
    if bool(args.name) != bool(args.runs):
        parser.error("give a study and its --runs, or neither")
    known = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    if args.runs:
        there = {(row["study"], row["arm"], row["seed"]) for row in known}
        known += [row for row in rows(args.name, args.runs) if (row["study"], row["arm"], row["seed"]) not in there]
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in known))
    drawn(known).savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
