"""The Dual-Attention Encoder against the paper's equations, its invariants, and its acting form."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from localmotion.models.dae import (
    DAEConfig,
    DualAttentionBlock,
    DualAttentionEncoder,
    MaskedMotion,
    Motion,
    atomic_actions,
    crop_patches,
    masked_loss,
    random_mask,
)
from property_examples import examples

SMALL = DAEConfig(keypoints=3, patch=4, blocks=2, dim=16, heads=2, max_length=32)
LITERAL = dataclasses.replace(SMALL, heads=1, attention_norm="none")
SEVERAL = dataclasses.replace(SMALL, mats=3)
PLACED = dataclasses.replace(SMALL, mats=4, mats_placed=True)
APART = dataclasses.replace(SEVERAL, mat_inter=False)
EACH = pytest.mark.parametrize("config", [SMALL, SEVERAL, PLACED], ids=["one [MAT]", "three", "placed"])


def make_motion(config: DAEConfig, batch: int = 2, time: int = 6, seed: int = 0) -> Motion:
    g = torch.Generator().manual_seed(seed)
    k, p = config.keypoints, config.patch
    visible = torch.rand(batch, time, k, generator=g) < 0.8
    track = (torch.rand(batch, time, k, generator=g) < 0.15).cumsum(1).int()
    return Motion(
        torch.randn(batch, time, k, p, p, 2, generator=g),
        torch.rand(batch, time, k, 2, generator=g) * 2 - 1,
        visible,
        track,
    )


def all_seen(config: DAEConfig, batch: int, time: int) -> tuple[Motion, torch.Tensor]:
    motion = make_motion(config, batch, time)
    motion = motion._replace(visible=torch.ones_like(motion.visible), track=torch.zeros_like(motion.track))
    return motion, torch.zeros(batch, time, dtype=torch.long)


def literal_block(block: DualAttentionBlock, z: torch.Tensor) -> torch.Tensor:
    """Eqs. 13-19 written out with loops, for tokens that are all visible."""
    time, parts, dim = z.shape
    wq, wk, wv = block.intra_qkv.weight.chunk(3)
    first = z.clone()
    for t in range(time):
        q, k, v = z[t] @ wq.T, z[t] @ wk.T, z[t] @ wv.T  # Eq. 13
        first[t] = z[t] + torch.softmax(q @ k.T / math.sqrt(dim), -1) @ v  # Eqs. 14, 17
    wq, wk, wv = block.inter_qkv.weight.chunk(3)
    second = first.clone()
    causal = torch.full((time, time), -math.inf).triu(1)
    for part in range(parts):
        s = first[:, part]
        q, k, v = s @ wq.T, s @ wk.T, s @ wv.T  # Eq. 15
        second[:, part] = s + torch.softmax(q @ k.T / math.sqrt(dim) + causal, -1) @ v  # Eqs. 16, 18
    return second + block.mlp(block.mlp_norm(second))  # Eq. 19


def first_block() -> tuple[DualAttentionBlock, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    encoder = DualAttentionEncoder(LITERAL)
    motion, episode = all_seen(LITERAL, 1, 5)
    intra, inter = encoder.masks(motion.visible, motion.track, episode)
    block = encoder.blocks[0]
    assert isinstance(block, DualAttentionBlock)
    return block, encoder.tokens(motion), intra, inter


def without(block: DualAttentionBlock, *parts: str) -> DualAttentionBlock:
    """The same block with attentions switched off, or the MLP's output layer set to zero."""
    other = copy.deepcopy(block)
    other.use_intra = "intra" not in parts
    other.use_inter = "inter" not in parts
    if "mlp" in parts:
        torch.nn.init.zeros_(other.mlp[2].weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(other.mlp[2].bias)  # type: ignore[arg-type]
    return other


def test_equation_13_queries_keys_values_are_linear_maps_of_the_frame() -> None:
    block, z, _, _ = first_block()
    wq, wk, wv = block.intra_qkv.weight.chunk(3)
    assert block.intra_qkv.bias is None
    torch.testing.assert_close(block.intra_qkv(z), torch.cat([z @ wq.T, z @ wk.T, z @ wv.T], -1))


def test_equation_15_queries_keys_values_are_linear_maps_of_the_part() -> None:
    block, z, _, _ = first_block()
    wq, wk, wv = block.inter_qkv.weight.chunk(3)
    assert block.inter_qkv.bias is None
    torch.testing.assert_close(block.inter_qkv(z[:, :, 1]), torch.cat([z[:, :, 1] @ w.T for w in (wq, wk, wv)], -1))


def test_equation_17_residual_intra_attention() -> None:
    block, z, intra, inter = first_block()
    out = without(block, "inter", "mlp")(z, intra, inter)
    wq, wk, wv = block.intra_qkv.weight.chunk(3)
    for t in range(z.shape[1]):
        frame = z[0, t]
        weights = torch.softmax((frame @ wq.T) @ (frame @ wk.T).T / math.sqrt(frame.shape[-1]), -1)
        torch.testing.assert_close(out[0, t], frame + weights @ (frame @ wv.T), atol=1e-5, rtol=1e-5)


def test_equation_18_residual_causal_inter_attention() -> None:
    block, z, intra, inter = first_block()
    out = without(block, "intra", "mlp")(z, intra, inter)
    wq, wk, wv = block.inter_qkv.weight.chunk(3)
    causal = torch.full((z.shape[1], z.shape[1]), -math.inf).triu(1)
    for part in range(z.shape[2]):
        s = z[0, :, part]
        weights = torch.softmax((s @ wq.T) @ (s @ wk.T).T / math.sqrt(s.shape[-1]) + causal, -1)
        torch.testing.assert_close(out[0, :, part], s + weights @ (s @ wv.T), atol=1e-5, rtol=1e-5)


def test_equation_19_mlp_on_layer_norm_with_residual() -> None:
    block, z, intra, inter = first_block()
    out = without(block, "intra", "inter")(z, intra, inter)
    torch.testing.assert_close(out, z + block.mlp(torch.nn.functional.layer_norm(z, z.shape[-1:])))


def test_each_attention_has_a_norm_in_front_and_several_heads_are_mixed_unless_the_form_is_literal() -> None:
    for config, kind in ((SMALL, torch.nn.LayerNorm), (LITERAL, torch.nn.Identity)):
        block = DualAttentionBlock(config)
        assert type(block.intra_norm) is type(block.inter_norm) is type(DualAttentionEncoder(config).out_norm) is kind
        assert type(block.intra_out) is type(block.inter_out) is (torch.nn.Linear if config.heads > 1 else torch.nn.Identity)


def test_equations_13_to_19_whole_block_literal_form() -> None:
    block, z, intra, inter = first_block()
    torch.testing.assert_close(block(z, intra, inter)[0], literal_block(block, z[0]), atol=1e-5, rtol=1e-5)


def test_equation_14_intra_attention_sees_one_frame_only() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(LITERAL, inter=False)
    encoder = DualAttentionEncoder(config)
    motion, episode = all_seen(config, 1, 4)
    before, _ = encoder(motion, episode)
    patches = motion.patches.clone()
    patches[:, 1] += 1.0
    after, _ = encoder(motion._replace(patches=patches), episode)
    changed = (after - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, True, False, False]


def test_equation_16_inter_attention_stays_in_its_part() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(LITERAL, intra=False)
    encoder = DualAttentionEncoder(config)
    motion, episode = all_seen(config, 1, 4)
    _, before = encoder(motion, episode)
    patches = motion.patches.clone()
    patches[:, 0, 1] += 1.0
    _, after = encoder(motion._replace(patches=patches), episode)
    changed = (after - before).abs().amax((0, 1, 3)) > 1e-6
    assert changed.tolist() == [False, True, False]


def test_equation_5_masked_loss_is_mean_squared_patch_error_over_masked() -> None:
    truth, rebuilt = torch.zeros(1, 2, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2, 2, 2)
    rebuilt[0, 0, 0], rebuilt[0, 1, 1], rebuilt[0, 0, 1] = 1.0, 2.0, 9.0
    masked = torch.tensor([[[True, False], [False, True]]])
    # two masked patches of 8 numbers: (8 * 1 + 8 * 4) / 2; the unmasked error of 9 does not count
    assert masked_loss(rebuilt, truth, masked).item() == pytest.approx(20.0)
    assert masked_loss(rebuilt, truth, torch.zeros_like(masked)).item() == 0.0


@pytest.mark.parametrize("config", [SMALL, LITERAL, SEVERAL, PLACED], ids=["default", "literal", "three [MAT]", "placed"])
def test_output_does_not_see_the_future(config: DAEConfig) -> None:
    torch.manual_seed(1)
    encoder = DualAttentionEncoder(config)
    motion = make_motion(config, 2, 7)
    episode = torch.zeros(2, 7, dtype=torch.long)
    before, local = encoder(motion, episode)
    later = make_motion(config, 2, 7, seed=9)
    mixed = Motion(*(torch.cat([a[:, :4], b[:, 4:]], 1) for a, b in zip(motion, later, strict=True)))
    after, local_after = encoder(mixed, episode)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    torch.testing.assert_close(local[:, :4], local_after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-4


@EACH
def test_permuting_the_parts_permutes_local_outputs_and_leaves_agg(config: DAEConfig) -> None:
    torch.manual_seed(2)
    encoder = DualAttentionEncoder(config)
    motion = make_motion(config, 2, 5)
    episode = torch.zeros(2, 5, dtype=torch.long)
    order = torch.tensor([2, 0, 1])
    agg, local = encoder(motion, episode)
    agg_permuted, local_permuted = encoder(Motion(*(x[:, :, order] for x in motion)), episode)
    torch.testing.assert_close(agg, agg_permuted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(local[:, :, order], local_permuted, atol=1e-5, rtol=1e-4)


@EACH
def test_invisible_token_influences_nothing(config: DAEConfig) -> None:
    torch.manual_seed(3)
    encoder = DualAttentionEncoder(config)
    motion = make_motion(config, 2, 6)
    episode = torch.zeros(2, 6, dtype=torch.long)
    noise = torch.randn_like(motion.patches) * (~motion.visible)[..., None, None, None] * 50
    moved = motion._replace(patches=motion.patches + noise, coords=torch.where(motion.visible[..., None], motion.coords, 0.3))
    agg, local = encoder(motion, episode)
    agg_moved, local_moved = encoder(moved, episode)
    torch.testing.assert_close(agg, agg_moved)
    torch.testing.assert_close(local[motion.visible], local_moved[motion.visible])


def test_episodes_and_tracks_do_not_mix() -> None:
    torch.manual_seed(4)
    encoder = DualAttentionEncoder(SMALL)
    motion, _ = all_seen(SMALL, 1, 6)
    episode = torch.tensor([[0, 0, 0, 1, 1, 1]])
    agg, _ = encoder(motion, episode)
    patches = motion.patches.clone()
    patches[:, :3] += 3.0
    changed, _ = encoder(motion._replace(patches=patches), episode)
    torch.testing.assert_close(agg[:, 3:], changed[:, 3:])
    # a redrawn slot: its history belongs to another track, so only [MAT] can carry it on
    config = dataclasses.replace(SMALL, mat_inter=False)
    encoder = DualAttentionEncoder(config)
    track = torch.zeros(1, 6, 3, dtype=torch.int32)
    track[:, 3:] = 1
    motion = motion._replace(track=track)
    same = torch.zeros(1, 6, dtype=torch.long)
    agg, _ = encoder(motion, same)
    changed, _ = encoder(motion._replace(patches=patches), same)
    torch.testing.assert_close(agg[:, 3:], changed[:, 3:])


@pytest.mark.parametrize("config", [SMALL, SEVERAL, PLACED, APART], ids=["one [MAT]", "three", "placed", "apart in time"])
@pytest.mark.parametrize("window", [4, 8])
def test_cached_acting_equals_whole_sequence(config: DAEConfig, window: int) -> None:
    """Up to the window the cache must equal the full pass; beyond it, the full pass over the re-encoded window."""
    torch.manual_seed(5)
    encoder = DualAttentionEncoder(config).eval()
    motion = make_motion(config, 2, 11)
    cache, outputs = encoder.start(2, torch.device("cpu")), []
    with torch.no_grad():
        for t in range(11):
            agg, cache = encoder.step(cache, Motion(*(x[:, t : t + 1] for x in motion)), window)
            outputs.append(agg)
        begin = 0
        for t in range(11):
            if t - begin == window:
                begin = t - window // 2
            part = Motion(*(x[:, begin : t + 1] for x in motion))
            full, _ = encoder(part, torch.zeros(2, t + 1 - begin, dtype=torch.long))
            torch.testing.assert_close(outputs[t], full[:, -1], atol=2e-5, rtol=1e-4)
    assert cache.motion.visible.shape[1] <= window


def test_several_mat_tokens_make_a_wider_code() -> None:
    torch.manual_seed(7)
    motion, episode = all_seen(SEVERAL, 2, 5)
    encoder = DualAttentionEncoder(SEVERAL)
    agg, local = encoder(motion, episode)
    assert agg.shape == (2, 5, 3 * 16)
    assert SEVERAL.code_dim == 48
    assert local.shape == (2, 5, 3, 16)
    rows = agg.unflatten(-1, (3, 16))
    assert (rows[:, :, 0] - rows[:, :, 1]).abs().min(-1).values.max() > 1e-4  # each reads in its own way
    narrow = DualAttentionEncoder(dataclasses.replace(SEVERAL, agg_dim=8))
    assert narrow(motion, episode)[0].shape == (2, 5, 8)
    with pytest.raises(ValueError, match="mats=0"):
        DualAttentionEncoder(dataclasses.replace(SMALL, mats=0))


def test_placed_mat_tokens_stand_where_a_part_would() -> None:
    """In cells of a grid, row by row; with equal [MAT] vectors each is that vector plus the embedding of its place."""
    torch.manual_seed(8)
    encoder = DualAttentionEncoder(PLACED)
    with torch.no_grad():
        encoder.mat.zero_()
    motion, _ = all_seen(PLACED, 1, 2)
    want = encoder.coord_embed(torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]))
    when = encoder.time_embed[:2]
    torch.testing.assert_close(encoder.tokens(motion)[0, :, :4], want + when[:, None])
    assert "places" not in encoder.state_dict()
    with pytest.raises(ValueError, match="square grid"):
        DualAttentionEncoder(dataclasses.replace(PLACED, mats=3))


@EACH
def test_one_batched_pass_equals_two(config: DAEConfig) -> None:
    torch.manual_seed(6)
    model = MaskedMotion(config)
    motion = make_motion(config, 3, 6)
    episode = torch.zeros(3, 6, dtype=torch.long)
    agg, _, loss = model(motion, episode, torch.Generator().manual_seed(3))
    masked = random_mask(motion.visible, config.mask_ratio, torch.Generator().manual_seed(3))
    torch.testing.assert_close(agg, model.encode(motion, episode)[0])
    torch.testing.assert_close(loss, masked_loss(model.reconstruct(motion, masked, episode), motion.patches, masked))


def test_masked_content_never_reaches_the_reconstruction() -> None:
    torch.manual_seed(7)
    model = MaskedMotion(SMALL)
    motion = make_motion(SMALL, 2, 6)
    episode = torch.zeros(2, 6, dtype=torch.long)
    masked = random_mask(motion.visible, 0.5, torch.Generator().manual_seed(0))
    other = motion._replace(patches=torch.where(masked[..., None, None, None], torch.tensor(7.0), motion.patches))
    torch.testing.assert_close(model.reconstruct(motion, masked, episode), model.reconstruct(other, masked, episode))


@examples(30)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.5, 0.7]))
def test_mask_has_the_right_share_and_only_visible_tokens(seed: int, ratio: float) -> None:
    g = torch.Generator().manual_seed(seed)
    visible = torch.rand(3, 8, 5, generator=g) < 0.7
    masked = random_mask(visible, ratio, g)
    assert not (masked & ~visible).any()
    expected = (visible.flatten(1).sum(1).float() * ratio).round()
    assert torch.equal(masked.flatten(1).sum(1).float(), expected)


