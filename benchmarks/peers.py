"""DreamerV3 of other projects, built from the user's checkouts and run on our batch. This file contains none of their code.

Each function returns one update, which can be called repeatedly, and the number of learned parameters.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.bench_update import ACTIONS, fake_batch
from localmotion.runs.settings import compose

BATCH, LENGTH = 16, 64
SETTINGS = ("size=size12m", f"online.batch_size={BATCH}", f"online.length={LENGTH}")
"""Settings of our DreamerV3 `paper` for the same model and batch as the peers."""


def _batch() -> dict[str, torch.Tensor]:
    """The batch of our own update (`bench_update.fake_batch`) without the keys of motion; no episode ends in it."""
    run = compose("dreamer_v3", "train", preset="paper", env="dmc:walker_walk", settings=SETTINGS)
    batch = fake_batch(run)
    kept = {key: batch[key] for key in ("image", "action", "reward", "is_first", "is_terminal")}
    return {**kept, "is_last": torch.zeros_like(batch["is_terminal"])}


def r2dreamer(path: Path, bf16: bool, *, device: str = "cpu", compiled: bool = False) -> tuple[Callable[[], object], int]:
    """(one update, number of learned parameters) of r2dreamer's DreamerV3 12M on pictures: its own `Dreamer.update` with a fixed batch."""
    from omegaconf import OmegaConf  # type: ignore[import-not-found,unused-ignore]

    sys.path.insert(0, str(path))
    theirs = importlib.import_module("dreamer")
    read = lambda name: OmegaConf.load(path / "configs" / f"{name}.yaml")  # noqa: E731
    whole = OmegaConf.create({"device": device, "seed": 0})
    whole.env = read("env/dmc_vision")
    whole.model = OmegaConf.merge(read("model/_base_"), {k: v for k, v in read("model/size12M").items() if k != "defaults"})
    whole.model.compile, whole.model.rep_loss = compiled, "dreamer"
    space = SimpleNamespace(spaces={"image": SimpleNamespace(shape=(64, 64, 3))})
    with contextlib.redirect_stdout(io.StringIO()):
        agent = theirs.Dreamer(whole.model, space, SimpleNamespace(shape=(ACTIONS,)))
    # Its half precision (fp16) is unusual on a CPU, so use bf16, as ours does, or none.
    theirs.autocast = lambda device_type, dtype: torch.autocast(device_type, torch.bfloat16, enabled=bf16)
    # Scalars need a last dimension.
    data = {key: value.unsqueeze(-1) if key in ("reward", "is_last", "is_terminal") else value for key, value in _batch().items()}
    from tensordict import TensorDict  # type: ignore[import-not-found,unused-ignore]

    batch = TensorDict(data, batch_size=(BATCH, LENGTH)).to(device)
    state = agent.get_initial_state(BATCH)

    class Fixed:
        """A replay that always gives the same batch and ignores updates."""

        def sample(self) -> tuple[Any, None, tuple[Any, Any]]:
            return batch.clone(recurse=False), None, (state["stoch"], state["deter"])

        def update(self, *_: Any) -> None:
            pass

    return lambda: agent.update(Fixed()), sum(p.numel() for p in agent._named_params.values())


def dreamerv3(path: Path, bf16: bool, *, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """(one update, number of learned parameters) of the JAX reference's 12M on pictures: its own `Agent.train`, compiled by XLA.

    Sequences start from the last update's states, not from stored ones, so it also learns from 64 steps and not from 63 or 65.
    """
    import elements  # type: ignore[import-not-found,unused-ignore]
    import ruamel.yaml  # type: ignore[import-not-found,unused-ignore]

    sys.path.insert(0, str(path))
    configs = ruamel.yaml.YAML(typ="safe").load((path / "dreamerv3" / "configs.yaml").read_text())
    config = elements.Config(configs["defaults"]).update(configs["dmc_vision"]).update(configs["size12m"])
    platform = "cuda" if device.startswith("cuda") else "cpu"
    jax_options = {**config.jax, "platform": platform, "compute_dtype": "bfloat16" if bf16 else "float32", "prealloc": False}
    jax_options |= {"enable_policy": False, "precompile": False, "profiler": False}
    space = elements.Space
    observed = {"image": space(np.uint8, (64, 64, 3)), "reward": space(np.float32)}
    observed |= {name: space(bool) for name in ("is_first", "is_last", "is_terminal")}
    whole = elements.Config(
        **config.agent,
        **{"logdir": tempfile.gettempdir(), "seed": 0, "batch_size": BATCH, "batch_length": LENGTH},
        **{"replay_context": 0, "report_length": LENGTH, "replica": 0, "replicas": 1, "jax": elements.Config(jax_options)},
    )
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = importlib.import_module("dreamerv3.agent")
        agent = theirs.Agent(observed, {"action": space(np.float32, (ACTIONS,), -1, 1)}, whole)
    import jax  # type: ignore[import-not-found,unused-ignore]

    data = {key: value.numpy() for key, value in _batch().items()}
    data |= {"consec": np.zeros((BATCH, LENGTH), np.int32), "stepid": np.zeros((BATCH, LENGTH, 20), np.uint8)}
    placed = jax.device_put(data, agent.train_sharded)
    seed = agent._seeds(0, agent.train_mirrored)
    carry = agent.init_train(BATCH)

    def update() -> None:
        nonlocal carry
        carry, _, _ = agent.train(carry, {**placed, "seed": seed})
        jax.block_until_ready((agent.params, carry))  # wait, as ours and r2dreamer's do

    modules = ("enc", "dyn", "dec", "rew", "con", "pol", "val")
    return update, sum(value.size for name, value in agent.params.items() if name.split("/")[0] in modules)


PEERS: dict[str, Callable[..., tuple[Callable[[], object], int]]] = {"r2dreamer": r2dreamer, "dreamerv3": dreamerv3}
NEEDS = {
    "r2dreamer": "pip install omegaconf tensordict tensorboard",
    "dreamerv3": "pip install jax==0.4.33 jaxlib==0.4.33 chex optax elements ninjax einops jaxtyping portal granular scope tqdm "
    "ruamel.yaml",
}
