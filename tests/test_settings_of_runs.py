"""Settings of a run reach the optimisers and the loop: each is changed by itself, and what the run then does is compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from localmotion import methods
from localmotion.acting.episodes import Rollout, episode_seed
from localmotion.acting.observer import Observer
from localmotion.acting.policy import MethodPolicy
from localmotion.config import OnlineConfig, OptimConfig, PretrainConfig
from localmotion.errors import ConfigError
from localmotion.methods.base import Rates, Source
from localmotion.methods.dreamer_v2 import DreamerV2
from localmotion.replay import Replay
from localmotion.runs.load import built
from localmotion.runs.settings import compose
from localmotion.training import online as online_loop
from localmotion.training import pretrain as pretraining
from localmotion.training import trials
from localmotion.training.finetune import finetune
from localmotion.training.online import OnlineLoop
from localmotion.training.update import Updater, rates
from method_batches import make
from test_settings_reach import UNCLIPPED, build, changed, difference, doing, stepped

# --- sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "setting"), [("drp", "dae.heads=3"), ("dreamer_v2", "world.encoder=cnn")])
def test_sizes_that_do_not_fit_are_a_mistake_in_the_settings(name: str, setting: str) -> None:
    run = compose(name, "train", preset="tiny", env="toy:dot", settings=(setting,))
    with pytest.raises(ConfigError, match=f"no {name} can be built of these settings: "):
        built(run, 32, 2)


# --- settings that a method does not read ---------------------------------------------------------------------------------


class Asked:
    """Rates that remember which of them a method's groups read."""

    def __init__(self, rates: Rates) -> None:
        self._rates, self.seen = rates, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.seen.add(name)
        return getattr(self._rates, name)


STAGES = [
    (name, stage) for name in methods.names() for stage, source in methods.get(name).stages.items() if source is not Source.CLIPS
]


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_method_names_the_rates_that_it_does_not_read(name: str, stage: Any) -> None:
    """The command line refuses them there."""
    run, method = make(name, stage)
    asked: Any = Asked(rates(run, method.stages[stage], True))
    method.groups(stage, asked)
    known = {"actor_lr": "actor_lr", "critic_lr": "critic_lr", "slow": "pretrained_lr_factor", "freeze_updates": "freeze_updates"}
    idle = {f"online.{setting}" for read, setting in known.items() if read not in asked.seen}
    assert {key for key in method.unread.get(stage, ()) if key.startswith("online.")} == idle


# --- rates and optimisers -----------------------------------------------------------------------------------------------

# What the setting changes: all of it, and nothing else that `doing` sees.
RATES: list[tuple[str, str, Any, str]] = [
    ("finetune", "online.lr", 5e-4, "rate.motion rate.encoder rate.model"),
    ("finetune", "online.actor_lr", 5e-4, "rate.actor"),
    ("finetune", "online.critic_lr", 5e-4, "rate.critic"),
    ("finetune", "online.pretrained_lr_factor", 0.5, "rate.motion"),
    ("finetune", "online.freeze_updates", 7, "rate.motion rate.encoder"),
    ("pretrain", "pretrain.lr", 5e-4, "rate.model"),
]


@pytest.mark.parametrize(("stage", "setting", "value", "reached"), RATES)
def test_a_rate_reaches_its_groups_and_no_other(stage: Any, setting: str, value: Any, reached: str) -> None:
    run, _ = make("drp", stage, "model.dae.blocks=1", "model.behaviour.horizon=2")
    method = build(run)
    assert difference(doing(run, method), doing(changed(run, setting, value), method)) == set(reached.split())


STEPS = [("optim.eps", 1e-2), ("optim.clip", 1e-3), ("optim.weight_decay", 0.5), ("online.freeze_updates", 7)]
DECAY = [("pretrain.lr_decay", 0.9), ("pretrain.updates", 1000)]


@pytest.mark.parametrize(("setting", "value"), STEPS)
def test_a_setting_of_the_optimisers_changes_their_steps(setting: str, value: float) -> None:
    run, _ = make("drp", "finetune", UNCLIPPED, "model.dae.blocks=1", "model.behaviour.horizon=2")
    found = difference(stepped(run), stepped(changed(run, setting, value)))
    learned = {
        "step.motion",
        "step.latent",
        "step.image.encoder",
        "step.dynamics",
        "step.behaviour.actor",
        "step.behaviour.critic",
    }
    frozen = {"step.motion", "step.latent", "step.image.encoder"}
    assert found >= (frozen if setting == "online.freeze_updates" else learned)


