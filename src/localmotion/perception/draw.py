"""Draw a clip of a store with its tracks, flow, Atomic Actions and the outline of its mask: a contact sheet (.png) or a film (.mp4)."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from localmotion.errors import StoreError
from localmotion.video.bits import unpack
from localmotion.video.store import Clip, ClipStore
from localmotion.video.write import write_video

TAIL = 8  # frames of history drawn for a point


def flow_colours(flow: NDArray[np.floating], top: float) -> NDArray[np.uint8]:
    """(..., 2) pixels -> (..., 3): hue is direction, saturation is magnitude up to ``top``, white is no motion."""
    field = flow.astype(np.float32)
    angle = np.arctan2(field[..., 1], field[..., 0]) / (2 * np.pi) % 1.0
    amount = np.clip(np.linalg.norm(field, axis=-1) / max(top, 1e-6), 0, 1)
    rgb = colormaps["hsv"](angle)[..., :3]
    out: NDArray[np.uint8] = ((1 - amount[..., None] * (1 - rgb)) * 255).astype(np.uint8)
    return out


def _pick(store: ClipStore, clip: str | int | None) -> int:
    store.require_clips()
    if clip is None:
        # A clip with much motion, but not the most.
        motion = np.array([info.get("flow", {}).get("p90", 0.0) for info in store.infos])
        return int(np.argsort(motion)[int(0.8 * (len(motion) - 1))])
    if isinstance(clip, int):
        if not 0 <= clip < len(store):
            raise StoreError(f"{store.path}: has clips 0 to {len(store) - 1}, not {clip}")
        return clip
    if clip not in store.ids:
        raise StoreError(f"{store.path}: has no clip {clip!r}; its ids begin with {', '.join(store.ids[:3])}")
    return list(store.ids).index(clip)


def _tail(clip: Clip, slot: int, t: int) -> NDArray[np.float32]:
    """Positions of the slot's current track in the last frames up to t, oldest first."""
    begin = t
    while begin > max(0, t - TAIL) and clip.track_id[begin - 1, slot] == clip.track_id[t, slot] and clip.visible[begin - 1, slot]:
        begin -= 1
    return clip.tracks[begin : t + 1, slot]


OUTLINE = (255, 0, 255)


def _masks(clip: Clip) -> NDArray[np.bool_] | None:
    """Masks (T, S, S) of a clip, if its store has them."""
    return unpack(clip.extra["mask"], clip.frames.shape[1]) if "mask" in clip.extra else None


