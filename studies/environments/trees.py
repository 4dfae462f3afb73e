"""Returns of random actions and of a simple better policy on every generated body (never on sealed ones), and how fast pixels move.

    python studies/environments/trees.py trees.json                 # 3 minutes

run: a sine for each motor, found by a cross-entropy search (10 rounds of 32 episodes of 400 env steps), tested on five other episodes.
reach: a proportional-derivative controller towards angles of the hinges at which the arm's end is in the target.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from localmotion.envs import make_env
from localmotion.envs.planar_trees import DEV, KINDS, TRAIN, tree

ROUNDS, TRIED, KEPT, SEARCHED = 10, 32, 6, 400


def rolled(env: Any, seed: int, steps: int, policy: Any) -> tuple[float, float]:
    """Return for 1000 env steps, and the mean forward speed of the body, m/s."""
    env._begin(seed)
    data, earned = env.physics.data, 0.0
    start = data.subtree_com[1, 0]
    for step in range(steps):
        earned += env._control(policy(step))[0]
    return earned * 1000 / steps, float((data.subtree_com[1, 0] - start) / (0.025 * steps))


def random_policy(env: Any, seed: int) -> Any:
    """Uniform actions, each for two env steps."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (500, *env.action_space.shape))
    return lambda step: actions[step // 2]


def gait(numbers: NDArray[np.float64], dims: int) -> Any:
    """Sines of one period (8 to 40 env steps) with an amplitude, a phase and an offset for each motor."""
    period = 8 + 32 / (1 + np.exp(-numbers[0]))
    height, phase, middle = numbers[1:].reshape(3, dims)
    return lambda step: np.clip(middle + height * np.sin(2 * np.pi * step / period + np.pi * phase), -1, 1)


def searched(env: Any) -> Any:
    """The best gait that the search saw."""
    dims, rng = env.action_space.shape[0], np.random.default_rng(0)
    mean, spread, best = np.zeros(1 + 3 * dims), np.ones(1 + 3 * dims), (-1.0, np.zeros(1 + 3 * dims))
    for _ in range(ROUNDS):
        tried = mean + spread * rng.standard_normal((TRIED, len(mean)))
        returns = np.array([rolled(env, 1, SEARCHED, gait(numbers, dims))[0] for numbers in tried])
        first = np.argsort(-returns)[:KEPT]
        mean, spread = 0.3 * mean + 0.7 * tried[first].mean(0), 0.3 * spread + 0.7 * tried[first].std(0) + 0.03
        best = max(best, (float(returns[first[0]]), tried[first[0]]), key=lambda pair: pair[0])
    return gait(best[1], dims)


def controller(env: Any, seed: int) -> Any:
    """Towards the best of 3000 random positions of the hinges for the target of this episode."""
    env._begin(seed)
    model, data = env.physics.model.ptr, env.physics.data.ptr
    low, high = np.where(model.jnt_limited == 1, model.jnt_range.T, [[-np.pi], [np.pi]])
    rng, wanted, least = np.random.default_rng(seed), data.qpos.copy(), np.inf
    for _ in range(3000):
        data.qpos[:] = rng.uniform(low, high)
        mujoco.mj_kinematics(model, data)
        away = float(np.linalg.norm(data.geom_xpos[1, :2] - data.site_xpos[0, :2]))
        if away < least:
            least, wanted = away, data.qpos.copy()

    def act(_: int) -> NDArray[np.float64]:
        error = wanted - data.qpos
        error[0] = (error[0] + np.pi) % (2 * np.pi) - np.pi
        return np.clip(error - 0.05 * data.qvel, -1, 1)

    return act


def pixels(env: Any) -> float:
    """Mean motion of the agent's moving pixels under random actions, pixels of 64 an agent step."""
    env.reset(seed=1)
    actions, moved = np.random.default_rng(0).uniform(-1, 1, (120, *env.action_space.shape)).astype(np.float32), []
    for action in actions:
        mask = env.agent_mask()
        env.step(action)
        flow = np.linalg.norm(env.exact_flow(), axis=-1)[mask]
        moved += [flow[flow > 0.1].mean()] if (flow > 0.1).any() else [0.0]
    return float(np.mean(moved))


def main() -> None:
    """Both tasks of every body."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out, rows = parser.parse_args().out, []
    for number in (*TRAIN, *DEV):
        for kind in KINDS:
            env: Any = make_env(f"planar:tree-{number:04d}_{kind}")
            chance = [rolled(env, seed, 1000, random_policy(env, seed)) for seed in range(5)]
            if kind == "run":
                found = searched(env)
                better = [rolled(env, seed, 1000, found) for seed in range(10, 15)]
            else:
                better = [rolled(env, seed, 1000, controller(env, seed)) for seed in range(5)]
            row: dict[str, Any] = {"env": env.name, "links": len(tree(number).links), "pixels": round(pixels(env), 2)}
            for name, played in (("random", chance), ("better", better)):
                row[name] = [round(earned) for earned, _ in played]
                if kind == "run":
                    row[f"{name}, m/s"] = round(float(np.mean([speed for _, speed in played])), 2)
            rows.append(row)
            out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
