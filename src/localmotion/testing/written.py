"""`check_update`: whole updates of a method against the same updates written out from its paper's equations.

The product (`training.update.Updater` over one of our methods) and the written-out function start from the same weights and see the same
batch and the same noise. Losses, metrics, gradient norms, the optimisers' moments, and every weight and buffer must agree after each
of a few updates. The product computes in float64 here (`_InDouble`), so a difference is a difference of meaning, not of rounding.

The written-out function of a `Case` is

    function(state: Written, batch, noise: Noise, run: RunConfig) -> dict of losses, metrics and gradient norms by the product's names

It reads and changes ``state.weights`` (float64, by the names of the method's ``state_dict``) and takes what is random from ``noise``.
It uses no module and no function of the product. `tests/written_out` has those of the methods here.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from localmotion import config
from localmotion.compute import Compute
from localmotion.config import RunConfig, Stage
from localmotion.methods.base import Method
from localmotion.training.update import Updater

CPU = Compute(torch.device("cpu"), False, 1, "update check")


# 1. What both sides are given -------------------------------------------------------------------------------------------------


class Noise:
    """Random numbers that depend on their shape and on how many of that shape were drawn before, and on nothing else.

    A draw of more than three dimensions is a stack of draws of its last three, so noise for all positions at once (T, B, S, C) is that
    of T single steps (B, S, C). Draws of different shapes may come in any order.
    """

    def __init__(self) -> None:
        self._drawn: Counter[tuple[Any, ...]] = Counter()

    def _draw(
        self, kind: str, shape: Sequence[int], make: Callable[[np.random.RandomState, tuple[int, ...]], np.ndarray]
    ) -> Tensor:
        shape = tuple(shape)
        tail = shape[-3:]
        slabs = []
        for _ in range(int(np.prod(shape[:-3]))):
            number = self._drawn[kind, tail]
            self._drawn[kind, tail] += 1
            slabs.append(make(np.random.RandomState(zlib.crc32(repr((kind, tail, number)).encode())), tail))
        return torch.from_numpy(np.stack(slabs).reshape(shape))

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1), float64."""
        return self._draw("uniform", shape, lambda state, tail: state.random_sample(tail))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal, float64."""
        return self._draw("normal", shape, lambda state, tail: state.standard_normal(tail))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Integers in [0, high)."""
        return self._draw("integers", shape, lambda state, tail: state.randint(0, high, tail, dtype=np.int64))

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        """x with a share ``rate`` of its values zero and the others divided by 1 - rate; one uniform number a value."""
        return x * (self.uniform(x.shape) >= rate) / (1 - rate)


class _InDouble(TorchFunctionMode):
    """Within, what asks for float32 by its name gets float64, and what draws random numbers gets `Noise`."""

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn):
            draw = self.noise.uniform if func is torch.rand else self.noise.normal
            return draw(
                kwargs["size"] if "size" in kwargs else args[0] if isinstance(args[0], (tuple, list, torch.Size)) else args
            )
        if func is torch.randint:
            if len(args) != 2:
                raise NotImplementedError("check_update knows torch.randint(high, size)")
            return self.noise.integers(*args)
        if func is F.dropout:
            rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            training = args[2] if len(args) > 2 else kwargs.get("training", True)
            return self.noise.dropout(args[0], rate) if training else args[0]
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def fill_(method: Method) -> None:
    """Weights by rule: a pure function of names and shapes, near their usual size, with no two modules alike and no bias at zero.

    Buffers that averages live in start off their neutral values; whole numbers (counts) and projections are left to the method.
    """
    for name, value in method.state_dict().items():
        state = np.random.RandomState(zlib.crc32(name.encode()))
        numbers = state.standard_normal(tuple(value.shape))
        if not value.is_floating_point():
            continue
        if name.endswith(("running_var", ".mean", ".high")):
            numbers = 0.5 + np.abs(numbers)
        elif value.ndim == 1:
            numbers = 0.1 * numbers + float(name.endswith((".scale", ".weight")))  # of a normalisation: vectors
        elif value.ndim > 1:
            fan = value.shape[-2] if name.endswith("kernel") else value[0].numel()
            numbers = numbers / np.sqrt(fan)
        value.copy_(torch.from_numpy(np.asarray(numbers)))


