"""Parts of the DreamerV2 family, written out: RSSM, heads, KL, returns, actor and critic, Adam. Float64 tensors in, float64 tensors out.

Nothing here comes from the product. Each function says which equation it is; `torch` gives arithmetic and gradients only.
``w`` is a dict of weights by the product's names; a part of it is meant by its prefix ("dynamics.", "behaviour.actor.").

Papers: DreamerV2 arXiv 2010.02193, APV 2203.13880, IPV 2305.18499.
Shapes: B sequences, T positions, N states, S categoricals, C classes, D deter, E embedding, A actions, F = S*C + D, H horizon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Mapped = Callable[[Weights, Tensor], Tensor]
"""Actions (N, A) -> what the dynamics are given, (N, Z)."""


# 1. Layers --------------------------------------------------------------------------------------------------------------------


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b, (..., I) -> (..., O)."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def elu(x: Tensor) -> Tensor:
    """x where positive, exp(x) - 1 elsewhere."""
    return torch.where(x > 0, x, torch.exp(x.clamp(max=0)) - 1)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + torch.exp(-x))


def log_softmax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    return x - torch.logsumexp(x, -1, keepdim=True)


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * scale + shift, over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * scale + shift


def mlp(w: Weights, prefix: str, x: Tensor, layers: int) -> Tensor:
    """``layers`` times [linear, ELU], then linear: reward, actor and critic. Layers are named net.0, net.2, ..."""
    for index in range(layers):
        x = elu(linear(w, f"{prefix}net.{2 * index}", x))
    return linear(w, f"{prefix}net.{2 * layers}", x)


# 2. Categorical latents -------------------------------------------------------------------------------------------------------


def gumbel(uniform: Tensor) -> Tensor:
    """-log(-log u), u kept off 0 and 1."""
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def one_hot_sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """DreamerV2 Algorithm 1: sample + probs - sg(probs), the sample by the Gumbel maximum. (..., S, C) -> (..., S, C)."""
    probs = torch.exp(log_softmax(logits))
    index = (logits.detach() + gumbel(uniform)).argmax(-1)
    sample = (index.unsqueeze(-1) == torch.arange(logits.shape[-1])).double()
    return sample + probs - probs.detach()


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum p (ln p - ln q) of logits (..., S, C), summed over S: (...)."""
    log_p, log_q = log_softmax(p), log_softmax(q)
    return (torch.exp(log_p) * (log_p - log_q)).sum((-1, -2))


def entropy(logits: Tensor) -> Tensor:
    """-sum p ln p of logits (..., S, C), summed over S: (...)."""
    log_p = log_softmax(logits)
    return -(torch.exp(log_p) * log_p).sum((-1, -2))


def balanced_kl(post: Tensor, prior: Tensor, alpha: float, free: float) -> tuple[Tensor, dict[str, Tensor]]:
    """DreamerV2 Algorithm 2: alpha KL(sg post || prior) + (1 - alpha) KL(post || sg prior) of logits (B, T, S, C).

    Free nats: each of the two means over the batch counts as ``free`` at least. Metrics "kl" and "post_entropy".
    """
    floor = torch.tensor(free)
    to_prior = kl_divergence(post.detach(), prior).mean()
    to_post = kl_divergence(post, prior.detach()).mean()
    loss = alpha * torch.maximum(to_prior, floor) + (1 - alpha) * torch.maximum(to_post, floor)
    return loss, {"kl": to_prior.detach(), "post_entropy": entropy(post.detach()).mean()}


# 3. Recurrent state-space model -----------------------------------------------------------------------------------------------


class State(NamedTuple):
    """stoch (..., S, C) one-hot sample, deter (..., D), and the logits (..., S, C) that the sample was drawn from."""

    stoch: Tensor
    deter: Tensor
    logits: Tensor

    @property
    def feat(self) -> Tensor:
        """Model state [z, h], (..., F)."""
        return torch.cat([self.stoch.flatten(-2), self.deter], -1)


class Sizes(NamedTuple):
    """S, C and D of an RSSM."""

    stoch: int
    classes: int
    deter: int


def initial(sizes: Sizes, count: int) -> State:
    """Zeros for ``count`` states."""
    zeros = torch.zeros(count, sizes.stoch, sizes.classes)
    return State(zeros, torch.zeros(count, sizes.deter), zeros)


