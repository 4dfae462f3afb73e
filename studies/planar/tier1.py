"""Frozen motion codes on bodies that pre-training never saw (PREREG.md, tiers 0 and 1).

    python studies/planar/tier1.py dev 100                    # development bodies, seed; all arms
    python studies/planar/tier1.py dev 101 drp "global flow"  # some arms
    python studies/planar/tier1.py sealed 0                   # sealed bodies; all arms of the registration
    python studies/planar/tier1.py seen 0                     # the first eight bodies of pre-training, to measure the gap

Sealed bodies are refused unless PREREG.md is in force and committed with the scripts.

Data, recorded once: 16 bodies for training, 12 episodes of 66 agent steps each, under smooth random actions, 32-pixel pictures, exact
motion. Of each tested body 100 other episodes for the probes; 80 to fit, 20 to score. An arm is pre-trained with its seed for 500
updates of `tiny` and then frozen. A row of rows/ holds an arm, a seed and a body:

    links           R2 of ridge regression from the code to the velocities of the links in the picture, pixels per agent step
    links_pose      the same of a small network that also has the true pose of the links
    actions         R2 of ridge regression from the code to the actions, by number of labelled transitions
    width           numbers in the code

Rows that are there are not made again, so an interrupted run continues. An arm of a seed takes about two CPU minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmotion import methods
from localmotion.compute import PLAIN, Compute
from localmotion.envs import planar_trees as trees
from localmotion.evaluation.probe_data import Episodes, Floats, ProbeData
from localmotion.evaluation.probe_fits import idm, mlp_fit, ridge_fit
from localmotion.evaluation.probes import grid_flow
from localmotion.methods.base import Batch, Method
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs.load import load_run
from localmotion.runs.settings import compose
from localmotion.training.pretrain import pretrain
from localmotion.video.store import Clip, ClipStore, ClipStoreWriter

HERE = Path(__file__).parent
RECIPE = Recipe(size=32, percept_size=64, tracks=16).with_motion("exact")
TRAINED, TESTED, STEPS, LENGTH = 12, 100, 66, 25
UPDATES = 500
LABELS = (50, 200, 1_000, 5_000)
MOTION = ("flow", "tracks", "visible", "track_id")
SETS = {"dev": trees.DEV, "sealed": trees.SEALED, "seen": trees.TRAIN[:8]}
RECOMPOSE = "recompose_weight=1"
ARMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "drp": ("drp", (), "train"),
    "recompose": ("drp", (RECOMPOSE,), "train"),
    "recompose, 9 tokens": ("drp", (RECOMPOSE, "model.dae.mats=9", "model.dae.mats_placed=true"), "train"),
    "recompose, 9 in 32": ("drp", (RECOMPOSE, "model.dae.mats=9", "model.dae.mats_placed=true", "model.dae.agg_dim=32"), "train"),
    "global flow": ("drp", ("motion_encoder=global",), "train"),
    "ipv": ("ipv", (), "train"),
    "apv": ("apv", (), "train"),
    "prelar": ("prelar", (), "train"),
    "diswm": ("diswm", (), "train"),
    "lapo": ("lapo", ("form=continuous",), "train"),
    "laom": ("laom", (), "train"),
    "drp, own bodies": ("drp", (), "own"),
    "drp, shuffled": ("drp", (), "shuffled"),
    "drp, frames": ("drp", (), "frames"),
    "drp, pixels": ("drp", (), "pixels"),
    "recompose, own bodies": ("drp", (RECOMPOSE,), "own"),
    "recompose, shuffled": ("drp", (RECOMPOSE,), "shuffled"),
    "recompose, frames": ("drp", (RECOMPOSE,), "frames"),
    "recompose, pixels": ("drp", (RECOMPOSE,), "pixels"),
    "scratch": ("drp", (), ""),
    "exact flow": ("", (), ""),
    "idm": ("", (), ""),
}
"""Method, settings, and the videos of pre-training: of the bodies for training, of the tested bodies themselves ("own"), none, or those
for training with a control's motion: that of other clips ("shuffled"), its frames in random order ("frames"), or the flow of each
frame with its pixels in random places ("pixels"). The last two arms: exact flow on an 8 x 8 grid, and a network that learns the target
from pictures."""


CONTROLS = ("own bodies", "shuffled", "frames", "pixels")
CHOSEN = {
    "dev": tuple(ARMS),
    "sealed": tuple(arm for arm in ARMS if not arm.endswith(CONTROLS)),
    "seen": ("drp", "recompose", "global flow", "scratch"),
}
"""The arms of each set of bodies."""


def recorded(number: int, work: Path, episodes: int, seed: int) -> Path:
    """The clip store of a body."""
    task, out = f"planar:tree-{number:04d}_run", work / "data" / f"{number:04d}-{seed}"
    options: dict[str, Any] = {"sealed": True} if number in trees.SEALED else {}
    collect(task, out, episodes=episodes, steps=STEPS, seed=seed, recipe=RECIPE, action_repeat=2, **options)
    return out


def videos(kind: str, tested: range, work: Path) -> Path:
    """The clip store of pre-training: see `ARMS`."""
    bodies = tested if kind == "own" else trees.TRAIN
    out = work / "data" / f"{kind}-{bodies[0]:04d}"
    if not (out / "COMPLETE").exists():
        shutil.rmtree(out, ignore_errors=True)
        each = TRAINED * len(trees.TRAIN) // len(bodies)  # as many clips of few bodies
        stores = [ClipStore(recorded(number, work, each, 1)) for number in bodies]
        clips = [replace(store.clip(i), extra={}) for store in stores for i in range(len(store))]
        clips = controlled(kind, clips, each)
        writer = ClipStoreWriter.open(out, RECIPE.size, RECIPE.to_json(), RECIPE.hash(), RECIPE.tracks, 64)
        known = {clip.id: clip for clip in clips}
        for index, members in writer.pending(known):
            writer.write_shard(index, [known[name] for name in members])
        (out / "COMPLETE").write_text("")
    return out


def controlled(kind: str, clips: list[Clip], each: int) -> list[Clip]:
    """Clips with the motion of a control; ``each`` clips follow one another of every body."""
    rng = np.random.default_rng(0)
    if kind == "shuffled":
        given = clips[each:] + clips[:each]
        return [
            replace(clip, **{name: getattr(other, name) for name in MOTION}) for clip, other in zip(clips, given, strict=True)
        ]
    if kind == "frames":
        orders = [np.append(rng.permutation(last := len(clip.frames) - 1), last) for clip in clips]  # the last has no flow
        return [
            replace(clip, **{name: getattr(clip, name)[order] for name in MOTION})
            for clip, order in zip(clips, orders, strict=True)
        ]
    if kind == "pixels":
        return [replace(clip, flow=np.stack([scattered(field, rng) for field in clip.flow])) for clip in clips]
    return clips


def scattered(field: Floats, rng: np.random.Generator) -> Floats:
    """A flow field (H, W, 2) whose vectors are in random places."""
    return rng.permutation(field.reshape(-1, 2)).reshape(field.shape)


def model(arm: str, seed: int, tested: range, work: Path, name: str) -> tuple[Method, Compute]:
    """The pre-trained model of an arm."""
    method, settings, kind = ARMS[arm]
    own = (f"pretrain.updates={UPDATES}", f"pretrain.eval_every={UPDATES}", f"pretrain.save_every={UPDATES // 2}")
    flags = {"device": "cpu", "precision": "fp32", "threads": 1, "seed": seed}
    if not kind:
        run = compose(method, "pretrain", preset="tiny", flags={**flags, "data": "-"}, settings=settings)
        torch.manual_seed(seed)
        return methods.get(method)(run.model, image_size=RECIPE.size, action_dim=None).eval(), PLAIN
    place = f"{name}-own" if kind == "own" else "any"  # other arms do not depend on the tested bodies
    out = work / "runs" / place / arm.replace(", ", "_").replace(" ", "_") / f"{seed}"
    data = {"data": str(videos(kind, tested, work))}
    pretrain(compose(method, "pretrain", preset="tiny", flags={**flags, **data}, settings=(*settings, *own)), out)
    return load_run(out, threads=1)[1:]


def code(found: Method | None, compute: Compute, data: ProbeData) -> Floats:
    """Codes (n, d) of a body's frames; of exact flow on a grid without a model."""

    @torch.no_grad()
    def of(batch: Batch) -> torch.Tensor:
        assert found is not None
        with compute.autocast():
            coded = found.motion_code(batch)
        assert coded is not None
        return coded

    torch.manual_seed(0)  # some codes are sampled
    return data.code(grid_flow if found is None else of)


