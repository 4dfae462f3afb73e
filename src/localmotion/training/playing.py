"""The training episode in progress. Between any two agent steps it can be saved and replayed, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmotion.acting.observer import Observer
from localmotion.acting.policy import MethodPolicy, Policy
from localmotion.acting.trees import carried, named


class Playing:
    """One episode in progress.

    Args:
        learning: whether the agent plays the episode. Otherwise the actions are random.
        extras: names and shapes of the extras that the method's `act` returns for the replay. The record of an action
            holds its extras. The record of the reset and the records of random episodes hold zeros.
    """

    def __init__(
        self,
        observer: Observer,
        policy: Policy,
        seed: int,
        *,
        learning: bool,
        extras: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.observer, self.policy, self.learning = observer, policy, learning
        self.kept = dict(extras or {})
        self.record: dict[str, Any] = observer.reset(seed) | self._zeros()
        """The newest record, for the replay."""
        self.extras: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self.kept}
        """The policy's extras for each action."""
        self.actions: list[NDArray[np.float32]] = []
        self.total = 0.0
        self.success: float | None = None
        self.cut = False
        """Whether the loop ended it before the environment did."""

    def choose(self) -> NDArray[np.float32]:
        """The policy's action (A,) for the newest record."""
        action: NDArray[np.float32] = self.policy([self.record], not self.actions)[0]
        return action

    def take(self, action: NDArray[np.float32]) -> bool:
        """Take an action in the environment. Returns whether the episode is over."""
        record, done, info = self.observer.step(action)
        chosen = self.policy.extras if isinstance(self.policy, MethodPolicy) else {}
        kept = self._zeros() | {name: value[0] for name, value in chosen.items()}
        self.record = record | kept
        self.actions.append(action)
        for name, values in self.extras.items():
            values.append(kept[name])
        self.total += self.record["reward"]
        if "success" in info:
            self.success = max(self.success or 0.0, float(info["success"]))
        return done

    def saved(self) -> dict[str, Tensor]:
        """The actions with their extras, and the policy's carry.

        With the seed they determine environment, perception and records.
        """
        found = {"actions": torch.from_numpy(np.array(self.actions, np.float32))}
        found |= {f"extra.{name}": torch.from_numpy(np.array(values, np.float32)) for name, values in self.extras.items()}
        if isinstance(self.policy, MethodPolicy):
            found |= named(self.policy.carry)
        return found

    def replay(self, saved: Mapping[str, Tensor], add: Callable[[dict[str, Any]], None]) -> None:
        """Take the saved actions again, call ``add`` with each record, and restore the policy's carry."""
        extras = {name: saved[f"extra.{name}"].numpy() for name in self.kept}
        for index, action in enumerate(saved["actions"].numpy()):
            if isinstance(self.policy, MethodPolicy):
                self.policy.extras = {name: values[index : index + 1] for name, values in extras.items()}
            else:
                self.choose()  # advances the generator of the random policy
            self.take(action)
            add(self.record)
        if isinstance(self.policy, MethodPolicy) and self.actions:
            self.policy.carry = carried(self.policy.method.initial_carry(1), saved)

    def _zeros(self) -> dict[str, NDArray[np.float32]]:
        return {name: np.zeros(shape, np.float32) for name, shape in self.kept.items()}
