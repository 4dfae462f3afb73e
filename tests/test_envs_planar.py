"""Planar bodies: dm_control's numbers bit for bit, pictures without OpenGL, and motion that is exact in every pixel."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from localmotion.envs import list_envs, make_env, planar
from localmotion.envs import planar_trees as trees
from localmotion.envs.base import PixelEnv
from localmotion.envs.masks import moving_parts
from localmotion.envs.planar_drawing import Painter, View
from localmotion.envs.truth import SKY, UNKNOWN, motion_truth, pixel_grid
from localmotion.envs.truth_planar import PlanarTruth
from localmotion.envs.vector import VectorEnv, env_seed
from localmotion.errors import ConfigError, EnvError
from localmotion.suites import SUITES

ONE_OF_EACH = (
    "acrobot_swingup",
    "cartpole_three_poles",
    "cheetah_run",
    "finger_turn_hard",
    "hopper_hop",
    "pendulum_swingup",
    "reacher_hard",
    "swimmer_swimmer6",
    "walker_run",
)
TREES = ("tree-0004_run", "tree-0010_reach")


def actions(env: PixelEnv, count: int, seed: int = 0) -> np.ndarray:
    shape = env.action_space.shape
    assert shape is not None
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


def played(task: str, steps: int, seed: int = 0, **settings: Any) -> Any:
    env: Any = make_env(f"planar:{task}", **settings)
    env.reset(seed=seed)
    for action in actions(env, steps):
        env.step(action)
    return env


# -- the environment ---------------------------------------------------------------------------------------------------


def test_has_every_task_of_every_planar_body() -> None:
    assert {task.partition("_")[0] for task in planar.TASKS} == set(planar.VIEWS)
    assert [f"planar:{task}" for task in (*planar.TASKS, *trees.TASKS)] == list_envs("planar")
    assert {f"dmc:{task}" for task in planar.TASKS} < set(list_envs("dmc"))
    assert set(ONE_OF_EACH) < set(planar.TASKS)
    assert SUITES["planar"] == SUITES["dmc"]


@pytest.mark.parametrize("task", ["cartpole_swingup", "finger_turn_easy", "swimmer_swimmer6", *TREES])
def test_passes_the_checker_of_gymnasium(task: str) -> None:
    check_env(make_env(f"planar:{task}", percept_size=128), skip_render_check=True)


@pytest.mark.parametrize("task", ONE_OF_EACH)
def test_states_rewards_and_vectors_are_those_of_dmc(task: str) -> None:
    ours, theirs = make_env(f"planar:{task}", size=16, observed="both"), make_env(f"dmc:{task}", observed="vectors")
    assert ours.action_space == theirs.action_space
    assert ours.metadata == theirs.metadata
    for seed in (3, None):
        first, second = ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0]
        np.testing.assert_array_equal(first["vector"], second["vector"])
        for action in actions(ours, 6):
            mine, yours = ours.step(action), theirs.step(action)
            np.testing.assert_array_equal(mine[0]["vector"], yours[0]["vector"])
            assert mine[1:] == yours[1:]
        np.testing.assert_array_equal(ours.state(), theirs.state())
    theirs.close()


@pytest.mark.parametrize("task", ["walker_walk", "reacher_easy", "swimmer_swimmer15", "finger_spin", *TREES])
def test_a_seed_gives_the_same_episode_whatever_went_before(task: str) -> None:
    first, second = make_env(f"planar:{task}"), played(task, 4, seed=5)
    second.render()
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    runs = []
    for env in (first, second):
        pictures = [env.reset(seed=7)[0]["image"]]
        for action in actions(env, 3):
            pictures += [env.step(action)[0]["image"], env.part_ids(), env.exact_flow()]  # type: ignore[attr-defined]
        runs.append(pictures)
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (first.reset(seed=8)[0]["image"] != runs[0][0]).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_a_vector_of_environments_equals_environments_one_by_one() -> None:
    name = "planar:cheetah_run"
    many = VectorEnv(name, 3, seed=1, workers=2, size=32, time_limit=8)
    single = [make_env(name, seed=env_seed(1, i), size=32, time_limit=8) for i in range(3)]
    seen, _ = many.reset(seed=[4, None, 6])
    np.testing.assert_array_equal(
        seen["image"], [env.reset(seed=seed)[0]["image"] for env, seed in zip(single, (4, None, 6), strict=True)]
    )
    for step in range(4):
        action = np.stack([actions(env, 1, seed=step + 10 * i)[0] for i, env in enumerate(single)])
        seen, reward, _, truncated, _ = many.step(action)
        alone = [env.step(one) for env, one in zip(single, action, strict=True)]
        np.testing.assert_array_equal(seen["image"], [one[0]["image"] for one in alone])
        np.testing.assert_array_equal(reward, [one[1] for one in alone])
        np.testing.assert_array_equal(truncated, [step == 3] * 3)
    many.close()


_FRESH = """
import sys
from localmotion.envs import make_env
env = make_env("planar:walker_walk"); env.reset(seed=0); env.step(env.action_space.sample()); env.exact_flow()
drivers = [name for name in ("libEGL", "libGL", "libOSMesa", "libglfw", "libLLVM") if name in open("/proc/self/maps").read()]
sys.exit(str(drivers) if drivers else 0)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the loaded drivers are read from /proc")
def test_needs_no_opengl() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("planar:walker_rnu", {}, "planar:walker_run"),
        ("planar:humanoid_walk", {}, "unknown environment"),
        ("planar:walker_run", {"camera": 0}, "no cameras"),
        ("planar:walker_run", {"quality": "best"}, "rendering quality"),
        ("planar:walker_run", {"size": 4}, "size=4"),
        ("planar:walker_run", {"wind": 1}, "look"),
        ("planar:walker_run", {"look": "shiny"}, "flat"),
    ],
)
def test_wrong_settings_are_errors(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_env(name, **settings)


def test_nothing_is_known_before_the_first_reset() -> None:
    env: Any = make_env("planar:pendulum_swingup", observed="both")
    for ask in (env.pose, env.part_ids, env.exact_flow, env.agent_mask, motion_truth(env).snapshot, env.render):
        with pytest.raises(EnvError, match=r"call reset\(\) before"):
            ask()
    with pytest.raises(EnvError, match=r"call reset\(\) before"):
        env.step(np.zeros(1, np.float32))
    with pytest.raises(EnvError, match="planar parts"):
        PlanarTruth(make_env("toy:dot"))


def test_says_what_it_is() -> None:
    facts = make_env("planar:hopper_stand").describe()
    assert (facts["suite"], facts["quality"], facts["camera"], facts["gl"]) == ("planar", "exact", None, None)
    assert facts["versions"]["opencv"] == cv2.__version__
    assert (facts["action_repeat"], facts["time_limit"]) == (2, 1000)


# -- the drawing -------------------------------------------------------------------------------------------------------

SIDE, HALF, RADIUS, LENGTH = 64, 2.0, 0.3, 0.5
ZOOM = SIDE / (2 * HALF)
MIDDLE = (SIDE - 1) / 2
SHAPES = {
    "capsule": (f"{RADIUS} {LENGTH}", np.pi * RADIUS**2 + 4 * RADIUS * LENGTH),
    "sphere": (f"{RADIUS}", np.pi * RADIUS**2),
    "box": (f"{RADIUS} .1 {LENGTH}", 4 * RADIUS * LENGTH),
    "ellipsoid": (f"{RADIUS} .1 {LENGTH}", np.pi * RADIUS * LENGTH),
    "cylinder": (f"{RADIUS} {LENGTH}", 4 * RADIUS * LENGTH),
}


class Stage:
    """One part that slides and turns, without a floor, in a known window."""

    def __init__(self, kind: str = "capsule", above: bool = False) -> None:
        import mujoco

        up = "0 1 0" if above else "0 0 1"
        turn = "0 0 1" if above else "0 -1 0"  # counterclockwise in the picture
        lying = ' euler="90 0 0"' if above else ""
        xml = f"""<mujoco><worldbody><camera/><body><joint name="x" type="slide" axis="1 0 0"/>
        <joint name="up" type="slide" axis="{up}"/><joint name="turn" type="hinge" axis="{turn}"/>
        <geom type="{kind}" size="{SHAPES[kind][0]}"{lying}/></body></worldbody></mujoco>"""
        self.mj, self.model = mujoco, mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, self.data)
        self.painter = Painter(self.model, self.data, View(above=above, half=HALF), moving_parts(self.model))

    def at(self, x: float = 0.0, up: float = 0.0, turn: float = 0.0) -> Any:
        for name, value in (("x", x), ("up", up), ("turn", turn)):
            self.data.joint(name).qpos[0] = value
        self.mj.mj_forward(self.model, self.data)
        return self.painter.pose()

    def cover(self, pose: Any) -> np.ndarray:
        """(S, S) how much of each pixel shows the part: green against the blank sky."""
        blank = self.painter.picture(self.at(x=50), SIDE).astype(float)
        colour = np.array(self.painter._colours[0])
        shown = self.painter.picture(pose, SIDE) - blank
        return np.asarray((shown * (colour - blank)).sum(-1) / ((colour - blank) ** 2).sum(-1))


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_part_covers_its_shape(kind: str, above: bool) -> None:
    stage = Stage(kind, above)
    area = SHAPES[kind][1] * ZOOM**2
    shown, codes = [], []
    for turn in np.linspace(0, 1.5, 9):
        pose = stage.at(0.2 + turn / 30, -0.1 - turn / 40, turn)
        codes.append(stage.painter.codes(pose, SIDE) == 1)
        shown.append(stage.cover(pose))
        assert ((shown[-1] > 0.5) != codes[-1]).sum() < 0.09 * area  # only pixels that the rim halves
        assert shown[-1].sum() == pytest.approx(area, rel=0.03)
    assert np.mean(shown) * SIDE**2 == pytest.approx(area, rel=0.015)
    assert np.mean(codes) * SIDE**2 == pytest.approx(area, rel=0.02)


