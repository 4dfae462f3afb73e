"""What long work shows."""

from __future__ import annotations

import pytest

from localmotion import console
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
        said.append(rest.forecast(step, 30.0))
        clock[0] += 0.1
    # 750 steps of 0.1 s; 1.5 evaluations of 30 s, and the last one of ten episodes: two of them
    assert [text for text in said if text] == [
        "about 3 minutes more on this machine: 0.1 s for an agent step, 30 s for an evaluation"
    ]
    assert said[50]