def recurrent(w: Weights, prefix: str, stoch: Tensor, deter: Tensor, action: Tensor | None) -> Tensor:
    """h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}]), DreamerV2 Eq. 1: stoch (N, S, C), deter (N, D), action (N, A) or None -> (N, D).

    Actions are padded with zeros to the width that the layer expects; None is all zeros (APV's action-free model). The GRU's three parts
    are normalised together (epsilon 1e-3); its update gate has a bias of -1.
    """
    flat = stoch.flatten(-2)
    width = w[f"{prefix}img_in.weight"].shape[1] - flat.shape[1]
    padded = torch.zeros(len(flat), width)
    if action is not None:
        padded = torch.cat([action, padded[:, action.shape[1] :]], 1)
    u = elu(linear(w, f"{prefix}img_in", torch.cat([flat, padded], 1)))
    parts = linear(w, f"{prefix}gru", torch.cat([u, deter], 1))
    parts = layer_norm(parts, w[f"{prefix}gru_norm.weight"], w[f"{prefix}gru_norm.bias"], 1e-3)
    size = deter.shape[1]
    reset, candidate, update = parts[:, :size], parts[:, size : 2 * size], parts[:, 2 * size :]
    gate = sigmoid(update - 1)
    return gate * torch.tanh(sigmoid(reset) * candidate) + (1 - gate) * deter


def prior_logits(w: Weights, prefix: str, deter: Tensor, sizes: Sizes) -> Tensor:
    """p(z_t | h_t), (..., D) -> (..., S, C)."""
    out = linear(w, f"{prefix}prior_out", elu(linear(w, f"{prefix}prior_in", deter)))
    return out.reshape(*out.shape[:-1], sizes.stoch, sizes.classes)


def posterior_logits(w: Weights, prefix: str, deter: Tensor, embed: Tensor, sizes: Sizes) -> Tensor:
    """q(z_t | h_t, e_t), (N, D) and (N, E) -> (N, S, C)."""
    out = linear(w, f"{prefix}post_out", elu(linear(w, f"{prefix}post_in", torch.cat([deter, embed], -1))))
    return out.reshape(*out.shape[:-1], sizes.stoch, sizes.classes)


def observe(
    w: Weights, prefix: str, embed: Tensor, action: Tensor | None, is_first: Tensor, sizes: Sizes, noise: Any
) -> tuple[State, Tensor]:
    """Posterior states (B, T, ...) of embeddings (B, T, E) and actions (B, T, A), and the prior's logits (B, T, S, C).

    action[:, t] led to embed[:, t]. Where ``is_first`` (B, T) state and action are zero. One draw (B, S, C) a position.
    """
    batch, time = is_first.shape
    state, states, priors = initial(sizes, batch), [], []
    for t in range(time):
        keep = (~is_first[:, t]).double().unsqueeze(1)
        given = None if action is None else action[:, t] * keep
        deter = recurrent(w, prefix, state.stoch * keep.unsqueeze(2), state.deter * keep, given)
        priors.append(prior_logits(w, prefix, deter, sizes))
        logits = posterior_logits(w, prefix, deter, embed[:, t], sizes)
        state = State(one_hot_sample(logits, noise.uniform(logits.shape)), deter, logits)
        states.append(state)
    return State(*(torch.stack(x, 1) for x in zip(*states, strict=True))), torch.stack(priors, 1)


def imagine_step(w: Weights, prefix: str, state: State, action: Tensor | None, sizes: Sizes, noise: Any) -> State:
    """The prior's next state (N, ...) after actions (N, A)."""
    deter = recurrent(w, prefix, state.stoch, state.deter, action)
    logits = prior_logits(w, prefix, deter, sizes)
    return State(one_hot_sample(logits, noise.uniform(logits.shape)), deter, logits)


def flatten(state: State) -> State:
    """States (B, T, ...) as starts of imagination (B*T, ...), without gradient."""
    return State(*(x.detach().flatten(0, 1) for x in state))


# 4. Actor and critic ----------------------------------------------------------------------------------------------------------


