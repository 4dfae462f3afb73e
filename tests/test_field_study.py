"""Study files in studies/ are valid; the study of all world models runs from the first line to the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from localmotion.cli import main
from localmotion.perception import Recipe
from localmotion.perception.extract import extract_folder
from localmotion.recording.collect import collect
from localmotion.training.study_file import load_study

STUDY = Path(__file__).parents[1] / "studies" / "field" / "field.yaml"
METHODS = {
    "DRP": "drp",
    "DisWM": "diswm",
    "PreLAR": "prelar",
    "IPV": "ipv",
    "APV": "apv",
    "DreamerV3": "dreamer_v3",
    "DreamerV2": "dreamer_v2",
    "Global_Flow": "drp",
}
SCRATCH = {"DreamerV3", "DreamerV2"}


def with_line(text: str, key: str, line: str) -> str:
    """The study with another value of a key of its first level."""
    changed, count = re.subn(rf"^{key}: .*$", lambda _: line, text, flags=re.MULTILINE)
    assert count == 1
    return changed


def paper_scale() -> list[str]:
    """The study with its commented lines in place, once for each list of tasks."""
    text = STUDY.read_text()
    lines = re.findall(r"^# ((preset|tasks|seeds): .*)$", text, flags=re.MULTILINE)
    for line, key in lines:
        if key != "tasks":
            text = with_line(text, key, line)
    return [with_line(text, "tasks", line) for line, key in lines if key == "tasks"]


def test_the_study_is_all_world_models_by_tasks_by_seeds() -> None:
    jobs = load_study(STUDY)
    runs = {job.name: job for job in jobs if job.stage != "pretrain"}
    tasks = ("planar_walker_run", "planar_hopper_stand")
    assert set(runs) == {f"{name}-{task}-{seed}" for name in METHODS for task in tasks for seed in (0, 1, 2)}
    for name, job in runs.items():
        variant = name.split("-")[0]
        assert job.method == METHODS[variant]
        assert job.preset == "tiny"
        assert (job.after == "") == (variant in SCRATCH)
    before = {job.name: job for job in jobs if job.stage == "pretrain"}
    assert len(before) == 6
    assert all('data="store"' in job.settings for job in before.values())
    for job in [before["global_pre"], runs["Global_Flow-planar_walker_run-0"]]:
        assert 'motion_encoder="global"' in job.settings
    assert runs["Global_Flow-planar_walker_run-0"].after == "global_pre"


@pytest.mark.parametrize(("number", "count"), [(0, 6 + 8 * 3 * 5), (1, 6 + 8 * 6 * 5)])
def test_its_runs_are_valid_at_the_papers_scale(number: int, count: int, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(paper_scale()[number])
    jobs = load_study(path)  # checks the settings of every run
    assert len(jobs) == count
    assert {job.preset for job in jobs} == {"paper"}


@pytest.mark.parametrize("path", sorted((STUDY.parents[1] / "diswm").glob("*_to_*.yaml")), ids=lambda path: path.stem)
def test_transfers_of_diswm_differ_in_one_thing_each(path: Path) -> None:
    jobs = load_study(path)
    source, target = path.stem.split("_to_")
    runs = {job.name: job for job in jobs if job.stage != "pretrain"}
    assert len(runs) == 4 * 5
    assert all({f"env=diswm:{target}", "phase_at=0.5"} <= set(job.settings) for job in runs.values())
    assert all(f'data="{source}"' in job.settings for job in jobs if job.stage == "pretrain")
    starts = {name.split("-")[0]: job.after.split("-")[0] for name, job in runs.items() if name.endswith("-0")}
    without = {"without_distillation": "", "without_disentanglement": "no_disentanglement"}
    assert starts == {"DisWM": "teacher", **without, "DreamerV2": ""}


@pytest.mark.parametrize("path", sorted((STUDY.parents[1] / "pvdr").glob("*.yaml")), ids=lambda path: path.stem)
def test_arms_of_pvdr_start_from_what_their_settings_say(path: Path) -> None:
    jobs = {job.name: job for job in load_study(path)}
    arms = {name: job for name, job in jobs.items() if job.stage == "finetune" and name.endswith("-0")}
    assert len(arms) in (4, 5)
    for name, job in arms.items():
        start = jobs[job.after]
        assert start.stage == ("tokenize" if "without_pre_training" in name else "pretrain")
        sizes = ("context=", "horizon=")  # the same in both, or the weights would not fit
        assert [s for s in job.settings if s.startswith(sizes)] == [s for s in start.settings if s.startswith(sizes)]
        assert start.stage == "tokenize" or jobs[start.after].name == "tokens"


@pytest.mark.slow
def test_it_runs_from_videos_of_other_bodies_to_the_page(tmp_path: Path) -> None:
    """At the preset `debug` with one seed: eight curves a task, and their average."""
    for tree in (3, 7):
        collect(f"planar:tree-{tree:04d}_run", tmp_path / "videos" / str(tree), policy="smooth", episodes=3, steps=60)
    extract_folder(tmp_path / "videos", tmp_path / "store", Recipe(size=32, percept_size=32, tracks=16), workers=1)
    text = with_line(with_line(STUDY.read_text(), "preset", "preset: debug"), "seeds", "seeds: [0]")
    text = text.replace("data: store", f"data: {tmp_path / 'store'}")
    text += "settings: {env_options: {time_limit: 60}, threads: 1, precision: fp32, device: cpu}\n"
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(text)
    main(["study", str(path), "--out", str(out), "--jobs", "1"])
    curves = json.loads((out / "curves.json").read_text())
    tasks = ("planar:walker_run", "planar:hopper_stand")
    names = {name.replace("_", " ") for name in METHODS}
    assert {(curve["task"], curve["method"]) for curve in curves} == {(task, name) for task in tasks for name in names}
    assert all(len(curve["xs"]) == len(curve["ys"]) >= 2 for curve in curves)
    assert "average over 2 tasks of planar" in (out / "report.html").read_text()
