"""What is declared is what is imported, extras are named where they are missing, and versions agree between files."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from localmotion import envs
from localmotion.demo import demo
from localmotion.envs import gl, list_envs, make_env
from localmotion.errors import MissingExtraError
from localmotion.evaluation.embedding import silhouette, tsne
from localmotion.foreign import needs
from localmotion.info import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"opencv-python-headless": "cv2", "pyyaml": "yaml", "scikit-learn": "sklearn", "pillow": "pil"}
"""Modules whose names are not those of their distributions, in lower case."""
ELSEWHERE = {"ptlflow", "torchvision"}
"""Imported, but installed apart: docs/perception.md."""
FOR_OTHERS = {"gym", "sea-raft", "mutation", "dev", "all"}
"""Extras with packages that our own code does not import itself."""


def declared(requirements: list[str]) -> set[str]:
    names = [re.match(r"[\w.-]+", text).group().lower() for text in requirements]  # type: ignore[union-attr]
    return {MODULES.get(name, name) for name in names} - {"localmotion"}


def imported() -> set[str]:
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return {name.lower() for name in found - set(sys.stdlib_module_names)} - {"localmotion"}


def test_what_is_imported_is_declared() -> None:
    known = declared(PROJECT["dependencies"])
    for extra, requirements in PROJECT["optional-dependencies"].items():
        known |= declared(requirements) if extra != "dev" else set()
    # PyOpenGL and dm_env come with mujoco and dm_control, whose interfaces use them.
    assert imported() - known - ELSEWHERE - {"opengl", "dm_env"} == set()


def test_what_is_declared_is_imported() -> None:
    wanted = declared(PROJECT["dependencies"])
    for extra, requirements in PROJECT["optional-dependencies"].items():
        wanted |= declared(requirements) if extra not in FOR_OTHERS else set()
    assert wanted - imported() - {"pil", "transformers"} == set()  # imported by name; pillow is what it reads pictures with


def test_developers_get_all_that_the_tests_and_the_demo_need() -> None:
    extras = PROJECT["optional-dependencies"]
    (own,) = [text for text in extras["dev"] if text.startswith("localmotion[")]
    assert set(own[len("localmotion[") : -1].split(",")) >= {"dmc", "metaworld", "report", "gym", "hub"}
    (everything,) = extras["all"]
    assert set(everything[len("localmotion[") : -1].split(",")) == set(extras) - {"sea-raft", "ray", "mutation", "dev", "all"}


def test_each_suite_of_a_simulator_has_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its packages the suites are listed, and making one names the extra; toy environments need none."""
    for name in ("mujoco", "dm_control", "metaworld"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(gl, "_INFO", None)
    suites = {name.partition(":")[0]: name for name in list_envs()}
    assert set(suites) == {*envs.NEEDS, "toy"}
    for suite, (extra, *packages) in envs.NEEDS.items():
        assert declared(PROJECT["optional-dependencies"][extra]) == set(packages)
        with pytest.raises(MissingExtraError, match=rf"{suite}:.*: needs mujoco, .*pip install 'localmotion\[{extra}\]'"):
            make_env(suites[suite])
    with pytest.raises(MissingExtraError, match=r"OpenGL: needs mujoco.*localmotion\[dmc\]"):
        gl.choose_gl()
    make_env(suites["toy"])


def test_a_missing_extra_of_reports_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for call in (lambda: tsne([[0.0], [1], [2], [3]]), lambda: silhouette([[0.0], [1], [2]], [0, 0, 1])):
        with pytest.raises(
            MissingExtraError, match=r"needs sklearn, which is not installed; run: pip install 'localmotion\[report\]'"
        ):
            call()
    with pytest.raises(MissingExtraError, match=r"this: needs no_such_thing.*localmotion\[x\]"):
        needs("x", "json", "no_such_thing", who="this")
    needs("x", "json", who="this")


def test_the_demo_asks_for_its_extras_before_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra in (("sklearn", "report"), ("dm_control", "dmc")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"demo: needs {module}, .*localmotion\[{extra}\]"):
            demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_info_names_extras_that_exist() -> None:
    for text, (_, fix) in EXTRAS.items():
        if found := re.search(r"localmotion\[([\w-]+)\]", fix):
            assert text.startswith(found.group(1))
            assert found.group(1) in PROJECT["optional-dependencies"]


def test_the_lock_file_has_a_version_for_all_that_developers_install() -> None:
    """It names packages and versions and nothing of the machine that made it; each is one that pyproject.toml allows."""
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!-]+( ; .+)?", line)] == []
    locked = {
        canonicalize_name(name): version for name, _, version in (line.partition(" ;")[0].partition("==") for line in lines)
    }
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["dev"]]
    for name in next(Requirement(text).extras for text in extras["dev"] if text.startswith("localmotion[")):
        wanted += extras[name]
    for requirement in map(Requirement, wanted):
        if requirement.name != "localmotion":
            assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement
