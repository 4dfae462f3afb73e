"""The conformance suite: it accepts methods of every kind, and refuses a method for each rule, with the fix."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localmotion.errors import ConfigError
from localmotion.methods.base import Batch, Group, Method, Pass, Rates, acted, images, same
from localmotion.methods.sizes import presets
from localmotion.testing import (
    CAPABILITIES,
    RULES,
    BrokenRuleError,
    check_acts,
    check_decodes,
    check_learns,
    check_method,
    check_plans,
    check_predicts,
    checks_of,
    name_of,
    random_batch,
    sentence_of,
)
from localmotion.testing.declares import DECLARES
from small_method import Found, Small

ROOT = Path(__file__).parent.parent


# --- what it accepts ----------------------------------------------------------------------------------------------------


def names_of(checks: list[Any]) -> set[str]:
    return {name_of(check.rule) for check in checks}


def test_a_method_with_every_capability_is_checked_by_every_rule() -> None:
    assert names_of(check_method(Small)) == {name_of(rule) for rule in RULES}


@pytest.mark.parametrize(
    ("module", "cls"), [("two_stages", "TwoStages"), ("frozen_teacher", "FrozenTeacher"), ("act_extras", "ActExtras")]
)
def test_the_examples_keep_the_rules(module: str, cls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    file = ROOT / "examples" / f"{module}.py"
    assert len(file.read_text().splitlines()) < 80
    method = getattr(__import__(f"examples.{module}", fromlist=[cls]), cls)
    found = check_method(method)
    assert {check.subject.stage for check in found} == set(method.stages)


def test_capabilities_are_checked_by_themselves() -> None:
    assert names_of(check_acts(Small, stages=["finetune"])) == {name_of(rule) for rule in CAPABILITIES["acts"][1]}
    assert names_of(check_plans(Small)) == {"actions_depend_on_the_goal", "panels_show_the_plan"}
    assert names_of(check_decodes(Small)) == {"labels_matter", "unlabelled_actions_are_not_read"}
    assert check_decodes(Small, stages=["finetune"]) == []
    assert "predictions_see_no_future" in names_of(check_predicts(Small, stages=["pretrain"]))
    assert "episodes_stay_apart" not in names_of(check_learns(Small, stages=["pretrain"]))


def test_a_check_has_the_name_of_method_stage_and_rule() -> None:
    assert str(checks_of(Small, stages=["decode"])[-1]) == "small-decode-unlabelled_actions_are_not_read"
    with pytest.raises(ConfigError, match="unknown stage of Small 'decod'; did you mean decode"):
        checks_of(Small, stages=["decod"])


def test_settings_that_do_not_compose_fail_once() -> None:
    """Else every check of the class fails with the same error. The settings of a caller are another matter."""
    assert [name_of(check.rule) for check in checks_of(Worldly)] == ["declares_its_members", "presets_compose"]
    assert checks_of(Worldly, rules=CAPABILITIES["acts"][1])  # without that rule nothing would fail
    assert len(checks_of(Small, settings=("model.world=1",))) == len(checks_of(Small))


def test_checking_leaves_the_callers_random_numbers() -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    check_learns(Small, stages=["pretrain"])
    assert torch.equal(torch.rand(2), want)


def test_the_page_has_every_rule() -> None:
    page = (ROOT / "docs" / "add_a_method.md").read_text()
    assert [name_of(rule) for rule in RULES if f"| `{name_of(rule)}` | {sentence_of(rule)} |" not in page] == []


# --- batches ------------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_keys_of_its_loop() -> None:
    class Moving(Small):
        wants = frozenset({"flow", "tracks", "mask"})

    assert set(random_batch(Small, "pretrain")) == {"image", "is_first", "clip", "start"}
    logged = {"image", "is_first", "action", "reward", "is_terminal", "goal", "labelled"}
    assert set(random_batch(Small, "decode")) == logged
    played = random_batch(Small, "finetune")
    assert set(played) == logged | {"code", "value"}
    assert played["code"].shape == (2, 8, 16)
    assert not played["value"][:, 0].any()
    assert played["value"][:, 1:].all()
    moving = {"image", "is_first", "flow", "tracks", "visible", "track_id"}
    assert set(random_batch(Moving, "pretrain")) == moving | {"clip", "start", "mask"}
    assert set(random_batch(Moving, "decode")) == moving | {"action", "reward", "is_terminal", "mask"}
    assert random_batch(Moving, "decode")["mask"].shape == (2, 8, 64, 64)
    batch = random_batch(Small, "decode", batch=3, time=5, seed=1)
    assert batch["action"].shape == (3, 5, 3)
    assert not batch["action"][:, 0].any()
    assert torch.equal(batch["image"], random_batch(Small, "decode", batch=3, time=5, seed=1)["image"])
    assert not torch.equal(batch["image"], random_batch(Small, "decode", batch=3, time=5, seed=2)["image"])


def test_a_key_that_nobody_knows_needs_a_maker() -> None:
    class Depth(Small):
        wants = frozenset({"goal", "labelled", "depth"})

    with pytest.raises(ConfigError, match="cannot make depth; give check_method a `batch`"):
        random_batch(Depth, "pretrain")

    def maker(method: Any, stage: str, *, batch: int, time: int, seed: int) -> dict[str, Tensor]:
        return random_batch(Small, stage, batch=batch, time=time, seed=seed) | {"depth": torch.zeros(batch, time, 64, 64)}

    assert check_plans(Depth, stages=["finetune"], batch=maker)


# --- what act returns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extras", "given", "match"),
    [
        ({}, {"value": torch.zeros(2)}, r"act returned 3 values, expected \(action, carry\); declare `extras`"),
        ({"value": ()}, None, r"act returned 2 values, expected \(action, carry, extras\)"),
        ({"value": ()}, {"valu": torch.zeros(2)}, r"the extras \['valu'\], declared are \['value'\]"),
        ({"value": ()}, {"value": torch.zeros(2, 1)}, r"'value' is torch.float32 \(2, 1\), declared is a float \(2, \*\(\)\)"),
        ({"value": (3,)}, {"value": torch.zeros(2, 3).long()}, r"torch.int64"),
        ({"value": (3,)}, {"value": torch.zeros(2, 3)}, ""),
        ({}, None, ""),
    ],
)
def test_acted_gives_both_forms_as_one(extras: Any, given: Any, match: str) -> None:
    class Acting:
        name = "acting"

        def act(self, *args: Any, **kwargs: Any) -> Any:
            return (torch.ones(2, 1), "carry") if given is None else (torch.ones(2, 1), "carry", given)

    method: Any = Acting()
    method.extras = extras
    if match:
        with pytest.raises(AssertionError, match=match):
            acted(method, {}, None, explore=False, window=1)
    else:
        action, carry, found = acted(method, {}, None, explore=False, window=1)
        assert (action.shape, carry, found) == ((2, 1), "carry", given or {})


# --- what it refuses ----------------------------------------------------------------------------------------------------


@dataclass
class OpenConfig:
    """Settings that can be changed."""

    width: int = 16
    """Width."""


@dataclass(frozen=True)
class SilentConfig:
    """Settings without docstrings."""

    width: int = 16


class Unfrozen(Small):
    Config = OpenConfig
    __doc__ = Small.__doc__


class Silent(Small):
    Config = SilentConfig
    __doc__ = Small.__doc__


class NoPaper(Small):
    """Of nobody."""

    paper = ""


class Nowhere(Small):
    """Settings for a suite that is not there."""

    SUITES = {"moon:walk": {}}


class NoTiny(Small):
    """Lacks a preset."""

    PRESETS = {name: value for name, value in Small.PRESETS.items() if name != "tiny"}


class Worldly(Small):
    """Has the presets of a method with the shared world model, and no such settings."""

    PRESETS = presets()


class Misuses(Small):
    """Calls the package wrongly: the error is raised inside the package."""

    def video_losses(self, batch: Batch, _: Any) -> Found:
        images({})
        return super().video_losses(batch, _)


class Rich(Small):
    """A small preset with more than the paper's budget."""

    PRESETS = Small.PRESETS | {"small": {"online": {"env_steps": 2_000_000}}}


