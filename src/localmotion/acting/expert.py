"""Experts: small policies over a task's own state vector (joint angles, velocities). They show videos how the task is done.

An expert is two files, ``NAME.safetensors`` (weights) and ``NAME.json`` (where it learned, its returns). `localmotion.training.experts`
trains them; ``collect --policy expert:PATH`` records videos of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor, nn

from localmotion.errors import CheckpointError, ConfigError
from localmotion.files import one_line, read_bytes, read_json

FORMAT, NAME, PREFIX = 1, "expert", "expert:"
MAX_BYTES = 64 << 20
CLIP = 10.0
"""Largest normalised number of a state vector."""
LOG_STD = (-10.0, 2.0)


class Expert(nn.Module):
    """A Gaussian policy over state vectors (B, V), squashed by tanh: actions (B, A) in [-1, 1].

    Args:
        inputs: V.
        actions: A.
        width: of the two hidden layers.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, actions: int, width: int = 256) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2 * actions)]
        self.net = nn.Sequential(*layers)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.about: dict[str, Any] = {}
        """Content of the JSON file: env, seed, env_steps, returns, ..."""

    def normal(self, vector: Tensor) -> Tensor:
        """State vectors (B, V) with mean 0 and deviation 1 over the training, clipped to +-`CLIP`."""
        return ((vector - self.mean) * self.scale).clamp(-CLIP, CLIP)

    def forward(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log of the standard deviation before tanh, (B, A) each, for normalised vectors (B, V)."""
        mean, log_std = self.net(normal).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD)

    @torch.inference_mode()
    def act(self, vectors: NDArray[Any], *, explore: bool = False) -> NDArray[np.float32]:
        """Actions (E, A) for state vectors (E, V): the tanh of the mean, or with ``explore`` of a sample."""
        mean, log_std = self(self.normal(torch.from_numpy(np.asarray(vectors, np.float32))))
        action: NDArray[np.float32] = torch.tanh(mean + log_std.exp() * torch.randn_like(mean) if explore else mean).numpy()
        return action

    def digest(self) -> str:
        """Eight characters that differ between experts with different weights."""
        return hashlib.sha256(save({k: v.contiguous() for k, v in self.state_dict().items()})).hexdigest()[:8]


def save_expert(folder: Path, expert: Expert, about: Mapping[str, Any]) -> Path:
    """Write ``folder``/expert.safetensors and .json. Returns the former. Raises CheckpointError if it cannot be written."""
    weights = {name: tensor.detach().contiguous() for name, tensor in expert.state_dict().items()}
    text = json.dumps({"format": FORMAT, **about}, indent=1) + "\n"
    path = folder / f"{NAME}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place, content in ((path, save(weights)), (path.with_suffix(".json"), text.encode())):
            partial = place.with_name(f".{place.name}.partial-{os.getpid()}")
            partial.write_bytes(content)
            os.replace(partial, place)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    return path


def load_expert(path: Path, env: str, inputs: int, actions: int) -> Expert:
    """Read an expert for ``env``, whose state vector has ``inputs`` numbers and whose action ``actions``.

    Args:
        path: the .safetensors file, or a folder with expert.safetensors.
        env: the task must be the expert's; the suite may differ, e.g. dmc:walker_run for an expert of planar:walker_run.

    Raises:
        ConfigError: the expert learned another task.
        CheckpointError: a file is missing or damaged, or its weights do not fit.
    """
    file = path / f"{NAME}.safetensors" if path.is_dir() else path
    fix = "give the folder or the .safetensors file of `localmotion expert`"
    about = read_json(file.with_suffix(".json"), CheckpointError, fix)
    learned = str(about.get("env"))
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{file}: expert format {about.get('format')!r:.40}, this version reads {FORMAT}")
    if learned.partition(":")[2] != env.partition(":")[2]:
        raise ConfigError(f"{file}: is an expert of {one_line(learned, 80)}, not of {env}")
    try:
        weights = load(read_bytes(file, MAX_BYTES))
        width = len(weights["net.0.bias"])
        if weights["net.2.weight"].shape != (width, width):  # else building the network could take any memory
            raise ValueError("its layers do not fit together")
        expert = Expert(inputs, actions, width)
        expert.load_state_dict(weights)
    except Exception as error:  # damaged files and foreign weights raise errors of many types
        raise CheckpointError(f"{file}: cannot be read as an expert of {env} ({one_line(error)}); {fix}") from error
    expert.about = about
    return expert.eval()
