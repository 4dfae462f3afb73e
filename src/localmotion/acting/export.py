"""Write a trained method as programs that run without localmotion: its encoder, and one agent step with the carry as tensors.

Batches hold one environment. Each name is an input or an output of a program; ``next_NAME`` is the value of ``NAME`` for the next step.
Nothing is random: latents and actions are the likeliest (`models.distributions.likeliest`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from localmotion import methods
from localmotion.acting.deployed import known_actions, loaded
from localmotion.acting.observer import wants_goal
from localmotion.config import RunConfig
from localmotion.errors import ConfigError, LocalmotionError, MissingExtraError, unknown_name
from localmotion.files import check_output, one_line
from localmotion.methods.base import MOTION, Method, acted
from localmotion.models.distributions import likeliest
from localmotion.models.image import ImageModel
from localmotion.models.observations import ObservationModel
from localmotion.recipe import Recipe
from localmotion.runs.load import Which
from localmotion.runs.rundir import versions, write_json
from localmotion.runs.sharing import local_run, run_label
from localmotion.video.lerobot import about_of

Format = Literal["torch", "onnx"]
SUFFIX: Mapping[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}
ABOUT = "export.json"
NEXT = "next_"
TOLERANCE = 1e-3
"""Largest difference between a program and the method, in the units of each output, that is rounding."""
CHECKED = 4
"""Agent steps after which a program is compared with the method."""
Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Tensors]


def carried(carry: Any, name: str = "carry") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a carry with their names: ``carry_state_deter`` is field deter of field state."""
    if isinstance(carry, Tensor):
        yield name, carry
    elif carry is not None:
        for key, part in zip(getattr(carry, "_fields", range(len(carry))), carry, strict=True):
            yield from carried(part, f"{name}_{key}")


