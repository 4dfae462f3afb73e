"""Fewer triangles for drawing meshes, without details that a picture of 64 or 128 pixels cannot show.

Meta-World's robot has 67,000 triangles, most of them smaller than a pixel. Vertices in the same cell of a cubic grid are merged; where the
surface is nearly flat the cells are larger. Triangles that collapse are dropped. Only OpenGL's meshes change; the physics keeps the full
meshes. Clustering by quadrics is Lindstrom's (2000), the measure of flatness Garland and Heckbert's (1997).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

CELL = 0.0053
"""Side of the finest cell as a part of the model's extent: 12 mm in Meta-World, where a pixel of 64 is about 25 mm wide."""
LEVELS = 3
"""Maximum number of times that the cell is doubled where the surface is nearly flat."""
FLATNESS = 0.25
"""Limit of flatness: root mean square distance of the merged vertex from the planes of its triangles, in finest cells."""
_ARRAYS = ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum")


def merge_vertices(
    vertices: NDArray[np.floating[Any]], faces: NDArray[np.integer[Any]], cell: float, levels: int = 0, flatness: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Cluster (V, 3) ``vertices`` in cubes: their new positions (V, 3) and the numbers of the (F, 3) ``faces`` to keep.

    Cubes have side ``cell``, or up to 2 ** ``levels`` times that if one vertex stays within ``flatness`` cells (root mean square) of the
    planes of all triangles that touch the cube. Vertices of one cube get the same position inside it. A face is kept if
    its corners are in three cubes and no earlier face has the same three in the same orientation.
    """
    points = np.asarray(vertices, np.float64)
    quadrics = _quadrics(points, faces)
    low = points.min(axis=0)
    finest = np.floor((points - low) / cell).astype(np.int64)
    cube, moved = _merge(points, quadrics, finest, cell, low)[:2]
    for level in range(1, levels + 1):
        wider, target, error = _merge(points, quadrics, finest >> level, cell * 2**level, low)
        flat = error[wider] < (flatness * cell) ** 2
        cube = np.where(flat, wider + len(points) * level, cube)  # the levels have different numbers
        moved = np.where(flat[:, None], target, moved)
    corners = cube[faces]
    whole = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]) & (corners[:, 0] != corners[:, 2])
    # Rotate each triangle so its lowest cube comes first: equal triangles become equal rows, mirrored ones do not.
    start = corners.argmin(axis=1)[:, None]
    turned = np.take_along_axis(corners, (start + np.arange(3)) % 3, axis=1)
    candidates = np.flatnonzero(whole)
    _, first = np.unique(turned[candidates], axis=0, return_index=True)
    return moved, candidates[np.sort(first)]


def _quadrics(points: NDArray[np.float64], faces: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """(V, 11) sums over the triangles at each vertex, weighted by area: n n^T (6 values), -d n (3), d^2, area; n x = d is the plane."""
    a, b, c = (points[faces[:, k]] for k in range(3))
    normal = np.cross(b - a, c - a)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = normal / np.maximum(length, 1e-30)
    d = (normal * a).sum(1, keepdims=True)
    rows, columns = np.triu_indices(3)
    values = np.concatenate([normal[:, rows] * normal[:, columns], -d * normal, d * d, np.ones_like(d)], 1) * length / 2
    out = np.zeros((len(points), values.shape[1]))
    for k in range(3):
        np.add.at(out, faces[:, k], values)
    return out


def _merge(
    points: NDArray[np.float64], quadrics: NDArray[np.float64], keys: NDArray[np.int64], side: float, low: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Cube (V,) of each vertex, the merged position (V, 3) of its cube, and the mean squared distance of that from the cube's planes."""
    cells, cube = np.unique(keys, axis=0, return_inverse=True)
    cube = cube.ravel()
    counts = np.bincount(cube)
    mean = np.stack([np.bincount(cube, points[:, axis]) / counts for axis in range(3)], axis=1)
    q = np.stack([np.bincount(cube, quadrics[:, k]) for k in range(quadrics.shape[1])], axis=1)
    area = np.maximum(q[:, 10], 1e-30)
    matrix = np.empty((len(q), 3, 3))
    rows, columns = np.triu_indices(3)
    matrix[:, rows, columns] = matrix[:, columns, rows] = q[:, :6]
    # The point nearest to all planes; in free directions (edges, flat parts) it stays at the mean of the vertices.
    slope = (matrix @ mean[:, :, None])[:, :, 0] + q[:, 6:9]
    best = mean - (np.linalg.pinv(matrix, rcond=0.05, hermitian=True) @ slope[:, :, None])[:, :, 0]
    best = np.clip(best, low + cells * side, low + (cells + 1) * side)
    error = ((matrix @ best[:, :, None])[:, :, 0] * best).sum(1) + 2 * (q[:, 6:9] * best).sum(1) + q[:, 9]
    return cube, best[cube], np.maximum(error, 0) / area


@contextmanager
def simplified(model: Any) -> Iterator[None]:
    """Context in which ``model`` (mujoco.MjModel) has simplified meshes; afterwards its own are restored, bit for bit."""
    before = {name: getattr(model, name).copy() for name in _ARRAYS}
    cell = CELL * model.stat.extent
    try:
        for mesh in range(model.nmesh):
            vertices = _part(model.mesh_vertadr[mesh], model.mesh_vertnum[mesh])
            faces = _part(model.mesh_faceadr[mesh], model.mesh_facenum[mesh])
            moved, keep = merge_vertices(model.mesh_vert[vertices], model.mesh_face[faces], cell, LEVELS, FLATNESS)
            if len(keep) < 12:
                continue  # smaller than a few cells, too small to simplify
            kept = slice(faces.start, faces.start + len(keep))
            model.mesh_vert[vertices] = moved
            for name in ("mesh_face", "mesh_facenormal", "mesh_facetexcoord"):
                array = getattr(model, name)
                array[kept] = array[faces][keep]
            model.mesh_facenum[mesh] = len(keep)
        yield
    finally:
        for name, value in before.items():
            getattr(model, name)[:] = value


def _part(start: int, count: int) -> slice:
    return slice(int(start), int(start) + int(count))
