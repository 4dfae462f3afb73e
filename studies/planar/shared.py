"""What the scripts of tier 3, the second round and the candidates share. Those of tiers 1 and 2 are bound by their registrations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tier1 import RECOMPOSE
from tier2_analysis import SEEDS, Pairs, Scores, contrasts, paired

HERE = Path(__file__).parent
SIXTEEN = "model.dae.keypoints=16"
"""The paper's number of points; the preset `tiny` has 8."""
NINE = ("model.dae.mats=9", "model.dae.mats_placed=true")
"""Nine placed [MAT] tokens."""
CHANGED: dict[str, tuple[str, ...]] = {
    "drp, 16 points": (SIXTEEN,),
    "recompose, 16 points": (RECOMPOSE, SIXTEEN),
    "recompose, 9 tokens, 16 points": (RECOMPOSE, *NINE, SIXTEEN),
}
"""Settings of the changed forms of DRP."""


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of rows/NAME.jsonl."""
    file = HERE / "rows" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add_row(name: str, row: Mapping[str, Any]) -> None:
    """Write a row to rows/NAME.jsonl and print it."""
    with (HERE / "rows" / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def contrast_table(
    scores: Scores, tasks: Sequence[str], families: Mapping[str, Pairs], smallest: float, *, verdicts: bool = True
) -> list[str]:
    """Markdown: the contrasts of some families. There is no verdict before all seeds are there."""
    heads = ["", "seeds", "difference", "95 % interval", "p", "p, Holm", "verdict", *tasks]
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for one, other, each, x, p, q, said in contrasts(scores, tasks, families, smallest):
        seeds = len(paired(scores, one, other, tasks))
        cells = [f"{one} - {other}", f"{seeds}", f"{x.point:+.3f}", f"{x.low:+.3f} to {x.high:+.3f}", f"{p:.4f}", f"{q:.4f}"]
        cells += [said if verdicts and seeds == SEEDS else "", *(f"{value:+.3f}" for value in each)]
        out.append("| " + " | ".join(cells) + " |")
    return out
