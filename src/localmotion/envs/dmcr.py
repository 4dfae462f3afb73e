"""DMC Remastered: the tasks of the DeepMind Control Suite with seven visual factors redrawn at every episode.

Source: Grigsby and Qi 2020, "Measuring Visual Generalization in Continuous Control from Pixels"; used by IPV and DRP for walker run,
hopper stand and cheetah run (DRP, section 5.1). Ranges and order of the draws are those of the reference. Differences:

* The reference builds the physics again for every episode; here the compiled model is changed in place, with the same picture.
* Pictures are numbered in the order of their names, so a visual seed gives the same picture on every machine; the reference uses the
  order of the directory.
* A separate generator draws the visual seed from the episode's seed, and the look from the visual seed. Camera and lamp have their own
  stream; the reference restarts the same generator for them, which makes the camera's place depend on the sky.
* The shadow map's size (1548..2548 in the reference) is drawn and not used: it belongs to the rendering quality.
* Domains that the reference lacks get a camera and a lamp moved by a share of their distance (`View` of `GENERIC`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import Observation
from localmotion.envs.dmc import TASKS, DMCEnv
from localmotion.envs.textures import SIDES, Kind, find_textures
from localmotion.envs.visuals import Mount, TextureSlot, chosen, euler_rotation, in_range, named, sky_texture

FACTORS = ("background", "floor", "body", "target", "reflectance", "camera", "light")
WITHOUT_CAMERA = ("hopper_stand",)
"""Tasks whose camera does not move by default. IPV found hopper stand too hard with a moved camera."""
SEEDS = 1_000_000
"""Visual seeds are 1..SEEDS."""
_SEED_STREAM, _VIEW_STREAM = 0xD3C, 1

Range = tuple[float, float]
Box = tuple[Range, Range, Range]


@dataclass(frozen=True)
class View:
    """Ranges of a domain's camera and lamp, in the frame of their body; None: they stay.

    euler   degrees about x, y, z; ``tilt`` as in MuJoCo's xyaxes "1 0 0 0 tilt 1"
    lamp    position; ``lamp_diffuse`` and ``lamp_specular`` a grey level, with each channel changed by up to 0.02
    floor   size of the floor that replaces the model's (drawing only)
    """

    camera: Box | None = None
    euler: Box | None = None
    tilt: Range | None = None
    lamp: Box | None = None
    lamp_diffuse: Range | None = None
    lamp_specular: Range | None = None
    floor: tuple[float, float, float] | None = None


VIEWS: dict[str, View] = {
    "ball_in_cup": View(((-0.05, 0.05), (-1.1, -0.9), (0.8, 1.0)), lamp=((-0.5, 0.5), (-0.5, 0.5), (1.2, 2.7))),
    "cartpole": View(((-0.15, 0.15), (-5.0, -3.0), (0.8, 1.2)), lamp=((-1, 1), (-1, 1), (4.5, 7.5))),
    "cheetah": View(((-0.25, 0.25), (-3.2, -2.8), (-0.25, 0.25)), lamp=((-2, 2), (-2, 2), (1, 5)), floor=(100, 15, 0.5)),
    "finger": View(
        ((-0.02, 0.02), (-1.01, -0.99), (0.7, 1.0)),
        lamp=((-0.8, 0.8), (-0.8, 0.8), (1, 3)),
        lamp_diffuse=(0.5, 1.1),
        lamp_specular=(0, 1.2),
    ),
    "fish": View(((-0.05, 0.05), (-0.05, 0.05), (0.8, 1.2)), lamp=((-0.3, 0.3), (-0.3, 0.3), (0, 1))),
    "hopper": View(((-0.15, 0.15), (-3.0, -2.6), (0.6, 1.0)), euler=((85, 95), (-5, 5), (-5, 5))),
    "humanoid": View(((-3.5, -2.5), (-0.5, 0.5), (0.5, 1.5)), lamp=((-0.7, 0.7), (-0.7, 0.7), (1.2, 1.8))),
    "pendulum": View(((0, 0.2), (-1.1, -0.97), (1.3, 1.6)), tilt=(0.4, 0.6), lamp=((-0.5, 0.5), (-0.2, 0.2), (1.2, 2.8))),
    "reacher": View(((-0.05, 0.05), (-0.05, 0.05), (0.7, 0.8)), lamp=((-0.2, 0.2), (-0.2, 0.2), (0.15, 0.75))),
    "walker": View(((-0.3, 0.3), (-2.05, -1.95), (0.6, 0.8))),
}
"""Domains of the reference, with its numbers. As in the reference, the pendulum's camera shows less of the hanging pole than the
suite's camera."""
GENERIC = (0.12, 0.3)
"""Other domains: the camera moves along each axis by up to this share of half the picture's width at its distance (5 % of the distance for
a field of 45 degrees), a lamp by up to this share of its height."""
_STAYING_LAMPS = ("target_light",)