def test_pictures_move_by_fractions_of_a_pixel() -> None:
    stage = Stage()
    places = []
    for step in range(9):
        cover = stage.cover(stage.at(step / 8 / ZOOM, step / 16 / ZOOM, 0.3))
        places.append([(cover * axis).sum() / cover.sum() for axis in np.indices(cover.shape)[::-1]])
    moved = np.array(places) - places[0]
    np.testing.assert_allclose(moved, np.outer(np.arange(9), [1 / 8, -1 / 16]), atol=0.04)
    np.testing.assert_allclose(places[0], MIDDLE, atol=0.05)


@pytest.mark.parametrize("above", [False, True])
def test_known_motions_give_their_analytic_flow(above: bool) -> None:
    stage = Stage(above=above)
    start = stage.at(0.2, 0.1, 0.5)
    centre = np.array([MIDDLE + 0.2 * ZOOM, MIDDLE - 0.1 * ZOOM])
    arm = pixel_grid(SIDE).reshape(SIDE, SIDE, 2) - centre
    cos, sin = np.cos(0.3), np.sin(0.3)
    body = stage.painter.codes(start, SIDE) == 1
    assert body.sum() > 100
    for motion, expected in (
        ({"x": 0.45, "up": 0.1, "turn": 0.5}, np.broadcast_to([0.25 * ZOOM, 0.0], arm.shape)),
        ({"x": 0.2, "up": 0.3, "turn": 0.5}, np.broadcast_to([0.0, -0.2 * ZOOM], arm.shape)),
        # Counterclockwise to a viewer, with y down
        ({"x": 0.2, "up": 0.1, "turn": 0.8}, arm @ np.array([[cos, -sin], [sin, cos]]) - arm),
    ):
        flow = stage.painter.flow(start, stage.at(**motion), SIDE)
        np.testing.assert_allclose(flow[body], expected[body], atol=2e-5)
        assert not flow[~body].any()