class Measures(Small):
    """Looks at a value while it is built."""

    def made(self, width: int) -> nn.Module:
        return super().made(width if float(torch.ones(1)) > 0 else 1)


class NoPlace(Small):
    """Takes over a module that is not there."""

    transfers = same("memory", "nothing")


class OtherPlace(Small):
    """Takes over a module of another shape."""

    transfers = {"encoder": "memory"}


class NoScale(Small):
    """Forgets a scale."""

    def passes(self, stage: str) -> tuple[Pass, ...]:
        return tuple(each._replace(scales=dict(list(each.scales.items())[:1])) for each in super().passes(stage))


class Vector(Small):
    """A loss for each sequence."""

    def video_losses(self, batch: Batch, _: Any) -> Found:
        losses, metrics, handed = super().video_losses(batch, _)
        return {"next": losses["next"].repeat(2)}, metrics, handed


class Peeks(Small):
    """Reads actions where there are none."""

    def video_losses(self, batch: Batch, _: Any) -> Found:
        losses, metrics, handed = super().video_losses(batch, _)
        return {"next": losses["next"] + batch["action"].mean()}, metrics, handed


class Dice(Small):
    """Random numbers of its own."""

    def video_losses(self, batch: Batch, _: Any) -> Found:
        losses, metrics, handed = super().video_losses(batch, _)
        return {"next": losses["next"] * (1 + random.random())}, metrics, handed


