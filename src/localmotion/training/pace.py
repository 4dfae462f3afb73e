"""How long the rest of an online run takes on this machine, from its first agent steps of learning."""

from __future__ import annotations

import time

from localmotion.config import OnlineConfig
from localmotion.console import duration

STEPS = 50
"""Agent steps of learning that are timed."""


class Pace:
    """Times the first `STEPS` agent steps of learning. Evaluations are timed by the run."""

    def __init__(self, budget: int, online: OnlineConfig) -> None:
        """``budget``: agent steps of the whole run."""
        self.budget, self.online = budget, online
        self.began: tuple[int, float] | None = None  # agent step and time without evaluations

    def forecast(self, agent_step: int, evaluating: float) -> str:
        """What to say after this agent step of learning: once how long the rest takes, "" at all others.

        ``evaluating``: seconds that evaluations took so far. The run has made one by now, unless it goes on from a checkpoint.
        """
        now = time.perf_counter() - evaluating
        self.began = self.began or (agent_step, now)
        left = self.budget - agent_step
        if agent_step - self.began[0] != STEPS or left <= 0:
            return ""
        each = (now - self.began[1]) / STEPS
        last = max(10, self.online.eval_episodes) / self.online.eval_episodes  # the final evaluation plays more episodes
        rest = duration(left * each + (left / self.online.eval_every + last) * evaluating)
        return f"about {rest} more on this machine: {each:.3g} s for an agent step, {evaluating:.3g} s for an evaluation"
