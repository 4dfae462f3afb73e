"""DreamerV3: its pieces against numbers computed apart, the whole against a public PyTorch implementation, and what must not leak."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dreamer_v3_parity as parity
from localmotion import methods
from localmotion.compute import Compute
from localmotion.config import compose, update
from localmotion.errors import ConfigError
from localmotion.methods.base import total
from localmotion.methods.dreamer_v3 import SIZES, DreamerV3, DreamerV3Config
from localmotion.models.blocks import BlockLinear, NormMLP, NormSiLU
from localmotion.models.observations import ImageDecoder, ImageEncoder, UpConv, from_patches, pixel_loss, to_patches
from localmotion.models.policies import BoundedNormal, OneHotPolicy
from localmotion.models.rssm_block import BlockRSSM, State, kl_losses
from localmotion.models.values import (
    ReturnRange,
    TwoHot,
    bootstrapped_return,
    follow,
    symexp,
    symexp_bins,
    symlog,
)
from localmotion.training.optimizers import LaProp, clip_adaptive_
from localmotion.training.update import Updater

CPU = Compute(torch.device("cpu"), False, 1, "test")


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
    with pytest.raises(ValueError, match="odd"):
        symexp_bins(254)


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


@settings(max_examples=60, deadline=None)
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
    extremes = BoundedNormal(torch.tensor([[0.0, -100.0], [0.0, 100.0]])).randomness()
    assert extremes.tolist() == pytest.approx([0.0, 1.0])


def test_one_hot_policy_is_a_categorical() -> None:
    torch.manual_seed(0)
    out = torch.randn(5, 4)
    policy, theirs = OneHotPolicy(out), torch.distributions.Categorical(logits=out)
    action = policy.sample()
    torch.testing.assert_close(policy.log_prob(action), theirs.log_prob(action.argmax(-1)))
    torch.testing.assert_close(policy.entropy(), theirs.entropy())
    mixed = OneHotPolicy(torch.tensor([100.0, 0, 0, 0]), unimix=0.04)
    assert mixed.log_probs.exp().tolist() == pytest.approx([0.97, 0.01, 0.01, 0.01])


# 3. The whole against another implementation ----------------------------------------------------------------------------------

# NM512/r2dreamer, commit 546e4fa, its "dreamer" representation loss (which is DreamerV3), run in fp32 on the weights and the batch of
# dreamer_v3_parity.py: three updates of _cal_grad, clip_grad_agc_(0.3, 1e-3) and LaProp(lr 1e-3, eps 1e-20), no warm-up. Shared with ours:
# the sampling noise, and the straight-through gradient (its gumbel_softmax was replaced by the reference's p - sg(p) + one-hot). Without
# unimix and contdisc, in which it differs from the reference; its imagined weights carry one factor 1 - 1/333 more, divided out here.
# Largest relative difference seen when run side by side: losses 5e-7, gradient of any parameter 4e-6, weights after three updates 7e-7.
LOSSES = ("dyn", "rep", "recon", "reward", "cont", "policy", "value", "repval")
GRADIENTS = ("observations", "dynamics", "reward", "cont", "actor", "critic")
PIXELS = [
    ((1.233588, 1.233588, 1131.941, 4.8784, 0.8372387, -0.00377365, 0.6836363, 6.958236),
     (776.332, 105.398, 2.95842, 1.85908, 0.00258087, 2.4883)),
    ((1.333777, 1.333777, 1107.681, 4.848837, 0.8218899, -0.005182143, 0.6897897, 6.917906),
     (585.864, 66.2604, 2.9521, 1.77417, 0.005216, 2.14872)),
    ((1.329757, 1.329757, 1088.74, 4.839116, 0.8353084, -0.005379844, 0.6663196, 6.846686),
     (427.219, 33.2719, 2.69901, 1.76029, 0.00285029, 1.78643)),
]  # fmt: skip
VECTORS = [
    ((1.46425, 1.46425, 11.13288, 4.764214, 0.8744777, 0.003743511, 0.6262171, 7.008981),
     (26.9293, 13.4848, 2.51858, 1.56261, 0.0047205, 0.895181)),
    ((1.373955, 1.373955, 12.4622, 4.669443, 0.8386344, 0.004147286, 0.6705177, 7.065318),
     (53.262, 27.2962, 2.32866, 1.47741, 0.0122122, 0.96806)),
    ((1.316595, 1.316595, 11.04398, 4.648879, 0.8206698, 0.006790492, 0.7003877, 6.963883),
     (41.9354, 21.3586, 2.20558, 1.41746, 0.0121729, 1.18818)),
]  # fmt: skip
# The same with unimix 0.01, first update; its KL leaves unimix out, so dyn and rep are not compared.
UNIMIX = {
    "recon": 1132.659,
    "reward": 4.906868,
    "cont": 0.8412329,
    "policy": -0.004310281,
    "value": 0.6864746,
    "repval": 6.957039,
}


@pytest.mark.parametrize(("options", "golden"), [({}, PIXELS), ({"pixels": False, "vector_dim": parity.V}, VECTORS)])
def test_three_updates_agree_with_r2dreamer(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], golden: Any) -> None:
    parity.fix_noise(monkeypatch)
    model, batch = parity.build(**options), parity.make_batch()
    optimiser = LaProp([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for losses_there, gradients_there in golden:
        losses, _, _ = model.world_model_losses(batch)
        total(losses, model.loss_scales("train")).backward()
        assert {k: float(v.detach()) for k, v in losses.items()} == pytest.approx(
            dict(zip(LOSSES, losses_there, strict=True)), rel=1e-5
        )
        for name, norm in zip(GRADIENTS, gradients_there, strict=True):
            grads = [p.grad for p in model.get_submodule(name).parameters() if p.grad is not None]
            assert float(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()) == pytest.approx(norm, rel=1e-4), (
                name
            )
        clip_adaptive_(model.parameters(), 0.3)
        optimiser.step()
        optimiser.zero_grad()
        model.after_update()


def test_unimix_agrees_with_r2dreamer(monkeypatch: pytest.MonkeyPatch) -> None:
    parity.fix_noise(monkeypatch)
    losses, _, _ = parity.build(unimix=0.01).world_model_losses(parity.make_batch())
    assert {key: float(losses[key].detach()) for key in UNIMIX} == pytest.approx(UNIMIX, rel=1e-5)


# Learned numbers that the same commit of NM512/r2dreamer counts for 64x64 pictures, and for vectors of 24, with 6 actions. Its widths are
# the reference's; the names of the sizes are the reference's too, and generous.
COUNTS = {
    "size1m": (686_846, 640_867),
    "size12m": (10_494_158, 9_738_019),
    "size25m": (23_489_326, 21_782_947),
    "size50m": (41_650_062, 38_612_003),
    "size100m": (93_468_238, 86_622_499),
    "size200m": (165_948_686, 153_769_507),
    "size400m": (372_896_398, 345_473_059),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_parameters_of_the_reference(size: str) -> None:
    found = []
    for options in ({}, {"pixels": False, "vector_dim": 24}):
        with torch.device("meta"):
            model = DreamerV3(update(DreamerV3Config(), {"size": size, **options}), image_size=64, action_dim=6)
        found.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert tuple(found) == COUNTS[size]


# 4. What reaches what ---------------------------------------------------------------------------------------------------------


def gradients(model: DreamerV3, loss: Tensor) -> set[str]:
    """Child modules that a loss reaches."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_each_loss_reaches_its_own_modules() -> None:
    """As in the reference: the actor and the imagined critic leave the world model alone, the replayed critic trains it."""
    model = parity.build(unimix=0.01, contdisc=True, kl_free=0.0)
    losses, _, start = model.world_model_losses(parity.make_batch())
    world = {"observations", "dynamics"}
    assert gradients(model, losses["policy"]) == {"actor"}
    assert gradients(model, losses["value"]) == {"critic"}
    assert gradients(model, losses["repval"]) == world | {"critic"}
    assert gradients(model, losses["reward"]) == world | {"reward"}
    assert gradients(model, losses["cont"]) == world | {"cont"}
    assert gradients(model, losses["recon"]) == world
    assert gradients(model, losses["rep"]) == world
    assert "dynamics" in gradients(model, losses["dyn"])
    assert not any(x.requires_grad for x in start)
    assert set(losses) == set(model.loss_scales("train"))


