"""Environments of one's own: what their spaces become, how they are named, and that no file can have one imported."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from localmotion import foreign
from localmotion.acting.episodes import evaluate, run_episodes
from localmotion.acting.observer import Observer
from localmotion.acting.policy import random_policy
from localmotion.config import to_dict
from localmotion.envs import check_env, make_env, trust_env
from localmotion.envs.gym_env import GymEnv
from localmotion.envs.spaces import read_actions, read_observations
from localmotion.errors import ConfigError, EnvError, SimulationError
from localmotion.evaluation.films import save_film
from localmotion.runs.load import load_run
from localmotion.runs.settings import compose
from localmotion.training.study import load_study
from localmotion.video.decode import probe
from localmotion.video.listing import VideoRef
from own_envs import NUMBERS, Walk, drawn, picture
from refusals import fails

CHOICES, DRAWN = "own_envs:choices", "own_envs:drawn"


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trusted, and where modules are looked for, is as before afterwards."""
    monkeypatch.setattr(foreign, "_trusted", [CHOICES, DRAWN])
    monkeypatch.setattr(sys, "path", list(sys.path))


def one_hot(index: int, count: int = 3) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[index]


# 1. Spaces ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "action", "expected"),
    [
        (spaces.Box(-1, 1, (2,), np.float32), [0.3, -1.0], np.float32([0.3, -1.0])),
        (spaces.Box(-2, 6, (2,), np.float32), [0.0, 0.5], np.float32([2.0, 4.0])),
        (
            spaces.Box(np.array([[0.0], [10.0]]), np.array([[1.0], [30.0]]), dtype=np.float64),
            [1.0, -0.5],
            np.array([[1.0], [15.0]]),
        ),
        (spaces.Discrete(4, start=7), [0, 0, 1, 0], 9),
    ],
)
def test_an_action_is_what_the_space_takes(space: Any, action: list[float], expected: Any) -> None:
    given = read_actions(space).given(np.array(action, np.float64))
    np.testing.assert_array_equal(given, expected)
    assert space.contains(given)


def test_rounding_does_not_leave_the_bounds() -> None:
    space = spaces.Box(np.float32(0.1), np.float32(0.7), (1,), np.float32)
    for end in (-1.0, 1.0):
        assert space.contains(read_actions(space).given(np.array([end])))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (spaces.Box(-np.inf, 1, (3,)), r"no bounds.*TransformAction\(env, lambda a: a, gymnasium.spaces.Box\(-1, 1, \(3,\)\)"),
        (spaces.MultiDiscrete([2, 3]), "MultiDiscrete, which no method takes; wrap it so that it has one Discrete space"),
        (spaces.MultiBinary(2), "MultiBinary, which no method takes"),
        (
            spaces.Tuple([spaces.Discrete(2)]),
            "Tuple, which no method takes; wrap it so that it has one Box or one Discrete space",
        ),
        (spaces.Box(0, 9, (2,), np.int64), "Box of int64; use floats, or Discrete"),
        (spaces.Discrete(1), "one action, so there is nothing to choose"),
        (spaces.Box(0, 1, (0,)), "no numbers"),
    ],
)
def test_other_actions_are_refused_with_what_to_do(space: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_actions(space)


def test_the_parts_of_an_observation() -> None:
    found = read_observations(
        spaces.Dict({"rgb": picture(8, 8, 3), "pixels": picture(9, 9, 1), "reward": NUMBERS["speed"], "words": spaces.Text(3),
                     "depth": spaces.Box(0, 1, (8, 8, 1)), "pair": spaces.Tuple([spaces.Discrete(3), NUMBERS["speed"]])})
    )  # fmt: skip
    assert found.picture == "pixels"  # image, then pixels, then rgb
    assert set(found.numbers) == {"pair"}
    assert found.length("pair") == 5
    assert set(found.left_out) == {"rgb", "reward", "words", "depth"}
    assert "records use this key" in found.left_out["reward"]
    assert found.goal is None
    plain = read_observations(NUMBERS["speed"])
    assert (plain.picture, plain.numbers, dict(plain.left_out)) == (None, ("state",), {})
    assert read_observations(picture(8, 8, 3)).picture == "image"
    assert read_observations(spaces.Dict({"goal": NUMBERS["speed"]})).left_out


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (spaces.Box(0, 255, (8, 8, 3), np.float32), "floats must be in 0..1, but its bounds are 0 and 255; give uint8"),
        (spaces.Box(-1, 1, (8, 8, 3), np.float32), "bounds are -1 and 1"),
        (picture(3, 8, 8), r"shape \(3, 8, 8\) is not H x W x 3; move the channels to the end"),
        (picture(8, 8, 4), r"shape \(8, 8, 4\) is not H x W x 3$"),
        (spaces.Box(0, 255, (8, 8, 3), np.int64), "pictures are uint8"),
    ],
)
def test_pictures_that_cannot_be_used(space: Any, said: str) -> None:
    for whole in (space, spaces.Dict({"image": space})):
        with pytest.raises(ConfigError, match=said):
            read_observations(whole)


