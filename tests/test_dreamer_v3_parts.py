"""The pieces of DreamerV3 against numbers computed apart: values of any scale, returns, layers, latents, policies."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dreamer_v3_parity as parity
from localmotion.errors import ConfigError
from localmotion.models import blocks
from localmotion.models.blocks import BlockLinear, NormMLP, NormSiLU
from localmotion.models.observations import (
    ImageDecoder,
    ImageEncoder,
    ObservationModel,
    UpConv,
    from_patches,
    pixel_loss,
    pool,
    shapes,
    to_patches,
)
from localmotion.models.policies import BoundedNormal, OneHotPolicy
from localmotion.models.rssm_block import BlockRSSM, State, kl_losses
from localmotion.models.values import ReturnRange, TwoHot, bootstrapped_return, follow, symexp, symexp_bins, symlog
from property_examples import examples

# 1. Numbers of any scale ------------------------------------------------------------------------------------------------------


def test_symlog_by_hand() -> None:
    x = torch.tensor([-(np.e**2 - 1), -1.0, 0.0, np.e - 1, 1e6])
    assert symlog(x).tolist() == pytest.approx([-2.0, -np.log(2), 0.0, 1.0, np.log(1e6 + 1)], rel=1e-6)
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-5, atol=1e-6)


def test_bins_are_symmetric_and_reach_twenty() -> None:
    bins = symexp_bins(255)
    assert torch.equal(bins, -bins.flip(0))
    assert bins[127] == 0
    want = np.sign(np.linspace(-20, 20, 255)) * (np.exp(np.abs(np.linspace(-20, 20, 255))) - 1)
    np.testing.assert_allclose(bins.numpy(), want, rtol=1e-5, atol=1e-6)
    assert symexp_bins(3).tolist() == [bins[0], 0.0, bins[-1]]
    for count in (254, 2, 1):
        with pytest.raises(ValueError, match="odd"):
            symexp_bins(count)


def numpy_two_hot(logits: np.ndarray, target: float, bins: np.ndarray) -> float:
    """Cross-entropy with the two-hot vector of ``target``, written out."""
    log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    below = max(int((bins <= target).sum()) - 1, 0)
    above = min(below + 1, len(bins) - 1)
    vector = np.zeros(len(bins))
    if target <= bins[0] or target >= bins[-1]:
        vector[0 if target <= bins[0] else -1] = 1
    else:
        share = (target - bins[below]) / (bins[above] - bins[below])
        vector[below], vector[above] = 1 - share, share
    return float(-(vector * log_probs).sum())


@examples(60)
@given(st.floats(-6e8, 6e8, width=32), st.integers(0, 3))
def test_two_hot_loss_and_its_gradient(target: float, seed: int) -> None:
    bins = symexp_bins(255)
    logits = torch.from_numpy(np.random.RandomState(seed).standard_normal(255)).float().requires_grad_()
    loss = TwoHot(logits, bins).loss(torch.tensor(target))
    want = numpy_two_hot(logits.detach().double().numpy(), target, bins.double().numpy())
    assert float(loss.detach()) == pytest.approx(want, rel=1e-4)
    (grad,) = torch.autograd.grad(loss, logits)
    hot = torch.softmax(logits.detach(), -1) - grad  # cross-entropy's gradient is softmax - target
    assert int((hot > 1e-4).sum()) <= 2
    inside = float(torch.tensor(target).clamp(bins[0], bins[-1]))
    assert float((hot.double() * bins.double())[hot > 1e-4].sum()) == pytest.approx(
        inside, rel=3e-3, abs=1e-2 + 1e-3 * abs(inside)
    )


def test_two_hot_prediction_is_the_mean_and_exactly_zero_at_first() -> None:
    bins = symexp_bins(255)
    assert TwoHot(torch.zeros(4, 255), bins).pred().tolist() == [0.0] * 4
    logits = torch.from_numpy(np.random.RandomState(0).standard_normal((3, 255)) - 0.3 * np.abs(np.arange(255) - 127)).float()
    probs = np.exp(logits.double().numpy())
    probs /= probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(TwoHot(logits, bins).pred().numpy(), (probs * bins.double().numpy()).sum(-1), rtol=1e-4)


def test_a_target_that_is_no_number_shows() -> None:
    assert torch.isnan(TwoHot(torch.zeros(255), symexp_bins()).loss(torch.tensor(float("nan"))))


def test_returns_by_hand() -> None:
    """Four positions; the third is the last of its episode, the fourth terminal."""
    reward, value = [9.0, 1.0, 2.0, 3.0, 4.0], [9.0, 10.0, 20.0, 30.0, 40.0]
    last, terminal = [0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.25]
    d, lam = 0.9, 0.8
    r3 = 4 + 0.75 * d * ((1 - lam) * 40 + lam * 40)
    r2 = 3 + 0 * r3
    r1 = 2 + d * 20  # what follows is of another episode: all of it is the value's
    r0 = 1 + d * ((1 - lam) * 10 + lam * r1)
    columns = [torch.tensor(x) for x in (last, terminal, reward, value)]
    found = bootstrapped_return(*columns, discount=d, lambda_=lam)  # type: ignore[misc]
    assert found.tolist() == pytest.approx([r0, r1, r2, r3])


def test_return_range_follows_percentiles() -> None:
    found = ReturnRange(rate=0.01, limit=1.0)
    low = high = 0.0
    for seed in range(5):
        returns = 100 * np.random.RandomState(seed).standard_normal((7, 30)).astype(np.float32)
        low = 0.99 * low + 0.01 * np.percentile(returns, 5)
        high = 0.99 * high + 0.01 * np.percentile(returns, 95)
        offset, scale = found(torch.from_numpy(returns))
        assert float(offset) == pytest.approx(low, rel=1e-4)
        assert float(scale) == pytest.approx(max(1.0, high - low), rel=1e-4)
    assert float(scale) > 1
    found.eval()
    assert [float(x) for x in found(torch.full((9,), 1e9))] == pytest.approx([low, high - low], rel=1e-4)
    found.train()(torch.tensor([1.0, float("nan")]))
    assert float(found.low) == pytest.approx(low, rel=1e-4)
    assert float(ReturnRange()(torch.tensor([0.1, 0.2]))[1]) == 1.0


def test_follow_moves_by_a_share() -> None:
    slow, fast = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = {k: 0.98 * v.detach() + 0.02 * dict(fast.named_parameters())[k].detach() for k, v in slow.named_parameters()}
    follow(slow, fast, 0.02)
    for key, value in slow.named_parameters():
        torch.testing.assert_close(value.detach(), want[key])


# 2. Layers, latents, policies -------------------------------------------------------------------------------------------------


def test_norm_silu_is_rms_norm_then_silu() -> None:
    torch.manual_seed(0)
    layer = NormSiLU(6)
    layer.scale.data.normal_()
    x = (3 * torch.randn(2, 4, 6)).requires_grad_()
    other = x.detach().clone().requires_grad_()
    scale = layer.scale.detach().clone().requires_grad_()
    weight = torch.randn(2, 4, 6)
    ours, theirs = layer(x), F.silu(F.rms_norm(other, (6,), scale, 1e-4))
    torch.testing.assert_close(ours, theirs)
    for mine, want in zip(
        torch.autograd.grad((ours * weight).sum(), [x, layer.scale]),
        torch.autograd.grad((theirs * weight).sum(), [other, scale]),
        strict=True,
    ):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


def test_large_maps_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that do not divide the rows change nothing."""
    torch.manual_seed(0)
    layer = NormSiLU(5)
    x = torch.randn(4, 13, 5, requires_grad=True)
    whole = layer(x)
    grads = torch.autograd.grad(whole.sin().sum(), [x, layer.scale])
    monkeypatch.setattr(blocks, "CHUNK", 37)
    pieces = layer(x)
    torch.testing.assert_close(pieces, whole)
    for mine, want in zip(torch.autograd.grad(pieces.sin().sum(), [x, layer.scale]), grads, strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pool_is_torchs_with_its_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of few steps, so that many corners are equal: the first of them has the gradient. Pieces do not divide the batch."""
    monkeypatch.setattr(blocks, "CHUNK", 4 * 6 * 3 // 2 + 1)
    torch.manual_seed(0)
    x = ((2 * torch.randn(5, 8, 12, 3)).round() / 2 + 0.0).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = F.max_pool2d(theirs.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    found = pool(ours)
    assert type(found.grad_fn).__name__ == "_PoolCornersBackward"  # the faster way
    assert torch.equal(found, want)
    grad = torch.randn(5, 4, 6, 3).to(dtype)
    found.backward(grad)
    want.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)
    with torch.no_grad():
        assert torch.equal(pool(x), want)
    ours.grad = None
    pool(ours[..., ::2]).sum().backward()  # not contiguous
    assert ours.grad.sum() == 5 * 4 * 6 * 2
    assert not ours.grad[..., 1].any()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what is compiled is torch's own, as on a GPU
    with mock.patch.object(F, "max_pool2d", wraps=F.max_pool2d) as torchs:
        assert torch.equal(pool(x), want)
    torchs.assert_called_once()


def test_pieces_are_for_the_caches_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.empty(10, 3, blocks.CHUNK)
    assert blocks.spans(x, times=4) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8), slice(8, 10)]
    assert blocks.spans(x, 1, times=10) == [slice(0, 2), slice(2, 4)]
    assert blocks.spans(x) == [slice(n, n + 1) for n in range(10)]  # never less than one
    assert blocks.spans(torch.empty(0, 3)) == []
    assert blocks.spans(x.to("meta")) == [slice(0, 10)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert blocks.spans(x) == [slice(0, 10)]


def test_norm_silu_is_computed_in_fp32_whatever_it_is_given() -> None:
    torch.manual_seed(0)
    layer = NormSiLU(64)
    x = (3 * torch.randn(50, 64)).bfloat16()
    found, exact = layer(x), layer(x.float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_gates_in_pieces_are_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imagination in low precision takes another way to the same numbers; pieces do not divide the batch."""
    monkeypatch.setattr(blocks, "CHUNK", 3 * 24)
    torch.manual_seed(0)
    rssm = BlockRSSM(embed_dim=3, action_dim=2, deter=8, hidden=4, stoch=2, classes=3, blocks=4)
    rssm.gru.bias.data.normal_()
    parts, deter = 2 * torch.randn(4, 17, 6), torch.randn(17, 8)
    bias = rssm._in_blocks(rssm.gru.bias.unsqueeze(0))
    with torch.no_grad():
        torch.testing.assert_close(
            rssm._gates_in_pieces(parts, bias, deter), rssm._gates(parts + bias, deter), rtol=1e-6, atol=1e-6
        )
        assert rssm._gates_in_pieces(parts.bfloat16(), bias, deter.bfloat16()).dtype == torch.float32


def test_block_linear_keeps_blocks_apart() -> None:
    torch.manual_seed(0)
    layer = BlockLinear(6, 4, 2)
    layer.bias.data.normal_()
    x = torch.randn(3, 6)
    kernel, bias = layer.kernel.detach().numpy(), layer.bias.detach().numpy()
    want = np.concatenate([x[:, :3].numpy() @ kernel[0], x[:, 3:].numpy() @ kernel[1]], -1) + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="blocks"):
        BlockLinear(6, 4, 3)


