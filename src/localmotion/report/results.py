"""Results of online runs: groups, learning curves, final numbers and films."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from localmotion.errors import LocalmotionError
from localmotion.evaluation.statistics import Curve, Summary, aggregate_curves, final_scores, summarise
from localmotion.report import media, plots
from localmotion.report.memory import recall, recalled, stamp
from localmotion.report.page import Block, Fold, Notice, Picture, Row, Table
from localmotion.report.style import plain, score, short
from localmotion.runs.read import Floats, Line, RunData, flatten, names, number

R = TypeVar("R")

# Settings in which the seeds of one group may differ.
_MAY_DIFFER = {"seed", "device", "threads", "precision", "checkpoint", "data", "online.env_steps", "recipe.seed"}
_MAY_DIFFER |= {f"online.{name}" for name in ("log_every", "eval_every", "save_every")}


@dataclass(frozen=True)
class Group:
    """Runs in one environment that differ only in their seed. A notice reports other differences."""

    env: str
    """The environment, and whether the runs learned in it or from logged episodes."""
    label: str
    runs: tuple[RunData, ...]

    @property
    def unit(self) -> str:
        """What its evaluations count: "env steps" or "updates"."""
        return "updates" if self.runs[0].offline else "env steps"


def finished(groups: Iterable[Group]) -> list[Group]:
    """The groups with only their finished runs. A group without any is left out. Tables, averages and comparisons count these."""
    kept = [replace(group, runs=tuple(run for run in group.runs if run.finished)) for group in groups]
    return [group for group in kept if group.runs]


def not_counted(runs: Iterable[RunData], missing: Sequence[str] = (), left_out: Sequence[str] = ()) -> list[str]:
    """Sentences that name the runs which count in no table: unfinished ones of ``runs``, and others.

    ``missing``: runs of a study that have no numbers yet. ``left_out``: runs in its folder that are not in its file.
    """
    going = [f"{run.name} ({why})" for run in runs if (why := _lack(run))]
    texts = []
    for what, found in (
        ("Runs without a result", [*going, *missing]),
        ("Runs that the study file does not have, left out", left_out),
    ):
        if found:
            texts.append(f"{what}: {', '.join(found[:20])}{f' and {len(found) - 20} more' * (len(found) > 20)}.")
    return texts


def _lack(run: RunData) -> str:
    """Why a run has no result, "" if it has one."""
    if not run.finished:
        return {"unknown": "state unknown"}.get(run.state, run.state)
    scored = any(number(line, "return_mean") is not None for line in run.lines.get("eval", ()))
    return "" if scored or not _acts(run) else "finished, no evaluation"


def _acts(run: RunData) -> bool:
    return run.stage != "pretrain" and bool(run.env)


def origin(run: RunData) -> str:
    """ "pre-trained" for a run that started from a checkpoint, else "from scratch"."""
    return "pre-trained" if run.checkpoint else "from scratch"


def budget(run: RunData) -> str:
    """The part of a label that says how many labelled transitions a run was given; "" for a run that learned in an environment."""
    if given := run.setting("labels", 0):
        return f", labels {given}"
    return ", all labels" if run.offline else ""


def group_runs(runs: Sequence[RunData]) -> list[Group]:
    """Online runs by environment and label, or else method, origin, preset and label budget, in the order of their first run."""
    online = [run for run in runs if _acts(run)]
    presets, budgets = {run.preset for run in online}, {run.setting("labels", 0) for run in online}
    found: dict[tuple[str, str], list[RunData]] = {}
    for run in online:
        label = run.label
        if not label:
            label = f"{run.method}, {origin(run)}"
            if len(presets) > 1:
                label += f", {run.preset or 'no preset'}"
            if len(budgets) > 1:
                label += budget(run)
        found.setdefault((f"{run.env}, from logged episodes" if run.offline else run.env, label), []).append(run)
    return [
        Group(env, label, tuple(sorted(members, key=lambda r: (r.seed is None, r.seed or 0))))
        for (env, label), members in found.items()
    ]


def differing_settings(runs: Sequence[RunData]) -> list[str]:
    """Names of settings in which runs differ, although only the seed should differ."""
    flat = [{k: repr(v) for k, v in flatten(run.config).items() if k not in _MAY_DIFFER} for run in runs]
    return sorted(k for k in {k for f in flat for k in f} if len({f.get(k) for f in flat}) > 1)


def _signals(run: RunData) -> bool:
    return any("success_rate" in line for line in run.lines.get("eval", ()))


@dataclass
class Gathered:
    """The runs of a report, and sentences about data that could not be shown."""

    runs: list[RunData]
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        shown = names([run.path for run in self.runs])
        self.runs = [replace(run, shown=name) for run, name in zip(self.runs, shown, strict=True)]
        signals = {run.env for run in self.runs if _signals(run)}
        self.runs = [self._failures(run) if run.env in signals and not _signals(run) else run for run in self.runs]
        self.groups = group_runs(self.runs)
        several = len({g.env for g in self.groups}) > 1
        self._labels = {run.path: f"{g.label}, {g.env}" if several else g.label for g in self.groups for run in g.runs}

    def _failures(self, run: RunData) -> RunData:
        """A run that never succeeded, with a success rate of 0: some environments signal success only where it is true."""
        lines = run.lines.get("eval", [])
        if not lines or not _acts(run):
            return run
        self.missing.append(f"{run.name} never signalled success, as other runs in {run.env} did. It counts as 0.")
        return replace(run, lines={**run.lines, "eval": [{"success_rate": 0.0, **line} for line in lines]})

    def label(self, run: RunData) -> str:
        """Name of a run in a chart of all runs: its group's label, or its own name."""
        return self._labels.get(run.path, run.name)

    def of(self, *stages: str) -> list[RunData]:
        return [run for run in self.runs if run.stage in stages]

    def each(self, runs: Iterable[RunData], pattern: str, show: Callable[[Path, RunData], R]) -> list[R]:
        """``show`` of every matching media file; a file that cannot be shown becomes a sentence."""
        found = []
        for run in runs:
            for path in run.media(pattern):
                try:
                    found.append(recalled((pattern, run.name, str(path), stamp(path)), functools.partial(show, path, run)))
                except (LocalmotionError, OSError) as error:
                    self.missing.append(f"{run.name}: {error}.")
        return found


