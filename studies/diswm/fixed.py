"""Does a teacher from videos of another task help a world model that learns from a fixed data set with changing colours?

    python studies/diswm/fixed.py 0                                # seed; all transfers and arms
    python studies/diswm/fixed.py 0 --transfers walker_walk --arms DisWM "w/o distillation"
    python studies/diswm/fixed.py --table                          # tables and fixed.png

The three transfers of the paper's Figure 4: finger spin to reacher easy, cheetah run to walker walk, reacher easy to cheetah run. Videos of
a source task: 24 episodes of 100 agent steps in each palette, smooth random actions, 32 pixels; 500 updates of `tiny` on them. Data of a
target task, recorded once: in each palette episodes of 48 agent steps under smooth random actions, 105 to learn from (5,000 transitions),
40 to fit probes and 40 to score. The world model alone learns, in batches of 16 x 16, the same ones for all arms of a seed: 200 updates in
palette 1, then 200 in palette 2, as the colours of the paper's environment change half-way. The distillation's weight falls to its least
over these 400 updates (`distillation_steps` of `tiny`). Measuring leaves random numbers and weights as they were.

    DisWM                the teacher of the source task's videos
    own videos           a teacher of videos of the target task itself: the positive control
    untrained teacher    a teacher with random weights: the negative control
    w/o distillation     from scratch with the beta-VAE
    w/o disentanglement  beta_code = 0 in both stages
    DreamerV2            from scratch

A row of fixed.jsonl holds an arm, a seed and a transfer, and figures after 50, 100, 200, 300 and 400 updates. They are R2 of ridge
regression from posterior states at positions 6 to 15 of windows of 16, fitted on the probes' episodes and scored on the last 40:

    pose 1, 2           places, cosines and sines of the links; fitted and scored in palette 1, in palette 2
    pose 12             fitted in palette 1, scored in palette 2
    reward 1, 2, 12     the same of the reward
    colours 1, 2        colours of all materials, from the state
    code pose, code colours     from the mean of DisWM's code, in palette 1
    kl                  KL of the posterior from the prior in nats, palette 1
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from localmotion import methods
from localmotion.acting.observer import Observer
from localmotion.compute import Compute
from localmotion.envs import make_env
from localmotion.envs.bodies import smooth_actions
from localmotion.evaluation.contrasts import sign_flip_test
from localmotion.evaluation.probe_data import Episodes
from localmotion.evaluation.probe_fits import ridge_fit
from localmotion.methods.diswm import DisWM
from localmotion.models.rssm import RSSMState
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.report.style import GRID, PALETTE
from localmotion.runs.settings import compose
from localmotion.training.pretrain import pretrain
from localmotion.training.transfer import load_pretrained
from localmotion.training.update import Updater
from localmotion.video.store import ClipStore, ClipStoreWriter

ROWS = Path(__file__).with_suffix(".jsonl")
TRANSFERS = {"walker_walk": "cheetah_run", "reacher_easy": "finger_spin", "cheetah_run": "reacher_easy"}
"""Source task by target task."""
ARMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "DisWM": ("diswm", "source", ()),
    "own videos": ("diswm", "own", ()),
    "untrained teacher": ("diswm", "untrained", ()),
    "w/o distillation": ("diswm", "", ()),
    "w/o disentanglement": ("diswm", "source", ("beta_code=0",)),
    "DreamerV2": ("dreamer_v2", "", ()),
}
"""Method, whose teacher, settings."""
SIZE, STEPS, LEARNED, PROBED, SCORED = 32, 48, 105, 40, 40
CONTEXT, LENGTH, BATCH = 6, 16, 16
STARTS = (0, 11, 22, 33)
"""Of the windows that are measured, in every episode: they cover it."""
POINTS = (50, 100, 200, 300, 400)
CHANGE = 200
"""The update after which palette 2 comes."""
PRETRAINED, VIDEOS, VIDEO_STEPS = 500, 24, 100
RECIPE = Recipe(size=SIZE, percept_size=2 * SIZE, tracks=4).with_motion("exact")
Batch = dict[str, Tensor]
Data = dict[str, NDArray[Any]]


def pose(env: Any) -> NDArray[np.float32]:
    """Places in the picture, cosines and sines of the links, (4 L,)."""
    x, y, angle = env.link_places(SIZE).T
    return np.concatenate([x, y, np.cos(angle), np.sin(angle)]).astype(np.float32)


def recorded(task: str, palette: int, work: Path) -> Data:
    """Episodes (n, T, ...) of a target task by key: those to learn from, to fit probes, and to score."""
    file = work / "data" / f"{task}-{palette}.npz"
    if not file.exists():
        env: Any = make_env(f"diswm:{task}", size=SIZE, supersample=2, phase=palette)
        observer, found = Observer(env, None), dict[str, list[NDArray[Any]]]()
        for number in range(LEARNED + PROBED + SCORED):
            seed = 1_000 * palette + number
            rows, truth = [observer.reset(seed)], [(pose(env), env.colours().ravel())]
            for move in smooth_actions(np.random.default_rng(seed), STEPS, observer.action_dim):
                rows.append(observer.step(np.clip(move, -1, 1).astype(np.float32))[0])
                truth.append((pose(env), env.colours().ravel()))
            for key in ("image", "action", "reward"):
                found.setdefault(key, []).append(np.stack([np.asarray(row[key]) for row in rows]))
            for key, values in zip(("pose", "colours"), zip(*truth, strict=True), strict=True):
                found.setdefault(key, []).append(np.stack(values))
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.stem}-{os.getpid()}.npz")
        np.savez_compressed(partial, **{key: np.stack(values) for key, values in found.items()})
        partial.replace(file)
    with np.load(file, allow_pickle=False) as kept:
        return {key: kept[key] for key in kept}


def windows(data: Data, places: list[tuple[int, int]]) -> Batch:
    """A batch as the replay gives it: what led to the first frame is unknown."""
    batch = {key: torch.from_numpy(np.stack([value[n, s : s + LENGTH] for n, s in places])) for key, value in data.items()}
    batch |= {key: batch[key].float() for key in ("reward", "action")}
    batch["is_first"] = torch.zeros(batch["reward"].shape, dtype=torch.bool)
    batch["is_first"][:, 0] = True
    batch["action"][:, 0] = 0
    batch["is_terminal"] = torch.zeros_like(batch["is_first"])
    return batch


def videos(task: str, work: Path) -> Path:
    """Videos of a source task in both palettes, in one store."""
    out, parts = work / "videos" / task, [work / "videos" / f"{task}-{palette}" for palette in (1, 2)]
    if (out / ".ok").exists():
        return out
    for palette, part in enumerate(parts, 1):
        collect(f"diswm:{task}", part, episodes=VIDEOS, steps=VIDEO_STEPS, seed=palette, recipe=RECIPE, phase=palette)
    opened = [ClipStore(part) for part in parts]
    first = opened[0]
    writer = ClipStoreWriter.open(out, first.size, first.recipe, first.recipe_hash, first.tracks, VIDEOS)
    for shard, store in enumerate(opened):
        clips = [store.clip(number) for number in range(len(store))]
        writer.write_shard(shard, [replace(clip, id=f"{store.path.name}/{clip.id}", extra={}) for clip in clips], [])
    (out / ".ok").touch()
    return out


def teacher(source: str, seed: int, settings: tuple[str, ...], work: Path) -> str:
    """The pre-training run of a teacher."""
    own = (f"pretrain.updates={PRETRAINED}", f"pretrain.eval_every={PRETRAINED}", f"pretrain.save_every={PRETRAINED // 2}")
    flags = {"device": "cpu", "precision": "fp32", "threads": 1, "seed": seed, "data": str(videos(source, work))}
    out = work / "runs" / "-".join([source, *settings, str(seed)])
    pretrain(compose("diswm", "pretrain", preset="tiny", flags=flags, settings=(*settings, *own)), out)
    return str(out)


def begun(target: str, arm: str, seed: int, actions: int, work: Path) -> tuple[Any, Updater]:
    """The method of an arm with its weights, and its world model's updater. Arms of DisWM begin with the same weights."""
    method, source, settings = ARMS[arm]
    flags: dict[str, Any] = {"device": "cpu", "precision": "fp32", "threads": 1, "seed": seed}
    if source:
        task = target if source == "own" else TRANSFERS[target]
        flags["checkpoint"] = teacher(task, seed, settings, work)
    run = compose(method, "finetune" if source else "train", preset="tiny", env=f"diswm:{target}", flags=flags, settings=settings)
    torch.manual_seed(seed)
    model = methods.get(method)(run.model, image_size=SIZE, action_dim=actions)
    if source in ("source", "own"):
        load_pretrained(model, run)
    torch.manual_seed(seed)
    updater = Updater(model, run, Compute(torch.device("cpu"), False, 1, ""), pretrained=bool(source))
    updater.passes = updater.passes[:1]  # a fixed data set needs no actor
    return model, updater