def test_initial_weights_have_the_reference_deviation() -> None:
    torch.manual_seed(0)
    layer = BlockLinear(256, 512, 8)
    assert float(layer.kernel.detach().std()) == pytest.approx(256**-0.5, rel=0.02)  # all inputs count, not a block's 32
    assert float(layer.kernel.detach().abs().max()) <= 2 * 1.1368 * 256**-0.5
    net = NormMLP(64, 3, units=128, layers=2, outscale=0.0)
    assert all(not p.any() for p in net[-1].parameters())
    assert float(net[0].weight.detach().std()) == pytest.approx(64**-0.5, rel=0.03)
    whole = NormMLP(64, 256, units=128, layers=1)
    assert float(whole[-1].weight.detach().std()) == pytest.approx(128**-0.5, rel=0.03)


def test_up_convolution_equals_doubling_and_convolving() -> None:
    torch.manual_seed(0)
    layer = UpConv(3, 2)
    layer.bias.data.normal_()
    x = torch.randn(2, 4, 6, 3, requires_grad=True)
    ours = from_patches(layer(x), 2)
    doubled = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    theirs = F.conv2d(doubled, layer.weight, layer.bias, padding=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(ours)
    for mine, want in zip(
        torch.autograd.grad((ours * weight).sum(), [x, layer.weight, layer.bias]),
        torch.autograd.grad((theirs * weight).sum(), [x, layer.weight, layer.bias]),
        strict=True,
    ):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stem", ["pool", "blocks"])
def test_decoder_draws_in_the_layout_of_the_truth(stem: Any) -> None:
    torch.manual_seed(0)
    decoder = ImageDecoder(16, 8, stem=stem, depth=2, units=4, blocks=4, image_size=64)
    encoder = ImageEncoder(stem=stem, depth=2, image_size=64)
    image = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    assert encoder(image).shape == (3, encoder.embed_dim)
    logits = decoder(torch.randn(3, 16), torch.randn(3, 8))
    assert logits.shape == decoder.patches(image).shape
    pictures = decoder.picture(logits)
    want = (pictures - image / 255).square().sum((1, 2, 3))
    torch.testing.assert_close(pixel_loss(logits, decoder.patches(image)), want, rtol=1e-4, atol=1e-3)
    assert torch.equal(from_patches(to_patches(image, 4), 4), image)


def test_sizes_of_pictures_are_those_of_the_reference() -> None:
    assert shapes("pool", 3, 48) == ([6, 9, 12, 12], 3)
    assert shapes("pool", 3, 256) == ([6, 9, 12, 12], 16)
    assert shapes("blocks", 3, 32) == ([12, 12], 2)
    for stem, size in (("pool", 32), ("blocks", 16), ("pool", 272), ("pool", 56)):
        with pytest.raises(ConfigError, match=f"image_size={size}.*multiples of 16 from {32 if stem == 'blocks' else 48} to 256"):
            shapes(stem, 3, size)


def test_pictures_have_colours_first() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"deter": 16, "latent": 8, "stem": "pool", "depth": 2, "units": 4, "blocks": 4}
    model = ObservationModel(image_size=64, vector_dim=0, **sizes)
    feat = torch.randn(2, 3, 24)
    found = model.pictures(feat)
    assert found.shape == (2, 3, 3, 64, 64)
    decoder = model.image_decoder
    assert decoder is not None
    one = decoder.picture(decoder(feat[1, 2:, :16], feat[1, 2:, 16:]))[0]
    torch.testing.assert_close(found[1, 2], one.permute(2, 0, 1))
    with pytest.raises(ConfigError, match="cannot draw"):
        ObservationModel(image_size=0, vector_dim=3, **sizes).pictures(feat)


