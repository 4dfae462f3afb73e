"""Policies: a trained method with its recurrent state, and random actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmotion.compute import Compute, uncompiled
from localmotion.methods.base import Method, acted

Policy = Callable[[list[dict[str, Any]], bool], NDArray[np.float32]]


def to_batch(records: Sequence[dict[str, Any]], *, first: bool, device: torch.device) -> dict[str, Tensor]:
    """Records of several environments at one time as a batch (B, 1, ...)."""
    keys = [key for key in records[0] if key not in ("reward", "is_terminal")]
    batch = {key: torch.from_numpy(np.stack([np.asarray(r[key]) for r in records])[:, None]).to(device) for key in keys}
    batch["is_first"] = torch.full((len(records), 1), first, device=device)
    return batch


class MethodPolicy:
    """A trained method as a policy with its own recurrent state, ``carry``, for environments stepped in lockstep."""

    def __init__(self, method: Method, compute: Compute, *, explore: bool, window: int) -> None:
        self.method, self.compute, self.explore, self.window = method, compute, explore, window
        self.carry: Any = None

    @torch.inference_mode()
    def __call__(self, records: list[dict[str, Any]], first: bool) -> NDArray[np.float32]:
        """Actions (E, A) for the newest record of each environment; ``first``: the first of an episode."""
        if first:
            self.carry = self.method.initial_carry(len(records))
        batch = to_batch(records, first=first, device=self.compute.device)
        with self.compute.acting(len(records)), uncompiled(self.method):
            action, self.carry, _ = acted(self.method, batch, self.carry, explore=self.explore, window=self.window)
        result: NDArray[np.float32] = action.float().clamp(-1, 1).cpu().numpy()
        return result


def random_policy(action_dim: int, seed: int) -> Policy:
    """Uniform random actions."""
    rng = np.random.default_rng(seed)
    return lambda records, first: rng.uniform(-1, 1, (len(records), action_dim)).astype(np.float32)
