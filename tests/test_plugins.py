"""Methods outside the package: --plugin and entry points. Through `cli.main`; no file that is read imports anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localmotion import methods
from localmotion.cli import WITH_METHODS, main
from localmotion.config import to_dict
from localmotion.errors import ConfigError
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs.settings import compose, from_dict
from refusals import fails

EXAMPLES = Path(__file__).parent.parent / "examples"
METHOD = """
from dataclasses import dataclass
import act_extras

class {cls}(act_extras.ActExtras):
    '''A method of somebody.'''
    name = "{name}"

print("imported {module}")
"""
FAST = ["--preset", "debug", "--env", "toy:dot"]
BUILT_IN = dict(methods._METHODS)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that the command runs in; the registry and the modules are as before afterwards."""
    monkeypatch.setattr(methods, "_METHODS", dict(BUILT_IN))
    monkeypatch.setattr(methods, "_PLUGGED_IN", [])
    monkeypatch.setattr(sys, "path", [*(place for place in sys.path if place), str(EXAMPLES)])
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("theirs")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def module(folder: Path, name: str, *, cls: str = "Mine", method: str = "mine", text: str = METHOD) -> None:
    (folder / f"{name}.py").write_text(text.format(cls=cls, name=method, module=name))


def package(folder: Path, name: str, points: str) -> None:
    """An installed distribution with entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[localmotion.methods]\n{points}\n")


# --- --plugin ------------------------------------------------------------------------------------------------------------


def test_a_plugin_is_a_method_of_this_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its module is found in the working folder, and is imported by the flag alone."""
    module(folder, "theirs_plain")
    assert "unknown method 'mine'" in fails(capsys, "train", "--method", "mine", *FAST, "--help")
    main(["train", "--plugin", "theirs_plain:Mine", "--method", "mine", *FAST, "--help"])
    said = capsys.readouterr().out
    assert "settings of mine, preset debug" in said
    assert "--model.clip" in said
    assert methods.plugged_in() == ("theirs_plain:Mine",)
    main(
        ["train", "--plugin", "theirs_plain:Mine", "--plugin", "act_extras:ActExtras", "--method", "act_extras", *FAST, "--help"]
    )
    assert methods.plugged_in() == ("theirs_plain:Mine", "act_extras:ActExtras")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("theirs", "--plugin 'theirs': write it as MODULE:CLASS, e.g. --plugin my_method:MyMethod"),
        ("theirs/one.py:Mine", "write it as MODULE:CLASS"),
        (
            "theirs_nowhere:Mine",
            "--plugin theirs_nowhere:Mine: there is no module 'theirs_nowhere'; run the command in the folder",
        ),
        ("theirs_one.deep:Mine", "there is no module 'theirs_one.deep'"),
        ("theirs_needs:Mine", "importing theirs_needs failed: No module named 'theirs_lacking'; install what it needs"),
        ("theirs_broken:Mine", r"importing theirs_broken failed: ZeroDivisionError: division by zero .*theirs_broken.py, line 3"),
        ("theirs_one:Min", "module theirs_one has no class 'Min'; its methods are Mine"),
        ("theirs_one:dataclass", "dataclass is not a subclass of localmotion.methods.Method; its methods are Mine"),
        ("theirs_nameless:Mine", 'Mine has no name; write `name = "..."` in the class'),
        ("theirs_drp:Mine", "the name 'drp' belongs to localmotion.methods.drp.DRP; give Mine another `name`"),
    ],
)
def test_a_plugin_that_cannot_be_had(folder: Path, capsys: pytest.CaptureFixture[str], text: str, match: str) -> None:
    module(folder, "theirs_one")
    module(folder, "theirs_drp", method="drp")
    module(folder, "theirs_needs", text="import theirs_lacking\n" + METHOD)
    module(folder, "theirs_broken", text="\n\nx = 1 / 0\n" + METHOD)
    module(folder, "theirs_nameless", method="")
    before = methods.names()
    assert re.search(match, fails(capsys, "train", "--plugin", text, "--method", "mine", *FAST, "--help"))
    assert methods.names() == before


