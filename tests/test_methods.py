"""What every registered method must do: the rules of localmotion.testing, and what else our Dreamers have in common.

A new method is covered from the moment it is in the registry.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localmotion import methods
from localmotion.cli import main
from localmotion.methods.base import MOTION
from localmotion.models import distributions, policies
from localmotion.recipe import Recipe
from localmotion.runs import checkpoint
from localmotion.runs.load import load_run
from localmotion.runs.rundir import RunDir
from localmotion.runs.settings import read_config
from localmotion.testing import Check, Subject, checks_of
from localmotion.testing.acts import agents_act_as_if_alone, play
from localmotion.testing.learns import updates_can_be_replayed
from method_batches import ACTIONS, AGENTS, groups_of, make, make_batch

NAMES = methods.names()
PRETRAINING = [name for name in AGENTS if "pretrain" in methods.get(name).stages]
BEHAVIOUR = ("actor", "critic")
CONTEXT = "the decoder attends to one frame of the segment, whichever episode it is of (IPV's context)"
ACROSS = {"drp": {"image": CONTEXT, "latent_image": CONTEXT}, "ipv": {"image": CONTEXT}}
ACROSS |= {name: {"policy": "PPO scales the advantages of a batch together"} for name in ("lapo", "laom", "masklam")}
"""Losses of several episodes."""


# --- the rules ----------------------------------------------------------------------------------------------------------


def checks(name: str) -> list[Check]:
    """Of all stages but `train`, which is fine-tuning without a checkpoint; test_graphs.py replays the updates of agents."""
    cls = methods.get(name)
    found = checks_of(cls, stages=[stage for stage in cls.stages if stage != "train"], across=ACROSS.get(name, {}))
    return [check for check in found if name not in AGENTS or check.rule is not updates_can_be_replayed]


@pytest.mark.parametrize("check", [check for name in NAMES for check in checks(name)], ids=str)
def test_a_method_keeps_the_rules(check: Check) -> None:
    check()


@pytest.mark.parametrize("name", AGENTS)
def test_agents_side_by_side_act_as_alone(name: str, modes: None) -> None:
    """Without noise the rule also compares a batch of one with a batch of two."""
    agents_act_as_if_alone(Subject(methods.get(name), "finetune"))


# --- what the package's own methods have in common ----------------------------------------------------------------------


def observation(batch: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """Position t of a batch as acting sees it."""
    return {k: v[:, t : t + 1] for k, v in batch.items() if k not in ("reward", "is_terminal", "action")}


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise: latents are their most likely class and policies their mean, whatever order a path draws in."""

    def no_gumbel(shape: Any, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(tuple(shape), device=like.device)

    def no_normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros_like(like)

    quiet = {(distributions, "gumbel"): no_gumbel, (policies, "normal"): no_normal}
    loaded = [module for name, module in sys.modules.items() if name.startswith("localmotion.")]
    for (home, name), nothing in quiet.items():
        noisy = getattr(home, name)
        for module in loaded:
            if getattr(module, name, None) is noisy:
                monkeypatch.setattr(module, name, nothing)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_names_its_paper_and_stands_in_the_table(name: str) -> None:
    cls = methods.get(name)
    assert cls.name == name
    paper = re.search(r"arXiv \d{4}\.\d{5}|ECCV \d{4}", cls.paper)  # the second: not on arXiv
    assert paper, cls.paper
    assert paper.group() in (inspect.getmodule(cls).__doc__ or "")
    assert cls.__doc__
    assert cls.Config.__doc__
    rows = (Path(__file__).parent.parent / "METHODS.md").read_text().splitlines()
    assert any(row.startswith(f"| `{name}` |") and cls.__name__ in row for row in rows)


@pytest.mark.parametrize("name", [name for name in AGENTS if len(make(name, "finetune")[1].passes("finetune")) > 1])
def test_actor_and_critic_learn_from_their_own_loss(name: str) -> None:
    """Every parameter of both has a gradient of its own loss."""
    run, method = make(name, "finetune")
    found, metrics = method.behaviour_losses(method.world_model_losses(make_batch())[2])
    assert set(found) == set(BEHAVIOUR)
    assert all(torch.isfinite(v) for v in [*found.values(), *metrics.values()])
    for key in BEHAVIOUR:
        group = next(g for g in groups_of(method, run, False) if g.name == key)
        gradients = torch.autograd.grad(found[key], group.parameters, retain_graph=True)
        assert all(torch.isfinite(g).all() for g in gradients)
        assert max(float(g.abs().max()) for g in gradients) > 0


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("pretrained", [False, True])
def test_only_slow_copies_and_teachers_have_no_optimiser(name: str, pretrained: bool) -> None:
    run, method = make(name, "finetune")
    held = {id(p) for group in groups_of(method, run, pretrained) for p in group.parameters}
    assert all("slow" in key or "teacher" in key for key, p in method.named_parameters() if id(p) not in held)


@pytest.mark.parametrize("name", AGENTS)
def test_what_follows_an_episodes_end_knows_nothing_of_it(name: str, modes: None) -> None:
    """States after an is_first inside a sequence are the same whatever came before."""
    _, method = make(name, "finetune")
    method.eval()
    batch, other = make_batch(), make_batch(seed=1)
    for key, value in batch.items():
        value[:, :4] = other[key][:, :4] if key != "is_first" else value[:, :4]
    one, two = make_batch(), batch
    for data in (one, two):
        data["is_first"][:, 4], data["visible"][:, 4], data["action"][:, 4] = True, False, 0.0
    with torch.no_grad():
        found = [method.world_model_losses(data)[2].deter.view(2, 8, -1) for data in (one, two)]
    torch.testing.assert_close(found[0][:, 4:], found[1][:, 4:], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found[0][:, :4], found[1][:, :4])


@pytest.mark.parametrize("name", AGENTS)
def test_acting_step_by_step_meets_the_states_of_training(name: str, modes: None) -> None:
    """`act` walks where `observe` walks: the states of a played sequence are those of the same sequence in a batch."""
    _, method = make(name, "finetune")
    method.eval()
    batch, states, actions = make_batch(), [], [torch.zeros(2, ACTIONS)]
    carry = method.initial_carry(2)
    with torch.no_grad():
        for t in range(8):
            action, carry = method.act(observation(batch, t), carry, explore=False, window=8)
            states.append(carry.state)
            actions.append(action)
        batch["action"] = torch.stack(actions[:-1], 1)  # action[t] led to frame t
        start = method.world_model_losses(batch)[2]
    for field in ("deter", "logits"):
        played = torch.stack([getattr(state, field) for state in states], 1).flatten(0, 1)
        torch.testing.assert_close(played, getattr(start, field), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", AGENTS)
def test_a_saved_run_acts_as_the_method_did(name: str, tmp_path: Path) -> None:
    run, method = make(name, "finetune")
    out = RunDir(tmp_path / "run", replace(run, recipe=Recipe()))
    state = {"stage": "finetune", "action_dim": ACTIONS}
    checkpoint.save(out.path / "checkpoints", 2, tensors={"weights": method.state_dict()}, state=state)
    subject = Subject(methods.get(name), "finetune")
    _, agent, _ = load_run(out.path, device="cpu", threads=1)
    assert torch.equal(play(subject, agent, subject.data()), play(subject, method.eval(), subject.data()))


def perceives(name: str) -> bool:
    """Whether pre-training reads motion, with the default settings."""
    cls = methods.get(name)
    return bool(cls.needs(cls.Config(), "pretrain") & MOTION)


@pytest.mark.parametrize("name", [name for name in PRETRAINING if not perceives(name)])
def test_commands_run_end_to_end_without_motion(
    name: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a clip store whose motion is never read; the method with motion has its own test in test_runs.py."""
    one = ["--set", "threads=1", "--set", "device=cpu", "--set", "precision=fp32"]
    train = ["--method", name, "--preset", "debug", *one]
    quick = ["--env", "toy:dot", "--env_steps", "160", "--prefill", "60"]
    main(["pretrain", *train, "--data", str(store), "--run", str(tmp_path / "pre"), "--heldout_fraction", "0.4"])
    main(["finetune", *train, *quick, "--checkpoint", str(tmp_path / "pre"), "--run", str(tmp_path / "fine")])
    main(["train", *train, *quick, "--run", str(tmp_path / "scratch")])
    main(["evaluate", str(tmp_path / "fine"), "--episodes", "1"])
    strips = str(tmp_path / "x.png")
    main(["predict", "--checkpoint", str(tmp_path / "pre"), "--data", str(store), "--out", strips, "--split", "all"])
    main(["report", *(str(tmp_path / run) for run in ("pre", "fine", "scratch")), "--out", str(tmp_path / "r.html")])
    said = capsys.readouterr().out
    parts = ", ".join(methods.get(name).transfers)
    assert f"of {parts} from {tmp_path / 'pre'}" in "".join(said.splitlines())
    assert "PSNR, dB" in said
    row = {"prelar": "zero_action"}.get(name, "prior")
    assert row in said
    assert '"return_mean"' in said
    page = (tmp_path / "r.html").read_text()
    assert {"prior": "from the observed frames alone", "zero_action": "with latent actions of zero"}[row] in page
    shutil.rmtree(tmp_path / "pre")  # the run keeps its recipe, which says how large its pictures are
    recipe = read_config(tmp_path / "fine").recipe
    assert recipe
    assert (recipe.percept_size, recipe.tracks) == (64, 8)
