"""Grounded SAM: a text-prompted detector, then SAM on its boxes. The foreground of DRP, section 4.2.1.

Liu et al., "Grounding DINO", ECCV 2024; Kirillov et al., "Segment Anything", ICCV 2023; both through ``transformers`` (v5), code and
weights Apache-2.0. Pictures are prepared with the PIL processors on every machine, with or without torchvision, so the same recipe gives
the same mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from localmotion.errors import ConfigError
from localmotion.perception._neural import (
    GUIDE,
    check_frames,
    check_options,
    failure,
    inference,
    missing,
    optional_import,
    pick_device,
    pick_precision,
    shared_network,
)
from localmotion.perception.base import Frame, register

INSTALL = "pip install 'localmotion[perception]'"


@dataclass(frozen=True)
class Detections:
    """Detections in one frame, best first.

    boxes (n, 4) float32 xyxy in pixels; scores (n,) float32; labels n words of the prompt.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: tuple[str, ...]


@register("segment", "grounded_sam")
class GroundedSam:
    """Foreground of the first frame: the union of the SAM masks of all detections.

    Options:
        prompt: what to look for: phrases separated by dots ("person. hand. robot arm.").
        detector: Hugging Face id or local folder of a Grounding DINO model with its tokenizer and processor files.
        segmenter: id or local folder of a SAM model (facebook/sam-vit-base, -large, -huge).
        detector_revision, segmenter_revision: branch, tag or commit of the two; with commits the recipe is exact.
        box_threshold, text_threshold: minimum score of a box and of a word, 0..1.
        max_boxes: how many of the best boxes are segmented.
        batch: pictures in one forward pass, for several pictures (`weights`).
        local_files_only: True never touches the network.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        precision: ``float32``, or autocast to ``bfloat16`` or ``float16``.

    Weights are read from safetensors only and no code of a model repository is run. Raises MissingExtraError without
    transformers, ConfigError for an invalid option, LocalmotionError for models that cannot be read.
    """

    name: ClassVar[str] = "grounded_sam"
    licence: ClassVar[str] = "Apache-2.0"
    uses_motion: ClassVar[bool] = False

    def __init__(
        self,
        *,
        prompt: str = "person. hand. robot arm.",
        detector: str = "IDEA-Research/grounding-dino-tiny",
        segmenter: str = "facebook/sam-vit-base",
        detector_revision: str = "main",
        segmenter_revision: str = "main",
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        max_boxes: int = 16,
        batch: int = 4,
        local_files_only: bool = False,
        device: str = "auto",
        precision: str = "float32",
    ) -> None:
        check_options(
            self.name,
            box_threshold=0 <= box_threshold <= 1,
            text_threshold=0 <= text_threshold <= 1,
            max_boxes=max_boxes >= 1,
            batch=batch >= 1,
        )
        self.prompt = clean_prompt(prompt)
        self.box_threshold, self.text_threshold = box_threshold, text_threshold
        self.max_boxes, self.batch = max_boxes, batch
        self.device = pick_device(device)
        self.dtype = pick_precision(self.name, precision, self.device)
        self._image: Any = optional_import("PIL.Image", self.name, INSTALL)
        library: Any = optional_import("transformers", self.name, INSTALL)
        try:  # transformers imports lazily: a wrong torchvision fails only when a class is accessed
            dino, dino_images = library.GroundingDinoForObjectDetection, library.GroundingDinoImageProcessorPil
            dino_processor, tokenizer = library.GroundingDinoProcessor, library.AutoTokenizer
            sam, sam_images, sam_processor = library.SamModel, library.SamImageProcessorPil, library.SamProcessor
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            raise missing(self.name, "transformers>=5,<6", INSTALL, error) from error

        at = {"revision": detector_revision, "local_files_only": local_files_only}
        try:
            self._detector_processor = dino_processor(
                image_processor=dino_images.from_pretrained(detector, **at),
                tokenizer=tokenizer.from_pretrained(detector, **at),
            )
            self._detector = self._network(dino, detector, at)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unreadable("detector", detector, error) from error
        at = {"revision": segmenter_revision, "local_files_only": local_files_only}
        try:
            self._segmenter_processor = sam_processor(sam_images.from_pretrained(segmenter, **at))
            self._segmenter = self._network(sam, segmenter, at)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unreadable("segmenter", segmenter, error) from error

    def _network(self, kind: Any, model: str, at: dict[str, Any]) -> Any:
        def load() -> Any:
            return kind.from_pretrained(model, use_safetensors=True, **at)

        return shared_network((self.name, kind.__name__, model, at["revision"]), self.device, load)

    def _unreadable(self, slot: str, model: str, error: Exception) -> Exception:
        fix = f"check the id and the network, or give a local folder as {slot} ({GUIDE})"
        return failure(self.name, f"loading {slot} {model!r}", error, fix)

    def detect(self, frame: Frame) -> Detections:
        """Boxes of the prompt's objects in one (H, W, 3) uint8 frame, at most ``max_boxes``, best first."""
        return self._detect(frame[None])[0]

    def _detect(self, frames: NDArray[np.uint8]) -> list[Detections]:
        """Detections of each of (n, H, W, 3) frames, in one forward pass."""
        check_frames(frames, "frames")
        count, height, width = frames.shape[:3]
        pictures = [self._picture(frame) for frame in frames]
        inputs = self._detector_processor(images=pictures, text=[self.prompt] * count, return_tensors="pt")
        with self._inference(frames):
            outputs = self._detector(**self._moved(inputs))
        all_found = self._detector_processor.post_process_grounded_object_detection(
            outputs,
            inputs["input_ids"],
            threshold=self.box_threshold,
            text_threshold=self.text_threshold,
            target_sizes=[(height, width)] * count,
        )
        limits = np.array([width, height, width, height], np.float32)
        detections = []
        for found in all_found:
            scores = found["scores"].float().cpu().numpy()
            boxes = found["boxes"].float().cpu().numpy().reshape(-1, 4)
            order = np.argsort(-scores, kind="stable")[: self.max_boxes]
            labels = tuple(str(found["text_labels"][i]) for i in order)
            detections.append(Detections(np.clip(boxes[order], 0, limits), scores[order], labels))
        return detections

    def masks(self, frame: Frame, boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
        """SAM masks of (n, 4) xyxy boxes in one (H, W, 3) uint8 frame: (n, H, W)."""
        return self._masks(frame[None], [boxes])[0]

    def _masks(self, frames: NDArray[np.uint8], boxes: list[NDArray[np.float32]]) -> list[NDArray[np.bool_]]:
        """Masks of each of (n, H, W, 3) frames. One forward pass encodes the pictures; the boxes of each are decoded separately."""
        masks = [np.zeros((0, *frames.shape[1:3]), np.bool_) for _ in frames]
        which = [index for index, several in enumerate(boxes) if len(several)]
        if not which:
            return masks
        prepared = [
            self._segmenter_processor(images=self._picture(frames[i]), input_boxes=[boxes[i].tolist()], return_tensors="pt")
            for i in which
        ]
        with self._inference(frames):
            moved = [self._moved(inputs) for inputs in prepared]
            encoded = self._segmenter.get_image_embeddings(torch.cat([inputs["pixel_values"] for inputs in moved]))
            for row, (index, inputs) in enumerate(zip(which, prepared, strict=True)):
                outputs = self._segmenter(
                    image_embeddings=encoded[row : row + 1], input_boxes=moved[row]["input_boxes"], multimask_output=False
                )
                found = self._segmenter_processor.post_process_masks(
                    outputs.pred_masks.float().cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
                )[0]  # (boxes, 1, H, W)
                masks[index] = found[:, 0].cpu().numpy().astype(np.bool_)
        return masks

    def weight(
        self, frames: NDArray[np.uint8], flows: NDArray[np.float32] | Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Foreground weight of the FIRST of (n, H, W, 3) uint8 frames: (H, W) float32, 1 on the prompt's objects, else 0.

        The other frames and ``flows`` are not used (the paper segments the first frame). If nothing is found, the
        result is all zeros; the caller decides what to use instead and records it.
        """
        return self.weights([(frames, flows)])[0]

    def weights(
        self, asked: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32] | Sequence[NDArray[np.float32]]]]
    ) -> list[NDArray[np.float32]]:
        """`weight` of each, ``batch`` pictures of one size in a forward pass."""
        for frames, _ in asked:
            check_frames(frames, "frames")
        weights: list[NDArray[np.float32]] = []
        for _, same in itertools.groupby((frames[0] for frames, _ in asked), key=np.shape):
            pictures = np.stack(list(same))
            for start in range(0, len(pictures), self.batch):
                part = pictures[start : start + self.batch]
                masks = self._masks(part, [found.boxes for found in self._detect(part)])
                weights += [np.any(several, axis=0).astype(np.float32) for several in masks]
        return weights

    def _picture(self, frame: Frame) -> Any:
        return self._image.fromarray(np.ascontiguousarray(frame))

    def _inference(self, frames: NDArray[np.uint8]) -> Any:
        load = f"{len(frames)} frames of {frames.shape[1]}x{frames.shape[2]}"
        fix = f"lower the option batch={self.batch}, use smaller models or device=cpu"
        return inference(self.name, self.device, self.dtype, load, fix)

    def _moved(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors on the device, real numbers as float32 (boxes are float64, which parts of SAM do not accept)."""
        moved = {}
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor):
                moved[key] = value.to(self.device, torch.float32 if value.is_floating_point() else value.dtype)
        return moved


def clean_prompt(prompt: str) -> str:
    """The form Grounding DINO was trained on: lower case, phrases end with dots. Raises ConfigError if nothing remains."""
    phrases = [" ".join(part.split()).lower() for part in prompt.split(".")]
    phrases = [part for part in phrases if part]
    if not phrases:
        raise ConfigError(f"grounded_sam option prompt={prompt!r} names nothing; give e.g. 'person. hand. robot arm.'")
    return " ".join(f"{part}." for part in phrases)
