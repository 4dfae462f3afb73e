"""PPO of latent action models: probabilities, advantages, what a rollout teaches and what not, checkpoints, refusals, runs in pieces."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from localmotion import methods
from localmotion.cli import main
from localmotion.config import RunConfig
from localmotion.envs.toy import BLOCK_OPTIMAL, BLOCK_RANDOM
from localmotion.errors import CheckpointError, ConfigError
from localmotion.methods.base import acted
from localmotion.models.latent_windows import pictures, whole
from localmotion.models.ppo import RewardHeads, advantages, clipped_log_prob, normalised, policy_loss
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs import checkpoint
from localmotion.runs.load import load_run
from localmotion.runs.rundir import RunDir
from localmotion.runs.settings import compose
from localmotion.testing import Subject
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain
from localmotion.training.rollout import RolloutLoop
from localmotion.training.transfer import load_pretrained
from method_batches import CPU
from test_resume import Stops, assert_same, in_pieces

NAMES = [name for name in methods.names() if "clone" in methods.get(name).stages]
PAIRS = [
    ("lapo", ()),
    ("lapo", ("model.form=continuous",)),
    ("masklam", ("mask_channel=false", "decoder_until=0.5")),
    ("laom", ()),
]
FLAGS: dict[str, Any] = {"precision": "fp32", "device": "cpu", "threads": 1}
OPTIONS: dict[str, Any] = {"env": "toy:block", "env_options": {"time_limit": 6}}


# --- probabilities and advantages -------------------------------------------------------------------------------------


def test_a_clipped_action_has_the_density_inside_and_the_mass_beyond_at_an_end() -> None:
    mean, log_std = torch.tensor([0.4, -0.9], dtype=torch.float64), torch.tensor([-0.5, 0.2], dtype=torch.float64)
    normal = Normal(mean, log_std.exp())
    inside = torch.tensor([[0.3, -0.99], [-0.2, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(clipped_log_prob(inside, mean, log_std), normal.log_prob(inside).sum(-1))
    for end, beyond in ((1.0, 1 - normal.cdf(torch.ones(2))), (-1.0, normal.cdf(-torch.ones(2)))):
        found = clipped_log_prob(torch.full((2,), end, dtype=torch.float64), mean, log_std)
        torch.testing.assert_close(found, beyond.log().sum())
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None]
    density = clipped_log_prob(grid, mean[:1], log_std[:1]).exp().sum() * 1e-4
    ends = sum(clipped_log_prob(torch.tensor([end]), mean[:1], log_std[:1]).exp() for end in (-1.0, 1.0))
    assert float(density + ends) == pytest.approx(1, abs=1e-4)


def test_a_far_action_has_a_finite_gradient() -> None:
    mean = torch.tensor([30.0, -30.0], requires_grad=True)
    (slope,) = torch.autograd.grad(clipped_log_prob(torch.tensor([-1.0, 1.0]), mean, torch.full((2,), -2.0)), mean)
    assert torch.isfinite(slope).all()
    assert slope[0] < 0 < slope[1]


def naive(reward: Tensor, value: Tensor, terminal: Tensor, inside: Tensor, discount: float, lambda_: float) -> Tensor:
    """A_t as a sum over k of (discount lambda)^k times the error of step t + k, until the episode is over."""
    out = torch.zeros_like(reward)
    for b, t in itertools.product(*map(range, reward.shape)):
        factor = 1.0
        for k in range(t, reward.shape[1]):
            if not inside[b, k]:
                break
            follows = 0.0 if terminal[b, k] else float(value[b, k + 1])
            out[b, t] += factor * (float(reward[b, k]) + discount * follows - float(value[b, k]))
            if terminal[b, k]:
                break
            factor *= discount * lambda_
    return out


def test_advantages_are_those_of_a_loop_over_episodes() -> None:
    g = torch.Generator().manual_seed(0)
    reward, value = torch.randn(6, 20, generator=g), torch.randn(6, 21, generator=g)
    inside = torch.rand(6, 20, generator=g) > 0.15
    terminal = (torch.rand(6, 20, generator=g) < 0.1) & inside
    found = advantages(reward, value, terminal, inside, discount=0.9, lambda_=0.8)
    assert terminal.any()
    assert not inside.all()
    torch.testing.assert_close(found, naive(reward, value, terminal, inside, 0.9, 0.8), atol=1e-5, rtol=1e-5)


def test_the_value_after_a_time_limit_counts_and_after_a_terminal_step_does_not() -> None:
    reward, value = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0, 10.0]])
    inside = torch.ones(1, 2, dtype=torch.bool)
    ended = torch.tensor([[False, True]])
    options = {"discount": 0.5, "lambda_": 1.0}
    assert advantages(reward, value, ended, inside, **options).tolist() == [[1.5, 1.0]]
    assert advantages(reward, value, ~inside, inside, **options).tolist() == [[1 + 0.5 * 6, 6.0]]


def test_a_ratio_beyond_the_clip_has_no_gradient_and_is_counted() -> None:
    """Written-out numbers: ratios 1.5, 0.5, 1.1 and one without weight."""
    old = torch.zeros(4)
    log_prob = torch.tensor([1.5, 0.5, 1.1, 9.0]).log().requires_grad_()
    advantage, weight = torch.tensor([2.0, -1.0, 3.0, 7.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, metrics = policy_loss(log_prob, old, advantage, weight, 0.2)
    assert float(loss.detach()) == pytest.approx(-(1.2 * 2 - 0.8 + 3.3) / 3)
    assert float(metrics["policy/clipped"]) == pytest.approx(2 / 3)
    (slope,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, -1.1, 0.0]))
    other, _ = policy_loss(log_prob, old, -advantage, weight, 0.2)  # now both move back: no clipping
    torch.testing.assert_close(torch.autograd.grad(other, log_prob)[0], torch.tensor([1.0, -0.5 / 3, 1.1, 0.0]))
    scaled = normalised(advantage, weight)[:3]
    torch.testing.assert_close(scaled, (advantage[:3] - 4 / 3) / advantage[:3].std(correction=0))


# --- the heads --------------------------------------------------------------------------------------------------------


def test_the_decoder_acts_alone_until_the_stage_begins() -> None:
    heads = RewardHeads(3, 2, log_std=-1.0, noise=0.0)
    decoded, features = torch.tensor([[0.5, 3.0]]), torch.ones(1, 3)
    with torch.no_grad():
        heads.action.bias.fill_(0.25)
    assert heads.act(decoded, features, explore=True)[0].tolist() == [[0.5, 1.0]]
    heads.begin(0.5)
    assert heads.act(decoded, features, explore=False)[0].tolist() == [[0.375, 1.0]]
    torch.manual_seed(0)
    drawn = heads.act(torch.zeros(4000, 2), torch.zeros(4000, 3), explore=True)[0]
    assert float(drawn.detach().std()) == pytest.approx(math.exp(-1), rel=0.05)


def made(name: str, *settings: str, stage: str = "finetune") -> tuple[Subject, Any]:
    """A method at the start of the stage, with weights that are not zero."""
    subject = Subject(methods.get(name), stage, settings=settings)
    method = subject.awake()
    subject.groups(method)
    return subject, method


def rollout(subject: Subject, method: Any, begin: int = 4, time: int = 8) -> dict[str, Tensor]:
    """A batch whose actions and extras are those of `act`, with an episode that begins within it, as `RolloutLoop` makes it."""
    batch = subject.data()
    batch["is_first"][:, begin] = True
    carry = method.initial_carry(2)
    torch.manual_seed(3)
    for t in range(time):
        obs = {key: batch[key][:, t : t + 1] for key in ("image", "is_first")}
        with torch.no_grad():
            action, carry, extras = acted(method, obs, carry, explore=True, window=time)
        for key, value in {"action": action, **extras}.items():
            if t + 1 < time:
                fresh = batch["is_first"][:, t + 1].view(-1, *[1] * (value.ndim - 1))
                batch[key][:, t + 1] = torch.where(fresh, 0.0, value)
    return batch


@pytest.mark.parametrize(("name", "settings"), PAIRS)
def test_losses_see_the_policy_that_acted(name: str, settings: tuple[str, ...]) -> None:
    """Before the first update every ratio is 1, at the start of an episode and behind it."""
    subject, method = made(name, *settings)
    batch = rollout(subject, method)
    _, metrics = method.reward_losses(batch)
    assert float(metrics["policy/kl"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["policy/clipped"]) == 0
    batch["log_prob"] = batch["log_prob"] + 0.3
    assert float(method.reward_losses(batch)[1]["policy/clipped"]) == 1


def test_a_stack_from_before_the_rollout_is_left_out() -> None:
    """A rollout begins in the middle of an episode: its first positions lack frames that acting saw."""
    is_first = torch.tensor([[False, False, False, False, True, False, False], [True] + 6 * [False]])
    assert whole(is_first, 3).tolist() == [[False, False, True, True, True, True, True], [True] * 7]
    assert whole(is_first, 1).all()
    subject, method = made("laom")
    batch = rollout(subject, method)
    batch["is_first"][:, 0] = False
    batch["log_prob"][:, 1:3] += 1  # of the first two steps
    assert float(method.reward_losses(batch)[1]["policy/clipped"]) == 0


@pytest.mark.parametrize(("name", "settings"), PAIRS)
def test_pairs_of_latent_action_and_action_stay_in_their_episode(name: str, settings: tuple[str, ...]) -> None:
    """The decoder's loss is that of the windows within an episode, cut one by one."""
    subject, method = made(name, *settings)
    batch, before = subject.data(), 2 if name == "lapo" and not settings else 3
    batch["is_first"][0, 0], batch["is_first"][0, 4] = False, True  # the first sequence begins in the middle of an episode
    frames = pictures(batch["image"]) * (2 if name == "laom" else 1)
    errors = []
    for b in range(2):
        for t in [t for t in range(7) if b == 1 or before - 1 <= t <= 2 or t >= 4]:
            least = 4 if b == 0 and t >= 4 else 0  # an episode begins with copies of its first frame
            index = [max(t - back, least) for back in range(before - 1, -2, -1)]
            old, new = frames[b, index[:-1]].flatten(0, 1)[None], frames[b, index[1:]].flatten(0, 1)[None]
            with torch.no_grad():
                if name == "lapo":
                    z = method.inverse(torch.cat([old, frames[b, t + 1][None]], 1))
                else:
                    z = method._latents(old, new)[1] if name == "laom" else method.inverse(torch.cat([old, new], 1))
                errors.append((method.head(z)[0] - batch["action"][b, t + 1]).square().mean())
    loss, _ = method.pair_losses(batch)
    torch.testing.assert_close(loss["action"], torch.stack(errors).mean())
    assert len(errors) == 7 + 3 + 4 - before


