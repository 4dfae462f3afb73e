"""Episodes of a policy, and the evaluation protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.acting.observer import Observer
from localmotion.acting.policy import MethodPolicy, Plan, Policy
from localmotion.console import say
from localmotion.errors import EnvError, LocalmotionError, SimulationError
from localmotion.foreign import shut

AT_ONCE = 5
"""Evaluation episodes that are played in lockstep."""
FINAL_EPISODES = 10
"""The last evaluation of a run plays at least as many."""
FILM_RATE = 25.0
"""Pictures per second of films from environments that do not know how long a step takes."""
FAULTS = 3
"""Failures of an environment without a complete episode between them that end training, an evaluation or a collection."""


def episode_seed(seed: int, stream: str, episode: int, attempt: int = 1) -> int:
    """Seed of one episode: a pure function of the run's seed, the stream (train, eval, ...) and the episode's number.

    Training and evaluation therefore never share random numbers, and a resumed run gets the same episodes. An episode that is played
    again because its environment failed has another ``attempt``, and with it another seed.
    """
    streams = {"train": 0, "eval": 1, "prefill": 2, "collect": 3, "policy": 4, "replay": 5}
    mixed = np.random.SeedSequence([seed, streams[stream], episode])
    first = int(mixed.generate_state(1)[0] >> 1)
    return first if attempt == 1 else int(np.random.SeedSequence([first, attempt]).generate_state(1)[0] >> 1)


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
    """For each episode, 1.0 if any agent step signalled success. Empty if no episode had a signal, true or false."""
    frames: NDArray[np.uint8] | None = None
    """Pictures (T, S, S, 3) of the first episode."""
    plans: Planned | None = None
    """What was planned in the first episode, if it has pictures and the method shows its plans."""
    faults: list[tuple[int, SimulationError]] = field(default_factory=list)
    """Each failure of an environment: number of the episode (of the environment, in `run_episodes`) and error."""
    frame_rate: float = FILM_RATE
    """Pictures of ``frames`` per second of real time."""

    def summary(self) -> dict[str, Any]:
        """Fields of an "eval" line."""
        out: dict[str, Any] = {
            "returns": [round(x, 4) for x in self.returns],
            "return_mean": float(np.mean(self.returns)),
            "return_std": float(np.std(self.returns)),
            "episodes": len(self.returns),
            "faults": len(self.faults),
            "length_mean": float(np.mean(self.lengths)),
        }
        if self.successes:
            out["success_rate"] = float(np.mean(self.successes))
        return out


class EvaluationError(EnvError):
    """The environment kept failing, so an evaluation ended early. ``result`` has the episodes that are complete.

    ``measured`` has the fields of their "eval" line; it is empty where none is complete.
    """

    def __init__(self, message: str, result: Rollout) -> None:
        super().__init__(message)
        self.result = result
        self.measured: dict[str, Any] = result.summary() if result.returns else {}


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

    An environment that fails ends its own episode and is listed in ``faults``. Its return, length and success are those until then, and
    there is no film of it. The policy still gets a record for it, so the random numbers of the others stay the same.
    """
    count = len(observers)
    begun, faults, frames = dict[int, dict[str, Any]](), dict[int, SimulationError](), list[NDArray[np.uint8]]()
    for index, (observer, seed) in enumerate(zip(observers, seeds, strict=True)):
        try:
            begun[index] = observer.reset(seed)
            if keep_frames and index == 0:
                frames.append(_picture(observer, begun[0]))
        except SimulationError as error:
            faults[index] = error
    any_record = next(iter(begun.values()), {})  # for environments that failed in their reset
    records = [begun.get(index, any_record) for index in range(count)]
    returns, lengths, success = np.zeros(count), np.zeros(count, int), np.zeros(count)
    alive, has_success = np.array([index not in faults for index in range(count)]), False
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
            try:
                records[index], done, info = observers[index].step(actions[index])
                if keep_frames and index == 0:
                    frames.append(_picture(observers[0], records[0]))
                    seen.append(records[0].get("image"))
            except SimulationError as error:
                faults[index], alive[index] = error, False
                continue
            returns[index] += records[index]["reward"]
            lengths[index] += 1
            if "success" in info:
                has_success = True
                success[index] = max(success[index], float(info["success"]))
            alive[index] = not done
    filmed = keep_frames and 0 not in faults
    return Rollout(
        returns.tolist(),
        lengths.tolist(),
        success.tolist() if has_success else [],
        np.stack(frames) if filmed else None,
        Planned(np.stack(seen), goal, plans) if plans and filmed else None,
        sorted(faults.items()),
        observers[0].frame_rate or FILM_RATE,
    )


