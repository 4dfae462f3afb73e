"""What long work shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from localmotion import console
from localmotion.cli import main
from localmotion.config import OnlineConfig
from localmotion.training import pace


def test_duration() -> None:
    assert [console.duration(x) for x in (0.4, 89, 120, 5399, 9000)] == ["0 s", "89 s", "2 minutes", "90 minutes", "2.5 hours"]


def lines(monkeypatch: pytest.MonkeyPatch, reports: list[tuple[float, int]], **settings: bool) -> list[str]:
    """What `progress` of 100 units says when it is given (seconds, units done)."""
    said: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(console, "say", said.append)
    with console.progress("work", 100, "parts", every=1e9, **settings) as advance:
        for clock[0], done in reports:
            advance(done)
    return said


def test_it_says_once_how_long_the_work_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(monkeypatch, [(0, 0), (2, 1), (6, 3), (8, 4), (200, 99)])
    assert said == ["work: about 3 minutes more on this machine (2 s for each of the parts)"]
    assert lines(monkeypatch, [(0, 0), (6, 3)], forecast=False) == []


def test_what_was_done_before_does_not_count_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(monkeypatch, [(1, 90), (11, 95)])
    assert said == ["work: about 10 s more on this machine (2 s for each of the parts)"]


def test_work_that_ends_past_its_total_has_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(console, "say", said.append)
    with console.progress("p", 10, "steps") as advance:
        clock[0] = 100.0
        advance(12)
    assert said[-1].startswith("p 12/10 steps  0.12/s  ETA 0:00:00")


def test_a_run_says_once_how_long_the_rest_takes_with_its_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    rest = pace.Pace(1000, OnlineConfig(eval_every=500, eval_episodes=5))
    said = []
    for step in range(200, 400):
        said.append(rest.forecast(step, 60.0, 2))
        clock[0] += 0.1
    # 750 steps of 0.1 s; one evaluation of 30 s, and the last one of ten episodes, five at a time: twice as long
    assert [text for text in said if text] == [
        "about 3 minutes more on this machine: 0.1 s for an agent step, 30 s for an evaluation"
    ]
    assert said[50]


def test_many_short_evaluations_are_forecast_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    rest = pace.Pace(500, OnlineConfig(eval_every=10, eval_episodes=1))
    said = []
    for step in range(100, 151):
        said.append(rest.forecast(step, 1.2 * (step // 10 - 9), step // 10 - 9))
        clock[0] += 0.1 + 1.2 * (step % 10 == 9)
    # 350 steps of 0.1 s; 34 evaluations of 1.2 s; ten final episodes are played five at a time: 2.4 s
    assert said[-1] == "about 78 s more on this machine: 0.1 s for an agent step, 1.2 s for an evaluation"


def test_the_number_of_updates_is_known_before_they_are_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    online = OnlineConfig(train_every=5, warmup_updates=0)
    assert pace.updates_due(online, 200, 50, 25) == 30
    assert pace.updates_due(online, 200, 60, 25) == 25  # the random episode lasts until step 75
    assert pace.updates_due(online, 200, 60, 250) == 28  # it is cut at step 60
    assert pace.updates_due(OnlineConfig(train_every=5, warmup_updates=7), 200, 0, 25) == 47
    sets = ("env_steps=90", "prefill=33", "train_every=4", "warmup_updates=3", "threads=1", "precision=fp32", "eval_every=1000")
    line = ["train", "--method", "dreamer_v2", "--env", "toy:dot", "--preset", "debug", "--run", str(tmp_path / "run")]
    main([*line, *(part for text in sets for part in ("--set", text)), "--device", "cpu"])
    (announced,) = re.findall(r"about (\d+) updates", " ".join(capsys.readouterr().out.split()))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert int(announced) == last["update"]
