"""Checkpoints: safetensors and JSON in a directory that appears whole or not at all. Nothing is ever unpickled.

RUN/checkpoints/0000001000/{weights,optimizer,rng,...}.safetensors, state.json, COMPLETE. Written in a sibling directory, fsynced, renamed;
the newest complete one wins; the last two are kept. RUN/checkpoints/best holds the weights of the best evaluation.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from localmotion.config import RunConfig, from_dict
from localmotion.errors import CheckpointError, ConfigError

FORMAT = 1
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
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    version, *values, _ = state["python"].tolist()
    random.setstate((version, tuple(values), None))
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(state["numpy_position"]), 0, 0.0))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(
    folder: Path,
    update: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint of ``tensors`` (groups by file name: weights, optimizer, ...) atomically and remove all but the last ``keep``.

    The states of the global generators go with it. Raises CheckpointError when the disk has too little room or writing fails; what was
    there before stays.
    """
    target = folder / f"{update:010d}"
    _write(target, {**tensors, "rng": rng_state()}, {"update": update, **state})
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_best(folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``folder``/best: what evaluation needs, no more. Atomic, raises as `save`."""
    _write(folder / BEST, {"weights": weights}, state)


def _write(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    folder = target.parent
    temporary, replaced = folder / f".{target.name}.tmp", folder / f".{target.name}.old"
    need = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + 1_000_000
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{folder}: a checkpoint needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; the previous one is kept"
        )
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
        if target.exists():  # of the same update, or the best before: out of the way in one step, not file by file
            os.replace(target, replaced)
        os.replace(temporary, target)
        _sync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{target}: checkpoint could not be written ({error.strerror or error}); the previous one is kept"
        ) from error


def complete(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / "COMPLETE").exists())


def newest(run_dir: Path) -> Path:
    """The newest complete checkpoint of a run. Raises CheckpointError when there is none."""
    if not run_dir.exists():
        raise CheckpointError(f"{run_dir}: no such run; give the directory that --run named when it was trained")
    found = complete(run_dir / "checkpoints")
    if not found:
        raise CheckpointError(f"{run_dir}: holds no complete checkpoint; let its training reach one (save_every) first")
    return found[-1]


def best(run_dir: Path) -> Path:
    """The weights of the run's best evaluation. Raises CheckpointError when there was none."""
    found = run_dir / "checkpoints" / BEST
    if not (found / "COMPLETE").exists():
        raise CheckpointError(f"{run_dir}: has no best checkpoint yet; it is kept from the first evaluation on. Use the newest")
    return found


def read(path: Path, name: str) -> dict[str, Tensor]:
    """One tensor file of a checkpoint. Raises CheckpointError when it is damaged."""
    try:
        found: dict[str, Tensor] = load_file(path / f"{name}.safetensors")
    except Exception as error:
        raise CheckpointError(
            f"{path / name}.safetensors: cannot be read ({error}); remove this checkpoint to use the one before"
        ) from error
    return found


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'}: cannot be read ({error})") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {state.get('format')!r}, this version reads {FORMAT}")
    return dict(state)


def read_config(run_dir: Path) -> RunConfig:
    """Settings of a run. Raises CheckpointError when there are none, ConfigError when they do not fit this version."""
    path = run_dir / "config.json"
    if not path.exists():
        raise CheckpointError(f"{run_dir}: no such run (no config.json)")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a settings object")
    return from_dict(values)


def load_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], where: str, *, partial: bool = False) -> list[str]:
    """Load weights by name with every shape checked. ``partial``: only the names given, which must all exist in the module.

    Returns the loaded names. Raises CheckpointError naming the first few that do not fit.
    """
    own = module.state_dict()
    missing = [] if partial else sorted(set(own) - set(weights))
    foreign = sorted(set(weights) - set(own))
    shapes = [
        f"{k} {tuple(v.shape)} there, {tuple(own[k].shape)} here"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    for problem, names in (("lacks", missing), ("has unknown", foreign), ("has other shapes:", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{where}: the checkpoint {problem} {', '.join(names[:3])}{more}; are method, preset and settings the same?"
            )
    module.load_state_dict(dict(weights), strict=not partial)
    return sorted(weights)
