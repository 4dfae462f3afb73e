"""Goal pictures: which environments have them, and the poses in which dm_control's planar tasks are solved.

A goal picture shows the episode's task solved: an arm at its target, a pendulum that stands. Tasks of locomotion have none. Physics and
targets are those of ``dmc:``, so its variants have goal pictures for the same tasks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from localmotion.envs import is_own
from localmotion.errors import ConfigError

UPRIGHT = (
    "acrobot_swingup", "acrobot_swingup_sparse", "cartpole_balance", "cartpole_balance_sparse", "cartpole_swingup",
    "cartpole_swingup_sparse", "cartpole_two_poles", "cartpole_three_poles", "hopper_stand", "pendulum_swingup", "walker_stand",
)  # fmt: skip
"""Tasks that are solved where the body stands with straight joints."""
TARGETS = ("finger_turn_easy", "finger_turn_hard", "reacher_easy", "reacher_hard", "swimmer_swimmer6", "swimmer_swimmer15")
"""Tasks with a target that a part of the body has to reach."""


@lru_cache(maxsize=1)
def solved_tasks() -> frozenset[str]:
    """Names of dm_control's tasks, and of those of generated trees, that `solve` can solve."""
    from localmotion.envs.planar_trees import SEALED_TASKS, TASKS

    return frozenset([*UPRIGHT, *TARGETS, *(task for task in (*TASKS, *SEALED_TASKS) if task.endswith("_reach"))])


def list_goals(suite: str | None = None) -> list[str]:
    """Full names of all environments with goal pictures, or of one suite's. Raises ConfigError for an unknown suite."""
    from localmotion.envs import list_envs

    return [name for name in list_envs(suite) if _has(name)]


def check_goals(name: str) -> None:
    """Raise ConfigError for an environment without goal pictures. Builds nothing, so one of the user's own is refused when it is made."""
    if not is_own(name) and not _has(name):
        raise no_goals(name)


def no_goals(name: str) -> ConfigError:
    """The error for an environment without goal pictures. It names those that have them."""
    by_suite: dict[str, list[str]] = {}
    for full in list_goals():
        suite, _, task = full.partition(":")
        by_suite.setdefault(suite, []).append("tree-NNNN_reach" if task.startswith("tree-") else task)
    tasks: dict[str, list[str]] = {}  # suites with equal tasks share a line
    for suite, found in by_suite.items():
        tasks.setdefault(", ".join(dict.fromkeys(found)), []).append(f"{suite}:")
    able = "; ".join(f"{' '.join(suites)} {found if len(found) < 500 else 'all tasks'}" for found, suites in tasks.items())
    return ConfigError(f"{name}: has no goal pictures; these environments have them: {able}")


def _has(name: str) -> bool:
    suite, _, task = name.partition(":")
    if suite in ("metaworld", "dmw"):
        return True
    if suite == "toy":
        return task != "pairs"
    return task in solved_tasks()


def solve(task: str, physics: Any, definition: Any) -> None:
    """Move the body of a dm_control physics to a pose in which its ``task`` is solved, at rest. ``definition``: dm_control's task object.

    The body stays where it is along the floor; joints that do not matter keep their positions.
    """
    data = physics.data
    data.qvel[:] = 0
    if task.endswith("_reach"):
        data.qpos[:] = definition.solution
    elif task.startswith("reacher"):
        data.qpos[:] = _two_links(*physics.named.model.geom_pos["target", :2], bend=float(data.qpos[1]))
    elif task.startswith("swimmer"):
        named = physics.named.data
        data.qpos[:2] += (named.geom_xpos["target"] - named.geom_xpos["nose"])[:2]  # its first joints slide along x and y
    elif task.startswith("finger"):
        _turn(physics)
    else:
        _stand(physics)
    physics.forward()


def _stand(physics: Any) -> None:
    """All joints as near to zero as their ranges let them, except the place along the floor; a body that is free stands on the floor."""
    from localmotion.envs.planar_tree_tasks import lowest

    data, model = physics.data, physics.model
    for joint in range(model.nq):
        if model.id2name(joint, "joint") != "rootx":
            data.qpos[joint] = np.clip(0, *model.jnt_range[joint]) if model.jnt_limited[joint] else 0
    physics.forward()
    if "rootz" in physics.named.data.qpos.axes.row.names:
        physics.named.data.qpos["rootz"] -= lowest(physics)


ARM = (0.12, 0.12)
"""Metres from shoulder to wrist and from wrist to finger of dm_control's reacher."""


def _two_links(x: float, y: float, *, bend: float) -> tuple[float, float]:
    """Angles of shoulder and wrist that bring the finger to (x, y). The wrist bends to the side of ``bend``."""
    first, second = ARM
    cosine = (x * x + y * y - first**2 - second**2) / (2 * first * second)
    wrist = float(np.copysign(np.arccos(np.clip(cosine, -1, 1)), bend))
    return float(np.arctan2(y, x) - np.arctan2(second * np.sin(wrist), first + second * np.cos(wrist))), wrist


def _turn(physics: Any) -> None:
    """Turn the spinner of dm_control's finger to its target, and the finger out of its way if it is there."""
    named, data = physics.named.data, physics.data
    way = named.site_xpos["target"] - named.xpos["spinner"]
    named.qpos["hinge"] = -np.arctan2(way[0], way[2])
    low, high = physics.named.model.jnt_range["proximal"]
    for proximal in (named.qpos["proximal"].item(), *np.linspace(high, low, 23)):
        named.qpos["proximal"] = proximal
        physics.forward()
        if data.ncon == 0:
            return