def test_dyn_trains_the_prior_and_rep_the_posterior() -> None:
    model = parity.build(kl_free=0.0)
    losses, _, _ = model.world_model_losses(parity.make_batch())
    for name, other, loss in (("prior_net", "post_out", "dyn"), ("post_out", "prior_net", "rep")):
        model.zero_grad()
        losses[loss].backward(retain_graph=True)
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.dynamics.get_submodule(name).parameters())
        if loss == "rep":  # the posterior decides what the prior of the next position starts from, not the reverse
            assert all(p.grad is None or not p.grad.any() for p in model.dynamics.get_submodule(other).parameters())


def test_every_parameter_learns_under_bf16_too() -> None:
    """Imagination casts the actor's weights without a gradient; the loss must not use those casts."""
    model = parity.build(unimix=0.01, contdisc=True, kl_free=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses, metrics, _ = model.world_model_losses(parity.make_batch())
        total(losses, model.loss_scales("train")).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    assert all(torch.isfinite(x).all() for x in (*losses.values(), *metrics.values()))
    fp32, _, _ = parity.build(unimix=0.01, contdisc=True, kl_free=0.0).world_model_losses(parity.make_batch())
    for key in ("recon", "reward", "cont"):
        assert float(losses[key].detach()) == pytest.approx(float(fp32[key].detach()), rel=0.05)


def test_the_continuation_head_learns_the_discount() -> None:
    """At a logit of zero the loss is ln 2 whatever the target; its gradient tells the target: 1/2 - (1 - 1/333), and 1/2 where terminal."""
    batch = parity.make_batch()
    for contdisc, want in ((True, 1 - 1 / 333), (False, 1.0)):
        model = parity.build(contdisc=contdisc)
        for p in model.cont[-1].parameters():
            p.data.zero_()
        losses, _, _ = model.world_model_losses(batch)
        losses["cont"].backward()
        alive = 1 - float(batch["is_terminal"].float().mean())
        assert float(model.cont[-1].bias.grad) == pytest.approx(0.5 - want * alive, rel=1e-5)


def test_imagination_from_the_last_positions_only() -> None:
    model = parity.build(imag_last=2)
    losses, _, start = model.world_model_losses(parity.make_batch())
    assert start.deter.shape == (2 * 2, 32)
    assert torch.isfinite(losses["repval"])


def test_the_slow_critic_follows_and_does_not_learn() -> None:
    run = compose("dreamer_v3", "train", preset="debug", env="toy:dot", settings=("warmup=0",))
    torch.manual_seed(0)
    model = DreamerV3(run.model, image_size=64, action_dim=parity.A)
    updater = Updater(model, run, CPU)
    slow = [p.detach().clone() for p in model.slow_critic.parameters()]
    updater.online(parity.make_batch())
    for old, new, fast in zip(slow, model.slow_critic.parameters(), model.critic.parameters(), strict=True):
        torch.testing.assert_close(new, 0.98 * old + 0.02 * fast.detach())
    ours = {id(p) for group in updater.groups for p in group.parameters}
    assert ours == {id(p) for p in model.parameters() if p.requires_grad}
    assert not ours & {id(p) for p in model.slow_critic.parameters()}


# 5. Acting, looking, settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"vector_dim": parity.V}, {"pixels": False, "vector_dim": parity.V}, {"discrete": True}])
def test_observations_and_actions_of_every_kind(options: dict[str, Any]) -> None:
    model, batch = parity.build(unimix=0.01, contdisc=True, **options), parity.make_batch()
    if options.get("discrete"):
        batch["action"] = F.one_hot(batch["action"].argmax(-1), parity.A).float()
    losses, metrics, _ = model.world_model_losses(batch)
    assert all(torch.isfinite(x) for x in (*losses.values(), *metrics.values()))
    seen = {"recon/image"} if options.get("pixels", True) else set()
    seen |= {"recon/vector"} if "vector_dim" in options else set()
    assert {key for key in metrics if key.startswith("recon/")} == seen
    model.eval()
    carry = model.initial_carry(parity.B)
    for t in range(3):
        obs = {key: value[:, t : t + 1] for key, value in batch.items() if key != "reward"}
        action, carry = model.act(obs, carry, explore=True)
        assert action.shape == (parity.B, parity.A)
        assert action.abs().max() <= 1
        assert torch.equal(carry.action, action)
        if options.get("discrete"):
            assert torch.equal(action.sum(-1), torch.ones(parity.B))


def test_evaluation_samples_unless_told_otherwise() -> None:
    batch = parity.make_batch()
    obs = {key: value[:, :1] for key, value in batch.items() if key != "reward"}
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for mode in found:
        model = parity.build(evaluate_mode=mode).eval()
        for explore in (True, False):
            torch.manual_seed(1)
            found[mode].append(model.act(obs, model.initial_carry(parity.B), explore=explore)[0])
    torch.testing.assert_close(*found[False])
    assert not torch.allclose(*found[True])


def test_acting_starts_anew_where_an_episode_begins() -> None:
    model, batch = parity.build().eval(), parity.make_batch()
    obs = {key: value[:, :1] for key, value in batch.items() if key != "reward"}
    torch.manual_seed(0)
    first, carry = model.act(obs, model.initial_carry(parity.B), explore=True)
    torch.manual_seed(0)
    again, _ = model.act(obs, carry, explore=True)
    torch.testing.assert_close(first, again)


def test_open_loop_sees_no_future_picture() -> None:
    model, batch = parity.build().eval(), parity.make_batch()
    other = {**batch, "image": batch["image"].clone(), "action": batch["action"].clone()}
    other["image"][:, 3:] = 255 - other["image"][:, 3:]
    moved = {**other, "action": other["action"].clone()}
    moved["action"][:, 3:] *= -1
    found = []
    for data in (batch, other, moved):
        torch.manual_seed(0)
        found.append(model.open_loop(data, 3)["action"])
    assert found[0].shape == (parity.B, parity.T, 3, 64, 64)
    assert found[0].abs().max() <= 0.5
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0][:, 3:], found[2][:, 3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": False}, "vector_dim"),
        ({"deter": 30}, "blocks"),
        ({"depth": 3, "deter": 32, "blocks": 8}, "depth"),
    ],
)
def test_settings_that_do_not_fit_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parity.build(**options)


