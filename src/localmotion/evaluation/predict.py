"""Open-loop prediction of clips by pre-trained runs, side by side. It needs video only: no environment, no actions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.errors import ConfigError, LocalmotionError, VideoError
from localmotion.evaluation.heldout import CONTEXT_FRAMES, open_loop_errors, predicts
from localmotion.methods.base import MASK, MOTION, Method
from localmotion.perception.extract import extract_one
from localmotion.recipe import Recipe
from localmotion.runs.load import at_least, load_run
from localmotion.runs.settings import read_config
from localmotion.runs.sharing import run_label
from localmotion.video.listing import VideoRef, usable_videos
from localmotion.video.sample import NoClipsError, Split, WindowSampler
from localmotion.video.store import Clip, ClipStore, ClipStoreWriter

AT_ONCE = 8
"""Largest number of windows that are predicted in one batch."""


@dataclass(frozen=True)
class Prediction:
    """Result of `predict`.

    Its rows are the predictors: ``last_frame`` and each run's rows (with several runs "RUN: row").
    """

    scores: dict[str, dict[str, list[float]]]
    """By row, then "psnr" (dB) and "ssim": means over the windows, for 1, 2, ... frames ahead."""
    pictures: dict[str, NDArray[np.uint8]]
    """By row, and "truth": pictures of the first windows, (N, T, S, S, 3)."""
    windows: int
    """Number of windows that the scores average over."""
    length: int
    """Number of frames of a window. The first ``context`` are observed."""
    context: int = CONTEXT_FRAMES
    rejected: tuple[str, ...] = ()
    """Videos that could not be used, as "ID: reason: detail". Empty if the data is a store."""

    def table(self, kind: str) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table: scores of ``kind`` ("psnr" or "ssim") at some horizons, and the mean over all."""
        ahead = self.length - self.context
        horizons = sorted({h for h in (1, 2, 5, 10, 20, 50, ahead) if h <= ahead})
        digits = 2 if kind == "psnr" else 3
        rows = [
            [row, *(f"{scores[kind][h - 1]:.{digits}f}" for h in horizons), f"{np.mean(scores[kind]):.{digits}f}"]
            for row, scores in self.scores.items()
        ]
        return ["", *(f"{h} ahead" for h in horizons), "mean"], rows


@dataclass(frozen=True)
class _Loaded:
    label: str
    run: RunConfig
    method: Method
    compute: Compute
    recipe: Recipe


def predict(
    checkpoints: Sequence[Path],
    data: Path,
    *,
    clips: int = 4,
    windows: int = 32,
    split: Split = "heldout",
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[int, int | None, str], object] | None = None,
) -> Prediction:
    """Predict windows of clips after 5 observed frames with every run. All runs predict the same windows.

    Args:
        checkpoints: pre-training runs of methods that predict video.
        data: clip store, video file, or folder of videos or frame folders. Videos are extracted for this call with each
            run's recipe.
        clips: number of windows whose pictures are kept.
        windows: number of windows to score. From videos at most one window each.
        split: part of a store, by the first run's ``heldout_fraction``. Videos are not split.
        seed: of the choice of windows and videos.

    DRP has two rows. ``motion`` uses a^agg of the tracked points, as in the paper's Fig. 8. ``zero_motion`` uses no
    information from the future. IPV and APV have the row ``prior``; PVDR has it too, ``prior_sample``, and ``latent_action`` with
    the latent of the true frames. PreLAR, LAPO and MaskLAM have ``latent_action``, with the latent actions of the true frames,
    ``zero_action``, and ``swapped_action``, with those of the next window (see `futures`).

    Raises CheckpointError, StoreError or VideoError, and ConfigError if a run cannot predict from video alone.
    """
    at_least(checkpoints=(len(checkpoints), 1), clips=(clips, 1), windows=(windows, 1), seed=(seed, 0))
    for path in checkpoints:
        read_config(path)  # raises if there is no run
    stored = (data / "store.json").exists()
    refs = [] if stored else usable_videos(data)  # before runs are loaded: a folder without videos is quickly found
    runs = _load(checkpoints, device)
    length = max(min(each.run.pretrain.length for each in runs), CONTEXT_FRAMES + 1)
    with tempfile.TemporaryDirectory(prefix="localmotion-") as scratch:
        if stored:
            stores = {each.recipe.hash(): ClipStore(data) for each in runs}
            rejected: list[str] = []
        else:
            split = "all"
            recipes = {each.recipe.hash(): each.recipe for each in runs}
            stores, rejected = _extracted(data, refs, recipes, length, windows, seed, Path(scratch), progress)
        found = _predict(runs, stores, length, clips, windows, split, seed, progress)
    return replace(found, rejected=tuple(rejected))


