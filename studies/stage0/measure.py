"""What DRP's world model learns from one fixed replay, by settings: does z open, what does s know, and can it be predicted?

    python studies/stage0/measure.py planar:walker_run exact 0 published embed embed+z0        # task, motion, seed, arms
    python studies/stage0/measure.py planar:walker_run exact 0 published no_context --pretrain # the same of pre-training
    python studies/stage0/measure.py planar:walker_run exact 0 scratch slow full all_slow --transfer

Data: 280 episodes of 48 agent steps under smooth random actions (action repeat 2; 32-pixel pictures, motion at 64), 240 to learn from and
40 held out. One seed decides initial weights and batches, the same for all arms. Only the world model learns; 500 updates of 16 x 16.
Rows go to studies/stage0/rows/, one JSON line an arm; arms that are already there are not run again.

Held-out figures of a fine-tuned world model (windows of 16, positions 6 to 15):

    z_kl, s_kl      nats, posterior against prior
    image           loss of pictures from s (mean squared error times pixels over 2, as trained)
    reward_r2       of the reward head at the posterior of s
    pose_r2         ridge regression from the posterior of s to the pose, fitted on the training episodes
    open_reward_r2, open_pose_r2, open_db
                    the same heads and the picture over 10 steps of the prior of s with the real actions, from position 6
    agg_links_r2    ridge regression from a^agg to the velocities of links in the picture; grid_links_r2: from the flow on an 8 x 8 grid
    z_real_db, z_shuffled_db, z_zero_db
                    pictures of z's prior, 10 steps, with the real a^agg, that of another sequence, and zero
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from localmotion import methods
from localmotion.acting.observer import Observer
from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.envs import make_env
from localmotion.envs.bodies import smooth_actions
from localmotion.recipe import Motion, Recipe
from localmotion.runs.settings import compose
from localmotion.training.update import Updater

HERE = Path(__file__).parent
TRAINED, EPISODES, STEPS = 240, 280, 48
LENGTH, CONTEXT, AHEAD = 16, 6, 10
UPDATES, BATCH = 500, 16
RECIPE = Recipe(size=32, percept_size=64, redraw_rounds=0)
OTHER = {"planar:walker_run": "planar:cheetah_run", "planar:cheetah_run": "planar:walker_run"}
Arrays = dict[str, NDArray[Any]]
Batch = dict[str, Tensor]

EMBED, Z0, Z_FREE = "embed_input=true", "beta_z_finetune=0", "free_nats_z=1"
BASE = {
    "pretrain": (),
    "finetune": ("embed_input=false", "beta_z_finetune=null"),  # Eqs. 3 and 8
    "transfer": (EMBED, Z0),
}
"""Settings of all arms of a kind, before their own."""
ARMS: dict[str, tuple[str, ...]] = {
    "published": (),
    "z_free": (Z_FREE,),
    "z0": (Z0,),
    "embed": (EMBED,),
    "embed+z_free": (EMBED, Z_FREE),
    "embed+z0": (EMBED, Z0),
    "no_context": ("model.world.context=false", "context_copy=false"),
    "no_copy": ("context_copy=false",),
    "embed+z0+no_context": (EMBED, Z0, "model.world.context=false", "context_copy=false"),
    "flow_norm": ("model.dae.flow_norm=true",),
    "recompose": ("recompose_weight=1",),
    "code4": ("model.dae.agg_dim=4",),
    "embed+z0+flow_norm": (EMBED, Z0, "model.dae.flow_norm=true"),
}
PRETRAIN_ARMS: dict[str, tuple[str, ...]] = {
    "published": (),
    "z_free": (Z_FREE,),
    "z0.1": ("beta_z=0.1",),
    "no_context": ("model.world.context=false", "context_copy=false"),
    "no_copy": ("context_copy=false",),
    "flow_norm": ("model.dae.flow_norm=true",),
    "recompose": ("recompose_weight=1",),
    "code4": ("model.dae.agg_dim=4",),
    "motion_only": ("joint_gradient=false",),
}
TRANSFER_ARMS: dict[str, tuple[str, ...]] = {
    "scratch": (),
    "slow": ("online.pretrained_lr_factor=0.1",),
    "full": ("online.pretrained_lr_factor=1",),
    "all_slow": ("online.pretrained_lr_factor=0.1", "slow_image=true"),
}
PENALTIES = tuple(10.0**k for k in range(-4, 4))
POINTS = (0, 50, 100, 200, 300)
"""Updates after which a transferred model is measured."""
MADE: dict[str, Any] = {}
"""Pre-trained models of this process, by source: the arms of one seed share them."""


def record(task: str, motion: Motion) -> list[Arrays]:
    """The episodes, from a file if they were recorded before."""
    file = HERE / "data" / f"{task.replace(':', '_')}-{motion}.npz"
    if not file.exists():
        recipe = RECIPE.with_motion(motion)
        env: Any = make_env(task, size=recipe.size, percept_size=recipe.percept_size, action_repeat=2, observed="both")
        observer, arrays = Observer(env, recipe), {}
        for number in range(EPISODES):
            rng = np.random.default_rng(number)
            moves = smooth_actions(rng, STEPS, observer.action_dim).astype(np.float32)
            rows = [observer.reset(number)]
            places = [_links(env)]
            for move in moves:
                rows.append(observer.step(move)[0])
                places.append(_links(env))
            arrays |= {f"{number}/{key}": np.stack([np.asarray(row[key]) for row in rows]) for key in rows[0]}
            arrays[f"{number}/links"] = np.diff(np.stack(places), axis=0, prepend=places[0][None]).astype(np.float32)
        file.parent.mkdir(exist_ok=True)
        np.savez_compressed(file, **arrays)
    with np.load(file, allow_pickle=False) as found:
        return [{key.partition("/")[2]: found[key] for key in found if key.startswith(f"{n}/")} for n in range(EPISODES)]


def _links(env: Any) -> NDArray[np.float64]:
    """Places of the agent's parts in the stored picture, (2 L,), pixels."""
    painter = env.painter
    return np.asarray(painter.in_pixels(env.pose(), RECIPE.size)[painter.agent].view(np.float64))


