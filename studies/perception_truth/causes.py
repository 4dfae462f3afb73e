"""What limits the embedded perception: the same episodes with one thing changed at a time, against the exact motion.

    python studies/perception_truth/causes.py OUT.json [--videos FOLDER]

Changes of the flow: settings of DIS. Of the picture: drawn at twice the side and averaged. Of the foreground: the weight times how much the
picture has changed there, `GATE` grey levels counting as wholly changed. With videos, also how well real frames agree after warping by
the flow (mean absolute grey levels; it rewards flow that overfits, so only large differences mean something).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs import make_env
from localmotion.envs.base import area_average
from localmotion.envs.truth import motion_truth, pixel_grid
from localmotion.perception.base import make_backend
from localmotion.perception_eval.report import ENVS, jsonable, save_report
from localmotion.perception_eval.scores import FlowScore, MaskScore
from localmotion.perception_eval.warps import load_pictures, warp_pair
from localmotion.video.decode import iter_frames
from localmotion.video.listing import usable_videos

SIDE, STORED, FRAMES, EPISODES, GATE = 128, 64, 16, (3, 4), 3.0
FLOWS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "refined 10": {"VariationalRefinementIterations": 10},
    "refined 20": {"VariationalRefinementIterations": 20},
    "no propagation, refined 10": {"UseSpatialPropagation": False, "VariationalRefinementIterations": 10},
    "no propagation, no mean, refined 10": {
        "UseSpatialPropagation": False,
        "UseMeanNormalization": False,
        "VariationalRefinementIterations": 10,
    },
}


def engine(settings: dict[str, Any]) -> Any:
    """The embedded backend with other settings of OpenCV's object."""
    backend = make_backend("flow", "dis")
    inner = backend._engine((SIDE, SIDE))
    for name, value in settings.items():
        getattr(inner, f"set{name}")(value)
    return backend


def gate(before: NDArray[np.uint8], now: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W) in [0, 1]: whether the picture changed here, largest channel, within about a pixel."""
    change = np.abs(now.astype(np.float32) - before).max(-1)
    return np.clip(cv2.GaussianBlur(change, (0, 0), 1.0) / np.float32(GATE), 0, 1).astype(np.float32)


def environment(name: str) -> list[dict[str, Any]]:
    """Rows of one environment: every drawing and flow on the same episodes."""
    env = make_env(name, size=STORED, percept_size=SIDE, quality="fast")
    truth = motion_truth(env)
    shape = env.action_space.shape
    assert shape is not None
    drawn: dict[str, list[NDArray[np.uint8]]] = {"one sample": [], "four samples": []}
    true = []
    for episode in EPISODES:
        env.reset(seed=episode)
        rng = np.random.default_rng([episode, 1])
        once, twice, shots = [], [], []
        for t in range(FRAMES):
            if t:
                env.step(rng.uniform(-1, 1, shape).astype(np.float32))
            once.append(env.render_frame(SIDE))
            twice.append(area_average(env.render_frame(2 * SIDE), SIDE))
            shots.append(truth.snapshot(SIDE))
        drawn["one sample"].append(np.stack(once))
        drawn["four samples"].append(np.stack(twice))
        true.append([(*truth.flow(a, b), truth.foreground(a), truth.foreground(b)) for a, b in itertools.pairwise(shots)])
    env.close()
    saliency, rows = make_backend("segment", "saliency", change=0.0), []
    for drawing, clips in drawn.items():
        for flow_name, settings in FLOWS.items():
            backend, score, plain, gated = engine(settings), FlowScore(SIDE // STORED), MaskScore(), MaskScore()
            for frames, pairs in zip(clips, true, strict=True):
                fields = backend.flow(frames[:-1], frames[1:])
                for t, (flow, valid, body, body_after) in enumerate(pairs):
                    score.add(fields[t], flow, valid, body)
                    weight = saliency.weight(frames[t + 1][None], [fields[k] for k in range(t, max(t - 3, -1), -1)])
                    plain.add(weight, {"body": body_after})
                    gated.add(weight * gate(frames[t], frames[t + 1]), {"body": body_after})
            numbers = score.numbers()["stored"]
            rows.append(
                {"env": name, "drawing": drawing, "flow": flow_name, "body": numbers["body"], "ground": numbers["ground"]}
                | {"saliency": plain.numbers()["body"], "gated": gated.numbers()["body"]}
            )
    return rows


def brightness(settings: dict[str, Any]) -> dict[str, float]:
    """Mean end-point error (stored pixels) on warped procedural pictures whose second one is brighter by a factor."""
    backend, out = engine(settings), {}
    for gain in (1.0, 1.03, 1.1):
        score = FlowScore(SIDE // STORED)
        for picture in load_pictures(None, count=6):
            for kind, amount in (("shift", 1.0), ("turn", 1.0), ("zoom", 1.02)):
                first, second, flow, valid = warp_pair(picture, SIDE, kind, amount, 1.0)
                brighter = np.clip(second.astype(np.float32) * gain, 0, 255).astype(np.uint8)
                score.add(backend.flow(first[None], brighter[None])[0], flow, valid, valid)
        out[f"{gain:g}"] = score.numbers()["stored"]["all"]["mean"]
    return out


def photometric(videos: Path, stride: int) -> dict[str, float]:
    """Mean absolute difference of real frames and their warped successors, by flow; "still" without warping."""
    refs = usable_videos(videos)
    chosen = [refs[int(k)] for k in np.linspace(0, len(refs) - 1, 20)]
    clips = [list(itertools.islice(iter_frames(ref, SIDE, stride), 6)) for ref in chosen]
    pairs = [pair for clip in clips for pair in itertools.pairwise(clip)]
    grid = pixel_grid(SIDE).reshape(SIDE, SIDE, 2).astype(np.float32)
    out = {"still": float(np.mean([np.abs(b.astype(np.float32) - a).mean() for a, b in pairs]))}
    for name, settings in FLOWS.items():
        backend, errors = engine(settings), []
        for a, b in pairs:
            x, y = np.moveaxis(grid + backend.flow(a[None], b[None])[0], -1, 0)
            errors.append(
                np.abs(cv2.remap(b, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float32) - a).mean()
            )
        out[name] = float(np.mean(errors))
    return {name: round(value, 4) for name, value in out.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--videos", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    names = [name for name in ENVS if not name.startswith("toy:")]
    result: dict[str, Any] = {"opencv": cv2.__version__, "rows": [row for name in names for row in environment(name)]}
    result["brightness"] = {name: brightness(settings) for name, settings in FLOWS.items()}
    if args.videos:
        result["photometric"] = {f"stride {stride}": photometric(args.videos, stride) for stride in (1, 3)}
    save_report(jsonable(result), args.out)


if __name__ == "__main__":
    main()