@pytest.mark.parametrize("task", ONE_OF_EACH)
def test_a_textured_body_has_the_same_parts_and_shows_more(task: str) -> None:
    flat, textured = (played(task, 3, size=192, look=look) for look in planar.LOOKS)
    np.testing.assert_array_equal(flat.part_ids(), textured.part_ids())
    np.testing.assert_array_equal(flat.exact_flow(), textured.exact_flow())
    pictures = [env.render_frame(192).astype(int) for env in (flat, textured)]
    changed = np.abs(pictures[1] - pictures[0]).max(-1) > 8
    parts = flat.part_ids()
    bodies = cv2.dilate((parts != flat.painter.numbers[-1]).astype(np.uint8) * (parts != SKY), np.ones((3, 3))) > 0
    assert not changed[~bodies].any()
    assert 0.25 < changed[flat.agent_mask()].mean() < 0.7
    assert textured.describe()["look"] == "textured"


@pytest.mark.parametrize("task", ["walker_run", "cheetah_run", "hopper_hop"])
def test_the_floor_begins_at_the_ground(task: str) -> None:
    env = played(task, 0)
    ids, picture = env.part_ids()[:, 0], env.render_frame(64)[:, 0].astype(int)
    heights = env.view.middle + (MIDDLE - np.arange(64)) * 2 * env.view.half / 64
    np.testing.assert_array_equal(ids == 0, heights < 0)
    blue = picture[:, 2] > picture[:, 1]
    assert (blue != (heights > 0)).sum() <= 1
    np.testing.assert_array_equal(blue, np.sort(blue)[::-1])