def _colours(count: int) -> NDArray[np.float64]:
    return np.asarray(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def inspect(
    store: ClipStore, out: Path, clip: str | int | None = None, *, frames: int = 6, points: int = 16, patch: int | None = None
) -> Path:
    """Draw one clip (id, number, or None for one with much motion) into ``out``: .png contact sheet or .mp4 film.

    ``patch`` is the side of the flow patches in pixels; None means a quarter of the frame's side, as in the paper (16 of 64).

    Raises StoreError for a clip that does not exist or another file ending.
    """
    chosen = store.clip(_pick(store, clip))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".mp4":
        write_video(out, _film(chosen, points), fps=12)
    elif out.suffix == ".png":
        _sheet(store, chosen, frames, points, patch or store.size // 4).savefig(out, dpi=110, facecolor="white")
    else:
        raise StoreError(f"{out}: inspect writes .png or .mp4")
    return out


def _film(clip: Clip, points: int, scale: int = 6) -> NDArray[np.uint8]:
    side = clip.frames.shape[1] * scale
    colours = (_colours(points)[:, :3] * 255).astype(int)
    top = float(np.quantile(np.linalg.norm(clip.flow.astype(np.float32), axis=-1), 0.99)) or 1.0
    film, masks = [], _masks(clip)
    for t in range(len(clip.frames) - 1):
        left = cv2.resize(clip.frames[t], (side, side), interpolation=cv2.INTER_CUBIC)
        if masks is not None:
            large = masks[t].repeat(scale, 0).repeat(scale, 1).astype(np.uint8)
            outlines, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(left, outlines, -1, OUTLINE, 1)
        right = cv2.resize(flow_colours(clip.flow[t], top), (side, side), interpolation=cv2.INTER_NEAREST)
        for slot in range(min(points, clip.tracks.shape[1])):
            if clip.visible[t, slot]:
                path = np.round((_tail(clip, slot, t) + 0.5) * scale).astype(np.int32)
                colour = tuple(int(c) for c in colours[slot])
                cv2.polylines(left, [path], False, colour, 2, cv2.LINE_AA)
                cv2.circle(left, tuple(int(v) for v in path[-1]), 5, colour, -1, cv2.LINE_AA)
        film.append(np.concatenate([left, right], 1))
    return np.stack(film)


def _sheet(store: ClipStore, clip: Clip, frames: int, points: int, patch: int) -> Figure:
    times = np.unique(np.linspace(0, len(clip.frames) - 2, frames).round().astype(int))
    columns = len(times)
    points = min(points, clip.tracks.shape[1])
    figure = Figure(figsize=(2.1 * columns, 6.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(4, columns, height_ratios=(1, 1, 0.05, 0.5))
    size = np.linalg.norm(clip.flow.astype(np.float32), axis=-1)
    top = max(float(np.quantile(size, 0.99)), 0.05)
    colours, side = _colours(points), clip.frames.shape[1]
    quantiles, masks = clip.info.get("flow", {}), _masks(clip)
    figure.suptitle(
        f"{clip.id}   {len(clip.frames)} frames   recipe {store.recipe_hash} ({store.recipe.get('flow')}, {store.recipe.get('segment')}, "
        f"{store.recipe.get('track')} at {store.recipe.get('percept_size')} px)\n"
        + "flow magnitude, pixels of a stored frame: "
        + ", ".join(f"{k} {v:.3f}" for k, v in quantiles.items()),
        fontsize=10,
    )
    for column, t in enumerate(times.tolist()):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(clip.frames[t], interpolation="bicubic", extent=(-0.5, side - 0.5, side - 0.5, -0.5))
        for slot in range(points):
            if clip.visible[t, slot]:
                tail = _tail(clip, slot, t)
                axes.plot(*tail.T, color=colours[slot], lw=1.3)
                axes.plot(*tail[-1], "o", color=colours[slot], ms=4, mec="black", mew=0.5)
        if masks is not None and masks[t].any():
            # Padded, so that the outline closes at the edge of the picture.
            places = np.arange(-1, side + 1)
            outline = np.pad(masks[t], 1).astype(np.float32)
            axes.contour(places, places, outline, levels=[0.5], colors=[np.array(OUTLINE) / 255], linewidths=1)
        _bare(axes, side, f"frame {t}")
        axes = figure.add_subplot(grid[1, column])
        axes.imshow(flow_colours(clip.flow[t], top), extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="nearest")
        _bare(axes, side, f"flow {t} to {t + 1}")
    wheel = figure.add_subplot(grid[2, :])
    span = np.linspace(0, 2 * np.pi, 400)
    wheel.imshow(flow_colours(np.stack([np.cos(span), np.sin(span)], -1)[None] * top, top), aspect="auto", extent=(0, 360, 0, 1))
    wheel.set_yticks([])
    wheel.set_xticks([0, 90, 180, 270, 360], ["right", "down", "left", "up", "right"], fontsize=7)
    wheel.set_title(f"direction of motion; full colour at {top:.2f} px or more", fontsize=8)
    _patches(figure, grid[3, :], clip, int(np.argmax(size.mean((1, 2)))), points, patch, top)
    return figure


def _bare(axes: Axes, side: int, title: str) -> None:
    axes.set_xlim(-0.5, side - 0.5)
    axes.set_ylim(side - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)


def _patches(figure: Figure, place: object, clip: Clip, t: int, points: int, patch: int, top: float) -> None:
    """The Atomic Actions of the frame with most motion: P x P crops of its flow at the tracked points, as arrows on colour."""
    import torch

    from localmotion.models.dae import crop_patches

    crops = crop_patches(
        torch.from_numpy(clip.flow[t].astype(np.float32)), torch.from_numpy(clip.tracks[t, :points].copy()), patch
    ).numpy()
    axes = figure.add_subplot(place)  # type: ignore[call-overload]
    colours, gap = _colours(points), 3
    axes.set_xlim(-gap, points * (patch + gap))
    axes.set_ylim(patch + 1, -gap)
    axes.set_aspect("equal")
    axes.axis("off")
    step = max(patch // 4, 1)
    # The longest arrow has the length of the gap to the next, so no arrow leaves its patch.
    scale = max(top, float(np.linalg.norm(crops, axis=-1).max())) / (0.95 * step)
    ys, xs = np.mgrid[step // 2 : patch : step, step // 2 : patch : step]
    for slot in range(points):
        left = slot * (patch + gap)
        shown = bool(clip.visible[t, slot])
        picture = flow_colours(crops[slot], top) if shown else np.full((patch, patch, 3), 225, np.uint8)
        axes.imshow(picture, interpolation="nearest", extent=(left, left + patch, patch, 0))
        axes.add_patch(Rectangle((left, 0), patch, patch, fill=False, ec=colours[slot], lw=2))
        axes.text(left + patch / 2, -0.8, f"$u^{{{slot + 1}}}$" + ("" if shown else " lost"), ha="center", fontsize=8)
        if shown:
            arrows = crops[slot][ys, xs]
            place_of = (left + xs + 0.5, ys + 0.5)
            axes.quiver(
                *place_of, *np.moveaxis(arrows, -1, 0), angles="xy", scale_units="xy", scale=scale, pivot="mid", width=0.0009
            )
    axes.set_title(f"Atomic Actions: {patch}x{patch} patches of the flow {t} to {t + 1} at the tracked points", fontsize=8)
