"""Generated planar trees: which bodies there are, that they are sound, their tasks, and the sealed ones.

No test builds a sealed body.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from localmotion.envs import check_env, list_envs, make_env
from localmotion.envs import planar_trees as trees
from localmotion.envs.planar_drawing import TARGET
from localmotion.errors import ConfigError

OPEN = (*trees.TRAIN, *trees.DEV)


def made(number: int, kind: str, **settings: Any) -> Any:
    env: Any = make_env(f"planar:tree-{number:04d}_{kind}", **settings)
    env.reset(seed=1)
    return env


def test_the_listed_bodies_are_those_for_training_and_development() -> None:
    names = [name.removeprefix("planar:") for name in list_envs("planar") if "tree" in name]
    assert names == [f"tree-{number:04d}_{kind}" for number in range(20) for kind in ("run", "reach")]
    sizes = [[len(trees.tree(n).links) for n in group] for group in (trees.TRAIN, trees.DEV)]
    assert set(sizes[0]) == {2, 3, 4, 5, 6, 7}
    assert len(set(sizes[1])) == 4
    with pytest.raises(ConfigError, match="tree-0019_run"):
        make_env("planar:tree-0019_rum")
    with pytest.raises(ConfigError, match="unknown environment"):
        make_env("planar:tree-0028_run")


def test_sealed_bodies_need_an_explicit_option() -> None:
    name = "planar:tree-0021_run"
    for options in ({}, {"sealed": False}, {"sealed": 1}):
        with pytest.raises(ConfigError, match=r"bodies 0020 to 0027 are kept for the pre-registered test.*sealed=True"):
            make_env(name, **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="kept for the pre-registered test"):
            check_env(name, options)
    check_env(name, {"sealed": True})  # builds nothing
    for other in ("planar:tree-0001_run", "planar:walker_run"):
        with pytest.raises(ConfigError, match="not one of the sealed bodies"):
            make_env(other, sealed=True)
        with pytest.raises(ConfigError, match="not one of the sealed bodies"):
            check_env(other, {"sealed": True})


def test_the_bodies_do_not_change() -> None:
    """A change of the generator would make another benchmark, so it needs another edition (`trees.STREAM`)."""
    both = [trees.mjcf(trees.tree(number), kind) for number in OPEN for kind in trees.KINDS]
    assert len(set(both)) == 40
    assert (
        hashlib.sha256("".join(both).encode()).hexdigest() == "b0f100266bcc42a511fba77598b0bc82c32e36fe1c9ec2d62187d4ae5ff03c5f"
    )
    assert trees.tree_hash() == "790773a86c03073dd046b544c76a509c686bd0a2789988526fde15d508a38e24"


def test_bodies_are_sound() -> None:
    for number in OPEN:
        body = trees.tree(number)
        depth, places = [0], set()
        for k, link in enumerate(body.links):
            assert 0.2 <= link.length <= 0.7
            assert 0.03 <= link.radius <= 0.055
            assert link.low <= -45 < 45 <= link.high
            if k:
                assert link.parent < k
                depth.append(depth[link.parent] + 1)
                place = (link.parent, link.start, np.sign(link.rest) if link.parent else 0)
                assert place not in places  # limbs begin at different places of the root, and part elsewhere
                places.add(place)
                assert abs(link.rest) + max(-link.low, link.high) < 230
        assert max(depth) <= 3
    assert any(len([1 for link in trees.tree(n).links if link.parent == j]) > 1 for n in OPEN for j in range(1, 6))


@pytest.mark.parametrize("kind", trees.KINDS)
def test_every_body_moves_within_its_window(kind: str) -> None:
    """Random torques for twenty agent steps: numbers stay finite, pixels move by about a pixel, nothing leaves the picture."""
    speeds, shares = [], []
    for number in OPEN:
        env = made(number, kind)
        links = len(trees.tree(number).links)
        assert env.action_space.shape == (links - (kind == "run"),)
        rng, moved, earned = np.random.default_rng(number), [], 0.0
        for _ in range(20):
            earned += env.step(rng.choice([-1.0, 1.0], env.action_space.shape).astype(np.float32))[1]
            flow = np.linalg.norm(env.exact_flow(), axis=-1)[
                np.append(False, env.painter.agent)[env.painter.codes(env._before, 64)]
            ]
            moved.append(flow[flow > 0.1].mean() if (flow > 0.1).any() else 0.0)
            mask = env.agent_mask()
            assert not np.concatenate([mask[0], mask[:, 0], mask[:, -1]]).any()
        assert np.isfinite(env.state()).all()
        assert np.abs(env.velocities()).max() < 60
        assert earned < 20
        speeds.append(np.mean(moved))
        shares.append(mask.mean())
    assert min(speeds) > 0.5
    assert max(speeds) < 5
    assert min(shares) > 0.009
    assert max(shares) < 0.15


def test_links_have_different_colours_and_the_target_is_the_targets() -> None:
    env = made(10, "reach", size=128)
    painter, model = env.painter, env.physics.model.ptr
    links = [model.geom(f"link{k}").id for k in range(7)]
    colours = dict(zip(painter.numbers.tolist(), painter._colours, strict=False))
    assert len({colours[k] for k in links}) == 7
    target = model.geom("target").id
    assert colours[target] == tuple(map(float, TARGET))
    assert not painter.agent[painter.numbers.tolist().index(target)]
    assert painter.agent.sum() == 8  # links and tip
    assert (env.part_ids() == target).sum() > 30
    assert {"links": 7, "sealed": False}.items() <= env.describe()["tree"].items()


def test_run_pays_for_forward_speed() -> None:
    env = made(5, "run")
    body, physics = trees.tree(5), env.physics
    wanted = 0.6 * np.sqrt(9.81 * 2 * body.extent("run"))
    paid = []
    for speed in (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0):
        with physics.reset_context():
            physics.data.qpos[1] = 3.0
            physics.data.qvel[:] = 0
            physics.data.qvel[0] = speed * wanted
        paid.append(env._task.get_reward(physics))
    np.testing.assert_allclose(paid, [0, 0, 0.25, 0.5, 1, 1], atol=5e-3)
    assert env._task.get_termination(physics) is None


def test_run_begins_at_rest_on_the_ground() -> None:
    heights, angles = [], []
    for seed in range(4):
        env: Any = make_env("planar:tree-0019_run", size=8)
        env.reset(seed=seed)
        data, model = env.physics.data, env.physics.model
        ends = data.geom_xpos[1:, 2] - model.geom_size[1:, 1] * np.abs(data.geom_xmat[1:, 8]) - model.geom_size[1:, 0]
        heights.append(ends.min())
        angles.append(data.qpos[2])
        assert np.abs(data.qvel).max() < 0.5
        assert data.time == 0
        before = data.subtree_com[1].copy()
        for _ in range(10):
            env._control(np.zeros(6))
        np.testing.assert_allclose(data.subtree_com[1], before, atol=0.02)
    np.testing.assert_allclose(heights, 0, atol=0.02)
    assert np.ptp(angles) > 0.01


def test_reach_pays_in_the_target_which_can_be_reached() -> None:
    env: Any = make_env("planar:tree-0011_reach", size=8)
    physics, body = env.physics, trees.tree(11)
    for seed in range(5):
        env.reset(seed=seed)
        target, tip = physics.named.data.geom_xpos["target"][:2].copy(), physics.named.data.site_xpos["tip"][:2].copy()
        radius = physics.named.model.geom_size["target", 0]
        assert radius == pytest.approx(0.12 * body.extent("reach"), abs=1e-3)
        assert np.linalg.norm(target) < body.extent("reach")
        assert np.linalg.norm(target - tip) > 3 * radius
        assert env._task.get_reward(physics) == 0
        np.testing.assert_allclose(env._task.get_observation(physics)["to_target"], target - tip)
    size = physics.named.model.site_size["tip", 0]
    for share, wanted in ((0.0, 1.0), (0.98, 1.0), (1.02, 0.0)):
        physics.named.model.geom_pos["target", :2] = tip + np.array([share * (radius + size), 0])
        physics.forward()
        assert env._task.get_reward(physics) == wanted
    # The chain's end is that of the longest one.
    assert physics.model.site_bodyid[0] == 1 + max(range(6), key=body.way)


def test_a_link_hangs_on_its_parent_and_turns_counterclockwise() -> None:
    """The picture and the generator agree on where links are: the drawn ends are those of the generator's own geometry."""
    body = trees.tree(19)
    for kind in trees.KINDS:
        env = made(19, kind)
        physics = env.physics
        with physics.reset_context():
            physics.data.qpos[:] = 0
            physics.named.data.qpos["joint1"] = 0.3
        up = 2 if kind == "run" else 1
        ends: list[tuple[complex, complex]] = []
        turns: list[float] = []
        for k, link in enumerate(body.links):
            turn = (turns[link.parent] + np.deg2rad(link.rest) + 0.3 * (k == 1)) if k else 0.0
            begin = ends[link.parent][0] + link.start * (ends[link.parent][1] - ends[link.parent][0]) if k else 0j
            turns.append(turn)
            ends.append((begin, begin + link.length * np.exp(1j * turn)))
            where = physics.named.data.geom_xpos[f"link{k}"] - physics.named.data.xpos["link0"]
            np.testing.assert_allclose([where[0], where[up]], [np.mean(ends[k]).real, np.mean(ends[k]).imag], atol=1e-3)
