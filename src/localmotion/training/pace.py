"""Estimate the remaining time of an online run from its first agent steps of learning."""

from __future__ import annotations

import time

from localmotion.acting.episodes import AT_ONCE, FINAL_EPISODES
from localmotion.config import OnlineConfig
from localmotion.console import duration

STEPS = 50
"""Number of agent steps of learning that `Pace` times."""


class Pace:
    """Times the first `STEPS` agent steps of learning. The loop times the evaluations."""

    def __init__(self, budget: int, online: OnlineConfig) -> None:
        """``budget``: agent steps of the whole run."""
        self.budget, self.online = budget, online
        self.began: tuple[int, float] | None = None  # agent step and time without evaluations

    def forecast(self, agent_step: int, evaluating: float, evaluations: int) -> str:
        """The estimate to print after this agent step. Only one agent step returns a text; all others return "".

        ``evaluating``: seconds of the ``evaluations`` so far. There is at least one by now, unless the run continues from a checkpoint.
        """
        now = time.perf_counter() - evaluating
        self.began = self.began or (agent_step, now)
        left = self.budget - agent_step
        if agent_step - self.began[0] != STEPS or left <= 0:
            return ""
        each = (now - self.began[1]) / STEPS
        one = evaluating / max(1, evaluations)
        every, episodes = self.online.eval_every, self.online.eval_episodes
        between = (self.budget - 1) // every - agent_step // every  # without the final one, which plays more episodes
        final = rounds(max(FINAL_EPISODES, episodes)) / rounds(episodes)
        rest = duration(left * each + (between + final) * one)
        return f"about {rest} more on this machine: {each:.3g} s for an agent step, {one:.3g} s for an evaluation"


def rounds(episodes: int) -> int:
    """How many times an evaluation plays `AT_ONCE` episodes or fewer together."""
    return -(-episodes // AT_ONCE)


def updates_due(online: OnlineConfig, total: int, prefill: int, longest: int) -> int:
    """Updates of a run of ``total`` agent steps whose episodes last ``longest``, with those of the warm-up.

    ``prefill``: agent steps of random exploration. The agent plays from the next episode on. A random episode that could last to the
    end of the run is cut at ``prefill``.
    """
    start = -(-prefill // longest) * longest
    start = start if start < total else prefill
    return online.warmup_updates + total // online.train_every - start // online.train_every
