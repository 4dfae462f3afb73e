"""Backgrounds that move behind planar bodies: only the picture changes, and the motion of every pixel stays exact."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from localmotion.envs import list_options, make_env
from localmotion.envs.backgrounds import ProceduralBackgrounds
from localmotion.envs.base import area_average
from localmotion.envs.composite import Backdrop
from localmotion.envs.planar_backgrounds import MOTIONS, MovingBackground
from localmotion.envs.truth import SKY, motion_truth, pixel_grid
from localmotion.errors import ConfigError

MOVING = tuple(motion for motion in MOTIONS if motion != "none")


def actions(count: int, seed: int = 0, dims: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, dims)).astype(np.float32)


def made(background: str, task: str = "walker_run", **settings: Any) -> Any:
    env: Any = make_env(f"planar:{task}", background=background, **settings)
    env.reset(seed=3)
    return env


def test_only_what_is_behind_the_parts_changes() -> None:
    plain, moving = made("none", observed="both"), made("leaky", observed="both")
    for action in actions(4):
        earlier = plain.agent_mask()
        (first, *rest), (second, *others) = plain.step(action), moving.step(action)
        assert rest == others
        np.testing.assert_array_equal(first["vector"], second["vector"])
    np.testing.assert_array_equal(plain.state(), moving.state())
    np.testing.assert_array_equal(plain.agent_mask(), moving.agent_mask())
    parts = plain.part_ids()
    floor = parts == plain.painter.numbers[-1]
    assert floor.any()
    np.testing.assert_array_equal(np.where(floor, SKY, parts), moving.part_ids())
    inside = cv2.erode(plain.agent_mask().astype(np.uint8), np.ones((3, 3))) > 0
    np.testing.assert_allclose(first["image"][inside].astype(int), second["image"][inside], atol=3)  # a thin part's rim
    behind = ~cv2.dilate(plain.agent_mask().astype(np.uint8), np.ones((3, 3))).astype(bool)
    assert (first["image"] != second["image"]).any(-1)[behind].mean() > 0.95
    flow = moving.exact_flow()
    np.testing.assert_array_equal(flow[earlier], plain.exact_flow()[earlier])
    assert len(np.unique(flow[~earlier], axis=0)) == 1


def test_parts_fixed_to_the_world_stay() -> None:
    plain, moving = made("none", "cartpole_balance"), made("twin", "cartpole_balance")
    rail = plain.physics.model.ptr.geom("rail2").id
    assert (moving.part_ids() == rail).any()
    np.testing.assert_array_equal(plain.part_ids() == rail, moving.part_ids() == rail)


@pytest.mark.parametrize("motion", MOVING)
def test_it_is_the_background_of_masklam(motion: str) -> None:
    """The texture and its shifts, for the same seed, actions and settings."""
    env = made(motion, percept_size=128)
    seed = int(np.random.Generator(np.random.PCG64(3)).integers(2**31))  # of the episode that ``reset(seed=3)`` begins
    backdrop = Backdrop(motion=motion, region="rest", videos="procedural")
    backdrop.open(128, 6)
    backdrop.begin(seed)
    before = backdrop.offset
    for action in actions(3):
        pose = env.pose()
        env.step(action)
        for _ in range(env.action_repeat):
            backdrop.advance(action.astype(np.float64))
        behind = (env.painter.codes(pose, 128)) == 0
        np.testing.assert_allclose(env.exact_flow()[behind], [backdrop.offset - before] * behind.sum(), atol=1e-5)
        before = backdrop.offset
    everywhere = np.ones((128, 128), bool)
    wanted = backdrop.paint(env.render_frame(128), everywhere).astype(int)
    away = ~cv2.dilate(env.agent_mask().astype(np.uint8), np.ones((3, 3))).astype(bool)
    assert np.abs(env.render_frame(128) - wanted)[away].mean() < 1.0
    assert np.abs(np.roll(wanted, 1, 1) - wanted)[away].mean() > 2.0


def test_each_motion_follows_its_actions() -> None:
    first, second = actions(4), actions(4)
    second[1] *= -1
    begins = {}
    for motion in MOVING:
        shifts = []
        for given in (first, second):
            env = made(motion, action_repeat=1)
            drifts = []
            for action in given[[0, 1, 2, 2, 2, 2]]:
                env.step(action)
                drifts.append(env.pose().drift)
            shifts.append(np.array(drifts))
        differs = np.flatnonzero(shifts[0] != shifts[1])
        begins[motion] = int(differs[0]) if len(differs) else None
    assert begins == {"independent": None, "lagged": 4, "twin": None, "leaky": 1}  # the second action, or three env steps later


@pytest.mark.parametrize("motion", ["independent", "twin"])
def test_a_seed_gives_the_same_pictures_whatever_went_before(motion: str) -> None:
    first, second = make_env("planar:walker_run", background=motion), made(motion)
    second.step(actions(1)[0])
    runs = []
    for env in (first, second):
        pictures = [env.reset(seed=7)[0]["image"]]
        for action in actions(3):
            pictures += [env.step(action)[0]["image"], env.exact_flow()]  # type: ignore[attr-defined]
        runs.append(pictures)
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.abs(first.reset(seed=8)[0]["image"].astype(int) - runs[0][0]).max(-1) > 2).mean() > 0.5


def test_the_later_picture_warped_back_is_the_earlier_one() -> None:
    env = made("lagged", size=192)
    truth = motion_truth(env)
    still, warped = [], []
    for action in actions(4, seed=1):
        a, before = truth.snapshot(), env.render_frame(192).astype(float)
        after = env.step(action)[0]["image"]
        flow, valid = truth.flow(a, truth.snapshot())
        np.testing.assert_allclose(flow, env.exact_flow(), atol=1e-4)
        at = (pixel_grid(192).reshape(192, 192, 2) + flow).astype(np.float32)
        back = cv2.remap(after, at[..., 0], at[..., 1], cv2.INTER_LINEAR)
        # Away from the rims of parts, in both pictures
        rims = [cv2.dilate(env.painter.codes(p, 192).clip(0, 1), np.ones((5, 5))) > 0 for p in (env._before, env.pose())]
        clear = cv2.remap(rims[1].astype(np.uint8), at[..., 0], at[..., 1], cv2.INTER_NEAREST) == 0
        behind = valid & (a.ident == SKY) & ~rims[0] & clear
        assert behind.mean() > 0.3
        still.append(np.abs(after - before)[behind].mean())
        warped.append(np.abs(back - before)[behind].mean())
    assert np.mean(still) > 5
    assert np.mean(warped) < 0.6  # levels: rounding and bilinear interpolation


def test_tracks_and_camera_motion_are_those_of_the_background() -> None:
    env = made("leaky", percept_size=128)
    truth = motion_truth(env)
    shots, moved = [truth.snapshot(64)], []
    for action in actions(3):
        before = env.pose().drift
        env.step(action)
        moved.append((env.pose().drift - before) * 64)
        shots.append(truth.snapshot(64))
    rows, columns = np.nonzero(shots[0].ident == SKY)
    points = np.column_stack([columns, rows]).astype(float)
    tracks, visible = truth.tracks(shots, points)
    np.testing.assert_allclose((tracks[-1] - points) @ [1, 1j], np.full(len(points), sum(moved)), atol=1e-3)
    assert 0.5 < visible[-1].mean() < 1.0
    camera = truth.camera_flow(shots[0], shots[1])
    np.testing.assert_allclose(camera @ np.array([1, 1j]), np.full((64, 64), moved[0]), atol=1e-4)
    np.testing.assert_array_equal(truth.foreground(shots[0]), shots[0].ident >= 0)


def test_a_background_that_moves_alone_is_drawn_anew() -> None:
    env = made("independent")
    state, first, picture = env.physics.get_state().copy(), env.pose(), env.render_frame(64)
    env._control(actions(1)[0].astype(np.float64))
    with env.physics.reset_context():
        env.physics.set_state(state)
    np.testing.assert_array_equal(env.pose().place, first.place)
    assert env.pose().drift != first.drift
    assert (env.render_frame(64) != picture).any()


def test_pictures_of_every_size_show_the_same() -> None:
    env = made("independent")
    env.step(actions(1)[0])
    large = area_average(env.render_frame(256), 64).astype(int)
    assert np.abs(large - env.render_frame(64))[~env.agent_mask()].mean() < 1.5


def test_wrong_names_are_errors_and_a_run_knows_its_background() -> None:
    assert "background" in list_options("planar")
    with pytest.raises(ConfigError, match="did you mean lagged"):
        make_env("planar:walker_run", background="laged")
    with pytest.raises(ConfigError, match="background of planar bodies"):
        make_env("planar:walker_run", background="video")
    told = make_env("planar:walker_run", background="twin").describe()["background"]
    assert (told["motion"], told["correlation"], told["clips"]["source"]) == ("twin", 0.7, "procedural")
    assert told["clips"]["split"] == "train"
    assert make_env("planar:walker_run").describe()["background"] == "none"


def test_held_out_textures_are_never_those_of_training() -> None:
    """The textures of 60 episodes of each split, by the frames that they are from."""
    frames = {
        split: {frame.tobytes() for k in range(clips.count()) for frame in clips.clip(k)}
        for split in ("train", "val")
        for clips in [ProceduralBackgrounds(split, None, 8)]
    }
    assert not frames["train"] & frames["val"]
    shown = {}
    for split in ("train", "val", "all"):
        moving = MovingBackground("lagged", 8, 6, split)
        shown[split] = set()
        for seed in range(60):
            moving.begin(seed)
            shown[split].add(moving.picture(0j, 8).tobytes())
    assert shown["train"] <= frames["train"]
    assert shown["val"] <= frames["val"]
    assert shown["all"] & frames["train"]
    assert shown["all"] & frames["val"]
    pictures = {split: made("lagged", split=split, size=16).render_frame(16) for split in ("train", "val")}
    default = made("lagged", size=16)
    np.testing.assert_array_equal(default.render_frame(16), pictures["train"])
    assert (pictures["val"] != pictures["train"]).any()
    assert made("lagged", split="val", size=16).describe()["background"]["clips"] == {
        "source": "procedural",
        "split": "val",
        "clips": 30,
        "side": 16,
    }
    with pytest.raises(ConfigError, match=r"split of the background's textures 'test'"):
        make_env("planar:walker_run", split="test")
