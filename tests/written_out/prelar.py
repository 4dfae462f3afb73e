"""PreLAR's updates, written out from what its paper and release describe: inverse dynamics with a learnable action, then a mapping network.

"PreLAR: World Model Pre-training with Learnable Action Representation", ECCV 2024. Z numbers of a latent action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from written_out import core, images, ipv

Parts = tuple[Tensor, ...]
"""Distribution of latent actions (B, T - 1, ...): mean and deviation; logits of one-hots; or the numbers themselves."""


def inverse(state: Any, w: core.Weights, batch: Mapping[str, Tensor], truth: Tensor, model: Any) -> Parts:
    """Frames t - 1 and t -> what led from one to the other, t = 1..T-1."""
    shape, blocks = batch["is_first"].shape, truth.shape[1] == 48
    x = truth.unflatten(0, shape)
    before, after = x[:, :-1], x[:, 1:]
    if model.action_input == "flow":
        field = batch["flow"][:, 1:].double() * 16 / batch["flow"].shape[2]  # (B, T - 1, S, S, 2)
        given = torch.stack([field[..., c] for c in (0, 1)], 2)
        if blocks:
            corners = [field[:, :, row::4, column::4, c] for c in (0, 1) for row in range(4) for column in range(4)]
            given = torch.stack(corners, 2)
    else:
        parts = {"concat": [before, after], "diff": [after - before], "catdiff": [before, after, after - before]}
        given = torch.cat(parts[model.action_input], 2)
    seen = images.resnet_encoder(state, w, "inverse.encoder.", given.flatten(0, 1))[0]
    out = core.linear(w, "inverse.out", core.elu(core.linear(w, "inverse.hidden", seen))).unflatten(0, before.shape[:2])
    if model.action_output == "gaussian":
        size = out.shape[-1] // 2
        return out[..., :size], 2 * core.sigmoid(out[..., size:] / 2)
    if model.action_output == "discrete":
        return (out.unflatten(-1, (model.action_codes, model.action_classes)),)
    return (out,)


def drawn(parts: Parts, model: Any, noise: Any) -> Tensor:
    """A latent action of each distribution, (B, T - 1, Z)."""
    if model.action_output == "gaussian":
        return parts[0] + parts[1] * noise.normal(parts[0].shape)
    if model.action_output == "discrete":
        return core.one_hot_sample(parts[0], noise.uniform(parts[0].shape)).flatten(-2)
    return parts[0]


def divergence(one: Parts, two: Parts, model: Any) -> Tensor:
    """KL(one || two); numbers count as normals of deviation 1: (B, T - 1)."""
    if model.action_output == "discrete":
        return core.kl_divergence(one[0], two[0])
    mean, std = one if len(one) == 2 else (one[0], torch.ones_like(one[0]))
    other, spread = two if len(two) == 2 else (two[0], torch.ones_like(two[0]))
    return (torch.log(spread / std) + (std**2 + (mean - other) ** 2) / (2 * spread**2) - 0.5).sum(-1)


def bottleneck(parts: Parts, model: Any) -> Tensor:
    """KL to N(0, action_prior_std^2), of one-hots to the uniform distribution: mean over videos and positions."""
    if model.action_output == "discrete":
        return (model.action_codes * math.log(model.action_classes) - core.entropy(parts[0])).mean()
    prior = (torch.zeros_like(parts[0]), torch.full_like(parts[1], model.action_prior_std))
    return divergence(parts, prior, model).mean()


def consistency(of_state: Tensor, of_action: Tensor, model: Any) -> tuple[Tensor, Tensor]:
    """The loss over all pairs of steps, and the agreement of the two orders over pairs that differ in the state."""
    count = len(of_state)
    logs_of = torch.log(1 + of_action)
    scaled = logs_of * model.consistency_sharpness / logs_of.detach().std()
    signs = [[float(torch.sign(x - y)) for y in of_state] for x in of_state]
    squares, logs, agree, ordered = torch.tensor(0.0), torch.tensor(0.0), 0.0, 0
    ranks = []
    for i in range(count):
        rank = torch.tensor(0.0)
        for j in range(count):
            apart, wanted = scaled[i] - scaled[j], signs[i][j]
            found = torch.tanh(apart) if model.consistency == "tanh" else torch.sign(apart)
            squares = squares + (wanted - found) ** 2 / count**2
            if wanted:
                logs, ordered = logs + torch.log(1 + torch.exp(-wanted * apart)), ordered + 1
                agree += wanted * float(torch.sign(apart.detach()))
            rank = rank + core.sigmoid(apart)
        ranks.append(rank)
    if model.consistency == "logistic":
        loss = logs / ordered
    elif model.consistency == "pearson":
        true, soft = torch.tensor([sum(row) for row in signs]), torch.stack(ranks)
        true, soft = true - true.mean(), soft - soft.mean()
        loss = 1 - (true * soft).sum() / torch.sqrt((true**2).sum() * (soft**2).sum())
    else:
        loss = squares
    return loss, torch.tensor(agree / ordered)


def pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """Image loss, balanced KL of the state, KL of the latent action, consistency; one group of weights."""
    model, world, w = run.model, run.model.world, core.leaves(state)
    sizes = ipv.sizes(run)
    embed, truth = images.encode(state, w, batch["image"], world)
    parts = inverse(state, w, batch, truth, model)
    action = drawn(parts, model, noise)
    action = torch.cat([torch.zeros_like(action[:, :1]), action], 1)  # nothing led to the first frame
    post, prior = core.observe(w, "latent.", embed, action, batch["is_first"], sizes, noise)
    kl, metrics = core.balanced_kl(post.logits, prior, world.kl_balance, 0.0)
    side = batch["image"].shape[2] // 16
    losses = {"image": images.image_loss(images.decode(state, w, post.feat, world, side), truth), "kl": kl}
    scales = {"image": world.image_weight, "kl": model.beta}
    told = {f"latent/{key}": value for key, value in metrics.items()} | {"action/std": action[:, 1:].detach().std()}
    if model.action_output != "deterministic":
        losses["action_kl"], scales["action_kl"] = bottleneck(parts, model), model.beta_action
    if model.consistency != "none":
        # Each video has the latent actions of another one, at the same positions. State distances are targets.
        order = noise.uniform((len(action),)).argsort()
        of_state = []
        for b in range(len(action)):
            for t in range(1, action.shape[1]):
                stoch, deter = post.stoch[b, t - 1].detach(), post.deter[b, t - 1].detach()
                other = core.recurrent(w, "latent.", stoch[None], deter[None], action[order[b], t].detach()[None])
                logits = core.prior_logits(w, "latent.", other, sizes)[0]
                change = core.kl_divergence(prior[b, t].detach(), logits.detach())
                same = torch.allclose(action[order[b], t], action[b, t], rtol=0, atol=1e-9)
                of_state.append(change * (not same))
        of_action = divergence(parts, tuple(part[order] for part in parts), model).flatten()
        losses["consistency"], told["action/agreement"] = consistency(torch.stack(of_state), of_action, model)
        scales["consistency"] = model.consistency_weight
    norm = ipv.learn_all(state, w, losses, scales, run)
    return core.report(losses, told, {"model": norm})


def mapped(w: core.Weights, action: Tensor, model: Any) -> Tensor:
    """The latent action of a real one: one hidden layer; of one-hots the most likely classes."""
    out = core.mlp(w, "mapping.net.", action, 1)
    if model.action_output != "discrete":
        return out
    logits = out.unflatten(-1, (model.action_codes, model.action_classes))
    return core.one_hot_sample(logits, torch.full_like(logits, 0.5)).flatten(-2)  # the same noise for all classes is none


def plain_rewards(w: core.Weights, feat: Tensor, reward: Tensor, layers: int) -> dict[str, Tensor]:
    """Naive fine-tuning: both heads learn r at every position."""
    heads = ("reward", "reward_representative")
    return {name: (0.5 * (core.mlp(w, f"{name}.", feat, layers)[..., 0] - reward) ** 2).mean() for name in heads}


def finetune(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """The same RSSM under mapped actions, two reward heads, then the behaviour in imagination."""
    model, world, online, w = run.model, run.model.world, run.online, core.leaves(state)
    embed, truth = images.encode(state, w, batch["image"], world)
    action = mapped(w, batch["action"], model)
    post, prior = core.observe(w, "latent.", embed, action, batch["is_first"], ipv.sizes(run), noise)
    kl, metrics = core.balanced_kl(post.logits, prior, world.kl_balance, model.free_nats)
    if model.intrinsic_weight:
        rewards, more = ipv.reward_losses(state, w, post.feat, embed, batch, run)
    else:
        rewards, more = plain_rewards(w, post.feat, batch["reward"], world.layers), {"bonus/mean": torch.zeros(())}
    side = batch["image"].shape[2] // 16
    losses = {"image": images.image_loss(images.decode(state, w, post.feat, world, side), truth), "kl": kl, **rewards}
    scales = {"image": world.image_weight, "kl": model.beta, "reward": world.reward_weight}
    scales["reward_representative"] = model.beta_r * world.reward_weight
    ends = core.continuation_loss(w, post.feat, batch["is_terminal"], world.layers)
    losses, scales = losses | ends, scales | dict.fromkeys(ends, 1.0)
    held = "image" in ipv.loaded(run)
    first, new = ["image.encoder."], ["image.decoder.", "mapping.", "reward.", "reward_representative."]
    new.append("continuation.")
    (first if "latent" in ipv.loaded(run) and not model.free_latent else new).append("latent.")
    rate = online.lr * (online.pretrained_lr_factor if held else 1.0)
    if held and state.update < online.freeze_updates:
        rate = 0.0
    whole = ipv.total(losses, scales)
    norms = {
        "encoder": core.adam_step(state, w, whole, core.named(state, *first), lr=rate, optim=run.optim),
        "model": core.adam_step(state, w, whole, core.named(state, *new), lr=online.lr, optim=run.optim),
    }
    behaviour, imagined, grads = core.behaviour_update(
        state, post, run, ipv.sizes(run), noise, "latent.", lambda weights, chosen: mapped(weights, chosen, model)
    )
    told = {f"latent/{key}": value for key, value in metrics.items()} | more
    return core.report({**losses, **behaviour}, {**told, **imagined}, {**norms, **grads})