# --- what changes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_stage_changes_policy_heads_and_decoder_only(name: str) -> None:
    """The decoder of MaskLAM stays, because a rollout has no masks. A policy from a checkpoint waits."""
    subject = Subject(methods.get(name), "finetune", settings=("freeze_updates=2",))
    own = {"policy", "heads"} | ({"head"} if name != "masklam" else set())
    for pretrained, updates, parts in ((False, 1, own), (True, 2, own - {"policy"}), (True, 3, own)):
        method = subject.awake()
        before = {key: value.clone() for key, value in method.state_dict().items()}
        updater = subject.updater(method, CPU, pretrained=pretrained)
        for seed in range(updates):
            updater.learn(subject.data(seed))
        changed = {key.partition(".")[0] for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == parts
    group = updater.groups[0]
    assert (group.name, group.lr) == ("policy", pytest.approx(0.1 * subject.run.online.lr))


def test_the_decoder_stops_learning_at_its_share_of_the_run() -> None:
    subject = Subject(methods.get("lapo"), "finetune", settings=("decoder_until=0.5",))
    method = subject.build()
    updater = subject.updater(method, CPU)
    for progress in (0.0, 0.4):
        updater.progress = progress
        assert float(updater.learn(subject.data())["loss/action"]) > 0
    updater.progress = 0.5
    before = {key: value.clone() for key, value in method.head.state_dict().items()}
    assert "loss/action" not in updater.learn(subject.data())  # it costs nothing
    assert all(torch.equal(value, before[key]) for key, value in method.head.state_dict().items())  # no momentum moves it


# --- checkpoints and refusals -----------------------------------------------------------------------------------------


def saved(path: Path, name: str, stage: str, *settings: str) -> Path:
    """A run of an earlier stage with weights that no update has changed."""
    subject = Subject(methods.get(name), stage, settings=settings)
    torch.manual_seed(5)
    method = methods.get(name)(subject.run.model, image_size=32, action_dim=2 if subject.acts else None)
    out = RunDir(path, replace(subject.run, recipe=Recipe(size=32, percept_size=32)))
    state = {"stage": stage, "action_dim": 2}
    checkpoint.save(out.path / "checkpoints", 1, tensors={"weights": method.state_dict()}, state=state)
    return path


def settings_of(name: str, start: Path | str, *texts: str, **flags: Any) -> RunConfig:
    quick = ("rollout.steps=8", "eval_episodes=1", "online.eval_every=100000", "online.log_every=1")
    given = {**FLAGS, **OPTIONS, "recipe": {"size": 32, "percept_size": 32}, "checkpoint": str(start), **flags}
    return compose(name, "finetune", preset="debug", env="toy:block", flags=given, settings=(*quick, *texts))


REFUSED: list[tuple[str, tuple[str, ...], dict[str, Any], str]] = [
    ("lapo", (), {"checkpoint": ""}, "finetune of lapo starts from a clone or decode run: give it with --checkpoint"),
    ("masklam", (), {"checkpoint": ""}, "finetune of masklam starts from a decode run"),
    ("masklam", ("decoder_until=0.5",), {}, "needs masks of the agent, and a rollout has none"),
    ("lapo", ("rollout.steps=1",), {}, "learns from rollouts of at least 2 steps"),
    ("lapo", ("minibatches=3",), {}, "minibatches=3 is more than rollout.environments=2"),
    ("lapo", (), {"observed": "vectors"}, "learns on-policy from pictures only"),
    ("lapo", (), {"motion": "exact"}, "lapo perceives no motion"),
    ("lapo", (), {"data": "logs"}, "logs do not hold them"),
    ("lapo", (), {"labels": 5}, "labels=5: finetune reads no labels"),
    ("lapo", ("online.lr_decay=0.5",), {}, "finetune of lapo keeps its learning rate"),
]


@pytest.mark.parametrize(("name", "texts", "flags", "message"), REFUSED)
def test_what_cannot_be_is_refused_before_an_environment_starts(
    name: str, texts: tuple[str, ...], flags: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmotion.training.finetune.VectorEnv", lambda *_, **__: pytest.fail("an environment was started"))
    with pytest.raises(ConfigError, match=message):
        finetune(settings_of(name, "nowhere", *texts, **flags), tmp_path)


@pytest.mark.parametrize("share", ["head_share=0", "decoder_until=1.5"])
def test_shares_out_of_range_are_refused(share: str) -> None:
    with pytest.raises(ConfigError, match=share):
        Subject(methods.get("lapo"), "finetune", settings=(share,)).build()


def test_a_decoder_comes_from_a_decode_run_and_from_no_clone_run(tmp_path: Path) -> None:
    clone, decode = (saved(tmp_path / stage, "lapo", stage) for stage in ("clone", "decode"))
    for start, loaded in ((clone, False), (decode, True)):
        run = settings_of("lapo", start)
        method: Any = methods.get("lapo")(run.model, image_size=32, action_dim=2)
        line = load_pretrained(method, run).line()
        theirs = checkpoint.read(checkpoint.newest(start), "weights")
        assert ("not pre-trained: head" in line) is not loaded
        assert all(torch.equal(theirs[key], value) for key, value in method.state_dict().items() if key.startswith("policy"))
        if loaded:
            assert all(torch.equal(theirs[key], value) for key, value in method.state_dict().items() if key.startswith("head."))
    mask = saved(tmp_path / "mask", "masklam", "clone")
    run = settings_of("masklam", mask)
    method = methods.get("masklam")(run.model, image_size=32, action_dim=2)
    with pytest.raises(CheckpointError, match="mask: is a clone run; finetune of masklam starts from a decode run"):
        load_pretrained(method, run)
    run = settings_of("lapo", clone, load="head")
    method = methods.get("lapo")(run.model, image_size=32, action_dim=2)
    with pytest.raises(CheckpointError, match="clone: has no head to load"):
        load_pretrained(method, run)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_in_pieces_is_the_whole_run_and_its_agent_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a policy that carries three frames; the episodes of the environments end within rollouts."""
    clone = saved(tmp_path / "clone", "lapo", "clone", "model.form=continuous")
    run = settings_of("lapo", clone, "model.form=continuous", "env_steps=48", "online.save_every=16")
    monkeypatch.setattr(RolloutLoop, "measure", lambda *_: None)  # evaluation is the loops' own
    whole_run = finetune(run, tmp_path / "whole")
    Stops(monkeypatch, 3, 100)
    assert in_pieces(finetune, run, tmp_path / "pieces") == 1
    assert_same(whole_run, tmp_path / "pieces")
    _, agent, _ = load_run(whole_run, device="cpu", threads=1)
    start = checkpoint.read(checkpoint.newest(clone), "weights")
    kept = {key: value for key, value in agent.state_dict().items() if key.startswith(("inverse", "dynamics"))}
    assert all(torch.equal(value, start[key]) for key, value in kept.items())
    assert float(agent.get_submodule("heads").get_buffer("share")) == 0.5
    rows = [json.loads(text) for text in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/policy", "loss/action", "policy/clipped", "value/r2", "action/r2"} <= set(
        next(r for r in rows if r["kind"] == "train")
    )
    assert sum(row["kind"] == "episode" for row in rows) >= 6


@pytest.mark.slow
def test_the_command_learns_the_block(tmp_path: Path) -> None:
    """From videos of random actions, so that all is learned by reward. Measured: 48 of 49 after 5,000 steps (random actions: 15)."""
    collect("toy:block", tmp_path / "logs", policy="smooth", episodes=30, recipe=Recipe(size=32, percept_size=32))
    few = {**FLAGS, "data": str(tmp_path / "logs")}
    pre = pretrain(compose("lapo", "pretrain", preset="tiny", flags=few, settings=["updates=60"]), tmp_path / "pre")
    run = compose("lapo", "clone", preset="tiny", flags={**few, "checkpoint": str(pre)}, settings=["updates=60"])
    clone = pretrain(run, tmp_path / "clone")
    common = ["--method", "lapo", "--preset", "tiny", "--device", "cpu", "--threads", "1", "--rollout.workers", "1"]
    budget = ["--env", "toy:block", "--env_steps", "8000", "--online.eval_every", "100000"]
    main(["finetune", *common, *budget, "--checkpoint", str(clone), "--run", str(tmp_path / "agent")])
    rows = [json.loads(text) for text in (tmp_path / "agent" / "metrics.jsonl").read_text().splitlines()]
    reached = [row for row in rows if row["kind"] == "eval"][-1]["return_mean"]
    assert reached > BLOCK_RANDOM + 0.7 * (BLOCK_OPTIMAL - BLOCK_RANDOM)
