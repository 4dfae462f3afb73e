"""Contact sheets of all environments, and of those whose looks vary: rows are tasks, columns visual seeds, levels or times. For docs/images

    python studies/environments/sheets.py [--out docs/images] [--textures FOLDER] [--videos FOLDER] [--only NAME]

Without folders everything is procedural. With --textures (floors/ and skies/) and --videos, sheets with those are drawn too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs import list_envs, make_env
from localmotion.envs.bodies import smooth_actions
from localmotion.envs.planar_trees import DEV, KINDS, TRAIN, tree
from localmotion.perception.draw import flow_colours

CELL, GAP, HEAD, SIDE = 96, 2, 16, 150
DMCR = (
    "walker_run", "hopper_stand", "cheetah_run", "reacher_easy", "finger_spin", "ball_in_cup_catch", "cartpole_swingup",
    "pendulum_swingup", "humanoid_walk", "fish_swim", "quadruped_walk", "dog_run",
)  # fmt: skip
DISTRACTING = ("walker_run", "cheetah_run", "hopper_hop", "reacher_easy", "cartpole_swingup", "ball_in_cup_catch", "finger_spin")
LEVELS = ("vanilla", "low", "easy", "medium", "hard")
MOTIONS = ("independent", "lagged", "twin", "leaky")

Row = tuple[str, list[NDArray[np.uint8]]]


def episode(name: str, times: tuple[int, ...], *, seed: int = 1, **options: Any) -> list[NDArray[np.uint8]]:
    """Pictures (96, 96, 3) at some agent steps of an episode under random actions."""
    env = make_env(name, size=CELL, quality="fast", **options)
    shape = env.action_space.shape
    assert shape is not None
    rng = np.random.default_rng(0)
    pictures = [env.reset(seed=seed)[0]["image"]]
    for _ in range(max(times)):
        pictures.append(env.step(rng.uniform(-1, 1, shape).astype(np.float32))[0]["image"])
    env.close()
    return [pictures[time] for time in times]


def dmcr(textures: str | Path) -> Iterator[Row]:
    """Eight visual seeds of one state."""
    for task in DMCR:
        env = make_env(f"dmcr:{task}", size=CELL, quality="fast", textures=textures)
        yield task, [env.reset(seed=1, options={"visual_seed": seed})[0]["image"] for seed in range(1, 9)]
        env.close()


def distracting(videos: str | Path) -> Iterator[Row]:
    """Two times of an episode for each level."""
    for task in DISTRACTING:
        cells = [episode(f"distracting:{task}", (2, 22), difficulty=level, videos=videos) for level in LEVELS]
        yield task, [picture for pair in cells for picture in pair]


def colours() -> Iterator[Row]:
    """DisWM: four times in phase 1, four in phase 2."""
    for task in ("cheetah_run", "walker_walk", "hopper_stand", "reacher_easy", "finger_spin", "cartpole_swingup"):
        yield task, [picture for phase in (1, 2) for picture in episode(f"diswm:{task}", (0, 1, 2, 3), phase=phase)]


def painted(videos: str | Path) -> Iterator[Row]:
    """MaskLAM: the four motions at three times; then Distracting Meta-World in the sky, and everything but the agent replaced."""
    times = (0, 8, 16)
    for name in ("masklam:walker_run", "masklam:reacher_easy", "dmw:reach"):
        cells = [episode(name, times, motion=motion, region="scenery", correlation=0.9, videos=videos) for motion in MOTIONS]
        yield name, [picture for three in cells for picture in three]
    for name in ("dmw:drawer-open", "dmw:peg-insert-side", "dmw:window-open"):
        sky = episode(name, (0, 4, 8, 12, 16, 20), videos=videos)
        yield name, sky + episode(name, (0, 4, 8, 12, 16, 20), motion="leaky", region="rest", videos=videos)


def masks() -> Iterator[Row]:
    """Pictures and the agent's mask, side by side."""
    for names in (
        ("dmc:walker_run", "dmc:cheetah_run", "dmc:ball_in_cup_catch", "dmc:reacher_easy"),
        ("metaworld:reach", "metaworld:drawer-open", "metaworld:hammer", "dmc:dog_run"),
    ):
        cells = []
        for name in names:
            env: Any = make_env(name, size=CELL, quality="fast")
            cells.append(env.reset(seed=1)[0]["image"])
            cells.append(np.repeat(env.agent_mask()[..., None], 3, axis=2).astype(np.uint8) * 255)
            env.close()
        yield ", ".join(name.partition(":")[2] for name in names), cells


