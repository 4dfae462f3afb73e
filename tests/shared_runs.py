"""Small runs to share, as the training loops leave them, and the comparison of two loaded methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from localmotion import methods
from localmotion.config import RunConfig
from localmotion.methods.base import acted
from localmotion.recipe import Recipe
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.runs.settings import compose
from localmotion.testing.batches import ACTIONS, full_batch

RECIPE = Recipe(percept_size=64, tracks=4, redraw_rounds=0)


def _saved(path: Path, run: RunConfig, seed: int, update: int, action_dim: int | None) -> Path:
    torch.manual_seed(seed)
    model = methods.get(run.method)(run.model, image_size=64, action_dim=action_dim)
    out = RunDir(path, run)
    out.environment({"recipe": RECIPE.to_json(), "device": "cpu", "precision": "fp32", "parameters": model.parameter_counts()})
    out.status("finished", update=update)
    for i in range(3):
        if action_dim:
            out.log("eval", env_step=i, return_mean=10.0 + i, return_std=1.0, episodes=2)
        else:
            out.log("heldout", update=i, **{"psnr/motion": 20.0 + i, "masked/ratio_best": 0.5})
        out.log("train" if action_dim else "pretrain", update=i, env_step=i, **{"loss/image": 3.0 - i, "seconds/update": 0.1})
    state: dict[str, Any] = {"stage": run.stage, "metrics_offset": out.metrics_offset()}
    if action_dim:
        state |= {"action_dim": action_dim, "agent_step": 9, "env_step": 18, "episode": 1, "next_eval": 20, "best": [0.0, 1.0]}
    tensors = {"weights": model.state_dict(), "optimizer": {"model.0.exp_avg": torch.zeros(3)}}
    checkpoint.save(path / "checkpoints", update, tensors=tensors, state=state)
    return path


def pretrained_run(path: Path, *, seed: int = 0, update: int = 1, **settings: Any) -> Path:
    """A pre-training run of DRP with one checkpoint."""
    run = compose("drp", "pretrain", preset="debug", settings=("precision=fp32", "threads=1", "data=/home/me/my films/store"))
    run = replace(run, pretrain=replace(run.pretrain, length=8), **settings)
    return _saved(path, run, seed, update, None)


def acting_run(path: Path) -> Path:
    """A run of DreamerV2 that learned in an environment."""
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", settings=("precision=fp32", "threads=1"))
    return _saved(path, replace(run, recipe=RECIPE), 0, 1, ACTIONS)


def same_outputs(one: Any, two: Any) -> None:
    """Assert that two methods have the same weights and give the same outputs, to the bit."""
    assert {k: v.dtype for k, v in one.state_dict().items()} == {k: v.dtype for k, v in two.state_dict().items()}
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    batch = full_batch(batch=1)
    found = []
    for method in (one, two):
        torch.manual_seed(0)
        with torch.no_grad():
            if method.acts:
                obs = {
                    "image": batch["image"][:, :1],
                    "is_first": torch.ones(1, 1, dtype=torch.bool),
                    "action": torch.zeros(1, 1, ACTIONS),
                }
                found.append([acted(method, obs, method.initial_carry(1), explore=False, window=8)[0]])
            else:
                losses, _ = method.pretrain_losses(batch)[:2]
                found.append(list(losses.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
