"""Evaluation episodes during training. They use separate environments and a separate stream of seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from localmotion.acting.episodes import FINAL_EPISODES, Rollout, evaluate
from localmotion.acting.observer import Observer
from localmotion.acting.policy import MethodPolicy, Policy
from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.evaluation.films import save_film, save_plans
from localmotion.methods.base import Method
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir


class Trials:
    """Plays evaluation episodes, logs them, films the first one, and saves the weights of the best evaluation.

    Args:
        make: makes an environment.
        check: called at every agent step. It raises to end an evaluation; a continued run then repeats the evaluation.
    """

    def __init__(
        self,
        run: RunConfig,
        out: RunDir,
        method: Method,
        compute: Compute,
        make: Callable[[], Observer],
        check: Callable[[], None],
    ) -> None:
        self.run, self.out, self.method, self.compute, self.make, self.check = run, out, method, compute, make, check
        self.observers: list[Observer] = []
        self.best: list[float] | None = None
        """Success rate and return of the best evaluation so far."""

    def __call__(self, counters: dict[str, int], count: int, *, place: tuple[str, int], final: bool) -> None:
        """Evaluate at ``count``.

        ``place`` (unit, number) names the evaluation in messages and in the film's file name. An episode in which the environment fails is
        played again (`evaluate`). Raises EvaluationError, an EnvError, if it keeps failing.
        """
        unit, number = place
        result = self._play(count, final)
        self.out.log("eval", **counters, **result.summary(), seed=self.run.seed, final=final)
        media = self.out.path / "media"
        save_film(result, media / f"eval_{number:09d}.mp4")
        if result.plans is not None:
            save_plans(result.plans, media / "plans_eval.npz", f"{unit} {number:,}")
        found = [float(np.mean(result.successes or [0.0])), float(np.mean(result.returns))]
        if self.best is None or found >= self.best:
            self.best = found
            state = {"stage": self.run.stage, "action_dim": self.method.action_dim, **counters, "score": found}
            checkpoint.save_best(self.out.path / "checkpoints", self.method.state_dict(), state)
        score = f"success {np.mean(result.successes):.2f} " if result.successes else ""
        say(f"{unit} {number:,}: {score}return {np.mean(result.returns):.1f} +- {np.std(result.returns):.1f}")

    def _play(self, count: int, final: bool) -> Rollout:
        torch.manual_seed(self.run.seed + count)
        episodes = self.run.online.eval_episodes
        return evaluate(
            self._policy,
            self.make,
            seed=self.run.seed,
            episodes=max(FINAL_EPISODES, episodes) if final else episodes,
            observers=self.observers,
            keep_frames=True,
            check=self.check,  # an evaluation may take minutes
        )

    def _policy(self) -> Policy:
        return MethodPolicy(self.method, self.compute, explore=False, window=self.run.online.length)
