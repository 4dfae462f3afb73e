"""The training episode that an online run is playing: between any two agent steps it can be saved and played again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmotion.acting.observer import Observer
from localmotion.acting.policy import MethodPolicy, Policy
from localmotion.training.trees import leaves_of, with_leaves


class Playing:
    """One episode in progress. ``learning``: the agent plays it; else random actions do."""

    def __init__(self, observer: Observer, policy: Policy, seed: int, *, learning: bool) -> None:
        self.observer, self.policy, self.learning = observer, policy, learning
        self.record: dict[str, Any] = observer.reset(seed)
        """The newest record, for the replay."""
        self.actions: list[NDArray[np.float32]] = []
        self.total = 0.0
        self.success: float | None = None

    def choose(self) -> NDArray[np.float32]:
        """The policy's action (A,) for the newest record."""
        action: NDArray[np.float32] = self.policy([self.record], not self.actions)[0]
        return action

    def take(self, action: NDArray[np.float32]) -> bool:
        """Take an action in the environment; whether the episode is over."""
        self.record, done, info = self.observer.step(action)
        self.actions.append(action)
        self.total += self.record["reward"]
        if "success" in info:
            self.success = max(self.success or 0.0, float(info["success"]))
        return done

    def saved(self) -> dict[str, Tensor]:
        """Its actions and the policy's carry. Environment, perception and records follow from the actions and the seed."""
        found = {"actions": torch.from_numpy(np.array(self.actions, np.float32))}
        if isinstance(self.policy, MethodPolicy):
            found |= {f"carry.{i:03d}": leaf for i, leaf in enumerate(leaves_of(self.policy.carry))}
        return found

    def replay(self, saved: Mapping[str, Tensor], add: Callable[[dict[str, Any]], None]) -> None:
        """Take the saved actions again, ``add`` each record, and give the policy its carry back."""
        for action in saved["actions"].numpy():
            if not isinstance(self.policy, MethodPolicy):
                self.choose()  # its generator moves on
            self.take(action)
            add(self.record)
        if isinstance(self.policy, MethodPolicy) and self.actions:
            leaves = [saved[key].to(self.policy.compute.device) for key in sorted(saved) if key.startswith("carry.")]
            self.policy.carry = with_leaves(self.policy.method.initial_carry(1), leaves)