def _predict(
    runs: Sequence[_Loaded],
    stores: Mapping[str, ClipStore],
    length: int,
    clips: int,
    windows: int,
    split: Split,
    seed: int,
    progress: Callable[[int, int | None, str], object] | None,
) -> Prediction:
    chosen: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    sums: dict[str, dict[str, NDArray[np.float64]]] = {}
    pictures: dict[str, NDArray[np.uint8]] = {}
    for number, each in enumerate(runs):
        store = stores[each.recipe.hash()]
        if store.size != each.method.image_size:
            raise ConfigError(
                f"{store.path}: clips of side {store.size}, but {each.label} was pre-trained on {each.method.image_size}"
            )
        fraction = runs[0].run.pretrain.heldout_fraction
        needs = each.method.needs(each.run.model, each.run.stage)
        try:
            sampler = WindowSampler(
                store,
                length,
                windows,
                seed,
                split=split,
                heldout_fraction=fraction,
                prefetch=False,
                motion=bool(needs & MOTION),
                mask=bool(needs & MASK),
            )
        except NoClipsError as error:
            raise NoClipsError(f"{error}, or score all clips with --split all") from error
        chosen = chosen or _spread(sampler, windows, seed)
        for indices in np.array_split(np.arange(len(chosen[0])), -(-len(chosen[0]) // AT_ONCE)):  # no batch of one beside others
            begin, part = int(indices[0]), slice(int(indices[0]), int(indices[-1]) + 1)
            batch = {k: v.to(each.compute.device) for k, v in sampler.windows(chosen[0][part], chosen[1][part]).items()}
            with each.compute.own_randomness(), each.compute.autocast():
                torch.manual_seed(seed + begin)
                scores, drawn = open_loop_errors(each.method, batch)
            for name, value in scores.items():
                kind, row = name.split("/")
                row = _row(row, each, runs)
                if row == "last_frame" and number:
                    continue
                total = sums.setdefault(row, {})
                total[kind] = total.get(kind, np.zeros(length - CONTEXT_FRAMES)) + value.double().cpu().numpy() * len(
                    batch["image"]
                )
            if begin < clips:
                for row, picture in drawn.items():
                    found = (picture[: clips - begin] * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
                    name = row if row == "truth" else _row(row, each, runs)
                    if name in ("truth", "last_frame") and number:
                        continue
                    pictures[name] = np.concatenate([pictures[name], found]) if begin else found
            if progress:
                progress(number * len(chosen[0]) + begin + len(batch["image"]), len(runs) * len(chosen[0]), each.label)
    assert chosen is not None
    count = len(chosen[0])
    order = sorted(pictures, key=lambda row: {"truth": 0, "last_frame": 2}.get(row, 1))
    means = {
        row: {kind: (value / count).round(4).tolist() for kind, value in sums[row].items()} for row in order if row != "truth"
    }
    return Prediction(means, {row: pictures[row] for row in order}, count, length)


def _load(checkpoints: Sequence[Path], device: str) -> list[_Loaded]:
    names = [run_label(path) for path in checkpoints]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, checkpoints, strict=True)]
    found = []
    for path, label in zip(checkpoints, labels, strict=True):
        run, method, compute = load_run(path, device=device, plays=False)
        if method.acts:
            raise ConfigError(f"{path}: predicts from actions; give the pre-training run to predict video")
        if not predicts(type(method), run.stage):
            raise ConfigError(f"{path}: a {run.stage} run of method {run.method} does not predict video")
        found.append(_Loaded(label, run, method, compute, run.recipe or Recipe()))
    return found


def _row(row: str, each: _Loaded, runs: Sequence[_Loaded]) -> str:
    return row if row == "last_frame" or len(runs) == 1 else f"{each.label}: {row}"


def _spread(sampler: WindowSampler, windows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Clips and starts (n,) of windows in random order, spread over as many clips as possible.

    No window occurs twice.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sampler.clips))
    starts = {i: rng.permutation(int(sampler.starts[i])) for i in order}
    turns = range(max(len(mine) for mine in starts.values()))
    places = [(int(sampler.clips[i]), int(starts[i][turn])) for turn in turns for i in order if turn < len(starts[i])]
    chosen = np.array(places[:windows], np.int64)
    return chosen[:, 0], chosen[:, 1]


def _extracted(
    data: Path,
    refs: Sequence[VideoRef],
    recipes: Mapping[str, Recipe],
    length: int,
    count: int,
    seed: int,
    scratch: Path,
    progress: Callable[[int, int | None, str], object] | None,
) -> tuple[dict[str, ClipStore], list[str]]:
    """Extract ``count`` random videos of ``data``, which are ``refs``, with each recipe.

    Returns the clips, and reasons for unusable videos.
    """
    refs = [refs[i] for i in np.random.default_rng(seed).permutation(len(refs))]
    stores: dict[str, ClipStore] = {}
    reasons: dict[str, str] = {}
    for key, recipe in recipes.items():
        clips: list[Clip] = []
        for ref in refs:
            if len(clips) == count:
                break
            found = extract_one(ref, recipe, length, 300)
            if isinstance(found, Clip):
                clips.append(found)
            elif isinstance(found, dict):
                reasons[ref.id] = f"{ref.id}: {found['reason']}: {found['detail']}"
            else:  # the cause is the recipe or the machine, not this video
                raise LocalmotionError(found.message)
            if progress:
                progress(len(clips), min(count, len(refs)), "extracting")
        if not clips:
            first = next(iter(reasons.values()))
            raise VideoError(data, "unusable", f"none of {len(refs)} videos has {length} good frames; the first: {first}")
        writer = ClipStoreWriter.open(scratch / key, recipe.size, recipe.to_json(), key, recipe.tracks, count)
        writer.write_shard(0, clips)
        stores[key] = ClipStore(scratch / key)
    if len({(tuple(store.ids), tuple(store.lengths.tolist())) for store in stores.values()}) > 1:
        raise ConfigError(f"{data}: the runs' recipes make different clips of it (frame_stride?), so no window is common to all")
    return stores, list(reasons.values())
