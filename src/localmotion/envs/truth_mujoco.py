"""Ground truth of motion in MuJoCo scenes.

A segmentation and depth rendering by the environment's own renderer gives the surface point of each pixel (in `fast` quality, of the
simplified meshes). The point is fixed to its geom, moved with the geom's pose and projected with the later camera. Depth only determines
*which* point of the geom it is: an error of depth moves the point along its line of sight and affects the flow only through parallax.

Followed: geoms of all types (also infinite planes, and height fields until they change) and drawn sites (targets, handles), which are
rigid parts like geoms. Geoms and sites with an opacity below `SOLID` are ignored, because the picture mostly shows what is behind them.
 Not followed (`UNKNOWN`, never valid): tendons, skins and flexible bodies, which are not rigid. The sky is
infinitely far; if a film plays on it, pass ``sky="unknown"``. Pixels of an environment's ``painted_mask`` are unknown, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import PixelEnv
from localmotion.envs.truth import SKY, UNKNOWN, Anchors, MotionTruth, Snapshot, look_up, pixel_grid
from localmotion.errors import EnvError, unknown_name

SOLID = 0.5
DEPTH_TOLERANCE = 0.002
"""Tolerance of a point's depth relative to the visible surface, as a share of the distance, in addition to the surface's slope."""


@dataclass(frozen=True)
class Camera:
    """A pinhole: ``position`` (3,), ``rotation`` (3, 3) from world to x right, y down, z forward of the drawn picture before turning it,
    ``focal`` and ``centre`` (2,) in pixels; a picture turned by 180 degrees has negative focal lengths. Pixel (0, 0) is a centre.
    """

    position: NDArray[np.float64]
    rotation: NDArray[np.float64]
    focal: NDArray[np.float64]
    centre: NDArray[np.float64]
    near: float
    far: float

    def rays(self, points: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """(N, 3) world vectors through (N, 2) pixels, one unit of depth long."""
        flat = (np.asarray(points, np.float64) - self.centre) / self.focal
        return np.column_stack([flat, np.ones(len(flat))]) @ self.rotation

    def project(self, vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(N, 3) world vectors from the camera: (N, 2) pixels, NaN behind the camera, and depth (N,)."""
        seen = vectors @ self.rotation.T
        depth = seen[:, 2]
        safe = np.where(depth > 0, depth, np.nan)
        return seen[:, :2] / safe[:, None] * self.focal + self.centre, depth


@dataclass(frozen=True)
class SceneSnapshot(Snapshot):
    """Poses, camera, depth and segmentation at one time. ``ident`` counts geoms, then sites, then the world itself.

    depth     (S, S) float32   along the optical axis, in the model's length unit; inf in the sky
    slope     (S, S) float32   largest difference of depth to neighbouring pixels of the same part
    position  (G, 3), rotation (G, 3, 3) float64  pose of every part
    """

    depth: NDArray[np.float32]
    slope: NDArray[np.float32]
    position: NDArray[np.float64]
    rotation: NDArray[np.float64]
    camera: Camera


def scene_camera(scene: Any, side: int, upside_down: bool, name: str) -> Camera:
    """The camera of a mujoco.MjvScene, for a picture of ``side`` pixels that is turned by 180 degrees if ``upside_down``.

    ``name`` is the environment's, for errors. Raises EnvError for an orthographic camera.
    """
    left, right = scene.camera[0], scene.camera[1]  # a stereo pair; the picture is drawn from between them
    if left.orthographic:
        raise EnvError(f"{name}: no ground truth for an orthographic camera; choose another camera")
    forward, up = np.array(left.forward, np.float64), np.array(left.up, np.float64)
    half = (left.frustum_top - left.frustum_bottom) / 2
    middle = (left.frustum_top + left.frustum_bottom) / 2
    wide = left.frustum_width / 2 or half  # zero means: from the picture's aspect ratio
    aside = (left.frustum_center + right.frustum_center) / 2
    near = float(left.frustum_near)
    focal = np.array([near / wide, near / half]) * side / 2
    centre = (np.array([-aside / wide, middle / half]) + 1) * side / 2 - 0.5
    if upside_down:
        focal, centre = -focal, side - 1 - centre
    return Camera(
        position=(np.array(left.pos, np.float64) + np.array(right.pos, np.float64)) / 2,
        rotation=np.stack([np.cross(forward, up), -up, forward]),
        focal=focal,
        centre=centre,
        near=near,
        far=float(left.frustum_far),
    )


