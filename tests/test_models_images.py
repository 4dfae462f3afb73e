"""Encoders, decoders, context, bonus and adapters: options, sizes, precision, and computations written out."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localmotion.config import WorldModelConfig
from localmotion.errors import ConfigError
from localmotion.models.adapters import make_adapter
from localmotion.models.bonus import IntrinsicBonus
from localmotion.models.decoders import CNNDecoder, ContextAttention, ResNetDecoder, composite
from localmotion.models.distributions import TruncatedNormal
from localmotion.models.encoders import CNNEncoder, ResidualLayer, ResNetEncoder, from_blocks, random_erasing, to_blocks
from localmotion.models.heads import MLP, actor_distribution
from localmotion.models.image import ImageModel, _piece, image_losses


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("stem", ["conv", "unshuffle"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("composite", [False, True])
def test_every_size_and_stem_comes_back_as_pixels(size: int, stem: str, norm: str, composite: bool) -> None:
    torch.manual_seed(0)
    largest = 8 if composite else 16  # finer maps are made, but never attended to
    encoder = ResNetEncoder(depth=8, image_size=size, stem=stem, norm=norm)
    decoder = ResNetDecoder(12, encoder.map_shapes, stem=stem, norm=norm, dropout=0.0, finest=largest, copy=composite)
    pixels = torch.randn(2, *((48, size // 4, size // 4) if stem == "unshuffle" else (3, size, size)))
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    embed, maps = encoder.maps(pixels)
    assert embed.shape == (2, encoder.embed_dim)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, s, s) for c, s in encoder.map_shapes]
    out = decoder(torch.randn(6, 12), maps, pixels)
    assert out.shape == (6, *pixels.shape[1:])
    out.square().mean().backward()
    attended = [m for m in decoder.modules() if isinstance(m, ContextAttention)]
    assert len(attended) == sum(s <= largest for _, s in encoder.map_shapes)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoder.parameters())
    for layer in (m for net in (encoder, decoder) for m in net.modules() if isinstance(m, (ResidualLayer, ContextAttention))):
        assert any(isinstance(m, nn.BatchNorm2d) for m in layer.modules()) == (norm == "batch")


@pytest.mark.parametrize("stem", ["conv", "unshuffle"])
def test_bf16_is_finite_and_near_fp32(stem: str) -> None:
    torch.manual_seed(0)
    encoder = ResNetEncoder(depth=8, image_size=32, stem=stem).eval()
    decoder = ResNetDecoder(12, encoder.map_shapes, stem=stem, mask=0.0, dropout=0.0).eval()
    pixels, feat = torch.rand(4, *((48, 8, 8) if stem == "unshuffle" else (3, 32, 32))) - 0.5, torch.randn(4, 12)

    def run(enabled: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            embed, maps = encoder.maps(pixels)
            return embed.float(), decoder(feat, maps).float()

    for low, high in zip(run(True), run(False), strict=True):
        assert torch.isfinite(low).all()
        assert (low - high).norm() < 0.03 * high.norm()


def test_residual_layer_by_its_equation() -> None:
    """ReLU(skip(x) + BN(conv(ReLU(BN(conv(y))))) ); the skip never sees y."""
    torch.manual_seed(0)
    layer = ResidualLayer(4, 6).eval()
    first, second = (m for m in layer.main if isinstance(m, nn.Sequential))
    for bn in (m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(bn.running_mean)  # type: ignore[arg-type]
    x, y = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    expected = torch.relu(layer.skip(x) + second(torch.relu(first(y))))
    torch.testing.assert_close(layer(x, y), expected)
    torch.testing.assert_close(layer(x), layer(x, x))
    assert all(m.bias is None for m in layer.modules() if isinstance(m, nn.Conv2d))
    plain = ResidualLayer(4, 6, "none")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert all(m.bias is not None for m in plain.modules() if isinstance(m, nn.Conv2d))


def test_context_attention_equals_the_library_attention_when_nothing_is_dropped() -> None:
    torch.manual_seed(0)
    ours = ContextAttention(8, 4, mask=0.0, dropout=0.0).eval()
    assert isinstance(ours.norm, nn.BatchNorm2d)
    nn.init.normal_(ours.query_position)
    nn.init.normal_(ours.key_position)
    x, context = torch.randn(6, 8, 4, 4), torch.randn(2, 8, 4, 4)
    query = x.flatten(2).transpose(1, 2) + ours.query_position
    key = (context.flatten(2).transpose(1, 2) + ours.key_position).repeat_interleave(3, 0)  # (B*T, hw, C)
    attended = ours.attention(query, key, key, need_weights=False)[0].transpose(1, 2).view(6, 8, 4, 4)
    torch.testing.assert_close(ours(x, context), torch.relu(x + ours.norm(attended)), atol=1e-5, rtol=1e-5)


def test_each_frame_draws_its_own_context_tokens_in_evaluation_too() -> None:
    """As in IPV's release: a new random subset per sequence and time, no train/eval switch."""
    torch.manual_seed(0)
    attention = ContextAttention(8, 8, norm="none", dropout=0.0).eval()
    x, context = torch.randn(1, 8, 8, 8).expand(5, -1, -1, -1), torch.randn(1, 8, 8, 8)
    out = attention(x, context)
    assert all(not torch.equal(out[0], other) for other in out[1:])
    assert not torch.equal(out, attention(x, context))
    whole = ContextAttention(8, 8, mask=0.0, norm="none", dropout=0.0).eval()(x, context)
    torch.testing.assert_close(whole[0], whole[1])


