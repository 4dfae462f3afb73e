"""The skeleton of every training loop: clocks, updates, the log, checkpoints, and how a run ends.

Each source of data has a loop of its own (`pretrain`, `logged`, `online`), which says what one count is and where batches come
from. The course of a run is `Loop.go`:

    resume     from the newest checkpoint, if there is one
    stop       between two counts, when a signal asks for it
    evaluate   every eval_every counts, and at the end
    save       every save_every counts, and at the end
    advance    by one count: an update, or an agent step with the updates that are due
    log        every log_every updates: losses, gradient norms, seconds
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.console import progress, say
from localmotion.methods.base import Batch, Method
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.training.endings import recorded
from localmotion.training.interrupt import StopRequest
from localmotion.training.update import Updater, to_floats


class Clock:
    """Is due when its counter has passed a multiple of ``every`` since it was last set; once, however far the counter went."""

    def __init__(self, every: int, last: int = 0) -> None:
        self.every, self.last = every, last

    def due(self, count: int) -> bool:
        """Whether it is due at ``count``."""
        return count // self.every > self.last // self.every

    def set(self, count: int) -> None:
        """What it was due for is done at ``count``."""
        self.last = count


class Loop(ABC):
    """One run: a method, its updater, its directory, and the clocks.

    Args:
        log, evaluate, save: the clocks; ``log`` counts updates, the others count the loop's ``unit``.
    """

    kind: ClassVar[str]
    """Name of its lines in metrics.jsonl."""
    unit: ClassVar[Literal["update", "agent_step"]]
    """What is counted to the end of the run."""
    steady: ClassVar[bool] = True
    """Whether all counts take about the same time, so that the first ones tell how long the run takes."""

    def __init__(
        self, run: RunConfig, out: RunDir, method: Method, updater: Updater, log: Clock, evaluate: Clock, save: Clock
    ) -> None:
        self.run, self.out, self.method, self.updater = run, out, method, updater
        self.compute: Compute = updater.compute
        self.logs, self.evaluates, self.saves = log, evaluate, save
        self.stop = StopRequest()
        self.note = ""
        """What the progress bar shows beside the counts."""
        self.spent: dict[str, float] = {"update": 0.0}
        """Seconds by part of the work."""
        self._logged: dict[str, float] = {}  # `spent` at the line before
        self._clock = time.perf_counter()
        self._begun: tuple[int, int] | None = None  # count and update at which this process began

    # What a loop says of itself ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def total(self) -> int:
        """Counts of the whole run."""

    @property
    def count(self) -> int:
        """Counts made."""
        return self.updater.update

    @property
    def over(self) -> bool:
        """Whether the last count was made."""
        return self.count >= self.total

    @property
    def may_evaluate(self) -> bool:
        """Whether an evaluation that is due may come now."""
        return True

    @property
    def may_save(self) -> bool:
        """Whether a checkpoint that is due may come now."""
        return True

    @abstractmethod
    def lines(self) -> list[str]:
        """What the run tells at its start: what learns from what, then further decisions."""

    def record(self) -> dict[str, Any]:
        """What environment.json keeps beside device and parameters."""
        return {}

    @abstractmethod
    def advance(self) -> None:
        """Make one count: get a batch and `learn` from it, or act and learn."""

    @abstractmethod
    def measure(self, final: bool) -> None:
        """The evaluation: measure, log and say it."""

    def state(self) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
        """What a checkpoint holds beside weights, optimisers and random state: JSON-able values, and tensors by file."""
        return {}, {}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:  # noqa: B027  # nothing by default
        """Take what `state` gave; ``folder`` is the checkpoint's."""

    def start(self) -> None:  # noqa: B027
        """Called in place of `restore` where there is no checkpoint."""

    def counters(self) -> dict[str, int]:
        """Where the run stands, in every unit."""
        return {"update": self.updater.update}

    def extra(self) -> dict[str, Any]:
        """Further values of a line of the log."""
        return {}

    # The course of a run ----------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Run to the end. Raises what ends it early, after writing that down (`endings.recorded`)."""
        with recorded(self.out, self.method, self.where, self._save_progress) as self.stop:
            self._resume()
            self._announce()
            self._begun = (self.count, self.updater.update)
            self.out.status("running", **self.where())
            title = f"{self.run.method} {self.run.env}".strip()
            with progress(title, self.total, f"{self.unit.replace('_', ' ')}s", self.count, forecast=self.steady) as advance:
                while not self.over:
                    self.stop.check()
                    if self.may_evaluate and self.evaluates.due(self.count):
                        self.evaluate()
                    if self.may_save and self.saves.due(self.count):
                        self.save()
                    self.advance()
                    advance(self.count, note=self.note)
            self.finish()
        self.out.status("finished", **self.where())

    def finish(self) -> None:
        """The end of a whole run."""
        self.evaluate(final=True)
        self.save()

    def where(self) -> dict[str, int]:
        """Counters of the run's status, its own unit first."""
        return {self.unit: self.count}

    def learn(self, batch: Batch) -> None:
        """One update from a batch on the device."""
        with self.timed("update"):
            if not self.method.training:  # looked at first: it visits every module
                self.method.train()
            self.updater.progress = self.count / self.total
            metrics = self.updater.learn(batch)
        if line := self.compute.look_again():
            self.out.log("threads", **self.counters(), threads=torch.get_num_threads())
            say(line)
        if self.logs.due(self.updater.update) or self.over:
            self.logs.set(self.updater.update)
            self._log(metrics)

    def evaluate(self, final: bool = False) -> None:
        """`measure`, without a trace in the run's random numbers."""
        with self.timed("eval"):
            try:
                self.method.eval()
                with self.compute.own_randomness():
                    self.measure(final)
            finally:
                self.method.train()
        self.evaluates.set(self.count)  # not before: one that a signal ended is made again

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the seconds within as those of ``part``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Seconds since the start by part, also of parts that time themselves."""
        return self.spent

    def times(self, parts: Mapping[str, float], whole: float) -> dict[str, float]:
        """What a line of the log says of time, from the seconds of each part and of the whole since the line before."""
        return {**{f"seconds/{part}": value for part, value in parts.items()}, "seconds/all": whole}

    def _log(self, metrics: Mapping[str, Tensor]) -> None:
        now, clock = dict(self.seconds()), time.perf_counter()
        parts = {part: value - self._logged.get(part, 0.0) for part, value in now.items()}
        found = to_floats(metrics)
        more = {**self.times(parts, clock - self._clock), "skipped": self.updater.check(), **self.extra()}
        self.out.log(self.kind, **self.counters(), **found, **more)
        self._logged, self._clock = now, clock
        self.note = " ".join(f"{key[5:]} {value:.2f}" for key, value in found.items() if key.startswith("loss/"))

    def _announce(self) -> None:
        counts = self.method.parameter_counts()
        self.out.environment({**self.compute.record(), "parameters": counts, **self.record()})
        first, *rest = self.lines()
        for line in (first, "parameters " + ", ".join(f"{k} {v / 1e6:.2f}M" for k, v in counts.items()), *rest):
            say(line)

    # Saving -----------------------------------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Write a checkpoint; False (said aloud) where the newest update was not finite."""
        if not self.updater.healthy:
            say("not saved: the newest update was not finite; the checkpoint before stays")
            return False
        self.saves.set(self.count)
        own, tensors = self.state()
        clocks = {"metrics_offset": self.out.metrics_offset(), "evaluated": self.evaluates.last}
        common = {"stage": self.run.stage, "skipped": self.updater.check(), **clocks}
        weights = {"weights": self.method.state_dict(), "optimizer": self.updater.state()}
        checkpoint.save(self.out.path / "checkpoints", self.updater.update, tensors=weights | tensors, state=common | own)
        return True

    def _save_progress(self) -> bool:
        """Save if this process made anything that is not saved yet."""
        return self._begun is not None and (self.count, self.updater.update) != self._begun and self.save()

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        found = checkpoint.complete(self.out.path / "checkpoints")
        if not found:
            self.out.truncate_metrics(0)
            self.start()
            return
        folder = found[-1]
        state = checkpoint.read_state(folder)
        checkpoint.load_weights(self.method, checkpoint.read(folder, "weights"), str(folder))
        self.updater.load_state(checkpoint.read(folder, "optimizer"))
        self.updater.resume(int(state["update"]), int(state.get("skipped", 0)))
        self.out.truncate_metrics(int(state["metrics_offset"]))
        self.logs.set(self.updater.update)
        before = state.get("next_eval", self.updater.update + 1) - 1  # checkpoints of earlier versions
        self.evaluates.set(int(state.get("evaluated", before)))
        self.restore(state, folder)
        self.saves.set(self.count)
        checkpoint.set_rng_state(checkpoint.read(folder, "rng"))
        say(f"continuing from {self.unit.replace('_', ' ')} {self.count:,} ({folder})")
