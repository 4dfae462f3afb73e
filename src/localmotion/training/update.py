"""One gradient update: precision, clipping, optimisers.

On a GPU it does not wait for the device; metrics stay tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from localmotion import ranks
from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.errors import CheckpointError, LocalmotionError
from localmotion.methods.base import Batch, Counters, Group, Method, Pass, Rates, Source, total
from localmotion.training import optimizers
from localmotion.training.compiled import compile_parts
from localmotion.training.graphs import Replayed
from localmotion.training.rehearsal import rehearsed

BAD_LIMIT = 10  # a run stops after this many non-finite updates in a row


class DivergedError(LocalmotionError):
    """Losses or gradients were not finite in `BAD_LIMIT` updates in a row."""

    def __init__(self, update: int, terms: Mapping[str, float], batch: Mapping[str, Tensor]) -> None:
        self.update, self.terms, self.batch = update, dict(terms), batch
        self.first = next((name for name, value in terms.items() if not math.isfinite(value)), "total")
        super().__init__(
            f"{self.first!r} was not finite in {BAD_LIMIT} updates in a row (update {update}); try --precision fp32 or a lower"
            " learning rate"
        )


def rates(run: RunConfig, source: Source, pretrained: bool) -> Rates:
    """Learning rates of a run's stage.

    ``pretrained``: a checkpoint was loaded; its parts learn slowly or are frozen at first.
    """
    if source is Source.CLIPS:
        return Rates(run.pretrain.lr)
    online = run.online
    held = (online.pretrained_lr_factor, online.freeze_updates) if pretrained else (1.0, 0)
    return Rates(online.lr, online.actor_lr, online.critic_lr, *held, run.load)


def _check(passes: Sequence[Pass], groups: Sequence[Group]) -> None:
    """Raise AssertionError if a group is in no pass."""
    stepped = {name for each in passes for name in each.groups}
    if idle := [group.name for group in groups if group.name not in stepped]:
        raise AssertionError(f"groups {idle} are in no pass: they would never learn")


class Updater:
    """Runs a method's passes with one optimiser per parameter group. It knows no loss and no group by name.

    With several ranks gradients are averaged before they are clipped, and an update that is not finite on one rank is skipped on all.

    If a loss or gradient is not finite, the update leaves weights, moments and buffers (running means, queues, codebooks) unchanged and is
    counted as skipped.
    After `BAD_LIMIT` such updates in a row the updater raises DivergedError. On a GPU the device decides whether to
    skip; the host reads the counts only in `check`, when the run logs.

    Args:
        deferred: let the device decide. Default: True on a GPU.
        graph: runs the device work of an update, e.g. as a CUDA graph (`training.graphs`); needs ``deferred``. Default:
            each operation is launched separately.
    """

    def __init__(
        self,
        method: Method,
        run: RunConfig,
        compute: Compute,
        *,
        pretrained: bool = False,
        deferred: bool | None = None,
        graph: Replayed | None = None,
    ) -> None:
        self.method, self.run, self.compute = method, run, compute
        self.source = method.stages[run.stage]
        self.passes = method.passes(run.stage)
        if run.rehearsal.data:
            self.passes = rehearsed(method, self.passes, run.rehearsal.weight)
        self.groups = method.groups(run.stage, rates(run, self.source, pretrained))
        _check(self.passes, self.groups)
        self.deferred = compute.device.type != "cpu" if deferred is None else deferred
        self.optimisers = {group.name: optimizers.make(group, run.optim, on_device=self.deferred) for group in self.groups}
        self.graph = graph
        if run.compile:
            compile_parts(method)
        self.update = 0
        self.progress = 0.0
        """Share of the stage that is complete, in [0, 1]. The training loop sets it; schedules read it."""
        self.agent_step: int | None = None
        """Agent steps made, where the method learns in an environment. The training loop sets it; schedules read it."""
        self._works: dict[
            tuple[int, ...], Callable[[Batch], dict[str, Tensor]]
        ] = {}  # by the passes that are due; a graph records one
        self._bad = torch.zeros((), device=compute.device if self.deferred else None)  # updates in a row that were not finite
        self._skipped = torch.zeros_like(self._bad)
        self._found = torch.zeros_like(self._bad)  # 1 where a part of this update was not finite
        # The batch, losses and norms of a non-finite update (deferred: of every update), for the dump of a run that
        # diverged.
        self._terms: dict[str, Tensor] = {}
        self._batch: Mapping[str, Tensor] = {}

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """One update: the passes that are due, in order, each followed by the steps of its groups.

        Returns detached losses, metrics and gradient norms. With a graph, the next update overwrites them.
        """
        due = tuple(
            index for index, each in enumerate(self.passes) if self.update % each.every == 0 and self.progress < each.until
        )
        return self._apply(self._works.setdefault(due, partial(self._run, due)), batch)

    def _run(self, due: tuple[int, ...], batch: Batch) -> dict[str, Tensor]:
        self._found.zero_()
        self._terms = {}
        buffers = list(self.method.buffers())
        before = [buffer.clone() for buffer in buffers]
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        handed: Any = None
        for each in (self.passes[index] for index in due):
            with self.compute.autocast():
                found, more, handed = each.losses(batch, handed)
                loss = total(found, each.scales)
            norms |= self._backward(each.groups, found, loss)
            losses |= found
            metrics |= more
        self._undo(buffers, before)
        self._skipped.add_(self._found)
        self._bad.add_(1).mul_(self._found)
        return {**{f"loss/{k}": v.detach() for k, v in losses.items()}, **metrics, **norms}

    @torch.no_grad()
    def _undo(self, buffers: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Give ``buffers`` their values from ``before`` if the update was not finite.

        They change in the forward pass. One NaN in a running mean would spoil all updates that follow.
        """
        if not self.deferred and not bool(self._found):
            return
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(self._found > 0, old, buffer))

    def _backward(self, names: tuple[str, ...], terms: Mapping[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
        """Compute gradients of ``loss`` for the groups ``names`` and `step` them. Do nothing if the loss is not finite.

        Gradients of other groups are never computed. The actor's pass, for example, computes none for the world model.
        """
        fine = torch.isfinite(loss.detach())
        if not self.deferred and ranks.alone() and not bool(fine):
            return self._skip(terms)
        parameters = [p for group in self.groups if group.name in names for p in group.parameters]
        loss.backward(inputs=parameters)
        if not ranks.alone():
            fine = ranks.average_([p.grad for p in parameters if p.grad is not None], fine)
        return self.step(names, terms, fine)

    def step(
        self, names: Sequence[str], terms: Mapping[str, Tensor] | None = None, fine: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Clip the gradients of the groups ``names`` and apply them if all are finite and ``fine`` is true.

        Returns norms by group.
        """
        groups = [group for group in self.groups if group.name in names]
        norms = {f"grad/{group.name}": self._clip(group) for group in groups}
        good = torch.isfinite(torch.stack(list(norms.values()))).all()
        if fine is not None:
            good = good & fine
        if not self.deferred and not bool(good):
            for group in groups:
                self.optimisers[group.name].zero_grad(set_to_none=True)
            return self._skip({**(terms or {}), **norms})
        if self.deferred:
            found = (~good).to(self._found.dtype)
            torch.maximum(self._found, found, out=self._found)
            self._terms |= {**(terms or {}), **norms}
        for group in groups:
            optimiser = self.optimisers[group.name]
            if self.deferred:
                optimiser.found_inf = found  # type: ignore[attr-defined]  # as torch's GradScaler: 1 means no step
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return norms

    def _clip(self, group: Group) -> Tensor:
        if group.agc:
            return optimizers.clip_adaptive_(group.parameters, group.agc)
        return torch.nn.utils.clip_grad_norm_(group.parameters, self.run.optim.clip)

    def _skip(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._found.fill_(1)
        self._terms |= terms
        return {}

    def check(self) -> int:
        """Number of skipped updates so far. Raises DivergedError if the last `BAD_LIMIT` updates were all skipped."""
        bad, skipped = torch.stack([self._bad, self._skipped]).tolist()
        if bad >= BAD_LIMIT:
            raise DivergedError(self.update, to_floats(self._terms), self._batch)
        return int(skipped)

    @property
    def healthy(self) -> bool:
        """Whether the newest update was finite. If not, no checkpoint is written."""
        return not bool(self._bad)

    def resume(self, update: int, skipped: int) -> None:
        """Set the counters of a continued run."""
        self.update = update
        self._skipped.fill_(skipped)

    def _apply(self, work: Callable[[Batch], dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """One update: ``work`` on the device, and on the host learning rates, slow copies and counting.

        A graph can replay ``work`` only if it depends neither on the update's number nor on a value read from the
        device, and if it writes lasting results in place.
        """
        for group in self.groups:
            now, settings = group.lr * self._share(group), self.optimisers[group.name].param_groups[0]
            if torch.is_tensor(settings["lr"]):
                settings["lr"].fill_(now)
            else:
                settings["lr"] = now
        try:
            found = self.graph(work, batch) if self.graph else work(batch)
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                cause = " ".join(str(error).split())[:200]
                fix = "run it with --compile false: the run goes on from its checkpoint"
                raise LocalmotionError(f"torch.compile cannot compile this method's parts ({cause}); {fix}") from error
            raise
        self._batch = batch
        self.update += 1
        self.method.after_update(Counters(self.run.stage, self.update, self.progress, self.agent_step))
        if not self.deferred:
            self.check()
        return found

    def _share(self, group: Group) -> float:
        """Factor on a group's learning rate at this update: 0 while it is frozen, then growing to 1 in its warm-up."""
        if self.update < group.freeze_updates:
            return 0.0
        return self._decay(group.decay) * (min(1.0, self.update / group.warmup) if group.warmup else 1.0)

    def _decay(self, shape: str) -> float:
        """Factor on the learning rate at this update: 1.

        In stages on clips and on logged episodes it falls to 0 over the last `lr_decay` of the updates.
        """
        settings = self.run.pretrain if self.source is Source.CLIPS else self.run.online
        if self.source not in (Source.CLIPS, Source.LOGGED) or settings.lr_decay <= 0:
            return 1.0
        left = min(1.0, (settings.updates - self.update) / (settings.lr_decay * settings.updates))
        return left if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    # Saving -----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Optimiser tensors by name, for safetensors."""
        out: dict[str, Tensor] = {}
        for name, optimiser in self.optimisers.items():
            for index, values in optimiser.state_dict()["state"].items():
                out.update({f"{name}.{index}.{key}": value for key, value in values.items()})
        return out

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned. Raises CheckpointError for tensors that do not fit these optimisers."""
        states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self.optimisers}
        for key, value in tensors.items():
            group, index, field = [*key.rsplit(".", 2), "", ""][:3]
            parameters = next((g.parameters for g in self.groups if g.name == group), [])
            fits = index.isdigit() and int(index) < len(parameters) and field in ("step", "exp_avg", "exp_avg_sq")
            if not fits or value.shape not in ((), (1,), parameters[int(index)].shape):
                raise CheckpointError(
                    f"optimizer state {key!r:.100} {tuple(value.shape)} does not fit; are method and settings the same?"
                )
            states[group].setdefault(int(index), {})[field] = value
        for name, optimiser in self.optimisers.items():
            lacking = [i for i, values in states[name].items() if set(values) != {"step", "exp_avg", "exp_avg_sq"}]
            if lacking:
                raise CheckpointError(
                    f"optimizer state of {name!r} lacks parts of parameter {lacking[0]}; is the checkpoint whole?"
                )
            optimiser.load_state_dict({**optimiser.state_dict(), "state": states[name]})
            # Files hold row-major tensors, but the fused kernel reads parameter and moments in memory order. Moments
            # therefore need the memory layout of their parameter (channels last for convolutions).
            for parameter, values in optimiser.state.items():
                for field, value in values.items():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        values[field] = torch.empty_like(parameter).copy_(value)


def to_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics as Python numbers. One copy moves them all from the device."""
    if not metrics:
        return {}
    values = torch.stack([value.detach().float().reshape(()) for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
