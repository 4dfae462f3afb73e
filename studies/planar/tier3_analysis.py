"""The analysis of tier 3: table of scores, contrasts, verdicts.

python studies/planar/tier3_analysis.py dev          # or tasks; reads rows/, writes tier3-dev.md
python studies/planar/tier3_analysis.py --simulate .1  # on made-up scores of known effects: how often each verdict is given

    actions   area under R2 of the actions over the logarithm of 50 to 5,000 labels; R2 below 0 counts as 0
    returns   (return - random) / (expert - random), mean of 200 and 5,000 labels

Actions by the regression from the predicted code and by that from the network's last maps ("features"), returns by the second alone. `bc`
has one form, which stands for both. The seed is the unit, averaged over the tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from analysis import score as area
from shared import contrast_table, rows_of
from tier2_analysis import Pairs, Scores, paired, simulated
from tier3 import SETS

from localmotion.evaluation.contrasts import hierarchical_bootstrap, sign_flip_test

HERE = Path(__file__).parent
MEASURES = {
    "features actions": "R² of actions by labels, from the features",
    "features returns": "score by labels, from the features",
    "code actions": "R² of actions by labels, from the code",
}
SMALLEST = {"actions": 0.02, "returns": 0.05}
PRIMARY = "features actions"
FAMILIES: dict[str, Pairs] = {
    "DRP as published": (("drp", "scratch"), ("drp", "global flow"), ("drp", "ipv"), ("drp", "apv"), ("drp", "prelar")),
    "changed DRP": tuple((arm, "global flow") for arm in ("recompose, 9 tokens", "drp, 16 points", "recompose, 16 points")),
    "labels": (("drp", "bc"), ("drp, 16 points", "bc")),
}
BESIDE: Pairs = (("lapo", "bc"), ("laom", "bc"), ("drp", "lapo"), ("exact flow", "drp"), ("actions", "bc"))
"""Reported without a verdict."""


def score(returns: Sequence[float], row: Mapping[str, Any]) -> float:
    return float((np.mean(returns) - row["random"]) / (row["expert"] - row["random"]))


def policy(row: Mapping[str, Any], part: str) -> Any:
    """R2 of the actions by labels."""
    return row.get(f"{part} policy") or row["features policy"]


def value(row: Mapping[str, Any], measure: str) -> float:
    part, kind = measure.split()
    if kind == "actions":
        return area({"": policy(row, part)}, "")
    return float(np.mean([score(returns, row) for returns in row["features returns"].values()]))


def read(rows: Sequence[Mapping[str, Any]], measure: str) -> Scores:
    found: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        found.setdefault(str(row["arm"]), {})[int(row["seed"]), str(row["task"])] = value(row, measure)
    return found


def table(rows: Sequence[Mapping[str, Any]], task: str, part: str) -> list[str]:
    """Markdown: every arm in a task, mean over its seeds."""
    if not any(row["task"] == task for row in rows):
        return []
    labels, played = [*policy(rows[0], part)], [*rows[0]["features returns"]] if part == "features" else []
    heads = [f"{task}, {part}", "seeds", "foreseen", *(f"R², {n}" for n in labels), *(f"score, {n}" for n in played)]
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm in dict.fromkeys(str(row["arm"]) for row in rows):
        mine = [row for row in rows if row["arm"] == arm and row["task"] == task]
        if not mine:
            continue
        cells = [[row["foreseen"] for row in mine if row["foreseen"] is not None]]
        cells += [[policy(row, part)[n] for row in mine] for n in labels]
        cells += [[score(row["features returns"][n], row) for row in mine] for n in played]
        out.append(f"| {arm} | {len(mine)} | " + " | ".join(map(shown, cells)) + " |")
    return out


def shown(cell: Sequence[float]) -> str:
    if not cell:
        return ""
    return f"{np.mean(cell):.2f}" + (f" ± {np.std(cell, ddof=1):.2f}" if len(cell) > 1 else "")


def page(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    out: list[str] = []
    for part in ("features", "code"):
        for task in tasks:
            out += [*table(rows, task, part), ""]
    for measure, title in MEASURES.items():
        scores, smallest = read(rows, measure), SMALLEST[measure.split()[1]]
        out += ["", f"**{title}**; smallest effect of interest {smallest}", ""]
        out += contrast_table(scores, tasks, FAMILIES, smallest, verdicts=measure == PRIMARY)
        for of, against in BESIDE:
            both = paired(scores, of, against, tasks)
            if len(both) < 2:
                continue
            x = hierarchical_bootstrap(both.mean(1)[:, None])
            cells = [f"{x.point:+.3f}", f"{x.low:+.3f} to {x.high:+.3f}", f"{sign_flip_test(both.mean(1)):.4f}", "", ""]
            out.append(f"| {of} - {against} | {len(both)} | " + " | ".join([*cells, *(f"{v:+.3f}" for v in both.mean(0))]) + " |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", nargs="?", choices=("dev", "tasks"))
    parser.add_argument("--simulate", type=float, metavar="SPREAD", help="spread of a cell over seeds")
    args = parser.parse_args()
    if args.simulate:
        for measure, smallest in SMALLEST.items():
            print("\n".join([f"{measure}:", *simulated(100, args.simulate, smallest)]))
    if args.set:
        text = page(rows_of(f"tier3-{args.set}"), SETS[args.set])
        (HERE / f"tier3-{args.set}.md").write_text("\n".join(text) + "\n")
        print("\n".join(text))


if __name__ == "__main__":
    main()
