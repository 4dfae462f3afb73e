"""DreamerV3 of others, built from checkouts of the user's and given our batch; nothing of theirs is here.

Each function returns one update, to be called again and again, and the number of learned parameters.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.bench_update import ACTIONS

BATCH, LENGTH = 16, 64


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
    # Its half precision (fp16) is not what anybody would use on a CPU: bf16 instead, as ours, or none.
    theirs.autocast = lambda device_type, dtype: torch.autocast(device_type, torch.bfloat16, enabled=bf16)
    g = torch.Generator().manual_seed(0)
    shape = (BATCH, LENGTH)
    first = torch.zeros(shape, dtype=torch.bool)
    first[:, 0] = True
    data = {
        "image": torch.randint(0, 256, (*shape, 64, 64, 3), generator=g, dtype=torch.uint8),
        "action": torch.rand(*shape, ACTIONS, generator=g) * 2 - 1,
        "reward": torch.rand(*shape, 1, generator=g),
        "is_first": first,
        "is_last": torch.zeros(*shape, 1, dtype=torch.bool),
        "is_terminal": torch.zeros(*shape, 1, dtype=torch.bool),
    }
    from tensordict import TensorDict  # type: ignore[import-not-found,unused-ignore]

    batch = TensorDict(data, batch_size=shape).to(device)
    state = agent.get_initial_state(BATCH)

    class Fixed:
        """A replay that always gives the same batch and forgets what it is told."""

        def sample(self) -> tuple[Any, None, tuple[Any, Any]]:
            return batch.clone(recurse=False), None, (state["stoch"], state["deter"])

        def update(self, *_: Any) -> None:
            pass

    return lambda: agent.update(Fixed()), sum(p.numel() for p in agent._named_params.values())


def dreamerv3(path: Path, bf16: bool, *, device: str = "cpu", threads: int = 0) -> tuple[Callable[[], object], int]:
    """(one update, number of learned parameters) of the JAX reference's 12M on pictures: its own `Agent.train`, compiled by XLA.

    Sequences begin from the last update's states, not from stored ones, so that it too learns from 64 steps and not from 63 or 65. On a
    CPU, XLA takes as many threads as the process may use cores: ``threads`` above 0 limits those, for good.
    """
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
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
    shape = (BATCH, LENGTH)
    whole = elements.Config(
        **config.agent,
        **{"logdir": tempfile.gettempdir(), "seed": 0, "batch_size": BATCH, "batch_length": LENGTH},
        **{"replay_context": 0, "report_length": LENGTH, "replica": 0, "replicas": 1, "jax": elements.Config(jax_options)},
    )
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = importlib.import_module("dreamerv3.agent")
        agent = theirs.Agent(observed, {"action": space(np.float32, (ACTIONS,), -1, 1)}, whole)
    import jax  # type: ignore[import-not-found,unused-ignore]

    rng = np.random.default_rng(0)
    first = np.zeros(shape, bool)
    first[:, 0] = True
    data = {
        "image": rng.integers(0, 256, (*shape, 64, 64, 3), dtype=np.uint8),
        "action": rng.uniform(-1, 1, (*shape, ACTIONS)).astype(np.float32),
        "reward": rng.uniform(size=shape).astype(np.float32),
        "is_first": first,
        "is_last": np.zeros(shape, bool),
        "is_terminal": np.zeros(shape, bool),
        "consec": np.zeros(shape, np.int32),
        "stepid": np.zeros((*shape, 20), np.uint8),
    }
    placed = jax.device_put(data, agent.train_sharded)
    seed = agent._seeds(0, agent.train_mirrored)
    carry = agent.init_train(BATCH)

    def update() -> None:
        nonlocal carry
        carry, _, _ = agent.train(carry, {**placed, "seed": seed})
        jax.block_until_ready((agent.params, carry))  # ours and r2dreamer's wait too

    modules = ("enc", "dyn", "dec", "rew", "con", "pol", "val")
    return update, sum(value.size for name, value in agent.params.items() if name.split("/")[0] in modules)


PEERS: dict[str, Callable[..., tuple[Callable[[], object], int]]] = {"r2dreamer": r2dreamer, "dreamerv3": dreamerv3}
NEEDS = {
    "r2dreamer": "pip install omegaconf tensordict tensorboard",
    "dreamerv3": "pip install jax==0.4.33 jaxlib==0.4.33 chex optax elements ninjax einops jaxtyping portal granular scope tqdm "
    "ruamel.yaml",
}