def _rebuilt(like: Any, tensors: Iterator[Tensor]) -> Any:
    """A carry of the form of ``like`` with other tensors, in the order of `carried`."""
    if isinstance(like, Tensor):
        return next(tensors)
    if like is None:
        return None
    parts = [_rebuilt(part, tensors) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


class Step(nn.Module):
    """One agent step: observation and carry in, action (1, A) in [-1, 1] and the next carry out."""

    def __init__(self, method: Method, window: int) -> None:
        super().__init__()
        self.method, self.window, self.form = method, window, method.initial_carry(1)

    def forward(self, **inputs: Tensor) -> Tensors:
        obs = {name: value.unsqueeze(1) for name, value in inputs.items() if not name.startswith("carry")}
        carry = _rebuilt(self.form, (inputs[name] for name, _ in carried(self.form)))
        with likeliest():
            action, carry, _ = acted(self.method, obs, carry, explore=False, window=self.window)
        return {"action": action.float().clamp(-1, 1)} | {f"{NEXT}{name}": value for name, value in carried(carry)}


class Encoder(nn.Module):
    """The encoder of a world model: observation in, embedding (1, E) out."""

    def __init__(self, part: ImageModel | ObservationModel) -> None:
        super().__init__()
        self.part = part

    def forward(self, **inputs: Tensor) -> Tensors:
        if isinstance(self.part, ImageModel):
            return {"embed": self.part.embed(inputs["image"])}
        return {"embed": self.part.encode({name: value.unsqueeze(1) for name, value in inputs.items()})[:, 0]}


def observation(run: RunConfig, method: Method) -> Tensors:
    """An observation of zeros: what a step takes besides the carry."""
    side, recipe = method.image_size, run.recipe or Recipe()
    found: Tensors = {}
    if getattr(run.model, "pixels", True):
        found["image"] = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    if length := getattr(run.model, "vector_dim", 0):
        found["vector"] = torch.zeros(1, length)
    if wants_goal(run):
        found["goal"] = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    if method.needs(run.model, run.stage) & MOTION:
        found["flow"] = torch.zeros(1, side, side, 2, dtype=torch.float16)
        found["tracks"] = torch.zeros(1, recipe.tracks, 2)
        found["visible"] = torch.zeros(1, recipe.tracks, dtype=torch.bool)
        found["track_id"] = torch.zeros(1, recipe.tracks, dtype=torch.int32)
    return found


def _examples(zeros: Tensors, step: int) -> Tensors:
    """Random values of the same form, for comparing."""
    rng = np.random.default_rng(step)
    found = {}
    for name, value in zeros.items():
        if value.dtype is torch.uint8:
            drawn: Any = rng.integers(0, 256, value.shape)
        else:
            drawn = rng.integers(0, 2, value.shape) if value.dtype is torch.bool else 3 * rng.random(value.shape)
        found[name] = torch.as_tensor(drawn).to(value.dtype)
    return found


def _check_carry(module: Step, run: RunConfig, obs: Tensors) -> Tensors:
    """The carry at the beginning, by name. Raises ConfigError for one that a program of fixed shapes cannot hold."""
    begin = dict(carried(module.form))
    found = module(**obs, is_first=torch.ones(1, dtype=torch.bool), **begin)
    for name, value in begin.items():
        later = found.get(f"{NEXT}{name}")
        if later is None or (later.shape, later.dtype) != (value.shape, value.dtype):
            shape = "nothing" if later is None else f"{tuple(later.shape)} {later.dtype}"
            raise ConfigError(
                f"{run.method}: cannot be exported with these settings: {name} is {tuple(value.shape)} {value.dtype} at first and"
                f" {shape} after a step, so a step has no fixed shapes; use localmotion.load_policy (docs/deployment.md)"
            )
        if value.any():
            raise ConfigError(f"{run.method}: cannot be exported: {name} does not begin with zeros")
    return begin


def _program(module: nn.Module, inputs: Tensors, who: str) -> torch.export.ExportedProgram:
    """The module as a graph. Raises ConfigError if it has none, or draws random numbers."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch about itself
            found = torch.export.export(module, (), inputs, strict=False)
    except Exception as error:  # whatever torch cannot trace
        raise ConfigError(f"{who}: torch.export cannot trace it ({type(error).__name__}: {one_line(error)})") from error
    drawn = {
        str(node.target)
        for node in found.graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and "dropout" not in str(node.target)
    }
    if drawn:
        raise ConfigError(f"{who}: draws random numbers in a step ({', '.join(sorted(drawn))}), which a program cannot repeat")
    return found


def _write_torch(program: torch.export.ExportedProgram, file: Path, inputs: Tensors, outputs: list[str]) -> Call:
    with warnings.catch_warnings():
        # torch says that weights with channels last are no complete tensors; the loaded program is compared below.
        warnings.simplefilter("ignore")
        torch.export.save(program, file)
    found = torch.export.load(file).module()
    return lambda values: found(**values)


def _write_onnx(program: torch.export.ExportedProgram, file: Path, inputs: Tensors, outputs: list[str]) -> Call:
    runtime = needs_onnx()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, dynamo=True, input_names=list(inputs), output_names=outputs, verbose=False)
            assert made is not None
            made.save(file, external_data=False)
    except Exception as error:
        raise ConfigError(f"{file.name}: torch.onnx cannot write it ({type(error).__name__}: {one_line(error)})") from error
    finally:
        logger.setLevel(level)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    taken = {item.name for item in session.get_inputs()}  # an input that changes nothing may be left out

    def call(values: Tensors) -> Tensors:
        given = {name: value.numpy() for name, value in values.items() if name in taken}
        return dict(zip(outputs, map(torch.from_numpy, session.run(outputs, given)), strict=True))

    return call


def needs_onnx() -> Any:
    """onnxruntime. Raises MissingExtraError if a package of the extra ``onnx`` is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"--format onnx needs {error.name}; run: pip install 'localmotion[onnx]'") from error
    return onnxruntime


def _differs(call: Call, module: nn.Module, obs: Tensors, begin: Tensors) -> float:
    """Largest difference of an output in `CHECKED` steps, from the same inputs."""
    worst, carry = 0.0, begin
    for step in range(CHECKED):
        given = _examples(obs, step) | ({"is_first": torch.tensor([step == 0])} if isinstance(module, Step) else {}) | carry
        with torch.no_grad():
            wanted = module(**given)
        found = call(given)
        for name, value in wanted.items():
            difference = float((found[name].float() - value.float()).abs().max()) if value.numel() else 0.0
            # NaN is no number that max could compare.
            worst = max(worst, difference if difference == difference else float("inf"))
        carry = {name: wanted[f"{NEXT}{name}"] for name in begin}
    return worst


