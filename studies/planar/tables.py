"""Every table and figure of this study from its committed rows, in seconds.

    python studies/planar/tables.py            # writes tier*.md, contrasts.png, returns.png, and the tables of both README.md
    python studies/planar/tables.py --check    # only say which are not what the rows give

A table stands in a page between `<!-- tables.py: NAME -->` and `<!-- end -->`; `BLOCKS` has the names. Tables hold what has all eight
seeds, and tier*.md everything. Verdicts are those of the registered scripts analysis.py, tier2_analysis.py, tier3_analysis.py, tier4.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import analysis
import candidates
import crossed
import numpy as np
import second_round
import tier2
import tier2_analysis
import tier3
import tier3_analysis
import tier4
import tier4_rivals
from matplotlib.figure import Figure
from shared import rows_of
from tier2_analysis import Pairs

from localmotion.evaluation.contrasts import Interval, verdict
from localmotion.report.style import GRID, INK, MUTED, PALETTE, styled

HERE = Path(__file__).parent
PROSE = (HERE / "README.md", HERE.parents[1] / "README.md")
SEEDS = 8
STUDENT = 2.3646
"""0.975 quantile of Student's t with seven degrees of freedom."""
BLOCK = re.compile(r"(<!-- tables\.py: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEADS = {"links": "linear probe", "links_pose": "network with the pose", "actions": "actions"}
DEVELOPED = {
    "scratch": "DRP, untrained",
    "drp": "DRP",
    "drp, own bodies": "on the tested bodies' own videos",
    "drp, shuffled": "on videos with the motion of other clips",
    "drp, frames": "on frames in random order",
    "drp, pixels": "on flow with its pixels in random places",
    "recompose": "DRP with `recompose_weight` 1",
    "recompose, own bodies": "the same, own videos",
    "recompose, shuffled": "the same, motion of other clips",
    "recompose, frames": "the same, frames in random order",
    "recompose, pixels": "the same, pixels in random places",
    "recompose, 9 tokens": "the same with nine placed [MAT] tokens, 288 numbers",
    "recompose, 9 in 32": "the same, projected to 32 numbers, the width of the others",
    "global flow": "Global Flow",
    "lapo": "LAPO, continuous (from pictures)",
    "laom": "LAOM (from pictures)",
    "prelar": "PreLAR (from pictures)",
    "diswm": "DisWM (from pictures)",
    "apv": "APV (from pictures)",
    "ipv": "IPV (from pictures)",
    "exact flow": "exact flow, 8 x 8 grid",
}
"""Arms of tier 0, and what they are pre-trained on."""
SHOWN = {
    "drp": "DRP",
    "recompose": "DRP + recompose",
    "recompose, 9 tokens": "DRP + recompose, nine tokens",
    "recompose, 9 in 32": "DRP + recompose, nine in 32",
    "9 tokens": "DRP + recompose, nine tokens",
    "scratch": "not pre-trained",
    "recompose, scratch": "the same, not pre-trained",
    "9 tokens, scratch": "the same, not pre-trained",
    "global flow": "Global Flow",
    "global flow, scratch": "the same, not pre-trained",
    "ipv": "IPV",
    "apv": "APV",
    "prelar": "PreLAR",
    "drp, image": "DRP's image model alone",
    "drp, own": "DRP, the body's own videos",
    "drp, no context": "DRP without the context frame",
    "drp, no context, scratch": "the same, not pre-trained",
    "drp, no context, image": "its image model alone",
    "global flow, no context": "Global Flow without it",
    "bc": "no code, the labelled steps alone",
    "drp, 16 points": "DRP with sixteen points",
    "recompose, 16 points": "DRP + recompose, sixteen points",
}
"""Arms of all tiers in the figure and in the project's README."""
COLOURS = {"confirmed": PALETTE[0], "refuted": PALETTE[1], "undecided": MUTED, "": MUTED}


class Found(NamedTuple):
    """A contrast whose eight seeds are there. ``said`` is empty where no verdict was registered."""

    of: str
    against: str
    interval: Interval
    p: float
    said: str
    each: tuple[float, ...] = ()
    """By task, in tier 2."""
    student: tuple[float, float] = (0.0, 0.0)
    """Student's interval over the seeds, in tier 2."""

    def cell(self) -> str:
        x = self.interval
        return f"{x.point:+.3f} ({x.low:+.3f} to {x.high:+.3f})" + (f" **{self.said}**" if self.said else "")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


# -- tier 1 -------------------------------------------------------------------------------------------------------------


def by_seed(scores: analysis.Scores, arm: str) -> list[float]:
    """Means over bodies, of the seeds that have all of them."""
    known = scores.get(arm, {})
    return [float(np.mean([value for (s, _), value in known.items() if s == seed])) for seed in analysis.whole(known)]


def tier1_scores(name: str, arms: Mapping[str, str], seeds: int) -> list[str]:
    tables = [analysis.read(analysis.load(name), metric) for metric in HEADS]
    rows = []
    for arm, shown in arms.items():
        found = [by_seed(scores, arm) for scores in tables]
        if (count := max(map(len, found))) >= seeds:
            rows.append([shown, f"{count}", *(spread(values) if values else "" for values in found)])
    return markdown(["arm", "seeds", *HEADS.values()], rows)


def tier1_contrasts(metric: str) -> dict[tuple[str, str], Found]:
    scores = analysis.read(analysis.load("sealed"), metric)
    return {
        (of, against): Found(of, against, x, q, said)
        for of in analysis.OF
        for against, seeds, x, _, q, said in analysis.contrasts(scores, of, analysis.SMALLEST[metric])
        if seeds == SEEDS
    }


def tier1_table(arms: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """A row for each contrast, a column for each measure."""
    found = {metric: tier1_contrasts(metric) for metric in metrics}
    pairs = [(of, against) for of in arms for against in analysis.AGAINST if (of, against) in found[metrics[0]]]
    rows = [[of, against, *(found[metric][of, against].cell() for metric in metrics)] for of, against in pairs]
    return markdown(["", "against", *(HEADS[metric] for metric in metrics)], rows)


def tier1_short() -> list[str]:
    """Differences and verdicts alone: a row for each arm that DRP is compared with, two columns for each form of DRP."""
    measures, arms = ("links", "links_pose"), analysis.OF[:3]
    found = {metric: tier1_contrasts(metric) for metric in measures}
    rows = []
    for against in analysis.AGAINST:
        cells = [found[metric][arm, against] for arm in arms for metric in measures]
        rows.append([SHOWN[against], *(f"{x.interval.point:+.3f} {x.said}" for x in cells)])
    return markdown(["against", *(f"{SHOWN[arm]}, {HEADS[metric]}" for arm in arms for metric in measures)], rows)


def kept() -> list[str]:
    return analysis.gaps(analysis.load("sealed"), analysis.load("seen"))[3:]


# -- tier 2 -------------------------------------------------------------------------------------------------------------


def over_tasks(names: Sequence[str], families: Mapping[str, Pairs], beside: Pairs = ()) -> Iterator[Found]:
    """Contrasts of tier 2's primary measure that have all seeds. Those of ``beside`` come last and have no verdict."""
    tasks = tier2.SETS["tasks"]
    scores = tier2_analysis.read([row for name in names for row in rows_of(f"{name}-tasks")], tier2_analysis.PRIMARY)
    asked = {pair for pairs in families.values() for pair in pairs}
    lists = {**families, "beside": beside}
    for of, against, each, x, p, q, said in tier2_analysis.contrasts(scores, tasks, lists, tier2_analysis.SMALLEST):
        means = tier2_analysis.paired(scores, of, against, tasks).mean(1)
        if len(means) == SEEDS:
            registered = (of, against) in asked
            half = STUDENT * float(means.std(ddof=1)) / SEEDS**0.5
            student = (float(means.mean()) - half, float(means.mean()) + half)
            yield Found(of, against, x, q if registered else p, said if registered else "", tuple(each), student)


def tier2_found() -> Iterator[Found]:
    return over_tasks(["tier2"], tier2_analysis.FAMILIES, tier2_analysis.BESIDE)


def second_found() -> Iterator[Found]:
    return over_tasks(["tier2", "second"], second_round.FAMILIES)


def task_contrasts(contrasts: Iterator[Found]) -> list[str]:
    """All of each contrast, with Student's interval and each task."""
    rows = []
    for x in contrasts:
        cells = [f"{x.of} - {x.against}", f"{x.interval.point:+.3f}", f"{x.interval.low:+.3f} to {x.interval.high:+.3f}"]
        cells += [f"{x.student[0]:+.3f} to {x.student[1]:+.3f}", f"{x.p:.4f}"]
        rows.append([*cells, f"**{x.said}**" if x.said else "none asked", *(f"{value:+.3f}" for value in x.each)])
    heads = ["", "difference", "95 % interval", "Student's interval", "p", "verdict", *tier2.SETS["tasks"]]
    return markdown(heads, rows)


def tier2_short() -> list[str]:
    """Contrasts with a verdict, of tier 2 and of the second round, under their long names."""
    found = [x for x in (*tier2_found(), *second_found()) if x.said]
    return markdown(["", "difference"], [[f"{SHOWN[x.of]} - {SHOWN[x.against]}", x.cell()] for x in found])


def task_scores(name: str, arms: Sequence[str]) -> list[str]:
    """All measures of tier 2: means over the tasks, of arms with all seeds."""
    tasks, found = tier2.SETS["tasks"], rows_of(f"{name}-tasks")
    tables, rows = [tier2_analysis.read(found, measure) for measure in tier2_analysis.MEASURES], []
    for arm in arms:
        seeds = [s for s in range(SEEDS) if all((s, task) in tables[0].get(arm, {}) for task in tasks)]
        if len(seeds) == SEEDS:
            means = [[float(np.mean([scores[arm][s, task] for task in tasks])) for s in seeds] for scores in tables]
            rows.append([arm, *map(spread, means)])
    return markdown(["arm", *tier2_analysis.MEASURES.values()], rows)


def tier2_page(kind: str) -> list[str]:
    return tier2_analysis.page(rows_of(f"tier2-{kind}"))


# -- tier 3 -------------------------------------------------------------------------------------------------------------


def tier3_found() -> Iterator[Found]:
    """Contrasts of the primary measure that have all seeds, those without a verdict last."""
    tasks = tier3.SETS["tasks"]
    scores = tier3_analysis.read(rows_of("tier3-tasks"), tier3_analysis.PRIMARY)
    for pairs in (*tier3_analysis.FAMILIES.values(), tier3_analysis.BESIDE):
        asked = pairs is not tier3_analysis.BESIDE
        for of, against, both, x, p, q in tier3_analysis.contrasts(scores, tasks, pairs):
            if len(both) == SEEDS:
                said = verdict(x, tier3_analysis.SMALLEST["actions"]) if asked else ""
                yield Found(of, against, x, q if asked else p, said, tuple(both.mean(0)))


def tier3_contrasts() -> list[str]:
    rows = []
    for x in tier3_found():
        cells = [
            f"{x.of} - {x.against}",
            f"{x.interval.point:+.3f}",
            f"{x.interval.low:+.3f} to {x.interval.high:+.3f}",
            f"{x.p:.4f}",
        ]
        rows.append([*cells, f"**{x.said}**" if x.said else "none asked", *(f"{value:+.3f}" for value in x.each)])
    return markdown(["", "difference", "95 % interval", "p", "verdict", *tier3.SETS["tasks"]], rows)


def tier3_scores() -> list[str]:
    """All measures: means over the tasks, of arms with all seeds."""
    tasks, found = tier3.SETS["tasks"], rows_of("tier3-tasks")
    tables, rows = [tier3_analysis.read(found, measure) for measure in tier3_analysis.MEASURES], []
    for arm in tier3.ARMS:
        if all((s, task) in tables[0].get(arm, {}) for s in range(SEEDS) for task in tasks):
            means = [[float(np.mean([scores[arm][s, task] for task in tasks])) for s in range(SEEDS)] for scores in tables]
            rows.append([arm, *map(spread, means)])
    return markdown(["arm", *tier3_analysis.MEASURES.values()], rows)


def tier3_short() -> list[str]:
    found = [x for x in tier3_found() if x.said]
    return markdown(["", "difference"], [[f"{SHOWN[x.of]} - {SHOWN[x.against]}", x.cell()] for x in found])


# -- tier 4 -------------------------------------------------------------------------------------------------------------


def tier4_rows() -> list[dict[str, Any]]:
    """Rows of arms that have all seeds."""
    rows = rows_of("tier4-task")
    return [row for row in rows if sum(other["arm"] == row["arm"] for other in rows) == SEEDS]


def tier4_found() -> Iterator[Found]:
    """Contrasts that have all seeds."""
    scores = tier4.read(tier4_rows())
    for pairs in tier4.FAMILIES.values():
        for of, against, _, x, _, q in tier3_analysis.contrasts(scores, [tier4.TASK], pairs):
            yield Found(of, against, x, q, verdict(x, tier4.SMALLEST))


def tier4_short() -> list[str]:
    rows = []
    for found in tier4_found():
        x, pair = found.interval, f"{SHOWN[found.of]} - {SHOWN[found.against]}"
        rows.append([pair, f"{x.point:+.1f} ({x.low:+.1f} to {x.high:+.1f}) **{found.said}**"])
    return markdown(["", "difference of the mean return"], rows)


# -- pages --------------------------------------------------------------------------------------------------------------


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "tier 0": lambda: tier1_scores("dev", DEVELOPED, 1),
    "tier 1, scores": lambda: tier1_scores("sealed", {arm: arm for arm in tier1_arms()}, SEEDS),
    "tier 1, contrasts": lambda: tier1_table(analysis.OF, [*HEADS]),
    "tier 1, kept": kept,
    "tier 1, short": tier1_short,
    "tier 2, scores": lambda: task_scores("tier2", [*tier2.ARMS]),
    "tier 2, contrasts": lambda: task_contrasts(tier2_found()),
    "tier 2, short": tier2_short,
    "second round, scores": lambda: task_scores("second", second_round.REGISTERED),
    "second round, contrasts": lambda: task_contrasts(second_found()),
    "second round, pilot": second_round.pilot,
    "tier 3, scores": tier3_scores,
    "tier 3, contrasts": tier3_contrasts,
    "tier 3, short": tier3_short,
    "tier 4, scores": lambda: tier4.score_table(tier4_rows()),
    "tier 4, contrasts": lambda: tier4.contrast_table(tier4_rows(), verdicts=True),
    "tier 4, short": tier4_short,
    "candidates": lambda: candidates.table(rows_of("candidates")),
}
PAGES: dict[str, Callable[[], list[str]]] = {
    "tier1-dev.md": lambda: analysis.page(analysis.load("dev")),
    "tier1-sealed.md": lambda: analysis.page(rows := analysis.load("sealed")) + analysis.gaps(rows, analysis.load("seen")),
    "tier1-crossed.md": lambda: crossed.table("sealed"),
    "tier2-dev.md": lambda: tier2_page("dev"),
    "tier2-tasks.md": lambda: tier2_page("tasks"),
    "tier3-dev.md": lambda: tier3_analysis.page(rows_of("tier3-dev"), tier3.SETS["dev"]),
    "tier3-tasks.md": lambda: tier3_analysis.page(rows_of("tier3-tasks"), tier3.SETS["tasks"]),
    "tier4-dev.md": lambda: tier4.page("dev"),
    "tier4-task.md": lambda: tier4.page("task"),
    "tier4-rivals-task.md": lambda: tier4_rivals.page("task"),
    "second-dev.md": lambda: second_round.table("dev"),
    "second-tasks.md": lambda: second_round.table("tasks"),
}


def tier1_arms() -> list[str]:
    return list(dict.fromkeys(str(row["arm"]) for row in analysis.load("sealed")))


def made() -> dict[Path, str]:
    """What each page is by the rows. Pages of a tier without rows are not made."""
    found = {}
    for name, lines in PAGES.items():
        if (HERE / "rows" / f"{name.replace('-crossed', '-sealed').removesuffix('.md')}.jsonl").exists():
            found[HERE / name] = "\n".join(lines()) + "\n"
    for page in PROSE:
        found[page] = BLOCK.sub(lambda m: m[1] + "\n" + "\n".join(BLOCKS[m[2]]()) + "\n\n" + m[4], page.read_text())
    return found


# -- figure -------------------------------------------------------------------------------------------------------------


@styled
def forest(panels: Mapping[str, Sequence[Found]]) -> Figure:
    """Differences with their intervals: a panel for each measure, a row for each contrast."""
    heights = [len(found) + 1.6 for found in panels.values()]
    figure = Figure(figsize=(9.6, 0.26 * sum(heights)), layout="constrained")
    axes: Any = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axis, (title, found) in zip(axes[:, 0], panels.items(), strict=True):
        axis.axvspan(-analysis.SMALLEST["links"], analysis.SMALLEST["links"], color=GRID, linewidth=0)
        axis.axvline(0, color=INK, linewidth=0.8)
        for row, x in enumerate(found):
            colour = COLOURS[x.said]
            axis.plot([x.interval.low, x.interval.high], [row, row], color=colour, linewidth=2)
            axis.plot(x.interval.point, row, "o", color=colour, markerfacecolor=colour if x.said else "white", markersize=5)
            axis.annotate(
                x.said or "none asked", (1.01, row), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=8
            )
        axis.set_yticks(
            range(len(found)), [f"{SHOWN.get(x.of, x.of)}  –  {SHOWN.get(x.against, x.against)}" for x in found], fontsize=8
        )
        axis.set_ylim(len(found) - 0.4, -0.6)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="x", color=GRID, linewidth=0.6)
    axes[-1, 0].set_xlabel("difference of R² with its 95 % interval; grey band: smaller than the smallest effect of interest")
    return figure


