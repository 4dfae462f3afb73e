"""DRP's motion encoder, adapters, bonus and IPV's picture model against the same written out in float64, one part at a time.

The product computes in float64 here too, so that what is compared agrees to nine digits and a small wrong factor shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localmotion.config import WorldModelConfig
from localmotion.models import decoders, encoders
from localmotion.models.adapters import make_adapter
from localmotion.models.bonus import IntrinsicBonus
from localmotion.models.dae import DAEConfig, MaskedMotion, Motion, atomic_actions, crop_patches, random_mask
from localmotion.models.global_flow import GlobalFlow
from localmotion.models.image import ImageModel, image_losses
from localmotion.testing.written import Noise, Written, _InDouble
from written_out import adapters, context, core, images, motion

SIDE, PARTS = 16, 3


@pytest.fixture(autouse=True)
def precise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The product in float64: what it makes by `float()` and by default."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def shaken(module: nn.Module) -> Any:
    """The module with weights of which none stays zero or one by its initialisation."""
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return module


def motion_batch(batch: int = 2, time: int = 5, side: int = SIDE, parts: int = PARTS) -> dict[str, Tensor]:
    """Flow, tracks that leave the picture here and there, and an episode that begins within the second sequence."""
    is_first = torch.zeros(batch, time, dtype=torch.bool)
    is_first[:, 0] = True
    is_first[-1, time // 2 + 1 :][:1] = time > 3
    return {
        "flow": torch.randn(batch, time, side, side, 2),
        "tracks": torch.rand(batch, time, parts + 1, 2) * torch.tensor([side + 4.0, side / 2]) - 2,
        "visible": torch.rand(batch, time, parts + 1) < 0.8,
        "track_id": (torch.rand(batch, time, parts + 1) < 0.2).int().cumsum(1),
        "is_first": is_first,
    }


def settings(**changes: Any) -> DAEConfig:
    return DAEConfig(
        **{"keypoints": PARTS, "patch": 4, "blocks": 2, "dim": 8, "heads": 2, "flow_clip": 1.5, "flow_scale": 0.7, **changes}
    )


def actions(batch: dict[str, Tensor], config: DAEConfig) -> Motion:
    return atomic_actions(batch["flow"], batch["tracks"], batch["visible"], batch["track_id"], config)


def named(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def gradients_agree(module: nn.Module, loss: Tensor, written: Tensor) -> None:
    """The gradients of two computations of the same loss, with respect to the module's weights."""
    parameters = dict(module.named_parameters())
    ours = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(written, list(parameters.values()), allow_unused=True)
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if one is None else one, zero if other is None else other, rtol=1e-7, atol=1e-9, msg=name)


