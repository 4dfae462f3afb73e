"""The base class of all training loops: clocks, updates, the log, checkpoints, and the end of a run.

Each source of data has a subclass (`pretrain`, `logged`, `online`, `rollout`). The subclass defines what one count is
and where batches come from. `Loop.go` runs these parts:

    resume     from the newest checkpoint, if there is one
    stop       between two counts, if a signal requested it
    evaluate   every eval_every counts, and at the end
    save       every save_every counts, and at the end
    advance    by one count or several: an update, an agent step with its updates, or a rollout with its updates
    log        every log_every updates, and after the last one: losses, gradient norms, seconds
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from localmotion import ranks
from localmotion.acting.observer import Observer
from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.console import progress, say
from localmotion.methods.base import Batch, Method
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.training.endings import recorded
from localmotion.training.interrupt import Interrupted, StopRequest
from localmotion.training.rehearsal import Rehearsal
from localmotion.training.trials import Trials
from localmotion.training.update import Updater, to_floats
from localmotion.video.store import ClipStore


class Clock:
    """Is due if its counter has passed a multiple of ``every`` since the last `set`. Several multiples count as one."""

    def __init__(self, every: int, last: int = 0) -> None:
        self.every, self.last = every, last

    def due(self, count: int) -> bool:
        """Whether it is due at ``count``."""
        return count // self.every > self.last // self.every

    def set(self, count: int) -> None:
        """Mark the clock's work as done at ``count``."""
        self.last = count


