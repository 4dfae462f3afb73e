"""Replay: windows stay inside episodes, shorter episodes follow one another, ends are prioritised as specified, saving is exact."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from localmotion.config import OnlineConfig
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError
from localmotion.perception.companding import KNEE, Companding
from localmotion.replay import Replay, Storage, _sent
from localmotion.training import storage as place
from localmotion.training.storage import available_memory, choose_storage, records_needed
from property_examples import examples

SPEC: dict[str, tuple[tuple[int, ...], str]] = {
    "image": ((2, 2, 3), "uint8"),
    "action": ((1,), "float32"),
    "reward": ((), "float32"),
    "is_terminal": ((), "bool"),
}


def fill(replay: Replay, lengths: list[int], first: int = 0) -> None:
    """Each record's reward names episode and time: 1000 * episode + t."""
    for number, length in enumerate(lengths, first):
        for t in range(length):
            record: dict[str, Any] = {
                "image": np.full((2, 2, 3), t % 256, np.uint8),
                "action": np.array([t], np.float32),
                "reward": 1000.0 * number + t,
                "is_terminal": False,
            }
            replay.add(record, last=t == length - 1)


@examples(40)
@given(st.lists(st.integers(5, 30), min_size=1, max_size=6), st.booleans(), st.integers(0, 1000))
def test_windows_never_cross_episodes(lengths: list[int], ends: bool, seed: int) -> None:
    replay = Replay(SPEC, capacity=10_000, length=5, prioritize_ends=ends, seed=seed)
    fill(replay, lengths)
    batch = replay.sample(16)
    reward = batch["reward"]
    assert torch.equal(reward.diff(dim=1), torch.ones(16, 4))
    assert batch["is_first"][:, 0].all()
    assert not batch["is_first"][:, 1:].any()
    assert (batch["action"][:, 0] == 0).all()
    assert torch.equal(batch["action"][:, 1:, 0] % 1000, reward[:, 1:] % 1000)


def test_prioritised_ends_have_the_specified_probability() -> None:
    # as in IPV's release: 501 records, windows of 50: the last window has probability 51/502 instead of 1/452
    replay = Replay(SPEC, capacity=10_000, length=50, prioritize_ends=True, seed=0)
    fill(replay, [501])
    last = (replay.sample(20_000)["reward"][:, -1] == 500).float().mean().item()
    assert last == pytest.approx(51 / 502, abs=0.008)


@examples(40)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.booleans(), st.integers(0, 1000))
def test_a_sequence_is_filled_with_pieces_of_episodes(lengths: list[int], ends: bool, seed: int) -> None:
    """Whole short episodes, then what fits of another; each piece begins as a window does."""
    replay = Replay(SPEC, capacity=10_000, length=9, prioritize_ends=ends, seed=seed)
    fill(replay, lengths)
    batch = replay.sample(8)
    for reward, action, first in zip(batch["reward"], batch["action"][:, 0:, 0], batch["is_first"], strict=True):
        starts = first.nonzero().flatten().tolist()
        assert starts[0] == 0
        for begin, end in itertools.pairwise([*starts, 9]):
            piece = reward[begin:end].int().tolist()
            episode, time = divmod(piece[0], 1000)
            assert piece == list(range(piece[0], piece[0] + end - begin))
            assert time + len(piece) <= lengths[episode]
            assert len(piece) == min(lengths[episode], 9 - begin)  # no room is left, and no short episode is cut before its end
            assert action[begin:end].tolist() == [0.0, *range(time + 1, time + len(piece))]


def test_an_episode_of_a_reset_alone_is_dropped_and_counted_and_capacity_evicts_oldest() -> None:
    replay = Replay(SPEC, capacity=25, length=5)
    fill(replay, [1, 10, 10, 10, 1])
    assert replay.dropped == 2
    assert len(replay) == 20
    assert [episode.serial for episode in replay.episodes] == [1, 2]


@pytest.mark.parametrize(("first", "second"), [*itertools.product(("memory", "disk", "device"), repeat=2)])
def test_save_and_load_continue_the_same_samples(first: Storage, second: Storage, tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, seed=3, folder=tmp_path, storage=first, rows=1000)
    fill(replay, [10, 12])
    replay.sample(4)
    replay.save()
    state = replay.state()
    expected = replay.sample(8)
    other = Replay(SPEC, capacity=1000, length=5, seed=99, folder=tmp_path, storage=second, rows=1000)
    other.load(state)
    for key, value in other.sample(8).items():
        assert torch.equal(value, expected[key]), key


