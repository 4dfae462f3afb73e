"""studies/planar/tables.py: tables of the pages are what the committed rows give."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "studies" / "planar"
NUMBER = re.compile(r"[+-]?\d+\.\d+")


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    """The script finds its neighbours beside it."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("tables")
    finally:
        sys.path.remove(str(FOLDER))


def test_pages_hold_what_the_rows_give(tables: ModuleType) -> None:
    """A last digit may differ: it depends on the order in which numpy adds."""
    for page, text in tables.made().items():
        kept = page.read_text()
        assert NUMBER.sub("#", kept) == NUMBER.sub("#", text), f"python studies/planar/tables.py makes {page.name} anew"
        for was, now in zip(NUMBER.findall(kept), NUMBER.findall(text), strict=True):
            assert abs(float(was) - float(now)) < 0.0015, (page.name, was, now)


def test_each_block_stands_in_a_page(tables: ModuleType) -> None:
    named = [name for page in tables.PROSE for _, name, *_ in tables.BLOCK.findall(page.read_text())]
    assert sorted(named) == sorted(tables.BLOCKS)
    marks = sum(page.read_text().count("<!-- tables.py:") for page in tables.PROSE)
    assert marks == len(named)  # none has lost its end


def test_a_verdict_needs_eight_seeds(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tables.analysis.load("sealed")
    assert ("drp", "scratch") in tables.tier1_contrasts("links")
    fewer = [row for row in rows if not (row["arm"] == "scratch" and row["seed"] == 7 and row["body"] == rows[0]["body"])]
    assert len(fewer) == len(rows) - 1
    monkeypatch.setattr(tables.analysis, "load", lambda name: fewer)
    assert ("drp", "scratch") not in tables.tier1_contrasts("links")
