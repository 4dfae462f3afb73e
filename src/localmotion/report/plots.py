"""Charts of the report, as SVG bytes on a transparent background, all in one style.

Every chart is drawn in the light palette. `dark_variant` exchanges the colours in its bytes, so a page has both
versions without drawing twice. Colours are from Okabe and Ito's set for colour-blind readers, and no chart depends on
colour alone. Only `matplotlib.figure.Figure` is used: no pyplot, so no global state and no display.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from localmotion.evaluation.contrasts import Profile
from localmotion.evaluation.statistics import Curve, Summary, aggregate_curves
from localmotion.report.strips import flow_to_rgb
from localmotion.report.strips import masked_reconstruction as masked_reconstruction
from localmotion.report.strips import prediction_strips as prediction_strips
from localmotion.report.style import GRID, GROUND, MUTED, PALETTE, WIDTH, distinct, plain, score, short, short_ticks, styled

Floats = NDArray[np.float64]
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
P = ParamSpec("P")
MARKERS = "osD^vPX*"
"""Marker of the first, second, ... learning curve, as many as there are colours."""


def _save(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Date off and a fixed hash salt: the same numbers give the same bytes.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _axes(axes: Axes) -> Axes:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _title(figure: Figure, text: str) -> None:
    if text:
        figure.suptitle(plain(text, 90), x=0.004, y=1 - 0.06 / figure.get_figheight(), ha="left", va="top")


def _chart(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Decorator: draw in the report's style and return the chart as SVG bytes."""

    @functools.wraps(draw)
    def chart(*args: P.args, **kwargs: P.kwargs) -> bytes:
        return _save(draw(*args, **kwargs))

    return styled(chart)


@dataclass(frozen=True)
class CurveGroup:
    """Runs that differ only in their seed: a label, one curve per seed, and their final numbers (None: not shown)."""

    label: str
    curves: tuple[Curve, ...]
    final: Summary | None = None
    unfinished: frozenset[int] = frozenset()
    """Places in ``curves`` of runs that have not finished. ``final`` is without them."""


@_chart
def learning_curves(
    groups: Sequence[CurveGroup],
    *,
    title: str,
    xlabel: str = "env steps",
    ylabel: str = "episode return",
    random_policy: float | None = None,
    percent: bool = False,
) -> Figure:
    """Learning curves over env steps with their final numbers beside them.

    Each group has one colour: a thick line for the mean, a band for mean +- population standard deviation over seeds, a
    thin line per seed. The mean is dashed where not all seeds have a value (see `aggregate_curves`). ``random_policy``
    is a dotted line; ``percent`` shows values in [0, 1] as percentages. The curve of an unfinished run ends in an open circle. Raises
    ValueError without groups or for a group without curves.
    """
    if not groups:
        raise ValueError("no curves to draw")
    entries = len(groups) + (random_policy is not None)
    unit = min(1.0, 0.92 / (0.16 * entries))  # a legend of many groups makes the figure higher
    figure = Figure(figsize=(WIDTH, 3.9 / unit))
    axes = _axes(figure.add_axes((0.075, 0.13 * unit, 0.6, 1 - 0.23 * unit)))
    lines, names = 1 - 0.08 * unit, distinct((group.label for group in groups), 38)
    for i, group in enumerate(groups):
        colour = PALETTE[i % len(PALETTE)]
        band = aggregate_curves(group.curves)
        several = len(group.curves) > 1
        one_grid = all(len(c.env_steps) == len(band.env_steps) for c in group.curves)
        shape = MARKERS[i % len(MARKERS)]
        marker = shape if one_grid and len(band.env_steps) <= 40 else None
        if several:
            for curve in group.curves:
                axes.plot(curve.env_steps, curve.values, color=colour, linewidth=0.8, alpha=0.45)
            low, high = band.mean - band.std, band.mean + band.std
            axes.fill_between(band.env_steps, low, high, where=band.complete, color=colour, alpha=0.15, linewidth=0)
        solid = np.where(band.complete, band.mean, np.nan)
        if not band.complete.all():
            axes.plot(band.env_steps, band.mean, color=colour, linewidth=1.6, linestyle=(0, (2, 2)))
        axes.plot(
            band.env_steps, solid, color=colour, linewidth=2.2, marker=marker, markersize=6, markeredgecolor=GROUND,
            markeredgewidth=0.6, solid_capstyle="round",
        )  # fmt: skip
        ends = [(group.curves[at].env_steps[-1], group.curves[at].values[-1]) for at in sorted(group.unfinished)]
        for x, y in ends:
            axes.plot(x, y, color=colour, marker="o", markersize=8, markerfacecolor="none", linestyle="")
        lines = _legend_entry(figure, lines, unit, colour, shape if marker else "o", names[group.label], group, percent)
    if random_policy is not None:
        axes.axhline(random_policy, color=MUTED, linewidth=1.3, linestyle=(0, (1, 2)))
        value = score(random_policy, percent=percent)
        dots = Line2D([0.703, 0.725], [lines - 0.03 * unit] * 2, color=MUTED, linewidth=1.3, linestyle=(0, (1, 2)))
        figure.add_artist(dots)
        figure.text(0.735, lines - 0.03 * unit, f"random policy  {value}", color=MUTED, fontsize=9.5, va="center")
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        axes.set_ylim(-0.03, 1.03)
    else:
        axes.yaxis.set_major_formatter(short_ticks())
    axes.xaxis.set_major_formatter(short_ticks())
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.015)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _title(figure, title)
    return figure


