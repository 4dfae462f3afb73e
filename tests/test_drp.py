"""DRP's losses against the paper's Eqs. 6-12, transfer, freezing, acting."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from localmotion.config import RunConfig
from localmotion.errors import ConfigError
from localmotion.evaluation.heldout import open_loop_errors, reconstruction_errors, trivial_reconstructions
from localmotion.methods.base import check_scales, total
from localmotion.methods.drp import DRP
from localmotion.models.dae import Motion, atomic_actions, masked_loss, random_mask
from localmotion.runs.settings import compose
from localmotion.training.update import Updater
from method_batches import ACTIONS, CPU, groups_of, make_batch


def make(stage: str, **settings: Any) -> tuple[RunConfig, DRP]:
    texts = [f"{key}={value}" for key, value in settings.items()]
    run = compose("drp", stage, preset="debug", env="" if stage == "pretrain" else "metaworld:reach", settings=texts)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return run, DRP(run.model, image_size=64, action_dim=None if stage == "pretrain" else ACTIONS)


def test_equation_06_latent_dynamics_loss_is_image_plus_weighted_kl() -> None:
    _, method = make("pretrain")
    losses, _ = method.pretrain_losses(make_batch())
    scales = method.loss_scales("pretrain")
    check_scales(losses, scales)
    assert scales == {"masked": 1.0, "image": 1.0, "kl": 1.0}
    # the dynamics loss reaches the DAE ("its gradient flows into [MAT]"); with joint_gradient off it does not
    mat = method.motion.encoder.mat
    (grad,) = torch.autograd.grad(losses["image"] + losses["kl"], mat, retain_graph=True)
    assert grad.abs().max() > 0
    _, apart = make("pretrain", joint_gradient="false")
    losses, _ = apart.pretrain_losses(make_batch())
    assert torch.autograd.grad(losses["image"] + losses["kl"], apart.motion.encoder.mat, allow_unused=True)[0] is None


def test_equation_01_posterior_of_z_uses_the_motion_that_led_to_the_frame() -> None:
    _, method = make("pretrain")
    batch = make_batch()
    embed = torch.randn(2, 8, method.image.embed_dim)

    def deter(flow: Tensor) -> Tensor:
        agg, _ = method.motion.encode(method._atomic_actions({**batch, "flow": flow}), batch["is_first"].cumsum(1))
        torch.manual_seed(1)
        return method.latent.observe(embed, agg, batch["is_first"])[0].deter

    changed = batch["flow"].clone()
    changed[:, 4] += 1.0
    difference = (deter(changed) - deter(batch["flow"])).abs().amax((0, 2))
    assert (difference[:4] == 0).all()
    assert difference[4] > 0


@pytest.mark.parametrize("equation", ["07", "08"])
def test_equation_07_and_08_fine_tuning_keeps_the_pretraining_objectives(equation: str) -> None:
    """L_MAE^ft = L_MAE and L_dyn^ft = L_dyn: the same numbers from the same weights, batch and random state."""
    _, pre = make("pretrain")
    _, fine = make("finetune", context_erasing="false")
    missing = fine.load_state_dict(pre.state_dict(), strict=False)
    assert not missing.unexpected_keys
    batch = make_batch()
    torch.manual_seed(3)
    expected, _ = pre.eval().pretrain_losses(batch)
    torch.manual_seed(3)
    got, _, _ = fine.eval().world_model_losses({**batch, "reward": torch.zeros(2, 8)})
    if equation == "07":
        torch.testing.assert_close(got["masked"], expected["masked"])
    else:
        torch.testing.assert_close(got["latent_kl"], expected["kl"])


def test_equation_09_action_loss_terms_and_weights() -> None:
    run, method = make("finetune")
    losses, _, start = method.world_model_losses(make_batch())
    scales = method.loss_scales("finetune")
    check_scales(losses, scales)
    assert (scales["image"], scales["kl"], scales["reward_representative"]) == (1.0, run.model.beta_s, run.model.beta_r)
    assert start.deter.shape[0] == 2 * 8
    assert not start.deter.requires_grad


def test_equation_03_posterior_of_s_sees_z_only_through_the_adapter() -> None:
    _, method = make("finetune")
    torch.nn.init.zeros_(method.adapter.linear.weight)  # type: ignore[arg-type]
    losses, _, _ = method.world_model_losses(make_batch())
    gradient = torch.autograd.grad(losses["kl"], list(method.image.encoder.parameters()), allow_unused=True)
    # gate and linear map are zero: nothing of o_t reaches s_t, so its KL has no gradient into the encoder
    assert all(g is None or g.abs().max() == 0 for g in gradient)


def test_equation_10_lambda_return_golden_value() -> None:
    from localmotion.models.returns import lambda_return

    got = lambda_return(torch.tensor([1.0, 2, 3]), torch.tensor([0.2, 0.3, 0.4]), torch.tensor(0.4), discount=0.99, lambda_=0.95)
    torch.testing.assert_close(got, torch.tensor([5.9088, 5.2088, 3.3960]), atol=1e-4, rtol=0)


def test_equations_11_and_12_against_a_written_out_rollout() -> None:
    """Critic: half squared error to the stopped return, weighted gamma^i. Actor: minus return minus eta entropy."""
    _, method = make("finetune")
    _, _, start = method.world_model_losses(make_batch())
    behaviour = method.behaviour
    with torch.no_grad():
        for p in behaviour.slow_critic.parameters():
            p.add_(0.01)  # so that slow and fast critic differ

    def reward(feat: Tensor) -> Tensor:
        return method.reward(feat).squeeze(-1)

    torch.manual_seed(5)
    losses, _ = behaviour.losses(start, method.dynamics, reward)
    torch.manual_seed(5)
    rssm, state, feats, entropy = method.dynamics, start, [method.dynamics.feat(start)], []
    for _ in range(behaviour.horizon):
        dist = behaviour.policy(feats[-1].detach())
        entropy.append(dist.entropy().sum(-1))
        state = rssm.img_step(state, dist.rsample())
        feats.append(rssm.feat(state))
    h, gamma, lam = behaviour.horizon, behaviour.discount, behaviour.lambda_
    r = [reward(f) for f in feats]
    v = [behaviour.slow_critic(f).squeeze(-1) for f in feats]
    returns = [torch.zeros(0)] * h + [v[h]]
    for i in reversed(range(h)):
        returns[i] = r[i] + gamma * ((1 - lam) * v[i + 1] + lam * returns[i + 1])
    critic = torch.stack(
        [gamma**i * 0.5 * (behaviour.critic(feats[i].detach()).squeeze(-1) - returns[i].detach()) ** 2 for i in range(h)]
    ).mean()
    actor = -torch.stack([gamma**i * (returns[i + 1] + behaviour.entropy * entropy[i]) for i in range(h - 1)]).mean()
    torch.testing.assert_close(losses["critic"], critic)
    torch.testing.assert_close(losses["actor"], actor)
    # the critic's target is stopped: its gradient does not reach the world model
    gradient = torch.autograd.grad(losses["critic"], list(method.dynamics.parameters()), allow_unused=True, retain_graph=True)
    assert all(g is None for g in gradient)


def test_behaviour_update_leaves_the_world_model_alone() -> None:
    run, method = make("finetune", freeze_updates=0)
    updater = Updater(method, dataclasses.replace(run, online=dataclasses.replace(run.online, lr=0.0)), CPU)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    updater.learn(make_batch())
    changed = {k.split(".")[0] for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"behaviour", "bonus"}
    assert all(p.grad is None for p in method.parameters())


def test_freeze_keeps_pretrained_weights_through_the_first_updates() -> None:
    """As in IPV's release on Meta-World: encoder and latent dynamics do not move in the first updates, the new parts do."""
    run, method = make("finetune", freeze_updates=2)
    updater = Updater(method, run, CPU, pretrained=True)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    for _ in range(2):
        updater.learn(make_batch())
    frozen = ("motion.", "latent.", "image.encoder", "image.context_encoder")
    after = method.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith(frozen))
    assert not torch.equal(after["dynamics.gru.weight"], before["dynamics.gru.weight"])
    updater.learn(make_batch())
    assert not torch.equal(method.state_dict()["latent.gru.weight"], before["latent.gru.weight"])


