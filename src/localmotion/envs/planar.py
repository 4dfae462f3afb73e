"""dm_control's planar bodies with our own drawing: its physics and rewards bit for bit, exact motion with every picture, no OpenGL.

``planar:walker_run`` with a seed and actions has the states, rewards and vector observations of ``dmc:walker_run``. Pictures differ: they
show the body in its plane, without perspective (`localmotion.envs.planar_drawing`).

Every picture has exact motion: `PlanarEnv.exact_flow`, `PlanarEnv.part_ids`, `PlanarEnv.agent_mask`, and point tracks by
`localmotion.envs.truth.motion_truth`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs import control
from localmotion.envs import planar_trees as trees
from localmotion.envs.backgrounds import SPLITS
from localmotion.envs.base import Observation
from localmotion.envs.control import ControlEnv
from localmotion.envs.links import Links
from localmotion.envs.masks import moving_parts
from localmotion.envs.planar_backgrounds import MOTIONS, Motion, MovingBackground
from localmotion.envs.planar_drawing import LOOKS, Look, Painter, Pose, View
from localmotion.errors import ConfigError, EnvError, unknown_name

VIEWS: dict[str, View] = {
    "acrobot": View(half=2.485, middle=2.0, tile=0.5),
    "cartpole": View(half=1.657, middle=1.0, tile=0.4),
    "cheetah": View(half=1.243, middle=0.6, follows=True),
    "finger": View(half=0.45, middle=0.39, tile=0.1),
    "hopper": View(half=1.16, middle=0.84, follows=True),
    "pendulum": View(half=0.62, middle=0.54, tile=0.15),
    "reacher": View(above=True, half=0.311, tile=0.08),
    "swimmer": View(above=True, half=0.45, follows=True, tile=0.12),
    "walker": View(half=1.1, middle=0.9, follows=True),
}
"""Windows of the domains. Those of acrobot, cartpole, cheetah, hopper and reacher are what dm_control's first camera sees in the body's
plane; its cameras on the other bodies look at them aslant."""
TASK_VIEWS = {
    "cartpole_two_poles": replace(VIEWS["cartpole"], half=2.2),
    "cartpole_three_poles": replace(VIEWS["cartpole"], half=3.1),
    "swimmer_swimmer15": replace(VIEWS["swimmer"], half=0.9, tile=0.25),
}
"""Windows of tasks with larger bodies."""
TASKS = tuple(task for task, (domain, _) in control.TASKS.items() if domain in VIEWS)


class PlanarEnv(ControlEnv):
    """A task of dm_control whose body moves in a plane, drawn flat; physics and rewards are those of ``dmc:``, bit for bit. Or a generated
    body (`localmotion.envs.planar_trees`).

    Args:
        task: a name of `TASKS` or `trees.TASKS`, e.g. "walker_run" or "tree-0003_run".
        quality: any of the rendering qualities, for the common interface; there is only one.
        camera: must be None.
        look: "flat": parts of one colour; "textured": with bands across them, so that motion is visible inside them, too.
        background: "none": sky and floor. Else a texture covers both and is shifted as in ``masklam:``: "independent" of the actions, by
            the action of 3 env steps ago ("lagged"), by those of another episode ("twin"), or by the present one ("leaky"). Physics,
            rewards, `agent_mask` and the parts stay the same. Its motion is part of `exact_flow`.
        split: of the background's textures: "train" (numbers 0 to 59), "val" (60 to 89, held out) or "all".
        sealed: True for the bodies that are kept for the pre-registered test, and only for them.

    Raises:
        ConfigError: an unknown task, quality, look, background or split, a camera, a sealed body without ``sealed=True``, or a setting
            out of range.
    """

    suite_name: ClassVar[str] = "planar"

    def __init__(
        self,
        task: str,
        *,
        seed: int = 0,
        size: int = 64,
        percept_size: int | None = None,
        action_repeat: int | None = None,
        time_limit: int | None = None,
        quality: str = "auto",
        camera: str | int | None = None,
        look: Look = "flat",
        background: Motion = "none",
        split: str = "train",
        sealed: bool = False,
    ) -> None:
        tree = trees.parse(task)
        if task not in TASKS and tree is None:
            raise unknown_name("planar task", task, [*TASKS, *trees.TASKS])
        trees.check_seal(task, sealed)
        self._tree = tree
        if camera is not None:
            raise ConfigError(f"camera={camera!r}: planar environments have no cameras; leave it out")
        from localmotion.envs.render import QUALITIES

        if quality not in QUALITIES:
            raise unknown_name("rendering quality", quality, QUALITIES)
        if look not in LOOKS:
            raise unknown_name("look of planar bodies", look, LOOKS)
        if background not in MOTIONS:
            raise unknown_name("background of planar bodies", background, MOTIONS)
        if split not in SPLITS:
            raise unknown_name("split of the background's textures", split, SPLITS)
        self.look, self.background = look, background
        super().__init__(
            task, seed=seed, size=size, percept_size=percept_size, action_repeat=action_repeat, time_limit=time_limit
        )
        self.view = trees.tree(tree[0]).view(tree[1]) if tree else TASK_VIEWS.get(task, VIEWS[control.TASKS[task][0]])
        self._kinds = moving_parts(self.physics.model.ptr)
        self._moving: MovingBackground | None = None
        if background != "none":
            self._moving = MovingBackground(background, self.draw_size, self.action_space.shape[0], split)  # type: ignore[index]
        self._painter: Painter
        self._shown: Pose | None = None  # of the last picture or the last question
        self._before: Pose | None = None  # of the picture before the last step

    @staticmethod
    def check_task(task: str, options: Mapping[str, Any]) -> None:
        """Raise ConfigError for a sealed body without the option ``sealed=True``. Builds nothing."""
        trees.check_seal(task, options.get("sealed", False))

    def _load(self, task: str) -> Any:
        if tree := trees.parse(task):
            from localmotion.envs.planar_tree_tasks import load

            return load(*tree)
        return super()._load(task)

    def _begin(self, episode_seed: int) -> None:
        super()._begin(episode_seed)
        if self._moving is not None:
            self._moving.begin(episode_seed)
        # Some tasks change sizes and colours when an episode begins.
        model, data = self.physics.model.ptr, self.physics.data.ptr
        self._painter = Painter(model, data, self.view, self._kinds, look=self.look, background=self._moving)
        self._shown = None

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        result = super()._control(action)
        if self._moving is not None:
            self._moving.advance(action)
        return result

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """As `PixelEnv.reset`."""
        result = super().reset(seed=seed, options=options)
        self._before = self._pose()
        return result

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """As `PixelEnv.step`; also keeps the previous pose, for ``exact_flow``."""
        if self._begun:
            self._before, self._shown = self._shown or self._pose(), None
        return super().step(action)

    def _draw(self, size: int) -> NDArray[np.uint8]:
        return self._painter.picture(self._pose(), size)

    def _pose(self) -> Pose:
        """The current pose; the same object as long as the physics has not moved, so that its codes are drawn once."""
        pose = self._painter.pose()
        if self._shown is None or not pose.equals(self._shown):
            self._shown = pose
        return self._shown

    def pose(self) -> Pose:
        """Where the parts are now. Raises EnvError before the first reset."""
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before it can say where anything is")
        return self._pose()

    @property
    def painter(self) -> Painter:
        """What draws this episode: parts, their numbers, motion between poses. Raises EnvError before the first reset."""
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before it has a painter")
        return self._painter

    def exact_flow(self) -> NDArray[np.float32]:
        """(S, S, 2) flow from the picture before the last ``step`` to the current one, at the pixels of the former, in pixels of the
        drawn size S, x then y. Exact, also where a moving background shows; zero in the sky and after a reset. `motion_truth` says which
        of it stays visible.

        Raises:
            EnvError: before the first reset.
        """
        now = self.pose()
        return self.painter.flow(self._before or now, now, self.draw_size)

    @cached_property
    def _links(self) -> Links:
        return Links(self.physics.model.ptr, self._kinds, self.view.axes)

    @property
    def link_names(self) -> tuple[str, ...]:
        """Names of the agent's links."""
        return self._links.names

    def link_places(self, size: int | None = None) -> NDArray[np.float64]:
        """(L, 3) x, y in pixels and angle of the agent's links in the current picture (`localmotion.envs.links`). The side of the picture
        is ``size`` or that of the drawing.

        Raises:
            EnvError: before the first reset.
        """
        data, axes = self.physics.data.ptr, self.view.axes
        centres = self._links.centres(data) @ axes[:2].T @ np.array([1, 1j])  # (L,) in the plane, x right, imaginary part down
        places = self.painter.to_pixels(centres, self.pose(), size or self.draw_size)
        return np.column_stack([places.real, places.imag, self._links.angles(data, axes)])

    def background_place(self, size: int | None = None) -> NDArray[np.float64] | None:
        """(2,) x, y in pixels by which a moving background is shifted. None if it does not move. The side of the picture is ``size`` or
        that of the drawing."""
        if self._moving is None:
            return None
        drift = self._moving.drift * (size or self.draw_size)
        return np.array([drift.real, drift.imag])

    def part_ids(self, size: int | None = None) -> NDArray[np.int16]:
        """(S, S) number of the part that each pixel of the current picture shows: of a geom its number in the MuJoCo model, of a site the
        number of geoms plus its own; the floor is a part, too. The sky and a moving background are -1. S is ``size`` or that of the
        drawing.

        Raises:
            EnvError: before the first reset.
        """
        return self._painter_codes(size, np.append(np.int16(-1), self.painter.numbers))

    def agent_mask(self, size: int | None = None) -> NDArray[np.bool_]:
        """(S, S) pixels that show the agent: everything that is not welded to the world, as in ``dmc:``. S is ``size`` or that of the
        drawing.

        Raises:
            EnvError: before the first reset.
        """
        return self._painter_codes(size, np.append(False, self.painter.agent))

    def _painter_codes(self, size: int | None, table: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(table.take(self.painter.codes(self.pose(), size or self.draw_size)))

    def _facts(self) -> dict[str, Any]:
        facts = super()._facts()
        versions = facts["versions"] | {"opencv": cv2.__version__, "numpy": np.__version__}
        moving = "none" if self._moving is None else self._moving.describe()
        made = {}
        if self._tree:
            number, kind = self._tree
            body = trees.tree(number)
            digest = hashlib.sha256(trees.mjcf(body, kind).encode()).hexdigest()[:16]
            made = {"tree": {"links": len(body.links), "mjcf": digest, "sealed": number in trees.SEALED}}
        return {
            "camera": None,
            "quality": "exact",
            "gl": None,
            "look": self.look,
            "background": moving,
            "versions": versions,
            **made,
        }
