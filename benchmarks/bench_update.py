"""Seconds per update, split by part, with FLOPs and their share of the machine's measured peak in the same precision."""

from __future__ import annotations

import time

import torch

from benchmarks.bench_machine import peak
from benchmarks.recorder import Recorder, allocations
from localmotion import methods
from localmotion.compute import choose
from localmotion.config import RunConfig
from localmotion.methods import sizes
from localmotion.methods.base import total
from localmotion.runs.settings import compose
from localmotion.training.update import Updater

ACTIONS = 6


def fake_batch(run: RunConfig, size: int = 64, tracks: int = 32) -> dict[str, torch.Tensor]:
    """A batch of the right shapes: moving noise, points everywhere, one in ten invisible."""
    part = run.pretrain if run.stage == "pretrain" else run.online
    b, t = part.batch_size, part.length
    g = torch.Generator().manual_seed(0)
    is_first = torch.zeros(b, t, dtype=torch.bool)
    is_first[:, 0] = True
    return {
        "image": torch.randint(0, 256, (b, t, size, size, 3), generator=g, dtype=torch.uint8),
        "action": torch.rand(b, t, ACTIONS, generator=g) * 2 - 1,
        "reward": torch.rand(b, t, generator=g),
        "is_terminal": torch.zeros(b, t, dtype=torch.bool),
        "is_first": is_first,
        "flow": torch.randn(b, t, size, size, 2, generator=g).half(),
        "tracks": torch.rand(b, t, tracks, 2, generator=g) * (size - 1),
        "visible": torch.rand(b, t, tracks, generator=g) < 0.9,
        "track_id": torch.zeros(b, t, tracks, dtype=torch.int32),
    }


def setup(
    method: str, stage: str, preset: str, *settings: str, env: str = "dmc:walker_walk"
) -> tuple[Updater, dict[str, torch.Tensor]]:
    """A method ready for updates, and a batch. ``settings`` as on the command line: name=value. Uses torch's current number of threads."""
    fixed = (f"threads={torch.get_num_threads()}", *settings)
    run = compose(method, stage, preset=preset, env=env if stage != "pretrain" else "", settings=fixed)  # type: ignore[arg-type]
    compute = choose(run)
    torch.manual_seed(0)
    size = int(sizes.RECIPE.get(preset, {}).get("size", 64))
    model = methods.get(method)(run.model, image_size=size, action_dim=None if stage == "pretrain" else ACTIONS).to(
        compute.device
    )
    return Updater(model, run, compute, pretrained=stage == "finetune"), fake_batch(run, size)


def count_flops(updater: Updater, batch: dict[str, torch.Tensor]) -> float:
    """FLOPs of one whole update, forward and backward."""
    with Recorder() as counter:
        updater.learn(batch)
    return counter.flops


def time_parts(updater: Updater, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of the first pass's forward, backward and optimisers, and of the passes after it as a whole ("behaviour")."""
    spent = dict.fromkeys(("forward", "backward", "optimiser", "behaviour"), 0.0)
    handed = None
    for index, each in enumerate(updater.passes):
        began = time.perf_counter()
        with updater.compute.autocast():
            losses, _, handed = each.losses(batch, handed)
            loss = total(losses, each.scales)
        forward = time.perf_counter()
        loss.backward(inputs=[p for group in updater.groups if group.name in each.groups for p in group.parameters])
        backward = time.perf_counter()
        updater.step(each.groups)
        end = time.perf_counter()
        if index:
            spent["behaviour"] += end - began
        else:
            spent |= {"forward": forward - began, "backward": backward - forward, "optimiser": end - backward}
    return spent


def run(
    cases: tuple[tuple[str, str, str], ...] = (
        ("drp", "pretrain", "small"),
        ("drp", "finetune", "small"),
        ("drp", "pretrain", "tiny"),
        ("drp", "finetune", "tiny"),
        ("dreamer_v2", "train", "small"),
        ("dreamer_v3", "train", "small"),
    ),
    repeats: int = 8,
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for method, stage, preset in cases:
        updater, batch = setup(method, stage, preset)
        step = updater.learn
        flops = count_flops(updater, batch)
        step(batch)
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - began)
        seconds = sorted(times)[len(times) // 2]
        parts = [time_parts(updater, batch) for _ in range(3)]
        split = {f"{key} ms": 1e3 * min(part[key] for part in parts) for key in parts[0]}
        top = peak(torch.bfloat16 if updater.compute.bf16 else torch.float32)
        rows.append(
            {
                "case": f"{method} {stage} {preset}",
                "threads": torch.get_num_threads(),
                "precision": "bf16" if updater.compute.bf16 else "fp32",
                "update ms": 1e3 * seconds,
                "GFLOP": flops / 1e9,
                "GFLOP/s": flops / seconds / 1e9,
                "of its peak": flops / seconds / top,
                "MB at most": allocations(lambda step=step, batch=batch: step(batch)).peak / 1e6,  # type: ignore[misc]
                **split,
            }
        )
    return rows
