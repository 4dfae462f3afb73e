"""Evaluate a trained agent: returns, success rate, a film."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmotion import methods
from localmotion.acting.episodes import EvaluationError, Rollout, episode_seed, evaluate
from localmotion.acting.observer import Observer, make_observer, wants_goal
from localmotion.acting.policy import MethodPolicy, random_policy
from localmotion.envs import check_env
from localmotion.envs.goals import check_goals
from localmotion.errors import CheckpointError, ConfigError
from localmotion.evaluation.films import save_film
from localmotion.files import check_output, read_json
from localmotion.methods.base import MOTION
from localmotion.runs.load import Which, at_least, load_run
from localmotion.runs.rundir import write_json
from localmotion.runs.settings import read_config

VIDEOS = (".mp4",)
"""File endings of films that can be written."""


def evaluate_run(
    path: Path,
    *,
    episodes: int = 10,
    seed: int | None = None,
    video: Path | None = None,
    device: str = "auto",
    policy: str = "agent",
    which: Which = "newest",
    env: str = "",
    env_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Play evaluation episodes of a run's environment. Returns the fields of an "eval" line of metrics.jsonl.

    Args:
        path: run directory.
        episodes: number of episodes.
        seed: decides everything random. Default: the run's seed. For the best weights the default is the next seed,
            because training chose these weights on the episodes of the run's seed.
        video: film of the first episode, .mp4, at the speed of real time (25 pictures per second where the environment does not know it).
        device: as `--device`.
        policy: "agent", or "random" for the floor.
        which: "newest" weights, or "best" for those of the best evaluation during training.
        env: where an agent plays that learned from logged episodes without an environment.
        env_options: options of the environment that differ from the run's, e.g. ``{"split": "val"}`` for backgrounds
            that training did not show. The result then has them, too.

    The caller's random generators do not change. On a CPU the same call gives the same numbers. Five episodes are
    played at a time and share a generator: the first five returns do not change from ``episodes=5`` to ``episodes=10``,
    but those of ``episodes=3`` differ.

    An episode in which the environment fails is played again with another seed, and ``faults`` counts the failures.

    Raises CheckpointError for a pre-training run, ConfigError for numbers out of range, for an unknown option, and for
    a film that cannot be written. Raises EvaluationError if the environment keeps failing; its ``measured`` has the
    fields for the episodes that are complete.
    """
    at_least(episodes=(episodes, 1), seed=(seed or 0, 0))
    if video is not None:
        check_output(video, ConfigError, suffixes=VIDEOS)
    asked = read_config(path)
    if asked.stage not in methods.get(asked.method).acts_after:
        raise CheckpointError(f"{path}: is a pre-training run and has no actor; fine-tune it first")
    if not (asked.env or env):
        raise ConfigError(f"{path}: learned from logged episodes without an environment; give the environment with --env")
    if env and asked.env not in ("", env):
        raise ConfigError(f"{path}: was trained in {asked.env}, not in {env}")
    options = {**asked.env_options, **(env_options or {})}
    check_env(asked.env or env, options)
    if policy == "agent" and wants_goal(asked):
        check_goals(asked.env or env)
    run, method, compute = load_run(path, device=device, which=which)
    run = replace(run, env=asked.env or env, env_options=options)
    recipe = run.recipe if bool(method.needs(run.model, run.stage) & MOTION) else None
    base = run.seed + (which == "best") if seed is None else seed

    blind = policy == "random" and video is None  # nobody sees the pictures: skip rendering, returns are equal
    shown = replace(run, observed="vectors") if blind else run

    def make() -> Observer:
        if policy == "random":
            return make_observer(shown, None, size=method.image_size, goal=False)
        return make_observer(shown, recipe, size=method.image_size)

    observers = [make()]
    dim, discrete = observers[0].action_dim, observers[0].discrete
    counter = iter(range(10**9))

    def policy_for() -> Any:
        group = next(counter)
        if policy == "random":
            return random_policy(dim, base * 1000 + group, discrete=discrete)
        torch.manual_seed(episode_seed(base, "policy", group))
        return MethodPolicy(method, compute, explore=False, window=run.online.length)

    def measured(result: Rollout) -> dict[str, Any]:
        if video is not None:
            save_film(result, video)
        changed = {"env_options": dict(env_options)} if env_options else {}
        return {**result.summary(), "env": run.env, **changed, "policy": policy, "seed": base}

    try:
        with compute.own_randomness():
            return measured(
                evaluate(policy_for, make, seed=base, episodes=episodes, observers=observers, keep_frames=video is not None)
            )
    except EvaluationError as error:
        error.measured = measured(error.result) if error.result.returns else {}
        raise


def random_floor(path: Path, episodes: int = 10) -> dict[str, Any]:
    """Score of the uniform random policy on a run's environment. It is saved in the run directory for reports."""
    target = path / "random.json"
    if target.exists():
        found = read_json(target, CheckpointError, "remove it, it is made again")
        if found.get("episodes", 0) >= episodes:
            return found
    result = evaluate_run(path, episodes=episodes, policy="random")
    write_json(target, json.loads(json.dumps(result, default=lambda x: np.asarray(x).tolist())))
    return result