def eval_curve(report: Gathered, run: RunData, key: str) -> Curve | None:
    """A run's evaluations over env steps or updates, None without any finite one. The report mentions values that are left out."""
    steps, values = run.series("eval", key, x="update" if run.offline else "env_step")
    good = np.isfinite(values)
    if not good.all():
        report.missing.append(f"{run.name}: {int((~good).sum())} values of {key} are not finite and left out.")
    return Curve(steps[good], values[good]) if good.any() else None


def _whole(run: RunData, line: Line) -> bool:
    """Whether the environment ended a random episode. The loop may cut the last one."""
    if isinstance(line.get("cut"), bool):
        return not line["cut"]
    # A line of an earlier version has no mark.
    end, prefill = number(line, "env_step"), number({"x": run.setting("prefill")}, "x")
    if end is not None and prefill is not None and end < prefill:
        return True
    env = run.environment.get("env")
    known = env if isinstance(env, dict) else {}
    limit, repeat, length = number(known, "time_limit"), number(known, "action_repeat"), number(line, "length")
    return limit is not None and repeat is not None and length is not None and length * repeat >= limit


class Floor(NamedTuple):
    """The random policy's score."""

    score: float
    episodes: int | None
    """Number of its episodes, None if it is not known."""


def floor_of(runs: Sequence[RunData], key: str) -> Floor | None:
    """The random policy's score: from random.json if it exists, else from the whole random episodes of the prefill."""
    measured = [(value, number(run.random, "episodes")) for run in runs if (value := number(run.random, key)) is not None]
    if measured:
        counts = [int(count) for _, count in measured if count is not None]
        return Floor(float(np.mean([value for value, _ in measured])), sum(counts) if len(counts) == len(measured) else None)
    name = {"return_mean": "return", "success_rate": "success"}.get(key, "")
    lines = [(run, line) for run in runs for line in run.lines.get("episode", ()) if line.get("random") is True]
    found = [value for run, line in lines if _whole(run, line) and (value := number(line, name)) is not None]
    return Floor(float(np.mean(found)), len(found)) if found else None


def random_score(runs: Sequence[RunData], key: str) -> float | None:
    """The score of `floor_of`."""
    floor = floor_of(runs, key)
    return None if floor is None else floor.score


