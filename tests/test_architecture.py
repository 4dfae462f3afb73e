"""The rules of the house that a machine can check: imports go downward, no method names outside the registry, small files."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "localmotion"
FILES = sorted(ROOT.rglob("*.py"))

# Rooms from the top floor down. A room may import from any floor below its own, and from nothing else.
FLOORS = (
    "testing",
    "training",
    "report",
    "evaluation",
    "perception_eval",
    "recording",
    "acting",
    "runs",
    "methods",
    "perception",
    "models",
    "envs",
    "launch",
    "video",
    "compute",
    "replay",
    "config",
    "limits",
    "suites",
    "recipe",
    "ranks",
    "console",
    "foreign",
    "files",
    "machine",
    "errors",
)
TOP = {"cli", "commands", "data_commands", "launch_commands", "demo", "info", "__init__", "__main__"}  # may import anything


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> set[str]:
    found = set()
    for node in nodes(path):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" if node.module == "localmotion" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("localmotion.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    here = room(path)
    if here in TOP:
        return
    wrong = imports(path) - set(FLOORS[FLOORS.index(here) :])
    assert not wrong, f"{here} may not import {sorted(wrong)}"


def test_a_name_of_a_file_means_one_thing() -> None:
    """But for base.py, which has the interfaces of its room."""
    seen: dict[str, Path] = {}
    for path in FILES:
        if path.name not in ("__init__.py", "base.py"):
            assert seen.setdefault(path.name, path) == path


def test_no_method_is_asked_for_by_name_outside_the_registry() -> None:
    from localmotion.methods import names

    known = set(names())
    for path in FILES:
        if room(path) in ("methods", "demo", "cli", "commands"):
            continue
        for node in nodes(path):
            if isinstance(node, ast.Compare):
                literals = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not literals & known, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_nothing_runs_code_from_a_file() -> None:
    banned = {"eval", "exec", "__import__"}
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert not (isinstance(node.func, ast.Name) and name in banned), f"{path}:{node.lineno}"
                for keyword in node.keywords:
                    value = getattr(keyword.value, "value", None)
                    assert (keyword.arg, value) not in {("weights_only", False), ("allow_pickle", True)}, f"{path}:{node.lineno}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {"pickle", "cloudpickle", "dill", "shelve"} & {m.split(".")[0] for m in modules}, path


def test_workers_that_decode_and_perceive_do_not_import_torch() -> None:
    """Three seconds and 190 MB for each of them; the neural backends load it when they are asked for."""
    code = "import sys, localmotion.perception.extract, localmotion.video.scan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
