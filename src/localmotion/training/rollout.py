"""The loop of an on-policy stage: environments run in lockstep; the method learns from each rollout and drops it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmotion import ranks
from localmotion.acting.episodes import FAULTS, episode_seed
from localmotion.acting.observer import SHOWN, make_observer
from localmotion.acting.policy import MethodPolicy
from localmotion.acting.trees import carried, named
from localmotion.compute import uncompiled
from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.envs.vector import VectorEnv
from localmotion.errors import EnvError
from localmotion.methods.base import Method
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.training.loop import ActingLoop
from localmotion.training.update import Updater

Record = dict[str, NDArray[Any]]


class RolloutLoop(ActingLoop):
    """All environments take ``rollout.steps`` agent steps with the policy.

    Frozen parts of the method then encode the rollout once, and ``rollout.epochs`` x ``rollout.minibatches`` updates learn
    from it. A count is an agent step of one environment, so one rollout makes many counts.

    A batch has B environments and T = steps + 1 positions. Its keys are those of a replay batch and the extras of
    `Method.act`. Position 0 is the last position of the previous rollout, so each action is in the same batch as the
    frame from which the policy chose it. The position after the end of an episode is the reset of the next episode
    (``is_first``), with a zero action. The environment does not step there. Where an environment fails, the reset comes in place of the
    step that failed: the record before it is the last of its episode.

    With several ranks each has an equal part of the environments and learns from its own.
    """

    def __init__(self, run: RunConfig, out: RunDir, envs: VectorEnv, method: Method, updater: Updater, repeat: int) -> None:
        super().__init__(run, out, method, updater, repeat, self._judge)
        self.envs = envs
        count = envs.num_envs
        self.policy = MethodPolicy(method, self.compute, explore=True, window=run.rollout.steps + 1)
        self.episodes = np.zeros(count, np.int64)  # number of episodes begun, by environment
        self.actions: list[list[NDArray[np.float32]]] = [[] for _ in range(count)]  # of the current episodes
        self.returns = np.zeros(count)
        self.success = np.full(count, np.nan)
        self.ended = np.ones(count, bool)  # whether an environment needs a reset
        self.now: Record = {}
        self.ends: list[list[float]] = []  # return, length and success of the episodes that ended in this rollout
        self.failures = np.zeros(count, np.int64)  # since the last complete episode, by environment
        self.faults: list[tuple[int, str]] = []  # environments that failed in this rollout, and why
        self.elsewhere = 0  # episodes begun by the other ranks
        self.spent |= {"act": 0.0, "env": 0.0}

    @property
    def episodes_begun(self) -> int:
        return int(self.episodes.sum()) + self.elsewhere

    @property
    def played(self) -> int:
        whole = self.run.rollout.agent_steps
        return -(-self.total // whole) * whole

    @property
    def last(self) -> bool:
        rollout = self.run.rollout
        return self.updater.update >= self.played // rollout.agent_steps * rollout.epochs * rollout.minibatches

    def lines(self) -> list[str]:
        rollout, budget = self.run.rollout, self.run.online.env_steps
        more = f" (whole rollouts: the budget is {budget:,} env steps)" if self.played != self.total else ""
        return [
            f"{self.run.method} on {self.run.env}: {self.compute.note}",
            f"{self.played:,} agent steps = {self.played * self.repeat:,} env steps{more} in {rollout.environments} environments;"
            f" {rollout.epochs * rollout.minibatches} updates after every {rollout.steps} agent steps of each environment",
        ]

    def record(self) -> dict[str, Any]:
        return {"env": self.envs.description, "recipe": self.run.recipe.to_json() if self.run.recipe else None}

    # Playing and learning ---------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One rollout, and the updates that learn from it."""
        begun = self._place()
        try:
            records = self._played()
        except EnvError:  # the run may save: as if this rollout had not begun
            self._go_back(*begun)
            raise
        rollout = self.run.rollout
        batch = {key: torch.from_numpy(np.stack([record[key] for record in records], 1)) for key in self.now}  # (E, T, ...)
        batch = self._encoded(batch)
        order = np.random.default_rng([self.run.seed, self.agent_step])
        for _ in range(rollout.epochs):
            for part in np.array_split(order.permutation(self.envs.num_envs), rollout.minibatches):
                rows = torch.from_numpy(np.sort(part))
                self.learn(self.compute.to_device({key: value[rows] for key, value in batch.items()}))
        self.agent_step += rollout.agent_steps
        self._hear()

    def _place(self) -> tuple[Any, ...]:
        """Where the episodes are, for `_go_back`."""
        actions = [list(taken) for taken in self.actions]
        counts = (self.episodes, self.returns, self.success, self.ended, self.failures)
        return self.now, self.policy.carry, actions, *(value.copy() for value in counts)

    def _go_back(self, now: Record, carry: Any, actions: list[list[NDArray[np.float32]]], *counts: NDArray[Any]) -> None:
        """Set the counts back. The environments are not: they are made again when the run goes on."""
        self.now, self.policy.carry, self.actions = now, carry, actions
        self.episodes, self.returns, self.success, self.ended, self.failures = counts

    def _played(self) -> list[Record]:
        """The records of a rollout, T = steps + 1."""
        if not self.now:
            self.now = self._next(np.zeros((self.envs.num_envs, self.method.action_dim), np.float32))
        records = [self.now]
        for _ in range(self.run.rollout.steps):
            with self.timed("act"):
                if self.method.training:
                    self.method.eval()
                action = self.policy.act(self.now)
            with self.timed("env"):
                self.now = self._next(action)
            records.append(self.now)
        return records

    def _encoded(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rollout with what the method's frozen parts make of it (`Method.encodes`).

        Parts of it are as large as a minibatch, so this takes no more of the device's memory than an update. The number of goals
        changes between rollouts, so compiled parts would compile again.
        """
        keys = self.method.encodes
        if not keys:
            return batch
        found: list[dict[str, Tensor]] = []
        with self.timed("update"), torch.no_grad(), self.compute.autocast(), uncompiled(self.method):
            for rows in torch.arange(self.envs.num_envs).tensor_split(self.run.rollout.minibatches):
                part = {key: batch[key][rows] for key in (*sorted(keys), "is_first")}
                found.append({key: value.cpu() for key, value in self.method.encoded(self.compute.to_device(part)).items()})
        kept = {key: value for key, value in batch.items() if key not in keys}
        return kept | {key: torch.cat([part[key] for part in found]) for key in found[0]}

    def _next(self, action: NDArray[np.float32]) -> Record:
        """The records (E, ...) after the actions (E, A).

        An environment whose episode has ended is reset instead of stepped, one that fails is reset.
        """
        fresh, playing = self.ended.copy(), ~self.ended
        reward = np.zeros(len(fresh), np.float32)
        terminal = np.zeros(len(fresh), bool)
        observed: dict[str, NDArray[Any]] = {}
        if playing.any():
            observed, gained, terminated, truncated, info = self.envs.step(action)
            fresh |= self._failed(info)
            playing &= ~fresh
            reward[playing], terminal[playing] = gained[playing], terminated[playing]
            self.ended = playing & (terminated | truncated)
            for index in np.flatnonzero(playing).tolist():
                self.actions[index].append(action[index].copy())
                self.returns[index] += gained[index]
                if "success" in info:
                    self.success[index] = np.fmax(self.success[index], float(info["success"][index]))
        for index in np.flatnonzero(self.ended & playing).tolist():
            self.ends.append([float(self.returns[index]), len(self.actions[index]), float(self.success[index])])
            self._log_episode(*self.ends[-1])
            self.failures[index] = 0
        if fresh.any():
            observed, fresh = self._reset(fresh)
            self.ended &= ~fresh
            terminal &= ~fresh
        extras = self.policy.extras or {
            name: np.zeros((len(fresh), *shape), np.float32) for name, shape in self.method.extras.items()
        }
        led = {"action": np.asarray(action, np.float32).copy(), "reward": reward, **{k: v.copy() for k, v in extras.items()}}
        for value in led.values():
            value[fresh] = 0
        pictures = {key: observed[key].copy() for key in SHOWN if key in observed}
        return {**pictures, **led, "is_terminal": terminal, "is_first": fresh}

    def _reset(self, mask: NDArray[np.bool_]) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """Begin the next episode in the environments of ``mask``. Returns observations and where an episode began.

        Its seed depends on the run's seed, environment and episode. An environment that fails in its reset begins another episode, and so
        do all those of a worker that dies.
        """
        observed, begun = dict[str, NDArray[Any]](), mask.copy()
        while mask.any():
            for index in np.flatnonzero(mask).tolist():
                self.episodes[index] += 1
                self.actions[index], self.returns[index], self.success[index] = [], 0.0, np.nan
            observed, info = self.envs.reset(seed=self._seeds(), options={"reset_mask": mask})
            mask = self._failed(info)
            begun |= mask
        return observed, begun

    def _seeds(self) -> list[int | None]:
        count = self.envs.num_envs
        places = range(self.envs.first, self.envs.first + count)
        whole = count * ranks.world()
        return [
            episode_seed(self.run.seed, "train", place + whole * int(episode))
            for place, episode in zip(places, self.episodes, strict=True)
        ]

    def _failed(self, info: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Log the environments that failed in a call, (E,). Raises EnvError for one that keeps failing."""
        found = np.zeros(self.envs.num_envs, bool)
        for index, error in info["faults"].items():
            found[index], number = True, self.envs.first + index
            self.failures[index] += 1
            self.faults.append((number, error))
            self._log_fault(number, error)
            say(f"{error}; the episode of environment {number} ends, and a fresh one begins")
        for index in np.flatnonzero(self.failures >= FAULTS).tolist():
            number, count = self.envs.first + index, self.failures[index]
            raise EnvError(
                f"environment {number}: {info['faults'][index]} ({count} failures without a complete episode between them)"
            )
        return found

    def _log_fault(self, environment: int, error: str) -> None:
        self.out.log("fault", **self.counters(), error=error, environment=environment)

    def _log_episode(self, total: float, length: float, success: float) -> None:
        extra = {} if np.isnan(success) else {"success": success}
        self.out.log("episode", **self.counters(), **{"return": total, "length": int(length), "random": False}, **extra)

    def _hear(self) -> None:
        """Rank 0 logs the episodes of the others, too."""
        if not ranks.alone():
            faults = torch.frombuffer(bytearray(json.dumps(self.faults).encode()), dtype=torch.uint8)
            said = {"ends": torch.tensor(self.ends, dtype=torch.float64).view(-1, 3), "episodes": torch.from_numpy(self.episodes)}
            said["faults"] = faults
            heard = ranks.collect(said)
            self.elsewhere = sum(int(each["episodes"].sum()) for each in heard) - int(self.episodes.sum())
            for each in heard[1:]:
                for row in each["ends"].tolist():
                    self._log_episode(*row)
                for number, error in json.loads(bytes(each["faults"].numpy())):
                    self._log_fault(number, error)
        self.ends, self.faults = [], []

    # Measuring and saving ---------------------------------------------------------------------------------------------------

    def _judge(self) -> Any:
        return make_observer(self.run, None, size=self.method.image_size)

    def state(self) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
        values, _ = super().state()
        dim = self.method.action_dim
        tensors = {f"now.{key}": torch.from_numpy(value) for key, value in self.now.items()}
        tensors |= named(self.policy.carry)
        tensors |= {
            f"actions.{i}": torch.from_numpy(np.array(x, np.float32).reshape(-1, dim)) for i, x in enumerate(self.actions)
        }
        tensors |= {"ended": torch.from_numpy(self.ended), "returns": torch.from_numpy(self.returns)}
        everywhere = ranks.gather(torch.from_numpy(self.episodes)).tolist()
        return values | {"episodes": everywhere}, {"rollout": tensors | {"success": torch.from_numpy(self.success)}}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Restore every environment: reset it with its episode's seed and repeat the episode's actions.

        An environment that fails meanwhile begins a new episode. With another number of ranks than before, all do.
        """
        super().restore(state, folder)
        count = self.envs.num_envs
        self.episodes = np.array(state["episodes"], np.int64)[self.envs.first : self.envs.first + count]
        self.elsewhere = sum(state["episodes"]) - int(self.episodes.sum())
        if int(state.get("ranks", 1)) != ranks.world():
            return
        saved = checkpoint.read_of_rank(folder, "rollout")
        self.now = {key[4:]: value.numpy() for key, value in saved.items() if key.startswith("now.")}
        self.ended, self.returns, self.success = (saved[key].numpy() for key in ("ended", "returns", "success"))
        played = [saved[f"actions.{index}"].numpy() for index in range(count)]
        self.actions = [list(actions) for actions in played]
        if self.now:
            longest, lengths = max(map(len, played)), np.array([len(actions) for actions in played])
            for step in range(longest + 1):  # shorter episodes begin later, so that all end together
                if (begins := (lengths == longest - step) & ~self.ended).any():
                    info = self.envs.reset(seed=self._seeds(), options={"reset_mask": begins})[1]
                    self.ended |= self._failed(info)
                if step < longest and self.envs.running.any():
                    taken = [x[step - longest] if len(x) >= longest - step else np.zeros(self.method.action_dim) for x in played]
                    self.ended |= self._failed(self.envs.step(np.array(taken, np.float32))[-1])
            self.policy.carry = carried(self.method.initial_carry(count), saved)
