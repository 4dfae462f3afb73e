"""Studies of chains of stages: which runs share what they start from, and returns by label budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import report_runs
from localmotion.cli import main
from localmotion.errors import ConfigError
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.report.build import report
from localmotion.report.table import write_table
from localmotion.runs.read import read_run
from localmotion.training.study_file import Job, load_study, read_study

CHAIN = """
preset: debug
settings: {threads: 1, precision: fp32, data: logs, online: {eval_episodes: 1}}
tasks: [planar:walker_run]
seeds: [0, 1]
pretrain:
  policy: {method: lapo, stage: clone, checkpoint: latent, per_seed: true}
  latent: {method: lapo, per_seed: true}
variants:
  LAPO: {method: lapo, stage: decode, checkpoint: policy, sweep: {labels: [20, 40]}}
"""
SUPERVISED = """
  wide: {method: laom, settings: {supervised: true}, per_seed: true, sweep: {labels: [20, 40]}}
  wide policy: {method: laom, settings: {supervised: true}, stage: clone, checkpoint: wide, per_seed: true}
variants:
  LAOM+: {method: laom, settings: {supervised: true}, stage: decode, checkpoint: wide policy, sweep: {labels: [40]}, seeds: [1]}
"""


def read(tmp_path: Path, text: str) -> dict[str, Job]:
    (tmp_path / "study.yaml").write_text(text)
    return {job.name: job for job in load_study(tmp_path / "study.yaml")}


def test_all_budgets_share_the_stages_before_them(tmp_path: Path) -> None:
    """One chain per seed, whatever the order of the entries; seed 0 comes first."""
    jobs = read(tmp_path, CHAIN)
    ends = ["LAPO_labels_20-planar_walker_run", "LAPO_labels_40-planar_walker_run"]
    assert list(jobs) == [f"{name}-{seed}" for seed in (0, 1) for name in ("latent", "policy", *ends)]
    assert [job.stage for job in jobs.values()] == ["pretrain", "clone", "decode", "decode"] * 2
    for seed in (0, 1):
        assert [jobs[f"{name}-{seed}"].after for name in ("latent", "policy", *ends)] == [
            "",
            f"latent-{seed}",
            *[f"policy-{seed}"] * 2,
        ]
        assert all(f"seed={seed}" in jobs[f"{name}-{seed}"].settings for name in ("latent", "policy", *ends))
    assert "labels=20" in jobs[f"{ends[0]}-1"].settings
    assert not any("labels" in text for name in ("latent-0", "policy-0") for text in jobs[name].settings)
    arguments = jobs["policy-1"].arguments(tmp_path)
    assert arguments[:3] == ["clone", "--method", "lapo"]
    assert arguments[arguments.index("--checkpoint") + 1] == str(tmp_path / "runs" / "latent-1")


def test_a_sweep_passes_on_to_what_starts_from_it_and_equal_values_go_together(tmp_path: Path) -> None:
    jobs = read(tmp_path, CHAIN[: CHAIN.index("  policy:")] + SUPERVISED.lstrip("\n"))
    values = {name: job.after for name, job in jobs.items()}
    assert values == {
        "wide_labels_20-1": "",
        "wide_labels_40-1": "",
        "wide_policy_labels_20-1": "wide_labels_20-1",
        "wide_policy_labels_40-1": "wide_labels_40-1",
        "LAOM_labels_40-planar_walker_run-1": "wide_policy_labels_40-1",
    }
    assert "labels=20" in jobs["wide_labels_20-1"].settings
    assert not any(text.startswith("labels") for text in jobs["wide_policy_labels_20-1"].settings)  # clone reads no labels


def test_a_model_keeps_the_size_that_its_first_stage_was_swept_over(tmp_path: Path) -> None:
    text = CHAIN.replace("latent: {method: lapo, ", "latent: {method: lapo, sweep: {latent: [32, 64], pretrain.lr: [0.1]}, ")
    jobs = read(tmp_path, text)
    last = jobs["LAPO_latent_32_pretrain.lr_0.1_labels_40-planar_walker_run-0"]
    assert last.after == "policy_latent_32_pretrain.lr_0.1-0"
    assert {"latent=32", "labels=40"} <= set(last.settings)
    assert "latent=32" in jobs[last.after].settings
    rated = [name for name, job in jobs.items() if "pretrain.lr=0.1" in job.settings]
    assert rated == [f"latent_latent_{size}_pretrain.lr_0.1-{seed}" for seed in (0, 1) for size in (32, 64)]


def test_a_chain_that_is_not_made_per_seed_is_made_once(tmp_path: Path) -> None:
    jobs = read(tmp_path, CHAIN.replace(", per_seed: true", ""))
    assert list(jobs)[:2] == ["latent", "policy"]
    assert len(jobs) == 6
    assert {job.after for job in list(jobs.values())[2:]} == {"policy"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("stage: clone", "stage: copy", "'policy': unknown stage of lapo 'copy'"),
        ("stage: decode", "stage: clone", "variant 'LAPO': after clone, lapo cannot act; name it under pretrain"),
        ("latent: {method: lapo, ", "latent: {method: lapo, checkpoint: policy, ", "would start from itself"),
        (
            "checkpoint: policy",
            "checkpoint: latent",
            "LAPO_labels_20.*latent-0: is a pretrain run; decode of lapo starts from a clone",
        ),
        ("latent: {method: lapo", "latent: {method: laom", "policy-0: latent-0: was pre-trained with method laom"),
        ("checkpoint: latent, ", "", "policy-0: clone of lapo starts from a pretrain run"),
        ("checkpoint: latent, per_seed: true", "checkpoint: latent", "'latent', which has a run per seed: add per_seed: true"),
        ("latent: {method: lapo, ", "latent: {method: lapo, seed: 3, ", "per_seed takes the study's seeds"),
        ("labels: [20, 40]", "labels: []", "'LAPO': a sweep has no values"),
        ("latent: {method: lapo, ", "latent: {method: lapo, settings: {labels: 5}, ", "pretrain reads no labels"),
        (
            "latent: {method: lapo, ",
            "latent: {method: lapo, sweep: {latent: [32, 64]}, ",
            "'LAPO' starts from 'policy', which has no run with labels 20, latent 96",
        ),
        ("variants:", "reference: LAPO\nvariants:", "reference: unknown variant 'LAPO'; did you mean LAPO, labels"),
        ("variants:", "reference: -3\nvariants:", "a return above 0"),
    ],
)
def test_mistakes_in_a_chain_are_found_before_anything_runs(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = CHAIN.replace("labels: [20, 40]", "labels: [20], latent: [96]") if "latent 96" in said else CHAIN
    assert old in text
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text.replace(old, new, 1))


def test_labels_that_a_store_does_not_have_are_found_before_anything_runs(tmp_path: Path) -> None:
    recipe = Recipe(size=16, percept_size=16, tracks=4).with_motion("exact")
    collect("planar:walker_run", tmp_path / "logs", policy="random", episodes=2, steps=15, recipe=recipe)
    text = CHAIN.replace("data: logs", f"data: {tmp_path / 'logs'}")
    with pytest.raises(ConfigError, match=r"LAPO_labels_40-planar_walker_run-0: .*labels=40, but it has 30 transitions"):
        read(tmp_path, text)
    assert len(read(tmp_path, text.replace("[20, 40]", "[20, 30]"))) == 8


# --- returns by label budget -------------------------------------------------------------------------------------------


def decoded(path: Path, label: str, labels: int, seed: int, value: float, transitions: int = 0) -> Path:
    """A run on logged episodes that was evaluated once."""
    settings = {"method": "lapo", "stage": "decode", "preset": "tiny", "seed": seed, "env": "planar:walker_run", "data": "logs"}
    report_runs.base(path, {**settings, "labels": labels, "label": label, "checkpoint": "policy"})
    if transitions:
        (path / "environment.json").write_text(json.dumps({"transitions": transitions}))
    lines: list[dict[str, Any]] = [{"kind": "train", "update": 100, "loss/action": 1.0}]
    report_runs.write_lines(
        path / "metrics.jsonl", [*lines, {"kind": "eval", "update": 100, "return_mean": value, "episodes": 2}]
    )
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    made = [
        decoded(tmp_path / f"{name}{labels}{seed}", f"{name}, labels {labels}", labels, seed, base * labels + 2 * seed)
        for name, base in (("LAPO", 1.0), ("BC", 0.5))
        for labels in (20, 100)
        for seed in (0, 1)
    ]
    return [*made, decoded(tmp_path / "all", "BC", 0, 0, 400.0, transitions=5_000)]


def test_the_table_and_the_curves_have_the_return_by_labels(runs: list[Path], tmp_path: Path) -> None:
    rows = write_table(runs, tmp_path)
    task = "planar:walker_run, from logged episodes"
    at = rows.index("| task | variant | score | 20 labels | 100 labels | 5,000 labels |")
    assert rows[at + 2 :] == [
        f"| {task} | LAPO | return_mean | 21.0 ± 1.0 | 101 ± 1 | - |",
        f"| {task} | BC | return_mean | 11.0 ± 1.0 | 51.0 ± 1.0 | 400 |",
    ]
    curves = json.loads((tmp_path / "curves.json").read_text())
    found = {(c["variant"], c["labels"], c["seed"]): c["ys"] for c in curves}
    assert found["LAPO", 100, 1] == [102.0]
    assert found["BC", 5_000, 0] == [400.0]
    assert len(found) == 9
    assert "| LAPO, labels 20 | 2 | 100 updates |" in "\n".join(rows)


@pytest.mark.parametrize(
    ("reference", "share"),
    [("BC", "0.052"), (210.0, "0.100"), ({"planar:walker_run": 42.0}, "0.500"), ({"dmc:walker_run": 42.0}, "-")],
)
def test_the_table_has_shares_of_the_reference(runs: list[Path], tmp_path: Path, reference: Any, share: str) -> None:
    rows = write_table(runs, tmp_path, reference)
    assert rows[0].endswith("| share of reference |")
    assert next(row for row in rows if "LAPO, labels 20" in row).endswith(f"| {share} |")


def test_the_page_draws_returns_against_labels_only_where_there_are_several_budgets(runs: list[Path], tmp_path: Path) -> None:
    title = "against the number of labelled transitions"
    assert title in report(runs, tmp_path / "several.html").read_text()
    assert title not in report(runs[:2], tmp_path / "one.html").read_text()


def test_scores_by_labels_are_of_finished_runs(runs: list[Path], tmp_path: Path) -> None:
    going = decoded(tmp_path / "going", "LAPO, labels 20", 20, 2, 900.0)
    (going / "status.json").write_text('{"state": "running"}')
    rows = write_table([*runs, going], tmp_path)
    task = "planar:walker_run, from logged episodes"
    assert f"| {task} | LAPO | return_mean | 21.0 ± 1.0 | 101 ± 1 | - |" in rows
    assert "Runs without a result: going (running)." in rows


def test_runs_without_a_study_are_not_averaged_over_budgets(tmp_path: Path) -> None:
    made = [decoded(tmp_path / f"{labels}", "", labels, 0, labels, transitions=(labels or 5_000)) for labels in (20, 100, 0)]
    rows = write_table(made, tmp_path)
    for said in ("labels 20", "labels 100", "all labels"):
        assert any(f"| lapo, pre-trained, {said} | 1 |" in row for row in rows)
    task = "planar:walker_run, from logged episodes"
    assert f"| {task} | lapo, pre-trained | return_mean | 20.0 | 100 | 0.000 |" in rows


@pytest.mark.slow
def test_a_study_of_budgets_runs_reports_and_is_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(size=32, percept_size=32, tracks=4).with_motion("exact")
    collect("planar:walker_run", tmp_path / "logs", policy="random", episodes=6, steps=12, recipe=recipe)
    text = CHAIN.replace("data: logs", f"data: {tmp_path / 'logs'}, env_options: {{time_limit: 12}}").replace("[0, 1]", "[0]")
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(text + "reference: LAPO, labels 40\n")
    assert read_study(path).reference == "LAPO, labels 40"
    main(["study", str(path), "--out", str(out), "--jobs", "1"])
    assert "0 finished, 4 to do" in capsys.readouterr().out
    assert read_run(out / "runs" / "LAPO_labels_20-planar_walker_run-0").labels == 20
    assert "20 labels | 40 labels" in (out / "table.md").read_text()
    assert [c["labels"] for c in json.loads((out / "curves.json").read_text())] == [20, 40]
    main(["study", str(path), "--out", str(out)])
    assert "4 finished, 0 to do" in capsys.readouterr().out
