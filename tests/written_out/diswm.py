"""DisWM's updates, written out from its paper (arXiv 2503.08751) and release: beta-VAE, Gaussian RSSM, distillation, behaviour.

Shapes: B sequences, T positions, N states, Z numbers of a code, S latents, D deter, A actions, F = S + D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from written_out import core

# 1. Code ----------------------------------------------------------------------------------------------------------------------


def _layers(w: core.Weights, prefix: str) -> list[str]:
    """Names of a chain's layers in order."""
    numbers = {int(name.removeprefix(f"{prefix}net.").split(".")[0]) for name in w if name.startswith(f"{prefix}net.")}
    return [f"{prefix}net.{number}" for number in sorted(numbers)]


def encoder(w: core.Weights, prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, S, S) -> mean and log variance (N, Z): convolutions of stride 2, one over 4 x 4 cells, a linear layer."""
    *halving, whole, last = _layers(w, prefix)
    for name in halving:
        x = core.elu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1))
    x = core.elu(F.conv2d(x, w[f"{whole}.weight"], w[f"{whole}.bias"]))
    out = core.linear(w, last, x[:, :, 0, 0])
    size = out.shape[1] // 2
    return out[:, :size], out[:, size:]


def decoder(w: core.Weights, prefix: str, feat: Tensor) -> Tensor:
    """Features (N, F) -> pictures (N, 3, S, S), through Z numbers."""
    narrow, wide, first, *doubling = _layers(w, prefix)
    x = core.elu(core.linear(w, wide, core.elu(core.linear(w, narrow, feat))))[:, :, None, None]
    x = F.conv_transpose2d(x, w[f"{first}.weight"], w[f"{first}.bias"])
    for name in doubling:
        x = F.conv_transpose2d(core.elu(x), w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
    return x


# 2. Gaussian states -----------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """mean, std and sample (..., S), deter (..., D)."""

    mean: Tensor
    std: Tensor
    stoch: Tensor
    deter: Tensor

    @property
    def feat(self) -> Tensor:
        """Model state [s, h], (..., F)."""
        return torch.cat([self.stoch, self.deter], -1)


def recurrent(w: core.Weights, state: State, action: Tensor | None) -> Tensor:
    """h_t of the state before (N, ...) and actions (N, A); without actions there are no columns for them."""
    given = state.stoch if action is None else torch.cat([state.stoch, action], 1)
    u = core.elu(core.linear(w, "dynamics.img_in", given))
    parts = core.linear(w, "dynamics.gru", torch.cat([u, state.deter], 1))
    parts = core.layer_norm(parts, w["dynamics.gru_norm.weight"], w["dynamics.gru_norm.bias"], 1e-5)
    size = state.deter.shape[1]
    gate = core.sigmoid(parts[:, 2 * size :] - 1)
    candidate = torch.tanh(core.sigmoid(parts[:, :size]) * parts[:, size : 2 * size])
    return gate * candidate + (1 - gate) * state.deter


def distribution(w: core.Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (..., S) by the layers ``name``_in and ``name``_out."""
    out = core.linear(w, f"dynamics.{name}_out", core.elu(core.linear(w, f"dynamics.{name}_in", x)))
    size = out.shape[-1] // 2
    return out[..., :size], 2 * core.sigmoid(out[..., size:] / 2) + 0.1


def drawn(mean: Tensor, std: Tensor, deter: Tensor, noise: Any) -> State:
    """A state (N, ...) whose latents are sampled, or without noise are means."""
    stoch = mean if noise is None else mean + std * noise.normal((*mean.shape, 1))[..., 0]
    return State(mean, std, stoch, deter)


