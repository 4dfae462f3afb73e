"""Changes of DRP, one at a time, on the development bodies: frozen codes, and behaviour from few labels.

    python studies/planar/candidates.py 100                       # seed; all candidates
    python studies/planar/candidates.py 100 "drp, 16 points"      # some
    python studies/planar/candidates.py --table                   # of the rows

Data, pre-training and probes are those of tier1.py; videos and policies of cheetah run are those of tier3.py. The policies of the committed
rows had 1,500 updates; now tier3.py has 1,000.
No sealed body is seen. Cheetah run is a task of tiers 2 and 3; here it has other episodes. A row of rows/candidates.jsonl holds an
arm and a seed:

    links, links_pose, actions
                    means over the four development bodies
    repeated        correlation of the code with that of other points of the same body and frames, mean over its numbers; on the
                    development bodies and in cheetah run. 1: it does not matter which points were drawn. Only for arms with 8 points:
                    a frame has 16, so there is no second draw of more
    foreseen, features policy, features returns
                    of tier3.py, cheetah run, development episodes

Rows that are there are not made again. Policies and scores of the first rows of seed 100 had labels drawn by seed 0, and a penalty that was
chosen on a tenth of the labelled episodes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import tier1
import torch
from analysis import score as area
from numpy.typing import NDArray
from shared import CHANGED, SIXTEEN, add_row, rows_of
from tier1 import ARMS, LENGTH, RECOMPOSE, TESTED, code, model, recorded, scores
from tier3 import recorded as expert_videos
from tier3 import row_of
from tier3_analysis import score as played
from tier3_analysis import shown

from localmotion.compute import Compute
from localmotion.envs import planar_trees as trees
from localmotion.evaluation.probe_data import SKIP, ProbeData
from localmotion.methods.base import Batch, Method
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

POINTS = 8
"""Keypoints of the preset `tiny`."""
CANDIDATES: dict[str, tuple[str, ...]] = {
    "drp": (),
    "drp, 16 points": CHANGED["drp, 16 points"],
    "drp, patches of 12": ("model.dae.patch=12",),
    "recompose": (RECOMPOSE,),
    "recompose, 16 points": CHANGED["recompose, 16 points"],
    "recompose, 9 tokens, 16 points": CHANGED["recompose, 9 tokens, 16 points"],
    "global flow": ("motion_encoder=global",),
}
ARMS.update({arm: ("drp", settings, "train") for arm, settings in CANDIDATES.items()})


@torch.no_grad()
def repeated(found: Method, compute: Compute, store: ClipStore) -> float:
    """Correlation of codes of two disjoint draws of `POINTS` points."""
    sampler, rng, codes = WindowSampler(store, LENGTH, 16, 0, split="all", prefetch=False), np.random.default_rng(0), ([], [])
    for begin in range(0, min(len(store), 96), 16):
        clips = np.arange(begin, min(begin + 16, len(store)))
        batch, order = sampler.windows(clips, np.zeros(len(clips), int)), rng.permutation(tier1.RECIPE.tracks)
        for part, half in zip(codes, (order[:POINTS], order[POINTS : 2 * POINTS]), strict=True):
            part.append(of(found, compute, batch, half))
    first, second = (np.concatenate(part) for part in codes)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(first.T, second.T, strict=True)]))


def redrawn(arm: str) -> bool:
    """Whether the code of an arm can be made of other points of the same frames."""
    return SIXTEEN not in CANDIDATES[arm] and "motion_encoder=global" not in CANDIDATES[arm]


def of(found: Method, compute: Compute, batch: Batch, tracks: NDArray[np.int64]) -> NDArray[Any]:
    """Codes (n, d) of a batch with only some of its tracks."""
    some = {**batch, **{name: batch[name][:, :, tracks] for name in ("tracks", "visible", "track_id")}}
    with compute.autocast():
        coded = found.motion_code(some)
    assert coded is not None
    return coded[:, SKIP:].flatten(0, 1).float().numpy()


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: means and deviations over seeds."""
    heads = [
        "linear probe",
        "network with the pose",
        "actions",
        "another draw",
        "the same, cheetah",
        "foreseen",
        "R², 200",
        "score, 200",
        "score, 5000",
    ]
    out = ["| arm | seeds | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for arm in CANDIDATES:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        cells = [[row[key] for row in mine] for key in ("links", "links_pose", "actions")]
        cells += [[row["repeated"][at] for row in mine if "repeated" in row] for at in (0, 1)]
        cells += [[row["foreseen"] for row in mine], [row["features policy"]["200"] for row in mine]]
        cells += [[played(row["features returns"][n], row) for row in mine] for n in ("200", "5000")]
        out.append(f"| {arm} | {len(mine)} | " + " | ".join(map(shown, cells)) + " |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_args()
    if unknown := set(args.arms) - set(CANDIDATES):
        parser.error(f"no candidate {', '.join(unknown)}; there are {', '.join(CANDIDATES)}")
    torch.set_num_threads(1)
    kept = rows_of("candidates")
    if args.table or args.seed is None:
        print("\n".join(table(kept)))
        return
    done = {(row["arm"], row["seed"]) for row in kept}
    for arm in args.arms or CANDIDATES:
        if (arm, args.seed) in done:
            continue
        began = time.process_time()
        found, compute = model(arm, args.seed, trees.DEV, args.work, "dev")
        measured, twice = [], []
        for number in trees.DEV:
            place = recorded(number, args.work, TESTED, 2)
            data = ProbeData(place, LENGTH)
            measured.append(scores(code(found, compute, data), data.episodes))
            if redrawn(arm):
                twice.append(repeated(found, compute, ClipStore(place)))
        row: dict[str, Any] = {"arm": arm, "seed": args.seed, "width": measured[0]["width"]}
        row |= {name: round(float(np.mean([x[name] for x in measured])), 4) for name in ("links", "links_pose")}
        row["actions"] = round(float(np.mean([area(x, "actions") for x in measured])), 4)
        videos = expert_videos("cheetah_run", "dev", args.work)
        if twice:
            row["repeated"] = [round(float(np.mean(twice)), 3), round(repeated(found, compute, videos.store), 3)]
        row |= row_of(arm, args.seed, "cheetah_run", videos, args.work)
        row["cpu_seconds"] = round(time.process_time() - began)
        add_row("candidates", row)


if __name__ == "__main__":
    main()
