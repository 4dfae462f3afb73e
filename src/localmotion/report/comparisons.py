"""Variants compared over tasks: a study's contrasts over paired seeds, and profiles, IQM and improvement on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from localmotion.evaluation.contrasts import (
    Contrast,
    Contrasts,
    hierarchical_bootstrap,
    holm,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sign_flip_test,
    verdict,
)
from localmotion.evaluation.statistics import Curve, Interval, bootstrap_interval, final_scores, iqm
from localmotion.report import plots
from localmotion.report.budgets import score_of
from localmotion.report.memory import recall
from localmotion.report.page import Block, Fold, Notice, Picture, Table
from localmotion.report.results import Gathered, Group, eval_curve, finished, random_score
from localmotion.report.style import score
from localmotion.runs.read import RunData

Reference = str | float | Mapping[str, float | tuple[float, float]]
"""What counts as 1: a variant's mean, a return, or for each task a return or a pair of returns, what counts as 0 and as 1."""
FEW = 5
"""With fewer seeds than this, an interval is not reliable and there is no verdict."""


@dataclass(frozen=True)
class Scale:
    """The scores of a task that count as 0 and as 1."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def reference_scale(reference: Reference, task: str, key: str, means: Mapping[str, float]) -> Scale | None:
    """The reference's scale for a task and score. None: it has none. ``means``: each variant's mean of this score in the task.

    Returns as references hold for returns only. A variant holds for every score.
    """
    if isinstance(reference, str):
        ends = (0.0, means.get(reference, 0.0))
    elif key != "return_mean":
        return None
    else:
        given = reference.get(task, 0.0) if isinstance(reference, Mapping) else reference
        ends = (0.0, given) if isinstance(given, (int, float)) else given
    return Scale(*ends) if ends[1] > ends[0] else None


def _key(groups: Sequence[Group]) -> str:
    return "success_rate" if all(score_of(group) == "success_rate" for group in groups) else "return_mean"


def _curves(report: Gathered, group: Group, key: str) -> list[tuple[RunData, Curve]]:
    return [(run, curve) for run in group.runs if (curve := eval_curve(report, run, key)) is not None]


def _means(report: Gathered, groups: Sequence[Group], key: str) -> dict[str, float]:
    """Mean over seeds of each variant's last evaluations, by label."""
    found = {group.label: [curve for _, curve in _curves(report, group, key)] for group in groups}
    return {label: float(final_scores(curves).mean()) for label, curves in found.items() if curves}


# --- contrasts of a study ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Paired:
    """Scores of both variants, (S, M) each: paired seeds x tasks, on the scale that ``unit`` names."""

    of: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    against: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    unit: str


def contrast_table(report: Gathered, contrasts: Contrasts, reference: Reference | None = None) -> tuple[Table, list[str]]:
    """A row for each contrast, and sentences on what the numbers mean and on what is missing.

    A score is a run's last evaluation, on the reference's scale if there is one. Only finished runs count. A row has the mean over
    paired seeds of the difference of scores, averaged over tasks; its 95 % hierarchical bootstrap interval; the p value of the paired
    sign-flip test on the seeds' means, as it is and by Holm over all contrasts; the probability that a run of the first variant is better;
    and the verdict if there is a smallest effect of interest and there are at least five seeds. A contrast without any pair counts
    in Holm's family with p = 1.
    """
    notes: list[str] = []
    found = [_paired(report, contrast, reference, notes) for contrast in contrasts.pairs]
    differences = [pair.of - pair.against for pair in found]  # (S, M) each
    p_values = [sign_flip_test(d.mean(1)) if len(d) else 1.0 for d in differences]
    rows = []
    for contrast, pair, d, p, adjusted in zip(contrasts.pairs, found, differences, p_values, holm(p_values), strict=True):
        cells = ["–"] * 6
        seeds = f"{len(d)} of {len(contrast.seeds)}"
        if len(d):
            interval = hierarchical_bootstrap(d)
            better = probability_of_improvement(list(pair.of.T), list(pair.against.T))
            cells[0] = _signed(interval.point, interval)
            cells[4] = f"{better.point:.2f}"
            if len(d) > 1:
                cells[1] = f"{_signed(interval.low, interval)} to {_signed(interval.high, interval)}"
                cells[2:4] = f"{p:.4f}", f"{adjusted:.4f}"
                cells[4] += f" ({better.low:.2f} to {better.high:.2f})"
            if contrasts.smallest is not None and len(d) >= FEW:
                cells[5] = verdict(interval, contrasts.smallest)
        rows.append([f"{contrast.of} against {contrast.against}", str(len(contrast.tasks)), seeds, *cells])
    header = ["contrast", "tasks", "seeds", "difference", "95 % interval", "p", "p, Holm", "P(better)", "verdict"]
    cut = len(header) - (contrasts.smallest is None)
    table = Table(header[:cut], [row[:cut] for row in rows])
    return table, [*_explained(contrasts, found), *notes]


