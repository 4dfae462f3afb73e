"""Distractions: background videos, camera, colours, painted backgrounds and agent masks; only what is seen may change."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from localmotion.envs import list_envs, list_options, make_env
from localmotion.envs.backgrounds import (
    ActionShift,
    ClipCache,
    Playback,
    ProceduralBackgrounds,
    find_backgrounds,
    mixing,
    shifted,
)
from localmotion.envs.base import PixelEnv
from localmotion.envs.camera_walk import from_sphere, looking, to_sphere
from localmotion.errors import ConfigError, EnvError
from localmotion.runs.settings import compose
from property_examples import examples
from test_envs_dmcr import actions, digest

Make = Callable[..., PixelEnv]

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("distracting:walker_run", {"difficulty": "hard"}),
    ("distracting:reacher_easy", {"difficulty": "medium"}),
    ("diswm:cheetah_run", {}),
    ("masklam:hopper_hop", {"motion": "twin"}),
    ("dmw:drawer-open", {}),
]


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[PixelEnv] = []

    def build(name: str, **settings: Any) -> PixelEnv:
        opened.append(make_env(name, **{"quality": "fast", **settings}))
        return opened[-1]

    yield build
    for env in opened:
        env.close()


def plain_name(name: str) -> str:
    suite, _, task = name.partition(":")
    return f"{'metaworld' if suite == 'dmw' else 'dmc'}:{task}"


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_states_and_rewards_are_those_of_the_plain_task(make: Make, name: str, options: dict[str, Any]) -> None:
    plain, distracted = make(plain_name(name)), make(name, **options)
    first, second = plain.reset(seed=3)[0]["image"], distracted.reset(seed=3)[0]["image"]
    assert np.abs(first.astype(int) - second).mean() > 2
    np.testing.assert_array_equal(plain.state(), distracted.state())
    for action in actions(plain, 5):
        assert plain.step(action)[1] == distracted.step(action)[1]
    np.testing.assert_array_equal(plain.state(), distracted.state())


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_seed_gives_the_same_episode_whatever_went_before(make: Make, name: str, options: dict[str, Any]) -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = make(name, **options), make(name, seed=9, **options)
    second.reset()
    for action in actions(second, 3):
        second.step(action)

    def play(env: PixelEnv) -> np.ndarray:
        return np.stack([env.reset(seed=7)[0]["image"], *(env.step(action)[0]["image"] for action in actions(env, 3))])

    pictures = play(first)
    np.testing.assert_array_equal(pictures, play(second))
    np.testing.assert_array_equal(pictures, play(first))
    assert not np.array_equal(first.reset(seed=8)[0]["image"], pictures[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_a_fresh_process_sees_the_same() -> None:
    wanted = [KINDS[0], KINDS[3], KINDS[4]]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_envs_distracting import KINDS, digest\n"
        "for kind in (0, 3, 4): print(digest(*KINDS[kind]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.stdout.split() == [digest(*kind) for kind in wanted], done.stderr


def test_environments_stepped_in_turn_do_not_disturb_each_other(make: Make, videos: Path) -> None:
    kinds = [*KINDS, ("distracting:walker_run", {"difficulty": "low", "videos": videos}), ("dmcr:walker_run", {})]

    def play(env: PixelEnv) -> Iterator[np.ndarray]:
        yield env.reset(seed=1)[0]["image"]
        for action in actions(env, 2):
            yield env.step(action)[0]["image"]

    alone = [list(play(make(name, **options))) for name, options in kinds]
    for time, images in enumerate(zip(*(play(make(name, **options)) for name, options in kinds), strict=True)):
        for kind, image in enumerate(images):
            np.testing.assert_array_equal(image, alone[kind][time], err_msg=kinds[kind][0])


@pytest.mark.parametrize("name", ["distracting:cartpole_swingup", "diswm:walker_run", "masklam:walker_run", "dmw:reach"])
def test_passes_the_checker_of_gymnasium(make: Make, name: str) -> None:
    check_env(make(name), skip_render_check=True)


# ---------------------------------------------------------------------------------------------------------- distracting


@pytest.mark.parametrize("one", ["background", "camera", "colour"])
def test_each_distraction_alone(make: Make, one: str) -> None:
    env: Any = make("distracting:cheetah_run", difficulty="hard", distractions=one)
    plain: Any = make("dmc:cheetah_run")
    observation, own = env.reset(seed=1)[0]["image"], plain.reset(seed=1)[0]["image"]
    assert (observation != own).any()
    drawn, expected = env.physics.model.ptr, plain.physics.model.ptr
    assert np.array_equal(drawn.mat_rgba, expected.mat_rgba) == (one != "colour")
    moved = not np.array_equal(env.physics.data.cam_xpos, plain.physics.data.cam_xpos)
    assert moved == (one == "camera")
    assert (env.describe()["backgrounds"] is not None) == (one == "background")


def test_no_distraction_is_the_plain_picture(make: Make) -> None:
    own = make("dmc:walker_run").reset(seed=1)[0]["image"]
    for options in ({"difficulty": "vanilla"}, {"distractions": "none"}, {"distractions": "camera", "scale": 0}):
        np.testing.assert_array_equal(make("distracting:walker_run", **options).reset(seed=1)[0]["image"], own)


def test_switching_one_off_leaves_the_others_as_they_are(make: Make) -> None:
    both: Any = make("distracting:cheetah_run", difficulty="hard", distractions="camera,colour")
    camera: Any = make("distracting:cheetah_run", difficulty="hard", distractions="camera")
    for env in (both, camera):
        env.reset(seed=2)
        env.step(actions(env, 1)[0])
    np.testing.assert_array_equal(both.physics.data.cam_xpos, camera.physics.data.cam_xpos)


def test_levels_are_those_of_the_papers(make: Make) -> None:
    facts = {level: make("distracting:walker_run", difficulty=level).describe() for level in ("easy", "medium", "hard", "low")}
    assert {level: (fact["scale"], fact["backgrounds"]["clips"]) for level, fact in facts.items()} == {
        "easy": (0.1, 4),
        "medium": (0.2, 8),
        "hard": (0.3, 60),
        "low": (0.0, 60),
    }


def test_colours_and_camera_stay_within_their_boxes(make: Make) -> None:
    env: Any = make("distracting:walker_run", difficulty="hard", distractions="camera,colour", action_repeat=20)
    plain: Any = make("dmc:walker_run")
    own = plain.physics.model.ptr.mat_rgba[:, :3]
    seen = []
    for seed in range(4):
        env.reset(seed=seed)
        for action in actions(env, 5):
            env.step(action)
            data = env.physics.data.ptr
            radius, around, down = to_sphere(data.cam_xpos[0] - data.subtree_com[1])
            seen.append((radius, around, down))
            axes = data.cam_xmat[0].reshape(3, 3)
            np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-9)
            assert np.linalg.det(axes) > 0
            assert np.abs(env.physics.model.ptr.mat_rgba[:, :3] - own).max() <= 0.3 + 1e-6
    reach = np.array(seen)
    start = float(np.linalg.norm(plain.physics.model.ptr.cam_poscom0[0]))
    assert reach[:, 0].min() >= start * (1 - 0.5 * 0.3) - 1e-9
    assert reach[:, 0].max() <= start * (1 + 1.5 * 0.3) + 1e-9
    assert np.all(np.abs(reach[:, 1] + np.pi / 2) <= np.pi / 2 * 0.3 + 1e-6)
    assert np.all(reach[:, 2] <= np.pi / 2 + 1e-6)
    assert np.ptp(reach[:, 1]) > 0.2


@given(st.tuples(*[st.floats(-5, 5)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1))
def test_sphere_coordinates_round_trip(vector: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(from_sphere(to_sphere(np.array(vector))), vector, atol=1e-9)


@given(st.tuples(*[st.floats(-3, 3)] * 3), st.booleans())
@examples(40)
def test_cameras_look_where_they_should(eye: tuple[float, float, float], level: bool) -> None:
    if np.hypot(*eye[:2]) < 0.05:
        return  # straight above or below: level has no answer
    axes = looking(np.array(eye), np.zeros(3), level=level)
    np.testing.assert_allclose(-axes[:, 2], -np.array(eye) / np.linalg.norm(eye), atol=1e-9)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert np.linalg.det(axes) > 0
    if level:
        assert abs(axes[2, 0]) < 1e-9
        assert axes[2, 1] > 0


# ----------------------------------------------------------------------------------------------------------- backgrounds


@given(st.integers(0, 2**31 - 1))
@examples(25)
def test_playback_moves_by_one_and_bounces(seed: int) -> None:
    playback = Playback(ProceduralBackgrounds("all", None, 16), np.random.default_rng(seed))
    shown = [playback.index]
    for _ in range(200):
        playback.advance()
        shown.append(playback.index)
    steps = np.diff(shown)
    assert set(shown) == set(range(80))
    assert np.abs(steps).max() == 1
    turns = np.flatnonzero(steps[1:] != steps[:-1])
    assert {shown[turn + 1] for turn in turns} <= {0, 79}
    assert (steps == 0).sum() <= 1  # only a start at an end, headed outwards, waits there once


def test_splits_do_not_overlap_and_are_every_third(videos: Path, tmp_path: Path) -> None:
    names = {split: find_backgrounds(videos, split=split, limit=None, side=32) for split in ("train", "val", "all")}
    assert [names[split].count() for split in ("train", "val", "all")] == [6, 2, 8]
    listed = {split: [ref.path.name for ref in names[split]._videos] for split in names}  # type: ignore[attr-defined]
    assert not set(listed["train"]) & set(listed["val"])
    assert sorted(listed["train"] + listed["val"]) == sorted(listed["all"])
    for part, source in (("train", "clip0.mp4"), ("val", "clip1.mp4")):
        (tmp_path / part).mkdir()
        (tmp_path / part / source).write_bytes((videos / source).read_bytes())
    assert find_backgrounds(tmp_path, split="all", limit=None, side=32).count() == 2
    held_out = find_backgrounds(tmp_path, split="val", limit=None, side=32)
    assert held_out.count() == 1
    assert held_out.clip(0).shape == (30, 32, 32, 3)
    procedural = {split: find_backgrounds("procedural", split=split, limit=None, side=8) for split in ("train", "val", "all")}
    clips = {split: [found.clip(k).tobytes() for k in range(found.count())] for split, found in procedural.items()}
    assert [len(set(clips[split])) for split in ("train", "val", "all")] == [60, 30, 90]
    assert not set(clips["train"]) & set(clips["val"])
    assert clips["train"] + clips["val"] == clips["all"]


@pytest.mark.parametrize("name", ["distracting:walker_run", "masklam:walker_run", "dmw:reach"])
def test_every_suite_shows_the_clips_of_its_split(make: Make, name: str) -> None:
    for split, count in (("train", 60), ("val", 30)):
        options = {"split": split, **({"num_videos": 90} if name.startswith("distracting") else {})}
        facts = make(name, size=16, **options).describe()
        clips = facts.get("backgrounds") or facts["background"]["clips"]
        assert (clips["split"], clips["clips"]) == (split, count)


def test_the_cache_of_clips_keeps_the_ones_used_last() -> None:
    cache, made = ClipCache(250), []

    def get(key: str) -> None:
        cache.get((key, 1), lambda: (made.append(key), np.zeros(100, np.uint8))[1])

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert made == ["a", "b", "c", "b"]
    cache.get(("large", 1), lambda: np.zeros(1000, np.uint8))
    get("b")
    assert made[-2:] == ["b", "b"]


def test_gratings_move_tile_and_differ() -> None:
    clips = ProceduralBackgrounds("train", None, 32)
    clip = clips.clip(0).astype(int)
    assert clip.shape == (80, 32, 32, 3)
    assert 20 < clip.std() < 80
    change = np.abs(np.diff(clip, axis=0)).mean()
    assert 1 < change < 40
    seam = np.abs(clip[:, :, 0] - clip[:, :, -1]).mean()
    assert seam < 2 * np.abs(np.diff(clip, axis=2)).mean()
    assert not np.array_equal(clip, clips.clip(1))


def test_videos_of_a_folder_are_shown(make: Make, videos: Path) -> None:
    env = make("distracting:walker_run", difficulty="low", videos=videos, split="val")
    first = env.reset(seed=0)[0]["image"]
    procedural = make("distracting:walker_run", difficulty="low").reset(seed=0)[0]["image"]
    assert np.abs(first.astype(int) - procedural).mean() > 5
    facts = env.describe()["backgrounds"]
    assert (facts["source"], facts["clips"], facts["split"]) == ("folder", 2, "val")


# ------------------------------------------------------------------------------------------------------ shifts by actions


def shift(motion: str, drive: np.ndarray, correlation: float = 1.0, **options: Any) -> np.ndarray:
    """Innovations (N, 2) of the offset under actions (N, A)."""
    given = {"lag": 3, "rank": 2, "twin": None, "speed": 2.0} | options
    process = ActionShift(motion, correlation=correlation, dims=drive.shape[1], rng=np.random.default_rng(0), **given)
    places = [process.offset]
    for action in drive:
        process.advance(action)
        places.append(process.offset)
    track = np.array(places)
    return track[1:] - ActionShift.RHO * track[:-1]


def test_leaky_lagged_and_twin_follow_the_actions_they_say() -> None:
    rng = np.random.default_rng(1)
    drive, other = rng.uniform(-1, 1, (50, 4)), rng.uniform(-1, 1, (50, 4))
    pull = 2.0 * np.tanh(np.sqrt(3) * drive) @ mixing(4, 2).T
    np.testing.assert_allclose(shift("leaky", drive), pull, atol=1e-12)
    np.testing.assert_allclose(shift("lagged", drive)[3:], pull[:-3], atol=1e-12)
    np.testing.assert_allclose(shift("lagged", drive)[:3], 0, atol=1e-12)
    np.testing.assert_array_equal(shift("twin", drive, twin=other), shift("twin", other, twin=other))
    np.testing.assert_array_equal(shift("independent", drive), shift("independent", other))


def test_correlation_is_what_the_knob_says() -> None:
    drive = np.random.default_rng(1).uniform(-1, 1, (20_000, 2))
    scaled = np.tanh(np.sqrt(3) * drive) @ mixing(2, 2).T
    for c in (0.0, 0.5, 0.9):
        moved = shift("leaky", drive, correlation=c) / 2.0
        slope = (moved * scaled).sum(axis=0) / (scaled**2).sum(axis=0)
        np.testing.assert_allclose(slope, c, atol=0.03)
        np.testing.assert_allclose((moved - c * scaled).std(axis=0), np.sqrt(1 - c * c), atol=0.02)


def test_rank_one_moves_along_a_line() -> None:
    drive = np.random.default_rng(1).uniform(-1, 1, (30, 6))
    assert np.linalg.matrix_rank(shift("leaky", drive, rank=1), tol=1e-9) == 1
    assert np.linalg.matrix_rank(shift("leaky", drive, rank=2), tol=1e-9) == 2
    np.testing.assert_allclose(np.linalg.norm(mixing(6, 2), axis=1), 1)


def test_shifted_pictures_wrap_and_interpolate() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(shifted(picture, np.array([3.0, -2.0])), np.roll(picture, (-2, 3), axis=(0, 1)))
    np.testing.assert_array_equal(shifted(picture, np.array([16.0, 32.0])), picture)
    half = shifted(picture, np.array([0.5, 0.0])).astype(float)
    np.testing.assert_allclose(half, (picture.astype(float) + np.roll(picture, 1, axis=1)) / 2, atol=0.51)


def test_the_background_is_painted_and_the_agent_is_not(make: Make) -> None:
    plain, painted = make("dmc:walker_run"), make("masklam:walker_run", motion="leaky")
    for env in (plain, painted):
        env.reset(seed=0)
    for action in actions(plain, 3):
        own, seen = plain.step(action)[0]["image"], painted.step(action)[0]["image"]
        mask = painted.agent_mask()  # type: ignore[attr-defined]
        np.testing.assert_array_equal(own[mask], seen[mask])
        assert (own[~mask] != seen[~mask]).mean() > 0.9


def test_regions_keep_what_they_should(make: Make) -> None:
    own = make("dmc:reacher_easy").reset(seed=0)[0]["image"]
    counts = {}
    for region in ("sky", "scenery", "rest"):
        image = make("masklam:reacher_easy", region=region).reset(seed=0)[0]["image"]
        counts[region] = int((image != own).any(axis=-1).sum())
    assert counts["sky"] == 0  # the reacher's camera sees no sky
    assert 2000 < counts["scenery"] < counts["rest"]  # rest hides the target too


def test_twin_actions_come_from_a_file(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "twin.npy"
    np.save(path, np.random.default_rng(0).uniform(-1, 1, (40, 6)))
    env: Any = make("masklam:walker_run", motion="twin", twin_actions=path, correlation=1.0)
    env.reset(seed=0)
    for action in actions(env, 2):
        env.step(action)
    assert env.describe()["background"]["twin_given"] is True
    assert np.abs(env.backdrop.offset).max() > 0
    with pytest.raises(ConfigError, match="6 actions a row, the environment has 4"):
        make("masklam:hopper_hop", motion="twin", twin_actions=path)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        make("masklam:walker_run", twin_actions=tmp_path / "none.npy")


# ----------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(("name", "share"), [("dmc:walker_walk", (0.02, 0.3)), ("metaworld:drawer-open", (0.05, 0.5))])
@pytest.mark.parametrize("quality", ["fast", "reference"])
def test_masks_are_where_the_agent_is(make: Make, name: str, share: tuple[float, float], quality: str) -> None:
    env: Any = make(name, quality=quality)
    with pytest.raises(EnvError, match="reset"):
        env.agent_mask()
    before = env.reset(seed=0)[0]["image"]
    mask = env.agent_mask()
    assert mask.shape == (64, 64)
    assert mask.dtype == bool
    assert share[0] < mask.mean() < share[1]
    np.testing.assert_array_equal(env._draw(64), before)  # rendering a mask leaves no trace
    large = env.agent_mask(256).reshape(64, 4, 64, 4).mean(axis=(1, 3))
    assert np.abs(large - mask).mean() < 0.05
    # The agent painted another colour: what changes is in the mask or right beside it (shadows and mirror images apart).
    model = env.physics.model.ptr if hasattr(env, "physics") else env.inner.model
    from localmotion.envs.masks import AGENT, moving_parts, subtree_parts

    parts = moving_parts(model) if hasattr(env, "physics") else subtree_parts(model)
    geoms = parts.geoms == AGENT
    model.geom_matid[geoms] = -1
    model.geom_rgba[geoms, :3] = (0, 1, 0)
    changed = np.abs(env._draw(64).astype(int) - before).max(axis=-1) > 60
    assert (changed & mask).sum() > 0.6 * mask.sum()
    assert (changed & ~mask).sum() < 0.35 * changed.sum()


def test_the_string_of_the_cup_is_the_agent_and_its_target_is_not(make: Make) -> None:
    from localmotion.envs.masks import OTHER, moving_parts

    env: Any = make("dmc:ball_in_cup_catch")
    env.reset(seed=0)
    assert 0.005 < env.agent_mask().mean() < 0.1
    reacher: Any = make("dmc:reacher_easy")
    model = reacher.physics.model.ptr
    assert moving_parts(model).geoms[model.geom("target").id] == OTHER


def test_what_is_painted_is_not_followed_as_ground_truth(make: Make) -> None:
    from localmotion.envs.truth import UNKNOWN, motion_truth

    for name, options in (("masklam:walker_run", {}), ("distracting:walker_run", {"difficulty": "low"}), ("dmw:reach", {})):
        env: Any = make(name, **options)
        env.reset(seed=0)
        painted = env.painted_mask(64)
        ident = motion_truth(env).snapshot().ident
        assert 0.05 < painted.mean() < 0.98
        assert np.all(ident[painted] == UNKNOWN)
        assert np.all(ident[env.agent_mask() & ~painted] != UNKNOWN)
    still: Any = make("distracting:walker_run", difficulty="vanilla")
    still.reset(seed=0)
    assert not still.painted_mask(64).any()


def test_the_sky_sent_fast_is_the_sky_mujoco_sends(make: Make) -> None:
    env: Any = make("distracting:walker_run", difficulty="low")
    fast = env.reset(seed=0)[0]["image"].astype(int)
    env._renderer.upload_texture(env._slot.index)
    difference = np.abs(env._draw(64) - fast)
    assert difference.mean() < 0.5  # MuJoCo also draws from smaller copies of the texture


# ----------------------------------------------------------------------------------------------------------------- diswm


def test_colours_of_diswm_are_near_their_base(make: Make) -> None:
    env: Any = make("diswm:cheetah_run", phase=1)
    for phase, base in ((1, (0.7, 0.3, 0.5)), (2, (0.5, 0.7, 0.3))):
        env.set_phase(phase)
        env.reset(seed=0)
        seen = [env.physics.model.ptr.mat_rgba[:, :3].copy()]
        for action in actions(env, 10):
            env.step(action)
            seen.append(env.physics.model.ptr.mat_rgba[:, :3].copy())
        off = np.array(seen) - base
        assert np.abs(off).max() <= 0.2 + 1e-6
        assert np.abs(off).max() > 0.19  # the walk is as wide as its box
        assert np.abs(np.diff(off, axis=0)).mean() > 0.05


def test_the_reference_repeats_twice_and_loses_half_of_the_rewards(make: Make) -> None:
    plain = make("dmc:cheetah_run", action_repeat=1)
    usual, quirk = make("diswm:cheetah_run"), make("diswm:cheetah_run", reference_repeat=True)
    for env in (plain, usual, quirk):
        env.reset(seed=0)
    for action in actions(plain, 4):
        each = [plain.step(action)[1] for _ in range(4)]
        _, reward, _, _, info = quirk.step(action)
        assert info["env_steps"] == 4
        assert reward == pytest.approx(2 * (each[2] + each[3]))
    assert usual.action_repeat == 2
    assert quirk.describe()["reference_repeat"] is True
    ended = make("diswm:cheetah_run", reference_repeat=True, time_limit=8)
    ended.reset(seed=0)
    assert [ended.step(actions(ended, 1)[0])[3] for _ in range(2)] == [False, True]


# --------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("distracting:walker_run", {"difficulty": "eazy"}, "did you mean easy"),
        ("distracting:walker_run", {"dificulty": "easy"}, "did you mean difficulty"),
        ("distracting:walker_run", {"distractions": "color"}, "did you mean colour"),
        ("distracting:walker_run", {"split": "test"}, "train"),
        ("distracting:walker_run", {"scale": 2}, "scale=2"),
        ("distracting:walker_run", {"num_videos": 1.5}, "num_videos=1.5"),
        ("distracting:walker_run", {"videos": "/nowhere"}, "is not a folder"),
        ("distracting:walker_run", {"dynamic": "no"}, "true or false"),
        ("diswm:walker_run", {"phase": 3}, "phase=3"),
        ("masklam:walker_run", {"motion": "leeky"}, "did you mean leaky"),
        ("masklam:walker_run", {"correlation": 1.1}, "correlation=1.1"),
        ("masklam:walker_run", {"region": "floor"}, "region of the background"),
        ("masklam:walker_run", {"lag": 0}, "lag=0"),
        ("dmw:rech", {}, "did you mean dmw:reach"),
        ("metaworld:reach", {"difficulty": "easy"}, "known: camera, end_on_success, time_limit"),
        ("dmw:reach", {"end_on_success": 1}, "end_on_success=1 must be true or false"),
        ("toy:dot", {"difficulty": "easy"}, "toy has no options"),
    ],
)
def test_wrong_options_say_what_is_right(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_env(name, **options)


def test_suites_and_options_are_listed() -> None:
    assert "difficulty" in list_options("distracting")
    assert list_options("dmc") == []
    assert list_options("diswm") == ["phase", "reference_repeat"]
    assert {*list_options("masklam"), "end_on_success"} == set(list_options("dmw"))
    assert len(list_envs("dmw")) == 50
    with pytest.raises(ConfigError, match="did you mean distracting"):
        list_options("distractin")


def test_options_reach_a_run() -> None:
    from localmotion.acting.observer import make_observer

    text = "env_options={difficulty: medium, distractions: [colour]}"
    run = compose("drp", "finetune", env="distracting:walker_run", preset="debug", settings=[text])
    assert run.env_options == {"difficulty": "medium", "distractions": ["colour"]}
    env: Any = make_observer(run, None).env
    assert (env.difficulty, env.distractions) == ("medium", ("colour",))
    assert env.quality == run.quality or run.quality == "auto"
    assert (
        compose("drp", "finetune", env="dmw:reach").online.env_steps
        == compose("drp", "finetune", env="metaworld:reach").online.env_steps
    )
    env.close()