def decoded(x: Floats, data: Episodes, labels: int) -> float:
    """R2 of actions from a code, fitted on ``labels`` transitions: the first of a fixed random order."""
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(~data.tested))[:labels]
    rows = np.sort(np.concatenate([drawn, np.flatnonzero(data.tested)]))
    actions = data.targets["actions"][rows]
    return ridge_fit(x[rows], actions, Episodes(data.name, data.episode[rows], {}, None, data.tested[rows])).score


def scores(x: Floats, data: Episodes) -> dict[str, Any]:
    assert data.pose is not None
    links = data.targets["links"]
    actions = {str(labels): round(decoded(x, data, labels), 4) for labels in LABELS}
    return {
        "width": x.shape[1],
        "links": round(ridge_fit(x, links, data).score, 4),
        "links_pose": round(mlp_fit(np.concatenate([x, data.pose], 1), links, data).score, 4),
        "actions": actions,
    }


def supervised(data: ProbeData) -> dict[str, Any]:
    """A network that learns the target from two frames."""
    frames = [batch["image"] for batch in data.batches()]  # (B, T, S, S, 3) each
    before = [torch.cat([image[:, :1], image[:, :-1]], 1) for image in frames]
    pairs = torch.cat([torch.stack(both, 2)[:, 4:].flatten(0, 1) for both in zip(before, frames, strict=True)])  # (n, 2, S, S, 3)
    return {"links": round(idm(pairs.numpy(), data.episodes.targets["links"], data.episodes), 4)}


