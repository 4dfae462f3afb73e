"""Dynamics, heads, imagination and optimiser that IPV and DRP share, written out in float64 from the equations and the weights' meaning.

Latents are those of DreamerV2 (arXiv 2010.02193): S categoricals of C classes beside a GRU state of D values, sampled straight-through.
Actor and critic are Eqs. 10-12 of DRP (arXiv 2607.00808).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from written_out.context import Draw, elu
from written_out.motion import Weights, layer_norm, linear, under


def one_hot(logits: Tensor, uniform: Tensor) -> Tensor:
    """A sample by the Gumbel maximum: one-hot in value, the probabilities' gradient."""
    noise = -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
    probability = logits.softmax(-1)
    hot = (logits + noise).argmax(-1, keepdim=True) == torch.arange(logits.shape[-1])
    return hot.double() + probability - probability.detach()


def feature(stoch: Tensor, deter: Tensor) -> Tensor:
    """Latents (..., S, C) and state (..., D) side by side."""
    return torch.cat([stoch.flatten(-2), deter], -1)


class Dynamics:
    """h_t = GRU(h_{t-1}, z_{t-1}, a_t); prior p(z_t | h_t); posterior q(z_t | h_t, e_t)."""

    def __init__(self, weights: Weights, world: Any) -> None:
        self.weights, self.world = weights, world

    def step(self, stoch: Tensor, deter: Tensor, action: Tensor) -> Tensor:
        """The next h; an action with fewer columns than the weights is widened by zeros."""
        columns = self.weights["img_in.weight"].shape[1] - self.world.stoch * self.world.classes
        action = torch.cat([action, action.new_zeros(len(action), columns - action.shape[1])], 1)
        given = elu(linear(self.weights, "img_in", torch.cat([stoch.flatten(1), action], 1)))
        parts = layer_norm(self.weights, "gru_norm", linear(self.weights, "gru", torch.cat([given, deter], 1)), 1e-3)
        reset, candidate, update = parts.chunk(3, 1)
        new = torch.tanh(torch.sigmoid(reset) * candidate)
        share = torch.sigmoid(update - 1)
        return share * new + (1 - share) * deter

    def logits(self, which: str, x: Tensor) -> Tensor:
        """Logits (B,S,C) of "prior" or "post"."""
        out = linear(self.weights, f"{which}_out", elu(linear(self.weights, f"{which}_in", x)))
        return out.unflatten(-1, (self.world.stoch, self.world.classes))

    def observe(self, embed: Tensor, action: Tensor, is_first: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        """Posterior logits, latents, states and prior logits, each (B,T,...). At an episode's start state and action are zero."""
        batch, time = is_first.shape
        stoch = embed.new_zeros(batch, self.world.stoch, self.world.classes)
        deter, out = embed.new_zeros(batch, self.world.deter), []
        for t in range(time):
            keep = 1 - is_first[:, t, None].double()
            deter = self.step(stoch * keep[..., None], deter * keep, action[:, t] * keep)
            post = self.logits("post", torch.cat([deter, embed[:, t]], 1))
            stoch = one_hot(post, uniform[t])
            out.append((post, stoch, deter, self.logits("prior", deter)))
        return tuple(torch.stack(parts, 1) for parts in zip(*out, strict=True))

    def imagine(self, stoch: Tensor, deter: Tensor, action: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The next latent and state, the latent from the prior."""
        deter = self.step(stoch, deter, action)
        return one_hot(self.logits("prior", deter), uniform), deter


def divergence(post: Tensor, prior: Tensor) -> Tensor:
    """KL(post || prior): sum over latents, mean over positions."""
    return (post.softmax(-1) * (post.log_softmax(-1) - prior.log_softmax(-1))).sum((-1, -2)).mean()


def kl(post: Tensor, prior: Tensor, balance: float, free: float) -> Tensor:
    """balance max(KL(sg post || prior), free) + (1 - balance) max(KL(post || sg prior), free)."""
    least = torch.tensor(free, dtype=torch.float64)
    to_prior, to_post = divergence(post.detach(), prior), divergence(post, prior.detach())
    return balance * torch.maximum(to_prior, least) + (1 - balance) * torch.maximum(to_post, least)


def head(weights: Weights, x: Tensor) -> Tensor:
    """Linear layers with ELU between them."""
    layers = sorted({int(name.split(".")[0]) for name in weights})
    for layer in layers:
        x = linear(weights, str(layer), x)
        x = elu(x) if layer != layers[-1] else x
    return x


def below(x: Tensor) -> Tensor:
    """The standard normal's probability below x."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def policy(weights: Weights, feat: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A reparameterised action of the normal truncated to [-1, 1], and the distribution's entropy."""
    mean, deviation = head(weights, feat).chunk(2, 1)
    mean, deviation = torch.tanh(mean), 2 * torch.sigmoid(deviation / 2) + 0.1
    low, high = (-1 - mean) / deviation, (1 - mean) / deviation
    mass = below(high) - below(low)
    quantile = (below(low) + uniform * mass).clamp(1e-6, 1 - 1e-6)
    action = mean + deviation * math.sqrt(2) * torch.erfinv(2 * quantile - 1)
    action = action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()
    density_low, density_high = ((-0.5 * x * x).exp() / math.sqrt(2 * math.pi) for x in (low, high))
    entropy = 0.5 * math.log(2 * math.pi * math.e) + (deviation * mass).log()
    entropy = entropy + (low * density_low - high * density_high) / (2 * mass)
    return action, entropy.sum(1)


def behaviour(weights: Weights, start: tuple[Tensor, Tensor], model: Any, actions: int, draw: Draw) -> dict[str, Tensor]:
    """Losses of actor and critic along an imagined trajectory; the reward is the head "reward", the values are the slow critic's."""
    settings, horizon = model.behaviour, model.behaviour.horizon
    rssm = Dynamics(under(weights, "dynamics"), model.world)
    stoch, deter = start
    feats, entropies = [feature(stoch, deter)], []
    for _ in range(horizon):
        action, entropy = policy(under(weights, "behaviour.actor.net"), feats[-1].detach(), draw(len(deter), actions))
        stoch, deter = rssm.imagine(stoch, deter, action, draw(len(deter), model.world.stoch, model.world.classes))
        feats.append(feature(stoch, deter))
        entropies.append(entropy)
    rewards = [head(under(weights, "reward.net"), feat).squeeze(1) for feat in feats]
    values = [head(under(weights, "behaviour.slow_critic.net"), feat).squeeze(1) for feat in feats]
    returns = {horizon: values[horizon]}
    for i in range(horizon - 1, -1, -1):  # Eq. 10
        ahead = (1 - settings.lambda_) * values[i + 1] + settings.lambda_ * returns[i + 1]
        returns[i] = rewards[i] + settings.discount * ahead
    critic = []
    for i in range(horizon):  # Eq. 11
        value = head(under(weights, "behaviour.critic.net"), feats[i].detach()).squeeze(1)
        critic.append(settings.discount**i * 0.5 * (value - returns[i].detach()).square().mean())
    actor = [
        -(settings.discount**i) * (returns[i + 1] + settings.entropy * entropies[i]).mean() for i in range(horizon - 1)
    ]  # Eq. 12
    return {"actor": torch.stack(actor).mean(), "critic": torch.stack(critic).mean()}


class Adam:
    """Adam over one group: the gradients' common norm is clipped first, then weight decay is added to them."""

    def __init__(self, optim: Any) -> None:
        self.optim, self.count = optim, 0
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    def step(self, weights: Weights, gradients: Mapping[str, Tensor], rate: float) -> tuple[float, dict[str, Tensor]]:
        """The norm before clipping, and the weights afterwards."""
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        self.count += 1
        out = {}
        for name, gradient in gradients.items():
            g = gradient * min(1.0, self.optim.clip / (norm + 1e-6)) + self.optim.weight_decay * weights[name].detach()
            self.first[name] = 0.9 * self.first.get(name, torch.zeros_like(g)) + 0.1 * g
            self.second[name] = 0.999 * self.second.get(name, torch.zeros_like(g)) + 0.001 * g * g
            mean, square = self.first[name] / (1 - 0.9**self.count), self.second[name] / (1 - 0.999**self.count)
            out[name] = weights[name].detach() - rate * mean / (square.sqrt() + self.optim.eps)
        return norm, out
