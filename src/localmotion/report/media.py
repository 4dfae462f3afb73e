"""Files in RUN/media, checked and turned into blocks of the page.

    openloop_*.npz   truth, prediction (N, T, H, W, 3) uint8, context int; any prediction_<name> of the same shape,
                     predictor (a name of `strips.ROWS`): what made the prediction
    masked_*.npz     truth, masked, reconstruction (M, P, P, 2) float: flow patches
    embedding_*.npz  xy (n, 2) float, labels (or label) (n,) strings, title; optional angle (n,) radians
    traversal_*.npz  frame (H, W, 3), pictures (D, K, H, W, 3) uint8: the frame's code with number d set to values[k]; values (K,)
    plans_*.npz      observed (N, H, W, 3), plan and followed (N, n, H, W, 3) uint8, steps (N,), ahead (n,) int; optional goal (H, W, 3)
    flow_*.npz       magnitudes (n,) float, name
    atomic_*.png     Atomic Actions drawn on clips
    eval_<env step>.mp4   film of an evaluation episode; eval_<word>.mp4 for a special one, e.g. eval_best.mp4

Arrays are loaded without pickle and bounded in size. A file that cannot be used raises MediaError, and the
report prints its message.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import VideoError
from localmotion.files import read_bytes
from localmotion.report import plots, strips
from localmotion.report.arrays import MediaError, read_arrays
from localmotion.report.page import Picture, Video
from localmotion.report.style import short
from localmotion.video.decode import iter_frames
from localmotion.video.listing import VideoRef

MAX_FILE = 12 << 20
"""Largest picture or video put into the page, bytes."""


def _text(arrays: dict[str, NDArray[Any]], name: str, default: str) -> str:
    return str(arrays[name]) if name in arrays and arrays[name].ndim == 0 else default


def open_loop(path: Path, run: str, clips: int = 3, predictor: str = "") -> list[Picture]:
    """Prediction strips, one picture per clip, for at most ``clips`` clips.

    ``predictor``: a name of `strips.ROWS`, that of the first prediction in a file that does not name it.
    """
    arrays = read_arrays(path, ("truth", "prediction", "context"))
    truth, context = arrays["truth"], arrays["context"]
    if context.size != 1 or context.dtype.kind not in "iu":
        raise MediaError(f"{path.name}: context must be one integer")
    others = {key.removeprefix("prediction_"): value for key, value in sorted(arrays.items()) if key.startswith("prediction_")}
    named = {strips.ROWS.get(_text(arrays, "predictor", predictor), "prediction"): arrays["prediction"]}
    for name, value in others.items():
        row = strips.ROWS.get("zero_motion" if name == "zero" else name, "prediction")
        named[row if row not in named and row != "prediction" else f"prediction, {name.replace('_', ' ')}"] = value
    found = []
    try:
        for i in range(min(clips, len(truth))):
            one = {name: value[i : i + 1] for name, value in named.items()}
            data = strips.prediction_strips(truth[i : i + 1], one, context=int(context), transparent=True)
            caption = f"{run}, clip {i + 1} of {path.stem.removeprefix('openloop_')}: {int(context)} observed frames (green),"
            caption += " then imagined ones (red), with the PSNR of each."
            found.append(Picture(data, caption, "Prediction strip: rows truth, prediction, error"))
    except (ValueError, IndexError) as error:
        raise MediaError(f"{path.name}: {error}") from error
    return found


def masked_patches(path: Path, run: str) -> Picture:
    """Masked-reconstruction examples."""
    arrays = read_arrays(path, ("truth", "masked", "reconstruction"))
    try:
        data = strips.masked_reconstruction(arrays["truth"], arrays["masked"], arrays["reconstruction"])
    except (ValueError, TypeError, IndexError) as error:
        raise MediaError(f"{path.name}: {error}") from error
    caption = (
        f"{run}: flow patches that were hidden from the motion encoder, and their reconstruction. Colour is direction,"
        " saturation is magnitude."
    )
    return Picture(data, caption, "Flow patches: truth and reconstruction")


def embedding(path: Path, run: str) -> Picture:
    """A t-SNE scatter, by direction if the file has angles."""
    arrays = read_arrays(path, ("xy",))
    label, angle = arrays.get("labels", arrays.get("label")), arrays.get("angle")
    if label is None or label.dtype.kind != "U" or label.ndim != 1:
        raise MediaError(f"{path.name}: needs labels, a vector of strings")
    title = _text(arrays, "title", path.stem.removeprefix("embedding_"))
    try:
        data = plots.tsne_scatter(arrays["xy"], label.tolist(), title=title, angles=angle)
    except (ValueError, TypeError) as error:
        raise MediaError(f"{path.name}: {error}") from error
    how = "direction of motion" if angle is not None else "label"
    return Picture(data, f"{run}: t-SNE of the motion code, {len(label)} windows, coloured by {how}.", title)


def traversal(path: Path, run: str) -> Picture:
    """Pictures of a code's numbers, each set to several values."""
    arrays = read_arrays(path, ("frame", "pictures", "values"))
    try:
        data = strips.traversal(arrays["frame"], arrays["pictures"], arrays["values"])
    except (ValueError, TypeError) as error:
        raise MediaError(f"{path.name}: {error}") from error
    caption = f"{run}: the code of one held-out frame, decoded with one of its {len(arrays['pictures'])} numbers set to the value above."
    caption += " Below a row's number is its largest change of a picture in grey levels, a mean over pixels and colours."
    caption += " A row that does not change belongs to a number that the decoder does not read."
    return Picture(data, caption, "Latent traversal: one row for each number of the code")


