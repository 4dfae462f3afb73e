"""Run directories as they are found: whole, torn, resumed, half written."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmotion.errors import CheckpointError, LocalmotionError
from localmotion.report.results import group_runs
from localmotion.runs.read import names, read_run, superseded_by_none
from report_runs import online_run, pretrain_run, write_lines


def test_a_whole_run_is_read_without_a_notice(tmp_path: Path) -> None:
    run = read_run(online_run(tmp_path / "r", seed=3, checkpoint="pre", media=False))
    assert (run.method, run.stage, run.preset, run.env, run.seed) == ("drp", "finetune", "small", "dmc:walker_walk", 3)
    assert (run.state, run.checkpoint, run.name) == ("finished", "pre", "r")
    assert run.setting("deter") == 256  # nested under model
    assert run.setting("no_such") is None
    assert run.command.startswith("localmotion finetune")
    assert run.random["return_mean"] == 38
    assert (run.notices, run.bad_lines) == ((), 0)
    steps, values = run.series("eval", "return_mean")
    assert steps.tolist() == list(range(0, 50_001, 2500))
    assert len(values) == 21
    assert run.wall_seconds() == pytest.approx(1 + 50_000 * 0.09)
    assert "loss/kl" in run.keys("train")
    assert "returns" not in run.keys("eval")  # a list is no number


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_counted_and_left_out(tmp_path: Path, cut: int) -> None:
    path = pretrain_run(tmp_path / "r", media=False)
    whole = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(whole[:-cut] if cut > 1 else whole[:-2])
    run = read_run(path)
    assert run.bad_lines == 1
    assert sum(len(lines) for lines in run.lines.values()) == whole.count(b"\n") - 1
    assert "1 unreadable line," in " ".join(run.notices)


def test_a_line_torn_inside_a_character_and_lines_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.mkdir()
    good = json.dumps({"kind": "train", "update": 1, "note": "ü"}, ensure_ascii=False).encode()
    rows = [good, b"[1, 2]", b'{"update": 3}', b"", b'{"kind": 5}', b"[" * 100_000, good[:-3]]
    (path / "metrics.jsonl").write_bytes(b"\n".join(rows))
    run = read_run(path)
    assert run.bad_lines == 5
    assert len(run.lines["train"]) == 1
    assert any("config.json is missing" in n for n in run.notices)


def test_damaged_json_becomes_a_sentence(tmp_path: Path) -> None:
    path = online_run(tmp_path / "r", media=False)
    (path / "config.json").write_text("{")
    (path / "status.json").write_text("[]")
    (path / "environment.json").unlink()
    run = read_run(path)
    assert (run.method, run.state, run.seed) == ("unknown method", "unknown", None)
    text = " ".join(run.notices)
    assert "config.json cannot be read" in text
    assert "status.json does not hold an object" in text
    assert "environment.json is missing" in text


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent: no such run directory"):
        read_run(tmp_path / "absent")
    with pytest.raises(LocalmotionError, match="neither config"):
        read_run(tmp_path)


def test_a_resumed_run_supersedes_what_it_wrote_before(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.mkdir()
    rows = [(0, 1.0), (10, 2.0), (20, 3.0), (30, 4.0), (20, 5.0), (25, 6.0), (25, 7.0)]
    lines = [{"kind": "eval", "env_step": s, "return_mean": v} for s, v in rows]
    lines += [
        {"kind": "eval", "env_step": True, "return_mean": 9.0},
        {"kind": "eval", "env_step": 40, "return_mean": None},
    ]
    lines += [
        {"kind": "eval", "env_step": 10**400, "return_mean": 1.0},
        {"kind": "eval", "env_step": math.nan, "return_mean": 1.0},
    ]
    write_lines(path / "metrics.jsonl", lines)
    steps, values = read_run(path).series("eval", "return_mean")
    assert steps.tolist() == [0, 10, 20, 25]
    assert values.tolist() == [1, 2, 5, 7]
    assert [x.tolist() for x in read_run(path).series("eval", "absent")] == [[], []]


def test_wall_time_adds_up_over_sessions(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.mkdir()
    write_lines(path / "metrics.jsonl", [{"kind": "train", "wall": w} for w in (5, 60, 100, 4, 50)])
    assert read_run(path).wall_seconds() == 150


@pytest.mark.parametrize("clock", [True, False], ids=["wall", "no wall"])
def test_episodes_that_end_together_are_all_kept_and_a_session_that_wrote_again_replaces_them(
    tmp_path: Path, clock: bool
) -> None:
    """Three parallel environments end episodes at env step 20 and 40. The run stops, and writes step 40 again with other returns."""
    path = tmp_path / "r"
    path.mkdir()
    rows = [(20, 1.0, 5), (20, 2.0, 5), (20, 6.0, 5), (40, 7.0, 9), (40, 8.0, 9)]
    rows += [(30, 3.0, 8)] * (not clock)  # only a smaller count tells that a session began
    rows += [(40, 10.0, 3), (40, 20.0, 3), (40, 60.0, 4)]
    lines = [
        {"kind": "episode", "env_step": step, "return": value, **({"wall": wall} if clock else {})} for step, value, wall in rows
    ]
    write_lines(path / "metrics.jsonl", lines)
    run = read_run(path)
    steps, values = run.every("episode", "return")
    between = [] if clock else [(30.0, 3.0)]
    expected = [(20.0, 1.0), (20.0, 2.0), (20.0, 6.0), *between, (40.0, 10.0), (40.0, 20.0), (40.0, 60.0)]
    assert list(zip(steps.tolist(), values.tolist(), strict=True)) == expected
    steps, values = run.series("episode", "return")
    assert list(zip(steps.tolist(), values.tolist(), strict=True)) == [(20.0, 6.0), *between, (40.0, 60.0)]


@given(st.lists(st.tuples(st.integers(0, 30), st.one_of(st.just(math.nan), st.integers(0, 5).map(float))), max_size=40))
def test_superseding_keeps_what_no_later_session_wrote_again(rows: list[tuple[int, float]]) -> None:
    xs, walls = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    kept = xs[keep := superseded_by_none(xs, walls)]
    assert (np.diff(kept) >= 0).all()
    if rows:
        assert keep[-1]
        assert kept[0] == xs.min()
    # Against the definition: a session begins where a count or the clock falls.
    session = [0]
    for (x, wall), (next_x, next_wall) in itertools.pairwise(rows):
        session.append(session[-1] + (next_x < x or next_wall < wall))
    again = [any(session[j] > session[i] and rows[j][0] <= rows[i][0] for j in range(i + 1, len(rows))) for i in range(len(rows))]
    assert keep.tolist() == [not found for found in again]


def test_runs_are_grouped_by_env_method_and_origin(tmp_path: Path) -> None:
    runs = [
        online_run(tmp_path / "a1", seed=1, checkpoint="p", media=False),
        online_run(tmp_path / "b", seed=0, media=False),
        online_run(tmp_path / "a0", seed=0, checkpoint="p", media=False),
        online_run(tmp_path / "c", seed=0, method="dreamer_v2", media=False),
        online_run(tmp_path / "d", seed=0, env="metaworld:reach", media=False),
        pretrain_run(tmp_path / "p", media=False),
    ]
    groups = group_runs([read_run(r) for r in runs])
    assert [(g.env, g.label, [r.name for r in g.runs]) for g in groups] == [
        ("dmc:walker_walk", "drp, pre-trained", ["a0", "a1"]),
        ("dmc:walker_walk", "drp, from scratch", ["b"]),
        ("dmc:walker_walk", "dreamer_v2, from scratch", ["c"]),
        ("metaworld:reach", "drp, from scratch", ["d"]),
    ]


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["a/drp"], ["drp"]),
        (["a/drp", "a/ipv"], ["drp", "ipv"]),
        (["a/drp", "b/drp"], ["a/drp", "b/drp"]),
        (["a/drp", "b/drp", "b/ipv"], ["a/drp", "b/drp", "ipv"]),
        (["x/drp/100", "x/ipv/101"], ["drp/100", "ipv/101"]),
        (["x/drp/100", "y/drp/100"], ["x/drp/100", "y/drp/100"]),
        (["100"], ["100"]),
        (["a/b", "b"], ["a/b", "b"]),
    ],
)
def test_names_tell_runs_apart(paths: list[str], shown: list[str]) -> None:
    assert names([Path(path) for path in paths]) == shown