def test_floats_and_grey_pictures_become_bytes() -> None:
    found = read_observations(spaces.Dict({"image": spaces.Box(0, 1, (2, 2, 3), np.float32)}))
    seen = found.image({"image": np.full((2, 2, 3), [0.0, 0.5, 1.0], np.float32)}, "image")
    assert seen.dtype == np.uint8
    assert seen[0, 0].tolist() == [0, 128, 255]
    grey = read_observations(picture(2, 1, 1))
    assert grey.image({"image": np.uint8([[[5]], [[9]]])}, "image").tolist() == [[[5, 5, 5]], [[9, 9, 9]]]
    with pytest.raises(EnvError, match=r"observation 'image' has shape \(3, 3, 1\), its space says \(2, 1, 1\)"):
        grey.image({"image": np.zeros((3, 3, 1), np.uint8)}, "image")


# 2. The environment -----------------------------------------------------------------------------------------------------------


def test_pictures_are_averaged_and_numbers_come_along() -> None:
    env = make_env(CHOICES, size=16, percept_size=64)
    seen, info = env.reset(seed=5)
    inner: Any = env.inner  # type: ignore[attr-defined]
    assert info == {"env_steps": 0}
    assert env.observation_space.contains(seen)
    assert {key: (value.shape, value.dtype.name) for key, value in seen.items()} == {
        "image": ((16, 16, 3), "uint8"), "percept": ((64, 64, 3), "uint8"),
        "position": ((1,), "float32"), "speed": ((2,), "float32"), "kind": ((3,), "float32"),
    }  # fmt: skip
    assert np.unique(seen["image"]).tolist() == np.unique(seen["percept"]).tolist() == [inner.level]
    seen, *_ = env.step(one_hot(0))
    assert seen["kind"].tolist() == [0, 1, 0]
    kept = seen["position"]
    env.step(one_hot(1))
    assert kept[0] != inner.buffer[0]  # a copy, though the environment returns one array again and again
    env.show("both")
    seen, _ = env.reset(seed=5)
    np.testing.assert_array_equal(seen["vector"], np.concatenate([seen["kind"], seen["position"], seen["speed"]]))  # Dict sorts
    assert env.observation_space.contains(seen)
    assert env.describe()["recorded"] == ["kind", "position", "speed"]
    assert env.metadata["render_fps"] == 7


