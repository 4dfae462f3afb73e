"""A method with its settings, and a batch with all keys: what the tests of methods share."""

from __future__ import annotations

from typing import Any

import torch

from localmotion import methods
from localmotion.config import RunConfig, Stage
from localmotion.methods.base import Group, Method
from localmotion.runs.settings import compose
from localmotion.testing import ACTIONS
from localmotion.testing import full_batch as make_batch
from localmotion.testing.rules import CPU
from localmotion.training.update import rates

AGENTS = [name for name in methods.names() if "train" in methods.get(name).stages]
"""Methods that learn in an environment. Latent action models do not; test_latent_actions.py has what they share."""
CASES: list[tuple[str, Stage]] = [
    (name, stage)
    for name in AGENTS
    for stage in (("train", "pretrain", "finetune") if "pretrain" in methods.get(name).stages else ("train",))
]
"""Every such method and stage."""
DEFAULT_ENV = "toy:dot"


def groups_of(method: Method, run: RunConfig, pretrained: bool) -> list[Group]:
    """Optimisers of a run's stage."""
    return method.groups(run.stage, rates(run, method.stages[run.stage], pretrained))


def make(name: str, stage: Stage, *texts: str, env: str = DEFAULT_ENV, preset: str = "debug") -> tuple[RunConfig, Any]:
    """Settings and the method they describe, its weights a function of the settings alone."""
    run = compose(name, stage, preset=preset, env="" if stage == "pretrain" else env, settings=texts)
    torch.manual_seed(0)
    return run, methods.get(name)(run.model, image_size=64, action_dim=None if stage == "pretrain" else ACTIONS)


__all__ = ["ACTIONS", "AGENTS", "CASES", "CPU", "groups_of", "make", "make_batch"]
