"""DRP's updates written out from arXiv 2607.00808: Algorithm 1 (Eqs. 1, 2, 5, 6) and Algorithm 2 (Eqs. 3, 4, 7-12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from written_out import context, core, motion
from written_out.adapters import adapt
from written_out.ipv import learn_all, learn_online, loaded, reward_losses, sizes
from written_out.motion import under


def deconstruct(
    w: core.Weights, batch: Mapping[str, Tensor], noise: Any, model: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """a^agg, the losses of the motion encoder and their weights; the global code of Fig. 5b has no loss of its own."""
    weights = under(w, "motion")
    if model.motion_encoder == "global":
        return motion.global_code(weights, batch["flow"], model.dae), {}, {}
    numbers = noise.uniform((len(batch["is_first"]), batch["is_first"].shape[1] * model.dae.keypoints))
    rebuilds = model.recompose_weight > 0
    agg, losses = motion.recompose(weights, batch, numbers, model.dae, from_code=rebuilds)
    scales = {"masked": 1.0, **({"recompose": model.recompose_weight} if rebuilds else {})}
    return agg if model.joint_gradient else agg.detach(), losses, scales


def pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """Eqs. 5 and 6; all weights learn at one rate."""
    model, world, w = run.model, run.model.world, core.leaves(state)
    embed, around, truth = context.observe(state, w, batch, world, noise, erase=False)
    agg, losses, scales = deconstruct(w, batch, noise, model)
    z, prior = core.observe(w, "latent.", embed, agg, batch["is_first"], sizes(run), noise)
    (image,) = context.losses(state, w, [z.feat], around, truth, world, noise)
    kl, metrics = core.balanced_kl(z.logits, prior, world.kl_balance, 0.0)
    losses |= {"image": image, "kl": kl}
    scales |= {"image": world.image_weight, "kl": model.beta_z}
    norm = learn_all(state, w, losses, scales, run)
    reported = {f"latent/{name}": value for name, value in metrics.items()} | {"agg/std": agg.detach().std()}
    return core.report(losses, reported, {"model": norm})


def finetune(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any, pretrained: bool = True) -> dict[str, Tensor]:
    """Eqs. 7 to 9, then the behaviour; z and s are both decoded."""
    model, world, online, w = run.model, run.model.world, run.online, core.leaves(state)
    embed, around, truth = context.observe(state, w, batch, world, noise, erase=model.context_erasing)
    agg, losses, scales = deconstruct(w, batch, noise, model)
    z, z_prior = core.observe(w, "latent.", embed, agg, batch["is_first"], sizes(run), noise)
    z_kl, _ = core.balanced_kl(z.logits, z_prior, world.kl_balance, 0.0)  # Eq. 8 has the form of Eq. 6: no free nats
    seen = adapt(under(w, "adapter"), model.adapter, z.feat, stoch=world.stoch, classes=world.classes)
    seen = torch.cat([embed, seen], -1) if model.embed_input else seen
    s, s_prior = core.observe(w, "dynamics.", seen, batch["action"], batch["is_first"], sizes(run), noise)
    s_kl, s_metrics = core.balanced_kl(s.logits, s_prior, world.kl_balance, model.free_nats)
    z_image, s_image = context.losses(state, w, [z.feat, s.feat], around, truth, world, noise)
    rewards, metrics = reward_losses(state, w, s.feat, z.feat, batch, run)
    losses |= {"latent_image": z_image, "latent_kl": z_kl, "image": s_image, "kl": s_kl, **rewards}
    ends = core.continuation_loss(w, s.feat, batch["is_terminal"], world.layers)
    losses, scales = losses | ends, scales | dict.fromkeys(ends, 1.0)
    scales |= {"latent_image": world.image_weight, "image": world.image_weight, "kl": model.beta_s}
    scales["latent_kl"] = model.beta_z if model.beta_z_finetune is None else model.beta_z_finetune
    scales |= {"reward": world.reward_weight, "reward_representative": model.beta_r * world.reward_weight}
    # Motion encoder and latent dynamics learn slowly where they were loaded (4.4); what was loaded is frozen at first (IPV)
    slow, frozen = (online.pretrained_lr_factor, online.freeze_updates) if pretrained else (1.0, 0)
    old = [f"{name}." for name in ("motion", "latent") if name in loaded(run)]
    new = ["image.decoder.", "adapter.", "dynamics.", "reward.", "reward_representative.", "continuation."]
    new += [f"{name}." for name in ("motion", "latent") if name not in loaded(run)]
    groups = {
        **({"motion": (old, online.lr * slow, frozen)} if old else {}),
        "encoder": (["image.encoder.", "image.context_encoder."], online.lr, frozen if "image" in loaded(run) else 0),
        "model": (new, online.lr, 0),
    }
    metrics |= {f"dynamics/{name}": value for name, value in s_metrics.items()}
    return learn_online(state, w, losses, scales, groups, metrics, s, run, noise)
