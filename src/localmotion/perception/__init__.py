"""Atomic Actions: optical flow, foreground, point tracks; batch extraction of clips and the streaming form."""

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