SMALLEST_FILM = 64
"""Smallest side of a film's pictures, in pixels. People cannot recognise the scene in smaller pictures."""


def _picture(observer: Observer, record: dict[str, Any]) -> NDArray[np.uint8]:
    """The film's picture for a record: the agent's picture, or a new rendering if that is too small or missing."""
    seen: NDArray[np.uint8] | None = record.get("image")
    if seen is not None and len(seen) >= SMALLEST_FILM:
        return seen
    return observer.drawn(2 * SMALLEST_FILM)


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

    An episode in which its environment fails is played again after the others, with another seed and not in that environment. The result
    has ``episodes`` complete episodes, each in its place, and lists the failures. The other episodes begin as if there had been none;
    their actions, too, are the same if ``policy_for`` seeds a policy that draws random numbers.

    Raises EvaluationError after `FAULTS` failures without a complete episode between them (one in the same group of ``at_once`` counts as
    between), or if a fresh environment cannot be made after a failure.
    """
    pool = observers if observers is not None else []
    together = max(len(pool), min(at_once, episodes))
    complete: dict[int, tuple[float, int, list[float]]] = {}  # return, length, success if its group signalled one, by episode
    out = Rollout()

    def result() -> Rollout:
        ends = [complete[index] for index in sorted(complete)]
        out.returns, out.lengths = [end[0] for end in ends], [end[1] for end in ends]
        signals = any(end[2] for end in ends)  # some environments say it only where it is true
        out.successes = [end[2][0] if end[2] else 0.0 for end in ends] if signals else []
        return out

    wanted, attempt, in_a_row = list(range(episodes)), 1, 0
    while wanted:
        again = list[int]()
        for begin in range(0, len(wanted), together):
            group = wanted[begin : begin + together]
            try:
                while len(pool) < len(group):
                    pool.append(make())
            except LocalmotionError as error:
                if not out.faults:
                    raise
                raise EvaluationError(f"{error}; {_so_far(result(), episodes)}; fix the environment", result()) from error
            seeds = [episode_seed(seed, "eval", index, attempt) for index in group]
            film = keep_frames and group[0] == 0
            part = run_episodes(pool[: len(group)], seeds, policy_for(), keep_frames=film, check=check)
            failed = dict(part.faults)
            for place, index in enumerate(group):
                if place not in failed:
                    complete[index] = part.returns[place], part.lengths[place], part.successes[place : place + 1]
            if film:
                out.frames, out.plans, out.frame_rate = part.frames, part.plans, part.frame_rate
            for place in sorted(failed, reverse=True):
                shut(pool.pop(place).env)
            out.faults += [(group[place], error) for place, error in part.faults]
            again += [group[place] for place in failed]
            in_a_row = in_a_row + len(failed) if len(failed) == len(group) else 0
            said = [f"{error} in episode {group[at] + 1} of {episodes} (seed {seeds[at]})" for at, error in part.faults]
            if in_a_row >= FAULTS:
                raise EvaluationError(
                    f"{said[0]}: {in_a_row} failures without a complete episode between them; {_so_far(result(), episodes)}; fix the"
                    f" environment; make_env(...).reset(seed={seeds[part.faults[0][0]]}) begins this episode",
                    result(),
                ) from part.faults[0][1]
            for line in said:
                say(f"{line}; it is played again with another seed")
        wanted, attempt = again, attempt + 1
    return result()


def _so_far(result: Rollout, episodes: int) -> str:
    """What was measured before an evaluation ended early, in words."""
    score = f", return {np.mean(result.returns):.1f} +- {np.std(result.returns):.1f}" if result.returns else ""
    return f"{len(result.returns)} of {episodes} episodes are complete{score}"
