"""Edges of the core that whole updates do not reach: no noise where none is asked for, rollouts, small ranges, losses that overflow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from localmotion.config import OptimConfig
from localmotion.methods.base import Group
from localmotion.models.distributions import TruncatedNormal
from localmotion.models.rssm import RSSM, RSSMState
from localmotion.models.rssm_block import BlockRSSM
from localmotion.models.values import ReturnRange
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.training import optimizers
from localmotion.training.transfer import load_pretrained
from localmotion.training.update import Updater
from method_batches import ACTIONS, CPU, make, make_batch


@pytest.mark.parametrize("mode", [False, True])
def test_dreamer_v3_takes_the_mode_only_where_it_is_evaluated_and_asked_to(mode: bool) -> None:
    _, method = make("dreamer_v3", "train", f"model.evaluate_mode={str(mode).lower()}")
    method.eval()
    torch.nn.init.normal_(list(method.actor.parameters())[-2], std=0.1)  # it begins with equal actions for all pictures
    obs = {key: value[:, :1] for key, value in make_batch().items()}

    def acts(explore: bool, seed: int) -> torch.Tensor:
        carry = method.initial_carry(2)
        torch.manual_seed(3)  # the latent
        embed = method.observations.encode(obs)[:, 0]
        state = method.dynamics.obs_step(carry.state, carry.action, embed, obs["is_first"][:, 0])
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(method.dynamics, "obs_step", lambda *_: state)
            torch.manual_seed(seed)
            action: torch.Tensor = method.act(obs, carry, explore=explore)[0]
        return action

    assert not torch.equal(acts(True, 0), acts(True, 1))
    assert torch.equal(acts(False, 0), acts(False, 1)) == mode


def test_imagination_clears_the_casts_of_weights_that_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were made without a gradient, and older versions of torch would go on to use them in the losses."""
    _, method = make("dreamer_v3", "train")
    _, _, start = method.world_model_losses(make_batch())
    cleared = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(True))
    method.imagine(start)
    assert cleared


def test_a_step_without_noise_takes_the_likeliest_class() -> None:
    torch.manual_seed(0)
    model = BlockRSSM(embed_dim=6, action_dim=2, deter=16, hidden=8, stoch=3, classes=4, blocks=2, unimix=0.01)
    action = torch.rand(5, 2)
    found = [model.img_step(model.initial(5), action, sample=False) for _ in range(2)]
    assert torch.equal(found[0].stoch, found[1].stoch)
    assert torch.equal(found[0].stoch.argmax(-1), found[0].logits.argmax(-1))


def test_a_rollout_is_its_steps_one_after_another() -> None:
    torch.manual_seed(0)
    model = RSSM(embed_dim=6, action_dim=2, deter=8, hidden=8, stoch=3, classes=4)
    actions = torch.rand(5, 4, 2)
    found = model.imagine(model.initial(5), actions, sample=False)
    state: RSSMState = model.initial(5)
    for t in range(4):
        state = model.img_step(state, actions[:, t], False)
        torch.testing.assert_close(found.deter[:, t], state.deter)
        torch.testing.assert_close(found.stoch[:, t], state.stoch)
    assert not torch.allclose(found.deter[:, 1], found.deter[:, 3])


def test_a_small_range_of_returns_is_not_blown_up() -> None:
    moving = ReturnRange(rate=1.0)
    _, scale = moving(torch.linspace(0, 0.1, 100))
    assert scale == 1.0
    _, scale = moving(torch.linspace(0, 10, 101))
    assert float(scale) == pytest.approx(9.0)


def test_the_mode_of_an_action_lies_within_the_limits() -> None:
    assert TruncatedNormal(torch.tensor([1.5, -2.0, 0.5]), torch.ones(3)).mode.tolist() == [1.0, -1.0, 0.5]