# Geometry -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [4, 5])
def test_a_patch_is_centred_at_its_point_with_x_to_the_right_and_y_downwards(patch: int) -> None:
    ys, xs = torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij")
    field = torch.stack([xs, ys], -1)  # each pixel's flow is where it lies
    x, y = 11.3, 4.6  # nearest pixel: (11, 5)
    found = crop_patches(field, torch.tensor([[x, y]]), patch)[0]
    for i in range(patch):
        for j in range(patch):
            assert found[i, j].tolist() == [11 - patch // 2 + j, 5 - patch // 2 + i]


def test_a_patch_over_the_border_is_zero_outside_of_the_picture() -> None:
    field = torch.ones(12, 20, 2)
    left_bottom = crop_patches(field, torch.tensor([[0.0, 11.0]]), 4)[0, ..., 0]
    assert left_bottom.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    right_top = crop_patches(field, torch.tensor([[19.0, 0.0]]), 4)[0, ..., 0]
    assert right_top.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert not crop_patches(field, torch.tensor([[-40.0, 5.0]]), 4).any()


def test_coordinates_are_x_then_y_as_shares_of_the_picture() -> None:
    batch = motion_batch(1, 1, 16)
    batch["tracks"][0, 0, :3] = torch.tensor([[0.0, 15.0], [7.5, 3.5], [40.0, -40.0]])
    coords = actions(batch, settings()).coords[0, 0]
    torch.testing.assert_close(coords, torch.tensor([[-1 + 1 / 16, 1 - 1 / 16], [0.0, -0.5], [1.5, -1.5]]))


def test_atomic_actions_are_the_written_out_ones() -> None:
    batch, config = motion_batch(), settings()
    found, wanted = actions(batch, config), motion.atomic_actions(batch, config)
    torch.testing.assert_close(found.patches, wanted.patch)
    torch.testing.assert_close(found.coords, wanted.where)
    assert torch.equal(found.visible, wanted.seen)
    assert torch.equal(found.track, wanted.track)
    assert (wanted.patch.abs().amax() - 1.5 / 0.7).abs() < 1e-12  # clipped before it is scaled, and something was


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_the_hidden_set_is_the_share_of_visible_tokens(ratio: float) -> None:
    visible = torch.rand(3, 6, 4) < 0.7
    torch.manual_seed(1)
    found = random_mask(visible, ratio)
    torch.manual_seed(1)
    assert torch.equal(found, motion.hidden_set(visible, torch.rand(3, 24), ratio))


# Dual-Attention Encoder -----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "the paper's literal form": {"heads": 1, "attention_norm": "none"},
    "without attention within frames": {"intra": False},
    "without attention along time": {"inter": False},
    "without coordinates": {"coord": False},
    "without time": {"temporal": False},
    "[MAT] without time": {"mat_temporal": False},
    "[MAT] alone along time": {"mat_inter": False},
    "causal decoder": {"decoder_causal": True, "decoder_blocks": 2},
    "projected code": {"agg_dim": 6, "mlp_ratio": 2},
    "four placed [MAT]": {"mats": 4, "mats_placed": True, "agg_dim": 6},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_code_and_losses_of_the_motion_encoder_are_the_written_out_ones(variant: str) -> None:
    batch, config = motion_batch(time=4), settings(**({"blocks": 1} | VARIANTS[variant]), max_length=6)
    model = shaken(MaskedMotion(config, from_code=True))
    torch.manual_seed(1)
    found, episode = actions(batch, config), batch["is_first"].cumsum(1)
    agg, local, masked = model(found, episode)
    recompose = model.loss_from_code(agg, found)
    torch.manual_seed(1)
    noise = torch.rand(2, 4 * PARTS)
    code, losses = motion.recompose(named(model), batch, noise, config, from_code=True)
    torch.testing.assert_close(agg, code)
    torch.testing.assert_close(masked, losses["masked"])
    torch.testing.assert_close(recompose, losses["recompose"])
    weigh = torch.randn(code.shape)
    gradients_agree(
        model, masked + 0.7 * recompose + (weigh * agg).sum(), losses["masked"] + 0.7 * losses["recompose"] + (weigh * code).sum()
    )
    # what acting and the probes read
    torch.testing.assert_close(model.encode(found, episode)[0], code)
    rows = motion.encode(
        motion.under(named(model), "encoder"), motion.atomic_actions(batch, config), batch["visible"][..., :PARTS], config
    )
    torch.testing.assert_close(local, rows[:, :, config.mats :])


def test_a_mask_token_is_told_its_place_and_time() -> None:
    batch, config = motion_batch(1, 3), settings(blocks=1)
    batch["visible"][:] = True
    batch["track_id"][:] = 0
    batch["tracks"][0, :, 1] = batch["tracks"][0, :, 0]  # two parts that stay together and are both hidden
    model = shaken(MaskedMotion(config))
    hidden = torch.zeros(1, 3, PARTS, dtype=torch.bool)
    hidden[..., :2] = True
    rebuilt = model.reconstruct(actions(batch, config), hidden, batch["is_first"].cumsum(1))
    torch.testing.assert_close(rebuilt[0, :, 0], rebuilt[0, :, 1])
    assert (rebuilt[0, 0, 0] - rebuilt[0, 1, 0]).abs().max() > 1e-3
    batch["tracks"][0, :, 1] += 3.0  # nothing but the place of hidden tokens
    moved = model.reconstruct(actions(batch, config), hidden, batch["is_first"].cumsum(1))
    assert (moved[0, :, 1] - moved[0, :, 0]).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("side", [32, 64, 192])
def test_the_global_code_is_the_written_out_one(side: int) -> None:
    config = settings(agg_dim=6 if side == 32 else 0)
    model, flow = shaken(GlobalFlow(config)), torch.randn(1, 2, side, side, 2)
    code, wanted = model(flow), motion.global_code(named(model), flow, config)
    assert code.shape == (1, 2, config.code_dim)
    torch.testing.assert_close(code, wanted)
    if side == 32:
        weigh = torch.randn(code.shape)
        gradients_agree(model, (weigh * code).sum(), (weigh * wanted).sum())


# Between the two dynamics models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "mlp", "linear"])
def test_an_adapter_is_the_written_out_one(kind: str) -> None:
    model, feat = shaken(make_adapter(kind, deter=16, stoch=3, classes=4, out_dim=7)), torch.randn(2, 3, 28)
    found, wanted = model(feat), adapters.adapt(named(model), kind, feat, stoch=3, classes=4)
    torch.testing.assert_close(found, wanted)
    weigh = torch.randn(found.shape)
    gradients_agree(model, (weigh * found).sum(), (weigh * wanted).sum())


@pytest.mark.parametrize("filled", [0, 12, 39])
def test_the_bonus_is_the_written_out_one(filled: int) -> None:
    model = IntrinsicBonus(6, size=40)
    model.queue[:filled] = 0.05 * torch.randn(filled, 128)
    model.filled.fill_(filled)
    model.mean.fill_(0.7)
    is_first = motion_batch(time=8)["is_first"]
    for _ in range(2):  # the second one finds the first one's windows
        feat = torch.randn(2, 8, 6)
        state = Written({f"bonus.{name}": value.clone() for name, value in model.named_buffers()})
        found, wanted = model(feat, is_first), core.intrinsic_bonus(state, feat, is_first)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        for name, value in model.named_buffers():
            torch.testing.assert_close(value, state.weights[f"bonus.{name}"], rtol=1e-5, atol=1e-6)


# Pictures and their context --------------------------------------------------------------------------------------------------------

WORLDS: dict[str, dict[str, Any]] = {
    "paper": {"context_side": 4, "context_dropout": 0.1},
    "small": {"stem": "unshuffle", "norm": "none", "context_copy": True, "context_side": 8},
    "copies": {"norm": "none", "context_copy": True, "context_mask": 0.5, "context_side": 2},
    "no context": {"stem": "unshuffle", "context": False},
}


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("name", WORLDS)
def test_embedding_context_and_losses_of_pictures_are_the_written_out_ones(name: str, erase: bool) -> None:
    world = WorldModelConfig(depth=4, deter=5, stoch=2, classes=3, **WORLDS[name])
    model = shaken(ImageModel(world, image_size=16))
    batch = {"image": torch.randint(0, 256, (3, 3, 16, 16, 3), dtype=torch.uint8)}
    feats = [torch.randn(3, 3, 11) for _ in range(2)]
    state = Written({f"image.{key}": value.detach().clone() for key, value in named(model).items()})
    with _InDouble(Noise()):
        truth = model.pixels(batch["image"])
        embed, around = model.encode(truth, batch["image"], erase=erase)
        losses = model.losses(feats, around, truth)
    w, noise = {f"image.{key}": value for key, value in named(model).items()}, Noise()
    code, known, seen = context.observe(state, w, batch, world, noise, erase=erase)
    wanted = torch.stack(context.losses(state, w, feats, known, seen, world, noise))
    torch.testing.assert_close(embed, code)
    torch.testing.assert_close(losses, wanted)
    if known is None:
        assert around is None
    else:
        assert around is not None
        assert around.frame.tolist() == known.frame
        torch.testing.assert_close(around.pixels, known.pixels)
        plain = truth.unflatten(0, (3, 3))[torch.arange(3), around.frame]
        changed = [not torch.equal(*pair) for pair in zip(around.pixels, plain, strict=True)]
        assert set(changed) == ({False, True} if erase else {False})  # the noise erases some and some not
    for key, value in model.named_buffers():
        torch.testing.assert_close(value, state.weights[f"image.{key}"], msg=key)
    weigh, share = torch.randn(embed.shape), torch.tensor([1.0, 0.6])
    gradients_agree(model, losses @ share + (weigh * embed).sum(), wanted @ share + (weigh * code).sum())


def test_the_context_picture_is_the_frame_that_it_is_said_to_be() -> None:
    model = ImageModel(WorldModelConfig(depth=4, deter=5, stoch=2, classes=3, stem="unshuffle", norm="none"), image_size=16)
    image = torch.randint(0, 256, (6, 4, 16, 16, 3), dtype=torch.uint8)
    truth = model.pixels(image)
    picked = []
    for frame in (None, None, None, 0, 2):
        _, known = model.encode(truth, image, frame=frame)
        assert known is not None
        if frame is None:
            picked += known.frame.tolist()
        else:
            assert known.frame.tolist() == [frame] * 6
        own = truth.unflatten(0, (6, 4))[torch.arange(6), known.frame]
        torch.testing.assert_close(known.pixels, own)
        assert model.context_encoder is not None
        for found, wanted in zip(known.maps, model.context_encoder.maps(own)[1], strict=True):
            torch.testing.assert_close(found, wanted)
    assert set(picked) == {0, 1, 2, 3}  # every frame of a sequence can be its context


def test_copying_adds_the_share_of_the_context_picture() -> None:
    decoded, source = torch.randn(6, 8, 2, 2), torch.randn(2, 6, 2, 2)  # two pixels in six channels
    wanted = context.composite(decoded, source)
    torch.testing.assert_close(decoders.composite(decoded, source), wanted)
    truth = torch.randn(6, 6, 2, 2)
    torch.testing.assert_close(image_losses(decoded, truth, source), 0.5 * (wanted - truth).square().sum()[None] / 6)


def test_pixel_blocks_go_there_and_back() -> None:
    image = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    blocks = encoders.to_blocks(image).double() / 255 - 0.5
    torch.testing.assert_close(blocks, images.pixels(image[:, None], unshuffle=True))
    torch.testing.assert_close(encoders.from_blocks(blocks), images.pixels(image[:, None]))
