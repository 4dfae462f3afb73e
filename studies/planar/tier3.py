"""Does behaviour need fewer labelled actions with a code of motion that was learned on other bodies? (tier 3, PREREG-tier3.md)

    python studies/planar/tier3.py dev 100                    # walker run and cheetah run, other episodes; all arms
    python studies/planar/tier3.py tasks 0 drp bc             # cheetah run, hopper stand, walker run; refused before the registration

Codes are those of tier1.py: pre-trained on its 16 bodies and frozen, so no code has seen the task's body. Videos, recorded once: episodes
of 105 frames of the expert of studies/experts with noise 0.4; 200 to learn from, 40 to score. Exact motion goes to the codes that use it.

1. A policy watches the videos, without actions: from the last three pictures it predicts the code of the motion that follows (each number
   of the code with mean 0 and deviation 1, squared error, 1,000 updates on 64 frames, the same frames for all arms of a seed).
2. Ridge regression to the action is fitted on N labelled steps of the same videos, the first N of a random order of the seed: from the
   predicted code ("code"), and from the network's last maps, of which the code is an affine map ("features").

So a code helps if it can be foreseen from pictures and says what to do. `bc` is the same network, trained on the N labelled steps alone;
its figures stand under "features".
With `actions` the code is the action itself, of all frames: what labels for all videos would be worth. `exact flow` is the flow on a
grid of 8 x 8.

A row of rows/ holds an arm, a seed and a task:

    foreseen        R2 of the predicted code on the episodes that are scored
    code policy, features policy
                    number of labels: R2 of the actions, against those of the expert with its noise, on the same episodes
    features returns
                    number of labels: returns of 10 episodes of 500 agent steps, without noise
    expert, random  mean returns of the expert without noise, and of uniform random actions

Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from registration import registered
from shared import CHANGED, add_row, rows_of
from tier1 import ARMS as CODES
from tier1 import LENGTH, RECIPE, model
from torch import Tensor

from localmotion.compute import Compute
from localmotion.envs import make_env
from localmotion.envs import planar_trees as trees
from localmotion.evaluation.probe_data import SKIP
from localmotion.evaluation.probe_fits import LAMBDAS, r_squared
from localmotion.evaluation.probes import grid_flow
from localmotion.methods.base import Batch, Method
from localmotion.models.latent_actions import LatentEncoder
from localmotion.recording.collect import collect
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

HERE = Path(__file__).parent
FILES = (
    "PREREG-tier3.md",
    "tier3.py",
    "tier3_analysis.py",
    "registration.py",
    "shared.py",
    "tier1.py",
    "analysis.py",
    "tier2_analysis.py",
)
"""What the registration binds."""
SETS = {"dev": ("walker_run", "cheetah_run"), "tasks": ("cheetah_run", "hopper_stand", "walker_run")}
SEEDS = {"dev": 10, "tasks": 0}
"""Of the recordings: development does not see the episodes of the study."""
LEARNED, SCORED, STEPS, NOISE = 200, 40, 104, 0.4
LABELS, PLAYED = (50, 200, 1_000, 5_000), (200, 5_000)
STACK, WIDTHS, UPDATES, BATCH, RATE = 3, (8, 16, 32), 1_000, 64, 1e-3
EPISODES, AGENT_STEPS = 10, 500
FOLDS = 5
ARMS = (
    "drp",
    "recompose",
    "recompose, 9 tokens",
    "drp, 16 points",
    "recompose, 16 points",
    "recompose, 9 tokens, 16 points",
    "global flow",
    "ipv",
    "apv",
    "prelar",
    "lapo",
    "laom",
    "scratch",
    "exact flow",
    "actions",
    "bc",
)
CODES.update({arm: ("drp", settings, "train") for arm, settings in CHANGED.items()})
Floats = NDArray[np.float32]
Act = Callable[[Tensor], Floats]


class Videos(NamedTuple):
    """Episodes of a task. Frame t + 1 follows from action t."""

    store: ClipStore
    frames: NDArray[np.uint8]
    """(n, T, S, S, 3)"""
    actions: Floats
    """(n, T - 1, A), in [-1, 1]"""

    def steps(self, begin: int, end: int) -> NDArray[np.int64]:
        """(k, 2) episode and step of all steps of some episodes."""
        return np.stack(np.meshgrid(np.arange(begin, end), np.arange(STEPS), indexing="ij"), -1).reshape(-1, 2)

    def seen(self, steps: NDArray[np.int64]) -> Tensor:
        """What the policy sees before steps (k, 2): (k, 3 * STACK, S, S). Before an episode its first frame stands still."""
        episode, step = steps.T
        return seen(np.stack([self.frames[episode, np.maximum(step - back, 0)] for back in reversed(range(STACK))], 1))


def seen(frames: NDArray[np.uint8]) -> Tensor:
    """Pictures (k, STACK, S, S, 3) as the policy gets them, (k, 3 * STACK, S, S) in [-0.5, 0.5]."""
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).flatten(1, 2) / 255 - 0.5


def recorded(task: str, kind: str, work: Path) -> Videos:
    """The videos of a task, from the store if they were recorded before."""
    out = work / "data" / f"tier3-{kind}-{task}"
    expert = f"expert:{HERE.parent / 'experts' / task}"
    count = LEARNED + SCORED
    collect(
        f"planar:{task}",
        out,
        policy=expert,
        noise=NOISE,
        episodes=count,
        steps=STEPS,
        seed=SEEDS[kind],
        recipe=RECIPE,
        action_repeat=2,
    )
    store = ClipStore(out)
    frames, actions = (np.stack([store.window(key, clip) for clip in range(len(store))]) for key in ("frames", "action"))
    assert frames.shape[:2] == (count, STEPS + 1), frames.shape
    return Videos(store, frames, actions[:, 1:].clip(-1, 1).astype(np.float32))


@torch.no_grad()
def coded(found: Method | None, compute: Compute | None, store: ClipStore) -> Floats:
    """Codes (n, STEPS, d) of the motion of all steps. Windows overlap, so that all but those at a start see `SKIP` frames before."""

    def of(batch: Batch) -> Tensor:
        if found is None or compute is None:
            return grid_flow(batch)
        with compute.autocast():
            code = found.motion_code(batch)
        assert code is not None
        return code

    torch.manual_seed(0)  # some codes are sampled
    sampler, parts = WindowSampler(store, LENGTH, 16, 0, split="all", prefetch=False), []
    for start in range(0, STEPS + 2 - LENGTH, LENGTH - 1 - SKIP):
        skipped, rows = 1 + (SKIP if start else 0), []
        for clips in np.array_split(np.arange(len(store)), len(store) // 16):
            rows.append(of(sampler.windows(clips, np.full(len(clips), start)))[:, skipped:].float().numpy())
        parts.append(np.concatenate(rows))
    codes = np.concatenate(parts, 1)
    assert codes.shape[:2] == (len(store), STEPS), codes.shape
    return codes


def learned(videos: Videos, target: Floats, steps: NDArray[np.int64], updates: int, seed: int) -> LatentEncoder:
    """A policy that predicts ``target`` (n, STEPS, d) from what it sees before ``steps``."""
    torch.manual_seed(seed)
    net = LatentEncoder(3 * STACK, WIDTHS, RECIPE.size, target.shape[2])
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    rng = np.random.default_rng(seed)
    for _ in range(updates):
        chosen = steps[rng.integers(len(steps), size=BATCH)]
        loss = (net(videos.seen(chosen)) - torch.from_numpy(target[chosen[:, 0], chosen[:, 1]])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def predicted(of: Callable[[Tensor], Any], videos: Videos, steps: NDArray[np.int64]) -> Floats:
    """What ``of`` gives for steps (k, 2): (k, d)."""
    return np.concatenate([np.asarray(of(videos.seen(part))) for part in np.array_split(steps, len(steps) // 500 + 1)])


def labelled(videos: Videos, labels: int, seed: int) -> NDArray[np.int64]:
    """(labels, 2) the steps whose actions are known: the first of a random order, the same for all arms of a seed."""
    steps = videos.steps(0, LEARNED)
    return steps[np.random.default_rng(seed).permutation(len(steps))[:labels]]


def regression(x: Floats, y: Floats, episode: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Ridge regression from (n, d) to (n, k): weights (d, k) and bias (k,). Five folds of whole episodes choose the penalty."""
    mean, spread = x.mean(0), x.std(0)
    scale = np.where(spread > 1e-6, spread, 1.0)
    z, fold = ((x - mean) / scale).astype(np.float64), np.unique(episode, return_inverse=True)[1] % FOLDS
    errors = np.zeros(len(LAMBDAS))
    for held in range(FOLDS):
        test = fold == held
        fits = ridges(z[~test], y[~test])
        errors += [float(((z[test] @ weights + bias - y[test]) ** 2).sum()) for weights, bias in fits]
    weights, bias = ridges(z, y)[int(errors.argmin())]
    weights = weights / scale[:, None]
    return weights.astype(np.float32), (bias - mean @ weights).astype(np.float32)


