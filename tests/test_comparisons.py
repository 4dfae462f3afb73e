"""Variants compared over tasks: the contrasts of a study by hand, and what the page compares on which scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmotion.evaluation.contrasts import Contrast, Contrasts, Profile, sign_flip_test
from localmotion.report import plots
from localmotion.report.build import report
from localmotion.report.comparisons import comparisons, contrast_table
from localmotion.report.page import Block, Fold, Notice, Picture, Table
from localmotion.report.results import Gathered, averages, results
from localmotion.report.table import write_table
from localmotion.runs.read import read_run
from report_runs import base, write_lines

WALKER, HOPPER, REACH = "planar:walker_run", "planar:hopper_stand", "metaworld:reach"


def run(
    root: Path,
    label: str,
    env: str,
    seed: int,
    value: float,
    *,
    random: float | None = None,
    state: str = "finished",
    **last: Any,
) -> Path:
    """An online run that was evaluated twice; ``value`` is the return of the second."""
    path = root / f"{label}-{env.replace(':', '_')}-{seed}"
    config = {"method": "drp", "stage": "train", "preset": "tiny", "seed": seed, "env": env, "label": label, "checkpoint": ""}
    base(path, config, state)
    lines = [{"kind": "eval", "env_step": step, "return_mean": mean, "episodes": 2} for step, mean in ((0, 777.0), (1000, value))]
    write_lines(path / "metrics.jsonl", [lines[0], lines[1] | last])
    if random is not None:
        (path / "random.json").write_text(json.dumps({"return_mean": random}))
    return path


def gathered(paths: list[Path]) -> Gathered:
    return Gathered([read_run(path) for path in paths])


# --- contrasts --------------------------------------------------------------------------------------------------------

GAINS = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0]


def eight(root: Path) -> list[Path]:
    """DRP is better than IPV by GAINS in walker, and by ten times that in hopper. "same" equals IPV but for seed 0."""
    made = []
    for seed, gain in enumerate(GAINS):
        made += [run(root, "DRP", WALKER, seed, 100 + seed + gain), run(root, "DRP", HOPPER, seed, 500 + seed + 10 * gain)]
        made += [run(root, "IPV", WALKER, seed, 100 + seed), run(root, "IPV", HOPPER, seed, 500 + seed)]
        near = 0.5 if seed == 0 else 0.0
        made += [run(root, "same", WALKER, seed, 100 + seed + near), run(root, "same", HOPPER, seed, 500 + seed)]
    return made


def rows_of(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_contrasts_by_hand(tmp_path: Path) -> None:
    """On the scale of the references the gain of a seed is gain / 100 in either task."""
    data = gathered(eight(tmp_path))
    both = (WALKER, HOPPER)
    family = Contrasts((Contrast("DRP", "IPV", both, tuple(range(8))), Contrast("same", "IPV", both, tuple(range(8)))), 0.05)
    table, notes = contrast_table(data, family, {WALKER: (50.0, 150.0), HOPPER: 1000.0})
    first, second = rows_of(table)
    assert first["contrast"] == "DRP against IPV"
    assert (first["tasks"], first["seeds"], first["difference"]) == ("2", "8 of 8", "+0.450")
    assert (first["p"], first["p, Holm"], first["verdict"]) == ("0.0078", "0.0156", "confirmed")
    low, high = (float(end) for end in first["95 % interval"].split(" to "))
    half = 1.96 * np.std(GAINS) / 100 / np.sqrt(8)
    assert (low, high) == (pytest.approx(0.45 - half, abs=0.02), pytest.approx(0.45 + half, abs=0.02))
    assert first["P(better)"].startswith("1.00 (1.00 to 1.00)")
    # A single difference of 0.005 in one of 16: (0.5 / 100) / 2 / 8, every other difference is 0.
    assert (second["p"], second["p, Holm"], second["verdict"]) == ("1.0000", "1.0000", "refuted")
    assert second["difference"] == "+0.000"
    assert "share of the reference" in notes[0]
    assert "Holm over 2 contrasts" in notes[0]
    assert "above 0.05" in notes[1]
    assert len(notes) == 2


def test_one_scale_or_the_returns_as_they_are(tmp_path: Path) -> None:
    data = gathered(eight(tmp_path))
    family = Contrasts((Contrast("DRP", "IPV", (WALKER, HOPPER), tuple(range(8))),))
    table, notes = contrast_table(data, family)
    assert table.header[-1] == "P(better)"  # no smallest effect, no verdict
    assert rows_of(table)[0]["difference"] == f"+{np.mean(GAINS) * 11 / 2:.0f}"
    assert any("Returns are averaged over tasks as they are" in note for note in notes)
    by_variant, _ = contrast_table(data, family, "IPV")
    means = [np.mean(GAINS) / 103.5, np.mean(GAINS) * 10 / 503.5]
    assert rows_of(by_variant)[0]["difference"] == f"+{np.mean(means):.3f}"
    half, notes = contrast_table(data, family, {WALKER: 100.0})
    assert rows_of(half)[0]["seeds"] == "0 of 8"
    assert any("tasks are measured by share of the reference and by return" in note for note in notes)


def test_success_rates_are_compared_where_both_have_them(tmp_path: Path) -> None:
    made = [run(tmp_path, "DRP", REACH, seed, 5.0, success_rate=0.5 + 0.1 * seed) for seed in (0, 1)]
    made += [run(tmp_path, "IPV", REACH, seed, 900.0, success_rate=0.25) for seed in (0, 1)]
    table, notes = contrast_table(gathered(made), Contrasts((Contrast("DRP", "IPV", (REACH,), (0, 1)),), 0.1), 1000.0)
    row = rows_of(table)[0]
    assert (row["difference"], row["p"], row["verdict"]) == ("+0.300", "0.5000", "–")
    assert "(success rate)" in notes[0]
    assert "With fewer than five seeds the intervals are not reliable, and there is no verdict." in notes
    assert "p cannot be below 0.5 with 2 paired seeds." in notes


def test_only_seeds_with_finished_runs_of_both_in_every_task_are_paired(tmp_path: Path) -> None:
    whole = [run(tmp_path, label, env, 0, 1.0 if label == "DRP" else 0.0) for label in ("DRP", "IPV") for env in (WALKER, HOPPER)]
    one = [run(tmp_path, "DRP", WALKER, 1, 50.0), run(tmp_path, "DRP", HOPPER, 1, 50.0), run(tmp_path, "IPV", WALKER, 1, 0.0)]
    failed = run(tmp_path, "IPV", HOPPER, 1, 0.0, state="failed")
    family = Contrasts((Contrast("DRP", "IPV", (WALKER, HOPPER), (0, 1, 2)), Contrast("DRP", "APV", (WALKER,), (0, 1))), 0.1)
    table, notes = contrast_table(gathered([*whole, *one, failed]), family)
    first, second = rows_of(table)
    assert (first["seeds"], first["difference"], first["95 % interval"], first["p"]) == ("1 of 3", "+1.00", "–", "–")
    assert (second["seeds"], second["difference"], second["P(better)"]) == ("0 of 2", "–", "–")
    assert "DRP against IPV: 2 of 3 seeds are left out, because they lack a finished run." in notes
    assert "DRP against APV: 2 of 2 seeds are left out, because they lack a finished run." in notes


def test_a_contrast_without_pairs_stays_in_the_family(tmp_path: Path) -> None:
    seeds = tuple(range(6))
    made = [run(tmp_path, label, WALKER, seed, level + seed) for label, level in (("a", 9.0), ("b", 2.0)) for seed in seeds]
    family = Contrasts((Contrast("a", "b", (WALKER,), seeds), Contrast("a", "gone", (WALKER,), seeds)))
    row = rows_of(contrast_table(gathered(made), family)[0])[0]
    assert sign_flip_test([7.0] * 6) == 0.03125
    assert (row["p"], row["p, Holm"]) == ("0.0312", "0.0625")


def test_the_table_of_a_study_has_its_contrasts(tmp_path: Path) -> None:
    family = Contrasts((Contrast("DRP", "IPV", (WALKER,), tuple(range(8))),), 1.0)
    runs = eight(tmp_path / "runs")
    lines = write_table(runs, tmp_path, None, family)
    at = lines.index("| contrast | tasks | seeds | difference | 95 % interval | p | p, Holm | P(better) | verdict |")
    assert lines[at + 2].startswith("| DRP against IPV | 1 | 8 of 8 | +45.0 | +")
    assert lines[at + 2].endswith(" | 0.0078 | 0.0078 | 1.00 (1.00 to 1.00) | confirmed |")
    assert (tmp_path / "table.md").read_text() == "\n".join(lines) + "\n"
    assert not any("contrast" in line for line in write_table(runs, tmp_path))
    page = report(runs, tmp_path / "page.html", contrasts=family).read_text()
    assert "<td>DRP against IPV</td>" in page
    assert "<h2>Contrasts</h2>" in page


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Profile]]:
    found: list[Mapping[str, Profile]] = []
    monkeypatch.setattr(plots, "profile_curves", lambda profiles, **_: found.append(profiles) or b"<svg></svg>")
    return found


def tables(blocks: list[Block]) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


def test_scores_lie_between_the_random_policy_and_the_best_variant(tmp_path: Path, drawn: list[Mapping[str, Profile]]) -> None:
    made = []
    for seed in range(5):
        made += [run(tmp_path, "DRP", WALKER, seed, 110.0, random=10.0), run(tmp_path, "DRP", HOPPER, seed, 40.0 + seed)]
        made += [run(tmp_path, "IPV", WALKER, seed, 60.0), run(tmp_path, "IPV", HOPPER, seed, 84.0)]
    made += [run(tmp_path, "only walker", WALKER, 0, 500.0)]  # not in every task, and no reason to leave hopper out
    data = gathered(made)
    blocks = comparisons(data, data.groups)
    assert [list(profiles) for profiles in drawn] == [["DRP", "IPV"]]  # the higher IQM first
    aggregates, pairs, scale = tables(blocks)
    assert scale.rows == [
        ["walker_run", "10.0, random policy", "110, mean of DRP"],
        ["hopper_stand", "0, because the random policy was not measured", "84.0, mean of IPV"],
    ]
    hopper = [(40 + seed) / 84 for seed in range(5)]
    assert [row[:4] for row in aggregates.rows] == [
        ["DRP", "5", f"{(1 + np.mean(hopper)) / 2:.3f}", f"{np.mean([*hopper[2:], 1, 1, 1]):.3f}"],
        ["IPV", "5", "0.750", "0.750"],
    ]
    assert not any(isinstance(block, Notice) for block in blocks)
    assert pairs.rows[0][2] == "0.50"  # better in one task, worse in the other
    profile = drawn[0]["IPV"]
    assert profile.share[np.searchsorted(profile.thresholds, 0.6)] == 0.5  # 0.5 in walker, 1 in hopper
    assert (profile.share[0], profile.share[-1]) == (1, 0)
    assert "only walker is not in the comparison over 2 tasks of planar: it has too few runs there." in data.missing


def test_a_reference_is_the_scale(tmp_path: Path) -> None:
    made = [run(tmp_path, label, WALKER, seed, value) for label, value in (("a", 30.0), ("b", 60.0)) for seed in (0, 1)]
    data = gathered(made)
    for reference, mean, low, high in (
        (120.0, "0.500", "0.000", "120, reference"),
        ({WALKER: (40.0, 80.0)}, "0.500", "40.0", "80.0, reference"),
        ("a", "2.000", "0.000", "30.0, mean of a"),
        ({HOPPER: 9.0}, "1.000", "0, because the random policy was not measured", "60.0, mean of b"),
    ):
        blocks = comparisons(data, data.groups, reference)
        aggregates, pairs, scale = tables(blocks)
        assert aggregates.rows[0][:3] == ["b", "2", mean]
        assert scale.rows == [["walker_run", low, high]]
        assert pairs.rows == [["b", "a", "1.00", "[1.00, 1.00]"]]
        assert [block.text for block in blocks if isinstance(block, Notice)] == [
            "1 task of planar: with fewer than five seeds in a task the intervals are not reliable, and with one there are none."
        ]


def test_single_runs_have_no_intervals_and_one_task_of_them_no_comparison(tmp_path: Path) -> None:
    one = [run(tmp_path, label, WALKER, 0, value) for label, value in (("a", 30.0), ("b", 60.0))]
    two = [run(tmp_path, label, HOPPER, 0, value) for label, value in (("a", 90.0), ("b", 60.0))]
    data = gathered(one)
    assert comparisons(data, data.groups) == []
    data = gathered(one + two)
    aggregates, pairs, _ = tables(comparisons(data, data.groups))
    assert [row[4] for row in aggregates.rows] == [row[6] for row in aggregates.rows] == ["–", "–"]
    assert pairs.rows[0][2:] == ["0.50", "–"]
    assert "<h2>Comparison of variants</h2>" in report(one + two, tmp_path / "page.html").read_text()
    assert "<h2>Comparison of variants</h2>" not in report(one, tmp_path / "one.html").read_text()


def test_a_task_that_nobody_learned_and_runs_that_ended_elsewhere_are_told(tmp_path: Path) -> None:
    made = [run(tmp_path, label, WALKER, seed, 5.0, random=10.0) for label in "ab" for seed in (0, 1)]
    made += [run(tmp_path, label, HOPPER, seed, 50.0, random=10.0) for label in "ab" for seed in (0, 1)]
    made += [run(tmp_path, label, REACH, seed, 5.0, success_rate=0.1) for label in "ab" for seed in (0, 1)]
    data = gathered(made)
    scales = [table.rows for table in tables(comparisons(data, data.groups)) if table.header[0] == "task"]
    assert [[row[0] for row in rows] for rows in scales] == [["hopper_stand"], ["reach"]]
    assert scales[1] == [["reach", "0 %", "100 %"]]
    assert f"{WALKER} is not in the comparison: no variant is better than the random policy." in data.missing
    data = gathered([*made, run(tmp_path, "a", HOPPER, 2, 50.0, env_step=2000)])
    pictures = [block.caption for block in comparisons(data, data.groups) if isinstance(block, Picture)]
    assert ["ended at different places" in caption for caption in pictures] == [True, False]


def test_many_pairs_are_folded(tmp_path: Path) -> None:
    made = [run(tmp_path, f"v{n}", WALKER, seed, 10.0 + n) for n in range(6) for seed in (0, 1)]
    data = gathered(made)
    blocks = comparisons(data, data.groups)
    folds = [block for block in blocks if isinstance(block, Fold)]
    assert [fold.note for fold in folds] == ["15 pairs"]
    assert isinstance(folds[0].blocks[0], Table)
    assert folds[0].blocks[0].rows[0][:3] == ["v5", "v4", "1.00"]


# --- runs that have not finished --------------------------------------------------------------------------------------


def begun(root: Path) -> list[Path]:
    """Two variants with two finished seeds each. A third seed runs, and one variant has only a run that failed. Both would change all."""
    made = [run(root, label, WALKER, seed, value, random=0.0) for label, value in (("a", 30.0), ("b", 60.0)) for seed in (0, 1)]
    made += [run(root, "a", WALKER, 2, 900.0, state="running"), run(root, "c", WALKER, 0, 800.0, state="failed")]
    return made


def test_the_table_counts_finished_runs_and_names_the_others(tmp_path: Path) -> None:
    lines = write_table(begun(tmp_path / "runs"), tmp_path, "a", None, ["d (not begun)"], ["old-0", "old-1"])
    assert lines[2:5] == [
        f"| {WALKER} | a | 2 | 1,000 | return_mean | 30.0 | 0.0 | 30.0 | 30.0 to 30.0 | 1.000 |",
        f"| {WALKER} | b | 2 | 1,000 | return_mean | 60.0 | 0.0 | 60.0 | 60.0 to 60.0 | 2.000 |",
        f"| {WALKER} | random policy | - | - | return_mean | 0.000 | - | - | - | - |",
    ]
    assert lines[5:] == [
        "",
        "Runs without a result: a-planar_walker_run-2 (running), c-planar_walker_run-0 (failed), d (not begun).",
        "",
        "Runs that the study file does not have, left out: old-0, old-1.",
    ]
    curves = json.loads((tmp_path / "curves.json").read_text())
    found = {(curve["method"], curve["seed"]): (curve["state"], curve["ys"][-1]) for curve in curves}
    assert found["a", 0] == ("finished", 30.0)
    assert (found["a", 2], found["c", 0]) == (("running", 900.0), ("failed", 800.0))
    many = write_table(begun(tmp_path / "more"), tmp_path, missing=[f"m{n} (not begun)" for n in range(30)])[-1]
    assert many.endswith("m17 (not begun) and 12 more.")


def test_the_page_compares_finished_runs_and_shows_the_others_apart(tmp_path: Path, drawn: list[Mapping[str, Profile]]) -> None:
    made = begun(tmp_path)
    data = gathered(made)
    aggregates, pairs, scale = tables(comparisons(data, data.groups))
    assert [list(profiles) for profiles in drawn] == [["b", "a"]]
    assert [row[:3] for row in aggregates.rows] == [["b", "2", "1.000"], ["a", "2", "0.500"]]
    assert pairs.rows == [["b", "a", "1.00", "[1.00, 1.00]"]]
    assert scale.rows == [["walker_run", "0.000, random policy", "60.0, mean of b"]]
    blocks, tiles = results(data, WALKER, data.groups)
    final, so_far = tables(blocks)
    assert [row[:5] for row in final.rows] == [
        ["a", "2", "1K", "4", "30.0"],
        ["b", "2", "1K", "4", "60.0"],
        ["random policy", "–", "–", "–", "0.000"],
    ]
    assert so_far.rows == [["a", "2", "running", "1K", "900"], ["c", "0", "failed", "1K", "800"]]
    assert tiles == [("60.0 ± 0.0", f"Episode return in {WALKER}: b; a 30.0 ± 0.0; random policy 0.000")]
    page = report(made, tmp_path / "page.html", None, None, ["d (not begun)"], ["old-0"]).read_text()
    assert "Runs without a result: a-planar_walker_run-2 (running), c-planar_walker_run-0 (failed), d (not begun)." in page
    assert "Runs that the study file does not have, left out: old-0." in page
    assert "An open circle ends the curve of a run that has not finished." in page


def test_a_study_that_has_no_finished_run_yet_has_curves_and_no_numbers(tmp_path: Path) -> None:
    made = [run(tmp_path, label, env, 0, 9.0, state="running") for label in "ab" for env in (WALKER, HOPPER)]
    made += [run(tmp_path, f"v{n}", WALKER, 0, 9.0, state="interrupted") for n in range(10)]
    data = gathered(made)
    blocks, tiles = results(data, WALKER, [group for group in data.groups if group.env == WALKER])
    assert tiles == []
    assert tables(blocks) == []
    (fold,) = [block for block in blocks if isinstance(block, Fold)]  # many rows
    assert fold.note == "12 runs"
    assert any(isinstance(block, Picture) for block in blocks)
    assert comparisons(data, data.groups) == []
    assert write_table(made, tmp_path)[2:4] == [
        "",
        f"Runs without a result: {', '.join(path.name + ' (running)' for path in made[:4])}, "
        + ", ".join(path.name + " (interrupted)" for path in made[4:])
        + ".",
    ]
    report(made, tmp_path / "page.html")


def test_a_reference_and_a_contrast_are_of_finished_runs(tmp_path: Path) -> None:
    family = Contrasts((Contrast("b", "a", (WALKER,), (0, 1, 2)),))
    table, notes = contrast_table(gathered(begun(tmp_path)), family, "a")
    (row,) = rows_of(table)
    assert (row["seeds"], row["difference"]) == ("2 of 3", "+1.00")  # 60 / 30 - 1, and not by the mean with 900
    assert "b against a: 1 of 3 seeds are left out, because they lack a finished run." in notes


def test_an_average_over_tasks_ends_with_finished_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [run(tmp_path, "a", env, seed, 10.0 + seed) for env in (WALKER, HOPPER) for seed in (0, 1)]
    made += [run(tmp_path, "a", WALKER, 2, 900.0), run(tmp_path, "a", HOPPER, 2, 900.0, state="running")]
    found: list[plots.CurveGroup] = []
    monkeypatch.setattr(plots, "learning_curves", lambda groups, **_: found.extend(groups) or b"<svg></svg>")
    data = gathered(made)
    averages(data, data.groups)
    (group,) = found
    assert len(group.curves) == 3
    assert group.unfinished == {2}
    assert group.final is not None
    assert group.final.scores == (10.0, 11.0)


def test_a_finished_run_without_an_evaluation_is_named(tmp_path: Path) -> None:
    made = [run(tmp_path, "a", WALKER, seed, 5.0) for seed in (0, 1)]
    write_lines(made[1] / "metrics.jsonl", [{"kind": "eval", "env_step": 10, "return_mean": float("nan")}])
    lines = write_table(made, tmp_path)
    assert f"Runs without a result: {made[1].name} (finished, no evaluation)." in lines
    assert f"{made[1].name}: 1 values of return_mean are not finite and left out." in lines


def test_a_run_that_never_succeeded_counts_where_others_signal_success(tmp_path: Path) -> None:
    """Some environments signal success only where it is true. Such a run was left out, and the mean was too high."""
    made = [run(tmp_path, "a", REACH, 0, 5.0, success_rate=0.5), run(tmp_path, "a", REACH, 1, 5.0)]
    lines = write_table(made, tmp_path)
    assert "| a | 2 | 1,000 | success_rate | 25 % |" in lines[2]
    assert f"{made[1].name} never signalled success, as other runs in {REACH} did. It counts as 0." in lines
    assert not any("success" in line for line in write_table(made[1:], tmp_path))
