"""The demo with other settings of fine-tuning, on seeds that the demo's own figures do not use.

    python studies/demo/forms.py 20 letter embed+z0 embed+z0+full      # seed, arms

One seed decides videos, pre-training and fine-tuning; its arms share the videos and the pre-trained weights. Everything that an arm
does not name is that of the demo's form at the time. Rows go to studies/demo/forms.jsonl; arms that are there are not run again. An
arm takes about four minutes on one idle core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from localmotion import demo
from localmotion.envs.bodies import render_videos
from localmotion.evaluation.evaluate import evaluate_run, random_floor
from localmotion.perception.extract import extract_folder
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain

HERE = Path(__file__).parent
FORMER = ("env_steps=20000", "online.batch_size=4", "online.length=32")  # the demo's until `letter+wide+more` replaced it
LETTER = ("embed_input=false", "beta_z_finetune=null")  # Eqs. 3 and 8
RELEASE = ("embed_input=true", "beta_z_finetune=0")  # IPV's release
FULL = ("online.pretrained_lr_factor=1",)
WIDE = (
    "online.batch_size=8",
    "online.length=16",
)  # as many positions in an update as the preset, in half as many steps of the RSSM
HALF_MORE = ("env_steps=30000",)  # with half as many updates more
TWICE = ("env_steps=40000", "train_every=4")  # twice the experience for about as many updates
ARMS: dict[str, tuple[str, ...]] = {
    "letter": LETTER,
    "letter+full": (*LETTER, *FULL),
    "letter+wide+more": (*LETTER, *WIDE, *HALF_MORE),
    "embed": ("embed_input=true", "beta_z_finetune=null"),
    "embed+free1": ("embed_input=true", "beta_z_finetune=null", "free_nats_z=1"),
    "embed+z0": RELEASE,
    "embed+z0+full": (*RELEASE, *FULL),
    "embed+z0+entropy3": (*RELEASE, "entropy=0.003"),
    "embed+z0+entropy10": (*RELEASE, "entropy=0.01"),
    "embed+z0+twice": (*RELEASE, *TWICE),
    "embed+z0+full+twice": (*RELEASE, *FULL, *TWICE),
    "letter+twice": (*LETTER, *TWICE),
    "letter+full+twice": (*LETTER, *FULL, *TWICE),
    "scratch": RELEASE,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("arms", nargs="*", choices=[[], *ARMS])
    parser.add_argument("--work", type=Path, default=Path("runs/demo_forms"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, root = HERE / "forms.jsonl", args.work / f"{args.seed}"
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    videos, store, pre = root / "videos", root / "store", root / "pretrain"
    if not (videos / "COMPLETE").exists():
        render_videos(videos, clips=64, frames=60, size=128, seed=args.seed, bodies=demo.BODIES, exclude=(demo.TASK,))
        (videos / "COMPLETE").write_text("")
    extract_folder(videos, store, demo.RECIPE, workers=1)
    fixed = {"seed": args.seed, "threads": 1}
    pretrain(demo._settings("pretrain", demo.PRETRAIN, data=str(store), **fixed), pre)
    own = {text.partition("=")[0] for text in (*LETTER, *FORMER)}
    shared = (*(text for text in demo.FINETUNE if text.partition("=")[0] not in own), *FORMER)
    for arm in args.arms or ARMS:
        if any((row["seed"], row["arm"]) == (args.seed, arm) for row in known):
            continue
        began, fine = time.process_time(), root / arm
        checkpoint = {} if arm == "scratch" else {"checkpoint": str(pre)}
        stage = "train" if arm == "scratch" else "finetune"
        finetune(demo._settings(stage, (*shared, *ARMS[arm]), env=demo.TASK, **checkpoint, **fixed), fine)
        score, floor = evaluate_run(fine, episodes=10, seed=args.seed + 1, which="best"), random_floor(fine)
        lines = [json.loads(line) for line in (fine / "metrics.jsonl").read_text().splitlines()]
        row = {
            "seed": args.seed,
            "arm": arm,
            "settings": list(ARMS[arm]),
            "evaluations": {
                str(line["env_step"]): round(line["return_mean"], 1)
                for line in lines
                if line["kind"] == "eval" and not line.get("random")
            },
            "best": [round(score["return_mean"], 1), round(score["return_std"], 1)],
            "random": [round(floor["return_mean"], 1), round(floor["return_std"], 1)],
            "cpu_seconds": round(time.process_time() - began),
        }
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
