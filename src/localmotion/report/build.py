"""Collects run directories into one page: groups of runs, their numbers, and sentences about missing data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localmotion import methods
from localmotion.errors import CheckpointError
from localmotion.evaluation.contrasts import Contrasts
from localmotion.report import media, plots
from localmotion.report.able import about_open_loop, could_save
from localmotion.report.budgets import by_budget, score_of
from localmotion.report.comparisons import Reference, comparisons, contrast_table
from localmotion.report.page import (
    Block,
    Code,
    Fold,
    Notice,
    Picture,
    Section,
    Settings,
    Table,
    Text,
    Tiles,
    build_page,
)
from localmotion.report.results import Gathered, Group, averages, not_counted, origin, results
from localmotion.report.style import short
from localmotion.runs.read import Line, RunData, flatten, number, read_run

_COUNTERS = ("update", "agent_step", "env_step", "episode", "wall", "updates_per_second")


# --- pre-training and representation ----------------------------------------------------------------------------------


_PREDICTORS = {
    "motion": "with real motion",
    "prior": "from the observed frames alone",
    "prior_sample": "from the observed frames, one sample",
    "action": "with the real actions",
    "latent_action": "with the latent actions of the true frames",
    "zero_motion": "with zero motion",
    "zero_action": "with latent actions of zero",
    "swapped_action": "with the latent actions of another clip",
    "last_frame": "copy of the last frame",
}
_TRIVIAL = {"zero": "over zero flow", "frame_mean": "over the frame's mean", "nearest_time": "over the nearest time"}


def _first(run: RunData) -> str:
    """The first predictor of a run's held-out figures, "" without one."""
    return next((name for name in _PREDICTORS if f"psnr/{name}" in (run.last("heldout") or {})), "")


def _cell(line: Line | None, key: str, form: str) -> str:
    value = number(line, key)
    return "–" if value is None else format(value, form)


def _no_figures(run: RunData) -> str:
    """Why a run has no held-out figures."""
    if run.state != "finished":
        return f"{run.name} has no held-out figures yet."
    known = run.method in methods.names() and could_save(run, "traversal")
    fraction = run.setting("heldout_fraction", "not known")
    return f"{run.name} has no held-out figures{' and no latent traversal' * known}: no clip is held out (heldout_fraction={fraction})."


def _heldout(report: Gathered) -> tuple[list[Block], list[tuple[str, str]]]:
    """Held-out figures of pre-training: masked reconstruction against trivial predictors, open-loop prediction."""
    blocks: list[Block] = []
    tiles: list[tuple[str, str]] = []
    for run in report.of("pretrain"):
        line = run.last("heldout")
        if line is None:
            report.missing.append(_no_figures(run))
            continue
        if not run.finished:
            blocks.append(Notice(f"{run.name} has not finished ({run.state}). Its figures here are the newest so far."))
        name = run.name if run.finished else f"{run.name}, not finished"
        errors = {
            k.removeprefix("masked/"): v
            for k in line
            if k.startswith("masked/") and not k.startswith("masked/ratio") and (v := number(line, k)) is not None
        }
        model = errors.pop("model", None)
        ratios = {_TRIVIAL.get(k, k): model / v for k, v in errors.items() if model is not None and v > 0}
        if ratios:
            best = max(ratios.values())
            chart = plots.comparison_bars(
                ratios, title=f"Masked reconstruction on held-out clips, {run.name}", reference=1.0,
                reference_label="1: no better", target=0.6,
            )  # fmt: skip
            caption = (
                "Squared error of the model on hidden Atomic Actions, divided by that of each predictor without a model;"
                " lower is better. The longest bar is the ratio to the best of these predictors."
            )
            blocks.append(Picture(chart, caption, "Ratio of the model's error to each trivial predictor"))
            tiles.append((f"{best:.2f}", f"{name}: held-out masked error divided by that of the best trivial predictor"))
        scores = {k: v for k in _PREDICTORS if (v := number(line, f"psnr/{k}")) is not None}
        if scores and (first := next(iter(scores))) != "last_frame":
            others = [f"{_PREDICTORS[k]} {v:.1f}" for k, v in scores.items() if k != first]
            others += [text] if (text := about_open_loop(run)) else []
            tiles.append((f"{scores[first]:.1f} dB", "; ".join([f"{name}: open-loop PSNR {_PREDICTORS[first]}", *others])))
        blocks += _horizon(run, line)
        own = [k for k in line if k.startswith("figure/")]
        rows = [[k.removeprefix("figure/").replace("_", " "), _cell(line, k, ".4g")] for k in own]
        if rows:
            blocks.append(
                Table(["held-out figure", run.name], rows, "Figures of the method's own (`heldout` in its file explains them).")
            )
    return blocks, tiles


