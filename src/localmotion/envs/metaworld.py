"""Meta-World (3.1.1) by task name, with IPV's protocol: no action repeat, 500 env steps, new goals at every reset.

An episode never terminates, unless the option ``end_on_success`` is on.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import PixelEnv
from localmotion.envs.links import CameraLinks
from localmotion.errors import ConfigError, EnvError, unknown_name

if TYPE_CHECKING:
    from localmotion.envs.masks import AgentParts

TASKS: tuple[str, ...] = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press", "button-press-topdown", "button-press-topdown-wall",
    "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn", "disassemble", "door-close", "door-lock",
    "door-open", "door-unlock", "drawer-close", "drawer-open", "faucet-close", "faucet-open", "hammer", "hand-insert",
    "handle-press", "handle-press-side", "handle-pull", "handle-pull-side", "lever-pull", "peg-insert-side", "peg-unplug-side",
    "pick-out-of-hole", "pick-place", "pick-place-wall", "plate-slide", "plate-slide-back", "plate-slide-back-side",
    "plate-slide-side", "push", "push-back", "push-wall", "reach", "reach-wall", "shelf-place", "soccer", "stick-pull",
    "stick-push", "sweep", "sweep-into", "window-close", "window-open",
)  # fmt: skip
"""The 50 tasks without their "-v3", listed here so names can be checked without importing MuJoCo."""

MT10: tuple[str, ...] = (
    "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown", "peg-insert-side",
    "window-open", "window-close",
)  # fmt: skip
"""The tasks of the benchmark MT10 (Yu et al. 2019, arXiv 1910.10897), in its order."""

CAMERA = "corner"
UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
"""Cameras that 3.1.1 mounts upside down. Only here their pictures are rotated by 180 degrees."""
ACTION_REPEAT, TIME_LIMIT = 1, 500
EXPERT_TRIES, EXPERT_STEPS, SETTLING = 4, 250, 20
"""For a goal picture the scripted policy plays at most this often and this many env steps, and goes on this long after it succeeded."""
EXPERT_NOISE = 0.3
"""Deviation of the noise on its actions after the first try."""


class MetaWorldEnv(CameraLinks, PixelEnv):
    """One task. ``info["success"]`` is 1 if the goal is met after the call (an episode succeeds if it is 1 at any call).

    By default Meta-World draws object and goal positions from NumPy's *global* generator, and a reset starts from the model as the previous
    episode left it. Here the environment has its own generator, seeded at every reset, and moved bodies and sites of the model are first
    restored. So environments in one process do not affect each other.

    Args:
        end_on_success: an episode terminates when the goal is met, as in MaskLAM's data sets (arXiv 2602.02259). A scripted expert else
            stays at the goal until the time limit.

    Raises:
        ConfigError: an unknown task, or a setting out of range.
    """

    has_success = True
    suite_name: ClassVar[str] = "metaworld"

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
        end_on_success: bool = False,
    ) -> None:
        if not isinstance(end_on_success, bool):
            raise ConfigError(f"end_on_success={end_on_success!r} must be true or false")
        self.end_on_success = end_on_success
        task = task.removesuffix("-v3")
        if task not in TASKS:
            raise unknown_name("Meta-World task", task, TASKS)
        super().__init__(
            f"{self.suite_name}:{task}",
            seed=seed,
            size=size,
            percept_size=percept_size,
            action_dim=4,
            action_repeat=ACTION_REPEAT if action_repeat is None else action_repeat,
            time_limit=TIME_LIMIT if time_limit is None else time_limit,
        )
        from localmotion.envs.gl import choose_gl

        self._gl = choose_gl()  # before MuJoCo is imported
        from localmotion.envs.render import SceneRenderer, camera_id, resolve_quality

        with warnings.catch_warnings():
            # gymnasium's viewer imports glfw, which warns if there is no display.
            warnings.simplefilter("ignore")
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS

            self.inner: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        self._mujoco = mujoco
        inner = self.inner
        inner._partially_observable = False
        inner.__dict__.pop("sawyer_observation_space", None)  # cached for hidden goals; rewards may read the goal
        inner._set_task_called = True
        inner._freeze_rand_vec = False
        inner.seeded_rand_vec = True
        # Meta-World raises at its own limit; our limit truncates before it.
        inner.max_path_length = max(self.time_limit, EXPERT_STEPS) + 1
        model = inner.model
        self._fresh = {name: getattr(model, name).copy() for name in ("body_pos", "body_quat", "site_pos", "geom_pos")}
        self._met = 0.0
        self._vector = np.zeros(39)  # Meta-World's own observation, the input of its scripted policies
        self._expert: Any = None
        self.camera = camera_id(model, CAMERA if camera is None else camera, self.name)
        self.camera_name = model.camera(self.camera).name
        self.quality = resolve_quality(quality)
        self._renderer = SceneRenderer(
            model,
            size=self.draw_size,
            camera=self.camera,
            quality=self.quality,
            upside_down=self.camera_name in UPSIDE_DOWN,
        )
        self.metadata = {**self.metadata, "render_fps": max(1, round(1.0 / (inner.dt * self.action_repeat)))}

    def _begin(self, episode_seed: int) -> None:
        model, data = self.inner.model, self.inner.data
        for name, value in self._fresh.items():
            getattr(model, name)[:] = value
        self._mujoco.mj_resetData(model, data)
        self._mujoco.mj_forward(model, data)
        self.inner.seed(episode_seed)
        self._vector = self.inner.reset()[0]
        self._met = 0.0

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        self._vector, reward, _, _, info = self.inner.step(action.astype(np.float32))
        self._met = float(info["success"])
        return float(reward), self.end_on_success and self._met > 0

    def _success(self) -> float:
        return self._met

    def expert_action(self) -> NDArray[np.float32]:
        """Current action of Meta-World's scripted policy for this task, (4,) in [-1, 1]. Its input is the state, not the picture."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns about actions outside [-1, 1], which are clipped here
            if self._expert is None:
                from metaworld.policies import ENV_POLICY_MAP

                self._expert = ENV_POLICY_MAP[f"{self.name.partition(':')[2]}-v3"]()
            wanted = self._expert.get_action(self._vector)
        action: NDArray[np.float32] = np.clip(wanted, -1.0, 1.0).astype(np.float32)
        return action

    @property
    def has_goals(self) -> bool:
        """Goal pictures show the last success of the scripted policy."""
        return True

    def _solve(self, episode_seed: int) -> bool:
        """The scripted policy plays until `SETTLING` env steps after its first success; the last successful state is kept. If it fails,
        it plays again with noise. If all tries fail, the state with the smallest distance to the target is kept."""
        mujoco, model, data = self._mujoco, self.inner.model, self.inner.data
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        nearest, kept = np.inf, np.empty(mujoco.mj_stateSize(model, spec))
        for attempt in range(EXPERT_TRIES):
            if attempt:
                self._begin(episode_seed)
            noise, left = np.random.default_rng([episode_seed, attempt]), SETTLING
            for _ in range(EXPERT_STEPS):
                action = self.expert_action()
                if attempt:
                    action = np.clip(action + noise.normal(0, EXPERT_NOISE, 4), -1, 1).astype(np.float32)
                self._vector, _, _, _, info = self.inner.step(action)
                distance = -1.0 if info["success"] else float(info["obj_to_target"])
                if distance <= nearest:
                    nearest = distance
                    mujoco.mj_getState(model, data, kept, spec)
                if nearest < 0:
                    left -= 1
                if left < 0:
                    break
            if nearest < 0:
                break
        mujoco.mj_setState(model, data, kept, spec)
        mujoco.mj_forward(model, data)
        return nearest < 0

    def _draw(self, size: int) -> NDArray[np.uint8]:
        return self._renderer.frame(self.inner.data, size)

    def agent_mask(self, size: int | None = None) -> NDArray[np.bool_]:
        """(S, S) pixels that show the robot, by MuJoCo's segmentation (`localmotion.envs.masks`); S is ``size`` or that of the drawing.

        Raises:
            EnvError: before the first reset.
        """
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before agent_mask()")
        from localmotion.envs.masks import segment, subtree_parts

        model = self.inner.model
        return segment(self._renderer, model, self.inner.data, subtree_parts(model), size).agent

    def _linked(self) -> tuple[Any, Any, AgentParts]:
        from localmotion.envs.masks import subtree_parts

        return self.inner.model, self.inner.data, subtree_parts(self.inner.model)

    def velocities(self) -> NDArray[np.float64]:
        """Velocity of the hand (3,), metres per second, then the generalised velocities (nv,), the targets of probes."""
        model, data, hand = self.inner.model, self.inner.data, np.zeros(6)
        body = self._mujoco.mj_name2id(model, self._mujoco.mjtObj.mjOBJ_BODY, "hand")
        self._mujoco.mj_objectVelocity(model, data, self._mujoco.mjtObj.mjOBJ_BODY, body, hand, 0)
        return np.concatenate([hand[3:], data.qvel])

    def vector(self) -> NDArray[np.float64]:
        """Meta-World's own observation, (39,), with the goal's position in its last three numbers."""
        return np.array(self._vector, np.float64)

    def state(self) -> NDArray[np.float64]:
        """Positions, velocities, mocap pose and the target, with the model's body and site positions, which tasks move."""
        model, data = self.inner.model, self.inner.data
        parts = [data.qpos, data.qvel, data.mocap_pos, data.mocap_quat, self.inner._target_pos, model.body_pos, model.site_pos]
        return np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])

    def _facts(self) -> dict[str, Any]:
        return {
            "camera": self.camera_name or self.camera,
            "quality": self.quality,
            "gl": self._gl.to_json(),
            "versions": {"mujoco": self._mujoco.__version__, "metaworld": version("metaworld")},
            **({"end_on_success": True} if self.end_on_success else {}),  # without it as in earlier versions
        }

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()
