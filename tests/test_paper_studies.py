"""studies/paper: every table and figure of DRP's paper is a valid study at each scale, and runs to its picture at `debug`."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from localmotion.cli import main
from localmotion.envs import check_env
from localmotion.errors import ConfigError, StoreError
from localmotion.evaluation.statistics import Curve
from localmotion.launch import Command, Launch, Outcome
from localmotion.training.study_file import load_study

FOLDER = Path(__file__).parents[1] / "studies" / "paper"
SCALES = ("paper", "tiny", "debug")
SHOWN = {"fig4", "fig5a", "fig5b", "fig6", "fig7", "fig8", "fig12", "fig13", "fig14", "fig15", "fig16"}
SHOWN |= {f"table{n}" for n in range(1, 6)}


@pytest.fixture(scope="module")
def paper() -> Iterator[ModuleType]:
    """studies/paper/run.py, which finds drawing.py beside it."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("run")
    sys.path.remove(str(FOLDER))


def merged(paper: ModuleType, scale: str) -> dict[str, Any]:
    """One study of all figures: the first seed, and of each variant one task of each suite. Equal names are equal runs."""
    whole: dict[str, Any] = {"pretrain": {}, "variants": {}}
    for name in paper.NAMES:
        study = paper.study_of(name, scale, Path("data"))
        for part in ("pretrain", "variants"):
            for key, given in study.get(part, {}).items():
                tasks = {env.partition(":")[0]: env for env in study["tasks"]} if part == "variants" else {}
                known = whole[part].setdefault(key, {**given, **({"tasks": tasks} if tasks else {})})
                assert {**given, "tasks": 0} == {**known, "tasks": 0}, f"{name}: {key} is another run elsewhere"
                if tasks:
                    known["tasks"] = known["tasks"] | tasks
        whole |= {key: study[key] for key in ("preset", "settings") if key in study}
    for given in whole["variants"].values():
        given["tasks"] = list(given["tasks"].values())
    return {**whole, "seeds": [0]}


def test_every_table_and_figure_has_a_file_and_a_row(paper: ModuleType) -> None:
    assert set(paper.NAMES) == SHOWN
    page = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\w+)\]", page, flags=re.MULTILINE)) == SHOWN


@pytest.mark.parametrize("scale", SCALES)
def test_all_files_are_valid(scale: str, paper: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(merged(paper, scale), sort_keys=False))
    jobs = {job.name: job for job in load_study(path)}  # checks settings and starts of all runs
    tasks = paper.read("common", scale)["tasks"]
    for env in tasks.values():
        check_env(env, {})
    # What an ablation of the encoder changes is the same in pre-training and in fine-tuning.
    encoder = ("intra=", "inter=", "coord=", "temporal=", "motion_encoder=", "keypoints=", "mask_ratio=", "patch=")
    own = {job.name: {text for text in job.settings if text.startswith(encoder)} for job in jobs.values()}
    changed = [job for job in jobs.values() if own[job.name]]
    assert len({frozenset(own[job.name]) for job in changed}) == 5 + 3 * 2
    assert all(own[job.after] == own[job.name] for job in changed if job.after)
    assert sum(job.stage == "pretrain" for job in jobs.values()) == 16
    # Runs without a checkpoint see pictures and motion as those with one do.
    recipe = json.dumps(paper.read("common", scale)["recipe"])
    assert {job.name.split("-")[0] for job in jobs.values() if f"recipe={recipe}" in job.settings} == {
        "DRP_without_pre", "DreamerV3", "DreamerV2",
    }  # fmt: skip


def runs_of(study: dict[str, Any]) -> int:
    """Number of runs of a study, without checking it."""
    sizes = {
        part: [math.prod(map(len, given.get("sweep", {}).values())) for given in study.get(part, {}).values()]
        for part in ("pretrain", "variants")
    }
    return sum(sizes["pretrain"]) + sum(sizes["variants"]) * len(study.get("tasks", ())) * len(study.get("seeds", ()))


