"""Does a world model learn faster from a fixed data set after pre-training on videos of other bodies? (PREREG-tier2.md)

    python studies/planar/tier2.py dev 100                    # development bodies, and two tasks with other episodes; all arms
    python studies/planar/tier2.py tasks 0 drp scratch        # walker run, cheetah run, hopper stand; all arms without names

Pre-training is that of tier1.py, on its 16 bodies. The positive control is pre-trained on as many videos of the task's own body. Data
of a task, recorded once: episodes of 48 agent steps, 105 to learn from (5,000 transitions), 40 to fit probes and 40 to score. An action
is a mix of the expert's and a smooth random one, with a share that is drawn for each episode; without an expert it is random. The world
model alone learns, in batches of 16 x 16, the same ones for all arms of a seed. Arms of DRP begin with the same weights where their
shapes agree; what pre-training knows is loaded over them. Measuring leaves random numbers and running statistics as they were.

A row of rows/ holds an arm, a seed and a task, and figures after 0, 50, 100, 200 and 300 updates. They are R2 of ridge regression, fitted
on the probes' episodes and scored on the last 40, except the loss:

    pose            from the posterior state to places, cosines and sines of the links, positions 6 to 15 of windows of 16
    reward          from the same states to the reward
    ahead, far      pose from states of the prior with the real actions, 1 to 5 and 6 to 10 steps after position 5; fitted on such states
    image           loss of pictures

Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from registration import registered
from tier1 import ARMS as PRETRAINED
from tier1 import RECIPE, TRAINED, UPDATES, videos
from torch import Tensor

from localmotion import methods
from localmotion.acting.expert import load_expert
from localmotion.acting.observer import Observer
from localmotion.compute import Compute
from localmotion.envs import make_env
from localmotion.envs import planar_trees as trees
from localmotion.envs.bodies import smooth_actions
from localmotion.evaluation.probe_data import Episodes
from localmotion.evaluation.probe_fits import ridge_fit
from localmotion.models.rssm import RSSMState
from localmotion.recording.collect import collect
from localmotion.runs.settings import compose
from localmotion.training.pretrain import pretrain
from localmotion.training.rehearsal import Rehearsal
from localmotion.training.transfer import load_pretrained
from localmotion.training.update import Updater

HERE = Path(__file__).parent
FILES = ("PREREG-tier2.md", "tier2.py", "tier2_analysis.py", "registration.py", "tier1.py")
"""What the registration binds."""
SETS = {
    "dev": ["walker_run", "cheetah_run", *(f"tree-{number:04d}_run" for number in trees.DEV)],
    "tasks": ["walker_run", "cheetah_run", "hopper_stand"],
}
OTHER_EPISODES = {"dev": 10_000, "tasks": 0}
"""Added to the seeds of episodes: development does not see the episodes of the study."""
STEPS, LEARNED, PROBED, SCORED = 48, 105, 40, 40
CONTEXT, LENGTH, BATCH = 6, 16, 16
STARTS = (0, 11, 22, 33)
"""Of the windows that are measured, in every episode: they cover it."""
POINTS = (0, 50, 100, 200, 300)
ARMS: dict[str, tuple[str, str]] = {
    "scratch": ("drp", ""),
    "drp": ("drp", "train"),
    "drp, own": ("drp", "own"),
    "drp, image": ("drp", "image"),
    "drp, rehearsal": ("drp", "train"),
    "recompose": ("recompose", "train"),
    "recompose, scratch": ("recompose", ""),
    "9 tokens": ("recompose, 9 tokens", "train"),
    "9 tokens, scratch": ("recompose, 9 tokens", ""),
    "global flow": ("global flow", "train"),
    "global flow, scratch": ("global flow", ""),
    "ipv": ("ipv", "train"),
    "apv": ("apv", "train"),
    "prelar": ("prelar", "train"),
}
"""Arm of tier1.py, and what is loaded: nothing, all that pre-training on its bodies or on the task's own one knows, or its image model."""
DEVELOPMENT = ("drp, rehearsal",)
"""Arms that the tasks do not get unless they are asked for."""
REHEARSES = ("drp, rehearsal",)
"""Arms whose updates also have the losses of pre-training, on a batch of its videos."""
SAME = ("beta_z_finetune=0",)
"""For IPV and APV, too: DRP's value here was chosen on walker and cheetah (docs/decisions/0015), and it is that of both releases."""
Arrays = dict[str, NDArray[Any]]
Batch = dict[str, Tensor]


