"""What the replay draws, by counting: episodes, starts, ends, and what a sequence knows of the time before it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from localmotion.perception.companding import Companding
from localmotion.replay import Replay

SPEC: dict[str, tuple[tuple[int, ...], str]] = {
    "image": ((2, 2, 3), "uint8"),
    "action": ((1,), "float32"),
    "reward": ((), "float32"),
    "is_terminal": ((), "bool"),
    "flow": ((2, 2, 2), "float16"),
    "visible": ((3,), "bool"),
}
DRAWN = 6_000


def replay_of(lengths: list[int], **settings: Any) -> Replay:
    """Each record's reward names episode and time, 1000 episode + t; all else that led to a frame is never zero."""
    replay = Replay(SPEC, **{"capacity": 10_000, "length": 5, "seed": 3} | settings)
    for number, length in enumerate(lengths):
        add(replay, number, length)
    return replay


def add(replay: Replay, number: int, length: int) -> None:
    for t in range(length):
        record: dict[str, Any] = {
            "image": np.full((2, 2, 3), t, np.uint8),
            "action": np.array([t + 1], np.float32),
            "reward": 1000.0 * number + t,
            "is_terminal": t == length - 1,
            "flow": np.full((2, 2, 2), (t + 1) / 16, np.float16),
            "visible": np.ones(3, bool),
        }
        replay.add(record, last=t == length - 1)


def check_shares(counts: Counter[Any], shares: dict[Any, float], drawn: int) -> None:
    """Counts of a multinomial: each within five standard deviations of its share, and nothing else was drawn."""
    assert counts.keys() <= shares.keys()
    for key, share in shares.items():
        deviation = (drawn * share * (1 - share)) ** 0.5
        assert abs(counts[key] - drawn * share) < 5 * deviation, (key, counts[key], drawn * share)


def test_every_episode_is_drawn_alike_whatever_its_length() -> None:
    replay = replay_of([5, 30, 6, 17, 5, 9])
    first = replay.sample(DRAWN)["reward"][:, 0]
    check_shares(Counter((first // 1000).int().tolist()), dict.fromkeys(range(6), 1 / 6), DRAWN)


def test_the_newest_episode_is_drawn_as_soon_as_it_is_there() -> None:
    replay = replay_of([8])
    assert set((replay.sample(50)["reward"][:, 0] // 1000).int().tolist()) == {0}
    add(replay, 1, 8)
    drawn = Counter((replay.sample(DRAWN)["reward"][:, 0] // 1000).int().tolist())
    check_shares(drawn, {0: 1 / 2, 1: 1 / 2}, DRAWN)


def test_every_start_is_drawn_alike() -> None:
    starts = Counter(replay_of([12]).sample(DRAWN)["reward"][:, 0].int().tolist())
    check_shares(starts, dict.fromkeys(range(8), 1 / 8), DRAWN)


def test_prioritised_ends_draw_the_last_window_as_often_as_all_that_would_overhang() -> None:
    """Starts 0 to 12 are drawn and those beyond 7 are clamped to 7, as in IPV's release."""
    starts = Counter(replay_of([12], prioritize_ends=True).sample(DRAWN)["reward"][:, 0].int().tolist())
    check_shares(starts, {**dict.fromkeys(range(7), 1 / 13), 7: 6 / 13}, DRAWN)


def test_an_episode_as_long_as_a_sequence_is_taken_whole() -> None:
    assert set(replay_of([5]).sample(40)["reward"][:, 0].tolist()) == {0.0}


def test_what_follows_a_short_episode_is_drawn_from_all() -> None:
    """Sequences of 5 from episodes of 3 and 9: after the short one either begins anew, the rest of the sequence is its window."""
    batch = replay_of([3, 9]).sample(DRAWN)
    reward = batch["reward"].int()
    short = reward[reward[:, 0] == 0]
    check_shares(Counter((short[:, 3] // 1000).tolist()), {0: 1 / 2, 1: 1 / 2}, len(short))
    second = short[short[:, 3] >= 1000]
    check_shares(Counter((second[:, 3] - 1000).tolist()), dict.fromkeys(range(8), 1 / 8), len(second))
    assert torch.equal(second[:, 4], second[:, 3] + 1)
    cut = short[short[:, 3] < 1000]
    check_shares(Counter(cut[:, 3].tolist()), {0: 1 / 2, 1: 1 / 2}, len(cut))


@pytest.mark.parametrize("coded", [False, True])
def test_a_piece_knows_nothing_of_the_time_before_it(coded: bool) -> None:
    replay = replay_of([3, 9], coders={"flow": Companding(2)} if coded else None)
    batch = replay.sample(200)
    reward = batch["reward"]
    starts = torch.ones_like(batch["is_first"])
    starts[:, 1:] = reward.diff(dim=1) != 1
    assert torch.equal(batch["is_first"], starts)
    assert starts[:, 1:].any()
    for key in ("action", "flow", "visible"):
        known = batch[key].flatten(2).float().abs().sum(-1)
        assert (known[starts] == 0).all()
        assert (known[~starts] > 0).all()
    # What is in the frame itself stays.
    assert torch.equal(batch["image"][..., 0, 0, 0].float(), reward % 1000)
    assert torch.equal(batch["is_terminal"], (reward == 2) | (reward == 1008))
    time = reward[~starts] % 1000
    assert torch.equal(batch["action"][..., 0][~starts], time + 1)
    assert torch.allclose(batch["flow"][..., 0, 0, 0][~starts].float(), (time + 1) / 16, rtol=0.03)


def test_the_oldest_episodes_leave_first_and_only_as_many_as_have_to() -> None:
    replay = replay_of([8, 8, 8], capacity=24)
    assert [e.serial for e in replay.episodes] == [0, 1, 2]
    add(replay, 3, 9)
    assert [e.serial for e in replay.episodes] == [2, 3]
    assert len(replay) == 17
    assert set((replay.sample(100)["reward"][:, 0] // 1000).int().tolist()) == {2, 3}


def test_newest_gives_the_newest_episodes_oldest_first_as_they_were() -> None:
    replay = replay_of([5, 6, 7], coders={"flow": Companding(2)})
    flows = list(replay.newest("flow", 2))
    assert [len(flow) for flow in flows] == [6, 7]
    assert np.allclose(flows[1][:, 0, 0, 0], (np.arange(7) + 1) / 16, rtol=0.03)
    assert [rewards.tolist() for rewards in replay.newest("reward", 2)] == [
        list(range(n, n + k)) for n, k in ((1000, 6), (2000, 7))
    ]


def test_a_seed_decides_the_draws() -> None:
    one, again, other = (replay_of([12, 9], seed=seed).sample(64)["reward"] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
