"""Random batches with the keys that a method's training loop gives it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from localmotion.errors import ConfigError
from localmotion.methods.base import LABELS, MOTION, VIDEO, Method, Source

ACTIONS = 3
"""Numbers of an action."""
SIZE = 64
"""Side of the pictures."""
CLIPS_KEYS = frozenset({"image", "is_first"})
EPISODE_KEYS = CLIPS_KEYS | {"action", "reward", "is_terminal"}
MOTION_KEYS = frozenset({"flow", "tracks", "visible", "track_id"})


class BatchMaker(Protocol):
    """What makes a batch for a method and stage."""

    def __call__(self, method: type[Method], stage: str, *, batch: int, time: int, seed: int) -> dict[str, Tensor]: ...


def full_batch(batch: int = 2, time: int = 8, tracks: int = 6, seed: int = 0, size: int = SIZE) -> dict[str, Tensor]:
    """All keys of pictures, actions, rewards and motion (shapes: `methods.base`); every sequence starts an episode."""
    g = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    is_first[:, 0] = True
    visible = torch.rand(batch, time, tracks, generator=g) < 0.9
    visible[:, 0] = False
    return {
        "image": torch.randint(0, 256, (batch, time, size, size, 3), generator=g, dtype=torch.uint8),
        "action": (torch.rand(batch, time, ACTIONS, generator=g) * 2 - 1) * ~is_first[..., None],
        "reward": torch.rand(batch, time, generator=g),
        "is_terminal": torch.zeros(batch, time, dtype=torch.bool),
        "is_first": is_first,
        "flow": torch.randn(batch, time, size, size, 2, generator=g).half(),
        "tracks": torch.rand(batch, time, tracks, 2, generator=g) * (size - 1),
        "visible": visible,
        "track_id": torch.zeros(batch, time, tracks, dtype=torch.int32),
    }


def random_batch(method: type[Method], stage: str, *, batch: int = 2, time: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """A batch with the keys that the loop of ``stage`` gives ``method``, and no others.

    `Source.CLIPS` gives pictures without actions and rewards; the other sources give both. `Method.wants` adds

        flow, tracks   all four keys of motion
        mask           (B,T,S,S) bool, where the agent is seen; `Source.CLIPS` and `Source.LOGGED`
        goal           (B,T,S,S,3) uint8, a picture of the goal, the same at all positions; not `Source.CLIPS`
        labelled       (B,T) bool, whether the action at a position is known
        labelled_...   a second batch of logged episodes (`LABELS`); `Source.CLIPS` only
        video_image    (B,T,S,S,3) uint8, pictures of clips without actions (`VIDEO`); `Source.LOGGED` only

    and `Method.extras` adds what acting stored with each action, (B,T,*shape), to `Source.REPLAY` and `Source.ROLLOUT`.

    Raises ConfigError for a key in `Method.wants` that is none of these.
    """
    source = method.stages[stage]
    known = MOTION | LABELS | VIDEO | {"mask", "goal", "labelled"}
    if unknown := sorted(method.wants - known - MOTION_KEYS):
        raise ConfigError(f"random_batch cannot make {', '.join(unknown)}; give check_method a `batch` of your own, which can")
    keys = CLIPS_KEYS if source is Source.CLIPS else EPISODE_KEYS
    keys |= MOTION_KEYS if method.wants & MOTION_KEYS else frozenset()
    found = {key: value for key, value in full_batch(batch, time, seed=seed).items() if key in keys}
    g = torch.Generator().manual_seed(seed + 1)
    if "goal" in method.wants and source is not Source.CLIPS:
        goal = torch.randint(0, 256, (batch, 1, SIZE, SIZE, 3), generator=g, dtype=torch.uint8)
        found["goal"] = goal.expand(-1, time, -1, -1, -1).clone()
    if "mask" in method.wants and source in (Source.CLIPS, Source.LOGGED):
        found["mask"] = torch.rand(batch, time, SIZE, SIZE, generator=g) < 0.3
    if "labelled" in method.wants and source is not Source.CLIPS:
        found["labelled"] = torch.rand(batch, time, generator=g) < 0.5
        found["labelled"][:, 1] = True  # some position is, and some is not
        found["labelled"][:, -1] = False
    if source in (Source.REPLAY, Source.ROLLOUT):
        found |= {name: torch.randn(batch, time, *shape, generator=g) for name, shape in method.extras.items()}
        for name in method.extras:
            found[name][:, 0] = 0  # nothing led to the first frame
    if source is Source.CLIPS and method.wants & LABELS:
        second = full_batch(batch, time, seed=seed + 2)
        found |= {key: second[key.removeprefix("labelled_")] for key in sorted(LABELS)}
    if source is Source.LOGGED and method.wants & VIDEO:
        found["video_image"] = full_batch(batch, time, seed=seed + 3)["image"]
    if source is Source.CLIPS:
        found |= {"clip": torch.arange(batch), "start": torch.zeros(batch, dtype=torch.int64)}
    return found