def test_a_picture_of_another_size_is_told() -> None:
    with pytest.raises(ConfigError, match="image_size=40"):
        DreamerV3(update(DreamerV3Config(), parity.SETTINGS), image_size=40, action_dim=2)


@pytest.mark.parametrize("env", ["dmc:walker_walk", "metaworld:reach", "toy:dot"])
def test_paper_preset_is_the_reference(env: str) -> None:
    """What a suite sets for the other methods (free nats, batch size) does not reach this one."""
    run = compose("dreamer_v3", "train", preset="paper", env=env)
    assert run.model == DreamerV3Config()
    assert (run.online.batch_size, run.online.length, run.online.lr, run.online.prioritize_ends) == (16, 64, 4e-5, False)


def test_world_model_learns_a_batch() -> None:
    """Pictures of a moving square and its place as reward: most of their variance becomes predictable within seconds."""
    run = compose("dreamer_v3", "train", preset="debug", env="toy:dot", settings=("warmup=5", "online.lr=0.004", "depth=8"))
    torch.manual_seed(0)
    model = methods.get("dreamer_v3")(run.model, image_size=64, action_dim=2)
    updater = Updater(model, run, CPU)
    place = torch.stack([torch.arange(8).roll(s) for s in range(4)])  # (B, T)
    image = torch.zeros(4, 8, 64, 64, 3, dtype=torch.uint8)
    for b in range(4):
        for t in range(8):
            x = 7 * int(place[b, t])
            image[b, t, 20:40, x : x + 14] = 255
    is_first = torch.zeros(4, 8, dtype=torch.bool)
    is_first[:, 0] = True
    batch = {
        "image": image,
        "action": torch.zeros(4, 8, 2),
        "reward": place / 8,
        "is_first": is_first,
        "is_terminal": torch.zeros(4, 8, dtype=torch.bool),
    }
    variance = float((image.flatten(0, 1).float() / 255).var(0).sum())
    for _ in range(80):
        metrics = updater.online(batch)
    assert float(metrics["loss/recon"]) < 0.3 * variance
    assert float(metrics["loss/reward"]) < 1.0  # from ln 255 = 5.5