def test_without_a_picture_the_environment_is_rendered() -> None:
    """Squeezed to a square, by areas."""
    env = make_env(DRAWN, size=10)
    seen, _ = env.reset(seed=0)
    inner: Any = env.inner  # type: ignore[attr-defined]
    expected = cv2.resize(inner.render(), (10, 10), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(seen["image"], expected)
    assert inner.level > 9
    assert np.abs(seen["image"][:, :5] - inner.level / 2).max() <= 0.5  # each cell has a stripe and a gap
    assert not seen["image"][:, 5:].any()
    assert seen["state"].tolist() == [np.float32(inner.at)]
    assert env.describe()["pictures"] == "render"
    assert env.render().shape == (256, 256, 3)


def test_ends_of_the_task_and_ends_by_a_limit() -> None:
    """Rewards of an action's env steps are added; an episode ends within them."""
    env = make_env(DRAWN, action_repeat=4)
    inner: Any = env.inner  # type: ignore[attr-defined]
    env.reset(seed=0)
    start = inner.at
    _, reward, terminated, truncated, info = env.step(np.float32([0.0, 0.0]))  # 2 x 0.5 an env step
    assert (terminated, truncated, info) == (True, False, {"env_steps": 3, "success": 1.0})
    assert reward == pytest.approx(3 * start + 1 + 2 + 3)
    assert [action.tolist() for action in inner.taken] == [[0.5, 0.5]] * 3
    with pytest.raises(EnvError, match="the episode is over"):
        env.step(np.float32([0.0, 0.0]))
    still = np.float32([-0.5, -0.5])
    short = make_env(DRAWN, action_repeat=4, limit=6)
    short.reset(seed=0)
    ends = [short.step(still)[2:] for _ in range(2)]
    assert [(*end[:2], end[2]["env_steps"]) for end in ends] == [(False, False, 4), (False, True, 2)]
    ours = make_env(DRAWN, time_limit=3)
    ours.reset(seed=0)
    assert [ours.step(still)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


def test_success_is_only_where_it_is_signalled() -> None:
    env = make_env(DRAWN)
    env.reset(seed=0)
    assert "success" not in env.step(np.float32([-0.5, -0.5]))[4]
    assert env.step(np.float32([-0.5, -0.5]))[4]["success"] == 0.0


def test_a_goal_is_that_of_the_reset() -> None:
    env = make_env(CHOICES, size=32, goal=True)
    seen, info = env.reset(seed=2)
    first = seen["goal"]
    assert info["goal_solved"] == 1.0
    assert np.unique(first).tolist() == [env.inner.goal]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(env.step(one_hot(0))[0]["goal"], first)
    assert env.observation_space.contains(env.step(one_hot(0))[0])
    assert not np.array_equal(env.reset(seed=3)[0]["goal"], first)
    with pytest.raises(ConfigError, match="has no goal pictures; give its observation a picture under the key 'goal'"):
        make_env(DRAWN, goal=True)


@pytest.mark.parametrize("action", [[1, 1, 0], [0, 0, 0], [0.5, 0.5, 0], [2, 0, -1], [1, 0]])
def test_a_choice_is_one_hot(action: list[float]) -> None:
    env = make_env(CHOICES, offset=1)
    env.reset(seed=0)
    with pytest.raises(EnvError, match="is not a one-hot vector of 3 numbers"):
        env.step(np.array(action, np.float32))
    env.step(one_hot(2))
    assert env.inner.taken == [3]  # type: ignore[attr-defined]


def test_what_cannot_be_drawn_is_refused_before_a_run() -> None:
    with pytest.raises(ConfigError, match=r"no picture: .* its render_mode is None, not 'rgb_array'"):
        GymEnv("x", Walk(NUMBERS["speed"], spaces.Discrete(2)))
    broken = Walk(NUMBERS["speed"], spaces.Discrete(2), "rgb_array")
    broken.render = lambda: np.zeros((4, 4), np.uint8)  # type: ignore[method-assign]
    with pytest.raises(EnvError, match=r"render\(\) returned uint8 of shape \(4, 4\)"):
        GymEnv("x", broken)
    broken.render = lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(EnvError, match=r"x: render\(\) failed: ZeroDivisionError: .*test_own_envs.py, line"):
        GymEnv("x", broken)
    with pytest.raises(ConfigError, match="supersample=2 of own_envs:choices"):
        make_env(CHOICES, supersample=2)


API = r"; gymnasium's API has 5: observation, reward, terminated, truncated, info"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"keep": 4}, rf"step\(\) returned 4 values{API} \(gym's old API had 4: split done"),
        ({"keep": 3}, rf"step\(\) returned 3 values{API}$"),
        ({"keep": 1}, r"reset\(\) returned a dict; gymnasium's API has 2: observation, info$"),
        ({"reward": None}, "reward is None; a number is needed"),
        ({"reward": np.zeros(2)}, r"reward is an array of shape \(2,\); a number is needed"),
        ({"reward": "3"}, "reward is '3'; a number is needed"),
        ({"truncated": {}}, "truncated is a dict; True or False is needed"),
        ({"truncated": np.zeros(2, bool)}, r"truncated is an array of shape \(2,\); True or False is needed"),
        ({"info": None}, "info is None; a dict is needed"),
        ({"info": {"success": None}}, r"info\['success'\] is None; a number is needed"),
        (
            {"observation": np.zeros(3)},
            r"the observation is an array of shape \(3,\); its space is a Dict of goal, image, kind, pos",
        ),
        (
            {"observation": {"speed": None}},
            "the observation has no 'speed', its space has it; it has goal, image, kind, position",
        ),
        ({"observation": {"speed": np.zeros(3)}}, r"observation 'speed' has shape \(3,\), its space says \(2,\)"),
        ({"observation": {"speed": "fast"}}, "observation 'speed' is 'fast', which its space does not have: Box"),
        ({"observation": {"kind": 3}}, r"observation 'kind' is 3, which its space does not have: Discrete\(3\)"),
        ({"observation": {"kind": -1}}, r"observation 'kind' is -1, which its space does not have: Discrete\(3\)"),
        ({"observation": {"image": np.zeros((8, 8, 3), np.uint8)}}, r"observation 'image' has shape \(8, 8, 3\), its space says"),
    ],
)
def test_what_breaks_the_api_is_named(changed: dict[str, Any], said: str) -> None:
    """As misuse and not as a fault of the simulator, which would be tried again."""
    trust_env("own_envs:wrong")
    env = make_env("own_envs:wrong", **changed)

    def play() -> None:
        env.reset(seed=0)
        env.step(one_hot(0))

    with pytest.raises(EnvError, match=f"^own_envs:wrong: {said}") as caught:
        play()
    assert not isinstance(caught.value, SimulationError)


