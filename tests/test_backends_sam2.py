"""The mask backend `grounded_sam`: with a stand-in for transformers, and with real networks of untrained weights."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from localmotion.errors import ConfigError, LocalmotionError, MissingExtraError
from localmotion.perception import _neural
from localmotion.perception.base import MaskBackend, mask_backend, recipe_backends
from localmotion.perception.sam2 import GroundedSam2
from localmotion.recipe import Recipe
from test_backends_grounded_sam import StandInTransformers, save_untrained

NO_CUTS = np.zeros(6, bool)
NO_FLOW = np.zeros((6, 1, 1, 2), np.float32)


class StandIn(StandInTransformers):
    """With a tracker that marks the red pixels of a frame, if its first mask does, and remembers what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        library = self
        self.visits: list[int] = []
        self.sessions: list[Any] = []

        class Sam2VideoInferenceSession:
            def __init__(self, **given: Any) -> None:
                self.given, self.masks = given, {}
                library.sessions.append(self)

            def obj_id_to_idx(self, number: int) -> int:
                return number - 1

            def add_mask_inputs(self, index: int, frame: int, mask: torch.Tensor) -> None:
                assert index == 0
                self.masks[frame] = mask

        class Sam2VideoModel(torch.nn.Module):
            config = types.SimpleNamespace(image_size=96)

            @classmethod
            def from_pretrained(cls, name: str, **options: Any) -> Any:
                library.loads.append((cls.__name__, name, options))
                if name == "absent":
                    raise OSError("absent is not a local folder")
                return cls()

            def propagate_in_video_iterator(self, session: Any, start_frame_idx: int, reverse: bool = False) -> Any:
                assert session.obj_with_new_inputs == [1]
                video = session.given["video"]
                order = range(start_frame_idx, -1, -1) if reverse else range(start_frame_idx, len(video))
                for t in order:
                    library.visits.append(t)
                    red = video[t, 0] - video[t, 1:].amax(0)
                    yield types.SimpleNamespace(frame_idx=t, pred_masks=F.avg_pool2d(red[None, None], 2) - 2)

        self.Sam2VideoInferenceSession, self.Sam2VideoModel = Sam2VideoInferenceSession, Sam2VideoModel


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    _neural._networks.clear()
    monkeypatch.setitem(sys.modules, "transformers", module)
    pytest.importorskip("PIL.Image", reason="the backend hands pictures over as PIL images")
    return module


def square(at: int | None) -> np.ndarray:
    """(96, 96, 3) grey with a red square at ``at``."""
    frame = np.full((96, 96, 3), 90, np.uint8)
    if at is not None:
        frame[20:60, at : at + 40] = (255, 0, 0)
    return frame


def reds(frames: np.ndarray, size: int) -> np.ndarray:
    ratio = 96 // size
    red = (frames == (255, 0, 0)).all(-1)
    return red.reshape(len(frames), size, ratio, size, ratio).mean((2, 4)) > 0.5


def test_the_prompts_objects_are_followed_from_the_first_frame_that_shows_them(transformers: StandIn) -> None:
    frames = np.stack([square(at) for at in (None, None, 10, 14, 18, 22)])
    backend = GroundedSam2(prompt="hand", looks=3, device="cpu")
    found = backend.masks(frames, NO_FLOW, NO_CUTS, 48)
    assert isinstance(backend, MaskBackend)
    np.testing.assert_array_equal(found, reds(frames, 48))
    assert found[2:].any((1, 2)).all()
    assert transformers.visits == [2, 3, 4, 5, 2, 1, 0]  # looks at frames 0, 2 and 4
    (session,) = transformers.sessions
    assert {t: mask.shape for t, mask in session.masks.items()} == {2: (1, 1, 96, 96)}
    assert (session.masks[2][0, 0].numpy() != reds(frames[2:3], 96)[0]).mean() < 0.01  # the stand-in of SAM is coarse
    video = session.given["video"]
    assert video.shape == (6, 3, 96, 96)
    torch.testing.assert_close(
        video[2, :, 30, 30],
        (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]),
    )


def test_each_scene_is_looked_through_by_itself_and_nothing_found_is_an_empty_mask(transformers: StandIn) -> None:
    frames = np.stack([square(at) for at in (5, 8, None, None, 30, 33)])
    cuts = np.array([False, False, True, False, True, False])
    found = GroundedSam2(device="cpu").masks(frames, NO_FLOW, cuts, 96)
    assert found.any((1, 2)).tolist() == [True, True, False, False, True, True]
    assert [len(session.given["video"]) for session in transformers.sessions] == [2, 2]


