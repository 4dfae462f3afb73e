"""APV against its paper and the facts of the released code (ipv_apv spec, sections 4 and 7)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from localmotion import methods
from localmotion.config import leaves
from localmotion.methods.base import total
from localmotion.runs.settings import compose
from localmotion.training.update import Updater
from method_batches import CPU, make, make_batch

# Table 4.1, column metaworld_pretrain.
TABLE_PRETRAIN = {
    "model.world.encoder": "cnn",
    "model.world.context": False,
    "pretrain.batch_size": 16,
    "pretrain.length": 25,
    "pretrain.updates": 600_000,
    "pretrain.lr": 3e-4,
    "optim.eps": 1e-5,
    "optim.clip": 100.0,
    "optim.weight_decay": 1e-6,
    "model.beta_z": 0.1,
    "model.world.kl_balance": 0.8,
    "model.world.deter": 1024,
    "model.world.hidden": 1024,
    "model.world.stoch": 32,
    "model.world.classes": 32,
}
COMMON = {
    "online.length": 50,
    "online.warmup_updates": 100,
    "online.train_every": 5,
    "online.lr": 3e-4,
    "online.pretrained_lr_factor": 1.0,
    "online.actor_lr": 8e-5,
    "online.critic_lr": 8e-5,
    "model.beta_s": 1.0,
    "model.world.units": 400,
    "model.world.layers": 4,
    "model.behaviour.horizon": 15,
    "model.behaviour.discount": 0.99,
    "model.behaviour.lambda_": 0.95,
    "model.behaviour.entropy": 1e-4,
    "model.behaviour.slow_critic_every": 100,
}
PER_ENV = {
    "metaworld:lever-pull": {
        "online.batch_size": 50,
        "online.prefill": 5_000,
        "online.env_steps": 255_000,
        "online.freeze_updates": 100,
        "online.prioritize_ends": True,
        "model.embed_input": False,
        "model.intrinsic_weight": 1.0,
        "model.free_nats": 0.0,
    },
    "dmc:quadruped_run": {
        "online.batch_size": 16,
        "online.prefill": 2_000,
        "online.freeze_updates": 0,
        "online.prioritize_ends": False,
        "model.embed_input": True,
        "model.intrinsic_weight": 0.1,
        "model.free_nats": 1.0,
    },
}


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_paper_preset_is_the_table_of_pretraining() -> None:
    values = dict(leaves(compose("apv", "pretrain", preset="paper")))
    assert {key: values[key] for key in TABLE_PRETRAIN} == TABLE_PRETRAIN


@pytest.mark.parametrize("env", PER_ENV)
def test_paper_preset_is_the_table_of_finetuning(env: str) -> None:
    values = dict(leaves(compose("apv", "finetune", preset="paper", env=env)))
    expected = COMMON | PER_ENV[env]
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(("env", "observed"), [("metaworld:reach", 2048), ("dmc:walker_run", 3584)])
def test_golden_sizes_of_the_paper_preset(env: str, observed: int) -> None:
    """Spec 1.2, 7, 8.2 with 4 actions."""
    run = compose("apv", "finetune", preset="paper", env=env)
    model: Any = methods.get("apv")(run.model, image_size=64, action_dim=4)
    assert count(model.image.encoder) == 1_551_312
    assert count(model.image.decoder) == 11_152_275
    assert model.image.embed_dim == 1536
    assert model.latent.post_in.in_features == 1024 + 1536
    assert model.dynamics.post_in.in_features == 1024 + observed
    assert count(model.behaviour.actor) == 1_304_008
    assert not [name for name, _ in model.named_modules() if "context" in name or "representative" in name]


@pytest.mark.parametrize(("texts", "millions"), [((), 25.88), (("encoder=resnet",), 23.83)])
def test_sizes_of_the_two_plain_models(texts: tuple[str, ...], millions: float) -> None:
    """Spec 1.6: plain CNN (APV) and plain ResNet (the "plain WM" of IPV's experiments)."""
    run = compose("apv", "pretrain", preset="paper", settings=texts)
    model = methods.get("apv")(run.model, image_size=64, action_dim=None)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_plain_cnn_learns_a_batch() -> None:
    run, model = make("apv", "pretrain", "encoder=cnn", "pretrain.lr=3e-3")
    updater, batch = Updater(model, run, CPU), make_batch(time=4)
    batch["image"] = batch["image"] // 8 + 200
    first = updater.learn(batch)
    for _ in range(20):
        last = updater.learn(batch)
    assert last["loss/image"] < 0.8 * first["loss/image"]


@pytest.mark.parametrize("embed_input", ["true", "false"])
def test_losses_of_finetuning(embed_input: str) -> None:
    """One head learns reward and bonus where a window of five fits; its error reaches the action-free model."""
    _, model = make("apv", "finetune", "intrinsic_weight=0.5", f"embed_input={embed_input}")
    nn.init.normal_(model.reward.net[-1].weight, std=0.1)
    batch = make_batch()
    bonus: list[torch.Tensor] = []
    model.bonus.register_forward_hook(lambda _module, _inputs, out: bonus.append(out))
    torch.manual_seed(0)
    losses, _, start = model.world_model_losses(batch)
    predicted = model.reward(model.dynamics.feat(start)).view(2, 8)[:, :4]
    torch.testing.assert_close(losses["reward"], 0.5 * (predicted - batch["reward"][:, :4] - 0.5 * bonus[0]).square().mean())
    for part in (model.latent.post_out.weight, model.image.encoder.stem.weight):
        (gradient,) = torch.autograd.grad(losses["reward"], [part], retain_graph=True)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(("weight", "learns"), [("0.1", True), ("0.0", False)])
def test_the_released_weight_of_the_action_free_kl_leaves_its_prior_alone(weight: str, learns: bool) -> None:
    _, model = make("apv", "finetune", f"beta_z_finetune={weight}")
    losses, _, _ = model.world_model_losses(make_batch())
    (gradient,) = torch.autograd.grad(total(losses, model.loss_scales("finetune")), [model.latent.prior_out.weight])
    assert (gradient.abs().max() > 0) == learns


def test_freeze_keeps_what_was_loaded() -> None:
    run, model = make("apv", "finetune", "freeze_updates=1", env="metaworld:reach")
    updater = Updater(model, run, CPU, pretrained=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    updater.learn(make_batch())
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith(("latent.", "image.encoder")))
    assert not torch.equal(after["image.decoder.linear.weight"], before["image.decoder.linear.weight"])
    updater.learn(make_batch())
    assert not torch.equal(model.state_dict()["latent.gru.weight"], before["latent.gru.weight"])
