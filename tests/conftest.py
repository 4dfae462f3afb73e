"""What all tests share: one thread, examples of property tests, CPU seconds of each test, small data made by the product itself."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

# Before torch is loaded, here and in every process that a test starts: several threads on shared cores wait for each other.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import cv2
import numpy as np
import pytest
import torch
from hypothesis import settings

import property_examples
from localmotion.perception.extract import extract_folder
from localmotion.recipe import Recipe
from localmotion.video.write import write_video

torch.set_num_threads(1)
cv2.setNumThreads(1)

settings.load_profile(property_examples.QUICK)


# ----------------------------------------------------------------------------------------- the longest files begin first

LONGEST = ("test_learning_toy.py", "test_study.py", "test_methods.py", "test_kills.py", "test_runs.py", "test_predict.py")
"""A file runs on one worker. A long one that begins last leaves the other worker idle."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))  # stable: the rest keeps its order


# ----------------------------------------------------------------------------------------- CPU seconds of every test

SLOWEST = 15  # tests, and files, named at the end of a run
_marks: list[float] = []
_tests: defaultdict[str, float] = defaultdict(float)
_workers: list[float] = []


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    _marks[:] = [cpu_seconds()]
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Each report, of a test's setup, call and teardown, carries the seconds since the report before."""
    report = yield
    _marks.append(cpu_seconds())
    report.cpu_seconds = _marks[-1] - _marks[-2]
    return report


def pytest_runtest_logreport(report: Any) -> None:
    _tests[report.nodeid] += getattr(report, "cpu_seconds", 0.0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist tells the process that started it
        session.config.workeroutput["cpu_seconds"] = cpu_seconds()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _workers.append(getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    slowest = sorted(_tests.items(), key=lambda item: -item[1])[:SLOWEST]
    whole = sum(os.times()[:2]) + sum(_workers) if _workers else cpu_seconds()
    terminalreporter.section(f"{len(slowest)} slowest of {len(_tests)} tests, CPU seconds; all, with imports: {whole:.0f}")
    for name, seconds in slowest:
        terminalreporter.write_line(f"{seconds:7.2f}  {name}")
    files: defaultdict[str, float] = defaultdict(float)
    for name, seconds in _tests.items():
        files[name.partition("::")[0]] += seconds
    terminalreporter.section(f"{min(SLOWEST, len(files))} slowest of {len(files)} files")
    for name, seconds in sorted(files.items(), key=lambda item: -item[1])[:SLOWEST]:
        terminalreporter.write_line(f"{seconds:7.2f}  {name}")


# --------------------------------------------------------------------------------------------------------------- data


def moving_squares(seed: int, frames: int = 30, side: int = 96) -> np.ndarray:
    """A textured square on a textured ground, moving on a seeded smooth path: (T, side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    ground = cv2.GaussianBlur(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), (0, 0), 3)
    patch = cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (28, 28), interpolation=cv2.INTER_NEAREST)
    phase, speed = rng.uniform(0, 6, 2), rng.uniform(0.1, 0.3, 2)
    out = []
    for t in range(frames):
        x, y = (side / 2 - 14 + 28 * np.sin(phase + speed * t)).round().astype(int)
        frame = ground.copy()
        frame[y : y + 28, x : x + 28] = patch
        out.append(frame)
    return np.stack(out)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight short videos."""
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(8):
        write_video(folder / f"clip{seed}.mp4", moving_squares(seed), fps=12)
    return folder


@pytest.fixture(scope="session")
def store(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their clip store at 64 px."""
    path = tmp_path_factory.mktemp("store") / "store"
    extract_folder(videos, path, Recipe(percept_size=64, redraw_rounds=1, tracks=8))
    return path