def test_the_floor_moves_by_fractions_of_a_pixel() -> None:
    env = played("swimmer_swimmer6", 0)
    pose, pixel = env.pose(), 2 * env.view.half / 64

    def drawn(x: float, y: float) -> np.ndarray:
        still = replace(pose, place=pose.place + 50, eye=pose.eye + pixel * complex(x, y), seen={})  # the body is far away
        return np.asarray(env.painter.picture(still, 64), float)

    for direction in ((1, 0), (0, 1)):
        first, second, quarter = (drawn(*(share * way for way in direction)) for share in (0, 1, 0.25))
        np.testing.assert_allclose(second[:-1, :-1], first[direction[1] :, direction[0] :][:63, :63], atol=3)
        assert np.abs(quarter - (0.75 * first + 0.25 * second)).mean() < 0.17 * np.abs(second - first).mean()


def test_thin_parts_are_never_missing() -> None:
    """The poles are narrower than a pixel at this size."""
    env = played("cartpole_three_poles", 0, size=32)
    model = env.physics.model.ptr
    for angle in (0.0, 0.03, 1.0):
        with env.physics.reset_context():
            env.physics.data.qpos[:] = [0.0, angle, 0.0, 0.0]
        ids = env.part_ids()
        lengths = [(ids == model.geom(f"pole_{k}").id).sum() for k in (1, 2, 3)]
        assert min(lengths) > 0.6 * 32 / (2 * env.view.half)
        assert max(lengths) < 3 * 32 / (2 * env.view.half) + 3


def test_the_far_leg_is_behind_the_near_one_and_darker() -> None:
    env = played("walker_stand", 0)
    painter = env.painter
    names = [env.physics.model.ptr.geom(int(n)).name for n in painter.numbers[:-1]]
    order = [names[k] for k in painter._order]
    assert order.index("left_thigh") < order.index("torso") < order.index("right_thigh")
    light = {name: sum(colour) for name, colour in zip(names, painter._colours, strict=True)}
    assert max(v for k, v in light.items() if k.startswith("left")) < min(v for k, v in light.items() if k.startswith("right"))


def test_targets_are_seen_and_never_hide_the_agent() -> None:
    env = played("reacher_easy", 0, size=128)
    model = env.physics.model.ptr
    ids = env.part_ids()
    assert (ids == model.geom("target").id).sum() > 100
    finger = env.physics.named.data.geom_xpos["finger"][:2]
    env.physics.model.ptr.geom_pos[model.geom("target").id, :2] = finger
    env.physics.forward()
    assert (env.part_ids() == model.geom("finger").id).any()
    turned = played("finger_turn_easy", 0, size=128)
    assert (turned.part_ids() == turned.physics.model.ptr.ngeom + turned.physics.model.ptr.site("target").id).any()
    assert turned.part_ids().max() < turned.physics.model.ptr.ngeom + turned.physics.model.ptr.nsite
    assert played("finger_spin", 0).part_ids().max() < turned.physics.model.ptr.ngeom  # there its sites are invisible


# -- its motion --------------------------------------------------------------------------------------------------------


def warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    at = (pixel_grid(len(flow)).reshape(*flow.shape) + flow).astype(np.float32)
    return np.asarray(cv2.remap(picture, at[..., 0], at[..., 1], cv2.INTER_LINEAR))


@pytest.mark.parametrize("look", planar.LOOKS)
@pytest.mark.parametrize("task", [*ONE_OF_EACH, *TREES])
def test_the_later_picture_warped_back_is_the_earlier_one(task: str, look: str) -> None:
    env = played(task, 4, size=192, action_repeat=4, look=look)
    truth = motion_truth(env)
    still, warped = [], []
    for action in actions(env, 4, seed=2):
        a, before = truth.snapshot(), env.render_frame(192)
        after = env.step(action)[0]["image"]
        flow, valid = truth.flow(a, truth.snapshot())
        same = cv2.morphologyEx(a.ident.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3))) == 0
        moving = valid & same & (np.linalg.norm(flow, axis=-1) > 0.4)
        edges = moving & (np.abs(after.astype(int) - before).max(-1) > 8)  # inside a flat colour nothing can be seen to move
        for errors, picture in ((still, after), (warped, warp(after, flow))):
            errors.append(np.abs(picture[edges].astype(float) - before[edges]))
    assert len(np.concatenate(still)) > 20
    assert np.concatenate(warped).mean() < 0.2 * np.concatenate(still).mean()


@pytest.mark.parametrize("task", [*ONE_OF_EACH, *TREES])
def test_flow_is_the_projected_motion_of_points_of_the_bodies(task: str) -> None:
    """Independent of the drawing: each pixel's point is fixed to its geom in MuJoCo's three dimensions, moved and projected."""
    env = played(task, 5)
    model, data, view = env.physics.model.ptr, env.physics.data.ptr, env.view
    plane = [0, 1] if view.above else [0, 2]
    followed = model.cam_bodyid[0]

    def state() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        eye = np.array([0.0, 0.0 if view.above else view.middle])
        if view.follows:
            eye += data.subtree_com[followed][:2] if view.above else [data.subtree_com[followed][0], 0]
        return (
            np.concatenate([data.geom_xpos, data.site_xpos]).copy(),
            np.concatenate([data.geom_xmat, data.site_xmat]).reshape(-1, 3, 3).copy(),
            eye,
        )

    position, rotation, eye = state()
    ids, zoom = env.part_ids(), 64 / (2 * view.half)
    env.step(actions(env, 1, seed=9)[0])
    moved, turned, seen_from = state()
    flow = env.exact_flow()
    rows, columns = np.nonzero(ids >= 0)
    part = ids[rows, columns]
    at = np.column_stack([columns, rows]).astype(float)
    world = position[part].copy()
    world[:, plane] = (at - MIDDLE) / zoom * [1, -1] + eye
    local = np.einsum("nji,nj->ni", rotation[part], world - position[part])
    later = moved[part] + np.einsum("nij,nj->ni", turned[part], local)
    expected = (later[:, plane] - seen_from) * zoom * [1, -1] + MIDDLE - at
    np.testing.assert_allclose(flow[rows, columns], expected, atol=1e-4)
    assert np.abs(expected).max() > 0.03
    assert not flow[ids < 0].any()


@pytest.mark.parametrize(("task", "same"), [("acrobot_swingup", 0.85), ("cartpole_swingup", 0.9), ("reacher_easy", 0.8)])
def test_parts_and_flow_are_those_of_dm_controls_scene_where_the_windows_agree(task: str, same: float) -> None:
    ours, theirs = (make_env(f"{suite}:{task}", size=128, quality="fast", action_repeat=4) for suite in ("planar", "dmc"))
    truths, shots = [motion_truth(env) for env in (ours, theirs)], []
    for env, truth in zip((ours, theirs), truths, strict=True):
        env.reset(seed=3)
        first = truth.snapshot()
        for action in actions(env, 5):
            env.step(action)
        shots.append((first, truth.snapshot()))
    flows = [truth.flow(*pair)[0] for truth, pair in zip(truths, shots, strict=True)]
    bodies = [truth.foreground(pair[0]) for truth, pair in zip(truths, shots, strict=True)]
    snapshots = [pair[0] for pair in shots]
    both = bodies[0] & bodies[1] & (snapshots[0].ident == snapshots[1].ident)
    assert both.sum() > same * bodies[0].sum() > 100
    size = np.linalg.norm(flows[1], axis=-1)[both]
    assert size.mean() > 0.3
    # Theirs is the flow of the surface, which is nearer to the camera than the middle of the body.
    error = np.linalg.norm(flows[0] - flows[1], axis=-1)[both]
    assert error.mean() < 0.06 * size.mean()
    assert error.max() < 0.25
    theirs.close()


