"""Measure how costs grow: updates with batch, length and sizes; extraction with pixels, frames and workers; the replay.

Along an axis one size doubles and the others stay as in preset `small` (with batch 4, to be quick). A cost has a fixed part, which does
not depend on the axis (pictures cost the same for every K), and a growing part. `expected` is the order of the growing part.

* `time's exponent` and `FLOPs' exponent` are the slopes p of cost ~ x^p over all values, including the fixed part: at most the expected
  order. `at the end` is the slope of time between the last two values, where the fixed part has the least weight.
* `without the fixed part` is the order of the growing part, from FLOPs, which have no noise: if f = a + b x^p, then each doubling of x adds
  2^p times what the doubling before it added. This is compared with the expected order; where FLOPs are not counted, `at the end` is.

Seconds are CPU seconds of this process on one thread: the median of a few rounds in which the values alternate, so other work on the
machine affects all values equally. Only `wall` is wall-clock time.
"""

from __future__ import annotations

import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from soak.replay import SPEC

from benchmarks.bench_update import setup
from benchmarks.recorder import Recorder
from localmotion.compute import choose
from localmotion.envs.bodies import render_videos
from localmotion.machine import cores
from localmotion.methods.drp import DRP
from localmotion.models.dae import MaskedMotion, atomic_actions
from localmotion.perception.companding import Companding
from localmotion.perception.extract import extract_folder, extract_one
from localmotion.recipe import Recipe
from localmotion.replay import Replay
from localmotion.runs.settings import compose
from localmotion.training.update import Updater
from localmotion.video.listing import usable_videos

Step = Callable[[], object]
BASE = ("drp", "finetune", "small", "online.batch_size=4")
UPDATE, ENCODER = "update", "motion encoder alone"


@dataclass(frozen=True)
class Axis:
    """One setting of an update that doubles from value to value."""

    name: str
    """Its name in tables and pictures."""
    values: tuple[int, ...]
    settings: tuple[str, ...]
    """As on the command line, with {} in place of the value."""
    expected: tuple[float, float]
    """Least and greatest order of the part of the cost that grows."""
    why: str
    encoder: bool = False
    """Whether the motion encoder is also measured alone, because the axis changes it."""


AXES = (
    Axis("batch", (2, 4, 8, 16), ("online.batch_size={}",), (1, 1), "sequences do not meet"),
    Axis(
        "length T",
        (8, 16, 32, 64),
        ("online.length={}",),
        (1, 2),
        "position after position; attention over time is T^2, but small",
        True,
    ),
    Axis(
        "Atomic Actions K",
        (4, 8, 16, 32),
        ("model.dae.keypoints={}",),
        (1, 2),
        "each is a token; attention in a frame is K^2, but small",
        True,
    ),
    Axis("blocks L", (1, 2, 4, 8), ("model.dae.blocks={}",), (1, 1), "one block after another", True),
    Axis(
        "token width d",
        (32, 64, 128, 256),
        ("model.dae.dim={}",),
        (1, 2),
        "matrices d x d; patches and attention are linear in d",
        True,
    ),
    Axis(
        "state width",
        (128, 256, 512, 1024),
        ("model.world.deter={}", "model.world.hidden={}", "model.world.units={}"),
        (1, 2),
        "matrices width x width in dynamics, rewards, actor, critic; their inputs and outputs are linear",
    ),
    Axis(
        "picture width",
        (12, 24, 48, 96),
        ("model.world.depth={}",),
        (1, 2),
        "convolutions width x width; first and last are linear",
    ),
    Axis("horizon H", (4, 8, 16, 32), ("model.behaviour.horizon={}",), (1, 1), "one imagined step after another"),
)


