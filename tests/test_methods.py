"""What every registered method must do. A new method is covered from the moment it is in the registry."""

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
from localmotion.compute import Compute
from localmotion.config import PRESETS, Stage
from localmotion.methods.base import MOTION, check_scales, total
from localmotion.models import distributions, policies
from localmotion.recipe import Recipe
from localmotion.runs import checkpoint
from localmotion.runs.load import load_run
from localmotion.runs.rundir import RunDir
from localmotion.runs.settings import compose, read_config
from localmotion.training.update import Updater
from method_batches import ACTIONS, CPU, groups_of, make, make_batch

NAMES = methods.names()
PRETRAINING = [name for name in NAMES if "pretrain" in methods.get(name).stages]
STAGES: list[tuple[str, Stage]] = [
    (name, stage) for name in NAMES for stage in ("pretrain", "finetune") if stage == "finetune" or name in PRETRAINING
]
BEHAVIOUR = ("actor", "critic")


def observation(batch: dict[str, Tensor], t: int, rows: slice = slice(None), first: bool | None = None) -> dict[str, Tensor]:
    """Position t of a batch as acting sees it."""
    obs = {k: v[rows, t : t + 1] for k, v in batch.items() if k not in ("reward", "is_terminal", "action")}
    return obs if first is None else obs | {"is_first": torch.full_like(obs["is_first"], first)}


def play(method: Any, batch: dict[str, Tensor], *, explore: bool = False, seed: int = 0) -> Tensor:
    """Actions (B, T, A) of an agent that is shown the batch's pictures, whatever it does."""
    torch.manual_seed(seed)
    time = batch["image"].shape[1]
    carry, actions = method.initial_carry(len(batch["image"])), []
    with torch.no_grad():
        for t in range(time):
            action, carry = method.act(observation(batch, t), carry, explore=explore, window=time)
            actions.append(action)
    return torch.stack(actions, 1)