def observe(
    w: core.Weights, code: Tensor, action: Tensor | None, is_first: Tensor, noise: Any
) -> tuple[State, tuple[Tensor, Tensor]]:
    """Posterior states (B, T, ...) and the prior's mean and deviation (B, T, S) of codes (B, T, Z)."""
    batch, time = is_first.shape
    size, latents = w["dynamics.prior_in.weight"].shape[1], w["dynamics.prior_out.weight"].shape[0] // 2
    zeros = torch.zeros(batch, latents)
    state, states, priors = State(zeros, zeros, zeros, torch.zeros(batch, size)), [], []
    for t in range(time):
        keep = (~is_first[:, t]).double().unsqueeze(1)
        before = State(zeros, zeros, state.stoch * keep, state.deter * keep)
        deter = recurrent(w, before, None if action is None else action[:, t] * keep)
        priors.append(distribution(w, "prior", deter))
        state = drawn(*distribution(w, "post", torch.cat([deter, code[:, t]], 1)), deter, noise)
        states.append(state)
    stacked = State(*(torch.stack(x, 1) for x in zip(*states, strict=True)))
    return stacked, (torch.stack([p[0] for p in priors], 1), torch.stack([p[1] for p in priors], 1))


def gaussian_kl(mean: Tensor, std: Tensor, other: Tensor, spread: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other, spread^2)), summed over the last dimension."""
    return (torch.log(spread / std) + (std**2 + (mean - other) ** 2) / (2 * spread**2) - 0.5).sum(-1)


# 3. World model ---------------------------------------------------------------------------------------------------------------


def observed(
    w: core.Weights, batch: Mapping[str, Tensor], action: Tensor | None, noise: Any, run: Any, sample: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], State, Tensor, Tensor]:
    """Losses and metrics of both stages, states, sampled codes (B*T, Z) and pictures (B*T, 3, S, S)."""
    model, shape = run.model, batch["is_first"].shape
    x = batch["image"].flatten(0, 1).permute(0, 3, 1, 2).double() / 255 - 0.5
    mean, log_variance = encoder(w, "encoder.", x)
    code = mean + torch.exp(log_variance / 2) * noise.normal(mean.shape)
    state, prior = observe(w, code.unflatten(0, shape), action, batch["is_first"], noise if sample else None)
    floor = torch.tensor(model.kl_free)
    to_prior = gaussian_kl(state.mean.detach(), state.std.detach(), *prior).mean()
    to_post = gaussian_kl(state.mean, state.std, *(p.detach() for p in prior)).mean()
    pictures = decoder(w, "decoder.", state.feat.flatten(0, 1))
    losses = {
        "image": 0.5 * ((pictures - x) ** 2).sum((1, 2, 3)).mean(),
        "kl": model.kl_balance * torch.maximum(to_prior, floor) + (1 - model.kl_balance) * torch.maximum(to_post, floor),
        "code_kl": 0.5 * (mean**2 + torch.exp(log_variance) - 1 - log_variance).sum(1).mean(),
    }
    metrics = {
        "dynamics/kl": to_prior,
        "dynamics/post_entropy": (0.5 * math.log(2 * math.pi * math.e) + torch.log(state.std)).sum(-1).mean(),
        "code/std": torch.exp(log_variance / 2).mean(),
    }
    return losses, metrics, state, code, x


def weights_of(model: Any) -> dict[str, float]:
    """The weights of the losses of both stages."""
    return {"image": model.image_weight, "kl": model.beta, "code_kl": model.beta_code}


def summed(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    return torch.stack([losses[name] * scales[name] for name in losses]).sum()


MODEL = ("encoder.", "dynamics.", "decoder.")


def pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """No actions; with ``pretrain_means`` states are means."""
    w = core.leaves(state)
    losses, metrics, *_ = observed(w, batch, None, noise, run, not run.model.pretrain_means)
    lr = core.decayed(run.pretrain.lr, state.update, run.pretrain)
    norm = core.adam_step(state, w, summed(losses, weights_of(run.model)), core.named(state, *MODEL), lr=lr, optim=run.optim)
    return core.report(losses, metrics, {"model": norm})


def weight(model: Any, steps: int) -> float:
    """eta after ``steps`` agent steps."""
    if not model.distillation_steps:
        return float(model.distillation)
    if not model.cross_domain:
        return float(model.distillation) * max(1 - steps / model.distillation_steps, 0.1)
    if steps < model.distillation_steps:
        return 0.0
    return float(model.distillation) * max(2 - steps / model.distillation_steps, 0.1)


def finetune(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """World model with actions, reward, and the teacher's codes as targets; then the behaviour in imagination."""
    model, w = run.model, core.leaves(state)
    losses, metrics, states, code, x = observed(w, batch, batch["action"], noise, run, True)
    predicted = core.mlp(w, "reward.", states.feat, model.reward_layers)[..., 0]
    losses["reward"] = 0.5 * ((predicted - batch["reward"]) ** 2).mean()
    ends = core.continuation_loss(w, states.feat, batch["is_terminal"], model.reward_layers)
    losses |= ends
    scales = {**weights_of(model), "reward": model.reward_weight, **dict.fromkeys(ends, 1.0)}
    if run.stage == "finetune" and model.distillation:
        mean, log_variance = (part.detach() for part in encoder(w, "teacher.", x))
        teacher = torch.softmax(mean + torch.exp(log_variance / 2) * noise.normal(mean.shape), 1)
        student = torch.softmax(code, 1)
        distance = (teacher * (torch.log(teacher) - torch.log(student))).sum(1).mean()
        eta = weight(model, int(state.weights["agent_steps"]))
        losses["distillation"], scales["distillation"] = eta * model.distillation_frames * distance, 1.0
        metrics |= {"distillation/kl": distance, "distillation/weight": torch.tensor(eta)}
    names = core.named(state, *MODEL, "reward.", "continuation.")
    norms = {"model": core.adam_step(state, w, summed(losses, scales), names, lr=run.online.lr, optim=run.optim)}
    starts = State(*(part.detach().flatten(0, 1) for part in states))
    behaviour, imagined, found = behaviour_update(state, starts, run, noise)
    state.weights["agent_steps"] = torch.tensor(5 * (state.update + 1))  # without an environment
    return core.report({**losses, **behaviour}, {**metrics, **imagined}, {**norms, **found})


