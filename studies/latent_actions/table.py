"""Tables of the rows that `toy.py` and `planar.py` wrote, markdown on the standard output, and the figure returns.png.

python studies/latent_actions/table.py

The score of a return is (return - random) / (expert - random): 0 is the mean return of random actions, 1 that of the expert without
noise. Seed 100 is not in the tables of returns: it is for development. A seed whose runs are not complete is not in them either.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from localmotion.report.style import GRID, PALETTE

HERE = Path(__file__).parent
PROBES = ("nmse", "actions", "links", "background")
LABELS = ("50", "500", "5000")
ORDER = ("masklam", "masklam, motion", "masklam, eroded", "lapo", "laom", "idm", "bc")


def rows(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(HERE.glob(pattern)) for line in file.read_text().splitlines()]


def cell(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def table(head: list[str], lines: list[list[str]]) -> None:
    print("\n".join(["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines)]))


def score(row: dict[str, Any], key: str, labels: str) -> float:
    """0: the mean return of random actions; 1: that of the expert."""
    return float((row[key][labels][0] - row["random"]) / (row["expert"] - row["random"]))


def complete(sweep: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of seeds of a task that all arms have run, so that arms are compared on the same seeds."""
    arms = defaultdict(set)
    for row in sweep:
        arms[row["task"], row["seed"]].add(row["arm"])
    return [row for row in sweep if arms[row["task"], row["seed"]] == set(ORDER)]


def found(sweep: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows by task and arm, both in a fixed order."""
    out: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in sorted({row["task"] for row in sweep}):
        arms = {arm: [row for row in sweep if (row["task"], row["arm"]) == (task, arm)] for arm in ORDER}
        out[task] = {arm: rows for arm, rows in arms.items() if rows}
    return out


def draw(by_task: dict[str, dict[str, list[dict[str, Any]]]], out: Path) -> None:
    """Explained actions and scores against the number of labels, a column for each task; bars from the lowest to the highest seed."""
    figure = Figure(figsize=(max(3.6 * len(by_task), 6.4), 6.2), layout="constrained")
    panels = figure.subplots(2, len(by_task), sharex=True, sharey="row", squeeze=False)
    rows_of = {
        "R² of the policy": lambda row, labels: row["policy"][labels],
        "score (expert = 1)": lambda row, n: score(row, "returns", n),
    }
    for (name, value), line in zip(rows_of.items(), panels, strict=True):
        line[0].set_ylabel(name)
        for panel, (task, arms) in zip(line, by_task.items(), strict=True):
            for number, arm in enumerate(ORDER):
                values = np.array([[value(row, labels) for labels in LABELS] for row in arms.get(arm, [])])
                if not len(values):
                    continue
                middle, low, high = values.mean(0), values.min(0), values.max(0)
                panel.errorbar(
                    [float(labels) * 1.07 ** (number - 3) for labels in LABELS],
                    middle,
                    [middle - low, high - middle],
                    fmt="o--" if arm in ("bc", "idm") else "o-",
                    ms=3.5,
                    lw=1.6,
                    elinewidth=0.8,
                    color=PALETTE[number % len(PALETTE)],
                    label=arm,
                )
            panel.set_xscale("log")
            panel.set_xticks([float(labels) for labels in LABELS], LABELS)
            panel.minorticks_off()
            panel.grid(color=GRID, lw=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            if name.startswith("R²"):
                panel.set_title(task.replace("_", " "), fontsize=10)
                panel.set_ylim(-0.35, 0.65)  # policies from 50 labels can be far below
            else:
                panel.set_xlabel("labelled transitions")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(out, dpi=130)


def probes_table(task: str, arms: dict[str, list[dict[str, Any]]]) -> None:
    exact = next(iter(arms.values()))[0]["exact flow"]
    lines = [["exact flow, 8 x 8 grid", "", *(f"{exact[name]:.2f}" for name in PROBES)]]
    lines += [[arm, str(len(some)), *(cell([row[name] for row in some]) for name in PROBES)] for arm, some in arms.items()]
    table([task, "seeds", *PROBES], lines)


def returns_tables() -> None:
    by_task = found(complete([row for row in rows("rows/*_*-*.jsonl") if row["seed"] != 100 and "returns" in row]))
    for task, arms in by_task.items():
        probes_table(task, {arm: some for arm, some in arms.items() if "nmse" in some[0]})
        wide = [f"{what}, {labels}" for what in ("R²", "score", "held-out") for labels in LABELS]
        lines = []
        for arm, some in arms.items():
            policy = [cell([row["policy"][labels] for row in some]) for labels in LABELS]
            scores = [cell([score(row, key, labels) for row in some]) for key in ("returns", "held-out") for labels in LABELS]
            lines.append([arm, str(len(some)), *policy, *scores])
        table([task, "seeds", *wide], lines)
    means = []
    for arm in ORDER if by_task else ():
        some = [[score(row, "returns", labels) for labels in LABELS] for arms in by_task.values() for row in arms.get(arm, [])]
        if some:
            means.append([arm, str(len(some)), *(cell([values[i] for values in some]) for i in range(len(LABELS)))])
    if means:
        table(["all bodies", "runs", *(f"score, {labels}" for labels in LABELS)], means)
        draw(by_task, HERE / "returns.png")


def starts_table() -> None:
    """How strongly policies of 5,000 labels act where an episode begins, and MaskLAM's returns with its actions multiplied."""
    whole = {(row["task"], row["seed"]) for row in complete([row for row in rows("rows/*_*-*.jsonl") if "returns" in row])}
    known = [row for row in rows("rows/starts.jsonl") if str(row["labels"]) == LABELS[-1] and (row["task"], row["seed"]) in whole]
    tasks = sorted({row["task"] for row in known})
    lines = []
    for arm in ORDER if known else ():
        some = [[row for row in known if (row["arm"], row["task"]) == (arm, task)] for task in tasks]
        spans = [[row[span] for row in each] for each in some for span in ("first", "later")]
        lines.append([arm, *(cell(values) if values else "" for values in spans)])
    if lines:
        table(["labels 5,000", *(f"{task}, steps {span}" for task in tasks for span in ("0 to 4", "20 to 39"))], lines)
    times = rows("rows/times.jsonl")
    if times:
        factors = sorted({row["times"] for row in times})
        by_seed = {
            seed: {row["times"]: row for row in times if row["seed"] == seed} for seed in sorted({r["seed"] for r in times})
        }
        lines = [
            [str(seed), *(f"{of[x]['return']:.0f} ± {of[x]['deviation']:.0f}" if x in of else "" for x in factors)]
            for seed, of in by_seed.items()
        ]
        table(["cheetah_run, masklam, seed", *(f"actions x {x:g}" for x in factors)], lines)


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
        probes_table(task, arms)
    returns_tables()
    starts_table()


if __name__ == "__main__":
    main()
