"""Environments that fail in evaluation episodes: the episode is played again, the others do not change, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from localmotion.acting.episodes import FAULTS, EvaluationError, Rollout, episode_seed, evaluate
from localmotion.acting.observer import Observer
from localmotion.acting.policy import random_policy
from localmotion.errors import ConfigError, EnvError

Fails = Callable[[int], bool]


class Coin(gymnasium.Env[Any, Any]):
    """An episode of 3 steps. The first reward depends on its seed, all on the action. It fails where ``fails(seed)``."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)
    made: list[Coin]

    def __init__(self, fails: Fails, at: str) -> None:
        self.fails, self.at, self.broken, self.closed = fails, at, False, False
        Coin.made.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        assert seed is not None
        assert not self.broken
        self.seed, self.steps = seed, 0
        self._fail("reset")
        return {"image": self.picture()}, {}

    def step(self, action: Any) -> Any:
        assert not self.broken
        self.steps += 1
        if self.steps == 2:
            self._fail("step")
        reward = float(action[0]) + (self.seed % 97 if self.steps == 1 else 0)
        bad = self.at == "reward" and self.steps == 2 and self.fails(self.seed)
        return {"image": self.picture()}, np.nan if bad else reward, False, self.steps == 3, {"success": self.seed % 2}

    def picture(self) -> Any:
        return np.full((8, 8, 3), self.seed % 251, np.uint8)

    def render_frame(self, size: int) -> Any:
        if self.steps == 1:
            self._fail("render")
        return np.full((size, size, 3), self.seed % 251, np.uint8)

    def close(self) -> None:
        self.closed = True
        raise RuntimeError("cannot even close")

    def _fail(self, at: str) -> None:
        if self.at == at and self.fails(self.seed):
            self.broken = True
            raise RuntimeError("dropped")


@pytest.fixture(autouse=True)
def no_coins() -> None:
    Coin.made = []


def played(fails: Fails, episodes: int, at: str = "step", **more: Any) -> Rollout:
    """An evaluation with random actions. The generator of each group has its number as seed."""
    groups = iter(range(1000))
    return evaluate(
        lambda: random_policy(1, next(groups)), lambda: Observer(Coin(fails, at), None), seed=3, episodes=episodes, **more
    )


class Winner(Coin):
    """It has a success in its info only where there is one, in every fifth seed."""

    def step(self, action: Any) -> Any:
        *found, _ = super().step(action)
        return (*found, {"success": True} if self.steps == 3 and self.seed % 5 == 0 else {})


def test_an_episode_without_a_signal_of_success_is_a_failure_where_another_has_one() -> None:
    """Groups of 5 episodes: most have no signal at all."""
    found = evaluate(lambda: random_policy(1, 0), lambda: Observer(Winner(lambda seed: False, ""), None), seed=3, episodes=40)
    true = [float(episode_seed(3, "eval", index, 1) % 5 == 0) for index in range(40)]
    assert found.successes == true
    assert 0 < found.summary()["success_rate"] == np.mean(true) < 0.5
    never = evaluate(lambda: random_policy(1, 0), lambda: Observer(Winner(lambda seed: False, ""), None), seed=3, episodes=1)
    assert (never.successes == []) == (true[0] == 0)


def seeds_of(*episodes: int, attempts: int = 1) -> set[int]:
    return {episode_seed(3, "eval", index, attempt) for index in episodes for attempt in range(1, attempts + 1)}


