"""`make mutants`: every entry of tests/mutants fits the source, and the script reports what the tests do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools import mutants

SOURCE = "LIMIT = 3\n\n\ndef double(x: int) -> int:\n    return 2 * x\n\n\ndef wait(n: int) -> None:\n    while n > 0:\n        n -= 1\n"
TESTS = (
    "from toy import LIMIT, double, wait\n\n\ndef test_double() -> None:\n    assert double(2) == 4\n\n\n"
    "def test_wait() -> None:\n    wait(3)\n\n\ndef test_limit() -> None:\n    assert LIMIT == 4\n"
)
ENTRY = {
    "what": "Adds.",
    "file": "src/toy.py",
    "old": "2 * x",
    "new": "2 + x + x - x",
    "tests": ["tests/test_toy.py::test_double"],
}
ADDS_ONE = {**ENTRY, "what": "Adds one.", "new": "2 * x + 1"}


def test_the_entries_fit_the_source() -> None:
    entries, wrong = mutants.load(mutants.ROOT)
    assert not wrong + mutants.validate(mutants.ROOT, entries)
    assert entries


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for folder in ("src", "tests/mutants"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "src/toy.py").write_text(SOURCE)
    (tmp_path / "tests/test_toy.py").write_text(TESTS)
    return tmp_path


def listed(root: Path, *entries: Any) -> None:
    (root / "tests/mutants/toy.yaml").write_text(yaml.safe_dump(list(entries)))


def script(root: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(mutants.ROOT / "tools/mutants.py"), "--root", str(root), "--preload", "pytest", *arguments]
    quick = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quick)
    return done.returncode, done.stdout + done.stderr


def test_a_caught_edit_a_survivor_and_a_crash_are_told_apart(toy: Path) -> None:
    same = {**ENTRY, "what": "Multiplies the other way.", "new": "x * 2"}
    hangs = {**ENTRY, "what": "Waits for ever.", "old": "n -= 1", "new": "n -= 0", "tests": ["tests/test_toy.py::test_wait"]}
    exits = {**ENTRY, "what": "Ends the process.", "old": "n -= 1", "new": "import os; os.abort()", "tests": hangs["tests"]}
    fails = {**ENTRY, "what": "Fails anyway.", "old": "LIMIT = 3", "new": "LIMIT = 2", "tests": ["tests/test_toy.py::test_limit"]}
    equivalent = {key: value for key, value in ENTRY.items() if key != "tests"} | {"new": "x + x", "equivalent": "x + x is 2 * x"}
    listed(toy, ADDS_ONE, same, exits, equivalent)
    code, said = script(toy)
    assert code == 1
    assert "4 wrong edits in" in said
    assert "2 caught (0 by the time limit), 1 survived, 1 equivalent, 0 broken." in said
    assert said.count("SURVIVED: toy: Multiplies the other way.") == 2  # as it happens, and at the end
    assert (toy / "src/toy.py").read_text() == SOURCE
    assert {line.get("result") for line in json.loads((toy / mutants.RESULTS).read_text()).values()} == {
        None,
        "caught",
        "SURVIVED",
    }

    # What is known is not tried again; a result falls with its test file.
    listed(toy, ADDS_ONE, same, exits, {**hangs, "tests": ["tests/test_toy.py::test_wait"]})
    code, said = script(toy, "--only", "other way|Adds one")
    assert (code, "2 known from before, 0 to try" in said) == (1, True)
    (toy / "tests/test_toy.py").write_text(TESTS + "\n\ndef test_more() -> None:\n    assert double(3) == 6\n")
    listed(toy, ADDS_ONE, fails)
    code, said = script(toy, "--only", "Adds one|Fails anyway")
    assert code == 1
    assert "0 known from before, 2 to try" in said
    assert "tests/test_toy.py fails without an edit" in said


def test_an_endless_edit_is_stopped_and_counts_as_caught(
    toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def asleep(tree: Path, tests: tuple[str, ...], log: Path) -> int:
        assert "n -= 0" in (tree / "src/toy.py").read_text()
        log.write_text("")
        return os.posix_spawn(
            sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), setpgroup=0
        )

    job = mutants.Job((), 0.3, mutants.Mutant("Waits.", "src/toy.py", "n -= 1", "n -= 0", (), "", "toy"))
    monkeypatch.setattr(mutants, "start", asleep)
    trees = mutants.copies(toy, 1, tmp_path_factory.mktemp("trees"))
    assert [mutants.verdict(done) for done in mutants.run([job], trees)] == [mutants.TIMEOUT]
    assert (trees[0] / "src/toy.py").read_text() == SOURCE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "src/gone.py"}, "there is no file src/gone.py"),
        ({"old": "x"}, "'old' occurs 2 times"),
        ({"old": "3 * x"}, "'old' occurs 0 times"),
        ({"new": "2  *  x"}, "is the same code"),
        ({"new": "2 * ("}, "is not Python"),
        ({"tests": ["tests/test_gone.py"]}, "there is no test file"),
        ({"tests": ["tests/test_toy.py::test_gone"]}, "there is no test_gone in"),
        ({"tests": []}, "either 'tests' or 'equivalent'"),
        ({"equivalent": "because"}, "either 'tests' or 'equivalent'"),
        ({"test": "tests/test_toy.py"}, "unknown keys"),
        ({"what": None}, "'what' is missing"),
    ],
)
def test_an_entry_that_has_rotted_is_refused(
    toy: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    listed(toy, {**ENTRY, **change})
    assert mutants.main(["--root", str(toy)]) == 2
    assert said in capsys.readouterr().out


def test_one_edit_is_listed_once(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed(toy, ENTRY, {**ENTRY, "what": "Adds again."})
    assert mutants.main(["--root", str(toy), "--check"]) == 2
    assert "is the same edit as 'toy: Adds.'" in capsys.readouterr().out
