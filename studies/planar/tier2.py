"""Does a world model learn faster from a fixed data set after pre-training on other bodies? (tier 2; not registered yet)

    python studies/planar/tier2.py dev 100                    # development bodies, seed; all arms
    python studies/planar/tier2.py tasks 0 drp scratch        # walker run, cheetah run, hopper stand

Pre-training is that of tier1.py. Data of a task: episodes of 48 agent steps, recorded once, of which 1,000 or 5,000 transitions are
learned from and 40 episodes are held out. The policy is smooth and random; where studies/experts has an expert, every second episode is
the expert's with noise 0.4. The world model alone learns, in batches of 16 x 16, the same ones for all arms of a seed. What is not
loaded begins with the same weights in all arms of a method.

A row of rows/ holds an arm, a seed, a task and a number of transitions, and figures after 0, 25, 50, 100, 200 and 300 updates:

    reward    R2 of the reward over 15 steps of the prior with the real actions, from the posterior after 6 frames
    pose      R2 of ridge regression from the imagined states of these steps to the pose; fitted on posterior states of the data

Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tier1 import ARMS as PRETRAINED
from tier1 import RECIPE, UPDATES, registered, videos
from torch import Tensor

from localmotion import methods
from localmotion.acting.expert import load_expert
from localmotion.acting.observer import Observer
from localmotion.compute import Compute
from localmotion.envs import make_env
from localmotion.envs import planar_trees as trees
from localmotion.envs.bodies import smooth_actions
from localmotion.evaluation.probe_data import Episodes
from localmotion.evaluation.probe_fits import r_squared, ridge_fit
from localmotion.models.rssm import RSSMState
from localmotion.runs.settings import compose
from localmotion.training.pretrain import pretrain
from localmotion.training.transfer import load_pretrained
from localmotion.training.update import Updater

HERE = Path(__file__).parent
SETS = {
    "dev": [f"tree-{number:04d}_run" for number in trees.DEV],
    "tasks": ["walker_run", "cheetah_run", "hopper_stand"],
}
STEPS, HELD_OUT = 48, 40
SIZES = (1_000, 5_000)
CONTEXT, AHEAD, BATCH, LENGTH = 6, 15, 16, 16
POINTS = (0, 25, 50, 100, 200, 300)
ARMS = (
    "drp",
    "recompose",
    "global flow",
    "ipv",
    "apv",
    "prelar",
    "scratch",
    "ipv, scratch",
    "dreamer_v2",
    "drp, own bodies",
    "drp, shuffled",
)
"""Names of tier1.py, and methods without pre-training."""
Arrays = dict[str, NDArray[Any]]
Batch = dict[str, Tensor]


class Data(NamedTuple):
    """Episodes (n, T, ...) by key, those to learn from first; ``actions`` numbers of an action."""

    arrays: Arrays
    actions: int

    def windows(self, places: list[tuple[int, int]], length: int) -> Batch:
        """A batch as the replay gives it: what led to the first frame is unknown."""
        batch = {
            key: torch.from_numpy(np.stack([value[n, s : s + length] for n, s in places])) for key, value in self.arrays.items()
        }
        batch |= {key: batch[key].float() for key in ("reward", "action", "flow")}
        batch["is_first"] = torch.zeros(batch["reward"].shape, dtype=torch.bool)
        batch["is_first"][:, 0] = True
        for key in ("action", "visible", "flow"):
            batch[key][:, 0] = 0
        return batch


def recorded(task: str, work: Path) -> Data:
    """The data of a task, from a file if they were recorded before."""
    file, count = work / "data" / f"tier2-{task}.npz", -(-SIZES[-1] // STEPS) + HELD_OUT
    env: Any = make_env(f"planar:{task}", size=RECIPE.size, percept_size=RECIPE.percept_size, action_repeat=2, observed="both")
    observer = Observer(env, RECIPE)
    if not file.exists():
        found: dict[str, list[NDArray[Any]]] = {}
        folder = HERE.parent / "experts" / task
        expert = (
            load_expert(folder, f"planar:{task}", len(observer.reset(0)["vector"]), observer.action_dim)
            if folder.exists()
            else None
        )
        for number in range(count):
            rng = np.random.default_rng(number)
            moves, rows = smooth_actions(rng, STEPS, observer.action_dim), [observer.reset(number)]
            for move in moves:
                if expert is not None and number % 2:
                    move = np.clip(expert.act(rows[-1]["vector"][None])[0] + rng.normal(0, 0.4, len(move)), -1, 1)
                rows.append(observer.step(move.astype(np.float32))[0])
            for key in rows[0]:
                found.setdefault(key, []).append(np.stack([np.asarray(row[key]) for row in rows]))
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **{key: np.stack(values) for key, values in found.items()})
    with np.load(file, allow_pickle=False) as kept:
        return Data({key: kept[key] for key in kept}, observer.action_dim)


def begun(arm: str, seed: int, task: str, data: Data, kind: str, work: Path) -> tuple[Any, Updater]:
    """The method of an arm with its weights, and its world model's updater."""
    name = {"scratch": "drp", "ipv, scratch": "ipv"}.get(arm, arm)
    method, settings, source = PRETRAINED.get(name, (name, (), ""))
    flags: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1, "seed": seed}
    if arm in PRETRAINED and arm != "scratch":
        place = f"{kind}-own" if source == "own" else "any"
        out = work / "runs" / place / arm.replace(", ", "_").replace(" ", "_") / f"{seed}"
        own = (f"pretrain.updates={UPDATES}", f"pretrain.eval_every={UPDATES}", f"pretrain.save_every={UPDATES // 2}")
        clips = {"data": str(videos(source, trees.DEV, work))}
        pretrain(compose(method, "pretrain", preset="tiny", flags={**flags, **clips}, settings=(*settings, *own)), out)
        flags["checkpoint"] = str(out)
    stage = "finetune" if "checkpoint" in flags else "train"
    run = compose(method, stage, preset="tiny", env=f"planar:{task}", flags=flags, settings=settings)
    torch.manual_seed(seed)
    model = methods.get(method)(run.model, image_size=RECIPE.size, action_dim=data.actions)
    if "checkpoint" in flags:
        load_pretrained(model, run)
    torch.manual_seed(seed)
    updater = Updater(model, run, Compute(torch.device("cpu"), False, 1, ""), pretrained="checkpoint" in flags)
    updater.passes = updater.passes[:1]  # a fixed data set needs no actor
    return model, updater