class Scribbles(Small):
    """Writes into the batch."""

    def video_losses(self, batch: Batch, _: Any) -> Found:
        batch["image"][:, 0] = 0
        return super().video_losses(batch, _)


class Steps(Small):
    """Moves weights while it computes losses."""

    def video_losses(self, batch: Batch, _: Any) -> Found:
        with torch.no_grad():
            self.decoder.bias.add_(1.0)
        return super().video_losses(batch, _)


class Idle(Small):
    """A group in no pass."""

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        found = super().groups(stage, rates)
        return [*found[1:], Group("rest", found[0].parameters, rates.lr)]


class Unreached(Small):
    """A pass whose losses do not reach its group."""

    def passes(self, stage: str) -> tuple[Pass, ...]:
        first, *rest = super().passes(stage)
        return (first._replace(groups=("model", "actor")), *rest)


class Forgotten(Small):
    """A parameter in no group."""

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        return [replace(group, parameters=group.parameters[1:]) for group in super().groups(stage, rates)]


class Twice(Small):
    """A parameter in two groups."""

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        found = super().groups(stage, rates)
        return [found[0], replace(found[-1], parameters=[*found[-1].parameters, self.decoder.bias])]


class Thaws(Small):
    """A frozen parameter in a group."""

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        found = super().groups(stage, rates)
        return [replace(found[0], parameters=[*found[0].parameters, *self.teacher.parameters()]), *found[1:]]


class Still(Small):
    """A learning rate of zero."""

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        return [replace(group, lr=0.0) for group in super().groups(stage, rates)]


