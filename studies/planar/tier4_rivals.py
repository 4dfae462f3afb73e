"""Tier 4 for the image model alone and for other methods (PREREG-tier4-rivals.md).

    python studies/planar/tier4_rivals.py dev 100 "drp, image"      # other seeds
    python studies/planar/tier4_rivals.py task 0                    # seeds 0 to 7; refused before the registration
    python studies/planar/tier4_rivals.py task --table              # with the rows of tier 4; also writes tier4-rivals-task.md

Task, budget, updates and score are those of tier4.py, and its rows of `drp` are the other side of all contrasts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tier4
import torch
from registration import registered
from shared import add_row, rows_of
from tier2 import PRETRAINED, SAME
from tier2_analysis import SEEDS, Pairs
from tier3_analysis import contrasts

from localmotion.evaluation.contrasts import verdict

HERE = Path(__file__).parent
FILES = ("PREREG-tier4-rivals.md", "tier4_rivals.py", *tier4.FILES[1:])
"""What the registration binds."""
ARMS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "drp, image": ("drp", ("load=image",), True),
    "global flow": ("global flow", ("motion_encoder=global",), True),
    "dreamer_v2": ("dreamer_v2", (), False),
    "apv": ("apv", SAME, True),
    "ipv": ("ipv", SAME, True),
    "prelar": ("prelar", (), True),
    "dreamer_v3": ("dreamer_v3", (), False),
}
"""As in tier4.py, in the order in which they run."""
FAMILIES: dict[str, Pairs] = {"rivals": tuple(("drp", arm) for arm in ARMS)}
tier4.ARMS.update(ARMS)
PRETRAINED.update({name: (name, (), "") for name in ("dreamer_v2", "dreamer_v3")})


def rows(kind: str) -> list[dict[str, Any]]:
    """Rows of this script, and those of `drp` and `scratch` of tier 4."""
    return [row for row in rows_of(f"tier4-{kind}") if row["arm"] in ("drp", "scratch")] + rows_of(f"tier4-rivals-{kind}")


def contrast_table(found: Sequence[Mapping[str, Any]], *, verdicts: bool) -> list[str]:
    """Markdown: the contrasts. There is no verdict before all seeds are there."""
    heads = ["", "seeds", "difference", "95 % interval", "p", "p, Holm", "verdict"]
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for pairs in FAMILIES.values():
        for of, against, both, x, p, q in contrasts(tier4.read(found), [tier4.TASK], pairs):
            said = verdict(x, tier4.SMALLEST) if verdicts and len(both) == SEEDS else ""
            cells = [f"{of} - {against}", f"{len(both)}", f"{x.point:+.1f}", f"{x.low:+.1f} to {x.high:+.1f}", f"{p:.4f}"]
            out.append("| " + " | ".join([*cells, f"{q:.4f}", said]) + " |")
    return out


def page(kind: str) -> list[str]:
    found = rows(kind)
    return [*tier4.score_table(found), "", *contrast_table(found, verdicts=kind == "task")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", choices=("dev", "task"))
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_intermixed_args()
    if args.table or args.seed is None:
        text = "\n".join(page(args.set))
        (HERE / f"tier4-rivals-{args.set}.md").write_text(text + "\n")
        print(text)
        return
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    commit = {"registered": registered(FILES)} if args.set == "task" else {}
    done = {(row["arm"], row["seed"]) for row in rows_of(f"tier4-rivals-{args.set}")}
    for arm in args.arms or ARMS:
        if (arm, args.seed) not in done:
            began = time.process_time()
            row = {"arm": arm, "seed": args.seed, **commit, **tier4.run_of(arm, args.seed, args.work)}
            add_row(f"tier4-rivals-{args.set}", row | {"cpu_seconds": round(time.process_time() - began)})


if __name__ == "__main__":
    main()
