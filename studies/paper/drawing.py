"""The paper's forms: learning curves in panels, tables of final scores, prediction strips, a t-SNE, the table of hyperparameters.

Each function of `SHOW` gets a file of this folder at a scale, the folder for its results, the folder of the runs, that of the clips,
and the scale's tasks (the paper's name -> environment). It returns the files that it wrote.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from localmotion import methods
from localmotion.compute import PLAIN
from localmotion.config import leaves
from localmotion.errors import StoreError
from localmotion.evaluation.embedding import knn_accuracy, silhouette, tsne
from localmotion.evaluation.metrics import psnr
from localmotion.evaluation.predict import predict
from localmotion.evaluation.probes import grid_flow
from localmotion.evaluation.statistics import Curve, aggregate_curves, final_scores, summarise
from localmotion.methods.base import images
from localmotion.recipe import Recipe
from localmotion.report.budgets import score_of
from localmotion.report.plots import DASHES, tsne_scatter
from localmotion.report.results import Gathered, Group, eval_curve, finished, mean_over_tasks
from localmotion.report.strips import strip_times
from localmotion.report.style import GRID, GROUND, PALETTE, plain, score, short_ticks, styled
from localmotion.runs.load import load_run
from localmotion.runs.read import read_run
from localmotion.runs.settings import compose
from localmotion.training.study_file import load_study, slug
from localmotion.training.update import Updater
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

Panel = tuple[str, bool, dict[str, Sequence[Curve]]]
"""Title, whether values are success rates, and the curves of each variant's seeds."""


def gathered(here: Path, runs: Path) -> tuple[Gathered, dict[tuple[str, str], Group]]:
    """The runs of the study in ``here``, and its groups of finished seeds by environment and variant."""
    paths = [runs / job.name for job in load_study(here / "study.yaml")]
    data = Gathered([read_run(path) for path in paths if (path / "metrics.jsonl").exists()])
    return data, {(group.env, group.label): group for group in finished(data.groups)}


def curves_of(data: Gathered, group: Group) -> list[Curve]:
    return [curve for run in group.runs if (curve := eval_curve(data, run, score_of(group))) is not None]


# -- learning curves ----------------------------------------------------------------------------------------------------


def curves(figure: Mapping[str, Any], here: Path, runs: Path, data: Path, tasks: Mapping[str, str]) -> list[Path]:
    """Figures 4 to 7, 12, 13: a panel for each task, and the average over tasks if the file says so."""
    found, groups = gathered(here, runs)
    labels = list(figure["variants"])
    panels: list[Panel] = []
    shown = {task: tasks[task] for task in figure["tasks"] if task in tasks}
    for task, env in shown.items():
        members = {label: group for label in labels if (group := groups.get((env, label)))}
        percent = any(score_of(group) == "success_rate" for group in members.values())
        panels.append((f"{task} ({env})", percent, {label: curves_of(found, group) for label, group in members.items()}))
    if figure.get("average"):
        key = "success_rate" if all(percent for _, percent, _ in panels) else "return_mean"
        whole = {label: [groups[env, label] for env in shown.values() if (env, label) in groups] for label in labels}
        means = {
            label: [curve for _, curve in mean_over_tasks(found, g, key)] for label, g in whole.items() if len(g) == len(shown)
        }
        panels.append((f"Average of {len(shown)} tasks", key == "success_rate", means))
    draw_panels(panels, labels).savefig(here / "figure.png", dpi=150)
    return [here / "figure.png", here / "curves.json"]


