"""`localmotion check-env`: what it says of environments that fit, and of those that do not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from localmotion import foreign, methods
from localmotion.acting.env_check import inspect_env
from localmotion.cli import main
from localmotion.envs import trust_env
from localmotion.errors import ConfigError


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_trusted", [])


def test_an_environment_of_choices(capsys: pytest.CaptureFixture[str]) -> None:
    """The command trusts the name that it is given."""
    main(["check-env", "own_envs:choices", "--env-option", "limit=5", "--steps", "60", "--size", "16", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["usable"]
    assert found["problems"] == []
    assert set(found["observations"]) == {"image", "goal", "position", "speed", "kind"}
    assert found["observations"]["image"] == "Box 32x32x3 uint8 -> the picture, 16x16"
    assert "the goal picture" in found["observations"]["goal"]
    assert "a vector of 3, recorded" in found["observations"]["kind"]
    assert found["pictures"] == "its observation 'image', 32x32, averaged to 16x16"
    assert found["actions"] == "Discrete(3) -> a one-hot vector of 3"
    assert "success is signalled" in found["episodes"]
    assert "time limit 1000 env steps (ours; option time_limit)" in found["episodes"]
    assert found["repeatable"].startswith("the same pictures, numbers and rewards")
    assert found["repeatable"].endswith("another seed changes them")
    assert set(found["milliseconds"]) == {"reset", "env step", "drawing"}
    assert set(found["methods"]) == set(methods.names())
    able = {name for name, reason in found["methods"].items() if not reason}
    assert able == {name for name in methods.names() if methods.get(name).discrete}
    assert "its actions are" not in found["methods"]["dreamer_v3"]


def test_counts_of_ends_and_rewards() -> None:
    """Every action adds 3 and terminates; or many do not, and a limit truncates."""
    trust_env("own_envs:drawn")
    ended = inspect_env("own_envs:drawn", {"low": 1.5}, steps=30)
    assert ended.episodes.startswith("30 terminated, 0 truncated in 30 env steps of random actions, lengths 1 to 1;")
    low, high = (float(text) for text in ended.rewards.split(" an env step")[0].split(" to "))
    assert 3 <= low <= high <= 4
    short = inspect_env("own_envs:drawn", {"low": -1.6, "limit": 2}, steps=40)
    terminated, truncated = (int(text.split()[0]) for text in short.episodes.split(" in ")[0].split(", "))
    assert truncated > 0
    assert 2 * truncated + terminated <= 40
    limited = inspect_env("own_envs:drawn", {"low": -1.6, "time_limit": 4}, steps=40)
    assert "time limit 4 env steps;" in limited.episodes
    assert "render(), 20x40, resized to 64x64 (squeezed to a square)" in limited.pictures
    assert {name for name, reason in limited.methods.items() if reason} == {
        name for name in methods.names() if "goal" in methods.get(name).wants
    }
    assert "key goal" in limited.methods["pvdr"]


def test_what_nothing_can_be_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check-env", "own_envs:unbounded"])
    assert caught.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "own_envs:unbounded: nothing can be trained on it problem: its action space has no bounds" in said
    assert "method dreamer_v3 no: see the problems above" in said
    assert "gymnasium's checker" in said


def test_all_problems_are_said_at_once() -> None:
    trust_env("own_envs:blind")
    found = inspect_env("own_envs:blind")
    assert not found.usable
    assert len(found.problems) == 2
    assert "it has no picture" in found.problems[0]
    assert "MultiBinary, which no method takes" in found.problems[1]


def test_what_happens_in_play_is_a_problem_too() -> None:
    trust_env("own_envs:breaking")
    found = inspect_env("own_envs:breaking", steps=10)
    assert found.problems[0].startswith("step() failed: ZeroDivisionError: ")
    assert "own_envs.py, line" in found.problems[0]


def test_a_program_that_ends_itself_is_a_problem() -> None:
    trust_env("own_envs:quits")
    for at in ("reset", "step", "render"):
        found = inspect_env("own_envs:quits", {"at": at}, steps=10)
        assert found.problems[0].startswith(f"{at}() failed: it called sys.exit(3) (")
        assert "own_envs.py, line" in found.problems[0]
        assert not found.usable
    assert any(text.startswith("it called sys.exit(3)") for text in inspect_env("own_envs:quits").checker)
    with pytest.raises(ConfigError, match=r"own_envs:quits: making it failed: it called sys\.exit\(3\) \(.*own_envs.py, line"):
        inspect_env("own_envs:quits", {"at": "make"})
    assert "close() failed: it called sys.exit(3)" in " ".join(inspect_env("own_envs:quits", {"at": "close"}).problems)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"keep": 4}, "step() returned 4 values; gymnasium's API has 5: observation, reward, terminated, truncated, info (gym's"),
        ({"keep": 1}, "reset() returned a dict; gymnasium's API has 2: observation, info"),
        ({"reward": None}, "reward is None; a number is needed"),
        ({"observation": {"goal": np.zeros((8, 8, 3), np.uint8)}}, "observation 'goal' has shape (8, 8, 3), its space says"),
        (
            {"observation": {"speed": np.array([0, np.nan])}},
            "observation 'speed' is not finite (nan) at env step 0 of its episode",
        ),
        ({"reward": float("nan")}, "reward is not finite (nan) at env step 1 of 5"),
    ],
)
def test_what_breaks_the_api_is_a_problem(changed: dict[str, Any], said: str) -> None:
    trust_env("own_envs:wrong")
    found = inspect_env("own_envs:wrong", changed, steps=5)
    assert found.problems[0].startswith(said)
    assert len(found.problems) == 1
    assert not found.usable
    assert "differs" not in found.repeatable  # NaN is equal to NaN here


def test_a_start_that_the_seed_does_not_decide() -> None:
    trust_env("own_envs:forgetful")
    found = inspect_env("own_envs:forgetful", steps=5)
    assert found.usable
    assert found.repeatable == "differs in a second episode of the same environment"
    assert any("self.np_random" in note for note in found.notes)


def test_names_and_options_that_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["toy:dot"], "toy:dot: is built in and fits"),
        (["gym:CartPol-v1"], "did you mean CartPole-v1"),
        (["own_envs:choices", "--env-option", "limi=3"], "did you mean limit"),
        (["own_envs:choices", "--env-option", "limit"], "write it as name=value"),
        (["own_envs:choices", "--env-option", "time_limit=0"], "option time_limit=0 of own_envs:choices: must be a whole number"),
        (["own_envs:choices", "--env-option", "size=9"], "it is set by the recipe"),
        (["own_envs:choices", "--steps", "0"], "steps=0 must be at least 1"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["check-env", *arguments])
        assert caught.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match="is imported only if you name it"):
        inspect_env("own_envs:suite")
