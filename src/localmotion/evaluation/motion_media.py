"""Arrays of what a pre-trained run has learned. The report draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from localmotion.evaluation.embedding import tsne
from localmotion.runs.load import load_run
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

DIRECTIONS = ("right", "down", "left", "up")


def motion_media(run_dir: Path, data: Path, *, windows: int = 192, seed: int = 0) -> None:
    """Write a t-SNE of the method's motion code (paper Fig. 14) and the store's flow magnitudes to RUN/media.

    The vector of a window is its mean code (DRP: a^agg). If the store has no labels, the colour of a window is its
    dominant direction of motion (mean displacement of the tracks). The model never gets this direction as input.
    """
    run, method, compute = load_run(run_dir)
    store = ClipStore(data)
    sampler = WindowSampler(store, run.pretrain.length, 32, seed, split="all", prefetch=False)
    codes, shift, magnitudes = [], [], []
    for index in range(-(-windows // 32)):
        batch = {k: v.to(compute.device) for k, v in sampler.batch(index).items()}
        with torch.no_grad(), compute.own_randomness(), compute.autocast():
            torch.manual_seed(seed + index)  # some codes are sampled
            code = method.motion_code(batch)
        if code is None:
            return
        codes.append(code[:, 1:].float().mean(1).cpu())
        flow = batch["flow"][:, 1:].float()
        size = flow.norm(dim=-1)
        weight = size.unsqueeze(-1) + 1e-6
        shift.append(((flow * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))).cpu())
        magnitudes.append(size.flatten()[:: max(1, size.numel() // 20_000)].cpu())
    vectors, moves = torch.cat(codes).numpy(), torch.cat(shift).numpy()
    angle = np.arctan2(moves[:, 1], moves[:, 0])
    labels = np.array([DIRECTIONS[round(float(a) / (np.pi / 2)) % 4] for a in angle])
    media = run_dir / "media"
    media.mkdir(exist_ok=True)
    np.savez_compressed(
        media / "embedding_motion.npz",
        xy=tsne(vectors, seed=seed).astype(np.float32),
        labels=labels,
        angle=angle.astype(np.float32),
        title="motion code of windows, coloured by direction of motion",
    )
    np.savez_compressed(
        media / "flow_pretraining.npz",
        magnitudes=torch.cat(magnitudes).numpy().astype(np.float32),
        name="pre-training clips",
    )