def make_batch(
    *, batch: int = 2, time: int = 6, actions: int = 2, side: int = 64, tracks: int = 4, vector: int = 3
) -> dict[str, Tensor]:
    """All keys of a batch. A second episode begins within the last sequence, and the first one ends at its last position.

    Where an episode begins there are actions too: they are of another episode, and an update must not read them. Two slots are given
    a new point within an episode: their track changes.
    """
    state = np.random.RandomState(7)
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    is_first[:, 0] = is_first[-1, time // 2] = True
    is_terminal = torch.zeros(batch, time, dtype=torch.bool)
    is_terminal[0, -1] = True
    visible = torch.from_numpy(state.random_sample((batch, time, tracks)) < 0.8) & ~is_first.unsqueeze(-1)
    track_id = torch.arange(tracks, dtype=torch.int32).expand(batch, time, tracks).clone()
    track_id[:, time // 2 + 1 :, 0] = tracks  # within an episode a slot is given a new point
    track_id[0, 2:, 1] = tracks + 1
    return {
        "image": torch.from_numpy(state.randint(0, 256, (batch, time, side, side, 3)).astype(np.uint8)),
        "action": torch.from_numpy(state.uniform(-1.5, 1.5, (batch, time, actions))),
        "reward": torch.from_numpy(state.standard_normal((batch, time))),
        "is_first": is_first,
        "is_terminal": is_terminal,
        "vector": torch.from_numpy(3 * state.standard_normal((batch, time, vector))),
        "flow": torch.from_numpy(state.standard_normal((batch, time, side, side, 2))).half(),
        "tracks": torch.from_numpy(state.uniform(0, side - 1, (batch, time, tracks, 2))),
        "visible": visible,
        "track_id": track_id,
        "mask": torch.from_numpy(state.random_sample((batch, time, side, side)) < 0.3),
        "labelled_image": torch.from_numpy(state.randint(0, 256, (batch, time, side, side, 3)).astype(np.uint8)),
        "labelled_action": torch.from_numpy(state.uniform(-1.5, 1.5, (batch, time, actions))),
        "labelled_is_first": is_first.clone(),
        "video_image": torch.from_numpy(state.randint(0, 256, (batch, time, side, side, 3)).astype(np.uint8)),
        "log_prob": torch.from_numpy(state.uniform(-3, 0, (batch, time))),
        "value": torch.from_numpy(state.standard_normal((batch, time))),
    }


# 2. The written-out side ------------------------------------------------------------------------------------------------------


@dataclass
class Written:
    """What an update reads and changes: weights and buffers by name, float64, and the optimisers' moments by weight."""

    weights: dict[str, Tensor]
    mean: dict[str, Tensor] = field(default_factory=dict)
    """First moment of each weight that was stepped."""
    square: dict[str, Tensor] = field(default_factory=dict)
    """Second moment."""
    steps: Counter[str] = field(default_factory=Counter)
    """How often each weight was stepped."""
    update: int = 0
    """Updates so far; `check_update` counts."""


WrittenOut = Callable[[Written, Mapping[str, Tensor], Noise, RunConfig], dict[str, Tensor]]


# 3. The comparison ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method at a stage with small settings, and its update written out."""

    method: type[Method]
    stage: Stage
    written_out: WrittenOut
    model: Mapping[str, Any] = field(default_factory=dict)
    """The method's settings that are not its defaults."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings that are not the defaults, e.g. ``{"optim": {"clip": 1.0}}``."""
    batch: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `make_batch`."""
    prepare: Callable[[Any], None] | None = None
    """Called with the filled method: buffers and counts that the case wants otherwise."""
    updates: int = 3
    pretrained: bool | None = None
    """Whether weights were loaded; None: where the stage is fine-tuning."""
    deferred: bool = False
    """Whether the update decides on the device, as on a GPU."""
    tolerance: float = 1e-9
    """Of differences, relative to the largest value of each tensor."""
    label: str = ""

    def __str__(self) -> str:
        return f"{self.method.name}-{self.stage}" + (f"-{self.label}" if self.label else "")


def _run_config(case: Case) -> RunConfig:
    start = RunConfig(method=case.method.name, stage=case.stage, model=config.update(case.method.Config(), case.model))
    run: RunConfig = config.update(start, case.run)
    return run


def _tensors(method: Method) -> dict[str, Tensor]:
    """All weights and buffers, those that are not saved too."""
    return {**dict(method.named_parameters()), **dict(method.named_buffers())}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.shape != theirs.shape:
        return float("inf")
    size = float(theirs.abs().max()) if theirs.numel() else 0.0
    worst = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    return worst / size if size > 0 else worst


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str, tolerance: float) -> list[str]:
    """A line for each name that only one side has, and for each value that differs."""
    lines = [f"{what} {name}: only the method has it" for name in sorted(set(ours) - set(theirs))]
    lines += [f"{what} {name}: only the written-out update has it" for name in sorted(set(theirs) - set(ours))]
    for name in sorted(set(ours) & set(theirs)):
        found = _difference(ours[name], theirs[name])
        if not found <= tolerance:
            short = [x.detach().double().flatten()[:1].tolist() for x in (ours[name], theirs[name])]
            lines.append(f"{what} {name}: differ by {found:.1e} of the largest value (first values {short[0]} and {short[1]})")
    return lines


def check_update(case: Case) -> None:
    """Run the product's updates and the written-out ones side by side. Raises AssertionError that lists what differs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        # Backward passes of functions written by hand call it too, and no function mode is on there.
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            _check_update(case)
    finally:
        torch.set_default_dtype(before)


def _check_update(case: Case) -> None:
    run = _run_config(case)
    sizes = {"actions": 2, "side": 64, **case.batch}
    batch = make_batch(**sizes)
    method = case.method(
        run.model, image_size=sizes["side"], action_dim=sizes["actions"] if case.stage in case.method.acts_after else None
    ).double()
    fill_(method)
    if case.prepare:
        case.prepare(method)
    method.train()
    pretrained = case.stage == "finetune" if case.pretrained is None else case.pretrained
    updater = Updater(method, run, CPU, pretrained=pretrained, deferred=case.deferred)
    state = Written({name: value.detach().clone() for name, value in _tensors(method).items()})
    shared, ours_noise, theirs_noise = torch.get_rng_state(), Noise(), Noise()
    for update in range(case.updates):
        with _InDouble(ours_noise):
            ours = updater.learn(batch)
        state.update = update
        theirs = case.written_out(state, batch, theirs_noise, run)
        lines = compare(ours, theirs, "loss, metric or norm", case.tolerance)
        lines += compare(_moments(updater, method), _written_moments(state), "moment", case.tolerance)
        lines += compare(_tensors(method), state.weights, "weight", case.tolerance)
        if lines:
            raise AssertionError("\n".join([f"{case}, update {update}: {len(lines)} differences", *lines[:40]]))
    if not torch.equal(torch.get_rng_state(), shared):
        raise AssertionError(f"{case}: an update draws random numbers that check_update does not hold fixed")


def _moments(updater: Updater, method: Method) -> dict[str, Tensor]:
    """The optimisers' tensors by field and weight."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups = {group.name: group.parameters for group in updater.groups}
    out = {}
    for key, value in updater.state().items():
        group, index, what = key.rsplit(".", 2)
        out[f"{what} {names[id(groups[group][int(index)])]}"] = value
    return out


def _written_moments(state: Written) -> dict[str, Tensor]:
    return {
        **{f"exp_avg {name}": value for name, value in state.mean.items()},
        **{f"exp_avg_sq {name}": value for name, value in state.square.items()},
        **{f"step {name}": torch.tensor(float(count)) for name, count in state.steps.items() if count},
    }