def ridges(z: NDArray[np.float64], y: Floats) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Weights (d, k) and bias (k,) for each penalty of `LAMBDAS`."""
    centre, mean = z.mean(0), y.mean(0).astype(np.float64)
    values, vectors = np.linalg.eigh((z - centre).T @ (z - centre))
    moment = vectors.T @ ((z - centre).T @ (y - mean))  # (d, k)
    found = [vectors @ (moment / (np.maximum(values, 0) + penalty * len(z))[:, None]) for penalty in LAMBDAS]
    return [(weights, mean - centre @ weights) for weights in found]


@torch.no_grad()
def played(task: str, act: Act, seed: int) -> list[float]:
    """Returns of `EPISODES` episodes; ``act`` gives actions (k, A) for what the policy sees (k, 3 * STACK, S, S)."""
    envs: list[Any] = [make_env(f"planar:{task}", size=RECIPE.size, action_repeat=2, observed="pixels") for _ in range(EPISODES)]
    first = np.stack([env.reset(seed=1_000 + seed * EPISODES + number)[0]["image"] for number, env in enumerate(envs)])
    frames, returns = np.repeat(first[:, None], STACK, 1), np.zeros(EPISODES)
    for _ in range(AGENT_STEPS):
        moved = [env.step(action) for env, action in zip(envs, act(seen(frames)).clip(-1, 1), strict=True)]
        returns += [float(reward) for _, reward, *_ in moved]
        frames = np.concatenate([frames[:, 1:], np.stack([obs["image"] for obs, *_ in moved])[:, None]], 1)
    return [round(value, 2) for value in returns.tolist()]


def standard(code: Floats) -> Floats:
    """Each number with mean 0 and deviation 1 over the videos to learn from."""
    mean, spread = code[:LEARNED].mean((0, 1)), code[:LEARNED].std((0, 1))
    scaled: Floats = ((code - mean) / np.where(spread > 1e-6, spread, 1.0)).astype(np.float32)
    return scaled


def target(arm: str, seed: int, videos: Videos, work: Path) -> Floats:
    """(n, STEPS, d) what the policy of an arm foresees."""
    if arm == "actions":
        return standard(videos.actions)
    found, compute = model(arm, seed, trees.DEV, work, "dev") if CODES[arm][0] else (None, None)
    return standard(coded(found, compute, videos.store))


def row_of(arm: str, seed: int, task: str, videos: Videos, work: Path) -> dict[str, Any]:
    """The figures of an arm."""
    known, scored = labelled(videos, LABELS[-1], seed), videos.steps(LEARNED, LEARNED + SCORED)
    right, true = (videos.actions[steps[:, 0], steps[:, 1]] for steps in (known, scored))
    row: dict[str, Any] = {"foreseen": None}

    def measure(part: str, labels: int, act: Act, answer: Floats) -> None:
        row.setdefault(f"{part} policy", {})[str(labels)] = round(r_squared(answer.clip(-1, 1), true), 4)
        if labels in PLAYED and part == "features":
            row.setdefault("features returns", {})[str(labels)] = played(task, act, seed)

    if arm == "bc":
        for labels in LABELS:
            cloned = learned(videos, videos.actions, known[:labels], UPDATES, seed)
            measure("features", labels, lambda stack, net=cloned: net(stack).numpy(), predicted(cloned, videos, scored))
    else:
        code = target(arm, seed, videos, work)
        net = learned(videos, code, videos.steps(0, LEARNED), UPDATES, seed)

        def both(stack: Tensor) -> Floats:
            """(k, F + d) the network's last maps, and the predicted code."""
            beside: Floats = torch.cat(net.both(stack), 1).numpy()
            return beside

        x, x_scored = (predicted(both, videos, steps) for steps in (known, scored))
        parts = {"features": slice(0, net.features), "code": slice(net.features, None)}
        row["foreseen"] = round(r_squared(x_scored[:, parts["code"]], code[scored[:, 0], scored[:, 1]]), 4)
        for labels in LABELS:
            for part, columns in parts.items():
                weights, bias = regression(x[:labels, columns], right[:labels], known[:labels, 0])

                def act(stack: Tensor, weights: Floats = weights, bias: Floats = bias, columns: slice = columns) -> Floats:
                    return both(stack)[:, columns] @ weights + bias

                measure(part, labels, act, x_scored[:, columns] @ weights + bias)
    expert = json.loads((HERE.parent / "experts" / task / "expert.json").read_text())
    rng = np.random.default_rng(seed)
    random = played(task, lambda stack: rng.uniform(-1, 1, (len(stack), videos.actions.shape[2])).astype(np.float32), seed)
    return row | {"expert": round(expert["return_mean"], 1), "random": round(float(np.mean(random)), 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", choices=SETS)
    parser.add_argument("seed", type=int)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--tasks", nargs="*", help="some tasks of the set")
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_intermixed_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    commit = {"registered": registered(FILES)} if args.set == "tasks" else {}
    rows = f"tier3-{args.set}"
    done = {(row["arm"], row["seed"], row["task"]) for row in rows_of(rows)}
    for task in args.tasks or SETS[args.set]:
        for arm in args.arms or ARMS:
            if (arm, args.seed, task) in done:
                continue
            began = time.process_time()
            row = {"arm": arm, "seed": args.seed, "task": task, **commit}
            row |= row_of(arm, args.seed, task, recorded(task, args.set, args.work), args.work)
            row["cpu_seconds"] = round(time.process_time() - began)
            add_row(rows, row)


if __name__ == "__main__":
    main()
