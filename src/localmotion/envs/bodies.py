"""Unlabeled source videos of many bodies: simulated creatures and mechanisms under smooth random actions. Each clip has its own look.

For demos, tests and studies without a download: pre-training needs videos of *other* bodies than the downstream task's, with backgrounds,
colours, lights and cameras that differ from clip to clip. Bodies are those of the DeepMind Control suite; the procedures below draw
the textures, which are sent to OpenGL again for every clip.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs.dmc import TASKS, DMCEnv
from localmotion.errors import ConfigError, EnvError, unknown_name

BODIES: dict[str, str] = {
    "acrobot": "acrobot_swingup",
    "ball_in_cup": "ball_in_cup_catch",
    "cartpole": "cartpole_three_poles",
    "cheetah": "cheetah_run",
    "dog": "dog_run",
    "finger": "finger_spin",
    "fish": "fish_upright",
    "hopper": "hopper_hop",
    "humanoid": "humanoid_walk",
    "pendulum": "pendulum_swingup",
    "quadruped": "quadruped_walk",
    "reacher": "reacher_easy",
    "swimmer": "swimmer_swimmer6",
    "walker": "walker_walk",
}
"""Body -> its task of the suite."""
SECONDS_PER_FRAME = 0.04
PACE = {"fish": 4, "pendulum": 2, "swimmer": 2}
"""Factor on `SECONDS_PER_FRAME` for bodies that random actions move slowly."""
NEARER = {"acrobot": 0.75, "ball_in_cup": 0.75, "fish": 0.55, "pendulum": 0.7}
"""Factor on the camera's distance for bodies that are small in their own camera's picture."""
CENTRED = ("acrobot", "cartpole", "finger", "pendulum", "reacher")
"""Bodies fixed to the world. The camera looks at the middle of their scene; it follows all other bodies."""
_KEPT = ("tex_data", "mat_rgba", "mat_reflectance", "geom_rgba", "light_pos", "light_diffuse", "light_ambient", "light_specular")
_BODY_TEXTURE = '<texture name="random_skin" type="cube" builtin="flat" rgb1="1 1 1" width="96" height="96"/>'


def render_videos(
    out: Path,
    *,
    clips: int,
    frames: int,
    size: int,
    seed: int,
    bodies: Sequence[str],
    exclude: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Render ``clips`` videos of ``frames`` frames at ``size`` x ``size`` into ``out`` as mp4, 25 frames a second.

    Clip i shows ``bodies[i % len(bodies)]``; (seed, i) determines everything random in it, so a clip does not depend on the others.

    Args:
        out: folder, made if needed; files of the same name are replaced.
        bodies: names of `BODIES`.
        exclude: bodies or environments ("reacher" or "dmc:reacher_easy") that must not appear, e.g. the downstream task.
        progress: called with the number of clips done.

    Returns:
        The files, in order.

    Raises:
        ConfigError: an unknown body, no body left, or a number out of range.
        EnvError: no working OpenGL, or a simulation keeps diverging.
    """
    from localmotion.video.write import write_video

    for label, value, least in (("clips", clips, 1), ("frames", frames, 2), ("size", size, 16)):
        if value < least:
            raise ConfigError(f"{label}={value} must be at least {least}")
    chosen = choose_bodies(bodies, exclude)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{index:05d}_{chosen[index % len(chosen)]}.mp4" for index in range(clips)]
    done = 0
    for offset, body in enumerate(chosen):  # one model and one renderer at a time
        indices = range(offset, clips, len(chosen))
        if not indices:
            continue
        studio = Studio(body, size)
        try:
            for index in indices:
                write_video(paths[index], studio.clip(frames, (seed, index)), round(1 / SECONDS_PER_FRAME))
                done += 1
                if progress is not None:
                    progress(done)
        finally:
            studio.close()
    return paths


