"""PVDR in the environment: plans towards a goal, what is learned from a rollout, and by which parts."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localmotion.acting.trees import leaves_of
from localmotion.errors import CheckpointError, ConfigError
from localmotion.methods.base import Counters, Rates
from localmotion.methods.pvdr import PVDR
from localmotion.models.alignment import STATIC, AlignmentConfig
from localmotion.models.distributions import likeliest
from localmotion.models.planning import GoalDistance
from localmotion.models.ppo import PPOConfig
from localmotion.runs.settings import compose
from localmotion.testing.rules import Subject
from localmotion.training.finetune import finetune
from localmotion.training.interrupt import Interrupted
from method_batches import CPU
from test_resume import Stops, assert_same, in_pieces

ROWS, TIME = 2, 12


def made(*settings: str) -> tuple[Subject, Any]:
    """The stage at preset debug, and its method with noise on every weight."""
    subject = Subject(PVDR, "finetune", settings=settings)
    return subject, subject.awake()


def observation(seed: int, first: bool, rows: int = ROWS) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 256, (rows, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    goal = torch.randint(0, 256, (rows, 1, 64, 64, 3), generator=torch.Generator().manual_seed(99), dtype=torch.uint8)
    return {"image": picture, "goal": goal, "is_first": torch.full((rows, 1), first)}


def test_plans_are_drawn_also_where_the_rest_is_the_likeliest() -> None:
    """With all plans at the prior's mean there would be nothing to choose from."""
    method = made()[1].eval()
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad(), likeliest():
            found.append(method.act(observation(0, True), method.initial_carry(ROWS), explore=False, window=TIME)[2]["z"])
    assert not torch.equal(*found)


def rollout(method: Any, ends: int = 5) -> dict[str, Tensor]:
    """A rollout as the loop stores it: the step to position t + 1 was chosen at position t. An episode begins at position ``ends``."""
    method.eval()
    carry, records, chosen = method.initial_carry(ROWS), [], {}
    for t in range(TIME):
        first = t in (0, ends)
        obs = observation(t, first)
        led = {key: torch.zeros_like(value) if first else value for key, value in chosen.items()}
        with torch.no_grad():
            action, carry, extras = method.act(obs, carry, explore=True, window=TIME)
        if not led:
            led = {key: torch.zeros_like(value) for key, value in {"action": action, **extras}.items()}
        records.append({**{key: value[:, 0] for key, value in obs.items()}, **led, "reward": torch.zeros(ROWS)})
        chosen = {"action": action, **extras}
    method.train()
    batch = {key: torch.stack([record[key] for record in records], 1) for key in records[0]}
    return batch | {"is_terminal": torch.zeros(ROWS, TIME, dtype=torch.bool)}