def test_a_recipe_shares_the_options_of_segmenter_and_mask(transformers: StandIn) -> None:
    recipe = Recipe(segment="grounded_sam", mask="grounded_sam", prompt="cup")
    given = {"device": "cpu", "box_threshold": 0.5, "tracker": "a/sam2", "tracker_revision": "abc", "local_files_only": True}
    recipe = Recipe(**{**recipe.to_json(), "backend_options": {"grounded_sam": given}})
    _, segment, _ = recipe_backends(recipe)
    mask: Any = mask_backend(recipe)
    assert segment.prompt == mask.first.prompt == "cup."
    assert segment.box_threshold == mask.first.box_threshold == 0.5
    loads = {name: (where, options) for name, where, options in transformers.loads}
    assert loads["Sam2VideoModel"] == ("a/sam2", {"use_safetensors": True, "revision": "abc", "local_files_only": True})
    wrong = Recipe(**{**recipe.to_json(), "backend_options": {"grounded_sam": {"traker": "a"}}})
    for build in (recipe_backends, mask_backend):
        with pytest.raises(ConfigError, match="traker"):
            build(wrong)


def test_errors(transformers: StandIn) -> None:
    with pytest.raises(LocalmotionError, match="loading tracker 'absent' failed"):
        GroundedSam2(tracker="absent", device="cpu")
    with pytest.raises(ConfigError, match="looks"):
        GroundedSam2(looks=0, device="cpu")
    del transformers.Sam2VideoModel
    with pytest.raises(MissingExtraError, match="transformers>=5,<6"):
        GroundedSam2(device="cpu")


def test_with_real_untrained_models(tmp_path: Path) -> None:
    """The true calling path of transformers, on networks of a million parameters."""
    library = pytest.importorskip("transformers", reason="the perception extra is not installed")
    side, wide = 64, 128
    trunk = library.Sam2HieraDetConfig(
        image_size=[side, side],
        hidden_size=8,
        embed_dim_per_stage=[8, 16, 24, 32],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        blocks_per_stage=[1, 1, 2, 1],
        global_attention_blocks=[3],
        window_size_per_stage=[4, 4, 4, 2],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = library.Sam2VisionConfig(
        backbone_config=trunk.to_dict(),
        backbone_channel_list=[32, 24, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=wide,
    )
    memory = {"memory_attention_hidden_size": wide, "memory_attention_num_layers": 1, "memory_encoder_hidden_size": wide}
    memory |= {"memory_attention_feed_forward_hidden_size": 32, "memory_attention_rope_feat_sizes": [4, 4]}
    memory |= {"mask_downsampler_embed_dim": wide, "memory_fuser_embed_dim": wide, "memory_fuser_intermediate_dim": 32}
    config = library.Sam2VideoConfig(
        vision_config=vision.to_dict(),
        prompt_encoder_config={"hidden_size": wide, "image_size": side, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": wide, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        image_size=side,
        **memory,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library.Sam2VideoModel(config).save_pretrained(tmp_path / "sam2")
    folders = save_untrained(library, tmp_path) | {"tracker": str(tmp_path / "sam2")}
    backend = GroundedSam2(**folders, box_threshold=0.0, text_threshold=0.0, max_boxes=3, device="cpu")
    assert backend.side == side
    frames = np.random.default_rng(0).integers(0, 255, (6, 48, 48, 3), dtype=np.uint8)
    found = backend.masks(frames, NO_FLOW, NO_CUTS, 32)
    np.testing.assert_array_equal(found, backend.masks(frames, NO_FLOW, NO_CUTS, 32))
    assert found.shape == (6, 32, 32)
    begin = np.zeros((48, 48), bool)
    begin[12:36, 12:36] = True
    followed = backend._follow(frames, begin, 2, 48)
    assert (followed[2] == begin).mean() > 0.95  # the frame that was marked keeps its mask
    assert not np.array_equal(followed[3], begin)
    nothing = GroundedSam2(**folders, box_threshold=1.0, device="cpu").masks(frames, NO_FLOW, NO_CUTS, 32)
    assert not nothing.any()