def choose_bodies(bodies: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """``bodies`` without those of ``exclude`` (body names or "dmc:" environments). Raises ConfigError if none remains."""
    for body in bodies:
        if body not in BODIES:
            raise unknown_name("body", body, BODIES)
    banned = set()
    for name in exclude:
        task = name.partition(":")[2]
        if not task and name not in BODIES:
            raise unknown_name("body", name, BODIES)
        banned.add(TASKS[task][0] if task in TASKS else name)
    left = [body for body in bodies if body not in banned]
    if not left:
        raise ConfigError(f"no body left: bodies {', '.join(bodies) or '(none)'} without {', '.join(sorted(banned)) or 'any'}")
    return left


class Studio:
    """One body, its renderer, and a new look for every clip."""

    def __init__(self, body: str, size: int) -> None:
        with _textured_bodies():
            self.env = DMCEnv(BODIES[body], size=size, quality="fast", action_repeat=1, time_limit=10**9)
        import mujoco

        self.body, self.size = body, size
        self.model = self.env.physics.model.ptr
        self.data = self.env.physics.data.ptr
        self._before = {name: getattr(self.model, name).copy() for name in _KEPT}
        self._headlight = [np.array(getattr(self.model.vis.headlight, name)) for name in ("ambient", "diffuse", "specular")]
        seconds = SECONDS_PER_FRAME * PACE.get(body, 1)
        self._per_frame = max(1, round(seconds / (self.env._sub_steps * self.env.physics.timestep())))
        self._camera = self.env._renderer.camera
        self._fixed_view = self.env.camera
        self._free = mujoco.mjtCamera.mjCAMERA_FREE

    def clip(self, frames: int, seed: Sequence[int]) -> NDArray[np.uint8]:
        """(T, S, S, 3) uint8 of ``frames`` frames; the same ``seed`` gives the same clip. Raises EnvError if all attempts diverge."""
        for attempt in range(5):
            rng = np.random.default_rng([*seed, attempt])
            try:
                return self._film(frames, rng)
            except EnvError as error:
                last = error
        raise EnvError(f"{self.body}: five random clips in a row diverged; the last: {last}")

    def _film(self, frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        self.env.reset(seed=int(rng.integers(2**31)))
        self._dress(rng)
        dims = self.env.action_space.shape[0]  # type: ignore[index]
        actions = smooth_actions(rng, frames * self._per_frame, dims, self._per_frame)
        aim = self._aim(rng)
        pictures = np.empty((frames, self.size, self.size, 3), np.uint8)
        for t in range(frames):
            for action in actions[t * self._per_frame : (t + 1) * self._per_frame]:
                self.env._control(action)
            self._follow(aim)
            pictures[t] = self.env._draw(self.size)
        return pictures

    # -- look -----------------------------------------------------------------------------------------------------------

    def _dress(self, rng: np.random.Generator) -> None:
        """New textures, colours and lights; nothing remains from the clip before."""
        model = self.model
        for name, value in self._before.items():
            getattr(model, name)[:] = value
        bright_body = rng.random() < 0.75
        dark, light = (0.12, 0.45), (0.75, 1.0)
        for texture in range(model.ntex):
            name = model.texture(texture).name
            height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
            on_body = name == "random_skin"
            picture = pattern(rng, width, (0.55, 1.0) if on_body else light if not bright_body else dark, busy=not on_body)
            faces = height // width
            data = np.tile(picture, (faces, 1, 1)) if faces > 1 else cv2.resize(picture, (width, height))
            start = int(model.tex_adr[texture])
            model.tex_data[start : start + data.size] = data.ravel()
            self.env._renderer.upload_texture(texture)
        base = rng.random()
        for material in range(model.nmat):
            name = model.material(material).name
            if name.startswith("grid"):
                model.mat_rgba[material] = 1.0
                model.mat_reflectance[material] = rng.uniform(0, 0.3)
            elif not name.endswith("highlight") and name != "site":
                hue = (base + rng.uniform(-0.12, 0.12) + 0.5 * name.startswith(("effector", "target"))) % 1.0
                value = rng.uniform(*light) if bright_body else rng.uniform(0.25, 0.55)
                model.mat_rgba[material, :3] = colorsys.hsv_to_rgb(hue, rng.uniform(0.25, 0.9), value)
        bare = model.geom_matid < 0
        tints = [colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.5, 1)) for _ in range(bare.sum())]
        if tints:
            model.geom_rgba[bare, :3] = tints
        model.light_pos[:] += rng.uniform(-0.5, 0.5, model.light_pos.shape) * np.array([1.0, 1.0, 0.2])
        model.light_diffuse[:] *= rng.uniform(0.5, 1.1, (model.nlight, 1)) * rng.uniform(0.85, 1.0, (model.nlight, 3))
        head = model.vis.headlight
        strength = rng.uniform(0.75, 1.1)
        head.ambient[:] = self._headlight[0] * strength * rng.uniform(0.85, 1.1, 3)
        head.diffuse[:] = self._headlight[1] * strength

    # -- camera ---------------------------------------------------------------------------------------------------------

    def _aim(self, rng: np.random.Generator) -> _Aim:
        """A view near the model's own camera, turned, tilted, nearer or farther, that looks at the body or the middle of the scene."""
        model, data = self.model, self.data
        eye, axes = data.cam_xpos[self._fixed_view].copy(), data.cam_xmat[self._fixed_view].reshape(3, 3)
        forward = -axes[:, 2]
        body = data.subtree_com[0].copy()
        distance = float(np.linalg.norm(body - eye))
        look = eye + forward * distance if self.body in CENTRED else body
        gaze = (look - eye) / max(float(np.linalg.norm(look - eye)), 1e-6)
        azimuth = float(np.degrees(np.arctan2(gaze[1], gaze[0])))
        elevation = float(np.degrees(np.arcsin(np.clip(gaze[2], -1, 1))))
        if elevation < -75:  # from above all directions are equal
            azimuth = float(rng.uniform(-180, 180))
        # A free camera has the model's field of view, not that of the camera it replaces.
        wide = np.tan(np.radians(model.cam_fovy[self._fixed_view] / 2)) / np.tan(np.radians(model.vis.global_.fovy / 2))
        shift = rng.uniform(-0.06, 0.06, 3) * distance * np.array([1, 1, 0.5])
        return _Aim(
            look=look + shift,
            body=body,
            follow=0.0 if self.body in CENTRED else float(rng.choice([0.05, 0.2])),
            azimuth=azimuth + float(rng.uniform(-30, 30)),
            elevation=float(np.clip(elevation + rng.uniform(-20, 8), -89, -4)),
            distance=distance * wide * NEARER.get(self.body, 1.0) * float(rng.uniform(0.65, 1.0)),
        )

    def _follow(self, aim: _Aim) -> None:
        moved = self.data.subtree_com[0] - aim.body
        aim.look, aim.body = aim.look + aim.follow * moved, aim.body + aim.follow * moved
        camera = self._camera
        camera.type = self._free
        camera.lookat[:] = aim.look
        camera.azimuth, camera.elevation, camera.distance = aim.azimuth, aim.elevation, aim.distance

    def close(self) -> None:
        """Free the renderer."""
        self.env.close()


