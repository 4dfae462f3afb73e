"""Several ranks learn what one process learns from the whole batch. Ranks are threads here; test_torchrun.py has processes."""

from __future__ import annotations

import copy
import json
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from localmotion import methods, ranks
from localmotion.compute import Compute
from localmotion.errors import ConfigError
from localmotion.methods.base import Source
from localmotion.models.batch_norm import BatchNorm2d
from localmotion.models.planning import WindowMemory
from localmotion.models.rssm import kl_loss
from localmotion.models.values import ReturnRange
from localmotion.runs import checkpoint
from localmotion.runs.settings import compose
from localmotion.testing import ACTIONS, random_batch
from localmotion.training.interrupt import Interrupted, StopRequest
from localmotion.training.loop import Loop
from localmotion.training.online import OnlineLoop
from localmotion.training.spread import SpreadLoop
from localmotion.training.update import Updater
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore
from threads_as_ranks import Threads, no_noise, together

CPU = Compute(torch.device("cpu"), False, 1, "test")
# All but PVDR's alignment, which draws random windows of its rollouts: test_the_memory_of_windows_is_the_same_on_all_ranks. Of two
# stages of the same losses, one.
STAGES = [
    (name, stage)
    for name in methods.names()
    for stage in methods.get(name).stages
    if (name, stage) != ("pvdr", "finetune") and (stage != "train" or "pretrain" not in methods.get(name).stages)
]


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
    """And the same buffers: codebooks, running statistics, queues. To 1e-4 of the largest number of each tensor."""
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
    assert not {key: value for key, value in worst.items() if value > 1e-4}


# The parts ----------------------------------------------------------------------------------------------------------------


