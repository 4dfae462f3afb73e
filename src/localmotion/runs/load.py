"""Load a run: settings, method, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from localmotion import methods
from localmotion.compute import Compute, choose
from localmotion.config import RunConfig
from localmotion.envs import check_env
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError
from localmotion.files import one_line
from localmotion.methods.base import MOTION, Method
from localmotion.recipe import Recipe
from localmotion.runs import checkpoint
from localmotion.runs.rundir import read_environment
from localmotion.runs.settings import read_config

Which = Literal["newest", "best"]


def at_least(**given: tuple[float, float]) -> None:
    """Raise ConfigError for an argument ``name=(value, least)`` whose value is below ``least``."""
    for name, (value, least) in given.items():
        if value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")


def load_run(
    path: Path, *, device: str = "auto", threads: int = 0, which: Which = "newest", plays: bool = True
) -> tuple[RunConfig, Method, Compute]:
    """Load a run. Returns its settings, its method in evaluation mode, and the device settings (`Compute`).

    ``which``: the newest weights, or those of the best evaluation. ``plays``: check that the run's environment can be made here. The
    state of torch's generator does not change.

    Raises CheckpointError if the run is missing, incomplete or damaged, or if its weights do not fit the model of its
    settings. Raises ConfigError if its settings or its recipe do not fit this version.
    """
    run = replace(read_config(path), device=device, threads=threads)
    cls = methods.get(run.method)
    acts = run.stage in cls.acts_after
    if plays and acts and (run.env or not run.data):
        _check_env(run, path)
    if acts and cls.needs(run.model, run.stage) & MOTION and not run.recipe:
        raise CheckpointError(f"{path / 'config.json'}: has no recipe, so its motion cannot be perceived; restore it")
    found = checkpoint.best(path) if which == "best" else checkpoint.newest(path)
    weights = checkpoint.read(found, "weights")
    action_dim = None
    if acts:
        # The actor's last layer has two outputs (mean, deviation) for each action dimension.
        action_dim = int(checkpoint.read_state(found)["action_dim"])
    size = (run.recipe or Recipe()).size
    _check_model(run, size, action_dim, weights, found)
    with torch.random.fork_rng(devices=[]):  # measuring and building draw random numbers
        compute = choose(run, read_environment(path))
        method = cls(run.model, image_size=size, action_dim=action_dim)
    checkpoint.load_weights(method, weights, str(found))
    return run, method.to(compute.device).eval(), compute


def built(run: RunConfig, image_size: int, action_dim: int | None) -> Method:
    """The method of a new run, with fresh weights. Raises ConfigError for sizes that do not fit each other."""
    try:
        return methods.get(run.method)(run.model, image_size=image_size, action_dim=action_dim)
    except ValueError as error:
        raise ConfigError(f"no {run.method} can be built of these settings: {one_line(error)}") from error


def _check_env(run: RunConfig, path: Path) -> None:
    """Raise ConfigError for an environment or options with which no run could have begun."""
    try:
        check_env(run.env, run.env_options)
    except ConfigError as error:
        raise ConfigError(f"{path / 'config.json'}: {one_line(error)}") from error


def _check_model(run: RunConfig, size: int, action_dim: int | None, weights: Mapping[str, Tensor], found: Path) -> None:
    """Build the model without memory and compare its shapes with the weights.

    This check comes first, because a number in a file from somebody else could make the real model allocate too much.
    Raises CheckpointError as `checkpoint.load_weights` does, and if no model can be built from the settings.
    """
    most = 2 * len(weights) + 100
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += 1
        if made > most:  # stop early: a huge number of layers would take forever
            raise CheckpointError(f"{found}: its settings describe more than {most} parameters, its weights are {len(weights)}")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            method: Any = methods.get(run.method)(run.model, image_size=size, action_dim=action_dim)
    except LocalmotionError:
        raise
    except Exception as error:  # unchecked sizes can raise any error of torch or Python
        raise CheckpointError(
            f"{found}: no {run.method} can be built of its settings ({one_line(error)}); has config.json been changed?"
        ) from error
    finally:
        hook.remove()
    checkpoint.check_weights(method, weights, str(found))
