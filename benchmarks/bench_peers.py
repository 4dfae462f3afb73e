"""One update of our DreamerV3 and of a peer's, same model size, batch, precision, threads, in turn.

The peers are checkouts of the user's; nothing of theirs is here. r2dreamer (github.com/NM512/r2dreamer) needs `pip install omegaconf
tensordict tensorboard` beside this package:

    python -m benchmarks peers --r2dreamer PATH/TO/r2dreamer
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.bench_machine import clock
from benchmarks.bench_update import ACTIONS, setup
from localmotion.compute import keep_buffers

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


def ours(bf16: bool) -> tuple[Callable[[], object], int]:
    """(one update, number of learned parameters) of DreamerV3 12M."""
    precision = "bf16" if bf16 else "fp32"
    shape = (f"online.batch_size={BATCH}", f"online.length={LENGTH}")
    updater, batch = setup("dreamer_v3", "train", "paper", "size=size12m", f"precision={precision}", *shape)
    return lambda: updater.online(batch), sum(p.numel() for group in updater.groups for p in group.parameters)


def _serve(pipe: Connection, what: str, path: str, bf16: bool, threads: int, keep: bool) -> None:
    """In a process of its own: build one of the two, then update once for each message and answer with the seconds."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    if keep:
        keep_buffers()
    try:
        step, size = ours(bf16) if what == "ours" else r2dreamer(Path(path).resolve(), bf16)
    except Exception as error:
        pipe.send(f"{path}: {type(error).__name__}: {error}")
        return
    step()
    pipe.send(size)
    while pipe.recv():
        began = clock()
        step()
        pipe.send(clock() - began)


def run(r2dreamer_path: str = "", rounds: int = 5, precisions: tuple[bool, ...] = (True, False)) -> list[dict[str, object]]:
    """Each in its own process, in turn; seconds are the median of ``rounds``, the ratio is the median of the rounds' ratios.

    The peer runs as it comes, and once more with our setting of the C library's allocator (`compute.keep_buffers`), which is worth as much
    to it as all the rest.
    """
    if not r2dreamer_path:
        return [{"peer": "none given: --r2dreamer PATH"}]
    spawn = multiprocessing.get_context("spawn")
    rows: list[dict[str, object]] = []
    for bf16 in precisions:
        seats = {
            "ours": ("ours", True),
            "r2dreamer, eager": ("peer", False),
            "the same, with our allocator setting": ("peer", True),
        }
        pipes, sizes, times = {}, {}, {name: [] for name in seats}  # type: ignore[var-annotated]
        for name, (what, keep) in seats.items():
            pipes[name], far = spawn.Pipe()
            spawn.Process(
                target=_serve, args=(far, what, r2dreamer_path, bf16, torch.get_num_threads(), keep), daemon=True
            ).start()
            sizes[name] = pipes[name].recv()
            if isinstance(sizes[name], str):  # why it cannot be run: the other parts go on
                for pipe in pipes.values():
                    pipe.send(False)
                return [{"peer": name, "cannot be run": sizes[name], "it needs": "pip install omegaconf tensordict tensorboard"}]
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                times[name].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
        for name in list(seats)[1:]:
            ratios = sorted(b / a for a, b in zip(times["ours"], times[name], strict=True))
            rows.append(
                {
                    "update": f"DreamerV3 12M, {BATCH} x {LENGTH}, pictures",
                    "precision": "bf16" if bf16 else "fp32",
                    "threads": torch.get_num_threads(),
                    "peer": name,
                    "parameters, ours": sizes["ours"],
                    "peer's": sizes[name],
                    "ours s": middle["ours"],
                    "peer s": middle[name],
                    "ratio": ratios[len(ratios) // 2],
                    "ratios": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                }
            )
    return rows