@_chart
def budget_curves(
    lines: Mapping[str, Mapping[int, Summary]], *, title: str, ylabel: str = "episode return", percent: bool = False
) -> Figure:
    """Final scores against the number of labelled transitions (logarithmic): a line per variant, mean +- std over seeds.

    Raises ValueError without any point.
    """
    if not any(lines.values()):
        raise ValueError("no budgets to draw")
    figure = Figure(figsize=(WIDTH, 3.4), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 0.91)))
    axes = _axes(figure.add_subplot())
    names = distinct(lines, 38)
    for i, (name, scores) in enumerate(lines.items()):
        spread = [final.std if len(final.scores) > 1 else 0.0 for final in scores.values()]
        axes.errorbar(
            list(scores), [final.mean for final in scores.values()], spread, label=names[name],
            color=PALETTE[i % len(PALETTE)], linewidth=2.0, marker="os^Dv"[i % 5], markersize=5, capsize=3, elinewidth=1.0,
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = sorted({labels for scores in lines.values() for labels in scores})
    axes.set_xticks(ticks, [f"{labels:,}" for labels in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    else:
        axes.yaxis.set_major_formatter(short_ticks())
    axes.set_xlabel("labelled transitions")
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    _title(figure, title)
    return figure


@_chart
def profile_curves(profiles: Mapping[str, Profile], *, title: str, xlabel: str) -> Figure:
    """Share of runs above each score: a line per variant, with its interval as a band. Raises ValueError without profiles."""
    if not profiles:
        raise ValueError("no profiles to draw")
    rows = math.ceil(len(profiles) / 2)
    figure = Figure(figsize=(WIDTH * 0.72, 3.6 + 0.2 * rows), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 0.92)))
    axes = _axes(figure.add_subplot())
    names = distinct(profiles, 38)
    for i, (name, profile) in enumerate(profiles.items()):
        colour, dash = PALETTE[i % len(PALETTE)], DASHES[(i + i // len(PALETTE)) % len(DASHES)]
        axes.fill_between(profile.thresholds, profile.low, profile.high, color=colour, alpha=0.1, linewidth=0, step="post")
        axes.step(profile.thresholds, profile.share, color=colour, linewidth=2.0, linestyle=dash, where="post", label=names[name])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    axes.set_ylim(-0.02, 1.02)
    axes.margins(x=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("runs with a higher score")
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, handlelength=2.6)
    _title(figure, title)
    return figure


def _legend_entry(
    figure: Figure, top: float, unit: float, colour: str, marker: str, name: str, group: CurveGroup, percent: bool
) -> float:
    """One entry of the table beside the curves; returns where the next one starts, in figure fractions. ``unit``: 3.9 inches."""
    figure.add_artist(Line2D([0.715], [top - 0.03 * unit], color=colour, marker=marker, markersize=7, linestyle=""))
    figure.text(0.735, top - 0.03 * unit, name, fontsize=9.5, weight="bold", va="center")
    count, going = len(group.curves), len(group.unfinished)
    seeds = f"{count} seed{'s' * (count > 1)}"
    text = seeds + f", {going} unfinished" * (going > 0)
    if group.final is not None:
        seeds = f"{count - going} of {seeds}" if going else seeds
        spread = group.final.std if len(group.final.scores) > 1 else None
        text = f"final {score(group.final.mean, spread, percent=percent)}, {seeds}"
    figure.text(0.735, top - 0.09 * unit, text, fontsize=9.5, color=MUTED, va="center")
    return top - 0.16 * unit


def thin(xs: ArrayLike, ys: ArrayLike, points: int = 300) -> tuple[Floats, Floats]:
    """Average a long series in ``points`` bins with equal numbers of entries; means ignore non-finite values."""
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if len(x) <= points:
        return x, np.where(np.isfinite(y), y, np.nan)
    index = np.arange(len(x)) * points // len(x)
    good = np.isfinite(y)
    count = np.bincount(index, weights=good, minlength=points)
    total = np.bincount(index, weights=np.where(good, y, 0.0), minlength=points)
    mean_x = np.bincount(index, weights=x, minlength=points) / np.bincount(index, minlength=points)
    return mean_x, np.divide(total, count, out=np.full(points, np.nan), where=count > 0)


@_chart
def loss_curves(
    series: Mapping[str, Sequence[tuple[str, ArrayLike, ArrayLike]]], *, xlabel: str = "updates", columns: int = 3
) -> Figure:
    """One panel per loss, with the (run label, x, y) lines of the runs in the same colours.

    Long series are averaged to 300 points. A panel is logarithmic if its values are positive and span more than a
    factor of 30. Raises ValueError without any series.
    """
    if not series:
        raise ValueError("no losses to draw")
    runs = list(dict.fromkeys(label for lines in series.values() for label, _, _ in lines))
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(WIDTH, 2.15 * rows + 0.35), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06))
    grid = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (name, lines) in zip(grid.flat, series.items(), strict=False):
        _axes(axes)
        finite: list[Floats] = []
        for label, x, y in lines:
            xs, ys = thin(x, y)
            (handles[label],) = axes.plot(xs, ys, color=PALETTE[runs.index(label) % len(PALETTE)], linewidth=1.5)
            finite.append(ys[np.isfinite(ys)])
        values = np.concatenate(finite) if finite else np.zeros(0)
        if len(values) and values.min() > 0 and values.max() / values.min() > 30:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=5))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(which="minor", length=0)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(short_ticks())
        axes.xaxis.set_major_formatter(short_ticks())
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.02)
        axes.set_title(plain(name, 40), fontsize=9.5)
    for axes in list(grid.flat)[len(series) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    if len(runs) > 1:
        figure.legend(
            [handles[r] for r in runs], list(distinct(runs, 60).values()), loc="outside lower left", ncols=min(3, len(runs)),
            frameon=False, fontsize=9, handlelength=1.4,
        )  # fmt: skip
    return figure


@_chart
def horizon_curves(lines: Mapping[str, Sequence[float]], *, title: str = "", ylabel: str = "PSNR, dB") -> Figure:
    """Quality of open-loop prediction over the horizon: one line per predictor, one value per frame ahead.

    The name of each line is at its end. Raises ValueError without any value.
    """
    kept = {name: np.asarray(v, dtype=np.float64) for name, v in lines.items() if len(v)}
    if not kept:
        raise ValueError("no horizon to draw")
    figure = Figure(figsize=(WIDTH, 2.9))
    limit = 26 if max(map(len, kept)) <= 26 else 42
    names = distinct(kept, limit)
    axes = _axes(figure.add_axes((0.075, 0.17, 0.66 if limit == 26 else 0.53, 0.7)))
    ends = []
    for i, (name, values) in enumerate(kept.items()):
        marker = "osD^vPX*"[i % 8] if len(values) <= 40 else None
        axes.plot(
            np.arange(1, len(values) + 1), values, color=PALETTE[i % len(PALETTE)], linewidth=2, marker=marker,
            markersize=4.5, markeredgecolor=GROUND, markeredgewidth=0.6,
        )  # fmt: skip
        ends.append((float(values[-1]), i, name, len(values)))
    low, high = axes.get_ylim()
    floor, apart = -math.inf, (high - low) * 0.1  # overlapping labels move up
    for value, i, name, length in sorted(ends):
        floor = max(value if math.isfinite(value) else low, floor + apart)
        axes.annotate(
            f"{names[name]}  {value:.1f}", (length, floor), xytext=(9, 0), textcoords="offset points", va="center",
            color=PALETTE[i % len(PALETTE)], fontsize=9, weight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.margins(x=0.015)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("frames after the last observed one")
    axes.set_ylabel(ylabel)
    _title(figure, title)
    return figure


@_chart
def tsne_scatter(xy: ArrayLike, labels: Sequence[str], *, title: str = "", angles: ArrayLike | None = None) -> Figure:
    """Scatter of a 2-d embedding (n, 2), coloured by label or, with ``angles`` (n,) in radians, by direction of motion.

    Labels after the eight most frequent are grey, as "other". Angles use the colours of `flow_to_rgb` (0: right, pi
    / 2: down, as in image coordinates), with a wheel as legend. Raises ValueError if lengths differ.
    """
    points = np.asarray(xy, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) != len(labels) or not np.isfinite(points).all():
        raise ValueError(f"an embedding needs finite (n, 2) points and n labels, not {points.shape} and {len(labels)}")
    figure = Figure(figsize=(WIDTH * 0.72, 4.4))
    axes = figure.add_axes((0.01, 0.02, 0.62, 0.9))
    axes.set_axis_off()
    many = len(points) > 1500  # one SVG element per point would make the page too large
    style: dict[str, Any] = {"s": 30 if len(points) < 400 else 14, "linewidths": 0.5, "edgecolors": GROUND}
    style["rasterized"] = many
    if angles is not None:
        turn = np.asarray(angles, dtype=np.float64)
        if turn.shape != (len(points),):
            raise ValueError(f"needs one angle per point: {turn.shape} angles for {len(points)} points")
        unit = np.stack([np.cos(turn), np.sin(turn)], axis=-1).astype(np.float32)
        axes.scatter(points[:, 0], points[:, 1], c=flow_to_rgb(unit[None], 1.0)[0] / 255.0, **style)
        _direction_wheel(figure, (0.7, 0.52, 0.2, 0.32))
    else:
        names, inverse, count = np.unique(np.asarray(labels, dtype=str), return_inverse=True, return_counts=True)
        ranked = sorted(range(len(names)), key=lambda j: (-count[j], names[j]))
        shown, rest = ranked[: len(PALETTE)], ranked[len(PALETTE) :]
        markers = "osD^vPX*"
        if rest:
            chosen = np.isin(inverse, rest)
            axes.scatter(*points[chosen].T, color=GRID, label=f"other ({len(rest)} labels, {chosen.sum()})", **style)
        for i, j in enumerate(shown):
            chosen = inverse == j
            axes.scatter(
                *points[chosen].T,
                color=PALETTE[i],
                marker=markers[i],
                label=plain(f"{names[j]} ({count[j]})", 34),
                **style,
            )
        axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=9, handletextpad=0.3)
    _title(figure, title)
    return figure


def _direction_wheel(figure: Figure, place: tuple[float, float, float, float]) -> None:
    side = np.linspace(-1, 1, 121, dtype=np.float32)
    field = np.stack(np.meshgrid(side, side), axis=-1)
    radius = np.linalg.norm(field, axis=-1)
    colour = flow_to_rgb(field / np.maximum(radius, 1e-6)[..., None], 1.0)
    alpha = ((radius <= 1) & (radius >= 0.55)).astype(np.uint8) * 255
    axes = figure.add_axes(place)
    axes.imshow(np.dstack([colour, alpha]))
    axes.set_axis_off()
    axes.set_title("direction of motion", fontsize=9, loc="center", color=MUTED, weight="normal")


@_chart
def share_bars(parts: Mapping[str, Mapping[str, float]], *, title: str = "", unit: str = " s") -> Figure:
    """Shares of time: one stacked bar per run with each part's share of the total, largest parts first.

    ``parts`` maps run label -> part -> amount (seconds); parts keep one colour over all bars. Raises ValueError if
    nothing is positive.
    """
    totals = {run: sum(v for v in amounts.values() if v > 0) for run, amounts in parts.items()}
    totals = {run: total for run, total in totals.items() if total > 0}
    if not totals:
        raise ValueError("no time to divide")
    weight: dict[str, float] = {}
    for run in totals:
        for name, amount in parts[run].items():
            weight[name] = weight.get(name, 0.0) + max(amount, 0.0) / totals[run]
    names = sorted((n for n in weight if weight[n] > 0), key=lambda n: (n == "other", -weight[n], n))
    figure = Figure(figsize=(WIDTH, 0.42 * len(totals) + (0.75 if title else 0.45)))
    height = figure.get_figheight()
    axes = figure.add_axes((0.3, 0.36 / height, 0.61, 1 - (0.71 if title else 0.41) / height))
    axes.set_axis_off()
    for row, (run, total) in enumerate(totals.items()):
        left = 0.0
        for i, name in enumerate(names):
            share = max(parts[run].get(name, 0.0), 0.0) / total
            colour = GRID if name == "other" else PALETTE[i % len(PALETTE)]
            axes.barh(row, share, left=left, height=0.62, color=colour, edgecolor=GROUND, linewidth=1.2)
            if share >= 0.055:
                ink = MUTED if name == "other" else GROUND
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=9)
            left += share
        axes.text(-0.012, row, plain(run, 44), ha="right", va="center", fontsize=9.5)
        axes.text(1.012, row, f"{short(total)}{unit}", ha="left", va="center", fontsize=9, color=MUTED)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(totals) - 0.5, -0.5)
    handles = [Patch(color=GRID if n == "other" else PALETTE[i % len(PALETTE)]) for i, n in enumerate(names)]
    figure.legend(
        handles, [plain(n, 24) for n in names], loc="lower left", bbox_to_anchor=(0.292, 0), ncols=min(8, len(names)),
        frameon=False, fontsize=9, handlelength=0.9, handleheight=0.9, columnspacing=1.3,
    )  # fmt: skip
    _title(figure, title)
    return figure