def test_context_attention_drops_in_training_alone() -> None:
    torch.manual_seed(0)
    attention = ContextAttention(8, 4, mask=0.0, norm="none", dropout=0.5).eval()
    x, context = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(attention(x, context), attention(x, context))
    attention.train()
    assert not torch.allclose(attention(x, context), attention(x, context))


def test_a_decoder_with_context_says_so() -> None:
    encoder = ResNetEncoder(depth=8, image_size=32)
    with pytest.raises(ValueError, match="needs context maps"):
        ResNetDecoder(4, encoder.map_shapes)(torch.randn(1, 4))
    assert ResNetDecoder(4, encoder.map_shapes, context=False)(torch.randn(2, 4)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("stem", ["conv", "unshuffle"])
def test_composite_adds_the_context_frame_where_the_mask_says_so(stem: str) -> None:
    """Mask near 1 above the diagonal of pixels, near 0 below: the context is added there alone, to all colours of the right pixel."""
    torch.manual_seed(0)
    encoder = ResNetEncoder(depth=8, image_size=16, stem=stem)
    decoder = ResNetDecoder(4, encoder.map_shapes, stem=stem, copy=True)
    copied = torch.triu(torch.ones(16, 16))
    seen, drawn = torch.rand(2, 16, 16, 3) - 0.5, torch.rand(6, 16, 16, 3) - 0.5
    logit = (copied * 2 - 1).mul(50.0).expand(6, 16, 16)
    if stem == "unshuffle":
        blocks = to_blocks(logit[..., None].expand(-1, -1, -1, 3))[:, ::3]  # (6, 16, 4, 4): one value a pixel
        mixed = from_blocks(composite(torch.cat([to_blocks(drawn), blocks], 1), to_blocks(seen)))
    else:
        mixed = composite(torch.cat([drawn, logit[..., None]], -1).permute(0, 3, 1, 2), seen.permute(0, 3, 1, 2))
    expected = (drawn + copied[..., None] * seen.repeat_interleave(3, 0)).permute(0, 3, 1, 2)
    torch.testing.assert_close(mixed, expected)
    with pytest.raises(ValueError, match="pixels"):
        decoder(torch.randn(2, 4), encoder.maps(to_blocks(seen) if stem == "unshuffle" else seen.permute(0, 3, 1, 2))[1])


@pytest.mark.parametrize("depth", [2, 5])
def test_plain_cnns_have_the_depth_of_the_settings(depth: int) -> None:
    model = ImageModel(WorldModelConfig(encoder="cnn", context=False, depth=depth), image_size=64)
    assert model.embed_dim == 8 * depth * 2 * 2
    assert next(model.encoder.parameters()).shape == (depth, 3, 4, 4)
    assert [m.in_channels for m in model.decoder.modules() if isinstance(m, nn.ConvTranspose2d)] == [
        32 * depth,
        4 * depth,
        2 * depth,
        depth,
    ]


def test_several_sequences_at_once_have_the_errors_of_each() -> None:
    """On a GPU all sequences are one piece, on a CPU each is one."""
    torch.manual_seed(0)
    rows, wanted, source = torch.randn(6, 4, 4, 8), torch.randn(6, 4, 4, 6), torch.randn(2, 6, 4, 4)
    whole, parts = torch.zeros_like(rows), torch.zeros_like(rows)
    found = _piece(rows, wanted, source, whole, 0.5)
    each = [_piece(rows[i : i + 3], wanted[i : i + 3], source[i // 3 : i // 3 + 1], parts[i : i + 3], 0.5) for i in (0, 3)]
    torch.testing.assert_close(found, torch.stack(each).sum())
    torch.testing.assert_close(whole, parts)


def test_plain_cnn_shapes() -> None:
    """DreamerV2's CNN, as in IPV's release."""
    encoder = CNNEncoder(depth=8)
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, encoder.embed_dim) == (2, 8 * 8 * 2 * 2)
    assert CNNDecoder(10, depth=8)(torch.randn(2, 10)).shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="64x64"):
        CNNDecoder(10, image_size=32)
    with pytest.raises(ValueError, match="64x64"):
        ImageModel(WorldModelConfig(encoder="cnn", context=False), image_size=128)
    with pytest.raises(ConfigError, match=r"world\.encoder=cnn has no context frame: add world\.context=false"):
        ImageModel(WorldModelConfig(encoder="cnn"), image_size=64)


def test_erasing_is_a_rectangle_and_its_generator_decides() -> None:
    frame = torch.full((64, 32, 32, 3), 9, dtype=torch.uint8)
    out = random_erasing(frame, generator=torch.Generator().manual_seed(3))
    assert torch.equal(out, random_erasing(frame, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(frame, torch.full_like(frame, 9))  # not in place
    for picture in out:
        hit = picture[..., 0] == 128
        assert torch.equal(picture[hit], torch.full_like(picture[hit], 128))
        assert torch.equal(hit, hit.any(1)[:, None] & hit.any(0)[None, :])  # an outer product: a rectangle
    assert torch.equal(random_erasing(frame, probability=0.0), frame)
    assert ((random_erasing(frame, probability=1.0) == 128).flatten(1).any(1)).all()


@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24)])
def test_what_is_erased_by_the_rule(height: int, width: int) -> None:
    """Tall and wide rectangles from the same numbers by the rule of IPV's release, in a picture that is not square."""
    out = random_erasing(torch.zeros(200, height, width, 3, dtype=torch.uint8), 0.7, torch.Generator().manual_seed(1))
    for picture, numbers in zip(out, torch.rand(200, 6, generator=torch.Generator().manual_seed(1)).tolist(), strict=True):
        kind, shape, size, down, right, whether = numbers
        ratio = 0.3 + 0.7 * shape if kind < 0.5 else 1 + 2.3 * shape
        area = (0.02 + 0.31 * size) * height * width
        tall, wide = min(math.sqrt(area * ratio), height), min(math.sqrt(area / ratio), width)
        top, left = down * (height - tall), right * (width - wide)
        expected = torch.zeros(height, width, dtype=torch.uint8)
        if whether < 0.7:
            expected[math.ceil(top) : math.ceil(top + tall), math.ceil(left) : math.ceil(left + wide)] = 128
        assert torch.equal(picture, expected[..., None].expand(-1, -1, 3))


def test_heads_start_as_the_spec_says() -> None:
    """Xavier-uniform weights, zero biases, as in IPV's release."""
    torch.manual_seed(0)
    head = MLP(50, 3, units=40, layers=2)
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 3
    assert [m.out_features for m in MLP(50, 3, layers=0).modules() if isinstance(m, nn.Linear)] == [3]
    for layer in linears:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() == 0


def test_actor_distribution_ranges() -> None:
    dist = actor_distribution(torch.tensor([[0.0, -50.0, 50.0, 0.0, -50.0, 50.0]]))
    torch.testing.assert_close(dist.mean, torch.tensor([[0.0, -1.0, 1.0]]))
    torch.testing.assert_close(dist.std, torch.tensor([[1.1, 0.1, 2.1]]))
    several = actor_distribution(torch.randn(2, 3, 8))
    assert several.mean.shape == several.rsample().shape == (2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        low = actor_distribution(torch.randn(4, 6).bfloat16())
        assert low.rsample().dtype == low.entropy().dtype == torch.float32


def test_truncated_normal_extremes_are_finite_with_gradients() -> None:
    out = torch.tensor([[-80.0, 80.0, 0.0, -80.0, -80.0, 80.0]], requires_grad=True)  # means at the ends, narrow and wide
    dist = actor_distribution(out.expand(500, -1))
    sample = dist.rsample(torch.Generator().manual_seed(0))
    loss = sample.sum() + dist.entropy().sum() + dist.log_prob(sample.detach()).sum()
    loss.backward()
    assert sample.abs().max() < 1
    assert torch.equal(sample, dist.rsample(torch.Generator().manual_seed(0)))
    assert out.grad is not None
    assert torch.isfinite(out.grad).all()
    for extreme in (0.0, 1.0):
        with mock.patch("torch.rand", lambda shape, value=extreme, **options: torch.full(shape, value)):
            assert torch.isfinite(TruncatedNormal(torch.zeros(3), torch.full((3,), 1e-2)).rsample()).all()
    for end in (-1.0, 1.0):  # both clips: a sample at an end would have an infinite density in the next layer's inverse
        at_end = TruncatedNormal(torch.full((9,), end), torch.full((9,), 1e-7)).rsample()
        assert float(at_end.detach().abs().max()) <= 1 - 0.9e-6
    wide = TruncatedNormal(torch.zeros(1), torch.full((1,), 1e3))
    assert wide.entropy().item() == pytest.approx(math.log(2), abs=1e-4)  # the uniform distribution on [-1, 1]


def alike_windows() -> Tensor:
    """Features whose windows lie close together far from the origin, as those of one slow scene do."""
    g = torch.Generator().manual_seed(0)
    return 4 * torch.randn(1, 1, 32, generator=g) + 0.05 * torch.randn(4, 20, 32, generator=g)


@pytest.mark.parametrize("bf16", [False, True])
def test_bonus_resolves_windows_that_are_close(bf16: bool) -> None:
    torch.manual_seed(0)
    bonus, feat = IntrinsicBonus(32, neighbours=4), alike_windows()
    means = torch.stack([feat[:, t : t + 5].double().mean(1) for t in range(16)], 1).flatten(0, 1)
    points = means @ bonus.projection.double()
    raw = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, :4].mean(1)
    expected = raw / (0.99 + 0.01 * raw.mean())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = bonus(feat)
    torch.testing.assert_close(found.flatten().double(), expected, atol=0, rtol=0.02)


def test_bonus_queue_holds_the_newest_first_and_forgets_the_oldest() -> None:
    torch.manual_seed(0)
    bonus = IntrinsicBonus(3, window=1, size=10, neighbours=2)
    batches = [torch.randn(1, 4, 3) for _ in range(4)]
    for index, batch in enumerate(batches):
        bonus(batch)
        assert int(bonus.filled) == min(4 * (index + 1), 10)
    expected = torch.cat([b[0] for b in batches[::-1]])[:10] @ bonus.projection
    torch.testing.assert_close(bonus.queue, expected, atol=1e-5, rtol=1e-4)


def test_bonus_is_resumed_from_its_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bonus = IntrinsicBonus(6, size=64)
    for _ in range(3):
        bonus(torch.randn(2, 9, 6))
    save_file(bonus.state_dict(), tmp_path / "bonus.safetensors")
    other = IntrinsicBonus(6, size=64)
    other.load_state_dict(load_file(tmp_path / "bonus.safetensors"))
    following = torch.randn(2, 9, 6, requires_grad=True)
    expected = copy.deepcopy(bonus)(following)
    assert torch.equal(other(following), expected)
    assert not expected.requires_grad
    assert not list(bonus.parameters())  # nothing to train


def test_adapter_is_attention_over_parts_once_the_gate_opens() -> None:
    torch.manual_seed(0)
    adapter = make_adapter("attention", deter=32, stoch=4, classes=4, out_dim=10)
    feat = torch.randn(5, 7, 48)
    closed = adapter(feat)
    with torch.no_grad():
        adapter.gate += 1.0  # type: ignore[operator]
    opened = adapter(feat)
    assert not torch.allclose(opened, closed)
    torch.testing.assert_close(opened[2, 3], adapter(feat[2, 3]), atol=1e-5, rtol=1e-4)  # rows are independent
    opened.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(adapter(feat)).all()


def test_adapter_names() -> None:
    with pytest.raises(ConfigError, match="unknown adapter 'atention'; did you mean attention"):
        make_adapter("atention", deter=32, stoch=4, classes=4, out_dim=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 64])
def test_image_losses_equal_their_definition_and_autograd(dtype: torch.dtype, channels: int) -> None:
    """Two stacked decodings of 3 sequences of 4 pictures: half the summed squared error a picture, and its gradient, composite included."""
    torch.manual_seed(0)
    groups, batch, time, colours = 2, 3, 4, 3 * channels // 4
    x = (
        torch.randn(groups * batch * time, channels, 8, 8)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    source = torch.randn(groups * batch, colours, 8, 8)
    truth = torch.randn(batch * time, colours, 8, 8)
    weights = torch.tensor([1.0, 2.0])
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    for copied in (True, False):
        given = x if copied else x[:, :colours].detach().requires_grad_()
        losses = image_losses(given, truth, source if copied else None)
        (gradient,) = torch.autograd.grad((losses * weights).sum(), given)
        picture = composite(given, source) if copied else given
        expected = [0.5 * (part.float() - truth).square().sum() / len(truth) for part in picture.chunk(groups)]
        (wanted,) = torch.autograd.grad((torch.stack(expected) * weights).sum(), given)
        torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gradient, wanted, **tolerance)
        assert gradient.dtype == dtype
