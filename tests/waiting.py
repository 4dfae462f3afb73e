"""Waiting for what a test has started. There are no time limits here: on a busy machine everything takes longer."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from localmotion.video import workers


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Return once ``happened()`` is true; an error if the process ends before. pytest's timeout ends what hangs."""
    while not happened():
        code = process.poll()
        assert code is None or happened(), f"the process ended with exit code {code} before"
        time.sleep(0.1)


def holds(path: Path, text: str) -> bool:
    """Whether the file is there and contains the text."""
    return path.exists() and text in path.read_text()


def jump_when_hanging(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Time limits of `map_isolated` pass when a worker says so, and never before.

    Returns a file. A worker that is about to hang adds a byte to it, and the clock of the limits then jumps by an hour. For one worker at
    a time: with two, the other one's item would be late too.
    """
    path = folder / "hanging"
    path.touch()
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: 3600.0 * path.stat().st_size))
    return path