@dataclass(frozen=True)
class Look:
    """One draw of all factors. Colours are RGB or RGBA in 0..1; pictures are numbers of `localmotion.envs.textures`."""

    sky: int
    floor: int
    reflectance: float
    body: NDArray[np.float64]
    effector: NDArray[np.float64]
    target: NDArray[np.float64]
    ambient: NDArray[np.float64]
    diffuse: NDArray[np.float64]
    specular: NDArray[np.float64]
    shadow_size: int


class _Draws:
    """Uniform draws in the reference's order; only ``Generator.random`` is used, whose stream NumPy keeps."""

    def __init__(self, *seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._rng.random())

    def number(self, count: int) -> int:
        return min(int(self._rng.random() * count), count - 1)

    def box(self, box: Box) -> NDArray[np.float64]:
        return np.array([self.uniform(*side) for side in box])

    def rgba(self) -> NDArray[np.float64]:
        alpha = self.uniform(0.75, 1.0)
        return np.array([self.uniform(0, 1) for _ in range(3)] + [alpha])

    def grey(self, level: Range, off: float) -> NDArray[np.float64]:
        base = self.uniform(*level)
        return np.array([base + self.uniform(-off, off) for _ in range(3)])


def draw_look(visual_seed: int, skies: int, floors: int) -> Look:
    """All factors of a visual seed except camera and lamp. Always drawn in the reference's order, also if some are not used."""
    draws = _Draws(visual_seed)
    return Look(
        sky=draws.number(skies),
        floor=draws.number(floors),
        reflectance=draws.uniform(0.0, 0.5),
        body=draws.rgba(),
        effector=draws.rgba(),
        target=draws.rgba(),
        ambient=draws.grey((0.1, 0.8), 0.05),
        diffuse=draws.grey((0.4, 0.9), 0.1),
        specular=draws.grey((0.05, 0.3), 0.02),
        shadow_size=1548 + draws.number(1001),
    )


