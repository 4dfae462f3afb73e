"""Studies: a grid is what its file says, runs go on where they stopped, failures are told and cost only themselves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import report_runs
from localmotion.cli import main
from localmotion.errors import ConfigError
from localmotion.evaluation.contrasts import Contrast, Contrasts
from localmotion.launch import Launch
from localmotion.training.study import RunsFailedError, load_study, run_study, slug, state
from localmotion.training.study_file import read_study
from waiting import holds, wait_until

STUDY = """
name: tiny
preset: debug
settings: {threads: 1, precision: fp32, online: {env_steps: 160, prefill: 60, eval_every: 100, warmup_updates: 1}}
tasks: [toy:dot]
seeds: [0, 1]
variants:
  DreamerV2: {method: dreamer_v2}
  entropy: {method: dreamer_v2, sweep: {entropy: [0.001, 0.01]}, seeds: [0]}
"""
# For studies that run: every run is a process that imports everything.
ONE = STUDY.replace("entropy: [0.001, 0.01]", "entropy: [0.01]")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_the_grid_is_what_the_file_says(tmp_path: Path) -> None:
    text = STUDY.replace("variants:", "pretrain:\n  clips: {method: drp, settings: {data: store}}\nvariants:")
    text += "  DRP w/o dyn.: {method: drp, checkpoint: clips, settings: {load: 'motion,image'}, tasks: [toy:dot, 'dmc:walker_walk']}\n"
    jobs = load_study(write(tmp_path, text))
    assert [job.name for job in jobs] == [
        "clips",
        "DreamerV2-toy_dot-0",
        "entropy_entropy_0.001-toy_dot-0",
        "entropy_entropy_0.01-toy_dot-0",
        "DRP_without_dyn-toy_dot-0",
        "DRP_without_dyn-dmc_walker_walk-0",
        "DreamerV2-toy_dot-1",
        "DRP_without_dyn-toy_dot-1",
        "DRP_without_dyn-dmc_walker_walk-1",
    ]
    assert [job.stage for job in jobs] == ["pretrain", *["train"] * 3, "finetune", "finetune", "train", "finetune", "finetune"]
    assert jobs[4].after == "clips"
    arguments = jobs[4].arguments(tmp_path)
    assert arguments[arguments.index("--checkpoint") + 1] == str(tmp_path / "runs" / "clips")
    assert "online.env_steps=160" in arguments
    assert 'label="DRP w/o dyn."' in arguments
    assert "entropy=0.01" in jobs[3].settings
    assert any(text.startswith("load=") and "motion,image" in text for text in jobs[4].settings)
    assert all(f"seed={job.name[-1]}" in job.settings for job in jobs[1:])
    assert all("online.env_steps=160" in job.settings for job in jobs)


def test_a_study_may_be_of_pretrainings_alone_and_may_set_the_recipe(tmp_path: Path) -> None:
    head, _, _ = STUDY.partition("variants:")
    alone = head + "pretrain:\n  clips: {method: drp, settings: {data: store}}\n"
    assert [(job.name, job.stage) for job in load_study(write(tmp_path, alone))] == [("clips", "pretrain")]
    with pytest.raises(ConfigError, match=r"needs variants.*or pretrain alone"):
        load_study(write(tmp_path, head))
    jobs = load_study(write(tmp_path, STUDY.replace("{threads: 1,", "{recipe: {size: 32, percept_size: 64}, threads: 1,")))
    assert all('recipe={"size": 32, "percept_size": 64}' in job.settings for job in jobs)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("method: dreamer_v2}", "method: dreamer_v4}", "did you mean dreamer_v"),
        ("variants:", "variations:", "unknown key of study 'variations'; did you mean variants"),
        ("sweep: {entropy:", "sweep: {entrophy:", "did you mean.*entropy"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "two runs would be called 'DreamerV2-toy_dot-0'"),
        ("seeds: [0, 1]", "seeds: 3", r"seeds is a list, e.g. \[0, 1\]"),
        ("name: tiny", "name: [", "cannot be read as a study"),
        ("variants:", "contrasts: [DreamerV2]\nvariants:", "contrasts is a mapping, e.g. contrasts: {of: DRP, against"),
        ("{threads: 1,", "{threads: 1, seed: 0,", "the study: seed is not a setting here, it tells runs apart; use seeds"),
        ("dreamer_v2}", "dreamer_v2, settings: {env: toy:reach}}", "variant 'DreamerV2': env is not a setting here.*use tasks"),
        ("entropy: [0.001, 0.01]", "seed: [3, 4]", "variant 'entropy': seed is not a setting here"),
        (
            "variants:",
            "pretrain:\n  clips: {method: drp, per_seed: true, settings: {data: store, seed: 3}}\nvariants:",
            "pre-training 'clips': seed is not a setting here.*use seed or per_seed of the entry",
        ),
        ("variants:", "contrasts: {of: DreamerV2}\nvariants:", "contrasts is a mapping"),
        ("variants:", "contrasts: {of: DreamerV2, against: [], least: 1}\nvariants:", "unknown key of contrasts 'least'"),
        (
            "variants:",
            "contrasts: {of: Dreamer, against: entropy}\nvariants:",
            "contrasts: unknown variant 'Dreamer'; did you mean DreamerV2",
        ),
        (
            "variants:",
            "contrasts: {of: DreamerV2, against: entropy}\nvariants:",
            r"unknown variant 'entropy'; did you mean entropy, entropy 0.01, entropy, entropy 0.001\?",
        ),
        ("variants:", "contrasts: {of: DreamerV2, against: DreamerV2}\nvariants:", "name each variant once"),
        (
            "variants:",
            "contrasts: {of: DreamerV2, against: ['entropy, entropy 0.01'], smallest: 0}\nvariants:",
            "smallest is the smallest difference that matters, a number above 0",
        ),
        ("variants:", "reference: {'toy:dot': [3, 3]}\nvariants:", "pairs .return of the random policy, return above it"),
        ("variants:", "reference: {'toy:dot': [1, 2, 3]}\nvariants:", "pairs .return of the random policy, return above it"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = write(tmp_path, STUDY.replace(old, new, 1))
    with pytest.raises(ConfigError, match=said):
        run_study(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "checkpoint: clips",
            "checkpoint: clisp",
            "DRP-toy_dot-0: checkpoint 'clisp' is no pre-training of this file; the file's are clips, and no run on disk; did you mean"
            r" clips\?",
        ),
        ("checkpoint: clips", "checkpoint: AT/runs/plips", r"no run on disk; did you mean .*/runs/clips\?"),
        (
            "data: AT/store",
            "data: AT/stoer",
            r"clips: data: .*stoer: no clip store there \(no store.json\); did you mean .*/store\?",
        ),
        (
            "checkpoint: clips}",
            "checkpoint: clips, settings: {rehearsal.data: AT/stoer}}",
            r"DRP-toy_dot-0: rehearsal.data: .*stoer: no clip store there \(no store.json\); did you mean .*/store\?",
        ),
    ],
)
def test_a_store_or_checkpoint_that_does_not_exist_is_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    for file in ("store/store.json", "runs/clips/config.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    monkeypatch.setattr("localmotion.training.study.carry_out", lambda *_, **__: {})
    text = STUDY.replace("variants:", "pretrain:\n  clips: {method: drp, settings: {data: AT/store}}\nvariants:")
    text += "  DRP: {method: drp, checkpoint: clips}\n"
    with pytest.raises(ConfigError, match=f"study.yaml: .*{said}"):
        run_study(write(tmp_path, text.replace(old, new).replace("AT", str(tmp_path))), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = text.replace("checkpoint: clips", f"checkpoint: {tmp_path}/out/runs/clips").replace("AT", str(tmp_path))
    run_study(write(tmp_path, made), tmp_path / "out")  # a run of this study need not exist yet


def test_a_run_that_has_not_begun_may_be_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("localmotion.training.study.carry_out", lambda _, todo, **__: given.extend(todo[0].arguments) or {})
    out = tmp_path / "out"
    run_study(write(tmp_path, STUDY), out)
    (out / "runs" / "DreamerV2-toy_dot-0").mkdir(parents=True)  # a run that failed before it wrote its settings
    changed = write(tmp_path, STUDY.replace("env_steps: 160", "env_steps: 200"))
    run_study(changed, out)
    assert "online.env_steps=200" in given
    assert json.loads((out / "study.json").read_text())["DreamerV2-toy_dot-0"].count("online.env_steps=200") == 1
    (out / "runs" / "DreamerV2-toy_dot-0" / "config.json").touch()
    status = out / "runs" / "DreamerV2-toy_dot-0" / "status.json"
    status.write_text('{"state": "failed", "agent_step": 0}')  # at its first step: nothing was played
    run_study(write(tmp_path, STUDY.replace("env_steps: 160", "env_steps: 300")), out)
    run_study(write(tmp_path, STUDY.replace("env_steps: 160", "env_steps: 200")), out)
    status.write_text('{"state": "running", "agent_step": 0}')  # perhaps on another machine
    with pytest.raises(ConfigError, match="with other settings"):
        run_study(write(tmp_path, STUDY.replace("env_steps: 160", "env_steps: 300")), out)
    status.write_text('{"state": "interrupted", "agent_step": 3}')
    run_study(write(tmp_path, STUDY.replace("env_steps: 160", "env_steps: 200")), out)
    with pytest.raises(
        ConfigError, match=r"says: preset \(debug there, tiny now\), online.env_steps \(200 there, not set now\); ch"
    ):
        run_study(write(tmp_path, STUDY.replace("preset: debug", "preset: tiny").replace("env_steps: 160, ", "")), out)


def test_contrasts_and_references_are_what_the_file_says(tmp_path: Path) -> None:
    text = STUDY.replace("seeds: [0]}", "seeds: [0, 2], tasks: ['dmc:walker_walk', 'toy:dot']}")
    more = "  other: {method: dreamer_v2, seeds: [3]}\n  far: {method: dreamer_v2, tasks: ['dmc:walker_walk']}\n"
    text = text.replace("  DreamerV2:", f"{more}  DreamerV2:")
    text += "contrasts: {of: DreamerV2, against: ['entropy, entropy 0.01', 'entropy, entropy 0.001'], smallest: 0.02}\n"
    study = read_study(write(tmp_path, text + "reference: {'toy:dot': [-2, 10], 'dmc:walker_walk': 900}\n"))
    pairs = [Contrast("DreamerV2", f"entropy, entropy {value}", ("toy:dot",), (0, 1, 2)) for value in (0.01, 0.001)]
    assert study.contrasts == Contrasts(tuple(pairs), 0.02)
    assert study.reference == {"toy:dot": (-2.0, 10.0), "dmc:walker_walk": 900.0}
    one = re.sub(r"contrasts: .*", "contrasts: {of: DreamerV2, against: 'entropy, entropy 0.01'}", text)
    assert read_study(write(tmp_path, one)).contrasts == Contrasts((pairs[0],), None)
    assert read_study(write(tmp_path, STUDY)).contrasts is None
    for name, what in (("other", "seed"), ("far", "task")):
        with pytest.raises(ConfigError, match=f"'DreamerV2' and '{name}' share no {what}"):
            read_study(write(tmp_path, one.replace("against: 'entropy, entropy 0.01'", f"against: {name}")))


def test_a_study_runs_reports_and_is_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        ONE
        + "contrasts: {of: DreamerV2, against: ['entropy, entropy 0.01'], smallest: 0.1}\nreference: {'toy:dot': [-1000, 10]}\n"
    )
    path, out = write(tmp_path, text), tmp_path / "out"
    main(["study", str(path), "--out", str(out), "--jobs", "2"])
    text = capsys.readouterr().out
    assert "0 finished, 3 to do" in text
    table = (out / "table.md").read_text()
    assert "| toy:dot | DreamerV2 | 2 | 160 | return_mean |" in table
    assert "| toy:dot | entropy, entropy 0.01 | 1 | 160 |" in table
    assert "| DreamerV2 against entropy, entropy 0.01 | 1 | 1 of 2 |" in table
    curves = json.loads((out / "curves.json").read_text())
    assert [(c["method"], c["seed"]) for c in curves if c["method"] == "DreamerV2"] == [("DreamerV2", 0), ("DreamerV2", 1)]
    assert all(len(c["xs"]) == len(c["ys"]) >= 2 for c in curves)
    page = (out / "report.html").read_text()
    assert "<td>DreamerV2 against entropy, entropy 0.01</td>" in page
    assert "Performance profiles" not in page  # one variant has a single run
    written = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in (out / "runs").iterdir()}
    main(["study", str(path), "--out", str(out)])
    assert "3 finished, 0 to do" in capsys.readouterr().out
    assert written == {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in (out / "runs").iterdir()}
    # Another seed is more of the same study; other settings under the same names are another study.
    assert len(load_study(write(tmp_path, ONE.replace("seeds: [0, 1]", "seeds: [0, 1, 2]")))) == 4
    with pytest.raises(
        ConfigError, match=r"holds DreamerV2-toy_dot-0 with other .* online.env_steps \(160 there, 200 now\); choose"
    ):
        run_study(write(tmp_path, ONE.replace("env_steps: 160", "env_steps: 200")), out)


def test_a_run_that_fails_costs_only_itself_and_what_needs_it(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "store.json").write_text("{}")
    clips = f"pretrain:\n  clips: {{method: drp, settings: {{data: {tmp_path / 'broken'}}}}}\nvariants:"
    text = STUDY.replace("variants:", clips).replace("[0, 1]", "[0]")
    text = text[: text.index("  entropy:")] + "  DRP: {method: drp, checkpoint: clips}\n"
    out = tmp_path / "out"
    with pytest.raises(RunsFailedError, match=r"2 of 3 runs failed, first clips: .*broken.*exit code 2"):
        run_study(write(tmp_path, text), out, Launch(jobs=2))
    assert state(out / "runs" / "DreamerV2-toy_dot-0") == "finished"
    assert state(out / "runs" / "DRP-toy_dot-0") == ""
    with pytest.raises(SystemExit):
        main(["study", str(tmp_path / "study.yaml"), "--out", str(out)])
    assert "\n\nRuns without a result: clips (not begun), DRP-toy_dot-0 (not begun).\n" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("number", "code", "ctrl_c"),
    [(signal.SIGINT, 130, signal.SIG_DFL), (signal.SIGTERM, 143, signal.SIG_IGN)],  # a shell's background jobs ignore Ctrl-C
)
def test_an_interrupted_study_lets_its_runs_save(number: int, code: int, ctrl_c: signal.Handlers, tmp_path: Path) -> None:
    path, out = write(tmp_path, STUDY.replace("env_steps: 160", "env_steps: 100000")), tmp_path / "out"
    command = [sys.executable, "-m", "localmotion", "study", str(path), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, ctrl_c),
    )
    run = out / "runs" / "DreamerV2-toy_dot-0"
    try:
        wait_until(lambda: holds(run / "metrics.jsonl", "eval"), process)
        os.kill(process.pid, number)
        assert process.wait() == code
    finally:
        process.kill()
    assert state(run) == "interrupted"
    assert any((run / "checkpoints").iterdir())


def test_results_are_of_the_finished_runs_of_the_file_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One seed runs, one has not begun. A variant was renamed after its runs, and its new name must not be averaged with them."""
    out, label = tmp_path / "out", "entropy, entropy 0.01"

    def made(name: str, variant: str, seed: int, value: float, state: str = "finished", **more: Any) -> None:
        path = out / "runs" / name
        settings = {"method": "dreamer_v2", "stage": "train", "preset": "debug", "seed": seed, "env": "toy:dot"}
        report_runs.base(path, {**settings, "label": variant, "checkpoint": ""}, state)
        if value:
            report_runs.write_lines(
                path / "metrics.jsonl", [{"kind": "eval", "env_step": 160, "return_mean": value, "episodes": 2}]
            )

    made("DreamerV2-toy_dot-0", "DreamerV2", 0, 10.0)
    made("DreamerV2-toy_dot-1", "DreamerV2", 1, 12.0, "running")
    made("DreamerV2-toy_dot-2", "DreamerV2", 2, 900.0)  # seed 2 is no longer in the file
    made("entropy_entropy_0.01-toy_dot-0", label, 0, 20.0)
    made("entropy_entropy_0.1-toy_dot-0", "entropy, entropy 0.1", 0, 800.0)
    made("former-toy_dot-0", "former", 0, 0.0, "failed")  # it has logged nothing
    (out / "runs" / "note").mkdir()  # no run

    def edited(path: Path, *_: Any, **__: Any) -> None:
        path.write_text("variants: [")  # while the runs go on

    monkeypatch.setattr("localmotion.training.study.run_study", edited)
    text = ONE.replace("seeds: [0]}", "seeds: [0, 3]}")
    main(["study", str(write(tmp_path, text)), "--out", str(out)])
    table = (out / "table.md").read_text()
    assert "| toy:dot | DreamerV2 | 1 | 160 | return_mean | 10.0 |" in table
    assert f"| toy:dot | {label} | 1 | 160 | return_mean | 20.0 |" in table
    said = (
        "Runs without a result: DreamerV2-toy_dot-1 (running), entropy_entropy_0.01-toy_dot-3 (not begun).",
        "Runs that the study file does not have, left out: DreamerV2-toy_dot-2, entropy_entropy_0.1-toy_dot-0, former-toy_dot-0.",
    )
    page, printed = (out / "report.html").read_text(), " ".join(capsys.readouterr().out.split())
    for line in said:
        assert line in table
        assert line in page
        assert line in printed
    assert not re.search(r"\b[89]00\b", re.sub(r"<svg.*?</svg>|<style.*?</style>|data:[^\"]*", "", page, flags=re.DOTALL))
    curves = json.loads((out / "curves.json").read_text())
    assert sorted((c["method"], c["seed"], c["state"]) for c in curves) == [
        ("DreamerV2", 0, "finished"),
        ("DreamerV2", 1, "running"),
        (label, 0, "finished"),
    ]


def test_a_study_without_a_run_that_logged_anything_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmotion.training.study.run_study", lambda *_, **__: (tmp_path / "out").mkdir())
    main(["study", str(write(tmp_path, ONE)), "--out", str(tmp_path / "out")])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Runs without a result: DreamerV2-toy_dot-0 (not begun), entropy_entropy_0.01-toy_dot-0 (not begun), Dream" in table
    assert not (tmp_path / "out" / "report.html").exists()


def test_labels_become_names_of_directories() -> None:
    assert slug("DRP w/o dyn.") == "DRP_without_dyn"
    assert "/" not in slug("../../etc")
    assert slug("..") == slug("???") == "run"
