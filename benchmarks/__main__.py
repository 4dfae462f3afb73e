"""`make bench`: measures the speed of every part, prints tables, writes JSON. `python -m benchmarks update env` runs two parts."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.goals import against_goals
from localmotion.machine import cores

PARTS = (
    *("machine", "threads", "update", "gpu", "floor", "peers", "acting"),
    *("env", "planar", "visuals", "extract", "shards", "replay", "loop", "many", "scaling"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description="Times depend on this machine; compare ratios within one run."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)}; all if none is named")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of torch, 0 for one per core; with 1, updates are measured in CPU seconds of the process",
    )
    parser.add_argument(
        "--r2dreamer", default="", metavar="PATH", help="checkout of NM512/r2dreamer to be timed beside DreamerV3"
    )
    parser.add_argument(
        "--dreamerv3", default="", metavar="PATH", help="checkout of danijar/dreamerv3 (JAX) to be timed beside DreamerV3"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench.json"),
        help="file for the numbers as JSON (default: %(default)s); the picture of scaling is written beside it, .scaling.png",
    )
    given = parser.parse_args()
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(PARTS)}")
    import torch  # not at the top: workers of extraction import this file, and torch would make their start slow

    torch.set_num_threads(given.threads or min(torch.get_num_threads(), cores()))
    paths: dict[str, object] = {"r2dreamer_path": given.r2dreamer, "dreamerv3_path": given.dreamerv3}
    options = dict.fromkeys(("peers", "gpu"), paths)
    options["scaling"] = {"picture": given.out.with_suffix(".scaling.png")}
    console = Console(width=170)
    results: dict[str, list[dict[str, object]]] = {}
    began = time.monotonic()
    for part in given.parts or PARTS:
        start = time.monotonic()
        results[part] = importlib.import_module(f"benchmarks.bench_{part}").run(**options.get(part, {}))
        show(console, f"{part} ({time.monotonic() - start:.0f} s)", results[part])
        given.out.write_text(json.dumps(results, indent=1) + "\n")  # after each part, because parts take long
    if rows := against_goals(results):
        results["goals"] = rows
        show(console, "against the goals (reached: 1 or more)", rows)
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"wrote {given.out}; {(time.monotonic() - began) / 60:.0f} minutes")


def show(console: Console, title: str, rows: list[dict[str, object]]) -> None:
    """Rows as a table; the first one names the columns."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