def test_pixel_loss_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 2, 12, requires_grad=True)
    truth = torch.randint(0, 256, (2, 2, 2, 12), dtype=torch.uint8)
    weight = torch.tensor([1.0, -3.0])
    (mine,) = torch.autograd.grad((pixel_loss(logits, truth) * weight).sum(), logits)
    formula = (torch.sigmoid(logits) - truth / 255).square().sum((1, 2, 3))
    (want,) = torch.autograd.grad((formula * weight).sum(), logits)
    torch.testing.assert_close(mine, want)


def rssm(**options: Any) -> BlockRSSM:
    torch.manual_seed(0)
    values: dict[str, Any] = {"embed_dim": 7, "action_dim": 3, "deter": 12, "hidden": 6, "stoch": 3, "classes": 4, "blocks": 2}
    out = BlockRSSM(**{**values, **options})
    for parameter in out.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return out


def test_block_gru_written_out() -> None:
    """One step in numpy, block by block: layers of state, latent and clipped action, core, gates."""
    model = rssm()
    p = {key: value.detach().double().numpy() for key, value in model.named_parameters()}
    stoch, deter = np.eye(4)[[1, 3, 0]].reshape(-1), np.random.RandomState(1).standard_normal(12)
    action = np.array([0.5, -4.0, 2.0])

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        y = x / np.sqrt((x**2).mean() + 1e-4) * scale
        return y / (1 + np.exp(-y))

    inputs = []
    for index, (name, x) in enumerate([("deter", deter), ("stoch", stoch), ("action", np.array([0.5, -1.0, 1.0]))]):
        out = p[f"in_{name}.weight"] @ x + p[f"in_{name}.bias"]
        inputs.append(norm(out, p[f"in_norms.{index}.scale"]))
    shared = np.concatenate(inputs)
    core = [np.concatenate([deter[6 * g : 6 * g + 6], shared]) @ p["core.kernel"][g] for g in range(2)]
    hidden = norm(np.concatenate(core) + p["core.bias"], p["core_norm.scale"])
    new = np.zeros(12)
    for g in range(2):
        parts = hidden[6 * g : 6 * g + 6] @ p["gru.kernel"][g] + p["gru.bias"][18 * g : 18 * g + 18]
        reset, cand, gate = parts[:6], parts[6:12], parts[12:]
        sigmoid = [1 / (1 + np.exp(-x)) for x in (reset, gate - 1)]
        new[6 * g : 6 * g + 6] = sigmoid[1] * np.tanh(sigmoid[0] * cand) + (1 - sigmoid[1]) * deter[6 * g : 6 * g + 6]
    state = State(torch.zeros(1, 3, 4), torch.tensor(stoch).float().view(1, 3, 4), torch.tensor(deter).float()[None])
    found = model.img_step(state, torch.tensor(action).float()[None], sample=False)
    np.testing.assert_allclose(found.deter[0].detach().numpy(), new, rtol=1e-4, atol=1e-5)


