"""Acting: exploring while data is collected and not while it is judged; points at the border of the picture; clocks after a resume."""

from __future__ import annotations

import random
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from localmotion.acting.episodes import episode_seed, run_episodes
from localmotion.acting.observer import Observer
from localmotion.acting.policy import MethodPolicy, random_policy
from localmotion.compute import PLAIN
from localmotion.envs import make_env
from localmotion.envs.base import PixelEnv
from localmotion.models.actor_critic import ActorCritic
from localmotion.perception.lk import LKTracks
from localmotion.runs import checkpoint
from method_batches import AGENTS, make, make_batch
from test_settings_reach import build, same_noise


@pytest.mark.parametrize("name", AGENTS)
def test_exploring_adds_noise_and_nothing_else_does(name: str) -> None:
    """With the same noise for latents an agent that explores does something else, and one that does not repeats itself."""
    run, _ = make(
        name, "train", *(["evaluate_mode=true"] if name == "dreamer_v3" else [])
    )  # its reference samples in evaluation too
    method, batch = build(run).eval(), make_batch(4, 1, tracks=8)
    seen = {key: value for key, value in batch.items() if key not in ("reward", "is_terminal", "action")}

    def action(explore: bool, seed: int) -> torch.Tensor:
        with torch.no_grad(), same_noise(seed):
            return method.act(seen, method.initial_carry(4), explore=explore, window=4)[0]

    assert torch.equal(action(False, 7), action(False, 7))
    exploring, plain = action(True, 7), action(False, 7)
    assert (exploring != plain).any(-1).all()
    assert exploring.abs().max() <= 1
    assert plain.abs().max() <= 1


def test_the_policy_that_acts_passes_on_whether_it_explores() -> None:
    _, method = make("dreamer_v2", "train")
    asked = []

    def act(obs: Any, carry: Any, *, explore: bool, window: int) -> Any:
        asked.append((explore, window))
        return torch.zeros(1, 2), carry

    method.act = act
    observer = Observer(make_env("toy:dot", size=64), None)
    first = observer.reset(0)
    for explore in (True, False):
        policy = MethodPolicy(method, PLAIN, explore=explore, window=9)
        policy([first], True)
    assert asked == [(True, 9), (False, 9)]


@pytest.mark.parametrize("direction", [(3, 0), (-3, 0), (0, 3), (0, -3)])
def test_a_point_that_leaves_the_picture_is_lost_and_stays_lost(direction: tuple[int, int]) -> None:
    """A texture moves over the border. Points near it leave; those that are said to be seen are in the picture, where they should be."""
    rng = np.random.default_rng(0)
    wall = cv2.GaussianBlur(rng.integers(0, 256, (160, 160, 3)).astype(np.float32), (0, 0), 1.5)
    wall = ((wall - wall.mean()) * 3 + 128).clip(0, 255).astype(np.uint8)
    side, (dx, dy) = 64, direction
    frames = np.stack([wall[48 - dy * t : 112 - dy * t, 48 - dx * t : 112 - dx * t] for t in range(9)])
    grid = np.array([(x, y) for x in range(2, side, 6) for y in range(2, side, 6)], np.float32)
    tracks, visible = LKTracks().track(frames, grid)
    true = grid + np.arange(9)[:, None, None] * np.array(direction, np.float32)
    inside = ((true >= -0.5) & (true <= side - 0.5)).all(-1)
    assert visible[0].all()
    assert not visible[~inside].any()
    assert not (visible[1:] & ~visible[:-1]).any()
    assert np.abs(tracks - true)[visible].max() < 1.5
    safe = ((true >= 8) & (true <= side - 9)).all(-1).all(0)
    assert visible[:, safe].mean() > 0.9
    lost = ~visible[1:]
    assert np.array_equal(tracks[1:][lost], tracks[:-1][lost])  # it waits where it was seen last


def test_the_slow_critics_clock_goes_on_after_a_resume() -> None:
    torch.manual_seed(0)
    before = ActorCritic(6, 2, units=4, layers=1, slow_every=5)
    for _ in range(3):
        before.after_update()
    after = ActorCritic(6, 2, units=4, layers=1, slow_every=5)
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        for parameter in after.critic.parameters():
            parameter.add_(1)
    copied = []
    for _ in range(7):
        after.after_update()
        pairs = zip(after.slow_critic.parameters(), after.critic.parameters(), strict=True)
        copied.append(all(torch.equal(slow, fast) for slow, fast in pairs))
        with torch.no_grad():
            for parameter in after.critic.parameters():
                parameter.add_(1)
    assert copied == [False, True, False, False, False, False, True]  # updates 5 and 10 of the run


