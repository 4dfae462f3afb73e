"""The notebooks of docs/notebooks: as they are in the repository, and (slow) that their cells still run."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from tools import notebooks

BOOKS = sorted((Path(__file__).parent.parent / "docs/notebooks").glob("*.ipynb"))


def test_there_are_three() -> None:
    assert [path.stem for path in BOOKS] == ["add_a_method", "first_run", "own_videos"]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_its_outputs(path: Path) -> None:
    text = path.read_text()
    cells = json.loads(text)["cells"]
    printing = [
        cell for cell in cells if re.search(r"\bprint\(|plt\.show", "".join(cell["source"])) and cell["cell_type"] == "code"
    ]
    assert printing
    assert all(cell["outputs"] for cell in printing)
    assert not [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "error"]
    assert len(text) < 200_000
    assert "/tmp" not in text
    assert "/home" not in text


def test_run_returns_what_cells_print_and_draw() -> None:
    draws = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint(x)"
    sources = [("code", "x = 1"), ("markdown", "x = 2"), ("code", draws)]
    first, second = notebooks.run({"cells": [{"cell_type": kind, "source": text} for kind, text in sources]})
    assert first == []
    assert [output["output_type"] for output in second] == ["stream", "display_data"]
    assert second[0]["text"] == ["1\n"]


@pytest.mark.slow
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text())
    began = time.process_time()
    outputs = iter(notebooks.run(notebook))
    assert time.process_time() - began < 120
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            kinds = [output["output_type"] for output in cell["outputs"]]
            assert [output["output_type"] for output in next(outputs)] == kinds