def test_latents_carry_a_share_of_the_uniform_distribution() -> None:
    logits = rssm(unimix=0.2)._logits(torch.tensor([[50.0, 0, 0, 0] * 3]))
    np.testing.assert_allclose(logits.exp()[0, 0].numpy(), [0.85, 0.05, 0.05, 0.05], rtol=1e-5)


def test_kl_and_free_nats_by_numbers() -> None:
    state = np.random.RandomState(0)
    post, prior = (np.log(state.dirichlet(np.ones(4), (5, 3))) for _ in range(2))
    post[0] = prior[0]  # below the free nats
    kl = (np.exp(post) * (post - prior)).sum((-2, -1))
    a, b = (torch.from_numpy(x).float().requires_grad_() for x in (post, prior))
    dyn, rep = kl_losses(a, b, 1.0)
    for found in (dyn, rep):
        np.testing.assert_allclose(found.detach().numpy(), np.maximum(kl, 1.0), rtol=1e-4)
    (to_prior,) = torch.autograd.grad(dyn.sum(), b)
    (to_post,) = torch.autograd.grad(rep.sum(), a)
    for grad in (to_prior, to_post):
        assert not grad[torch.from_numpy(kl < 1)].any()
        assert grad[torch.from_numpy(kl > 1)].any()
    assert torch.autograd.grad(kl_losses(a, b)[0].sum(), a, allow_unused=True)[0] is None
    assert torch.equal(kl_losses(a, b)[0], dyn)  # one nat by default


