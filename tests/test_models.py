"""Shared models against golden numbers of IPV's release (thuml/ContextWM), invariants, and independent computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from localmotion.config import Stage, WorldModelConfig
from localmotion.models.adapters import make_adapter
from localmotion.models.bonus import IntrinsicBonus
from localmotion.models.decoders import CNNDecoder, ContextAttention, ResNetDecoder
from localmotion.models.distributions import TruncatedNormal
from localmotion.models.encoders import CNNEncoder, ResNetEncoder, from_blocks, random_erasing, to_blocks
from localmotion.models.heads import MLP
from localmotion.models.image import ImageModel
from localmotion.models.returns import lambda_return
from localmotion.models.rssm import RSSM, RSSMState, kl_loss
from localmotion.runs.settings import compose
from method_batches import CASES, make, make_batch


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_paper_preset() -> None:
    """Exactly the numbers of IPV's release."""
    encoder = ResNetEncoder()
    assert count(encoder) == 1_562_112
    assert 2 * count(encoder) == 3_124_224  # with its context twin
    assert count(ResNetDecoder(2048, encoder.map_shapes)) == 7_779_003
    assert count(ResNetDecoder(2048, encoder.map_shapes, context=False)) == 7_519_227
    assert count(CNNEncoder()) == 1_551_312
    assert count(CNNDecoder(2048)) == 11_152_275
    assert count(RSSM(embed_dim=3072, action_dim=50)) == 14_745_600
    assert count(RSSM(embed_dim=2048, action_dim=4, action_pad=50)) == 13_697_024
    assert count(RSSM(embed_dim=5120, action_dim=4, action_pad=50)) == 16_842_752
    assert count(MLP(2048, 1)) == 1_301_201
    assert count(MLP(2048, 2 * 4)) == 1_304_008


def test_shapes_of_the_paper_preset() -> None:
    """Shapes and kept tokens of IPV's release, for the model that DRP's paper preset builds."""
    world = compose("drp", "pretrain", preset="paper").model.world
    assert world == WorldModelConfig()
    model = ImageModel(world, image_size=64)
    image = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    embed, context = model.encode(model.pixels(image), image)
    assert embed.shape == (2, 3, 3072)
    assert context is not None
    assert [tuple(m.shape[1:]) for m in context.maps] == [(48, 32, 32), (96, 16, 16), (192, 8, 8)]
    assert model.decode(torch.randn(2, 3, 2048), context).shape == (6, 3, 64, 64)
    attention = [m for m in model.modules() if isinstance(m, ContextAttention)]
    assert sorted(m.keep for m in attention) == [16, 64]
    sizes = {"deter": world.deter, "hidden": world.hidden, "stoch": world.stoch, "classes": world.classes}
    assert RSSM(embed_dim=3072, action_dim=4, **sizes).feat_dim == 2048  # type: ignore[arg-type]


def test_lambda_return_golden() -> None:
    """Golden values of IPV's lambda-return."""
    found = lambda_return(
        torch.tensor([1.0, 2, 3]), torch.tensor([0.2, 0.3, 0.4]), torch.tensor(0.4), discount=0.99, lambda_=0.95
    )
    torch.testing.assert_close(found, torch.tensor([5.9088, 5.2088, 3.3960]), atol=1e-4, rtol=0)


def test_bonus_golden() -> None:
    """As in IPV's release: 46 targets from 50 positions; the running mean after (.02, .04) is .9903."""
    torch.manual_seed(0)
    bonus = IntrinsicBonus(8)
    assert bonus(torch.randn(3, 50, 8)).shape == (3, 46)
    fresh = IntrinsicBonus(8)
    found = fresh.normalise(torch.tensor([0.02, 0.04]))
    assert fresh.mean.item() == pytest.approx(0.9903)
    torch.testing.assert_close(found, torch.tensor([0.02, 0.04]) / 0.9903)
    fresh.mean.zero_()
    torch.testing.assert_close(fresh.normalise(torch.tensor([1e-8])), torch.tensor([1e-8 / (1e-10 + 1e-8)]))


def test_bonus_against_a_loop() -> None:
    torch.manual_seed(1)
    bonus = IntrinsicBonus(6, size=40, neighbours=3)
    first, second = torch.randn(2, 12, 6), torch.randn(2, 12, 6)
    bonus(first)
    got = bonus(second)

    def windows(feat: Tensor) -> Tensor:
        return torch.stack([feat[b, t : t + 5].mean(0) for b in range(2) for t in range(8)]) @ bonus.projection

    queue = torch.cat([windows(second), windows(first)])
    distance = torch.cdist(windows(second), queue, compute_mode="donot_use_mm_for_euclid_dist")
    raw = distance.sort(1).values[:, :3].mean(1)  # the nearest is itself, at distance 0
    torch.testing.assert_close(got.flatten(), raw / (bonus.mean + 1e-8), atol=2e-3, rtol=1e-2)
    assert int(bonus.filled) == 32


