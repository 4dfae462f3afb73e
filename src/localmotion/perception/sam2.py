"""Masks of the objects that a prompt names: Grounded SAM in one frame, SAM 2 from there through the clip.

Ravi et al., "SAM 2: Segment Anything in Images and Videos", arXiv 2408.00714, through ``transformers`` (v5), code and weights
Apache-2.0. MaskLAM (arXiv 2602.02259) gets masks of real videos from such models. The processors of ``transformers`` for video need
torchvision, so frames are prepared here: resized to the model's square, with ImageNet's mean and deviation.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from localmotion.perception._neural import (
    GUIDE,
    check_frames,
    check_options,
    failure,
    inference,
    missing,
    optional_import,
    shared_network,
)
from localmotion.perception.base import register
from localmotion.perception.grounded_sam import INSTALL, GroundedSam

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in SAM 2's preprocessor_config.json


@register("mask", "grounded_sam")
class GroundedSam2:
    """Union of the objects that the prompt names, through each scene of a clip.

    The prompt is looked for in up to ``looks`` frames, spread evenly over the scene from its first one on. SAM 2 follows what is in the
    first of them that shows it, forward to the end of the scene and back to its beginning. If none shows it, the masks are empty.

    Options: those of `GroundedSam`, and

        tracker: Hugging Face id or local folder of a SAM 2 video model (facebook/sam2.1-hiera-tiny, -small, -base-plus, -large).
        tracker_revision: branch, tag or commit of it.
        looks: frames of a scene in which the prompt is looked for.

    Raises what `GroundedSam` raises.
    """

    name: ClassVar[str] = "grounded_sam"
    licence: ClassVar[str] = "Apache-2.0"

    def __init__(
        self,
        *,
        prompt: str = "person. hand. robot arm.",
        detector: str = "IDEA-Research/grounding-dino-tiny",
        segmenter: str = "facebook/sam-vit-base",
        tracker: str = "facebook/sam2.1-hiera-tiny",
        detector_revision: str = "main",
        segmenter_revision: str = "main",
        tracker_revision: str = "main",
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        max_boxes: int = 16,
        batch: int = 4,
        looks: int = 4,
        local_files_only: bool = False,
        device: str = "auto",
        precision: str = "float32",
    ) -> None:
        check_options(self.name, looks=looks >= 1)
        self.first = GroundedSam(
            prompt=prompt,
            detector=detector,
            segmenter=segmenter,
            detector_revision=detector_revision,
            segmenter_revision=segmenter_revision,
            box_threshold=box_threshold,
            text_threshold=text_threshold,
            max_boxes=max_boxes,
            batch=batch,
            local_files_only=local_files_only,
            device=device,
            precision=precision,
        )
        self.looks = looks
        self.device, self.dtype = self.first.device, self.first.dtype
        library: Any = optional_import("transformers", self.name, INSTALL)
        try:
            model, self._session = library.Sam2VideoModel, library.Sam2VideoInferenceSession
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            raise missing(self.name, "transformers>=5,<6", INSTALL, error) from error

        def load() -> Any:
            return model.from_pretrained(
                tracker, use_safetensors=True, revision=tracker_revision, local_files_only=local_files_only
            )

        try:
            key = (self.name, model.__name__, tracker, tracker_revision)
            self._tracker: Any = shared_network(key, self.device, load)
        except (OSError, ValueError, RuntimeError) as error:
            fix = f"check the id and the network, or give a local folder as tracker ({GUIDE})"
            raise failure(self.name, f"loading tracker {tracker!r}", error, fix) from error
        self.side = int(self._tracker.config.image_size)
        """Side of the pictures that SAM 2 works on (1024)."""

    def masks(
        self, frames: NDArray[np.uint8], flows: NDArray[np.float32], cuts: NDArray[np.bool_], size: int
    ) -> NDArray[np.bool_]:
        """See `localmotion.perception.base.MaskBackend.masks`. The flow is not used."""
        check_frames(frames, "frames")
        found = np.zeros((len(frames), size, size), np.bool_)
        starts = [0, *np.flatnonzero(cuts[1:]) + 1, len(frames)]
        for start, stop in itertools.pairwise(starts):
            found[start:stop] = self._scene(frames[start:stop], size)
        return found

    def _scene(self, frames: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
        empty = np.zeros((0, 1, 1, 2), np.float32)
        for at in np.arange(0, len(frames), -(-len(frames) // self.looks)).tolist():
            begin = self.first.weight(frames[at][None], empty) > 0
            if begin.any():
                return self._follow(frames, begin, at, size)
        return np.zeros((len(frames), size, size), np.bool_)

    def _follow(self, frames: NDArray[np.uint8], begin: NDArray[np.bool_], at: int, size: int) -> NDArray[np.bool_]:
        """Masks (T, size, size) of frames (T, H, W, 3) that show ``begin`` (H, W) in frame ``at``."""
        height, width = begin.shape
        session = self._session(
            video=self._prepared(frames),
            video_height=height,
            video_width=width,
            inference_device=self.device,
            inference_state_device=self.device,
            dtype=torch.float32,
        )
        mask = torch.from_numpy(begin).float()[None, None].to(self.device)  # (1, 1, H, W)
        mask = F.interpolate(mask, (self.side, self.side), mode="bilinear", antialias=True)
        session.add_mask_inputs(session.obj_id_to_idx(1), at, (mask >= 0.5).float())
        session.obj_with_new_inputs = [1]
        found = np.zeros((len(frames), size, size), np.bool_)
        load = f"{len(frames)} frames of {height}x{width}"
        with inference(self.name, self.device, self.dtype, load, "use a smaller tracker or device=cpu"):
            order = itertools.chain(
                self._tracker.propagate_in_video_iterator(session, start_frame_idx=at),
                self._tracker.propagate_in_video_iterator(session, start_frame_idx=at, reverse=True),
            )
            for seen in order:
                scores = F.interpolate(seen.pred_masks.float(), (size, size), mode="bilinear", antialias=True)
                found[seen.frame_idx] = (scores[0, 0] > 0).cpu().numpy()
        return found

    def _prepared(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """(T, 3, side, side) float32 of (T, H, W, 3) frames."""
        pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        resized = [
            F.interpolate(one[None].float() / 255, (self.side, self.side), mode="bilinear", antialias=True) for one in pictures
        ]
        return (torch.cat(resized) - mean) / deviation
