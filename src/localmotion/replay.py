"""Replay: stores transitions and samples training sequences.

Time convention (docs/decisions/0001): a record holds what led to its frame. An episode of n agent steps has n + 1 records; record 0 is
the reset, with is_first, a zero action, zero reward and no motion. Only complete episodes are sampled, as in IPV's
release (thuml/ContextWM).

A training sequence has T records. It is a window of one episode or, if an episode is shorter than T, several pieces of episodes in a row
(docs/decisions/0011). Each piece is a whole episode or a window that fills the rest. `is_first` is set at the start of every piece, so
each starts from the zero state and no information crosses between pieces.

A complete episode is one safetensors file, written once and atomically, so a checkpoint only adds new episodes. The arrays are also in
memory or, if they do not fit (``storage="disk"``), each window is read from the file by position into the batch. With a memory mapping,
every page that was ever sampled would count as resident memory. With ``storage="device"`` the arrays are on the GPU, and no batch passes
through the host.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from localmotion.errors import CheckpointError, LocalmotionError

Record = Mapping[str, Any]
Storage = Literal["memory", "disk", "device"]


class Coder(Protocol):
    """How one key of a record is stored: encoded when it is added, decoded when it is sampled."""

    dtype: np.dtype[Any]
    """Type of the codes, one byte. Codes have the shape of the value."""
    table: NDArray[Any]
    """(256,): the decoded value of each code, indexed by its bits as an unsigned number."""

    def encode(self, value: NDArray[Any]) -> NDArray[Any]: ...

    def decode(self, codes: NDArray[Any]) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Episode:
    """A complete episode: its arrays in memory, or their offsets in its file, and its first row in the arena if there is one."""

    serial: int
    length: int
    arrays: Mapping[str, NDArray[Any]] | None
    offsets: Mapping[str, int]
    row: int = 0


SHORTEST = 2
"""Records of the shortest episode that is kept: a reset and one agent step."""


class _Piece(NamedTuple):
    """Records of one episode within a training sequence."""

    row: int
    """Which sequence of the batch."""
    at: int
    """Position of its first record in that sequence."""
    episode: Episode
    start: int
    """Its first record in the episode."""
    length: int


class _Ready(NamedTuple):
    """A batch that was prepared in advance."""

    size: int
    serial: int
    rng: Any
    """The sampler's state before this batch."""
    batch: dict[str, Tensor]


