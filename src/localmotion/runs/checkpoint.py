"""Checkpoints: directories of safetensors and JSON, written completely or not at all. Nothing is ever unpickled.

A checkpoint is RUN/checkpoints/0000001000 with {weights,optimizer,rng,...}.safetensors, state.json and COMPLETE. With
several ranks, rank1.safetensors and so on hold what is not the same on all ranks, such as random states. A checkpoint is
written to a sibling directory, synced to the disk, and renamed. A run resumes from the newest complete checkpoint. The
last two are kept. RUN/checkpoints/best holds the weights of the best evaluation.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from localmotion import ranks
from localmotion.errors import CheckpointError
from localmotion.files import one_line, parse_json, read_json

FORMAT = 1
_REMOVE = "remove this checkpoint to use the one before"
BEST = "best"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rng_state() -> dict[str, Tensor]:
    """States of the global generators of torch (CPU and CUDA), numpy and python."""
    version, values, gauss = random.getstate()
    keys: Any = np.random.get_state(legacy=True)
    out = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *values, -1 if gauss is None else 0], dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys[1], np.int64)),
        "numpy_position": torch.tensor([int(keys[2])]),
    }
    if torch.cuda.is_available():
        out |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return out


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Restore the states that `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, *values, _ = state["python"].tolist()
    random.setstate((version, tuple(values), None))
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(state["numpy_position"]), 0, 0.0))
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


def seed_rank(seed: int, update: int) -> None:
    """Give this rank random numbers of its own from ``update`` on. Those of rank 0 stay as they are."""
    if ranks.leads():
        return
    drawn, other, third = np.random.SeedSequence([seed, ranks.rank(), update]).generate_state(3).tolist()
    torch.manual_seed(drawn)
    np.random.seed(other)
    random.seed(third)


def of_ranks(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Further files of a checkpoint of several ranks: ``tensors`` by file name, and random states, of all ranks but the first."""
    own = {f"{file}.{key}": value for file, group in {**tensors, "rng": rng_state()}.items() for key, value in group.items()}
    return {f"rank{number}": found for number, found in enumerate(ranks.collect(own)) if number}


def read_of_rank(path: Path, name: str) -> dict[str, Tensor]:
    """As `read`, of what this rank saved. Raises CheckpointError if it saved nothing."""
    if ranks.leads():
        return read(path, name)
    file = f"rank{ranks.rank()}"
    mine = _Named(
        path / f"{file}.safetensors", {k[len(name) + 1 :]: v for k, v in read(path, file).items() if k.startswith(f"{name}.")}
    )
    if name == "rng":
        try:
            _check_rng(mine)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path / file}.safetensors: cannot be read ({one_line(error)}); {_REMOVE}") from error
    return mine


def read_own(path: Path) -> dict[str, Any]:
    """Values that this rank saved for itself, as JSON in the file "own". Raises CheckpointError if they cannot be used."""
    try:
        own: dict[str, Any] = parse_json(bytes(read_of_rank(path, "own")["json"].numpy()))
        _check_state(own)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: the values of rank {ranks.rank()} are damaged ({one_line(error)}); {_REMOVE}") from error
    return own


