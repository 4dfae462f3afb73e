"""How good perception is: every backend against the exact motion and masks of environments, and against pictures moved by known warps."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs import OWN_DRAWING, make_env
from localmotion.envs.base import PixelEnv
from localmotion.envs.truth import MotionTruth, motion_truth
from localmotion.errors import ConfigError, LocalmotionError, unknown_name
from localmotion.perception.base import backends, make_backend
from localmotion.perception.draw import flow_colours
from localmotion.perception.exact import ExactMask
from localmotion.perception.stream import StreamingExtractor
from localmotion.perception_eval.agent_masks import MASK_ENVS, Masked, read_set, score_masks
from localmotion.perception_eval.scores import FlowScore, MaskScore, SlotScore, TrackScore, block_mean, stored
from localmotion.perception_eval.warps import load_pictures, score_warps
from localmotion.recipe import Recipe

ENVS = (
    "dmc:walker_walk",
    "dmc:cheetah_run",
    "dmc:hopper_stand",
    "dmc:reacher_easy",
    "dmc:finger_spin",
    "dmc:cartpole_swingup",
    "metaworld:reach",
    "metaworld:drawer-open",
    "metaworld:door-lock",
    "toy:moving_background",
)
EMBEDDED = {"flow": "dis", "segment": "saliency", "track": "lk", "mask": "motion"}
MOVES = 0.05
"""A body moves if its flow differs from the camera's by more than this, in pixels of the perceived picture."""


