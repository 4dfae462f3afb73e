"""The loop of an offline stage.

Batches are sequences of logged episodes, with actions and rewards, from a clip store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from localmotion import ranks
from localmotion.acting.observer import Observer
from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.methods.base import GOAL, MASK, MOTION, VIDEO, Method
from localmotion.recording.logs import EpisodeSampler
from localmotion.runs.rundir import RunDir
from localmotion.training.checks import about_ends
from localmotion.training.loop import Clock, Loop
from localmotion.training.trials import Trials
from localmotion.training.update import Updater
from localmotion.video.lerobot import about_of
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore


class LoggedLoop(Loop):
    """A count is an update. The environment (optional) is used for evaluation only."""

    kind = "train"
    unit = "update"

    def __init__(
        self,
        run: RunConfig,
        out: RunDir,
        store: ClipStore,
        method: Method,
        updater: Updater,
        make: Callable[[], Observer] | None,
    ) -> None:
        online = run.online
        super().__init__(run, out, method, updater, Clock(online.log_every), Clock(online.eval_every), Clock(online.save_every))
        self.store, needs = store, method.needs(run.model, run.stage)
        share = ranks.rows(online.batch_size)
        self.sampler = EpisodeSampler(
            store,
            online.length,
            online.batch_size,
            run.seed,
            motion=bool(needs & MOTION),
            mask=bool(needs & MASK),
            goal=bool(needs & GOAL),
            prioritize_ends=online.prioritize_ends,
            labels=run.labels,
            label_seed=run.seed,
            rows=share,
            lead=(lead := method.lead(run.model, run.stage)),
        )
        self.video: WindowSampler | None = None
        if needs & VIDEO:  # the clips that stages on video learn from
            held = run.pretrain.heldout_fraction
            self.video = WindowSampler(
                store,
                online.length,
                online.batch_size,
                run.seed,
                heldout_fraction=held,
                prefetch=False,
                motion=False,
                rows=share,
                lead=lead,
            )
        self.trials = Trials(run, out, method, self.compute, make, lambda: self.stop.check()) if make else None
        self.ends = about_ends(run)  # to be said at the first end by the task's rules
        self.spent |= {"data": 0.0, "eval": 0.0}

    @property
    def total(self) -> int:
        return self.run.online.updates

    def lines(self) -> list[str]:
        frames = int(self.sampler.frames.sum())
        online = self.run.online
        judged = f"evaluated in {self.run.env}" if self.trials else "not evaluated: no --env"
        return [
            f"{self.run.method} on logged episodes ({self.run.data}): {self.compute.note}",
            f"{len(self.sampler.clips):,} episodes, {frames:,} frames",
            f"{self.total:,} updates ({online.batch_size} x {online.length}); {judged}",
        ]

    def stores(self) -> dict[str, ClipStore]:
        return {"data": self.store} | super().stores()

    def record(self) -> dict[str, Any]:
        transitions = int(self.sampler.frames.sum()) - len(self.sampler.clips)
        about = about_of(self.store.path)  # whoever uses the agent needs the ranges of its actions
        return {"recipe": self.store.recipe, "transitions": transitions, **({"lerobot": about} if about else {})}

    def advance(self) -> None:
        with self.timed("data"):
            found = self.sampler.batch(self.updater.update)
            if self.video:
                found["video_image"] = self.video.batch(self.updater.update)["image"]
            batch = self.compute.to_device(found)
        if self.ends and found["is_terminal"].any():
            say(self.ends)
            self.ends = ""
        self.learn(batch)

    def measure(self, final: bool) -> None:
        if self.trials:
            self.trials(self.counters(), self.count, place=("update", self.count), final=final)

    def state(self) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
        return {"action_dim": self.method.action_dim, "best": self.trials.best if self.trials else None}, {}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        if self.trials:
            self.trials.best = state.get("best")
