"""The table of a study, as text for people and as curves for other programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from localmotion.evaluation.contrasts import Contrasts
from localmotion.evaluation.statistics import final_scores, summarise
from localmotion.report.budgets import by_budget, labels_of, score_of, variant_of
from localmotion.report.comparisons import Reference, contrast_table, reference_scale
from localmotion.report.results import Gathered, eval_curve, finished, floor_of, not_counted
from localmotion.report.style import score
from localmotion.runs.read import read_run


def write_table(
    run_dirs: Sequence[Path],
    out: Path,
    reference: Reference | None = None,
    contrasts: Contrasts | None = None,
    missing: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> list[str]:
    """Write ``out/table.md`` and ``out/curves.json`` of online runs and return the table's lines.

    One row per variant and task: seeds, env steps of the last evaluations, mean and population standard deviation of each seed's last
    evaluation, IQM with its 95 % bootstrap interval over seeds. With a ``reference`` (`comparisons.Reference`) the last column is the
    mean as a share of it. Variants with label budgets have a second table: mean and standard deviation at each number of labelled
    transitions. ``contrasts`` have a table of differences over paired seeds (`comparisons.contrast_table`).
    Only finished runs count. Last lines name the others, as `results.not_counted` does: unfinished runs of ``run_dirs``, ``missing`` and
    ``left_out``.

    curves.json is a list of {task, method, seed, state, score, labels, variant, xs (env steps, or updates of runs on logged episodes), ys},
    also of unfinished runs. ``state`` is "finished" for a run that counts in the table. ``labels`` is the number of labelled transitions or
    null, ``variant`` the method's label without it.
    """
    data = Gathered([read_run(path) for path in run_dirs])
    rows = [
        "| task | variant | seeds | env steps | score | mean | std | IQM | 95 % interval |"
        + " share of reference |" * bool(reference),
        "|---|---|---|---|---|---|---|---|---|" + "---|" * bool(reference),
    ]
    curves: list[dict[str, object]] = []
    means: dict[tuple[str, str], tuple[str, float]] = {}  # task and label -> score and its mean
    cells_of: list[tuple[str, str, list[str]]] = []
    for group in data.groups:
        key = score_of(group)
        percent = key == "success_rate"
        drawn = [(run, curve) for run in group.runs if (curve := eval_curve(data, run, key)) is not None]
        about = {"score": key, "labels": labels_of(group), "variant": variant_of(group)}
        for run, curve in drawn:
            points = {"xs": curve.env_steps.astype(int).tolist(), "ys": curve.values.tolist()}
            curves.append({"task": group.env, "method": group.label, "seed": run.seed, "state": run.state, **about, **points})
        found = [(run, curve) for run, curve in drawn if run.finished]
        if not found:
            continue
        final = summarise(final_scores([curve for _, curve in found]))
        ends = sorted({int(curve.env_steps[-1]) for _, curve in found})
        ci = final.interval
        cells = [
            group.env,
            group.label,
            str(len(found)),
            f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,} to {ends[-1]:,}",
            key,
            score(final.mean, percent=percent),
            score(final.mean, final.std, percent=percent).split(" ± ")[1] if ci else "-",
            score(final.iqm, percent=percent),
            f"{score(ci.low, percent=percent)} to {score(ci.high, percent=percent)}" if ci else "-",
        ]
        if group.runs[0].offline:
            cells[3] += " updates"
        task = group.runs[0].env
        means[task, group.label] = key, final.mean
        cells_of.append((task, group.label, cells))
    for task, label, cells in cells_of:
        rows.append("| " + " | ".join(cells + ([_share(means, task, label, reference)] if reference else [])) + " |")
    floors, unknown = _random_rows(data, bool(reference))
    rows += floors
    rows += [line for text in unknown for line in ("", text)]
    rows += _label_table(data)
    if contrasts:
        table, notes = contrast_table(data, contrasts, reference)
        rows += ["", f"| {' | '.join(table.header)} |", "|" + "---|" * len(table.header)]
        rows += [f"| {' | '.join(row)} |".replace("–", "-") for row in table.rows]
        rows += [line for note in notes for line in ("", note)]
    said = [*data.missing, *not_counted(data.runs, missing, left_out)]
    rows += [line for text in dict.fromkeys(said) for line in ("", text)]
    _replace(out / "table.md", "\n".join(rows) + "\n")
    _replace(out / "curves.json", json.dumps(curves, indent=1) + "\n")
    return rows


def _random_rows(data: Gathered, reference: bool) -> tuple[list[str], list[str]]:
    """A row of the random policy for each task and score of its variants, and sentences about rows that are left out."""
    rows, unknown = [], []
    ended = finished(data.groups)
    for env in dict.fromkeys(group.env for group in ended):
        groups = [group for group in ended if group.env == env]
        runs = [run for group in groups for run in group.runs]
        for key in dict.fromkeys(map(score_of, groups)):
            floor = floor_of(runs, key)
            if floor is None:
                if key == "success_rate" and floor_of(runs, "return_mean"):
                    unknown.append(f"No row of the random policy in {env}: its success was not recorded.")
                continue
            name = "random policy" if floor.episodes is None else f"random policy, {floor.episodes} episodes"
            shown = score(floor.score, percent=key == "success_rate")
            rows.append(f"| {env} | {name} | - | - | {key} | {shown} | - | - | - |" + " - |" * reference)
    return rows, unknown


def _share(means: Mapping[tuple[str, str], tuple[str, float]], task: str, label: str, reference: Reference) -> str:
    """The mean of a variant as a share of the reference, "-" without one for this task and score."""
    key, mean = means[task, label]
    same = {other: value for (env, other), (theirs, value) in means.items() if (env, theirs) == (task, key)}
    scale = reference_scale(reference, task, key, same)
    return f"{scale(mean):.3f}" if scale else "-"


def _label_table(data: Gathered) -> list[str]:
    """Lines of the table of scores by number of labelled transitions, [] if no run was given a number."""
    found = by_budget(data, data.groups)
    if not found:
        return []
    keys = {(group.env, variant_of(group)): score_of(group) for group in finished(data.groups)}
    budgets = sorted({labels for row in found for labels in row.scores})
    rows = ["", f"| task | variant | score |{''.join(f' {labels:,} labels |' for labels in budgets)}"]
    rows.append("|---|---|---|" + "---|" * len(budgets))
    for row in found:
        key = keys[row.env, row.variant]
        cells = [row.env, row.variant, key]
        for labels in budgets:
            final = row.scores.get(labels)
            spread = final.std if final and len(final.scores) > 1 else None
            cells.append(score(final.mean, spread, percent=key == "success_rate") if final else "-")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
