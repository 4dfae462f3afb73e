"""Latent actions before moving backgrounds: what they know of actions, and what few labels are worth with them.

    python studies/latent_actions/planar.py walker_run 0                         # task, seed; all arms
    python studies/latent_actions/planar.py walker_run 0 lapo masklam bc         # some
    python studies/latent_actions/planar.py walker_run 0 --probes                # the first stage alone and its probes

Data, recorded once a task: 400 episodes of 100 agent steps of the expert of studies/experts with noise 0.4, before a background that moves
independently of it, at 32 pixels, and 40 more before textures that training does not show (`split: val`). For `masklam, motion` the same
episodes with masks perceived by `extract --mask motion` instead of the simulator's. Seed 100 is for development: the data and the
budgets were chosen on it.

An arm learns in the stages of docs/latent_actions.md, preset `tiny` with 500 updates of `pretrain` and 1,500 of `clone`, each on 8 clips,
and 200 of `decode` for each number of labelled transitions. MaskLAM's inverse model sees the next frame, as LAPO's does (`offset=1`), so
that the two differ in the mask alone and get as many windows from a clip. `bc` learns from the labelled transitions alone for 1,000
updates; `idm` also trains an inverse model on them that labels all video. Both take 16 pieces of 8 frames an update, as `decode` does.
Products are in bf16 where that is faster. Rows go to studies/latent_actions/rows/, one JSON line an arm; arms that are there are not run
again.

    nmse            error of ridge regression from the latent action to the action / variance of actions; held-out backgrounds
    actions, links, background
                    R2 of ridge regression to actions, velocities of links in the picture, and the background's motion; held-out backgrounds
    policy          number of labels: R2 of the policy's actions, against those of the expert with its noise, on the held-out episodes
    returns, held-out
                    number of labels: mean and deviation over 5 episodes, before the textures of training and before held-out ones
    expert, random  mean return of the expert without noise, and of uniform random actions
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmotion import methods
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.evaluation.probes import probe
from localmotion.methods.base import Source
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs.load import load_run
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain
from localmotion.video.store import ClipStore

HERE = Path(__file__).parent
LABELS = (50, 500, 5000)
BACKGROUND = {"background": "independent"}
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lapo": ("lapo", ("form=continuous",)),
    "masklam": ("masklam", ("offset=1",)),
    "masklam, motion": ("masklam", ("offset=1",)),
    "masklam, eroded": ("masklam", ("offset=1", "mask_grow=-1")),
    "laom": ("laom", ()),
    "bc": ("bc", ("policy=impala",)),
    "idm": ("bc", ("policy=impala", "relabel=true")),
}


def data(task: str, work: Path, kind: str) -> Path:
    """The clip store of a kind: "exact", "motion" (perceived masks) or "val" (held-out backgrounds)."""
    out = work / "data" / f"{task}-{kind}"
    recipe = Recipe(size=32, percept_size=32, tracks=4, mask="motion" if kind == "motion" else "").with_motion("exact")
    held_out = kind == "val"
    options: dict[str, Any] = {**BACKGROUND, **({"split": "val"} if held_out else {})}
    collect(
        f"planar:{task}",
        out,
        policy=f"expert:{HERE.parent / 'experts' / task}",
        noise=0.4,
        episodes=40 if held_out else 400,
        steps=100,
        seed=int(held_out),
        recipe=recipe,
        **options,
    )
    return out


def learn(method: str, stage: str, out: Path, updates: int, settings: tuple[str, ...], **flags: Any) -> Path:
    clips = methods.get(method).stages[stage] is Source.CLIPS
    part, batch = ("pretrain", 8) if clips else ("online", 16)
    own = (f"{part}.updates={updates}", f"{part}.batch_size={batch}")
    common = {"device": "cpu", "precision": "auto", "threads": 1}
    run = compose(method, stage, preset="tiny", flags={**common, **flags}, settings=(*settings, *own))
    return pretrain(run, out) if clips else finetune(run, out)


def explained(agent: Path, store: ClipStore) -> tuple[float, str]:
    """R2 of an agent's actions on the episodes of a store that it has not seen, and the precision that it learned with."""
    _, method, compute = load_run(agent, device="cpu", threads=1, plays=False)
    frames, action = (np.stack([store.window(name, clip) for clip in range(len(store))]) for name in ("frames", "action"))
    copies = [np.repeat(array[:, :1], 2, 1) for array in (frames, action)]  # as the agent sees an episode's first frame
    image, action = (torch.from_numpy(np.concatenate(pair, 1)) for pair in zip(copies, (frames, action), strict=True))
    batch = {"image": image, "action": action, "is_first": torch.zeros(image.shape[:2], dtype=torch.bool)}
    losses = method.clone_losses if method.name == "bc" else method.decode_losses
    with torch.no_grad():
        return round(float(losses(batch)[1]["action/r2"]), 4), "bf16" if compute.bf16 else "fp32"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("seed", type=int)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--probes", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/latent_actions"))
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    rows = HERE / "rows" / f"{'probes-' if args.probes else ''}{args.task}-{args.seed}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    known = {json.loads(line)["arm"] for line in rows.read_text().splitlines()} if rows.exists() else set()
    stores = {kind: data(args.task, args.work, kind) for kind in ("exact", "val")}
    for arm in args.arms or ARMS:
        if arm in known or (args.probes and ARMS[arm][0] == "bc"):
            continue
        if arm == "masklam, motion":
            stores["motion"] = data(args.task, args.work, "motion")
        began, (method, settings) = time.process_time(), ARMS[arm]
        root = args.work / f"{args.task}-{args.seed}" / arm.replace(", ", "_")
        shutil.rmtree(root, ignore_errors=True)
        row: dict[str, Any] = {"task": args.task, "seed": args.seed, "arm": arm, "settings": list(settings)}
        clips = str(stores["motion" if arm == "masklam, motion" else "exact"])
        logs = {"data": str(stores["exact"]), "seed": args.seed}
        start: dict[str, Any] = {}
        if method != "bc":
            first = learn(method, "pretrain", root / "pretrain", 500, settings, data=clips, seed=args.seed)
            scores = probe([first], [stores["exact"]], tests=[stores["val"]], networks=False, untrained=False, ceilings=False)
            found = next(score for score in scores if score["code"].startswith(method))
            names = {
                "nmse": "ridge actions nmse",
                "actions": "ridge actions",
                "links": "ridge links",
                "background": "ridge background",
            }
            row |= {name: round(float(found[key]), 4) for name, key in names.items()}
            exact = next(score for score in scores if score["code"].startswith("exact flow"))
            row["exact flow"] = {name: round(float(exact[key]), 4) for name, key in names.items()}
            if not args.probes:
                policy = learn(
                    method, "clone", root / "clone", 1_500, settings, data=clips, seed=args.seed, checkpoint=str(first)
                )
                start = {"checkpoint": str(policy)}
        env = f"planar:{args.task}"
        if not args.probes:
            row |= {"policy": {}, "returns": {}, "held-out": {}}
        for labels in () if args.probes else LABELS:
            updates = 200 if start else 1_000
            agent = learn(method, "decode", root / f"decode-{labels}", updates, settings, labels=labels, **logs, **start)
            row["policy"][str(labels)], row["precision"] = explained(agent, ClipStore(stores["val"]))
            for key, split in (("returns", "train"), ("held-out", "val")):
                options = {**BACKGROUND, "split": split}
                score = evaluate_run(agent, episodes=5, seed=args.seed + 1000, env=env, env_options=options)
                row[key][str(labels)] = [round(score["return_mean"], 1), round(score["return_std"], 1)]
        if not args.probes:
            expert = json.loads((HERE.parent / "experts" / args.task / "expert.json").read_text())
            floor = evaluate_run(agent, policy="random", episodes=10, seed=args.seed + 1000, env=env, env_options=BACKGROUND)
            row |= {"expert": round(expert["return_mean"], 1), "random": round(floor["return_mean"], 1)}
        row["cpu_seconds"] = round(time.process_time() - began)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