def _density(x: Tensor) -> Tensor:
    return torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _cumulative(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


class TruncatedNormal(NamedTuple):
    """Normal of mean tanh(m) and deviation 2 sigmoid(s / 2) + 0.1, cut off at -1 and 1; the actor's output (N, 2A) is [m, s]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, out: Tensor) -> TruncatedNormal:
        """From the actor's output."""
        size = out.shape[-1] // 2
        return cls(torch.tanh(out[..., :size]), 2 * sigmoid(out[..., size:] / 2) + 0.1)

    def sample(self, uniform: Tensor) -> Tensor:
        """Inverse of the cumulative distribution at ``uniform``, differentiable; the value is clipped without its gradient."""
        low, high = _cumulative((-1 - self.mean) / self.std), _cumulative((1 - self.mean) / self.std)
        share = (low + uniform * (high - low)).clamp(1e-6, 1 - 1e-6)
        x = self.mean + self.std * math.sqrt(2) * torch.erfinv(2 * share - 1)
        return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()

    def entropy(self) -> Tensor:
        """ln(sqrt(2 pi e) sigma Z) + (a phi(a) - b phi(b)) / (2 Z), summed over actions: (N,)."""
        a, b = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        mass = _cumulative(b) - _cumulative(a)
        edge = (a * _density(a) - b * _density(b)) / (2 * mass)
        return (0.5 * math.log(2 * math.pi * math.e) + torch.log(self.std * mass) + edge).sum(-1)


def lambda_returns(reward: Tensor, value: Tensor, gamma: Tensor, lambda_: float) -> Tensor:
    """DreamerV2 Eq. 4: G_i = r_i + gamma_i [(1 - lambda) v_{i+1} + lambda G_{i+1}], G_H = v_H.

    Rewards, values and discounts (H+1, N) -> (H+1, N), the last of which is v_H.
    """
    returns = [value[-1]]
    for i in reversed(range(len(reward) - 1)):
        returns.insert(0, reward[i] + gamma[i] * ((1 - lambda_) * value[i + 1] + lambda_ * returns[0]))
    return torch.stack(returns)


def continuation_loss(w: Weights, feat: Tensor, is_terminal: Tensor, layers: int) -> dict[str, Tensor]:
    """DreamerV2 Eq. 2, -ln p(gamma_t | s_t), of "goes on" or "ends": features (B, T, F). Only where the weights have the head."""
    if not named_in(w, "continuation."):
        return {}
    goes_on = sigmoid(mlp(w, "continuation.", feat, layers)[..., 0])
    return {"continue": -torch.where(is_terminal, torch.log(1 - goes_on), torch.log(goes_on)).mean()}


def discounts(w: Weights, feat: Tensor, gamma: float, layers: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """gamma_i of imagined features (H+1, N, F), the weights of the losses, (H+1, N) both, and the metric of the head.

    gamma_i is the constant, with the head times the probability that the episode goes on after state i. A weight is the product of
    gamma_j over the states j before i: how likely state i is reached, and how much it counts.
    """
    goes_on = sigmoid(mlp(w, "continuation.", feat, layers)[..., 0]) if named_in(w, "continuation.") else None
    each = gamma * (torch.ones(feat.shape[:-1], dtype=feat.dtype) if goes_on is None else goes_on)
    weights = [torch.ones_like(each[0])]
    for i in range(len(each) - 1):
        weights.append(weights[-1] * each[i].detach())
    return each, torch.stack(weights), {} if goes_on is None else {"imagined/continue": goes_on.mean()}


def named_in(w: Weights, prefix: str) -> bool:
    """Whether there are weights of this prefix."""
    return any(name.startswith(prefix) for name in w)


def behaviour_losses(
    w: Weights,
    start: State,
    reward: Callable[[Tensor], Tensor],
    behaviour: Any,
    *,
    layers: int,
    sizes: Sizes,
    noise: Any,
    dynamics: str = "dynamics.",
    mapping: Mapped = lambda w, action: action,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses "actor" and "critic" of imagined trajectories from states (N, ...), and their metrics.

    DreamerV2 Eqs. 5 and 6 with gradients through the dynamics (rho = 0), weighed by `discounts`; values of the returns are the
    slow critic's. IPV: the action at state i first shows in the reward of state i+1, so the actor's return starts there. ``reward``:
    features (..., F) -> (...). A step draws (N, A) for the action, then (N, S, C).
    """
    state, feats, entropies = start, [start.feat], []
    for _ in range(behaviour.horizon):
        policy = TruncatedNormal.of(mlp(w, "behaviour.actor.", feats[-1].detach(), layers))
        entropies.append(policy.entropy())
        action = policy.sample(noise.uniform(policy.mean.shape))
        state = imagine_step(w, dynamics, state, mapping(w, action), sizes, noise)
        feats.append(state.feat)
    feat = torch.stack(feats)  # (H+1, N, F)
    rewards = reward(feat)
    slow = mlp(w, "behaviour.slow_critic.", feat, layers)[..., 0]
    gamma, weight, told = discounts(w, feat, behaviour.discount, layers)
    returns = lambda_returns(rewards, slow, gamma, behaviour.lambda_)
    horizon = behaviour.horizon
    actor, critic, value_sum = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
    for i in range(horizon):
        if i + 1 < horizon:
            actor = actor - (weight[i] * (returns[i + 1] + behaviour.entropy * entropies[i])).mean() / (horizon - 1)
        value = mlp(w, "behaviour.critic.", feats[i].detach(), layers)[..., 0]
        critic = critic + (weight[i] * 0.5 * (value - returns[i].detach()) ** 2).mean() / horizon
        value_sum = value_sum + value.mean()
    metrics = {
        "imagined/reward": rewards.mean(),
        "imagined/return": returns[:-1].mean(),
        "imagined/value": value_sum / horizon,
        "actor/entropy": torch.stack(entropies).mean(),
        **told,
    }
    return {"actor": actor, "critic": critic}, metrics


def copy_slow_critic(state: Any, every: int) -> None:
    """Target network: after every ``every`` updates (counted by the weight "behaviour.updates") the slow critic is the critic."""
    state.weights["behaviour.updates"] = state.weights["behaviour.updates"] + 1
    if int(state.weights["behaviour.updates"]) % every == 0:
        for name in [name for name in state.weights if name.startswith("behaviour.slow_critic.")]:
            state.weights[name] = state.weights[name.replace("slow_critic", "critic")].clone()


# 5. Intrinsic bonus -----------------------------------------------------------------------------------------------------------

WINDOW, NEIGHBOURS = 5, 16


def intrinsic_bonus(state: Any, phi: Tensor, is_first: Tensor, prefix: str = "bonus.") -> Tensor:
    """APV Eq. 5: how far a window's mean feature is from its nearest neighbours. phi (B, T, F) -> (B, T - 4), without gradient.

    A window is five positions, shorter where another episode begins in it. Its mean goes through a fixed random projection and joins the
    queue of all seen, newest first; the bonus is the mean distance to the 16 nearest of the queue (itself among them; to all of the queue
    while it holds fewer), divided by the running mean of its size, into which the batch goes first with a share of 0.01.
    """
    batch, time, _ = phi.shape
    means = []
    for b in range(batch):
        for t in range(time - WINDOW + 1):
            end = t + 1
            while end < t + WINDOW and not is_first[b, end]:
                end += 1
            means.append(phi[b, t:end].detach().mean(0))
    points = torch.stack(means) @ state.weights[f"{prefix}projection"]
    seen = int(state.weights[f"{prefix}filled"])
    size = len(state.weights[f"{prefix}queue"])
    queue = torch.cat([points, state.weights[f"{prefix}queue"]])[:size]
    filled = min(size, seen + len(points))
    raw = []
    for point in points:
        distances = torch.sqrt(((queue[:filled] - point) ** 2).sum(1))
        raw.append(distances.sort().values[:NEIGHBOURS].mean())
    found = torch.stack(raw)
    mean = 0.99 * state.weights[f"{prefix}mean"] + 0.01 * found.abs().mean()
    state.weights |= {
        f"{prefix}queue": queue,
        f"{prefix}filled": torch.tensor(filled),
        f"{prefix}mean": mean,
    }
    return (found / (mean + 1e-8)).reshape(batch, -1)


def behavioural_loss(predicted: Tensor, batch: Any, bonus: Tensor, weight: float) -> Tensor:
    """Half the mean squared error against r + weight r_int, (B, T), at the positions where a window begins, and at those after the last
    window's first that are of its episode, if the sequence shows that it ends: another begins there, or the last position is terminal.
    """
    errors, (rows, time), windows = [], predicted.shape, bonus.shape[1]
    for b in range(rows):
        for t in range(time):
            begun = batch["is_first"][b, windows : t + 1].any()  # another episode than the last window's
            ends = batch["is_terminal"][b, -1] or batch["is_first"][b, t + 1 :].any()
            if t < windows or (ends and not begun):
                errors.append(predicted[b, t] - batch["reward"][b, t] - weight * bonus[b, min(t, windows - 1)])
    return (0.5 * torch.stack(errors) ** 2).mean()


# 6. Optimisation --------------------------------------------------------------------------------------------------------------


def leaves(state: Any) -> dict[str, Tensor]:
    """The weights of an update's state as tensors that gradients can be asked for; buffers and slow copies are never asked."""
    return {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in state.weights.items()}


def named(state: Any, *prefixes: str, without: Sequence[str] = ()) -> list[str]:
    """Names of the weights that start with one of ``prefixes`` and with none of ``without``."""
    return [name for name in state.weights if name.startswith(prefixes) and not name.startswith(tuple(without))]


def adam_step(state: Any, w: Weights, loss: Tensor, names: Iterable[str], *, lr: float, optim: Any) -> Tensor:
    """One step of Adam (arXiv 1412.6980) of one group of weights on the gradient of ``loss``. Returns the gradient's global norm.

    Before Adam the gradient is scaled so that its global norm is ``optim.clip`` at most; ``optim.weight_decay`` times the weight is added
    to it. Weights that the loss does not depend on stay as they are. ``w``: the `leaves` that ``loss`` was computed from.
    """
    names = [name for name in names if w[name].is_floating_point()]
    found = torch.autograd.grad(loss, [w[name] for name in names], retain_graph=True, allow_unused=True)
    gradients = {name: g for name, g in zip(names, found, strict=True) if g is not None}
    norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))  # type: ignore[arg-type]
    scale = min(1.0, optim.clip / (float(norm) + 1e-6))  # torch adds 1e-6
    for name, gradient in gradients.items():
        weight = state.weights[name]
        g = gradient * scale + optim.weight_decay * weight
        state.steps[name] += 1
        t = state.steps[name]
        state.mean[name] = 0.9 * state.mean.get(name, torch.zeros_like(g)) + 0.1 * g
        state.square[name] = 0.999 * state.square.get(name, torch.zeros_like(g)) + 0.001 * g**2
        mean, square = state.mean[name] / (1 - 0.9**t), state.square[name] / (1 - 0.999**t)
        state.weights[name] = weight - lr * mean / (torch.sqrt(square) + optim.eps)
    return norm


def decayed(lr: float, update: int, pretrain: Any) -> float:
    """Learning rate of a pre-training update: over the last share ``pretrain.lr_decay`` of the updates it falls linearly to zero."""
    if pretrain.lr_decay <= 0:
        return lr
    return lr * min(1.0, (pretrain.updates - update) / (pretrain.lr_decay * pretrain.updates))


def report(losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an update returns: "loss/x" of each loss, metrics by their own names, "grad/g" of each group."""
    return {
        **{f"loss/{name}": value.detach() for name, value in losses.items()},
        **{name: value.detach() for name, value in metrics.items()},
        **{f"grad/{name}": value for name, value in norms.items()},
    }


def behaviour_update(
    state: Any,
    start: State,
    run: Any,
    sizes: Sizes,
    noise: Any,
    dynamics: str = "dynamics.",
    mapping: Mapped = lambda w, action: action,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The second half of an online update: imagination with the world model as it is now, actor, critic, slow critic.

    Returns losses, metrics and gradient norms. ``start``: states (B, T, ...) of the model that the actions drive.
    """
    w, layers, behaviour = leaves(state), run.model.world.layers, run.model.behaviour
    losses, metrics = behaviour_losses(
        w,
        flatten(start),
        lambda feat: mlp(w, "reward.", feat, layers)[..., 0],
        behaviour,
        layers=layers,
        sizes=sizes,
        noise=noise,
        dynamics=dynamics,
        mapping=mapping,
    )
    norms = {}
    for name, lr in (("actor", run.online.actor_lr), ("critic", run.online.critic_lr)):
        norms[name] = adam_step(state, w, losses[name], named(state, f"behaviour.{name}."), lr=lr, optim=run.optim)
    copy_slow_critic(state, behaviour.slow_critic_every)
    return losses, metrics, norms
