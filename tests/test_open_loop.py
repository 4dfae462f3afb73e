"""What an open-loop prediction may see: every frame, action and motion that it may not see is replaced, and nothing may change."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from localmotion import methods
from localmotion.config import Stage
from localmotion.models.image import ImageModel
from method_batches import CASES, make, make_batch
from test_settings_reach import build, same_noise

STAGES: list[tuple[str, Stage]] = [
    (name, stage) for name, stage in CASES if (stage == "train") != ("pretrain" in methods.get(name).stages)
]
LAST, TIME = 4, 7  # frames that are observed, and all


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, Stage], Any]:
    """Each method with weights that let every input through, in evaluation mode."""
    found = {}
    for name, stage in STAGES:
        # A decoder that copies asks how the feature differs from the context frame's: then every picture knows of every observed frame.
        run, _ = make(name, stage, *(["context_copy=false"] if name in ("drp", "ipv") else []))
        method = found[name, stage] = build(run).eval()
        with torch.no_grad():
            for weight in (value for key, value in method.named_parameters() if ".post" in key and key.endswith("weight")):
                weight.mul_(4)  # other frames, other samples of the posterior
    return found


def predicted(method: Any, batch: dict[str, Tensor], context: int = LAST) -> dict[str, Tensor]:
    with torch.no_grad(), same_noise():
        found: dict[str, Tensor] = method.open_loop(batch, context)
    return found


def data() -> dict[str, Tensor]:
    return make_batch(2, TIME, tracks=8) | {"vector": torch.zeros(2, TIME, 5)}


def replaced(batch: dict[str, Tensor], keys: tuple[str, ...], where: slice | int) -> dict[str, Tensor]:
    """The batch with other values of some keys at some positions."""
    other = make_batch(2, TIME, tracks=8, seed=99)
    out = {key: value.clone() for key, value in batch.items()}
    for key in keys:
        if key == "visible":
            out[key][:, where] = ~out[key][:, where]
        elif key == "flow":
            out[key][:, where] = 7 * other[key][:, where]
        else:
            out[key][:, where] = other[key][:, where]
    return out


MOTION = ("flow", "tracks", "visible", "track_id")


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_nothing_of_the_future_is_seen(known: Any, name: str, stage: Stage) -> None:
    method, batch = known[name, stage], data()
    plain = predicted(method, batch)
    poisoned = predicted(method, replaced(batch, ("image", "reward"), slice(LAST, None)))
    moved = predicted(method, replaced(batch, MOTION, slice(LAST, None)))
    acted = predicted(method, replaced(batch, ("action",), slice(LAST, None)))
    for row, picture in plain.items():
        # A row's name says what it knows of the future: the true motion, the true or latent actions, or nothing.
        assert torch.equal(poisoned[row], picture) == (row not in ("latent_action", "swapped_action"))
        assert torch.equal(poisoned[row][:, :LAST], picture[:, :LAST])
        assert torch.equal(moved[row], picture) == (row != "motion")
        assert torch.equal(acted[row], picture) == (row != "action")
        assert torch.equal(acted[row][:, :LAST], picture[:, :LAST])


@pytest.mark.parametrize(("name", "stage"), STAGES)
@pytest.mark.parametrize("frame", range(LAST))
def test_every_observed_frame_is_seen(known: Any, name: str, stage: Stage, frame: int) -> None:
    """Latents are classes: not every other picture is another class, but of black, white and halves one is."""
    method, batch = known[name, stage], data()
    plain, differs = predicted(method, batch), set()
    for above, below in ((0, 0), (255, 255), (0, 255), (255, 0)):
        other = {key: value.clone() for key, value in batch.items()}
        other["image"][:, frame, :32], other["image"][:, frame, 32:] = above, below
        differs |= {
            row for row, found in predicted(method, other).items() if not torch.equal(found[:, LAST:], plain[row][:, LAST:])
        }
    assert differs == plain.keys()


@pytest.mark.parametrize(("name", "stage"), [case for case in STAGES if case[0] in ("drp", "ipv")])
@pytest.mark.parametrize("context", [1, LAST])
def test_the_context_is_the_last_observed_frame(known: Any, name: str, stage: Stage, context: int) -> None:
    method, batch, seen = known[name, stage], data(), []
    encode = ImageModel.encode

    def spied(self: ImageModel, *args: Any, **kwargs: Any) -> Any:
        found = encode(self, *args, **kwargs)
        seen.append(found[1])
        return found

    with mock.patch.object(ImageModel, "encode", spied):
        predicted(method, batch, context)
    (used,) = seen
    frame = batch["image"][:, context - 1 : context]
    assert torch.equal(used.pixels, method.image.pixels(frame))
    assert used.frame.tolist() == [context - 1] * 2
    with torch.no_grad():
        maps = method.image.context_encoder.maps(method.image.pixels(frame))[1]
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(used.maps, maps, strict=True))


@pytest.mark.parametrize("name", ["drp", "ipv"])
def test_the_context_of_training_is_the_frame_it_is_said_to_be(known: Any, name: str) -> None:
    """Each sequence's frame is drawn, all of them in time; the picture, its maps and its number are of one frame."""
    method, batch, drawn = known[name, "finetune"], data(), set()
    for seed in range(12):
        torch.manual_seed(seed)
        with torch.no_grad():
            _, context = method.image.encode(method.image.pixels(batch["image"]), batch["image"])
        drawn |= set(context.frame.tolist())
        frame = batch["image"][torch.arange(2), context.frame][:, None]
        assert torch.equal(context.pixels, method.image.pixels(frame))
        with torch.no_grad():
            maps = method.image.context_encoder.maps(method.image.pixels(frame))[1]
        assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(context.maps, maps, strict=True))
    assert drawn == set(range(TIME))
