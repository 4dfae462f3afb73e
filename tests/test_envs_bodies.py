"""Source videos of simulated bodies: they move, differ in look, repeat by seed, and never show the task's body."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmotion.envs.bodies import BODIES, Studio, choose_bodies, pattern, render_videos, smooth_actions
from localmotion.errors import ConfigError
from property_examples import examples


def test_the_tasks_body_is_left_out() -> None:
    bodies = ("cheetah", "reacher", "finger", "ball_in_cup")
    assert choose_bodies(bodies, ("dmc:reacher_easy",)) == ["cheetah", "finger", "ball_in_cup"]
    assert choose_bodies(bodies, ("dmc:ball_in_cup_catch", "cheetah")) == ["reacher", "finger"]
    assert choose_bodies(bodies, ("metaworld:reach",)) == list(bodies)
    with pytest.raises(ConfigError, match="no body left"):
        choose_bodies(("reacher",), ("dmc:reacher_hard",))
    with pytest.raises(ConfigError, match="did you mean cheetah"):
        choose_bodies(("chetah",))
    with pytest.raises(ConfigError, match="reacher"):
        choose_bodies(bodies, ("reachr",))


@pytest.mark.parametrize("body", ["cheetah", "fish", "reacher"])
def test_clips_repeat_by_seed_and_do_not_depend_on_each_other(body: str) -> None:
    one, two = Studio(body, 64), Studio(body, 64)
    try:
        clip = one.clip(8, (0, 1))
        two.clip(3, (0, 5))
        np.testing.assert_array_equal(two.clip(8, (0, 1)), clip)
        other = two.clip(8, (0, 2))
    finally:
        one.close()
        two.close()
    assert clip.shape == (8, 64, 64, 3)
    assert np.abs(clip.astype(int) - other).mean() > 10  # another look
    motion = np.abs(np.diff(clip.astype(int), axis=0)).max(axis=-1)
    assert (motion.reshape(7, -1).max(axis=1) > 15).all()  # something moves in every frame
    assert clip.std() > 10  # not black, not one colour


def test_bodies_do_not_change_what_other_environments_look_like() -> None:
    from localmotion.envs import make_env

    env = make_env("dmc:cheetah_run", quality="fast")
    before = env.reset(seed=0)[0]["image"]
    studio = Studio("cheetah", 64)
    studio.clip(2, (0,))
    studio.close()
    fresh = make_env("dmc:cheetah_run", quality="fast")
    np.testing.assert_array_equal(env.reset(seed=0)[0]["image"], before)
    np.testing.assert_array_equal(fresh.reset(seed=0)[0]["image"], before)
    env.close()
    fresh.close()


def test_videos_are_written_and_can_be_read(tmp_path: Path) -> None:
    import av

    done: list[int] = []
    paths = render_videos(
        tmp_path / "videos",
        clips=3,
        frames=5,
        size=48,
        seed=3,
        bodies=("pendulum", "acrobot", "reacher"),
        exclude=("dmc:reacher_easy",),
        progress=done.append,
    )
    assert [path.name for path in paths] == ["00000_pendulum.mp4", "00001_acrobot.mp4", "00002_pendulum.mp4"]
    assert done == [1, 2, 3]
    assert sorted(tmp_path.joinpath("videos").iterdir()) == paths
    studio = Studio("pendulum", 48)
    expected = studio.clip(5, (3, 2))
    studio.close()
    with av.open(str(paths[2])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5
    assert np.abs(np.stack(frames).astype(float) - expected).mean() < 8  # the codec's loss


@pytest.mark.parametrize(("setting", "value"), [("clips", 0), ("frames", 1), ("size", 8)])
def test_numbers_out_of_range(tmp_path: Path, setting: str, value: int) -> None:
    numbers = {"clips": 1, "frames": 2, "size": 32} | {setting: value}
    with pytest.raises(ConfigError, match=f"{setting}={value}"):
        render_videos(tmp_path, seed=0, bodies=("pendulum",), **numbers)


def test_bodies_are_environments() -> None:
    from localmotion.envs.dmc import TASKS

    assert all(TASKS[task][0] == body for body, task in BODIES.items())


@examples(30)
@given(seed=st.integers(0, 10**6), steps=st.integers(2, 200), dims=st.integers(1, 12), per_frame=st.integers(1, 5))
def test_actions_are_smooth_and_in_range(seed: int, steps: int, dims: int, per_frame: int) -> None:
    actions = smooth_actions(np.random.default_rng(seed), steps, dims, per_frame)
    assert actions.shape == (steps, dims)
    assert np.abs(actions).max() <= 1
    # Two sines of at most 0.9 with periods of at least 8 frames: the steepest slope they can have.
    assert np.abs(np.diff(actions, axis=0)).max() <= 2 * 0.9 * 2 * np.pi / (8 * per_frame) + 1e-9


@examples(15)
@given(seed=st.integers(0, 10**6), side=st.sampled_from([32, 96, 300]), low=st.floats(0.1, 0.5))
def test_patterns_keep_their_brightness(seed: int, side: int, low: float) -> None:
    picture = pattern(np.random.default_rng(seed), side, (low, low + 0.4))
    assert picture.shape == (side, side, 3)
    brightest = picture.max(axis=-1)
    # Mixing two colours can only darken the brightest channel, and only so far as the hues differ.
    assert brightest.max() <= 255 * (low + 0.4) + 1
    assert picture.std() > 0
