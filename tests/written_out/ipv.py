"""IPV's updates written out from arXiv 2305.18499: pre-training without actions, and fine-tuning of the two models one above the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from written_out import context, core


def loaded(run: Any) -> set[str]:
    """What a checkpoint gives: the parts that are named, all of them where none is."""
    return set(run.load.split(",")) if run.load else {"motion", "image", "latent"}


def sizes(run: Any) -> core.Sizes:
    world = run.model.world
    return core.Sizes(world.stoch, world.classes, world.deter)


def pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """-ln p(o_t | z_t, c) + beta_z KL[q(z_t | z_{t-1}, o_t) || p(z_t | z_{t-1})]; all weights learn at one rate."""
    model, world, w = run.model, run.model.world, core.leaves(state)
    embed, around, truth = context.observe(state, w, batch, world, noise, erase=False)
    z, prior = core.observe(w, "latent.", embed, None, batch["is_first"], sizes(run), noise)
    (image,) = context.losses(state, w, [z.feat], around, truth, world, noise)
    kl, metrics = core.balanced_kl(z.logits, prior, world.kl_balance, 0.0)
    losses, scales = {"image": image, "kl": kl}, {"image": world.image_weight, "kl": model.beta_z}
    norm = learn_all(state, w, losses, scales, run)
    return core.report(losses, {f"latent/{name}": value for name, value in metrics.items()}, {"model": norm})


def finetune(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any, pretrained: bool = True) -> dict[str, Tensor]:
    """The objective of the paper's section 3.3: phi = feat(z) is what the model with actions observes, with the embedding on DMC."""
    model, world, online, w = run.model, run.model.world, run.online, core.leaves(state)
    embed, around, truth = context.observe(state, w, batch, world, noise, erase=model.context_erasing)
    z, z_prior = core.observe(w, "latent.", embed, None, batch["is_first"], sizes(run), noise)
    seen = torch.cat([embed, z.feat], -1) if model.embed_input else z.feat
    s, s_prior = core.observe(w, "dynamics.", seen, batch["action"], batch["is_first"], sizes(run), noise)
    (image,) = context.losses(state, w, [s.feat], around, truth, world, noise)
    z_kl, z_metrics = core.balanced_kl(z.logits, z_prior, world.kl_balance, model.free_nats)
    s_kl, s_metrics = core.balanced_kl(s.logits, s_prior, world.kl_balance, model.free_nats)
    rewards, metrics = reward_losses(state, w, s.feat, z.feat, batch, run)
    ends = core.continuation_loss(w, s.feat, batch["is_terminal"], world.layers)
    losses = {"image": image, "kl": s_kl, "latent_kl": z_kl, **rewards, **ends}
    scales = {"image": world.image_weight, "kl": model.beta_s, "latent_kl": model.beta_z_finetune}
    scales |= {"reward": world.reward_weight, "reward_representative": model.beta_r * world.reward_weight}
    scales |= dict.fromkeys(ends, 1.0)
    # One optimiser for the encoders and the model without actions, held back where the encoders were loaded
    held = pretrained and "image" in loaded(run)
    old, new = ["image.encoder.", "image.context_encoder."], ["image.decoder.", "dynamics.", "reward.", "reward_representative."]
    new.append("continuation.")
    (old if "latent" in loaded(run) else new).append("latent.")
    groups = {
        "encoder": (old, online.lr * (online.pretrained_lr_factor if held else 1.0), online.freeze_updates if held else 0),
        "model": (new, online.lr, 0),
    }
    metrics |= {f"latent/{name}": value for name, value in z_metrics.items()}
    metrics |= {f"dynamics/{name}": value for name, value in s_metrics.items()}
    return learn_online(state, w, losses, scales, groups, metrics, s, run, noise)


def reward_losses(
    state: Any, w: core.Weights, feat: Tensor, phi: Tensor, batch: Mapping[str, Tensor], run: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The representative head learns r at every position, the behavioural one r + lambda r_int (`core.behavioural_loss`)."""
    novel = core.intrinsic_bonus(state, phi, batch["is_first"])
    layers = run.model.world.layers
    behavioural = core.mlp(w, "reward.", feat, layers)[..., 0]
    representative = core.mlp(w, "reward_representative.", feat, layers)[..., 0]
    losses = {
        "reward": core.behavioural_loss(behavioural, batch, novel, run.model.intrinsic_weight),
        "reward_representative": (0.5 * (representative - batch["reward"]) ** 2).mean(),
    }
    return losses, {"bonus/mean": novel.mean()}


def total(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """The weighted sum; each loss has its weight."""
    assert losses.keys() == scales.keys()
    return torch.stack([losses[name] * scales[name] for name in losses]).sum()


def learn_all(state: Any, w: core.Weights, losses: Mapping[str, Tensor], scales: Mapping[str, float], run: Any) -> Tensor:
    """Pre-training: one optimiser over everything. Returns its gradient norm."""
    lr = core.decayed(run.pretrain.lr, state.update, run.pretrain)
    return core.adam_step(state, w, total(losses, scales), core.named(state, ""), lr=lr, optim=run.optim)


def learn_online(
    state: Any,
    w: core.Weights,
    losses: Mapping[str, Tensor],
    scales: Mapping[str, float],
    groups: Mapping[str, tuple[Sequence[str], float, int]],
    metrics: Mapping[str, Tensor],
    start: core.State,
    run: Any,
    noise: Any,
) -> dict[str, Tensor]:
    """World model (each group: prefixes, rate, frozen updates), then imagination over s with the behavioural head, actor, critic."""
    whole, norms = total(losses, scales), {}
    for name, (prefixes, rate, frozen) in groups.items():
        lr = rate if state.update >= frozen else 0.0
        norms[name] = core.adam_step(state, w, whole, core.named(state, *prefixes), lr=lr, optim=run.optim)
    behaviour, imagined, more = core.behaviour_update(state, start, run, sizes(run), noise)
    norms |= more
    return core.report({**losses, **behaviour}, {**metrics, **imagined}, norms)
