"""Learn a task from a pre-trained run or from scratch, in an environment or from logged episodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from localmotion import methods, ranks
from localmotion.acting.observer import Observer, make_observer, streaming_recipe, wants_goal
from localmotion.compute import choose
from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.envs.vector import VectorEnv
from localmotion.errors import ConfigError
from localmotion.machine import cores
from localmotion.methods.base import MOTION, Method, Source
from localmotion.recipe import Recipe
from localmotion.recording.logs import action_dim
from localmotion.runs.load import built
from localmotion.runs.rundir import check_stores, claimed, earlier, read_environment, run_dir
from localmotion.runs.settings import recipe_of, with_recipe
from localmotion.runs.sharing import local_run, pinned
from localmotion.training import graphs
from localmotion.training.checks import check_acting_stage, check_budget, check_learns, check_phases, check_plays, check_ranks
from localmotion.training.logged import LoggedLoop
from localmotion.training.online import OnlineLoop
from localmotion.training.rehearsal import check_clips
from localmotion.training.rollout import RolloutLoop
from localmotion.training.spread import SpreadLoop
from localmotion.training.transfer import load_pretrained
from localmotion.training.update import Updater
from localmotion.video.store import ClipStore


def finetune(run: RunConfig, path: Path) -> Path:
    """Run a stage of ``run.method`` that learns from actions, in the run directory ``path``. Returns ``path``.

    If ``path`` holds a stopped run with the same settings, that run continues. If ``run.data`` names a store of logged
    episodes, the stage learns from these episodes only; ``run.env`` (optional) is then used for evaluation. Otherwise
    the agent plays in ``run.env``.

    Raises LocalmotionError with the cause and the fix, also if the run ends without an update. On a stop signal it
    saves and raises Interrupted.
    """
    cls = methods.get(run.method)
    source = cls.stages[run.stage]
    check_acting_stage(cls, run)
    if run.data:
        work = _logged
    elif source is Source.ROLLOUT:
        work = _rollout
    else:
        work = _online
    check_ranks(run)
    check_plays(run)
    with ranks.joined(), claimed(path):
        return work(pinned(run, earlier(path)), path, cls)


def _online(run: RunConfig, path: Path, cls: type[Method]) -> Path:
    perception = streaming_recipe(with_recipe(run, earlier(path), _start(run)).recipe or Recipe(), run.motion)
    run = replace(run, recipe=perception)
    observer = make_observer(run, perception if bool(cls.needs(run.model, run.stage) & MOTION) else None, size=perception.size)
    run = _acting(run, observer.discrete)
    if run.observed != "pixels":
        run = _shown(run, observer)
    repeat = int(observer.env.describe()["action_repeat"])  # type: ignore[attr-defined]
    check_learns(run, repeat)
    check_phases(run, observer.env)
    method, updater = _begun(run, path, perception.size, observer.action_dim)
    loop = OnlineLoop if ranks.alone() else SpreadLoop
    loop(run, run_dir(path, run), observer, method, updater, repeat).go()
    return path


def _logged(run: RunConfig, path: Path, cls: type[Method]) -> Path:
    if run.observed != "pixels":
        raise ConfigError(f"observed={run.observed}: logged episodes have pictures only; leave it out")
    if cls.extras and cls.stages[run.stage] is not Source.LOGGED:
        raise ConfigError(
            f"{run.method}: learns from values that its policy computes while acting ({', '.join(cls.extras)});"
            " logs do not hold them"
        )
    store = ClipStore(Path(run.data))
    check_stores(path, {"data": store})
    if store.missing:
        say(store.missing_line())
    recipe = streaming_recipe(recipe_of(store.recipe, store.path), run.motion)
    run, dim = replace(run, recipe=recipe), action_dim(store)
    make: Callable[[], Observer] | None = None
    if run.env:
        run = _as_logged(run)
        perceived = recipe if bool(cls.needs(run.model, run.stage) & MOTION) else None

        def make() -> Observer:
            return make_observer(run, perceived, size=recipe.size)

        observer = make()
        if observer.action_dim != dim:
            raise ConfigError(f"{run.data}: was logged with {dim} action dimensions, {run.env} has {observer.action_dim}")
        run = _acting(run, observer.discrete)
        observer.env.close()
    method, updater = _begun(run, path, store.size, dim)
    LoggedLoop(run, run_dir(path, run), store, method, updater, make).go()
    return path


def _rollout(run: RunConfig, path: Path, cls: type[Method]) -> Path:
    rollout = run.rollout
    run = replace(run, recipe=with_recipe(run, earlier(path), _start(run)).recipe or Recipe())
    size = run.recipe.size if run.recipe else Recipe().size
    settings = {
        "size": size,
        "quality": run.quality,
        "action_repeat": run.action_repeat or None,
        "supersample": run.supersample,
        "goal": wants_goal(run),
        **run.env_options,
    }
    share = ranks.rows(rollout.environments, "rollout.environments")
    count = share.stop - share.start
    workers = rollout.workers or max(1, cores() // ranks.local()[1])
    with closing(VectorEnv(run.env, count, seed=run.seed, first=share.start, workers=workers, **settings)) as envs:
        repeat = int(envs.description["action_repeat"])
        check_budget(run, repeat)
        dim = int(np.prod(envs.single_action_space.shape or ()))
        run = _acting(run, bool(envs.description.get("discrete")))
        method, updater = _begun(run, path, size, dim)
        RolloutLoop(run, run_dir(path, run), envs, method, updater, repeat).go()
    return path


def _start(run: RunConfig) -> Path | None:
    """The folder of the run's checkpoint."""
    return local_run(run.checkpoint) if run.checkpoint else None


