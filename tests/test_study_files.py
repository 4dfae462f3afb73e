"""Study files in studies/ are valid, and their arms differ in what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmotion.config import leaves
from localmotion.runs.settings import compose
from localmotion.training.study_file import load_study

STUDIES = Path(__file__).parents[1] / "studies"


@pytest.mark.parametrize("path", sorted((STUDIES / "diswm").glob("*_to_*.yaml")), ids=lambda path: path.stem)
def test_transfers_of_diswm_differ_in_one_thing_each(path: Path) -> None:
    jobs = load_study(path)
    source, target = path.stem.split("_to_")
    runs = {job.name: job for job in jobs if job.stage != "pretrain"}
    assert len(runs) == 4 * 5
    assert all({f"env=diswm:{target}", "phase_at=0.51", "supersample=2"} <= set(job.settings) for job in runs.values())
    assert all(f'data="{source}"' in job.settings for job in jobs if job.stage == "pretrain")
    starts = {name.split("-")[0]: job.after.split("-")[0] for name, job in runs.items() if name.endswith("-0")}
    without = {"without_distillation": "", "without_disentanglement": "no_disentanglement"}
    assert starts == {"DisWM": "teacher", **without, "DreamerV2": ""}


@pytest.mark.parametrize("path", sorted((STUDIES / "pvdr").glob("*.yaml")), ids=lambda path: path.stem)
def test_arms_of_pvdr_start_from_what_their_settings_say(path: Path) -> None:
    jobs = {job.name: job for job in load_study(path)}
    arms = {name: job for name, job in jobs.items() if job.stage == "finetune" and name.endswith("-0")}
    assert len(arms) in (4, 5, 6)
    for name, job in arms.items():
        start = jobs[job.after]
        assert start.stage == ("tokenize" if "without_pre_training" in name else "pretrain")
        sizes = ("context=", "horizon=")  # the same in both, or the weights would not fit
        assert [s for s in job.settings if s.startswith(sizes)] == [s for s in start.settings if s.startswith(sizes)]
        assert start.stage == "tokenize" or jobs[start.after].name == "tokens"


def test_arms_of_pvdr_on_the_toy_differ_in_one_thing() -> None:
    jobs = load_study(STUDIES / "pvdr" / "toy_reach.yaml")
    runs = {job.name: compose(job.method, job.stage, preset=job.preset, settings=job.settings) for job in jobs}
    arms = {name.split("-")[0]: dict(leaves(run)) for name, run in runs.items() if name.endswith("toy_reach-0")}
    main = arms.pop("PVDR")
    changed = {arm: {key: run[key] for key in run if run[key] != main[key] and key != "label"} for arm, run in arms.items()}
    assert changed == {
        "one_plan": {"model.align.plans": 1, "model.align.plans_eval": 1},
        "without_pre_training": {"model.pretrained": False, "load": "tokenizer"},
        "without_reward": {"model.align.reward_from": 1.0},
        "frozen_plans": {"model.align.plans_learn": False},
    }
    plans = runs["plans-0"]
    assert plans.pretrain.length == plans.model.plan.context + plans.model.plan.horizon  # no frame is loaded in vain