def losses_of(method: Any, stage: str, batch: dict[str, Tensor], seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """World-model losses of a stage, and the states that imagination starts from."""
    torch.manual_seed(seed)
    if stage == "pretrain":
        return method.pretrain_losses(batch)[0], None
    losses, _, start = method.world_model_losses(batch)
    return losses, start


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


# --- what it says of itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_method_names_its_paper_and_stands_in_the_table(name: str) -> None:
    cls = methods.get(name)
    assert cls.name == name
    paper = re.search(r"arXiv \d{4}\.\d{5}", cls.paper)
    assert paper, cls.paper
    assert paper.group() in (inspect.getmodule(cls).__doc__ or "")
    assert cls.__doc__
    assert cls.Config.__doc__
    rows = (Path(__file__).parent.parent / "METHODS.md").read_text().splitlines()
    assert any(row.startswith(f"| `{name}` |") and cls.__name__ in row for row in rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compose_for_all_stages(name: str, preset: str) -> None:
    cls = methods.get(name)
    for env in ("metaworld:reach", "dmc:walker_run", "dmcr:hopper_stand", "toy:dot"):
        for stage in ("finetune", "train"):
            run = compose(name, stage, preset=preset, env=env)
            assert isinstance(run.model, cls.Config)
    assert compose(name, "pretrain", preset=preset).pretrain.updates > 0
    # `small` learns on two CPU cores, `debug` runs in seconds: never more than the paper's budget
    budgets = [compose(name, "train", preset=p, env="dmc:walker_run").online.env_steps for p in ("debug", preset, "paper")]
    assert budgets == sorted(budgets)


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_of_its_own_is_one_that_exists(name: str) -> None:
    from localmotion.config import SUITES

    assert {key.partition(":")[0] for key in methods.get(name).SUITES} <= set(SUITES)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_losses_match_their_scales_and_every_group_has_gradients(name: str, stage: Stage) -> None:
    run, method = make(name, stage)
    batch = make_batch()
    losses, start = losses_of(method, stage, batch)
    scales = method.loss_scales(stage)
    check_scales(losses, scales)
    assert all(v.shape == () and torch.isfinite(v) for v in losses.values())
    total(losses, scales).backward()
    if start is not None and len(method.passes(stage)) > 1:
        found, metrics = method.behaviour_losses(start)
        assert set(found) == set(BEHAVIOUR)
        assert all(torch.isfinite(v) for v in [*found.values(), *metrics.values()])
        for key in BEHAVIOUR:  # an actor's loss moves the actor only through its own optimiser
            group = next(g for g in groups_of(method, run, False) if g.name == key)
            gradients = torch.autograd.grad(found[key], group.parameters, retain_graph=True)
            for p, gradient in zip(group.parameters, gradients, strict=True):
                p.grad = gradient
    for group in groups_of(method, run, False):
        gradients = [p.grad for p in group.parameters if p.grad is not None]
        assert gradients, group.name
        assert all(torch.isfinite(g).all() for g in gradients), group.name
        assert max(float(g.abs().max()) for g in gradients) > 0, group.name


@pytest.mark.parametrize(("name", "stage"), STAGES)
@pytest.mark.parametrize("pretrained", [False, True])
def test_every_parameter_has_one_optimiser(name: str, stage: Stage, pretrained: bool) -> None:
    """But for slow copies, which follow without gradient."""
    run, method = make(name, stage)
    groups = groups_of(method, run, pretrained)
    held = [id(p) for group in groups for p in group.parameters]
    assert len(held) == len(set(held))
    left = {key for key, p in method.named_parameters() if id(p) not in set(held)}
    assert all("slow" in key for key in left), left
    assert not any(p.requires_grad for key, p in method.named_parameters() if key in left)
    assert len({group.name for group in groups}) == len(groups)
    assert sum(method.parameter_counts().values()) == sum(p.numel() for p in method.parameters())


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_the_same_seed_gives_the_same_losses(name: str, stage: Stage) -> None:
    found = [losses_of(make(name, stage)[1], stage, make_batch(), seed=3)[0] for _ in range(2)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize(("name", "stage"), STAGES)
@pytest.mark.parametrize("bf16", [False, True])
def test_updates_change_every_group_and_stay_finite(name: str, stage: Stage, bf16: bool) -> None:
    run, method = make(name, stage)
    updater = Updater(method, run, Compute(torch.device("cpu"), bf16, 1, "test"))
    before = [[p.detach().clone() for p in group.parameters] for group in updater.groups]
    for seed in range(2):
        metrics = updater.learn(make_batch(seed=seed))
    assert all(torch.isfinite(v).all() for v in metrics.values())
    for group, old in zip(updater.groups, before, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(group.parameters, old, strict=True)), group.name
    assert all(torch.isfinite(p).all() for p in method.parameters())
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize("name", NAMES)
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


# --- acting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_actions_are_in_range_and_reproducible(name: str) -> None:
    _, method = make(name, "finetune")
    method.eval()
    batch = make_batch()
    for explore in (False, True):
        first, again, other = (play(method, batch, explore=explore, seed=seed) for seed in (0, 0, 1))
        assert first.shape == (2, 8, ACTIONS)
        assert first.abs().max() <= 1
        assert torch.equal(first, again)
        assert not explore or not torch.equal(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_an_episodes_first_step_forgets_the_one_before(name: str) -> None:
    _, method = make(name, "finetune")
    method.eval()
    batch, found = make_batch(), []
    for used in (0, 3):
        carry = method.initial_carry(2)
        with torch.no_grad():
            for t in range(used):
                carry = method.act(observation(batch, t), carry, explore=True, window=8)[1]
            torch.manual_seed(0)
            for t in (4, 5):
                action, carry = method.act(observation(batch, t, first=t == 4), carry, explore=False, window=8)
        found.append(action)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", NAMES)
def test_agents_side_by_side_act_as_alone(name: str, modes: None) -> None:
    """Evaluation steps many environments at once; an agent may not see its neighbours."""
    _, method = make(name, "finetune")
    method.eval()
    batch = make_batch()
    together = play(method, batch)
    alone = torch.cat([play(method, {k: v[row : row + 1] for k, v in batch.items()}) for row in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
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


# --- looking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_open_loop_prediction_has_its_shape_and_sees_no_future_picture(name: str, stage: Stage) -> None:
    _, method = make(name, stage)
    method.eval()
    batch = make_batch()
    future = {**batch, "image": batch["image"].clone()}
    future["image"][:, 3:] = 255 - future["image"][:, 3:]
    past = {**batch, "image": batch["image"].clone()}
    past["image"][:, :3] = 255
    found = []
    for data in (batch, future, past):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(method.open_loop(data, 3))
    assert found[0]
    for row, pictures in found[0].items():
        assert pictures.shape == (2, 8, 3, 64, 64)
        assert torch.isfinite(pictures).all()
        torch.testing.assert_close(pictures, found[1][row])
        assert not torch.equal(pictures[:, 3:], found[2][row][:, 3:])


@pytest.mark.parametrize("name", NAMES)
def test_a_motion_code_is_one_vector_a_frame(name: str) -> None:
    _, method = make(name, "finetune")
    code = method.eval().motion_code(make_batch())
    assert code is None or (code.shape[:2] == (2, 8) and torch.isfinite(code).all())


# --- keeping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(name: str, stage: Stage, tmp_path: Path) -> None:
    """Weights, optimiser and random state through the disk, then one more update: bit by bit the same."""
    batches = [make_batch(seed=seed) for seed in range(3)]
    run, method = make(name, stage)
    out = RunDir(tmp_path / "run", replace(run, recipe=Recipe()))
    updater = Updater(method, run, CPU)
    for batch in batches[:2]:
        updater.learn(batch)
    state = {"stage": stage, "action_dim": ACTIONS}
    saved = checkpoint.save(
        out.path / "checkpoints", 2, tensors={"weights": method.state_dict(), "optimizer": updater.state()}, state=state
    )
    updater.learn(batches[2])

    _, second = make(name, stage)
    torch.nn.init.normal_(next(second.parameters()))
    checkpoint.load_weights(second, checkpoint.read(saved, "weights"), str(saved))
    resumed = Updater(second, run, CPU)
    resumed.load_state(checkpoint.read(saved, "optimizer"))
    resumed.update = 2
    checkpoint.set_rng_state(checkpoint.read(saved, "rng"))
    resumed.learn(batches[2])
    expected = method.state_dict()
    for key, value in second.state_dict().items():
        assert torch.equal(value, expected[key]), key

    if stage != "pretrain":  # and as an agent
        _, agent, _ = load_run(out.path, device="cpu", threads=1)
        checkpoint.load_weights(method, checkpoint.read(saved, "weights"), str(saved))
        assert torch.equal(play(agent, batches[0]), play(method.eval(), batches[0]))


@pytest.mark.parametrize("name", PRETRAINING)
def test_fine_tuning_has_a_place_for_all_that_pretraining_learned(name: str) -> None:
    _, pre = make(name, "pretrain")
    _, fine = make(name, "finetune")
    into = fine.state_dict()
    state = {k: v for k, v in pre.state_dict().items() if k.partition(".")[0] in pre.transfers}
    assert state
    assert {k: v.shape for k, v in state.items()} == {k: into[k].shape for k in state}
    assert set(state) == {k for k in into if k.startswith(tuple(f"{part}." for part in fine.transfers))}


@pytest.mark.parametrize("name", [name for name in PRETRAINING if not bool(methods.get(name).wants & MOTION)])
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
    assert f"of image, latent from {tmp_path / 'pre'}" in "".join(said.splitlines())
    assert "PSNR, dB" in said
    assert "prior" in said
    assert '"return_mean"' in said
    page = (tmp_path / "r.html").read_text()
    assert "from the observed frames alone" in page
    shutil.rmtree(tmp_path / "pre")  # the run keeps its recipe, which says how large its pictures are
    recipe = read_config(tmp_path / "fine").recipe
    assert recipe
    assert (recipe.percept_size, recipe.tracks) == (64, 8)