@dataclass(frozen=True)
class ReportSettings:
    """What a perception report measures."""

    envs: tuple[str, ...] = ENVS
    percepts: tuple[int, ...] = (64, 128)
    """Sides at which flow and tracks are computed; multiples of `size`."""
    qualities: tuple[str, ...] = ("fast",)
    """Rendering: fast, reference, auto."""
    supersample: int = 1
    """Pictures drawn at n times their side and averaged."""
    backends: tuple[str, ...] = ("embedded",)
    """Names of backends; "embedded" stands for dis, saliency, lk and motion, "all" for all that are installed (may fetch weights)."""
    policy: str = "random"
    """random (uniform) or smooth (a bounded random walk)."""
    episodes: int = 2
    frames: int = 26
    """Frames of an episode that are looked at, from its reset: 25 pairs."""
    points: int = 64
    """True tracks an episode, begun on the moving bodies."""
    seed: int = 0
    size: int = 64
    """Side of the stored picture."""
    pictures: Path | None = None
    """Video, or folder of videos or picture folders, for the known warps; None for procedural pictures."""
    masks: Path | None = None
    """Masks of a video segmentation data set, with its frames beside them (`perception_eval.agent_masks.read_set`)."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown_name("policy", self.policy, POLICIES)
        for name, least in (("episodes", 1), ("frames", 3), ("points", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"perception-report: {name}={getattr(self, name)} must be at least {least}")
        for percept in self.percepts:
            Recipe(size=self.size, percept_size=percept)


def _uniform(rng: np.random.Generator, dims: int) -> Iterator[NDArray[np.float32]]:
    while True:
        yield rng.uniform(-1, 1, dims).astype(np.float32)


def _smooth(rng: np.random.Generator, dims: int) -> Iterator[NDArray[np.float32]]:
    action = rng.uniform(-1, 1, dims)
    while True:
        yield action.astype(np.float32)
        action = np.clip(0.9 * action + 0.4 * rng.normal(0, 1, dims), -1, 1)


POLICIES: dict[str, Callable[[np.random.Generator, int], Iterator[NDArray[np.float32]]]] = {"random": _uniform, "smooth": _smooth}


@dataclass(frozen=True)
class Clip:
    """An episode with its truth: ``frames`` (T, P, P, 3) uint8 and T snapshots of ``truth``."""

    frames: NDArray[np.uint8]
    snapshots: tuple[Any, ...]
    truth: MotionTruth


def _shown(env: PixelEnv, frames: int, seed: int, policy: str) -> Iterator[NDArray[np.uint8]]:
    """The pictures (P, P, 3) of `record`, while the environment shows them."""
    obs, _ = env.reset(seed=seed)
    yield obs.get("percept", obs["image"])
    shape = env.action_space.shape
    assert shape is not None
    for action in itertools.islice(POLICIES[policy](np.random.default_rng([seed, 1]), int(shape[0])), frames - 1):
        obs, _, terminated, truncated, _ = env.step(action)
        yield obs.get("percept", obs["image"])
        if terminated or truncated:
            return


def record(env: PixelEnv, frames: int, seed: int, policy: str) -> Clip:
    """Play the first ``frames`` frames of episode ``seed``, fewer if it ends; actions follow from the seed too."""
    truth = motion_truth(env)
    pictures, snapshots = [], []
    for picture in _shown(env, frames, seed, policy):
        pictures.append(picture)
        snapshots.append(truth.snapshot())
    return Clip(np.stack(pictures), tuple(snapshots), truth)


@dataclass
class _Scores:
    flow: dict[str, FlowScore]
    segment: dict[str, MaskScore]
    track: dict[str, TrackScore]
    slots: SlotScore


def score_clip(clip: Clip, tools: dict[str, dict[str, Any]], recipe: Recipe, scores: _Scores, seed: int, points: int) -> None:
    """Measure every backend on one clip, into ``scores``. Segmenters get the fields of the first flow backend, as in a stream."""
    frames, shots, truth = clip.frames, clip.snapshots, clip.truth
    pairs = list(itertools.pairwise(shots))
    true = [truth.flow(a, b) for a, b in pairs]
    bodies = [truth.foreground(shot) for shot in shots]
    fields: dict[str, NDArray[np.float32]] = {}
    for name, backend in tools["flow"].items():
        began = time.perf_counter()
        fields[name] = backend.flow(frames[:-1], frames[1:])
        scores.flow[name].seconds += time.perf_counter() - began
        for t, (flow, valid) in enumerate(true):
            scores.flow[name].add(fields[name][t], flow, valid, bodies[t])
    recent = next(iter(fields.values()))
    moving = [np.linalg.norm(truth.flow(b, a)[0] - truth.camera_flow(b, a), axis=-1) > MOVES for a, b in pairs]
    for name, backend in tools["segment"].items():
        for t in range(1, len(frames), 1 if backend.uses_motion else recipe.segment_frames):
            weight = backend.weight(frames[[t, t - 1]], [recent[k] for k in range(t - 1, max(t - 4, -1), -1)])
            scores.segment[name].add(weight, {"body": bodies[t], "moving": moving[t - 1] & bodies[t]})
    rng = np.random.default_rng([seed, 2])
    ys, xs = np.nonzero(bodies[0])
    if len(ys):
        chosen = rng.choice(len(ys), points, replace=len(ys) < points)
        start = np.stack([xs[chosen], ys[chosen]], 1).astype(np.float32)
        start += rng.uniform(-0.25, 0.25, start.shape).astype(np.float32)
        paths, seen = truth.tracks(shots, start)
        for name, backend in tools["track"].items():
            found, kept = backend.track(frames, start)
            scores.track[name].add(found, kept, paths, seen)
    stream = StreamingExtractor(recipe, seed)
    stream.reset(frames[0])
    for t, (flow, valid) in enumerate(true):
        step = stream.step(frames[t + 1])
        small_valid = block_mean(valid.astype(np.float32), recipe.ratio) > 0.999
        body = block_mean(bodies[t].astype(np.float32), recipe.ratio) > 0
        scores.slots.add(step.tracks, step.visible, step.flow, stored(flow, recipe.ratio), small_valid, body)


def score_env(env: PixelEnv, tools: dict[str, dict[str, Any]], settings: ReportSettings) -> dict[str, Any]:
    """Numbers of all backends in one environment, drawn at one size and quality."""
    recipe = Recipe(size=settings.size, percept_size=env.draw_size)
    ratio = recipe.ratio
    scores = _Scores(
        {name: FlowScore(ratio) for name in tools["flow"]},
        {name: MaskScore() for name in tools["segment"]},
        {name: TrackScore(ratio) for name in tools["track"]},
        SlotScore(),
    )
    for episode in range(settings.episodes):
        clip = record(env, settings.frames, settings.seed + episode, settings.policy)
        score_clip(clip, tools, recipe, scores, settings.seed + episode, settings.points)
    groups = {
        kind: {name: score.numbers() for name, score in getattr(scores, kind).items()} for kind in ("flow", "segment", "track")
    }
    return {**groups, "slots": scores.slots.numbers()}


def masked_clips(env: PixelEnv, settings: ReportSettings) -> Iterator[Masked]:
    """Episodes of an environment with the agent's exact masks."""
    truth = ExactMask(env, settings.size)
    for episode in range(settings.episodes):
        pictures: list[NDArray[np.uint8]] = []
        for picture in _shown(env, settings.frames, settings.seed + episode, settings.policy):
            truth.advance() if pictures else truth.begin()
            pictures.append(picture)
        yield Masked(np.stack(pictures), np.stack(truth.shown))