def test_every_generator_goes_on_where_it_was() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    saved = checkpoint.rng_state()
    try:
        random.seed(5)
        np.random.seed(6)
        torch.manual_seed(7)
        draw()
        state = {key: value.clone() for key, value in checkpoint.rng_state().items()}
        went_on = [draw() for _ in range(3)]
        checkpoint.set_rng_state(state)
        again = [draw() for _ in range(3)]
        assert again == went_on
    finally:
        checkpoint.set_rng_state(saved)


@pytest.mark.parametrize(("size", "filmed"), [(32, 128), (64, 64), (96, 96)])
def test_a_film_of_an_agent_with_small_pictures_is_drawn_larger(size: int, filmed: int) -> None:
    observer = Observer(make_env("toy:dot", size=size, time_limit=3), None)
    frames = run_episodes([observer], [0], random_policy(observer.action_dim, 0), keep_frames=True).frames
    assert frames is not None
    assert frames.shape == (4, filmed, filmed, 3)
    assert len(np.unique(frames)) > 1


# --- seeds, time limits, repeated actions -----------------------------------------------------------------------------------


def test_no_two_streams_share_an_episodes_seed() -> None:
    streams = ("train", "eval", "prefill", "collect", "policy")
    seeds = [episode_seed(seed, stream, episode) for seed in range(3) for stream in streams for episode in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


class Ends(PixelEnv):
    """Rewards 1, 2, 4, ... of env steps; the task ends with env step ``last``."""

    def __init__(self, last: int, **settings: Any) -> None:
        super().__init__("test:ends", seed=0, size=16, percept_size=None, action_dim=1, **settings)
        self.last, self.done = last, 0

    def _begin(self, episode_seed: int) -> None:
        self.done = 0

    def _control(self, action: Any) -> tuple[float, bool]:
        self.done += 1
        return 2.0 ** (self.done - 1), self.done == self.last

    def _draw(self, size: int) -> Any:
        return np.full((size, size, 3), self.done, np.uint8)


@pytest.mark.parametrize(
    ("last", "rewards", "pictures", "terminal"),
    [
        (99, [1 + 2 + 4, 8 + 16 + 32, 64], [3, 6, 7], False),
        (5, [1 + 2 + 4, 8 + 16], [3, 5], True),
        (7, [7, 56, 64], [3, 6, 7], True),
    ],
)
def test_a_time_limit_is_no_end_of_the_task_and_repeats_stop_at_either(
    last: int, rewards: list[float], pictures: list[int], terminal: bool
) -> None:
    env = Ends(last, action_repeat=3, time_limit=7)
    observer = Observer(env, None)
    records, done = [observer.reset(0)], False
    while not done:
        record, done, info = observer.step(np.array([0.5], np.float32))
        records.append(record)
    assert [record["reward"] for record in records] == [0, *rewards]
    assert [int(record["image"][0, 0, 0]) for record in records] == [0, *pictures]
    assert [record["is_terminal"] for record in records] == [False] * len(rewards) + [terminal]
    assert [float(record["action"][0]) for record in records] == [0, *[0.5] * len(rewards)]
    assert info["env_steps"] == pictures[-1] - pictures[-2]


def test_a_policy_begins_each_episode_anew_and_moves_on_within_it() -> None:
    _, method = make("dreamer_v2", "train")
    seen = []

    def act(obs: Any, carry: Any, **_: Any) -> Any:
        seen.append((carry, bool(obs["is_first"].all()), bool(obs["is_first"].any())))
        return torch.zeros(1, 2), f"after {len(seen)}"

    method.act, method.initial_carry = act, lambda batch: f"start of {batch}"
    record = Observer(make_env("toy:dot", size=64), None).reset(0)
    policy = MethodPolicy(method, PLAIN, explore=True, window=9)
    for first in (True, False, False, True, False):
        policy([record], first)
    start = ("start of 1", True, True)
    assert seen == [start, ("after 1", False, False), ("after 2", False, False), start, ("after 4", False, False)]


def test_random_actions_differ_from_step_to_step_and_by_seed() -> None:
    policy, again, other = (random_policy(3, seed) for seed in (1, 1, 2))
    one, two = policy([{}, {}], True), policy([{}, {}], False)
    assert len(np.unique(np.concatenate([one, two, other([{}, {}], True)]))) == 18
    np.testing.assert_array_equal(again([{}, {}], True), one)
    assert np.abs(np.concatenate([policy([{}] * 50, False)])).max() <= 1