def test_damage_and_misuse_are_named(tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, folder=tmp_path)
    with pytest.raises(LocalmotionError, match="complete episode"):
        replay.sample(1)
    fill(replay, [10])
    replay.save()
    state = replay.state()
    path = next(tmp_path.glob("episode_*"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="episode_0000000"):
        replay.load(state)
    record: dict[str, Any] = {
        "image": np.zeros((2, 2, 3)),
        "action": np.zeros(1),
        "reward": float("nan"),
        "is_terminal": False,
    }
    with pytest.raises(LocalmotionError, match="not finite"):
        replay.add(record, last=False)
    with pytest.raises(LocalmotionError, match="keys"):
        replay.add({"reward": 0.0}, last=False)


@pytest.mark.parametrize("storage", ["memory", "disk", "device"])
def test_saved_files_shrink_to_what_checkpoints_name(storage: Storage, tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=25, length=5, folder=tmp_path, storage=storage, rows=1000)
    fill(replay, [10, 10])
    replay.save()
    fill(replay, [10], first=2)
    replay.save()
    replay.prune(set(replay.state()["episodes"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["episode_0000001.safetensors", "episode_0000002.safetensors"]
    replay.prune({1})
    assert len(list(tmp_path.iterdir())) == 2  # an episode of the buffer stays, whether a checkpoint has it or not
    fill(replay, [10], first=3)
    replay.save()
    replay.prune({1})
    assert len(list(tmp_path.iterdir())) == 3  # and one that has left the buffer, if a checkpoint has it


MOTION: dict[str, tuple[tuple[int, ...], str]] = {**SPEC, "flow": ((4, 4, 2), "float16"), "visible": ((3,), "bool")}


def moving(rng: np.random.Generator, t: int) -> dict[str, Any]:
    return {
        "image": rng.integers(0, 256, (2, 2, 3), np.uint8),
        "action": rng.standard_normal(1).astype(np.float32),
        "reward": float(t),
        "is_terminal": False,
        "flow": (rng.standard_normal((4, 4, 2)) * 3).astype(np.float16),
        "visible": rng.random(3) < 0.5,
    }


@examples(25)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=2, max_size=12),
    capacity=st.integers(20, 60),
    prepared=st.lists(st.booleans(), min_size=12, max_size=12),
    ends=st.booleans(),
    seed=st.integers(0, 99),
)
def test_all_storages_give_the_same_batches(
    lengths: list[int], capacity: int, prepared: list[bool], ends: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Between episodes that come and go, with batches made ahead or not, and where a run was stopped and goes on."""
    settings: dict[str, Any] = {"capacity": capacity, "length": 6, "seed": seed, "prioritize_ends": ends, "rows": capacity}

    def make(kind: Storage) -> Replay:
        return Replay(MOTION, **settings, coders={"flow": Companding(4)}, folder=tmp_path_factory.mktemp("r"), storage=kind)

    def play(replay: Replay, prepares: bool = False) -> list[dict[str, torch.Tensor]]:
        rng, batches = np.random.default_rng(seed), []
        for number, length in enumerate(lengths):
            for t in range(length):
                replay.add(moving(rng, t), last=t == length - 1)
            if replay.episodes and prepares and prepared[number]:
                replay.prepare(8)
            if replay.episodes and number % 3:
                batches.append(replay.sample(8))
        return batches

    held, filed, ahead, ring = make("memory"), make("disk"), make("memory"), make("device")
    expected = play(held)
    found = [play(filed), play(ahead, prepares=True), play(ring)]
    assert all(episode.arrays is None for replay in (filed, ring) for episode in replay.episodes)
    if ahead.episodes:
        ahead.save()
        ahead.prepare(8)  # what is saved now must still give this batch
        again = Replay(MOTION, **settings, coders={"flow": Companding(4)}, folder=ahead.folder, storage="device")
        again.load(ahead.state())
        expected.append(held.sample(8))
        found = [[*batches, replay.sample(8)] for batches, replay in zip(found, (filed, ahead, ring), strict=True)]
        found.append([*expected[:-1], again.sample(8)])
    assert len({len(replay) for replay in (held, filed, ahead, ring)}) == 1
    for batches in found:
        for one, two in zip(expected, batches, strict=True):
            assert one["flow"].dtype == torch.float16
            assert one.keys() == two.keys()
            for key, value in one.items():
                assert torch.equal(value, two[key]), key
    for mine, theirs, placed in zip(held.newest("flow", 2), filed.newest("flow", 2), ring.newest("flow", 2), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(mine, placed)


def test_a_batch_made_ahead_is_drawn_again_where_an_episode_came_in() -> None:
    replay, plain = Replay(SPEC, capacity=10_000, length=5), Replay(SPEC, capacity=10_000, length=5)
    fill(replay, [20])
    fill(plain, [20])
    replay.prepare(8)
    kept = replay._ready
    assert kept
    replay.prepare(8)
    assert replay._ready is kept
    assert replay.sample(8) is kept.batch  # nothing came in: no second gathering
    plain.sample(8)
    replay.prepare(8)
    fill(replay, [30], first=1)
    fill(plain, [30], first=1)
    assert torch.equal(replay.sample(8)["reward"], plain.sample(8)["reward"])
    replay.prepare(8)
    assert torch.equal(replay.sample(3)["reward"], plain.sample(3)["reward"])
    replay.prepare(4, lambda batch: {key: value.to("meta") for key, value in batch.items()})
    assert {value.device.type for value in replay.sample(4).values()} == {
        "meta"
    }  # sent when it was made, not when it is asked for


def test_a_replay_on_the_device_is_sampled_without_waiting_for_it(tmp_path: Path) -> None:
    """On `meta`, where there is no value to wait for, all of it can be launched."""
    replay = Replay(
        MOTION, capacity=50, length=3, coders={"flow": Companding(4)}, folder=tmp_path, storage="device", rows=50, device="meta"
    )
    rng = np.random.default_rng(0)
    for t in range(20):
        replay.add(moving(rng, t), last=t == 19)
    batch = replay.sample(4)
    assert {value.device.type for value in batch.values()} == {"meta"}
    assert batch["flow"].shape == (4, 3, 4, 4, 2)
    for t in range(2):
        replay.add(moving(rng, t), last=t == 1)
    assert replay.sample(16)["is_first"].device.type == "meta"


def test_a_ring_holds_no_more_than_its_rows(tmp_path: Path) -> None:
    small = Replay(SPEC, capacity=50, length=3, folder=tmp_path, storage="device", rows=10)
    with pytest.raises(LocalmotionError, match=r"11 records.*10 on the device"):
        fill(small, [11])
    small = Replay(SPEC, capacity=50, length=3, folder=tmp_path / "more", storage="device", rows=10)
    fill(small, [6, 4, 5])  # the ring is the smaller limit: what it would overwrite has left
    assert [episode.length for episode in small.episodes] == [4, 5]
    rewards = small.sample(16)["reward"]
    assert torch.equal(rewards.diff(dim=1), torch.ones(16, 2))
    with pytest.raises(ValueError, match="folder"):
        Replay(SPEC, capacity=50, length=3).place("device", 50)
    placed = Replay(SPEC, capacity=50, length=3, folder=tmp_path / "placed", coders={})
    placed.place("device", 50)
    fill(placed, [4])
    assert placed.sample(2)["reward"].shape == (2, 3)


@given(st.lists(st.floats(-70, 70, width=16), min_size=1, max_size=50))
def test_flow_keeps_small_motion_and_three_percent_of_large(values: list[float]) -> None:
    coder, flow = Companding(64), np.array(values, np.float16)
    codes = coder.encode(flow)
    decoded = coder.decode(codes)
    assert codes.dtype == coder.dtype == np.int8
    bounded = np.clip(flow.astype(np.float64), -64, 64)
    assert (np.abs(decoded - bounded) <= 0.001 + 0.031 * np.abs(bounded)).all()
    np.testing.assert_array_equal(coder.encode(decoded), codes)
    np.testing.assert_array_equal(coder.decode(coder.encode(-flow)), -decoded)


@pytest.mark.parametrize("storage", ["memory", "disk", "device"])
def test_a_replay_of_before_flow_was_coded_is_read(storage: Storage, tmp_path: Path) -> None:
    old = Replay(MOTION, capacity=100, length=3, folder=tmp_path)
    rng = np.random.default_rng(0)
    for t in range(12):
        old.add(moving(rng, t), last=t == 11)
    old.save()
    new = Replay(MOTION, capacity=100, length=3, folder=tmp_path, storage=storage, rows=100, coders={"flow": Companding(64)})
    new.load(old.state())
    one, other = old.sample(6), new.sample(6)
    for key, value in one.items():
        assert torch.allclose(value, other[key], atol=0.001, rtol=0.04) if key == "flow" else torch.equal(value, other[key]), key
    assert not torch.equal(one["flow"], other["flow"])


def test_flow_codes_are_those_of_the_formula() -> None:
    coder = Companding(64)
    every = np.arange(256, dtype=np.uint8).view(np.int8).reshape(2, 128)[:, ::2]
    expected_flow = np.sign(every) * KNEE * np.expm1(np.abs(every.astype(float)) * np.log1p(64 / KNEE) / 127)
    np.testing.assert_allclose(coder.decode(every), expected_flow, rtol=1e-3, atol=1e-6)
    assert coder.decode(np.zeros((0, 4), np.int8)).shape == (0, 4)
    for value in (0.0, 0.01, KNEE, 0.5, 3.0, 64.0, 1000.0):
        expected = round(127 * np.log1p(min(value, 64) / KNEE) / np.log1p(64 / KNEE))
        assert coder.encode(np.array([value, -value], np.float16)).tolist() == [expected, -expected]
    with pytest.raises(LocalmotionError, match="not numbers"):
        coder.encode(np.array([np.nan], np.float16))


def test_a_million_drp_transitions_take_less_than_25_gigabytes() -> None:
    from localmotion.acting.observer import Observer
    from localmotion.envs import make_env
    from localmotion.recipe import Recipe

    spec = Observer(make_env("toy:dot"), Recipe(percept_size=64)).spec()
    replay = Replay(spec, capacity=1_000_000, length=50, coders={"flow": Companding(64)})
    assert replay.bytes_per_record * 1_000_000 < 21.5e9


@pytest.mark.parametrize("storage", ["memory", "disk", "device"])
def test_episodes_filed_after_the_checkpoint_are_played_again(storage: Storage, tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, folder=tmp_path, storage=storage, rows=1000)
    fill(replay, [10])
    replay.save()
    state = replay.state()
    fill(replay, [11, 12], first=1)
    replay.save()
    for number in (0, 3):
        (tmp_path / f"episode_000000{number}.tmp").write_bytes(b"half")
    again = Replay(SPEC, capacity=1000, length=5, folder=tmp_path, storage=storage, rows=1000)
    again.load(state)
    assert [path.name for path in tmp_path.iterdir()] == ["episode_0000000.safetensors"]
    fill(again, [20], first=1)
    again.save()
    assert [episode.length for episode in again.episodes] == [10, 20]


def test_a_loaded_replay_in_memory_needs_its_files_no_longer(tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, folder=tmp_path / "of a run" / "replay")
    fill(replay, [10, 12])
    replay.save()
    state, expected = replay.state(), replay.sample(8)
    again = Replay(SPEC, capacity=1000, length=5, folder=replay.folder)
    again.load(state)
    for path in again._path(0).parent.iterdir():
        path.unlink()
    for key, value in again.sample(8).items():
        assert torch.equal(value, expected[key]), key


def test_a_load_forgets_what_was_played_since(tmp_path: Path) -> None:
    """The open episode, the batch made ahead, and what was dropped."""
    replay = Replay(SPEC, capacity=1000, length=5, folder=tmp_path)
    fill(replay, [1, 10, 12])
    replay.save()
    state, expected = replay.state(), replay.sample(8)
    replay.prepare(8)
    record = {"image": np.zeros((2, 2, 3), np.uint8), "action": np.zeros(1), "reward": 0.0, "is_terminal": False}
    fill(replay, [1])
    replay.add(record, last=False)
    replay.load(state)
    assert replay.dropped == 1
    assert torch.equal(replay.sample(8)["reward"], expected["reward"])
    fill(replay, [6], first=2)
    assert [episode.length for episode in replay.episodes] == [10, 12, 6]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, folder=tmp_path)
    fill(replay, [10])
    replay.save()
    state = replay.state()
    fill(replay, [11], first=1)

    def killed(arrays: Any, path: Path) -> None:
        path.write_bytes(b"a part")
        raise KeyboardInterrupt

    monkeypatch.setattr("localmotion.replay.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        replay.save()
    assert len(list(tmp_path.iterdir())) == 2
    replay.load(state)
    assert [path.name for path in tmp_path.iterdir()] == ["episode_0000000.safetensors"]


def test_a_file_of_other_records_is_refused(tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, folder=tmp_path)
    fill(replay, [10])
    replay.save()
    state, (path,) = replay.state(), tmp_path.iterdir()
    whole = load_file(path)
    for key, value in (("image", whole["image"][:, :1]), ("action", whole["action"].astype(np.float64))):
        save_file({**whole, key: value}, path)
        with pytest.raises(CheckpointError, match=f"episode_0000000.*array '{key}' does not fit"):
            replay.load(state)
    save_file({key: value for key, value in whole.items() if key != "action"}, path)
    with pytest.raises(CheckpointError, match=r"episode_0000000.*lacks 'action'"):
        replay.load(state)
    coded = Replay(MOTION, capacity=1000, length=5, folder=tmp_path, coders={"flow": Companding(4)})
    save_file(whole, path)
    with pytest.raises(CheckpointError, match=r"episode_0000000.*lacks 'flow'"):
        coded.load(state)
    save_file({key: value[:1] for key, value in whole.items()}, path)
    with pytest.raises(CheckpointError, match="array 'reward' does not fit"):
        replay.load(state)
    save_file({key: value[:2] for key, value in whole.items()}, path, {"written by": "another program"})
    replay.load(state)
    assert len(replay) == 2


def test_indices_go_to_a_gpu_without_waiting_for_it() -> None:
    device, found = torch.device("cuda"), mock.Mock()
    with mock.patch("localmotion.replay.torch.from_numpy", return_value=found):
        assert _sent(np.arange(3), device) is found.pin_memory.return_value.to.return_value
    found.pin_memory.return_value.to.assert_called_once_with(device, non_blocking=True)
    assert _sent(np.arange(3), torch.device("meta")).device.type == "meta"  # without pinning elsewhere


def fill_and_save(replay: Replay, lengths: list[int]) -> None:
    fill(replay, lengths, first=1)
    replay.save()


@pytest.mark.parametrize("storage", ["memory", "disk", "device"])
def test_a_full_disk_costs_nothing_that_was_saved(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, folder=tmp_path, storage=storage, rows=1000)
    fill(replay, [10])
    replay.save()
    state = replay.state()

    def full(arrays: Any, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    def full_at_once(arrays: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    for fails in (full, full_at_once):
        monkeypatch.setattr("localmotion.replay.save_file", fails)
        with pytest.raises(CheckpointError, match=r"episode_0000001.*No space left.*same command"):
            fill_and_save(replay, [12])
        replay.load(state)
    assert len(list(tmp_path.iterdir())) == 1
    again = Replay(SPEC, capacity=1000, length=5, folder=tmp_path)
    again.load(state)
    assert len(again) == 10


def test_an_episode_that_was_cut_is_kept_if_it_is_more_than_a_reset() -> None:
    replay = Replay(SPEC, capacity=1000, length=5)
    fill(replay, [7, 1])
    for t in range(6):
        replay.add({"image": np.zeros((2, 2, 3), np.uint8), "action": np.zeros(1), "reward": t, "is_terminal": False}, last=False)
    replay.cut()
    replay.cut()
    assert [episode.length for episode in replay.episodes] == [7, 6]
    assert replay.dropped == 1


def test_a_damaged_episode_is_named_when_it_is_sampled(tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, folder=tmp_path, storage="disk")
    fill(replay, [10])
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"episode_0000000.*shorter"):
        replay.sample(50)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"episode_0000000"):
        replay.sample(1)


GB = 10**9


def room(monkeypatch: pytest.MonkeyPatch, memory: float, disk: float) -> None:
    monkeypatch.setattr(place, "available_memory", lambda: int(memory * GB))
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(disk * GB)))


@pytest.mark.parametrize(
    ("asked", "memory", "disk", "storage"),
    [("auto", 50, 100, "memory"), ("auto", 41, 100, "disk"), ("disk", 500, 100, "disk"), ("memory", 22, 100, "memory")],
)
def test_the_replay_is_sampled_from_memory_if_it_fits(
    asked: Any, memory: float, disk: float, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room(monkeypatch, memory, disk)
    online = OnlineConfig(replay_storage=asked, replay_capacity=1_000_000)
    found, note = choose_storage(online, 2_000_000, 21_000, tmp_path / "run" / "replay")
    assert found == storage
    assert "1,000,000 records = 21.0 GB" in note
    assert storage in note


def test_a_replay_that_fits_nowhere_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 500, 21)  # without room for what two checkpoints keep
    online = OnlineConfig(replay_capacity=1_000_000)
    with pytest.raises(ConfigError, match=r"21\.2 GB on disk.*--online.replay_capacity 890000"):
        choose_storage(online, 2_000_000, 21_000, tmp_path)
    assert choose_storage(OnlineConfig(replay_capacity=890_000), 2_000_000, 21_000, tmp_path)[0] == "memory"
    for free, why in ((None, "no memory of its own"), (20 * GB, r"20\.0 GB free")):
        with pytest.raises(ConfigError, match=why):
            choose_storage(OnlineConfig(replay_storage="device", replay_capacity=990_000), 2_000_000, 21_000, tmp_path, free)
    room(monkeypatch, 10, 100)
    with pytest.raises(ConfigError, match=r"10\.0 GB of memory.*disk"):
        choose_storage(OnlineConfig(replay_storage="memory"), 2_000_000, 21_000, tmp_path)


def test_a_replay_lies_on_the_gpu_where_it_takes_half_of_it_or_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 500, 100)
    for free, found in ((140 * GB, "device"), (43 * GB, "device"), (41 * GB, "memory"), (None, "memory")):
        storage, note = choose_storage(OnlineConfig(), 2_000_000, 21_000, tmp_path, free)
        assert storage == found
        assert found in note
    assert choose_storage(OnlineConfig(replay_storage="device"), 2_000_000, 21_000, tmp_path, 22 * GB)[0] == "device"
    assert choose_storage(OnlineConfig(replay_storage="disk"), 2_000_000, 21_000, tmp_path, 140 * GB)[0] == "disk"
    assert place.device_memory(torch.device("cpu")) is None


def test_ranks_of_a_machine_share_its_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 100, 100)
    assert choose_storage(OnlineConfig(), 2_000_000, 21_000, tmp_path)[0] == "memory"
    monkeypatch.setattr(place.ranks, "local", lambda: (1, 4))  # 25 GB each, for 21 GB
    assert choose_storage(OnlineConfig(), 2_000_000, 21_000, tmp_path)[0] == "disk"
    monkeypatch.setattr(place.ranks, "local", lambda: (1, 8))
    with pytest.raises(ConfigError, match=r"12\.5 GB free"):
        choose_storage(OnlineConfig(), 2_000_000, 21_000, tmp_path)


def test_copies_of_files_are_memory_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "memory.max": "8000\n",
        "memory.current": "7000\n",
        "memory.stat": "anon 1000\ninactive_file 5000\nactive_file 900\n",
    }
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a: files[self.name] if self.name in files else read(self, *a))
    assert available_memory() == 6000


@given(st.integers(2, 60), st.integers(1, 200), st.integers(1, 2000))
def test_no_run_holds_more_records_than_were_announced(length: int, limit: int, budget: int) -> None:
    """Of episodes that end by their time limit."""
    held = budget + -(-budget // limit)
    assert held <= records_needed(OnlineConfig(length=length), budget, limit)
    if limit >= length - 1:
        assert records_needed(OnlineConfig(length=length), budget, limit) <= records_needed(OnlineConfig(length=length), budget)


def test_available_memory_is_measured() -> None:
    assert 10**8 < available_memory() < 10**14