def behaviour_update(
    state: Any, start: State, run: Any, noise: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """`core.behaviour_update` with Gaussian states and heads of different depths."""
    model, behaviour, w = run.model, run.model.behaviour, core.leaves(state)
    horizon, current, feats, entropies = behaviour.horizon, start, [start.feat], []
    for _ in range(horizon):
        policy = core.TruncatedNormal.of(core.mlp(w, "behaviour.actor.", feats[-1].detach(), model.layers))
        entropies.append(policy.entropy())
        deter = recurrent(w, current, policy.sample(noise.uniform(policy.mean.shape)))
        current = drawn(*distribution(w, "prior", deter), deter, noise)
        feats.append(current.feat)
    feat = torch.stack(feats)  # (H+1, N, F)
    rewards = core.mlp(w, "reward.", feat, model.reward_layers)[..., 0]
    slow = core.mlp(w, "behaviour.slow_critic.", feat, model.critic_layers)[..., 0]
    gamma, weight, told = core.discounts(w, feat, behaviour.discount, model.reward_layers)
    returns = core.lambda_returns(rewards, slow, gamma, behaviour.lambda_)
    actor, critic, values = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
    for i in range(horizon):
        if i + 1 < horizon:
            actor = actor - (weight[i] * (returns[i + 1] + behaviour.entropy * entropies[i])).mean() / (horizon - 1)
        value = core.mlp(w, "behaviour.critic.", feats[i].detach(), model.critic_layers)[..., 0]
        critic = critic + (weight[i] * 0.5 * (value - returns[i].detach()) ** 2).mean() / horizon
        values = values + value.mean() / horizon
    losses = {"actor": actor, "critic": critic}
    metrics = {
        "imagined/reward": rewards.mean(),
        "imagined/return": returns[:-1].mean(),
        "imagined/value": values,
        "actor/entropy": torch.stack(entropies).mean(),
        **told,
    }
    norms = {}
    for name, lr in (("actor", run.online.actor_lr), ("critic", run.online.critic_lr)):
        norms[name] = core.adam_step(state, w, losses[name], core.named(state, f"behaviour.{name}."), lr=lr, optim=run.optim)
    core.copy_slow_critic(state, behaviour.slow_critic_every)
    return losses, metrics, norms