class Data(NamedTuple):
    """Episodes (n, T, ...) by key: those to learn from, to fit probes, and to score. ``actions``: numbers of an action."""

    arrays: Arrays
    actions: int
    digest: str

    def windows(self, places: list[tuple[int, int]]) -> Batch:
        """A batch as the replay gives it: what led to the first frame is unknown."""
        batch = {
            key: torch.from_numpy(np.stack([value[n, s : s + LENGTH] for n, s in places])) for key, value in self.arrays.items()
        }
        batch |= {key: batch[key].float() for key in ("reward", "action", "flow")}
        batch["is_first"] = torch.zeros(batch["reward"].shape, dtype=torch.bool)
        batch["is_first"][:, 0] = True
        for key in ("action", "visible", "flow"):
            batch[key][:, 0] = 0
        return batch


def pose(env: Any) -> NDArray[np.float32]:
    """Places in the stored picture, cosines and sines of the agent's links, (4 L,)."""
    x, y, angle = env.link_places(RECIPE.size).T
    return np.concatenate([x, y, np.cos(angle), np.sin(angle)]).astype(np.float32)


def recorded(task: str, kind: str, work: Path) -> Data:
    """The data of a task, from a file if they were recorded before."""
    count = LEARNED + PROBED + SCORED
    file = work / "data" / f"tier2-{kind}-{task}-{count}x{STEPS}.npz"
    env: Any = make_env(f"planar:{task}", size=RECIPE.size, percept_size=RECIPE.percept_size, action_repeat=2, observed="both")
    observer = Observer(env, RECIPE)
    if not file.exists():
        found: dict[str, list[NDArray[Any]]] = {}
        folder = HERE.parent / "experts" / task
        size = len(observer.reset(0)["vector"])
        expert = load_expert(folder, f"planar:{task}", size, observer.action_dim) if folder.exists() else None
        for number in range(OTHER_EPISODES[kind], OTHER_EPISODES[kind] + count):
            rng = np.random.default_rng(number)
            moves, share, rows = smooth_actions(rng, STEPS, observer.action_dim), rng.uniform(), [observer.reset(number)]
            places = [pose(env)]
            for move in moves:
                if expert is not None:
                    move = (1 - share) * expert.act(rows[-1]["vector"][None])[0] + share * move
                rows.append(observer.step(np.clip(move, -1, 1).astype(np.float32))[0])
                places.append(pose(env))
            for key in rows[0]:
                found.setdefault(key, []).append(np.stack([np.asarray(row[key]) for row in rows]))
            found.setdefault("pose", []).append(np.stack(places))
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.stem}-{os.getpid()}.npz")
        np.savez_compressed(partial, **{key: np.stack(values) for key, values in found.items()})
        partial.replace(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    with np.load(file, allow_pickle=False) as kept:
        return Data({key: kept[key] for key in kept}, observer.action_dim, digest)


def own_videos(task: str, work: Path) -> Path:
    """Videos of the task's own body: as many, as long, and under the same policy as those of the other bodies."""
    out, count = work / "data" / f"own-{task}", TRAINED * len(trees.TRAIN)
    collect(f"planar:{task}", out, episodes=count, steps=66, seed=1, recipe=RECIPE, action_repeat=2)
    return out


def pretrained(name: str, source: str, task: str, seed: int, work: Path) -> str:
    """The pre-training run of an arm."""
    method, settings, _ = PRETRAINED[name]
    own = (f"pretrain.updates={UPDATES}", f"pretrain.eval_every={UPDATES}", f"pretrain.save_every={UPDATES // 2}")
    place = f"own-{task}" if source == "own" else "any"
    clips = own_videos(task, work) if source == "own" else videos("train", trees.DEV, work)
    flags = {"device": "cpu", "precision": "fp32", "threads": 1, "seed": seed, "data": str(clips)}
    out = work / "runs" / place / name.replace(", ", "_").replace(" ", "_") / f"{seed}"  # as tier1.py names them
    pretrain(compose(method, "pretrain", preset="tiny", flags=flags, settings=(*settings, *own)), out)
    return str(out)


def begun(arm: str, seed: int, task: str, data: Data, work: Path) -> tuple[Any, Updater, Rehearsal | None]:
    """The method of an arm with its weights, its world model's updater, and the videos that are rehearsed."""
    name, source = ARMS[arm]
    method, settings, _ = PRETRAINED[name]
    flags: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1, "seed": seed}
    if source:
        flags |= {"checkpoint": pretrained(name, source, task, seed, work), "load": "image" if source == "image" else ""}
    settings = (*settings, *(SAME if method in ("ipv", "apv") else ()))
    if arm in REHEARSES:
        settings = (*settings, f"rehearsal.data={videos('train', trees.DEV, work)}")
    run = compose(method, "finetune" if source else "train", preset="tiny", env=f"planar:{task}", flags=flags, settings=settings)

    def built(settings: Any) -> Any:
        torch.manual_seed(seed)
        return methods.get(method)(settings.model, image_size=RECIPE.size, action_dim=data.actions)

    model = built(run)
    if method == "drp":
        plain = built(compose("drp", "train", preset="tiny", env=f"planar:{task}", flags={"seed": seed})).state_dict()
        own = model.state_dict()
        same = {key: value for key, value in plain.items() if key in own and own[key].shape == value.shape}
        model.load_state_dict({**own, **same})
    if source:
        load_pretrained(model, run)
    torch.manual_seed(seed)
    updater = Updater(model, run, Compute(torch.device("cpu"), False, 1, ""), pretrained=bool(source))
    updater.passes = updater.passes[:1]  # a fixed data set needs no actor
    return model, updater, Rehearsal(run) if arm in REHEARSES else None


