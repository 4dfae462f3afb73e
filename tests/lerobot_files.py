"""What the data sets of tests/lerobot_data hold: the script that wrote them and the tests use the same functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parent / "lerobot_data"
FPS, WIDTH, HEIGHT = 10, 96, 64
LENGTHS = (12, 17, 9)
CAMERAS = ("observation.images.top", "observation.images.side")
TASKS = ("push the block", "lift the block")
ACTION, STATE = ("shoulder", "elbow", "gripper"), ("shoulder", "elbow")
BITS = 6


def picture(episode: int, frame: int, camera: int) -> NDArray[np.uint8]:
    """(H, W, 3): the upper half has the colour of the episode, dark for camera 1; below are the bits of the frame's number."""
    shown = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    shown[: HEIGHT // 2, :, episode] = 240 if camera == 0 else 120
    for bit in range(BITS):
        if frame >> bit & 1:
            shown[HEIGHT // 2 :, bit * WIDTH // BITS : (bit + 1) * WIDTH // BITS] = 255
    return shown


def read_picture(shown: NDArray[np.uint8]) -> tuple[int, int, int]:
    """(episode, frame, camera) of a picture of any size."""
    height, width = shown.shape[:2]
    colour = shown[height // 8 : 3 * height // 8].mean((0, 1))
    cells = shown[5 * height // 8 : 7 * height // 8].mean((0, 2))
    bits = [cells[(2 * bit + 1) * width // (2 * BITS)] > 128 for bit in range(BITS)]
    return int(colour.argmax()), sum(1 << bit for bit, on in enumerate(bits) if on), int(colour.max() < 180)


def row(episode: int, frame: int) -> dict[str, Any]:
    """What the table holds of a frame. The gripper never moves."""
    last = frame == LENGTHS[episode] - 1
    return {
        "action": np.array([frame - 4, 100 * episode + frame, 7], np.float32),
        "observation.state": np.array([frame, -episode], np.float32),
        "next.reward": np.array([0.25 * frame + 10 * last], np.float32),
        "next.done": np.array([last]),
    }
