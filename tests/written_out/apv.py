"""APV's updates, written out from arXiv 2203.13880: pre-training on videos (Eq. 2), and with actions and a bonus (Eqs. 3-6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from written_out import core, images


def _check_columns(w: core.Weights, prefix: str, pad: int, sizes: core.Sizes) -> None:
    """The first layer reads the latent and ``pad`` columns of actions, so that pre-trained weights fit any robot."""
    assert w[f"{prefix}img_in.weight"].shape[1] == sizes.stoch * sizes.classes + pad, (
        f"{prefix}img_in: not padded to {pad} columns"
    )


def pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """Eq. 2: -ln p(o_t | z_t) + beta_z KL[q(z_t | z_{t-1}, o_t) || p(z_t | z_{t-1})], no actions; one group of weights."""
    model, world = run.model, run.model.world
    sizes = core.Sizes(world.stoch, world.classes, world.deter)
    w = core.leaves(state)
    _check_columns(w, "latent.", model.action_pad, sizes)
    embed, truth = images.encode(state, w, batch["image"], world)
    post, prior = core.observe(w, "latent.", embed, None, batch["is_first"], sizes, noise)
    kl, metrics = core.balanced_kl(post.logits, prior, world.kl_balance, 0.0)
    losses = {"image": images.image_loss(images.decode(state, w, post.feat, world), truth), "kl": kl}
    total = world.image_weight * losses["image"] + model.beta_z * kl
    lr = core.decayed(run.pretrain.lr, state.update, run.pretrain)
    norm = core.adam_step(state, w, total, core.named(state, ""), lr=lr, optim=run.optim)
    return core.report(losses, {f"latent/{key}": value for key, value in metrics.items()}, {"model": norm})


def online(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """Eq. 4 with the reward target r_t + lambda r_int_t (Eq. 6), then the behaviour, then the slow critic.

    Fine-tuning leaves encoder and action-free model as they are for ``freeze_updates``, then learns them at a share of the rate. The
    action-conditioned model observes [z, h] of the action-free one, after the embedding with ``embed_input``.
    """
    model, online = run.model, run.online
    world = model.world
    sizes = core.Sizes(world.stoch, world.classes, world.deter)

    w = core.leaves(state)
    for prefix in ("latent.", "dynamics."):
        _check_columns(w, prefix, model.action_pad, sizes)
    embed, truth = images.encode(state, w, batch["image"], world)
    latent, latent_prior = core.observe(w, "latent.", embed, None, batch["is_first"], sizes, noise)
    phi = latent.feat
    observed = torch.cat([embed, phi], -1) if model.embed_input else phi
    post, prior = core.observe(w, "dynamics.", observed, batch["action"], batch["is_first"], sizes, noise)
    latent_kl, latent_metrics = core.balanced_kl(latent.logits, latent_prior, world.kl_balance, model.free_nats)
    kl, metrics = core.balanced_kl(post.logits, prior, world.kl_balance, model.free_nats)
    bonus = core.intrinsic_bonus(state, phi, batch["is_first"])
    reward = core.mlp(w, "reward.", post.feat, world.layers)[..., 0]
    losses = {
        "image": images.image_loss(images.decode(state, w, post.feat, world), truth),
        "kl": kl,
        "latent_kl": latent_kl,
        "reward": core.behavioural_loss(reward, batch, bonus, model.intrinsic_weight),
    }
    total = world.image_weight * losses["image"] + model.beta_s * kl + model.beta_z_finetune * latent_kl
    ends = core.continuation_loss(w, post.feat, batch["is_terminal"], world.layers)
    total = total + world.reward_weight * losses["reward"] + sum(ends.values())
    loaded = set((run.load or "image,latent").split(","))
    first = ["image.encoder."]
    new = ["image.decoder.", "dynamics.", "reward.", "continuation."]
    (first if "latent" in loaded else new).append("latent.")
    held = run.stage == "finetune" and "image" in loaded
    rate = online.lr * (online.pretrained_lr_factor if held else 1.0)
    if held and state.update < online.freeze_updates:
        rate = 0.0
    norms = {
        "encoder": core.adam_step(state, w, total, core.named(state, *first), lr=rate, optim=run.optim),
        "model": core.adam_step(state, w, total, core.named(state, *new), lr=online.lr, optim=run.optim),
    }

    behaviour, imagined, more = core.behaviour_update(state, post, run, sizes, noise)
    norms |= more
    told = {f"dynamics/{key}": value for key, value in metrics.items()}
    told |= {f"latent/{key}": value for key, value in latent_metrics.items()} | {"bonus/mean": bonus.mean()}
    return core.report({**losses, **ends, **behaviour}, {**told, **imagined}, norms)