def windows(episodes: list[Arrays], starts: list[tuple[int, int]]) -> Batch:
    """A batch as the replay gives it: what led to the first frame is unknown."""
    batch = {key: torch.from_numpy(np.stack([episodes[n][key][s : s + LENGTH] for n, s in starts])) for key in episodes[0]}
    batch |= {key: batch[key].float() for key in ("reward", "action", "flow")}
    batch["is_first"] = torch.zeros(batch["reward"].shape, dtype=torch.bool)
    batch["is_first"][:, 0] = True
    for key in ("action", "visible", "flow"):
        batch[key][:, 0] = 0
    return batch


def drawn(episodes: list[Arrays], rng: np.random.Generator, size: int) -> Batch:
    return windows(episodes, [(int(rng.integers(TRAINED)), int(rng.integers(STEPS + 2 - LENGTH))) for _ in range(size)])


def covering(chosen: range, step: int) -> list[tuple[int, int]]:
    return [(n, s) for n in chosen for s in range(0, STEPS + 2 - LENGTH, step)]


def settings(stage: str, task: str, given: tuple[str, ...]) -> RunConfig:
    flags = {"precision": "fp32", "device": "cpu", "data": "store" if stage == "pretrain" else ""}
    env = "" if stage == "pretrain" else task
    return compose("drp", stage, preset="tiny", env=env, flags=flags, settings=given)


def world_model_alone(updater: Updater) -> None:
    """Only the first pass: without an actor and a critic, which a fixed replay does not need."""
    updater.passes = updater.passes[:1]


def learn(updater: Updater, episodes: list[Arrays], rng: np.random.Generator, updates: int, size: int) -> None:
    updater.method.train()
    for _ in range(updates):
        updater.learn(drawn(episodes, rng, size))
    updater.method.eval()


def ridge(x: NDArray[Any], y: NDArray[Any], x_test: NDArray[Any], y_test: NDArray[Any]) -> float:
    """R2 of ridge regression, mean over the outputs that vary. The last sixth of the training rows chooses the penalty."""

    def answer(fit: slice, asked: NDArray[Any], penalty: float) -> NDArray[Any]:
        known, middle = x[fit].astype(np.float64), y[fit].mean(0)
        mean, deviation = known.mean(0), known.std(0) + 1e-6
        a, b = (known - mean) / deviation, (asked - mean) / deviation
        weights = np.linalg.solve(a.T @ a + penalty * len(a) * np.eye(a.shape[1]), a.T @ (y[fit] - middle))
        return np.asarray(b @ weights + middle)

    most = len(x) * 5 // 6
    best = max(PENALTIES, key=lambda penalty: r2(answer(slice(most), x[most:], penalty), y[most:]))
    return r2(answer(slice(None), x_test, best), y_test)


def r2(predicted: NDArray[Any], true: NDArray[Any]) -> float:
    varies = true.var(0) > 1e-9
    error = ((predicted - true) ** 2).mean(0)[varies]
    return float(np.mean(1 - error / true.var(0)[varies]))


def flat(x: Tensor) -> NDArray[Any]:
    return np.asarray(x.float().flatten(0, 1).numpy())


def decibels(predicted: Tensor, truth: Tensor) -> float:
    return float(-10 * torch.log10(((predicted.float() - truth) ** 2).mean()))