@pytest.mark.parametrize("reward", [2, True, np.float32(2), np.array(2.0), np.array([2.0]), torch.tensor(2.0)])
def test_what_counts_as_a_number(reward: Any) -> None:
    trust_env("own_envs:wrong")
    env = make_env("own_envs:wrong", reward=reward)
    env.reset(seed=0)
    assert env.step(one_hot(0))[1] == (2.0 if reward is not True else 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("observed", ["pixels", "vectors", "both"])
def test_numbers_that_are_not_finite_are_a_fault(value: float, observed: Any) -> None:
    trust_env("own_envs:wrong")
    env = make_env("own_envs:wrong", observed=observed, observation={"speed": np.array([0.0, value])}, after=2)
    env.reset(seed=0)
    env.step(one_hot(0))
    with pytest.raises(
        SimulationError, match=rf"^own_envs:wrong: observation 'speed' is not finite \({value}\) at env step 2 of its"
    ):
        env.step(one_hot(0))


def test_pictures_that_are_not_finite_are_a_fault() -> None:
    trust_env("own_envs:wrong")
    spoilt = np.full((32, 32, 3), 0.5, np.float32)
    env = make_env("own_envs:wrong", floats=True, observation={"image": spoilt})
    assert (env.reset(seed=0)[0]["image"] == 128).all()
    spoilt[3, 4, 1] = np.nan
    with pytest.raises(SimulationError, match=r"observation 'image' is not finite \(nan\) at env step 1"):
        env.step(one_hot(0))


def test_an_interrupt_stays_an_interrupt() -> None:
    env = make_env(CHOICES)
    env.reset(seed=0)

    def interrupted(action: Any) -> Any:
        raise KeyboardInterrupt

    env.inner.step = interrupted  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        Observer(env, None).step(one_hot(0))


# 3. Names -----------------------------------------------------------------------------------------------------------------------


def test_gymnasium_makes_its_own() -> None:
    """Options go to gymnasium.make, the time limit too."""
    gymnasium.register("own_envs/Limited-v0", "own_envs:drawn", max_episode_steps=9)
    try:
        name = "gym:own_envs:own_envs/Limited-v0"
        trust_env(name)
        env = make_env(name, low=-7.0)
        assert env.time_limit == 9
        assert env.inner.action_space.low.min() == -7  # type: ignore[attr-defined]
        longer = make_env(name, time_limit=12)
        longer.reset(seed=0)
        ends = [longer.step(np.float32([-0.5, -0.5]))[3] for _ in range(12)]
        assert ends == [False] * 11 + [True]
        with pytest.raises(
            ConfigError, match=r"'gym:own_envs/Limited-v0': its code, own_envs:drawn, is imported only if you name it"
        ):
            check_env("gym:own_envs/Limited-v0", {})
    finally:
        del gymnasium.registry["own_envs/Limited-v0"]
    check_env("gym:CartPole-v1", {"anything": 1})  # what it takes is known when it is made
    with pytest.raises(ConfigError, match=r"unknown id of gymnasium 'CartPol-v1'; did you mean CartPole-v1"):
        check_env("gym:CartPol-v1", {})


def test_cartpole_is_drawn_with_pygame() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imports of pygame
        pytest.importorskip("pygame")
        env = make_env("gym:CartPole-v1", size=64)
        seen, _ = env.reset(seed=0)
    assert env.describe()["time_limit"] == 500
    assert seen["state"].shape == (4,)
    assert (seen["image"] < 200).any(-1).mean() < 0.2  # a cart on white
    seen, reward, *_ = env.step(one_hot(1, 2))
    assert reward == 1.0
    env.close()


def test_rendering_is_asked_for_where_it_can_be_had() -> None:
    """By an argument render_mode, or by metadata of what takes any argument; and not of a class that has neither."""
    for name in ("examples.lamps:Lamps", "own_envs:Loose", "own_envs:Named"):
        trust_env(name)
    assert make_env("examples.lamps:Lamps", presses=3).inner.presses == 3  # type: ignore[attr-defined]
    assert make_env("own_envs:Loose").inner.render_mode == "rgb_array"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="its render_mode is None"):
        make_env("own_envs:Named")
    with pytest.raises(ConfigError, match="its render_mode is 'human'"):
        make_env(DRAWN, render_mode="human")


