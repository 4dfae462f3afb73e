"""Replay: transitions in, training sequences out.

Time convention (docs/decisions/0001): a record holds what led to its frame. An episode of n agent steps has n + 1 records; record 0 is
the reset, with is_first, a zero action, zero reward and no motion. Only complete episodes are sampled (IPV 2.6), a sequence
never crosses an episode, and `is_first` is forced at its start so that every sequence begins from the zero state.

Records live in preallocated arrays that grow by chunks; the oldest whole episodes are overwritten when the capacity is reached.
Saving is append-only: one safetensors file an episode, written once (atomic rename), so a checkpoint costs what is new.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from localmotion.errors import CheckpointError, LocalmotionError

Record = Mapping[str, Any]


class Replay:
    """Buffer of complete episodes.

    Args:
        spec: per key, the shape and dtype of one record (image (S,S,3) uint8, action (A,) float32, reward () float32,
            is_terminal () bool, and for methods with motion: flow, tracks, visible, track_id as in `StepMotion`).
        capacity: records kept; the oldest episodes leave first.
        length: window length T of a training sequence, in records.
        prioritize_ends: draw the start from an extended range and clamp it, so that episode ends are met more often (IPV 2.6).
        seed: of the sampling; the generator's state is part of `state()`.
    """

    def __init__(
        self,
        spec: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        capacity: int,
        length: int,
        prioritize_ends: bool = False,
        seed: int = 0,
    ) -> None:
        self.spec = {key: (tuple(shape), np.dtype(dtype)) for key, (shape, dtype) in spec.items()}
        self.capacity, self.length, self.prioritize_ends = capacity, length, prioritize_ends
        self.rng = np.random.default_rng(seed)
        self.episodes: deque[tuple[int, dict[str, NDArray[Any]]]] = deque()  # (serial, arrays)
        self.open: list[Record] = []
        self.records = 0
        self.serial = 0
        self.dropped = 0

    @property
    def bytes_per_record(self) -> int:
        """Memory of one record."""
        return int(sum(np.prod(shape, dtype=int) * dtype.itemsize for shape, dtype in self.spec.values()))

    def describe(self) -> str:
        """What the buffer needs when full, in words: printed before a run starts."""
        size = self.bytes_per_record
        return f"replay: {size / 1e3:.1f} kB a record, {self.capacity:,} records = {size * self.capacity / 1e9:.1f} GB when full"

    def add(self, record: Record, *, last: bool) -> None:
        """Append one record to the open episode; ``last`` closes it. Episodes shorter than T records are dropped (counted).

        Raises LocalmotionError for a key, shape or non-finite value that does not fit.
        """
        if set(record) != set(self.spec):
            raise LocalmotionError(f"replay record has keys {sorted(record)}, expected {sorted(self.spec)}")
        if not np.isfinite(record["reward"]):
            raise LocalmotionError(f"reward {record['reward']!r} is not finite; the environment is broken or has diverged")
        self.open.append({key: np.asarray(value, self.spec[key][1]) for key, value in record.items()})
        for key, (shape, _) in self.spec.items():
            if self.open[-1][key].shape != shape:
                raise LocalmotionError(f"replay record {key!r} has shape {self.open[-1][key].shape}, expected {shape}")
        if last:
            self._close()

    def _close(self) -> None:
        if len(self.open) < self.length:
            self.dropped += 1
        else:
            self._insert(self.serial, {key: np.stack([r[key] for r in self.open]) for key in self.spec})
            self.serial += 1
        self.open = []

    def _insert(self, serial: int, arrays: dict[str, NDArray[Any]]) -> None:
        self.episodes.append((serial, arrays))
        self.records += len(arrays["reward"])
        while self.records > self.capacity and len(self.episodes) > 1:
            _, old = self.episodes.popleft()
            self.records -= len(old["reward"])

    def __len__(self) -> int:
        return self.records

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """A batch of sequences (B, T, ...) on the CPU: uniform episode, then a window within it.

        Raises LocalmotionError while no complete episode of at least T records is stored.
        """
        if not self.episodes:
            raise LocalmotionError(
                f"replay holds no complete episode of at least {self.length} records yet; raise online.prefill or lower online.length"
            )
        out = {key: np.empty((batch_size, self.length, *shape), dtype) for key, (shape, dtype) in self.spec.items()}
        chosen = self.rng.integers(len(self.episodes), size=batch_size)
        for row, index in enumerate(chosen):
            arrays = self.episodes[index][1]
            spare = len(arrays["reward"]) - self.length
            if self.prioritize_ends:
                start = min(int(self.rng.integers(spare + self.length + 1)), spare)
            else:
                start = int(self.rng.integers(spare + 1))
            for key, target in out.items():
                target[row] = arrays[key][start : start + self.length]
        batch = {key: torch.from_numpy(value) for key, value in out.items()}
        is_first = torch.zeros(batch_size, self.length, dtype=torch.bool)
        is_first[:, 0] = True
        batch["is_first"] = is_first
        # What led to the first frame of a window lies before it: unknown, like at a reset.
        batch["action"][:, 0] = 0
        if "visible" in batch:
            batch["visible"][:, 0] = False
            batch["flow"][:, 0] = 0
        return batch

    # Saving -----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able position: which episodes, the counters, the sampler's random state. The open episode is not part of it."""
        return {
            "episodes": [serial for serial, _ in self.episodes],
            "serial": self.serial,
            "dropped": self.dropped,
            "rng": self.rng.bit_generator.state,
        }

    def save(self, folder: Path) -> None:
        """Write the episodes that ``folder`` does not hold yet and remove the ones that have left the buffer before the last save."""
        folder.mkdir(parents=True, exist_ok=True)
        for serial, arrays in self.episodes:
            path = folder / f"episode_{serial:07d}.safetensors"
            if not path.exists():
                temporary = path.with_suffix(".tmp")
                save_file(arrays, temporary)
                os.replace(temporary, path)

    def prune(self, folder: Path, keep: set[int]) -> None:
        """Delete saved episodes that no kept checkpoint names."""
        for path in folder.glob("episode_*.safetensors"):
            if int(path.stem.split("_")[1]) not in keep:
                path.unlink()

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Restore what `state` names. Raises CheckpointError for a missing or unreadable episode."""
        self.episodes.clear()
        self.open, self.records = [], 0
        for serial in state["episodes"]:
            path = folder / f"episode_{serial:07d}.safetensors"
            try:
                arrays = load_file(path)
            except Exception as error:
                raise CheckpointError(
                    f"{path}: replay episode cannot be read ({error}); restore it or start a new run"
                ) from error
            for key, (shape, dtype) in self.spec.items():
                if key not in arrays or arrays[key].shape[1:] != shape or arrays[key].dtype != dtype:
                    raise CheckpointError(f"{path}: array {key!r} does not fit this run's settings")
            self._insert(serial, dict(arrays))
        self.serial, self.dropped = int(state["serial"]), int(state["dropped"])
        self.rng.bit_generator.state = json.loads(json.dumps(state["rng"]))
