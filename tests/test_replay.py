"""Replay: windows stay inside episodes, ends are prioritised as specified, saving is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmotion.errors import CheckpointError, LocalmotionError
from localmotion.replay import Replay

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


@settings(max_examples=40, deadline=None)
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
    # IPV 2.6: 501 records, windows of 50: the last window has probability 51/502 instead of 1/452
    replay = Replay(SPEC, capacity=10_000, length=50, prioritize_ends=True, seed=0)
    fill(replay, [501])
    last = (replay.sample(20_000)["reward"][:, -1] == 500).float().mean().item()
    assert last == pytest.approx(51 / 502, abs=0.008)


def test_short_episodes_are_dropped_and_counted_and_capacity_evicts_oldest() -> None:
    replay = Replay(SPEC, capacity=25, length=5)
    fill(replay, [4, 10, 10, 10])
    assert replay.dropped == 1
    assert len(replay) == 20
    assert [serial for serial, _ in replay.episodes] == [1, 2]


def test_save_and_load_continue_the_same_samples(tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=1000, length=5, seed=3)
    fill(replay, [10, 12])
    replay.sample(4)
    replay.save(tmp_path)
    state = replay.state()
    expected = replay.sample(8)
    other = Replay(SPEC, capacity=1000, length=5, seed=99)
    other.load(tmp_path, state)
    for key, value in other.sample(8).items():
        assert torch.equal(value, expected[key]), key


def test_damage_and_misuse_are_named(tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=1000, length=5)
    with pytest.raises(LocalmotionError, match="complete episode"):
        replay.sample(1)
    fill(replay, [10])
    replay.save(tmp_path)
    state = replay.state()
    path = next(tmp_path.glob("episode_*"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="episode_0000000"):
        replay.load(tmp_path, state)
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


def test_saved_files_shrink_to_what_checkpoints_name(tmp_path: Path) -> None:
    replay = Replay(SPEC, capacity=25, length=5)
    fill(replay, [10, 10])
    replay.save(tmp_path)
    fill(replay, [10], first=2)
    replay.save(tmp_path)
    replay.prune(tmp_path, set(replay.state()["episodes"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["episode_0000001.safetensors", "episode_0000002.safetensors"]