def test_the_page_has_the_number_of_runs_of_each(paper: ModuleType) -> None:
    page = (FOLDER / "README.md").read_text()
    for name in paper.NAMES:
        cells = next(line for line in page.splitlines() if line.startswith(f"| [{name}]")).split("|")
        counts = [runs_of(paper.study_of(name, scale, Path("data"))) for scale in ("paper", "tiny")]
        assert cells[3].strip() == " / ".join(f"{count}" for count in counts), name


def test_clips_of_the_paper_are_the_users(paper: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"fig8 needs clips in .*store; make them .*localmotion extract SSV2_VIDEOS --list .*sea_raft"
    ):
        paper.provide("fig8", "paper", tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").touch()
    with pytest.raises(ConfigError, match=r"unseen; make them .*localmotion collect metaworld:"):
        paper.provide("fig8", "paper", tmp_path)
    paper.provide("fig15", "paper", tmp_path)
    assert paper.clips_of("table5", "paper") == []
    with pytest.raises(SystemExit):
        paper.main(["fig15", "--scale", "big", "--out", str(tmp_path)])


def test_curves_have_a_panel_for_each_task_with_mean_and_spread(paper: ModuleType) -> None:
    steps = np.array([0.0, 10.0, 20.0])
    seeds = [Curve(steps, np.array([0.0, 1.0, 4.0])), Curve(steps[:2], np.array([2.0, 3.0]))]
    panels = [("one", False, {"a": seeds, "b": seeds[:1]}), ("two", True, {"a": seeds[:1]})]
    figure = paper.drawing.draw_panels(panels, ["a", "b"])
    first, second = [axes for axes in figure.axes if axes.get_visible()]
    assert [line.get_xydata().tolist() for line in first.lines] == [[[0, 1], [10, 2]], [[0, 0], [10, 1], [20, 4]]]
    band = first.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in band.tolist()} == {(0, 0), (10, 1), (10, 3), (0, 2)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert second.get_ylabel() == "success rate"


def test_windows_of_a_label_do_not_overlap_and_are_spread_over_clips(paper: ModuleType) -> None:
    store = SimpleNamespace(labels=[93, 93, None, 5], ids=["a", "b", "94/c.mp4", "d"], path="store")
    sampler = SimpleNamespace(clips=np.array([0, 1, 2, 3]), starts=np.array([21, 1, 11, 9]), length=10)
    clips, starts, texts = paper.drawing.windows_by_label(store, sampler, {93: "right", "94": "left"}, 3)
    assert list(zip(clips, starts, texts, strict=True)) == [
        (0, 0, "right"), (1, 0, "right"), (0, 10, "right"), (2, 0, "left"), (2, 10, "left"),
    ]  # fmt: skip
    with pytest.raises(StoreError, match="no clip of 10 frames has the label 'up'"):
        paper.drawing.windows_by_label(store, sampler, {93: "right", 7: "up"}, 3)


def test_strips_have_a_row_for_each_method_and_show_what_they_are_given(paper: ModuleType) -> None:
    pictures = np.arange(2 * 6, dtype=np.uint8).reshape(2, 6, 1, 1, 1) * np.ones((1, 1, 4, 4, 3), np.uint8)
    figure = paper.drawing.draw_strips({"GT": pictures, "DRP": pictures + 100}, 2)
    first, second = [list(block.axes) for block in figure.subfigs]
    assert [axes.images[0].get_array().max() for axes in first] == [0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104, 105]
    assert [axes.images[0].get_array().max() for axes in second[:6]] == [6, 7, 8, 9, 10, 11]
    assert [axes.get_ylabel() for axes in first if axes.get_ylabel()] == ["GT", "DRP"]
    assert [bool(axes.lines) for axes in first[:6]] == [False, False, True, False, False, False]
    assert paper.drawing.quality(pictures[:1, :2], pictures[:1, :2] + 51) == pytest.approx([20 * math.log10(5)] * 2, abs=1e-3)


def test_table_1_has_losses_as_the_paper_counts_them(paper: ModuleType) -> None:
    assert [paper.drawing.change(*pair) for pair in ((681, 613), (634, 628), (2.0, 3.0), (None, 1.0))] == [
        "↓ 10.0 %",
        "↓ 0.9 %",
        "↑ 50.0 %",
        "-",
    ]
    rows = paper.read("table1", "paper")["published"]
    before = {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in rows[1:] if "±" in row[1]}
    losses = [row[1:] for row in rows if row[0].startswith("Δ")]
    computed = [
        [paper.drawing.change(a, b) for a, b in zip(before[name], before[f"{name} w/o dyn."], strict=True)]
        for name in ("DRP", "IPV")
    ]
    assert losses == computed


def test_table_5_agrees_but_for_the_training_frequency(paper: ModuleType, tmp_path: Path) -> None:
    paper.make("table5", "debug", tmp_path, tmp_path / "data", 1)
    rows = [line.split(" | ") for line in (tmp_path / "table5" / "figure.md").read_text().splitlines()[2:]]
    assert len(rows) == 38
    other = [row[1:] for row in rows if row[-1] != "yes |"]
    assert other == [["Training frequency, env steps", "5", "5 Meta-World, 10 DMCR", "only Meta-World |"]]


class InThisProcess:
    """An engine that runs each command at once, here: tests/test_study.py has real processes, and each of them imports everything."""

    poll = 0.0

    def __init__(self) -> None:
        self.started: list[str] = []
        self.over: list[tuple[str, Outcome]] = []

    def adopt(self, commands: Sequence[Command]) -> set[str]:
        return set()

    def start(self, groups: Sequence[Sequence[Command]]) -> None:
        for command in (command for group in groups for command in group):
            self.started.append(command.name)
            try:
                main(command.arguments)
                self.over.append((command.name, Outcome(0, "")))
            except SystemExit as end:
                self.over.append((command.name, Outcome(int(end.code or 0), "failed")))

    def ended(self) -> list[tuple[str, Outcome]]:
        over, self.over = self.over, []
        return over

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_every_table_and_figure_runs_at_debug(paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = InThisProcess()
    monkeypatch.setattr(Launch, "engine", lambda launch, folder: engine)
    out = tmp_path / "out"
    for name in paper.NAMES:
        paper.main([name, "--scale", "debug", "--out", str(out), "--jobs", "1"])
        figure, here = paper.read(name, "debug"), out / name
        tasks = [task for task in figure.get("tasks", ()) if task in paper.read("common", "debug")["tasks"]]
        if figure["shows"] in ("curves", "table"):
            found = {(curve["task"], curve["method"]) for curve in json.loads((here / "curves.json").read_text())}
            assert len(found) == sum(job.stage != "pretrain" for job in load_study(here / "study.yaml"))
            assert {method for _, method in found} >= set(figure["variants"]) - {"DRP K", "DRP rho", "DRP P"}
            assert len({task for task, _ in found}) == len(tasks)
        if figure["shows"] == "table":
            ours, theirs = (here / "figure.md").read_text().split("The paper:")
            assert ours.count("\n|") == theirs.count("\n|")  # the same form
            assert "| - |" not in ours
        elif figure["shows"] == "strips":
            scores = json.loads((here / "scores.json").read_text())
            assert set(scores) == set(figure["parts"])
            assert all(math.isfinite(x) for part in scores.values() for row in part["scores"].values() for x in row["psnr"])
        elif figure["shows"] == "embedding":
            assert json.loads((here / "scores.json").read_text())["windows"] == dict.fromkeys(figure["labels"].values(), 6)
        if figure["shows"] in ("curves", "strips"):
            assert all(path.stat().st_size > 10_000 for path in here.glob("figure*.png"))
            assert list(here.glob("figure*.png"))
    assert (
        len(engine.started) == len(set(engine.started)) == len(list((out / "runs").iterdir()))
    )  # what figures share is made once
