"""Does an agent gain more return from few interactions after pre-training on videos of other bodies? (tier 4, PREREG-tier4.md)

    python studies/planar/tier4.py dev 100                 # other seeds; all arms
    python studies/planar/tier4.py task 0 drp scratch      # seeds 0 to 7; refused before the registration
    python studies/planar/tier4.py task --table            # scores and contrasts; also writes tier4-task.md
    python studies/planar/tier4.py --simulate 15           # on made-up scores: how often each verdict is given

Cheetah run, action repeat 4, preset `tiny`, batches of 8 x 16, an update for two agent steps. Pre-training is that of tier1.py, on its
16 bodies. A row of rows/ holds an arm and a seed:

    evaluations     env steps: returns of four episodes every 2,000 env steps, of ten at the end
    training        env steps and return of the training episodes

The score of a run is the mean of all of its evaluations after the first, which follows the random prefill.
Runs are in WORK/runs/tier4; the same command continues one that was stopped. Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from registration import registered
from second_round import NO_CONTEXT
from shared import add_row, rows_of
from tier2 import PRETRAINED, pretrained
from tier2_analysis import SEEDS, Pairs, Scores
from tier3_analysis import contrasts

from localmotion.evaluation.contrasts import verdict
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune

HERE = Path(__file__).parent
FILES = (
    "PREREG-tier4.md",
    "tier4.py",
    "tier2.py",
    "tier2_analysis.py",
    "tier3_analysis.py",
    "second_round.py",
    "registration.py",
    "shared.py",
    "tier1.py",
    "analysis.py",
)
"""What the registration binds."""
TASK, REPEAT, STEPS, EVERY = "cheetah_run", 4, 12_000, 2_000
ONLINE = (
    f"action_repeat={REPEAT}",
    f"env_steps={STEPS}",
    f"prefill={500 * REPEAT}",
    "train_every=2",
    "online.batch_size=8",
    "online.length=16",
    f"online.eval_every={EVERY // REPEAT}",
    f"online.save_every={EVERY // REPEAT}",
    "online.eval_episodes=4",
    "online.log_every=500",
)
ARMS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "drp": ("drp", (), True),
    "scratch": ("drp", (), False),
    "drp, no context": ("drp, no context", (NO_CONTEXT,), True),
    "drp, no context, scratch": ("drp, no context", (NO_CONTEXT,), False),
}
"""Pre-training of tier2.py, settings, and whether it is loaded."""
FAMILIES: dict[str, Pairs] = {
    "returns": (
        ("drp", "scratch"),
        ("drp, no context", "drp"),
        ("drp, no context", "drp, no context, scratch"),
    )
}
SMALLEST = 5.0
"""Smallest effect of interest, in the mean return."""


def run_of(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """The figures of an arm."""
    name, settings, loaded = ARMS[arm]
    flags: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1, "seed": seed}
    if loaded:
        flags["checkpoint"] = pretrained(name, "train", TASK, seed, work)
    stage = "finetune" if loaded else "train"
    run = compose(PRETRAINED[name][0], stage, preset="tiny", env=f"planar:{TASK}", flags=flags, settings=(*settings, *ONLINE))
    out = work / "runs" / "tier4" / arm.replace(", ", "_").replace(" ", "_") / f"{seed}"
    finetune(run, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    played = {line["env_step"]: line["returns"] for line in lines if line["kind"] == "eval" and not line.get("random")}
    trained = [[line["env_step"], round(line["return"], 2)] for line in lines if line["kind"] == "episode"]
    return {"evaluations": {str(step): [round(x, 2) for x in found] for step, found in played.items()}, "training": trained}


def score(row: Mapping[str, Any]) -> float:
    means = [float(np.mean(found)) for found in row["evaluations"].values()]
    return float(np.mean(means[1:]))


def read(rows: Sequence[Mapping[str, Any]]) -> Scores:
    found: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        found.setdefault(str(row["arm"]), {})[int(row["seed"]), TASK] = score(row)
    return found


def score_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: evaluations of each arm by env steps, mean and deviation over its seeds."""
    steps = list(rows[0]["evaluations"]) if rows else []
    out = ["| arm | seeds | score | " + " | ".join(f"{int(step):,}" for step in steps) + " |", "|---" * (len(steps) + 3) + "|"]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if mine:
            cells = [
                [score(row) for row in mine],
                *([float(np.mean(row["evaluations"][step])) for row in mine] for step in steps),
            ]
            out.append(f"| {arm} | {len(mine)} | " + " | ".join(map(shown, cells)) + " |")
    return out


def shown(cell: Sequence[float]) -> str:
    return f"{np.mean(cell):.1f}" + (f" ± {np.std(cell, ddof=1):.1f}" if len(cell) > 1 else "")


def contrast_table(rows: Sequence[Mapping[str, Any]], *, verdicts: bool) -> list[str]:
    """Markdown: the contrasts. There is no verdict before all seeds are there."""
    heads = ["", "seeds", "difference", "95 % interval", "p", "p, Holm", "verdict"]
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for pairs in FAMILIES.values():
        for of, against, both, x, p, q in contrasts(read(rows), [TASK], pairs):
            said = verdict(x, SMALLEST) if verdicts and len(both) == SEEDS else ""
            cells = [f"{of} - {against}", f"{len(both)}", f"{x.point:+.1f}", f"{x.low:+.1f} to {x.high:+.1f}", f"{p:.4f}"]
            out.append("| " + " | ".join([*cells, f"{q:.4f}", said]) + " |")
    return out


def simulated(spread: float, repeats: int = 500) -> list[str]:
    """Markdown: shares of verdicts for a contrast of known effect, if scores of an arm vary by ``spread`` over eight seeds."""
    rng, out = np.random.default_rng(0), ["| true effect | confirmed | undecided | refuted |", "|---|---|---|---|"]
    for effect in (0.0, 5.0, 10.0, 20.0, 30.0, 40.0):
        counts = dict.fromkeys(("confirmed", "undecided", "refuted"), 0)
        for _ in range(repeats):
            arms = {"a": effect, "b": 0.0}
            scores = {arm: {(s, TASK): float(rng.normal(mean, spread)) for s in range(SEEDS)} for arm, mean in arms.items()}
            ((*_, x, _, _),) = contrasts(scores, [TASK], (("a", "b"),))
            counts[verdict(x, SMALLEST)] += 1
        out.append(f"| {effect:+.0f} | " + " | ".join(f"{count / repeats:.2f}" for count in counts.values()) + " |")
    return out


def page(kind: str) -> list[str]:
    rows = rows_of(f"tier4-{kind}")
    return [*score_table(rows), "", *contrast_table(rows, verdicts=kind == "task")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", nargs="?", choices=("dev", "task"), default="dev")
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--simulate", type=float, metavar="SPREAD", help="spread of a score over seeds")
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_intermixed_args()
    if args.simulate:
        print("\n".join(simulated(args.simulate)))
        return
    if args.table or args.seed is None:
        text = "\n".join(page(args.set))
        (HERE / f"tier4-{args.set}.md").write_text(text + "\n")
        print(text)
        return
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    commit = {"registered": registered(FILES)} if args.set == "task" else {}
    done = {(row["arm"], row["seed"]) for row in rows_of(f"tier4-{args.set}")}
    for arm in args.arms or ARMS:
        if (arm, args.seed) not in done:
            began = time.process_time()
            row = {"arm": arm, "seed": args.seed, **commit, **run_of(arm, args.seed, args.work)}
            add_row(f"tier4-{args.set}", row | {"cpu_seconds": round(time.process_time() - began)})


if __name__ == "__main__":
    main()
