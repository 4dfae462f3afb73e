"""What weights and buffers are before the first update: the update checks fill them by rule, so only these tests see how they begin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from localmotion.models.adapters import AttentionAdapter, make_adapter
from localmotion.models.dae import DAEConfig, MaskedMotion
from localmotion.models.global_flow import GlobalFlow
from localmotion.models.heads import MLP
from localmotion.models.rssm import RSSM
from method_batches import make


@torch.no_grad()
def test_dreamer_v3_predicts_nothing_at_first() -> None:
    """Reward and critic start at exactly zero (arXiv 2301.04104), so early returns are not noise; the policy is nearly indifferent."""
    _, model = make("dreamer_v3", "train")
    model.eval()
    feat = torch.randn(64, model.dynamics.feat_dim)
    for head in (model.reward, model.critic, model.slow_critic):
        assert not any(p.any() for p in head[-1].parameters())
    policy = model.policy(feat)
    assert float(policy.mean.abs().max()) < 0.1
    torch.testing.assert_close(
        policy.std, torch.full_like(policy.std, 0.9 * torch.sigmoid(torch.tensor(2.0)) + 0.1), rtol=0.03, atol=0
    )
    assert float(model.actor[-1].weight.abs().max()) > 0
    assert float(model.cont[-1].weight.std()) > 0.05  # the only head that is not scaled down
    assert float(model.return_range.low) == float(model.return_range.high) == 0


@pytest.mark.parametrize("name", ["dreamer_v2", "apv", "ipv", "drp", "prelar", "diswm", "dreamer_v3"])
def test_the_slow_critic_begins_as_a_copy_of_the_critic(name: str) -> None:
    _, method = make(name, "train")
    critics = method if name == "dreamer_v3" else method.behaviour
    fast = critics.critic.state_dict()
    assert any(bool(value.any()) for value in fast.values())
    for key, value in critics.slow_critic.state_dict().items():
        assert torch.equal(value, fast[key])
        assert value.data_ptr() != fast[key].data_ptr()
    assert not any(p.requires_grad for p in critics.slow_critic.parameters())


def test_heads_and_latents_begin_xavier_uniform_without_bias() -> None:
    """Uniform in +-sqrt(6 / (in + out)): a deviation of sqrt(2 / (in + out))."""
    torch.manual_seed(0)
    heads = MLP(120, 40, units=100, layers=2)
    dynamics = RSSM(embed_dim=50, action_dim=3, deter=40, hidden=60, stoch=8, classes=8)
    layers = [layer for layer in heads.net if isinstance(layer, nn.Linear)]
    layers += [getattr(dynamics, name) for name in ("img_in", "prior_in", "prior_out", "post_in", "post_out")]
    for layer in layers:
        weight, bound = layer.weight.detach(), math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.97 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.bias.any()


def test_the_bonus_begins_with_an_empty_queue_and_a_mean_of_one() -> None:
    """A fixed projection of deviation 1/128; the running mean starts at 1, so that early bonuses are not blown up."""
    for name in ("apv", "ipv", "drp", "prelar"):
        _, method = make(name, "train")
        bonus = method.bonus
        assert float(bonus.mean) == 1
        assert int(bonus.filled) == 0
        assert not bonus.queue.any()
        assert bonus.queue.shape == (4096, 128)
        assert float(bonus.projection.std()) == pytest.approx(1 / 128, rel=0.05)


def test_the_adapter_begins_with_small_queries_and_positions_of_a_size_that_follows_the_state() -> None:
    torch.manual_seed(0)
    for deter, width, slices in ((64, 64, 4), (256, 64, 16), (512, 128, 16)):
        adapter = make_adapter("attention", deter=deter, stoch=8, classes=8, out_dim=10)
        assert isinstance(adapter, AttentionAdapter)
        assert adapter.position.shape == (8 + slices, width)
        assert adapter.query.shape == (8, width)
        assert len(adapter.mlps) == len(adapter.to_query) == 2
        assert adapter.deter_embed.in_features == deter // slices
        for value in (adapter.position, adapter.query):
            assert float(value.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("mats", [1, 4])
def test_tokens_of_the_motion_encoder_begin_small(mats: int) -> None:
    torch.manual_seed(0)
    motion = MaskedMotion(DAEConfig(dim=512, mats=mats, blocks=1, patch=2))
    assert motion.encoder.mat.shape == ((4, 512) if mats == 4 else (512,))
    for value in (motion.encoder.mat, motion.encoder.time_embed, motion.decoder.mask_token):
        assert float(value.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not hasattr(motion, "code_decoder")  # only where it is asked for
    decoder = MaskedMotion(DAEConfig(dim=16, mats=mats, patch=2), from_code=True).code_decoder
    assert [tuple(layer.weight.shape) for layer in decoder if isinstance(layer, nn.Linear)] == [(32, 16 * mats + 16), (8, 32)]


@pytest.mark.parametrize(("dim", "depth"), [(4, 1), (8, 1), (64, 8)])
def test_the_global_code_has_an_eighth_of_the_width_at_first(dim: int, depth: int) -> None:
    layers = GlobalFlow(DAEConfig(dim=dim)).convolutions
    assert [layer.out_channels for layer in layers] == [depth, 2 * depth, 4 * depth, 8 * depth]  # type: ignore[union-attr]
