"""Policies: a trained method with its recurrent state, and random actions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmotion.acting.trees import leaves_of, with_leaves
from localmotion.compute import Compute, uncompiled
from localmotion.methods.base import Method, acted, planned

Policy = Callable[[list[dict[str, Any]], bool], NDArray[np.float32]]


def to_batch(
    records: Sequence[dict[str, Any]], *, first: bool, device: torch.device, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """The newest records of B environments as a batch (B, 1, ...) for `Method.act`, without reward and ``without``."""
    keys = [key for key in records[0] if key not in ("reward", "is_terminal", *without)]
    batch = {key: torch.from_numpy(np.stack([np.asarray(r[key]) for r in records])[:, None]).to(device) for key in keys}
    batch["is_first"] = torch.full((len(records), 1), first, device=device)
    return batch


class Plan(NamedTuple):
    """What a method planned for one action: n frames, K candidates."""

    frames: NDArray[np.uint8]
    """(n, S, S, 3): what the chosen plan expects from this action on, one frame an agent step."""
    ends: NDArray[np.uint8]
    """(K, S, S, 3): the last frame of each candidate."""
    chosen: int
    """The plan's number among them."""


class MethodPolicy:
    """A method as a policy for environments in lockstep. It keeps the recurrent state, ``carry``."""

    def __init__(self, method: Method, compute: Compute, *, explore: bool, window: int) -> None:
        self.method, self.compute, self.explore, self.window = method, compute, explore, window
        self.carry: Any = None
        self.extras: dict[str, NDArray[np.float32]] = {}
        """The method's extras for the newest actions, (E, *shape) by name (`Method.extras`)."""

    def __call__(self, records: list[dict[str, Any]], first: bool) -> NDArray[np.float32]:
        """Actions (E, A) for the newest record of each environment.

        ``first``: all episodes begin with these records.
        """
        if first:
            self.carry = None
        return self._act(to_batch(records, first=first, device=self.compute.device, without=self.method.extras))

    def act(self, record: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Actions (E, A) for records (E, ...) by key. Episodes may begin at different times: ``is_first`` is (E,)."""
        keys = [key for key in record if key not in ("reward", "is_terminal", *self.method.extras)]
        return self._act({key: torch.from_numpy(record[key][:, None]).to(self.compute.device) for key in keys})

    @torch.inference_mode()
    def _act(self, batch: dict[str, Tensor]) -> NDArray[np.float32]:
        count = len(batch["is_first"])
        if self.carry is None:
            self.carry = self.method.initial_carry(count)
        with self.compute.acting(count), uncompiled(self.method):
            action, self.carry, extras = acted(self.method, batch, self.carry, explore=self.explore, window=self.window)
        self.extras = {name: value.float().cpu().numpy() for name, value in extras.items()}
        result: NDArray[np.float32] = action.float().clamp(-1, 1).cpu().numpy()
        return result

    @torch.inference_mode()
    def plan(self) -> Plan | None:
        """What the method planned for the newest action of the first environment. None for a method that shows no plans."""
        first = with_leaves(self.carry, [leaf[:1] for leaf in leaves_of(self.carry)])  # films show no other, and drawing is slow
        with self.compute.own_randomness(), self.compute.acting(), uncompiled(self.method):
            found = planned(self.method, first)
        if found is None:
            return None
        chosen = int(found["chosen"][0])
        return Plan(_pictures(found["plan"][0]), _pictures(found["ends"][0]), chosen)


def _pictures(values: Tensor) -> NDArray[np.uint8]:
    """(N,3,S,S) in [-0.5, 0.5] -> (N,S,S,3) uint8."""
    found: NDArray[np.uint8] = values.float().add(0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return found


def random_policy(action_dim: int, seed: int, *, discrete: bool = False) -> Policy:
    """Uniform random actions; ``discrete``: one-hot vectors."""
    rng = np.random.default_rng(seed)
    if discrete:
        return lambda records, first: np.eye(action_dim, dtype=np.float32)[rng.integers(action_dim, size=len(records))]
    return lambda records, first: rng.uniform(-1, 1, (len(records), action_dim)).astype(np.float32)
