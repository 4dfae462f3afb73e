"""Stores in object storage, through fsspec: the local file system and the one in memory stand for it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmotion.errors import StoreError
from localmotion.perception import Recipe, extract_shards
from localmotion.video import ClipStore
from localmotion.video.finish import finish_store
from localmotion.video.history import Limits
from localmotion.video.manifest import write_manifest
from localmotion.video.remote import Remote, is_remote, place_of
from localmotion.video.sources import open_videos
from video_files import encode, moving_square

fsspec = pytest.importorskip("fsspec")
FAST = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    (folder / "in").mkdir()
    for number in range(4):
        encode(folder / "in" / f"{number}.mp4", moving_square(12, seed=number))
    (folder / "in/x.mp4").write_text("no video")
    write_manifest(folder / "m.jsonl", folder / "in", open_videos(folder / "in")[0], Limits(5, 10))
    return folder / "m.jsonl"


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LOCALMOTION_CACHE", str(tmp_path / "cache"))
    yield f"file://{tmp_path}/far/store" if request.param == "file" else f"memory://{uuid.uuid4().hex}/store"
    fsspec.filesystem("memory").store.clear()


def part(manifest: Path, out: Path | str, number: int = 0, parts: int = 1) -> Any:
    return extract_shards(manifest, out, FAST, number, parts, workers=0, shard_clips=2)


def test_parts_write_and_a_store_reads_what_a_folder_would_hold(manifest: Path, tmp_path: Path, address: str) -> None:
    part(manifest, tmp_path / "near")
    finish_store(tmp_path / "near")
    near = ClipStore(tmp_path / "near")
    found = part(manifest, address, 0, 2)
    assert (found.shards, found.clips) == (2, 2)
    assert f"frames in {address}" in found.lines()[0]
    with pytest.raises(StoreError, match="1 of 3 shards are missing"):
        finish_store(address)
    part(manifest, address, 1, 2)
    assert part(manifest, address, 0, 2).there == 2
    assert not list((tmp_path / "cache").rglob("frames.u8"))  # a shard that was uploaded is removed here
    with pytest.raises(StoreError, match="run localmotion store finish first"):
        ClipStore(address)
    finish_store(address)
    far = ClipStore(address)
    assert not list((tmp_path / "cache").rglob("frames.u8"))
    assert (list(far.ids), list(far.infos), far.lengths.tolist()) == (list(near.ids), list(near.infos), near.lengths.tolist())
    for clip in range(len(near)):
        np.testing.assert_array_equal(far.window("flow", clip), near.window("flow", clip))
    far.verify()
    assert far.rejected == near.rejected
    remote = Remote(address)
    for index in near._shard_indices:
        for name, size in remote.sizes(index).items():
            assert size == (tmp_path / "near/shards" / f"{index:05d}" / name).stat().st_size


def test_an_upload_that_broke_off_is_made_again(
    manifest: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sent = Remote.put, []

    def put(self: Remote, file: Path, name: str) -> None:
        if name.startswith("shards/") and len(sent) == 3:
            raise StoreError("the line is down")
        sent.append(name)
        real(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put", put)
        with pytest.raises(StoreError, match="the line is down"):
            part(manifest, address)
    assert Remote(address).shards() == []
    assert part(manifest, address).shards == 2  # the first was made before
    finish_store(address)
    ClipStore(address).verify()


def test_what_is_an_address() -> None:
    assert is_remote("s3://bucket/store")
    assert not is_remote("store:/x")
    assert not is_remote(Path("s3://bucket"))
    assert place_of("a/b") == Path("a/b")
    assert place_of("gs://b/c") == "gs://b/c"
