"""The door to the environments: names, errors, and what importing it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from localmotion.envs import SETTINGS, check_env, list_envs, make_env
from localmotion.errors import ConfigError


def test_lists_all_suites_and_one() -> None:
    names = list_envs()
    assert {
        "dmc:walker_walk",
        "dmc:ball_in_cup_catch",
        "metaworld:button-press-topdown-wall",
        "toy:dot",
        "dmcr:walker_run",
    } <= set(names)
    assert len(list_envs("metaworld")) == 50
    assert len(names) == len(set(names)) == sum(len(list_envs(s)) for s in sorted({name.partition(":")[0] for name in names}))


def test_written_out_names_are_those_of_the_suites() -> None:
    from localmotion.envs.dmc import TASKS as DMC
    from localmotion.envs.gl import choose_gl
    from localmotion.envs.metaworld import TASKS as META

    choose_gl()
    from dm_control import suite
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert sorted(DMC.values()) == sorted(suite.ALL_TASKS)
    assert all(name == f"{domain}_{task}" for name, (domain, task) in DMC.items())
    assert sorted(f"{name}-v3" for name in META) == sorted(ALL_V3_ENVIRONMENTS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dmc:walker_wlak", "dmc:walker_walk"),
        ("metaworld:drawer-opn-v3", "metaworld:drawer-open"),
        ("walker_walk", "did you mean dmc:walker_walk"),
        ("reach-v3", "did you mean metaworld:reach"),
        ("something", "no suite before its name"),
        ("CartPole-v1", "did you mean gym:CartPole-v1"),
        ("dcm:walker_walk", "did you mean dmw, dmc"),
        ("toy:", "toy:dot"),
    ],
)
def test_wrong_names_say_which_are_near(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_env(name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 4}, "size=4"),
        ({"percept_size": 100}, "multiple of size=64"),
        ({"percept_size": 32}, "multiple of size=64"),
        ({"action_repeat": 0}, "action_repeat=0"),
        ({"time_limit": 0}, "time_limit=0"),
        ({"quality": "best"}, "fast"),
        ({"camera": "corner"}, "no cameras"),
    ],
)
def test_impossible_settings_are_errors(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_env("toy:dot", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("env", "options", "said"),
    [
        *(("dmc:walker_walk", {name: 1}, rf"option {name}=1 of dmc:walker_walk: it is set by") for name in SETTINGS),
        ("toy:dot", {"camera": 0}, "toy has no cameras"),
        ("toy:dot", {"wind": 1}, "toy has no options but time_limit"),
        ("metaworld:reach", {"time_limit": 2.5}, "whole number of env steps"),
        ("metaworld:reach", {"time_limit": True}, "whole number of env steps"),
        ("metaworld:reach", {"camera": [1]}, "a name or a number"),
        ("distracting:walker_walk", {"dificulty": "easy"}, "did you mean difficulty"),
        ("toy:dto", {}, "toy:dot"),
    ],
)
def test_options_of_a_run_are_checked_without_making_anything(env: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_env(env, options)


def test_camera_and_time_limit_are_options_of_a_run() -> None:
    for env in ("dmc:walker_walk", "dmcr:walker_walk", "distracting:walker_walk", "diswm:walker_walk", "metaworld:reach"):
        check_env(env, {"camera": 1, "time_limit": 100})
        check_env(env, {"camera": "corner"})
    check_env("toy:dot", {"time_limit": 7})
    check_env("dmcr:walker_walk", {"visual_seed": 3})
    # Every argument of the door is an option of a run, or names the setting that stands for it
    arguments = {name for name, kind in inspect.signature(make_env).parameters.items() if kind.kind is not kind.VAR_KEYWORD}
    assert arguments == {*SETTINGS, "camera", "time_limit"}


def test_unknown_suite_of_a_list() -> None:
    with pytest.raises(ConfigError, match="metaworld"):
        list_envs("metawrld")


def test_listing_names_and_the_toy_import_no_mujoco() -> None:
    code = (
        "import sys; from localmotion.envs import list_envs, make_env; list_envs(); make_env('toy:dot').reset(seed=0);"
        "bad = {'mujoco', 'dm_control', 'metaworld', 'OpenGL', 'torch'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
