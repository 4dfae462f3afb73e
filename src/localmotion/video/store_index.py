"""The index of a finished store: one file, so that opening a store of ten thousand shards reads none of them.

`STORE/index.bin` has a line of JSON (the shards it covers, and where each column lies) and columns of numbers and texts, which are
mapped and not read. It is only a copy of what the shards say. A store whose shards are not those of the index is read without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import StoreError
from localmotion.files import one_line, parse_json
from localmotion.video.shards import check_id, sync, sync_folder, video_of

FILE = "index.bin"
FORMAT, VERSION = "localmotion-index", 1
_COLUMNS = {
    "length": "<i8",  # frames of each clip
    "offset": "<i8",  # its first frame in its shard
    "shard": "<i4",  # place of its shard in the list of shards
    "id_end": "<i8",  # where its id ends in the text `ids`
    "video_bytes": "<i4",  # an id begins with the id of the video: number of its bytes
    "label": "<i4",  # number of its label
    "ids": "|u1",
    "rows": "<i8",  # frames of each shard
    "label_end": "<i8",  # where each label ends in the text `labels`
    "labels": "|u1",  # each is JSON
}
_HEADER = 1 << 26  # maximum bytes of the header
_FIX = "run localmotion store finish again"
Item = TypeVar("Item")


class Lazy(Sequence[Item], Generic[Item]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, count: int, item: Callable[[int], Item]) -> None:
        self._count, self._item = count, item

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Item: ...
    @overload
    def __getitem__(self, i: slice) -> list[Item]: ...
    def __getitem__(self, i: int | slice) -> Item | list[Item]:
        if isinstance(i, slice):
            return [self._item(n) for n in range(*i.indices(self._count))]
        if not -self._count <= i < self._count:
            raise IndexError(i)
        return self._item(int(i) % self._count)

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(self._count))


class StoreIndex:
    """The columns of an index file."""

    def __init__(self, path: Path) -> None:
        """Map the file. Raises StoreError if it is damaged."""
        try:
            with path.open("rb") as file:
                header = parse_json(file.readline(_HEADER))
            if (header["format"], header["version"]) != (FORMAT, VERSION):
                raise ValueError("is of another version")
            self.shards: list[int] = header["shards"]
            self.newest: dict[str, int] = header["newest"]
            data = np.memmap(path, np.uint8, "r")
            columns = {name: _column(data, header["columns"][name], kind) for name, kind in _COLUMNS.items()}
            self.lengths: NDArray[np.int64] = columns["length"]
            self.offsets: NDArray[np.int64] = columns["offset"]
            self._shard, self._rows = columns["shard"], columns["rows"]
            self._columns = columns
            clips = len(self.lengths)
            same = all(len(columns[name]) == clips for name in ("offset", "shard", "id_end", "video_bytes", "label"))
            if not same or len(self._rows) != len(self.shards) or (clips and int(self.lengths.min()) < 1):
                raise ValueError("its columns do not fit each other")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: is damaged ({one_line(error)}); {_FIX}") from error
        self.path = path
        self._places = {shard: place for place, shard in enumerate(self.shards)}
        self.ids = Lazy(clips, self._id)
        self.videos = Lazy(clips, lambda i: self._id(i, video=True))
        self.labels = Lazy(clips, self._label)

    def shard(self, i: int) -> int:
        """Number of the shard that holds clip ``i``."""
        return self.shards[int(self._shard[i])]

    def rows(self, shard: int) -> int:
        """Frames of a shard."""
        return int(self._rows[self._places[shard]])

    def _id(self, i: int, video: bool = False) -> str:
        start = int(self._columns["id_end"][i - 1]) if i else 0
        stop = start + int(self._columns["video_bytes"][i]) if video else int(self._columns["id_end"][i])
        text = self._text("ids", start, stop)
        check_id(text)
        return text

    def _label(self, i: int) -> int | str | None:
        number = int(self._columns["label"][i])
        ends = self._columns["label_end"]
        label = json.loads(self._text("labels", int(ends[number - 1]) if number else 0, int(ends[number])))
        if not isinstance(label, int | str | None):
            raise StoreError(f"{self.path}: is damaged (label {number}); {_FIX}")
        return label

    def _text(self, column: str, start: int, stop: int) -> str:
        try:
            return bytes(self._columns[column][start:stop]).decode("utf-8", "surrogateescape")
        except (ValueError, IndexError) as error:
            raise StoreError(f"{self.path}: is damaged ({one_line(error)}); {_FIX}") from error


def _column(data: NDArray[np.uint8], place: list[int], kind: str) -> Any:
    offset, count = place
    size = np.dtype(kind).itemsize * count
    if not 0 <= offset <= offset + size <= len(data):
        raise ValueError("a column is not in the file")
    return data[offset : offset + size].view(kind)


def read_index(store: Path, shards: Sequence[int]) -> StoreIndex | None:
    """The index of a store; None if it has none, or one of other shards."""
    if not (store / FILE).is_file():
        return None
    index = StoreIndex(store / FILE)
    return index if index.shards == list(shards) else None


class ShardColumns(NamedTuple):
    """What the index holds of one shard."""

    numbers: NDArray[np.int64]
    """(clips, 6): length, offset, bytes of the id, bytes of the video's id, place of the label in `labels`, hash of the id."""
    ids: bytes
    labels: list[int | str | None]


