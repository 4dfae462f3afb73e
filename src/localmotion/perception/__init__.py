"""Atomic Actions: optical flow, foreground, point tracks; batch extraction of clips and the streaming form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localmotion.perception import dis, lk, motion_mask, saliency  # registers the embedded backends
from localmotion.perception.base import (
    KINDS,
    ClipMotion,
    FlowBackend,
    MaskBackend,
    SegmentBackend,
    StepMotion,
    TrackBackend,
    backends,
    make_backend,
    register,
    register_lazily,
)
from localmotion.recipe import Recipe

if TYPE_CHECKING:
    from localmotion.perception.extract import extract_folder
    from localmotion.perception.part_shards import extract_shards

__all__ = [
    "ClipMotion",
    "FlowBackend",
    "MaskBackend",
    "Recipe",
    "SegmentBackend",
    "StepMotion",
    "TrackBackend",
    "backends",
    "dis",
    "extract_folder",
    "extract_shards",
    "lk",
    "make_backend",
    "motion_mask",
    "register",
    "register_lazily",
    "saliency",
]


def _sea_raft() -> None:
    from localmotion.perception import sea_raft  # noqa: F401


def _grounded_sam() -> None:
    from localmotion.perception import grounded_sam  # noqa: F401


def _sam2() -> None:
    from localmotion.perception import sam2  # noqa: F401


def _cotracker() -> None:
    from localmotion.perception import cotracker  # noqa: F401


def _exact() -> None:
    from localmotion.perception.exact import Exact, ExactMask

    for kind in KINDS:
        register(kind, "exact")(ExactMask if kind == "mask" else Exact)


# The neural backends import torch (three seconds and 190 MB), which workers of the embedded default do not need.
register_lazily("flow", "sea_raft", _sea_raft)
register_lazily("flow", "raft", _sea_raft)
register_lazily("segment", "grounded_sam", _grounded_sam)
register_lazily("track", "cotracker3", _cotracker)
register_lazily("mask", "grounded_sam", _sam2)
for kind in KINDS:  # it imports the environments
    register_lazily(kind, "exact", _exact)


def __getattr__(name: str) -> Any:
    """Load extraction on first use: its modules import those of this room."""
    if name == "extract_folder":
        from localmotion.perception.extract import extract_folder

        return extract_folder
    if name == "extract_shards":
        from localmotion.perception.part_shards import extract_shards

        return extract_shards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
