"""The rows of one episode of a LeRobot data set: actions, rewards and states by the convention of a store, and pictures.

Row t of a table has the frame t, the command that was given at t (`action`) and what it led to (`next.reward`, `next.done`). A store
keeps what led to a frame (docs/decisions/0001), so all three move one frame up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import MissingExtraError, VideoError
from localmotion.files import one_line
from localmotion.video.shards import Extra

PREFIX = "lerobot:"
ACTION, STATE = "action", "observation.state"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, NotImplementedError)
"""What pyarrow raises for a table that it cannot read, and Python for values of another form."""
_BATCH = 32  # pictures read from a table at a time
_SLACK = 1e-4  # share of an action's range by which it may exceed the statistics, which are rounded


class Range(NamedTuple):
    """Smallest and largest value of an action in a data set."""

    low: float
    high: float


@dataclass(frozen=True)
class Logged:
    """What the tables hold beside pictures."""

    action: tuple[Range, ...]
    """For each number of an action; empty if there are no actions to keep."""
    state: int
    """Numbers of a state; 0 if there is none."""
    reward: str
    """Feature with the reward; empty if there is none."""
    ends: str

    def layout(self, stride: int) -> Extra:
        """The arrays of a store: those of `recording.logs.logged`, and `state`, (D,) float32, of the frame itself, as recorded."""
        if not self.action:
            return {}
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "action": ("<f4", (len(self.action) * stride,)),
            "reward": ("<f4", ()),
            "is_terminal": ("|u1", ()),
        }
        return found | ({"state": ("<f4", (self.state,))} if self.state else {})


@dataclass(frozen=True)
class EpisodeRows:
    """The rows of one episode in a table. See `video.refs.Rows`."""

    file: Path
    episode: int
    frames: int
    fps: float
    logged: Logged
    camera: str
    """Column of the pictures, if they are in the table."""

    def read(self, stride: int) -> dict[str, NDArray[Any]]:
        """The arrays of `Logged.layout` of the frames 0, n, 2n, ... with n = ``stride``: T of them.

        Row k of `action` has the n commands that led from the frame n(k-1) to nk, one after the other; row 0 is zero. Row k of `reward` is
        the sum of their rewards; `is_terminal` is 1 if one of them ended the episode. The data set has no picture of what came after its
        last frame: rewards and end of the commands from the last kept frame on are added to that frame, and the commands are left out. So
        the sum of the rewards is that of the table.
        """
        columns = {"frame_index": 1, "timestamp": 1}
        if self.logged.action:
            columns |= {ACTION: len(self.logged.action), STATE: self.logged.state, self.logged.reward: 1, self.logged.ends: 1}
        found = self._columns({name: width for name, width in columns.items() if name and width})
        order, times = found["frame_index"][:, 0], found["timestamp"][:, 0]
        if not np.array_equal(order, np.arange(self.frames)):
            raise self._fault("odd_times", "its frame_index does not count the frames from 0 on")
        if np.abs(times * self.fps - order).max() >= 0.5:
            raise self._fault("odd_times", f"its timestamps are not those of {self.fps:g} frames a second")
        if not self.logged.action:
            return {}
        try:
            action = _scaled(found[ACTION], self.logged.action)
        except ValueError as error:
            raise self._fault("bad_table", str(error)) from error
        none = np.zeros((self.frames, 1), np.float32)
        arrays = {
            "action": _led(action, stride),
            "reward": _sums(found.get(self.logged.reward, none), stride).astype(np.float32),
            "is_terminal": (_sums(found.get(self.logged.ends, none), stride) != 0).astype(np.uint8),
        }
        return arrays | ({"state": found[STATE][::stride]} if self.logged.state else {})

    def pictures(self) -> Iterator[bytes]:
        """The encoded pictures of the episode."""
        count = 0
        try:
            with parquet().ParquetFile(self.file) as file:
                for batch in file.iter_batches(_BATCH, columns=["episode_index", self.camera], use_threads=False):
                    mine = batch.filter(batch.column("episode_index").to_numpy(zero_copy_only=False) == self.episode)
                    for value in mine.column(self.camera).to_pylist():
                        data = value.get("bytes") if isinstance(value, dict) else None
                        if not data:
                            raise ValueError(f"picture {count} is not in the table")
                        yield data
                        count += 1
        except VideoError:
            raise
        except UNREADABLE as error:
            raise self._fault("unreadable", f"its table cannot be read ({one_line(error)})") from error
        if count != self.frames:
            raise self._fault("wrong_length", f"has {count} pictures, {self.frames} frames are listed")

    def _columns(self, widths: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """Columns (T, width), float32 or int64."""
        try:
            table = parquet().read_table(
                self.file, columns=list(widths), filters=[("episode_index", "==", self.episode)], use_threads=False
            )
        except UNREADABLE as error:
            raise self._fault("unreadable", f"its table cannot be read ({one_line(error)})") from error
        if table.num_rows != self.frames:
            raise self._fault("wrong_length", f"has {table.num_rows} rows, {self.frames} frames are listed")
        found = {}
        for name, width in widths.items():
            try:
                values = np.concatenate([_numbers(chunk) for chunk in table.column(name).chunks])
                if values.size != self.frames * width or not np.isfinite(values).all():
                    raise ValueError(f"not {width} finite numbers a frame")
            except UNREADABLE as error:
                raise self._fault("bad_table", f"its column {name} cannot be used ({one_line(error)})") from error
            found[name] = values.reshape(self.frames, width)
        return found

    def _fault(self, reason: str, detail: str) -> VideoError:
        return VideoError(self.file, reason, f"episode {self.episode}: {detail}")


def _numbers(column: Any) -> NDArray[Any]:
    """The numbers of a column of numbers or lists, one after the other."""
    while hasattr(column, "flatten") and hasattr(column.type, "value_type"):
        column = column.flatten()
    if column.null_count:
        raise ValueError("has empty entries")
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "biuf":
        raise TypeError("holds no numbers")
    return np.asarray(values, np.int64 if values.dtype.kind in "iu" else np.float32)


def _led(action: NDArray[np.float32], stride: int) -> NDArray[np.float32]:
    """(T, A) commands -> (ceil(T / stride), stride A): those that led to each kept frame."""
    kept = -(-len(action) // stride)
    led = np.zeros((kept, stride * action.shape[1]), np.float32)
    led[1:] = action[: (kept - 1) * stride].reshape(kept - 1, -1)
    return led


def _sums(values: NDArray[Any], stride: int) -> NDArray[np.float64]:
    """(T, 1) values of commands -> (ceil(T / stride),) sums over those that led to each kept frame; the last frame has the rest, too."""
    kept = -(-len(values) // stride)
    sums = np.zeros(kept)
    sums[1:] = values[: (kept - 1) * stride, 0].reshape(kept - 1, stride).sum(1, dtype=np.float64)
    sums[-1] += values[(kept - 1) * stride :, 0].sum(dtype=np.float64)
    return sums


def _scaled(action: NDArray[np.float32], ranges: Sequence[Range]) -> NDArray[np.float32]:
    """(T, A) in [-1, 1]. A number that never changes in the data set becomes 0. Raises ValueError for one outside of its range."""
    low, high = np.array(ranges, np.float64).T
    span = high - low
    slack = _SLACK * span + 1e-6 * np.maximum(np.abs(low), np.abs(high))
    outside = (action < low - slack) | (action > high + slack)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        limits = f"{low[column]:g} to {high[column]:g}"
        raise ValueError(
            f"action {column} of frame {row} is {action[row, column]:g}; by the data set's statistics it is {limits}"
        )
    scaled = 2 * (action - low) / np.where(span > 0, span, 1) - 1
    return np.asarray(np.clip(np.where(span > 0, scaled, 0), -1, 1), np.float32)


def parquet() -> Any:
    """pyarrow.parquet. Raises MissingExtraError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            f"{PREFIX} needs pyarrow, which cannot be imported ({one_line(error)}); install it with: pip install 'localmotion[lerobot]'"
        ) from error
    return pyarrow.parquet
