"""Estimate the remaining time of an online run from its first agent steps of learning."""

from __future__ import annotations

import time

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

    def forecast(self, agent_step: int, evaluating: float) -> str:
        """The estimate to print after this agent step. Only one agent step returns a text; all others return "".

        ``evaluating``: seconds spent in evaluations so far. One evaluation is complete by now, unless the run continues
        from a checkpoint.
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