def goals() -> Iterator[Row]:
    """Observation at the reset and goal picture, side by side."""
    for names in (
        ("metaworld:reach", "metaworld:drawer-open", "metaworld:button-press", "metaworld:pick-place"),
        ("metaworld:door-open", "metaworld:peg-insert-side", "metaworld:window-close", "metaworld:hammer"),
        ("planar:reacher_easy", "planar:finger_turn_easy", "planar:pendulum_swingup", "planar:cartpole_two_poles"),
        ("planar:walker_stand", "planar:tree-0000_reach", "planar:tree-0004_reach", "planar:tree-0011_reach"),
        ("dmc:acrobot_swingup", "dmc:reacher_hard", "dmc:hopper_stand", "dmc:swimmer_swimmer6"),
        ("toy:dot", "toy:block", "toy:moving_background", "dmw:drawer-open"),
    ):
        cells = []
        for name in names:
            env = make_env(name, size=CELL, quality="fast", goal=True)
            seen = env.reset(seed=1)[0]
            cells += [seen["image"], seen["goal"]]
            env.close()
        yield ", ".join(names), cells


def planar() -> Iterator[Row]:
    """Four times of an episode; then, at the last one, each pixel's part, the flow of the last step, the agent's mask,
    the textured look and a moving background."""
    for task in (
        "walker_run", "cheetah_run", "hopper_hop", "swimmer_swimmer6", "reacher_easy", "finger_turn_easy", "acrobot_swingup",
        "pendulum_swingup", "cartpole_swingup", "cartpole_three_poles",
    ):  # fmt: skip
        env: Any = make_env(f"planar:{task}", size=CELL, action_repeat=4)
        shape = env.action_space.shape
        assert shape is not None
        rng = np.random.default_rng(0)
        cells = [env.reset(seed=1)[0]["image"]]
        for time in range(1, 13):
            picture = env.step(rng.uniform(-1, 1, shape).astype(np.float32))[0]["image"]
            if time % 4 == 0:
                cells.append(picture)
        names = np.append(-1, env.painter.numbers)
        shades = np.full((names.max() + 2, 3), 255, np.uint8)
        levels = np.linspace(40, 255, len(names)).astype(np.uint8)[:, None]
        shades[names] = cv2.applyColorMap(levels, cv2.COLORMAP_TURBO).reshape(-1, 3)[:, ::-1]
        shades[-1] = 255
        flow = env.exact_flow()
        cells += [shades[env.part_ids()], flow_colours(flow, max(1.0, float(np.abs(flow).max())))]
        cells.append(np.repeat(env.agent_mask()[..., None], 3, axis=2).astype(np.uint8) * 255)
        cells += episode(f"planar:{task}", (12,), action_repeat=4, look="textured")
        yield task, cells + episode(f"planar:{task}", (12,), action_repeat=4, background="lagged")


def planar_trees() -> Iterator[Row]:
    """Generated bodies, except the sealed ones: three times of an episode and the flow of its last step, running and reaching."""
    for number in (*TRAIN, *DEV):
        cells = []
        for kind in KINDS:
            env: Any = make_env(f"planar:tree-{number:04d}_{kind}", size=CELL)
            actions = smooth_actions(np.random.default_rng(number), 31, env.action_space.shape[0], 2).astype(np.float32)
            pictures = [env.reset(seed=1)[0]["image"], *(env.step(action)[0]["image"] for action in actions)]
            flow = env.exact_flow()
            cells += [pictures[0], pictures[15], pictures[30], flow_colours(flow, max(1.0, float(np.abs(flow).max())))]
        yield f"tree-{number:04d}, {len(tree(number).links)} links", cells


