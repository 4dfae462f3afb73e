"""Pictures of the report, as PNG bytes: flow as colour, prediction strips, masked reconstructions of flow patches.

Labels are grey on a transparent background and readable on white and on a dark page, so one picture serves both.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from localmotion.evaluation.metrics import psnr
from localmotion.report.arrays import Pixels, flow_to_rgb
from localmotion.report.style import WIDTH, plain, styled

GREY = "#808895"
"""Contrast at least 3.5 on #ffffff and on #14171d."""
OBSERVED, IMAGINED = (0, 150, 105), (213, 70, 40)
DPI = 200
HIGH, HIGHEST = 6_000, 65_000
"""Height of strips in pixels: what is still pleasant to look at, and what can be drawn (2^16)."""


def error_to_rgb(error: ArrayLike, top: float) -> Pixels:
    """Absolute error (H, W) -> (H, W, 3) uint8: black over red and orange to pale yellow at ``top`` (map "inferno")."""
    from matplotlib import colormaps

    scaled = np.clip(np.asarray(error, dtype=np.float64) / max(top, 1e-9), 0, 1)
    return np.rint(255 * colormaps["inferno"](scaled)[..., :3]).astype(np.uint8)


def _canvas(width: float, height: float, pixels_across: float, pixels_down: float) -> tuple[Figure, Axes]:
    """A transparent figure with one axes in picture pixels, y down, that fills it."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, pixels_across)
    axes.set_ylim(pixels_down, 0)
    return figure, axes


def _save(figure: Figure, transparent: bool = True) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=transparent, dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _frame_psnr(truth: Pixels, prediction: Pixels) -> NDArray[np.float64]:
    """(T,) PSNR in dB of (T, H, W, 3) uint8 frames."""
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2) for x in (prediction, truth))
    return psnr(a, b).numpy()


def strip_times(frames: int, context: int, columns: int = 12) -> list[int]:
    """Frames of a strip: the last observed ones (at most 3), then evenly spaced imagined ones up to the end.

    Needs ``columns`` >= 4, for two observed frames and a first and a last imagined one.
    """
    observed = min(3, context, columns // 2)
    times = list(range(context - observed, context))
    left = min(columns - observed, frames - context)
    return times + sorted({round(t) for t in np.linspace(context, frames - 1, left)}) if left > 0 else times


def in_lines(name: str, width: int = 12) -> str:
    """A row's name in lines of at most ``width`` characters: "ipv_pre: prior" -> "ipv_pre:" and "prior"."""
    parts = name.replace(", ", ",\n").replace(": ", ":\n").split("\n")
    return "\n".join(line for part in parts for line in textwrap.wrap(part, width))


# Strips are laid out in units of a picture's width: a gap between pictures, the column of names, the height of a line of text.
STRIP_GAP, STRIP_LABEL, STRIP_LINE = 0.13, 1.3, 0.3


def _clip_height(predictions: int, aspect: float, errors: bool) -> float:
    """Height of one clip's rows."""
    return (1 + (1 + errors) * predictions) * (aspect + STRIP_GAP) + predictions * STRIP_LINE


def clips_that_fit(arrays: Mapping[str, Pixels], pixels: int, *, context: int = 5, errors: bool = True) -> int:
    """Number of clips of ``arrays`` whose strips are at most ``pixels`` high (`save_strips`), at least one."""
    clips, frames, height, width = arrays["truth"].shape[:4]
    across = STRIP_LABEL + len(strip_times(frames, context)) * (1 + STRIP_GAP)
    room = pixels / (WIDTH * DPI) * across - 1.2 * STRIP_LINE
    each = _clip_height(len(arrays) - 1, height / width, errors) + STRIP_LINE
    return min(clips, max(1, int((room + STRIP_LINE) / each)))