def _horizon(run: RunData, line: Line) -> list[Block]:
    blocks: list[Block] = []
    ends = {k: v for k, v in line.items() if k.endswith("_horizon") and k.startswith("psnr/") and isinstance(v, list)}
    lines = {
        _PREDICTORS.get(k[5:-8], k[5:-8].replace("_", " ")): v
        for k, v in ends.items()
        if all(number({"x": x}, "x") is not None for x in v)
    }
    if any(lines.values()):
        chart = plots.horizon_curves(lines, title=f"Open-loop prediction of held-out clips, {run.name}")
        caption = "PSNR of imagined frames over the prediction horizon; the number at the end of each line is its last frame."
        blocks.append(Picture(chart, caption, "PSNR over the prediction horizon"))
    names = [k[5:] for k in line if k.startswith("psnr/") and not k.endswith("_horizon")]
    rows = [
        [_PREDICTORS.get(n, n.replace("_", " ")), _cell(line, f"psnr/{n}", ".2f"), _cell(line, f"ssim/{n}", ".3f")] for n in names
    ]
    if rows:
        about = ["Mean over imagined frames of held-out clips.", about_open_loop(run)]
        blocks.append(Table(["open-loop prediction", "PSNR, dB", "SSIM"], rows, " ".join(filter(None, about))))
    return blocks


def _flow(report: Gathered) -> list[Block]:
    blocks: list[Block] = []
    found = report.each(report.runs, "flow_*.npz", lambda path, _: media.flow_magnitudes(path))
    named: dict[str, list[Any]] = {}
    for name, values in found:
        named.setdefault(name, []).append(values)
    if named:
        chart = plots.flow_histogram({name: np.concatenate(v) for name, v in named.items()})
        caption = "Flow magnitude over all pixels, in pixels of the model's picture; a tick marks each 99th percentile."
        caption += " If sources differ a lot, the recipes of pre-training and fine-tuning do not match."
        blocks.append(Picture(chart, caption, "Histograms of flow magnitude"))
    keys = sorted({k for run in report.runs for kind in run.lines for k in run.keys(kind) if k.startswith("flow/")})
    rows: dict[str, list[str]] = {}
    for run in report.runs:
        line = next((x for kind in ("train", "pretrain") if (x := run.last(kind)) and any(k in x for k in keys)), None)
        if line:
            rows.setdefault(report.label(run), [report.label(run), *(_cell(line, k, ".3g") for k in keys)])
    if rows:
        caption = "Quantiles of flow magnitude as last logged by the first run of each group, pixels."
        blocks.append(Table(["", *(k.removeprefix("flow/") for k in keys)], list(rows.values()), caption))
    return blocks


def _budgets(report: Gathered, env: str, groups: Sequence[Group]) -> list[Block]:
    """Final scores against label budgets, if there are several."""
    found = by_budget(report, groups)
    if len({labels for row in found for labels in row.scores}) < 2:
        return []
    percent = any(score_of(group) == "success_rate" for group in groups)
    name = "Success rate" if percent else "Episode return"
    chart = plots.budget_curves(
        {row.variant: row.scores for row in found}, title=f"{name} by labels in {env}", ylabel=name.lower(), percent=percent
    )
    caption = (
        f"{name} at each seed's last evaluation, by number of labelled transitions: mean and population deviation over seeds."
    )
    return [Picture(chart, caption, f"{name} against the number of labelled transitions in {env}")]


# --- training, speed, settings ----------------------------------------------------------------------------------------


def _losses(report: Gathered, runs: Sequence[RunData], kind: str, what: str) -> list[Block]:
    """Losses of all runs in one figure, one colour per group of seeds; other logged scalars in a second one."""

    def figure(keys: Sequence[str], caption: str, source: str = kind) -> list[Block]:
        panels = {
            key.removeprefix("loss/"): [
                (report.label(run), *run.series(source, key, x="update")) for run in runs if run.lines.get(source)
            ]
            for key in keys
        }
        for key, series in panels.items():
            if bad := sum(int((~np.isfinite(ys)).sum()) for _, _, ys in series):
                report.missing.append(f"{key} of {what} has {bad} values that are not finite (gaps in its curve).")
        panels = {key: [s for s in series if np.isfinite(s[2]).any()] for key, series in panels.items()}
        panels = {key: series for key, series in panels.items() if series}
        return [Picture(plots.loss_curves(panels), caption, caption)] if panels else []

    keys = sorted({k for run in runs for k in run.keys(kind)})
    losses = [k for k in keys if k.startswith("loss/")]
    other = [k for k in keys if k not in losses and k not in _COUNTERS and not k.startswith(("seconds/", "flow/"))]
    held = sorted({k for run in runs for k in run.keys("heldout") if "/" in k}) if kind == "pretrain" else []
    held = [
        k for k in held if k in ("masked/ratio_best", *(f"psnr/{name}" for name in _PREDICTORS if not name.startswith("zero_")))
    ]
    return [
        *figure(losses[:12], f"Losses of {what}."),
        *figure(held, "Held-out figures over training.", "heldout"),
        *figure(other[:12], f"Other measures of {what}."),
    ]