def _explained(contrasts: Contrasts, found: Sequence[_Paired]) -> list[str]:
    units = " or ".join(dict.fromkeys(pair.unit for pair in found if len(pair.of)))
    text = [
        f"Difference: mean over paired seeds, each the mean over tasks, of the last evaluations{f' ({units})' * bool(units)}."
        f" Interval: hierarchical bootstrap over seeds and tasks. p: paired sign-flip test, two-sided; Holm over {len(found)}"
        f" contrast{'s' * (len(found) > 1)}. P(better): probability that a run of the first variant beats one of the second."
    ]
    fewest = min((len(pair.of) for pair in found if len(pair.of)), default=FEW + 1)
    if fewest < FEW:
        none = ", and there is no verdict" * (contrasts.smallest is not None)
        text.append(f"With fewer than five seeds the intervals are not reliable{none}.")
    if fewest <= FEW:
        text.append(f"p cannot be below {2.0 ** (1 - fewest):g} with {fewest} paired seed{'s' * (fewest > 1)}.")
    if contrasts.smallest is not None:
        text.append(f"Confirmed: the whole interval is above {contrasts.smallest:g}; refuted: below it; undecided: neither.")
    if any(pair.unit == "return" and pair.of.shape[1] > 1 for pair in found):
        text.append("Returns are averaged over tasks as they are. Give a reference for each task to compare them on one scale.")
    return text


def _paired(report: Gathered, contrast: Contrast, reference: Reference | None, notes: list[str]) -> _Paired:
    """The scores of the seeds that have a finished run of both variants in every task of the contrast."""
    name = f"{contrast.of} against {contrast.against}"
    groups = {(g.runs[0].env, g.label): g for g in finished(report.groups)}
    sides: tuple[list[dict[int | None, float]], ...] = ([], [])  # of, against: for each task the score of each seed
    units = []
    for task in contrast.tasks:
        both = [groups[task, label] for label in (contrast.of, contrast.against) if (task, label) in groups]
        key = _key(both)
        unit, scale = ("success rate" if key == "success_rate" else "return"), Scale(0, 1)
        if reference is not None:
            means = _means(report, [g for (env, _), g in groups.items() if env == task], key)
            if (known := reference_scale(reference, task, key, means)) is not None:
                unit, scale = "share of the reference", known
        units.append(unit)
        for side, label in zip(sides, (contrast.of, contrast.against), strict=True):
            curves = _curves(report, groups[task, label], key) if (task, label) in groups else []
            side.append({run.seed: scale(float(curve.values[-1])) for run, curve in curves})
    paired = [seed for seed in contrast.seeds if all(seed in scores for side in sides for scores in side)]
    if len(units := list(dict.fromkeys(units))) > 1 and paired:
        notes.append(
            f"{name}: no common scale, because tasks are measured by {' and by '.join(units)}. Give a reference for each task."
        )
        paired = []
    elif missing := len(contrast.seeds) - len(paired):
        notes.append(f"{name}: {missing} of {len(contrast.seeds)} seeds are left out, because they lack a finished run.")
    of, against = (
        np.array([[scores[seed] for scores in side] for seed in paired]).reshape(-1, len(contrast.tasks)) for side in sides
    )
    return _Paired(of, against, units[0])


def _signed(value: float, interval: Interval) -> str:
    """A difference with its sign, with digits that depend on the largest number of its interval."""
    size = max(abs(interval.point), abs(interval.low), abs(interval.high))
    return f"{value:+.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


# --- the page ---------------------------------------------------------------------------------------------------------


def comparisons(report: Gathered, groups: Sequence[Group], reference: Reference | None = None) -> list[Block]:
    """Profiles, IQM over tasks and improvement of each pair: for each suite where two variants ran on the same tasks.

    A comparison needs variants that all have the same tasks. Of such sets, the one with the most variants x tasks is taken. A
    variant needs at least two runs in all. Returns are on the reference's scale, or else 0 is the random policy's score and 1 the
    best of these variants' means. Success rates stay.
    Runs on logged episodes are a suite of their own. Only finished runs count.
    """
    suites: dict[str, dict[str, list[Group]]] = {}
    for group in finished(groups):
        suite = group.env.partition(":")[0] + ", from logged episodes" * (group.unit == "updates")
        suites.setdefault(suite, {}).setdefault(group.env, []).append(group)
    return [block for suite, tasks in suites.items() for block in _suite(report, suite, tasks, reference)]