def losses(method: Any, batch: dict[str, Tensor], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(seed)
    own, metrics, found = method.dynamics_losses(batch) if method.config.align.plans_learn else ({}, {}, method.experience(batch))
    more, more_metrics = method.align_losses(batch, found)
    return {name: loss.detach() for name, loss in {**own, **more}.items()}, {**metrics, **more_metrics}


def test_the_plan_nearest_to_the_goal_is_taken() -> None:
    _, method = made("plans=7", "plans_eval=7", "random_plan=0", "blur=0", "compared=last")
    with torch.no_grad():
        _, carry, extras = method.act(observation(0, True), method.initial_carry(ROWS), explore=True, window=TIME)
        goal = method.tokenizer.features(observation(0, True)["goal"][:, 0].permute(0, 3, 1, 2).float() / 255 - 0.5)
        last = method.tokenizer.embed(carry.plans[:, :, -1])  # (B, K, N, D)
        far = GoalDistance(method.tokenizer.side, "cosine", 0.0)(last, goal[:, None])
        again = method.plans(carry.tokens, extras["z"][:, None])[:, 0]
    assert torch.equal(carry.chosen, far.argmin(1))
    rows = torch.arange(ROWS)
    assert torch.equal(again, carry.plans[rows, carry.chosen])  # the stored z is that of the plan
    assert torch.equal(extras["plan"], method.tokenizer.embed(again[:, 0]))
    pictures = method.panels(carry)
    assert pictures["ends"].shape == (ROWS, 7, 3, 64, 64)
    assert torch.allclose(pictures["plan"], method.drawn(again), atol=1e-6)
    assert torch.allclose(pictures["plan"][:, -1], pictures["ends"][rows, carry.chosen], atol=1e-6)


def test_evaluation_draws_its_own_number_of_plans() -> None:
    _, method = made("plans=2", "plans_eval=5")
    with torch.no_grad():
        for explore, count in ((True, 2), (False, 5)):
            carry = method.act(observation(0, True), method.initial_carry(ROWS), explore=explore, window=TIME)[1]
            assert carry.plans.shape[1] == count


def test_the_context_is_the_newest_frames_and_begins_with_copies() -> None:
    _, method = made()
    carry = method.initial_carry(ROWS)
    tokens = []
    with torch.no_grad():
        for t, first in enumerate((True, False, False)):
            _, carry, _ = method.act(observation(t, first), carry, explore=False, window=TIME)
            tokens.append(method.tokens(observation(t, first)["image"])[:, 0])
            kept = [tokens[max(t - 1, 0)], tokens[t]]
            assert torch.equal(carry.tokens, torch.stack(kept, 1))
    assert [leaf.dtype for leaf in leaves_of(carry)] == [torch.int64] * 3 + [torch.float32] * 2 + [torch.int64]


def test_a_goal_is_encoded_when_its_episode_begins_and_kept_until_it_ends() -> None:
    _, method = made()
    looked: list[int] = []
    method.tokenizer.encoder.register_forward_pre_hook(lambda _, given: looked.append(len(given[0])))
    firsts = ((True, True), (False, False), (False, True), (False, False))
    goals, seen = {row: torch.empty(0) for row in range(ROWS)}, method.initial_carry(ROWS)
    with torch.no_grad():
        for t, first in enumerate(firsts):
            obs = observation(t, False) | {"is_first": torch.tensor(first)[:, None]}
            for row in range(ROWS):
                if first[row]:
                    goals[row] = observation(50 + t + 10 * row, True)["image"][row]
            obs["goal"] = torch.stack([goals[row] for row in range(ROWS)])
            looked.clear()
            torch.manual_seed(t)
            action, kept, extras = method.act(obs, seen, explore=True, window=TIME)
            assert sorted(looked) == sorted([ROWS] + [sum(first)] * any(first))
            anew = method.features(obs["goal"]).squeeze(1)
            torch.testing.assert_close(kept.goal, anew)
            torch.manual_seed(t)
            again = method.act(obs, seen._replace(goal=anew), explore=True, window=TIME)
            torch.testing.assert_close(action, again[0])
            torch.testing.assert_close(extras, again[2])
            seen = kept


def test_losses_see_the_policy_that_acted() -> None:
    _, method = made()
    _, metrics = losses(method, rollout(method))
    assert float(metrics["policy/kl"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["policy/clipped"]) == 0


def test_pairs_are_the_action_that_led_to_the_first_planned_frame() -> None:
    """Frame t is t everywhere and action t is t / 100: a window of the frames t - 1, t | t + 1, .. goes with the action to t + 1."""
    _, method = made("windows=40")
    batch = rollout(method)
    method.eval()
    time = torch.arange(TIME)
    batch["image"] = time.to(torch.uint8)[None, :, None, None, None].expand(ROWS, -1, 64, 64, 3)
    batch["action"] = (time / 100)[None, :, None].expand(ROWS, -1, 3)
    seen: list[Tensor] = []
    method.tokens = lambda image: seen.append(image[..., 0, 0, 0]) or torch.zeros(*image.shape[:2], 64, dtype=torch.int64)
    _, _, (_, action, known) = method.dynamics_losses(batch)
    windows = seen[0].long()
    assert windows.shape == (40, 5)
    assert torch.equal((100 * action[:, 0]).round().long(), windows[:, 2])
    assert known.all()
    assert not ((windows[:, 0] < 5) & (windows[:, -1] >= 5)).any()  # none crosses the end of the episode


def test_only_the_posteriors_last_layer_the_prior_and_the_decoder_learn_online() -> None:
    subject, method = made()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    updater = subject.updater(method, CPU, pretrained=True)
    batch = rollout(method)
    for _ in range(3):
        updater.learn(batch)
    changed = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    parts = {key.partition(".")[0] for key in changed}
    assert parts == {"posterior", "prior", "decoder", "aligner", "memory", "warm"} - ({"warm"} if before["warm"] == 1 else set())
    assert {key for key in changed if key.startswith("posterior")} == {"posterior.last.weight", "posterior.last.bias"}


def test_plans_that_do_not_learn_stay_and_the_alignment_learns() -> None:
    subject, method = made("plans_learn=false")
    before = {key: value.clone() for key, value in method.state_dict().items()}
    updater = subject.updater(method, CPU, pretrained=True)
    batch = rollout(method)
    for _ in range(3):
        found = updater.learn(batch)
    changed = {key.partition(".")[0] for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert changed - {"warm"} == {"aligner", "memory"}
    assert {group.name for group in updater.groups} == {"actor", "critic"}
    assert {key for key in found if key.startswith("loss/")} == {f"loss/{name}" for name in method.loss_scales("finetune")}
    assert int(method.memory.count) == 3 * method.config.align.windows
    filled = method.memory.tokens[: int(method.memory.count)].long()
    torch.testing.assert_close(method.memory.kept[: len(filled)], method.posterior.body(filled))  # of windows of all updates
    with pytest.raises(ConfigError, match="plans_learn"):
        made("plans_learn=false", "pretrained=false")


def test_without_pretraining_the_whole_posterior_learns() -> None:
    subject, method = made("pretrained=false")
    trained = {id(p) for group in subject.groups(method) for p in group.parameters}
    assert {id(p) for p in method.posterior.parameters()} <= trained
    assert not {id(p) for p in method.tokenizer.parameters()} & trained
    assert PVDR.origins(method.config, "finetune") == ("tokenize",)
    assert PVDR.origins(made()[1].config, "finetune") == ("pretrain",)


def test_the_alignment_learns_by_reward_from_its_share_of_the_run_on() -> None:
    _, method = made("reward_from=0.5", "supervised=2", "supervised_end=1")
    batch = rollout(method)
    method.eval()  # the same windows each time
    found = {}
    for progress in (0.25, 0.5):
        method.after_update(Counters("finetune", 1, progress))
        found[progress] = losses(method, batch)[0]
    assert float(found[0.25]["policy"]) == float(found[0.25]["entropy"]) == 0
    assert float(found[0.5]["entropy"]) != 0
    assert float(found[0.5]["action"] / found[0.25]["action"]) == pytest.approx(1.5 / 1.75, rel=1e-4)


def explored(method: Any, firsts: tuple[bool, ...]) -> list[Tensor]:
    """The noise of steps; ``firsts``: where the first row's episodes begin. The others' begin at the first step."""
    carry, found = method.initial_carry(ROWS), []
    with torch.no_grad():
        for t, first in enumerate(firsts):
            obs = observation(t, t == 0)
            obs["is_first"][0] = first
            _, carry, _ = method.act(obs, carry, explore=True, window=TIME)
            found.append(carry.noise)
    return found


def test_noise_is_held_within_an_episode() -> None:
    _, method = made("hold=3", "reward_from=0.5")
    torch.manual_seed(0)
    one, other = torch.stack(explored(method, (True, False, False, False, True, False, False))).unbind(1)
    kept = [[bool(torch.equal(row[t], row[t + 1])) for t in range(6)] for row in (one, other)]
    assert kept == [[True, True, False, False, True, True], [True, True, False, True, True, False]]
    _, method = made("reward_from=0.5")  # the default
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(explored(method, (True, False, False))))


def test_what_was_played_with_held_noise_is_not_reinforced() -> None:
    _, method = made("hold=3", "reward_from=0.5")
    held = []
    for progress in (0.4, 0.5, 0.5, 0.6, 0.6):  # two updates of each of the rollouts of the second half
        noise = explored(method, (True, False))
        held.append(torch.equal(*noise))
        method.after_update(Counters("finetune", 1, progress))
        held.append(bool(method.aligner.reinforcing))
    # The rollout of 0.5 was played with held noise. Before that of 0.6 the noise is new at each step.
    assert held == [True, False, True, False, False, False, False, True, False, True]
    _, method = made("reward_from=0.5")
    method.after_update(Counters("finetune", 1, 0.5))
    assert bool(method.aligner.reinforcing)


def test_the_value_of_a_last_frame_is_not_that_of_another_position() -> None:
    """The critic of the last frame sees the prior's mean there, so changing the last picture changes the value's target."""
    _, method = made("reward_from=0", "follow_weight=0", "progress_weight=0")
    method.aligner.count(1.0)
    batch = rollout(method)
    plain = losses(method, batch)[0]["value"]
    other = {key: value.clone() for key, value in batch.items()}
    other["image"][:, -1] = 255 - other["image"][:, -1]
    assert float(losses(method, other)[0]["value"]) != float(plain)


def test_centred_rewards_have_the_mean_of_none_and_their_means_are_kept_with_the_weights() -> None:
    _, method = made("centred=true", "reward_weight=2")
    batch = rollout(method)
    batch["reward"] = 5 + torch.rand(ROWS, TIME)
    inside, before = ~batch["is_first"][:, 1:], method.state_dict()
    code = method.encoded(batch)
    terms = code["seen"], method.tokenizer.embed(code["tokens"]), code["wanted"], batch["plan"], batch
    reward = method.aligner.rewards(*terms)[0]  # the first: its own mean is the running one
    assert float(reward[inside].mean()) == pytest.approx(0, abs=1e-4)
    other = made("centred=true", "reward_weight=2")[1]
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(other.eval().aligner.rewards(*terms)[0], reward, rtol=0, atol=0)
    plain = made("reward_weight=2")[1].aligner
    plain.load_state_dict({key: value for key, value in method.aligner.state_dict().items() if not key.startswith("own.")})
    shift = (plain.eval().rewards(*terms)[0] - reward)[inside]
    torch.testing.assert_close(shift, shift.mean().expand_as(shift))  # nothing but a constant
    aligner = method.aligner
    means = [float(each.mean() / each.deviation()) for each in (aligner.following, aligner.progress)]
    assert float(shift.mean()) == pytest.approx(sum(means) + 2 * float(batch["reward"][:, 1:][inside].mean()), rel=1e-4)
    assert set(before) - set(made()[1].state_dict()) == {f"aligner.own.{name}" for name in ("first", "second", "weight")}


def test_static_plans_are_counted() -> None:
    _, method = made()
    batch = rollout(method)
    tokens = method.tokens(batch["image"])
    batch["plan"] = torch.cat([torch.zeros(ROWS, 1, 64, 8), method.tokenizer.embed(tokens[:, :-1])], 1)
    assert float(losses(method, batch)[1]["plan/static"]) == 1
    batch["plan"] = -batch["plan"]
    assert float(losses(method, batch)[1]["plan/static"]) < STATIC


@pytest.mark.parametrize(
    "settings", ["plans=0", "plans_eval=0", "windows=0", "pairs=0", "hold=0", "memory=3", "random_plan=1.5", "reward_from=-0.1"]
)
def test_settings_out_of_range_are_refused(settings: str) -> None:
    with pytest.raises(ConfigError, match=settings.partition("=")[0]):
        made(settings)


def test_pretrained_parts_learn_at_their_factor() -> None:
    subject, method = made()
    found = {group.name: group.lr for group in method.groups("finetune", Rates(1e-3, 2e-3, 3e-3, slow=0.1))}
    assert found == pytest.approx({"decayed": 1e-4, "plain": 1e-4, "actor": 2e-3, "critic": 3e-3})
    assert subject.acts


REACH = {
    "plans": "act.plans",
    "plans_eval": "act.evaluation",
    "random_plan": "act.plan",
    "compared": "act.plan",
    "metric": "loss.value",
    "blur": "act.plan loss.value",
    "width": "size",
    "log_std": "act.action",
    "hold": "loss.policy",
    "centred": "loss.value",
    "follow": "loss.value",
    "plans_learn": "weight.tokens weight.kl",
    "follow_weight": "loss.value",
    "progress_weight": "loss.value",
    "reward_weight": "loss.value",
    "supervised": "loss.action",
    "supervised_end": "loss.action",
    "reward_from": "loss.policy",
    "windows": "loss.tokens",
    "memory": "size.memory",
    "pairs": "loss.action",
    "discount": "loss.value",
    "lambda_": "loss.value",
    "ratio_clip": "metric.policy/clipped",
    "value_weight": "weight.value",
    "entropy": "weight.entropy",
    "reward_scale": "loss.value",
}
"""What each setting of `align` and `ppo` changes at least."""
OTHER: dict[str, Any] = {
    "compared": "last",
    "metric": "squared",
    "blur": 0.0,
    "random_plan": 1.0,
    "reward_from": 0.9,
    "reward_weight": 3.0,
    "log_std": 0.5,
    "centred": "true",
    "follow": "gain",
    "plans_learn": "false",
}


def shown(*settings: str) -> dict[str, Any]:
    """Sizes, weights, losses of one and the same rollout, and what acting does on one and the same observation."""
    _, method = made("plans=6", "plans_eval=4", "reward_from=0.5", *settings)
    out: dict[str, Any] = {"size": sum(p.numel() for p in method.parameters()), "size.memory": len(method.memory.tokens)}
    out |= {f"weight.{name}": weight for name, weight in method.loss_scales("finetune").items()}
    _, other = made("plans=6", "plans_eval=4", "reward_from=0.5")
    batch = rollout(other)
    batch["reward"] = torch.arange(TIME).float().expand(ROWS, -1)
    batch["log_prob"] = batch["log_prob"] - 0.15  # ratios between those of two clips
    method.after_update(Counters("finetune", 1, 0.6))
    batch["action"] = batch["action"] + 0.3 * torch.arange(TIME)[None, :, None] / TIME
    for _ in range(3):  # the memory fills
        found, metrics = losses(method.train(), batch)
    out |= {f"loss.{name}": float(value) for name, value in found.items()}
    out |= {f"metric.{name}": float(value) for name, value in metrics.items()}
    obs = observation(5, True)
    with torch.no_grad():
        for name, explore in (("", True), ("evaluation", False)):
            torch.manual_seed(3)
            action, carry, extras = method.eval().act(obs, method.initial_carry(ROWS), explore=explore, window=TIME)
            out["act.evaluation" if name else "act.plans"] = carry.plans.shape[1]
            if not name:
                out |= {"act.plan": extras["z"].tolist(), "act.action": action.tolist()}
    return out


def test_every_setting_of_the_online_stage_reaches_something() -> None:
    plain = shown()
    settings = {f.name: f for kind in (AlignmentConfig, PPOConfig) for f in dataclasses.fields(kind)}
    assert set(REACH) == set(settings)
    for name, wanted in REACH.items():
        value = OTHER.get(name, 2 * getattr(AlignmentConfig(), name, 0) or 0.5 * getattr(PPOConfig(), name, 0.5))
        where = "align" if name in {f.name for f in dataclasses.fields(AlignmentConfig)} else "ppo"
        found = shown(f"model.{where}.{name}={value}")
        same = [part for part in wanted.split() if found.get(part) == plain.get(part)]
        assert not same, f"{name}={value} leaves {same}"


def test_the_error_of_actions_leaves_their_deviation_alone() -> None:
    _, method = made("supervised=1")
    _, _, (codes, action, known) = method.dynamics_losses(rollout(method))
    loss, _ = method.aligner.action_error(*codes, action, known)
    loss.backward()
    assert method.aligner.actor.spread.grad is None
    assert all(p.grad is not None for p in method.aligner.actor.net.parameters())


@pytest.mark.parametrize("pretrained", [True, False])
def test_codes_of_pairs_are_those_of_the_model_of_now(pretrained: bool) -> None:
    _, method = made("windows=6", "memory=6", f"pretrained={str(pretrained).lower()}")
    batch = rollout(method)
    for _ in range(2):
        codes, action, known = method.dynamics_losses(batch)[2]
        now = method.coded(method.memory.tokens.long())
        rows = (codes.mean[:, None] - now.mean).abs().sum(-1).argmin(1)
        for found, expected in zip(codes, now, strict=True):
            torch.testing.assert_close(found, expected[rows])
        torch.testing.assert_close(action, method.memory.action[rows])
        assert known.all()
        with torch.no_grad():  # what the next update is to notice
            method.prior.norm.weight.mul_(1.5)
            method.posterior.last.weight.mul_(2.0)
            if not pretrained:
                method.posterior.body.norm.weight.mul_(1.5)
    assert method.memory.kept.shape[1] == (len(method.posterior.body.norm.weight) if pretrained else 0)


def test_losses_of_an_encoded_rollout_are_those_of_its_pictures() -> None:
    _, method = made("windows=6")
    batch, ends = rollout(method), 5
    batch["goal"][:, ends:] = observation(7, True)["image"]  # the second episode has another goal
    looked: list[int] = []
    method.tokenizer.encoder.register_forward_pre_hook(lambda _, given: looked.append(len(given[0])))
    codes = method.encoded({key: batch[key] for key in ("image", "goal", "is_first")})
    assert sorted(looked) == [2 * ROWS, ROWS * TIME]  # a goal once an episode
    encoded = {key: value for key, value in batch.items() if key not in method.encodes} | codes
    kept = {key: value.clone() for key, value in method.state_dict().items()}
    direct = losses(method, batch)
    method.load_state_dict(kept)
    looked.clear()
    found = losses(method, encoded)
    assert not looked
    for one, other in zip(direct, found, strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, msg=name)


def test_the_prior_of_a_rollout_sees_what_it_saw_while_acting() -> None:
    """The newest frames of each position; at the start of an episode, copies of its first."""
    _, method = made()
    batch, ends = rollout(method), 5
    tokens = method.tokens(batch["image"])
    seen: list[Tensor] = []
    method.prior.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    _, _, found = method.dynamics_losses(batch)
    seen.clear()
    method.align_losses(batch, found)
    before = [t if t in (0, ends) else t - 1 for t in range(TIME)]
    assert torch.equal(seen[0].unflatten(0, (ROWS, TIME)), torch.stack([tokens[:, before], tokens], 2))


def short_run() -> Any:
    few = ("env_steps=48", "environments=2", "rollout.workers=1", "rollout.steps=6", "online.save_every=12", "eval_episodes=1")
    own = ("hold=4", "centred=true", "follow=gain", "reward_from=0.4", "reward_weight=1", "online.eval_every=100000")
    flags: dict[str, Any] = {"precision": "fp32", "device": "cpu", "threads": 1, "recipe": {"size": 32, "percept_size": 32}}
    flags["env_options"] = {"time_limit": 8}
    return compose("pvdr", "finetune", preset="debug", env="toy:reach", flags=flags, settings=(*few, *own))


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that have learned nothing from videos do for what is tested."""
    monkeypatch.setattr("localmotion.training.finetune.check_acting_stage", lambda *_: None)


def test_a_run_in_pieces_is_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untaught: None) -> None:
    """What acting keeps (the goal, the noise) and what the rewards have so far is all in the checkpoint."""
    run = short_run()
    whole = finetune(run, tmp_path / "whole")
    Stops(monkeypatch, 25)  # longer than an evaluation, which is made anew after a stop
    assert in_pieces(finetune, run, tmp_path / "pieces") >= 1
    assert_same(whole, tmp_path / "pieces")


def test_a_run_of_a_version_with_another_carry_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untaught: None
) -> None:
    Stops(monkeypatch, 25)
    with pytest.raises(Interrupted):
        finetune(short_run(), tmp_path)
    plain = PVDR.initial_carry
    monkeypatch.setattr(PVDR, "initial_carry", lambda method, count: plain(method, count)[:3])
    with pytest.raises(CheckpointError, match=r"holds 6 tensors .* keeps 3"):
        finetune(short_run(), tmp_path)
