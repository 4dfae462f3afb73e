"""Compiled parts learn what plain ones do, without graph breaks, and are compiled once."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo

from localmotion.acting.policy import MethodPolicy
from localmotion.config import Stage
from localmotion.errors import LocalmotionError
from localmotion.models.dae import DualAttentionBlock
from localmotion.training import compiled
from localmotion.training.update import Updater
from method_batches import CASES, CPU, make, make_batch

# Dynamo looks at .grad of what is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:::torch")


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Traced by Dynamo and by autograd, then run operation by operation: what a compiler would be given, without the compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


# One joint update and one pre-training with attention stand for all: tracing the others takes three times as long.
QUICK = {("dreamer_v3", "train"), ("drp", "pretrain")}


@pytest.mark.parametrize(("name", "stage"), [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES])
def test_compiled_parts_learn_the_same(name: str, stage: Stage) -> None:
    run, method = make(name, stage)
    twin = copy.deepcopy(method)
    assert compiled.compile_parts(twin, whole=True) >= 2
    assert twin.state_dict().keys() == method.state_dict().keys()
    counted, found = [], []
    for model in (method, twin):
        updater = Updater(model, run, CPU, pretrained=stage == "finetune")
        torch.manual_seed(0)
        steps = []
        for index in range(3):
            steps.append(updater.learn(make_batch(seed=index)))
            counted.append(graphs())
        found.append(steps)
    assert counted[:3] == [0, 0, 0]
    assert counted[3] > 0
    assert counted[4] == counted[5]  # nothing is compiled anew after the second update
    assert not torch._dynamo.utils.counters["graph_break"]
    for want, have in zip(*found, strict=True):
        assert {k: float(v) for k, v in have.items()} == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-4, abs=1e-6)


def test_a_run_compiles_if_asked_and_acts_without() -> None:
    run, method = make("drp", "train", "compile=true")
    updater = Updater(method, run, CPU)
    updater.learn(make_batch())
    before = graphs()
    assert before > 0
    batch = make_batch()
    record = {key: batch[key][0, 1].numpy() for key in batch if key not in ("is_first", "reward", "is_terminal")}
    plain = make("drp", "train")[1]
    plain.load_state_dict(method.state_dict())
    actions = []
    for model in (method, plain):
        policy = MethodPolicy(model, CPU, explore=False, window=8)
        torch.manual_seed(0)  # the latents are drawn
        actions.append([policy([record], first) for first in (True, False, False)])
    assert graphs() == before
    for action, alike in zip(*actions, strict=True):
        np.testing.assert_array_equal(action, alike)


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: Any) -> None:
        raise OSError("no C++ compiler")

    monkeypatch.setattr(compiled, "BACKEND", without)
    run, method = make("dreamer_v2", "train", "compile=true")
    with pytest.raises(LocalmotionError, match=r"cannot compile.*no C\+\+ compiler.*--compile false"):
        Updater(method, run, CPU).learn(make_batch())


def test_recurrences_are_not_compiled() -> None:
    _, method = make("drp", "train")
    parts = compiled.feed_forward(method)
    within = {id(module) for part in parts for module in part.modules()}
    assert any(isinstance(part, DualAttentionBlock) for part in parts)
    assert len(within) == sum(len(list(part.modules())) for part in parts)  # outermost: none lies within another
    for recurrent in (method.latent, method.dynamics):  # type: ignore[union-attr]
        assert not within & {id(module) for module in recurrent.modules()}  # type: ignore[union-attr]
