"""Fast pictures of a MuJoCo scene: one persistent context at the exact size, in one of two qualities.

In software OpenGL vertices and shadow maps take the time, not pixels (measure with benchmarks/bench_env.py): the 4096 x 4096 shadow
map and four samples per pixel of MuJoCo's defaults, round bodies of 28 x 16 facets and meshes of ten thousands of triangles, all drawn
again for each light with shadows and for reflections. `fast` keeps the lights, shadows and reflections but draws them with a
small map, one sample, fewer facets and simplified meshes. Rendering without shadows would be faster, but floors become up to a
third darker: without the extra pass for shadows MuJoCo adds all lights before it clips them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.gl import choose_gl, current_context, register
from localmotion.envs.meshes import simplified
from localmotion.errors import ConfigError, EnvError, unknown_name

Quality = Literal["fast", "reference", "auto"]
QUALITIES = ("fast", "reference", "auto")
MAX_GEOMS = 5000
FAST = {"offsamples": 0, "shadowsize": 128, "numslices": 12, "numstacks": 8, "numquads": 2}
"""MuJoCo's ``visual/quality`` settings in `fast`; `reference` keeps the model's own."""


def resolve_quality(quality: str) -> Literal["fast", "reference"]:
    """`auto` is `fast` on software OpenGL and `reference` on a GPU. Raises ConfigError for another word."""
    if quality not in QUALITIES:
        raise unknown_name("rendering quality", quality, QUALITIES)
    if quality == "auto":
        return "fast" if choose_gl().software else "reference"
    return "fast" if quality == "fast" else "reference"


def camera_id(model: Any, camera: str | int, where: str) -> int:
    """Number of a camera given by name or number. Raises ConfigError naming the model's cameras."""
    names = [model.camera(i).name for i in range(model.ncam)]
    if isinstance(camera, str):
        if camera not in names:
            raise unknown_name(f"camera of {where}", camera, [name for name in names if name])
        return names.index(camera)
    if not 0 <= camera < model.ncam:
        raise ConfigError(f"camera {camera} of {where} does not exist: there are {model.ncam} ({', '.join(names)})")
    return int(camera)


class SceneRenderer:
    """Draws one model from one camera.

    Args:
        model: mujoco.MjModel. It is only read; settings changed while the context is built are restored.
        size: side of the square picture in pixels.
        camera: number of the model's camera.
        quality: "fast" or "reference".
        upside_down: rotate every picture by 180 degrees (for cameras mounted upside down).
    """

    def __init__(
        self, model: Any, *, size: int, camera: int, quality: Literal["fast", "reference"], upside_down: bool = False
    ) -> None:
        current_context()  # sets MUJOCO_GL before MuJoCo is imported
        import mujoco

        self._mujoco = mujoco
        self._owner = (os.getpid(), threading.get_ident())
        self._model, self.size, self.quality, self._upside_down = model, size, quality, upside_down
        self._scene = mujoco.MjvScene(model, MAX_GEOMS)
        self._options = mujoco.MjvOption()
        self._options.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = False  # as in dm_control: do not draw rays of sensors
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.camera.fixedcamid = camera
        self._buffers: dict[int, NDArray[np.uint8]] = {}
        with _drawn_with(model, quality, size):
            self._context: Any = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        register(self)

    def frame(self, data: Any, size: int | None = None) -> NDArray[np.uint8]:
        """Draw mujoco.MjData ``data``: (S, S, 3) uint8 RGB, a new array; S is ``size`` or the renderer's own.

        Raises:
            EnvError: closed, or called from a thread or process that did not make it.
        """
        self._enter()
        mj, side = self._mujoco, size or self.size
        if side > self._context.offWidth:
            mj.mjr_resizeOffscreen(side, side, self._context)
        pixels = self._buffers.get(side)
        if pixels is None:
            pixels = self._buffers[side] = np.empty((side, side, 3), np.uint8)
        rect = mj.MjrRect(0, 0, side, side)
        mj.mjv_updateScene(self._model, data, self._options, None, self.camera, mj.mjtCatBit.mjCAT_ALL.value, self._scene)
        mj.mjr_render(rect, self._scene, self._context)
        mj.mjr_readPixels(pixels, None, rect, self._context)
        # OpenGL's first row is the bottom one; turning by 180 degrees undoes that flip and mirrors the columns.
        turned = pixels[:, ::-1] if self._upside_down else pixels[::-1]
        return np.ascontiguousarray(turned)

    def upload_texture(self, index: int) -> None:
        """Send texture ``index`` of the model to OpenGL again, after its bytes were changed."""
        self._enter()
        self._mujoco.mjr_uploadTexture(self._model, self._context, index)

    def upload_height_fields(self) -> None:
        """Send the model's height fields again; some tasks change their terrain at a reset."""
        if self._model.nhfield:
            self._enter()
            for index in range(self._model.nhfield):
                self._mujoco.mjr_uploadHField(self._model, self._context, index)

    def _enter(self) -> None:
        if self._context is None:
            raise EnvError("this environment is closed; make a new one")
        if self._owner != (os.getpid(), threading.get_ident()):
            raise EnvError("an environment draws only in the process and thread that made it; make it where it is stepped")
        current_context()
        # Renderers share one GL context, so the last one's buffer is still bound.
        self._mujoco.mjr_setBuffer(self._mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def close(self) -> None:
        """Free the OpenGL objects. Safe to call twice."""
        context, self._context = getattr(self, "_context", None), None
        # In another thread or a forked child these OpenGL names belong to another context; keep them.
        if context is not None and self._owner == (os.getpid(), threading.get_ident()):
            current_context()
            context.free()

    def __del__(self) -> None:
        self.close()


@contextmanager
def _drawn_with(model: Any, quality: str, size: int) -> Iterator[None]:
    """Context with quality settings while an OpenGL context is built, which reads them only then; restored afterwards."""
    area, settings = model.vis.global_, model.vis.quality
    before = {name: getattr(settings, name) for name in FAST}
    sides = area.offwidth, area.offheight
    area.offwidth = area.offheight = size
    try:
        if quality == "fast":
            for name, value in FAST.items():
                setattr(settings, name, min(value, before[name]))
            with simplified(model):
                yield
        else:
            yield
    finally:
        area.offwidth, area.offheight = sides
        for name, value in before.items():
            setattr(settings, name, value)
