"""Simplified meshes: what may move, what may go, and that the physics never sees it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from localmotion.envs.gl import choose_gl
from localmotion.envs.meshes import merge_vertices, simplified
from property_examples import examples

choose_gl()
import mujoco  # noqa: E402


@examples(50)
@given(seed=st.integers(0, 10**6), count=st.integers(4, 60), cell=st.floats(0.01, 0.8), levels=st.integers(0, 3))
def test_vertices_stay_within_a_cell_and_faces_stay_whole(seed: int, count: int, cell: float, levels: int) -> None:
    rng = np.random.default_rng(seed)
    vertices = rng.uniform(-1, 1, (count, 3))
    faces = rng.integers(0, count, (count * 2, 3))
    moved, keep = merge_vertices(vertices, faces, cell, levels, 0.5)
    assert np.linalg.norm(moved - vertices, axis=1).max() <= 2**levels * cell * np.sqrt(3) + 1e-9
    assert (np.diff(keep) > 0).all()
    corners = moved[faces[keep]]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (np.abs(corners[:, a] - corners[:, b]).max(axis=1) > 0).all()


def test_a_fine_cell_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    vertices = rng.uniform(0, 1, (30, 3))
    faces = np.array([[0, 1, 2], [1, 2, 0], [2, 1, 0], [3, 4, 5]])
    moved, keep = merge_vertices(vertices, faces, 1e-7)
    np.testing.assert_allclose(moved, vertices)
    # The second face is the first turned, so it goes; the third is its back side, so it stays.
    np.testing.assert_array_equal(keep, [0, 2, 3])


def test_flat_ground_is_merged_and_edges_and_bends_are_kept() -> None:
    """A fine square with a ridge along its middle: the two halves need few triangles, the ridge stays where it is."""
    side = np.linspace(0, 1, 41)
    x, y = np.meshgrid(side, side, indexing="ij")
    vertices = np.stack([x, y, 0.3 - 0.6 * np.abs(x - 0.5)], -1).reshape(-1, 3)
    corner = (np.arange(40)[:, None] * 41 + np.arange(40)).ravel()
    faces = np.concatenate([np.stack([corner, corner + 41, corner + 1], 1), np.stack([corner + 1, corner + 41, corner + 42], 1)])
    _, plain = merge_vertices(vertices, faces, 0.06)
    moved, keep = merge_vertices(vertices, faces, 0.06, 2, 0.1)
    assert len(keep) < len(plain) / 2 < len(faces) / 8
    used = moved[np.unique(faces[keep])]
    assert np.abs(used[:, 2] - (0.3 - 0.6 * np.abs(used[:, 0] - 0.5))).max() < 0.1 * 0.06 * 3  # on the surface
    assert used[:, 2].max() > 0.27
    assert np.ptp(used[:, 0]) > 0.8


def _sphere(rings: int) -> str:
    theta, phi = np.meshgrid(np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, 2 * rings, endpoint=False))
    points = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1).reshape(-1, 3)
    text = " ".join(f"{v:.5f}" for v in points.ravel())
    return (
        f'<mujoco><asset><mesh name="ball" vertex="{text}"/></asset><worldbody><body>'
        '<joint type="slide" axis="0 0 1"/><geom type="mesh" mesh="ball"/></body></worldbody></mujoco>'
    )


def test_the_model_is_put_back_bit_for_bit() -> None:
    model = mujoco.MjModel.from_xml_string(_sphere(40))
    names = ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum", "mesh_normal", "mesh_graph")
    before = {name: getattr(model, name).copy() for name in names}
    model.stat.extent = 40.0  # cells of a fifth of the ball's radius
    with simplified(model):
        assert 12 <= model.mesh_facenum[0] < before["mesh_facenum"][0] / 3
        used = model.mesh_vert[model.mesh_face[: model.mesh_facenum[0]]]
        radius = np.linalg.norm(used, axis=-1)
        assert radius.min() > 0.9
        assert radius.max() < 1.1
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(model, name), value)
