"""Videos in, clips out: find, scan, decode, store and sample. Knows nothing of models or perception."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localmotion.video.decode import VideoInfo, decode, iter_frames, probe, video_ref
from localmotion.video.listing import VideoRef, find_videos
from localmotion.video.store import Clip, ClipStore, ClipStoreWriter
from localmotion.video.timing import Decoding
from localmotion.video.write import write_video

if TYPE_CHECKING:
    from localmotion.video.sample import WindowSampler

__all__ = [
    "Clip",
    "ClipStore",
    "ClipStoreWriter",
    "Decoding",
    "VideoInfo",
    "VideoRef",
    "WindowSampler",
    "decode",
    "find_videos",
    "iter_frames",
    "probe",
    "video_ref",
    "write_video",
]


def __getattr__(name: str) -> Any:
    """Load the sampler on first use, because it imports torch, which would slow down every decoding worker."""
    if name == "WindowSampler":
        from localmotion.video.sample import WindowSampler

        return WindowSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
