"""The stage `finetune` of LAPO, MaskLAM and LAOM, written out: PPO on a rollout, and the decoder on latent actions of the same rollout.

Papers: PPO arXiv 1707.06347, generalised advantage estimation arXiv 1506.02438, clipped actions arXiv 1802.07564, LAPO arXiv 2312.10812.
Steps are taken one by one; nothing comes from the product.

Shapes: N steps or pictures, F features, Z numbers of a latent action, A actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from written_out import core, latent

Weights = Mapping[str, Tensor]
Both = Callable[[Weights, Tensor], tuple[Tensor, Tensor]]
Codes = Callable[[Weights, Tensor, list[tuple[int, int]]], Tensor]


def shown(x: Tensor, batch: Mapping[str, Tensor], seen: int, b: int, t: int) -> Tensor:
    """The frames that acting saw at position t: the newest ``seen`` of its episode, and copies of the first one before it."""
    first = max([s for s in range(t + 1) if batch["is_first"][b, s]])
    return torch.cat([x[b, max(t - back, first)] for back in range(seen - 1, -1, -1)])


def log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(a; mean, std), and at the ends of [-1, 1] the log of the mass beyond them. () from (A,)."""
    out = torch.zeros(())
    for a, m, s in zip(action, mean, log_std, strict=True):
        std = torch.exp(s)
        if abs(float(a)) < 1:
            out = out + torch.log(torch.exp(-(((a - m) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi)))
        else:
            beyond = (1 - m) / std if float(a) > 0 else (1 + m) / std
            out = out + torch.log(0.5 * torch.erfc(beyond / math.sqrt(2)))
    return out


def estimates(reward: list[float], value: list[float], discount: float, lambda_: float) -> list[float]:
    """A_t = sum_l (discount lambda)^l d_{t+l} of one piece of an episode; one value more than rewards, 0 after a terminal step."""
    out = []
    for t in range(len(reward)):
        total = 0.0
        for k in range(t, len(reward)):
            error = reward[k] + discount * value[k + 1] - value[k]
            total += (discount * lambda_) ** (k - t) * error
        out.append(total)
    return out


def pieces(begins: Tensor) -> list[tuple[int, int]]:
    """First and last position of each episode in a sequence (T,)."""
    starts = [t for t in range(len(begins)) if t == 0 or begins[t]]
    return list(zip(starts, [s - 1 for s in starts[1:]] + [len(begins) - 1], strict=True))


def decoded(w: Weights, z: Tensor, relu: Callable[[Tensor], Tensor], first: bool) -> Tensor:
    """The decoder; ``first``: its nonlinearity also stands before its first layer."""
    for layer in range(len(latent.counted(w, "head.net."))):
        z = core.linear(w, f"head.net.{2 * layer + first}", relu(z) if layer or first else z)
    return z


def finetune(
    both: Both, codes: Codes, before: int, seen: int, relu: Callable[[Tensor], Tensor] = latent.relu, first: bool = True
) -> Any:
    """Both passes of an update: PPO on policy and heads, then the decoder with the weights that it had."""

    def update(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
        ppo, w, x = run.model.ppo, core.leaves(state), latent.frames(batch)
        rows, time = batch["is_first"].shape
        picture = torch.stack([shown(x, batch, seen, b, t) for b in range(rows) for t in range(time)])
        features, z = both(w, picture)
        mean = (1 - ppo.head_share) * decoded(w, z, relu, first) + ppo.head_share * core.linear(w, "heads.action", features)
        value = core.linear(w, "heads.value", features)[:, 0].reshape(rows, time)
        mean = mean.reshape(rows, time, -1)
        steps, advantage = [], []
        for b in range(rows):
            for start, end in pieces(batch["is_first"][b]):
                acted = [float(batch["value"][b, t + 1]) for t in range(start, end)] + [float(value[b, end].detach())]
                after = [*acted[:-1], 0.0 if batch["is_terminal"][b, end] else acted[-1]]
                reward = [ppo.reward_scale * float(batch["reward"][b, t + 1]) for t in range(start, end)]
                found = estimates(reward, after, ppo.discount, ppo.lambda_)
                steps += [(b, t) for t in range(start, end)]
                advantage += found
        target = torch.tensor([a + float(batch["value"][b, t + 1]) for a, (b, t) in zip(advantage, steps, strict=True)])
        scaled = torch.tensor(advantage)
        scaled = (scaled - scaled.mean()) / (torch.sqrt(((scaled - scaled.mean()) ** 2).mean()) + 1e-8)
        log_std = w["heads.log_std"]
        now = torch.stack([log_prob(batch["action"][b, t + 1], mean[b, t], log_std) for b, t in steps])
        then = torch.stack([batch["log_prob"][b, t + 1] for b, t in steps])
        ratio = torch.exp(now - then)
        limited = torch.minimum(torch.maximum(ratio, torch.tensor(1 - ppo.ratio_clip)), torch.tensor(1 + ppo.ratio_clip))
        guess = torch.stack([value[b, t] for b, t in steps])
        losses = {
            "policy": -torch.minimum(ratio * scaled, limited * scaled).mean(),
            "value": 0.5 * ((guess - target) ** 2).mean(),
            "entropy": -(log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(),
        }
        metrics = {
            "policy/clipped": (ratio != limited).double().mean(),
            "policy/kl": (ratio - 1 - (now - then)).mean().detach(),
            "policy/std": torch.exp(log_std).mean().detach(),
            "value/r2": latent.shared(guess.detach()[:, None], target[:, None]),
        }
        at, four = [], []  # steps within an episode, and their frames t - 2 to t + 1: copies stand before an episode's first
        for b in range(rows):
            for start, end in pieces(batch["is_first"][b]):
                begins = bool(batch["is_first"][b, start])  # else frames before the rollout are missing
                for t in range(start if begins else start + before - 1, end):
                    at.append((b, t))
                    four.append(torch.stack([x[b, max(t + shift, start)] for shift in (-2, -1, 0, 1)]))
        taken = torch.stack([batch["action"][b, t + 1] for b, t in at]).clamp(-1, 1)
        named = decoded(w, codes(state.weights, torch.stack(four), [(number, 2) for number in range(len(at))]), relu, first)
        error, fit = ((named - taken) ** 2).mean(), latent.shared(named.detach(), taken)
        total = losses["policy"] + ppo.value_weight * losses["value"] + ppo.entropy * losses["entropy"]
        slow = run.online.lr * run.online.pretrained_lr_factor if state.update >= run.online.freeze_updates else 0.0
        norms = {}
        for group, part, loss, lr in (
            ("policy", "policy.", total, slow),
            ("heads", "heads.", total, run.online.lr),
            ("decoder", "head.", error, ppo.decoder_lr),
        ):
            names = core.named(state, part, without=["heads.share", "heads.learning"])
            optim = SimpleNamespace(clip=run.optim.clip, eps=run.optim.eps, weight_decay=0.0)
            norms[group] = core.adam_step(state, w, loss, names, lr=lr, optim=optim)
        return core.report({**losses, "action": error}, {**metrics, "action/r2": fit}, norms)

    return update


# The three methods ------------------------------------------------------------------------------------------------------------


def hidden(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """LAPO's policy with a hidden layer."""
    units = latent.relu(core.linear(w, "policy.project", latent.relu(latent.impala(w, "policy.encoder.", x).flatten(1))))
    return units, core.linear(w, "policy.out", units)


def maps(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """The policy of the MaskLAM study."""
    units = latent.relu(latent.impala(w, "policy.encoder.", x).flatten(1))
    return units, core.linear(w, "policy.project", units)


def means(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """LAOM's policy, with pictures in [-1, 1]."""
    units = latent.relu6(latent.strided(w, "policy.encoder.", 2 * x).mean((2, 3)))
    return units, core.linear(w, "policy.project", units)


def between(before: int) -> Codes:
    """LAPO's inverse model: ``before`` frames and the one after them."""
    return lambda w, x, at: latent.encoded(w, "inverse.encoder.", latent.cut(x, at, 1 - before, 1))


def stacked(w: Weights, x: Tensor, at: list[tuple[int, int]]) -> Tensor:
    """MaskLAM's without masks."""
    return latent.encoded(w, "inverse.encoder.", torch.cat([latent.cut(x, at, -2, 0), latent.cut(x, at, -1, 1)], 1))


def wide(w: Weights, x: Tensor, at: list[tuple[int, int]]) -> Tensor:
    """LAOM's."""
    return latent.laom_latent(w, latent.cut(2 * x, at, -2, 0), latent.cut(2 * x, at, -1, 1))[1]


lapo = finetune(hidden, between(2), 2, 1)
continuous = finetune(maps, between(3), 3, 3)
masklam = finetune(maps, stacked, 3, 3)
laom = finetune(means, wide, 3, 3, latent.relu6, first=False)
