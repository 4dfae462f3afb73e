"""The loop of an online stage of several ranks: each plays an environment of its own into a replay of its own.

All ranks take one agent step at a time, and all count the steps of all. After each they exchange whether the agent plays
yet and which episodes have ended. So they agree about when to learn, to evaluate, to save and to end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localmotion import ranks
from localmotion.acting.observer import Observer
from localmotion.config import RunConfig
from localmotion.errors import SimulationError
from localmotion.methods.base import Method
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.training.online import OnlineLoop
from localmotion.training.playing import Playing
from localmotion.training.update import Updater


class SpreadLoop(OnlineLoop):
    """As `OnlineLoop`, with R ranks. An agent step of each is R agent steps of the run.

    Updates begin when the agent plays on all ranks. Then one follows every ``train_every`` agent steps of the run, each
    with sequences of all replays. Checkpoints are written at any agent step, because episodes of ranks do not end together.
    """

    def __init__(self, run: RunConfig, out: RunDir, observer: Observer, method: Method, updater: Updater, repeat: int) -> None:
        super().__init__(run, out, observer, method, updater, repeat)
        self.all_learn = False  # whether the agent plays on all ranks
        self.elsewhere = 0  # complete episodes of the other ranks

    @property
    def played(self) -> int:
        return -(-self.total // ranks.world()) * ranks.world()

    @property
    def may_evaluate(self) -> bool:
        return self.all_learn

    @property
    def may_save(self) -> bool:
        return self.all_learn

    @property
    def episodes_begun(self) -> int:
        return self.episode + self.elsewhere

    def _warm_up(self) -> None:
        """Not when this rank begins to play, but when all ranks do (`advance`)."""

    def advance(self) -> None:
        """One agent step of each rank, and the updates that are due."""
        before, faults, done = self.agent_step, self.faults, False
        try:
            done = self._act()
        except SimulationError as error:
            self._broken(error)
        self.agent_step += ranks.world()
        ended: Playing | None = None
        if self.playing:
            self.playing.cut = not done and (self.agent_step >= self.total or self._prefilled(self.playing))
            done = done or self.playing.cut
            self.replay.add(self.playing.record, last=done)
            ended = self.playing if done else None
        learns = self.may_learn and (self.playing is None or self.playing.learning)
        self._exchange(learns, ended, self.faults > faults)
        if self.all_learn:
            while self.updater.update < self.run.online.warmup_updates:
                self.heed()
                self._update()
            every = self.run.online.train_every
            for _ in range(self.agent_step // every - before // every):
                self._update()
        if ended:
            self._end(ended)

    def _act(self) -> bool:
        """Begin an episode if there is none, and take a step in it. Returns whether it is over."""
        if self.playing is None:
            self._begin()
        assert self.playing
        with self.timed("act"):
            if self.method.training:
                self.method.eval()
            action = self.playing.choose()
        return self.playing.take(action)

    def _exchange(self, learns: bool, ended: Playing | None, fault: bool) -> None:
        """Learn whether the agent plays on all ranks. Rank 0 logs the episodes and faults of the others."""
        mine = [float(learns), float(ended is not None), float(fault), 0.0, 0.0, 0.0, np.nan, 0.0]
        if ended:
            success = np.nan if ended.success is None else ended.success
            mine[3:] = ended.total, len(ended.actions), not ended.learning, success, ended.cut
        told = ranks.tell(mine)
        self.all_learn = all(row[0] for row in told)
        for rank, (_, over, broke, total, length, random, success, cut) in enumerate(told):
            if rank == ranks.rank():
                continue
            self.elsewhere += int(over or broke)
            if over:
                self._log_episode(total, int(length), bool(random), None if np.isnan(success) else success, bool(cut))
            if broke:
                self.out.log("fault", **self.counters(), error=f"the environment of rank {rank} failed")

    # Saving -----------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
        values, tensors = super().state()
        own = {key: values[key] for key in ("episode", "phase", "playing", "replay")}
        own |= {"elsewhere": self.elsewhere, "all_learn": self.all_learn}
        text = bytearray(json.dumps(own).encode())
        return values, {**tensors, "own": {"json": torch.frombuffer(text, dtype=torch.uint8)}}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        own = checkpoint.read_own(folder) if int(state.get("ranks", 1)) == ranks.world() else {}
        super().restore({**state, **own}, folder)
        self.elsewhere = int(own["elsewhere"])
        self.all_learn = bool(own.get("all_learn", False))  # an evaluation that is due takes place before the next step

    def _episodes_in(self, path: Path) -> list[int]:
        found: list[int] = checkpoint.read_own(path)["replay"]["episodes"]
        return found