@examples(30)
@given(st.integers(0, 10_000), st.sampled_from([1, 4, 5, 16]))
def test_crop_equals_a_loop_with_zero_padding(seed: int, patch: int) -> None:
    g = torch.Generator().manual_seed(seed)
    flow = torch.randn(2, 3, 12, 12, 2, generator=g)
    points = torch.rand(2, 3, 4, 2, generator=g) * 16 - 2
    got = crop_patches(flow, points, patch)
    padded = F.pad(flow, (0, 0, 32, 32, 32, 32))
    for b in range(2):
        for t in range(3):
            for k in range(4):
                x, y = (math.floor(float(v) + 0.5) - patch // 2 + 32 for v in points[b, t, k])
                torch.testing.assert_close(got[b, t, k], padded[b, t, y : y + patch, x : x + patch])


def test_atomic_actions_scale_and_coordinates() -> None:
    config = dataclasses.replace(SMALL, flow_scale=0.5, flow_clip=2.0)
    flow = torch.full((1, 1, 64, 64, 2), 8.0, dtype=torch.float16)
    tracks = torch.tensor([[[[31.5, 31.5], [-0.5, -0.5], [63.5, 63.5]]]])
    motion = atomic_actions(flow, tracks, torch.ones(1, 1, 3, dtype=torch.bool), torch.zeros(1, 1, 3), config)
    assert motion.patches[0, 0, 0].unique().tolist() == [4.0]  # clipped to 2 px, divided by 0.5
    torch.testing.assert_close(motion.coords[0, 0], torch.tensor([[0.0, 0.0], [-1.0, -1.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="tracks per clip"):
        atomic_actions(flow, tracks[..., :2, :], torch.ones(1, 1, 2, dtype=torch.bool), torch.zeros(1, 1, 2), config)


@pytest.mark.parametrize("switch", ["intra", "inter", "coord", "temporal"])
def test_each_ablation_changes_the_output(switch: str) -> None:
    torch.manual_seed(8)
    on = DualAttentionEncoder(SMALL)
    off = DualAttentionEncoder(dataclasses.replace(SMALL, **{switch: False}))
    off.load_state_dict(on.state_dict())
    motion = make_motion(SMALL, 2, 6)
    episode = torch.zeros(2, 6, dtype=torch.long)
    assert (on(motion, episode)[0] - off(motion, episode)[0]).abs().max() > 1e-3
