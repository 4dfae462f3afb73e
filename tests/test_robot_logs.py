"""The example of docs/robot_logs.md: a data set recorded, read, learned from offline, and the policy in a loop as on a robot."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployed_runs import saved
from localmotion.acting.deployed import DeployedPolicy
from localmotion.cli import main
from localmotion.envs.toy import BLOCK_RANDOM
from localmotion.recipe import Recipe
from localmotion.video import iter_frames
from localmotion.video.lerobot import about_of, commands, read_data_set

EXAMPLE = Path(__file__).parent.parent / "examples" / "robot_logs"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed: pip install 'localmotion[lerobot]'"
)


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a script of the example as `python NAME ARGUMENTS`; what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLE))

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLE / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    for name in ("robot", "record"):
        sys.modules.pop(name, None)


def test_the_recorded_data_set_has_what_happened(run_script: Any, tmp_path: Path) -> None:
    """Commands that are read and given to the robot again lead to the rewards, positions and pictures that are read."""
    printed = run_script("record.py", tmp_path / "play", "--episodes", 3)
    from robot import STEPS, Robot

    data = read_data_set(f"lerobot:{tmp_path / 'play'}")
    about = data.about(1)
    assert [ref.label for ref in data.refs] == ["move the block to the middle"] * 3
    assert (about["action"]["names"], about["state"]["names"], about["reward"]) == (["vx", "vy"], ["x", "y"], "next.reward")
    (tmp_path / "lerobot.json").write_text(json.dumps(about))
    returns = []
    for ref in data.refs:
        rows, robot, pictures = ref.rows.read(1), Robot(), list(iter_frames(ref, None))
        given = commands(tmp_path, rows["action"][1:])[:, 0]
        assert np.abs(given).max() > 300
        robot.start(0)
        robot._env.agent = rows["state"][0] / 500.0  # the example does not record the seed
        for t, command in enumerate(given[:-1], 1):
            picture, reward = robot.send(command)
            assert np.abs(picture - pictures[t].astype(float)).mean() < 3  # a move at full speed changes 7
            np.testing.assert_allclose(robot.position, rows["state"][t], atol=1e-2)
            assert rows["reward"][t] == pytest.approx(reward, abs=1e-4)
        assert len(rows["action"]) == STEPS
        returns.append(rows["reward"].sum())
    assert float(re.search(r"operator (\S+)", printed)[1]) == pytest.approx(np.mean(returns), abs=0.06)
    with pytest.raises(SystemExit):
        run_script("record.py", tmp_path / "play")  # never over another data set


def test_the_loop_gives_commands_in_the_units_of_the_data_set(
    run_script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "run", "bc", "decode", env="", recipe=Recipe(size=32, percept_size=32))
    known = json.loads((run / "environment.json").read_text())
    ranges = {"names": None, "min": [-500.0, -400.0], "max": [500.0, 400.0], "commands": 1}
    (run / "environment.json").write_text(json.dumps({**known, "lerobot": {"action": ranges}}))
    import robot

    given, send, act = [], robot.Robot.send, DeployedPolicy.act
    monkeypatch.setattr(DeployedPolicy, "act", lambda self, obs: 0 * act(self, obs) + np.array([0.5, -0.5]))
    monkeypatch.setattr(robot.Robot, "send", lambda self, command: (given.append(command), send(self, command))[1])
    assert "2 episodes, return" in run_script("drive.py", run, 2)
    assert len(given) == 2 * robot.STEPS
    np.testing.assert_allclose(given, np.tile([250.0, -200.0], (len(given), 1)), atol=1e-3)


@pytest.mark.slow
def test_the_example_learns_the_task_from_play(run_script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the page. Three times the return of random play, of an operator who does not know the task."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE / "learn.yaml", tmp_path)
    run_script("record.py", "play")
    learn = ["--method", "drp", "--config", "learn.yaml", "--data", "store"]
    main(["extract", "lerobot:play", "--out", "store", "--size", "32", "--percept-size", "64"])
    main(["pretrain", *learn, "--run", "pretrained"])
    main(["finetune", *learn, "--checkpoint", "pretrained", "--env", "toy:block", "--run", "agent"])
    assert about_of(tmp_path / "agent")
    found = re.search(r"return (\S+) \(", run_script("drive.py", "agent", 5))
    assert float(found[1]) > 2.5 * BLOCK_RANDOM