@styled
def prediction_strips(
    truth: Pixels,
    predictions: Mapping[str, Pixels],
    *,
    context: int,
    title: str = "",
    columns: int = 12,
    errors: bool = True,
    transparent: bool = False,
) -> bytes:
    """Open-loop predictions of N clips as one PNG: a row of truth, then each named prediction, with ``errors`` also its error.

    ``truth`` and each of ``predictions`` (N, T, H, W, 3) uint8; the first ``context`` frames were observed (framed
    green), the rest imagined (framed red). The PSNR in dB is below each imagined frame. The error is the absolute
    difference, averaged over channels, on one scale for the whole picture. ``transparent``: transparent background,
    else white. Raises ValueError for other shapes or dtypes, no clip or no prediction.
    """
    shapes = [x.shape for x in (truth, *predictions.values())]
    if truth.ndim != 5 or truth.shape[-1] != 3 or len(truth) == 0 or len(shapes) < 2 or len(set(shapes)) > 1:
        raise ValueError(f"strips need a truth and predictions of one shape (N, T, H, W, 3), not {shapes}")
    if any(x.dtype != np.uint8 for x in (truth, *predictions.values())):
        raise ValueError("strips need uint8 frames")
    N, T, H, W = truth.shape[:4]
    if not 0 <= context <= T:
        raise ValueError(f"context must be within 0..{T}, not {context}")
    times = strip_times(T, context, columns)
    imagined = np.array(times) >= context
    shown = truth[:, times]
    wrong = {
        name: np.abs(p[:, times].astype(np.float64) - shown).mean(axis=-1) / 255 for name, p in predictions.items()
    }  # (N, columns, H, W)
    peaks = [float(np.quantile(e[:, imagined], 0.995)) for e in wrong.values() if imagined.any()]
    top = max(0.05, math.ceil(max(peaks, default=0.0) * 20) / 20)

    gap, label, line = STRIP_GAP, STRIP_LABEL, STRIP_LINE
    aspect = H / W
    clip_height = _clip_height(len(predictions), aspect, errors)
    head = line * (2.4 if title else 1.2)
    across = label + len(times) * (1 + gap)
    down = head + N * clip_height + (N - 1) * line
    figure, axes = _canvas(WIDTH, WIDTH * down / across, across, down)

    def row(y: float, name: str, pictures: Pixels, quality: NDArray[np.float64] | None = None) -> float:
        axes.text(label - 0.14, y + aspect / 2, name, ha="right", va="center", color=GREY, fontsize=8.5)
        for j, picture in enumerate(pictures):
            x = label + j * (1 + gap)
            colour = tuple(c / 255 for c in (IMAGINED if imagined[j] else OBSERVED))
            axes.add_patch(Rectangle((x - 0.04, y - 0.04), 1.08, aspect + 0.08, color=colour, lw=0))
            axes.imshow(picture, extent=(x, x + 1, y + aspect, y), interpolation="nearest", aspect="auto", zorder=2)
            if quality is not None and imagined[j]:
                text = f"{quality[j]:.1f} dB" if math.isfinite(quality[j]) else "exact"
                axes.text(x + 0.5, y + aspect + line * 0.55, text, ha="center", va="center", color=GREY, fontsize=7.2)
        return y + aspect + gap + (line if quality is not None else 0.0)

    if title:
        axes.text(0.1, line * 0.6, plain(title, 90), va="center", color=GREY, fontsize=10, weight="bold")
    for j, t in enumerate(times):
        text = f"t = {t}" if j == 0 else str(t)
        axes.text(label + j * (1 + gap) + 0.5, head - line * 0.55, text, ha="center", va="center", color=GREY, fontsize=7.6)
    y = head
    for n in range(N):
        y = row(y, "truth", shown[n])
        for name, prediction in predictions.items():
            y = row(
                y,
                in_lines(plain(name, 60)),
                prediction[n, times],
                _frame_psnr(shown[n], prediction[n, times]),
            )
            if errors:
                y = row(y, f"error\n0 to {top:.2f}", error_to_rgb(wrong[name][n], top))
        y += line
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)
    return _save(figure, transparent)


