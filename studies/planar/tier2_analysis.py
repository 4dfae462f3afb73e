"""The analysis of tier 2: table of scores, contrasts, verdicts.

python studies/planar/tier2_analysis.py dev          # or tasks; reads rows/, writes tier2-dev.md
python studies/planar/tier2_analysis.py --pilot      # does the measure see anything? on the development rows
python studies/planar/tier2_analysis.py --simulate   # the same on made-up scores of known effects: how often each verdict is given

A score is the mean of a figure after 100, 200 and 300 updates. The seed is the unit, averaged over the tasks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.evaluation.contrasts import Interval, hierarchical_bootstrap, holm, sign_flip_test, verdict

HERE = Path(__file__).parent
MEASURES = {
    "pose": "pose, posterior",
    "reward": "reward, posterior",
    "ahead": "pose, 1 to 5 steps ahead",
    "far": "pose, 6 to 10 steps ahead",
}
PRIMARY = "pose"
POINTS = ("100", "200", "300")
SMALLEST, SEEDS = 0.02, 8
"""Smallest effect of interest; seeds that a verdict needs."""
Pairs = tuple[tuple[str, str], ...]
FAMILIES: dict[str, Pairs] = {
    "DRP as published": (("drp", "scratch"), ("drp", "global flow"), ("drp", "ipv"), ("drp", "apv"), ("drp", "prelar")),
    "changed DRP": (("recompose", "recompose, scratch"), ("9 tokens", "9 tokens, scratch"), ("9 tokens", "global flow")),
}
"""The registered contrasts. Holm's correction is over those of a family."""
BESIDE = (
    ("drp, own", "scratch"),
    ("drp, image", "scratch"),
    ("drp, rehearsal", "drp"),
    ("drp", "drp, image"),
    ("global flow", "global flow, scratch"),
)
"""Reported without a verdict."""
Floats = NDArray[np.float64]
Scores = Mapping[str, Mapping[tuple[int, str], float]]
"""Arm -> (seed, task) -> score."""


def read(rows: Sequence[Mapping[str, Any]], measure: str) -> Scores:
    found: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        score = float(np.mean([row["curve"][point][measure] for point in POINTS]))
        found.setdefault(str(row["arm"]), {})[int(row["seed"]), str(row["task"])] = score
    return found


def paired(scores: Scores, of: str, against: str, tasks: Sequence[str]) -> Floats:
    """Differences (seeds, tasks), on the seeds that both arms have in all tasks."""
    first, second = scores.get(of, {}), scores.get(against, {})
    seeds = sorted({seed for seed, _ in first})
    whole = [s for s in seeds if all((s, task) in arm for arm in (first, second) for task in tasks)]
    return np.array([[first[s, task] - second[s, task] for task in tasks] for s in whole]).reshape(len(whole), len(tasks))


def contrasts(
    scores: Scores, tasks: Sequence[str], families: Mapping[str, Pairs], smallest: float
) -> list[tuple[str, str, Floats, Interval, float, float, str]]:
    """Rows (of, against, differences of tasks, mean difference with interval over seeds, p, p by Holm, verdict)."""
    rows = []
    for pairs in families.values():
        found = [(of, against, table) for of, against in pairs if len(table := paired(scores, of, against, tasks)) > 1]
        tests = [sign_flip_test(table.mean(1)) for *_, table in found]
        adjusted = holm(tests) if tests else np.zeros(0)
        for (of, against, table), p, q in zip(found, tests, adjusted, strict=True):
            interval = hierarchical_bootstrap(table.mean(1)[:, None])  # the tasks are fixed: only seeds are drawn
            rows.append((of, against, table.mean(0), interval, p, float(q), verdict(interval, smallest)))
    return rows


def tasks_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(row["task"]) for row in rows))