@_chart
def flow_histogram(magnitudes: Mapping[str, ArrayLike], *, title: str = "") -> Figure:
    """Distributions of flow magnitude (pixels), one outlined histogram per source, on a logarithmic axis.

    Values below 0.01 px count as 0.01 (background without motion). A tick marks each source's 99th percentile. If
    sources differ a lot, the model gets flow of another scale than in training. Raises ValueError without
    finite values.
    """
    cleaned = {name: np.asarray(v, dtype=np.float64).ravel() for name, v in magnitudes.items()}
    cleaned = {name: v[np.isfinite(v)] for name, v in cleaned.items()}
    cleaned = {name: np.maximum(v, 0.01) for name, v in cleaned.items() if len(v)}
    if not cleaned:
        raise ValueError("no magnitudes to draw")
    top = max(float(v.max()) for v in cleaned.values())
    bins = np.geomspace(0.01, max(top * 1.05, 1.0), 48)
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axes = _axes(figure.add_subplot())
    for i, (name, values) in enumerate(cleaned.items()):
        share = np.histogram(values, bins)[0] / len(values)
        colour = PALETTE[i % len(PALETTE)]
        p50, p99 = np.quantile(values, [0.5, 0.99])
        label = f"{plain(name, 40)}: median {short(p50)} px, 99 % {short(p99)} px"
        axes.stairs(share, bins, fill=True, color=colour, alpha=0.18)
        axes.stairs(share, bins, color=colour, linewidth=1.8, label=label)
        axes.plot([p99, p99], [0, 0.06], color=colour, linewidth=2.2, transform=axes.get_xaxis_transform())
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(short_ticks())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("flow magnitude, pixels")
    axes.set_ylabel("share of pixels")
    axes.legend(loc="upper right", frameon=False, fontsize=9, handlelength=1.2)
    _title(figure, title)
    return figure


