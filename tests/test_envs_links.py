"""Places of the links in the picture: exact flow and the truth of rendered scenes say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from localmotion.envs import make_env
from localmotion.envs.truth import Anchors, motion_truth
from localmotion.errors import EnvError


def actions(env: Any, count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, *env.action_space.shape)).astype(np.float32)


def geom_of(model: Any, body: str) -> int:
    return int(np.flatnonzero(model.geom_bodyid == model.body(body).id)[0])


@pytest.mark.parametrize("task", ["walker_run", "swimmer_swimmer6"])
def test_links_of_planar_bodies_move_like_exact_flow_at_their_centres(task: str) -> None:
    """Within a part flow is affine, so it is exact between four pixels of one part, and its slope is the rotation."""
    env: Any = make_env(f"planar:{task}", size=128)
    env.reset(seed=0)
    model = env.physics.model.ptr
    geoms = [geom_of(model, name) for name in env.link_names]
    compared, largest = 0, 0.0
    for action in actions(env, 8):
        before, ids = env.link_places(), env.part_ids()
        env.step(action)
        moved, flow = env.link_places() - before, env.exact_flow().astype(np.float64)
        for link, geom in enumerate(geoms):
            x, y = before[link, :2]
            if not (0 <= x < 127 and 0 <= y < 127):
                continue
            left, top = int(x), int(y)
            if not (ids[top : top + 2, left : left + 2] == geom).all():
                continue
            corner, right, below = flow[top, left], flow[top, left + 1], flow[top + 1, left]
            wanted = corner + (x - left) * (right - corner) + (y - top) * (below - corner)
            np.testing.assert_allclose(moved[link, :2], wanted, atol=2e-3)
            turn = np.arctan2((right - corner)[1], 1 + (right - corner)[0])
            assert (moved[link, 2] - turn + np.pi) % (2 * np.pi) - np.pi == pytest.approx(0, abs=1e-4)
            compared, largest = compared + 1, max(largest, float(np.abs(moved[link]).max()))
    assert compared > 15
    assert largest > 0.5


@pytest.mark.parametrize("name", ["dmc:walker_run", "metaworld:reach"])
def test_links_of_rendered_scenes_are_where_truth_finds_points_of_their_geoms(name: str) -> None:
    env: Any = make_env(name, size=64, quality="fast")
    env.show("vectors")  # no picture before the places
    env.reset(seed=0)
    scene = env.physics if hasattr(env, "physics") else env.inner
    model, data = (getattr(x, "ptr", x) for x in (scene.model, scene.data))
    bodies = [model.body(body).id for body in env.link_names]
    geoms = np.array([geom_of(model, body) for body in env.link_names])
    local = np.einsum("nji,nj->ni", data.geom_xmat[geoms].reshape(-1, 3, 3), data.xipos[bodies] - data.geom_xpos[geoms])
    truth, first = motion_truth(env), env.link_places()
    anchors = Anchors(geoms.astype(np.int32), local)  # the centres, fixed to a geom of each link
    for action in actions(env, 3):
        env.step(action)
        places = env.link_places()
        points, _ = truth.locate(truth.snapshot(), anchors)
        np.testing.assert_allclose(places[:, :2], points, atol=1e-6)
    moved = np.abs(env.link_places() - first)
    assert moved[:, :2].max() > 0.4
    assert moved[:, 2].max() > 0.001
    np.testing.assert_allclose(env.link_places(32)[:, :2], (points + 0.5) / 2 - 0.5, atol=1e-6)
    env.close()


def test_angles_are_those_of_the_joints_whatever_draws_the_body() -> None:
    """The torso's joint turns about an axis into the picture, and both cameras look along it."""
    found = []
    for suite in ("dmc", "planar"):
        env: Any = make_env(f"{suite}:cheetah_run", size=32)
        env.reset(seed=1)
        env.step(np.ones(6, np.float32))
        found.append(env.link_places()[:, 2])
        position = env.physics.data.qpos[2]
        env.close()
    assert found[0][0] == pytest.approx(position, abs=1e-9)
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)


def test_the_link_of_a_toy_is_its_agent() -> None:
    env: Any = make_env("toy:dot", size=32)
    env.reset(seed=0)
    assert env.link_names == ("agent",)
    before = env.link_places()
    env.step(np.array([1, -1], np.float32))
    moved, mask = env.link_places() - before, env.true_mask()
    assert env.link_places()[0].tolist() == [*np.argwhere(mask)[0][::-1], 0]
    np.testing.assert_array_equal(moved[0, :2], env.true_flow()[0][int(before[0, 1]), int(before[0, 0])])
    assert np.abs(moved).max() >= 1


@pytest.mark.parametrize("name", ["planar:walker_run", "dmc:walker_run", "toy:dot"])
def test_no_link_has_a_place_before_the_first_reset(name: str) -> None:
    env: Any = make_env(name, size=32)
    with pytest.raises(EnvError, match="reset"):
        env.link_places()
    env.close()
