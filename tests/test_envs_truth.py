"""Ground truth of motion: known motions give known flow, pictures warped by it agree, hidden points are told, tracks follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from localmotion.envs import make_env
from localmotion.envs.base import PixelEnv
from localmotion.envs.truth import SKY, UNKNOWN, MotionTruth, motion_truth, pixel_grid
from localmotion.errors import ConfigError, EnvError

SIDE, FOVY, DISTANCE, HALF = 64, 45.0, 4.0, 0.5
FOCAL = SIDE / 2 / np.tan(np.radians(FOVY / 2))
MIDDLE = (SIDE - 1) / 2
SCENE = f"""<mujoco><asset><texture name="t" type="2d" builtin="checker" rgb1="1 0 0" rgb2="0 1 1" width="64" height="64"/>
<texture type="skybox" builtin="gradient" rgb1=".2 .3 .9" rgb2=".8 .8 .8" width="64" height="64"/>
<material name="m" texture="t" texuniform="true" texrepeat="3 3"/></asset>
<worldbody><light pos="0 -4 4" dir="0 1 -1"/>
<body name="eye" pos="0 -{DISTANCE} 0"><joint name="pan" type="hinge" axis="0 0 1"/><geom size=".01" contype="0" rgba="0 0 0 0"/>
<camera name="eye" xyaxes="1 0 0 0 0 1" fovy="{FOVY}"/></body>
<geom name="wall" type="box" pos="0 2.5 0" size="1.2 .1 1.2" material="m"/>
<body name="b"><joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/>
<joint name="z" type="slide" axis="0 0 1"/><joint name="roll" type="hinge" axis="0 1 0"/><joint name="turn" type="hinge" axis="0 0 1"/>
<geom name="b" type="{{kind}}" size="{HALF} {HALF} {HALF}" material="m" rgba="1 1 1 {{alpha}}"/></body>
</worldbody></mujoco>"""


class Stage:
    """A scene of one body before a wall, seen by a known camera, in the shape of an environment."""

    def __init__(self, kind: str = "box", alpha: float = 1.0, upside_down: bool = False, quality: Any = "fast") -> None:
        from localmotion.envs.gl import choose_gl

        choose_gl()
        import mujoco

        from localmotion.envs.render import SceneRenderer

        self.mj = mujoco
        self.model = mujoco.MjModel.from_xml_string(SCENE.format(kind=kind, alpha=alpha))
        self.data = mujoco.MjData(self.model)
        self.renderer = SceneRenderer(self.model, size=SIDE, camera=0, quality=quality, upside_down=upside_down)
        env: Any = SimpleNamespace(name="stage", draw_size=SIDE, _begun=True, _renderer=self.renderer)
        env.inner = SimpleNamespace(model=self.model, data=self.data)
        self.truth = motion_truth(env)

    def at(self, **joints: float) -> Any:
        self.data.qpos[:] = 0
        for name, value in joints.items():
            self.data.joint(name).qpos[0] = value
        self.mj.mj_forward(self.model, self.data)
        return self.truth.snapshot()


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def build(**settings: Any) -> Stage:
        made.append(Stage(**settings))
        return made[-1]

    yield build
    for one in made:
        one.renderer.close()


@pytest.fixture
def make() -> Iterator[Callable[..., PixelEnv]]:
    opened: list[PixelEnv] = []

    def build(name: str, **settings: Any) -> PixelEnv:
        opened.append(make_env(name, **settings))
        return opened[-1]

    yield build
    for env in opened:
        env.close()


def grid() -> np.ndarray:
    return pixel_grid(SIDE).reshape(SIDE, SIDE, 2)


DEPTH = DISTANCE - HALF  # of the box's front face


@pytest.mark.parametrize(
    ("joints", "expected"),
    [
        ({"x": 0.3}, lambda p: np.array([FOCAL * 0.3 / DEPTH, 0.0])),
        ({"z": 0.1}, lambda p: np.array([0.0, -FOCAL * 0.1 / DEPTH])),
        ({"y": -0.5}, lambda p: (p - MIDDLE) * (DEPTH / (DEPTH - 0.5) - 1)),
        # Positive about y, which points away from the viewer: clockwise in the picture, from x right to y down.
        (
            {"roll": 0.2},
            lambda p: (p - MIDDLE) @ np.array([[np.cos(0.2), np.sin(0.2)], [-np.sin(0.2), np.cos(0.2)]]) - (p - MIDDLE),
        ),
    ],
    ids=["right", "up", "nearer", "roll"],
)
@pytest.mark.parametrize("upside_down", [False, True])
def test_known_motion_of_a_box_gives_its_analytic_flow(
    stage: Callable[..., Stage], joints: dict[str, float], expected: Any, upside_down: bool
) -> None:
    scene = stage(upside_down=upside_down)
    a, b = scene.at(), scene.at(**joints)
    flow, valid = scene.truth.flow(a, b)
    body = scene.truth.foreground(a)
    assert 0.9 < body.sum() / (2 * HALF * FOCAL / DEPTH) ** 2 < 1.1
    wanted = np.broadcast_to(expected(grid()), flow.shape)
    if upside_down:
        wanted = -np.broadcast_to(expected(SIDE - 1 - grid()), flow.shape)
    np.testing.assert_allclose(flow[body], wanted[body], atol=0.01)
    assert valid[body].mean() > 0.97
    assert np.abs(flow[~body]).max() < 1e-6


def test_rotating_sphere_agrees_with_rays_and_hides_what_turns_away(stage: Callable[..., Stage]) -> None:
    scene, angle = stage(kind="sphere", quality="reference"), 0.7
    a, b = scene.at(), scene.at(turn=angle)
    flow, valid = scene.truth.flow(a, b)
    body = scene.truth.foreground(a)
    pixels = grid()[body]
    rays = np.column_stack([(pixels[:, 0] - MIDDLE) / FOCAL, np.ones(len(pixels)), -(pixels[:, 1] - MIDDLE) / FOCAL])
    origin = np.array([0.0, -DISTANCE, 0.0])
    square, half, rest = (rays**2).sum(1), rays @ origin, DISTANCE**2 - HALF**2
    under = half**2 - square * rest
    hit = under > 0  # the sphere that is drawn has facets; rays at its rim may miss the true one
    rays, pixels, found = rays[hit], pixels[hit], flow[body][hit]
    hits = origin + rays * ((-half - np.sqrt(np.maximum(under, 0))) / square)[hit, None]
    cos, sin = np.cos(angle), np.sin(angle)
    turned = hits @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    moved = np.column_stack([turned[:, 0], -turned[:, 2]]) / (turned[:, 1] + DISTANCE)[:, None] * FOCAL + MIDDLE
    inner = np.linalg.norm(pixels - MIDDLE, axis=1) < 0.8 * HALF * FOCAL / DISTANCE
    np.testing.assert_allclose(found[inner], (moved - pixels)[inner], atol=0.15)  # the drawn sphere has facets
    normal_away = (turned * (turned - origin)).sum(1) > 0.25  # faces away afterwards, not at the very rim
    assert normal_away.sum() > 10
    assert valid[body][hit][normal_away].mean() < 0.1
    facing = (turned * (turned - origin)).sum(1) < -0.2
    assert valid[body][hit][facing].mean() > 0.9


def test_a_turning_camera_moves_sky_and_walls_alike_and_nothing_is_residual(stage: Callable[..., Stage]) -> None:
    scene, angle = stage(), 0.05
    a, b = scene.at(), scene.at(pan=angle)
    flow, valid = scene.truth.flow(a, b)
    x = (grid()[..., 0] - MIDDLE) / FOCAL
    # About z, to the left: what is seen moves right by tan(atan(x) + angle).
    np.testing.assert_allclose(flow[..., 0], (np.tan(np.arctan(x) + angle) - x) * FOCAL, atol=2e-3)
    assert {SKY} < set(np.unique(a.ident))
    assert UNKNOWN not in a.ident
    np.testing.assert_allclose(scene.truth.camera_flow(a, b), flow, atol=1e-3)
    leaves = (flow + grid() > SIDE - 0.5).any(-1)
    assert leaves.any()
    assert not valid[leaves].any()
    assert valid[~leaves].mean() > 0.97


def test_what_the_body_covers_is_invalid_and_comes_back(stage: Callable[..., Stage]) -> None:
    scene = stage()
    a, b = scene.at(x=-0.4), scene.at(x=0.4)
    _, valid = scene.truth.flow(a, b)
    before, after = scene.truth.foreground(a), scene.truth.foreground(b)
    covered = after & ~before
    assert covered.sum() > 50
    assert not valid[covered].any()
    assert valid[~after & ~before].all()
    points = grid()[covered][::7]
    tracks, visible = scene.truth.tracks([a, b, a], points)
    np.testing.assert_array_equal(visible, np.array([True, False, True])[:, None] & np.ones(len(points), bool))
    np.testing.assert_allclose(tracks, np.broadcast_to(points, tracks.shape), atol=1e-4)


def test_glass_is_looked_through_and_mostly_solid_things_are_not(stage: Callable[..., Stage]) -> None:
    glass, solid = stage(alpha=0.2), stage(alpha=0.8)
    assert not glass.truth.foreground(glass.at()).any()
    assert solid.truth.foreground(solid.at()).sum() > 100


def test_looking_does_not_change_the_picture(stage: Callable[..., Stage]) -> None:
    scene = stage(quality="reference")
    scene.at(x=0.1)
    before = scene.renderer.frame(scene.data)
    larger = scene.truth.snapshot(2 * SIDE)
    scene.truth.snapshot()
    np.testing.assert_array_equal(scene.renderer.frame(scene.data), before)
    assert larger.ident.shape == (2 * SIDE, 2 * SIDE)


def play(env: PixelEnv, steps: int, seed: int = 0) -> tuple[MotionTruth, list[np.ndarray], list[Any]]:
    key = "image" if env.draw_size == env.size else "percept"
    truth, rng = motion_truth(env), np.random.default_rng(seed)
    pictures, shots = [env.reset(seed=seed)[0][key]], [truth.snapshot()]
    shape = env.action_space.shape
    assert shape is not None
    for _ in range(steps):
        pictures.append(env.step(rng.uniform(-1, 1, shape).astype(np.float32))[0][key])
        shots.append(truth.snapshot())
    return truth, pictures, shots


def warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    at = (pixel_grid(len(flow)).reshape(*flow.shape) + flow).astype(np.float32)
    return np.asarray(cv2.remap(picture, at[..., 0], at[..., 1], cv2.INTER_LINEAR))


@pytest.mark.parametrize("name", ["dmc:walker_walk", "dmc:reacher_easy", "dmc:finger_spin", "dmc:ball_in_cup_catch"])
def test_the_later_picture_warped_back_is_the_earlier_one(make: Callable[..., PixelEnv], name: str) -> None:
    env = make(name, percept_size=128, quality="fast")
    truth, pictures, shots = play(env, 8)
    still, warped = [], []
    for first, second in ((2, 4), (4, 6), (6, 8)):
        flow, valid = truth.flow(shots[first], shots[second])
        inner = cv2.erode(valid.astype(np.uint8), np.ones((3, 3))) > 0
        moving = inner & (np.linalg.norm(flow, axis=-1) > 0.5)
        for errors, picture in ((still, pictures[second]), (warped, warp(pictures[second], flow))):
            errors.append(np.abs(picture[moving].astype(float) - pictures[first][moving]))
    # What is left is light: shadows and shading do not move with the surface.
    assert np.concatenate(warped).mean() < 0.4 * np.concatenate(still).mean()


@pytest.mark.parametrize("name", ["dmc:cheetah_run", "metaworld:drawer-open"])
def test_forth_and_back_end_where_they_began(make: Callable[..., PixelEnv], name: str) -> None:
    truth, _, shots = play(make(name, percept_size=128, quality="fast"), 6)
    forth, valid = truth.flow(shots[2], shots[6])
    back, _ = truth.flow(shots[6], shots[2])
    error = np.linalg.norm(warp(back, forth) + forth, axis=-1)[valid & truth.foreground(shots[2])]
    assert np.median(error) < 0.05
    assert np.linalg.norm(forth, axis=-1)[valid & truth.foreground(shots[2])].mean() > 0.3


def test_a_still_scene_has_no_flow_and_all_of_it_is_valid(make: Callable[..., PixelEnv]) -> None:
    env = make("metaworld:door-lock", quality="fast")
    env.reset(seed=0)
    truth = motion_truth(env)
    flow, valid = truth.flow(truth.snapshot(), truth.snapshot())
    assert np.abs(flow).max() < 1e-5
    assert valid.all()


def test_tracks_are_the_flow_added_up(make: Callable[..., PixelEnv]) -> None:
    truth, _, shots = play(make("dmc:walker_walk", percept_size=128, quality="fast"), 4)
    ys, xs = np.nonzero(truth.foreground(shots[0]))
    points = np.column_stack([xs, ys])[::5].astype(float)
    tracks, visible = truth.tracks(shots, points)
    np.testing.assert_allclose(tracks[0], points, atol=1e-4)
    assert visible[0].all()
    assert visible[-1].mean() > 0.5
    added = points.copy()
    for a, b in itertools.pairwise(shots):
        step, _ = truth.tracks([a, b], added)
        flow, _ = truth.flow(a, b)
        whole = np.round(added).astype(int)
        inside = ((whole >= 0) & (whole < 128)).all(1)
        near = flow[whole[inside, 1], whole[inside, 0]]
        assert np.median(np.linalg.norm(near - (step[1] - added)[inside], axis=1)) < 0.1
        added = step[1].astype(float)
    error = np.linalg.norm(added - tracks[-1], axis=1)[visible.all(0)]
    assert np.median(error) < 0.02 < np.median(np.linalg.norm(tracks[-1] - points, axis=1))
    backward, _ = truth.tracks(shots[::-1], tracks[-1][visible[-1]])
    assert np.median(np.linalg.norm(backward[-1] - points[visible[-1]], axis=1)) < 0.2


def test_in_metaworld_a_rising_gripper_rises_in_the_picture(make: Callable[..., PixelEnv]) -> None:
    env = make("metaworld:reach", quality="fast", size=96)
    env.reset(seed=0)
    truth = motion_truth(env)
    for _ in range(10):
        env.step(np.array([0, 0, -1, 0], np.float32))
    a, low = truth.snapshot(), env.render_frame(96)
    for _ in range(12):
        env.step(np.array([0, 0, 1, 0], np.float32))
    b, high = truth.snapshot(), env.render_frame(96)
    flow, valid = truth.flow(a, b)
    hand = valid & (np.linalg.norm(flow, axis=-1) > 2)
    assert hand.sum() > 40
    assert flow[hand][:, 1].mean() < -2
    error = np.abs(warp(high, flow)[hand].astype(float) - low[hand]).mean()
    assert error < 0.6 * np.abs(high[hand].astype(float) - low[hand]).mean()
    body = truth.foreground(a)
    assert 0.03 < body.mean() < 0.4


def test_strings_and_skins_are_not_followed(make: Callable[..., PixelEnv]) -> None:
    env = make("dmc:ball_in_cup_catch", percept_size=128, quality="fast")
    truth, _, shots = play(env, 1)
    string = shots[0].ident == UNKNOWN
    assert 5 < string.sum() < 200
    flow, valid = truth.flow(shots[0], shots[1])
    assert not valid[string].any()
    assert not flow[string].any()
    points = pixel_grid(128)[string.ravel()]
    assert not truth.tracks(shots, points)[1].any()


def test_a_film_on_the_sky_can_be_declared_unknown(make: Callable[..., PixelEnv], monkeypatch: pytest.MonkeyPatch) -> None:
    from localmotion.envs.truth_mujoco import MujocoTruth

    env = make("dmc:cartpole_swingup", quality="fast")
    with pytest.raises(EnvError, match=r"call reset\(\) before snapshot"):
        motion_truth(env).snapshot()
    env.reset(seed=0)
    known, unknown = MujocoTruth(env).snapshot(), MujocoTruth(env, sky="unknown").snapshot()
    assert (known.ident == SKY).any()
    np.testing.assert_array_equal(known.ident == SKY, unknown.ident == UNKNOWN)
    painted = np.tri(64, dtype=bool)
    monkeypatch.setattr(env, "painted_mask", lambda size: painted, raising=False)
    np.testing.assert_array_equal(motion_truth(env).snapshot().ident, np.where(painted, UNKNOWN, known.ident))
    with pytest.raises(ConfigError, match="camera"):
        MujocoTruth(env, sky="camrea")  # type: ignore[arg-type]
    with pytest.raises(EnvError, match="points must be"):
        motion_truth(env).tracks([known], np.array([[np.nan, 1.0]]))