@pytest.mark.parametrize("free", [0.0, 1.0])
def test_kl_is_balanced_and_free_nats_are_on_the_mean(free: float) -> None:
    """As in IPV's release: 0.8 of the gradient to the prior, 0.2 to the posterior."""
    torch.manual_seed(0)
    post = (torch.randn(4, 3, 5, 6) * 2).requires_grad_()
    prior = torch.randn(4, 3, 5, 6, requires_grad=True)
    p, q = torch.log_softmax(post, -1), torch.log_softmax(prior, -1)
    plain = (p.exp() * (p - q)).sum((-1, -2)).mean()
    loss, _ = kl_loss(post, prior, balance=0.8, free=free)
    torch.testing.assert_close(loss, plain.clamp(min=free))
    got = torch.autograd.grad(loss, [post, prior])
    whole = torch.autograd.grad(plain, [post, prior])
    torch.testing.assert_close(got[0], 0.2 * whole[0])
    torch.testing.assert_close(got[1], 0.8 * whole[1])
    far, _ = kl_loss(post.detach(), post.detach() + 1e-3 * torch.randn_like(post), free=1.0)
    assert far.item() == 1.0


def make_rssm() -> RSSM:
    torch.manual_seed(0)
    return RSSM(embed_dim=7, action_dim=3, deter=16, hidden=12, stoch=4, classes=5)


def test_rssm_step_by_the_equations() -> None:
    """The RSSM of IPV's release, written out."""
    rssm = make_rssm()
    state = RSSMState(torch.zeros(2, 4, 5), torch.nn.functional.one_hot(torch.randint(5, (2, 4)), 5).float(), torch.randn(2, 16))
    action = torch.randn(2, 3)
    u = torch.nn.functional.elu(rssm.img_in(torch.cat([state.stoch.flatten(1), action], 1)))
    parts = torch.nn.functional.layer_norm(
        rssm.gru(torch.cat([u, state.deter], 1)), (48,), rssm.gru_norm.weight, rssm.gru_norm.bias, 1e-3
    )
    r, c, z = parts.chunk(3, 1)
    c = torch.tanh(torch.sigmoid(r) * c)
    z = torch.sigmoid(z - 1)
    deter = z * c + (1 - z) * state.deter
    found = rssm.img_step(state, action)
    torch.testing.assert_close(found.deter, deter)
    logits = rssm.prior_out(torch.nn.functional.elu(rssm.prior_in(deter)))
    torch.testing.assert_close(found.logits.flatten(1), logits)
    assert torch.equal(found.stoch.sum(-1).round(), torch.ones(2, 4))


def test_rssm_observe_equals_its_steps_in_value_and_gradient() -> None:
    rssm = make_rssm()
    embed, action = torch.randn(3, 6, 7, requires_grad=True), torch.randn(3, 6, 3, requires_grad=True)
    is_first = torch.zeros(3, 6, dtype=torch.bool)
    is_first[:, 0] = is_first[1, 3] = True
    post, prior = rssm.observe(embed, action, is_first, sample=False)
    weight = torch.randn(3, 6, rssm.feat_dim)
    whole = (rssm.feat(post) * weight).sum() + prior.square().sum()
    expected = torch.autograd.grad(whole, [embed, action, *rssm.parameters()])
    state, total = rssm.initial(3), torch.zeros(())
    for t in range(6):
        state = rssm.obs_step(state, action[:, t], embed[:, t], is_first[:, t], sample=False)
        torch.testing.assert_close(state.deter, post.deter[:, t], atol=1e-5, rtol=1e-4)
        total = total + (rssm.feat(state) * weight[:, t]).sum() + rssm.prior(state.deter).square().sum()
    got = torch.autograd.grad(total, [embed, action, *rssm.parameters()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3)


def test_rssm_forgets_at_an_episode_start() -> None:
    rssm = make_rssm()
    embed, action = torch.randn(1, 4, 7), torch.randn(1, 4, 3)
    is_first = torch.tensor([[True, False, True, False]])
    both, _ = rssm.observe(embed, action, is_first, sample=False)
    second, _ = rssm.observe(embed[:, 2:], action[:, 2:], is_first[:, 2:], sample=False)
    torch.testing.assert_close(both.deter[:, 2:], second.deter)


def test_rssm_is_finite_in_bf16() -> None:
    rssm = make_rssm()
    with torch.autocast("cpu", torch.bfloat16):
        post, prior = rssm.observe(torch.randn(2, 5, 7), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool))
        loss, _ = kl_loss(post.logits, prior)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in rssm.parameters() if p.grad is not None)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.9, 1.0), (-0.99, 0.11)])
def test_truncated_normal_against_integration(mean: float, std: float) -> None:
    dist = TruncatedNormal(torch.tensor([mean]), torch.tensor([std]))
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    log_p = dist.log_prob(x.float()).double()
    assert torch.trapezoid(log_p.exp(), x).item() == pytest.approx(1.0, abs=1e-4)
    assert dist.entropy().item() == pytest.approx(-torch.trapezoid(log_p.exp() * log_p, x).item(), abs=1e-3)
    many = TruncatedNormal(torch.full((100_000,), mean), torch.full((100_000,), std))
    torch.manual_seed(0)
    sample = many.rsample()
    assert sample.abs().max() < 1
    assert sample.mean().item() == pytest.approx(torch.trapezoid(log_p.exp() * x, x).item(), abs=0.01)
    assert -1 <= dist.mode.item() <= 1