def registered() -> str:
    """The commit that registered the study. Sealed bodies are not looked at before, nor with another script."""
    if "draft" in (HERE / "PREREG.md").read_text().partition("\n")[0].lower():
        raise SystemExit("PREREG.md is a draft; sealed bodies stay sealed")
    files = [str(HERE / name) for name in ("PREREG.md", "tier1.py", "analysis.py")]
    git = ["git", "-C", str(HERE)]
    found = subprocess.run(
        [*git, "log", "-1", "--format=%h", "--", *files], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", *files], capture_output=True, text=True, check=True).stdout
    if changed or not found:
        raise SystemExit("the registration is not committed as it stands; sealed bodies stay sealed:\n" + changed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", choices=SETS)
    parser.add_argument("seed", type=int)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    commit = {"registered": registered()} if args.set == "sealed" else {}
    tested = SETS[args.set]
    rows = HERE / "rows" / f"tier1-{args.set}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {(row["arm"], row["seed"], row["body"]) for row in kept}
    for arm in args.arms or CHOSEN[args.set]:
        if ARMS[arm][0] == "" and args.seed not in (0, 100):  # nothing in it depends on the seed but the network's start
            continue
        todo = [number for number in tested if (arm, args.seed, number) not in done]
        if not todo:
            continue
        began = time.process_time()
        found, compute = model(arm, args.seed, tested, args.work, args.set) if ARMS[arm][0] else (None, PLAIN)
        for number in todo:
            data = ProbeData(recorded(number, args.work, TESTED, 2), LENGTH)
            found_scores = supervised(data) if arm == "idm" else scores(code(found, compute, data), data.episodes)
            row = {
                "arm": arm,
                "seed": args.seed,
                "body": number,
                **found_scores,
                **commit,
                "cpu_seconds": round(time.process_time() - began),
            }
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            began = time.process_time()


if __name__ == "__main__":
    main()