@dataclass
class _Aim:
    """Where the camera looks from; ``look`` and ``body`` (3,) move with the body, ``follow`` of the way each frame."""

    look: NDArray[np.float64]
    body: NDArray[np.float64]
    follow: float
    azimuth: float
    elevation: float
    distance: float


def smooth_actions(rng: np.random.Generator, steps: int, dims: int, per_frame: int = 1) -> NDArray[np.float64]:
    """Random actions (steps, dims) in [-1, 1] that change smoothly: per axis two sines with periods of 8 to 50 frames, and a constant."""
    time = np.arange(steps)[:, None, None] / per_frame
    period = np.exp(rng.uniform(np.log(8), np.log(50), (1, dims, 2)))
    waves = rng.uniform(0.3, 0.9, (1, dims, 2)) * np.sin(2 * np.pi * (time / period + rng.random((1, dims, 2))))
    return np.clip(waves.sum(axis=2) + rng.uniform(-0.3, 0.3, dims), -1.0, 1.0)


def pattern(rng: np.random.Generator, side: int, brightness: tuple[float, float], *, busy: bool = True) -> NDArray[np.uint8]:
    """A procedural texture (side, side, 3): clouds, stripes, checks or rings in two to four colours of the given brightness range."""
    small = min(side, 256)
    y, x = np.mgrid[0:small, 0:small] / small
    clouds = np.zeros((small, small))
    for octave in range(2, 7 if busy else 5):
        grid = rng.random((2**octave + 1, 2**octave + 1)).astype(np.float32)
        clouds += cv2.resize(grid, (small, small), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    clouds = (clouds - clouds.min()) / (np.ptp(clouds) + 1e-9)
    count, turn, bend = rng.integers(3, 12), rng.uniform(0, np.pi), rng.uniform(0, 2)
    kind = rng.integers(4)
    if kind == 0:
        field = clouds
    elif kind == 1:
        field = 0.5 + 0.5 * np.sin(2 * np.pi * (count * (x * np.cos(turn) + y * np.sin(turn)) + bend * clouds))
    elif kind == 2:
        field = ((np.floor(x * count) + np.floor(y * count)) % 2) * 0.75 + 0.25 * clouds
    else:
        centre = rng.uniform(0.2, 0.8, 2)
        field = 0.5 + 0.5 * np.sin(2 * np.pi * (count * np.hypot(x - centre[0], y - centre[1]) + bend * clouds))
    stops = int(rng.integers(2, 5))
    hue = rng.random()
    colours = np.array(
        [
            colorsys.hsv_to_rgb((hue + rng.uniform(-0.2, 0.2)) % 1.0, rng.uniform(0.1, 0.8), rng.uniform(*brightness))
            for _ in range(stops)
        ]
    )
    ramp = np.linspace(0, 1, 256)
    palette = np.stack([np.interp(ramp, np.linspace(0, 1, stops), colours[:, k]) for k in range(3)], axis=1)
    picture = (palette[(field * 255).astype(np.int64).clip(0, 255)] * 255).astype(np.uint8)
    return picture if small == side else np.asarray(cv2.resize(picture, (side, side)), np.uint8)


@contextmanager
def _textured_bodies() -> Iterator[None]:
    """Context for building a model: a cube texture for bodies, and a smaller sky, in the assets shared by all domains of the suite."""
    from localmotion.envs.gl import choose_gl

    choose_gl()  # before dm_control is imported
    from dm_control.suite.common import ASSETS

    materials, sky = "./common/materials.xml", "./common/skybox.xml"
    before = {name: ASSETS[name] for name in (materials, sky)}
    text = before[materials].decode()
    for name in ("self", "effector", "decoration"):
        text = text.replace(f'<material name="{name}" ', f'<material name="{name}" texture="random_skin" ')
    ASSETS[materials] = text.replace("<asset>", f"<asset>{_BODY_TEXTURE}", 1).encode()
    ASSETS[sky] = before[sky].replace(b'width="800" height="800"', b'width="256" height="256"')
    try:
        yield
    finally:
        ASSETS.update(before)
