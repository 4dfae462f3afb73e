"""Exact masks of the agent from MuJoCo's segmentation rendering (MaskLAM: "simulator mask").

A pixel is in the mask if it shows a part of the robot: in dm_control everything not welded to the world (geoms, their sites, strings and
skins), in Meta-World the kinematic subtree of the first body of the world with "base" in its name. Objects in front of the agent hide it.
Parts more transparent than `SOLID` are ignored, as in `localmotion.envs.truth_mujoco`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import EnvError

SOLID = 0.5


SCENERY, AGENT, OTHER = 0, 1, 2


@dataclass(frozen=True)
class Layers:
    """Masks (S, S) bool: ``agent``; ``sky``, pixels without any part of the scene; ``scenery``, the sky and everything fixed to the
    world except targets. Objects and targets are in none of them.
    """

    agent: NDArray[np.bool_]
    sky: NDArray[np.bool_]
    scenery: NDArray[np.bool_]


@dataclass(frozen=True)
class AgentParts:
    """`SCENERY`, `AGENT` or `OTHER` for each geom and site, uint8; ``soft``: for tendons, skins and flexible bodies."""

    geoms: NDArray[np.uint8]
    sites: NDArray[np.uint8]
    soft: int


def moving_parts(model: Any) -> AgentParts:
    """dm_control: the agent is everything not welded to the world; other geoms named or painted "target" are not scenery."""
    return _sorted(model, np.asarray(model.body_weldid) != 0, soft=AGENT)


def subtree_parts(model: Any, word: str = "base") -> AgentParts:
    """Meta-World: the agent is the subtree of the first child of the world whose name contains ``word``. Raises EnvError if there is
    none."""
    parents = np.asarray(model.body_parentid)
    root = next((i for i in range(1, model.nbody) if parents[i] == 0 and word in model.body(i).name), None)
    if root is None:
        raise EnvError(f"no agent mask: the model has no body named {word!r} at its root")
    inside = np.zeros(model.nbody, bool)
    inside[root] = True
    for body in range(root + 1, model.nbody):  # parents come before their children
        inside[body] |= inside[parents[body]]
    return _sorted(model, inside, soft=OTHER)


def _sorted(model: Any, agent: NDArray[np.bool_], soft: int) -> AgentParts:
    """Parts by the flags (bodies,) of the agent's bodies."""
    moves = (np.asarray(model.body_weldid) != 0) | (np.asarray(model.body_mocapid) >= 0)
    painted = np.array([i >= 0 and "target" in model.material(int(i)).name for i in model.geom_matid], bool)
    aims = painted | np.array(["target" in model.geom(i).name for i in range(model.ngeom)], bool)
    bodies = np.where(agent, AGENT, np.where(moves, OTHER, SCENERY)).astype(np.uint8)
    geoms, sites = bodies[model.geom_bodyid], bodies[model.site_bodyid]
    geoms[aims & (geoms == SCENERY)] = OTHER
    sites[sites == SCENERY] = OTHER  # goals are sites
    return AgentParts(geoms, sites, soft)


def segment(renderer: Any, model: Any, data: Any, parts: AgentParts, size: int | None = None) -> Layers:
    """Render the segmentation of the current state at (S, S), without lights, in about a third of a picture's time.

    Args:
        renderer: the environment's `SceneRenderer`, so meshes, camera and rotation are those of its pictures.
        model, data: mujoco.MjModel and mujoco.MjData.
        parts: which parts are the agent.
        size: S; None for the renderer's own.
    """
    import mujoco as mj

    renderer._enter()
    scene, context, side = renderer._scene, renderer._context, size or renderer.size
    if side > context.offWidth:
        mj.mjr_resizeOffscreen(side, side, context)
    mj.mjv_updateScene(model, data, renderer._options, None, renderer.camera, mj.mjtCatBit.mjCAT_ALL.value, scene)
    table = np.zeros(scene.ngeom + 1, np.uint8)
    kinds = {int(mj.mjtObj.mjOBJ_GEOM): parts.geoms, int(mj.mjtObj.mjOBJ_SITE): parts.sites}
    soft = {int(mj.mjtObj.mjOBJ_TENDON), int(mj.mjtObj.mjOBJ_SKIN), int(mj.mjtObj.mjOBJ_FLEX)}
    for geom in scene.geoms[: scene.ngeom]:
        kind = geom.objtype
        if geom.rgba[3] < SOLID:
            geom.segid = -1  # MuJoCo's code for: not in this rendering
        elif geom.segid >= 0:
            table[geom.segid + 1] = kinds[kind][geom.objid] if kind in kinds else parts.soft if kind in soft else OTHER
    flags = (mj.mjtRndFlag.mjRND_SEGMENT, mj.mjtRndFlag.mjRND_IDCOLOR)
    before = [scene.flags[flag] for flag in flags]
    rect, colours = mj.MjrRect(0, 0, side, side), np.empty((side, side, 3), np.uint8)
    try:
        for flag in flags:
            scene.flags[flag] = 1
        mj.mjr_render(rect, scene, context)
        mj.mjr_readPixels(colours, None, rect, context)
    finally:
        for flag, value in zip(flags, before, strict=True):
            scene.flags[flag] = value
    # As SceneRenderer.frame: OpenGL's first row is the bottom one, and some cameras are mounted upside down.
    turned = colours[:, ::-1] if renderer._upside_down else colours[::-1]
    codes = turned[..., 0] + 256 * turned[..., 1].astype(np.int64) + 65536 * turned[..., 2].astype(np.int64)
    kinds_seen = table[codes]
    return Layers(kinds_seen == AGENT, codes == 0, kinds_seen == SCENERY)
