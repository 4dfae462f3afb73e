"""Tier 2 again, for DRP with sixteen points: what does its motion add to its pictures? (second round; not registered yet)

    python studies/planar/second_round.py dev 100        # development bodies; all arms
    python studies/planar/second_round.py tasks 0        # seeds 0 to 7; refused before the registration
    python studies/planar/second_round.py tasks --table  # contrasts, with the rows of tier 2

Data, batches, updates and figures are those of tier2.py, and so is the arm `global flow`, whose rows are read from rows/tier2-*.jsonl. The
changes were found on development bodies (candidates.py): `tiny` has 8 points, the paper and these arms have 16. `image` loads the image
encoder and decoder of the same pre-training alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import tier2
import torch
from registration import registered
from shared import CHANGED, add_row, contrast_table, rows_of
from tier2_analysis import PRIMARY, SMALLEST, Pairs, read

FILES = ("PREREG-second.md", "second_round.py", "tier2.py", "tier2_analysis.py", "registration.py", "shared.py", "tier1.py")
"""What the registration binds."""
FORMS = {"drp, 16 points": "drp, 16 points", "9 tokens, 16 points": "recompose, 9 tokens, 16 points"}
"""Names here, and in shared.py."""
ARMS = {f"{name}{end}": (form, source) for name, form in FORMS.items() for end, source in (("", "train"), (", image", "image"))}
FAMILIES: dict[str, Pairs] = {
    "sixteen points": (
        ("drp, 16 points", "drp, 16 points, image"),
        ("drp, 16 points", "global flow"),
        ("9 tokens, 16 points", "9 tokens, 16 points, image"),
        ("9 tokens, 16 points", "global flow"),
    )
}
tier2.PRETRAINED.update({form: ("drp", CHANGED[form], "train") for form in FORMS.values()})
tier2.ARMS.update(ARMS)


def table(kind: str) -> list[str]:
    """Markdown: the contrasts of the primary measure."""
    rows = rows_of(f"tier2-{kind}") + rows_of(f"second-{kind}")
    return contrast_table(read(rows, PRIMARY), tier2.SETS[kind], FAMILIES, SMALLEST)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", choices=tier2.SETS)
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--tasks", nargs="*", help="some tasks of the set")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_intermixed_args()
    if args.table or args.seed is None:
        print("\n".join(table(args.set)))
        return
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    commit = {"registered": registered(FILES)} if args.set == "tasks" else {}
    done = {(row["arm"], row["seed"], row["task"]) for row in rows_of(f"second-{args.set}")}
    for task in args.tasks or tier2.SETS[args.set]:
        for arm in args.arms or ARMS:
            if (arm, args.seed, task) in done:
                continue
            began, data = time.process_time(), tier2.recorded(task, args.set, args.work)
            model, updater, rehearsal = tier2.begun(arm, args.seed, task, data, args.work)
            row = {"arm": arm, "seed": args.seed, "task": task, "data": data.digest, **commit}
            row |= {"curve": tier2.curve(model, updater, rehearsal, data, args.seed)}
            row["cpu_seconds"] = round(time.process_time() - began)
            add_row(f"second-{args.set}", row)


if __name__ == "__main__":
    main()
