"""Fewer triangles for the drawing of meshes: what a picture of 64 or 128 pixels cannot show need not be drawn.

Meta-World's robot has 67,000 triangles, most of them smaller than a pixel. Vertices that share a cell of a cubic grid are merged to their
mean, triangles that collapse are dropped. Only what OpenGL is given changes: the physics keeps the full meshes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

CELL = 0.0053
"""Side of a grid cell as a part of the model's extent: 12 mm in Meta-World, where a pixel of 64 is about 25 mm wide."""
_ARRAYS = ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum")


def merge_vertices(
    vertices: NDArray[np.floating[Any]], faces: NDArray[np.integer[Any]], cell: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Cluster (V, 3) ``vertices`` in cubes of side ``cell``: their new positions (V, 3) and the numbers of the (F, 3) ``faces`` to keep.

    Vertices of one cube get the same position, their mean, so every vertex moves by less than the cube's diagonal. A face is kept when its
    corners are in three cubes and no earlier face has the same three in the same turning direction.
    """
    keys = np.floor((vertices - vertices.min(axis=0)) / cell).astype(np.int64)
    _, cube = np.unique(keys, axis=0, return_inverse=True)
    cube = cube.ravel()
    counts = np.bincount(cube)
    means = np.stack([np.bincount(cube, vertices[:, axis]) / counts for axis in range(3)], axis=1)
    corners = cube[faces]
    whole = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]) & (corners[:, 0] != corners[:, 2])
    # Turn each triangle so that its lowest cube comes first: equal triangles become equal rows, mirrored ones do not.
    start = corners.argmin(axis=1)[:, None]
    turned = np.take_along_axis(corners, (start + np.arange(3)) % 3, axis=1)
    candidates = np.flatnonzero(whole)
    _, first = np.unique(turned[candidates], axis=0, return_index=True)
    return means[cube], candidates[np.sort(first)]


@contextmanager
def simplified(model: Any) -> Iterator[None]:
    """Within the block ``model`` (mujoco.MjModel) has simplified meshes; afterwards its own again, bit for bit."""
    before = {name: getattr(model, name).copy() for name in _ARRAYS}
    cell = CELL * model.stat.extent
    try:
        for mesh in range(model.nmesh):
            vertices = _part(model.mesh_vertadr[mesh], model.mesh_vertnum[mesh])
            faces = _part(model.mesh_faceadr[mesh], model.mesh_facenum[mesh])
            moved, keep = merge_vertices(model.mesh_vert[vertices], model.mesh_face[faces], cell)
            if len(keep) < 12:
                continue  # smaller than a few cells: a box would be too little
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
