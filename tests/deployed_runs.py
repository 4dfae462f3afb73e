"""Small runs that can act, untrained, for the tests of deployed and exported policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from localmotion import methods
from localmotion.recipe import Recipe
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.runs.settings import compose

MOVING = Recipe(size=32, percept_size=64, tracks=4, redraw_rounds=0)


def saved(path: Path, name: str, stage: str = "train", *, env: str = "toy:dot", actions: int | None = 2, **more: Any) -> Path:
    """A debug run with one checkpoint of fresh weights. ``more``: ``model`` and ``recipe`` of its settings, ``described`` for its env."""
    described = more.pop("described", {})
    flags = {"precision": "fp32", "device": "cpu", "recipe": MOVING, **more}
    run = compose(name, stage, preset="debug", env=env, flags=flags)
    torch.manual_seed(1)
    model = methods.get(name)(run.model, image_size=run.recipe.size if run.recipe else 64, action_dim=actions)
    out = RunDir(path, run)
    out.environment({"device": "cpu", "precision": "fp32", "env": described})
    state = {"stage": stage, "action_dim": actions} if actions else {"stage": stage}
    checkpoint.save(path / "checkpoints", 1, tensors={"weights": model.state_dict()}, state=state)
    return path