@styled
def masked_reconstruction(
    truth: ArrayLike,
    masked: ArrayLike,
    reconstruction: ArrayLike,
    *,
    max_magnitude: float | None = None,
    columns: int = 12,
) -> bytes:
    """Flow patches as a PNG: truth, the encoder's input, and the reconstruction, with bars of mean magnitude.

    Three arrays (M, P, P, 2) float, x then y, in pixels or the model's scaled units; the first ``columns`` patches
    are drawn. A patch is hidden if ``masked`` is not finite, or zero where the truth is not. Hidden patches are
    grey; if all are hidden, that row is left out. Colours as in `flow_to_rgb`, one scale for all (``max_magnitude``;
    default: the truth's 99th percentile). Raises ValueError for shapes.
    """
    t, m, r = (np.asarray(x, dtype=np.float64)[:columns] for x in (truth, masked, reconstruction))
    if t.ndim != 4 or t.shape[-1] != 2 or t.shape != m.shape or t.shape != r.shape or len(t) == 0:
        raise ValueError(f"patches must be equal (M, P, P, 2) arrays, not {t.shape}, {m.shape}, {r.shape}")
    if not (np.isfinite(t).all() and np.isfinite(r).all()):
        raise ValueError("truth and reconstruction must be finite")
    sizes = [np.hypot(x[..., 0], x[..., 1]) for x in (t, r)]  # (M, P, P)
    scale = max_magnitude if max_magnitude is not None else max(float(np.quantile(sizes[0], 0.99)), 1e-3)
    empty = (m == 0).all(axis=(1, 2, 3)) & (t != 0).any(axis=(1, 2, 3))
    m = np.where(empty[:, None, None, None], np.nan, m)
    rows = [("truth", t), ("seen", m), ("reconstruction", r)]
    if not np.isfinite(m).any():
        del rows[1]  # every patch was hidden: leave out a row of grey
    bars = [s.mean(axis=(1, 2)) for s in sizes]  # (M,) each
    full = max(float(np.max(bars)), 1e-9)

    gap, label, bar = 0.14, 2.0, 0.62
    M = len(t)
    across, down = label + max(M, 6) * (1 + gap) + 2.2, len(rows) * (1 + gap) + bar + 0.25
    figure, axes = _canvas(WIDTH, WIDTH * down / across, across, down)
    font = 8.2
    for row, (name, patches) in enumerate(rows):
        y = row * (1 + gap) + 0.05
        axes.text(label - 0.14, y + 0.5, name, ha="right", va="center", color=GREY, fontsize=font)
        for j, patch in enumerate(patches):
            x = label + j * (1 + gap)
            axes.add_patch(Rectangle((x - 0.015, y - 0.015), 1.03, 1.03, color=GREY, lw=0))
            axes.imshow(flow_to_rgb(patch, scale), extent=(x, x + 1, y + 1, y), interpolation="nearest", zorder=2)
    y = len(rows) * (1 + gap) + 0.1
    axes.text(label - 0.14, y + bar / 2, "mean magnitude", ha="right", va="center", color=GREY, fontsize=font)
    for j in range(M):
        x = label + j * (1 + gap)
        for k, (values, colour) in enumerate(zip(bars, (GREY, tuple(c / 255 for c in IMAGINED)), strict=True)):
            axes.add_patch(Rectangle((x, y + k * 0.3), max(values[j] / full, 0.015), 0.22, color=colour, lw=0))
    x = label + max(M, 6) * (1 + gap) + 0.2
    _wheel(axes, x, 0.35, scale, font)
    for k, (name, colour) in enumerate((("truth", GREY), ("reconstruction", tuple(c / 255 for c in IMAGINED)))):
        axes.add_patch(Rectangle((x, y + k * 0.3), 0.22, 0.22, color=colour, lw=0))
        axes.text(x + 0.34, y + k * 0.3 + 0.12, name, va="center", color=GREY, fontsize=font - 0.8)
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)
    return _save(figure)


