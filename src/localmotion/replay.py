"""Replay: transitions in, training sequences out.

Time convention (docs/decisions/0001): a record holds what led to its frame. An episode of n agent steps has n + 1 records; record 0 is
the reset, with is_first, a zero action, zero reward and no motion. Only complete episodes are sampled (IPV 2.6), a sequence
never crosses an episode, and `is_first` is forced at its start so that every sequence begins from the zero state.

A complete episode is one safetensors file, written once and whole, so a checkpoint costs what is new. Its arrays are also held in
memory, or, where they would not fit (``storage="disk"``), read from the file a window at a time: by position, into the batch. A memory
mapping would do the same reading, but every page that was ever sampled would count as resident memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from localmotion.errors import CheckpointError, LocalmotionError

Record = Mapping[str, Any]
Storage = Literal["memory", "disk"]


class Coder(Protocol):
    """How one key of a record is stored: encoded when it is added, decoded when it is sampled."""

    dtype: np.dtype[Any]
    """Of the codes. They have the shape of what they stand for."""

    def encode(self, value: NDArray[Any]) -> NDArray[Any]: ...

    def decode(self, codes: NDArray[Any]) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Episode:
    """A complete episode: its arrays in memory, or where they begin in its file."""

    serial: int
    length: int
    arrays: Mapping[str, NDArray[Any]] | None
    offsets: Mapping[str, int]


class Replay:
    """Buffer of complete episodes.

    Args:
        spec: per key, the shape and dtype of one record (image (S,S,3) uint8, action (A,) float32, reward () float32,
            is_terminal () bool, and for methods with motion: flow, tracks, visible, track_id as in `StepMotion`).
        capacity: records kept; the oldest episodes leave first.
        length: window length T of a training sequence, in records.
        prioritize_ends: draw the start from an extended range and clamp it, so that episode ends are met more often (IPV 2.6).
        seed: of the sampling; the generator's state is part of `state()`.
        coders: per key, how it is stored if not as it is.
        folder: where episodes are filed, by `save` or, with ``storage="disk"``, when they are complete. None: nothing can be saved.
        storage: where episodes are sampled from. Both give the same batches.
    """

    def __init__(
        self,
        spec: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        capacity: int,
        length: int,
        prioritize_ends: bool = False,
        seed: int = 0,
        coders: Mapping[str, Coder] | None = None,
        folder: Path | None = None,
        storage: Storage = "memory",
    ) -> None:
        self.spec = {key: (tuple(shape), np.dtype(dtype)) for key, (shape, dtype) in spec.items()}
        self.coders = {key: coder for key, coder in (coders or {}).items() if key in self.spec}
        self.stored = {k: (shape, self.coders[k].dtype if k in self.coders else d) for k, (shape, d) in self.spec.items()}
        self.capacity, self.length, self.prioritize_ends = capacity, length, prioritize_ends
        if storage == "disk" and folder is None:
            raise ValueError('storage="disk" needs a folder')
        self.folder, self.storage = folder, storage
        self.rng = np.random.default_rng(seed)
        self.episodes: list[Episode] = []
        self.open: list[Record] = []
        self.records = 0
        self.serial = 0
        self.dropped = 0

    @property
    def bytes_per_record(self) -> int:
        """What one record takes, in memory or on disk."""
        return int(sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.stored.values()))

    def add(self, record: Record, *, last: bool) -> None:
        """Append one record to the open episode; ``last`` closes it. Episodes shorter than T records are dropped (counted).

        Raises LocalmotionError for a key, shape or non-finite value that does not fit, CheckpointError when an episode cannot be filed.
        """
        if set(record) != set(self.spec):
            raise LocalmotionError(f"replay record has keys {sorted(record)}, expected {sorted(self.spec)}")
        if not np.isfinite(record["reward"]):
            raise LocalmotionError(f"reward {record['reward']!r} is not finite; the environment is broken or has diverged")
        found = {key: np.asarray(value, self.spec[key][1]) for key, value in record.items()}
        for key, (shape, _) in self.spec.items():
            if found[key].shape != shape:
                raise LocalmotionError(f"replay record {key!r} has shape {found[key].shape}, expected {shape}")
        self.open.append({key: self.coders[key].encode(value) if key in self.coders else value for key, value in found.items()})
        if last:
            self._close()

    def _close(self) -> None:
        if len(self.open) < self.length:
            self.dropped += 1
        else:
            arrays = {key: np.stack([r[key] for r in self.open]) for key in self.spec}
            if self.storage == "disk":
                self._insert(self._described(self._file(self.serial, arrays)))
            else:
                self._insert(Episode(self.serial, len(self.open), arrays, {}))
            self.serial += 1
        self.open = []

    def cut(self) -> None:
        """End the open episode where it is, as a time limit would: what it holds is kept if it is long enough."""
        if self.open:
            self._close()

    def _insert(self, episode: Episode) -> None:
        self.episodes.append(episode)
        self.records += episode.length
        while self.records > self.capacity and len(self.episodes) > 1:
            self.records -= self.episodes.pop(0).length

    def __len__(self) -> int:
        return self.records

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """A batch of sequences (B, T, ...) on the CPU: uniform episode, then a window within it.

        Raises LocalmotionError while no complete episode of at least T records is stored, CheckpointError for an episode file that is gone
        or damaged.
        """
        if not self.episodes:
            raise LocalmotionError(
                f"replay holds no complete episode of at least {self.length} records yet; raise online.prefill or lower online.length"
            )
        out = {key: np.empty((batch_size, self.length, *shape), dtype) for key, (shape, dtype) in self.stored.items()}
        chosen = self.rng.integers(len(self.episodes), size=batch_size)
        for row, index in enumerate(chosen):
            episode = self.episodes[index]
            spare = episode.length - self.length
            if self.prioritize_ends:
                start = min(int(self.rng.integers(spare + self.length + 1)), spare)
            else:
                start = int(self.rng.integers(spare + 1))
            self._read(episode, start, {key: target[row] for key, target in out.items()})
        out |= {key: coder.decode(out[key]) for key, coder in self.coders.items()}
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

    def newest(self, key: str, count: int) -> Iterator[NDArray[Any]]:
        """One key (T, ...) of each of the ``count`` newest episodes, oldest first."""
        for episode in self.episodes[-count:]:
            shape, dtype = self.stored[key]
            found = np.empty((episode.length, *shape), dtype)
            self._read(episode, 0, {key: found})
            yield self.coders[key].decode(found) if key in self.coders else found

    def _read(self, episode: Episode, start: int, targets: Mapping[str, NDArray[Any]]) -> None:
        """Fill arrays (n, ...) with the records from ``start`` on."""
        if episode.arrays is not None:
            for key, target in targets.items():
                target[:] = episode.arrays[key][start : start + len(target)]
            return
        path = self._path(episode.serial)
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                for key, target in targets.items():
                    into = target.reshape(-1).view(np.uint8)  # of one row of a batch: contiguous, so not a copy
                    if os.preadv(handle, [into.data], episode.offsets[key] + start * (into.nbytes // len(target))) != into.nbytes:
                        raise OSError("shorter than it was")
            finally:
                os.close(handle)
        except OSError as error:
            raise _unreadable(path, error) from error

    # Saving -----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able position: which episodes, the counters, the sampler's random state. The open episode is not part of it."""
        return {
            "episodes": [episode.serial for episode in self.episodes],
            "serial": self.serial,
            "dropped": self.dropped,
            "rng": self.rng.bit_generator.state,
        }

    def save(self) -> None:
        """File the episodes that are not filed yet. Raises CheckpointError when the disk is full; what is filed stays."""
        for episode in self.episodes:
            if episode.arrays is not None and not self._path(episode.serial).exists():
                self._file(episode.serial, episode.arrays)

    def prune(self, keep: set[int]) -> None:
        """Delete filed episodes that have left the buffer and that no kept checkpoint names (``keep``)."""
        assert self.folder
        held = keep | {episode.serial for episode in self.episodes}
        for path in self.folder.glob("episode_*.safetensors"):
            if int(path.stem.split("_")[1]) not in held:
                path.unlink()

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` names. Raises CheckpointError for a missing or unreadable episode.

        Episodes filed after that state was saved are removed: they will be played again.
        """
        assert self.folder
        self.episodes, self.open, self.records = [], [], 0
        self.serial, self.dropped = int(state["serial"]), int(state["dropped"])
        for path in [*self.folder.glob("episode_*.safetensors"), *self.folder.glob("*.tmp")]:
            if path.suffix == ".tmp" or int(path.stem.split("_")[1]) >= self.serial:
                path.unlink()
        for serial in state["episodes"]:
            self._recode(self._path(serial))
            episode = self._described(self._path(serial))
            if self.storage == "memory":
                arrays = {key: np.empty((episode.length, *shape), dtype) for key, (shape, dtype) in self.stored.items()}
                self._read(episode, 0, arrays)
                episode = Episode(serial, episode.length, arrays, {})
            self._insert(episode)
        self.rng.bit_generator.state = json.loads(json.dumps(state["rng"]))

    def _path(self, serial: int) -> Path:
        assert self.folder
        return self.folder / f"episode_{serial:07d}.safetensors"

    def _file(self, serial: int, arrays: Mapping[str, NDArray[Any]]) -> Path:
        """Write an episode: beside its place, to the disk, then renamed."""
        path = self._path(serial)
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(arrays), temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except Exception as error:  # safetensors tells a full disk by an error class of its own
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: replay episode could not be written ({error}); free some disk space and give the same command again: it goes on"
                " from the last checkpoint"
            ) from error
        return path

    def _recode(self, path: Path) -> None:
        """File an episode again that holds a key as it was added, by a run of before it was coded."""
        found, _ = _header(path)
        plain = [key for key in self.coders if found.get(key, {}).get("dtype") == _NAMES[self.spec[key][1].name]]
        if plain:
            arrays = load_file(path)
            self._file(int(path.stem.split("_")[1]), {**arrays, **{key: self.coders[key].encode(arrays[key]) for key in plain}})

    def _described(self, path: Path) -> Episode:
        """Length and offsets of a filed episode, from its header. Raises CheckpointError when it does not fit the spec."""
        found, begin = _header(path)
        try:
            length = int(found["reward"]["shape"][0])
            fits = [
                found[key]["dtype"] == _NAMES[dtype.name] and found[key]["shape"] == [length, *shape]
                for key, (shape, dtype) in self.stored.items()
            ]
            offsets = {key: begin + int(found[key]["data_offsets"][0]) for key in self.stored}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: lacks {error} of this run's records; start a new run") from error
        if not all(fits) or length < self.length:
            wrong = next((key for key, fit in zip(self.stored, fits, strict=True) if not fit), "reward")
            raise CheckpointError(f"{path}: array {wrong!r} does not fit this run's settings; start a new run")
        return Episode(int(path.stem.split("_")[1]), length, None, offsets)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and where its data begin. Raises CheckpointError unless the file is as long as the header says."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > MAX_HEADER:
                raise ValueError(f"its header claims {size} bytes")
            found: dict[str, Any] = {key: value for key, value in json.loads(file.read(size)).items() if key != "__metadata__"}
            end = 8 + size + max(int(value["data_offsets"][1]) for value in found.values())
            if os.fstat(file.fileno()).st_size != end:
                raise ValueError(f"has not the {end} bytes that its header says")
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return found, 8 + size


MAX_HEADER = 1 << 20
_NAMES = {"uint8": "U8", "int8": "I8", "bool": "BOOL", "float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32"}
_NAMES |= {"int64": "I64"}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: replay episode cannot be read ({error}); restore it or start a new run")
