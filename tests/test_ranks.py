"""Several ranks learn what one process learns from the whole batch. Ranks are threads here; test_torchrun.py has processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from localmotion import methods
from localmotion.compute import Compute
from localmotion.methods.base import Source
from localmotion.runs.settings import compose
from localmotion.testing import ACTIONS, random_batch
from localmotion.training.update import Updater
from threads_as_ranks import no_noise, together

CPU = Compute(torch.device("cpu"), False, 1, "test")
STAGES = [(name, stage) for name in methods.names() for stage, source in methods.get(name).stages.items()]


class Spy(Updater):
    """Keeps the gradients that are clipped."""

    seen: dict[str, Tensor]

    def _clip(self, group: Any) -> Tensor:
        for index, parameter in enumerate(group.parameters):
            if parameter.grad is not None:
                self.seen[f"{group.name}.{index}"] = parameter.grad.clone()
        return super()._clip(group)


def learn(
    method: methods.Method, run: Any, batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Gradients before clipping, buffers, and metrics of one update."""
    method = copy.deepcopy(method)
    updater = Spy(method, run, CPU)
    updater.seen = {}
    updater.agent_step = 0
    found = updater.learn(batch)
    return updater.seen, dict(method.named_buffers()), {name: float(value) for name, value in found.items()}


def difference(one: Tensor, other: Tensor, scale: float) -> float:
    return float((one.double() - other.double()).abs().max()) / max(scale, 1e-12)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_two_ranks_compute_the_gradients_of_the_whole_batch(name: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = methods.get(name)
    clips = cls.stages[stage] is Source.CLIPS
    run = compose(name, stage, preset="debug", env="" if clips else "toy:dot")
    torch.manual_seed(0)
    method = cls(run.model, image_size=64, action_dim=ACTIONS if stage in cls.acts_after else None)
    batch = random_batch(cls, stage, batch=4)
    if not clips:
        for row, place in enumerate((3, 5, 6)):  # another number of valid steps in each row
            batch["is_first"][row, place] = True
    no_noise(monkeypatch)
    whole = together(1, lambda rank: learn(method, run, batch), monkeypatch)[0]
    parts = together(2, lambda rank: learn(method, run, {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}), monkeypatch)
    scale = max(float(grad.abs().max()) for grad in whole[0].values())
    worst = {}
    for key, grad in whole[0].items():
        assert torch.equal(parts[0][0][key], parts[1][0][key]), key
        worst[key] = difference(grad, parts[0][0][key], float(grad.abs().max()) + 1e-3 * scale)
    for key, value in whole[1].items():
        assert torch.equal(parts[0][1][key], parts[1][1][key]), key
        worst[key] = difference(value, parts[0][1][key], float(value.abs().double().max()) if value.numel() else 1)
    bad = {k: v for k, v in worst.items() if v > 1e-4}
    print(name, stage, max(worst.values()))
    assert not bad, bad
