"""The check of a release refuses what is wrong, and the package that it builds works outside of the checkout."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import yaml
from tools import release_check
from tools.release_check import FailedError, check_changelog, version_of

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "src/localmotion/__init__.py", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_versions_agree(tree: Path) -> None:
    version = version_of(ROOT)
    for name in ("src/localmotion/__init__.py", "CITATION.cff"):
        text = (tree / name).read_text()
        (tree / name).write_text(text.replace(version, "9.9.9"))
        with pytest.raises(FailedError, match=r"versions differ: .*9\.9\.9"):
            version_of(tree)
        (tree / name).write_text(text)
    assert version_of(tree) == version


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("## [Unreleased]\n\n## [1.2.0] - 2026-01-31\n- x\n", ""),
        ("## [1.2.0] - 2026-01-31\n- x\n## [1.1.0] - 2025-01-01\n- y\n", ""),
        ("## [Unreleased]\n- x\n## [1.2.0] - 2026-01-31\n- x\n", r"\[Unreleased\] has lines"),
        ("## [1.1.0] - 2025-01-01\n- y\n", "newest section is"),
        ("## [1.2.0]\n- y\n", "newest section is"),
        ("## [1.2.0] - 2026-01-31\n\n", "newest section is"),
        ("", "newest section is 'nothing'"),
    ],
)
def test_the_changelog_has_the_version(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{text}")
    if not problem:
        check_changelog(tmp_path, "1.2.0")
        return
    with pytest.raises(FailedError, match=problem):
        check_changelog(tmp_path, "1.2.0")


def test_files_for_people_can_be_read() -> None:
    for name in ("bug", "question"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert {"name", "description", "body"} <= set(form)
        assert all(part["type"] == "markdown" or part["attributes"]["label"] for part in form["body"])
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["cff-version"] == "1.2.0"


@pytest.mark.parametrize("more", [["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "whole"])
def test_wheel_and_sdist_work_outside_of_the_checkout(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = release_check.main(["--no-changelog", "--packages", sysconfig.get_paths()["purelib"], *more])
    out = capsys.readouterr()
    assert found == 0, out.err
    done = "--version, train" if more else "--version, info, train, evaluate, report, export"
    assert out.out.count(f"installed, ran {done}\n") == (1 if more else 2)