def duration(seconds: float) -> str:
    """90 -> "1.5 min"."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def seconds_per_update(run: RunData) -> dict[str, float]:
    """Mean seconds of each part per update: "train" lines have sums since the line before, "pretrain" lines have means."""
    parts: dict[str, float] = {}
    for kind in ("train", "pretrain"):
        lines = run.lines.get(kind, [])
        divide = number(run.last(kind), "update") if kind == "train" else len(lines)
        if not divide or divide < 0:
            continue
        for line in lines:
            for key in line:
                if key.startswith("seconds/") and (value := number(line, key)) is not None:
                    parts[key[8:]] = parts.get(key[8:], 0.0) + value / divide
    if (whole := parts.pop("all", None)) is not None and whole > sum(parts.values()):
        parts["other"] = whole - sum(parts.values())
    return parts


def _speed(report: Gathered) -> list[Block]:
    found: dict[str, list[dict[str, float]]] = {}
    for run in report.runs:
        if parts := seconds_per_update(run):
            found.setdefault(report.label(run), []).append(parts)
    means = {
        label: {name: sum(p.get(name, 0.0) for p in many) / len(many) for name in {n for p in many for n in p}}
        for label, many in found.items()
    }
    means = {label: parts for label, parts in means.items() if sum(parts.values()) > 0}
    if not means:
        report.missing.append("No run logged where its time goes (seconds/<part>).")
        return []
    caption = "Share of each part in the time of a run (mean over seeds); on the right, total seconds per update."
    return [Picture(plots.share_bars(means), caption, "Time by part")]


def _runs_table(runs: Sequence[RunData]) -> Table:
    rows = []
    for run in runs:
        last = run.last("train") or run.last("pretrain") or run.last("eval") or {}
        counts = [number(run.last(kind), "update") for kind in run.lines] + [number(run.status, "update")]
        update = max((count for count in counts if count is not None), default=None)
        env_step = number(run.last("eval") or last, "env_step")
        wall = run.wall_seconds()
        rows.append(
            [
                run.name,
                run.method,
                run.stage if run.stage == "pretrain" else f"{run.stage}, {origin(run)}",
                run.env or "–",
                run.preset or "–",
                "–" if run.seed is None else str(run.seed),
                run.state,
                "–" if update is None else short(update),
                "–" if env_step is None else short(env_step),
                duration(wall) if wall > 0 else "–",
            ]
        )
    header = ["run", "method", "stage", "environment", "preset", "seed", "state", "updates", "env steps", "time"]
    return Table(header, rows)


def _settings(runs: Sequence[RunData]) -> list[Block]:
    blocks: list[Block] = [Text("Each run directory describes itself; the same command with the same directory resumes it.")]
    for run in runs:
        inside: list[Block] = [Code(run.command)] if run.command else []
        inside += [
            Settings(title, values)
            for title, values in (
                ("settings", run.config),
                ("machine and versions", run.environment),
                ("status", run.status),
            )
            if values
        ]
        blocks.append(Fold(run.name, inside, f"{len(flatten(run.config))} settings"))
    return blocks


def report(
    run_dirs: Sequence[str | Path],
    out: str | Path,
    reference: Reference | None = None,
    contrasts: Contrasts | None = None,
    missing: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML page about one or more run directories and return its path.

    Online runs are grouped by environment, method, origin (pre-trained or from scratch) and preset; seeds of a group
    become one curve with its spread. Variants that ran on the same tasks are compared over them, on the scale of ``reference``
    if there is one; a study's ``contrasts`` have a table. A run that has not finished is drawn and marked, and counts in no other table,
    average or comparison. The page lists what is missing or damaged. ``missing``, ``left_out``: runs of a study that it names
    (`results.not_counted`).

    Raises CheckpointError if no directory is given, or one is not a run directory or given twice; OSError if ``out`` cannot be
    written (the old file is kept).
    """
    paths = [Path(p) for p in run_dirs]
    if not paths:
        raise CheckpointError("no run directory given; name at least one")
    if len({p.resolve() for p in paths}) < len(paths):
        raise CheckpointError("a run directory is given twice; name each once")
    data = Gathered([read_run(p) for p in paths])
    title, sections = sections_of(data, reference, contrasts, missing, left_out)
    count = f"{len(data.runs)} run{'s' * (len(data.runs) > 1)}"
    page = build_page(
        title,
        sections,
        subtitle=f"{count} of localmotion, world models that know motion from unlabeled video",
        footer="Made by localmotion report from the files of the run directories. Self-contained: opens offline.",
    )
    return _write(Path(out), page)


