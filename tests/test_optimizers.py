"""LaProp and adaptive clipping against plain numpy, and what the updater does with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from localmotion import methods
from localmotion.compute import Compute
from localmotion.config import OptimConfig
from localmotion.errors import ConfigError
from localmotion.methods.base import Group
from localmotion.runs import checkpoint
from localmotion.runs.settings import compose
from localmotion.training import optimizers
from localmotion.training.optimizers import LaProp, clip_adaptive_
from localmotion.training.update import Updater

CPU = Compute(torch.device("cpu"), False, 1, "test")


def parameters(seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,), (2, 3, 3, 3))]


def gradients(params: list[nn.Parameter], seed: int) -> list[np.ndarray]:
    """Gives every parameter a gradient of its own size; the same as float64 arrays."""
    g = torch.Generator().manual_seed(seed)
    for index, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=g) * 10.0 ** (index - 1)
    return [p.grad.double().numpy().copy() for p in params if p.grad is not None]


def test_laprop_and_clipping_are_the_reference_arithmetic() -> None:
    """Written out in float64: clip by the whole tensor's norm, divide by the unbiased root mean square, then momentum."""
    params = parameters()
    want = [p.detach().double().numpy().copy() for p in params]
    mu, nu = [np.zeros_like(x) for x in want], [np.zeros_like(x) for x in want]
    optimiser = LaProp(params, lr=1e-2, betas=(0.9, 0.999), eps=1e-20)
    for step in range(1, 8):
        grads = gradients(params, step)
        total = clip_adaptive_(params, 0.3, 1e-3)
        optimiser.step()
        assert float(total) == pytest.approx(np.sqrt(sum((g**2).sum() for g in grads)), rel=1e-5)
        for i, g in enumerate(grads):
            limit = 0.3 * max(1e-3, np.linalg.norm(want[i]))
            g = g / max(1.0, np.linalg.norm(g) / limit)
            nu[i] = 0.999 * nu[i] + 0.001 * g * g
            scaled = g / (np.sqrt(nu[i] / (1 - 0.999**step)) + 1e-20)
            mu[i] = 0.9 * mu[i] + 0.1 * scaled
            want[i] = want[i] - 1e-2 * mu[i] / (1 - 0.9**step)
    for p, x in zip(params, want, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=2e-5, atol=2e-6)


def test_clipping_leaves_small_gradients_and_knows_a_least_size() -> None:
    zero, large, small = (nn.Parameter(torch.full((4,), x)) for x in (0.0, 5.0, 5.0))
    zero.grad, large.grad, small.grad = torch.ones(4), torch.full((4,), 100.0), torch.full((4,), 0.1)
    unused = nn.Parameter(torch.ones(3))
    clip_adaptive_([zero, large, small, unused], 0.3, 1e-3)
    assert float(zero.grad.norm()) == pytest.approx(0.3 * 1e-3, rel=1e-5)  # a parameter of zeros can still move
    assert float(large.grad.norm()) == pytest.approx(0.3 * 10.0, rel=1e-5)
    assert torch.equal(small.grad, torch.full((4,), 0.1))
    assert unused.grad is None
    assert float(clip_adaptive_([unused], 0.3)) == 0.0


def test_first_step_of_laprop_has_the_size_of_the_rate_whatever_the_gradient() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    for p, scale in zip(params, (1e-12, 1.0, 1e12), strict=True):
        p.grad = torch.randn_like(p) * scale
    LaProp(params, lr=3e-3).step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close((p - old).abs(), torch.full_like(p, 3e-3), rtol=1e-3, atol=1e-6)


def test_parameters_updated_less_often_are_corrected_by_their_own_count() -> None:
    params = parameters()
    optimiser = LaProp(params, lr=1e-2)
    gradients(params, 0)
    params[0].grad = None
    optimiser.step()
    gradients(params, 1)
    before = params[0].detach().clone()
    optimiser.step()
    torch.testing.assert_close((params[0] - before).abs(), torch.full_like(before, 1e-2), rtol=1e-3, atol=1e-6)


def test_counts_on_the_device_give_the_same_steps() -> None:
    """Also for a parameter that was updated less often, and with a rate that is a tensor."""
    both = parameters(), parameters()
    rate = torch.tensor(1e-2)
    optimisers = LaProp(both[0], lr=1e-2), LaProp(both[1], lr=rate, capturable=True)
    for step in range(5):
        for params, optimiser in zip(both, optimisers, strict=True):
            gradients(params, step)
            if step == 1:
                params[0].grad = None
            optimiser.step()
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    rate.zero_()
    before = [p.detach().clone() for p in both[1]]
    gradients(both[1], 9)
    optimisers[1].step()
    assert all(torch.equal(p, old) for p, old in zip(both[1], before, strict=True))


def test_bad_settings_are_refused() -> None:
    for bad in ({"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}):
        with pytest.raises(ValueError, match="LaProp"):
            LaProp(parameters(), **bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="laprop"):
        optimizers.make(Group("model", parameters(), 1e-3, optimizer="lapropp"), OptimConfig())
    adam = optimizers.make(Group("model", parameters(), 1e-3), OptimConfig(eps=1e-3))
    assert isinstance(adam, torch.optim.Adam)
    assert adam.param_groups[0]["eps"] == 1e-3


def batch(seed: int = 0, sequences: int = 2, length: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (sequences, length)
    is_first = torch.zeros(shape, dtype=torch.bool)
    is_first[:, 0] = True
    return {
        "image": torch.randint(0, 256, (*shape, 64, 64, 3), dtype=torch.uint8, generator=g),
        "action": torch.rand(*shape, 2, generator=g) * 2 - 1,
        "reward": torch.randn(shape, generator=g),
        "is_terminal": torch.zeros(shape, dtype=torch.bool),
        "is_first": is_first,
    }


def updater(seed: int, *settings: str) -> Updater:
    run = compose("dreamer_v3", "train", preset="debug", env="toy:dot", settings=settings)
    torch.manual_seed(seed)
    return Updater(methods.get("dreamer_v3")(run.model, image_size=64, action_dim=2), run, CPU)


def test_a_saved_optimiser_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Through the files of a checkpoint: the same weights, bit by bit, as without the interruption."""
    first = updater(0)
    for seed in range(2):
        first.learn(batch(seed))
    checkpoint.save(tmp_path, 2, tensors={"weights": first.method.state_dict(), "optimizer": first.state()}, state={})
    saved = checkpoint.complete(tmp_path)[-1]
    second = updater(1)
    checkpoint.load_weights(second.method, checkpoint.read(saved, "weights"), str(saved))
    second.load_state(checkpoint.read(saved, "optimizer"))
    second.update = first.update
    for each in (first, second):
        torch.manual_seed(7)
        each.learn(batch(5))
    ours, theirs = first.method.state_dict(), second.method.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert float(ours["return_range.high"]) != 0


def test_warm_up_starts_at_zero_and_ends_at_the_rate() -> None:
    found = updater(0, "model.warmup=4", "online.lr=0.01")
    before = {k: v.clone() for k, v in found.method.state_dict().items()}
    rates = []
    for seed in range(6):
        found.learn(batch(seed))
        rates.append(found.optimisers["model"].param_groups[0]["lr"])
        if seed == 0:  # the first update only fills the moments
            moved = [k for k, v in found.method.named_parameters() if not torch.equal(v, before[k])]
            assert not moved
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01, 0.01])