@styled
def returns(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Evaluations of tier 4 by env steps: thick the mean over seeds, thin each seed. A panel for each form of DRP."""
    forms = {"DRP": ("drp", "scratch"), "DRP without the context frame": ("drp, no context", "drp, no context, scratch")}
    known = {str(row["arm"]) for row in rows}
    forms = {title: arms for title, arms in forms.items() if known & set(arms)}
    figure = Figure(figsize=(4.8 * len(forms), 3.4), layout="constrained")
    axes: Any = figure.subplots(1, len(forms), sharey=True, squeeze=False)
    for axis, (title, arms) in zip(axes[0], forms.items(), strict=True):
        for arm, colour, name in zip(arms, PALETTE, ("pre-trained on other bodies", "not pre-trained"), strict=False):
            found = [row["evaluations"] for row in rows if row["arm"] == arm]
            if not found:
                continue
            steps = np.array([*map(int, found[0])])
            curves = np.array([[np.mean(played) for played in one.values()] for one in found])
            axis.plot(steps, curves.T, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(steps, curves.mean(0), color=colour, linewidth=2.4, label=f"{name}, {len(found)} seeds")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("env steps in cheetah run")
        axis.grid(color=GRID, linewidth=0.6)
        axis.legend(loc="upper left", fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("return of evaluation episodes")
    return figure


def panels() -> dict[str, Sequence[Found]]:
    first = {
        f"Tier 1, velocities of links of unseen bodies, {HEADS[metric]}": [*tier1_contrasts(metric).values()]
        for metric in ("links", "links_pose")
    }
    title = "pose from the state of a world model after few updates"
    later = {
        f"Tier 2, {title}": [*tier2_found()],
        f"Second round, {title}": [*second_found()],
        "Tier 3, actions from few labels, by policies that foresee a code": [*tier3_found()],
    }
    return first | {name: found for name, found in later.items() if found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pages = made()
    stale = [page for page, text in pages.items() if not page.exists() or page.read_text() != text]
    if args.check:
        raise SystemExit("not what the rows give: " + ", ".join(page.name for page in stale) if stale else 0)
    for page, text in pages.items():
        page.write_text(text)
    forest(panels()).savefig(HERE / "contrasts.png", dpi=130)
    if rows := tier4_rows():
        returns(rows).savefig(HERE / "returns.png", dpi=130)
    print("written: " + (", ".join(page.name for page in stale) or "nothing new") + ", contrasts.png, returns.png")


if __name__ == "__main__":
    main()
