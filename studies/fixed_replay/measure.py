"""What a world model of preset `tiny` learns from one fixed replay, by settings: KL of s, image loss, and what s knows of pose and reward.

    python studies/fixed_replay/measure.py dmc:cheetah_run 300 plain,drp norm,drp,norm=batch dv2,dreamer_v2

Each argument is NAME,METHOD,SETTING=VALUE,... Fourteen episodes of smooth random actions (action repeat 4, 32-pixel pictures, motion
perceived at 64), ten to learn from and four held out; batches, seed and initial weights are the same for all. The ridge regressions read
the features of s at positions 8 to 15 of windows of 16 and are scored (R2, mean over outputs) on the held-out episodes.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from localmotion import methods
from localmotion.acting.observer import make_observer
from localmotion.compute import Compute
from localmotion.recipe import Recipe
from localmotion.runs.settings import compose
from localmotion.training.update import Updater

LENGTH, SEEN, TRAINED, EPISODES = 16, 8, 10, 14
RECIPE = Recipe(size=32, percept_size=64, redraw_rounds=0)
Episode = list[dict[str, Any]]
Values = NDArray[np.float64]


def record(task: str) -> tuple[list[Episode], int]:
    """Episodes under smooth random actions, and the number of actions."""
    run = compose("drp", "train", preset="tiny", env=task, flags={"action_repeat": 4, "observed": "both"})
    observer = make_observer(run, RECIPE)
    rng = np.random.default_rng(0)
    episodes = []
    for seed in range(EPISODES):
        entry, done = observer.reset(seed), False
        episode, action = [entry], np.zeros(observer.action_dim, np.float32)
        while not done:
            action = np.clip(0.7 * action + 0.7 * rng.uniform(-1, 1, observer.action_dim), -1, 1).astype(np.float32)
            entry, done, _ = observer.step(action)
            episode.append(entry)
        episodes.append(episode)
    return episodes, observer.action_dim


def batch_of(windows: list[Episode]) -> dict[str, torch.Tensor]:
    """Windows as the replay gives them: what led to the first frame is unknown."""
    keys = ("image", "action", "reward", "is_terminal", "flow", "tracks", "visible", "track_id")
    batch = {k: torch.from_numpy(np.stack([np.stack([np.asarray(r[k]) for r in w]) for w in windows])) for k in keys}
    batch |= {key: batch[key].float() for key in ("reward", "action")}
    batch["is_first"] = torch.zeros(batch["reward"].shape, dtype=torch.bool)
    batch["is_first"][:, 0] = True
    for key in ("action", "visible", "flow"):
        batch[key][:, 0] = 0
    return batch


def r2(train: tuple[Values, Values], test: tuple[Values, Values]) -> float:
    """Ridge regression (penalty 10 on standardised inputs) fitted to ``train``, scored on ``test``."""
    (x, y), (x_test, y_test) = train, test
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    error = ((y_test - x_test @ weights - y.mean(0)) ** 2).sum(0)
    return float(np.mean(1 - error / ((y_test - y_test.mean(0)) ** 2).sum(0)))


def measure(name: str, method: str, settings: tuple[str, ...], task: str, updates: int, data: tuple[list[Episode], int]) -> None:
    episodes, actions = data
    run = compose(method, "train", preset="tiny", env=task, flags={"precision": "fp32", "device": "cpu"}, settings=settings)
    torch.manual_seed(0)
    model = methods.get(method)(run.model, image_size=RECIPE.size, action_dim=actions)
    updater = Updater(model, run, Compute(torch.device("cpu"), False, 1, ""))
    rng = np.random.default_rng(0)
    began = time.process_time()
    for _ in range(updates):
        windows = []
        for _ in range(run.online.batch_size):
            episode = episodes[rng.integers(TRAINED)]
            start = rng.integers(len(episode) - LENGTH + 1)
            windows.append(episode[start : start + LENGTH])
        updater.learn(batch_of(windows))
    seconds = time.process_time() - began
    model.eval()

    def features(chosen: list[Episode]) -> tuple[Values, Values, Values, dict[str, float]]:
        windows = [e[s : s + LENGTH] for e in chosen for s in range(0, len(e) - LENGTH + 1, LENGTH)]
        with torch.no_grad():
            losses, metrics, state = model.world_model_losses(batch_of(windows))
        feat = torch.cat([state.stoch.flatten(-2), state.deter], -1).view(len(windows), LENGTH, -1)[:, SEEN:].flatten(0, 1)
        late = [entry for window in windows for entry in window[SEEN:]]
        found = {"kl": float(metrics["dynamics/kl"]), "image": float(losses["image"])}
        vectors = np.stack([np.asarray(entry["vector"], np.float64) for entry in late])
        return feat.numpy().astype(np.float64), np.array([[float(e["reward"])] for e in late]), vectors, found

    feat, reward, vector, _ = features(episodes[:TRAINED])
    feat_test, reward_test, vector_test, found = features(episodes[TRAINED:])
    half = vector.shape[1] // 2  # cheetah: eight positions, nine velocities
    row = {
        "name": name,
        "method": method,
        "settings": settings,
        "task": task,
        "updates": updates,
        "cpu_seconds": round(seconds),
        "kl": round(found["kl"], 2),
        "image": round(found["image"], 2),
        "reward_r2": round(r2((feat, reward), (feat_test, reward_test)), 3),
        "pose_r2": round(r2((feat, vector[:, :half]), (feat_test, vector_test[:, :half])), 3),
        "velocity_r2": round(r2((feat, vector[:, half:]), (feat_test, vector_test[:, half:])), 3),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = record(sys.argv[1])
    for text in sys.argv[3:]:
        label, chosen, *given = text.split(",")
        measure(label, chosen, tuple(given), sys.argv[1], int(sys.argv[2]), recorded)
