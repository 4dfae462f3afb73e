"""Atomic Actions: optical flow, foreground, point tracks; batch extraction of clips and the streaming form."""

from localmotion.perception import cotracker, dis, grounded_sam, lk, saliency, sea_raft  # registers the backends
from localmotion.perception.base import (
    ClipMotion,
    FlowBackend,
    Recipe,
    SegmentBackend,
    StepMotion,
    TrackBackend,
    backends,
    make_backend,
    register,
)

__all__ = [
    "ClipMotion",
    "FlowBackend",
    "Recipe",
    "SegmentBackend",
    "StepMotion",
    "TrackBackend",
    "backends",
    "cotracker",
    "dis",
    "grounded_sam",
    "lk",
    "make_backend",
    "register",
    "saliency",
    "sea_raft",
]