class DMCRemasteredEnv(DMCEnv):
    """A task of the suite in a new look every episode; physics and rewards are those of ``dmc:``, bit for bit.

    ``reset(options={"visual_seed": n})`` shows look n for that episode.

    Args:
        visual_seed: the look of all episodes, 1..1,000,000; None: drawn at every reset from its seed.
        factors: names of `FACTORS` that vary, a list or text with commas, "all" or "none"; None: all, except the camera of hopper stand.
        textures: folder with floors/ and skies/, or "procedural"; None: the folder in LOCALMOTION_DMCR_TEXTURES, else procedural.

    Raises:
        ConfigError: an unknown factor, a visual seed out of range, a folder without pictures.
    """

    suite_name: ClassVar[str] = "dmcr"

    def __init__(
        self,
        task: str,
        *,
        visual_seed: int | None = None,
        factors: str | Iterable[str] | None = None,
        textures: str | Path | None = None,
        **settings: Any,
    ) -> None:
        default = [name for name in FACTORS if task not in WITHOUT_CAMERA or name != "camera"]
        self.factors = chosen("visual factor", default if factors is None else factors, FACTORS)
        self._fixed = _check_seed(visual_seed)
        self.textures = find_textures(textures)
        self.visual_seed: int | None = self._fixed
        self._asked: int | None = None
        super().__init__(task, **settings)

    def _prepare(self, model: Any) -> None:
        domain = TASKS[self.name.partition(":")[2]][0]
        self._slots: list[tuple[Kind, TextureSlot]] = []
        kinds: tuple[tuple[str, Kind, int | None], ...] = (
            ("background", "skies", sky_texture(model)),
            ("background", "skies", named(model, "texture", "background")),  # the wall behind manipulator and stacker
            ("floor", "floors", named(model, "texture", "grid")),
        )
        for factor, kind, texture in kinds:
            if factor in self.factors and texture is not None:
                self._slots.append((kind, TextureSlot(model, texture, SIDES[kind])))
        self._materials = {name: named(model, "material", name) for name in ("grid", "self", "skin", "effector", "target")}
        self._view = VIEWS.get(domain, View())
        self._mount = Mount(model, "cam", self.camera)
        lamp = next((i for i in range(model.nlight) if model.light(i).name not in _STAYING_LAMPS), None)
        self._lamp_index, self._lamp = lamp, None if lamp is None else Mount(model, "light", lamp)
        self._generic = domain not in VIEWS
        if self._view.floor is not None and "floor" in self.factors:
            ground = next(i for i in range(model.ngeom) if model.geom_type[i] == 0)
            model.geom_size[ground] = self._view.floor  # a plane collides everywhere, for any size

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; ``options={"visual_seed": n}`` for look n. ``info`` has the ``visual_seed``."""
        self._asked = _check_seed((options or {}).get("visual_seed"))
        observation, info = super().reset(seed=seed)
        return observation, info | {"visual_seed": self.visual_seed}

    def _begin(self, episode_seed: int) -> None:
        drawn = 1 + _Draws(episode_seed, _SEED_STREAM).number(SEEDS)
        self.visual_seed = self._asked or self._fixed or drawn
        self._dress(self.visual_seed)
        super()._begin(episode_seed)  # its forward pass moves camera and lamp to their mounts

    def _dress(self, visual_seed: int) -> None:
        """Give the model the look of a visual seed. Nothing remains from the look before."""
        model, on = self.physics.model.ptr, self.factors
        look = draw_look(visual_seed, self.textures.count("skies"), self.textures.count("floors"))
        for kind, slot in self._slots:
            if slot.write(self.textures.picture(kind, look.sky if kind == "skies" else look.floor)):
                self._renderer.upload_texture(slot.index)
        for factor, name, colour in (
            ("body", "self", look.body),
            ("body", "skin", look.body),  # of the dog; its texture is tinted
            ("body", "effector", look.effector),
            ("target", "target", look.target),
        ):
            if factor in on and self._materials[name] is not None:
                model.mat_rgba[self._materials[name]] = colour
        if "reflectance" in on and self._materials["grid"] is not None:
            model.mat_reflectance[self._materials["grid"]] = look.reflectance
        if "light" in on:
            head = model.vis.headlight
            head.ambient[:], head.diffuse[:], head.specular[:] = look.ambient, look.diffuse, look.specular
        self._mount_view(_Draws(visual_seed, _VIEW_STREAM))

    def _mount_view(self, draws: _Draws) -> None:
        """Place camera and lamp. Always draws for both, so switching one off does not move the other."""
        view, model = self._view, self.physics.model.ptr
        camera, rotation = self._mount.position, None
        if view.camera is not None:
            camera = draws.box(view.camera)
        elif self._generic:
            half = np.tan(np.radians(model.cam_fovy[self.camera] / 2)) * float(np.linalg.norm(self._mount.position))
            reach = GENERIC[0] * float(half)
            camera = self._mount.position + draws.box(((-reach, reach),) * 3)
        if view.euler is not None:
            rotation = euler_rotation(draws.box(view.euler).tolist())
        elif view.tilt is not None:
            up = np.array([0.0, draws.uniform(*view.tilt), 1.0])
            up /= np.linalg.norm(up)
            right = np.array([1.0, 0.0, 0.0])
            rotation = np.stack([right, up, np.cross(right, up)], axis=1)
        if "camera" in self.factors:
            self._mount.place(camera, rotation)
        if self._lamp is None:
            return
        lamp = None
        if view.lamp is not None:
            lamp = draws.box(view.lamp)
        elif self._generic:
            reach = GENERIC[1] * abs(float(self._lamp.position[2]))
            lamp = self._lamp.position + draws.box(((-reach, reach),) * 3)
        colours = [draws.grey(level, 0.02) for level in (view.lamp_diffuse, view.lamp_specular) if level is not None]
        if "light" in self.factors and lamp is not None:
            self._lamp.place(lamp)
            for name, colour in zip(("light_diffuse", "light_specular"), colours, strict=False):
                getattr(model, name)[self._lamp_index] = colour

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {
            "factors": list(self.factors),
            "visual_seed": self._fixed,
            "textures": self.textures.describe(),
        }


def _check_seed(seed: Any) -> int | None:
    return None if seed is None else int(in_range("visual_seed", seed, 1, SEEDS, whole=True))
