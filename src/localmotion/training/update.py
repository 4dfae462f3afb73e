"""One gradient update: precision, clipping, optimisers. No host synchronisation inside on a GPU; metrics stay tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.errors import CheckpointError, LocalmotionError
from localmotion.methods.base import Batch, Group, Method, total
from localmotion.training import optimizers
from localmotion.training.compiled import compile_parts
from localmotion.training.graphs import Replayed

BAD_LIMIT = 10  # non-finite updates in a row after which a run stops


class DivergedError(LocalmotionError):
    """Losses or gradients were not finite in `BAD_LIMIT` updates in a row."""

    def __init__(self, update: int, terms: Mapping[str, float], batch: Mapping[str, Tensor]) -> None:
        self.update, self.terms, self.batch = update, dict(terms), batch
        self.first = next((name for name, value in terms.items() if not math.isfinite(value)), "total")
        super().__init__(
            f"{self.first!r} was not finite in {BAD_LIMIT} updates in a row (update {update}); try --precision fp32 or a lower"
            " learning rate"
        )


class Updater:
    """Applies a method's losses with one optimiser per parameter group.

    An update whose loss or gradients are not finite leaves weights and moments as they are and is counted; after `BAD_LIMIT` in a row
    DivergedError is raised. On a GPU that is decided on the device, and looked at only in `check`, at the log clock.

    Args:
        deferred: decide on the device. Default: on a GPU.
        graph: what runs an update's work on the device, e.g. as a CUDA graph (`training.graphs`); needs ``deferred``. Default: nothing
            between, each operation is launched by itself.
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
        self.scales = method.loss_scales(run.stage)
        self.groups = method.groups(run, pretrained)
        self.deferred = compute.device.type != "cpu" if deferred is None else deferred
        self.optimisers = {group.name: optimizers.make(group, run.optim, on_device=self.deferred) for group in self.groups}
        self.graph = graph
        if run.compile:
            compile_parts(method)
        self.update = 0
        self._bad = torch.zeros((), device=compute.device if self.deferred else None)  # updates in a row that were not finite
        self._skipped = torch.zeros_like(self._bad)
        self._found = torch.zeros_like(self._bad)  # 1 where a part of this update was not finite
        # Losses and norms of this update if it is bad (deferred: in any case), and its batch: for whoever looks for the cause.
        self._terms: dict[str, Tensor] = {}
        self._batch: Mapping[str, Tensor] = {}

    def _learn(
        self, names: list[str], terms: Mapping[str, Tensor], roots: list[Tensor], *, own: bool = False
    ) -> dict[str, Tensor]:
        """Backward from ``roots`` and `step` of the groups ``names``; nothing if ``roots`` are not finite.

        ``own``: gradients of these groups only. Those of the world model's weights along an imagined trajectory are never computed.
        """
        fine = torch.isfinite(torch.stack([root.detach() for root in roots])).all()
        if not self.deferred and not bool(fine):
            return self._skip(terms)
        parameters = [p for group in self.groups if group.name in names for p in group.parameters]
        torch.autograd.backward(roots, inputs=parameters if own else None)
        return self.step(names, terms, fine)

    def step(self, names: list[str], terms: Mapping[str, Tensor] | None = None, fine: Tensor | None = None) -> dict[str, Tensor]:
        """Clip the gradients of the groups ``names`` and apply them, if they (and ``fine``) are finite. Returns their norms by group."""
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
                optimiser.found_inf = found  # type: ignore[attr-defined]  # as torch's GradScaler asks: no step where it is 1
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
        """How many updates were skipped so far. Raises DivergedError when it was the last `BAD_LIMIT` in a row."""
        bad, skipped = torch.stack([self._bad, self._skipped]).tolist()
        if bad >= BAD_LIMIT:
            raise DivergedError(self.update, to_floats(self._terms), self._batch)
        return int(skipped)

    @property
    def healthy(self) -> bool:
        """Whether the newest update was finite; what is saved now can be trusted."""
        return not bool(self._bad)

    def resume(self, update: int, skipped: int) -> None:
        """Counters of a run that goes on."""
        self.update = update
        self._skipped.fill_(skipped)

    def _apply(self, work: Callable[[Batch], dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """One update: ``work`` between what is done on the host, which is learning rates, slow copies and counting.

        Within ``work`` nothing may depend on the update's number or on a value of the device, and what outlives it is written in place:
        then it can be replayed.
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
                mend = "run it with --compile false: the run goes on from its checkpoint"
                raise LocalmotionError(f"torch.compile cannot compile this method's parts ({cause}); {mend}") from error
            raise
        self._batch = batch
        self.method.after_update()
        self.update += 1
        if not self.deferred:
            self.check()
        return found

    def _count(self) -> None:
        """Take the finished update into the counters."""
        self._skipped.add_(self._found)
        self._bad.add_(1).mul_(self._found)

    def _share(self, group: Group) -> float:
        """What a group uses of its learning rate at this update: nothing while frozen, a growing part in its warm-up."""
        if self.update < group.freeze_updates:
            return 0.0
        return self._decay() * (min(1.0, self.update / group.warmup) if group.warmup else 1.0)

    def _decay(self) -> float:
        """What is left of the learning rate at this update: 1, in pre-training falling to 0 over the last `lr_decay` of the updates."""
        settings = self.run.pretrain
        if self.run.stage != "pretrain" or settings.lr_decay <= 0:
            return 1.0
        return min(1.0, (settings.updates - self.update) / (settings.lr_decay * settings.updates))

    def pretrain(self, batch: Batch) -> dict[str, Tensor]:
        """One pre-training update. Returns detached losses, gradient norms and metrics; with a graph the next update overwrites them."""
        return self._apply(self._pretrain, batch)

    def _pretrain(self, batch: Batch) -> dict[str, Tensor]:
        self._found.zero_()
        self._terms = {}
        with self.compute.autocast():
            losses, metrics = self.method.pretrain_losses(batch)
            loss = total(losses, self.scales)
        norms = self._learn([group.name for group in self.groups], losses, [loss])
        self._count()
        return {**{f"loss/{k}": v.detach() for k, v in losses.items()}, **metrics, **norms}

    def online(self, batch: Batch) -> dict[str, Tensor]:
        """One online update in Algorithm 2's order: world model, then imagination with the updated model, actor, critic.

        A method with ``joint_update`` is updated by one backward pass of all its losses instead. Returns what `pretrain` does.
        """
        return self._apply(self._online, batch)

    def _online(self, batch: Batch) -> dict[str, Tensor]:
        self._found.zero_()
        self._terms = {}
        joint = self.method.joint_update
        world = [group.name for group in self.groups if joint or group.name not in ("actor", "critic")]
        with self.compute.autocast():
            losses, metrics, start = self.method.world_model_losses(batch)
            loss = total(losses, self.scales)
        norms = self._learn(world, losses, [loss])
        if not joint:
            with self.compute.autocast():
                behaviour, more = self.method.behaviour_losses(start)
            norms |= self._learn(["actor", "critic"], behaviour, [behaviour["actor"], behaviour["critic"]], own=True)
            losses, metrics = {**losses, **behaviour}, {**metrics, **more}
        self._count()
        return {**{f"loss/{k}": v.detach() for k, v in losses.items()}, **metrics, **norms}

    # Saving -----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Optimiser tensors by name, for safetensors."""
        out: dict[str, Tensor] = {}
        for name, optimiser in self.optimisers.items():
            for index, values in optimiser.state_dict()["state"].items():
                out.update({f"{name}.{index}.{key}": value for key, value in values.items()})
        return out

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave. Raises CheckpointError for tensors that are not of these optimisers."""
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
            # Files hold plain row-major tensors, but the fused kernel walks parameter and moments side by side in memory:
            # moments must lie as their parameter does (channels last for convolutions).
            for parameter, values in optimiser.state.items():
                for field, value in values.items():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        values[field] = torch.empty_like(parameter).copy_(value)


def to_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics as numbers, moved from the device in one copy."""
    if not metrics:
        return {}
    values = torch.stack([value.detach().float().reshape(()) for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
