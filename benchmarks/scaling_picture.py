"""The picture of `bench_scaling`: one panel per axis, both scales logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.bench_scaling import Curve, exponent
from localmotion.report.style import GRID, GROUND, MUTED, PALETTE, WIDTH, styled

COLUMNS = 3


@styled
def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write a PNG: seconds along each axis, the expected order, and FLOPs scaled to the first point.

    An expected order between two bounds is a wedge, drawn once per panel, from the first point of the last curve, which has the smallest
    fixed part. If a curve is below the wedge, its fixed part is still larger than its growing part.
    """
    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        panels.setdefault(curve.axis, []).append(curve)
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(WIDTH, 2.35 * rows + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.07))
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes, (name, found) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, name, found)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("milliseconds")
    handles = [
        Line2D([], [], color=MUTED, linewidth=1.8, marker="o", markersize=4.5),
        Line2D([], [], color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5))),
        Patch(facecolor=GRID, edgecolor=MUTED, alpha=0.6),
    ]
    names = ["measured", "FLOPs, scaled to the first point", "expected order of what grows, from the first point"]
    figure.legend(handles, names, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, format="png", dpi=144, facecolor=GROUND, metadata={"Software": None})


def _panel(axes: Axes, name: str, curves: Sequence[Curve]) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = []
    for index, curve in enumerate(curves):
        x, y = np.asarray(curve.values, float), 1e3 * np.asarray(curve.seconds)
        colour, marker = PALETTE[index], "os"[index]
        if curve is curves[-1] or curve.expected != curves[-1].expected:
            low, high = (y[0] * (x / x[0]) ** order for order in curve.expected)
            axes.fill_between(x, low, high, color=GRID, alpha=0.5, linewidth=0)
            for bound in (low, high):
                axes.plot(x, bound, color=MUTED, alpha=0.45, linewidth=1.2)
        if curve.flops:
            axes.plot(x, y[0] * np.asarray(curve.flops) / curve.flops[0], color=colour, linewidth=1.2, linestyle=(0, (1, 1.5)))
        axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=4.5, markeredgecolor=GROUND, markeredgewidth=0.6)
        ends.append((curve, colour, y))
    # Space above the curves for the names; on a logarithmic scale this is a factor.
    bottom, top = min(y.min() for *_, y in ends) / 1.6, max(y.max() for *_, y in ends)
    axes.set_ylim(bottom, max(top * (top / bottom) ** (0.16 * len(ends)), top * 3))
    for row, (curve, colour, _) in enumerate(ends):
        text = f"{curve.what}  x^{exponent(curve.values, curve.seconds):.2f}"
        axes.text(0.02, 0.99 - 0.1 * row, text, transform=axes.transAxes, color=colour, fontsize=8.5, weight="bold", va="top")
    axes.xaxis.set_major_locator(FixedLocator(list(curves[0].values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.tick_params(which="both", length=0, pad=4)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(name, fontsize=9.5)
