"""The analysis of tier 3: table of scores, contrasts, verdicts.

python studies/planar/tier3_analysis.py dev          # or tasks; reads rows/, writes tier3-dev.md
python studies/planar/tier3_analysis.py --simulate .1  # on made-up scores of known effects: how often each verdict is given

    actions   area under R2 of the actions over the logarithm of 50 to 5,000 labels; R2 below 0 counts as 0
    returns   (return - random) / (expert - random), mean of 200 and 5,000 labels

Actions by the regression from the predicted code and by that from the network's last maps ("features"), returns by the second alone. `bc`
has one form, which stands for both. The seed is the unit, averaged over the tasks. Intervals are Student's, over seeds: with eight
seeds the percentiles of a bootstrap, as in tier 2, hold the true value in about 88 of 100 studies.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from analysis import score as area
from shared import rows_of
from tier2_analysis import SEEDS, Floats, Pairs, Scores, paired
from tier3 import SETS

from localmotion.evaluation.contrasts import Interval, holm, sign_flip_test, verdict

HERE = Path(__file__).parent
MEASURES = {
    "features actions": "R² of actions by labels, from the features",
    "features returns": "score by labels, from the features",
    "code actions": "R² of actions by labels, from the code",
}
SMALLEST = {"actions": 0.02, "returns": 0.05}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
"""0.975 quantiles of Student's t, one to seven degrees of freedom."""
PRIMARY = "features actions"
FAMILIES: dict[str, Pairs] = {
    "DRP as published": (("drp", "scratch"), ("drp", "global flow"), ("drp", "ipv"), ("drp", "apv"), ("drp", "prelar")),
    "changed DRP": tuple((arm, "global flow") for arm in ("recompose, 9 tokens", "drp, 16 points", "recompose, 16 points")),
    "labels": (("drp", "bc"), ("drp, 16 points", "bc")),
}
BESIDE: Pairs = (
    ("scratch", "global flow"),
    ("scratch", "bc"),
    ("lapo", "bc"),
    ("laom", "bc"),
    ("drp", "lapo"),
    ("exact flow", "drp"),
    ("actions", "bc"),
)
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


def student(differences: Floats) -> Interval:
    """Mean of (n,) differences, n from 2 to 8, and Student's 95 % interval."""
    mean, count = float(differences.mean()), len(differences)
    half = STUDENT[count - 2] * float(differences.std(ddof=1)) / count**0.5
    return Interval(mean, mean - half, mean + half, 0.95)


def contrasts(scores: Scores, tasks: Sequence[str], pairs: Pairs) -> list[tuple[str, str, Floats, Interval, float, float]]:
    """Rows (of, against, differences (seeds, tasks), interval, p, p by Holm over ``pairs``) of pairs with two seeds or more."""
    found = [(of, against, both) for of, against in pairs if len(both := paired(scores, of, against, tasks)) > 1]
    tests = [sign_flip_test(both.mean(1)) for *_, both in found]
    adjusted = holm(tests) if tests else ()
    return [(*pair, student(pair[2].mean(1)), p, float(q)) for pair, p, q in zip(found, tests, adjusted, strict=True)]


def contrast_table(scores: Scores, tasks: Sequence[str], smallest: float, *, verdicts: bool) -> list[str]:
    """Markdown: all contrasts, those of `BESIDE` without a verdict. There is no verdict before all seeds are there."""
    heads = ["", "seeds", "difference", "95 % interval", "p", "p, Holm", "verdict", *tasks]
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for pairs in (*FAMILIES.values(), BESIDE):
        for of, against, both, x, p, q in contrasts(scores, tasks, pairs):
            asked = pairs is not BESIDE
            cells = [f"{of} - {against}", f"{len(both)}", f"{x.point:+.3f}", f"{x.low:+.3f} to {x.high:+.3f}", f"{p:.4f}"]
            cells += [f"{q:.4f}" if asked else ""]
            cells += [verdict(x, smallest) if asked and verdicts and len(both) == SEEDS else ""]
            out.append("| " + " | ".join([*cells, *(f"{value:+.3f}" for value in both.mean(0))]) + " |")
    return out


def simulated(spread: float, smallest: float, repeats: int = 200) -> list[str]:
    """Markdown: shares of verdicts, and of p by Holm below .05, for five contrasts of known effect, 8 seeds x 3 tasks."""
    rng, effects = np.random.default_rng(0), tuple(times * smallest for times in (4, 2, 1, 0, -1.5))
    pairs = tuple((f"arm {number}", f"less {effect}") for number, effect in enumerate(effects))
    counts = [dict.fromkeys(("confirmed", "undecided", "refuted", "p"), 0.0) for _ in effects]
    for _ in range(repeats):
        scores: dict[str, dict[tuple[int, str], float]] = {}
        for (of, against), effect in zip(pairs, effects, strict=True):
            for arm, mean in ((of, effect), (against, 0.0)):
                scores[arm] = {(s, t): float(rng.normal(mean, spread)) for s in range(SEEDS) for t in "abc"}
        for count, (*_, x, _, q) in zip(counts, contrasts(scores, "abc", pairs), strict=True):
            count[verdict(x, smallest)] += 1 / repeats
            count["p"] += (q < 0.05) / repeats
    out = ["| true effect | confirmed | undecided | refuted | p (Holm) < .05 |", "|---|---|---|---|---|"]
    for effect, count in zip(effects, counts, strict=True):
        out.append(f"| {effect:+.2f} | " + " | ".join(f"{share:.2f}" for share in count.values()) + " |")
    return out


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
        out += contrast_table(scores, tasks, smallest, verdicts=measure == PRIMARY)
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", nargs="?", choices=("dev", "tasks"))
    parser.add_argument("--simulate", type=float, metavar="SPREAD", help="spread of a cell over seeds")
    args = parser.parse_args()
    if args.simulate:
        for measure, smallest in SMALLEST.items():
            print("\n".join([f"{measure}:", *simulated(args.simulate, smallest)]))
    if args.set:
        text = page(rows_of(f"tier3-{args.set}"), SETS[args.set])
        (HERE / f"tier3-{args.set}.md").write_text("\n".join(text) + "\n")
        print("\n".join(text))


if __name__ == "__main__":
    main()