class MujocoTruth(MotionTruth):
    """Exact motion of an environment with a MuJoCo scene (dmc, metaworld and suites built on them).

    Args:
        env: it must have been reset before the first snapshot. It is only read; its pictures do not change.
        sky: "camera": the sky is infinitely far; "unknown": something else is painted over it.

    Raises:
        EnvError: the environment draws no MuJoCo scene.
        ConfigError: another value of ``sky``.
    """

    def __init__(self, env: PixelEnv, sky: Literal["camera", "unknown"] = "camera") -> None:
        if sky not in ("camera", "unknown"):
            raise unknown_name("sky", sky, ("camera", "unknown"))
        if not hasattr(env, "_renderer") or not (hasattr(env, "physics") or hasattr(env, "inner")):
            raise EnvError(f"{env.name}: no ground truth, it draws no MuJoCo scene; use a dmc, metaworld or toy environment")
        import mujoco

        self._mj, self._env, self._sky = mujoco, env, SKY if sky == "camera" else UNKNOWN

    def _model_and_data(self) -> tuple[Any, Any]:
        env: Any = self._env
        if hasattr(env, "physics"):
            return env.physics.model.ptr, env.physics.data.ptr
        return env.inner.model, env.inner.data

    # -- rendering ------------------------------------------------------------------------------------------------------

    def snapshot(self, size: int | None = None) -> SceneSnapshot:
        """Store the current state; one extra rendering without light or shadow (1 to 2 ms in software OpenGL).

        Raises:
            EnvError: before the first reset; an orthographic camera.
        """
        env: Any = self._env
        if not env._begun:
            raise EnvError(f"{env.name}: call reset() before snapshot()")
        model, data = self._model_and_data()
        side = size or env.draw_size
        codes, nearness, table, camera = self._render(model, data, side)
        depth = camera.near * camera.far / (camera.near + nearness.astype(np.float64) * (camera.far - camera.near))
        ident = table[codes]
        ident[codes == 0] = self._sky
        if hasattr(env, "painted_mask"):
            ident[env.painted_mask(side)] = UNKNOWN
        metric: NDArray[np.float32] = np.where(codes == 0, np.inf, depth).astype(np.float32)
        return SceneSnapshot(
            ident=ident,
            depth=metric,
            slope=_slope(metric, ident),
            position=np.concatenate([data.geom_xpos, data.site_xpos, np.zeros((1, 3))]),
            rotation=np.concatenate([data.geom_xmat, data.site_xmat, np.eye(3).reshape(1, 9)]).reshape(-1, 3, 3),
            camera=camera,
        )

    def _render(
        self, model: Any, data: Any, side: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32], Camera]:
        """Codes (S, S), 0 for the sky; depth buffer (S, S), 1 at the near plane; part of each code; the camera."""
        env: Any = self._env
        renderer = env._renderer
        renderer._enter()
        mj, scene, context = self._mj, renderer._scene, renderer._context
        if side > context.offWidth:
            mj.mjr_resizeOffscreen(side, side, context)
        everything = mj.mjtCatBit.mjCAT_ALL.value
        mj.mjv_updateScene(model, data, renderer._options, None, renderer.camera, everything, scene)
        table = np.full(scene.ngeom + 1, UNKNOWN, np.int32)
        kinds = {int(mj.mjtObj.mjOBJ_GEOM): 0, int(mj.mjtObj.mjOBJ_SITE): model.ngeom}
        for geom in scene.geoms[: scene.ngeom]:
            if geom.rgba[3] < SOLID:
                geom.segid = -1  # MuJoCo's code for: not in this rendering
            elif geom.segid >= 0 and geom.objtype in kinds:
                table[geom.segid + 1] = kinds[geom.objtype] + geom.objid
        flags = (mj.mjtRndFlag.mjRND_SEGMENT, mj.mjtRndFlag.mjRND_IDCOLOR)
        before = [scene.flags[flag] for flag in flags], context.readDepthMap
        rect = mj.MjrRect(0, 0, side, side)
        colours, nearness = np.empty((side, side, 3), np.uint8), np.empty((side, side), np.float32)
        try:
            for flag in flags:
                scene.flags[flag] = 1
            context.readDepthMap = mj.mjtDepthMap.mjDEPTH_ZEROFAR  # keeps precision at large distances
            mj.mjr_render(rect, scene, context)
            mj.mjr_readPixels(colours, nearness, rect, context)
        finally:
            for flag, value in zip(flags, before[0], strict=True):
                scene.flags[flag] = value
            context.readDepthMap = before[1]
        # As SceneRenderer.frame: OpenGL's first row is the bottom one, and some cameras are mounted upside down.
        turn = (slice(None), slice(None, None, -1)) if renderer._upside_down else (slice(None, None, -1), slice(None))
        codes = colours[turn].astype(np.int64) @ np.array([1, 256, 65536])
        return codes, np.ascontiguousarray(nearness[turn]), table, scene_camera(scene, side, renderer._upside_down, env.name)

    # -- MotionTruth ----------------------------------------------------------------------------------------------------

    def anchor(self, at: SceneSnapshot, points: NDArray[np.floating[Any]]) -> Anchors:
        """Points on the surfaces of the nearest pixels, on the line of sight through the exact point."""
        ident, rows, columns = look_up(at, points)
        world = at.camera.rays(points) * self._depth(at, points, ident, rows, columns)[:, None] + at.camera.position
        local = at.camera.rays(points)  # for the sky only the direction matters
        solid = ident >= 0
        part = ident[solid]
        local[solid] = np.einsum("nji,nj->ni", at.rotation[part], world[solid] - at.position[part])
        return Anchors(ident, local)

    @staticmethod
    def _depth(
        at: SceneSnapshot,
        points: NDArray[np.floating[Any]],
        ident: NDArray[np.int32],
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """(N,) depth at points between pixel centres: 1 / depth is linear over a plane, so it is interpolated within the part."""
        inverse = 1.0 / at.depth[rows, columns].astype(np.float64)
        result = inverse.copy()
        points = np.asarray(points, np.float64)
        last = at.size - 1
        for axis, line in enumerate((columns, rows)):
            offset = points[:, axis] - line
            step = np.where(offset < 0, -1, 1)
            neighbour = np.clip(line + step, 0, last)
            place = (rows, neighbour) if axis == 0 else (neighbour, columns)
            same = (at.ident[place] == ident) & (neighbour != line)
            result += np.where(same, np.abs(offset) * (1.0 / at.depth[place] - inverse), 0.0)
        return np.where(result > 0, 1.0 / np.where(result > 0, result, 1.0), 1.0)

    def locate(self, at: SceneSnapshot, anchors: Anchors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Anchored points moved with their parts and projected with this snapshot's camera."""
        vectors = anchors.local.copy()
        solid = anchors.ident >= 0
        part = anchors.ident[solid]
        world = at.position[part] + np.einsum("nij,nj->ni", at.rotation[part], anchors.local[solid])
        vectors[solid] = world - at.camera.position
        points, depth = at.camera.project(vectors)
        points[anchors.ident == UNKNOWN] = np.nan
        return points, np.where(anchors.ident == SKY, np.inf, depth)

    def _agrees(
        self, at: SceneSnapshot, rows: NDArray[np.int64], columns: NDArray[np.int64], depth: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """The near side of a part hides its far side, so depths must agree within the tolerance and the surface's slope."""
        far = np.isinf(depth)
        safe = np.where(far, 0.0, depth)
        found = np.where(far, 0.0, at.depth[rows, columns].astype(np.float64))
        return far | (np.abs(found - safe) <= DEPTH_TOLERANCE * safe + at.slope[rows, columns])

    def foreground(self, at: SceneSnapshot) -> NDArray[np.bool_]:
        """(S, S) pixels of geoms and sites on bodies that are not welded to the world (or that the task moves: mocap bodies)."""
        model, _ = self._model_and_data()
        free = (model.body_weldid != 0) | (model.body_mocapid >= 0)
        free[0] = False
        parts = np.concatenate([free[model.geom_bodyid], free[model.site_bodyid], [False]])
        return np.asarray((at.ident >= 0) & parts[np.maximum(at.ident, 0)])

    def camera_flow(self, a: SceneSnapshot, b: SceneSnapshot) -> NDArray[np.float32]:
        """(S, S, 2) flow if no part had moved in the world; zero where the part is unknown."""
        grid = pixel_grid(a.size)
        anchors = self.anchor(a, grid)
        solid = anchors.ident >= 0
        world = a.position[anchors.ident[solid]] + np.einsum("nij,nj->ni", a.rotation[anchors.ident[solid]], anchors.local[solid])
        local = anchors.local.copy()
        local[solid] = world
        fixed = Anchors(np.where(solid, len(a.position) - 1, anchors.ident).astype(np.int32), local)
        points, _ = self.locate(b, fixed)
        moved = np.where(np.isfinite(points), points - grid, 0.0)
        return moved.reshape(a.size, a.size, 2).astype(np.float32)


def _slope(depth: NDArray[np.float32], ident: NDArray[np.int32]) -> NDArray[np.float32]:
    """(S, S) largest difference of depth between a pixel and those of its four neighbours that show the same part."""
    finite = np.where(np.isfinite(depth), depth, 0.0)
    slope = np.zeros_like(finite)
    for axis in (0, 1):
        first = tuple(slice(None, -1) if k == axis else slice(None) for k in (0, 1))
        second = tuple(slice(1, None) if k == axis else slice(None) for k in (0, 1))
        step = np.where(ident[first] == ident[second], np.abs(finite[first] - finite[second]), 0.0).astype(np.float32)
        slope[first] = np.maximum(slope[first], step)
        slope[second] = np.maximum(slope[second], step)
    return slope
