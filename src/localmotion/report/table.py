"""The table of a study, as text for people and as curves for other programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from localmotion.evaluation.statistics import final_scores, summarise
from localmotion.report.results import Gathered, eval_curve, random_score
from localmotion.report.style import score
from localmotion.runs.read import read_run


def write_table(run_dirs: Sequence[Path], out: Path) -> list[str]:
    """Write ``out/table.md`` and ``out/curves.json`` of online runs and return the table's lines.

    One row per variant and task: seeds, env steps of the last evaluations, mean and population standard deviation of each seed's last
    evaluation, IQM with its 95 % bootstrap interval over seeds. curves.json is a list of {task, method, seed, score, xs (env steps), ys}.
    """
    data = Gathered([read_run(path) for path in run_dirs])
    rows = [
        "| task | variant | seeds | env steps | score | mean | std | IQM | 95 % interval |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    curves: list[dict[str, object]] = []
    for group in data.groups:
        key = (
            "success_rate"
            if any("success_rate" in line for run in group.runs for line in run.lines.get("eval", ()))
            else "return_mean"
        )
        percent = key == "success_rate"
        found = [(run, curve) for run in group.runs if (curve := eval_curve(data, run, key)) is not None]
        if not found:
            continue
        for run, curve in found:
            points = {"xs": curve.env_steps.astype(int).tolist(), "ys": curve.values.tolist()}
            curves.append({"task": group.env, "method": group.label, "seed": run.seed, "score": key, **points})
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
        rows.append("| " + " | ".join(cells) + " |")
    for env in dict.fromkeys(group.env for group in data.groups):
        floor = random_score([run for group in data.groups if group.env == env for run in group.runs], "return_mean")
        if floor is not None:
            rows.append(f"| {env} | random policy | - | - | return_mean | {score(floor)} | - | - | - |")
    _replace(out / "table.md", "\n".join(rows) + "\n")
    _replace(out / "curves.json", json.dumps(curves, indent=1) + "\n")
    return rows


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
