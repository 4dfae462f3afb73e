"""A tiny IPV and a tiny APV, their weights and a batch, all made by rule, so that numbers of the release can be compared with ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from localmotion import methods
from localmotion.config import RunConfig, Stage
from localmotion.methods.base import Method
from localmotion.runs.settings import compose
from localmotion.testing.rules import CPU
from localmotion.training.update import Updater

B, T, A = 2, 9, 3
UPDATES = 3
SIZES: dict[str, Any] = {
    "world": {"depth": 4, "deter": 16, "hidden": 12, "stoch": 4, "classes": 5, "units": 10, "layers": 4},
    "behaviour": {"horizon": 6, "slow_critic_every": UPDATES},
}
"""Small widths. The depth of every part, the padding of actions, the bonus's window, neighbours, projection and queue are the paper's."""
METAWORLD: dict[str, Any] = {"embed_input": False, "intrinsic_weight": 1.0, "free_nats": 0.0, "beta_z_finetune": 0.0}
DMC: dict[str, Any] = {"embed_input": True, "intrinsic_weight": 0.1, "free_nats": 1.0, "beta_z_finetune": 0.0}
"""The release's settings. The erasing of context frames is off, because it samples in another way (studies/parity/ipv.md)."""
RESNET = {"world": {"encoder": "resnet"}}
CASES: dict[str, tuple[str, Stage, str, dict[str, Any]]] = {
    "ipv, pre-training": ("ipv", "pretrain", "", {}),
    "ipv, Meta-World": ("ipv", "finetune", "metaworld:reach", METAWORLD | {"context_erasing": False}),
    "ipv, DMC Remastered": ("ipv", "finetune", "dmcr:walker_run", DMC),
    "ipv, with a KL of z": ("ipv", "finetune", "dmcr:walker_run", DMC | {"beta_z_finetune": 1.0, "free_nats": 0.0}),
    "apv, pre-training": ("apv", "pretrain", "", {}),
    "apv, Meta-World": ("apv", "finetune", "metaworld:reach", METAWORLD),
    "apv, DMC": ("apv", "finetune", "dmc:quadruped_walk", DMC),
    "plain WM, pre-training": ("apv", "pretrain", "", {"beta_z": 1.0, **RESNET}),
    "plain WM, DMC Remastered": ("apv", "finetune", "dmcr:walker_run", {**DMC, **RESNET}),
}
"""Method, stage, environment, and settings of the model on top of the preset `paper`, before `SIZES`."""
PARTS = ("image.encoder", "image.context_encoder", "image.decoder", "latent", "dynamics", "reward", "reward_representative")
PARTS += ("behaviour.actor", "behaviour.critic")