@_chart
def comparison_bars(
    rows: Mapping[str, float],
    *,
    title: str = "",
    unit: str = "",
    reference: float | None = None,
    reference_label: str = "",
    target: float | None = None,
    highlight: Sequence[str] = (),
    digits: int = 2,
) -> Figure:
    """Horizontal bars with their numbers, for held-out comparisons.

    ``rows`` label -> value, drawn from the top; ``reference`` a dashed line (e.g. ratio 1: no better than the trivial
    predictor) and ``target`` a dotted one; bars named in ``highlight`` are the model's. Raises ValueError without
    a finite value.
    """
    kept = {name: float(v) for name, v in rows.items() if math.isfinite(v)}
    if not kept:
        raise ValueError("no values to draw")
    figure = Figure(figsize=(WIDTH, 0.36 * len(kept) + 0.95))
    height = figure.get_figheight()
    axes = figure.add_axes((0.26, 0.3 / height, 0.62, 1 - 0.65 / height))
    axes.set_axis_off()
    for row, (name, value) in enumerate(kept.items()):
        colour = PALETTE[0] if name in highlight or not highlight else "#7a6a55"
        axes.barh(row, value, height=0.58, color=colour, alpha=1.0 if name in highlight or not highlight else 0.55)
        axes.text(0, row, plain(name, 40) + "  ", ha="right", va="center", fontsize=9.5)
        axes.text(max(value, 0), row, f"  {value:.{digits}f}{unit}", ha="left", va="center", fontsize=9.5, weight="bold")
    bottom = len(kept) - 0.4
    for level, dash, label in ((reference, (0, (4, 3)), reference_label), (target, (0, (1, 2)), f"target {target}")):
        if level is not None:
            axes.plot([level, level], [-0.45, bottom], color=MUTED, linewidth=1.3, linestyle=dash)
            axes.text(level, bottom + 0.12, plain(label), ha="center", va="top", fontsize=8.5, color=MUTED)
    levels = [v for v in (*kept.values(), reference, target, 0.0) if v is not None]
    axes.set_xlim(min(0.0, min(levels) * 1.1), max(levels) * 1.02 if max(levels) > 0 else 1.0)
    axes.set_ylim(bottom, -0.6)
    _title(figure, title)
    return figure
