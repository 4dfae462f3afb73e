"""Run the notebooks of docs/notebooks and write into them what their cells print and draw.

    python tools/notebooks.py docs/notebooks/*.ipynb

It executes code cells in a plain namespace, in an empty folder, without Jupyter: a cell prints, and shows figures with `plt.show()`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Execute the code cells of a notebook, in the working folder. Returns the outputs of each. Errors of a cell pass through."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    space: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
        outputs = [_stream(printed.getvalue())] if printed.getvalue() else []
        for figure in plt.get_fignums():
            outputs.append(_picture(plt.figure(figure)))
        plt.close("all")
        found.append(outputs)
    return found


def _stream(text: str) -> dict[str, Any]:
    return {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}


def _picture(figure: Any) -> dict[str, Any]:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=72, bbox_inches="tight")
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def main(paths: list[Path]) -> None:
    home = Path.cwd()
    for path in paths:
        notebook = json.loads((home / path).read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            outputs = iter(run(notebook))
            os.chdir(home)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = next(outputs)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