def test_slow_fine_tuning_applies_to_loaded_parts_only() -> None:
    run, method = make("finetune", pretrained_lr_factor=0.1)
    rates = {g.name: g.lr for g in groups_of(method, run, True)}
    assert rates["motion"] == pytest.approx(0.1 * rates["model"])
    assert {g.lr for g in groups_of(method, run, False) if g.name not in ("actor", "critic")} == {run.online.lr}
    every = [p for g in groups_of(method, run, True) for p in g.parameters]
    assert len({id(p) for p in every}) == len(every)
    left = {n.split(".")[0] for n, p in method.named_parameters() if id(p) not in {id(q) for q in every}}
    assert left == {"behaviour"}  # the slow critic alone


def test_pretraining_reduces_its_losses_on_one_batch() -> None:
    run, method = make("pretrain", **{"pretrain.lr": 3e-3})
    updater, batch = Updater(method, run, CPU), make_batch()
    batch["image"] = batch["image"] // 8 + 200  # noise cannot be learned, brightness can
    first = updater.learn(batch)
    for _ in range(60):
        last = updater.learn(batch)
    assert last["loss/image"] < 0.8 * first["loss/image"]
    assert last["loss/masked"] < first["loss/masked"]


def test_open_loop_prediction_sees_no_future_picture() -> None:
    """Of what comes after the observed frames only the motion may reach a prediction; with zero motion nothing may."""
    _, method = make("pretrain")
    method.eval()
    batch = make_batch()
    other = {k: v.clone() for k, v in batch.items()}
    other["image"][:, 3:] = 255 - other["image"][:, 3:]
    moved = {**other, "flow": other["flow"].clone()}
    moved["flow"][:, 3:] *= -2
    found = []
    for data in (batch, other, moved):
        torch.manual_seed(5)
        found.append(method.open_loop(data, 3))
    torch.testing.assert_close(found[0]["motion"], found[1]["motion"])
    torch.testing.assert_close(found[0]["zero_motion"], found[2]["zero_motion"])
    assert not torch.allclose(found[0]["motion"], found[2]["motion"])


