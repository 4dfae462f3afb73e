"""What the codes of DisWM, IPV and DRP know of colours and of the pose, and whether single numbers of DisWM's code stand for them.

    python studies/diswm/disentanglement.py OUT                    # videos and runs go to OUT, rows to disentanglement.jsonl
    python studies/diswm/disentanglement.py OUT --seeds 1 2
    python studies/diswm/disentanglement.py --table                # the table of README.md

Every step is skipped where its result exists. 32 episodes of 100 agent steps of a smooth random policy are for pre-training and for fitting
the probes, 16 episodes of another seed for their scores. 500 updates of `tiny`, 2 to 4 minutes a run on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from localmotion.evaluation.heldout import traversal
from localmotion.evaluation.probe_data import ProbeData
from localmotion.evaluation.probes import probe
from localmotion.methods.base import images
from localmotion.methods.diswm import DisWM
from localmotion.report.strips import traversal as picture
from localmotion.runs.load import load_run

TASKS = ("reacher_easy", "cheetah_run")
MODELS: dict[str, list[str]] = {
    "diswm": ["--method", "diswm"],
    "ipv": ["--method", "ipv"],
    "diswm_beta0": ["--method", "diswm", "--beta_code", "0"],
    "diswm_beta1": ["--method", "diswm", "--beta_code", "1"],
    "drp": ["--method", "drp"],
}
NAMES = {
    "picture, 8x8 grid": "picture, 8x8 grid",
    "diswm": "DisWM, beta 0.015",
    "diswm_beta0": "DisWM, beta 0",
    "diswm_beta1": "DisWM, beta 1",
    "diswm, untrained": "DisWM, untrained",
    "ipv": "IPV",
    "drp": "DRP",
}
UPDATES, LENGTH = 500, 25
ACTIVE = 0.01
"""A number of the code is active if the variance of its mean over frames is above this (Burda et al. 2016, arXiv 1509.00519)."""
ROWS = Path(__file__).with_suffix(".jsonl")
SCORES = ("ridge colours", "ridge pose", "ridge velocities", "mig colours", "mig pose", "by colour")
NAMED = 0.1
"""Nats: a number of the code with a larger KL is counted."""


def run(*words: object) -> None:
    """Run a localmotion command."""
    subprocess.run([sys.executable, "-m", "localmotion", *map(str, words)], check=True)


def collected(out: Path, task: str) -> tuple[Path, Path]:
    """Collections for learning and for scores."""
    places = []
    for seed, episodes in ((0, 32), (1, 16)):
        places.append(out / f"{task}_{seed}")
        run(
            *("collect", f"diswm:{task}", "--out", places[-1], "--store", "--size", 32, "--percept-size", 64),
            *("--policy", "smooth", "--episodes", episodes, "--steps", 100, "--seed", seed),
        )
    return places[0], places[1]


def pretrained(out: Path, task: str, model: str, seed: int) -> Path:
    """A run that has ended."""
    path = out / f"{task}_{model}_{seed}"
    if not (path / ".ok").exists():
        every = [f"--pretrain.{name}={UPDATES}" for name in ("updates", "eval_every", "save_every")]
        run(
            *("pretrain", "--data", out / f"{task}_0", "--run", path, "--preset", "tiny", "--threads", 1, "--seed", seed),
            *every,
            *MODELS[model],
        )
        (path / ".ok").touch()
    return path


@torch.no_grad()
def numbers(path: Path, test: Path) -> dict[str, Any]:
    """Of DisWM's code on the frames for scores: active numbers, and the KL of each number from N(0, 1) in nats, largest first."""
    _, method, _ = load_run(path, device="cpu", threads=1)
    if not isinstance(method, DisWM):
        return {}
    means, kls = [], []
    for batch in ProbeData(test, LENGTH).batches():
        frames = images(batch)
        code = method.encoder(frames)
        means.append(code.mean)
        kls.append(0.5 * (code.mean**2 + code.std**2 - 1) - code.std.log())
    kl = torch.cat(kls).mean(0).sort(descending=True).values
    return {"active": int((torch.cat(means).var(0) > ACTIVE).sum()), "kl": [round(x, 2) for x in kl.tolist()]}


def drawn(path: Path, test: Path, file: Path) -> None:
    """Traversal of a frame's code."""
    _, method, _ = load_run(path, device="cpu", threads=1)
    found = traversal(method, next(iter(ProbeData(test, LENGTH).batches())))
    assert found is not None
    file.write_bytes(picture(found["frame"], found["pictures"], found["values"]))


def measured(out: Path, task: str, model: str, seed: int) -> list[dict[str, Any]]:
    """Rows of a run; of the first run of DisWM also of fresh weights and of the picture."""
    data, test = out / f"{task}_0", out / f"{task}_1"
    path, floors = pretrained(out, task, model, seed), model == "diswm" and not seed
    rows = []
    for row in probe([path], [data], tests=[test], length=LENGTH, untrained=floors, networks=False):
        own = row["code"].endswith(path.name)
        if not own and not (floors and row["code"] == "picture, 8x8 grid") and not row["code"].endswith("untrained"):
            continue
        name = model if own else "diswm, untrained" if row["code"].endswith("untrained") else row["code"]
        scores = {key: row[key] for key in SCORES}
        extra = numbers(path, test) if own else {}
        rows.append({"task": task, "code": name, "seed": seed, "updates": UPDATES, "width": row["width"], **scores, **extra})
    return rows


def kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def shown(row: dict[str, Any]) -> dict[str, float]:
    """Columns of the table."""

    def of(kind: str, material: str) -> float:
        return fmean(value for name, value in row["by colour"][kind].items() if name.startswith(f"{material} "))

    found = {"R² ground": of("ridge", "grid"), "R² body": of("ridge", "self"), "R² colours": row["ridge colours"]}
    found |= {"R² pose": row["ridge pose"], "MIG ground": of("mig", "grid"), "MIG body": of("mig", "self")}
    found |= {"MIG colours": row["mig colours"], "MIG pose": row["mig pose"]}
    if "kl" in row:
        found |= {"active": row["active"], f"KL > {NAMED}": sum(x > NAMED for x in row["kl"])}
    return found


def table() -> None:
    """Means over seeds, with the least and the largest value where they differ in the second digit."""
    columns: list[str] = []
    for task in TASKS:
        for code, name in NAMES.items():
            rows = [shown(row) for row in kept() if (row["task"], row["code"]) == (task, code)]
            if not rows:
                continue
            if not columns:
                columns = [*rows[0], "active", f"KL > {NAMED}"]
                print(f"| task | code | seeds | {' | '.join(columns)} |")
                print("|---" * (3 + len(columns)) + "|")
            cells = [_cell([row[key] for row in rows if key in row], key) for key in columns]
            print(f"| {task} | {name} | {len(rows)} | {' | '.join(cells)} |")


def _cell(values: list[float], key: str) -> str:
    if not values:
        return ""
    digits = 2 if key.startswith(("R²", "MIG")) else 0
    mean, least, most = (f"{x:.{digits}f}" for x in (fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return table()
    for seed in args.seeds:
        for task in args.tasks:
            collected(args.out, task)
            for model in args.models:
                if any((row["task"], row["code"], row["seed"]) == (task, model, seed) for row in kept()):
                    continue
                rows = measured(args.out, task, model, seed)
                with ROWS.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                if model.startswith("diswm") and not seed:
                    drawn(args.out / f"{task}_{model}_0", args.out / f"{task}_1", args.out / f"traversal_{task}_{model}.png")
    return None


if __name__ == "__main__":
    main()