def shuffled(batch: Batch) -> Batch:
    """The batch with the motion of its next sequence."""
    return {**batch, **{key: batch[key].roll(1, 0) for key in ("flow", "tracks", "visible", "track_id")}}


def pose_of(batch: Batch) -> NDArray[Any]:
    """Positions of the state: without velocities, which are the second half of walker's and cheetah's vectors."""
    vector = flat(batch["vector"][:, CONTEXT:]).astype(np.float64)
    return vector[:, : vector.shape[1] // 2 + (1 if vector.shape[1] == 24 else 0)] if vector.shape[1] != 24 else vector[:, :15]


@torch.no_grad()
def motion_figures(model: Any, train: Batch, test: Batch) -> dict[str, float]:
    """What a^agg tells of the links, and what it is worth to z's prior."""
    torch.manual_seed(0)
    links = [flat(b["links"][:, CONTEXT:]).astype(np.float64) for b in (train, test)]
    codes = [flat(model.motion_code(b)[:, CONTEXT:]) for b in (train, test)]
    grids = [
        flat(
            F.adaptive_avg_pool2d(b["flow"].permute(0, 1, 4, 2, 3).flatten(0, 1), 8)
            .flatten(1)
            .unflatten(0, b["flow"].shape[:2])[:, CONTEXT:]
        )
        for b in (train, test)
    ]
    # Pictures of z's prior.
    truth = (test["image"].float() / 255 - 0.5).permute(0, 1, 4, 2, 3)[:, CONTEXT : CONTEXT + AHEAD]
    embed, maps = model.image.encode(model.image.pixels(test["image"]), test["image"], frame=CONTEXT - 1)
    found = {}
    real = model.motion_code(test)
    codes_of = {"real": real, "shuffled": model.motion_code(shuffled(test)), "zero": torch.zeros_like(real)}
    for name, agg in codes_of.items():
        post, _ = model.latent.observe(embed[:, :CONTEXT], real[:, :CONTEXT], test["is_first"][:, :CONTEXT])
        feat = model.latent.open_loop(post, agg[:, CONTEXT : CONTEXT + AHEAD])
        found[f"z_{name}_db"] = decibels(model.image.pictures(feat, maps)[:, CONTEXT:], truth)
    return {
        "agg_links_r2": ridge(codes[0], links[0], codes[1], links[1]),
        "grid_links_r2": ridge(grids[0], links[0], grids[1], links[1]),
        **found,
    }


@torch.no_grad()
def figures(model: Any, train: Batch, test: Batch) -> dict[str, float]:
    """Held-out figures of a fine-tuned world model."""
    torch.manual_seed(0)
    feats, found = [], {}
    for batch in (train, test):
        losses, metrics, state = model.world_model_losses(batch)
        feats.append(model.dynamics.feat(state).unflatten(0, batch["reward"].shape))
        found = {"z_kl": float(losses["latent_kl"]), "s_kl": float(metrics["dynamics/kl"]), "image": float(losses["image"])}
    heads = [flat(feat[:, CONTEXT:]) for feat in feats]
    poses = [pose_of(b) for b in (train, test)]
    rewards = flat(test["reward"][:, CONTEXT:, None])
    found |= {
        "reward_r2": r2(flat(model.reward_representative(feats[1])[:, CONTEXT:]), rewards),
        "reward_ridge_r2": ridge(heads[0], flat(train["reward"][:, CONTEXT:, None]), heads[1], rewards),
        "pose_r2": ridge(heads[0], poses[0], heads[1], poses[1]),
    }
    # The prior of s with the real actions.
    stop = CONTEXT + AHEAD
    embed, maps = model.image.encode(model.image.pixels(test["image"]), test["image"], frame=CONTEXT - 1)
    agg = model.motion_code(test)
    latent, _ = model.latent.observe(embed[:, :CONTEXT], agg[:, :CONTEXT], test["is_first"][:, :CONTEXT])
    observed = model.adapter(model.latent.feat(latent))
    if model.config.embed_input:
        observed = torch.cat([embed[:, :CONTEXT], observed], -1)
    post, _ = model.dynamics.observe(observed, test["action"][:, :CONTEXT], test["is_first"][:, :CONTEXT])
    ahead = model.dynamics.open_loop(post, test["action"][:, CONTEXT:stop])
    truth = (test["image"].float() / 255 - 0.5).permute(0, 1, 4, 2, 3)[:, CONTEXT:stop]
    imagined = ahead[:, CONTEXT:]
    short = {**test, "vector": test["vector"][:, :stop]}
    return found | {
        "open_reward_r2": r2(flat(model.reward_representative(imagined)), flat(test["reward"][:, CONTEXT:stop, None])),
        "open_pose_r2": ridge(heads[0], poses[0], flat(imagined), pose_of(short)),
        "open_db": decibels(model.image.pictures(ahead, maps)[:, CONTEXT:], truth),
    }


def built(run: RunConfig, seed: int, actions: int | None) -> Any:
    torch.manual_seed(seed)
    return methods.get("drp")(run.model, image_size=RECIPE.size, action_dim=actions)


def on_cpu(model: Any, run: RunConfig, *, pretrained: bool = False) -> Updater:
    updater = Updater(model, run, Compute(torch.device("cpu"), False, 1, ""), pretrained=pretrained)
    if run.stage != "pretrain":
        world_model_alone(updater)
    return updater


class Table:
    """Rows of one kind, task, motion and seed."""

    def __init__(self, kind: str, task: str, motion: str, seed: int) -> None:
        self.head = {"kind": kind, "task": task, "motion": motion, "seed": seed}
        self.file = HERE / "rows" / f"{kind}-{task.replace(':', '_')}-{motion}-{seed}.jsonl"
        self.file.parent.mkdir(exist_ok=True)
        rows = self.file.read_text().splitlines() if self.file.exists() else []
        self.known = {json.loads(row)["arm"] for row in rows}

    def add(self, arm: str, given: tuple[str, ...], values: dict[str, Any]) -> None:
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        row = {**self.head, "arm": arm, "settings": list(given), **rounded}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("motion", choices=("exact", "perceived"))
    parser.add_argument("seed", type=int)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--pretrain", action="store_true")
    parser.add_argument("--transfer", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    episodes = record(args.task, args.motion)
    train = windows(episodes, covering(range(TRAINED), 16))
    test = windows(episodes, covering(range(TRAINED, EPISODES), 16))
    actions = episodes[0]["action"].shape[-1]
    kind = "pretrain" if args.pretrain else "transfer" if args.transfer else "finetune"
    table = Table(kind, args.task, args.motion, args.seed)
    known = {"pretrain": PRETRAIN_ARMS, "transfer": TRANSFER_ARMS, "finetune": ARMS}[kind]
    for arm in args.arms or known:
        sources = ("own", "other") if kind == "transfer" and arm != "scratch" else ("",)
        for source in sources:
            name = f"{arm}, {source}" if source else arm
            if name in table.known:
                continue
            began, given = time.process_time(), (*BASE[kind], *known[arm])
            rng = np.random.default_rng(args.seed)
            if kind == "pretrain":
                run = settings("pretrain", args.task, (*given, f"pretrain.updates={UPDATES}"))
                model = built(run, args.seed, None)
                learn(on_cpu(model, run), episodes, rng, UPDATES, BATCH)
                values: dict[str, Any] = motion_figures(model, train, test)
                with torch.no_grad():
                    torch.manual_seed(0)
                    losses, metrics = model.pretrain_losses(test)
                values |= {
                    "z_kl": float(metrics["latent/kl"]),
                    "image": float(losses["image"]),
                    "masked": float(losses["masked"]),
                }
            elif kind == "finetune":
                run = settings("train", args.task, given)
                model = built(run, args.seed, actions)
                learn(on_cpu(model, run), episodes, rng, UPDATES, BATCH)
                values = {**figures(model, train, test), **motion_figures(model, train, test)}
            else:
                values = transfer(args, given, source, episodes, train, test, actions)
            table.add(name, known[arm], {**values, "cpu_seconds": round(time.process_time() - began, 1)})


def transfer(
    args: Any, given: tuple[str, ...], source: str, episodes: list[Arrays], train: Batch, test: Batch, actions: int
) -> dict[str, Any]:
    """Pre-trained on videos of the task's own body (a positive control) or of the other one, then fine-tuned on the fixed replay."""
    run = settings("train", args.task, given)
    if source and source not in MADE:
        before = settings("pretrain", args.task, (f"pretrain.updates={UPDATES}",))
        videos = episodes if source == "own" else record(OTHER[args.task], args.motion)
        MADE[source] = built(before, args.seed, None)
        learn(on_cpu(MADE[source], before), videos, np.random.default_rng(args.seed + 100), UPDATES, BATCH)
    model = built(run, args.seed, actions)  # after pre-training, so the noise of fine-tuning is the same in all arms
    if source:
        for part in ("motion", "image", "latent"):
            getattr(model, part).load_state_dict(getattr(MADE[source], part).state_dict())
    updater, rng = on_cpu(model, run, pretrained=bool(source)), np.random.default_rng(args.seed)
    curve: dict[str, Any] = {}
    for last, now in zip((0, *POINTS), POINTS, strict=False):
        learn(updater, episodes, rng, now - last, BATCH)
        curve[str(now)] = {key: round(value, 4) for key, value in figures(model, train, test).items()}
    return {"curve": curve}


if __name__ == "__main__":
    main()
