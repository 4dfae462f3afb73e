"""PVDR, written out: the tokenizer, and the conditional VAE of plans. Nothing comes from the product.

The context is computed anew for every plan, attention is a softmax over explicit scores, and codes are compared one by one.

Shapes: B sequences, T frames, N cells, C = N + 1 tokens of a frame, V codes, D numbers of a code, d width, Z numbers of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from written_out import core
from written_out.latent import conv, counted

Weights = Mapping[str, Tensor]


# 1. The tokenizer -------------------------------------------------------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def group_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Mean 0 and variance 1 within each group of channels of a picture, then a factor and a shift of each channel."""
    channels = x.shape[1]
    groups = next(count for count in (32, 16, 8, 4, 2, 1) if channels >= 2 * count and channels % count == 0)
    rows = x.reshape(len(x), groups, -1)
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / torch.sqrt((rows**2).mean(-1, keepdim=True) + 1e-5)
    return rows.reshape(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def residual(w: Weights, at: str, x: Tensor) -> Tensor:
    out = conv(w, f"{at}.convs.0", silu(group_norm(w, f"{at}.norms.0", x)))
    return x + conv(w, f"{at}.convs.1", silu(group_norm(w, f"{at}.norms.1", out)))


def over_cells(w: Weights, at: str, x: Tensor) -> Tensor:
    q, k, v = conv(w, f"{at}.to_qkv", group_norm(w, f"{at}.norm", x), padding=0).flatten(2).chunk(3, 1)  # (B, C, cells)
    scores = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(q.shape[1])
    found = torch.einsum("bqk,bck->bcq", torch.exp(core.log_softmax(scores)), v)
    return x + conv(w, f"{at}.out", found.reshape(x.shape), padding=0)


def walked(w: Weights, prefix: str, x: Tensor, out: int) -> Tensor:
    """The layers of an encoder or decoder in order; what a layer is, its weights' names say. Layer ``out`` is the last one."""
    for layer in range(out + 1):
        at = f"{prefix}{layer}"
        if f"{at}.convs.0.weight" in w:
            x = residual(w, at, x)
        elif f"{at}.to_qkv.weight" in w:
            x = over_cells(w, at, x)
        elif f"{at}.conv.weight" in w:
            x = conv(w, f"{at}.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        elif layer == out - 2:
            x = group_norm(w, at, x)
        elif layer == out - 1:
            x = silu(x)
        else:
            first_or_last = layer in (0, out)
            x = F.conv2d(x, w[f"{at}.weight"], w[f"{at}.bias"], stride=1 if first_or_last else 2, padding=1)
    return x


def last_layer(w: Weights, prefix: str) -> int:
    return max(int(name[len(prefix) :].split(".")[0]) for name in w if name.startswith(prefix))


def features(w: Weights, image: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] -> (B, N, D)."""
    return walked(w, "tokenizer.encoder.", image, last_layer(w, "tokenizer.encoder.")).flatten(2).movedim(1, 2)


def nearest(book: Tensor, found: Tensor) -> Tensor:
    """(..., D) -> (...)."""
    return torch.stack([((found.detach() - code) ** 2).sum(-1) for code in book], -1).argmin(-1)


def frames(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T, 3, S, S) in [-1, 1]."""
    return (2 * (batch["image"].double() / 255 - 0.5)).movedim(-1, 2)


def tokenize(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """mse_weight E |o^ - o|^2 + mae_weight E |o^ - o| + commitment E |psi - sg(code)|^2; codes follow averages, unused ones begin again."""
    model, w, true = run.model.tokenizer, core.leaves(state), frames(batch).flatten(0, 1)
    psi = features(w, true)
    book = state.weights["tokenizer.codebook.embedding"]
    tokens = nearest(book, psi)
    codes = book[tokens]
    side = math.isqrt(psi.shape[1])
    maps = (psi + (codes - psi).detach()).movedim(2, 1).reshape(len(psi), -1, side, side)
    error = walked(w, "tokenizer.decoder.", maps, last_layer(w, "tokenizer.decoder.")) - true
    image = model.mse_weight * (error**2).mean() + model.mae_weight * error.abs().mean()
    losses = {"image": image, "commitment": ((psi - codes) ** 2).mean()}
    metrics = {
        "image/psnr": -10 * torch.log10((error.detach() ** 2).mean() / 4),
        "codes/used": torch.tensor(len(set(tokens.flatten().tolist())) / len(book)),
    }
    total = losses["image"] + model.commitment * losses["commitment"]
    names = [name for name in core.named(state, "tokenizer.") if "codebook" not in name and "quantising" not in name]
    norm = step(state, w, total, names, run.pretrain.lr, run, (0.5, 0.9), {})
    follow(state, psi.detach().flatten(0, 1), tokens.flatten(), noise, model)
    return core.report(losses, metrics, {"tokenizer": norm})


def follow(state: Any, rows: Tensor, tokens: Tensor, noise: Any, model: Any) -> None:
    at = "tokenizer.codebook."
    count, total = state.weights[f"{at}count"].clone(), state.weights[f"{at}total"].clone()
    for code in range(len(count)):
        own = rows[tokens == code]
        count[code] = model.code_decay * count[code] + (1 - model.code_decay) * len(own)
        total[code] = model.code_decay * total[code] + (1 - model.code_decay) * own.sum(0)
    mean, drawn = count.sum() / len(count), noise.integers(len(rows), (len(count),))
    for code in range(len(count)):
        if count[code] < model.restart * mean:
            count[code], total[code] = mean, rows[drawn[code]] * mean
    state.weights[f"{at}count"], state.weights[f"{at}total"] = count, total
    state.weights[f"{at}embedding"] = total / count[:, None]


# 2. The Transformers ----------------------------------------------------------------------------------------------------------


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return core.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def attended(w: Weights, at: str, x: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """Attention over L tokens x (..., L, d); ``allowed`` (L, L): whether a row may see a column."""
    q, k, v = core.linear(w, f"{at}.to_qkv", x).chunk(3, -1)
    out, size = [], x.shape[-1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].movedim(-1, -2) / math.sqrt(size)
        scores = scores.masked_fill(~allowed, -math.inf)
        out.append(torch.exp(core.log_softmax(scores)) @ v[..., part])
    return core.linear(w, f"{at}.out", torch.cat(out, -1))


def blocks(w: Weights, prefix: str, x: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """x (B, T, C, d); ``allowed`` (T, T): whether a frame may see another."""
    everywhere = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool)
    for block in counted(w, f"{prefix}blocks."):
        at = f"{prefix}blocks.{block}."
        x = x + attended(w, f"{at}space", norm(w, f"{at}norms.0", x), heads, everywhere)
        x = x + attended(w, f"{at}time", norm(w, f"{at}norms.1", x).movedim(1, 2), heads, allowed).movedim(1, 2)
        hidden = core.linear(w, f"{at}up", norm(w, f"{at}norms.2", x))
        x = x + core.linear(w, f"{at}down", 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    return x


def embedded(w: Weights, prefix: str, tokens: Tensor) -> Tensor:
    """Tokens (B, T, N) -> (B, T, N + 1, d)."""
    local = w[f"{prefix}token"][tokens] + w[f"{prefix}place"]
    whole = w[f"{prefix}whole"].expand(*tokens.shape[:2], 1, -1)
    return torch.cat([local, whole], 2) + w[f"{prefix}time"][: tokens.shape[1], None]


def gaussian(w: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance in [-8, 4]."""
    mean, log_variance = core.linear(w, name, x).chunk(2, -1)
    return mean, torch.minimum(torch.maximum(log_variance, torch.tensor(-8.0)), torch.tensor(4.0))


def posterior(w: Weights, tokens: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
    time = tokens.shape[1]
    x = blocks(w, "posterior.body.transformer.", embedded(w, "posterior.body.embedding.", tokens), plan.heads, bools(time, time))
    return gaussian(w, "posterior.last", norm(w, "posterior.body.norm", x[:, plan.context :, -1].mean(1)))


def prior(w: Weights, past: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
    time = past.shape[1]
    x = blocks(w, "prior.transformer.", embedded(w, "prior.embedding.", past), plan.heads, bools(time, time).tril())
    return gaussian(w, "prior.last", norm(w, "prior.norm", x[:, -1, -1]))


def bools(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def decoded(w: Weights, past: Tensor, future: Tensor, z: Tensor, plan: Any) -> Tensor:
    """Logits (B, n, N, V): context and queries in one sequence of m + n frames."""
    m, n, at = plan.context, plan.horizon, "decoder.embedding."
    held = core.linear(w, "decoder.from_z", z)[:, None, None]  # (B, 1, 1, d)
    if plan.decode == "parallel":
        content = w["decoder.query"].expand(len(z), n, past.shape[2], -1)
    else:
        content = w[f"{at}token"][torch.cat([past[:, -1:], future[:, :-1]], 1)]
    queries = torch.cat([content + held + w[f"{at}place"], held.expand(-1, n, -1, -1)], 2) + w[f"{at}time"][m:, None]
    allowed = bools(m + n, m + n)
    allowed[:m, m:] = False
    if plan.decode == "frame_ar":
        allowed[m:, m:] = bools(n, n).tril()
    x = blocks(w, "decoder.transformer.", torch.cat([embedded(w, at, past), queries], 1), plan.heads, allowed)
    return core.linear(w, "decoder.out", norm(w, "decoder.norm", x[:, m:, :-1]))


def surprise(logits: Tensor, future: Tensor) -> Tensor:
    return -core.log_softmax(logits).gather(-1, future[..., None]).mean()


def kl_of(q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor]) -> Tensor:
    """Of each number, in nats: log(sigma_p / sigma_q) + (sigma_q^2 + (mu_q - mu_p)^2) / (2 sigma_p^2) - 1/2."""
    sigma_q, sigma_p = torch.exp(q[1] / 2), torch.exp(p[1] / 2)
    return torch.log(sigma_p / sigma_q) + (sigma_q**2 + (q[0] - p[0]) ** 2) / (2 * sigma_p**2) - 0.5


def pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """mean -log D(Y | X, z) + warm * beta / (n N) * KL(q || p), z ~ q, on one window of each sequence."""
    model, plan, w = run.model, run.model.plan, core.leaves(state)
    rows, time = batch["image"].shape[:2]
    count = plan.context + plan.horizon
    start = noise.integers(time - count + 1, (rows, 1)).flatten().tolist()
    pictures = torch.stack([frames(batch)[b, start[b] : start[b] + count] for b in range(rows)])
    book = state.weights["tokenizer.codebook.embedding"]
    tokens = nearest(book, features(state.weights, pictures.flatten(0, 1))).reshape(rows, count, -1)
    past, future = tokens[:, : plan.context], tokens[:, plan.context :]
    q, p = posterior(w, tokens, plan), prior(w, past, plan)
    z = q[0] + torch.exp(q[1] / 2) * noise.normal(q[0].shape)
    each = kl_of(q, p).mean(0)
    if model.kl_balance > 0:
        share = model.kl_balance
        still, fixed = ([x.detach() for x in pair] for pair in (q, p))
        learned = (share * kl_of(still, p) + (1 - share) * kl_of(q, fixed)).mean(0)  # type: ignore[arg-type]
    else:
        learned = each
    kl = sum(x if float(x.detach()) > model.free_nats_each else torch.tensor(model.free_nats_each) for x in learned)
    warm = state.weights["warm"].clone()
    losses = {"tokens": surprise(decoded(w, past, future, z, plan), future), "kl": warm * kl}
    state.weights["warm"] = torch.tensor(min(1.0, (state.update + 1) / model.beta_warmup))
    few = slice(0, 4)
    other = decoded(w, past[few], future[few], z[few].roll(1, 0), plan)
    own = decoded(w, past[few], future[few], z[few], plan)
    metrics = {
        "kl/nats": each.sum().detach(),
        "kl/active": torch.tensor(float((each > 0.05).sum())),
        "tokens/shuffled": (surprise(other, future[few]) - surprise(own, future[few])).detach(),
    }
    share_done = (run.pretrain.updates - state.update) / run.pretrain.updates
    rate = run.pretrain.lr * (0.5 - 0.5 * math.cos(math.pi * share_done)) * min(1.0, state.update / model.warmup)
    names = core.named(state, "posterior.", "prior.", "decoder.")
    heavy = [name for name in names if name.endswith(".weight") and "norm" not in name]
    total = losses["tokens"] + model.beta / (plan.horizon * tokens.shape[-1]) * losses["kl"]
    split = {"decayed": heavy, "plain": [name for name in names if name not in heavy]}
    norms = {}
    for group, own_names in split.items():
        decay = dict.fromkeys(heavy, model.decay)
        norms[group] = step(state, w, total, own_names, rate, run, (0.9, 0.95), decay)
    return core.report(losses, metrics, norms)


# 3. Steps ---------------------------------------------------------------------------------------------------------------------


def step(
    state: Any, w: Weights, loss: Tensor, names: Iterable[str], lr: float, run: Any, betas: tuple[float, float], decay: Mapping[str, float]
) -> Tensor:  # fmt: skip
    """Adam (arXiv 1412.6980) after clipping to the norm of all ``names``; a weight also shrinks by lr * its decay. Returns the norm."""
    names = list(names)
    gradients = dict(zip(names, torch.autograd.grad(loss, [w[name] for name in names], retain_graph=True), strict=True))
    size = torch.sqrt(sum((g**2).sum() for g in gradients.values()))  # type: ignore[arg-type]
    first, second = betas
    for name, gradient in gradients.items():
        g = gradient * min(1.0, run.optim.clip / (float(size) + 1e-6))
        state.steps[name] += 1
        t = state.steps[name]
        state.mean[name] = first * state.mean.get(name, 0.0) + (1 - first) * g
        state.square[name] = second * state.square.get(name, 0.0) + (1 - second) * g**2
        moved = state.mean[name] / (1 - first**t) / (torch.sqrt(state.square[name] / (1 - second**t)) + run.optim.eps)
        state.weights[name] = state.weights[name] * (1 - lr * decay.get(name, 0.0)) - lr * moved
    return size