@styled
def traversal(frame: Pixels, pictures: Pixels, values: ArrayLike) -> bytes:
    """Latent traversal as a PNG: a row for each of D numbers of a code, a column for each of K values that it is set to.

    ``frame`` (H, W, 3) and ``pictures`` (D, K, H, W, 3) uint8, ``values`` (K,). Below a row's name is its largest change of a picture:
    mean difference over pixels and channels, in grey levels. Rows fill two halves, left and right. Raises ValueError for other shapes.
    """
    numbers = np.asarray(values, dtype=np.float64)
    fits = pictures.ndim == 5 and pictures.shape[-1] == 3 and pictures.size > 0 and frame.shape == pictures.shape[2:]
    if not fits or numbers.shape != pictures.shape[1:2] or {pictures.dtype, frame.dtype} != {np.dtype(np.uint8)}:
        raise ValueError(f"a traversal needs (D, K, H, W, 3) uint8 and (K,), not {pictures.shape} and {numbers.shape}")
    D, K, H, W = pictures.shape[:4]
    shown = pictures.astype(np.float64)
    changes = np.abs(shown.max(1) - shown.min(1)).mean((1, 2, 3))  # (D,)
    gap, label, head, aspect = 0.06, 0.75, 0.4, H / W
    rows = -(-D // 2)
    half = label + K * (1 + gap) + 0.35
    across, down = 1.35 + 2 * half, head + rows * (aspect + gap)
    figure, axes = _canvas(WIDTH, WIDTH * down / across, across, down)
    axes.text(0.55, head * 0.5, "frame", ha="center", va="center", color=GREY, fontsize=8)
    axes.imshow(frame, extent=(0.05, 1.05, head + aspect, head), interpolation="nearest", aspect="auto", zorder=2)
    for d in range(D):
        left, y = 1.35 + (d // rows) * half, head + (d % rows) * (aspect + gap)
        text = f"{d + 1}\n{changes[d]:.1f}"
        axes.text(left + label - 0.12, y + aspect / 2, text, ha="right", va="center", color=GREY, fontsize=7.5)
        for k in range(K):
            x = left + label + k * (1 + gap)
            if d % rows == 0:
                axes.text(x + 0.5, head * 0.5, f"{numbers[k]:g}", ha="center", va="center", color=GREY, fontsize=7.5)
            axes.imshow(pictures[d, k], extent=(x, x + 1, y + aspect, y), interpolation="nearest", aspect="auto", zorder=2)
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)
    return _save(figure)


@styled
def plan_strips(
    observed: Pixels, plan: Pixels, followed: Pixels, *, steps: ArrayLike, ahead: ArrayLike, goal: Pixels | None = None
) -> bytes:
    """Plans of an agent as a PNG: for each of N plans a row of the n frames that it expected and a row of those that followed.

    ``observed`` (N, H, W, 3), ``plan`` and ``followed`` (N, n, H, W, 3) uint8; ``steps`` (N,): the agent step of each plan; ``ahead``
    (n,): agent steps from the plan to its frames; ``goal`` (H, W, 3). The PSNR in dB is below each pair of frames. Raises ValueError for
    other shapes.
    """
    at, later = (np.asarray(x, dtype=np.int64) for x in (steps, ahead))
    N, n, H, W = plan.shape[:4] if plan.ndim == 5 else (0, 0, 0, 0)
    wanted = [(N, H, W, 3), (N, n, H, W, 3), (N, n, H, W, 3), (N,), (n,), (H, W, 3)]
    given = [observed, plan, followed, at, later, observed[0] if goal is None and len(observed) else goal]
    if not plan.size or any(x is None or x.shape != shape for x, shape in zip(given, wanted, strict=True)):
        shapes = [None if x is None else x.shape for x in given]
        raise ValueError(f"plans must be (N, n, H, W, 3) with frames of the same shape, not {shapes}")
    if any(x.dtype != np.uint8 for x in (observed, plan, followed)):
        raise ValueError("strips need uint8 frames")
    gap, label, line, aspect = 0.13, 1.3, 0.3, H / W
    first = label + (0.0 if goal is None else 1 + 3 * gap)
    across, down = first + max(n + 1, 8) * (1 + gap) + gap, line + N * (2 * (aspect + gap) + 1.4 * line)
    figure, axes = _canvas(WIDTH, WIDTH * down / across, across, down)

    def show(picture: Pixels, x: float, y: float, colour: tuple[int, int, int] | None) -> None:
        if colour is not None:
            axes.add_patch(Rectangle((x - 0.04, y - 0.04), 1.08, aspect + 0.08, color=tuple(c / 255 for c in colour), lw=0))
        axes.imshow(picture, extent=(x, x + 1, y + aspect, y), interpolation="nearest", aspect="auto", zorder=2)

    def write(text: str, x: float, y: float, ha: str = "center") -> None:
        axes.text(x, y, text, ha=ha, va="center", color=GREY, fontsize=7.6)

    if goal is not None:
        write("goal", label + 0.5, line / 2)
        show(goal, label, line, None)
    for column, name in enumerate(["now", *(f"+{k}" for k in later)]):
        write(name, first + column * (1 + gap) + 0.5, line / 2)
    for k in range(N):
        y = line + k * (2 * (aspect + gap) + 1.4 * line)
        below = y + aspect + gap
        write(f"step {at[k]}\nplan", label - 0.14, y + aspect / 2, "right")
        write("what\nfollowed", label - 0.14, below + aspect / 2, "right")
        show(observed[k], first, y, OBSERVED)
        for j, quality in enumerate(_frame_psnr(followed[k], plan[k])):
            x = first + (j + 1) * (1 + gap)
            show(plan[k, j], x, y, IMAGINED)
            write(f"{quality:.1f} dB" if math.isfinite(quality) else "exact", x + 0.5, below + aspect + line * 0.55)
            show(followed[k, j], x, below, OBSERVED)
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)
    return _save(figure)