def _merged(*settings: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for each in settings:
        for key, value in each.items():
            out[key] = _merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def run_of(case: str) -> RunConfig:
    """Settings of the preset `paper` with small widths, fp32."""
    method, stage, env, settings = CASES[case]
    flags: dict[str, Any] = {"precision": "fp32", "model": _merged(SIZES, settings)}
    if env.startswith("metaworld"):  # the release freezes the encoder and z's model for 100 updates; here for one of the three
        flags["online"] = {"freeze_updates": 1}
    return compose(method, stage, preset="paper", env=env, flags=flags)


# Rules ------------------------------------------------------------------------------------------------------------------------


def numbers(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Normal numbers of numpy's legacy generator, whose stream is frozen."""
    return np.random.RandomState(seed).standard_normal(tuple(shape))


def uniform(shape: Sequence[int]) -> Tensor:
    """Numbers in [0, 1), the same for every call of a shape; what comes before the last three dimensions repeats them."""
    tail = tuple(shape)[-3:]
    found = np.random.RandomState(sum(tail)).random_sample(tail)
    return torch.as_tensor(found, dtype=torch.get_default_dtype()).expand(tuple(shape))


def positions(time: int, count: int) -> np.ndarray:
    """Context frames of ``count`` sequences of ``time`` frames."""
    return np.random.RandomState(count).randint(time, size=count)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout whose mask depends on the number of values."""
    if not training or p == 0:
        return x
    kept = np.random.RandomState(x.numel()).random_sample(x.numel()) >= p
    return x * torch.from_numpy(kept).view(x.shape) / (1 - p)


def float64(patch: pytest.MonkeyPatch) -> None:
    """All computations in float64, also what the code casts to fp32; for the caller to reset the default dtype."""
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)


def fix_noise(patch: pytest.MonkeyPatch) -> None:
    """All that our methods sample follows the rules."""
    patch.setattr(torch, "rand", lambda *shape, **_: uniform(shape[0] if isinstance(shape[0], Sequence) else shape).clone())
    patch.setattr(torch, "randint", lambda time, shape, **_: torch.from_numpy(positions(time, *shape)))
    patch.setattr(F, "dropout", dropout)


def fill_(model: Method) -> None:
    """Weights of the size they start with, biases and scales off their start; the running statistics stay as they start."""
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if name.startswith("behaviour.slow_critic."):
            continue
        values = numbers(index, parameter.shape)
        scale = name.endswith("weight") and parameter.ndim == 1
        if parameter.ndim == 1 or name.endswith("position"):
            values = 0.1 * values + float(scale)
        else:
            fan = parameter[0].numel()
            values = values / np.sqrt(fan)
        parameter.data.copy_(torch.from_numpy(values))
    if not model.acts:
        return
    actor_critic: Any = model.behaviour
    actor_critic.slow_critic.load_state_dict(actor_critic.critic.state_dict())
    for index, parameter in enumerate(actor_critic.slow_critic.parameters()):
        parameter.data.mul_(1 + 0.1 * float(np.sin(index)))
    if (bonus := getattr(model, "bonus", None)) is not None:
        bonus.projection.copy_(torch.from_numpy(numbers(1234, bonus.projection.shape) / bonus.projection.shape[1]))


def build(case: str) -> tuple[RunConfig, Any]:
    """Settings and the model in training mode."""
    run = run_of(case)
    model = methods.get(run.method)(run.model, image_size=64, action_dim=None if run.stage == "pretrain" else A)
    fill_(model)
    return run, model.train()


def make_batch(update: int = 0, count: int = B) -> dict[str, Tensor]:
    """Two sequences, or ``count``. A smooth picture that moves, and noise."""
    state = np.random.RandomState(99 + update)
    rows, columns = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    phase = np.arange(T)[None, :, None, None] * 0.4 + np.arange(count)[:, None, None, None] + 0.3 * update
    waves = np.stack([np.sin(rows / 9 + phase), np.cos(columns / 7 - phase), np.sin((rows + columns) / 11 + 2 * phase)], -1)
    image = np.clip(127 + 90 * waves + 12 * state.standard_normal((count, T, 64, 64, 3)), 0, 255).astype(np.uint8)
    is_first = torch.zeros(count, T, dtype=torch.bool)
    is_first[:, 0] = True
    return {
        "image": torch.from_numpy(image),
        "action": torch.from_numpy(np.tanh(state.standard_normal((count, T, A)))).float(),
        "reward": torch.from_numpy(state.standard_normal((count, T))).float(),
        "is_first": is_first,
    }


# Updates ----------------------------------------------------------------------------------------------------------------------


class Update(NamedTuple):
    """What one update computed, and the model after it."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]  # before clipping
    model: Any

    def changes(self, case: str) -> dict[str, float]:
        """Norm of what all updates so far changed in each part."""
        before = dict(build(case)[1].named_parameters())
        return norms({name: p.detach() - before[name].detach() for name, p in self.model.named_parameters()})


def norms(tensors: dict[str, Tensor], parts: Sequence[str] = PARTS) -> dict[str, float]:
    """Of all tensors of each part."""
    squares: dict[str, list[Tensor]] = {}
    for name, x in tensors.items():
        for part in parts:
            if name.startswith(f"{part}."):
                squares.setdefault(part, []).append(x.double().square().sum())
    return {part: float(torch.stack(found).sum().sqrt()) for part, found in squares.items()}


class Recorder(Updater):
    """The updater, which keeps the gradients before it clips them."""

    gradients: dict[str, Tensor]

    def step(self, names: Sequence[str], *rest: Any) -> dict[str, Tensor]:
        chosen = {id(p) for group in self.groups if group.name in names for p in group.parameters}
        named = self.method.named_parameters()
        self.gradients |= {name: p.grad.clone() for name, p in named if id(p) in chosen and p.grad is not None}
        return super().step(names, *rest)


def updates(case: str) -> Iterator[Update]:
    """`UPDATES` of them by the library's own updater. For within `fix_noise`."""
    run, model = build(case)
    updater = Recorder(model, run, CPU, pretrained=True)
    for update in range(UPDATES):
        updater.gradients = {}
        found = updater.learn(make_batch(update))
        yield Update(
            {key.removeprefix("loss/"): float(x) for key, x in found.items() if key.startswith("loss/")}, updater.gradients, model
        )


def act(model: Any, explore: bool, count: int = B) -> Tensor:
    """Actions (3, count, A) for the first frames of the batch, in evaluation mode as in the acting loop."""
    model.eval()
    batch, actions = make_batch(0, count), []
    with torch.no_grad():
        carry = model.initial_carry(count)
        for t in range(3):
            obs = {key: batch[key][:, t : t + 1] for key in ("image", "is_first")}
            action, carry = model.act(obs, carry, explore=explore)
            actions.append(action)
    model.train()
    return torch.stack(actions)