class Only32(Small):
    """Keeps codes in a buffer, and forgets that autocast gives bfloat16."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("queue", torch.zeros(2, 192))

    def video_losses(self, batch: Batch, _: Any) -> Found:
        losses, metrics, handed = super().video_losses(batch, _)
        self.queue.index_copy_(0, torch.arange(2), self.decoder(handed[:, 0]).detach())
        return losses, metrics, handed


class Drifts(Small):
    """A teacher with statistics of the batch."""

    def made(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(192), nn.Unflatten(0, (2, -1)), *super().made(width).children())


class ReadsBack(Small):
    """Waits for the device."""

    def video_losses(self, batch: Batch, _: Any) -> Found:
        losses, metrics, handed = super().video_losses(batch, _)
        return {"next": losses["next"] / max(losses["next"].item(), 1.0)}, metrics, handed


class Counts(Small):
    """A counter of Python decides within the update."""

    count = 0

    def after_update(self, counters: Any) -> None:
        self.count += 1

    def video_losses(self, batch: Batch, _: Any) -> Found:
        losses, metrics, handed = super().video_losses(batch, _)
        return {"next": losses["next"] + self.count * self.decoder(handed).square().mean()}, metrics, handed


class Carries(Small):
    """Remembers across episodes."""

    def states(self, batch: Batch) -> Tensor:
        return super().states({**batch, "is_first": torch.zeros_like(batch["is_first"])})


class Blind(Small):
    """Learns from nothing."""

    def video_losses(self, batch: Batch, _: Any) -> Found:
        state = self.states({**batch, "image": torch.zeros_like(batch["image"]), "is_first": torch.ones_like(batch["is_first"])})
        return {"next": self.decoder(state).square().mean()}, {}, state

    def action_losses(self, batch: Batch, state: Tensor) -> Found:
        nothing = {key: torch.zeros_like(value) for key, value in batch.items()}
        return super().action_losses(nothing, state)


class Forgets(Small):
    """A buffer that is not saved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mean_code", torch.zeros(16), persistent=False)

    def video_losses(self, batch: Batch, _: Any) -> Found:
        losses, metrics, handed = super().video_losses(batch, _)
        self.mean_code.lerp_(handed.float().mean((0, 1)), 0.1)
        return {"next": losses["next"] + (self.decoder(self.mean_code.clone())).square().mean()}, metrics, handed


class Narrow(Small):
    """Predicts pictures of another size."""

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        return {row: pictures[..., :32] for row, pictures in super().open_loop(batch, context).items()}


class Constant(Small):
    """Predicts the same whatever it saw."""

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        return {row: torch.zeros_like(pictures) for row, pictures in super().open_loop(batch, context).items()}


class Oracle(Small):
    """Looks at later pictures."""

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        return {"prior": super().open_loop(batch, context)["prior"] + images(batch).unflatten(0, batch["image"].shape[:2])}


class Acted(Small):
    """Looks at later actions, and does not say so in the row's name."""

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        (row, pictures), *_ = super().open_loop(batch, context).items()
        return {row: pictures + (batch["action"].sum((1, 2)).view(-1, 1, 1, 1, 1) if "action" in batch else 0)}


class Flat(Small):
    """A number for each frame in place of a vector."""

    def motion_code(self, batch: Batch) -> Any:
        return self.states(batch).mean(-1)


class Wild(Small):
    """Actions beyond the limits."""

    def act(self, *args: Any, **kwargs: Any) -> Any:
        action, state, extras = super().act(*args, **kwargs)
        return 50 * action, state, extras


class Undeclared(Small):
    """Extras that it does not declare."""

    extras = {}


class Hidden(Small):
    """State of the agent outside of the carry."""

    calls = 0.0

    def act(self, *args: Any, **kwargs: Any) -> Any:
        action, state, extras = super().act(*args, **kwargs)
        self.calls += 0.01
        return (action + self.calls).clamp(-1, 1), state, extras


class Timid(Small):
    """Does not explore."""

    def act(self, obs: Batch, carry: Any, *, explore: bool, window: int) -> Any:
        return super().act(obs, carry, explore=False, window=window)


class Clings(Small):
    """Acts on with the state of the episode before."""

    def act(self, obs: Batch, carry: Any, *, explore: bool, window: int) -> Any:
        return super().act({**obs, "is_first": torch.zeros_like(obs["is_first"])}, carry, explore=explore, window=window)


class Crowd(Small):
    """Agents see each other."""

    def act(self, *args: Any, **kwargs: Any) -> Any:
        action, state, extras = super().act(*args, **kwargs)
        return (action - 0.5 * action.mean(0)).clamp(-1, 1), state, extras


class Lonely(Small):
    """One agent acts otherwise than several."""

    def act(self, *args: Any, **kwargs: Any) -> Any:
        action, state, extras = super().act(*args, **kwargs)
        return action / len(action), state, extras


class Box(Small):
    """A dictionary for a carry."""

    def initial_carry(self, batch_size: int) -> Any:
        return {"state": super().initial_carry(batch_size)}

    def act(self, obs: Batch, carry: Any, *, explore: bool, window: int) -> Any:
        action, state, extras = super().act(obs, carry["state"], explore=explore, window=window)
        return action, {"state": state}, extras


