"""The tool: `check_update` runs the product's update and a written-out one on the same numbers and compares all that they leave behind.

A method is written out as a `Losses` (as `stages.IPV` and `stages.DRP` are): losses with their weights, who learns at which rate, and the
buffers that change. Backward pass, optimisers, imagination and slow copies are the same for all and are here and in `dynamics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from localmotion.config import RunConfig
from localmotion.training.update import Updater
from method_batches import CPU
from written_out import dynamics
from written_out.product import Draws


@dataclass
class World:
    """What a world model's losses are made of."""

    losses: dict[str, Tensor]
    scales: dict[str, float]
    start: tuple[Tensor, Tensor] | None = None
    """Latents (B*T, S, C) and states (B*T, D), from which imagination starts."""


@dataclass
class Learns:
    """One optimiser: the weights whose names begin so, their rate, and for how many first updates the rate is zero."""

    prefixes: tuple[str, ...]
    rate: float
    frozen: int = 0


class Losses(Protocol):
    """A method written out, for one update."""

    metrics: dict[str, Tensor]
    """What the product reports under the same names."""

    def pretrain(self) -> World: ...

    def finetune(self) -> World: ...

    def groups(self, pretrained: bool) -> dict[str, Learns]:
        """Optimisers of fine-tuning; "actor" and "critic" learn from imagination, the others from the world model's losses."""

    def changed(self) -> dict[str, Tensor]:
        """Buffers as the losses leave them behind."""


class WrittenUpdate:
    """Updates written out; weights, buffers and the optimisers' moments go on from one to the next."""

    def __init__(self, method: torch.nn.Module, run: RunConfig, losses: Callable[..., Losses], *, loaded: bool) -> None:
        self.run, self.losses, self.loaded, self.count = run, losses, loaded, 0
        self.state = {name: value.clone() for name, value in method.state_dict().items()}
        self.learned = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
        self.optimisers: dict[str, dynamics.Adam] = {}

    def update(self, batch: Mapping[str, Tensor], draws: Draws) -> tuple[dict[str, Tensor], dict[str, float], Losses]:
        """Losses and gradient norms of one update, and what computed them."""
        weights, norms = self.leaves(), {}
        method = self.losses(weights, batch, self.run, draws)
        world = method.pretrain() if self.run.stage == "pretrain" else method.finetune()
        groups = {"model": Learns(("",), self.pretraining_rate())} if self.run.stage == "pretrain" else method.groups(self.loaded)
        total = torch.stack([loss * world.scales[name] for name, loss in world.losses.items()]).sum()
        for name, group in groups.items():
            if name not in ("actor", "critic"):
                norms[name] = self.step(name, group, weights, total)
        losses = dict(world.losses)
        if world.start is not None:
            weights = self.leaves()  # imagination is in the world model as it is now
            imagined = dynamics.behaviour(weights, world.start, self.run.model, batch["action"].shape[-1], draws.uniform)
            norms |= {name: self.step(name, groups[name], weights, loss) for name, loss in imagined.items()}
            losses |= imagined
        self.state |= method.changed()
        self.count += 1
        self.copy_slowly()
        return losses, norms, method

    def pretraining_rate(self) -> float:
        """The rate, which falls in a line to zero over the last share ``lr_decay`` of the updates."""
        settings = self.run.pretrain
        last = settings.lr_decay * settings.updates
        return settings.lr * (min(1.0, (settings.updates - self.count) / last) if last else 1.0)

    def leaves(self) -> dict[str, Tensor]:
        return {name: value.detach().clone().requires_grad_(name in self.learned) for name, value in self.state.items()}

    def step(self, name: str, group: Learns, weights: dict[str, Tensor], loss: Tensor) -> float:
        """One optimiser's step; weights without a gradient stay. Returns the norm of the gradients."""
        mine = [key for key in weights if key in self.learned and key.startswith(group.prefixes)]
        found = torch.autograd.grad(loss, [weights[key] for key in mine], retain_graph=True, allow_unused=True)
        gradients = {key: gradient for key, gradient in zip(mine, found, strict=True) if gradient is not None}
        optimiser = self.optimisers.setdefault(name, dynamics.Adam(self.run.optim))
        norm, stepped = optimiser.step(weights, gradients, group.rate if self.count >= group.frozen else 0.0)
        self.state |= stepped
        return norm

    def copy_slowly(self) -> None:
        """Every so many updates the slow critic becomes the critic."""
        if "behaviour.updates" not in self.state:
            return
        self.state["behaviour.updates"] += 1
        if self.count % self.run.model.behaviour.slow_critic_every == 0:
            for name in [name for name in self.state if name.startswith("behaviour.slow_critic.")]:
                self.state[name] = self.state[name.replace("slow_critic", "critic")].clone()


def check_update(
    method: Any, run: RunConfig, written_out: Callable[..., Losses], batches: Sequence[Mapping[str, Tensor]], *, loaded: bool
) -> Losses:
    """The product's updates on ``batches`` must be those of ``written_out(weights, batch, run, draws)``; returns the last one of it.

    Compared are the names and values of losses, gradient norms and metrics, and every weight and buffer after each update. Call it
    within `product.in_float64`, with a ``method`` in float64 of which no weight is zero.
    """
    updater, written = Updater(method, run, CPU, pretrained=loaded), WrittenUpdate(method, run, written_out, loaded=loaded)
    for batch in batches:
        draws = Draws()
        with draws.recorded():
            found = updater.pretrain(batch) if run.stage == "pretrain" else updater.online(batch)
        losses, norms, last = written.update(batch, draws)
        assert not draws.kept, f"the update drew {len(draws.kept)} more tensors than the written-out one"
        wanted = {f"loss/{name}": float(loss.detach()) for name, loss in losses.items()}
        wanted |= {f"grad/{name}": norm for name, norm in norms.items()}
        assert {name for name in found if name.startswith(("loss/", "grad/"))} == set(wanted)
        wanted |= {name: float(value) for name, value in last.metrics.items()}
        for name, value in wanted.items():
            assert float(found[name]) == pytest.approx(value, rel=1e-6, abs=1e-9), name
        state = method.state_dict()
        assert state.keys() == written.state.keys()
        for name, value in written.state.items():
            torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    return last