def page(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: scores of all arms, then the contrasts of each measure. Only those of the primary measure are registered."""
    tasks, out = tasks_of(rows), []
    tables = {measure: read(rows, measure) for measure in MEASURES}
    out += ["| arm | seeds | " + " | ".join(MEASURES.values()) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for arm in dict.fromkeys(str(row["arm"]) for row in rows):
        cells, count = [], 0
        for scores in tables.values():
            known = scores[arm]
            whole = [s for s in sorted({seed for seed, _ in known}) if all((s, task) in known for task in tasks)]
            means, count = [float(np.mean([known[s, task] for task in tasks])) for s in whole], len(whole)
            spread = f" ± {np.std(means, ddof=1):.3f}" if count > 1 else ""
            cells.append(f"{np.mean(means):.3f}{spread}" if means else "–")
        out.append(f"| {arm} | {count} | " + " | ".join(cells) + " |")
    for measure, title in MEASURES.items():
        found = contrasts(tables[measure], tasks, FAMILIES, SMALLEST)
        beside = [(of, against, table) for of, against in BESIDE if len(table := paired(tables[measure], of, against, tasks)) > 1]
        if not found and not beside:
            continue
        primary = measure == PRIMARY
        out += ["", f"**{title}**" + (f"; primary, smallest effect of interest {SMALLEST}" if primary else ""), ""]
        out += [
            f"| | seeds | difference | 95 % interval | p | p, Holm | verdict | {' | '.join(tasks)} |",
            "|---" * (7 + len(tasks)) + "|",
        ]
        for of, against, each, x, p, q, said in found:
            seeds = len(paired(tables[measure], of, against, tasks))
            said = said if primary and seeds == SEEDS else ""
            cells = [f"{x.point:+.3f}", f"{x.low:+.3f} to {x.high:+.3f}", f"{p:.4f}", f"{q:.4f}", said]
            out.append(f"| {of} - {against} | {seeds} | " + " | ".join([*cells, *(f"{value:+.3f}" for value in each)]) + " |")
        for of, against, table in beside:
            x = hierarchical_bootstrap(table.mean(1)[:, None])
            cells = [f"{x.point:+.3f}", f"{x.low:+.3f} to {x.high:+.3f}", f"{sign_flip_test(table.mean(1)):.4f}", "", ""]
            out.append(
                f"| {of} - {against} | {len(table)} | "
                + " | ".join([*cells, *(f"{value:+.3f}" for value in table.mean(0))])
                + " |"
            )
    return out


def pilot(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each measure: mean over the cells (seed, task) of the development set of pre-trained less not pre-trained, in standard errors."""
    out = ["| measure | arm, less scratch | cells | mean | standard error | above 0 |", "|---|---|---|---|---|---|"]
    for measure, title in MEASURES.items():
        scores = read(rows, measure)
        for arm in ("drp, own", "drp"):
            both = sorted(scores.get(arm, {}).keys() & scores.get("scratch", {}).keys())
            if len(both) > 1:
                found = np.array([scores[arm][cell] - scores["scratch"][cell] for cell in both])
                error = found.std(ddof=1) / np.sqrt(len(found))
                out.append(f"| {title} | {arm} | {len(found)} | {found.mean():+.3f} | {error:.3f} | {(found > 0).sum()} |")
    return out


def simulated(repeats: int, seed_spread: float, smallest: float = SMALLEST) -> list[str]:
    """Shares of verdicts, and of p by Holm below .05, for a family of five contrasts of known effect, 8 seeds x 3 tasks."""
    rng, effects = np.random.default_rng(0), tuple(times * smallest for times in (4, 2, 1, 0, -1.5))
    family = {"": tuple((f"arm {number}", f"less {effect}") for number, effect in enumerate(effects))}
    counts: list[dict[str, float]] = [{} for _ in effects]
    for _ in range(repeats):
        scores: dict[str, dict[tuple[int, str], float]] = {}
        for (of, against), effect in zip(family[""], effects, strict=True):
            for arm, mean in ((of, effect), (against, 0.0)):
                scores[arm] = {(s, t): float(rng.normal(mean, seed_spread)) for s in range(8) for t in "abc"}
        for count, (*_, q, said) in zip(counts, contrasts(scores, "abc", family, smallest), strict=True):
            count[said] = count.get(said, 0) + 1 / repeats
            count["p"] = count.get("p", 0) + (q < 0.05) / repeats
    out = ["| true effect | confirmed | undecided | refuted | p (Holm) < .05 |", "|---|---|---|---|---|"]
    for effect, count in zip(effects, counts, strict=True):
        shares = [count.get(key, 0.0) for key in ("confirmed", "undecided", "refuted", "p")]
        out.append(f"| {effect:+.2f} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", nargs="?", choices=("dev", "tasks"))
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--simulate", type=float, metavar="SPREAD", help="spread of a cell over seeds, in R2")
    args = parser.parse_args()
    if args.simulate:
        print("\n".join(simulated(100, args.simulate)))
    if not (args.set or args.pilot):
        return
    file = HERE / "rows" / f"tier2-{args.set or 'dev'}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if args.pilot:
        print("\n".join(pilot(rows)))
    if args.set:
        (HERE / f"tier2-{args.set}.md").write_text("\n".join(text := page(rows)) + "\n")
        print("\n".join(text))


if __name__ == "__main__":
    main()
