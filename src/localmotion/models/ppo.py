"""Proximal policy optimisation over continuous actions: advantages, losses, and the heads that learn by reward.

Papers: PPO arXiv 1707.06347 (Eq. 7, with the normal distribution); generalised advantage estimation arXiv 1506.02438 (Eq. 16);
clipped actions arXiv 1802.07564; a policy whose action is the mean of a decoded latent action and of a new head, LAPO arXiv 2312.10812.

The losses are pure: tensors in, losses and metrics out. `methods.latent_stages` makes passes of them.

Shapes: B environments, T positions of a rollout, N rows, F features, A actions. Position t of a batch has the action that LED TO frame t
(docs/decisions/0001), so the step from frame t has action, reward and extras at position t + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from localmotion import ranks
from localmotion.limits import Limits, at_least, shares
from localmotion.models.latent_windows import every, pictures, r_squared, stacks, starts, whole

EXTRAS: Mapping[str, tuple[int, ...]] = {"log_prob": (), "value": ()}
"""`Method.extras` of a method that learns with `ppo_losses`."""


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO. Defaults are those of LAPO's release where it has them."""

    discount: float = 0.999
    """Discount of the return for each agent step."""
    lambda_: float = 0.95
    """Decay of the averages over longer returns (generalised advantage estimation)."""
    ratio_clip: float = 0.2
    """How far the probability of an action may move from that with which it was taken, before it has no gradient."""
    value_weight: float = 0.5
    """Weight of the error of values."""
    entropy: float = 0.0025
    """Weight of the entropy of actions."""
    reward_scale: float = 1.0
    """Factor on rewards, so that values are of the order of 1 to 10."""
    LIMITS: ClassVar[Limits] = {
        **at_least(0, "ratio_clip", "value_weight", "entropy", "reward_scale"),
        **shares("discount", "lambda_"),
    }


@dataclass(frozen=True)
class DecoderPPOConfig(PPOConfig):
    """Settings of PPO with a decoder of latent actions beside a new head (LAPO)."""

    log_std: float = -0.5
    """Logarithm of the standard deviation of actions, at the start. It is learned."""
    head_share: float = 0.5
    """Share of the new head in the mean action, above 0 and at most 1; the decoder has the rest. 1: plain PPO, the decoder is not used."""
    decoder_lr: float = 1e-3
    """Learning rate of the decoder."""
    decoder_until: float = 0.1
    """Share of the run in which the decoder learns from latent actions of the inverse model. 0: it stays as a `decode` run left it."""
    LIMITS: ClassVar[Limits] = {
        **PPOConfig.LIMITS,
        **at_least(0, "decoder_lr"),
        **shares("decoder_until"),
        "head_share": (math.nextafter(0, 1), 1.0),
    }


# 1. Probabilities and advantages ----------------------------------------------------------------------------------------------


def clipped_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability (...) of actions (..., A) that are a normal sample clipped to [-1, 1], summed over dimensions.

    Inside the range it is the density. At an end it is the probability that the sample lies beyond that end (arXiv 1802.07564). With the
    density of the sample in its place, the policy would also learn from how far beyond the end a sample was, which changed nothing.
    """
    std = log_std.exp()
    inside = -0.5 * ((action - mean) / std).square() - log_std - 0.5 * math.log(2 * math.pi)
    above, below = torch.special.log_ndtr((mean - 1) / std), torch.special.log_ndtr((-1 - mean) / std)
    return torch.where(action >= 1, above, torch.where(action <= -1, below, inside)).sum(-1)


def normal_entropy(log_std: Tensor) -> Tensor:
    """Entropy () in nats of a normal sample before clipping, summed over dimensions (A,)."""
    return (log_std + 0.5 * (1 + math.log(2 * math.pi))).sum()


def advantages(reward: Tensor, value: Tensor, terminal: Tensor, inside: Tensor, *, discount: float, lambda_: float) -> Tensor:
    """Generalised advantage estimates (B, n) of n steps.

        d_t = r_t + discount (1 - terminal_t) V_{t+1} - V_t,    A_t = d_t + discount lambda (1 - terminal_t) A_{t+1}

    ``reward`` (B, n); ``value`` (B, n + 1) of the frames before the steps and after the last one; ``terminal`` (B, n): the episode ended
    with this step, so nothing follows; ``inside`` (B, n): false where an episode begins instead of a step. A_t is 0 there, so nothing of
    an episode enters the one before. The last step of an episode that a time limit ended is not terminal: the value of its last frame
    counts.
    """
    live = discount * (1 - terminal.to(value.dtype))
    delta = reward + live * value[:, 1:] - value[:, :-1]
    found, following = [], torch.zeros_like(value[:, 0])
    for t in reversed(range(reward.shape[1])):
        following = torch.where(inside[:, t], delta[:, t] + lambda_ * live[:, t] * following, 0.0)
        found.append(following)
    return torch.stack(found[::-1], 1)


def weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of ``x`` with weights of the same shape; 0 without any weight."""
    return (weight * x).sum() / ranks.weighed(weight)


def normalised(advantage: Tensor, weight: Tensor) -> Tensor:
    """Advantages with mean 0 and deviation 1 over the rows with weight 1."""
    centred = advantage - ranks.mean(weighted_mean(advantage, weight))
    return centred / (ranks.mean(weighted_mean(centred.square(), weight)).sqrt() + 1e-8)


