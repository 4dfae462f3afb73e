"""Exact motion of an environment in place of perceived motion: the backends `exact` of flow, foreground, tracks and masks.

They read the simulator's state and not the pictures, so there is exact motion for environments only, and no look-ahead. A method that
learns from both kinds shows what perception costs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.truth import Anchors, motion_truth
from localmotion.errors import ConfigError
from localmotion.perception.base import Frame, Points


class Exact:
    """Flow, foreground and tracks between an environment's current picture and earlier ones.

    Call `begin` after each reset and `advance` after each step of the environment. The arguments of the backends' functions are pictures,
    which are not used.

    Args:
        env: a localmotion environment, see `localmotion.envs.truth.motion_truth`.
        size: side of the pictures, pixels.
        span: steps over which flow goes.

    Raises:
        ConfigError: there is no environment.
        EnvError: the environment does not know its motion.
    """

    name: ClassVar[str] = "exact"
    licence: ClassVar[str] = "MIT"
    uses_motion: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def __init__(self, env: Any = None, size: int = 0, span: int = 1) -> None:
        if env is None:
            raise ConfigError(
                "exact motion comes from a simulator's state, and these pictures have none; use other backends"
                " (flow=dis, segment=saliency, track=lk), or record an environment with localmotion collect --store"
            )
        self.truth, self.size = motion_truth(env), size
        self.states: deque[Any] = deque(maxlen=span + 1)
        self.points: Points = np.zeros((0, 2), np.float32)  # where `step` put its points last
        self.anchors: Anchors  # and what they are fixed to

    def begin(self) -> None:
        """The environment shows the first picture of an episode."""
        self.states.clear()
        self.points = np.zeros((0, 2), np.float32)
        self.advance()

    def advance(self) -> None:
        """The environment shows the next picture."""
        self.states.append(self.truth.snapshot(self.size))

    def flow(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(1, S, S, 2) motion over the last ``span`` steps, or since the first picture; zero where it is unknown."""
        return self.truth.motion(self.states[0], self.states[-1])[None]

    def weight(
        self, frames: NDArray[np.uint8], flows: NDArray[np.float32] | Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """(S, S) 1 where the current picture shows something that can move by itself, also if it does not move now."""
        return self.truth.foreground(self.states[-1]).astype(np.float32)

    def step(self, previous: Frame, current: Frame, points: Points) -> tuple[Points, NDArray[np.bool_]]:
        """Move (N, 2) points of the previous picture with the parts that they are on. (N,) is whether they are still visible.

        A point that comes back where it was put last stays on its part. Another one belongs to the part that its pixel shows.
        """
        before, now = self.states[-2], self.states[-1]
        anchors = self.truth.anchor(before, points)
        if len(points) == len(self.points):
            same = (points == self.points).all(1)
            anchors = Anchors(
                np.where(same, self.anchors.ident, anchors.ident), np.where(same[:, None], self.anchors.local, anchors.local)
            )
        places, depth = self.truth.locate(now, anchors)
        found = self.truth.seen(now, anchors, places, depth)
        self.points, self.anchors = np.where(found[:, None], places, points).astype(np.float32), anchors
        return self.points.copy(), found

    def track(self, frames: NDArray[np.uint8], points: Points, start: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Not possible: only the current picture's state is known. Raises ConfigError; a recipe with ``redraw_rounds=0`` does not ask."""
        raise ConfigError("exact tracks have no look-ahead; set redraw_rounds=0")


class ExactMask:
    """The agent's masks from the simulator, at the size at which they are stored.

    Call `begin` after each reset and `advance` after each step of the environment, as with `Exact`. A mask is the environment's
    ``agent_mask``. Environments without one give the pixels of everything that can move by itself.

    Raises:
        ConfigError: there is no environment.
        EnvError: the environment knows neither.
    """

    name: ClassVar[str] = "exact"
    licence: ClassVar[str] = "MIT"

    def __init__(self, env: Any = None, size: int = 0) -> None:
        if env is None:
            raise ConfigError(
                "exact masks come from a simulator's state, and these pictures have none; use --mask motion, or record an environment with"
                " localmotion collect --store"
            )
        self.env, self.size = env, size
        self.truth = None if hasattr(env, "agent_mask") else motion_truth(env)
        self.shown: list[NDArray[np.bool_]] = []

    def begin(self) -> None:
        """The environment shows the first picture of an episode."""
        self.shown = []
        self.advance()

    def advance(self) -> None:
        """The environment shows the next picture."""
        if self.truth is None:
            self.shown.append(np.array(self.env.agent_mask(self.size), np.bool_))
        else:
            self.shown.append(self.truth.foreground(self.truth.snapshot(self.size)))

    def masks(
        self, frames: NDArray[np.uint8], flows: NDArray[np.float32], cuts: NDArray[np.bool_], size: int
    ) -> NDArray[np.bool_]:
        """(T, S, S) masks of the T pictures since `begin`. The arguments are not used."""
        return np.stack(self.shown)