def dynamics_of(model: Any) -> Any:
    """What the method's actor imagines with."""
    if hasattr(model, "mapping"):
        from localmotion.models.learned_actions import MappedDynamics

        return MappedDynamics(model.latent, model.mapping)
    return model.dynamics


def pose(batch: Batch) -> NDArray[np.float32]:
    """Positions among the numbers of the state vector: its first half, and the trunk's."""
    vector = batch["vector"].float().numpy()
    return vector[..., : 15 if vector.shape[-1] == 24 else vector.shape[-1] // 2 + vector.shape[-1] % 2]


@torch.no_grad()
def figures(model: Any, train: Batch, test: Batch) -> dict[str, float]:
    """R2 of the reward and of the pose over `AHEAD` steps of the prior."""
    model.eval()
    torch.manual_seed(0)
    dynamics, found = dynamics_of(model), []
    head = getattr(model, "reward_representative", model.reward)
    for batch in (train, test):
        state = model.world_model_losses(batch)[2]
        found.append(RSSMState(*(x.unflatten(0, batch["reward"].shape) for x in state)))
    now = RSSMState(*(x[:, CONTEXT - 1] for x in found[1]))
    feats, rewards = [], []
    for t in range(CONTEXT, CONTEXT + AHEAD):
        now = dynamics.img_step(now, test["action"][:, t])
        feats.append(dynamics.feat(now))
        rewards.append(head(feats[-1]).squeeze(-1))
    ahead = slice(CONTEXT, CONTEXT + AHEAD)
    reward = r_squared(torch.stack(rewards, 1).reshape(-1, 1).numpy(), test["reward"][:, ahead].reshape(-1, 1).numpy())
    known, wanted = (pose(batch)[:, ahead] for batch in (train, test))
    seen = dynamics.feat(found[0])[:, ahead].float().numpy()
    x = np.concatenate([seen, torch.stack(feats, 1).float().numpy()]).reshape(-1, seen.shape[-1])
    y = np.concatenate([known, wanted]).reshape(-1, known.shape[-1])
    rows = np.repeat(np.arange(len(train["reward"]) + len(test["reward"])), AHEAD)
    tested = rows >= len(train["reward"])
    imagined = ridge_fit(x, y, Episodes("", rows, {}, None, tested)).score
    model.train()
    return {"reward": round(reward, 4), "pose": round(imagined, 4)}


def curve(model: Any, updater: Updater, data: Data, size: int, seed: int) -> dict[str, dict[str, float]]:
    """Figures by updates."""
    learned, held = -(-size // STEPS), len(data.arrays["reward"])
    whole = CONTEXT + AHEAD
    train = data.windows([(n, s) for n in range(learned) for s in (0, STEPS + 1 - whole)], whole)
    test = data.windows([(n, s) for n in range(held - HELD_OUT, held) for s in (0, STEPS + 1 - whole)], whole)
    train = {key: value[:80] for key, value in train.items()}
    rng, found = np.random.default_rng(seed), {}
    for last, now in zip((0, *POINTS), POINTS, strict=False):
        for _ in range(now - last):
            places = [(int(rng.integers(learned)), int(rng.integers(STEPS + 2 - LENGTH))) for _ in range(BATCH)]
            updater.learn(data.windows(places, LENGTH))
        found[str(now)] = figures(model, train, test)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", choices=SETS)
    parser.add_argument("seed", type=int)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    commit = {"registered": registered()} if args.set == "tasks" else {}
    rows = HERE / "rows" / f"tier2-{args.set}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {(row["arm"], row["seed"], row["task"], row["transitions"]) for row in kept}
    for arm in args.arms or ARMS:
        for task in SETS[args.set]:
            for size in args.sizes:
                if (arm, args.seed, task, size) in done:
                    continue
                began, data = time.process_time(), recorded(task, args.work)
                model, updater = begun(arm, args.seed, task, data, args.set, args.work)
                row = {"arm": arm, "seed": args.seed, "task": task, "transitions": size, **commit}
                row |= {"curve": curve(model, updater, data, size, args.seed), "cpu_seconds": round(time.process_time() - began)}
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
