"""A batch as the training loops give it, and a method with its settings: what the tests of methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localmotion import methods
from localmotion.compute import Compute
from localmotion.config import RunConfig, Stage
from localmotion.methods.base import Group, Method
from localmotion.runs.settings import compose
from localmotion.training.update import rates

CPU = Compute(torch.device("cpu"), False, 1, "test")
CASES: list[tuple[str, Stage]] = [
    (name, stage)
    for name in methods.names()
    for stage in (("train", "pretrain", "finetune") if "pretrain" in methods.get(name).stages else ("train",))
]
"""Every method and stage."""
ACTIONS = 3
DEFAULT_ENV = "toy:dot"


def groups_of(method: Method, run: RunConfig, pretrained: bool) -> list[Group]:
    """Optimisers of a run's stage."""
    return method.groups(run.stage, rates(run, method.stages[run.stage], pretrained))


def make_batch(batch: int = 2, time: int = 8, tracks: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """All keys of a batch; every sequence starts an episode."""
    g = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    is_first[:, 0] = True
    visible = torch.rand(batch, time, tracks, generator=g) < 0.9
    visible[:, 0] = False
    return {
        "image": torch.randint(0, 256, (batch, time, 64, 64, 3), generator=g, dtype=torch.uint8),
        "action": (torch.rand(batch, time, ACTIONS, generator=g) * 2 - 1) * ~is_first[..., None],
        "reward": torch.rand(batch, time, generator=g),
        "is_terminal": torch.zeros(batch, time, dtype=torch.bool),
        "is_first": is_first,
        "flow": torch.randn(batch, time, 64, 64, 2, generator=g).half(),
        "tracks": torch.rand(batch, time, tracks, 2, generator=g) * 63,
        "visible": visible,
        "track_id": torch.zeros(batch, time, tracks, dtype=torch.int32),
    }


def make(name: str, stage: Stage, *texts: str, env: str = DEFAULT_ENV, preset: str = "debug") -> tuple[RunConfig, Any]:
    """Settings and the method they describe, its weights a function of the settings alone."""
    run = compose(name, stage, preset=preset, env="" if stage == "pretrain" else env, settings=texts)
    torch.manual_seed(0)
    return run, methods.get(name)(run.model, image_size=64, action_dim=None if stage == "pretrain" else ACTIONS)
