"""Rehearsal: a stage that learns to act goes on with the losses of pre-training, on clips, beside its own.

A world model that learns only from the agent's own experience forgets what videos taught it. The first pass of an update, in which the
model learns, then has the losses of the method's `pretrain` stage on a batch of clips, too:

    loss = loss of the stage + weight * loss of pre-training

There is one step of the optimisers for both. The idea is that of "Efficient Reinforcement Learning by Guiding World Models with
Non-Curated Data" (arXiv 2502.19544), which found that fine-tuning alone helps little on many tasks. It rehearses logged episodes with
actions; clips here have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from localmotion import methods
from localmotion.acting.observer import streaming_recipe
from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.errors import ConfigError
from localmotion.methods.base import MOTION, Batch, Method, Pass
from localmotion.runs.rundir import check_stores
from localmotion.runs.settings import recipe_of
from localmotion.training.windows import windows
from localmotion.video.remote import place_of
from localmotion.video.store import ClipStore

STAGE = "pretrain"
"""The stage whose losses are rehearsed."""
PREFIX = "rehearsal."
"""Of the keys of clips in a batch."""


class Rehearsal:
    """Batches of clips for the updates of a run. Clips that pre-training held out are not among them."""

    def __init__(self, run: RunConfig) -> None:
        """Raises StoreError for a store that cannot be read or has no clip that is long enough."""
        name, settings = run.rehearsal.data, run.pretrain
        self.store = ClipStore(place_of(name))
        if self.store.missing:
            say(self.store.missing_line())
        self.sampler = windows(self.store, replace(run, stage=STAGE))
        self.about = f"rehearsal: {settings.batch_size} x {settings.length} frames of {name} in each update"

    def batch(self, update: int) -> dict[str, Tensor]:
        """The clips of an update, for the passes of `rehearsed`. A thread reads those of the next update."""
        self.sampler.load_state_dict({"index": update})
        return {PREFIX + key: value for key, value in next(self.sampler).items()}

    def close(self) -> None:
        """Stop reading ahead."""
        self.sampler.close()


def check_clips(run: RunConfig, size: int, path: Path) -> None:
    """Raise ConfigError for clips whose pictures or motion do not fit the run's, StoreError for those that cannot be read.

    Also for other clips than those of the run in ``path``, if it has begun.
    ``size``: pixels of the run's pictures.
    """
    name = run.rehearsal.data
    store = ClipStore(place_of(name))
    if store.size != size:
        raise ConfigError(f"{name}: has pictures of {store.size} pixels, the run of {size}; extract it again")
    check_stores(path, {"rehearsal.data": store})
    if methods.get(run.method).needs(run.model, STAGE) & MOTION and run.recipe is not None:
        clips = streaming_recipe(recipe_of(store.recipe, store.path), run.motion)
        if clips.hash() != run.recipe.hash():
            raise ConfigError(
                f"{name}: its motion was made with another recipe than that of the run; extract it with the same settings"
            )
    windows(store, replace(run, stage=STAGE)).close()


def rehearsed(method: Method, passes: Sequence[Pass], weight: float) -> tuple[Pass, ...]:
    """The passes of a stage, the first one with the losses of pre-training on the batch's clips.

    Raises ConfigError if the first pass learns no more than actor and critic.
    """
    first, *rest = passes
    if set(first.groups) <= {"actor", "critic"}:
        raise ConfigError("rehearsal.data: with these settings the model that learned from videos stays as it is; leave it out")
    (own,) = method.passes(STAGE)

    def losses(batch: Batch, handed: Any) -> Any:
        clips = {key.removeprefix(PREFIX): value for key, value in batch.items() if key.startswith(PREFIX)}
        found, metrics, out = first.losses({key: value for key, value in batch.items() if not key.startswith(PREFIX)}, handed)
        again, told, _ = own.losses(clips, None)
        return found | _named(again), metrics | _named(told), out

    scales = {**first.scales, **{key: weight * value for key, value in _named(own.scales).items()}}
    return first._replace(losses=losses, scales=scales), *rest


def _named(values: Any) -> dict[str, Any]:
    return {f"rehearsal/{key}": value for key, value in values.items()}