@dataclass
class Curve:
    """Costs along an axis."""

    axis: str
    what: str
    values: Sequence[float]
    seconds: list[float]
    expected: tuple[float, float]
    why: str
    flops: list[float] = field(default_factory=list)
    """Empty if FLOPs are not counted."""

    def row(self) -> dict[str, object]:
        order = growth(self.flops) if self.flops else None
        # Time gets a tolerance for noise.
        judged, slack = (order, 0.02) if order is not None else (exponent(self.values[-2:], self.seconds[-2:]), 0.2)
        low, high = self.expected
        return {
            "axis": self.axis,
            "of": self.what,
            "values": ", ".join(f"{x:g}" for x in self.values),
            "ms": ", ".join(f"{1e3 * s:.3g}" for s in self.seconds),
            "GFLOP": ", ".join(f"{f / 1e9:.3g}" for f in self.flops),
            "expected": f"{low:g}" if low == high else f"{low:g} to {high:g}",
            "time's exponent": exponent(self.values, self.seconds),
            "at the end": exponent(self.values[-2:], self.seconds[-2:]),
            "FLOPs' exponent": exponent(self.values, self.flops) if self.flops else "",
            "without the fixed part": "" if order is None else order,
            "as expected": "yes" if low - slack <= judged <= high + slack else "no",
            "why": self.why,
        }


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The p of y ~ x^p: slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def growth(ys: Sequence[float]) -> float:
    """The p of y = a + b x^p from the costs at the last three of the doubling values. Differences remove the fixed part a."""
    first, second, third = ys[-3:]
    return math.log2((third - second) / (second - first))


def in_turn(steps: Sequence[Step], rounds: int, clock: Callable[[], float] = time.process_time) -> list[float]:
    """Median seconds of each step over ``rounds`` in which they alternate, after one warm-up call."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(rounds):
        for step, found in zip(steps, times, strict=True):
            began = clock()
            step()
            found.append(clock() - began)
    return [float(np.median(found)) for found in times]


def encoder_step(updater: Updater, batch: dict[str, torch.Tensor]) -> Step:
    """DRP's motion encoder with its masked autoencoding, forward and backward."""
    method = updater.method
    assert isinstance(method, DRP)
    assert isinstance(method.motion, MaskedMotion)
    encoder = method.motion
    motion = atomic_actions(batch["flow"], batch["tracks"], batch["visible"], batch["track_id"], method.config.dae)
    episode = batch["is_first"].cumsum(1)

    def step() -> None:
        with updater.compute.autocast():
            code, _, loss = encoder(motion, episode)
        (code.float().square().mean() + loss).backward()
        encoder.zero_grad(set_to_none=True)

    return step


def steps_along(axis: Axis, base: Sequence[str], values: Sequence[int] = ()) -> dict[str, list[Step]]:
    """The steps to measure along an axis: for each name one step per value. ``base``: method, stage, preset and further settings."""
    found: dict[str, list[Step]] = {UPDATE: [], **({ENCODER: []} if axis.encoder else {})}
    for value in values or axis.values:
        updater, batch = setup(*base, *(setting.format(value) for setting in axis.settings))
        found[UPDATE].append(lambda updater=updater, batch=batch: updater.learn(batch))  # type: ignore[misc]
        if axis.encoder:
            found[ENCODER].append(encoder_step(updater, batch))
    return found


def flops_of(step: Step) -> float:
    """FLOPs of a step's matrix products and convolutions."""
    with Recorder() as recorder:
        step()
    return recorder.flops


def update_curves(rounds: int) -> list[Curve]:
    """Updates of DRP and its motion encoder along `AXES`."""
    found = []
    base = compose(*BASE[:2], preset=BASE[2], env="dmc:walker_walk", settings=[f"threads={torch.get_num_threads()}"])  # type: ignore[arg-type]
    precision = "bf16" if choose(base).bf16 else "fp32"
    for axis in AXES:
        measured = steps_along(axis, (*BASE, f"precision={precision}"))
        flops = {what: [flops_of(step) for step in steps] for what, steps in measured.items()}
        seconds = iter(in_turn([step for steps in measured.values() for step in steps], rounds))
        for what in measured:
            curve = Curve(
                axis.name, what, axis.values, [next(seconds) for _ in axis.values], axis.expected, axis.why, flops[what]
            )
            found.append(curve)
    return found


