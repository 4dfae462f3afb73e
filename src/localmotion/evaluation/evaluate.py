"""Evaluate a trained agent: returns, success rate, a film."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.errors import CheckpointError
from localmotion.evaluation.load import Which, load_run
from localmotion.evaluation.rollout import MethodPolicy, Observer, evaluate, make_observer, random_policy
from localmotion.files import read_json
from localmotion.perception.base import Recipe
from localmotion.training.rundir import write_json
from localmotion.video.write import write_video


def evaluate_run(
    path: Path,
    *,
    episodes: int = 10,
    seed: int | None = None,
    video: Path | None = None,
    device: str = "auto",
    policy: str = "agent",
    which: Which = "newest",
) -> dict[str, Any]:
    """Play ``episodes`` evaluation episodes of a run's environment; ``policy`` is "agent" or "random" (the floor).
    ``which`` weights: the newest, or those of the best evaluation during training.

    Returns the fields of an "eval" line. Raises CheckpointError for a pre-training run.
    """
    run, method, compute = load_run(path, device=device, which=which)
    if run.stage == "pretrain":
        raise CheckpointError(f"{path}: is a pre-training run and has no actor; fine-tune it first")
    recipe = Recipe.from_json(run.recipe) if run.recipe and method.wants_motion else None
    base = run.seed if seed is None else seed

    def make() -> Observer:
        return make_observer(run, recipe if policy == "agent" else None, size=method.image_size)

    observers = [make()]
    dim = observers[0].action_dim
    counter = iter(range(10**9))

    def policy_for() -> Any:
        if policy == "random":
            return random_policy(dim, base * 1000 + next(counter))
        return MethodPolicy(method, compute, explore=False, window=run.online.length)

    result = evaluate(policy_for, make, seed=base, episodes=episodes, observers=observers, keep_frames=video is not None)
    if video is not None and result.frames is not None:
        write_video(video, result.frames, fps=25)
    return {**result.summary(), "env": run.env, "policy": policy, "seed": base}


def random_floor(path: Path, episodes: int = 10) -> dict[str, Any]:
    """Score of the uniform random policy on a run's environment, kept in the run directory so that reports can draw it."""
    target = path / "random.json"
    if target.exists():
        found = read_json(target, CheckpointError, "remove it, it is made again")
        if found.get("episodes", 0) >= episodes:
            return found
    result = evaluate_run(path, episodes=episodes, policy="random")
    write_json(target, json.loads(json.dumps(result, default=lambda x: np.asarray(x).tolist())))
    return result
