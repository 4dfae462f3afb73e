"""Record a LeRobot data set, version 3.0, of an operator who plays with the robot (docs/robot_logs.md).

    python record.py OUT [--episodes 60] [--seed 0]

The operator moves the block from one random place to the next and does not know the task. The reward is logged beside.
Needs `pip install 'localmotion[lerobot]'`. The layout is that of the package lerobot, which reads the data set, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from robot import FPS, MAX_SPEED, STEPS, Robot

from localmotion.video import write_video

CAMERA, TASK = "observation.images.top", "move the block to the middle"
NUMBERS = {"action": ["vx", "vy"], "observation.state": ["x", "y"], "next.reward": None, "next.done": None}


def operate(robot: Robot, rng: np.random.Generator, seed: int) -> list[dict[str, np.ndarray]]:
    """The rows of an episode. Row t has the frame t, the command given at t, and its reward; the last picture has no row."""
    picture, rows, target = robot.start(seed), [], rng.uniform(0, 500, 2)
    for step in range(STEPS):
        if np.abs(target - robot.position).max() < 25:
            target = rng.uniform(0, 500, 2)
        command = np.clip((target - robot.position) * FPS, -MAX_SPEED, MAX_SPEED) + rng.normal(0, 100, 2)
        row = {CAMERA: picture, "action": np.clip(command, -MAX_SPEED, MAX_SPEED), "observation.state": robot.position}
        picture, reward = robot.send(row["action"])
        rows.append(row | {"next.reward": np.array([reward]), "next.done": np.array([step == STEPS - 1])})
    return rows


def write(out: Path, episodes: list[list[dict[str, np.ndarray]]]) -> None:
    """Write `meta/`, `data/` and `videos/` of a data set in one chunk of one file."""
    rows = [row for episode in episodes for row in episode]
    lengths = [len(episode) for episode in episodes]
    starts = np.cumsum([0, *lengths]).tolist()
    write_video(out / f"videos/{CAMERA}/chunk-000/file-000.mp4", (row[CAMERA] for row in rows), FPS)

    found = {name: np.stack([row[name] for row in rows]) for name in NUMBERS}
    frame = np.concatenate([np.arange(length) for length in lengths])
    pairs = {name: pa.array(found[name].ravel(), pa.float32()) for name in ("action", "observation.state")}
    table = {name: pa.FixedSizeListArray.from_arrays(values, 2) for name, values in pairs.items()}
    table |= {"next.reward": pa.array(found["next.reward"][:, 0], pa.float32()), "next.done": pa.array(found["next.done"][:, 0])}
    table |= {"timestamp": pa.array(frame / FPS, pa.float32()), "frame_index": pa.array(frame, pa.int64())}
    table["episode_index"] = pa.array(np.repeat(np.arange(len(lengths)), lengths), pa.int64())
    table |= {"index": pa.array(np.arange(len(rows)), pa.int64()), "task_index": pa.array(np.zeros(len(rows)), pa.int64())}
    listed = [
        {"episode_index": number, "tasks": [TASK], "length": length, "dataset_from_index": starts[number]}
        | {"dataset_to_index": starts[number + 1], "data/chunk_index": 0, "data/file_index": 0}
        | {f"videos/{CAMERA}/{key}_index": 0 for key in ("chunk", "file")}
        | {f"videos/{CAMERA}/{side}_timestamp": starts[number + end] / FPS for end, side in enumerate(("from", "to"))}
        | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for number, length in enumerate(lengths)
    ]
    tasks = pa.table({"task_index": [0], "task": [TASK]})
    column = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    index = {"index_columns": ["task"], "columns": [column], "column_indexes": []}  # lerobot reads the texts as pandas' index
    for path, content in (
        ("data/chunk-000/file-000.parquet", pa.table(table)),
        ("meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(listed)),
        ("meta/tasks.parquet", tasks.replace_schema_metadata({"pandas": json.dumps(index)})),
    ):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content, out / path)

    picture = {"dtype": "video", "shape": list(rows[0][CAMERA].shape), "names": ["height", "width", "channel"]}
    features = {CAMERA: picture | {"info": {"video.fps": FPS, "video.channels": 3, "has_audio": False}}}
    for name, names in NUMBERS.items():
        kind = "bool" if name == "next.done" else "float32"
        features[name] = {"dtype": kind, "shape": [found[name].shape[1]], "names": names}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "toy_block",
        "total_episodes": len(lengths),
        "total_frames": len(rows),
        "total_tasks": 1,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }
    numbers = {name: np.asarray(values, np.float64) for name, values in found.items()}
    stats = {
        name: {key: getattr(values, key)(0).tolist() for key in ("min", "max", "mean", "std")} | {"count": [len(values)]}
        for name, values in numbers.items()
    }
    (out / "meta/info.json").write_text(json.dumps(info, indent=1))
    (out / "meta/stats.json").write_text(json.dumps(stats, indent=1))


def main() -> None:
    """Record, and print the return of the operator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists; give a new folder")
    rng, robot = np.random.default_rng(args.seed), Robot()
    episodes = [operate(robot, rng, int(rng.integers(1 << 31))) for _ in range(args.episodes)]
    write(args.out, episodes)
    returns = [sum(row["next.reward"].item() for row in episode) for episode in episodes]
    print(
        f"{args.out}: {len(episodes)} episodes of {STEPS} frames, {STEPS / FPS:g} s each; return of the operator "
        f"{np.mean(returns):.1f} +- {np.std(returns):.1f}"
    )


if __name__ == "__main__":
    main()
