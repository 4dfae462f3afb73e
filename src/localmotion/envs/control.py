"""dm_control's tasks (1.0.28) without pictures: physics, rewards, initial states, vector observations. Suites add the drawing."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import PixelEnv
from localmotion.envs.goals import solve, solved_tasks
from localmotion.errors import EnvError, unknown_name

TASKS: dict[str, tuple[str, str]] = {
    f"{domain}_{task}": (domain, task)
    for domain, tasks in {
        "acrobot": ("swingup", "swingup_sparse"),
        "ball_in_cup": ("catch",),
        "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
        "cheetah": ("run",),
        "dog": ("stand", "walk", "trot", "run", "fetch"),
        "finger": ("spin", "turn_easy", "turn_hard"),
        "fish": ("upright", "swim"),
        "hopper": ("stand", "hop"),
        "humanoid": ("stand", "walk", "run", "run_pure_state"),
        "humanoid_CMU": ("stand", "walk", "run"),
        "lqr": ("lqr_2_1", "lqr_6_2"),
        "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
        "pendulum": ("swingup",),
        "point_mass": ("easy", "hard"),
        "quadruped": ("walk", "run", "escape", "fetch"),
        "reacher": ("easy", "hard"),
        "stacker": ("stack_2", "stack_4"),
        "swimmer": ("swimmer6", "swimmer15"),
        "walker": ("stand", "walk", "run"),
    }.items()
    for task in tasks
}
"""Task name -> (domain, task) of the suite, listed here so names can be checked without importing MuJoCo."""

ACTION_REPEAT, TIME_LIMIT = 2, 1000
UNBOUNDED = 1e6


class ControlEnv(PixelEnv):
    """One task of the suite. Return in 0..1000 for 1000 env steps; terminated only if the task says so (lqr).

    ``time_limit`` replaces the suite's own time limit. A model that the suite draws at random when it is built (lqr) is always the same.
    ``physics`` is dm_control's object, for ground truth. A subclass draws: `_draw`. This class needs no OpenGL.
    """

    suite_name: ClassVar[str]

    def __init__(
        self,
        task: str,
        *,
        seed: int,
        size: int,
        percept_size: int | None,
        action_repeat: int | None,
        time_limit: int | None,
    ) -> None:
        with warnings.catch_warnings(), _without_gl():
            warnings.simplefilter("ignore", DeprecationWarning)
            from dm_control.rl.control import PhysicsError

            inner = self._load(task)
        self._physics_error = PhysicsError
        self.physics, self._task = inner.physics, inner.task
        # quadruped escape requests an OpenGL context from its physics, to upload the terrain. dm_control caches which context is current,
        # so a second context would draw into ours. It gets none, and our renderer uploads the terrain.
        self.physics._make_rendering_contexts = _no_contexts
        self._sub_steps = round(inner.control_timestep() / self.physics.timestep())
        bounds = inner.action_spec()
        low, high = np.asarray(bounds.minimum, np.float64), np.asarray(bounds.maximum, np.float64)
        bounded = (low > -UNBOUNDED) & (high < UNBOUNDED)  # lqr has no bounds; use [-1, 1]
        low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
        self._centre, self._half = (high + low) / 2, (high - low) / 2
        super().__init__(
            f"{self.suite_name}:{task}",
            seed=seed,
            size=size,
            percept_size=percept_size,
            action_dim=int(np.prod(bounds.shape)),
            action_repeat=ACTION_REPEAT if action_repeat is None else action_repeat,
            time_limit=TIME_LIMIT if time_limit is None else time_limit,
        )
        rate = 1.0 / (inner.control_timestep() * self.action_repeat)
        self.metadata = {**self.metadata, "render_fps": max(1, round(rate))}

    def _load(self, task: str) -> Any:
        """dm_control's environment of a task, without a time limit. Raises ConfigError for an unknown one."""
        if task not in TASKS:
            raise unknown_name("DMC task", task, TASKS)
        from dm_control import suite

        domain, name = TASKS[task]
        return suite.load(domain, name, task_kwargs={"random": 0, "time_limit": float("inf")})

    def _begin(self, episode_seed: int) -> None:
        self._task.random.seed(episode_seed)
        with self.physics.reset_context():
            self._task.initialize_episode(self.physics)

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        # dm_control's Environment.step without its observation, which is not used and takes as long as the physics.
        try:
            self._task.before_step(self._centre + self._half * action, self.physics)
            self.physics.step(self._sub_steps)
            self._task.after_step(self.physics)
        except self._physics_error as error:
            raise EnvError(f"{self.name}: the simulation diverged ({error}); reset, or lower the actions") from error
        reward = float(self._task.get_reward(self.physics))
        discount = self._task.get_termination(self.physics)
        return reward, discount is not None and float(discount) == 0.0

    def velocities(self) -> NDArray[np.float64]:
        """Generalised velocities (nv,) of the physics, radians and metres per second, the targets of probes."""
        return np.array(self.physics.data.qvel, np.float64)

    @property
    def has_goals(self) -> bool:
        """Goal pictures exist for tasks with a solved pose (`localmotion.envs.goals`)."""
        return self.name.partition(":")[2] in solved_tasks()

    def _solve(self, episode_seed: int) -> bool:
        solve(self.name.partition(":")[2], self.physics, self._task)
        return True

    def vector(self) -> NDArray[np.float64]:
        """dm_control's own observation of the task, its parts in their order, as one vector."""
        parts = self._task.get_observation(self.physics).values()
        return np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])

    def state(self) -> NDArray[np.float64]:
        """Positions, velocities and activations of the physics, with the model's body and geom positions, which some tasks move."""
        model = self.physics.model.ptr
        return np.concatenate([self.physics.get_state(), model.body_pos.ravel(), model.geom_pos.ravel()])

    def _facts(self) -> dict[str, Any]:
        import dm_control
        import mujoco

        return {"versions": {"mujoco": mujoco.__version__, "dm_control": _version("dm_control", dm_control)}}


@contextmanager
def _without_gl() -> Iterator[None]:
    """Within it, importing MuJoCo loads no OpenGL, unless ``MUJOCO_GL`` chooses one. Does nothing if MuJoCo is already imported.

    MuJoCo otherwise looks for a display, and what it finds decides what later environments can draw with. Our environments that draw with
    OpenGL work afterwards in the same process; ``mujoco.Renderer`` itself does not, unless ``MUJOCO_GL`` was set.
    """
    if "mujoco" in sys.modules:
        yield
        return
    if os.environ.get("MUJOCO_GL"):
        from localmotion.envs.gl import load_triton

        load_triton()  # the import that follows may load a driver
        yield
        return
    os.environ["MUJOCO_GL"] = "disable"
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]


def _no_contexts() -> None:
    """Replaces dm_control's creation of OpenGL contexts."""


def _version(package: str, module: Any) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))