def policy_loss(
    log_prob: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective as a loss, and metrics: share of clipped ratios, and the divergence from the policy that acted.

    All arguments have the same shape. The logarithm of the ratio is limited to 20, so that a ratio is finite.
    """
    change = (log_prob - old).clamp(-20, 20)
    ratio = change.exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    ratio, change = ratio.detach(), change.detach()
    metrics = {
        "policy/clipped": weighted_mean(((ratio - 1).abs() > clip).to(weight.dtype), weight),
        "policy/kl": weighted_mean(ratio - 1 - change, weight),
    }
    return -weighted_mean(gain, weight), metrics


# 2. Heads ---------------------------------------------------------------------------------------------------------------------


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that gives zero. It draws no random number, so that a model with it has the same other weights as one without."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class RewardHeads(nn.Module):
    """What learns by reward alone: an action head and a value head on the policy's features, and the deviation of actions.

    The mean action is (1 - share) x decoded action + share x action head. The buffer ``share`` is 0 until a stage that learns by reward
    begins (`begin`); until then the decoder acts alone, with the deviation ``noise`` while exploring.
    """

    share: Tensor

    def __init__(self, features: int, actions: int, *, log_std: float, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.action, self.value = zero_linear(features, actions), zero_linear(features, 1)
        self.log_std = nn.Parameter(torch.full((actions,), log_std))
        self.register_buffer("share", torch.zeros(()))
        self.register_buffer("learning", torch.ones(()))  # not used any more; checkpoints of earlier versions have it

    def begin(self, share: float) -> None:
        """Let the action head act, with this share."""
        self.share.fill_(share)

    def mean(self, decoded: Tensor, features: Tensor) -> Tensor:
        """Mean actions (N, A), not clipped, of decoded actions (N, A) and features (N, F)."""
        return (1 - self.share) * decoded.float() + self.share * self.action(features).float()

    def values(self, features: Tensor) -> Tensor:
        """Values (N,) of features (N, F)."""
        out: Tensor = self.value(features).float().squeeze(-1)
        return out

    def act(self, decoded: Tensor, features: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions (N, A) in [-1, 1], and the `EXTRAS` of each."""
        mean = self.mean(decoded, features)
        std = torch.where(self.share > 0, self.log_std.exp(), self.noise)
        action = (mean + std * torch.randn_like(mean) if explore else mean).clamp(-1, 1)
        log_prob = clipped_log_prob(action, mean, std.clamp(min=1e-8).log())
        return action, {"log_prob": log_prob, "value": self.values(features)}


# 3. The losses of a rollout ---------------------------------------------------------------------------------------------------


def step_losses(
    mean: Tensor,
    log_std: Tensor,
    value: Tensor,
    now: Tensor,
    reward: Tensor,
    batch: Mapping[str, Tensor],
    known: Tensor,
    config: PPOConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses "policy", "value" and "entropy" of the steps of a rollout, n = T - 1, and metrics.

    ``mean`` (B, n, A) and ``log_std`` (A,) of the actions, ``value`` (B, n) of the frames before the steps, both as they are now;
    ``reward`` (B, n); ``known`` (B, n): whether they are made of what the policy saw when it acted. Other steps have no loss, but their
    rewards and values enter the advantages of the steps before them.

    Advantages use the values that were computed while acting. The last frame of an episode or a rollout has none, because nothing acted on
    it; its value is that of ``now`` (B, T), which gets no gradient.
    """
    inside = ~batch["is_first"][:, 1:]  # (B, n): a step led to the position
    now = now.detach()
    acted = torch.cat([torch.where(inside, batch["value"][:, 1:].to(now.dtype), now[:, :-1]), now[:, -1:]], 1)
    terminal = batch["is_terminal"][:, 1:]
    reward = config.reward_scale * reward.to(now.dtype)
    found = advantages(reward, acted, terminal, inside, discount=config.discount, lambda_=config.lambda_)
    target, weight = found + acted[:, :-1], (inside & known).to(now.dtype)
    log_prob = clipped_log_prob(batch["action"][:, 1:].to(now.dtype), mean, log_std)
    loss, metrics = policy_loss(log_prob, batch["log_prob"][:, 1:], normalised(found, weight), weight, config.ratio_clip)
    error = 0.5 * weighted_mean((value - target).square(), weight)
    metrics["policy/std"] = log_std.detach().exp().mean()
    metrics["value/r2"] = r_squared(value.reshape(-1, 1), target.reshape(-1, 1), weight.flatten())
    return {"policy": loss, "value": error, "entropy": -normal_entropy(log_std)}, metrics


def ppo_losses(
    heads: RewardHeads, decoded: Tensor, features: Tensor, batch: Mapping[str, Tensor], known: Tensor, config: PPOConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`step_losses` of a rollout with the environment's reward.

    ``decoded`` (B * T, A) and ``features`` (B * T, F) of every position; ``known`` (B, T): whether the policy saw here what it saw when it
    acted.
    """
    rows, time = batch["is_first"].shape
    value = heads.values(features).unflatten(0, (rows, time))
    mean = heads.mean(decoded, features).unflatten(0, (rows, time))
    reward = batch["reward"][:, 1:]
    return step_losses(mean[:, :-1], heads.log_std, value[:, :-1], value, reward, batch, known[:, :-1], config)


def rollout_losses(
    policy: Callable[[Tensor], tuple[Tensor, Tensor]],
    decoder: Callable[[Tensor], Tensor],
    heads: RewardHeads,
    batch: Mapping[str, Tensor],
    seen: int,
    config: PPOConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`ppo_losses` of a policy that sees the newest ``seen`` frames, and whose latent actions ``decoder`` turns into actions.

    ``policy``: stacks (N, seen * 3, S, S) in [-0.5, 0.5] -> features (N, F) and latent actions (N, Z). A stack at the start of an episode
    begins with copies of its first frame, as in acting.
    """
    frames, is_first = pictures(batch["image"]), batch["is_first"]
    features, z = policy(stacks(frames, every(frames, 0, frames.shape[1] - 1), seen, starts(is_first)))
    return ppo_losses(heads, decoder(z), features, batch, whole(is_first, seen), config)