def mask_rows(settings: ReportSettings, tools: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Numbers of the mask backends, one entry an environment or video and percept size."""
    flow, masks = next(iter(tools["flow"].values())), tools["mask"]
    chosen = MASK_ENVS if settings.envs == ENVS else [(name, {}) for name in settings.envs]
    for name, options in chosen:
        for percept in settings.percepts:
            own = name.partition(":")[0] in OWN_DRAWING
            env = _make(name, "exact" if own else settings.qualities[0], percept, settings, **options)
            try:
                numbers = score_masks(masked_clips(env, settings), masks, flow)
            finally:
                env.close()
            yield {"env": name, "options": dict(options), "percept": percept, "mask": numbers}
    for percept in settings.percepts if settings.masks else ():
        assert settings.masks is not None
        for name, clip in read_set(settings.masks, percept, settings.size):
            yield {"env": name, "options": {}, "percept": percept, "mask": score_masks(iter([clip]), masks, flow)}


# -- the whole report ---------------------------------------------------------------------------------------------------


def build_tools(names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Backends by kind and name, and for each that "all" asks for but that cannot be built, one line of why.

    A kind that no name covers gets its embedded backend. Raises ConfigError for a name that is in no registry, and what building a backend
    that was named raises.
    """
    registry = {kind: backends(kind) for kind in EMBEDDED}
    everything = {name for known in registry.values() for name in known}
    for name in names:
        if name not in everything | {"embedded", "all"}:
            raise unknown_name("perception backend", name, everything | {"embedded", "all"})
    tools: dict[str, dict[str, Any]] = {}
    skipped = []
    for kind, known in registry.items():
        first = EMBEDDED[kind]
        wanted = [name for name in known if name != first and (name in names or "all" in names)]
        if "embedded" in names or "all" in names or first in names or not wanted:
            wanted.insert(0, first)
        tools[kind] = {}
        for name in wanted:
            try:
                tools[kind][name] = make_backend(kind, name)
            except LocalmotionError as error:
                if name in names or name == first:
                    raise
                skipped.append(f"{name}: {error}")
    return tools, skipped


def _jobs(settings: ReportSettings) -> list[tuple[str, str, int]]:
    """Environment, quality ("exact" for suites that have only one) and percept size of every row."""
    return [
        (name, quality, percept)
        for name in settings.envs
        for quality in (("exact",) if name.partition(":")[0] in OWN_DRAWING else settings.qualities)
        for percept in settings.percepts
    ]


def _make(name: str, quality: str, percept: int, settings: ReportSettings, **options: Any) -> PixelEnv:
    drawn: Any = "auto" if quality == "exact" else quality
    return make_env(name, size=settings.size, percept_size=percept, quality=drawn, supersample=settings.supersample, **options)


def perception_report(settings: ReportSettings, progress: Callable[[int, int, str], Any] | None = None) -> dict[str, Any]:
    """Measure everything ``settings`` asks for: a JSON-able dict.

    ``rows``: one entry an environment, quality and percept size, with `score_env`'s numbers; ``masks``: one an environment or
    video of a data set; ``warps``: one an percept size. Raises what
    making an environment, a backend or reading a picture raises.
    """
    began = time.monotonic()
    tools, skipped = build_tools(settings.backends)
    pictures = load_pictures(settings.pictures)
    jobs = _jobs(settings)
    total = len(jobs) + len(settings.percepts) + 1
    rows, warps = [], []
    for number, (name, quality, percept) in enumerate(jobs):
        if progress:
            progress(number, total, f"{name} {percept} px {quality}")
        env = _make(name, quality, percept, settings)
        try:
            rows.append({"env": name, "quality": quality, "percept": percept, **score_env(env, tools, settings)})
        finally:
            env.close()
    for number, percept in enumerate(settings.percepts):
        if progress:
            progress(len(jobs) + number, total, f"warped pictures {percept} px")
        warps.append({"percept": percept, "warps": score_warps(pictures, tools, percept, settings.size, settings.seed)})
    if progress:
        progress(total - 1, total, "masks")
    masks = list(mask_rows(settings, tools))
    if progress:
        progress(total, total, "")
    shown = asdict(replace(settings, pictures=None, masks=None))
    shown |= {
        "pictures": settings.pictures.name if settings.pictures else "procedural",
        "masks": settings.masks and settings.masks.name,
    }
    versions = {"opencv": cv2.__version__, "numpy": np.__version__}
    return jsonable(
        {
            "settings": shown,
            "versions": versions,
            "skipped": skipped,
            "seconds": round(time.monotonic() - began, 1),
            "rows": rows,
            "masks": masks,
            "warps": warps,
        }
    )


def jsonable(value: Any) -> Any:
    """Not-a-number becomes null: JSON has none."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def save_report(result: dict[str, Any], out: Path) -> None:
    """Write the JSON. Raises LocalmotionError when the place cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise LocalmotionError(f"{out}: cannot be written ({error.strerror}); give another --out") from error


# -- for people ---------------------------------------------------------------------------------------------------------

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def tables(result: dict[str, Any]) -> list[Table]:
    """The report as tables: title, column names, rows of texts. All lengths in pixels of the stored picture."""
    flow, size, masks, tracks, warped = [], [], [], [], []
    for row in result["rows"]:
        where = (row["env"], row["quality"], str(row["percept"]))
        for name, score in row["flow"].items():
            body, ground = score["stored"]["body"], score["stored"]["ground"]
            cells = [_show(body, key) for key in ("still", "mean", "median", "outliers", "explained")]
            flow.append((*where, name, *cells, _show(ground, "mean"), _show(ground, "outliers"), _show(score, "ms")))
            size.append((*where, name, *(_share(b) for b in score["bins"])))
        for name, score in row["segment"].items():
            cells = [_show(score[mask], key) for mask in ("body", "moving") for key in ("iou", "share", "area")]
            masks.append((*where, name, *cells))
        for name, score in row["track"].items():
            if score:
                age = max(score, key=int)
                cells = [_show(score[age], key) for key in ("moved", "kept", "error", "right", "ghosts")]
                tracks.append((*where, name, age, *cells, *(_show(row["slots"], key) for key in ("used", "body", "explained"))))
    for entry in result["warps"]:
        for warp, score in entry["warps"].items():
            for name, numbers in score["flow"].items():
                part = numbers["stored"]["all"]
                cells = [_show(part, key) for key in ("still", "mean", "median", "outliers", "explained")]
                steps = score["track"].get(EMBEDDED["track"], {}).get("1", {})
                warped.append((warp, str(entry["percept"]), name, *cells, _show(steps, "kept"), _show(steps, "error")))
    agents = [
        (
            " ".join([row["env"], *(f"{key}={value}" for key, value in row["options"].items())]),
            str(row["percept"]),
            name,
            *(_show(score, key) for key in ("iou", "frames", "precision", "recall", "found", "area")),
        )
        for row in result["masks"]
        for name, score in row["mask"].items()
    ]
    head = ("environment", "quality", "percept", "backend")
    edges = (
        [f"{b['from']:g}" + (f"-{b['to']:g}" if b["to"] else "+") for b in result["rows"][0]["flow"][flow[0][3]]["bins"]]
        if flow
        else []
    )
    numbers = ("motion", "EPE", "median", ">1 px", "explained")
    return [
        ("Flow on the moving body, and EPE on the ground", (*head, *numbers, "ground", "ground >1", "ms"), flow),
        ("EPE / true motion on the body, by true motion in pixels", (*head, *edges), size),
        (
            "Foreground: all that can move | what moves now",
            (*head, "IoU", "weight on it", "area", "IoU", "weight on it", "area"),
            masks,
        ),
        (
            "Tracks begun on the body | what the agent's slots hold",
            (*head, "frames", "moved", "kept", "error", "right", "ghosts", "used", "on body", "explained"),
            tracks,
        ),
        (
            "Masks of the agent",
            ("environment or video", "percept", "backend", "IoU", "IoU per frame", "precision", "recall", "area", "true area"),
            agents,
        ),
        (
            f"Warped pictures ({result['settings']['pictures']})",
            ("warp", "percept", "backend", *numbers, "LK kept", "LK error"),
            warped,
        ),
    ]


def _show(numbers: dict[str, Any], key: str) -> str:
    value = numbers.get(key)
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _share(numbers: dict[str, Any]) -> str:
    """Error over motion of a bin with enough pixels to mean something."""
    if numbers["pixels"] < 30 or not numbers.get("still"):
        return "-"
    return f"{numbers['mean'] / numbers['still']:.2f}"


def draw_clip(clip: Clip, backend: Any, pairs: Sequence[int], scale: int = 2) -> NDArray[np.uint8]:
    """A picture to look at: one row a pair with the frame, the true flow, the found flow, the error and the validity, all to one
    colour scale a row (the 99th percentile of the true motion).
    """
    rows = []
    for t in pairs:
        flow, valid = clip.truth.flow(clip.snapshots[t], clip.snapshots[t + 1])
        found = backend.flow(clip.frames[t][None], clip.frames[t + 1][None])[0]
        top = max(float(np.percentile(np.linalg.norm(flow, axis=-1), 99)), 0.05)
        mask = np.repeat((valid * 255).astype(np.uint8)[..., None], 3, -1)
        parts = [clip.frames[t], *(flow_colours(x, top) for x in (flow, found, found - flow)), mask]
        rows.append(np.concatenate(parts, 1))
    sheet = np.concatenate(rows)
    return np.asarray(sheet.repeat(scale, 0).repeat(scale, 1))


def draw_report(settings: ReportSettings, out: Path) -> Iterator[Path]:
    """Write `draw_clip` of the first episode of every environment and percept size, with the first flow backend, into ``out``.

    Yields each path. Raises LocalmotionError when it cannot be written.
    """
    backend = next(iter(build_tools(settings.backends)[0]["flow"].values()))
    for name, quality, percept in _jobs(settings):
        env = _make(name, quality, percept, settings)
        try:
            clip = record(env, settings.frames, settings.seed, settings.policy)
        finally:
            env.close()
        pairs = np.unique(np.linspace(0, len(clip.frames) - 2, 4).astype(int)).tolist()
        path = out / f"{name.replace(':', '_')}_{quality}_{percept}.png"
        try:
            out.mkdir(parents=True, exist_ok=True)
            written = cv2.imwrite(str(path), draw_clip(clip, backend, pairs, 256 // percept or 1)[..., ::-1])
        except OSError as error:
            raise LocalmotionError(f"{out}: cannot be made ({error.strerror}); give another --draw") from error
        if not written:
            raise LocalmotionError(f"{path}: cannot be written; give another --draw")
        yield path
