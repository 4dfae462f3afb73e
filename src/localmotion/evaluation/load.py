"""A trained run back in memory: settings, method, weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from localmotion import methods
from localmotion.compute import Compute, choose
from localmotion.config import RunConfig
from localmotion.evaluation.rollout import stored_recipe
from localmotion.methods.base import Method
from localmotion.perception.base import Recipe
from localmotion.training import checkpoint

Which = Literal["newest", "best"]


def load_run(path: Path, *, device: str = "auto", threads: int = 0, which: Which = "newest") -> tuple[RunConfig, Method, Compute]:
    """Settings, method (evaluation mode) with its newest weights or those of its best evaluation, and where it computes.

    Raises CheckpointError when the run is missing, incomplete or damaged.
    """
    run = replace(checkpoint.read_config(path), device=device, threads=threads)
    found = checkpoint.best(path) if which == "best" else checkpoint.newest(path)
    weights = checkpoint.read(found, "weights")
    compute = choose(run)
    action_dim = None
    if run.stage != "pretrain":
        # The actor's last layer knows the number of actions: two numbers (mean, deviation) each.
        action_dim = int(checkpoint.read_state(found)["action_dim"])
    size = (stored_recipe(run, path) or Recipe()).size
    method = methods.get(run.method)(run.model, image_size=size, action_dim=action_dim)
    checkpoint.load_weights(method, weights, str(found))
    return run, method.to(compute.device).eval(), compute