def test_options_are_arguments() -> None:
    trust_env("own_envs:strict")
    env = make_env("own_envs:strict", camera="right", kwargs={"size": 8})
    assert env.inner.asked == (8, "right")  # type: ignore[attr-defined]
    assert env.size == 64
    check_env("own_envs:strict", {"camera": "right", "kwargs": {"size": 8}, "time_limit": 3})
    for options, said in (
        (
            {"size": 8},
            r'option size=8 of own_envs:strict: it is set by .*; an argument of this name is given as {"kwargs": {...}}',
        ),
        ({"camra": 1}, "unknown option of 'own_envs:strict' 'camra'; did you mean camera"),
        ({"kwargs": 3}, "option kwargs=3 of own_envs:strict: must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_env("own_envs:strict", options)
    check_env(DRAWN, {"whatever": 1})  # it takes all


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_envs:nothing", "environment own_envs:nothing: nothing of module own_envs does not exist; name a function or class"),
        ("own_envs:NUMBERS", "is not callable"),
        ("own_envs:not_an_env", "own_envs:not_an_env: returned dict, not a gymnasium.Env"),
        ("own_envs:Walk", r"own_envs:Walk: making it failed: TypeError: .*missing 2 required positional arguments"),
        ("own_envs:unbounded", "own_envs:unbounded: its action space has no bounds"),
        (
            "theirs_nowhere:make",
            "environment theirs_nowhere:make: there is no module 'theirs_nowhere'; run the command in the folder",
        ),
        ("dcm:walker_walk", "there is no module 'dcm'; .*; or did you mean the suite dm"),
        ("own envs:make", "unknown environment suite 'own envs'"),
    ],
)
def test_names_that_cannot_be_had(name: str, said: str) -> None:
    trust_env(name)
    with pytest.raises(ConfigError, match=said):
        make_env(name)


def package(folder: Path, name: str, points: str) -> None:
    """An installed distribution with entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[localmotion.envs]\n{points}\n")


def test_an_installed_package_has_a_suite(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown environment suite 'mysuite'"):
        make_env("mysuite:choices")
    sys.path.append(str(tmp_path))
    package(tmp_path, "theirs", "mysuite = own_envs:suite\ntoy = own_envs:suite\nlost = theirs_nowhere:make")
    assert make_env("mysuite:choices", offset=2).inner.action_space.start == 2  # type: ignore[attr-defined]
    assert make_env("toy:dot").describe()["action_dim"] == 2  # the built-in come first
    with pytest.raises(ConfigError, match="unknown environment 'mysuite:choice'; did you mean mysuite:choices"):
        check_env("mysuite:choice", {})
    with pytest.raises(ConfigError, match="unknown option of 'mysuite:choices' 'ofset'; did you mean offset"):
        check_env("mysuite:choices", {"ofset": 1})
    with pytest.raises(ConfigError, match=r"suite 'lost', entry point theirs_nowhere:make \(theirs\): there is no module"):
        check_env("lost:task", {})
    package(tmp_path, "others", "mysuite = own_envs:choices")
    with pytest.raises(ConfigError, match="is an entry point of several packages: own_envs:"):
        make_env("mysuite:choices")


# 4. Trust -----------------------------------------------------------------------------------------------------------------------

MODULE = "import own_envs\nmake = own_envs.choices\nraise SystemExit('imported')\n"


def foreign_run(folder: Path, name: str) -> Path:
    """A run directory of somebody, whose settings name code."""
    (folder / "theirs_code.py").write_text(MODULE)
    sys.path.append(str(folder))
    values = to_dict(compose("dreamer_v3", "train", preset="debug", env="toy:dot"))
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps({**values, "env": name}))
    return folder / "run"


@pytest.mark.parametrize("name", ["theirs_code:make", "gym:theirs_code:CartPole-v1"])
def test_a_file_has_nothing_imported(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a run's settings nor a study, whatever command reads them."""
    run, out = foreign_run(tmp_path, name), str(tmp_path / "out")
    (tmp_path / "s.yaml").write_text(f"preset: debug\ntasks: ['{name}']\nvariants: {{A: {{method: dreamer_v3}}}}\n")
    hidden = f"preset: debug\ntasks: ['toy:dot']\nvariants: {{A: {{method: dreamer_v3, settings: {{env: '{name}'}}}}}}\n"
    (tmp_path / "hidden.yaml").write_text(hidden)
    for command in (
        ["evaluate", str(run)],
        ["collect", "toy:dot", "--out", out, "--policy", str(run)],
        ["study", str(tmp_path / "s.yaml"), "--out", out],
        ["evaluate", str(run), "--trust-env", f"{name}2"],
    ):
        said = fails(capsys, *command)
        assert f"is imported only if you name it: --trust-env {name}" in said, said
    assert "env is not a setting here" in fails(capsys, "study", str(tmp_path / "hidden.yaml"), "--out", out)
    with pytest.raises(ConfigError, match="is imported only if you name it"):
        load_run(run)
    assert "theirs_code" not in sys.modules
    said = fails(capsys, "evaluate", str(run), "--trust-env", name)
    assert "importing theirs_code failed: it called sys.exit('imported')" in said