def test_truncated_normal_sample_has_a_gradient() -> None:
    mean = torch.zeros(1000, requires_grad=True)
    torch.manual_seed(0)
    TruncatedNormal(mean, torch.full((1000,), 0.2)).rsample().sum().backward()
    assert mean.grad is not None
    assert mean.grad.mean().item() == pytest.approx(1.0, abs=0.02)  # hardly truncated: a shift of the mean shifts the sample


def test_blocks_are_the_same_picture() -> None:
    image = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    blocks = to_blocks(image)
    assert blocks.shape == (3, 48, 8, 8)
    assert blocks.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(from_blocks(blocks), image.permute(0, 3, 1, 2))
    model = ImageModel(WorldModelConfig(stem="unshuffle", norm="none", depth=8), image_size=64)
    image = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    torch.testing.assert_close((model.picture(model.pixels(image)) + 0.5) * 255, image.permute(0, 3, 1, 2).float())


def test_context_drop_keeps_a_quarter_and_context_matters() -> None:
    torch.manual_seed(0)
    attention = ContextAttention(8, 8, norm="none", dropout=0.0).eval()
    assert attention.keep == 16
    x, context = torch.randn(6, 8, 8, 8), torch.randn(2, 8, 8, 8)
    out = attention(x, context)
    assert out.shape == x.shape
    other = context.clone()
    other[1] += 1.0
    torch.manual_seed(1)
    first = attention(x, context)
    torch.manual_seed(1)
    second = attention(x, other)
    assert torch.equal(first[:3], second[:3])  # frames of the other sequence
    assert not torch.equal(first[3:], second[3:])


def test_random_erasing_areas_and_share() -> None:
    torch.manual_seed(0)
    frame = torch.full((2000, 64, 64, 3), 7, dtype=torch.uint8)
    erased = random_erasing(frame)
    area = (erased[..., 0] == 128).float().mean((1, 2))
    assert (area > 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    some = area[area > 0]
    assert some.max() <= 0.345
    assert some.min() >= 0.012
    assert some.mean().item() == pytest.approx(0.175, abs=0.02)


def test_batch_norm_uses_running_statistics_when_acting() -> None:
    """IPV pitfall 7: in evaluation one frame is encoded as it would be in any company."""
    torch.manual_seed(0)
    encoder = ResNetEncoder(depth=8, image_size=32)
    encoder(torch.randn(8, 3, 32, 32))
    encoder.eval()
    batch = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(encoder(batch)[:1], encoder(batch[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "mlp", "linear"])
def test_adapter_shapes_and_gate(kind: str) -> None:
    adapter = make_adapter(kind, deter=32, stoch=4, classes=4, out_dim=10)
    feat = torch.randn(2, 3, 48, requires_grad=True)
    out = adapter(feat)
    assert out.shape == (2, 3, 10)
    if kind == "attention":
        torch.testing.assert_close(out, adapter.linear(feat))  # the gate starts at zero
        out.sum().backward()
        assert adapter.gate.grad is not None
        assert math.isfinite(adapter.gate.grad.item())
        assert adapter.gate.grad.abs() > 0


class HasDevice(TorchFunctionMode):
    """Fails for a tensor on `meta`. That device holds no values, and some operations would read memory of others instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, Tensor) or not out.is_meta, f"{func} without a device"
        return out


DEVICES = [*((name, stage, ()) for name, stage in CASES if stage != "train")]
DEVICES += [("dreamer_v2", "train", ()), ("dreamer_v3", "train", ())]
DEVICES += [("ipv", "finetune", ("model.context_erasing=true",)), ("drp", "finetune", ("model.motion_encoder=global",))]


@pytest.mark.parametrize(("name", "stage", "settings"), DEVICES)
def test_no_part_makes_a_tensor_on_the_default_device(name: str, stage: Stage, settings: tuple[str, ...]) -> None:
    """A tensor without a device of its own is on the CPU, which a model on a GPU cannot use. Here the default device has no values."""
    _, method = make(name, stage, *settings)
    batch = make_batch()
    batch["is_first"][1, 5] = True
    with torch.device("meta"), HasDevice():
        handed, found = None, {}
        for each in method.passes(stage):
            losses, metrics, handed = each.losses(batch, handed)
            sum(losses.values()).backward()
            found |= losses | metrics
        if method.acts:
            carry = method.initial_carry(2)
            for t in range(4):
                seen = {key: value[:, t : t + 1] for key, value in batch.items() if key != "reward"}
                found["action"], carry = method.act(seen, carry, explore=True, window=2)
        found |= method.open_loop(batch, 3)
    assert all(torch.isfinite(value).all() for value in found.values())