@torch.no_grad()
def figures(model: Any, probes: list[Batch], tests: list[Batch]) -> dict[str, float]:
    """The figures of a row at one point. Batches by palette."""
    model.eval()
    states: list[list[Tensor]] = []
    kl, codes = 0.0, []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for palette in zip(probes, tests, strict=True):
            states.append([])
            for batch in palette:
                _, metrics, state = model.world_model_losses(batch)
                state = RSSMState(*(x.unflatten(0, batch["reward"].shape) for x in state))
                states[-1].append(model.dynamics.feat(state)[:, CONTEXT:])
                if batch is probes[0]:
                    kl = float(next(value for key, value in metrics.items() if key in ("dynamics/kl", "model/kl")))
        if isinstance(model, DisWM):
            codes = [model.motion_code(batch)[:, CONTEXT:] for batch in (probes[0], tests[0])]
    model.train()

    def fitted(fit: Tensor, fit_on: Batch, score: Tensor, score_on: Batch, key: str) -> float:
        x = torch.cat([fit, score]).float()  # (windows, steps, F)
        count, steps, _ = x.shape
        y = torch.cat([batch[key] for batch in (fit_on, score_on)])[:, CONTEXT:].reshape(count * steps, -1).numpy()
        episode = np.repeat(np.arange(count) // len(STARTS), steps)  # a fold holds whole episodes
        data = Episodes("", episode, {}, None, episode >= PROBED)
        return round(ridge_fit(x.flatten(0, 1).numpy(), y[:, y.std(0) > 1e-3], data).score, 4)

    out = {}
    for name, fit, score in (("1", 0, 0), ("2", 1, 1), ("12", 0, 1)):
        for key in ("pose", "reward", "colours"):
            if key != "colours" or name != "12":
                out[f"{key} {name}"] = fitted(states[fit][0], probes[fit], states[score][1], tests[score], key)
    for key in ("pose", "colours") if codes else ():
        out[f"code {key}"] = fitted(codes[0], probes[0], codes[1], tests[0], key)
    return {**out, "kl": round(kl, 3)}


def curve(model: Any, updater: Updater, data: list[Data], seed: int) -> dict[str, dict[str, float]]:
    """Figures by updates."""
    probes, tests = (
        [windows(part, [(n, s) for n in chosen for s in STARTS]) for part in data]
        for chosen in (range(LEARNED, LEARNED + PROBED), range(LEARNED + PROBED, LEARNED + PROBED + SCORED))
    )
    rng, found = np.random.default_rng(seed), {}
    for last, now in zip((0, *POINTS), POINTS, strict=False):
        for _ in range(now - last):
            places = [(int(rng.integers(LEARNED)), int(rng.integers(STEPS + 2 - LENGTH))) for _ in range(BATCH)]
            updater.learn(windows(data[now > CHANGE], places))
        found[str(now)] = figures(model, probes, tests)
    return found


def kept(file: Path = ROWS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


COLUMNS = {
    "pose, palette 1": ("pose 1", (100, 200)),
    "pose, at the change": ("pose 2", (200,)),
    "pose, palette 2": ("pose 2", (300, 400)),
    "reward, palette 1": ("reward 1", (100, 200)),
    "reward, at the change": ("reward 2", (200,)),
    "reward, palette 2": ("reward 2", (300, 400)),
    "colours": ("colours 1", (200,)),
    "code: pose": ("code pose", (200,)),
    "code: colours": ("code colours", (200,)),
    "KL, nats": ("kl", (200,)),
}
"""Columns of the table: a figure, and the updates over which it is averaged."""
CONTRASTS = [("DisWM", other) for other in ("w/o distillation", "untrained teacher", "w/o disentanglement", "DreamerV2")]
CONTRASTS.append(("own videos", "w/o distillation"))


def score(row: dict[str, Any], column: str) -> float | None:
    key, points = COLUMNS[column]
    values = [row["curve"][str(point)].get(key) for point in points]
    return None if None in values else fmean(values)


def cell(values: Sequence[float], signed: bool = False) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):{'+' if signed else ''}.3f}{spread}"


