"""DreamerV3's update, written out from arXiv 2301.04104 and, where the paper is silent, as its reference has it (commit e3f0224).

Shapes: B sequences, T positions, N states, S categoricals, C classes, D deter, G blocks, H imagined steps, K bins, F = D + S*C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from written_out import core
from written_out.core import Weights, linear, log_softmax, sigmoid

# 1. Layers --------------------------------------------------------------------------------------------------------------------


def norm_silu(w: Weights, name: str, x: Tensor) -> Tensor:
    """RMSNorm (epsilon 1e-4) over the last dimension with a scale, then SiLU."""
    x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-4) * w[f"{name}.scale"]
    return x * sigmoid(x)


def mlp(w: Weights, prefix: str, x: Tensor, layers: int, *, output: bool = True) -> Tensor:
    """``layers`` times [linear, RMSNorm, SiLU], numbered two by two, then a linear output."""
    for index in range(layers):
        x = norm_silu(w, f"{prefix}{2 * index + 1}", linear(w, f"{prefix}{2 * index}", x))
    return linear(w, f"{prefix}{2 * layers}", x) if output else x


def block_linear(w: Weights, name: str, parts: list[Tensor]) -> list[Tensor]:
    """A linear layer for each of G blocks: kernel (G, I, O), the bias (G*O) shared out."""
    kernel = w[f"{name}.kernel"]
    bias = w[f"{name}.bias"].reshape(len(kernel), -1)
    return [part @ kernel[g] + bias[g] for g, part in enumerate(parts)]


def symlog(x: Tensor) -> Tensor:
    """Eq. 9: sign(x) ln(|x| + 1)."""
    return torch.sign(x) * torch.log(torch.abs(x) + 1)


# 2. Numbers as distributions over bins ----------------------------------------------------------------------------------------


def bins() -> Tensor:
    """Eq. 10: symexp of 255 evenly spaced numbers from -20 to 20."""
    x = torch.linspace(-20, 20, 255)
    return torch.sign(x) * (torch.exp(torch.abs(x)) - 1)


def expected(logits: Tensor) -> Tensor:
    """Expected value of logits (..., K), the sum taken from the middle out so that large bins cancel."""
    p, b = torch.exp(log_softmax(logits)), bins()
    return (p[..., 128:] * b[128:] + (p[..., :127] * b[:127]).flip(-1)).sum(-1)


def two_hot_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Eqs. 11 and 12: cross-entropy of logits (..., K) with the two bins next to the target (...), each weighed by its nearness."""
    b, target = bins(), target.detach()
    above = (b <= target.unsqueeze(-1)).sum(-1).clamp(1, 254)
    below = above - 1
    share = ((target - b[below]) / (b[above] - b[below])).clamp(0, 1)
    hot = F.one_hot(below, 255) * (1 - share).unsqueeze(-1) + F.one_hot(above, 255) * share.unsqueeze(-1)
    return -(hot * log_softmax(logits)).sum(-1)


# 3. Observations --------------------------------------------------------------------------------------------------------------


def _picture(image: Tensor, stem: str) -> Tensor:
    """(B, T, S, S, 3) -> (B*T, 3, S, S) in [0, 1]; for the stem "blocks" 4x4 pixels as channels (row, column, colour)."""
    x = image.flatten(0, 1).double() / 255
    if stem == "blocks":
        x = torch.cat([x[:, row::4, column::4] for row in range(4) for column in range(4)], -1)
    return x.permute(0, 3, 1, 2)


