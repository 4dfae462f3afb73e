"""Rehearsal: the losses of pre-training on clips, beside those of a stage that learns to act."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from localmotion import methods
from localmotion.acting.episodes import Rollout
from localmotion.compute import PLAIN
from localmotion.config import RehearsalConfig
from localmotion.errors import ConfigError
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs.settings import check_read, compose
from localmotion.testing import Subject, random_batch
from localmotion.training import trials
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain
from localmotion.training.rehearsal import PREFIX, rehearsed
from localmotion.training.update import Updater
from test_resume import Stops, assert_same, in_pieces

ABLE = [(name, stage) for name in methods.names() for stage in sorted(methods.get(name).rehearses)]
FLAGS = {"device": "cpu", "threads": 1, "precision": "fp32", "seed": 0}
FEW = ("online.env_steps=120", "online.prefill=40", "online.warmup_updates=2", "online.train_every=10", "online.eval_every=120")


def both(name: str, stage: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A method that can rehearse, and a batch of its stage with clips."""
    cls = methods.get(name)
    subject = Subject(cls, stage)
    clips = random_batch(cls, "pretrain", seed=5)
    batch = random_batch(cls, stage) | {PREFIX + key: value for key, value in clips.items()}
    return subject, batch


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short clips of the block, with exact motion."""
    out = tmp_path_factory.mktemp("clips") / "clips"
    collect("toy:block", out, episodes=6, steps=20, recipe=Recipe(size=32, percept_size=32, tracks=8).with_motion("exact"))
    return out


@pytest.fixture(scope="module")
def trained(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DRP after two updates on these clips."""
    settings = ("pretrain.updates=2", "pretrain.eval_every=2", "pretrain.heldout_fraction=0")
    run = compose("drp", "pretrain", preset="debug", flags={**FLAGS, "data": str(clips)}, settings=settings)
    return pretrain(run, tmp_path_factory.mktemp("trained") / "run")


def settings_of(clips: Path, trained: Path) -> Any:
    flags = {**FLAGS, "checkpoint": str(trained)}
    more = (*FEW, f"rehearsal.data={clips}", "pretrain.heldout_fraction=0")
    return compose("drp", "finetune", preset="debug", env="toy:block", flags=flags, settings=more)


@pytest.mark.parametrize(("name", "stage"), ABLE)
def test_the_losses_of_a_stage_are_joined_by_those_of_pretraining(name: str, stage: str) -> None:
    subject, batch = both(name, stage)
    method = subject.build().train()
    plain, own = method.passes(stage), method.passes("pretrain")[0]
    first, *rest = rehearsed(method, plain, 0.5)
    state = {key: value.clone() for key, value in method.state_dict().items()}

    def losses(of: Any, part: dict[str, torch.Tensor]) -> Any:
        method.load_state_dict(state)
        torch.manual_seed(1)
        return of(part, None)

    alone = {key: value for key, value in batch.items() if not key.startswith(PREFIX)}
    clips = {key.removeprefix(PREFIX): value for key, value in batch.items() if key.startswith(PREFIX)}
    found, scales = losses(first.losses, batch)[0], first.scales
    for key, value in losses(plain[0].losses, alone)[0].items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)
    again = losses(lambda part, _: (torch.rand(0), own.losses(part, None))[1], clips)[0]
    assert {f"rehearsal/{key}" for key in again} == set(found) - set(plain[0].scales)
    assert scales == {**plain[0].scales, **{f"rehearsal/{key}": 0.5 * value for key, value in own.scales.items()}}
    assert tuple(rest) == tuple(plain[1:])


@pytest.mark.parametrize(("name", "stage"), ABLE)
def test_clips_teach_the_model(name: str, stage: str) -> None:
    subject, batch = both(name, stage)
    batch |= {key: torch.zeros(2, 8, *shape) for key, shape in subject.build().extras.items() if key not in batch}
    ends = []
    for weight in (0.0, 1.0):
        run = replace(subject.run, rehearsal=RehearsalConfig("clips", weight))
        updater = Updater(subject.build().train(), run, PLAIN)
        torch.manual_seed(2)
        found = updater.learn(batch)
        assert all(torch.isfinite(value) for value in found.values())
        ends.append({key: value.clone() for key, value in updater.method.state_dict().items()})
    moved = {key.split(".")[0] for key, value in ends[1].items() if not torch.equal(value, ends[0][key])}
    assert moved & set(methods.get(name).transfers)


def test_a_run_that_rehearses_logs_both_and_can_be_stopped_anywhere(
    clips: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings_of(clips, trained)
    monkeypatch.setattr(trials, "evaluate", lambda *_, **__: Rollout([0.0], [1]))  # a stop may come at any of its steps
    finetune(run, tmp_path / "whole")
    last = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in last if line["kind"] == "train"]
    assert {"loss/image", "loss/rehearsal/image", "loss/rehearsal/masked"} <= set(last[-1])
    Stops(monkeypatch, 31)
    assert in_pieces(finetune, run, tmp_path / "pieces") > 1
    assert_same(tmp_path / "whole", tmp_path / "pieces")


def test_other_pictures_or_another_recipe_are_refused_before_the_run(trained: Path, tmp_path: Path) -> None:
    for size, motion, cause in ((16, "exact", "pictures of 16 pixels"), (32, "perceived", "another recipe")):
        out = tmp_path / cause.replace(" ", "_")
        recipe = Recipe(size=size, percept_size=size, tracks=8).with_motion(motion)  # type: ignore[arg-type]
        collect("toy:block", out, episodes=2, steps=12, recipe=recipe)
        with pytest.raises(ConfigError, match=cause):
            finetune(settings_of(out, trained), tmp_path / f"run-{size}-{motion}")
        assert not (tmp_path / f"run-{size}-{motion}" / "config.json").exists()


def test_who_cannot_rehearse_says_so(clips: Path, trained: Path, tmp_path: Path) -> None:
    more = (f"rehearsal.data={clips}", "pretrain.heldout_fraction=0")
    run = compose("dreamer_v2", "train", preset="debug", env="toy:block", flags=FLAGS, settings=more)
    with pytest.raises(ConfigError, match="train of dreamer_v2 learns no model of videos"):
        finetune(run, tmp_path / "run")
    run = compose("drp", "pretrain", preset="debug", flags={**FLAGS, "data": str(clips)}, settings=more)
    with pytest.raises(ConfigError, match="learns from clips in any case"):
        pretrain(run, tmp_path / "run")
    frozen = Subject(methods.get("pvdr"), "finetune", settings=("plans_learn=false",))
    with pytest.raises(ConfigError, match="stays as it is"):
        rehearsed(frozen.build(), frozen.build().passes("finetune"), 1.0)


def test_the_form_of_batches_is_read_where_clips_are() -> None:
    run = compose("drp", "finetune", preset="debug", env="toy:block", flags={**FLAGS, "checkpoint": "x"})
    with pytest.raises(ConfigError, match="does nothing"):
        check_read(run, ["pretrain.length=8"])
    check_read(replace(run, rehearsal=RehearsalConfig("clips")), ["pretrain.length=8", "rehearsal.weight=2"])