def test_a_study_of_an_environment_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"preset: debug\ntasks: ['{CHOICES}']\nvariants: {{A: {{method: dreamer_v3}}}}\n")
    (job,) = load_study(tmp_path / "s.yaml")
    assert f"env={CHOICES}" in job.arguments(tmp_path)  # the command line of the run names it again
    assert job.name == "A-own_envs_choices-0"


def test_ids_of_gymnasium_need_no_trust(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(foreign, "_trusted", [])
    run = foreign_run(tmp_path, "gym:CartPole-v1")
    with pytest.raises(Exception, match="holds no complete checkpoint"):
        load_run(run)


@pytest.mark.parametrize(("said", "given"), [(np.uint8, np.float32), (np.float32, np.uint8)])
def test_a_picture_of_another_kind_than_its_space_is_refused(said: Any, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resizing wrapper that returns floats in 0..255 gave pictures that were white everywhere."""
    space = spaces.Box(0, 255 if said == np.uint8 else 1, (16, 16, 3), said)
    seen = Walk(space, spaces.Discrete(3))
    monkeypatch.setattr(seen, "observation", lambda: np.full((16, 16, 3), 100, given))
    env = GymEnv("own", seen, size=16)
    with pytest.raises(EnvError, match=f"is a picture of {np.dtype(given)}, its space says {np.dtype(said)}"):
        env.reset(seed=1)


def test_films_keep_their_speed_with_an_action_repeat() -> None:
    env = GymEnv("own", drawn(render_mode="rgb_array"), size=16, action_repeat=3)
    assert env.metadata["render_fps"] == 2  # 7 env steps a second


def test_films_of_evaluations_have_the_speed_of_real_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control rate / action repeat where the environment knows it, and 25 pictures a second elsewhere."""
    silent = drawn(render_mode="rgb_array")
    monkeypatch.setattr(silent, "metadata", {"render_modes": ["rgb_array"]})
    played: list[tuple[Any, float]] = [
        (GymEnv("own", drawn(render_mode="rgb_array"), size=16, action_repeat=3, time_limit=6), 2),
        (GymEnv("own", silent, size=16, time_limit=6), 25),
        (make_env("toy:dot", size=16, time_limit=6), 25),
        (make_env("planar:reacher_easy", size=16, time_limit=6), 25),
        (make_env("planar:reacher_easy", size=16, time_limit=6, action_repeat=1), 50),
        (make_env("planar:walker_run", size=16, time_limit=6), 20),
    ]
    for number, (env, rate) in enumerate(played):
        observer = Observer(env, None)
        policy = random_policy(observer.action_dim, 0, discrete=observer.discrete)
        path = tmp_path / f"{number}.mp4"
        save_film(
            evaluate(lambda policy=policy: policy, lambda observer=observer: observer, seed=0, episodes=1, keep_frames=True), path
        )
        assert probe(VideoRef(path.name, path, "file")).fps == pytest.approx(rate), env.name
    save_film(run_episodes([observer], [0], policy), tmp_path / "none.mp4")
    assert not (tmp_path / "none.mp4").exists()  # no pictures were kept