class Plans(Small):
    """Shows plans."""

    def panels(self, carry: Any) -> dict[str, Tensor]:
        plans = torch.rand(2, 3, 4, 3, 64, 64) - 0.5
        return {"plan": plans[:, 1], "ends": plans[:, :, -1], "chosen": torch.ones(2, dtype=torch.int64)}


class FlatPlan(Plans):
    """Shows plans without time."""

    def panels(self, carry: Any) -> dict[str, Tensor]:
        return {name: value[:, -1] if name == "plan" else value for name, value in super().panels(carry).items()}


class OtherPlan(Plans):
    """Shows another plan than it chose."""

    def panels(self, carry: Any) -> dict[str, Tensor]:
        found = super().panels(carry)
        return found | {"plan": found["plan"].flip(1)}


class Beyond(Plans):
    """Chooses a plan that it has not."""

    def panels(self, carry: Any) -> dict[str, Tensor]:
        found = super().panels(carry)
        return found | {"chosen": found["chosen"] + 2}


class Aimless(Small):
    """Does not look at the goal."""

    def mean(self, state: Tensor, batch: Batch) -> Tensor:
        return super().mean(state, {"goal": torch.zeros_like(batch["goal"])})


class Unlabelled(Small):
    """Does not learn from labels."""

    def action_losses(self, batch: Batch, state: Tensor) -> Found:
        return super().action_losses({**batch, "action": torch.zeros_like(batch["action"])}, state)


class Leaks(Small):
    """Reads actions that are not known."""

    def action_losses(self, batch: Batch, state: Tensor) -> Found:
        return super().action_losses({**batch, "labelled": torch.ones_like(batch["labelled"])}, state)


