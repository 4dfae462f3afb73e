"""One gradient update: precision, clipping, optimisers. No host synchronisation inside on a GPU; metrics stay tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.errors import LocalmotionError
from localmotion.methods.base import Group, Method, total
from localmotion.training import optimizers

BAD_LIMIT = 10  # non-finite updates in a row after which a run stops


class Updater:
    """Applies a method's losses with one optimiser per parameter group."""

    def __init__(self, method: Method, run: RunConfig, compute: Compute, *, pretrained: bool = False) -> None:
        self.method, self.run, self.compute = method, run, compute
        self.scales = method.loss_scales(run.stage)
        self.groups = method.groups(run, pretrained)
        self.optimisers = {group.name: optimizers.make(group, run.optim) for group in self.groups}
        self.update = 0
        self.bad = 0

    def _step(self, names: list[str]) -> dict[str, Tensor]:
        norms = {}
        for group in self.groups:
            if group.name not in names:
                continue
            if group.agc:
                norms[f"grad/{group.name}"] = optimizers.clip_adaptive_(group.parameters, group.agc)
            else:
                clip = self.run.optim.clip
                norms[f"grad/{group.name}"] = torch.nn.utils.clip_grad_norm_(group.parameters, clip, foreach=True)
            optimiser = self.optimisers[group.name]
            optimiser.param_groups[0]["lr"] = group.lr * self._share(group)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return norms

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

    def _finite(self, losses: Mapping[str, Tensor], loss: Tensor) -> bool:
        """Whether to apply this update. On a GPU the check waits for the log clock (`check_metrics`), to avoid a synchronisation."""
        if self.compute.device.type != "cpu" or bool(torch.isfinite(loss)):
            self.bad = 0
            return True
        self.bad += 1
        first = next((k for k, v in losses.items() if not bool(torch.isfinite(v))), "total")
        if self.bad >= BAD_LIMIT:
            raise LocalmotionError(
                f"loss {first!r} was not finite in {self.bad} updates in a row (update {self.update}); try --precision fp32"
            )
        return False

    def pretrain(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pre-training update. Returns detached losses, gradient norms and metrics."""
        with self.compute.autocast():
            losses, metrics = self.method.pretrain_losses(batch)
            loss = total(losses, self.scales)
        if self._finite(losses, loss):
            loss.backward()
            metrics = {**metrics, **self._step([group.name for group in self.groups])}
        self.update += 1
        return {**{f"loss/{k}": v.detach() for k, v in losses.items()}, **metrics}

    def online(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One online update in Algorithm 2's order: world model, then imagination with the updated model, actor, critic.

        A method with ``joint_update`` is updated by one backward pass of all its losses instead.
        """
        if self.method.joint_update:
            return self._joint(batch)
        world = [group.name for group in self.groups if group.name not in ("actor", "critic")]
        with self.compute.autocast():
            losses, metrics, start = self.method.world_model_losses(batch)
            loss = total(losses, self.scales)
        if self._finite(losses, loss):
            loss.backward()
            metrics = {**metrics, **self._step(world)}
        with self.compute.autocast():
            behaviour, more = self.method.behaviour_losses(start)
        if self._finite(behaviour, behaviour["actor"] + behaviour["critic"]):
            parameters = [p for group in self.groups if group.name in ("actor", "critic") for p in group.parameters]
            # Only these inputs: gradients of the world model's weights along the imagined trajectory are never computed.
            torch.autograd.backward([behaviour["actor"], behaviour["critic"]], inputs=parameters)
            metrics = {**metrics, **self._step(["actor", "critic"])}
        self.method.after_update()
        self.update += 1
        return {**{f"loss/{k}": v.detach() for k, v in {**losses, **behaviour}.items()}, **metrics, **more}

    def _joint(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.compute.autocast():
            losses, metrics, _ = self.method.world_model_losses(batch)
            loss = total(losses, self.scales)
        if self._finite(losses, loss):
            loss.backward()
            metrics = {**metrics, **self._step([group.name for group in self.groups])}
        self.method.after_update()
        self.update += 1
        return {**{f"loss/{k}": v.detach() for k, v in losses.items()}, **metrics}

    # Saving -----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Optimiser tensors by name, for safetensors."""
        out: dict[str, Tensor] = {}
        for name, optimiser in self.optimisers.items():
            for index, values in optimiser.state_dict()["state"].items():
                out.update({f"{name}.{index}.{key}": value for key, value in values.items()})
        return out

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for name, optimiser in self.optimisers.items():
            state = optimiser.state_dict()
            state["state"] = {}
            for key, value in tensors.items():
                group, index, field = key.rsplit(".", 2)
                if group == name:
                    state["state"].setdefault(int(index), {})[field] = value
            optimiser.load_state_dict(state)
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