def test_two_plugins_of_one_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module(folder, "theirs_one")
    module(folder, "theirs_two")
    said = fails(
        capsys, "train", "--plugin", "theirs_one:Mine", "--plugin", "theirs_two:Mine", "--method", "mine", *FAST, "--help"
    )
    assert "--plugin theirs_two:Mine: the name 'mine' belongs to theirs_one.Mine" in said


@pytest.mark.parametrize("command", sorted(WITH_METHODS))
def test_every_command_with_methods_takes_plugins(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {
        "collect": ["toy:dot", "--out", "x"],
        "evaluate": ["x"],
        "export": ["x", "--out", "x"],
        "predict": ["--checkpoint", "x", "--data", "x", "--out", "x.png"],
        "probe": ["--data", "x"],
        "push": ["x", "y"],
        "report": ["x", "--out", "x.html"],
        "study": ["x.yaml", "--out", "x"],
        "watch": ["x"],
    }
    assert "there is no module 'theirs_nowhere'" in fails(
        capsys, command, *needed.get(command, []), "--plugin", "theirs_nowhere:X"
    )


def test_only_the_command_line_plugs_in() -> None:
    package = Path(methods.__file__).parent.parent
    calls = [path.name for path in package.rglob("*.py") if "methods.plug_in(" in path.read_text()]
    assert calls == ["cli.py"]


# --- runs of a plugin's method ---------------------------------------------------------------------------------------------


def run_of(folder: Path, name: str) -> Path:
    """A run directory of a method outside the package, as another command would leave it."""
    values = to_dict(compose("dreamer_v2", "train", preset="debug", env="toy:dot"))
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps({**values, "method": name, "model": {}}))
    return folder / "run"


def test_a_run_without_its_plugin_names_the_fix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module(folder, "theirs_run")
    run = str(run_of(folder, "mine"))
    for command in (["evaluate", run], ["collect", "toy:dot", "--out", "x", "--policy", run]):
        said = fails(capsys, *command)
        assert "config.json: unknown method 'mine'" in said
        assert "a method outside the package needs --plugin MODULE:CLASS" in said
    assert "holds no complete checkpoint" in fails(capsys, "evaluate", run, "--plugin", "theirs_run:Mine")