@pytest.mark.parametrize(("setting", "value"), DECAY)
def test_the_rate_of_pretraining_falls_as_set(setting: str, value: float) -> None:
    run, _ = make("drp", "pretrain", "pretrain.updates=100", "pretrain.lr_decay=0.5")
    late = stepped(run, at=80)
    assert "step.latent" in difference(late, stepped(changed(run, setting, value), at=80))
    assert not difference(stepped(run, at=20), stepped(changed(run, "pretrain.lr_decay", 0.6), at=20))  # not before the decay


# --- the loop -----------------------------------------------------------------------------------------------------------

BASE = (
    "env_options={time_limit: 16}",
    "env_steps=192",
    "prefill=64",
    "batch_size=2",
    "online.length=8",
    "train_every=4",
    "warmup_updates=2",
    "online.eval_every=64",
    "eval_episodes=1",
    "online.log_every=5",
    "online.save_every=64",
    "replay_capacity=1000",
)
LOOP: dict[str, tuple[Any, str]] = {
    "env_steps": (256, "updates"),
    "batch_size": (3, "shape"),
    "length": (6, "shape"),
    "prefill": (96, "updates"),
    "warmup_updates": (5, "updates"),
    "train_every": (2, "updates"),
    "replay_capacity": (70, "drawn"),
    "prioritize_ends": (True, "drawn"),
    "eval_every": (32, "evaluated"),
    "eval_episodes": (2, "episodes"),
    "log_every": (3, "logged"),
    "save_every": (32, "saved"),
}
"""Settings of the loop: another value, and what it changes."""
STORED: dict[str, tuple[str, int]] = {"replay_storage": ("disk", 0), "replay_flow": ("float16", 1)}
"""Settings of the replay: another value, and what of (storage, bytes of a record) it changes. Batches stay the same: test_replay.py."""