@styled
def draw_panels(panels: Sequence[Panel], labels: Sequence[str]) -> Figure:
    """Mean over seeds and one population standard deviation, a colour for each variant. A line ends where the first seed ends."""
    columns = 3 if len(panels) in (3, 5, 6) else min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * rows + 0.5 + 0.25 * -(-len(labels) // columns)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (title, percent, groups) in zip(grid.flat, panels, strict=False):
        for i, label in enumerate(labels):
            if not groups.get(label):
                continue
            band = aggregate_curves(groups[label])
            x, mean, std = (values[band.complete] for values in (band.env_steps, band.mean, band.std))
            style = {"color": PALETTE[i % len(PALETTE)], "linestyle": "-" if i == 0 else DASHES[i % len(DASHES)]}
            (handles[label],) = axes.plot(x, mean, linewidth=2.4 if i == 0 else 1.5, **style)
            axes.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_title(plain(title, 48), fontsize=9)
        axes.set_ylabel("success rate" if percent else "episode return", fontsize=8.5)
        if percent:
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        axes.xaxis.set_major_formatter(short_ticks())
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("env steps", fontsize=8.5)
    names = [label for label in labels if label in handles]
    figure.legend(
        [handles[name] for name in names], [plain(name) for name in names], loc="outside lower center",
        ncols=max(1, min(len(names), columns + 1)), frameon=False, fontsize=9,
    )  # fmt: skip
    figure.set_facecolor(GROUND)
    return figure


# -- tables of final scores ---------------------------------------------------------------------------------------------


def table(figure: Mapping[str, Any], here: Path, runs: Path, data: Path, tasks: Mapping[str, str]) -> list[Path]:
    """Tables 1 to 4: mean and population standard deviation over seeds of the last evaluation, and the paper's own below."""
    found, groups = gathered(here, runs)
    shown = [task for task in figure["tasks"] if task in tasks]
    finals = {at: summarise(final_scores(c)) for at, group in groups.items() if (c := curves_of(found, group))}

    def cell(task: str, label: str) -> str:
        final, group = finals.get((tasks[task], label)), groups.get((tasks[task], label))
        if final is None or group is None:
            return "-"
        return score(final.mean, final.std if len(final.scores) > 1 else None, percent=score_of(group) == "success_rate")

    if "columns" in figure:
        ((symbol, setting),) = figure["columns"].items()
        values = {group.label: group.runs[0].setting(setting) for group in groups.values()}
        order = sorted(values, key=lambda label: values[label])
        rows = [[figure["published"][0][0], *(f"{symbol} = {values[label]:g}" for label in order)]]
        rows += [[f"{task} ({tasks[task]})", *(cell(task, label) for label in order)] for task in shown]
    else:
        rows = [["Method", *(f"{task} ({tasks[task]})" for task in shown)]]
        for label in figure["variants"]:
            rows.append([label, *(cell(task, label) for task in shown)])
            if whole := figure["losses"].get(label):
                means = [
                    [finals[tasks[t], name].mean if (tasks[t], name) in finals else None for name in (whole, label)]
                    for t in shown
                ]
                rows.append(["Δ dyn.", *(change(before, after) for before, after in means)])
    seeds = sorted({len(final.scores) for final in finals.values()})
    note = f"Last evaluation: mean and population standard deviation over seeds ({' or '.join(map(str, seeds))})."
    (here / "figure.md").write_text(
        "\n".join([note, "", *markdown(rows), "", "The paper:", "", *markdown(figure["published"]), ""])
    )
    return [here / "figure.md", here / "curves.json"]


def change(before: float | None, after: float | None) -> str:
    """ "↓ 10.0 %": the second is so much below the first."""
    if not before or after is None:
        return "-"
    share = (before - after) / abs(before)
    return f"{'↓' if share >= 0 else '↑'} {abs(share):.1%}".replace("%", " %")


def markdown(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table. The first row is its head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


# -- pictures of pre-trained runs ---------------------------------------------------------------------------------------


def strips(figure: Mapping[str, Any], here: Path, runs: Path, data: Path, tasks: Mapping[str, str]) -> list[Path]:
    """Figures 8, 15 and 16: a picture for each part, and scores of all rows.

    With ``observed`` the rows are reconstructions: the frames that were observed, except the last, which a decoder sees as it is.
    """
    checkpoints = {name: runs / slug(run) for name, (run, _) in figure["rows"].items()}
    count, windows, observed = figure["clips"], figure["windows"], figure.get("observed", False)
    written: list[Path] = []
    scores: dict[str, Any] = {}
    for part, given in figure["parts"].items():
        drawn = windows if observed else count
        found = predict(list(checkpoints.values()), data / given["clips"], clips=drawn, windows=windows, split=given["split"])
        rows = {name: found.pictures[f"{checkpoints[name].name}: {row}"] for name, (_, row) in figure["rows"].items()}
        rows = {"GT": found.pictures["truth"], **rows}
        context, scored = found.context, found.scores
        if observed:
            rows = {name: x[:, : context - 1] for name, x in rows.items()}
            guesses = {**rows, "the next observed frame, copied": found.pictures["last_frame"][:, : context - 1]}
            scored = {name: {"psnr": quality(rows["GT"], x)} for name, x in guesses.items() if name != "GT"}
            context = 0
        path = here / ("figure.png" if len(figure["parts"]) == 1 else f"figure_{part[0]}.png")
        draw_strips({name: x[:count] for name, x in rows.items()}, context).savefig(path, dpi=150)
        written.append(path)
        scores[part] = {"windows": found.windows, "scores": scored}
    (here / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    return [*written, here / "scores.json"]


@styled
def draw_strips(rows: Mapping[str, NDArray[np.uint8]], context: int) -> Figure:
    """A block for each of N clips with a row for each entry (N, T, S, S, 3); a line marks where the prediction begins."""
    first = next(iter(rows.values()))
    times = strip_times(first.shape[1], context)
    figure = Figure(figsize=(0.8 * len(times) + 0.8, 0.8 * len(first) * len(rows) + 0.3 * len(first)))
    blocks = figure.subfigures(len(first), 1, squeeze=False)[:, 0]
    for n, block in enumerate(blocks):
        grid = block.subplots(len(rows), len(times), squeeze=False)
        block.subplots_adjust(left=0.8 / figure.get_figwidth(), right=0.995, top=0.91, bottom=0.005, wspace=0.03, hspace=0.03)
        for (name, pictures), line in zip(rows.items(), grid, strict=True):
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
            for axes, t in zip(line, times, strict=True):
                axes.imshow(pictures[n, t], interpolation="nearest")
                axes.set_xticks([], [])
                axes.set_yticks([], [])
                for side in axes.spines.values():
                    side.set_visible(False)
                if context and t == context:
                    axes.axvline(-0.5, color=PALETTE[1], linewidth=4)
        for axes, t in zip(grid[0], times, strict=True):
            axes.set_title(f"t = {t}" if t == times[0] else str(t), fontsize=8.5, loc="center", pad=3)
    figure.set_facecolor(GROUND)
    return figure


def quality(truth: NDArray[np.uint8], guess: NDArray[np.uint8]) -> list[float]:
    """PSNR in dB of (N, T, S, S, 3) pictures, the mean over N for each of the T frames. At most 60 dB count."""
    a, b = (torch.from_numpy(x.copy()).movedim(-1, -3) / 255 for x in (guess, truth))
    return psnr(a, b).clamp(max=60.0).mean(0).double().numpy().round(4).tolist()


def embedding(figure: Mapping[str, Any], here: Path, runs: Path, data: Path, tasks: Mapping[str, str]) -> list[Path]:
    """Figure 14: t-SNE of each window's mean motion code, and how well labels are separated before the t-SNE.

    The label of a clip is that of its store, or else the first folder of its id. A picture of t-SNE can mislead, so scores.json has the
    accuracy of the 5 nearest neighbours of other clips and the silhouette, of the codes, of an untrained network's codes, and of the
    clips' own flow averaged on a grid.
    """
    run, method, compute = load_run(runs / slug(figure["run"]))
    torch.manual_seed(0)
    fresh = methods.get(run.method)(run.model, image_size=method.image_size, action_dim=None).to(compute.device).eval()
    store = ClipStore(data / figure["clips"])
    sampler = WindowSampler(store, run.pretrain.length, 32, 0, split="all", prefetch=False)
    clips, starts, texts = windows_by_label(store, sampler, figure["labels"], figure["windows"])
    vectors: dict[str, list[torch.Tensor]] = {"DRP": [], "DRP, untrained": [], "flow, 8x8 grid": []}
    for part in np.array_split(np.arange(len(clips)), -(-len(clips) // 32)):
        batch = {key: value.to(compute.device) for key, value in sampler.windows(clips[part], starts[part]).items()}
        with torch.no_grad(), compute.autocast():
            for name, code in (("DRP", method.motion_code), ("DRP, untrained", fresh.motion_code), ("flow, 8x8 grid", grid_flow)):
                vectors[name].append(code(batch)[:, 1:].float().mean(1).cpu())  # nothing led to the first frame
    found = {name: torch.cat(parts).numpy() for name, parts in vectors.items()}
    xy = tsne(found["DRP"], seed=0)
    (here / "figure.svg").write_bytes(tsne_scatter(xy, texts, title="composed motion representations of clips, t-SNE"))
    scores = {
        name: {"5 nearest": knn_accuracy(x, texts, groups=clips), "silhouette": silhouette(x, texts)} for name, x in found.items()
    }
    counts = {text: texts.count(text) for text in dict.fromkeys(texts)}
    points = [
        {"clip": store.ids[clip], "start": int(start), "label": text, "xy": [round(float(v), 3) for v in place]}
        for clip, start, text, place in zip(clips, starts, texts, xy, strict=True)
    ]
    written = {"windows": counts, "scores": scores, "points": points}
    (here / "scores.json").write_text(json.dumps(written, indent=1) + "\n")
    return [here / "figure.svg", here / "scores.json"]


def windows_by_label(
    store: ClipStore, sampler: WindowSampler, labels: Mapping[Any, str], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Clips, starts and labels of windows that do not overlap, at most ``most`` of each label, first one of each clip, then a second."""
    places: dict[str, list[tuple[int, int, int]]] = {text: [] for text in labels.values()}
    for clip, count in zip(sampler.clips.tolist(), sampler.starts.tolist(), strict=True):
        label = store.labels[clip] if store.labels[clip] is not None else store.ids[clip].partition("/")[0]
        if label in labels:
            places[labels[label]] += [(turn, clip, start) for turn, start in enumerate(range(0, count, sampler.length))]
    if empty := [text for text, found in places.items() if not found]:
        raise StoreError(f"{store.path}: no clip of {sampler.length} frames has the label {empty[0]!r}")
    chosen = [(clip, start, text) for text, found in places.items() for _, clip, start in sorted(found)[:most]]
    clips, starts, texts = zip(*chosen, strict=True)
    return np.array(clips, np.int64), np.array(starts, np.int64), list(texts)


# -- hyperparameters ----------------------------------------------------------------------------------------------------


def hyperparameters(figure: Mapping[str, Any], here: Path, runs: Path, data: Path, tasks: Mapping[str, str]) -> list[Path]:
    """Table 5: the paper's values, those of DRP's preset `paper`, and whether they agree."""
    lines = [["", "hyperparameter", "the paper", "preset paper", "agrees"]]
    for section, rows in figure["rows"].items():
        envs = {"": ""} if section.startswith("Pre") else figure["tasks"]
        for name, given in rows.items():
            theirs = given["published"]
            theirs = theirs if isinstance(theirs, dict) else dict.fromkeys(envs, theirs)
            ours = {suite: ours_of(given, suite, env) for suite, env in envs.items()}
            agree = [suite for suite in envs if same(theirs[suite], ours[suite])]
            verdict = "yes" if len(agree) == len(envs) else f"only {', '.join(agree)}" if agree else "no"
            lines.append([section, name, by_suite(theirs), by_suite(ours), verdict])
    (here / "figure.md").write_text("\n".join([*markdown(lines), ""]))
    return [here / "figure.md"]


def ours_of(given: Mapping[str, Any], suite: str, env: str) -> Any:
    """Our value of a row of Table 5 in an environment, or in pre-training for none."""
    stage = "finetune" if env else "pretrain"
    run = compose("drp", stage, preset="paper", env=env)
    if given.get("reads") == "pixels":
        return images({"image": torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 3)})[
            :, 0, 0, 0
        ].tolist()
    if given.get("reads") == "optimizer":
        return optimizers(stage)
    if given["setting"].startswith("recipe."):
        return getattr(run.recipe or Recipe(), given["setting"].removeprefix("recipe."))
    return dict(leaves(run))[given["setting"]] * given.get("times", {}).get(suite, 1)


@functools.cache
def optimizers(stage: str) -> str:
    """Names of the optimisers of DRP's parameters, which do not depend on sizes and suites."""
    run = compose("drp", stage, preset="debug")
    method = methods.get("drp")(run.model, image_size=32, action_dim=None if stage == "pretrain" else 2)
    return ", ".join(sorted({group.optimizer for group in Updater(method, run, PLAIN, pretrained=True).groups}))


def same(theirs: Any, ours: Any) -> bool:
    return np.array_equal(theirs, ours) if isinstance(theirs, str) else np.allclose(theirs, ours, rtol=1e-9, atol=0)


def by_suite(values: Mapping[str, Any]) -> str:
    """One value for all, or each with its suite."""
    texts = {suite: f"{value:g}" if isinstance(value, float | int) else str(value) for suite, value in values.items()}
    return (
        next(iter(texts.values()))
        if len(set(texts.values())) == 1
        else ", ".join(f"{text} {suite}" for suite, text in texts.items())
    )


SHOW: dict[str, Callable[..., list[Path]]] = {
    "curves": curves,
    "table": table,
    "strips": strips,
    "embedding": embedding,
    "hyperparameters": hyperparameters,
}
