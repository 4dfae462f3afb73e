"""Tier 2 again, for DRP without the context frame, and pilots of other changes (second round, PREREG-second.md).

    python studies/planar/second_round.py dev 100 "drp, no context"   # development bodies; any arm
    python studies/planar/second_round.py tasks 0        # seeds 0 to 7; the registered arms
    python studies/planar/second_round.py dev --pilot    # all arms of the development rows, with those of tier 2
    python studies/planar/second_round.py tasks --table  # contrasts, with the rows of tier 2

Data, batches, updates and figures are those of tier2.py, and its rows are the other side of some contrasts. `image` loads the image
encoder and decoder of the same pre-training alone, `scratch` nothing.
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
NO_CONTEXT = "model.world.context=false"
"""The decoder gets no frame of the clip, so the state has to hold the whole picture, as in APV."""
WHOLE = "online.pretrained_lr_factor=1"
"""What was pre-trained learns as fast as the rest, as in the presets of IPV and APV."""
NINE = CHANGED["recompose, 9 tokens, 16 points"]
FORMS: dict[str, tuple[str, ...]] = {
    "drp, 16 points": CHANGED["drp, 16 points"],
    "9 tokens, 16 points": NINE,
    "drp, no context": (NO_CONTEXT,),
    "drp, whole rate": (WHOLE,),
    "drp, 16 points, no context": (*CHANGED["drp, 16 points"], NO_CONTEXT),
    "9 tokens, 16 points, no context": (*NINE, NO_CONTEXT),
    "global flow, no context": ("motion_encoder=global", NO_CONTEXT),
}
"""Settings of both stages."""
SOURCES = {"": "train", ", image": "image", ", scratch": ""}
ARMS = {f"{form}{end}": (form, source) for form in FORMS for end, source in SOURCES.items()}
REGISTERED = ("drp, no context", "drp, no context, scratch", "drp, no context, image", "global flow, no context")
"""The arms that the tasks get."""
FAMILIES: dict[str, Pairs] = {
    "without the context frame": (
        ("drp, no context", "drp"),
        ("drp, no context", "drp, no context, scratch"),
        ("drp, no context", "apv"),
        ("drp, no context", "drp, no context, image"),
        ("drp, no context", "global flow, no context"),
    )
}
PILOTED = ("walker_run", "tree-0016_run", "tree-0018_run", "cheetah_run")
"""Tasks of the development set on which changes were tried."""
tier2.PRETRAINED.update({form: ("drp", settings, "train") for form, settings in FORMS.items()})
tier2.ARMS.update(ARMS)


def table(kind: str) -> list[str]:
    """Markdown: the contrasts of the primary measure."""
    rows = rows_of(f"tier2-{kind}") + rows_of(f"second-{kind}")
    return contrast_table(read(rows, PRIMARY), tier2.SETS[kind], FAMILIES, SMALLEST)


def pilot() -> list[str]:
    """Markdown: the primary measure of each arm that has all tasks of the pilot, by seed and task."""
    scores = read(rows_of("tier2-dev") + rows_of("second-dev"), PRIMARY)
    out = ["| arm | seed | " + " | ".join(PILOTED) + " | mean |", "|---" * (len(PILOTED) + 3) + "|"]
    for arm, known in scores.items():
        for seed in sorted({seed for seed, _ in known}):
            cells = [known.get((seed, task)) for task in PILOTED]
            whole = [cell for cell in cells if cell is not None]
            if len(whole) == len(PILOTED):
                out.append(f"| {arm} | {seed} | " + " | ".join(f"{x:.3f}" for x in [*whole, sum(whole) / len(whole)]) + " |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", choices=tier2.SETS)
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--tasks", nargs="*", help="some tasks of the set")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_intermixed_args()
    if args.table or args.pilot or args.seed is None:
        print("\n".join(pilot() if args.pilot else table(args.set)))
        return
    arms = REGISTERED if args.set == "tasks" else tuple(ARMS)
    if unknown := set(args.arms) - set(arms):
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(arms)}")
    torch.set_num_threads(1)
    commit = {"registered": registered(FILES)} if args.set == "tasks" else {}
    done = {(row["arm"], row["seed"], row["task"]) for row in rows_of(f"second-{args.set}")}
    for task in args.tasks or tier2.SETS[args.set]:
        for arm in args.arms or arms:
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