class Arena:
    """Records of episodes on a device, in a ring.

    A batch of windows takes one gather per key and does not wait for the device.

    Args:
        spec: per key, the shape and dtype of one record as it is stored.
        records: rows of the ring. New records overwrite the oldest ones.
        device: of the ring.
    """

    def __init__(self, spec: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], records: int, device: torch.device) -> None:
        self.records, self.device, self.next = records, device, 0
        self.held = {
            key: torch.zeros((records, *shape), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
            for key, (shape, dtype) in spec.items()
        }

    def put(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """Store arrays (n, ...); returns the row of the first record. Raises LocalmotionError for more records than rows."""
        count, first = len(next(iter(arrays.values()))), self.next
        if count > self.records:
            raise LocalmotionError(
                f"an episode of {count:,} records does not fit a replay of {self.records:,} on the device; raise online.replay_capacity"
            )
        before = min(count, self.records - first)  # rows until the end of the ring
        for key, held in self.held.items():
            found = torch.from_numpy(arrays[key])
            held[first : first + before].copy_(found[:before])
            held[: count - before].copy_(found[before:])
        self.next = (first + count) % self.records
        return first

    def gather(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Batch (B, T, ...) of the records in ``rows`` (B, T), modulo the length of the ring."""
        index = _sent(rows % self.records, self.device)
        return {key: held[index] for key, held in self.held.items()}


class Replay:
    """Buffer of complete episodes.

    Args:
        spec: per key, the shape and dtype of one record (image (S,S,3) uint8, action (A,) float32, reward () float32,
            is_terminal () bool, and for methods with motion: flow, tracks, visible, track_id as in `StepMotion`).
        capacity: records kept; the oldest episodes leave first.
        length: window length T of a training sequence, in records.
        prioritize_ends: draw the start from an extended range and clamp it, so episode ends are sampled more often (IPV's release,
            Meta-World).
        seed: of the sampling; the generator's state is part of `state()`.
        coders: per key, its coder; other keys are stored unchanged.
        folder: of the episode files, written by `save` or, with ``storage="disk"``, when an episode is complete. None: no saving.
        storage: where episodes are sampled from. All give the same batches.
        rows, device: see `place`.
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
        rows: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = {key: (tuple(shape), np.dtype(dtype)) for key, (shape, dtype) in spec.items()}
        self.coders = {key: coder for key, coder in (coders or {}).items() if key in self.spec}
        self.stored = {k: (shape, self.coders[k].dtype if k in self.coders else d) for k, (shape, d) in self.spec.items()}
        self.capacity, self.length, self.prioritize_ends = capacity, length, prioritize_ends
        self.folder = folder
        self.place(storage, rows, device)
        self.rng = np.random.default_rng(seed)
        self.episodes: list[Episode] = []
        self.open: list[Record] = []
        self._ready: _Ready | None = None
        self.records = 0
        self.serial = 0
        self.dropped = 0

    @property
    def bytes_per_record(self) -> int:
        """Bytes of one record, in memory or on disk."""
        return int(sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.stored.values()))

    def place(self, storage: Storage, rows: int = 0, device: torch.device | str = "cpu") -> None:
        """Set where episodes are sampled from. Call it while the replay is empty.

        With ``storage="device"`` batches come from a ring of ``rows`` records on ``device`` (the maximum then) and are on it; otherwise
        they are on the CPU. Raises ValueError if a folder is needed and missing, torch's OutOfMemoryError if the ring does not fit.
        """
        if storage != "memory" and self.folder is None:
            raise ValueError(f"storage={storage!r} needs a folder")
        self.storage = storage
        self.arena = Arena(self.stored, rows, torch.device(device)) if storage == "device" else None
        self.tables = {key: torch.from_numpy(c.table).to(device) for key, c in self.coders.items()} if self.arena else {}

    def add(self, record: Record, *, last: bool) -> None:
        """Append one record to the open episode; ``last`` closes it. An episode with only a reset is dropped (counted in ``dropped``).

        Raises LocalmotionError for a key, shape or non-finite value that does not fit, CheckpointError if an episode cannot be written.
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
        if len(self.open) < SHORTEST:
            self.dropped += 1
        else:
            arrays = {key: np.stack([r[key] for r in self.open]) for key in self.spec}
            if self.storage == "memory":
                self._insert(Episode(self.serial, len(self.open), arrays, {}))
            else:
                self._insert(self._described(self._file(self.serial, arrays)), arrays)
            self.serial += 1
        self.open = []

    def cut(self) -> None:
        """End the open episode now, as a time limit would. It is kept if it has more than a reset."""
        if self.open:
            self._close()

    def _insert(self, episode: Episode, arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Add an episode and remove old ones to make room. An arena gets its ``arrays``, or those of its file."""
        room = min(self.capacity, self.arena.records) if self.arena else self.capacity
        while self.episodes and self.records + episode.length > room:
            self.records -= self.episodes.pop(0).length
        if self.arena:
            episode = replace(episode, row=self.arena.put(self._whole(episode) if arrays is None else arrays))
        self.episodes.append(episode)
        self.records += episode.length

    def __len__(self) -> int:
        return self.records

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """A batch of sequences (B, T, ...): uniform episode, then a window within it; after a short episode further episodes.

        Raises LocalmotionError while no complete episode is stored, CheckpointError for an episode file that is missing or damaged.
        """
        if self._ready:
            ready, self._ready = self._ready, None
            if ready.size == batch_size and ready.serial == self.serial:
                return ready.batch
            self.rng.bit_generator.state = ready.rng
        return self._sample(batch_size)

    def prepare(self, batch_size: int, send: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> None:
        """Make the next batch now, while the device computes and the host would wait, and ``send`` it, for example to the device.

        The batches equal those without `prepare`: if an episode is added before the next `sample`, the batch is drawn again.
        """
        if self._ready is None:
            before = self.rng.bit_generator.state
            batch = self._sample(batch_size)
            self._ready = _Ready(batch_size, self.serial, before, send(batch) if send else batch)

    def _sample(self, batch_size: int) -> dict[str, Tensor]:
        if not self.episodes:
            raise LocalmotionError("replay holds no complete episode yet; raise online.prefill")
        pieces = []
        for row, index in enumerate(self.rng.integers(len(self.episodes), size=batch_size)):
            pieces.append(self._cut(row, 0, self.episodes[index]))
            while (at := pieces[-1].at + pieces[-1].length) < self.length:
                pieces.append(self._cut(row, at, self.episodes[self.rng.integers(len(self.episodes))]))
        batch = self._from_device(pieces, batch_size) if self.arena else self._from_host(pieces, batch_size)
        # Motion and action of a piece's first frame are before the piece, so they are unknown, as at a reset.
        starts = tuple(_sent(np.array(x), batch["action"].device) for x in ([p.row for p in pieces], [p.at for p in pieces]))
        batch["is_first"] = torch.zeros_like(batch["is_terminal"])
        for key, value in {"is_first": True, "action": 0, "visible": False, "flow": 0}.items():
            if key in batch:
                batch[key][starts] = value
        return batch

    def _cut(self, row: int, at: int, episode: Episode) -> _Piece:
        """A piece of the episode for position ``at`` of a sequence: all of it, or a window if it is longer than the rest."""
        length = min(self.length - at, episode.length)
        spare = episode.length - length
        start = int(self.rng.integers(spare + (length if self.prioritize_ends else 0) + 1))
        return _Piece(row, at, episode, min(start, spare), length)

    def _from_host(self, pieces: list[_Piece], count: int) -> dict[str, Tensor]:
        """``count`` sequences from memory or files."""
        out = {key: np.empty((count, self.length, *shape), dtype) for key, (shape, dtype) in self.stored.items()}
        for row, at, episode, start, length in pieces:
            self._read(episode, start, {key: target[row, at : at + length] for key, target in out.items()})
        out |= {key: coder.decode(out[key]) for key, coder in self.coders.items()}
        return {key: torch.from_numpy(value) for key, value in out.items()}

    def _from_device(self, pieces: list[_Piece], count: int) -> dict[str, Tensor]:
        """The same from the arena."""
        assert self.arena
        rows = np.empty((count, self.length), np.int64)
        for row, at, episode, start, length in pieces:
            rows[row, at : at + length] = np.arange(length) + episode.row + start
        batch = self.arena.gather(rows)
        for key, table in self.tables.items():
            codes = batch[key].view(torch.uint8)
            batch[key] = table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return batch

    def newest(self, key: str, count: int) -> Iterator[NDArray[Any]]:
        """One key (T, ...) of each of the ``count`` newest episodes, oldest first."""
        for episode in self.episodes[-count:]:
            found = self._whole(episode, key)[key]
            yield self.coders[key].decode(found) if key in self.coders else found

    def _whole(self, episode: Episode, *keys: str) -> dict[str, NDArray[Any]]:
        """All stored records (T, ...) of an episode, for some keys or all."""
        arrays = {key: np.empty((episode.length, *self.stored[key][0]), self.stored[key][1]) for key in keys or self.stored}
        self._read(episode, 0, arrays)
        return arrays

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
                    into = target.reshape(-1).view(np.uint8)  # one row of a batch is contiguous, so this is not a copy
                    if os.preadv(handle, [into.data], episode.offsets[key] + start * (into.nbytes // len(target))) != into.nbytes:
                        raise OSError("shorter than it was")
            finally:
                os.close(handle)
        except OSError as error:
            raise _unreadable(path, error) from error

    # Saving -----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able state: the episodes, the counters, the sampler's random state. Without the open episode."""
        return {
            "episodes": [episode.serial for episode in self.episodes],
            "serial": self.serial,
            "dropped": self.dropped,
            "rng": self._ready.rng if self._ready else self.rng.bit_generator.state,
        }

    def save(self) -> None:
        """Write the episodes without a file. Raises CheckpointError if the disk is full; written files stay."""
        for episode in self.episodes:
            if episode.arrays is not None and not self._path(episode.serial).exists():
                self._file(episode.serial, episode.arrays)

    def prune(self, keep: set[int]) -> None:
        """Delete files of episodes that have left the buffer and are in no kept checkpoint (``keep``)."""
        assert self.folder
        held = keep | {episode.serial for episode in self.episodes}
        for path in self.folder.glob("episode_*.safetensors"):
            if int(path.stem.split("_")[1]) not in held:
                path.unlink()

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`. Raises CheckpointError for a missing or unreadable episode.

        Episodes written after that state was saved are removed, because they will be played again.
        """
        assert self.folder
        self.episodes, self.open, self.records, self._ready = [], [], 0, None
        self.serial, self.dropped = int(state["serial"]), int(state["dropped"])
        for path in [*self.folder.glob("episode_*.safetensors"), *self.folder.glob("*.tmp")]:
            if path.suffix == ".tmp" or int(path.stem.split("_")[1]) >= self.serial:
                path.unlink()
        for serial in state["episodes"]:
            self._recode(self._path(serial))
            episode = self._described(self._path(serial))
            if self.storage == "memory":
                episode = Episode(serial, episode.length, self._whole(episode), {})
            self._insert(episode)
        self.rng.bit_generator.state = json.loads(json.dumps(state["rng"]))

    def _path(self, serial: int) -> Path:
        assert self.folder
        return self.folder / f"episode_{serial:07d}.safetensors"

    def _file(self, serial: int, arrays: Mapping[str, NDArray[Any]]) -> Path:
        """Write an episode to a temporary file, sync it to the disk, and rename it."""
        path = self._path(serial)
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(arrays), temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except Exception as error:  # safetensors reports a full disk with its own error class
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: replay episode could not be written ({error}); free some disk space and run the same command again; it continues"
                " from the last checkpoint"
            ) from error
        return path

    def _recode(self, path: Path) -> None:
        """Write an episode of an older run again, with coders for keys that it stored without."""
        found, _ = _header(path)
        plain = [key for key in self.coders if found.get(key, {}).get("dtype") == _NAMES[self.spec[key][1].name]]
        if plain:
            arrays = load_file(path)
            self._file(int(path.stem.split("_")[1]), {**arrays, **{key: self.coders[key].encode(arrays[key]) for key in plain}})

    def _described(self, path: Path) -> Episode:
        """Length and offsets of an episode's file, from its header. Raises CheckpointError if it does not match the spec."""
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
        if not all(fits) or length < SHORTEST:
            wrong = next((key for key, fit in zip(self.stored, fits, strict=True) if not fit), "reward")
            raise CheckpointError(f"{path}: array {wrong!r} does not fit this run's settings; start a new run")
        return Episode(int(path.stem.split("_")[1]), length, None, offsets)


def _sent(index: NDArray[np.int64], device: torch.device) -> Tensor:
    """Indices on a device, without waiting for it."""
    found = torch.from_numpy(index)
    # With memory that is not pinned, the host would wait for the copy and for all queued work before it.
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset of its data. Raises CheckpointError unless the file has the length in the header."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > MAX_HEADER:
                raise ValueError(f"its header claims {size} bytes")
            found: dict[str, Any] = {key: value for key, value in json.loads(file.read(size)).items() if key != "__metadata__"}
            end = 8 + size + max(int(value["data_offsets"][1]) for value in found.values())
            if os.fstat(file.fileno()).st_size != end:
                raise ValueError(f"does not have the {end} bytes of its header")
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return found, 8 + size


MAX_HEADER = 1 << 20
_NAMES = {"uint8": "U8", "int8": "I8", "bool": "BOOL", "float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32"}
_NAMES |= {"int64": "I64"}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: replay episode cannot be read ({error}); restore it or start a new run")
