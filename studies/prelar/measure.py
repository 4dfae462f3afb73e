"""What the forms of PreLAR's consistency loss do to the latent action: its motion, and what it is worth to open-loop prediction.

    localmotion collect planar:walker_run --out STORE --store --policy smooth --episodes 40 --steps 50 --motion exact --size 32 \
        --percept-size 64
    python studies/prelar/measure.py STORE 0 none tanh logistic pearson     # seed, arms: FORM, FORM:WEIGHT, FORM:WEIGHT:BETA_ACTION

Preset `tiny` with sequences of 16 frames, 300 updates of pre-training; beta_action is 0.1 unless the arm says otherwise. Rows go to
studies/prelar/rows.jsonl, one line for each arm and seed; those that are already there are not run again. The arm
`untrained` makes no step.

    links, actions      R2 of ridge regression from the latent action's mean to the velocities of links in the picture and to the true
                        actions, on held-out episodes (`localmotion probe --ridge-only`); links_pose: with the pose as further input;
                        grid: links from the clips' own (exact) flow on an 8 x 8 grid
    true, zero, shuffled
                        error of 20 predicted frames after 5 observed ones (mean squared, of values in [-0.5, 0.5]), held-out clips, with
                        the latent actions of the true frames, zeros, and those of another clip
    worse               share by which shuffled latent actions make that error larger
    action_kl, image    of held-out clips, in the units of the losses
    agreement           of the orders of D^s and D^a on held-out clips, -1 to 1 (models/consistency.py)
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from localmotion.evaluation.probes import probe
from localmotion.models.consistency import consistency_loss, distances
from localmotion.runs.load import load_run
from localmotion.runs.settings import compose
from localmotion.training.pretrain import pretrain
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

ROWS = Path(__file__).parent / "rows.jsonl"
UPDATES, LENGTH, CONTEXT, BATCHES = 300, 25, 5, 4


@torch.no_grad()
def figures(model: Any, store: Path) -> dict[str, float]:
    """Held-out figures of a pre-trained model."""
    sampler = WindowSampler(ClipStore(store), LENGTH, 16, 0, split="heldout", heldout_fraction=0.2, prefetch=False, motion=False)
    found: dict[str, float] = {}
    torch.manual_seed(0)
    for number in range(BATCHES):
        batch = sampler.batch(number)
        truth = model.image.pixels(batch["image"])
        embed, _ = model.image.encode(truth, batch["image"])
        code = model._code(batch, truth)
        action = model.motion_code(batch)
        post, prior = model.latent.observe(embed, action, batch["is_first"])
        pixels = model.image.picture(truth).unflatten(0, embed.shape[:2])[:, CONTEXT:]
        seen = type(post)(*(part[:, :CONTEXT] for part in post))
        ahead = {"true": action, "zero": torch.zeros_like(action), "shuffled": action.roll(1, 0)}
        values = {}
        for name, actions in ahead.items():
            drawn = model.image.pictures(model.latent.open_loop(seen, actions[:, CONTEXT:]), None)[:, CONTEXT:]
            values[name] = (drawn - pixels).square().mean()
        losses, _ = model.pretrain_losses(batch)
        values |= {"image": losses["image"], "action_kl": code.from_prior(1.0).mean()}
        values["agreement"] = consistency_loss("sign", *distances(model.latent, post, prior, code, action))[1]
        for key, value in values.items():
            found[key] = found.get(key, 0.0) + float(value) / BATCHES
    return {**found, "worse": found["shuffled"] / found["true"] - 1}


def measure(store: Path, seed: int, arm: str) -> dict[str, Any]:
    """One row: pre-train with a form of the loss and a seed, then look."""
    form, weight, beta = [*arm.split(":"), *("1", "0.1")[arm.count(":") :]][:3]
    flags = {"data": str(store), "device": "cpu", "threads": 1, "precision": "fp32", "seed": seed}
    settings = [
        f"consistency={form if form != 'untrained' else 'none'}",
        f"consistency_weight={weight}",
        f"beta_action={beta}",
        f"pretrain.updates={UPDATES}",
    ]
    settings += ["heldout_fraction=0.2", "pretrain.length=16", "pretrain.eval_every=100000", "pretrain.save_every=100000"]
    if form == "untrained":
        settings += ["pretrain.updates=1", "pretrain.lr=1e-9"]
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = pretrain(compose("prelar", "pretrain", preset="tiny", flags=flags, settings=settings), Path(folder) / "run")
        seconds = time.process_time() - begin
        model = load_run(path, device="cpu", threads=1)[1]
        rows = probe([path], [store], untrained=False, networks=False, device="cpu")
    scores = rows[-1]
    row = {"links": scores["ridge links"], "links_pose": scores["ridge links + pose"], "actions": scores["ridge actions"]}
    row["grid"] = next(other["ridge links"] for other in rows if other["code"].startswith("flow"))
    row |= figures(model.eval(), store)
    return {"arm": arm, "seed": seed, **{key: round(value, 5) for key, value in row.items()}, "cpu_s": round(seconds, 1)}


def main() -> None:
    store, seed, arms = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    known = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for arm in arms:
        if any(row["arm"] == arm and row["seed"] == seed for row in known):
            continue
        row = measure(store, seed, arm)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
