"""Results by label budget: the scores of runs that differ in their number of labelled transitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from localmotion.evaluation.statistics import Summary, final_scores, summarise
from localmotion.report.results import Gathered, Group, budget, eval_curve, finished


@dataclass(frozen=True)
class Budgets:
    """A variant in one environment: its final scores at each number of labelled transitions, in ascending order."""

    env: str
    variant: str
    scores: Mapping[int, Summary]


def variant_of(group: Group) -> str:
    """The group's label without its label budget."""
    part = budget(group.runs[0])
    return group.label.replace(part, "", 1) if part else group.label


def labels_of(group: Group) -> int | None:
    """The number of labelled transitions that its runs learned from. None for runs in an environment, and if it is not known."""
    known = {run.labels for run in group.runs}
    return known.pop() if len(known) == 1 else None


def score_of(group: Group) -> str:
    """The key of its evaluations: success_rate if it was measured, else return_mean."""
    lines = (line for run in group.runs for line in run.lines.get("eval", ()))
    return "success_rate" if any("success_rate" in line for line in lines) else "return_mean"


def by_budget(report: Gathered, groups: Sequence[Group]) -> list[Budgets]:
    """The finished runs of variants that were given a number of labels. A variant with all labels has the number of all transitions."""
    groups = finished(groups)
    chosen = {(group.env, variant_of(group)) for group in groups if any(run.setting("labels", 0) for run in group.runs)}
    found: dict[tuple[str, str], dict[int, Summary]] = {}
    for group in groups:
        place, labels = (group.env, variant_of(group)), labels_of(group)
        curves = [curve for run in group.runs if (curve := eval_curve(report, run, score_of(group))) is not None]
        if place in chosen and labels and curves:
            found.setdefault(place, {})[labels] = summarise(final_scores(curves))
    return [Budgets(env, variant, dict(sorted(scores.items()))) for (env, variant), scores in found.items()]