def _form(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for name, x in tensors.items()}


def export_run(run: str | Path, out: Path, format: Format = "torch", *, which: Which = "newest") -> dict[str, Any]:
    """Write the programs of a run to the folder ``out``, and ``export.json`` about them. Returns the content of that file.

    ``encoder`` is written for world models (also after pre-training), ``step`` for runs that can act. ``torch``: NAME.pt2, for
    `torch.export.load`. ``onnx``: NAME.onnx. Each is compared with the method before it counts as written.

    Raises:
        ConfigError: an unknown format; a method or settings that a program of fixed shapes without random numbers cannot express.
        CheckpointError: a run that is missing, incomplete or damaged.
        MissingExtraError: --format onnx without its packages.
        LocalmotionError: a program that computes something else than the method.
    """
    if format not in get_args(Format):
        raise unknown_name("format", format, get_args(Format))
    if format == "onnx":
        needs_onnx()
    check_output(out, ConfigError, folder=True)
    path = local_run(run)
    config, method, _ = loaded(path, device="cpu", which=which)
    for parameter in method.parameters():
        parameter.requires_grad_(False)
    parts: dict[str, tuple[nn.Module, Tensors, Tensors]] = {}  # name -> module, observation, carry
    obs = observation(config, method)
    for child in method.children():
        if isinstance(child, (ImageModel, ObservationModel)) and "encoder" not in parts:
            seen = ("image",) if isinstance(child, ImageModel) else ("image", "vector")
            parts["encoder"] = Encoder(child).eval(), {name: obs[name] for name in seen if name in obs}, {}
    if config.stage in methods.get(config.method).acts_after:
        step = Step(method, config.online.length).eval()
        with torch.no_grad():
            parts["step"] = step, obs, _check_carry(step, config, obs)
    if not parts:
        raise ConfigError(f"{run}: {config.method} has no actor after {config.stage} and no encoder that stands alone")
    out.mkdir(parents=True, exist_ok=True)
    write = _write_torch if format == "torch" else _write_onnx
    about: dict[str, Any] = {"format": format, "versions": {name: versions()[name] for name in ("localmotion", "torch")}}
    about |= {
        "run": run_label(path),
        "which": which,
        **{key: getattr(config, key) for key in ("method", "stage", "preset", "env")},
    }
    about["programs"] = {}
    for name, (module, seen_obs, carry) in parts.items():
        first = {"is_first": torch.ones(1, dtype=torch.bool)} if name == "step" else {}
        inputs = {**seen_obs, **first, **carry}
        with torch.no_grad():
            outputs = module(**inputs)
        file = out / f"{name}{SUFFIX[format]}"
        call = write(_program(module, inputs, f"{config.method}, {name}"), file, inputs, list(outputs))
        worst = _differs(call, module, seen_obs, carry)
        if not worst <= TOLERANCE:
            file.unlink()
            raise LocalmotionError(
                f"{file}: computes something else than {config.method} (difference {worst:.2g}); it was removed"
            )
        about["programs"][name] = {"file": file.name, "inputs": _form(inputs), "outputs": _form(outputs), "difference": worst}
    if "step" in parts:
        about["carry"] = {name: f"{NEXT}{name}" for name in parts["step"][2]}
        actions = known_actions(path, method.action_dim, bool(getattr(config.model, "discrete", False)))
        about["action"] = {"low": -1.0, "high": 1.0, "environment": actions.to_json()}
        if ranges := about_of(path):  # of the commands that actions in [-1, 1] stand for (`video.lerobot.commands`)
            about["lerobot"] = ranges
    about["image"] = {"colours": "RGB", "low": 0, "high": 255, "side": method.image_size, "resized": "averaged over areas"}
    about["recipe"] = config.recipe.to_json() if config.recipe else None
    write_json(out / ABOUT, about)
    return about
