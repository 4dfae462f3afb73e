"""`make bench`: measures what a user waits for, prints tables, writes JSON. Each part can be named: python -m benchmarks update env."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

PARTS = ("machine", "update", "acting", "env", "visuals", "extract", "replay")


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    console = Console(width=150)
    results: dict[str, list[dict[str, object]]] = {}
    for part in wanted:
        if part not in PARTS:
            sys.exit(f"error: unknown benchmark {part!r}; known: {', '.join(PARTS)}")
        rows = importlib.import_module(f"benchmarks.bench_{part}").run()
        results[part] = rows
        table = Table(*rows[0], title=part)
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    out = Path("bench.json")
    out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
