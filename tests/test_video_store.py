"""The clip store: round trip, continuation byte for byte, faults."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmotion.errors import StoreError
from localmotion.video import Clip, ClipStore, ClipStoreWriter
from localmotion.video import store as store_module
from property_examples import examples

SIZE, TRACKS = 8, 3
RECIPE = {"size": SIZE, "flow": "dis", "options": {"a": 1}}
IDS = [f"v/{i:02d}.mp4" for i in range(11)]
REJECTED = {"v/03.mp4", "v/10.mp4"}


def make_clip(clip_id: str, seed: int | None = None) -> Clip:
    seed = int(clip_id[2:4]) if seed is None else seed
    rng = np.random.default_rng(seed)
    T = 3 + seed % 5
    flow = rng.normal(size=(T, SIZE, SIZE, 2)).astype(np.float16)
    flow[-1] = 0
    return Clip(
        id=clip_id,
        frames=rng.integers(0, 256, (T, SIZE, SIZE, 3), np.uint8),
        flow=flow,
        tracks=rng.normal(size=(T, TRACKS, 2)).astype(np.float32),
        visible=rng.random((T, TRACKS)) < 0.5,
        track_id=rng.integers(0, 99, (T, TRACKS), np.int32),
        label=seed,
        source={"sha256": f"{seed:064x}", "bytes": 100 + seed},
        info={"redraws": seed, "quantiles": [0.5, 1.5]},
    )


def open_writer(path: Path, **changes: Any) -> ClipStoreWriter:
    values: dict[str, Any] = {"size": SIZE, "recipe": RECIPE, "recipe_hash": "abc", "tracks": TRACKS, "shard_clips": 4}
    return ClipStoreWriter.open(path, **(values | changes))


def write(writer: ClipStoreWriter, index: int, ids: list[str]) -> None:
    clips = [make_clip(i) for i in ids if i not in REJECTED]
    writer.write_shard(index, clips, [{"id": i, "reason": "static"} for i in ids if i in REJECTED])


def write_all(path: Path, ids: list[str] = IDS) -> Path:
    writer = open_writer(path)
    for index, some in writer.pending(ids):
        write(writer, index, some)
    return path


def content(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("reference") / "store")


def test_round_trip(reference: Path) -> None:
    store = ClipStore(reference)
    assert store.ids == [i for i in IDS if i not in REJECTED]
    assert (store.size, store.tracks, store.recipe, store.recipe_hash) == (SIZE, TRACKS, RECIPE, "abc")
    assert store.rejected == [{"id": i, "reason": "static"} for i in sorted(REJECTED)]
    assert len(store) == 9
    for number, clip_id in enumerate(store.ids):
        have, want = store.clip(number), make_clip(clip_id)
        for name in ("frames", "flow", "tracks", "visible", "track_id"):
            np.testing.assert_array_equal(getattr(have, name), getattr(want, name))
            assert getattr(have, name).dtype == getattr(want, name).dtype
            assert not getattr(have, name).flags.writeable
        assert (have.id, have.label, have.source, have.info) == (want.id, want.label, want.source, want.info)
        assert store.lengths[number] == len(want.frames)
        np.testing.assert_array_equal(store.window("tracks", number, 1, 3), want.tracks[1:3])
    assert store.infos[0] == make_clip(store.ids[0]).info
    assert store.nbytes == sum(p.stat().st_size for p in reference.rglob("shards/*/*.[ufi]*[0-9]"))
    store.verify()
    with pytest.raises(StoreError, match="requested 1:99"):
        store.window("frames", 0, 1, 99)


def test_layout_is_the_documented_one(reference: Path) -> None:
    """Read without the library: other programs may."""
    header = json.loads((reference / "store.json").read_text())
    assert (header["format"], header["version"]) == ("localmotion-clips", 1)
    assert header["arrays"]["flow"] == {"file": "flow.f16", "dtype": "<f2", "shape": [SIZE, SIZE, 2]}
    shard = json.loads((reference / "shards/00001/shard.json").read_text())
    entry = shard["clips"][1]
    assert entry["id"] == "v/05.mp4"
    flow = np.fromfile(reference / "shards/00001/flow.f16", "<f2").reshape(-1, SIZE, SIZE, 2)
    clip = flow[entry["offset"] : entry["offset"] + entry["frames"]]
    np.testing.assert_array_equal(clip, make_clip("v/05.mp4").flow)
    assert sorted(os.listdir(reference / "shards")) == ["00000", "00001", "00002"]


class KillError(Exception):
    """Stands for the death of the process."""


@examples(25)
@given(order=st.permutations(range(3)), kills=st.lists(st.integers(0, 25), max_size=4))
def test_any_order_and_any_interruption_gives_the_same_bytes(
    reference: Path, tmp_path_factory: pytest.TempPathFactory, order: list[int], kills: list[int]
) -> None:
    path = tmp_path_factory.mktemp("again") / "store"
    for kill in [*kills, None]:
        with pytest.MonkeyPatch.context() as patch:

            def die(patch: pytest.MonkeyPatch = patch) -> BaseException:
                # A killed process cleans nothing up.
                patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
                patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
                return KillError()

            if kill is not None:
                patch.setattr(os, "fsync", failing_fsync(kill, die))
            try:
                writer = open_writer(path)
                todo = writer.pending(IDS)
                for index, some in sorted(todo, key=lambda pair: order.index(pair[0])):
                    write(writer, index, some)
            except KillError:
                continue
    assert content(path) == content(reference)


def failing_fsync(after: int, make_error: Callable[[], BaseException]) -> Callable[[int], None]:
    calls = iter(range(10**6))

    def fsync(handle: int) -> None:
        if next(calls) >= after:
            raise make_error()

    return fsync


def test_added_videos_go_to_further_shards(reference: Path, tmp_path: Path) -> None:
    path = shutil.copytree(reference, tmp_path / "store")
    writer = open_writer(path)
    assert writer.pending(IDS) == []
    assert writer.done_ids() == set(IDS)
    assert writer.pending([*IDS, "v/00b.mp4", "v/99.mp4"]) == [(3, ["v/00b.mp4", "v/99.mp4"])]
    before = content(path)
    write(writer, 3, ["v/99.mp4"])
    assert {k: v for k, v in content(path).items() if "/00003/" not in k} == before
    assert "v/99.mp4" in ClipStore(path).ids


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe_hash": "xyz", "recipe": RECIPE | {"flow": "sea_raft"}}, ["abc", "xyz", "flow 'dis' -> 'sea_raft'"]),
        ({"size": 16}, ["size 8", "16"]),
        ({"tracks": 4}, ["tracks 3", "4"]),
        ({"shard_clips": 5}, ["shard_clips 4", "5"]),
    ],
)
def test_another_recipe_is_refused(reference: Path, change: dict[str, Any], told: list[str]) -> None:
    before = content(reference)
    with pytest.raises(StoreError) as caught:
        open_writer(reference, **change)
    assert all(text in str(caught.value) for text in [*told, str(reference)]), str(caught.value)
    assert content(reference) == before


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        open_writer(tmp_path)
    assert os.listdir(tmp_path) == ["precious.txt"]
    with pytest.raises(StoreError, match="no clip store"):
        ClipStore(tmp_path)
    (tmp_path / "store.json").write_text('{"format": "other"}')
    with pytest.raises(StoreError, match="not a clip store"):
        ClipStore(tmp_path)


def test_disk_full_keeps_earlier_shards_and_can_be_continued(reference: Path, tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "store")
    first, second, third = writer.pending(IDS)
    write(writer, *first)
    before = content(tmp_path)
    for after in range(8):  # at each file of the shard in turn
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", failing_fsync(after, lambda: OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(StoreError, match=r"disk full while writing shard 00001.*run the same command again"):
                write(writer, *second)
        assert content(tmp_path) == before
    for pair in (second, third):
        write(writer, *pair)
    assert content(tmp_path / "store") == content(reference)


def test_real_write_limits_and_lack_of_space_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path / "store")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match="disk full"):
            write(writer, 0, IDS[:4])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(StoreError, match="disk full"):
        write(writer, 0, IDS[:4])
    assert os.listdir(tmp_path / "store/shards") == []


def test_leftovers_of_dead_processes_go_and_others_stay(tmp_path: Path) -> None:
    open_writer(tmp_path)
    host = socket.gethostname()
    names = {f"00000.partial-{host}-4194999": False, "00000.partial-elsewhere-1": True, f"00000.partial-{host}-1": True}
    for name in names:
        (tmp_path / "shards" / name).mkdir()
    open_writer(tmp_path)
    assert set(os.listdir(tmp_path / "shards")) == {name for name, stays in names.items() if stays}
    assert len(ClipStore(tmp_path)) == 0


def test_the_slower_of_two_writers_changes_nothing(reference: Path, tmp_path: Path) -> None:
    path = shutil.copytree(reference, tmp_path / "store")
    writer = open_writer(path)
    real = Path.exists
    with pytest.MonkeyPatch.context() as patch:  # the other one finishes after this one has looked
        patch.setattr(Path, "exists", lambda p: False if p.name == "00001" else real(p))
        write(writer, 1, IDS[4:8])
    assert content(path) == content(reference)


@pytest.mark.parametrize("name", ["frames.u8", "flow.f16", "tracks.f32", "visible.u8", "track_id.i32", "shard.json"])
def test_damaged_shards_are_named_with_the_mend(reference: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(reference, tmp_path / "store")
    file = path / "shards/00001" / name
    data = file.read_bytes()
    for damage in (data[:-1], data + b"\0", b"", None):
        file.unlink() if damage is None else file.write_bytes(damage)
        for use in (lambda: ClipStore(path), lambda: open_writer(path).pending(IDS)):
            with pytest.raises(StoreError, match=r"shard 00001 is damaged .*delete that shard folder and run the same"):
                use()
    # The mend works.
    shutil.rmtree(path / "shards/00001")
    with pytest.raises(StoreError, match="shard 00001 is missing"):
        ClipStore(path)
    assert len(ClipStore(path, partial=True)) == 5
    write_all(path)
    assert content(path) == content(reference)


def test_changed_bytes_are_found_by_verify(reference: Path, tmp_path: Path) -> None:
    path = shutil.copytree(reference, tmp_path / "store")
    file = path / "shards/00002/flow.f16"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard 00002 is damaged \(flow\.f16"):
        ClipStore(path).verify()


@pytest.mark.parametrize(
    "change",
    [
        {"clips": None},
        {"clips": [{"id": "../../x", "frames": 3, "offset": 0, "label": None, "info": {}, "source": {}}]},
        {"clips": [{"id": "x", "frames": -3, "offset": 0, "label": None, "info": {}, "source": {}}]},
        {"clips": [{"id": "x", "frames": 10**9, "offset": 0, "label": None, "info": {}, "source": {}}]},
        {"clips": [{"id": "x", "frames": 3, "offset": 5, "label": None, "info": {}, "source": {}}]},
        {"clips": [{"id": "x", "frames": 3, "offset": 0, "label": None, "info": [], "source": {}}]},
        {"files": {}},
    ],
)
def test_a_forged_index_is_refused(reference: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    path = shutil.copytree(reference, tmp_path / "store")
    file = path / "shards/00000/shard.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(StoreError, match="shard 00000 is damaged"):
        ClipStore(path)


@pytest.mark.parametrize("change", [{"version": 2}, {"size": -1}, {"size": True}, {"arrays": {}}, {"recipe": None}])
def test_a_forged_header_is_refused(reference: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    path = shutil.copytree(reference, tmp_path / "store")
    file = path / "store.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(StoreError, match=r"store\.json"):
        ClipStore(path)


def test_impossible_clips_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    good = vars(make_clip("v/01.mp4"))
    nan = good["flow"].copy()
    nan[0, 0, 0, 0] = np.nan
    moving = good["flow"].copy()
    moving[-1, 0, 0, 0] = 1
    faults = {
        "flow": [nan, moving, good["flow"].astype(np.float32), good["flow"][:-1]],
        "frames": [good["frames"][:, :4], good["frames"][:0], good["frames"].astype(np.int64)],
        "tracks": [good["tracks"] * np.inf, good["tracks"][:, :2]],
        "visible": [good["visible"].astype(np.uint8)],
        "id": ["", "/etc/passwd", "../x", "a/../../x", "a\0b"],
    }
    for name, values in faults.items():
        for value in values:
            with pytest.raises(StoreError):
                writer.write_shard(0, [Clip(**(good | {name: value}))])
    with pytest.raises(StoreError, match="twice"):
        writer.write_shard(0, [Clip(**good)], [{"id": "v/01.mp4", "reason": "static"}])
    assert os.listdir(tmp_path / "shards") == []


def test_odd_file_names_survive(tmp_path: Path) -> None:
    names = ["ä/\udcff.mp4", "new\nline.mp4", 'quote".mp4', "..dots.mp4"]
    writer = open_writer(tmp_path)
    writer.write_shard(0, [make_clip(name, 1) for name in names], [{"id": "\udcfe.mp4", "reason": "static"}])
    store = ClipStore(tmp_path)
    assert store.ids == sorted(names)
    assert writer.done_ids() == {*names, "\udcfe.mp4"}


def test_a_shard_may_hold_nothing_but_rejected_videos(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write_shard(0, [], [{"id": "a.mp4", "reason": "static"}])
    writer.write_shard(1, [make_clip("v/01.mp4")])
    store = ClipStore(tmp_path)
    assert len(store) == 1
    np.testing.assert_array_equal(store.clip(0).frames, make_clip("v/01.mp4").frames)


def test_many_shards_do_not_hold_many_files_open(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_OPEN_FILES", 2)
    store = ClipStore(reference)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(len(store)), 0, 8, 4]:
        np.testing.assert_array_equal(store.clip(number).flow, make_clip(store.ids[number]).flow)
    assert len(os.listdir("/proc/self/fd")) <= before + 3
