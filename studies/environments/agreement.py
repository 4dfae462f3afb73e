"""Do our environments give the suites' own numbers? Random policy on dm_control, Meta-World's scripted policies, gymnasium's checker.

    python studies/environments/agreement.py dmc OUT.json         every task: our rewards and dm_control's own, action by action
    python studies/environments/agreement.py metaworld OUT.json   every task: its scripted policy in ours and in Meta-World's own
    python studies/environments/agreement.py checker OUT.json     gymnasium's environment checker on every environment

Nothing is drawn in the first two. An episode that met its goal is not played to its end (success counts at any step).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.envs import list_envs, make_env

EPISODES = {"dmc": 1, "metaworld": 20}


def dmc(name: str) -> dict[str, Any]:
    """Return of a random episode, ours and dm_control's from the same state, and the largest difference of a reward or a state."""
    from dm_control import suite

    if not hasattr(np, "in1d"):
        np.in1d = np.isin  # type: ignore[attr-defined]  # dm_control's quadruped still asks for the name that NumPy 2.4 dropped
    from localmotion.envs.dmc import TASKS

    env: Any = make_env(name, size=8)
    theirs = suite.load(*TASKS[name.partition(":")[2]], task_kwargs={"random": 0})
    returns: list[list[float]] = []
    difference = 0.0
    for episode in range(EPISODES["dmc"]):
        env._begin(episode)
        theirs.task.random.seed(episode)
        theirs.reset()
        difference = max(difference, float(np.abs(env.physics.get_state() - theirs.physics.get_state()).max()))
        rng, totals = np.random.default_rng(episode), np.zeros(2)
        spec = theirs.action_spec()
        for _ in range(env.time_limit):
            action = rng.uniform(-1, 1, env.action_space.shape)
            ours, _ = env._control(action)
            low, high = np.maximum(spec.minimum, -1e3), np.minimum(spec.maximum, 1e3)
            low, high = np.where(low <= -1e3, -1.0, low), np.where(high >= 1e3, 1.0, high)
            step = theirs.step((high + low) / 2 + (high - low) / 2 * action)
            difference = max(difference, abs(ours - step.reward))
            totals += (ours, step.reward)
            if step.last():
                break
        difference = max(difference, float(np.abs(env.physics.get_state() - theirs.physics.get_state()).max()))
        returns.append(totals.tolist())
    env.close()
    return {"env": name, "ours": [a for a, _ in returns], "theirs": [b for _, b in returns], "largest_difference": difference}


def metaworld(name: str) -> dict[str, Any]:
    """Success of the scripted policy: in our environment over seeds, in Meta-World's own over the goals of its benchmark."""
    import metaworld as package
    from metaworld.policies import ENV_POLICY_MAP

    env: Any = make_env(name, size=8)
    full = f"{name.partition(':')[2]}-v3"
    benchmark = package.MT1(full, seed=0)
    inner: Any = benchmark.train_classes[full]()
    policy = ENV_POLICY_MAP[full]()
    ours, theirs, returns = [], [], []
    for episode in range(EPISODES["metaworld"]):
        env._begin(episode)
        met, total = 0.0, 0.0
        for _ in range(env.time_limit):
            reward, _ = env._control(env.expert_action())
            total += reward
            if env._success():
                met = 1.0
                break
        ours.append(met)
        returns.append(total)
        inner.set_task(benchmark.train_tasks[episode])
        seen, _ = inner.reset()
        met = 0.0
        for _ in range(env.time_limit):
            seen, _, _, _, info = inner.step(np.clip(policy.get_action(seen), -1, 1).astype(np.float32))
            if info["success"]:
                met = 1.0
                break
        theirs.append(met)
    env.close()
    return {"env": name, "ours": float(np.mean(ours)), "theirs": float(np.mean(theirs)), "episodes": len(ours)}


def checker(name: str) -> dict[str, Any]:
    """What gymnasium's checker said: nothing, warnings, or an error."""
    from gymnasium.utils.env_checker import check_env

    env = make_env(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            check_env(env, skip_render_check=True)
            error = None
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
    env.close()
    return {
        "env": name,
        "error": error,
        "warnings": sorted({str(w.message)[:160] for w in said if issubclass(w.category, UserWarning)}),
    }


def main() -> None:
    """Run one of the three over all environments; the file grows row by row and a second call goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dmc", "metaworld", "checker"))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = list_envs() if args.what == "checker" else list_envs(args.what)
    rows: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {row["env"] for row in rows}
    began = time.time()
    for name in names:
        if name in done:
            continue
        rows.append({"dmc": dmc, "metaworld": metaworld, "checker": checker}[args.what](name))
        args.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        print(f"{time.time() - began:5.0f} s  {rows[-1]}", flush=True)


if __name__ == "__main__":
    main()