_PLANS = ("observed", "plan", "followed", "steps", "ahead")


def plans(path: Path, run: str) -> Picture:
    """Plans of an evaluation episode beside what followed."""
    arrays = read_arrays(path, _PLANS)
    try:
        data = strips.plan_strips(**{name: arrays[name] for name in (*_PLANS, "goal") if name in arrays})
    except (ValueError, TypeError) as error:
        raise MediaError(f"{path.name}: {error}") from error
    caption = f"{run}, evaluation at {_text(arrays, 'when', 'an unknown time')}: what the agent expected from an agent step on (red) and"
    caption += " what followed (green), with the PSNR between the two. An agent may choose a new plan at each step."
    return Picture(data, caption, "Plans: rows of expected frames and of the frames that followed")


def flow_magnitudes(path: Path) -> tuple[str, NDArray[np.float64]]:
    """(name, finite magnitudes in pixels) of a flow_*.npz."""
    arrays = read_arrays(path, ("magnitudes",))
    values = arrays["magnitudes"]
    if values.dtype.kind not in "fiu":
        raise MediaError(f"{path.name}: magnitudes are not numbers")
    values = values.astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    if not len(values):
        raise MediaError(f"{path.name}: has no finite magnitudes")
    return _text(arrays, "name", path.stem.removeprefix("flow_")), values


def _read_file(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_FILE:
        raise MediaError(f"{path.name}: {size / 2**20:.0f} MB is too large for the page; open it at {path}")
    if size == 0:
        raise MediaError(f"{path.name}: is empty")
    return read_bytes(path, MAX_FILE)


def atomic_actions(path: Path, run: str) -> Picture:
    """A drawing of Atomic Actions on a clip."""
    data = _read_file(path)
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise MediaError(f"{path.name}: is not a PNG")
    name = path.stem.removeprefix("atomic_").replace("_", " ")
    return Picture(data, f"{run}, {name}: tracked points, flow and patches.", f"Atomic Actions on {name}")


def env_step_of(path: Path) -> int | None:
    """The env step (or update) in a name like eval_000050000.mp4, None if it has none."""
    found = re.fullmatch(r"eval_([0-9]{1,15})", path.stem)
    return int(found[1]) if found else None


def film(path: Path, label: str, unit: str = "env steps") -> Video:
    """An evaluation film with its first frame as poster. ``unit``: what the number in its name counts."""
    data = _read_file(path)
    try:
        image = next(iter_frames(VideoRef(path.name, path, "file"), None, max_frames=1))
    except (VideoError, StopIteration) as error:
        raise MediaError(f"{path.name}: is not a readable video") from error
    step = env_step_of(path)
    when = f"after {short(step)} {unit}" if step is not None else path.stem.removeprefix("eval_").replace("_", " ")
    return Video(data, f"{label}, {when}.", strips.png(image), wide=image.shape[1] > image.shape[0])