def _wheel(axes: Axes, x: float, y: float, scale: float, font: float) -> None:
    side = np.linspace(-1, 1, 161)
    field = np.stack(np.meshgrid(side, side), axis=-1)
    disc = flow_to_rgb(field, 1.0)
    alpha = (np.linalg.norm(field, axis=-1) <= 1).astype(np.uint8) * 255
    axes.imshow(np.dstack([disc, alpha]), extent=(x, x + 1.5, y + 1.5, y), zorder=2)
    axes.text(x + 0.75, y - 0.16, "direction", ha="center", va="center", color=GREY, fontsize=font - 0.8)
    axes.text(x + 0.75, y + 1.68, f"rim {scale:.2g}", ha="center", va="center", color=GREY, fontsize=font - 0.8)


ROWS = {
    "motion": "prediction",
    "prior": "prediction",
    "action": "prediction",
    "latent_action": "prediction, true latent actions",
    "zero_motion": "prediction, zero motion",
    "zero_action": "prediction, zero latent actions",
    "swapped_action": "prediction, latent actions of the next clip",
    "last_frame": "last frame, copied",
}
"""Names of the held-out evaluation's predictors in a strip."""


def save_strips(arrays: Mapping[str, Pixels], out: Path, *, context: int = 5, title: str = "", errors: bool = True) -> Path:
    """Write prediction strips of ``arrays["truth"]`` and every other entry, (N, T, H, W, 3) uint8 each, to a PNG file.

    The first ``context`` frames were observed. Returns ``out``; raises as `prediction_strips`, KeyError
    without truth, OSError if the file cannot be written.
    """
    predictions = {ROWS.get(name, name.replace("_", " ")): x for name, x in arrays.items() if name != "truth"}
    data = prediction_strips(arrays["truth"], predictions, context=context, title=title, errors=errors)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(data)
    return out


def png(frame: Pixels) -> bytes:
    """(H, W, 3) uint8 as PNG bytes, pixel by pixel."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, frame, format="png")
    return buffer.getvalue()