def results(report: Gathered, env: str, groups: Sequence[Group]) -> tuple[list[Block], list[tuple[str, str]]]:
    """Curves, final numbers and films of one environment, and tiles for the top of the page."""
    blocks: list[Block] = []
    tiles: list[tuple[str, str]] = []
    for group in groups:
        blocks += [Notice(text) for text in _doubts(group)]
    blocks += [Notice(text) for text in _options(env, groups)]
    runs = [run for group in groups for run in group.runs]
    for key, name, percent in (("success_rate", "Success rate", True), ("return_mean", "Episode return", False)):
        drawn: list[tuple[Group, plots.CurveGroup]] = []
        for group in groups:
            curves = [((run,), c) for run in group.runs if (c := eval_curve(report, run, key)) is not None]
            if curves:
                drawn.append((group, _curve_group(group.label, curves)))
            elif key == "return_mean":
                report.missing.append(f"{group.label} in {env} has no evaluations yet.")
        if not drawn:
            continue
        floor = floor_of(runs, key)
        chart = plots.learning_curves(
            [g for _, g in drawn],
            title=f"{name} in {env}",
            xlabel=groups[0].unit,
            ylabel=name.lower(),
            random_policy=floor.score if floor else None,
            percent=percent,
        )
        caption = (
            f"{name} of evaluation episodes. Thick: mean over seeds; shade: one population standard deviation; thin:"
            " each seed; dashed: not all seeds have come this far. Nothing is extrapolated."
        )
        caption += _OPEN * any(curves.unfinished for _, curves in drawn)
        blocks.append(Picture(chart, caption, f"Learning curves: {name.lower()} in {env}"))
        if ended := [(finished([group])[0], _ended(curves)) for group, curves in drawn if curves.final]:
            blocks.append(_final_table(ended, floor, percent, name))
            tiles = tiles or [_headline(env, name, [curves for _, curves in ended], floor, percent)]
    blocks += _so_far(groups)
    if floor_missing := [g for g in groups if random_score(g.runs, "return_mean") is None]:
        report.missing.append(f"The random policy in {env} was not measured for {', '.join(g.label for g in floor_missing)}.")
    blocks += _training_episodes(report, env, groups)
    blocks += _films(report, groups)
    if not blocks:
        blocks.append(Notice(f"The runs in {env} have no evaluations, episodes or films yet."))
    return blocks, tiles


def averages(report: Gathered, groups: Sequence[Group]) -> list[Block]:
    """Learning curves averaged over the tasks of a suite: one chart for each suite with two tasks or more.

    A chart has the labels that every task of the suite has, and of each label the seeds that every task has. A seed's curve is
    the mean over tasks, where all of them have a value. Success rates are averaged if every task has them, else returns.
    Runs on logged episodes are left out.
    """
    suites: dict[str, dict[str, dict[str, Group]]] = {}
    for group in groups:
        if group.unit == "env steps":
            suites.setdefault(group.env.partition(":")[0], {}).setdefault(group.label, {})[group.env] = group
    blocks: list[Block] = []
    for suite, labels in suites.items():
        tasks = list(dict.fromkeys(env for known in labels.values() for env in known))
        whole = {label: list(known.values()) for label, known in labels.items() if len(known) == len(tasks)}
        if len(tasks) < 2 or not whole:
            continue
        runs = [run for members in whole.values() for group in members for run in group.runs]
        percent = all(any("success_rate" in line for line in run.lines.get("eval", ())) for run in runs)
        key, name = ("success_rate", "Success rate") if percent else ("return_mean", "Episode return")
        drawn = []
        for label, members in whole.items():
            if means := mean_over_tasks(report, members, key):
                drawn.append(_curve_group(label, means))
        if drawn:
            title = f"{name}, average over {len(tasks)} tasks of {suite}"
            chart = plots.learning_curves(drawn, title=title, ylabel=name.lower(), percent=percent)
            caption = (
                f"Mean over {', '.join(tasks)} for each seed. Thick: mean over seeds; shade: one population standard deviation."
            )
            caption += _OPEN * any(curves.unfinished for curves in drawn)
            blocks.append(Picture(chart, caption, f"Learning curves: {title}"))
    return blocks


_OPEN = " An open circle ends the curve of a run that has not finished. It does not count in the numbers."


def _curve_group(label: str, found: Sequence[tuple[Sequence[RunData], Curve]]) -> plots.CurveGroup:
    """Curves with the runs that each is of. The final numbers are those of finished runs."""
    unfinished = frozenset(at for at, (runs, _) in enumerate(found) if not all(run.finished for run in runs))
    ended = [curve for at, (_, curve) in enumerate(found) if at not in unfinished]
    final = recall(summarise, final_scores(ended)) if ended else None
    return plots.CurveGroup(label, tuple(curve for _, curve in found), final, unfinished)


