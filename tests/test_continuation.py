"""No value follows an end of the task (`behaviour.continuation`): returns, head, what it learns from, where it is on, and who says so.

`test_updates_…[*-ends]` of test_written_out.py, test_written_updates.py, test_prelar.py and test_diswm.py hold whole updates with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from examples.add_a_method import Flat
from torch import Tensor, nn

from localmotion import foreign, methods
from localmotion.acting.episodes import Rollout
from localmotion.config import BehaviourConfig
from localmotion.errors import ConfigError
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.continuation import Continuation
from localmotion.models.returns import lambda_return
from localmotion.models.rssm import RSSMState
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs import checkpoint
from localmotion.runs.settings import compose
from localmotion.training import trials
from localmotion.training.finetune import finetune
from localmotion.training.interrupt import Interrupted, StopRequest
from localmotion.training.update import Updater
from method_batches import ACTIONS, AGENTS, CPU, groups_of, make, make_batch
from test_learning import Line
from test_resume import Stops

IMAGINING = [name for name in AGENTS if isinstance(getattr(methods.get(name).Config(), "behaviour", None), BehaviourConfig)]
WALK = "own_envs:drawn"


# 1. Returns -------------------------------------------------------------------------------------------------------------------


def test_a_return_with_given_continuations_is_a_golden_value() -> None:
    """gamma 0.9, lambda 0.5, c = 1, 0.5, 0. From the end: G_2 = 3; G_1 = 2 + 0.45 (10 + 1.5); G_0 = 1 + 0.9 (5 + G_1 / 2)."""
    reward, value = torch.tensor([[1.0], [2], [3]]), torch.tensor([[10.0], [20], [30]])
    found = lambda_return(reward, value, value[-1], discount=0.9 * torch.tensor([[1.0], [0.5], [0]]), lambda_=0.5)
    assert found.flatten().tolist() == pytest.approx([8.72875, 7.175, 3.0], rel=1e-6)


def test_a_tensor_of_one_discount_is_the_constant() -> None:
    torch.manual_seed(0)
    reward, value = torch.randn(2, 7, 5)
    one = lambda_return(reward, value, value[-1], discount=0.99, lambda_=0.95)
    other = lambda_return(reward, value, value[-1], discount=torch.full_like(reward, 0.99), lambda_=0.95)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Given(Continuation):
    """A head that knows: c = 1 left of an edge, 0 right of it."""

    def __init__(self, edge: float) -> None:
        nn.Module.__init__(self)
        self.edge = edge

    def logits(self, feat: Tensor) -> Tensor:
        return torch.where(feat.squeeze(-1) < self.edge, 1e9, -1e9)


class Still:
    """A world model in which each step adds 1 to a point, whatever the action (but for its gradient)."""

    def feat(self, state: RSSMState) -> Tensor:
        return state.deter

    def img_step(self, state: RSSMState, action: Tensor) -> RSSMState:
        return RSSMState(state.logits, state.stoch, state.deter + 1 + 0 * action)


def agent(**more: Any) -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(1, 1, units=8, layers=2, horizon=5, discount=0.9, lambda_=0.8, entropy=0.3, **more)


def losses(of: ActorCritic, world: Any, head: Continuation | None, count: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    none = torch.zeros(count, 0, 0)
    torch.manual_seed(1)
    start = RSSMState(none, none, torch.linspace(0, 0.1, count).unsqueeze(-1))
    return of.losses(start, world, lambda feat: 1 - 0.3 * feat.squeeze(-1).abs(), head)


def test_where_nothing_ends_losses_and_gradients_are_those_of_the_constant_discount() -> None:
    of = agent()
    (plain, metrics), (ending, more) = losses(of, Line(), None), losses(of, Line(), Given(9e9))
    assert more.pop("imagined/continue") == 1
    assert metrics.keys() == more.keys()
    for name, parameters in (("actor", of.actor.parameters()), ("critic", of.critic.parameters())):
        torch.testing.assert_close(plain[name], ending[name], rtol=1e-5, atol=1e-6)
        weights = list(parameters)
        one, other = torch.autograd.grad(plain[name], weights), torch.autograd.grad(ending[name], weights)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_nothing_after_an_end_reaches_its_value_and_its_own_reward_does() -> None:
    """States are at 0, 1, 2, .... State 2 is the end: it counts with its reward, and what would follow does not count at all."""
    of = agent()
    kept = losses(of, Still(), Given(1.5), count=1)
    assert kept[1]["imagined/continue"] == pytest.approx(2 / 6)
    with torch.no_grad():
        value = of.critic(torch.arange(3.0).unsqueeze(-1)).squeeze(-1)  # of states 0, 1, 2
        slow = of.slow_critic(torch.arange(3.0).unsqueeze(-1)).squeeze(-1)
    reward = [1.0, 0.7, 0.4]
    last = reward[2]
    middle = reward[1] + 0.9 * (0.2 * slow[2] + 0.8 * last)
    first = reward[0] + 0.9 * (0.2 * slow[1] + 0.8 * middle)
    weights = [1, 0.9, 0.81, 0, 0]
    critic = sum(w * 0.5 * (v - g) ** 2 for w, v, g in zip(weights, value, (first, middle, last), strict=False)) / 5
    torch.testing.assert_close(kept[0]["critic"], critic, rtol=1e-5, atol=1e-6)
    entropy = of.policy(torch.arange(3.0).unsqueeze(-1)).entropy().flatten()
    # The end's own action is not worth anything to learn, but it is weighed as it is reached.
    actor = -(middle + 0.3 * entropy[0] + 0.9 * (last + 0.3 * entropy[1]) + 0.81 * (1 - 0.9 + 0.3 * entropy[2])) / 4
    torch.testing.assert_close(kept[0]["actor"], actor, rtol=1e-5, atol=1e-6)


class Edge(Continuation):
    """A head that is less sure the farther right."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def logits(self, feat: Tensor) -> Tensor:
        return -2 * feat.squeeze(-1)