def _suite(report: Gathered, suite: str, tasks: Mapping[str, Sequence[Group]], reference: Reference | None) -> list[Block]:
    means = {env: _means(report, here, _key(here)) for env, here in tasks.items()}
    ran = {label: [env for env in tasks if label in means[env]] for known in means.values() for label in known}
    choices = [(envs, [label for label in ran if set(envs) <= set(ran[label])]) for envs in ran.values()]
    shared, labels = max(choices, key=lambda choice: len(choice[0]) * len(choice[1]), default=([], []))
    if len(labels) < 2:
        return []
    scores: dict[str, list[list[float]]] = {}  # scaled, for each variant those of each task
    scales: list[list[str]] = []  # rows of a table: a task, and what counts as 0 and as 1
    apart = False  # whether runs of a task ended at different places
    for env in shared:
        key = _key(tasks[env])
        here = [group for group in tasks[env] if group.label in labels]
        known = _scale(report, here, key, means[env], reference)
        if known is None:
            report.missing.append(f"{env} is not in the comparison: no variant is better than the random policy.")
            continue
        scale, *words = known
        scales.append([here[0].runs[0].env.partition(":")[2], *words])
        curves = {group.label: [curve for _, curve in _curves(report, group, key)] for group in here}
        for label, found in curves.items():
            scores.setdefault(label, []).append([scale(value) for value in final_scores(found)])
        apart |= len({curve.env_steps[-1] for found in curves.values() for curve in found}) > 1
    kept = {label: found for label, found in scores.items() if sum(map(len, found)) > 1}
    if len(kept) < 2:
        return []
    kept = dict(sorted(kept.items(), key=lambda item: -float(iqm(np.concatenate(item[1])))))
    place = f"{len(scales)} task{'s' * (len(scales) > 1)} of {suite}"
    report.missing += [
        f"{label} is not in the comparison over {place}: it has too few runs there." for label in ran if label not in kept
    ]
    blocks: list[Block] = []
    if min(len(values) for found in kept.values() for values in found) < FEW:
        blocks.append(
            Notice(f"{place}: with fewer than five seeds in a task the intervals are not reliable, and with one there are none.")
        )
    every = np.concatenate([values for found in kept.values() for values in found])
    low, high = min(0.0, every.min()), max(1.0, every.max())
    profiles = {
        label: recall(performance_profile, found, np.linspace(low, high + 0.02 * (high - low), 256))
        for label, found in kept.items()
    }
    chart = plots.profile_curves(profiles, title=f"Performance profiles, {place}", xlabel="score, on a common scale of the tasks")
    caption = (
        "Share of runs with a score above the value on the axis, averaged over tasks; higher is better. Shade: 95 % bootstrap"
        " interval over seeds, within tasks. Scores are those of last evaluations, with 0 and 1 as in the table of tasks below."
    )
    if apart:
        caption += " Runs that ended at different places are compared at their own last evaluation."
    blocks.append(Picture(chart, caption, f"Performance profiles, {place}"))
    blocks += [_aggregates(kept), _improvements(kept)]
    blocks.append(Table(["task", "counts as 0", "counts as 1"], scales, f"The common scale of {place}."))
    return blocks


def _scale(
    report: Gathered, here: Sequence[Group], key: str, means: Mapping[str, float], reference: Reference | None
) -> tuple[Scale, str, str] | None:
    """A task's scale, and its ends in words. None: no variant is better than the random policy."""
    percent = key == "success_rate"
    if reference is not None and (known := reference_scale(reference, here[0].runs[0].env, key, means)):
        name = f"mean of {reference}" if isinstance(reference, str) else "reference"
        return known, score(known.low, percent=percent), f"{score(known.high, percent=percent)}, {name}"
    if percent:
        return Scale(0, 1), "0 %", "100 %"
    floor = random_score([run for group in here for run in group.runs], key)
    best = max((group.label for group in here), key=lambda label: means[label])
    low = 0.0 if floor is None else floor
    if means[best] <= low:
        return None
    words = "0, because the random policy was not measured" if floor is None else f"{score(low)}, random policy"
    return Scale(low, means[best]), words, f"{score(means[best])}, mean of {best}"


def _aggregates(kept: Mapping[str, Sequence[Sequence[float]]]) -> Table:
    rows = []
    for label, found in kept.items():
        counts = sorted({len(values) for values in found})
        cells = [label, str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"]
        cells.append(f"{np.mean([np.mean(values) for values in found]):.3f}")
        for statistic in (iqm, optimality_gap):
            known = recall(bootstrap_interval, found, statistic)
            cells += [f"{known.point:.3f}", f"[{known.low:.3f}, {known.high:.3f}]" if counts[0] > 1 else "–"]
        rows.append(cells)
    header = ["", "seeds", "mean", "IQM", "95 % interval", "gap to 1", "95 % interval"]
    caption = (
        "Over all runs and tasks, on the same scale. IQM: mean of the middle half; gap to 1: by how much scores miss 1 on average"
        " (scores above 1 count as 1), lower is better. Intervals: bootstrap over seeds, within tasks."
    )
    return Table(header, rows, caption)


def _improvements(kept: Mapping[str, Sequence[Sequence[float]]]) -> Block:
    """Probability of improvement of each pair, the variant with the higher IQM first; folded if there are many."""
    labels, rows = list(kept), []
    for i, first in enumerate(labels):
        for second in labels[i + 1 :]:
            found = probability_of_improvement(kept[first], kept[second])
            several = min(len(values) for label in (first, second) for values in kept[label]) > 1
            interval = f"[{found.low:.2f}, {found.high:.2f}]" if several else "–"
            rows.append([first, second, f"{found.point:.2f}", interval])
    caption = "Probability that a run of X scores higher than a run of Y in the same task; a tie counts half; 0.5: no difference."
    table = Table(["X", "Y", "P(X > Y)", "95 % interval"], rows, caption)
    return table if len(rows) <= 10 else Fold("Probability of improvement", [table], f"{len(rows)} pairs")