def save(
    folder: Path,
    update: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint atomically, then remove all but the last ``keep``.

    ``tensors`` are groups by file name: weights, optimizer, ... The states of the global generators are saved too.
    Raises CheckpointError if the disk is too full or writing fails. Earlier checkpoints then stay.
    """
    target = folder / f"{update:010d}"
    write(target, {**tensors, "rng": rng_state()}, {"update": update, **state})
    whole = complete(folder)
    for old in [*whole[:-keep], *(path for path in folder.glob("[0-9]*") if path not in whole)]:
        # Remove the mark COMPLETE first: after a kill in between, half a checkpoint must not look complete.
        (old / "COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_best(folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``folder``/best, with only what evaluation needs. Atomic. Raises as `save`."""
    write(folder / BEST, {"weights": weights}, state)


def write(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write the directory ``target`` completely or not at all: one file for each group of tensors, and state.json.

    Raises as `save`.
    """
    folder = target.parent
    temporary, replaced = folder / f".{target.name}.tmp", folder / f".{target.name}.old"
    kept = "; the previous one is kept" if target.exists() or complete(folder) else ""
    need = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + 1_000_000
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(f"{folder}: a checkpoint needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free{kept}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in group.items()}, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, **state}))
        (temporary / "COMPLETE").write_text("")
        for path in temporary.iterdir():
            _sync(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():  # the same update again, or an earlier best: move it away in one step
            os.replace(target, replaced)
        os.replace(temporary, target)
        _sync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors has an error class of its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        cause = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target}: checkpoint could not be written ({cause}){kept}") from error


def complete(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / "COMPLETE").exists())


def what_stays(folder: Path) -> str:
    """What a run that cannot be saved still has, for its message. ``folder``: of its checkpoints."""
    return "the last good checkpoint stays" if complete(folder) else "no checkpoint was written yet"


def newest(run_dir: Path) -> Path:
    """The newest complete checkpoint of a run. Raises CheckpointError if there is none."""
    if not run_dir.exists():
        raise CheckpointError(f"{run_dir}: no such run; give the directory that --run named when it was trained")
    found = complete(run_dir / "checkpoints")
    if not found:
        raise CheckpointError(f"{run_dir}: holds no complete checkpoint; let its training reach one (save_every) first")
    return found[-1]


def best(run_dir: Path) -> Path:
    """The checkpoint with the weights of the run's best evaluation. Raises CheckpointError if there is none."""
    found = run_dir / "checkpoints" / BEST
    if not (found / "COMPLETE").exists():
        raise CheckpointError(f"{run_dir}: has no best checkpoint yet; it is kept from the first evaluation on. Use the newest")
    return found


class _Named(dict[str, Any]):
    """A dict from a file. A missing key raises CheckpointError with the file's name."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self.path}: lacks {key!r}; {_REMOVE}")


def read(path: Path, name: str) -> dict[str, Tensor]:
    """Read one tensor file of a checkpoint.

    Raises CheckpointError if it is damaged, or if "rng" holds no generator states.
    """
    file = path / f"{name}.safetensors"
    try:
        if not file.is_file():  # reading a pipe would block
            raise ValueError("is not there" if not file.exists() else "is not a regular file")
        found: dict[str, Tensor] = load_file(file)
        if name == "rng":
            _check_rng(found)
        elif name == "optimizer" and not all(re.fullmatch(r".+\.[0-9]{1,9}\.[^.]+", key) for key in found):
            raise ValueError("its names are not GROUP.NUMBER.FIELD")
    except Exception as error:
        raise CheckpointError(f"{file}: cannot be read ({one_line(error)}); {_REMOVE}") from error
    return _Named(file, found)


def _check_rng(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if `set_rng_state` cannot restore this."""
    words = state["python"].tolist(), state["numpy"].tolist(), state["numpy_position"].tolist()
    for name, values, count in zip(("python", "numpy", "numpy_position"), words, (627, 624, 1), strict=True):
        if state[name].dtype != torch.int64 or state[name].shape != (count,):
            raise ValueError(f"{name} is not a generator's state")
        if not all(0 <= value < 2**32 for value in values[: count - (name == "python")]):
            raise ValueError(f"{name} holds numbers that are not of 32 bits")
    if words[0][0] != random.getstate()[0] or words[0][-2] > 624 or words[2][0] > 624:
        raise ValueError("a generator's position or version is out of range")
    torch.Generator().set_state(state["torch"])


def read_state(path: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint.

    Raises CheckpointError if it is damaged, of another format, or has invalid values. Reading a missing key of the
    result raises CheckpointError too.
    """
    file = path / "state.json"
    state = read_json(file, CheckpointError, _REMOVE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {state.get('format')!r:.40}, this version reads {FORMAT}")
    try:
        _check_state(state)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: is damaged ({one_line(error)}); {_REMOVE}") from error
    replay = {"replay": _Named(file, state["replay"])} if "replay" in state else {}
    return _Named(file, {**state, **replay})


def _check_state(state: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or CheckpointError if the values of a state.json cannot be used."""
    for key in ("update", "ranks", "elsewhere", "agent_step", "env_step", "episode", "next_eval", "metrics_offset", "action_dim"):
        if key in state and (type(state[key]) is not int or not 0 <= state[key] < 2**53):
            raise ValueError(f"{key} is no count")
    best: Any = state.get("best")
    playing: Any = state.get("playing")
    replay: Any = state.get("replay")
    if best is not None and not (type(best) is list and len(best) == 2 and all(type(x) in (int, float) for x in best)):
        raise ValueError("best is not a pair of numbers")
    if playing is not None and type(playing["learning"]) is not bool:
        raise ValueError("playing.learning is neither true nor false")
    if "replay" not in state:
        return
    if not all(
        type(serial) is int and 0 <= serial < 2**53 for serial in (*replay["episodes"], replay["serial"], replay["dropped"])
    ):
        raise ValueError("replay names episodes that are no numbers")
    generator = replay["rng"]
    words = (generator["state"]["state"], generator["state"]["inc"], generator["uinteger"], generator["has_uint32"])
    if not all(type(word) is int and 0 <= word < 2**bits for word, bits in zip(words, (128, 128, 32, 1), strict=True)):
        raise ValueError("replay.rng is not a generator's state")
    np.random.PCG64().state = generator


def load_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], where: str, *, partial: bool = False) -> list[str]:
    """Load weights by name and check every shape. Returns the loaded names.

    ``partial``: ``weights`` may lack names of the module, but all its names must exist there. Raises CheckpointError
    with the first names that do not fit.
    """
    check_weights(module, weights, where, partial=partial)
    module.load_state_dict(dict(weights), strict=not partial)
    return sorted(weights)


def check_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], where: str, *, partial: bool = False) -> None:
    """Raise CheckpointError unless names, shapes and types fit (see `load_weights`).

    ``module`` may be on device "meta".
    """
    own = module.state_dict()
    missing = [] if partial else sorted(set(own) - set(weights))
    foreign = sorted(set(weights) - set(own))
    both = [(k, v, own[k]) for k, v in weights.items() if k in own]
    shapes = [f"{k} {tuple(v.shape)} there, {tuple(o.shape)} here" for k, v, o in both if v.shape != o.shape]
    types = [f"{k} {v.dtype} there, {o.dtype} here" for k, v, o in both if v.dtype != o.dtype]
    for problem, names in (
        ("lacks", missing),
        ("has unknown", foreign),
        ("has other shapes:", shapes),
        ("has other types:", types),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ", ".join(one_line(name, 120) for name in names[:3])
            raise CheckpointError(f"{where}: the checkpoint {problem} {shown}{more}; are method, preset and settings the same?")