def test_pretrained_state_is_what_finetuning_needs() -> None:
    _, pre = make("pretrain")
    _, fine = make("finetune", context_erasing="false")
    assert {name for name, _ in pre.named_children()} == set(pre.transfers)
    assert set(pre.state_dict()) <= set(fine.state_dict())


@pytest.mark.parametrize("embed_input", ["true", "false"])
@pytest.mark.parametrize("adapter", ["attention", "mlp", "linear"])
def test_variants_of_the_posterior_run(embed_input: str, adapter: str) -> None:
    _, method = make("finetune", embed_input=embed_input, adapter=adapter)
    losses, _, _ = method.world_model_losses(make_batch())
    assert all(torch.isfinite(v) for v in losses.values())


def test_trivial_predictors_by_hand() -> None:
    patches = torch.zeros(1, 3, 2, 1, 1, 2)
    patches[0, :, 0, 0, 0, 0] = torch.tensor([1.0, 2.0, 4.0])
    patches[0, :, 1, 0, 0, 0] = torch.tensor([10.0, 20.0, 40.0])
    track = torch.zeros(1, 3, 2, dtype=torch.int32)
    track[0, 2, 1] = 1  # redrawn
    seen = torch.ones(1, 3, 2, dtype=torch.bool)
    masked = torch.tensor([[[False, False], [True, False], [False, True]]])
    guess = trivial_reconstructions(Motion(patches, torch.zeros(1, 3, 2, 2), seen, track), masked)
    assert guess["zero"].abs().max() == 0
    assert guess["frame_mean"][0, 1, 0, 0, 0, 0] == 20  # the other part, visible in the same frame
    assert guess["nearest_time"][0, 1, 0, 0, 0, 0] == 1  # t=0 and t=2 are as near: the earlier
    assert guess["nearest_time"][0, 2, 1, 0, 0, 0] == 4  # the track is new: frame mean


def test_heldout_figures_are_consistent() -> None:
    _, method = make("pretrain")
    method.eval()
    batch = make_batch()
    found = reconstruction_errors(method, batch, torch.Generator().manual_seed(0))
    assert found is not None
    motion = atomic_actions(batch["flow"], batch["tracks"], batch["visible"], batch["track_id"], method.config.dae)
    masked = random_mask(motion.visible, method.config.dae.mask_ratio, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[0]["zero"], masked_loss(torch.zeros_like(motion.patches), motion.patches, masked))
    scores, pictures = open_loop_errors(method, batch, context=3)
    assert scores["psnr/last_frame"].shape == (5,)
    assert set(pictures) == {"truth", "last_frame", "motion", "zero_motion"}


# --- the paper's variants (METHODS.md) -----------------------------------------------------------------------------------

