"""Shared small data: made once, by the product itself."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from localmotion.perception.base import Recipe
from localmotion.perception.extract import extract_folder
from localmotion.video.write import write_video

torch.set_num_threads(1)
cv2.setNumThreads(1)


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