def _ended(group: plots.CurveGroup) -> plots.CurveGroup:
    """The same without unfinished runs."""
    kept = tuple(curve for at, curve in enumerate(group.curves) if at not in group.unfinished)
    return plots.CurveGroup(group.label, kept, group.final)


def _so_far(groups: Sequence[Group]) -> list[Block]:
    """A table of the runs of an environment that have not finished, one by one."""
    rows = []
    for group in groups:
        for run in group.runs:
            if run.finished:
                continue
            line = run.last("eval")
            values = [number(line, key) for key in ("success_rate", "return_mean")]
            shown = [score(value, percent=at == 0) for at, value in enumerate(values) if value is not None]
            steps = number(line, group.unit.replace(" ", "_")[:-1])
            seed = "–" if run.seed is None else str(run.seed)
            at = "–" if steps is None else short(steps)
            rows.append([group.label, seed, run.state, at, ", ".join(shown) or "–"])
    if not rows:
        return []
    header = ["not finished", "seed", "state", groups[0].unit, "last evaluation"]
    table = Table(
        header, rows, "Runs that have not finished, as far as they are. They count in no other table, average or comparison."
    )
    return [table if len(rows) <= 10 else Fold("Runs that have not finished", [table], f"{len(rows)} runs")]


def mean_over_tasks(report: Gathered, groups: Sequence[Group], key: str) -> list[tuple[list[RunData], Curve]]:
    """One curve for each seed that all groups (one per task) have, with its runs: the mean over tasks where all have a value."""
    curves = []
    by_seed = [{run.seed: run for run in group.runs} for group in groups]
    for seed in by_seed[0]:
        runs = [known[seed] for known in by_seed if seed in known]
        found = [curve for run in runs if (curve := eval_curve(report, run, key)) is not None]
        if len(found) < len(groups):
            continue
        band = aggregate_curves(found)
        if band.complete.any():
            curves.append((runs, Curve(band.env_steps[band.complete], band.mean[band.complete])))
    return curves


def _doubts(group: Group) -> list[str]:
    seeds = [run.seed for run in group.runs]
    texts = []
    if len(set(seeds)) < len(seeds):
        texts.append(f"{group.label}: several runs have the same seed, so the spread over seeds is too small.")
    if differ := differing_settings(group.runs):
        texts.append(
            f"{group.label}: runs shown as one group differ in {len(differ)} setting{'s' * (len(differ) > 1)}"
            f" beside the seed: {', '.join(differ[:6])}{' and more' * (len(differ) > 6)}."
        )
    return texts


def _options(env: str, groups: Sequence[Group]) -> list[str]:
    """A sentence for each option of the environment in which runs that share charts and tables differ."""
    known = [(group.label, flatten(run.config.get("env_options") or {})) for group in groups for run in group.runs]
    texts = []
    for option in sorted({name for _, options in known for name in options}):
        found: dict[str, list[str]] = {}
        for label, options in known:
            found.setdefault(plain(options.get(option, "default")), []).append(label)
        if len(found) > 1:
            values = "; ".join(f"{value} ({', '.join(dict.fromkeys(labels))})" for value, labels in found.items())
            texts.append(f"Runs in {env} are not in the same environment. They differ in the option {option}: {values}.")
    return texts


def _headline(env: str, name: str, groups: Sequence[plots.CurveGroup], floor: Floor | None, percent: bool) -> tuple[str, str]:
    """The best group's final score, with those of all other groups for comparison."""

    def text(final: Summary) -> str:
        return score(final.mean, final.std if len(final.scores) > 1 else None, percent=percent)

    ranked = sorted(((g.final, g.label) for g in groups if g.final), key=lambda pair: -pair[0].mean)
    parts = [f"{name} in {env}: {ranked[0][1]}", *(f"{label} {text(final)}" for final, label in ranked[1:])]
    if floor is not None:
        parts.append(f"random policy {score(floor.score, percent=percent)}")
    return text(ranked[0][0]), "; ".join(parts)