def shared(monkeypatch: pytest.MonkeyPatch, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over ranks of the losses of the halves of ``x``, their gradients averaged as in an update, and the whole batch's gradient."""

    def part(rank: int) -> tuple[Tensor, Tensor]:
        mine = x.chunk(2)[rank].clone().requires_grad_()
        value = loss(mine)
        value.backward()
        assert mine.grad is not None
        return value.detach(), mine.grad / 2

    halves = together(2, part, monkeypatch)
    whole = x.clone().requires_grad_()
    loss(whole).backward()
    assert whole.grad is not None
    return (halves[0][0] + halves[1][0]) / 2, torch.cat([grad for _, grad in halves]), whole.grad


def test_free_nats_count_for_the_mean_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One half is below the free nats and the other above; together they are above, so all rows learn."""
    torch.manual_seed(0)
    post = torch.cat([torch.randn(2, 3, 2, 4) * 0.1, torch.randn(2, 3, 2, 4) * 3])

    def loss(x: Tensor) -> Tensor:
        return kl_loss(x, torch.zeros_like(x), 0.2, 0.5)[0]

    value, found, expected = shared(monkeypatch, post, loss)
    torch.testing.assert_close(value, loss(post))
    torch.testing.assert_close(found, expected)
    assert expected[:2].any()


def test_a_weighted_mean_counts_the_weights_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])

    def loss(mine: Tensor) -> Tensor:
        weight = (mine.detach() != 2.0).float()  # three of four, two of them in the second half
        return (mine.square() * weight).sum() / ranks.weighed(weight)

    value, found, expected = shared(monkeypatch, x, loss)
    torch.testing.assert_close(value, loss(x))
    torch.testing.assert_close(found, expected)
    nothing = together(2, lambda rank: ranks.weighed(torch.zeros(3)), monkeypatch)
    assert sum(float(value) for value in nothing) == 1.0  # as for one process, where the sum of the weights is at least 1


def test_batch_norm_is_that_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * torch.arange(1, 5)[:, None, None, None] + 100
    x, pull = x.float(), torch.randn(4, 3, 5, 5)
    expected = nn.BatchNorm2d(3)
    norms = [BatchNorm2d(3), BatchNorm2d(3)]

    def part(rank: int) -> tuple[Tensor, Tensor]:
        mine = x.chunk(2)[rank].clone().requires_grad_()
        out = norms[rank](mine)
        (out * pull.chunk(2)[rank]).sum().backward()
        assert mine.grad is not None
        return out.detach(), mine.grad

    halves = together(2, part, monkeypatch)
    whole = x.clone().requires_grad_()
    out = expected(whole)
    (out * pull).sum().backward()
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), out.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([half[1] for half in halves]), whole.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norms[0].weight.grad + norms[1].weight.grad, expected.weight.grad, rtol=1e-3, atol=1e-3)  # type: ignore[operator]
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(norms[1].state_dict()[name], value)


def test_percentiles_are_those_of_all_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    returns = torch.arange(40.0).view(4, 10).flip(0)
    found = together(2, lambda rank: ReturnRange()(returns.chunk(2)[rank]), monkeypatch)
    expected = ReturnRange(limit=0.0)(returns)
    for offset, _ in found:
        torch.testing.assert_close(offset, expected[0])


def test_the_memory_of_windows_is_the_same_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, action, code = torch.arange(24).view(4, 3, 2), torch.randn(4, 2), torch.randn(4, 3)
    memories = [WindowMemory(6, 3, 2, 2, 3) for _ in range(2)]

    def part(rank: int) -> None:
        rows = slice(2 * rank, 2 * rank + 2)
        memories[rank].add(tokens[rows], action[rows], code[rows], torch.ones(2, dtype=torch.bool))

    together(2, part, monkeypatch)
    assert int(memories[0].count) == 4
    assert torch.equal(memories[0].tokens[:4].long(), tokens)
    assert torch.equal(memories[0].kept[:4], code)
    for one, other in zip(memories[0].buffers(), memories[1].buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("deferred", [False, True])
def test_an_update_that_is_bad_on_one_rank_is_skipped_on_all(deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is infinite with a gradient that is not, and a gradient that is not a number."""
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot")
    torch.manual_seed(0)
    start = methods.get("dreamer_v2")(run.model, image_size=64, action_dim=ACTIONS)
    batch = random_batch(methods.get("dreamer_v2"), "train", batch=2, time=4)
    for wrong in (torch.inf, torch.nan):

        def part(rank: int, wrong: float = wrong) -> tuple[dict[str, Tensor], int, dict[str, Tensor]]:
            method = copy.deepcopy(start)
            updater = Updater(method, run, CPU, deferred=deferred)
            losses = updater.passes[0].losses

            def bad(given: Any, handed: Any) -> Any:
                found, metrics, more = losses(given, handed)
                extra = torch.tensor(wrong) if wrong == torch.inf else found["reward"] * wrong
                return {**found, "reward": found["reward"] + extra}, metrics, more

            if rank == 1:
                updater.passes = (updater.passes[0]._replace(losses=bad), *updater.passes[1:])
            updater.learn(batch)
            return dict(method.named_parameters()), updater.check(), dict(start.named_parameters())

        for after, skipped, before in together(2, part, monkeypatch):
            assert skipped == 1
            still = [name for name in after if not name.startswith("behaviour.")]
            assert all(torch.equal(after[name], before[name]) for name in still)


def test_rows_of_ranks_are_the_rows_of_the_batch(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = ClipStore(store)

    def sampler(share: slice) -> WindowSampler:
        return WindowSampler(clips, 4, 6, 3, prefetch=False, rows=share)

    whole = sampler(slice(None)).batch(5)
    parts = [sampler(share).batch(5) for share in together(3, lambda rank: ranks.rows(6), monkeypatch)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value), name
    with pytest.raises(ConfigError, match=r"online\.batch_size=5: 2 processes"):
        together(2, lambda rank: ranks.rows(5, "online.batch_size"), monkeypatch)


def test_tensors_of_all_ranks_are_collected_whatever_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(rank: int) -> list[dict[str, Tensor]]:
        return ranks.collect({"x": torch.full((rank, 2), 7), **({"only": torch.tensor(1.5)} if rank else {})})

    for found in together(3, part, monkeypatch):
        assert [each["x"].shape for each in found] == [(0, 2), (1, 2), (2, 2)]
        assert [sorted(each) for each in found] == [["x"], ["only", "x"], ["only", "x"]]


def test_gradients_are_averaged_in_parts_of_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BUCKET", 40)
    shapes = [(3,), (2, 3, 2, 2), (5,), (1,), ()]

    def part(rank: int) -> tuple[list[Tensor], bool]:
        given = [torch.full(shape, float(rank + 1)).add_(torch.arange(max(1, math.prod(shape))).view(shape)) for shape in shapes]
        given[1] = given[1].contiguous(memory_format=torch.channels_last)
        return given, bool(ranks.average_(given, torch.tensor(True)))

    for given, fine in together(2, part, monkeypatch):
        assert fine
        for tensor, shape in zip(given, shapes, strict=True):
            assert torch.equal(tensor, torch.arange(max(1, math.prod(shape))).view(shape) + 1.5)


def test_ranks_that_drifted_apart_go_on_with_the_weights_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(rank: int) -> tuple[list[str], float]:
        tensors = {"same": torch.ones(3), "other": torch.tensor(1.0 + rank)}
        return ranks.align_(tensors), float(tensors["other"])

    assert together(2, part, monkeypatch) == [(["other"], 1.0)] * 2


def test_a_stop_asked_of_one_rank_is_heard_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(rank: int) -> int:
        loop: Any = SimpleNamespace(stop=StopRequest())
        Loop.heed(loop)
        loop.stop.signum = signal.SIGUSR1 if rank else 0
        with pytest.raises(Interrupted) as stopped:
            Loop.heed(loop)
        return stopped.value.code

    assert together(2, part, monkeypatch) == [138, 138]


def test_a_resumed_run_knows_that_all_ranks_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that was due when the run stopped then takes place before the next step, as it would have."""
    values: dict[str, Any] = {"episode": 1, "phase": 0, "playing": None, "replay": {}}
    monkeypatch.setattr(OnlineLoop, "state", lambda self: (values, {}))
    monkeypatch.setattr(OnlineLoop, "restore", lambda self, state, folder: None)
    loop, other = object.__new__(SpreadLoop), object.__new__(SpreadLoop)
    loop.all_learn, loop.elsewhere = True, 2
    own = json.loads(bytes(loop.state()[1]["own"]["json"].numpy()))
    monkeypatch.setattr(checkpoint, "read_own", lambda folder: own)
    other.restore({"ranks": ranks.world()}, tmp_path)
    assert other.may_evaluate
    assert other.elsewhere == 2


def test_each_rank_draws_its_own_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 those of a run of one process."""

    def drawn(rank: int, update: int) -> list[float]:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        with monkeypatch.context() as patch:
            patch.setattr(ranks, "_here", SimpleNamespace(rank=rank, world=3))
            checkpoint.seed_rank(7, update)
        return [float(torch.rand(())), np.random.rand(), random.random()]

    draws = [drawn(rank, update) for rank, update in ((1, 0), (2, 0), (1, 5), (0, 0))]
    alone = drawn(0, 9)
    assert draws[3] == alone
    assert all(len({row[kind] for row in draws}) == 4 for kind in range(3))
    assert drawn(1, 5) == draws[2]


def test_work_apart_asks_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of rank 0 computes losses, which would wait for the others."""

    def part(rank: int) -> float:
        if rank == 0:
            with ranks.apart():
                assert ranks.alone()
                assert float(ranks.mean(torch.tensor(5.0))) == 5.0
        return ranks.most(rank)

    exchange = Threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "_here", exchange)
        assert part(0) == 0
        assert ranks._here is exchange