class Loop(ABC):
    """One run: a method, its updater, its directory, and the clocks.

    Args:
        log, evaluate, save: the clocks. ``log`` counts updates; the others count the loop's ``unit``.
    """

    kind: ClassVar[str]
    """The "kind" of this loop's lines in metrics.jsonl."""
    unit: ClassVar[Literal["update", "agent_step"]]
    """The unit of `count` and `total`."""
    steady: ClassVar[bool] = True
    """Whether all counts take about the same time.

    If so, the progress bar estimates the remaining time from the first ones.
    """

    def __init__(
        self, run: RunConfig, out: RunDir, method: Method, updater: Updater, log: Clock, evaluate: Clock, save: Clock
    ) -> None:
        self.run, self.out, self.method, self.updater = run, out, method, updater
        self.compute: Compute = updater.compute
        self.logs, self.evaluates, self.saves = log, evaluate, save
        self.stop = StopRequest()
        self.rehearsal = Rehearsal(run) if run.rehearsal.data else None
        self.note = ""
        """Text in the progress bar beside the counts."""
        self.spent: dict[str, float] = {"update": 0.0}
        """Seconds spent, by part of the work."""
        self.evaluations = 0  # complete ones since the start of this process
        self._logged: dict[str, float] = {}  # `seconds()` at the previous line of the log
        self._clock = time.perf_counter()
        self.final: int | None = None
        """Count of the last evaluation of a complete run, once it was made."""
        self._begun: tuple[int, int] | None = None  # count and update at which this process began

    # What a subclass defines ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def total(self) -> int:
        """Number of counts in the whole run."""

    @property
    def count(self) -> int:
        """Number of counts so far."""
        return self.updater.update

    @property
    def played(self) -> int:
        """Number of counts that the run really makes: `total`, rounded up to what the loop makes at once."""
        return self.total

    @property
    def over(self) -> bool:
        """Whether the run has made its last count."""
        return self.count >= self.total

    @property
    def last(self) -> bool:
        """Whether the newest update is the run's last. Its losses are always logged.

        It depends on the run's counts only, so that a run in pieces logs what a whole one does.
        """
        return self.over

    @property
    def may_evaluate(self) -> bool:
        """Whether the loop is in a state in which it can evaluate. If not, a due evaluation waits."""
        return True

    @property
    def may_save(self) -> bool:
        """Whether the loop is in a state in which it can save. If not, a due checkpoint waits."""
        return True

    @abstractmethod
    def lines(self) -> list[str]:
        """Lines that the run prints at its start: first the method and its data, then further decisions."""

    def stores(self) -> dict[str, ClipStore]:
        """The stores that the run learns from, by their setting. It may go on only with the same clips (`rundir.check_stores`)."""
        return {"rehearsal.data": self.rehearsal.store} if self.rehearsal else {}

    def record(self) -> dict[str, Any]:
        """Further entries for environment.json, beside device and parameters."""
        return {}

    @abstractmethod
    def advance(self) -> None:
        """Make one count or several: get a batch and `learn` from it, or act and learn."""

    @abstractmethod
    def measure(self, final: bool) -> None:
        """Evaluate, log the result and print it. ``final``: this is the evaluation at the end of the run."""

    def state(self) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
        """Further contents of a checkpoint: values for JSON, and tensors by file name. Each rank has tensors of its own.

        Weights, optimisers and random state are in every checkpoint.
        """
        return {}, {}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:  # noqa: B027  # nothing by default
        """Restore the values that `state` returned. ``folder``: the checkpoint, for reading its tensors."""

    def start(self) -> None:  # noqa: B027
        """Called instead of `restore` if there is no checkpoint."""

    def counters(self) -> dict[str, int]:
        """The run's counters in every unit, for lines of the log."""
        return {"update": self.updater.update}

    def extra(self) -> dict[str, Any]:
        """Further values for a line of the log."""
        return {}

    # The course of a run ----------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Run to the end.

        If an error ends the run early, writes it to the run's status and raises it (`endings.recorded`).
        """
        read = closing(self.rehearsal) if self.rehearsal else nullcontext()
        with read, recorded(self.out, self.method, self.where, self._save_progress) as self.stop:
            self._resume()
            self._announce()
            self._begun = (self.count, self.updater.update)
            self.out.status("running", **self.where())
            title = f"{self.run.method} {self.run.env}".strip()
            with progress(title, self.played, f"{self.unit.replace('_', ' ')}s", self.count, forecast=self.steady) as advance:
                while not self.over:
                    self.heed()
                    if self.may_evaluate and self.evaluates.due(self.count):
                        self.evaluate()
                    if self.may_save and self.saves.due(self.count):
                        self.save()
                    self.advance()
                    advance(self.count, note=self.note)
            self.finish()
        self.out.status("finished", **self.where())

    def finish(self) -> None:
        """The last evaluation and the last checkpoint of a complete run. A checkpoint that has that evaluation does not need another."""
        if self.final != self.count:
            self.evaluate(final=True)
        self.save(last=True)

    def where(self) -> dict[str, int]:
        """Counters for the run's status, beginning with ``unit``."""
        return {self.unit: self.count}

    def heed(self) -> None:
        """Raise Interrupted on all ranks if a signal asked one of them to stop."""
        self.stop.signum = ranks.most(self.stop.signum)
        self.stop.check()

    def learn(self, batch: Batch) -> None:
        """One update from a batch on the device."""
        if self.rehearsal:
            with self.timed("data"):
                batch = {**batch, **self.compute.to_device(self.rehearsal.batch(self.updater.update))}
        with self.timed("update"):
            if not self.method.training:  # the check saves time: train() visits every module
                self.method.train()
            self.updater.progress = self.count / self.total
            metrics = self.updater.learn(batch)
        if line := self.compute.look_again():
            self.out.log("threads", **self.counters(), threads=torch.get_num_threads())
            say(line)
        if self.logs.due(self.updater.update) or self.last:
            self.logs.set(self.updater.update)
            self._log(metrics)

    def evaluate(self, final: bool = False) -> None:
        """Call `measure`, and leave the run's random generators unchanged. Rank 0 measures, the others wait."""
        with self.timed("eval"):
            try:
                self.method.eval()
                if ranks.leads():
                    with self.compute.own_randomness(), ranks.apart():
                        self.measure(final)
            except Interrupted as stopped:
                ranks.most(stopped.signum, patient=True)
                raise
            finally:
                self.method.train()
            if signum := ranks.most(0, patient=True):
                raise Interrupted(signum)
        self.evaluations += 1
        self.final = self.count if final else self.final
        self.evaluates.set(self.count)  # set at the end: a continued run repeats an evaluation that a signal ended

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside this context to ``part``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Seconds since the start by part, including parts that measure their own time."""
        return self.spent

    def times(self, parts: Mapping[str, float], whole: float) -> dict[str, float]:
        """Time fields of a line of the log. ``parts`` and ``whole`` are seconds since the previous line."""
        return {**{f"seconds/{part}": value for part, value in parts.items()}, "seconds/all": whole}

    def _log(self, metrics: Mapping[str, Tensor]) -> None:
        now, clock = dict(self.seconds()), time.perf_counter()
        parts = {part: value - self._logged.get(part, 0.0) for part, value in now.items()}
        found = to_floats(metrics)
        if not ranks.alone():  # means over the whole batch
            found = dict(zip(found, (ranks.total(torch.tensor([*found.values()])) / ranks.world()).tolist(), strict=True))
        more = {**self.times(parts, clock - self._clock), "skipped": self.updater.check(), **self.extra()}
        self.out.log(self.kind, **self.counters(), **found, **more)
        self._logged, self._clock = now, clock
        self.note = " ".join(f"{key[5:]} {value:.2f}" for key, value in found.items() if key.startswith("loss/"))

    def _announce(self) -> None:
        counts = self.method.parameter_counts()
        together = {} if ranks.alone() else {"ranks": ranks.world()}
        stores = {name: store.contents() for name, store in self.stores().items()}
        known = {"stores": stores} if stores else {}
        self.out.environment({**self.compute.record(), **together, "parameters": counts, **known, **self.record()})
        first, *rest = self.lines()
        about = [self.rehearsal.about] if self.rehearsal else []
        for line in (first, "parameters " + ", ".join(f"{k} {v / 1e6:.2f}M" for k, v in counts.items()), *rest, *about):
            say(line)

    # Saving -----------------------------------------------------------------------------------------------------------------

    def save(self, *, last: bool = False) -> bool:
        """Write a checkpoint. If the newest update was not finite, print a message and return False instead.

        ``last``: the run ends here. It is saved then, too: a skipped update changed nothing, and what came before it would be lost.
        """
        if not (last or self.updater.healthy):
            say(f"not saved: the newest update was not finite; {checkpoint.what_stays(self.out.path / 'checkpoints')}")
            return False
        self.saves.set(self.count)
        if drifted := self._align():
            say(f"the ranks had drifted apart in {len(drifted)} tensors ({drifted[0]}, ...); all go on with those of rank 0")
        own, tensors = self.state()
        clocks = {"metrics_offset": self.out.metrics_offset(), "evaluated": self.evaluates.last, "final": self.final}
        common = {"stage": self.run.stage, "skipped": self.updater.check(), **clocks}
        weights = {"weights": self.method.state_dict(), "optimizer": self.updater.state()}
        if not ranks.alone():
            own, tensors = own | {"ranks": ranks.world()}, tensors | checkpoint.of_ranks(tensors)
        if ranks.leads():
            checkpoint.save(self.out.path / "checkpoints", self.updater.update, tensors=weights | tensors, state=common | own)
        ranks.most(0, patient=True)
        return True

    def _align(self) -> list[str]:
        """Give all ranks the weights and moments of rank 0. Returns the names of those that differed."""
        return ranks.align_({**self.method.state_dict(), **{f"optimizer.{k}": v for k, v in self.updater.state().items()}})

    def _save_progress(self) -> bool:
        """Save if this process made progress. Returns whether it saved."""
        return self._begun is not None and (self.count, self.updater.update) != self._begun and self.save(last=True)

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        found = checkpoint.complete(self.out.path / "checkpoints")
        newest = int(ranks.agree(int(found[-1].name) if found else -1))
        if newest < 0:
            self.out.truncate_metrics(0)
            self.start()
            self._align()
            checkpoint.seed_rank(self.run.seed, 0)
            return
        folder = self.out.path / "checkpoints" / f"{newest:010d}"
        state = checkpoint.read_state(folder)
        checkpoint.load_weights(self.method, checkpoint.read(folder, "weights"), str(folder))
        self.updater.load_state(checkpoint.read(folder, "optimizer"))
        self.updater.resume(int(state["update"]), int(state.get("skipped", 0)))
        self.out.truncate_metrics(int(state["metrics_offset"]))
        self.logs.set(self.updater.update)
        earlier = state.get("next_eval", self.updater.update + 1) - 1  # checkpoints of earlier versions
        self.evaluates.set(int(state.get("evaluated", earlier)))
        self.final = state.get("final")
        self.restore(state, folder)
        self.saves.set(self.count)
        self._align()
        before = int(state.get("ranks", 1))
        if ranks.rank() < before:
            checkpoint.set_rng_state(checkpoint.read_of_rank(folder, "rng"))
        else:
            checkpoint.seed_rank(self.run.seed, self.updater.update)
        say(f"continuing from {self.unit.replace('_', ' ')} {self.count:,} ({folder})")
        if before != ranks.world():
            say(
                f"{before} process(es) before, {ranks.world()} now: the data are the same, and new processes draw their own random numbers"
            )


class ActingLoop(Loop):
    """A loop whose count is an agent step, and which is evaluated in its environment.

    Args:
        repeat: env steps of an agent step.
        make: makes an environment for evaluation.
    """

    kind = "train"
    unit = "agent_step"

    def __init__(
        self, run: RunConfig, out: RunDir, method: Method, updater: Updater, repeat: int, make: Callable[[], Observer]
    ) -> None:
        online = run.online
        clocks = Clock(online.log_every), Clock(online.eval_every, -1), Clock(online.save_every)
        super().__init__(run, out, method, updater, *clocks)
        self.repeat, self.agent_step = repeat, 0
        self.trials = Trials(run, out, method, self.compute, make, lambda: self.stop.check())
        self.spent["eval"] = 0.0

    @property
    @abstractmethod
    def episodes_begun(self) -> int:
        """Number of training episodes, as the log counts them."""

    @property
    def total(self) -> int:
        """Number of agent steps in the whole run."""
        return -(-self.run.online.env_steps // self.repeat)

    @property
    def count(self) -> int:
        return self.agent_step

    def learn(self, batch: Batch) -> None:
        self.updater.agent_step = self.agent_step
        super().learn(batch)

    def where(self) -> dict[str, int]:
        return {"agent_step": self.agent_step, "env_step": self.agent_step * self.repeat}

    def counters(self) -> dict[str, int]:
        return {"update": self.updater.update, **self.where(), "episode": self.episodes_begun}

    def measure(self, final: bool) -> None:
        place = ("env step", self.agent_step * self.repeat)
        self.trials(self.counters(), self.agent_step, place=place, final=final)

    def state(self) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
        dim, best = self.method.action_dim, self.trials.best
        return {"action_dim": dim, "agent_step": self.agent_step, "best": best}, {}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        self.agent_step, self.trials.best = int(state["agent_step"]), state.get("best")