VARIANTS = {
    "global flow": {"motion_encoder": "global"},
    "w/o intra": {"intra": "false"},
    "w/o inter": {"inter": "false"},
    "w/o coord": {"coord": "false"},
    "w/o temp": {"temporal": "false"},
    "mlp projection": {"adapter": "mlp"},
    "K": {"keypoints": 2},
    "rho": {"mask_ratio": 0.75},
    "P": {"patch": 4},
    "several [MAT] tokens": {"mats": 3},
    "global flow of the same width": {"motion_encoder": "global", "mats": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_learns_acts_and_predicts(variant: str) -> None:
    """Every loss has its weight and reaches every group; acting step by step is what training saw; prediction has its two rows."""
    run, method = make("finetune", **VARIANTS[variant])
    batch = make_batch()
    losses, _, _ = method.world_model_losses(batch)
    scales = method.loss_scales("finetune")
    check_scales(losses, scales)
    assert ("masked" in losses) == ("global flow" not in variant)
    total(losses, scales).backward()
    for group in groups_of(method, run, True):
        if group.name not in ("actor", "critic"):
            assert max(float(p.grad.abs().max()) for p in group.parameters if p.grad is not None) > 0, group.name
    method.eval()
    with torch.no_grad():
        together = method.motion_code(batch)
        carry, apart = method.initial_carry(2), []
        for t in range(8):
            obs = {k: v[:, t : t + 1] for k, v in batch.items() if k not in ("reward", "is_terminal", "action")}
            apart.append(method._recompose_step(obs, carry.motion, 8)[0])
            _, carry = method.act(obs, carry, explore=False, window=8)
    torch.testing.assert_close(torch.stack(apart, 1), together, atol=1e-4, rtol=1e-4)
    scores, _ = open_loop_errors(method, batch)
    assert {"psnr/motion", "psnr/zero_motion"} <= set(scores)


def test_a_variant_changes_what_it_says_and_nothing_else() -> None:
    """Global Flow: the rest of the model has the same parameters, so that a comparison differs in the motion code alone."""
    counts = [make("finetune", **settings)[1].parameter_counts() for settings in ({}, VARIANTS["global flow"])]
    changed = {name for name in counts[0] if counts[0][name] != counts[1][name]}
    assert changed == {"motion"}


def test_global_flow_sees_the_flow_outside_every_patch() -> None:
    batch = make_batch()
    changed = batch | {"flow": batch["flow"].clone(), "visible": torch.zeros_like(batch["visible"])}
    before = make("pretrain", **VARIANTS["global flow"])[1].motion_code(changed)
    changed["flow"][:, 3] += 1.0
    after = make("pretrain", **VARIANTS["global flow"])[1].motion_code(changed)
    difference = (after - before).abs().amax((0, 2))
    assert difference[3] > 0
    assert difference[:3].max() == 0
    assert difference[4:].max() == 0


def test_a_global_code_without_the_dynamics_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="without any loss"):
        make("pretrain", motion_encoder="global", joint_gradient="false")


def test_rebuilding_from_the_code_teaches_the_code() -> None:
    """Off it changes nothing; on, [MAT] learns from it alone to tell the patches that were seen."""
    _, plain = make("pretrain")
    assert "recompose" not in plain.loss_scales("pretrain")
    assert not any("code_decoder" in key for key in plain.state_dict())
    _, method = make("pretrain", recompose_weight="0.5")
    assert method.loss_scales("pretrain")["recompose"] == 0.5
    batch = make_batch()
    losses, _ = method.pretrain_losses(batch)
    (grad,) = torch.autograd.grad(losses["recompose"], [method.motion.encoder.mat])
    assert grad.abs().sum() > 0
    optimizer = torch.optim.Adam(method.motion.parameters(), 3e-3)
    first = losses["recompose"].item()
    for _ in range(60):
        loss = method.pretrain_losses(batch)[0]["recompose"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.93 * first
    shuffled = {**batch, "flow": batch["flow"].flip(1)}
    motion = method._atomic_actions(batch)
    other = method.motion_code(shuffled)
    assert method.motion.loss_from_code(other, motion) > method.motion.loss_from_code(method.motion_code(batch), motion)
    _, fine = make("finetune", recompose_weight="0.5")
    assert set(fine.world_model_losses(batch)[0]) == set(fine.loss_scales("finetune"))
