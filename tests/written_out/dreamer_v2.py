"""DreamerV2's update, written out from arXiv 2010.02193 with the settings that IPV's experiments give it for continuous control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from written_out import core, images


def train(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """World model (Eq. 2), then actor and critic in imagination (Eqs. 3-6) with the updated model, then the slow critic."""
    model, online = run.model, run.online
    world, sizes = model.world, core.Sizes(model.world.stoch, model.world.classes, model.world.deter)

    w = core.leaves(state)
    embed, truth = images.encode(state, w, batch["image"], world)
    post, prior = core.observe(w, "dynamics.", embed, batch["action"], batch["is_first"], sizes, noise)
    decoded = images.decode(state, w, post.feat, world)
    kl, kl_metrics = core.balanced_kl(post.logits, prior, world.kl_balance, model.free_nats)
    reward = core.mlp(w, "reward.", post.feat, world.layers)[..., 0]
    losses = {
        "image": images.image_loss(decoded, truth),
        "kl": kl,
        "reward": (0.5 * (reward - batch["reward"]) ** 2).mean(),
    }
    ends = core.continuation_loss(w, post.feat, batch["is_terminal"], world.layers)
    total = world.image_weight * losses["image"] + model.beta * losses["kl"] + world.reward_weight * losses["reward"]
    losses, total = losses | ends, total + sum(ends.values())
    names = core.named(state, "image.", "dynamics.", "reward.", "continuation.")
    norms = {"model": core.adam_step(state, w, total, names, lr=online.lr, optim=run.optim)}

    behaviour, metrics, more = core.behaviour_update(state, post, run, sizes, noise)
    norms |= more
    metrics |= {f"dynamics/{key}": value for key, value in kl_metrics.items()}
    return core.report({**losses, **behaviour}, metrics, norms)