@pytest.mark.parametrize("at", ["reset", "step", "reward"])
@pytest.mark.parametrize("failing", [(1, 6), (0, 1, 2, 3, 5)])
def test_an_episode_that_fails_is_played_again_and_the_others_do_not_change(
    at: str, failing: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = played(lambda seed: False, 7)
    bad = seeds_of(*failing)
    Coin.made = []
    found = played(bad.__contains__, 7, at)
    assert [index for index, _ in found.faults] == list(failing)
    assert (len(found.returns), found.lengths, len(found.successes)) == (7, [3] * 7, 7)
    for index in range(7):
        if index in failing:  # three actions of size 1 at most change what the seed gives
            assert abs(found.returns[index] - episode_seed(3, "eval", index, 2) % 97) <= 3
            assert found.successes[index] == episode_seed(3, "eval", index, 2) % 2
        else:
            assert found.returns[index] == whole.returns[index]
            assert found.successes[index] == whole.successes[index]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(failing)
    first = f"in episode {failing[0] + 1} of 7 (seed {episode_seed(3, 'eval', failing[0])}); it is played again"
    assert ("reward nan is not finite" if at == "reward" else "RuntimeError: dropped") in said[0]
    assert first in said[0]
    failed = [coin for coin in Coin.made if coin.closed]
    assert len(failed) == len(failing)  # each is closed and another takes its place
    assert whole.summary()["faults"] == 0
    assert found.summary()["faults"] == len(failing)


def test_another_attempt_has_another_seed_and_the_first_is_as_ever() -> None:
    assert episode_seed(3, "eval", 2) == episode_seed(3, "eval", 2, 1)
    assert len(seeds_of(*range(20), attempts=4)) == 80


@pytest.mark.parametrize("at", ["reset", "step"])
def test_failures_in_a_row_end_the_evaluation_and_keep_what_is_complete(at: str) -> None:
    with pytest.raises(
        EvaluationError, match=rf"dropped in episode 1 of 1 \(seed \d+\): {FAULTS} failures without.*; 0 of 1"
    ) as alone:
        played(lambda seed: True, 1, at)
    assert isinstance(alone.value, EnvError)
    assert alone.value.measured == {}
    assert {coin.seed for coin in Coin.made} == seeds_of(0, attempts=FAULTS)
    whole = played(lambda seed: False, 5)
    bad = seeds_of(5, 6, attempts=9)
    score = f"5 of 7 episodes are complete, return {np.mean(whole.returns):.1f} "
    with pytest.raises(EvaluationError, match=rf"episode 6 of 7 .*: 4 failures .*; {score}") as some:
        played(bad.__contains__, 7, at)
    assert some.value.result.returns == whole.returns
    measured = some.value.measured
    assert (measured["returns"], measured["episodes"], measured["faults"]) == ([round(x, 4) for x in whole.returns], 5, 4)


def test_a_complete_episode_begins_the_count_again() -> None:
    """Four of five fail in each group, and no more than two in a row afterwards."""
    bad = seeds_of(*(index for index in range(20) if index % 5))
    found = played(bad.__contains__, 20)
    assert (len(found.returns), len(found.faults)) == (20, 16)
    bad = seeds_of(0, attempts=FAULTS - 1)
    assert len(played(bad.__contains__, 1).faults) == FAULTS - 1


def test_what_is_complete_is_kept_if_no_fresh_environment_can_be_made() -> None:
    def make() -> Observer:
        if len(Coin.made) == 5:
            raise ConfigError("no licence left")
        return Observer(Coin(seeds_of(2).__contains__, "step"), None)

    with pytest.raises(EvaluationError, match=r"^no licence left; 4 of 10 episodes are complete") as caught:
        evaluate(lambda: random_policy(1, 0), make, seed=3, episodes=10)
    assert len(caught.value.result.returns) == 4
    with pytest.raises(ConfigError, match=r"^no licence left$"):  # before any episode it is the user's own error
        evaluate(lambda: random_policy(1, 0), make, seed=3, episodes=5)


@pytest.mark.parametrize("at", ["reset", "step", "render"])
def test_the_film_shows_a_complete_first_episode(at: str) -> None:
    found = played(seeds_of(0).__contains__, 6, at, keep_frames=True)
    assert found.frames is not None
    assert found.frames.shape[0] == 4
    assert set(found.frames.ravel().tolist()) == {episode_seed(3, "eval", 0, 2) % 251}
    assert [index for index, _ in found.faults] == [0]
