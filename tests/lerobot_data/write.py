"""Writes the data sets of this folder with the lerobot package itself; README.md says with which versions.

    python write.py FOLDER [images]

Every picture shows what it is: `picture` draws it, and tests/lerobot_files.py reads it back.
"""

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION, LeRobotDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from lerobot_files import ACTION, CAMERAS, FPS, HEIGHT, LENGTHS, STATE, TASKS, WIDTH, picture, row

root, images = Path(sys.argv[1]), sys.argv[2:] == ["images"]
cameras, lengths = (CAMERAS[:1], LENGTHS[:2]) if images else (CAMERAS, LENGTHS)
shape = (HEIGHT, WIDTH, 3)
features = {
    key: {"dtype": "image" if images else "video", "shape": shape, "names": ["height", "width", "channel"]} for key in cameras
} | {
    "action": {"dtype": "float32", "shape": (len(ACTION),), "names": list(ACTION)},
    "observation.state": {"dtype": "float32", "shape": (len(STATE),), "names": list(STATE)},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
}
data = LeRobotDataset.create("localmotion/written", FPS, features, root=root, use_videos=not images)
for episode, length in enumerate(lengths):
    for frame in range(length):
        values = {name: np.asarray(value) for name, value in row(episode, frame).items()}
        values |= {key: picture(episode, frame, camera) for camera, key in enumerate(cameras)}
        task = TASKS[episode % 2]
        if CODEBASE_VERSION == "v2.1":
            data.add_frame(values, task)
        else:
            data.add_frame({**values, "task": task})
    data.save_episode()
if hasattr(data, "finalize"):
    data.finalize()
print(CODEBASE_VERSION, data.meta.total_episodes, "episodes", data.meta.total_frames, "frames")