def sections_of(
    data: Gathered,
    reference: Reference | None = None,
    contrasts: Contrasts | None = None,
    missing: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> tuple[str, list[Section]]:
    """Title and sections of the page about some runs. Arguments as those of `report`."""
    groups = data.groups
    envs = list(dict.fromkeys(g.env for g in groups))

    sections: list[Section] = []
    tiles: list[tuple[str, str]] = []
    for env in envs:
        here = [g for g in groups if g.env == env]
        shown, found = results(data, env, here)
        shown[:0] = _budgets(data, env, here)
        sections.append(Section(f"Results in {env}", shown))
        tiles += found
    if shown := averages(data, groups):
        sections.append(Section("Average over tasks", shown))
    if contrasts:
        table, notes = contrast_table(data, contrasts, reference)
        sections.append(Section("Contrasts", [table, *map(Text, notes)]))
    if shown := comparisons(data, groups, reference):
        sections.append(Section("Comparison of variants", shown))
    heldout, found = _heldout(data)
    tiles += found

    strips = [
        p
        for ps in data.each(data.runs, "openloop_*.npz", lambda p, r: media.open_loop(p, r.name, predictor=_first(r)))
        for p in ps
    ]
    acting = [run for run in data.runs if "train" in run.lines]
    topics: list[tuple[str, Sequence[Block], str]] = [
        ("Held-out figures of pre-training", heldout, ""),
        ("Open-loop prediction", strips, "No run saved an open-loop prediction (media/openloop_*.npz)."),
        ("Latent traversal", data.each(data.runs, "traversal_*.npz", lambda p, r: media.traversal(p, r.name)), ""),
        ("Plans", data.each(data.runs, "plans_*.npz", lambda p, r: media.plans(p, r.name)), ""),
        (
            "Atomic Actions",
            data.each(data.runs, "atomic_*.png", lambda p, r: media.atomic_actions(p, r.name)),
            "No run saved a drawing of its Atomic Actions (media/atomic_*.png).",
        ),
        (
            "Masked reconstruction",
            data.each(data.runs, "masked_*.npz", lambda p, r: media.masked_patches(p, r.name)),
            "No run saved masked-reconstruction examples (media/masked_*.npz).",
        ),
        (
            "Embedding of the motion code",
            data.each(data.runs, "embedding_*.npz", lambda p, r: media.embedding(p, r.name)),
            "No run saved an embedding of its motion code (media/embedding_*.npz).",
        ),
        ("Flow magnitudes", _flow(data), "No run saved its flow magnitudes (media/flow_*.npz)."),
        ("Pre-training", _losses(data, data.of("pretrain"), "pretrain", "pre-training"), ""),
        (
            "Training in the environment",
            _losses(data, [run for run in acting if not run.offline], "train", "training in the environment"),
            "",
        ),
        (
            "Learning from logged episodes",
            _losses(data, [run for run in acting if run.offline], "train", "learning from logged episodes"),
            "",
        ),
        ("Speed", _speed(data), ""),
    ]
    for title, blocks, absent in topics:
        if blocks:
            sections.append(Section(title, blocks))
        elif absent and any(could_save(run, absent.partition("media/")[2].partition("_")[0]) for run in data.runs):
            data.missing.append(absent)
    sections.append(Section("Runs and settings", [_runs_table(data.runs), *_settings(data.runs)]))
    data.missing += not_counted(data.runs, missing, left_out)
    data.missing += [f"{run.name}: {text}" for run in data.runs for text in run.notices]
    if data.missing:
        sections.append(Section("Not in this report", [Notice(text) for text in dict.fromkeys(data.missing)]))
    if tiles:
        sections.insert(0, Section("At a glance", [Tiles(tiles[:6])]))

    methods = list(dict.fromkeys(run.method for run in data.runs))
    title = f"{', '.join(methods)}: {', '.join(envs) if envs else 'pre-training'}"
    return title, sections


def _write(out: Path, page: str) -> Path:
    """Write through a temporary file in the same folder, so a full disk does not damage the old page."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out