def _final_table(drawn: Sequence[tuple[Group, plots.CurveGroup]], floor: Floor | None, percent: bool, name: str) -> Table:
    rows = []
    for group, curves in drawn:
        final = curves.final
        assert final is not None
        ends = sorted({c.env_steps[-1] for c in curves.curves})
        steps = short(ends[0]) if len(ends) == 1 else f"{short(ends[0])} to {short(ends[-1])}"
        episodes = sum(int(number(run.last("eval"), "episodes") or 0) for run in group.runs)
        ci = final.interval
        rows.append(
            [
                group.label,
                str(len(curves.curves)),
                steps,
                str(episodes),
                score(final.mean, percent=percent),
                score(final.mean, final.std, percent=percent).split(" ± ")[1] if ci else "–",
                score(final.iqm, percent=percent),
                f"[{score(ci.low, percent=percent)}, {score(ci.high, percent=percent)}]" if ci else "–",
            ]
        )
    if floor is not None:
        known = "–" if floor.episodes is None else str(floor.episodes)
        rows.append(["random policy", "–", "–", known, score(floor.score, percent=percent), "–", "–", "–"])
    unit = drawn[0][0].unit
    header = ["", "seeds", unit, "episodes", "mean", "std", "IQM", "95 % interval of the IQM"]
    caption = (
        f"{name} at each seed's last evaluation. std: population, over seeds; IQM: mean of the middle half; interval:"
        " bootstrap over seeds (5000 resamples)."
    )
    if any(len(c.curves) < 5 for _, c in drawn):
        caption += " With fewer than five seeds the interval is not reliable."
    if any(len({curve.env_steps[-1] for curve in c.curves}) > 1 for _, c in drawn):
        caption += f" Seeds that ended at different {unit} are compared at their own last evaluation."
    return Table(header, rows, caption)


def binned(xs: Floats, ys: Floats, bins: int = 40) -> Curve:
    """Means of both in at most ``bins`` bins with about equal numbers of entries. ``xs`` (n,) never decreases.

    Entries with one x share a bin, so the x of the bins increase strictly and no entry is left out.
    """
    _, first, same = np.unique(xs, return_index=True, return_inverse=True)
    _, place = np.unique(first[same] * min(bins, len(xs)) // len(xs), return_inverse=True)
    count = np.bincount(place)
    return Curve(np.bincount(place, xs) / count, np.bincount(place, ys) / count)


def _training_episodes(report: Gathered, env: str, groups: Sequence[Group]) -> list[Block]:
    drawn = []
    for group in groups:
        curves = []
        for run in group.runs:
            lines = [line for line in run.lines.get("episode", ()) if line.get("random") is not True]
            trained = replace(run, lines={"episode": lines})
            steps, values = trained.every("episode", "return")
            good = np.isfinite(values)
            if not good.all():
                report.missing.append(
                    f"{run.name}: {int((~good).sum())} returns of training episodes are not finite and left out."
                )
            if good.any():
                curves.append(((run,), binned(steps[good], values[good])))
        if curves:
            drawn.append(replace(_curve_group(group.label, curves), final=None))
    if not drawn:
        return []
    chart = plots.learning_curves(drawn, title=f"Return of training episodes in {env}", ylabel="episode return")
    caption = "Episodes played while learning, with exploration noise, averaged in at most 40 bins per run."
    caption += _OPEN * any(curves.unfinished for curves in drawn)
    return [Picture(chart, caption, f"Return of training episodes in {env}")]


def _films(report: Gathered, groups: Sequence[Group]) -> list[Block]:
    """From each group's first run with films: the first and the last film by env step, and those with special names."""
    videos: list[Block] = []
    for group in groups:
        run = next((r for r in group.runs if r.media("eval_*.mp4")), None)
        if run is None:
            report.missing.append(f"{group.label} in {group.env} saved no film (media/eval_*.mp4).")
            continue
        paths = run.media("eval_*.mp4")
        timed = sorted((step, path) for path in paths if (step := media.env_step_of(path)) is not None)
        chosen = [timed[i][1] for i in (0, -1) if timed] + [path for path in paths if media.env_step_of(path) is None]
        seed = f", seed {run.seed}" if run.seed is not None else ""
        for path in dict.fromkeys(chosen):
            try:
                label = f"{group.label}{seed}"
                what = ("film", str(path), stamp(path), label, group.unit)
                videos.append(recalled(what, functools.partial(media.film, path, label, group.unit)))
            except (LocalmotionError, OSError) as error:
                report.missing.append(f"{run.name}: {error}.")
    return [Row(videos)] if videos else []