def test_the_actor_learns_to_stay_away_from_an_end() -> None:
    """All states have the same reward and value, so only the chance of an end tells them apart."""
    of = agent()
    for parameter in of.slow_critic.parameters():
        parameter.zero_()
    of.slow_critic.net[-1].bias.data += 10.0
    none = torch.zeros(64, 0, 0)
    slopes = []
    for head in (None, Edge()):
        torch.manual_seed(1)
        of.entropy = 0.0
        loss, _ = of.losses(RSSMState(none, none, torch.zeros(64, 1)), Line(), lambda feat: torch.ones_like(feat[..., 0]), head)
        mean = of.actor.net[-1].bias
        (slope,) = torch.autograd.grad(loss["actor"], mean, allow_unused=True) if loss["actor"].requires_grad else (None,)
        slopes.append(0.0 if slope is None else float(slope[0]))
    assert slopes[0] == 0
    assert slopes[1] > 0.01  # a step against it moves the mean to the left


# 2. The head ------------------------------------------------------------------------------------------------------------------


def ending_batch() -> dict[str, Tensor]:
    """Half of the sequences end by the task's rules, at their last position, which looks unlike all others."""
    batch = make_batch(4, 6, tracks=8)
    batch["is_terminal"][:2, -1] = True
    batch["image"][:2, -1] = 255
    return batch


def test_these_methods_have_it() -> None:
    assert IMAGINING == ["apv", "diswm", "dreamer_v2", "drp", "ipv", "prelar"]


@pytest.mark.parametrize("name", IMAGINING)
def test_a_method_learns_where_episodes_end(name: str) -> None:
    """The head is in the optimiser of the world model, learns in its pass from its own loss alone, and not in the actor's."""
    run, method = make(name, "finetune", "continuation=true", "model.behaviour.horizon=2", "online.lr=3e-3")
    head = method.continuation
    own = {id(p) for p in head.parameters()}
    groups = groups_of(method, run, False)
    assert [g.name for g in groups if own & {id(p) for p in g.parameters}] == ["model"]
    assert own <= {id(p) for g in groups for p in g.parameters}
    batch = ending_batch()
    parts, _, _ = method.world_model_losses(batch)
    moved = {
        key: torch.autograd.grad(loss, list(head.parameters()), allow_unused=True, retain_graph=True)
        for key, loss in parts.items()
        if loss.requires_grad
    }
    assert {key for key, grads in moved.items() if any(g is not None for g in grads)} == {"continue"}
    updater = Updater(method, run, CPU)
    came = []
    for parameter in head.parameters():
        parameter.register_hook(lambda grad: came.append(bool(grad.any())))
    found = [updater.learn(batch)]
    assert came
    assert len(came) == len(list(head.parameters()))  # once in an update of two passes
    method.train()
    found += [updater.learn(batch) for _ in range(24)]
    values = [float(x["loss/continue"]) for x in found]
    assert values[-1] < 0.5 * values[0]
    assert 0 < found[-1]["imagined/continue"] < 1