def extraction_curves(folder: Path, rounds: int) -> list[Curve]:
    """Extraction of videos rendered here, including decoding, along pixels per frame, frames per clip, and workers."""
    videos = folder / "videos"
    render_videos(videos, clips=4, frames=100, size=256, seed=0, bodies=("cheetah", "hopper", "finger", "fish"))
    one = usable_videos(videos)[0]
    for file in list(videos.iterdir()):  # enough work that the start of a worker takes a small share
        for copy in range(3):
            shutil.copy(file, file.with_stem(f"{file.stem}_{copy}"))

    def extract(side: int, frames: int, **dis: int) -> Step:
        return lambda: extract_one(one, Recipe(percept_size=side, backend_options={"dis": dis} if dis else {}), 2, frames)

    def shared(workers: int) -> tuple[float, float]:
        """Wall-clock seconds, and CPU seconds of all processes together."""
        before, began = _processor_seconds(), time.perf_counter()
        extract_folder(videos, folder / f"store{workers}", Recipe(percept_size=128), workers=workers)
        return time.perf_counter() - began, _processor_seconds() - before

    sides, lengths = (64, 128, 192, 256), (25, 50, 100)
    pixels = [float(side * side) for side in sides]
    seconds = in_turn([*(extract(side, 50) for side in sides), *(extract(side, 50, finest_scale=1) for side in sides)], rounds)
    why = "flow and tracking visit each; above 128 px flow's finest scale is 1 instead of 0, which costs a quarter; decoding is fixed"
    found = [Curve("pixels a frame", "extraction", pixels, seconds[:4], (0, 1), why)]
    why = "flow and tracking visit each; decoding is fixed"
    found.append(Curve("pixels a frame", "extraction, flow's finest scale 1", pixels, seconds[4:], (0, 1), why))
    seconds = in_turn([extract(64, frames) for frames in lengths], rounds)
    found.append(Curve("frames a clip", "extraction", lengths, seconds, (1, 1), "frame after frame, points drawn anew every 25"))
    counts = [n for n in (1, 2, 4, 8) if n == 1 or n <= cores()]
    if len(counts) > 1:
        times = [shared(workers) for workers in counts]
        why = "videos are shared out; 0 where other work has the cores"
        found.append(Curve("workers", "extraction, wall", counts, [wall for wall, _ in times], (-1, 0), why))
        why = "the same work, whoever does it; each worker's start is its own"
        found.append(Curve("workers", "extraction, CPU of all", counts, [cpu for _, cpu in times], (0, 0), why))
    return found


def _processor_seconds() -> float:
    """CPU seconds of this process and of all its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def replay_curves(folder: Path, sizes: Sequence[int] = (1_000, 4_000, 16_000), rounds: int = 40) -> list[Curve]:
    """A batch of 8 x 32 from replays of growing size with DRP's records, in memory and in files."""
    rng = np.random.default_rng(0)
    record = {key: rng.integers(0, 100, shape).astype(dtype) for key, (shape, dtype) in SPEC.items()}
    found = []
    for storage in ("memory", "disk"):
        steps: list[Step] = []
        for size in sizes:
            settings: dict[str, Any] = {
                "coders": {"flow": Companding(64)},
                "folder": folder / f"{storage}{size}",
                "storage": storage,
            }
            replay = Replay(SPEC, capacity=size, length=32, **settings)
            for number in range(size):
                replay.add(record, last=number % 250 == 249)
            steps.append(lambda replay=replay: replay.sample(8))  # type: ignore[misc]
        seconds = in_turn(steps, rounds)
        found.append(Curve("records stored", f"replay, {storage}", sizes, seconds, (0, 0), "an episode is drawn by its number"))
    return found


def run(rounds: int = 5, picture: Path | None = None) -> list[dict[str, object]]:
    """One row per curve; ``picture``: path of a PNG with the curves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as place:
            curves = [*update_curves(rounds), *extraction_curves(Path(place), rounds), *replay_curves(Path(place))]
    finally:
        torch.set_num_threads(threads)
    if picture:
        from benchmarks.scaling_picture import draw

        draw(curves, picture)
    return [curve.row() for curve in curves]
