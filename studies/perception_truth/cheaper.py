"""What cheaper settings of the embedded flow cost in quality: time of a pair, error against the exact motion, known warps, real frames.

    python studies/perception_truth/cheaper.py OUT.json [--videos FOLDER]

The environments' episodes are others than those of `causes.py`. Times are CPU time of the process on the same pairs, each variant in turn,
the least of three rounds, so their ratios hold on a busy machine too. With videos, also how well real frames one and three apart agree
after warping (mean absolute grey levels).
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs import make_env
from localmotion.envs.truth import motion_truth, pixel_grid
from localmotion.perception.base import make_backend
from localmotion.perception_eval.report import jsonable, save_report
from localmotion.perception_eval.scores import FlowScore, MaskScore
from localmotion.perception_eval.warps import WARPS, load_pictures, warp_pair
from localmotion.video.decode import iter_frames
from localmotion.video.listing import usable_videos

STORED, FRAMES, EPISODES, ROUNDS = 64, 9, (5, 6), 3
ENVS = (
    "dmc:walker_walk",
    "dmc:cheetah_run",
    "dmc:reacher_easy",
    "dmc:finger_spin",
    "dmc:cartpole_swingup",
    "metaworld:reach",
    "metaworld:drawer-open",
    "toy:moving_background",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "12 descents": {"descents": 12},
    "3 refinements": {"refinements": 3},
    "stride 4": {"patch_stride": 4},
    "stride 4, 12 descents": {"patch_stride": 4, "descents": 12},
    "stride 4, 12 descents, 3 refinements": {"patch_stride": 4, "descents": 12, "refinements": 3},
    "stride 5, 12 descents": {"patch_stride": 5, "descents": 12},
    "half size": {"finest_scale": 1},
    "half size, then 3 refinements": {"finest_scale": 1, "last_refinements": 3},
    "half size, then 5 refinements": {"finest_scale": 1, "last_refinements": 5},
    "half size, stride 2, then 5 refinements": {"finest_scale": 1, "patch_stride": 2, "last_refinements": 5},
    "half size without refinement, then 5": {"finest_scale": 1, "refinements": 0, "last_refinements": 5},
}


def episodes(name: str, side: int) -> list[tuple[NDArray[np.uint8], list[Any]]]:
    """Frames, and (flow, valid, body, body in the next frame) of each pair, of every episode of an environment."""
    env = make_env(name, size=STORED, percept_size=side, quality="fast")
    truth, found = motion_truth(env), []
    shape = env.action_space.shape
    assert shape is not None
    for episode in EPISODES:
        env.reset(seed=episode)
        rng = np.random.default_rng([episode, 1])
        frames, shots = [], []
        for t in range(FRAMES):
            if t:
                env.step(rng.uniform(-1, 1, shape).astype(np.float32))
            frames.append(env.render_frame(side))
            shots.append(truth.snapshot(side))
        pairs = [(*truth.flow(a, b), truth.foreground(a), truth.foreground(b)) for a, b in itertools.pairwise(shots)]
        found.append((np.stack(frames), pairs))
    env.close()
    return found


def environments(side: int, backends: dict[str, Any]) -> dict[str, Any]:
    """By environment and variant: error on the body and the ground, share explained, foreground on the body."""
    segment, out = make_backend("segment", "saliency"), {}
    for name in ENVS:
        clips = episodes(name, side)
        for variant, backend in backends.items():
            score, mask = FlowScore(side // STORED), MaskScore()
            for frames, pairs in clips:
                fields = backend.flow(frames[:-1], frames[1:])
                for t, (flow, valid, body, body_after) in enumerate(pairs):
                    score.add(fields[t], flow, valid, body)
                    newest_first = [fields[k] for k in range(t, max(t - 3, -1), -1)]
                    mask.add(segment.weight(frames[[t + 1, t]], newest_first), {"body": body_after})
            numbers = score.numbers()["stored"]
            row = {"body": numbers["body"], "ground": numbers["ground"], "foreground": mask.numbers()["body"]}
            out.setdefault(name, {})[variant] = row
    return out


def warps(side: int, backends: dict[str, Any]) -> dict[str, Any]:
    """Mean error (stored pixels) on pictures under each known warp, by variant."""
    out: dict[str, Any] = {}
    for name, (kind, amount) in WARPS.items():
        scores = {variant: FlowScore(side // STORED) for variant in backends}
        for number, picture in enumerate(load_pictures(None, count=6)):
            moved = amount * side / STORED if kind == "shift" else amount
            first, second, flow, valid = warp_pair(picture, side, kind, moved, float(number))
            for variant, backend in backends.items():
                scores[variant].add(backend.flow(first[None], second[None])[0], flow, valid, valid)
        out[name] = {variant: score.numbers()["stored"]["all"]["mean"] for variant, score in scores.items()}
    return out


def real(side: int, backends: dict[str, Any], videos: Path) -> dict[str, Any]:
    """Grey levels by which real frames differ after warping, and milliseconds of a pair, by variant."""
    refs = usable_videos(videos)
    chosen = [refs[int(k)] for k in np.linspace(0, len(refs) - 1, 20)]
    grid = pixel_grid(side).reshape(side, side, 2).astype(np.float32)
    out: dict[str, Any] = {}
    for stride in (1, 3):
        clips = [list(itertools.islice(iter_frames(ref, side, stride), 5)) for ref in chosen]
        pairs = [pair for clip in clips for pair in itertools.pairwise(clip)]
        first, second = (np.stack(x) for x in zip(*pairs, strict=True))
        cost = {variant: float("inf") for variant in backends}
        errors: dict[str, float] = {}
        for _ in range(ROUNDS):
            for variant, backend in backends.items():
                began = time.process_time()
                fields = backend.flow(first, second)
                cost[variant] = min(cost[variant], 1e3 * (time.process_time() - began) / len(pairs))
                maps = [np.moveaxis(grid + field, -1, 0) for field in fields]
                warped = [
                    cv2.remap(b, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
                    for b, (x, y) in zip(second, maps, strict=True)
                ]
                errors[variant] = float(np.mean(np.abs(np.stack(warped).astype(np.float32) - first)))
        still = float(np.mean(np.abs(second.astype(np.float32) - first)))
        out[f"stride {stride}"] = {"still": still, "grey levels": errors, "ms": cost}
    return out


def main() -> None:
    """Measure, print a table, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--videos", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    report: dict[str, Any] = {"opencv": cv2.__version__, "variants": VARIANTS}
    for side in (128, 64):
        backends = {name: make_backend("flow", "dis", **options) for name, options in VARIANTS.items()}
        found: dict[str, Any] = {"warps": warps(side, backends)}
        if args.videos:
            found["real"] = real(side, backends, args.videos)
        found["environments"] = environments(side, backends)
        report[str(side)] = found
        save_report(jsonable(report), args.out)
        for line in table(found):
            print(f"{side} px | {line}", flush=True)


def table(found: dict[str, Any]) -> list[str]:
    """One line a variant, for people."""
    lines = []
    rows = list(found["environments"].values())
    for variant in VARIANTS:
        ratio = float(np.exp(np.mean([np.log(row[variant]["body"]["mean"] / row["as it is"]["body"]["mean"]) for row in rows])))
        explained = float(np.mean([row[variant]["body"]["explained"] for row in rows]))
        on_body = float(np.nanmean([row[variant]["foreground"]["share"] for row in rows]))
        known = [f"{name} {values[variant]:.3f}" for name, values in found["warps"].items()]
        seen = [
            f"{values['ms'][variant]:.2f} ms {values['grey levels'][variant]:.3f}" for values in found.get("real", {}).values()
        ]
        lines.append(
            f"{variant}: error {ratio:.2f}, explained {explained:.2f}, on body {on_body:.2f} | {', '.join(seen + known)}"
        )
    return lines


if __name__ == "__main__":
    main()
