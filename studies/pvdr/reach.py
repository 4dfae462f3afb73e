"""What toy:reach pays without learning: random actions, standing still, and plans that are exact.

    python studies/pvdr/reach.py 0          # a run's seed; rows go to studies/pvdr/reach.jsonl, those that are there are not made again

Plays the 100 episodes on which `localmotion evaluate --episodes 100` plays a run with this seed, and in the same groups.

    random            uniform actions, those of `localmotion evaluate --policy random`
    standing still    no action
    exact plans       each agent step draws 8 actions, uniform, which are kept for 4 steps. Their true pictures are the plans. The action of
                      the plan nearest to the goal is taken, as PVDR does it at preset tiny: the nearest frame of a plan counts
                      (`AlignmentConfig`). There is no tokenizer. The distance compares pictures of 16 pixels, squared, and averages pixels
                      over the width of one cell of the tokenizer before that.

So the last row says what planning could reach if only the action had to be chosen: nothing is learned in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from localmotion.acting.episodes import episode_seed, evaluate
from localmotion.acting.observer import Observer
from localmotion.acting.policy import Policy, random_policy
from localmotion.envs.toy import ReachEnv
from localmotion.models.planning import GoalDistance

EPISODES, SIDE, FINE = 100, 32, 16
PLANS, HORIZON = 8, 4
CELL = SIDE // 4
"""Pixels of a cell of the tokenizer at preset tiny: three stages halve the picture."""


class Painter:
    """Draws the block at any place."""

    def __init__(self) -> None:
        self.env = ReachEnv(size=SIDE)

    def __call__(self, places: NDArray[np.float64]) -> torch.Tensor:
        """Places (..., 2) -> features (..., FINE * FINE, 3): pictures of FINE pixels a side."""
        found = []
        for place in places.reshape(-1, 2):
            self.env.agent = place
            found.append(self.env._draw(SIDE))
        pictures = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255
        small = torch.nn.functional.avg_pool2d(pictures, SIDE // FINE)
        return small.flatten(2).transpose(1, 2).reshape(*places.shape[:-1], FINE * FINE, 3)


def exact_plans(envs: list[ReachEnv], paint: Painter, distance: GoalDistance, seed: int) -> Policy:
    """The policy of the environments of one group. ``envs`` grows before it acts first."""
    rng = np.random.default_rng(seed)

    def act(records: list[dict[str, Any]], first: bool) -> NDArray[np.float32]:
        playing = envs[: len(records)]
        actions = rng.uniform(-1, 1, (len(playing), PLANS, 2))
        place, frames = np.stack([env.agent for env in playing])[:, None], []
        for _ in range(HORIZON):
            place = np.clip(place + ReachEnv.speed * actions, 0, 1)
            frames.append(place)
        goal = paint(np.stack([env.goal for env in playing]))  # (E, N, D)
        far = distance(paint(np.stack(frames, 2)), goal[:, None, None]).amin(2)  # (E, K)
        return actions[np.arange(len(playing)), far.argmin(1).numpy()].astype(np.float32)

    return act


def played(seed: int, policy: Callable[[list[ReachEnv], int], Policy]) -> dict[str, Any]:
    """Figures of a policy, which ``policy`` makes of the environments and the number of the group of episodes."""
    envs: list[ReachEnv] = []
    group = itertools.count()

    def make() -> Observer:
        envs.append(ReachEnv(size=SIDE))
        return Observer(envs[-1], None)

    result = evaluate(lambda: policy(envs, next(group)), make, seed=seed, episodes=EPISODES)
    found: dict[str, Any] = {"episodes": EPISODES}
    for name, values in (("return", result.returns), ("success", result.successes)):
        found |= {name: round(float(np.mean(values)), 3), f"{name} deviation": round(float(np.std(values)), 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    paint, distance = Painter(), GoalDistance(FINE, "squared", FINE * CELL / SIDE)
    policies: dict[str, Callable[[list[ReachEnv], int], Policy]] = {
        "random": lambda envs, group: random_policy(2, seed * 1000 + group),  # as `evaluation.evaluate` has it
        "standing still": lambda envs, group: lambda records, first: np.zeros((len(records), 2), np.float32),
        "exact plans": lambda envs, group: exact_plans(envs, paint, distance, episode_seed(seed, "policy", group)),
    }
    file = Path(__file__).with_suffix(".jsonl")
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name, policy in policies.items():
        if any((row["seed"], row["policy"]) == (seed, name) for row in known):
            continue
        began = time.process_time()
        row = {"seed": seed, "policy": name, **played(seed, policy), "cpu_seconds": round(time.process_time() - began, 1)}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
