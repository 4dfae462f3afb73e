"""The window sampler: what a batch holds, where it is shifted, random access, splits, resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from localmotion.errors import StoreError
from localmotion.video import Clip, ClipStore, ClipStoreWriter, WindowSampler
from localmotion.video.sample import is_heldout

S, N = 4, 3
LENGTHS = [12, 5, 30, 8, 7, 9, 25, 6, 11, 10, 13, 14]


def make_clip(number: int, T: int) -> Clip:
    """Every stored value tells its clip and frame: frames hold the clip, flow and tracks hold clip + frame / 64."""
    t = np.arange(T)
    frames = np.empty((T, S, S, 3), np.uint8)
    frames[..., 0], frames[..., 1:] = number, t[:, None, None, None]
    flow = np.broadcast_to((number + t / 64)[:, None, None, None], (T, S, S, 2)).astype(np.float16)
    flow[-1] = 0
    tracks = np.broadcast_to((number + t / 64)[:, None, None], (T, N, 2)).astype(np.float32)
    visible = np.ones((T, N), bool)
    visible[:, 1] = t % 3 > 0
    track_id = np.zeros((T, N), np.int32)
    track_id[:, 1] = 1
    track_id[:, 2] = 2 + t // 4  # redrawn at every fourth frame
    return Clip(f"v{number}.mp4", frames, flow, tracks, visible, track_id)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    path = tmp_path_factory.mktemp("sample") / "store"
    writer = ClipStoreWriter.open(path, S, {}, "abc", N, 5)
    clips = {f"v{i}.mp4": make_clip(i, T) for i, T in enumerate(LENGTHS)}
    for index, ids in writer.pending(clips):
        writer.write_shard(index, [clips[i] for i in ids])
    return ClipStore(path)


def sampler(store: ClipStore, length: int = 6, batch: int = 8, seed: int = 3, **options: Any) -> WindowSampler:
    return WindowSampler(store, length, batch, seed, **({"split": "all", "prefetch": False} | options))


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def test_a_batch_holds_the_motion_that_led_to_each_frame(store: ClipStore) -> None:
    windows = sampler(store)
    for index in range(20):
        batch = windows.batch(index)
        B, T = 8, 6
        assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
            "image": ((B, T, S, S, 3), torch.uint8),
            "flow": ((B, T, S, S, 2), torch.float16),
            "tracks": ((B, T, N, 2), torch.float32),
            "visible": ((B, T, N), torch.bool),
            "track_id": ((B, T, N), torch.int32),
            "is_first": ((B, T), torch.bool),
            "clip": ((B,), torch.int64),
            "start": ((B,), torch.int64),
        }
        assert batch["is_first"].tolist() == [[True] + [False] * (T - 1)] * B
        for b in range(B):
            number = int(store.ids[int(batch["clip"][b])][1:-4])
            t = torch.arange(T) + batch["start"][b]  # frame in the clip
            assert batch["image"][b, :, 0, 0, 0].tolist() == [number] * T
            assert batch["image"][b, :, 1, 2, 2].tolist() == t.tolist()
            assert not batch["flow"][b, 0].any()
            expected = (number + (t[1:] - 1) / 64).to(torch.float16)
            assert torch.equal(batch["flow"][b, 1:, 3, 1, 0], expected)
            assert torch.equal(batch["tracks"][b, 1:, 0, 1], (number + (t[1:] - 1) / 64).to(torch.float32))
            assert float(batch["tracks"][b, 0, 0, 0]) == number + float(t[0]) / 64
            assert not batch["visible"][b, 0].any()
            assert batch["visible"][b, 1:, 0].all()
            assert torch.equal(batch["visible"][b, 1:, 1], (t[1:] - 1) % 3 > 0)
            assert torch.equal(batch["visible"][b, 1:, 2], t[1:] % 4 != 0)
            assert batch["track_id"][b, 1:, 2].tolist() == (2 + (t[1:] - 1) // 4).tolist()
            assert batch["track_id"][b, 0, 2] == 2 + t[0] // 4


def test_windows_may_begin_with_copies_of_a_clips_first_frame(store: ClipStore) -> None:
    """Copies have no motion, and what follows is as without them. Each step of a clip is learned from at least as often as one in its
    middle: windows of 6 with a lead of 2 have three, so the first and the last are drawn three times as often as the others."""
    led, plain = sampler(store, lead=2), sampler(store)
    (long,) = np.flatnonzero(store.lengths == 30)
    places = [np.concatenate(both) for both in zip(*(led.positions(index) for index in range(4000)), strict=True)]
    counts = Counter(places[1][places[0] == long].tolist())
    each = 32_000 / 11 / 31  # eleven clips are long enough
    assert counts.keys() == set(range(-2, 25))
    for end in (-2, 24):
        assert abs(counts[end] - 3 * each) < 5 * (3 * each) ** 0.5  # five standard deviations
    assert abs(sum(counts[start] for start in range(-1, 24)) - 25 * each) < 5 * (25 * each) ** 0.5
    seen = set()
    for batch in (led.batch(index) for index in range(20)):
        for b, start in enumerate(batch["start"].tolist()):
            copies = max(-start, 0)
            seen.add(copies)
            (whole,) = [plain.windows(batch["clip"][b : b + 1].numpy(), np.array([max(start, 0)]))]
            for name in ("image", "flow", "tracks", "track_id", "visible"):
                assert torch.equal(batch[name][b, copies:], whole[name][0, : 6 - copies]), name
            assert (batch["image"][b, :copies] == whole["image"][0, 0]).all()
            assert not batch["flow"][b, :copies].any()
            assert not batch["visible"][b, :copies].any()
            assert batch["is_first"][b].tolist() == [True] + [False] * 5
    assert seen == {0, 1, 2}
    with pytest.raises(ValueError, match="lead 6"):
        sampler(store, lead=6)


def test_the_stream_is_the_batches_in_order_with_and_without_prefetch(store: ClipStore) -> None:
    plain, ahead = sampler(store), sampler(store, prefetch=True)
    for index in range(10):
        a, b = next(plain), next(ahead)
        assert_equal(a, b)
        assert_equal(a, sampler(store).batch(index))
    ahead.close()
    assert_equal(next(plain), next(ahead))


def test_resume_continues_exactly(store: ClipStore) -> None:
    first = sampler(store, prefetch=True)
    for _ in range(5):
        next(first)
    state = first.state_dict()
    rest = [next(first) for _ in range(4)]
    second = sampler(store, prefetch=True)
    next(second)  # something is under way for another position
    second.load_state_dict(state)
    for batch in rest:
        assert_equal(next(second), batch)
    first.load_state_dict(state)  # and backwards
    assert_equal(next(first), rest[0])
    for wrong in ({}, {"index": -1}, {"index": 1, "seed": 0}):
        with pytest.raises(ValueError):
            first.load_state_dict(wrong)
    first.close()
    second.close()


def test_positions_are_fixed_for_good(store: ClipStore) -> None:
    """Values written down: a change of them changes what every resumed run sees."""
    clips, starts = sampler(store, batch=4, seed=7).positions(1234)
    assert clips.tolist() == [0, 7, 2, 2]
    assert starts.tolist() == [6, 0, 0, 5]


def test_seeds_and_indices_give_different_draws(store: ClipStore) -> None:
    draws = {
        (seed, index): tuple(np.concatenate(sampler(store, seed=seed).positions(index)).tolist())
        for seed in (0, 1, 2**63)
        for index in range(30)
    }
    assert len(set(draws.values())) == len(draws)


def test_clips_and_starts_are_uniform(store: ClipStore) -> None:
    windows = sampler(store, length=6, batch=4096)
    drawn = [windows.positions(index) for index in range(10)]
    clips, starts = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    long_enough = [i for i, clip_id in enumerate(store.ids) if store.lengths[i] >= 6]
    assert sorted(set(clips.tolist())) == long_enough
    assert len(long_enough) == 11
    counts = np.asarray([Counter(clips.tolist())[i] for i in long_enough])
    expected = len(clips) / len(long_enough)
    assert ((counts - expected) ** 2 / expected).sum() < 35  # chi-square, 10 degrees of freedom: p = 0.0001
    for clip in long_enough:
        mine = starts[clips == clip]
        valid = int(store.lengths[clip]) - 6 + 1
        have = np.bincount(mine, minlength=valid)
        assert len(have) == valid
        assert have.min() > 0.6 * len(mine) / valid


def test_a_window_as_long_as_the_clip_has_one_start(store: ClipStore) -> None:
    windows = sampler(store, length=30)
    clips, starts = windows.positions(0)
    assert {store.ids[i] for i in clips} == {"v2.mp4"}
    assert set(starts.tolist()) == {0}
    assert windows.batch(0)["image"][0, -1, 0, 0, 1] == 29


def test_splits_are_disjoint_whole_and_stable(store: ClipStore) -> None:
    parts = {split: sampler(store, 1, split=split, heldout_fraction=0.3).clips for split in ("train", "heldout", "all")}
    assert sorted([*parts["train"], *parts["heldout"]]) == parts["all"].tolist() == list(range(12))
    assert {store.ids[i] for i in parts["heldout"]} == {i for i in store.ids if is_heldout(i, 0.3)}
    many = [f"clip{i}.mp4" for i in range(4000)]
    held = {i for i in many if is_heldout(i, 0.1)}
    assert 0.08 < len(held) / 4000 < 0.12
    assert held < {i for i in many if is_heldout(i, 0.2)}  # a larger part contains the smaller one
    assert [i for i in many[:40] if i in held] == ["clip10.mp4", "clip22.mp4", "clip32.mp4", "clip37.mp4"]


def test_what_cannot_be_drawn_is_told(store: ClipStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no clip has 31 frames: the longest of 12 clips has 30"):
        sampler(store, length=31)
    with pytest.raises(StoreError, match="none of 12 clips is in the heldout part"):
        sampler(store, split="heldout", heldout_fraction=0.0)
    writer = ClipStoreWriter.open(tmp_path / "empty", S, {}, "abc", N)
    writer.write_shard(0, [], [{"id": "x.mp4", "reason": "static"}])
    with pytest.raises(StoreError, match=r"holds no clips; all 1 videos were rejected \(1 static: x.mp4\)"):
        sampler(ClipStore(tmp_path / "empty"))
    wrong: list[dict[str, Any]] = [{"length": 0}, {"batch": 0}, {"seed": -1}, {"split": "test"}, {"heldout_fraction": 1}]
    for options in wrong:
        with pytest.raises(ValueError):
            sampler(store, **options)


def test_without_motion_its_files_are_not_touched(store: ClipStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = store.window
    monkeypatch.setattr(store, "window", lambda name, *args: asked.append(name) or real(name, *args))
    batch = sampler(store, motion=False).batch(0)
    assert set(batch) == {"image", "is_first", "clip", "start"}
    assert set(asked) == {"frames"}
    assert torch.equal(batch["image"], sampler(store).batch(0)["image"])


def test_batches_keep_their_memory(store: ClipStore) -> None:
    windows = sampler(store, prefetch=True)
    batches = [next(windows) for _ in range(8)]
    for index, batch in enumerate(batches):
        assert_equal(batch, sampler(store).batch(index))
    batches[0]["image"].zero_()  # writable, and nobody else's
    assert_equal(batches[1], sampler(store).batch(1))
    windows.close()


def test_an_error_while_reading_ahead_is_raised_where_the_batch_is_asked_for(
    store: ClipStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = sampler(store, prefetch=True)
    next(windows)
    assert windows._ahead is not None
    windows._ahead[1].result()

    def broken(*args: Any) -> None:
        raise StoreError("gone")

    monkeypatch.setattr(store, "window", broken)
    next(windows)  # was read before the fault
    with pytest.raises(StoreError, match="gone"):
        next(windows)
    monkeypatch.undo()
    position = windows.state_dict()["index"]
    assert_equal(next(windows), sampler(store).batch(position))
    windows.close()
