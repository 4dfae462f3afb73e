"""What the pages show can be typed: names that they import exist, and so do the commands and the options of each."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from localmotion.cli import _parser

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "studies").rglob("*.md")])
IMPORT = re.compile(r"^ *(?:from (localmotion[\w.]*) import ([\w, ]+)|import (localmotion[\w.]*))", re.MULTILINE)
COMMAND = re.compile(r"^ {4}(?:\$ )?localmotion ([a-z-]+)(.*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_imports_names_that_exist(page: Path) -> None:
    for module, names, whole in IMPORT.findall(page.read_text()):
        found = importlib.import_module(module or whole)
        for name in (part.strip() for part in names.split(",") if part.strip()):
            assert hasattr(found, name), f"{page.name}: from {module} import {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_pages_commands_exist_with_their_options(page: Path) -> None:
    commands = _parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert commands
    for command, rest in COMMAND.findall(page.read_text()):
        if command not in commands and "--method" in rest:
            continue  # a stage of one method's own
        assert command in commands, f"{page.name}: localmotion {command}"
        if command in ("pretrain", "finetune", "train"):
            continue  # they take every setting
        known = {text for action in commands[command]._actions for text in action.option_strings}
        for option in re.findall(r"(?<!\S)(--[a-z][\w-]*)", rest.split(" # ")[0]):
            assert option in known, f"{page.name}: localmotion {command} {option}"
