"""Baselines from labels alone: sizes, the rules with relabelling, what is read of which steps, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localmotion import methods
from localmotion.cli import main
from localmotion.config import update
from localmotion.methods.base import VIDEO
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs.settings import compose
from localmotion.testing import Check, Subject, checks_of
from localmotion.testing.learns import losses_of
from localmotion.training.logged import LoggedLoop

BC = methods.get("bc")
RELABEL = ("relabel=true",)


@pytest.mark.parametrize("check", checks_of(BC, settings=(*RELABEL, "policy=impala")), ids=str)
def test_relabelling_keeps_the_rules(check: Check) -> None:
    check()


def test_the_models_have_the_sizes_of_laoms() -> None:
    with torch.device("meta"):
        method: Any = BC(update(BC.Config(), {"relabel": True}), image_size=64, action_dim=6)
        laom: Any = methods.get("laom")(methods.get("laom").Config(), image_size=64, action_dim=6)
    shapes = [{key: value.shape for key, value in part.encoder.state_dict().items()} for part in (method.policy, laom.policy)]
    assert shapes[0] == shapes[1]
    assert method.policy.project.out_features == method.inverse.out.out_features == 6
    assert [stage[0].out_channels for stage in method.encoder.stages] == [192, 384, 384]
    assert method.inverse.project[0].out_features == 1024


def test_the_policy_of_masklam_is_a_choice() -> None:
    sizes = {"policy_widths": (64, 128, 128), "policy": "impala"}
    with torch.device("meta"):
        method: Any = BC(update(BC.Config(), sizes), image_size=64, action_dim=6)
        masklam: Any = methods.get("masklam")(methods.get("masklam").Config(), image_size=64, action_dim=6)
    count = masklam.parameter_counts()
    assert method.parameter_counts() == {"policy": count["policy"] + count["head"]}


def test_the_policy_learns_from_video_and_the_inverse_model_from_labels() -> None:
    """Each pass reads its own part of the batch, and only labels change the first."""
    subject = Subject(BC, "decode", settings=RELABEL)
    method, batch = subject.awake().eval(), subject.data()
    base = losses_of(method, "decode", batch)

    def moved(**changes: torch.Tensor) -> set[str]:
        found = losses_of(method, "decode", batch | changes)
        return {name for name in base if not torch.equal(found[name], base[name])}

    assert moved(action=-batch["action"]) == {"label"}
    assert moved(image=batch["image"].flip(0)) == {"label"}
    assert moved(video_image=batch["video_image"].flip(1)) == {"action"}
    assert BC.needs(subject.run.model, "decode") == VIDEO
    assert not BC.needs(BC.Config(), "decode")


def test_one_command_learns_from_labels_and_all_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    recipe = Recipe(size=32, percept_size=32, tracks=4).with_motion("exact")
    collect("planar:walker_run", logs, policy="random", episodes=5, steps=10, recipe=recipe)
    seen: dict[str, set[bytes]] = {"image": set(), "video_image": set()}
    learn = LoggedLoop.learn

    def watched(self: LoggedLoop, batch: Any) -> None:
        for key in seen:
            seen[key] |= {picture.numpy().tobytes() for picture in batch[key].flatten(0, 1)}
        learn(self, batch)

    monkeypatch.setattr(LoggedLoop, "learn", watched)
    one = ["--method", "bc", "--preset", "debug", "--data", str(logs), "--set", "threads=1", "--set", "precision=fp32"]
    world = ["--env", "planar:walker_run", "--eval_episodes", "1", "--env_options", "{time_limit: 12}"]
    place = ["--run", str(tmp_path / "run"), "--heldout_fraction", "0"]
    main(["decode", *one, *world, *place, "--labels", "12", "--relabel", "true"])
    assert "14 frames" in capsys.readouterr().out.replace("\n", " ")  # 10 + 2 transitions of two episodes
    assert len(seen["image"]) == 14
    assert len(seen["video_image"]) == 55
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("return_mean" in line for line in lines)
    assert {"loss/label", "loss/action"} <= {key for line in lines for key in line}
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["transitions"] == 12


def test_the_budget_of_updates_is_that_of_a_latent_action_model() -> None:
    for preset in ("small", "tiny"):
        others = [compose("masklam", stage, preset=preset) for stage in ("clone", "decode")]
        assert compose("bc", "decode", preset=preset).online.updates == others[0].pretrain.updates + others[1].online.updates
