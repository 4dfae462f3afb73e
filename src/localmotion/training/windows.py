"""Batches of clips as a stage of a method needs them."""

from __future__ import annotations

from localmotion import methods, ranks
from localmotion.config import RunConfig
from localmotion.evaluation.heldout import CONTEXT_FRAMES
from localmotion.methods.base import MASK, MOTION
from localmotion.video.sample import Split, WindowSampler
from localmotion.video.store import ClipStore


def windows(store: ClipStore, run: RunConfig, split: Split = "train") -> WindowSampler:
    """Sampler of one part of the clips for the run's stage. Raises NoClipsError if that part has no clip that is long enough."""
    settings, training, method = run.pretrain, split == "train", methods.get(run.method)
    needs = method.needs(run.model, run.stage)
    return WindowSampler(
        store,
        settings.length if training else max(settings.length, CONTEXT_FRAMES + 1),  # something is left to predict
        settings.batch_size,
        run.seed if training else run.seed + 1,
        split=split,
        heldout_fraction=settings.heldout_fraction,
        prefetch=training,
        motion=bool(needs & MOTION),
        mask=bool(needs & MASK),
        rows=ranks.rows(settings.batch_size) if training else slice(None),
        lead=method.lead(run.model, run.stage) if training else 0,
    )