def shard_columns(shard: int, entries: Sequence[dict[str, Any]]) -> ShardColumns:
    """The columns of a shard's entries. Raises StoreError for a clip whose id does not begin with that of its video."""
    numbers = np.zeros((len(entries), 6), np.int64)
    texts: list[bytes] = []
    labels: dict[tuple[type, Any], int] = {}
    for row, entry in zip(numbers, entries, strict=True):
        text, video = os.fsencode(entry["id"]), os.fsencode(video_of(entry))
        if not text.startswith(video):
            raise StoreError(
                f"shard {shard:05d}: clip {entry['id']!r} does not begin with the name of its video {video_of(entry)!r}"
            )
        label = labels.setdefault((type(entry["label"]), entry["label"]), len(labels))
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
        row[:] = entry["frames"], entry["offset"], len(text), len(video), label, digest
        texts.append(text)
    return ShardColumns(numbers, b"".join(texts), [label for _, label in labels])


class IndexWriter:
    """Collects one shard after the other, in the order of their numbers."""

    def __init__(self) -> None:
        self._shards: list[int] = []
        self._columns: list[ShardColumns] = []
        self._newest: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._shards)

    def add(self, shard: int, columns: ShardColumns, replaces: Iterable[str]) -> None:
        """The next shard; `replaces` as in shard.json."""
        self._shards.append(shard)
        self._columns.append(columns)
        self._newest |= dict.fromkeys(replaces, shard)

    def finish(self) -> tuple[int, int]:
        """Number of clips and frames that count, after the last shard. Raises StoreError for an id that is stored twice."""
        self._rows = [int(columns.numbers[:, 0].sum()) for columns in self._columns]
        if self._newest:
            self._columns = [self._without_replaced(*pair) for pair in zip(self._shards, self._columns, strict=True)]
        hashes = np.concatenate([columns.numbers[:, 5] for columns in self._columns] or [np.zeros(0, np.int64)])
        if len(np.unique(hashes)) != len(hashes):
            raise StoreError("a clip is stored twice; extract into a new folder")
        return len(hashes), sum(int(columns.numbers[:, 0].sum()) for columns in self._columns)

    def _without_replaced(self, shard: int, columns: ShardColumns) -> ShardColumns:
        ends = np.cumsum(columns.numbers[:, 2]).tolist()
        texts = [columns.ids[end - row[2] : end] for end, row in zip(ends, columns.numbers.tolist(), strict=True)]
        videos = [os.fsdecode(text[: row[3]]) for text, row in zip(texts, columns.numbers.tolist(), strict=True)]
        kept = [n for n, video in enumerate(videos) if self._newest.get(video, shard) <= shard]
        return ShardColumns(columns.numbers[kept], b"".join(texts[n] for n in kept), columns.labels)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """The columns of all shards."""
        numbers: dict[tuple[type, Any], int] = {}
        label = [
            np.asarray([numbers.setdefault((type(text), text), len(numbers)) for text in columns.labels] or [0])[
                columns.numbers[:, 4]
            ]
            for columns in self._columns
        ]
        texts = [json.dumps(text).encode() for _, text in numbers]
        table = np.concatenate([columns.numbers for columns in self._columns] or [np.zeros((0, 6), np.int64)])
        found = {
            "length": table[:, 0],
            "offset": table[:, 1],
            "shard": np.repeat(np.arange(len(self._shards)), [len(columns.numbers) for columns in self._columns]),
            "id_end": np.cumsum(table[:, 2]),
            "video_bytes": table[:, 3],
            "label": np.concatenate(label) if label else [],
            "ids": np.frombuffer(b"".join(columns.ids for columns in self._columns), np.uint8),
            "rows": self._rows,
            "label_end": np.cumsum([len(text) for text in texts]),
            "labels": np.frombuffer(b"".join(texts), np.uint8),
        }
        return {name: np.ascontiguousarray(found[name], kind) for name, kind in _COLUMNS.items()}

    def write(self, store: Path) -> None:
        """Write the index of a store, atomically, after `finish`. Raises OSError."""
        columns = self._arrays()
        header: dict[str, Any] = {"format": FORMAT, "version": VERSION, "shards": self._shards, "newest": self._newest}
        places = {name: [1 << 40, len(column)] for name, column in columns.items()}
        offset = _aligned(len(json.dumps({**header, "columns": places})) + 1)
        for name, column in columns.items():
            places[name][0] = offset
            offset = _aligned(offset + column.nbytes)
        partial = store / f"{FILE}.partial-{socket.gethostname()}-{os.getpid()}"
        try:
            with partial.open("wb") as file:
                file.write(json.dumps({**header, "columns": places}).encode() + b"\n")
                for name, column in columns.items():
                    file.seek(places[name][0])
                    file.write(column.data)
                file.truncate(offset)
                sync(file)
            os.replace(partial, store / FILE)
            sync_folder(store)
        finally:
            partial.unlink(missing_ok=True)


def _aligned(offset: int) -> int:
    return -(-offset // 64) * 64