def _as_logged(run: RunConfig) -> RunConfig:
    """The run with the action repeat of its logged episodes. Raises ConfigError if the settings name another."""
    try:
        logged = int(json.loads((Path(run.data) / "collection.json").read_text())["settings"]["env"]["action_repeat"])
    except (OSError, ValueError, KeyError, TypeError):
        return run  # `collect` did not make this store, so the logged action repeat is unknown
    if run.action_repeat not in (0, logged):
        raise ConfigError(f"action_repeat={run.action_repeat}: {run.data} was logged with {logged}; leave it out")
    return replace(run, action_repeat=logged)


def _begun(run: RunConfig, path: Path, size: int, dim: int) -> tuple[Method, Updater]:
    """Build the method, load its pre-trained weights (if any), and build its updater."""
    if run.rehearsal.data:
        check_clips(run, size, path)
    compute = choose(run, read_environment(earlier(path)))
    torch.manual_seed(run.seed)
    method = built(run, size, dim).to(compute.device)
    if run.checkpoint:
        say(load_pretrained(method, run).line())
    return method, Updater(method, run, compute, pretrained=bool(run.checkpoint), graph=graphs.wanted(run))


def _acting(run: RunConfig, discrete: bool) -> RunConfig:
    """The run with model settings for the environment's actions.

    Raises ConfigError if the method cannot act with them.
    """
    cls = methods.get(run.method)
    if not discrete:
        if getattr(run.model, "discrete", False):
            raise ConfigError(f"model.discrete=true: the actions of {run.env} are numbers, not choices; leave it out")
        return run
    if not cls.discrete:
        able = ", ".join(name for name in methods.names() if methods.get(name).discrete)
        raise ConfigError(
            f"{run.env}: its actions are choices (Discrete), and {run.method} acts with numbers in [-1, 1]; methods that take choices:"
            f" {able}"
        )
    return replace(run, model=replace(run.model, discrete=True))


def _shown(run: RunConfig, observer: Observer) -> RunConfig:
    """The run with model settings for the environment's vector.

    Raises ConfigError if the method learns from pictures only.
    """
    if not methods.get(run.method).vectors:
        able = ", ".join(name for name in methods.names() if methods.get(name).vectors)
        raise ConfigError(f"observed={run.observed}: {run.method} learns from pictures only; methods that take vectors: {able}")
    (length,) = observer.spec()["vector"][0]
    if not length:
        raise ConfigError(f"observed={run.observed}: the observation of {run.env} has no numbers; leave it out")
    return replace(run, model=replace(run.model, pixels=run.observed == "both", vector_dim=length))