def every(suite: str) -> NDArray[np.uint8]:
    """Every task of a suite after ten random steps, its name below."""
    cells = []
    for name in list_envs(suite):
        picture = episode(name, (1 if name == "toy:pairs" else 10,))[0]
        caption = np.full((HEAD, CELL, 3), 255, np.uint8)
        text = name.partition(":")[2].replace("moving_background", "background")
        (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.32, 1)
        cv2.putText(
            caption, text, (1, 10), cv2.FONT_HERSHEY_SIMPLEX, 0.32 * min(1.0, (CELL - 2) / width), (0, 0, 0), 1, cv2.LINE_AA
        )
        cells.append(np.pad(np.vstack([picture, caption]), ((0, GAP), (0, GAP), (0, 0)), constant_values=255))
    blank = np.full_like(cells[0], 255)
    cells += [blank] * (-len(cells) % 10)
    return np.vstack([np.hstack(cells[i : i + 10]) for i in range(0, len(cells), 10)])


def sheet(rows: Iterator[Row], heads: list[str]) -> NDArray[np.uint8]:
    """Rows with their names to the left and the columns' names above."""
    lines = []
    for label, cells in rows:
        space = np.full((CELL + GAP, GAP, 3), 255, np.uint8)
        line = [_label(label, SIDE, CELL + GAP)]
        for cell in cells:
            line += [np.vstack([cell, np.full((GAP, CELL, 3), 255, np.uint8)]), space]
        lines.append(np.hstack(line))
    width = max(line.shape[1] for line in lines)
    top = np.full((HEAD, width, 3), 255, np.uint8)
    for number, text in enumerate(heads):
        place = SIDE + number * (width - SIDE) // max(len(heads), 1)
        cv2.putText(top, text, (place + 2, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([top, *lines])


def _label(text: str, width: int, height: int) -> NDArray[np.uint8]:
    box = np.full((height, width, 3), 255, np.uint8)
    for number, part in enumerate(text.split(", ")):
        cv2.putText(box, part, (2, 20 + 20 * number), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return box


def main() -> None:
    """Draw all sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--textures", type=Path)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--only", help="draw only sheets whose name has this in it")
    args = parser.parse_args()
    seeds = [f"seed {seed}" for seed in range(1, 9)]
    jobs: dict[str, tuple[Any, list[str]]] = {
        "dmcr_procedural": (lambda: dmcr("procedural"), seeds),
        "distracting_procedural": (lambda: distracting("procedural"), list(LEVELS)),
        "diswm": (colours, ["phase 1", "phase 2"]),
        "painted_procedural": (lambda: painted("procedural"), list(MOTIONS)),
        "masks": (masks, []),
        "goals": (goals, ["reset", "goal"] * 4),
        "planar": (planar, ["start", "4 steps", "8", "12", "parts", "flow", "agent", "textured", "background"]),
        "planar_trees": (planar_trees, ["run", "15 steps", "30", "flow", "reach", "15 steps", "30", "flow"]),
    }
    if args.textures:
        jobs["dmcr_originals"] = (lambda: dmcr(args.textures), seeds)
    if args.videos:
        jobs["distracting_videos"] = (lambda: distracting(args.videos), list(LEVELS))
        jobs["painted_videos"] = (lambda: painted(args.videos), list(MOTIONS))
    args.out.mkdir(parents=True, exist_ok=True)
    draw = {name: lambda rows=rows, heads=heads: sheet(rows(), heads) for name, (rows, heads) in jobs.items()}
    draw |= {f"every_{suite}": lambda suite=suite: every(suite) for suite in ("dmc", "metaworld", "toy")}
    for name, drawn in draw.items():
        if args.only and args.only not in name:
            continue
        path = args.out / f"{name}.jpg"
        cv2.imwrite(str(path), drawn()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
        print(f"{path} {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
