"""The loop of a video stage: pre-training on windows of a clip store. Batches are a pure function of (seed, update)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from localmotion import methods, ranks
from localmotion.compute import choose
from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.errors import StoreError
from localmotion.evaluation.heldout import measure_heldout
from localmotion.methods.base import LABELS, Method
from localmotion.recording.logs import EpisodeSampler
from localmotion.runs.load import built
from localmotion.runs.rundir import RunDir, check_stores, claimed, earlier, read_environment, run_dir
from localmotion.runs.sharing import pinned
from localmotion.training import graphs
from localmotion.training.checks import check_ranks, check_video_stage
from localmotion.training.loop import Clock, Loop
from localmotion.training.transfer import load_pretrained
from localmotion.training.update import Updater
from localmotion.training.windows import windows
from localmotion.video.remote import place_of
from localmotion.video.sample import NoClipsError, Split, WindowSampler, other_fraction
from localmotion.video.store import ClipStore


def pretrain(run: RunConfig, path: Path) -> Path:
    """Run a stage of ``run.method`` that learns from the videos in ``run.data``, in the run directory ``path``.

    Returns ``path``. If ``path`` holds a stopped run with the same settings, that run continues. Raises ConfigError,
    StoreError or CheckpointError with the fix. On a stop signal it saves and raises Interrupted.
    """
    cls = methods.get(run.method)
    check_video_stage(cls, run)
    check_ranks(run)
    with ranks.joined(), claimed(path):
        return _pretrain(pinned(run, earlier(path)), path)


def _pretrain(run: RunConfig, path: Path) -> Path:
    store = ClipStore(place_of(run.data))
    check_stores(path, {"data": store})
    if store.missing:
        say(store.missing_line())
    train, heldout = _sampler(store, run, "train"), _heldout(store, run)
    compute = choose(run, read_environment(earlier(path)))
    torch.manual_seed(run.seed)
    method = built(run, store.size, None).to(compute.device)
    if run.checkpoint:
        say(load_pretrained(method, run).line())
    updater = Updater(method, run, compute, pretrained=bool(run.checkpoint), graph=graphs.wanted(run))
    with closing(train):
        VideoLoop(run, run_dir(path, run), store, method, updater, train, heldout, _labelled(store, run)).go()
    return path


class VideoLoop(Loop):
    """A count is an update. Evaluation uses held-out clips of the store."""

    kind = "pretrain"
    unit = "update"

    def __init__(
        self,
        run: RunConfig,
        out: RunDir,
        store: ClipStore,
        method: Method,
        updater: Updater,
        train: WindowSampler,
        heldout: WindowSampler | None,
        labelled: EpisodeSampler | None = None,
    ) -> None:
        settings = run.pretrain
        clocks = Clock(settings.log_every), Clock(settings.eval_every), Clock(settings.save_every)
        super().__init__(run, out, method, updater, *clocks)
        self.store, self.train, self.heldout, self.labelled = store, train, heldout, labelled
        self.spent["data"] = 0.0
        self._lined = 0  # update of the line before

    @property
    def total(self) -> int:
        return self.run.pretrain.updates

    def lines(self) -> list[str]:
        return [f"{self.run.method}, {self.run.stage} on {len(self.store)} clips ({self.run.data}), {self.compute.note}"]

    def stores(self) -> dict[str, ClipStore]:
        return {"data": self.store} | super().stores()

    def record(self) -> dict[str, Any]:
        return {"recipe": self.store.recipe}

    def advance(self) -> None:
        self.train.load_state_dict({"index": self.updater.update})
        with self.timed("data"):
            found = next(self.train)  # the batch of this update; a thread reads the next one
            if self.labelled:
                known = self.labelled.batch(self.updater.update)
                found |= {key: known[key.removeprefix("labelled_")] for key in LABELS}
            batch = self.compute.to_device(found)
        self.learn(batch)

    def measure(self, final: bool) -> None:
        if self.heldout:
            media, batches = self.out.path / "media", self.run.pretrain.eval_batches
            result = measure_heldout(self.method, self.heldout, batches, self.compute, media, self.run.stage)
            self.out.log("heldout", update=self.updater.update, **result)
            if final and (warning := self.method.about_heldout(result)):
                say(f"warning: {warning}")

    def times(self, parts: Mapping[str, float], whole: float) -> dict[str, float]:
        """Mean seconds per update since the previous line."""
        count = self.updater.update - max(self._lined, self._begun[1] if self._begun else 0)
        self._lined = self.updater.update
        means = {f"seconds/{part}": parts[part] / count for part in ("data", "update")}
        return means | {"updates_per_second": count / (whole - parts.get("eval", 0.0))}


def _sampler(store: ClipStore, run: RunConfig, split: Split) -> WindowSampler:
    """Sampler of one part of the clips. Raises StoreError if it has none, with a fraction that gives it some."""
    try:
        return windows(store, run, split)
    except NoClipsError as error:
        share = other_fraction(store, split, run.pretrain.heldout_fraction)
        if share is None:
            raise
        raise NoClipsError(f"{error}, or set --pretrain.heldout_fraction {share:g} in a new run") from error


def _labelled(store: ClipStore, run: RunConfig) -> EpisodeSampler | None:
    """Sampler of labelled transitions, for stages that need them: those that `decode` has with the same labels and seed."""
    if not methods.get(run.method).needs(run.model, run.stage) & LABELS:
        return None
    settings = run.pretrain
    share = ranks.rows(settings.batch_size)
    return EpisodeSampler(
        store,
        settings.length,
        settings.batch_size,
        run.seed,
        labels=run.labels,
        label_seed=run.seed,
        rows=share,
        lead=methods.get(run.method).lead(run.model, run.stage),
    )


def _heldout(store: ClipStore, run: RunConfig) -> WindowSampler | None:
    """Sampler over held-out clips. Returns None, with a message, if the store is too small to hold any out."""
    try:
        return _sampler(store, run, "heldout")
    except StoreError as error:
        say(f"no held-out figures: {error}")
        return None
