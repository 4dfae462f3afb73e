"""Films of an agent that plans: what it saw, its goal, the plans that it compared, the one that it took. And plans beside what followed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.acting.episodes import Planned, Rollout
from localmotion.acting.policy import Plan
from localmotion.video.write import write_video

Picture = NDArray[np.uint8]
SIDE, GAP, LINE = 192, 8, 20
"""Pixels of a film: side of the large pictures, space around pictures, height of a line of text."""
GROUND, INK, CHOSEN = (24, 26, 31), (225, 228, 234), (255, 176, 0)
MOST = 16
"""Largest number of candidates in a film."""
STRIP = 6
"""Largest number of frames of a plan in a film."""
KEPT, AHEAD = 4, 8
"""Plans that are kept for the report, and largest number of frames of each."""


def save_film(rollout: Rollout, path: Path) -> None:
    """Write `film` as an mp4 at the speed of real time, if the evaluation kept pictures."""
    if rollout.frames is not None:
        write_video(path, film(rollout), fps=rollout.frame_rate)


def film(rollout: Rollout) -> Iterable[Picture]:
    """Frames of the film of an evaluation's first episode, (H, W, 3) uint8 each: its pictures, with the plans if there are any."""
    if rollout.frames is None:
        return []
    return rollout.frames if rollout.plans is None else _panels(rollout.frames, rollout.plans)


def _panels(frames: Picture, planned: Planned) -> Iterator[Picture]:
    for t, frame in enumerate(frames):
        plan = planned.plans[min(t, len(planned.plans) - 1)]  # nothing is planned after the last action
        yield panel(frame, planned.goal, plan)


def panel(frame: Picture, goal: Picture | None, plan: Plan) -> Picture:
    """One frame of a film, (H, W, 3): observation, goal and the ends of the candidates side by side, below them the plan's frames."""
    large = [("observation", _sized(frame, SIDE)), *([] if goal is None else [("goal", _sized(goal, SIDE))])]
    shown = _some(len(plan.ends), MOST, plan.chosen)
    count = f"{len(shown)} of {len(plan.ends)}" if len(shown) < len(plan.ends) else str(len(shown))
    large.append((f"{count} plans: last frames", _grid(plan.ends[shown], shown.index(plan.chosen))))
    width = GAP + len(large) * (SIDE + GAP)
    times = _some(len(plan.frames), STRIP)
    side = min(SIDE, (width - GAP) // len(times) - GAP)
    canvas = np.full((3 * GAP + 2 * LINE + SIDE + side, width, 3), GROUND, np.uint8)
    for column, (name, picture) in enumerate(large):
        _place(canvas, picture, GAP + column * (SIDE + GAP), GAP, name)
    for column, t in enumerate(times):
        name = f"plan +{t + 1}" if column == 0 else f"+{t + 1}"
        _place(canvas, _sized(plan.frames[t], side), GAP + column * (side + GAP), 2 * GAP + LINE + SIDE, name)
    return np.pad(canvas, ((0, len(canvas) % 2), (0, width % 2), (0, 0)), mode="edge")  # players need even sides


def _some(count: int, most: int, kept: int = 0) -> list[int]:
    """At most ``most`` numbers of 0 .. count - 1, evenly spaced, with the first, the last and ``kept``."""
    found = {round(x) for x in np.linspace(0, count - 1, min(count, most))}
    if kept not in found:
        found.remove(min(found - {0, count - 1}, key=lambda x: abs(x - kept)))
    return sorted(found | {kept})


def _sized(picture: Picture, side: int) -> Picture:
    how = cv2.INTER_AREA if side < len(picture) else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (side, side), interpolation=how), np.uint8)


def _grid(pictures: Picture, chosen: int) -> Picture:
    """(SIDE, SIDE, 3): small pictures in rows, the chosen one in a frame."""
    across = int(np.ceil(np.sqrt(len(pictures))))
    cell = SIDE // across
    canvas = np.full((SIDE, SIDE, 3), GROUND, np.uint8)
    for number, picture in enumerate(pictures):
        y, x = number // across * cell, number % across * cell
        canvas[y + 2 : y + cell - 2, x + 2 : x + cell - 2] = _sized(picture, cell - 4)
        if number == chosen:
            cv2.rectangle(canvas, (x, y), (x + cell - 1, y + cell - 1), CHOSEN, 2)
    return canvas


def _place(canvas: Picture, picture: Picture, x: int, y: int, name: str) -> None:
    """Draw a picture with its name above it."""
    cv2.putText(canvas, name, (x, y + LINE - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
    canvas[y + LINE : y + LINE + len(picture), x : x + picture.shape[1]] = picture


def save_plans(planned: Planned, path: Path, when: str) -> None:
    """Write some plans of an episode, with what happened after each, for the report (`report.media.plans`).

    observed (N,S,S,3): the picture at the time of the plan; plan, followed (N,n,S,S,3): the expected frames and those that followed;
    ahead (n,), steps (N,) int: agent steps from the plan, and from the begin of the episode; goal (S,S,3), if there is one; when: text.
    """
    length = min(len(planned.plans), *(len(plan.frames) for plan in planned.plans))
    steps = _some(len(planned.plans) - length + 1, KEPT)
    ahead = np.array(_some(length, AHEAD)) + 1
    arrays: dict[str, Any] = {
        "observed": planned.seen[steps],
        "plan": np.stack([planned.plans[t].frames[ahead - 1] for t in steps]),
        "followed": np.stack([planned.seen[t + ahead] for t in steps]),
        "ahead": ahead,
        "steps": np.array(steps),
        "when": np.array(when),
    }
    if planned.goal is not None:
        arrays["goal"] = planned.goal
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **arrays)
