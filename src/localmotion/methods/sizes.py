"""Sizes of the `small`, `tiny` and `debug` presets. All methods share them, so a comparison on two CPU cores differs in the method alone.

`small` and `tiny` are chosen by measurement (docs/performance.md, METHODS.md); `debug` runs in seconds. A method adds its own settings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

WORLD: dict[str, dict[str, Any]] = {
    "small": {
        "stem": "unshuffle",
        "norm": "none",
        "depth": 24,
        "context_dropout": 0.0,
        "context_side": 8,
        "context_copy": True,
        "deter": 256,
        "hidden": 256,
        "stoch": 16,
        "classes": 16,
        "units": 200,
        "layers": 3,
    },
    "tiny": {
        "stem": "unshuffle",
        "norm": "batch",
        "depth": 16,
        "context_dropout": 0.0,
        "context_side": 4,
        "context_copy": True,
        "image_weight": 16.0,
        "reward_weight": 100.0,
        "deter": 128,
        "hidden": 128,
        "stoch": 8,
        "classes": 8,
        "units": 96,
        "layers": 2,
    },
    "debug": {
        "stem": "unshuffle",
        "norm": "none",
        "depth": 8,
        "context_side": 8,
        "context_copy": True,
        "deter": 32,
        "hidden": 32,
        "stoch": 4,
        "classes": 4,
        "units": 32,
        "layers": 2,
    },
}
"""Default `WorldModelConfig` of `small`, `tiny` and `debug`. A method overrides the values that differ."""

BEHAVIOUR: dict[str, dict[str, Any]] = {
    "small": {"slow_critic_every": 20},
    "tiny": {"slow_critic_every": 20},
    "debug": {"horizon": 5},
}

RECIPE: dict[str, dict[str, Any]] = {"tiny": {"size": 32, "percept_size": 64}}
"""Perception recipe of a run without a checkpoint: `tiny` has 32-pixel pictures. A checkpoint brings the recipe of its clips."""

RUN: dict[str, dict[str, Any]] = {
    "tiny": {"precision": "fp32"},
    "debug": {"rollout": {"environments": 2, "workers": 1, "steps": 8, "epochs": 1, "minibatches": 2}},
}
"""Settings of the run. bf16 does not speed up matrix products of this size (docs/performance.md). Rollouts fit the env steps of `debug`."""

PRETRAIN: dict[str, dict[str, Any]] = {
    "small": {"updates": 8_000, "lr": 1e-3, "lr_decay": 0.25, "eval_every": 2_000, "save_every": 1_000},
    "tiny": {"updates": 2_000, "batch_size": 8, "lr": 1e-3, "lr_decay": 0.25, "eval_every": 500, "save_every": 500},
    "debug": {
        "updates": 20,
        "batch_size": 2,
        "length": 8,
        "log_every": 5,
        "eval_every": 10,
        "eval_batches": 1,
        "save_every": 10,
    },
}

ONLINE: dict[str, dict[str, Any]] = {
    "small": {
        "env_steps": 50_000,
        "updates": 10_000,
        "batch_size": 8,
        "length": 32,
        "prefill": 2_500,
        "eval_every": 5_000,
        "eval_episodes": 4,
        "replay_capacity": 100_000,
        "lr": 1e-3,
        "actor_lr": 8e-5,
        "critic_lr": 2e-4,
    },
    "tiny": {
        "env_steps": 40_000,
        "updates": 4_000,
        "batch_size": 4,
        "length": 32,
        "train_every": 2,
        "prefill": 2_500,
        "eval_every": 2_500,
        "eval_episodes": 4,
        "save_every": 2_500,
        "replay_capacity": 100_000,
        "lr": 1e-3,
        "actor_lr": 2e-4,
        "critic_lr": 4e-4,
    },
    "debug": {
        "env_steps": 400,
        "updates": 20,
        "batch_size": 2,
        "length": 8,
        "prefill": 120,
        "warmup_updates": 2,
        "freeze_updates": 0,
        "eval_every": 100,
        "eval_episodes": 1,
        "log_every": 5,
        "save_every": 50,
        "replay_capacity": 2_000,
    },
}


def presets(
    *,
    paper: Mapping[str, Any] | None = None,
    world: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    pretrain: bool = True,
    online: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """PRESETS of a method with the shared sizes.

    Args:
        paper: settings of the preset `paper`, for shared settings whose default is another method's.
        world: `WorldModelConfig` values of `small`, `tiny` and `debug` that differ from the shared ones.
        own: per preset, settings of the method's own parts, beside `world` and `behaviour`.
        pretrain: whether the method has that stage.
        online: `OnlineConfig` values of `small`, `tiny` and `debug` that differ from the shared ones.
    """
    models = {
        name: {**(own or {}).get(name, {}), "world": {**WORLD[name], **(world or {})}, "behaviour": dict(BEHAVIOUR[name])}
        for name in ("small", "tiny", "debug")
    }
    return {**budgets(own=models, pretrain=pretrain, online=online), "paper": dict(paper or {})}


def budgets(
    *, own: Mapping[str, Mapping[str, Any]] | None = None, pretrain: bool = True, online: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """PRESETS of a method without the shared world model: updates, env steps, batches and rates.

    Args:
        own: per preset, settings of the method's model.
        pretrain: whether the method has that stage.
        online: `OnlineConfig` values of `small`, `tiny` and `debug` that differ from the shared ones.
    """
    out: dict[str, dict[str, Any]] = {"paper": {}}
    for name in ("small", "tiny", "debug"):
        out[name] = {
            **RUN.get(name, {}),
            "model": dict((own or {}).get(name, {})),
            **({"pretrain": dict(PRETRAIN[name])} if pretrain else {}),
            "online": {**ONLINE[name], **(online or {})},
            "recipe": dict(RECIPE.get(name, {})),
        }
    return out


LATENT: dict[str, dict[str, Any]] = {
    "small": {
        "pretrain": {"updates": 20_000, "batch_size": 32, "length": 16, "lr": 6e-4, "lr_decay": 1.0, "eval_every": 5_000},
        "online": {"updates": 5_000, "batch_size": 64, "length": 8, "lr": 1e-3, "lr_decay": 1.0, "eval_every": 2_500},
    },
    "tiny": {
        "pretrain": {
            "updates": 2_000,
            "batch_size": 16,
            "length": 14,
            "lr": 1e-3,
            "lr_decay": 1.0,
            "eval_every": 500,
            "save_every": 500,
        },
        "online": {
            "updates": 1_000,
            "batch_size": 32,
            "length": 8,
            "lr": 1e-3,
            "lr_decay": 1.0,
            "eval_every": 500,
            "save_every": 500,
        },
    },
    "debug": {
        "pretrain": PRETRAIN["debug"],
        "online": {**ONLINE["debug"], "lr": 1e-3, "lr_decay": 1.0, "eval_every": 10, "save_every": 10},
    },
}
"""Budgets of latent action models. The windows of a sequence overlap, so a sequence of n windows costs less than n single ones."""


PPO: dict[str, dict[str, Any]] = {
    "paper": {
        "online": {
            "env_steps": 4_000_000,
            "lr": 3e-4,
            "lr_decay": 0.0,
            "freeze_updates": 290,
            "eval_every": 100_000,
            "save_every": 100_000,
        },
        "rollout": {"environments": 64, "steps": 64, "epochs": 3, "minibatches": 8},
    },
    "small": {
        "online": {
            "env_steps": 400_000,
            "lr": 3e-4,
            "lr_decay": 0.0,
            "freeze_updates": 100,
            "eval_every": 20_000,
            "eval_episodes": 4,
            "save_every": 10_000,
        },
        "rollout": {"environments": 16, "steps": 64, "epochs": 3, "minibatches": 4},
        "model": {"ppo": {"discount": 0.99, "reward_scale": 0.1, "decoder_until": 1.0}},
    },
    "tiny": {
        "online": {
            "env_steps": 40_000,
            "lr": 1e-3,
            "lr_decay": 0.0,
            "freeze_updates": 50,
            "eval_every": 5_000,
            "eval_episodes": 4,
            "save_every": 2_500,
        },
        "rollout": {"environments": 8, "steps": 32, "epochs": 4, "minibatches": 2},
        "model": {"ppo": {"discount": 0.99, "reward_scale": 0.1, "decoder_until": 1.0}},
    },
    "debug": {
        "online": {"env_steps": 64, "lr_decay": 0.0, "eval_every": 100, "save_every": 32},
    },
}
"""The stage `finetune` of latent action models. `paper`: LAPO's release. Its policy begins to learn after 50,000 steps (290 updates), and
its decoder learns until step 400,000. Runs of the other presets are not longer than that, so their decoder learns to the end."""


def latent_presets(
    *,
    paper: Mapping[str, Any],
    small: Mapping[str, Any],
    tiny: Mapping[str, Any],
    debug: Mapping[str, Any],
    pretrain: Mapping[str, Mapping[str, Any]] | None = None,
    online: Mapping[str, Mapping[str, Any]] | None = None,
    pairs: bool = True,
) -> dict[str, dict[str, Any]]:
    """PRESETS of a latent action model.

    Args:
        paper: settings of the preset `paper`, without those of the stage `finetune`.
        small, tiny, debug: settings of the model.
        pretrain, online: per preset, settings of the stages on clips and on logged episodes that differ from the shared ones.
        pairs: whether the decoder learns from rollouts; if not, it stays as a `decode` run left it.
    """
    stages = {name: {"finetune": {**copy.deepcopy(values), "optim": {"clip": 0.5}}} for name, values in PPO.items()}
    for each in stages.values():
        if not pairs:
            each["finetune"].setdefault("model", {}).setdefault("ppo", {})["decoder_until"] = 0.0
    out: dict[str, dict[str, Any]] = {"paper": {**paper, "stages": {**paper.get("stages", {}), **stages["paper"]}}}
    for name, model in (("small", small), ("tiny", tiny), ("debug", debug)):
        parts = {part: dict(values) for part, values in LATENT[name].items()}
        parts["pretrain"] |= (pretrain or {}).get(name, {})
        parts["online"] |= (online or {}).get(name, {})
        out[name] = {**RUN.get(name, {}), "optim": {"eps": 1e-8}, "model": dict(model), **parts, "stages": stages[name]}
    return out


PLAN_SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "tokenizer": {"widths": (32, 64, 128), "codes": 512, "code_dim": 64, "quantise_from": 500},
        "plan": {
            "latent": 16,
            "dim": 128,
            "heads": 4,
            "posterior_layers": 3,
            "prior_layers": 2,
            "decoder_layers": 3,
        },
        "beta_warmup": 1_000,
        "warmup": 500,
    },
    "tiny": {
        "tokenizer": {"widths": (16, 32, 64), "blocks": 1, "codes": 128, "code_dim": 32, "quantise_from": 200},
        "plan": {
            "context": 2,
            "horizon": 4,
            "latent": 8,
            "dim": 96,
            "heads": 4,
            "posterior_layers": 2,
            "prior_layers": 2,
            "decoder_layers": 2,
        },
        "beta_warmup": 200,
        "warmup": 100,
    },
    "debug": {
        "tokenizer": {"widths": (4, 4, 8), "blocks": 1, "codes": 16, "code_dim": 8, "quantise_from": 0},
        "plan": {
            "context": 2,
            "horizon": 3,
            "latent": 4,
            "dim": 16,
            "heads": 2,
            "posterior_layers": 1,
            "prior_layers": 1,
            "decoder_layers": 1,
        },
        "beta_warmup": 4,
        "warmup": 2,
    },
}
PLAN_VIDEO: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "tokenize": {"updates": 200_000, "batch_size": 64, "length": 2, "lr": 2e-4, "lr_decay": 0.0},
        "pretrain": {"updates": 200_000, "batch_size": 64, "length": 13, "lr": 3e-4, "lr_decay": 1.0},
    },
    "small": {
        "tokenize": {"updates": 10_000, "batch_size": 32, "length": 2, "lr": 4e-4},
        "pretrain": {"updates": 20_000, "batch_size": 16, "length": 13, "lr": 5e-4, "lr_decay": 1.0},
    },
    "tiny": {
        "tokenize": {"updates": 2_000, "batch_size": 16, "length": 2, "lr": 1e-3},
        "pretrain": {"updates": 2_000, "batch_size": 16, "length": 13, "lr": 1e-3, "lr_decay": 1.0},
    },
    "debug": {"tokenize": {}, "pretrain": {}},
}
"""Batches of `tokenize` are frames: two of each clip, which differ more than many of one. Sequences of 13 frames are 5 that a held-out
prediction observes, and one plan of 8 or two of 4."""


PLAN_ONLINE: dict[str, dict[str, Any]] = {
    "paper": {
        "online": {
            "env_steps": 500_000,
            "lr": 1e-4,
            "actor_lr": 3e-4,
            "critic_lr": 3e-4,
            "pretrained_lr_factor": 1.0,
            "freeze_updates": 0,
            "eval_every": 10_000,
            "eval_episodes": 20,
        },
        "rollout": {"environments": 8, "steps": 256, "epochs": 10, "minibatches": 8},
    },
    "small": {
        "online": {
            "env_steps": 100_000,
            "lr": 5e-4,
            "actor_lr": 3e-4,
            "critic_lr": 3e-4,
            "pretrained_lr_factor": 0.3,
            "freeze_updates": 0,
            "eval_every": 10_000,
            "eval_episodes": 10,
        },
        "rollout": {"environments": 8, "steps": 64, "epochs": 4, "minibatches": 4},
        "model": {"align": {"plans": 8, "plans_eval": 16}, "ppo": {"reward_scale": 0.1}},
    },
    "tiny": {
        "online": {
            "env_steps": 20_000,
            "lr": 1e-3,
            "actor_lr": 1e-3,
            "critic_lr": 1e-3,
            "pretrained_lr_factor": 0.3,
            "freeze_updates": 0,
            "eval_every": 5_000,
            "eval_episodes": 10,
            "save_every": 5_000,
            "log_every": 40,
        },
        "rollout": {"environments": 8, "steps": 32, "epochs": 4, "minibatches": 4},
        "model": {
            "align": {
                "plans": 8,
                "plans_eval": 8,
                "width": 128,
                "windows": 16,
                "pairs": 64,
                # 20,000 steps are few for PPO: it is the smaller part of the actor's gradient (studies/pvdr, the development seed).
                "hold": 8,
                "follow": "gain",
                "centred": True,
                "supervised": 5.0,
                "supervised_end": 5.0,
                "reward_from": 0.2,
            },
            "ppo": {"reward_scale": 0.1},
        },
    },
    "debug": {
        "online": {"env_steps": 64, "eval_every": 100, "save_every": 32},
        "rollout": {"environments": 2, "workers": 1, "steps": 8, "epochs": 1, "minibatches": 2},
        "model": {
            "align": {"plans": 3, "plans_eval": 2, "width": 16, "windows": 4, "pairs": 6, "memory": 64, "reward_from": 0.0}
        },
    },
}


def plan_presets() -> dict[str, dict[str, Any]]:
    """PRESETS of a method that plans in pictures."""
    out = budgets(own=PLAN_SIZES)
    for name, values in out.items():
        video = PLAN_VIDEO[name]
        values["optim"] = {"eps": 1e-8, "clip": 1.0}
        values["stages"] = {
            "tokenize": {"pretrain": video["tokenize"]},
            "pretrain": {"pretrain": video["pretrain"], "load": "tokenizer"},
            "finetune": {**PLAN_ONLINE[name], "optim": {"clip": 0.5}},
        }
    return out
