"""Grounded SAM against stand-ins of transformers that really find coloured rectangles, and on tiny untrained models."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from localmotion.errors import ConfigError, LocalmotionError, MissingExtraError
from localmotion.perception import _neural
from localmotion.perception.base import SegmentBackend
from localmotion.perception.grounded_sam import GroundedSam, clean_prompt

torch.set_num_threads(1)
EMPTY_FLOWS = np.zeros((0, 1, 1, 2), np.float32)


class StandInTransformers(types.ModuleType):
    """The classes used, with v5 signatures. The detector finds pure red rectangles ("hand") and blue ones ("cup")."""

    def __init__(self) -> None:
        super().__init__("transformers")
        self.loads: list[tuple[str, str, dict[str, Any]]] = []
        self.texts: list[list[str]] = []
        self.passes: list[tuple[str, int]] = []
        library = self

        class Loadable:
            @classmethod
            def from_pretrained(cls, name: str, **options: Any) -> Any:
                library.loads.append((cls.__name__, name, options))
                if name == "absent":
                    raise OSError("absent is not a local folder\nand is not a valid model identifier")
                return cls()

        class GroundingDinoImageProcessorPil(Loadable):
            pass

        class AutoTokenizer(Loadable):
            pass

        class SamImageProcessorPil(Loadable):
            pass

        class GroundingDinoProcessor:
            def __init__(self, image_processor: Any, tokenizer: Any) -> None:
                assert isinstance(image_processor, GroundingDinoImageProcessorPil)
                assert isinstance(tokenizer, AutoTokenizer)

            def __call__(self, *, images: list[Any], text: list[str], return_tensors: str) -> dict[str, torch.Tensor]:
                library.texts.append(text)
                pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2) / 255
                return {"pixel_values": pixels.double(), "input_ids": torch.tensor([[101, 7, 102]] * len(text))}

            def post_process_grounded_object_detection(
                self, outputs, input_ids, threshold, text_threshold, target_sizes
            ) -> list[dict[str, Any]]:
                assert input_ids.shape == (len(target_sizes), 3)
                results = []
                for pred_boxes, scores, (height, width) in zip(outputs.pred_boxes, outputs.scores, target_sizes, strict=True):
                    keep = scores > threshold
                    cx, cy, w, h = pred_boxes[keep].T
                    boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
                    boxes = boxes * torch.tensor([width, height, width, height])
                    labels = [["hand", "cup"][i] for i in keep.nonzero()[:, 0].tolist()]
                    results.append({"boxes": boxes, "scores": scores[keep], "text_labels": labels})
                return results

        class GroundingDinoForObjectDetection(Loadable, torch.nn.Module):
            def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> Any:
                assert pixel_values.dtype == torch.float32
                library.passes.append(("detect", len(pixel_values)))
                found = [self.find(picture) for picture in pixel_values]
                boxes, scores = (torch.tensor([each[side] for each in found]) for side in (0, 1))
                return types.SimpleNamespace(pred_boxes=boxes, scores=scores)

            def find(self, picture: torch.Tensor) -> tuple[list[list[float]], list[float]]:
                height, width = picture.shape[-2:]
                boxes, scores = [], []
                for channel, score in ((0, 0.4), (2, 0.9)):
                    others = [c for c in range(3) if c != channel]
                    found = (picture[channel] == 1) & (picture[others] == 0).all(0)
                    y, x = found.nonzero().T
                    if not len(y):
                        boxes.append([0.0] * 4)
                        scores.append(0.0)
                        continue
                    x0, x1, y0, y1 = x.min(), x.max() + 1, y.min(), y.max() + 1
                    box = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
                    boxes.append([float(v) for v in box])
                    scores.append(score)
                return boxes, scores

        class SamProcessor:
            def __init__(self, image_processor: Any) -> None:
                assert isinstance(image_processor, SamImageProcessorPil)

            def __call__(self, *, images: Any, input_boxes: Any, return_tensors: str) -> dict[str, torch.Tensor]:
                height, width = images.size[1], images.size[0]
                scale = 64 / max(height, width)
                size = (round(height * scale), round(width * scale))
                return {
                    "pixel_values": torch.zeros(1, 3, 64, 64),
                    "input_boxes": torch.tensor(input_boxes, dtype=torch.float64) * scale,
                    "original_sizes": torch.tensor([[height, width]]),
                    "reshaped_input_sizes": torch.tensor([size]),
                }

            def post_process_masks(self, masks, original_sizes, reshaped_input_sizes) -> list[torch.Tensor]:
                (h, w), size = reshaped_input_sizes[0].tolist(), original_sizes[0].tolist()
                large = F.interpolate(masks[0], (64, 64), mode="bilinear")[..., :h, :w]
                return [F.interpolate(large, size, mode="bilinear") > 0]

        class SamModel(Loadable, torch.nn.Module):
            def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
                library.passes.append(("encode", len(pixel_values)))
                return pixel_values[:, :1]

            def forward(self, image_embeddings, input_boxes, multimask_output) -> Any:
                assert multimask_output is False
                assert input_boxes.dtype == torch.float32
                assert len(image_embeddings) == len(input_boxes) == 1
                y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
                x0, y0, x1, y1 = (v[0, :, None, None] for v in input_boxes.unbind(-1))
                inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
                return types.SimpleNamespace(pred_masks=(inside.float() * 2 - 1)[None, :, None])

        for cls in (
            GroundingDinoImageProcessorPil,
            GroundingDinoProcessor,
            GroundingDinoForObjectDetection,
            AutoTokenizer,
            SamImageProcessorPil,
            SamProcessor,
            SamModel,
        ):
            setattr(self, cls.__name__, cls)


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> StandInTransformers:
    module = StandInTransformers()
    _neural._networks.clear()
    monkeypatch.setitem(sys.modules, "transformers", module)
    pytest.importorskip("PIL.Image", reason="the backend hands pictures over as PIL images")
    return module


def scene(red: bool = True, blue: bool = True) -> np.ndarray:
    frame = np.full((48, 64, 3), 90, np.uint8)
    if red:
        frame[8:24, 4:20] = (255, 0, 0)
    if blue:
        frame[32:44, 40:60] = (0, 0, 255)
    return frame


def test_grounded_sam_marks_what_the_prompt_names_in_the_first_frame_only(transformers):
    backend = GroundedSam(prompt="Robot  Arm. HAND", device="cpu")
    frames = np.stack([scene(blue=False), scene(red=False)])
    weight = backend.weight(frames, np.zeros((1, 48, 64, 2), np.float32))
    expected = np.zeros((48, 64), np.float32)
    expected[8:24, 4:20] = 1
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, expected)
    assert transformers.texts == [["robot arm. hand."]]
    assert isinstance(backend, SegmentBackend)


def test_grounded_sam_unites_masks_and_keeps_the_best(transformers):
    both = GroundedSam(device="cpu")
    assert both.weight(scene()[None], EMPTY_FLOWS).sum() == 16 * 16 + 12 * 20
    found = both.detect(scene())
    assert found.labels == ("cup", "hand")
    np.testing.assert_allclose(found.scores, [0.9, 0.4])
    np.testing.assert_allclose(found.boxes, [[40, 32, 60, 44], [4, 8, 20, 24]], atol=1e-4)
    best = GroundedSam(device="cpu", max_boxes=1).weight(scene()[None], EMPTY_FLOWS)
    assert best.sum() == 12 * 20
    sure = GroundedSam(device="cpu", box_threshold=0.5).weight(scene()[None], EMPTY_FLOWS)
    np.testing.assert_array_equal(sure, best)


def test_grounded_sam_looks_at_several_pictures_in_one_pass(transformers):
    """... and finds in each what it finds in it alone; a picture with nothing on it is not encoded."""
    backend = GroundedSam(batch=3, device="cpu")
    scenes = [scene(), scene(red=False), scene(red=False, blue=False), scene(blue=False), scene(), scene()[:40, :50]]
    asked = [(each[None], EMPTY_FLOWS) for each in scenes]
    weights = backend.weights(asked)
    assert transformers.passes == [("detect", 3), ("encode", 2), ("detect", 2), ("encode", 2), ("detect", 1), ("encode", 1)]
    for weight, one in zip(weights, asked, strict=True):
        np.testing.assert_array_equal(weight, backend.weight(*one))
    assert [weight.any() for weight in weights] == [True, True, False, True, True, True]
    assert backend.weights([]) == []
    with pytest.raises(ConfigError, match="batch"):
        GroundedSam(batch=0, device="cpu")


def test_grounded_sam_finding_nothing_gives_zeros(transformers):
    weight = GroundedSam(device="cpu").weight(scene(red=False, blue=False)[None], EMPTY_FLOWS)
    assert weight.shape == (48, 64)
    assert weight.dtype == np.float32
    assert not weight.any()


def test_grounded_sam_loads_safetensors_at_the_revision_asked_for(transformers):
    GroundedSam(detector="a/dino", detector_revision="abc", segmenter="b/sam", local_files_only=True, device="cpu")
    loads = {name: (where, options) for name, where, options in transformers.loads}
    where, options = loads["GroundingDinoForObjectDetection"]
    assert where == "a/dino"
    assert options == {"use_safetensors": True, "revision": "abc", "local_files_only": True}
    assert loads["SamModel"] == ("b/sam", {"use_safetensors": True, "revision": "main", "local_files_only": True})
    assert loads["AutoTokenizer"][1]["revision"] == "abc"


def test_grounded_sam_errors(transformers):
    with pytest.raises(LocalmotionError, match="loading segmenter 'absent' failed") as caught:
        GroundedSam(segmenter="absent", device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(LocalmotionError, match="loading detector 'absent' failed"):
        GroundedSam(detector="absent", device="cpu")
    with pytest.raises(ConfigError, match="names nothing"):
        GroundedSam(prompt=" . ", device="cpu")
    with pytest.raises(ConfigError, match="box_threshold"):
        GroundedSam(box_threshold=1.5, device="cpu")
    del transformers.SamImageProcessorPil
    with pytest.raises(MissingExtraError, match="transformers>=5,<6"):
        GroundedSam(device="cpu")


@given(st.text(alphabet="aB .\n", max_size=20))
def test_clean_prompt_is_idempotent(text):
    try:
        once = clean_prompt(text)
    except ConfigError:
        assert not text.replace(".", "").strip()
        return
    assert clean_prompt(once) == once
    assert once.endswith(".")
    assert once == once.lower()


def save_untrained(library: Any, folder: Path) -> dict[str, Any]:
    """Write a detector and a segmenter of a few thousand parameters; the options of a backend that loads them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "person", "hand", "robot", "arm"]
    detector = library.GroundingDinoConfig(
        backbone_config=library.SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=library.BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        ),
        d_model=64,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        num_queries=8,
        max_text_len=16,
    )
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    vision |= {"image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 8}
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder |= {"attention_downsample_rate": 2, "iou_head_hidden_dim": 16}
    segmenter = library.SamConfig(
        vision_config=library.SamVisionConfig(**vision).to_dict(),
        prompt_encoder_config=library.SamPromptEncoderConfig(**prompt).to_dict(),
        mask_decoder_config=library.SamMaskDecoderConfig(**decoder).to_dict(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library.GroundingDinoForObjectDetection(detector).save_pretrained(folder / "dino")
        library.SamModel(segmenter).save_pretrained(folder / "sam")
    library.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder / "dino")
    size = {"shortest_edge": 64, "longest_edge": 96}
    library.GroundingDinoImageProcessorPil(size=size).save_pretrained(folder / "dino")
    library.SamImageProcessorPil(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    ).save_pretrained(folder / "sam")
    return {"detector": str(folder / "dino"), "segmenter": str(folder / "sam"), "local_files_only": True}


def test_grounded_sam_with_real_untrained_models(tmp_path):
    """The true loading and calling path of transformers, on networks of a few thousand parameters."""
    library = pytest.importorskip("transformers", reason="the perception extra is not installed")
    folders = save_untrained(library, tmp_path)
    backend = GroundedSam(**folders, box_threshold=0.0, text_threshold=0.0, max_boxes=3, device="cpu")
    frame = np.random.default_rng(0).integers(0, 255, (48, 72, 3), dtype=np.uint8)
    found = backend.detect(frame)
    assert found.boxes.shape == (3, 4)
    assert len(found.labels) == 3
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [72, 48, 72, 48]).all()
    masks = backend.masks(frame, found.boxes)
    assert masks.shape == (3, 48, 72)
    weight = backend.weight(frame[None], EMPTY_FLOWS)
    np.testing.assert_array_equal(weight, masks.any(0))
    np.testing.assert_array_equal(weight, backend.weight(frame[None], EMPTY_FLOWS))
    frames = [frame, frame[:, ::-1].copy(), frame // 2]
    together = backend.weights([(one[None], EMPTY_FLOWS) for one in frames])
    for one, many in zip(frames, together, strict=True):
        assert (many != backend.weight(one[None], EMPTY_FLOWS)).mean() < 0.01  # a mask's edge may move with rounding
    nothing = GroundedSam(**folders, box_threshold=1.0, device="cpu").weight(frame[None], EMPTY_FLOWS)
    assert not nothing.any()