def dynamics_of(model: Any) -> Any:
    """What the method's actor imagines with."""
    if hasattr(model, "mapping"):
        from localmotion.models.learned_actions import MappedDynamics

        return MappedDynamics(model.latent, model.mapping)
    return model.dynamics


@torch.no_grad()
def figures(model: Any, probe: Batch, test: Batch) -> dict[str, float]:
    """The figures of a row at one point."""
    kept = {key: value.clone() for key, value in model.state_dict().items()}  # the bonus follows what it sees
    model.eval()
    dynamics, seen, ahead, image = dynamics_of(model), [], [], 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in (probe, test):
            losses, _, state = model.world_model_losses(batch)
            image = float(losses["image"])
            state = RSSMState(*(x.unflatten(0, batch["reward"].shape) for x in state))
            seen.append(dynamics.feat(state)[:, CONTEXT:])
            now, steps = RSSMState(*(x[:, CONTEXT - 1] for x in state)), []
            for t in range(CONTEXT, LENGTH):
                now = dynamics.img_step(now, batch["action"][:, t])
                steps.append(dynamics.feat(now))
            ahead.append(torch.stack(steps, 1))
    model.load_state_dict(kept)
    model.train()

    def fitted(feats: list[Tensor], key: str, span: slice) -> float:
        x = torch.cat(feats)[:, span].float()  # (windows, steps, F)
        windows, steps, _ = x.shape
        y = torch.cat([batch[key] for batch in (probe, test)])[:, CONTEXT:][:, span].reshape(windows * steps, -1).numpy()
        episode = np.repeat(np.arange(windows) // len(STARTS), steps)  # a fold holds whole episodes
        data = Episodes("", episode, {}, None, episode >= PROBED)
        return round(ridge_fit(x.flatten(0, 1).numpy(), y[:, y.std(0) > 1e-6], data).score, 4)

    whole, half = slice(None), (LENGTH - CONTEXT) // 2
    return {
        "pose": fitted(seen, "pose", whole),
        "reward": fitted(seen, "reward", whole),
        "ahead": fitted(ahead, "pose", slice(0, half)),
        "far": fitted(ahead, "pose", slice(half, None)),
        "image": round(image, 4),
    }


def curve(model: Any, updater: Updater, rehearsal: Rehearsal | None, data: Data, seed: int) -> dict[str, dict[str, float]]:
    """Figures by updates."""
    probe, test = (
        data.windows([(n, s) for n in chosen for s in STARTS])
        for chosen in (range(LEARNED, LEARNED + PROBED), range(LEARNED + PROBED, LEARNED + PROBED + SCORED))
    )
    rng, found = np.random.default_rng(seed), {}
    for last, now in zip((0, *POINTS), POINTS, strict=False):
        for _ in range(now - last):
            places = [(int(rng.integers(LEARNED)), int(rng.integers(STEPS + 2 - LENGTH))) for _ in range(BATCH)]
            updater.learn(data.windows(places) | (rehearsal.batch(updater.update) if rehearsal else {}))
        found[str(now)] = figures(model, probe, test)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("set", choices=SETS)
    parser.add_argument("seed", type=int)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--tasks", nargs="*", help="some tasks of the set")
    parser.add_argument("--work", type=Path, default=Path("runs/planar"))
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    commit = {"registered": registered(FILES)} if args.set == "tasks" else {}
    rows = HERE / "rows" / f"tier2-{args.set}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {(row["arm"], row["seed"], row["task"]) for row in kept}
    for task in args.tasks or SETS[args.set]:
        for arm in args.arms or (arm for arm in ARMS if args.set == "dev" or arm not in DEVELOPMENT):
            if (arm, args.seed, task) in done:
                continue
            began, data = time.process_time(), recorded(task, args.set, args.work)
            model, updater, rehearsal = begun(arm, args.seed, task, data, args.work)
            row = {"arm": arm, "seed": args.seed, "task": task, "data": data.digest, **commit}
            row |= {"curve": curve(model, updater, rehearsal, data, args.seed), "cpu_seconds": round(time.process_time() - began)}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