@pytest.mark.parametrize("name", ["theirs_file:Mine", "theirs_file.Mine", "theirs_file"])
def test_a_file_imports_nothing(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    module(folder, "theirs_file")
    sys.path.append(str(folder))
    assert "unknown method" in fails(capsys, "evaluate", str(run_of(folder, name)))
    values = to_dict(compose("dreamer_v2", "train", preset="debug", env="toy:dot"))
    for more in ({"plugin": "theirs_file:Mine"}, {"model": {"plugin": "theirs_file:Mine"}}):
        with pytest.raises(ConfigError, match="unknown setting"):
            from_dict(values | more)
    (folder / "s.yaml").write_text("plugin: theirs_file:Mine\ntasks: [toy:dot]\nvariants: {A: {method: mine}}\n")
    assert "unknown key of study 'plugin'" in fails(capsys, "study", "s.yaml", "--out", "out")
    (folder / "s.yaml").write_text(f"tasks: [toy:dot]\nvariants: {{A: {{method: '{name}'}}}}\n")
    assert "needs --plugin MODULE:CLASS" in fails(capsys, "study", "s.yaml", "--out", "out")
    assert "theirs_file" not in sys.modules


def test_a_study_hands_its_plugins_on(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module(folder, "theirs_study")
    (folder / "s.yaml").write_text("preset: debug\ntasks: [toy:dot]\nvariants: {A: {method: mine}}\n")
    started: list[list[str]] = []

    class Process:
        """A worker that knows what its arguments say and nothing more."""

        returncode = 1

        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(command[3:])

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Process)
    fails(capsys, "study", "s.yaml", "--out", "out", "--plugin", "theirs_study:Mine", "--jobs", "1")
    (arguments,) = started
    assert arguments[-2:] == ["--plugin", "theirs_study:Mine"]
    monkeypatch.setattr(methods, "_METHODS", dict(BUILT_IN))
    main([*arguments, "--help"])
    assert "settings of mine" in capsys.readouterr().out


# --- entry points ------------------------------------------------------------------------------------------------------------


def test_an_installed_package_has_methods(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are listed without an import, and found for commands and for runs."""
    module(folder, "theirs_installed")
    sys.path.append(str(folder))
    package(folder, "theirs_package", "mine = theirs_installed:Mine")
    assert "mine" in methods.names()
    assert "mine" in fails(capsys, "train", *FAST, "--run", "x")
    assert "theirs_installed" not in sys.modules
    main(["train", "--method", "mine", *FAST, "--help"])
    assert "settings of mine" in capsys.readouterr().out
    assert "holds no complete checkpoint" in fails(capsys, "evaluate", str(run_of(folder, "mine")))
    main(["train", "--plugin", "theirs_installed:Mine", "--method", "mine", *FAST, "--help"])  # the same class again
    monkeypatch.setattr(methods, "_METHODS", dict(BUILT_IN))  # as another command
    module(folder, "theirs_other")
    said = fails(capsys, "train", "--plugin", "theirs_other:Mine", "--method", "mine", *FAST, "--help")
    assert "the name 'mine' belongs to theirs_installed.Mine" in said


@pytest.mark.parametrize(
    ("points", "match"),
    [
        ("mine = theirs_nowhere:Mine", r"method 'mine', entry point theirs_nowhere:Mine \(theirs_package\): there is no module"),
        ("mine = theirs_named:Other", "module theirs_named has no class 'Other'; its methods are Mine"),
        (
            "other = theirs_named:Mine",
            r"entry point 'other' = theirs_named:Mine .* has the method 'mine'; both names must be the same",
        ),
    ],
)
def test_an_entry_point_that_cannot_be_had(folder: Path, capsys: pytest.CaptureFixture[str], points: str, match: str) -> None:
    module(folder, "theirs_named")
    sys.path.append(str(folder))
    package(folder, "theirs_package", points)
    assert re.search(match, fails(capsys, "train", "--method", points.split()[0], *FAST, "--help"))
    main(["train", "--method", "dreamer_v2", *FAST, "--help"])  # a broken package breaks nothing else


def test_packages_that_disagree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module(folder, "theirs_named")
    sys.path.append(str(folder))
    package(folder, "theirs_a", "mine = theirs_named:Mine\ndrp = theirs_nowhere:DRP")
    package(folder, "theirs_b", "mine = theirs_else:Mine")
    said = fails(capsys, "train", "--method", "mine", *FAST, "--help")
    assert "is an entry point of several packages" in said
    assert "theirs_named:Mine (theirs_a)" in said
    assert methods.get("drp").__module__ == "localmotion.methods.drp"  # the package's own come first


def test_a_stage_of_a_methods_own_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Video, then logged actions, then the environment: two offline stages of a method from outside."""
    store = tmp_path / "logs"
    collect("toy:block", store, policy="random", episodes=12, recipe=Recipe(size=32, percept_size=32, tracks=8), time_limit=5)
    plugin = ["--plugin", "examples.two_stages:TwoStages"]
    head = [*plugin, "--method", "two_stages", "--preset", "debug", "--data", str(store)]
    few = ["--updates", "6", "--batch_size", "2", "--length", "5"]
    main(["pretrain", *head, "--run", str(tmp_path / "pre"), *few])
    decode = ["decode", *head, "--run", str(tmp_path / "decode"), *few, "--env", "toy:block", "--eval_episodes", "1"]
    with pytest.raises(SystemExit):
        main(decode)
    assert "decode needs --checkpoint" in capsys.readouterr().err
    main([*decode, "--checkpoint", str(tmp_path / "pre"), "--env_options", "{time_limit: 5}"])
    told = capsys.readouterr().out
    assert "loaded 2 tensors of encoder" in told
    assert "two_stages on logged episodes" in told
    main(["evaluate", str(tmp_path / "decode"), *plugin, "--episodes", "1"])
    assert '"length_mean": 5.0' in capsys.readouterr().out
    main(["decode", *head, "--help"])
    assert "--online.updates" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["decod", *head, "--run", str(tmp_path / "x")])
    assert "method two_stages has no stage 'decod'; it has pretrain, decode" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(
            ["decode", *plugin, "--method", "two_stages", "--preset", "debug", "--run", str(tmp_path / "y"), "--checkpoint", "z"]
        )
    assert "decode: give the logged episodes with --data" in capsys.readouterr().err
