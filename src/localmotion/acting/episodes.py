"""Episodes of a policy, and the evaluation protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.acting.observer import Observer
from localmotion.acting.policy import MethodPolicy, Plan, Policy

AT_ONCE = 5
"""Evaluation episodes that are played in lockstep."""
FINAL_EPISODES = 10
"""The last evaluation of a run plays at least as many."""


def episode_seed(seed: int, stream: str, episode: int) -> int:
    """Seed of one episode: a pure function of the run's seed, the stream (train, eval, ...) and the episode's number.

    Training and evaluation therefore never share random numbers, and a resumed run gets the same episodes.
    """
    streams = {"train": 0, "eval": 1, "prefill": 2, "collect": 3, "policy": 4, "replay": 5}
    mixed = np.random.SeedSequence([seed, streams[stream], episode])
    return int(mixed.generate_state(1)[0] >> 1)


@dataclass
class Planned:
    """Plans of one episode of T pictures. S is the side of the agent's pictures."""

    seen: NDArray[np.uint8]
    """(T, S, S, 3): what the agent saw."""
    goal: NDArray[np.uint8] | None
    """(S, S, 3): its goal picture, if it has one."""
    plans: list[Plan]
    """T - 1: before each action."""


@dataclass
class Rollout:
    """Finished evaluation episodes."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    successes: list[float] = field(default_factory=list)
    """For each episode, 1.0 if any agent step signalled success. Empty if the suite has no success signal."""
    frames: NDArray[np.uint8] | None = None
    """Pictures (T, S, S, 3) of the first episode."""
    plans: Planned | None = None
    """What was planned in the first episode, if it has pictures and the method shows its plans."""

    def summary(self) -> dict[str, Any]:
        """Fields of an "eval" line."""
        out: dict[str, Any] = {
            "returns": [round(x, 4) for x in self.returns],
            "return_mean": float(np.mean(self.returns)),
            "return_std": float(np.std(self.returns)),
            "episodes": len(self.returns),
            "length_mean": float(np.mean(self.lengths)),
        }
        if self.successes:
            out["success_rate"] = float(np.mean(self.successes))
        return out


def run_episodes(
    observers: Sequence[Observer],
    seeds: Sequence[int],
    policy: Policy,
    *,
    keep_frames: bool = False,
    check: Callable[[], None] | None = None,
) -> Rollout:
    """Play one episode in each of E environments, in lockstep.

    ``policy(records, first)`` returns all actions (E, A). ``check`` is called before every agent step; it may raise to end the episodes.
    """
    records = [observer.reset(seed) for observer, seed in zip(observers, seeds, strict=True)]
    count = len(observers)
    returns, lengths, success = np.zeros(count), np.zeros(count, int), np.zeros(count)
    alive, has_success = np.ones(count, bool), False
    frames = [_picture(observers[0], records[0])] if keep_frames else []
    seen: list[Any] = [records[0].get("image")]
    plans: list[Plan] = []
    goal = records[0].get("goal")
    first = True
    while alive.any():
        if check is not None:
            check()
        actions = policy(records, first)
        first = False
        if keep_frames and alive[0] and isinstance(policy, MethodPolicy) and seen[0] is not None:
            plan = policy.plan()
            plans += [] if plan is None else [plan]
        for index in np.flatnonzero(alive).tolist():
            records[index], done, info = observers[index].step(actions[index])
            returns[index] += records[index]["reward"]
            lengths[index] += 1
            if "success" in info:
                has_success = True
                success[index] = max(success[index], float(info["success"]))
            alive[index] = not done
        if keep_frames and lengths[0] == len(frames):
            frames.append(_picture(observers[0], records[0]))
            seen.append(records[0].get("image"))
    return Rollout(
        returns.tolist(),
        lengths.tolist(),
        success.tolist() if has_success else [],
        np.stack(frames) if keep_frames else None,
        Planned(np.stack(seen), goal, plans) if plans else None,
    )


SMALLEST_FILM = 64
"""Smallest side of a film's pictures, in pixels. People cannot recognise the scene in smaller pictures."""


def _picture(observer: Observer, record: dict[str, Any]) -> NDArray[np.uint8]:
    """The film's picture for a record: the agent's picture, or a new rendering if that is too small or missing."""
    seen: NDArray[np.uint8] | None = record.get("image")
    if seen is not None and len(seen) >= SMALLEST_FILM:
        return seen
    drawn: NDArray[np.uint8] = observer.env.render_frame(2 * SMALLEST_FILM)  # type: ignore[attr-defined]
    return drawn


def evaluate(
    policy_for: Callable[[], Policy],
    make: Callable[[], Observer],
    *,
    seed: int,
    episodes: int,
    at_once: int = AT_ONCE,
    observers: list[Observer] | None = None,
    keep_frames: bool = False,
    check: Callable[[], None] | None = None,
) -> Rollout:
    """The evaluation protocol: play ``episodes`` episodes with seeds of the eval stream, ``at_once`` in lockstep.

    The function adds environments to ``observers`` (if given), so that later evaluations can reuse them. ``check``: as `run_episodes`.
    """
    pool = observers if observers is not None else []
    while len(pool) < min(at_once, episodes):
        pool.append(make())
    out = Rollout()
    for begin in range(0, episodes, len(pool)):
        wanted = range(begin, min(begin + len(pool), episodes))
        seeds = [episode_seed(seed, "eval", index) for index in wanted]
        part = run_episodes(pool[: len(seeds)], seeds, policy_for(), keep_frames=keep_frames and begin == 0, check=check)
        out.returns += part.returns
        out.lengths += part.lengths
        out.successes += part.successes
        out.frames = out.frames if out.frames is not None else part.frames
        out.plans = out.plans or part.plans
    return out