def record(path: Path, *settings: str) -> dict[str, Any]:
    """What a run of DreamerV2 does whose updates are counted and not computed."""
    seen: dict[str, Any] = {
        "shape": set(),
        "drawn": hashlib.sha256(),
        "episodes": set(),
        "saved": [],
        "judged": set(),
        "played": set(),
        "made": [],
    }

    class Policy(MethodPolicy):
        def __init__(self, *args: Any, explore: bool, **kwargs: Any) -> None:
            super().__init__(*args, explore=explore, **kwargs)
            self.explore = explore
            seen["made"].append(explore)

        def __call__(self, *args: Any) -> Any:
            seen["played"].add(self.explore)
            return super().__call__(*args)

    def online(self: Updater, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen["shape"].add(tuple(batch["reward"].shape))
        seen["drawn"].update(batch["image"].numpy().tobytes())
        self.update += 1
        return {}

    def evaluate(policy_for: Any, *args: Any, episodes: int, **kwargs: Any) -> Any:
        seen["episodes"].add(episodes)
        policy_for()
        seen["judged"].add(seen["made"][-1])
        return Rollout([0.0] * episodes, [0.0] * episodes, [1] * episodes)

    save = OnlineLoop.save

    def saved(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen["saved"].append(self.agent_step)
        return save(self, *args, **kwargs)

    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags={"threads": 1}, settings=(*BASE, *settings))
    with (
        mock.patch.object(Updater, "learn", online),
        mock.patch.object(trials, "evaluate", evaluate),
        mock.patch.object(trials, "MethodPolicy", Policy),
        mock.patch.object(online_loop, "MethodPolicy", Policy),
        mock.patch.object(OnlineLoop, "save", saved),
    ):
        finetune(run, path)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        "updates": [row["update"] for row in rows][-1],
        "shape": seen["shape"],
        "drawn": seen["drawn"].hexdigest(),
        "evaluated": [row["agent_step"] for row in rows if row["kind"] == "eval"],
        "episodes": seen["episodes"],
        "logged": [row["update"] for row in rows if row["kind"] == "train"],
        "saved": seen["saved"],
        "explores": (seen["played"], seen["judged"]),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return record(tmp_path_factory.mktemp("plain") / "run")


def test_every_setting_of_a_run_is_looked_at() -> None:
    """A new setting needs a row in one of the tables of this file."""
    looked = {setting for _, setting, _, _ in RATES} | {setting for setting, _ in (*STEPS, *DECAY)}
    looked |= {f"online.{name}" for name in (*LOOP, *STORED)} | {f"pretrain.{name}" for name in PRETRAINING}
    looked |= {"online.updates", "online.lr_decay"}  # in test_logged and in test_written_latent
    looked |= {"online.phase_at"}  # in test_phases
    parts = {"online": OnlineConfig, "pretrain": PretrainConfig, "optim": OptimConfig}
    assert looked == {f"{part}.{item.name}" for part, config in parts.items() for item in dataclasses.fields(config)}


@pytest.mark.parametrize("setting", LOOP)
def test_a_setting_of_the_loop_changes_what_it_is_for(tmp_path: Path, plain: dict[str, Any], setting: str) -> None:
    value, reached = LOOP[setting]
    found = record(tmp_path / "run", f"online.{setting}={str(value).lower()}")
    assert found[reached] != plain[reached]
    beside = {"updates", "drawn", "logged", "saved", "evaluated", "shape", "episodes"} - {reached}
    if setting in ("eval_every", "eval_episodes", "log_every", "save_every"):  # clocks that learning does not hear
        assert {key: found[key] for key in beside} == {key: plain[key] for key in beside}


def test_the_loop_keeps_its_clocks(plain: dict[str, Any]) -> None:
    """64 agent steps of prefill, 2 updates to warm up, then one for every fourth of the 128 that are left."""
    assert plain["updates"] == 2 + 128 // 4
    assert plain["shape"] == {(2, 8)}
    assert plain["evaluated"] == [64, 128, 192]
    assert plain["episodes"] == {1, 10}  # the last evaluation plays at least ten


def test_a_run_explores_while_it_collects_and_not_while_it_is_judged(plain: dict[str, Any]) -> None:
    assert plain["explores"] == ({True}, {False})


class FirstRecordError(Exception):
    """Stops a run at its first record."""


def stored(path: Path, *settings: str) -> tuple[str, int]:
    """Where DRP's replay is, and the bytes of one of its records."""

    def add(self: Replay, *_: Any, last: bool) -> None:
        raise FirstRecordError(self.storage, self.bytes_per_record)

    run = compose("drp", "train", preset="debug", env="toy:dot", flags={"threads": 1}, settings=(*BASE, *settings))
    with mock.patch.object(Replay, "add", add), pytest.raises(FirstRecordError) as found:
        finetune(run, path)
    storage, size = found.value.args
    return storage, size


@pytest.mark.parametrize("setting", STORED)
def test_a_setting_of_the_replay_is_handed_on(tmp_path: Path, setting: str) -> None:
    value, reached = STORED[setting]
    before, after = stored(tmp_path / "before"), stored(tmp_path / "after", f"online.{setting}={value}")
    assert before[reached] != after[reached]
    assert before[1 - reached] == after[1 - reached]
    if setting == "replay_storage":
        assert (before[0], after[0]) == ("memory", "disk")


@dataclasses.dataclass
class Watched:
    """What a run did, in order."""

    resets: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """Environment, numbered by its first reset, and seed."""
    actions: list[list[bytes]] = dataclasses.field(default_factory=list)
    """Of the first environment, by episode."""
    acted: list[tuple[bool, bool, int]] = dataclasses.field(default_factory=list)
    """Of each action of the method: whether it explores, whether it is in training mode, torch's seed."""
    learned: list[bool] = dataclasses.field(default_factory=list)
    """Of each update: whether the method is in training mode."""


def watched(path: Path, *settings: str) -> Watched:
    """A run of DreamerV2 that plays and is judged, whose updates are counted and not computed."""
    seen, numbers = Watched(), dict[int, int]()
    reset, step, act = Observer.reset, Observer.step, DreamerV2.act

    def resets(self: Any, seed: int) -> Any:
        number = numbers.setdefault(id(self), len(numbers))
        seen.resets.append((number, seed))
        seen.actions += [] if number else [[]]
        return reset(self, seed)

    def steps(self: Any, action: Any) -> Any:
        if numbers[id(self)] == 0:
            seen.actions[-1].append(action.tobytes())
        return step(self, action)

    def acts(self: Any, *args: Any, explore: bool, window: int) -> Any:
        seen.acted.append((explore, self.training, torch.initial_seed()))
        return act(self, *args, explore=explore, window=window)

    def online(self: Updater, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.learned.append(self.method.training)
        self.update += 1
        return {}

    few = ("env_options={time_limit: 8}", "env_steps=64", "prefill=24", "online.eval_every=16", "eval_episodes=2", "seed=3")
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags={"threads": 1}, settings=(*BASE, *few, *settings))
    with (
        mock.patch.object(Updater, "learn", online),
        mock.patch.object(Observer, "reset", resets),
        mock.patch.object(Observer, "step", steps),
        mock.patch.object(DreamerV2, "act", acts),
    ):
        finetune(run, path)
    return seen


def test_a_run_plays_trains_and_is_judged_apart(tmp_path: Path) -> None:
    """Seeds, modes and noise: what is judged meets other episodes than what is learned from, and moves nothing of the run."""
    seen = watched(tmp_path / "run")
    played = [seed for number, seed in seen.resets if number == 0]
    judged = [seed for number, seed in seen.resets if number]
    assert played == [episode_seed(3, "train", index) for index in range(8)]
    every = [episode_seed(3, "eval", index) for index in range(10)]
    assert judged == [*every[:2], *every[:2], *every[:2], *every]  # after 24, 32 and 48 agent steps; at the end ten
    assert len({action for episode in seen.actions for action in episode}) == 64  # no action twice, random ones included
    assert {explore for explore, _, _ in seen.acted} == {True, False}
    assert not any(training for _, training, _ in seen.acted)
    assert seen.learned
    assert all(seen.learned)
    noise = [seed for explore, _, seed in seen.acted if not explore]
    assert len(set(noise)) == 4  # one an evaluation
    assert seen.actions == watched(tmp_path / "more", "eval_episodes=3").actions


# --- pre-training ---------------------------------------------------------------------------------------------------------

PRETRAINING: dict[str, tuple[Any, set[str]]] = {
    "updates": (13, {"drawn", "logged", "measured", "saved"}),
    "batch_size": (3, {"shape", "drawn", "heldout"}),
    "length": (7, {"shape", "drawn", "heldout"}),
    "heldout_fraction": (0.7, {"drawn", "heldout"}),
    "log_every": (5, {"logged"}),
    "eval_every": (3, {"measured"}),
    "eval_batches": (1, {"batches"}),
    "save_every": (7, {"saved"}),
}
"""Settings of pre-training's loop: another value, and all that it changes."""


def pretrained(store: Path, path: Path, *settings: str) -> dict[str, Any]:
    """What a pre-training of IPV does whose updates are counted and not computed."""
    seen: dict[str, Any] = {"shape": set(), "drawn": hashlib.sha256(), "batches": set(), "heldout": set(), "saved": []}

    def update(self: Updater, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen["shape"].add(tuple(batch["image"].shape[:2]))
        seen["drawn"].update(batch["image"].numpy().tobytes())
        self.update += 1
        return {}

    def measure(method: Any, sampler: Any, batches: int, *_: Any) -> dict[str, Any]:
        seen["batches"].add(batches)
        seen["heldout"].add(hashlib.sha256(sampler.batch(0)["image"].numpy().tobytes()).hexdigest())
        return {}

    def save(loop: Any, **_: Any) -> bool:
        seen["saved"].append(loop.updater.update)
        loop.saves.set(loop.count)
        return True

    base = ("updates=12", "batch_size=2", "length=6", "heldout_fraction=0.3", "log_every=4", "eval_every=6", "eval_batches=2")
    texts = [f"pretrain.{text}" for text in (*base, "save_every=5", *settings)]
    run = compose("ipv", "pretrain", preset="debug", flags={"threads": 1, "data": str(store)}, settings=texts)
    with (
        mock.patch.object(Updater, "learn", update),
        mock.patch.object(pretraining, "measure_heldout", measure),
        mock.patch.object(pretraining.VideoLoop, "save", save),
    ):
        pretraining.pretrain(run, path)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        **seen,
        "drawn": seen["drawn"].hexdigest(),
        "logged": [row["update"] for row in rows if row["kind"] == "pretrain"],
        "measured": [row["update"] for row in rows if row["kind"] == "heldout"],
    }


def test_a_setting_of_pretraining_changes_what_it_is_for_and_nothing_else(store: Path, tmp_path: Path) -> None:
    plain = pretrained(store, tmp_path / "plain")
    assert plain["shape"] == {(2, 6)}
    assert plain["batches"] == {2}
    assert (plain["logged"], plain["measured"], plain["saved"]) == ([4, 8, 12], [6, 12], [5, 10, 12])
    for setting, (value, reached) in PRETRAINING.items():
        found = pretrained(store, tmp_path / setting, f"{setting}={value}")
        assert {key for key in plain if found[key] != plain[key]} == reached, setting