@pytest.mark.parametrize("name", IMAGINING)
def test_without_it_nothing_is_different(name: str) -> None:
    """With the head the other weights begin as without it. Without it there is neither head, nor loss, nor metric."""
    run, plain = make(name, "finetune")
    _, ending = make(name, "finetune", "continuation=true")
    assert plain.continuation is None
    one, other = plain.state_dict(), ending.state_dict()
    assert {key for key in other if key not in one} == {key for key in other if key.startswith("continuation.")} != set()
    assert all(torch.equal(one[key], other[key]) for key in one if not key.startswith("teacher."))
    found = Updater(plain, run, CPU).learn(ending_batch())
    assert not [key for key in found if "continue" in key]
    del one, other
    video, _ = make(name, "pretrain", "continuation=true") if name != "dreamer_v2" else make(name, "train")
    assert video.model.behaviour.continuation is (name != "dreamer_v2")


def test_a_method_whose_settings_want_a_head_that_it_has_not_says_so() -> None:
    run = compose(Flat, "train", preset="debug", env="toy:dot", settings=("continuation=true",))
    method = Flat(run.model, image_size=64, action_dim=ACTIONS)
    start = method.world_model_losses(make_batch(2, 5))[2]
    with pytest.raises(ConfigError, match=r"model\.behaviour\.continuation=true: this method has no continuation head"):
        method.behaviour_losses(start)


# 3. Where it is on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGINING)
def test_it_is_on_in_own_environments_and_off_in_all_others(name: str) -> None:
    on = {
        env: compose(name, "train", preset=preset, env=env).model.behaviour.continuation
        for env, preset in (
            ("gym:Pendulum-v1", "paper"),
            ("my_module:make", "tiny"),
            ("mysuite:task", "debug"),
            ("dmc:walker_run", "small"),
            ("metaworld:reach", "paper"),
            ("planar:walker_run", "tiny"),
            ("toy:dot", "debug"),
            ("masklam:walker_run", "debug"),
            ("", "debug"),
        )
    }
    assert list(on.values()) == [True] * 3 + [False] * 6
    own = compose(name, "train", preset="debug", env=WALK, settings=("continuation=false",))
    assert not own.model.behaviour.continuation
    assert compose(Flat, "train", preset="debug", env=WALK).model.behaviour.continuation is False  # it has no head


# 4. Runs ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_trusted", [WALK])
    monkeypatch.setattr(trials, "evaluate", lambda *_, **__: Rollout([0.0], [1]))


def run_of(*more: str, env: str = WALK, **flags: Any) -> Any:
    fixed = {"precision": "fp32", "device": "cpu", "threads": 1, "recipe": {"size": 32, "percept_size": 32, "tracks": 4}}
    few = ("env_steps=60", "prefill=20", "warmup_updates=2", "online.eval_every=100000", "online.save_every=25")
    return compose("dreamer_v2", "train", preset="debug", env=env, flags={**fixed, **flags}, settings=(*few, *more))


SAID = "an episode ended by the task's rules (terminated), and dreamer_v2 expects reward after such an end"


@pytest.mark.parametrize(("env", "more", "count"), [(WALK, (), 0), (WALK, ("continuation=false",), 1), ("toy:dot", (), 0)])
def test_a_run_says_once_that_its_method_does_not_learn_of_ends(
    env: str, more: tuple[str, ...], count: int, own: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says nothing where episodes end by time limits alone. The run with the head logs what it predicts."""
    path = finetune(run_of(*more, env=env, env_options={"time_limit": 8}), tmp_path / "run")
    assert " ".join(capsys.readouterr().out.split()).count(SAID) == count
    log = (path / "metrics.jsonl").read_text()
    assert log.count('"random": ') > 3
    assert ("loss/continue" in log, "imagined/continue" in log) == (env == WALK and not more,) * 2


def test_a_run_with_the_head_in_pieces_is_the_whole_run(own: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finetune(run_of(), tmp_path / "whole")
    stops = Stops(monkeypatch, 45)
    with pytest.raises(Interrupted):
        finetune(run_of(), tmp_path / "pieces")
    del stops
    monkeypatch.setattr(StopRequest, "check", lambda _: None)
    pieces = finetune(run_of(), tmp_path / "pieces")
    one, other = (checkpoint.read(checkpoint.newest(path), "weights") for path in (whole, pieces))
    assert any(key.startswith("continuation.") for key in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ConfigError, match=r"model\.behaviour\.continuation \(True there, False now\)"):
        finetune(run_of("continuation=false"), pieces)


def test_a_run_on_logged_episodes_says_so_too(own: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect(WALK, tmp_path / "logs", policy="random", episodes=4, recipe=Recipe(size=32, percept_size=32, tracks=4))
    for more, count in (((), 1), (("continuation=true",), 0)):
        capsys.readouterr()
        settings = ("online.updates=4", "online.length=5", *more)
        finetune(run_of(*settings, env="", data=str(tmp_path / "logs"), recipe={}), tmp_path / f"run{count}")
        assert " ".join(capsys.readouterr().out.split()).count(SAID) == count
