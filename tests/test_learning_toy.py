"""Every method that acts learns a control task from pixels, the whole way: environment, perception, replay, updates, policy, evaluation.

The task is the easiest there is (`toy:block`), the models are tiny, a run takes a minute on one core. Random actions have 15 of 49.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localmotion import methods
from localmotion.config import compose
from localmotion.envs.toy import BLOCK_OPTIMAL, BLOCK_RANDOM
from localmotion.training.finetune import finetune

COMMON = (
    "env_steps=1750",
    "prefill=500",
    "warmup_updates=50",
    "online.batch_size=16",
    "online.length=16",
    "online.lr=2e-3",
    "online.eval_every=100000",
    "deter=128",
    "stoch=8",
    "classes=8",
    "units=64",
)
# Behaviour learns faster than on a real task: the optimum is ten steps away.
DREAMERS = (
    *COMMON,
    "hidden=128",
    "depth=16",
    "actor_lr=1e-3",
    "critic_lr=1e-3",
    "horizon=10",
    "discount=0.95",
    "slow_critic_every=20",
)
# The whole picture is drawn: what can be copied from a context frame starts the latent far later (decision 0004).
OWN = {
    "ipv": (*DREAMERS, "context_copy=false"),
    "drp": (*DREAMERS, "context_copy=false"),
    "dreamer_v3": (*COMMON, "hidden=64", "model.depth=8", "imag_length=10", "model.horizon=20"),
}


@pytest.mark.parametrize("name", methods.names())
def test_a_method_learns_the_block(name: str, tmp_path: Path) -> None:
    """From random weights and 1,750 steps to 90 % of the optimum, mean of ten episodes of a start not trained on."""
    flags = {"precision": "fp32", "device": "cpu", "threads": 1, "recipe": {"percept_size": 64}}
    run = compose(name, "train", preset="debug", env="toy:block", flags=flags, settings=OWN.get(name, DREAMERS))
    finetune(run, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if line["kind"] == "eval"][-1]
    assert final["episodes"] == 10
    assert final["return_mean"] > 0.9 * BLOCK_OPTIMAL
    assert lines[0]["random"]
    assert lines[0]["return"] < 2.5 * BLOCK_RANDOM