@pytest.mark.parametrize("task", ["walker_run", "swimmer_swimmer6"])
def test_tracks_follow_the_flow_and_the_flow_is_that_of_the_last_step(task: str) -> None:
    env = played(task, 2, percept_size=128)
    truth = motion_truth(env)
    shots = [truth.snapshot()]
    flows = []
    for action in actions(env, 4, seed=1):
        env.step(action)
        shots.append(truth.snapshot())
        flows.append(env.exact_flow())
        np.testing.assert_allclose(truth.flow(shots[-2], shots[-1])[0], flows[-1], atol=1e-4)
    assert flows[-1].shape == (128, 128, 2)
    ys, xs = np.nonzero(truth.foreground(shots[0]))
    points = np.column_stack([xs, ys]).astype(float)
    tracks, visible = truth.tracks(shots, points)
    np.testing.assert_allclose(tracks[1] - points, flows[0][ys, xs], atol=1e-4)
    assert visible[0].all()
    assert 0.5 < visible[-1].mean() < 1.0
    back, _ = truth.tracks(shots[::-1], tracks[-1][visible[-1]])
    stays = np.linalg.norm(back[-1] - points[visible[-1]], axis=1)
    assert np.quantile(stays, 0.9) < 0.01
    env.reset(seed=0)
    assert not env.exact_flow().any()


def test_the_floor_moves_against_the_camera_and_the_sky_stays() -> None:
    env = played("cheetah_run", 20)
    truth = motion_truth(env)
    a, com = truth.snapshot(), env.physics.data.subtree_com[1, 0]
    env.step(actions(env, 1)[0])
    b = truth.snapshot()
    floor = a.ident == a.floor
    expected = -(env.physics.data.subtree_com[1, 0] - com) * 64 / (2 * env.view.half)
    assert abs(expected) > 0.01
    assert floor[-1].all()
    np.testing.assert_allclose(env.exact_flow()[floor], [[expected, 0]] * floor.sum(), atol=1e-5)
    camera = truth.camera_flow(a, b)
    np.testing.assert_allclose(camera[a.ident != SKY][:, 0], expected, atol=1e-5)
    assert not camera[a.ident == SKY].any()
    assert (a.ident[0] == SKY).all()
    assert (truth.anchor(a, np.array([[-3.0, 2.0]])).ident == UNKNOWN).all()


@pytest.mark.parametrize("task", [*ONE_OF_EACH, *TREES])
def test_the_mask_is_the_agents_parts(task: str) -> None:
    env = played(task, 3)
    model = env.physics.model.ptr
    ids, bodies = env.part_ids(), np.concatenate([model.geom_bodyid, model.site_bodyid])
    agent = (ids >= 0) & (model.body_weldid[bodies[np.maximum(ids, 0)]] != 0)
    assert ids.dtype == np.int16
    assert agent.any()
    np.testing.assert_array_equal(env.agent_mask(), agent)
    np.testing.assert_array_equal(motion_truth(env).foreground(motion_truth(env).snapshot()), agent)
    assert env.agent_mask(96).shape == env.part_ids(96).shape == (96, 96)
    assert env.agent_mask(128).mean() == pytest.approx(env.agent_mask(256).mean(), rel=0.2)


def test_a_state_set_from_outside_is_drawn() -> None:
    env = played("pendulum_swingup", 1)
    before, picture = env.part_ids(), env.render_frame(64)
    with env.physics.reset_context():
        env.physics.data.qpos[0] += 1.0
    assert (env.part_ids() != before).any()
    assert (env.render_frame(64) != picture).any()