def _norm_map(w: Weights, name: str, x: Tensor) -> Tensor:
    """`norm_silu` over the channels of maps (N, C, h, w)."""
    return norm_silu(w, name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _stages(stem: str) -> int:
    return 2 if stem == "blocks" else 4


def encode(w: Weights, batch: Mapping[str, Tensor], model: Any) -> Tensor:
    """Embeddings (B, T, E): of the symlog vector, then of the picture (convolution, 2x2 maximum, norm, SiLU; rows, columns, channels)."""
    parts = []
    if model.vector_dim:
        parts.append(mlp(w, "observations.vector_encoder.", symlog(batch["vector"]), 3, output=False))
    if model.pixels:
        x = _picture(batch["image"], model.stem) - 0.5
        for index in range(_stages(model.stem)):
            name = f"observations.image_encoder.convs.{index}"
            x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=2)
            corners = [x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
            x = _norm_map(w, f"observations.image_encoder.norms.{index}", torch.stack(corners).amax(0))
        parts.append(x.permute(0, 2, 3, 1).flatten(1).unflatten(0, batch["image"].shape[:2]))
    return torch.cat(parts, -1)


def reconstruction(w: Weights, state: State, batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Squared errors (B, T) summed over each observation: of symlog vectors, and of pixels in [0, 1]."""
    out, prefix = {}, "observations.image_decoder."
    if model.vector_dim:
        error = mlp(w, "observations.vector_decoder.", state.feat, 3) - symlog(batch["vector"])
        out["vector"] = (error**2).sum(-1)
    if model.pixels:
        truth = _picture(batch["image"], model.stem)
        deter, latent = state.deter.flatten(0, 1), state.stoch.flatten(0, 1).flatten(1)
        side = truth.shape[-1] // 2 ** _stages(model.stem)
        pieces = block_linear(w, f"{prefix}from_deter", list(deter.chunk(model.blocks, -1)))
        x = torch.cat([piece.reshape(len(deter), side, side, -1) for piece in pieces], -1)
        hidden = norm_silu(w, f"{prefix}from_stoch.1", linear(w, f"{prefix}from_stoch.0", latent))
        x = x + linear(w, f"{prefix}from_stoch.2", hidden).reshape(x.shape)
        x = norm_silu(w, f"{prefix}norm", x).permute(0, 3, 1, 2)
        for index in range(_stages(model.stem)):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = F.conv2d(x, w[f"{prefix}convs.{index}.weight"], w[f"{prefix}convs.{index}.bias"], padding=2)
            if index + 1 < _stages(model.stem):
                x = _norm_map(w, f"{prefix}norms.{index}", x)
        error = sigmoid(x) - truth
        out["image"] = (error**2).flatten(1).sum(1).reshape(state.deter.shape[:2])
    return out


# 4. Dynamics ------------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """stoch (..., S, C), deter (..., D), and log-probabilities (..., S, C) that the sample was drawn from."""

    stoch: Tensor
    deter: Tensor
    log_probs: Tensor

    @property
    def feat(self) -> Tensor:
        """[h, z], (..., F)."""
        return torch.cat([self.deter, self.stoch.flatten(-2)], -1)


def latent(out: Tensor, model: Any, classes: int) -> Tensor:
    """(..., S*C) -> log-probabilities (..., S, C), of which ``unimix`` is uniform."""
    return mixed(out.reshape(*out.shape[:-1], model.stoch, classes), model.unimix)


def mixed(out: Tensor, share: float) -> Tensor:
    """(..., C) -> log-probabilities (..., C), of which ``share`` is uniform."""
    return torch.log((1 - share) * torch.exp(log_softmax(out)) + share / out.shape[-1])


def recurrent(w: Weights, stoch: Tensor, deter: Tensor, action: Tensor, blocks: int) -> Tensor:
    """Block GRU: every block sees its own part of the state and all of the three embedded inputs. -> (N, D)."""
    clipped = action / torch.maximum(torch.ones(()), action.abs()).detach()
    inputs = [
        norm_silu(w, f"dynamics.in_norms.{index}", linear(w, f"dynamics.{name}", x))
        for index, (name, x) in enumerate((("in_deter", deter), ("in_stoch", stoch.flatten(-2)), ("in_action", clipped)))
    ]
    own = deter.chunk(blocks, -1)
    x = torch.cat(block_linear(w, "dynamics.core", [torch.cat([part, *inputs], -1) for part in own]), -1)
    x = norm_silu(w, "dynamics.core_norm", x)
    out = []
    for part, old in zip(block_linear(w, "dynamics.gru", list(x.chunk(blocks, -1))), own, strict=True):
        reset, candidate, update = part.chunk(3, -1)
        gate = sigmoid(update - 1)
        out.append(gate * torch.tanh(sigmoid(reset) * candidate) + (1 - gate) * old)
    return torch.cat(out, -1)


def prior(w: Weights, deter: Tensor, model: Any, classes: int) -> Tensor:
    """Log-probabilities (..., S, C) of deter (..., D)."""
    return latent(mlp(w, "dynamics.prior_net.", deter, 2), model, classes)


def observe(w: Weights, embed: Tensor, batch: Mapping[str, Tensor], model: Any, classes: int, noise: Any) -> tuple[State, Tensor]:
    """Posterior states (B, T, ...) from zeros, and the prior's log-probabilities (B, T, S, C)."""
    (count, time), width = batch["is_first"].shape, w["dynamics.in_deter.weight"].shape[1]
    stoch, deter = torch.zeros(count, model.stoch, classes), torch.zeros(count, width)
    states = []
    for t in range(time):
        keep = (~batch["is_first"][:, t]).double().unsqueeze(1)
        action = batch["action"][:, t] * keep
        deter = recurrent(w, stoch * keep.unsqueeze(2), deter * keep, action, model.blocks)
        hidden = linear(w, "dynamics.post_in", torch.cat([deter, embed[:, t]], -1))
        post = latent(linear(w, "dynamics.post_out", norm_silu(w, "dynamics.post_norm", hidden)), model, classes)
        stoch = core.one_hot_sample(post, noise.uniform(post.shape))
        states.append(State(stoch, deter, post))
    state = State(*(torch.stack(x, 1) for x in zip(*states, strict=True)))
    return state, prior(w, state.deter, model, classes)


# 5. Actor and critic ----------------------------------------------------------------------------------------------------------


class Policy:
    """Normal of mean tanh(m) and deviation 0.9 sigmoid(s + 2) + 0.1, or one of A actions."""

    def __init__(self, out: Tensor, model: Any) -> None:
        self.discrete = model.discrete
        if self.discrete:
            self.log_probs = mixed(out, model.unimix)
        else:
            mean, std = out.chunk(2, -1)
            self.mean, self.std = torch.tanh(mean), 0.9 * sigmoid(std + 2) + 0.1

    def sample(self, noise: Any) -> Tensor:
        """(..., A), one draw."""
        if self.discrete:
            chosen = (self.log_probs + core.gumbel(noise.uniform(self.log_probs.shape))).argmax(-1)
            return F.one_hot(chosen, self.log_probs.shape[-1]).double()
        return (self.mean + self.std * noise.normal(self.mean.shape)).detach()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log density (...) of actions."""
        if self.discrete:
            return (self.log_probs * action).sum(-1)
        density = -(((action - self.mean) / self.std) ** 2) / 2 - torch.log(self.std * math.sqrt(2 * math.pi))
        return density.sum(-1)

    def entropy(self) -> Tensor:
        """In nats (...)."""
        if self.discrete:
            return -(torch.exp(self.log_probs) * self.log_probs).sum(-1)
        return torch.log(self.std * math.sqrt(2 * math.pi * math.e)).sum(-1)

    def randomness(self) -> Tensor:
        """Entropy as a share of the way from the least possible (0, or all deviations 0.1) to the most."""
        if self.discrete:
            return self.entropy() / math.log(self.log_probs.shape[-1])
        return (torch.log(self.std / 0.1) / math.log(10)).mean(-1)


def percentile(x: Tensor, share: float) -> Tensor:
    """Linear between the two nearest of the sorted values."""
    ordered = x.flatten().sort().values
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def lambda_returns(reward: Tensor, value: Tensor, going_on: Tensor, mixing: Tensor) -> Tensor:
    """Eq. 6: R_t = r_{t+1} + c_{t+1} [(1 - l_{t+1}) v_{t+1} + l_{t+1} R_{t+1}], R_{T-1} = v_{T-1}; all (T, N) -> (T-1, N).

    ``going_on`` is the discounted continuation c, ``mixing`` the lambda of each step (0 where the data is cut off). A reward stands at
    the state that it came with.
    """
    following, out = value[-1], []
    for t in reversed(range(len(reward) - 1)):
        rest = (1 - mixing[t + 1]) * value[t + 1] + mixing[t + 1] * following
        following = reward[t + 1] + going_on[t + 1] * rest
        out.insert(0, following)
    return torch.stack(out)


def imagine(w: Weights, start: State, model: Any, classes: int, noise: Any) -> tuple[Tensor, Tensor]:
    """Features (H+1, N, F) and actions (H, N, A) of the policy in the prior."""
    state, feats, actions = start, [start.feat], []
    for _ in range(model.imag_length):
        actions.append(Policy(mlp(w, "actor.", feats[-1], 3), model).sample(noise))
        deter = recurrent(w, state.stoch, state.deter, actions[-1], model.blocks)
        log_probs = prior(w, deter, model, classes)
        state = State(core.one_hot_sample(log_probs, noise.uniform(log_probs.shape)), deter, log_probs)
        feats.append(state.feat)
    return torch.stack(feats).detach(), torch.stack(actions).detach()


def behaviour(
    state: Any, w: Weights, start: State, model: Any, classes: int, noise: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Losses "policy" and "value" (Eqs. 5 to 7), metrics, and the returns (H, N). Moves the range of returns."""
    feat, action = imagine(w, start, model, classes, noise)
    base = 1.0 if model.contdisc else 1 - 1 / model.horizon
    critic = mlp(w, "critic.", feat, 3)
    reward = expected(mlp(w, "reward.", feat, 1)).detach()
    cont = sigmoid(mlp(w, "cont.", feat, 1)[..., 0]).detach()
    value = expected(critic).detach()
    slow = expected(mlp(w, "slow_critic.", feat[:-1], 3)).detach()
    returns = lambda_returns(reward, value, base * cont, torch.full_like(cont, model.lambda_))
    for name, share in (("low", 0.05), ("high", 0.95)):
        before = state.weights[f"return_range.{name}"]
        state.weights[f"return_range.{name}"] = 0.99 * before + 0.01 * percentile(returns, share)
    low, high = state.weights["return_range.low"], state.weights["return_range.high"]
    scale = torch.maximum(torch.ones(()), high - low)
    policy_loss, value_loss, reach, sizes = [], [], cont[0].clone(), []
    policies = [Policy(mlp(w, "actor.", feat[t], 3), model) for t in range(model.imag_length)]
    for t, policy in enumerate(policies):
        if t:
            reach = reach * base * cont[t]
        advantage = (returns[t] - value[t]) / scale
        sizes.append(advantage.abs())
        policy_loss.append(-reach * (policy.log_prob(action[t]) * advantage + model.entropy * policy.entropy()))
        value_loss.append(reach * (two_hot_loss(critic[t], returns[t]) + model.slow_reg * two_hot_loss(critic[t], slow[t])))
    metrics = {
        "imagined/reward": reward.mean(),
        "imagined/return": returns.mean(),
        "imagined/value": value.mean(),
        "imagined/cont": cont.mean(),
        "actor/entropy": torch.stack([policy.entropy() for policy in policies]).mean(),
        "actor/randomness": torch.stack([policy.randomness() for policy in policies]).mean(),
        "actor/advantage": torch.stack(sizes).mean(),
        "return_range/low": low,
        "return_range/scale": scale,
    }
    return {"policy": torch.stack(policy_loss).mean(), "value": torch.stack(value_loss).mean()}, metrics, returns


def replay_value(w: Weights, feat: Tensor, batch: Mapping[str, Tensor], boot: Tensor, model: Any) -> Tensor:
    """Critic on replayed positions: features (B, K, F) with gradient, imagined returns (B, K) as values to bootstrap from.

    Where the next position begins another episode, the step is cut off: its return is the bootstrap, and its loss does not count.
    """
    count = feat.shape[1]
    is_first = batch["is_first"]
    last = torch.cat([is_first[:, 1:], torch.zeros_like(is_first[:, :1])], 1)[:, -count:].double()
    alive = 1 - batch["is_terminal"][:, -count:].double()
    going_on = (1 - 1 / model.horizon) * alive
    reward = batch["reward"][:, -count:]
    returns = lambda_returns(reward.T, boot.T, going_on.T, (model.lambda_ * (1 - last)).T).T
    logits = mlp(w, "critic.", feat[:, :-1], 3)
    slow = expected(mlp(w, "slow_critic.", feat[:, :-1], 3)).detach()
    loss = two_hot_loss(logits, returns) + model.slow_reg * two_hot_loss(logits, slow)
    return ((1 - last[:, :-1]) * loss).mean()


# 6. The update ----------------------------------------------------------------------------------------------------------------


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.exp(p) * (p - q)).sum((-1, -2))


def _step(state: Any, w: Weights, loss: Tensor, lr: float, clip: float) -> Tensor:
    """LaProp (arXiv 2002.04839) after adaptive clipping of each weight's gradient (arXiv 2102.06171). Returns the norm before."""
    names = core.named(state, "", without=["slow_critic.", "bins", "return_range."])
    names = [name for name in names if not name.endswith((".taps", "return_range.quantiles"))]
    found = torch.autograd.grad(loss, [w[name] for name in names], allow_unused=True)
    squares = torch.zeros(())
    for name, gradient in zip(names, found, strict=True):
        if gradient is None:
            continue
        weight, norm = state.weights[name], torch.sqrt((gradient**2).sum())
        squares = squares + norm**2
        most = clip * max(1e-3, float(torch.sqrt((weight**2).sum())))
        g = gradient * min(1.0, most / max(float(norm), 1e-30))
        state.steps[name] += 1
        t, zero = state.steps[name], torch.zeros_like(g)
        state.square[name] = 0.999 * state.square.get(name, zero) + 0.001 * g**2
        scaled = g / (torch.sqrt(state.square[name] / (1 - 0.999**t)) + 1e-20)
        state.mean[name] = 0.9 * state.mean.get(name, zero) + 0.1 * scaled
        state.weights[name] = weight - lr * state.mean[name] / (1 - 0.9**t)
    return torch.sqrt(squares)


def train(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """World model (Eqs. 2 to 4), actor and critic (Eqs. 5 to 7) in one step of one optimiser, then the slow critic."""
    model, scales = run.model, run.model.scales
    classes = state.weights["dynamics.post_out.weight"].shape[0] // model.stoch
    w = core.leaves(state)
    post, prior_log_probs = observe(w, encode(w, batch, model), batch, model, classes, noise)
    feat, recon = post.feat, reconstruction(w, post, batch, model)
    free = torch.tensor(model.kl_free)
    alive = (~batch["is_terminal"]).double() * (1 - 1 / model.horizon if model.contdisc else 1.0)
    cont = sigmoid(mlp(w, "cont.", feat, 1)[..., 0])
    losses = {
        "dyn": torch.maximum(_kl(post.log_probs.detach(), prior_log_probs), free).mean(),
        "rep": torch.maximum(_kl(post.log_probs, prior_log_probs.detach()), free).mean(),
        "recon": sum(recon.values()).mean(),  # type: ignore[union-attr]
        "reward": two_hot_loss(mlp(w, "reward.", feat, 1), batch["reward"]).mean(),
        "cont": -(alive * torch.log(cont) + (1 - alive) * torch.log(1 - cont)).mean(),
    }
    count = model.imag_last or feat.shape[1]
    start = State(*(x.detach()[:, -count:].flatten(0, 1) for x in post))
    more, metrics, returns = behaviour(state, w, start, model, classes, noise)
    losses |= more
    losses["repval"] = replay_value(w, feat[:, -count:], batch, returns[0].reshape(len(feat), count), model)
    total = sum(getattr(scales, name) * value for name, value in losses.items())
    warm = min(1.0, state.update / model.warmup) if model.warmup else 1.0
    norm = _step(state, w, total, run.online.lr * warm, model.agc)
    for name in core.named(state, "slow_critic."):
        fast = state.weights[name.replace("slow_critic", "critic")]
        state.weights[name] = (1 - model.slow_rate) * state.weights[name] + model.slow_rate * fast
    metrics |= {
        "dynamics/prior_entropy": core.entropy(prior_log_probs).mean(),
        "dynamics/post_entropy": core.entropy(post.log_probs).mean(),
        **{f"recon/{key}": value.mean() for key, value in recon.items()},
    }
    return core.report(losses, metrics, {"model": norm})