REFUSED: list[tuple[type[Small], str, str, str]] = [
    (
        Unfrozen,
        "pretrain",
        "declares_its_members",
        r"Config is .*OpenConfig.*fix: make it a class with @dataclass\(frozen=True\)",
    ),
    (Silent, "pretrain", "declares_its_members", r"the settings \['width'\] have no docstring"),
    (NoPaper, "pretrain", "declares_its_members", "paper is ''"),
    (Nowhere, "pretrain", "declares_its_members", r"SUITES names \['moon'\]"),
    (NoTiny, "pretrain", "presets_compose", r"PRESETS lacks \['tiny'\]"),
    (Worldly, "pretrain", "presets_compose", r"PRESETS or SUITES, preset small of stage pretrain: .*'model\.world'.*`budgets`"),
    (Misuses, "pretrain", "losses_match_their_scales", r"KeyError.*look at line \d+ of .*test_testing\.py, in video_losses"),
    (Measures, "pretrain", "models_build_without_memory", "item.*meta"),
    (NoPlace, "pretrain", "transfers_fit", r"no later stage takes over \['nothing'\]"),
    (OtherPlace, "pretrain", "transfers_fit", "'encoder' of an earlier stage and 'memory' of stage decode have other weights"),
    (
        NoScale,
        "finetune",
        "losses_match_their_scales",
        r"returns the losses \['action', 'distil', 'value'\], its scales are \['action'\]",
    ),
    (Vector, "pretrain", "losses_match_their_scales", r"'next' has the shape \(2,\).*average it"),
    (Peeks, "pretrain", "losses_match_their_scales", r"KeyError: 'action'.*test_testing.py, in video_losses"),
    (Dice, "pretrain", "losses_are_pure", r"the losses \['next'\] differ between two equal runs"),
    (Scribbles, "pretrain", "losses_are_pure", r"write into the batch: \['image'\]"),
    (Steps, "pretrain", "losses_are_pure", r"change the weights \['decoder.bias'\]"),
    (Idle, "finetune", "every_group_learns", r"the groups \['rest'\] are in no pass"),
    (Unreached, "finetune", "every_group_learns", "group 'actor' gets no gradient from pass 0"),
    (
        Forgotten,
        "pretrain",
        "each_parameter_has_one_optimiser",
        "encoder.0.weight is in no group.*add it to a group, or freeze it",
    ),
    (Twice, "finetune", "each_parameter_has_one_optimiser", r"decoder.bias is in the groups \['model', 'actor'\]"),
    (Thaws, "finetune", "each_parameter_has_one_optimiser", "teacher.0.weight is frozen and in group 'model'"),
    (Still, "pretrain", "updates_change_every_group", "no parameter of group 'model' changed"),
    (Only32, "pretrain", "updates_work_in_bf16", "RuntimeError"),
    (Drifts, "finetune", "frozen_parts_stay", "of the frozen 'teacher'.*evaluation mode"),
    (ReadsBack, "pretrain", "updates_can_be_replayed", "cannot be recorded as a CUDA graph"),
    (Counts, "pretrain", "updates_can_be_replayed", "the replayed update leaves other values in"),
    (Carries, "finetune", "episodes_stay_apart", r"the losses \['next', .*of an episode depend on the episode before it"),
    (Blind, "finetune", "episodes_stay_apart", "no loss depends on the batch"),
    (Forgets, "pretrain", "saved_state_resumes", r"after a resume \[.*differ"),
    (Narrow, "pretrain", "predictions_have_their_shape", r"'prior' has the shape \(2, 8, 3, 64, 32\)"),
    (Constant, "pretrain", "predictions_have_their_shape", "'prior' does not depend on the observed frames"),
    (Oracle, "pretrain", "predictions_see_no_future", "'prior' changes with another picture or reward after its 3 frames"),
    (Acted, "finetune", "predictions_see_no_future", "changes with another action.*call the row 'action'"),
    (Flat, "pretrain", "motion_code_is_one_vector_a_frame", r"motion_code is \(2, 8\)"),
    (Wild, "finetune", "actions_are_in_range", "clamp actions"),
    (Undeclared, "finetune", "actions_are_in_range", "act returned 3 values"),
    (Hidden, "finetune", "actions_are_reproducible", "the same seed gives other actions"),
    (Timid, "finetune", "actions_are_reproducible", "explore=True gives the same actions for two seeds"),
    (Clings, "finetune", "a_first_step_forgets", "actions depend on the episode before"),
    (Crowd, "finetune", "agents_act_as_if_alone", "depends on the observation of another"),
    (Lonely, "finetune", "agents_act_as_if_alone", "alone gets other actions"),
    (Box, "finetune", "the_carry_can_be_saved", "the carry is dict"),
    (Aimless, "finetune", "actions_depend_on_the_goal", "two goals give the same actions"),
    (FlatPlan, "finetune", "panels_show_the_plan", r"panels returned .*plan must be \(B, n, 3, 64, 64\)"),
    (OtherPlan, "finetune", "panels_show_the_plan", "the plan does not end as the chosen one does"),
    (Beyond, "finetune", "panels_show_the_plan", r"chosen is \[3, 3\], of 3 plans"),
    (Unlabelled, "decode", "labels_matter", "other actions give the same losses"),
    (Leaks, "decode", "unlabelled_actions_are_not_read", r"the losses \['action'\] read actions of unlabelled positions"),
]


@pytest.mark.parametrize(
    ("method", "stage", "rule", "match"), [pytest.param(*case, id=f"{case[0].__name__}-{case[2]}") for case in REFUSED]
)
def test_a_broken_method_is_refused(method: type[Method], stage: str, rule: str, match: str) -> None:
    """The rules of the capability that stand before the broken one pass. Errors name stage, rule, page and fix."""
    groups = [DECLARES, *(rules for _, rules in CAPABILITIES.values())]
    rules = next(group for group in groups if rule in map(name_of, group))
    with pytest.raises(BrokenRuleError) as caught:
        check_method(method, stages=[stage], rules=rules)
    first, second, third = str(caught.value).splitlines()
    assert caught.value.rule == rule
    assert first.startswith(f"{method.__name__}, stage {stage}: ")
    assert second.startswith("  rule: ")
    assert second.endswith(f"({rule}, docs/add_a_method.md)")
    assert third.startswith("  fix: ")
    assert re.search(match, f"{first} {third}")


def test_every_rule_refuses_something() -> None:
    assert {rule for _, _, rule, _ in REFUSED} == {name_of(rule) for rule in RULES}
