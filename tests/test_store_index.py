"""The index of a store of ten thousand shards: opening it reads no shard, and only what is asked for is in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from localmotion.errors import StoreError
from localmotion.video.store import ClipStore, ClipStoreWriter
from localmotion.video.store_index import IndexWriter, ShardColumns, shard_columns

SHARDS, CLIPS = 10_000, 50

OPEN = """
import sys, time
from localmotion.video.store import ClipStore
def memory():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS:"))) / 1024
before, began = memory(), time.process_time()
store = ClipStore(sys.argv[1])
store.ids[len(store) - 1]
print(len(store), time.process_time() - began, memory() - before)
"""


def large_store(path: Path) -> None:
    """A store of empty shards and an index of half a million clips."""
    ClipStoreWriter.open(path, 8, {}, "0" * 16, 2)
    index = IndexWriter()
    width = len(b"00000/000.mp4")
    numbers = np.zeros((CLIPS, 6), np.int64)
    numbers[:, 0], numbers[:, 1], numbers[:, 2], numbers[:, 3] = 25, 25 * np.arange(CLIPS), width, width
    for shard in range(SHARDS):
        os.mkdir(path / "shards" / f"{shard:05d}")
        ids = b"".join(b"%05d/%03d.mp4" % (shard, clip) for clip in range(CLIPS))
        columns = numbers.copy()
        columns[:, 5] = np.arange(shard * CLIPS, (shard + 1) * CLIPS)
        index.add(shard, ShardColumns(columns, ids, [None]), [])
    assert index.finish() == (SHARDS * CLIPS, SHARDS * CLIPS * 25)
    index.write(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_a_store_of_ten_thousand_shards_opens_at_once(tmp_path: Path) -> None:
    large_store(tmp_path)
    done = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, check=True)
    clips, seconds, memory = (float(value) for value in done.stdout.split())
    assert clips == SHARDS * CLIPS
    assert seconds < 1  # CPU seconds: a busy machine changes them little
    assert memory < 200
    store = ClipStore(tmp_path)
    assert (store.ids[0], store.ids[-1], store.videos[51]) == ("00000/000.mp4", "09999/049.mp4", "00001/001.mp4")
    assert store.ids[3:5] == ["00000/003.mp4", "00000/004.mp4"]
    with pytest.raises(IndexError):
        store.ids[len(store)]


def entry(name: str, offset: int, label: int | str | None = None, video: str = "") -> dict[str, object]:
    return {"id": name, "frames": 3, "offset": offset, "label": label, "source": {"video": video or name}, "info": {}}


def index_of(path: Path, *shards: list[dict[str, object]]) -> None:
    ClipStoreWriter.open(path, 8, {}, "0" * 16, 2)
    index = IndexWriter()
    for number, entries in enumerate(shards):
        os.makedirs(path / "shards" / f"{number:05d}", exist_ok=True)
        index.add(number, shard_columns(number, entries), [])
    index.finish()
    index.write(path)


def test_labels_and_names_of_every_kind(tmp_path: Path) -> None:
    first = [entry("a.mp4", 0, 1), entry("a.mp4#000003-000006", 3, 1, "a.mp4"), entry("видео\udce9", 6, "1")]
    index_of(tmp_path, first, [entry("z", 0), entry("z2", 3, "push, pull")], [])
    store = ClipStore(tmp_path)
    assert list(store.labels) == [1, 1, "1", None, "push, pull"]
    assert list(store.ids) == ["a.mp4", "a.mp4#000003-000006", "видео\udce9", "z", "z2"]
    assert list(store.videos) == ["a.mp4", "a.mp4", "видео\udce9", "z", "z2"]
    assert list(store._shards) == [0, 0, 0, 1, 1]


def test_an_id_twice_or_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="stored twice"):
        index_of(tmp_path / "a", [entry("a", 0)], [entry("a", 0)])
    with pytest.raises(StoreError, match="does not begin with the name of its video"):
        index_of(tmp_path / "b", [entry("a", 0, video="b")])


@pytest.mark.parametrize("name", ["../x", "/x"])
def test_an_index_names_no_place_outside(name: str, tmp_path: Path) -> None:
    index_of(tmp_path, [entry(name, 0)])
    with pytest.raises(StoreError, match="is not a plain relative name"):
        list(ClipStore(tmp_path).ids)