def table(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, then paired differences: how many seeds are above 0, and the p of the sign-flip test."""
    for target, source in TRANSFERS.items():
        print(f"\n{source} to {target}\n\n| arm | seeds | {' | '.join(COLUMNS)} |\n|---|---{'|---' * len(COLUMNS)}|")
        for arm in ARMS:
            if some := [row for row in rows if (row["arm"], row["target"]) == (arm, target)]:
                known = [[value for row in some if (value := score(row, column)) is not None] for column in COLUMNS]
                print(f"| {arm} | {len(some)} | {' | '.join(cell(values) if values else '' for values in known)} |")
    own = [column for column in COLUMNS if column.startswith(("pose", "reward"))]
    print(f"\n| | transfer | seeds | {' | '.join(own)} |\n|---|---|---{'|---' * len(own)}|")
    for of, against in CONTRASTS:
        differences: dict[str, dict[int, list[float]]] = {}  # by transfer and seed, of each column
        for target, source in TRANSFERS.items():
            one, other = (
                {row["seed"]: row for row in rows if (row["arm"], row["target"]) == (arm, target)} for arm in (of, against)
            )
            differences[f"{source} to {target}"] = {
                seed: [score(one[seed], column) - score(other[seed], column) for column in own]  # type: ignore[operator]
                for seed in sorted(one.keys() & other.keys())
            }
        whole = set.intersection(*(set(each) for each in differences.values()))
        differences["mean of the three"] = {
            seed: [fmean(column) for column in zip(*(each[seed] for each in differences.values()), strict=True)]
            for seed in sorted(whole)
        }
        for name, each in differences.items():
            cells = []
            for found in zip(*each.values(), strict=True):
                cells.append(f"{cell(found, True)} ({sum(x > 0 for x in found)}/{len(found)}, p {sign_flip_test(found):.2f})")
            if cells:
                print(f"| {of} - {against} | {name} | {len(each)} | {' | '.join(cells)} |")


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """R2 of the pose and of the reward in the palette that is learned from; a band from the lowest to the highest seed."""
    figure = Figure(figsize=(10.8, 6.2), layout="constrained")
    panels = figure.subplots(2, len(TRANSFERS), sharex=True, sharey="row")
    for key, line in zip(("pose", "reward"), panels, strict=True):
        line[0].set_ylabel(f"R² of the {key}")
        if key == "reward":
            line[0].set_ylim(-0.32, 0.32)  # rewards of random actions are rare in two tasks; some scores are far below 0
        for panel, (target, source) in zip(line, TRANSFERS.items(), strict=True):
            for number, arm in enumerate(ARMS):
                some = [row["curve"] for row in rows if (row["arm"], row["target"]) == (arm, target)]
                # At the change both palettes are shown: that of before, and the new one, which nothing has learned from.
                spots = [(n, f"{key} {1 + (n > CHANGE)}") for n in POINTS if n <= CHANGE]
                spots += [(CHANGE, f"{key} 2"), *((n, f"{key} 2") for n in POINTS if n > CHANGE)]
                values = np.array([[curve[str(n)][name] for n, name in spots] for curve in some])
                if len(values):
                    at = np.array([n for n, _ in spots]) + np.array([0] * 3 + [1] + [0] * 2)
                    panel.plot(at, values.mean(0), "o-", ms=3, lw=1.6, color=PALETTE[number], label=arm)
                    panel.fill_between(at, values.min(0), values.max(0), color=PALETTE[number], alpha=0.12, lw=0)
            panel.axvline(CHANGE, color="#999999", lw=0.8, ls=":")
            panel.grid(color=GRID, lw=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            if key == "pose":
                panel.set_title(f"{source} to {target}".replace("_", " "), fontsize=10)
            else:
                panel.set_xlabel("updates; the palette changes at 200")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--transfers", nargs="+", choices=TRANSFERS, default=list(TRANSFERS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/diswm"))
    parser.add_argument("--rows", type=Path, help="another file for the rows")
    parser.add_argument("--table", action="store_true", help="the tables of README.md and fixed.png")
    args = parser.parse_args()
    if args.table:
        table(kept())
        return draw(kept(), ROWS.with_suffix(".png"))
    torch.set_num_threads(1)
    rows = args.rows or ROWS
    done = {(row["arm"], row["seed"], row["target"]) for row in kept(rows)}
    for target in args.transfers:
        for arm in args.arms:
            if (arm, args.seed, target) in done:
                continue
            began, data = time.process_time(), [recorded(target, palette, args.work) for palette in (1, 2)]
            model, updater = begun(target, arm, args.seed, data[0]["action"].shape[-1], args.work)
            row = {"arm": arm, "seed": args.seed, "source": TRANSFERS[target], "target": target}
            row |= {"curve": curve(model, updater, data, args.seed), "cpu_seconds": round(time.process_time() - began)}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    main()
