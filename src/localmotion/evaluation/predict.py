"""Open-loop prediction of clips by a pre-trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from localmotion.errors import ConfigError
from localmotion.evaluation.heldout import open_loop_errors, predicts
from localmotion.evaluation.load import load_run
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore


def predict(
    checkpoint: Path,
    data: Path,
    *,
    clips: int = 4,
    split: Literal["train", "heldout", "all"] = "heldout",
    seed: int = 0,
    device: str = "auto",
) -> tuple[dict[str, float], dict[str, NDArray[np.uint8]]]:
    """Predict windows of ``clips`` clips of a store after 5 observed frames.

    Returns mean PSNR and SSIM by row, and the pictures (N,T,S,S,3) uint8 by row: truth, the method's own (DRP: motion, with a^agg of the
    tracked points as in the paper's Fig. 8, and zero_motion, with no information from the future; IPV and APV: prior), last_frame.
    Raises CheckpointError or StoreError; ConfigError when the run cannot predict from video alone.
    """
    run, method, compute = load_run(checkpoint, device=device)
    if run.stage != "pretrain":
        raise ConfigError(f"{checkpoint}: predicts from actions; give the pre-training run to predict video")
    if not predicts(method):
        raise ConfigError(f"{checkpoint}: method {run.method} does not predict video (it has no open_loop)")
    store = ClipStore(data)
    sampler = WindowSampler(
        store,
        run.pretrain.length,
        clips,
        seed,
        split=split,
        heldout_fraction=run.pretrain.heldout_fraction,
        prefetch=False,
        motion=method.wants_motion,
    )
    batch = {k: v.to(compute.device) for k, v in sampler.batch(0).items()}
    torch.manual_seed(seed)
    with compute.autocast():
        scores, pictures = open_loop_errors(method, batch)
    arrays = {k: (v * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy() for k, v in pictures.items()}
    return {name: float(value.mean()) for name, value in scores.items()}, arrays
