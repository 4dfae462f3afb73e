"""Learning on-policy: what a rollout holds, runs in pieces, and extras of `act` in rollouts and in a replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from examples.act_extras import ActExtras

from localmotion import methods
from localmotion.acting.episodes import episode_seed
from localmotion.config import RunConfig
from localmotion.envs import make_env
from localmotion.envs.toy import BLOCK_OPTIMAL
from localmotion.errors import ConfigError
from localmotion.methods.base import Batch, Source
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.training.interrupt import StopRequest
from localmotion.training.study_file import load_study
from localmotion.training.update import Updater
from test_resume import Stops, assert_same, in_pieces

FLAGS: dict[str, Any] = {"precision": "fp32", "device": "cpu", "threads": 1, "recipe": {"size": 32, "percept_size": 32}}
FEW = (
    "environments=3",
    "rollout.workers=1",
    "rollout.steps=8",
    "epochs=2",
    "minibatches=2",
    "online.log_every=1",
    "eval_episodes=1",
)


class OffPolicy(ActExtras):
    """The same method on a replay."""

    name = "off_policy"
    stages = {"train": Source.REPLAY}


class Encoding(ActExtras):
    """The same method, whose pictures pass through a frozen part: their negative."""

    name = "encoding"
    encodes = frozenset({"image"})
    asked: ClassVar[list[torch.Tensor]] = []

    def encoded(self, batch: Batch) -> dict[str, torch.Tensor]:
        assert set(batch) == {"image", "is_first"}
        assert not torch.is_grad_enabled()
        self.asked.append(batch["image"])
        return {"image": 255 - batch["image"]}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    methods.register("act_extras", "examples.act_extras", "ActExtras")
    methods.register("off_policy", __name__, "OffPolicy")
    methods.register("encoding", __name__, "Encoding")


def settings(*texts: str, name: str = "act_extras", **flags: Any) -> RunConfig:
    given = {**FLAGS, "env_options": {"time_limit": 6}, **flags}
    return compose(name, "train", preset="debug", env="toy:block", flags=given, settings=(*FEW, *texts))


def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Batches that are learned from, copied."""
    found: list[dict[str, torch.Tensor]] = []
    learn = Updater.learn

    def looked(self: Updater, batch: dict[str, torch.Tensor]) -> Any:
        found.append({key: value.clone() for key, value in batch.items()})
        return learn(self, batch)

    monkeypatch.setattr(Updater, "learn", looked)
    return found


def test_a_rollout_is_encoded_once_and_all_its_updates_see_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = seen(monkeypatch)
    one_rollout = ("env_steps=24", "online.eval_every=100000")
    Encoding.asked.clear()
    for name in ("act_extras", "encoding"):
        finetune(settings(*one_rollout, name=name), tmp_path / name)
    plain, encoded = batches[:4], batches[4:]
    assert sum(len(part) for part in Encoding.asked) == 3  # environments, with two epochs of two updates each
    assert len(encoded) == 4
    for one, other in zip(plain, encoded, strict=True):
        assert torch.equal(255 - one["image"], other["image"])
        assert all(torch.equal(one[key], other[key]) for key in one if key != "image")