def sequence(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(3, 6, dtype=torch.bool)
    is_first[:, 0] = is_first[1, 3] = True
    return torch.randn(3, 6, 7, generator=g), 2 * torch.randn(3, 6, 3, generator=g), is_first


def test_observe_equals_its_steps_in_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rssm()
    embed, action, is_first = sequence()
    parity.fix_noise(monkeypatch)
    weights = [torch.randn(3, 6, 3, 4), torch.randn(3, 6, 12)]

    def score(logits: Tensor, stoch: Tensor, deter: Tensor, prior: Tensor) -> Tensor:
        return ((logits + 2 * stoch + prior) * weights[0]).sum() + (deter * weights[1]).sum()

    post, prior = model.observe(embed, action, is_first)
    ours = torch.autograd.grad(score(*post, prior), list(model.parameters()))
    state, rows = model.initial(3), []
    for t in range(6):
        state = model.obs_step(state, action[:, t], embed[:, t], is_first[:, t])
        rows.append((*state, model.prior(state.deter)))
    stacked = [torch.stack(x, 1) for x in zip(*rows, strict=True)]
    for mine, step in zip((*post, prior), stacked, strict=True):
        torch.testing.assert_close(mine, step, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(score(*stacked), list(model.parameters()))
    for (name, _), mine, step in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(mine, step, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_observe_without_a_gradient_gives_the_same_numbers() -> None:
    model = rssm()
    embed, action, is_first = sequence()
    kept, kept_prior = model.observe(embed, action, is_first, sample=False)
    with torch.no_grad():
        plain, plain_prior = model.observe(embed, action, is_first, sample=False)
    assert kept.deter.requires_grad
    assert not plain.deter.requires_grad
    for one, other in zip((*kept, kept_prior), (*plain, plain_prior), strict=True):
        torch.testing.assert_close(one, other)


def test_observing_on_a_device_does_not_wait_for_it() -> None:
    """On `meta`, where there is no value to wait for, all of it can be launched."""
    embed, action, is_first = (x.to("meta") for x in sequence())
    post, prior = rssm().to("meta").observe(embed, action, is_first)
    assert post.deter.shape == (3, 6, 12)
    assert prior.device.type == "meta"


def test_bf16_keeps_the_state_in_fp32_and_the_gradient_close() -> None:
    """Products are bf16; state and log-probabilities are not, and the steps of imagination take weights that were cast once."""
    model = rssm(deter=64, hidden=32)
    embed, action, is_first = sequence()

    def run(enabled: bool) -> tuple[State, State, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            post, prior = model.observe(embed, action, is_first, sample=False)
            loss = prior.square().mean() + post.logits.square().mean()
            with torch.no_grad():
                ahead = model.imagine(State(*(x[:, -1].detach() for x in post)), action, sample=False)
        return post, ahead, list(torch.autograd.grad(loss, list(model.parameters())))

    exact, rounded = run(False), run(True)
    assert {x.dtype for x in (*rounded[0], *rounded[1])} == {torch.float32}
    torch.testing.assert_close(rounded[0].deter, exact[0].deter, atol=0.03, rtol=0)
    torch.testing.assert_close(rounded[1].deter[:, 0], exact[1].deter[:, 0], atol=0.03, rtol=0)
    assert not torch.equal(rounded[1].deter, exact[1].deter)
    for low, high, (name, parameter) in zip(rounded[2], exact[2], model.named_parameters(), strict=True):
        assert low.dtype == parameter.dtype
        error = ((low - high).norm() / high.norm().clamp(min=1e-8)).item()
        assert error < 0.05, (name, error)
    for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert {x.dtype for x in model.weights()} == {dtype}


def test_the_first_state_is_nothing_for_every_sequence() -> None:
    logits, stoch, deter = rssm().initial(5)
    assert logits.shape == stoch.shape == (5, 3, 4)
    assert deter.shape == (5, 12)
    assert not logits.any()
    assert not stoch.any()
    assert not deter.any()


def test_latents_are_drawn_unless_the_likeliest_are_asked_for() -> None:
    model = rssm()
    embed, action, is_first = (x.repeat(40, *[1] * (x.ndim - 1)) for x in sequence())
    start = model.initial(len(embed))
    one = (embed[:, 0], is_first[:, 0])
    pairs = [
        (model.observe(embed, action, is_first)[0], model.observe(embed, action, is_first, sample=False)[0]),
        (model.obs_step(start, action[:, 0], *one), model.obs_step(start, action[:, 0], *one, sample=False)),
        (model.img_step(start, action[:, 0]), model.img_step(start, action[:, 0], sample=False)),
        (model.imagine(start, action), model.imagine(start, action, sample=False)),
    ]
    for drawn, likeliest in pairs:
        assert torch.equal(likeliest.stoch.argmax(-1), likeliest.logits.argmax(-1))
        assert not torch.equal(drawn.stoch.argmax(-1), drawn.logits.argmax(-1))


def test_a_generator_decides_every_latent() -> None:
    model = rssm()
    embed, action, is_first = sequence()

    def run(seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        post, _ = model.observe(embed, action, is_first, generator=g)
        return torch.cat([post.stoch, model.imagine(State(*(x[:, -1] for x in post)), action, generator=g).stoch], 1)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_bounded_normal_is_a_normal() -> None:
    torch.manual_seed(0)
    out = 3 * torch.randn(5, 4)
    policy = BoundedNormal(out)
    std = 0.9 * torch.sigmoid(out[:, 2:] + 2) + 0.1
    theirs = torch.distributions.Independent(torch.distributions.Normal(torch.tanh(out[:, :2]), std), 1)
    action = 2 * torch.randn(5, 2)
    torch.testing.assert_close(policy.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(policy.entropy(), theirs.entropy())
    assert torch.equal(policy.mode, torch.tanh(out[:, :2]))
    many = BoundedNormal(out[:1].expand(20_000, -1)).sample()
    torch.testing.assert_close(many.mean(0), policy.mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(many.std(0), std[0], atol=0.03, rtol=0)
    one, again, other = (policy.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    extremes = BoundedNormal(torch.tensor([[0.0, -100.0], [0.0, 100.0]])).randomness()
    assert extremes.tolist() == pytest.approx([0.0, 1.0])


def test_one_hot_policy_is_a_categorical() -> None:
    torch.manual_seed(0)
    out = torch.randn(5, 4)
    policy, theirs = OneHotPolicy(out), torch.distributions.Categorical(logits=out)
    action = policy.sample()
    torch.testing.assert_close(policy.log_prob(action), theirs.log_prob(action.argmax(-1)))
    torch.testing.assert_close(policy.entropy(), theirs.entropy())
    one, again, other = (OneHotPolicy(out.repeat(20, 1)).sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    mixed = OneHotPolicy(torch.tensor([100.0, 0, 0, 0]), unimix=0.04)
    assert mixed.log_probs.exp().tolist() == pytest.approx([0.97, 0.01, 0.01, 0.01])