@pytest.mark.parametrize("deferred", [False, True])
def test_a_loss_that_overflows_is_not_applied_though_its_gradient_is_finite(
    deferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, method = make("dreamer_v2", "train")
    updater = Updater(method, run, CPU, deferred=deferred)
    updater.learn(make_batch())
    before = {key: value.clone() for key, value in method.dynamics.state_dict().items()}
    losses = method.world_model_losses

    def overflowing(batch: Any) -> Any:
        found, metrics, start = losses(batch)
        return {**found, "reward": found["reward"] + torch.inf}, metrics, start

    monkeypatch.setattr(method, "world_model_losses", overflowing)
    updater.learn(make_batch(seed=1))
    assert updater.check() == 1
    assert all(torch.equal(value, before[key]) for key, value in method.dynamics.state_dict().items())


def test_a_run_that_goes_on_knows_its_updates_and_how_many_were_skipped() -> None:
    run, method = make("dreamer_v2", "train")
    updater = Updater(method, run, CPU)
    updater.resume(7, 3)
    assert (updater.update, updater.check()) == (7, 3)
    updater.learn(make_batch())
    assert (updater.update, updater.check()) == (8, 3)


def test_learning_rates_of_a_decay_fall_in_a_line_or_a_cosine() -> None:
    run, method = make("drp", "pretrain", "updates=8", "lr_decay=0.5")
    updater = Updater(method, run, CPU)
    line, curve = [], []
    for updater.update in range(9):
        line.append(updater._decay("linear"))
        curve.append(updater._decay("cosine"))
    assert line == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert curve == pytest.approx([1, 1, 1, 1, 1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_a_method_learns_from_as_many_actions_as_it_is_built_for() -> None:
    assert make("ipv", "pretrain")[1].acts is False
    assert make("ipv", "finetune")[1].action_dim == ACTIONS


def test_a_pass_runs_every_so_many_updates_and_steps_its_groups_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = make("dreamer_v2", "train")
    world, behaviour = method.passes("train")
    monkeypatch.setattr(method, "passes", lambda stage: (world, behaviour._replace(every=3)))
    updater = Updater(method, run, CPU)
    moved, told = [], []
    for seed in range(5):
        before = [p.detach().clone() for p in method.behaviour.actor.parameters()]
        told.append("loss/actor" in updater.learn(make_batch(seed=seed)))
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, method.behaviour.actor.parameters(), strict=True)))
    assert moved == told == [True, False, False, True, False]


def test_a_group_that_no_pass_steps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = make("dreamer_v2", "train")
    monkeypatch.setattr(method, "passes", lambda stage, passes=method.passes: passes(stage)[:1])
    with pytest.raises(AssertionError, match=r"\['actor', 'critic'\] are in no pass"):
        Updater(method, run, CPU)


@pytest.mark.parametrize(("name", "decoupled"), [("adam", False), ("adamw", True)])
def test_a_group_has_its_own_weight_decay_and_adamw_takes_it_off_the_weights(name: str, decoupled: bool) -> None:
    """First step by hand: both moments corrected, so the step is the rate times the sign of the gradient that Adam sees."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    group = Group("g", [weight], 0.1, optimizer=name, weight_decay=0.5)
    weight.grad = torch.tensor([0.25, 0.25])
    optimizers.make(group, OptimConfig(eps=0.0, weight_decay=7.0)).step()
    # Adam: gradients 0.25 + 0.5 w = (1.25, -1.25). AdamW: gradients (0.25, 0.25), and w shrinks by 0.1 * 0.5 of itself.
    expected = [2.0 * 0.95 - 0.1, -3.0 * 0.95 - 0.1] if decoupled else [1.9, -2.9]
    assert weight.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_part_of_a_checkpoint_may_go_where_another_name_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, source = make("ipv", "pretrain")
    out = RunDir(tmp_path / "pre", run)
    checkpoint.save(out.path / "checkpoints", 1, tensors={"weights": source.state_dict()}, state={"stage": "pretrain"})
    run, method = make("ipv", "finetune", f"checkpoint={out.path}")
    method.teacher = copy.deepcopy(method.latent)
    for parameter in [*method.teacher.parameters(), *method.latent.parameters()]:
        parameter.data.normal_()
    student = {key: value.clone() for key, value in method.latent.state_dict().items()}
    monkeypatch.setattr(type(method), "transfers", {"latent": "teacher"})
    load_pretrained(method, run)
    assert all(torch.equal(value, source.latent.state_dict()[key]) for key, value in method.teacher.state_dict().items())
    assert all(torch.equal(value, student[key]) for key, value in method.latent.state_dict().items())
