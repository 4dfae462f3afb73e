"""How strongly do the policies of planar.py act where an episode begins?

    python studies/latent_actions/starts.py --work runs/latent_actions
    python studies/latent_actions/starts.py --work runs/latent_actions --times 1.5 2 3

Reads the agents that planar.py left in its folder and plays them on the 40 held-out episodes: they see the recorded frames, and their
actions are compared with the expert's, which have its noise. It writes rows/starts.jsonl, one line a task, seed, arm and number of labels.
Agents that are there are not read again.

    first, later    gain over the first 5 steps, and over steps 20 to 40: sum of policy * expert / sum of expert^2, over all joints. 1: as
                    strong as the expert, and in its direction; 0: no action, or one that has nothing to do with the expert's

With `--times` it plays MaskLAM's agents of 5,000 labels on cheetah run with their actions multiplied, five episodes each, and writes
rows/times.jsonl: is it the size of the actions that the returns lack?
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from planar import ARMS, BACKGROUND, HERE, LABELS

from localmotion.evaluation.evaluate import evaluate_run
from localmotion.methods.masklam import MaskLAM
from localmotion.runs.load import load_run
from localmotion.video.store import ClipStore

STEPS = 40
SPANS = {"first": slice(0, 5), "later": slice(20, STEPS)}
Actions = NDArray[np.float32]


def played(agent: Path, frames: NDArray[np.uint8]) -> Actions:
    """The agent's actions (n, STEPS, A) on episodes of recorded frames (n, T, S, S, 3)."""
    _, method, _ = load_run(agent, device="cpu", threads=1, plays=False)
    carry, found = method.initial_carry(len(frames)), []
    with torch.no_grad():
        for t in range(STEPS):
            seen = {"image": torch.from_numpy(frames[:, t : t + 1]), "is_first": torch.full((len(frames), 1), t == 0)}
            action, carry = method.act(seen, carry, explore=False, window=0)[:2]
            found.append(action.float().numpy())
    return np.stack(found, 1)


def gain(policy: Actions, expert: Actions) -> float:
    return round(float((policy * expert).sum() / np.square(expert).sum()), 3)


def multiplied(folder: Path, seed: int, factor: float) -> dict[str, float]:
    """Return of MaskLAM's agent with its actions multiplied."""
    plain = MaskLAM.act

    def act(self: MaskLAM, *args: Any, **flags: Any) -> Any:
        action, *rest = plain(self, *args, **flags)
        return (action * factor).clamp(-1, 1), *rest

    MaskLAM.act = act  # type: ignore[method-assign]
    try:
        env, agent = f"planar:{folder.name.rsplit('-', 1)[0]}", folder / "masklam" / f"decode-{LABELS[-1]}"
        score = evaluate_run(agent, episodes=5, seed=seed + 1000, env=env, env_options={**BACKGROUND, "split": "train"})
    finally:
        MaskLAM.act = plain  # type: ignore[method-assign]
    return {"return": round(score["return_mean"], 1), "deviation": round(score["return_std"], 1)}


def kept(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/latent_actions"))
    parser.add_argument("--times", type=float, nargs="*", default=())
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = HERE / "rows" / ("times.jsonl" if args.times else "starts.jsonl")
    if args.times:
        done = {(row["seed"], row["times"]) for row in kept(rows)}
        for folder in sorted(args.work.glob("cheetah_run-[0-4]")):
            seed = int(folder.name[-1])
            for factor in args.times:
                if (seed, factor) not in done:
                    row = {"task": "cheetah_run", "seed": seed, "times": factor, **multiplied(folder, seed, factor)}
                    with rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
        return
    known = {(row["task"], row["seed"], row["arm"], row["labels"]) for row in kept(rows)}
    for folder in sorted(args.work.glob("*_*-[0-4]")):
        task, seed = folder.name.rsplit("-", 1)
        made = {json.loads(line)["arm"] for line in (HERE / "rows" / f"{folder.name}.jsonl").read_text().splitlines()}
        store = ClipStore(args.work / "data" / f"{task}-val")
        frames, action = (np.stack([store.window(name, clip) for clip in range(len(store))]) for name in ("frames", "action"))
        expert = np.clip(action[:, 1 : STEPS + 1].astype(np.float32), -1, 1)
        for arm in ARMS:
            for labels in LABELS:
                if arm not in made or (task, int(seed), arm, labels) in known:
                    continue
                policy = played(folder / arm.replace(", ", "_") / f"decode-{labels}", frames)
                row = {"task": task, "seed": int(seed), "arm": arm, "labels": labels}
                row |= {name: gain(policy[:, span], expert[:, span]) for name, span in SPANS.items()}
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