def test_a_rollout_holds_what_the_environments_showed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each environment is played again from its seeds and the actions of the batch."""
    batches = seen(monkeypatch)
    run = settings("env_steps=48", "epochs=1", "minibatches=1", "online.eval_every=100000")
    path = finetune(run, tmp_path)
    one, two = batches
    assert one["image"].shape == (3, 9, 32, 32, 3)
    joined = {key: torch.cat([one[key], two[key][:, 1:]], 1) for key in one}
    assert all(torch.equal(one[key][:, -1], two[key][:, 0]) for key in one)  # rollouts overlap by one position
    for index in range(3):
        env, number = make_env("toy:block", size=32, time_limit=6), 0
        for t in range(17):
            action = joined["action"][index, t]
            if joined["is_first"][index, t]:
                number += 1
                obs, _ = env.reset(seed=episode_seed(0, "train", index + 3 * number))
                assert not action.any()
                assert joined["reward"][index, t] == 0
                assert joined["value"][index, t] == 0
            else:
                obs, reward, *_ = env.step(action.numpy())
                assert joined["reward"][index, t] == pytest.approx(reward, abs=1e-6)
                assert joined["log_prob"][index, t] != 0
            np.testing.assert_array_equal(obs["image"], joined["image"][index, t])
        # six steps, one position to begin again
        assert torch.nonzero(joined["is_first"][index]).flatten().tolist() == [0, 7, 14]
    assert not joined["is_terminal"].any()
    rows = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    ended = [row for row in rows if row["kind"] == "episode"]
    assert [row["length"] for row in ended] == [6] * 6
    assert ended[0]["return"] == pytest.approx(float(joined["reward"][0, :7].sum()), abs=1e-5)
    assert [row["agent_step"] for row in rows if row["kind"] == "eval"] == [0, 48]


def test_extras_are_those_of_the_act_that_chose_the_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first update, acting once more on the frame before gives the stored value and log-probability."""
    batches = seen(monkeypatch)
    start: dict[str, torch.Tensor] = {}
    init = ActExtras.__init__

    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        start.update({key: value.clone() for key, value in self.state_dict().items()})

    monkeypatch.setattr(ActExtras, "__init__", kept)
    run = settings("env_steps=24", "epochs=1", "minibatches=1", "online.eval_every=100000")
    finetune(run, tmp_path)
    began = dict(start)
    method = ActExtras(run.model, image_size=32, action_dim=2)
    method.load_state_dict(began)
    batch = batches[0]
    for t in range(1, 9):
        code = method.encoder(batch["image"][:, t - 1].permute(0, 3, 1, 2).float() / 255 - 0.5)
        inside = ~batch["is_first"][:, t]
        value = method.critic(code).squeeze(-1)
        log_prob = method.policy(code).log_prob(batch["action"][:, t]).sum(-1)
        torch.testing.assert_close(batch["value"][inside, t], value[inside], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(batch["log_prob"][inside, t], log_prob[inside], atol=1e-4, rtol=1e-4)


def test_every_environment_is_learned_from_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = seen(monkeypatch)
    finetune(settings("env_steps=24", "online.eval_every=100000"), tmp_path)
    assert [len(batch["reward"]) for batch in batches] == [2, 1, 2, 1]
    for epoch in (batches[:2], batches[2:]):
        rows = torch.cat([batch["image"] for batch in epoch]).flatten(1)
        assert len(rows.unique(dim=0)) == 3


@pytest.mark.parametrize("name", ["act_extras", "off_policy"])
def test_a_run_with_extras_in_pieces_is_the_whole_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("env_steps=150", "online.eval_every=60", "online.save_every=30", "prefill=20", "warmup_updates=2")
    run = settings(*more, "train_every=4", "online.batch_size=2", "online.length=5", name=name)
    whole = finetune(run, tmp_path / "whole")
    looks = [0]
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", lambda _: looks.__setitem__(0, looks[0] + 1))
        finetune(run, tmp_path / "counted")
    Stops(monkeypatch, 9, 13, 17)
    assert in_pieces(finetune, run, tmp_path / "pieces") >= 2
    assert_same(whole, tmp_path / "pieces")
    if name == "off_policy":
        return
    one, other = (json.loads((path / "checkpoints" / "best" / "state.json").read_text()) for path in (whole, tmp_path / "pieces"))
    assert one["score"] == other["score"]


def test_extras_reach_the_replay_with_their_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = seen(monkeypatch)
    few = ("env_steps=60", "prefill=12", "warmup_updates=1", "train_every=6", "online.length=7", "online.eval_every=100000")
    finetune(settings(*few, name="off_policy"), tmp_path)
    last = batches[-1]
    played = last["log_prob"] != 0
    assert played.any()
    assert not played[last["is_first"]].any()
    assert not (~played & ~last["is_first"] & (last["action"].abs().sum(-1) == 0)).any()


def test_a_budget_between_whole_rollouts_says_what_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rollouts of 24, also where the run is stopped after the first. The last update is logged in each."""
    run = settings("env_steps=30", "online.log_every=3", "online.eval_every=100000")
    whole = finetune(run, tmp_path / "whole")
    said = " ".join(capsys.readouterr().out.split())
    assert "48 agent steps = 48 env steps (whole rollouts: the budget is 30 env steps) in 3 environments" in said
    Stops(monkeypatch, 9, 13, 17)  # longer than an evaluation, which is made anew after a stop
    assert in_pieces(finetune, run, tmp_path / "pieces") >= 1
    assert_same(whole, tmp_path / "pieces")
    rows = [json.loads(text) for text in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows if row["kind"] == "train"] == [3, 6, 8]


def test_a_budget_below_one_rollout_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    said = r"env_steps=23 is less than one rollout: 3 environments x 8 agent steps = 24; raise env_steps, or lower rollout\.envir"
    with pytest.raises(ConfigError, match=said):
        finetune(settings("env_steps=23"), tmp_path / "run")
    assert not list(tmp_path.glob("run/*.json"))
    with pytest.raises(ConfigError, match=r"8 agent steps x 2 env steps = 48"):
        finetune(settings("env_steps=47", action_repeat=2), tmp_path / "run")


def test_a_study_with_a_budget_below_one_rollout_is_refused(tmp_path: Path) -> None:
    text = "preset: debug\nsettings: {online: {env_steps: 20}, rollout: {environments: 3, steps: 8, minibatches: 2}}\n"
    (tmp_path / "study.yaml").write_text(text + "tasks: [toy:block]\nseeds: [0]\nvariants: {A: {method: act_extras}}\n")
    with pytest.raises(ConfigError, match=r"A-toy_block-0: online\.env_steps=20 is less than one rollout"):
        load_study(tmp_path / "study.yaml")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.minibatches=4 is more than rollout\.environments=3"):
        finetune(settings("minibatches=4"), tmp_path)
    with pytest.raises(ConfigError, match="learns from values that its policy computes while acting"):
        finetune(replace(settings(), data=str(tmp_path)), tmp_path)


@pytest.mark.slow
def test_the_example_learns_the_block_on_policy(tmp_path: Path) -> None:
    """From 15 of 49 with random actions."""
    texts = ("environments=8", "rollout.steps=32", "epochs=4", "minibatches=2", "online.lr=3e-4", "online.eval_every=100000")
    reached = []
    for steps in (30_000, 60_000):
        run = settings(*texts, f"env_steps={steps}", "discount=0.9", "eval_episodes=10", env_options={})
        rows = [json.loads(text) for text in (finetune(run, tmp_path) / "metrics.jsonl").read_text().splitlines()]
        reached.append([row for row in rows if row["kind"] == "eval"][-1]["return_mean"])
        if reached[-1] > 0.8 * BLOCK_OPTIMAL:
            break
    assert reached[-1] > 0.8 * BLOCK_OPTIMAL, reached
