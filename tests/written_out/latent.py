"""LAPO, MaskLAM and LAOM, written out: latent actions from video, a policy over them, a decoder to actions; and LAOM's baselines.

Papers: LAPO arXiv 2312.10812, MaskLAM arXiv 2602.02259, LAOM arXiv 2502.00379.
Windows are cut one by one, as the papers say it; nothing comes from the product.

Shapes: N windows, C channels, S side, Z numbers of a latent action, A actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from written_out import core
from written_out.images import batch_norm

Weights = Mapping[str, Tensor]


# 1. Networks ------------------------------------------------------------------------------------------------------------------


def conv(w: Weights, name: str, x: Tensor, padding: int = 1) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=padding)


def double(w: Weights, name: str, x: Tensor) -> Tensor:
    """A transposed convolution that doubles the side."""
    return F.conv_transpose2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride=2)


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def residual(w: Weights, prefix: str, x: Tensor) -> Tensor:
    return x + conv(w, f"{prefix}second", relu(conv(w, f"{prefix}first", relu(x))))


def counted(w: Weights, prefix: str) -> range:
    return range(len({name[len(prefix) :].split(".")[0] for name in w if name.startswith(prefix)}))


def impala(w: Weights, prefix: str, x: Tensor) -> Tensor:
    """IMPALA's encoder, (N, C, S, S) to maps."""
    for stage in counted(w, f"{prefix}stages."):
        at = f"{prefix}stages.{stage}."
        x = F.max_pool2d(conv(w, f"{at}0", x), 3, 2, 1)
        x = residual(w, f"{at}3.", residual(w, f"{at}2.", x))
    return x


def encoded(w: Weights, prefix: str, x: Tensor) -> Tensor:
    """(N, C, S, S) -> (N, Z)."""
    z = core.linear(w, f"{prefix}project", relu(impala(w, f"{prefix}encoder.", x).flatten(1)))
    return core.linear(w, f"{prefix}out", relu(z)) if f"{prefix}out.weight" in w else z


def unet(state: Any, w: Weights, past: Tensor, z: Tensor) -> Tensor:
    """LAPO's forward model: z at every pixel of the input and alone at the bottleneck; tanh / 2."""
    tiled = z[:, :, None, None] * torch.ones_like(past[:, :1])
    x, maps = torch.cat([past, tiled], 1), []
    for level in counted(w, "dynamics.down."):
        at = f"dynamics.down.{level}."
        x = batch_norm(state, w, f"{at}norm.", conv(w, f"{at}conv", x))
        x = relu(F.max_pool2d(residual(w, f"{at}residual.", x), 2))
        maps.append(x)
    x = conv(w, "dynamics.bottom", x, padding=0)
    beside = z[:, :, None, None]
    for level in counted(w, "dynamics.up."):
        at = f"dynamics.up.{level}."
        x = batch_norm(state, w, f"{at}norm.", double(w, f"{at}conv", torch.cat([x, beside], 1)))
        x = relu(residual(w, f"{at}residual.", x))
        beside = maps.pop() if maps else past
    x = residual(w, "dynamics.last.1.", conv(w, "dynamics.last.0", torch.cat([x, beside], 1)))
    return 0.5 * torch.tanh(conv(w, "dynamics.last.3", relu(x), padding=0))


def residual_forward(w: Weights, past: Tensor, z: Tensor, prefix: str = "dynamics.") -> Tensor:
    """The forward model of the MaskLAM study, without its tanh."""
    maps = impala(w, f"{prefix}encoder.", past)
    x = torch.cat([maps, core.linear(w, f"{prefix}project", z).reshape(maps.shape)], 1)
    blocks = len(counted(w, f"{prefix}encoder.stages."))
    for block in range(blocks):
        x = double(w, f"{prefix}decoder.{3 * block}", x)
        x = residual(w, f"{prefix}decoder.{3 * block + 2}.", residual(w, f"{prefix}decoder.{3 * block + 1}.", x))
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    return conv(w, f"{prefix}decoder.{3 * blocks + 1}", x, padding=0)


def quantised(state: Any, z: Tensor, model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Each of the codebooks x positions vectors of 16 numbers becomes its nearest code; codes follow the mean of their vectors."""
    book, at = state.weights["inverse.quantizer.embedding"].clone(), "inverse.quantizer."
    books, codes, width = book.shape
    positions = model.latent // (books * width)
    out, loss, perplexity = torch.zeros_like(z), 0.0, 0.0
    for b in range(books):
        where = [[(b * width + d) * positions + p for d in range(width)] for p in range(positions)]
        vectors = torch.stack([z[:, index] for index in where], 1)  # (N, positions, width)
        distance = ((vectors.detach()[:, :, None] - book[b]) ** 2).sum(-1)
        chosen = distance.argmin(-1)  # (N, positions)
        nearest = book[b][chosen]
        for p, index in enumerate(where):
            out[:, index] = nearest[:, p]
        loss = loss + ((vectors - nearest) ** 2).mean() / books
        share = torch.stack([(chosen == c).double().mean() for c in range(codes)])
        perplexity = perplexity + torch.exp(-(share * torch.log(share + 1e-10)).sum()) / books
        count = torch.stack([(chosen == c).double().sum() for c in range(codes)])
        total = torch.stack([(vectors.detach() * (chosen == c)[..., None]).sum((0, 1)) for c in range(codes)])
        decay = model.code_decay
        new = decay * state.weights[f"{at}count"][b] + (1 - decay) * count
        new = (new + 1e-5) / (new.sum() + codes * 1e-5) * new.sum()
        state.weights[f"{at}count"][b] = new
        state.weights[f"{at}total"][b] = decay * state.weights[f"{at}total"][b] + (1 - decay) * total
        state.weights[f"{at}embedding"][b] = state.weights[f"{at}total"][b] / new[:, None]
    return z + (out - z).detach(), model.commitment * loss, perplexity


# 2. Windows -------------------------------------------------------------------------------------------------------------------


def frames(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T, 3, S, S) in [-0.5, 0.5]."""
    return (batch["image"].double() / 255 - 0.5).movedim(-1, 2)


def cut(x: Tensor, windows: Sequence[tuple[int, int]], first: int, last: int) -> Tensor:
    """For each window (sequence, t) the frames t + first to t + last, channels side by side."""
    return torch.stack([torch.cat([x[b, t + k] for k in range(first, last + 1)]) for b, t in windows])


def windows_of(batch: Mapping[str, Tensor], before: int, after: int) -> list[tuple[int, int]]:
    """All (sequence, t) with ``before`` frames up to t and ``after`` frames behind it."""
    rows, time = batch["image"].shape[:2]
    return [(b, t) for b in range(rows) for t in range(before - 1, time - after)]


def shared(found: Tensor, true: Tensor) -> Tensor:
    """R^2 over all numbers, relative to the mean of each column."""
    return 1 - ((found - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum()


# 3. Steps ---------------------------------------------------------------------------------------------------------------------


def adamw_step(state: Any, w: Weights, loss: Tensor, names: Iterable[str], lr: float, run: Any, decay: float) -> Tensor:
    """AdamW (arXiv 1711.05101): the weight shrinks by lr * decay of itself, then Adam's step. Returns the gradient's norm."""
    names = list(names)
    gradients = dict(zip(names, torch.autograd.grad(loss, [w[name] for name in names]), strict=True))
    norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))  # type: ignore[arg-type]
    for name, gradient in gradients.items():
        g = gradient * min(1.0, run.optim.clip / (float(norm) + 1e-6))
        state.steps[name] += 1
        t = state.steps[name]
        state.mean[name] = 0.9 * state.mean.get(name, 0.0) + 0.1 * g
        state.square[name] = 0.999 * state.square.get(name, 0.0) + 0.001 * g**2
        step = state.mean[name] / (1 - 0.9**t) / (torch.sqrt(state.square[name] / (1 - 0.999**t)) + run.optim.eps)
        state.weights[name] = state.weights[name] * (1 - lr * decay) - lr * step
    return norm


def learned(
    state: Any, w: Weights, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor], parts: Sequence[str], lr: float, run: Any,
    weights: Mapping[str, float] | None = None, decay: float | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    total = sum((weights or {}).get(name, 1.0) * loss for name, loss in losses.items())
    names = core.named(state, *parts, without=["inverse.quantizer."])
    names = [name for name in names if "running" not in name and "tracked" not in name]
    assert isinstance(total, Tensor)
    norm = adamw_step(state, w, total, names, lr, run, run.model.decay if decay is None else decay)
    return core.report(losses, metrics, {"model": norm})


def linear_rate(run: Any, update: int, warmup: int) -> float:
    """The rate rises over ``warmup`` updates and falls to 0 at the end of the run, both linearly."""
    settings = run.pretrain
    return float(settings.lr * min(1.0, update / warmup if warmup else 1.0) * (settings.updates - update) / settings.updates)


def cosine_rate(settings: Any, update: int) -> float:
    """Half a cosine from 1 to 0."""
    left = torch.tensor((settings.updates - update) / settings.updates, dtype=torch.float64)
    return float(settings.lr * (0.5 - 0.5 * torch.cos(torch.pi * left)))


# 4. LAPO ----------------------------------------------------------------------------------------------------------------------


def lapo_pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """E |o^_{t+1} - o_{t+1}|^2 with the commitment loss, and with `flow_weight` the error of the flow in sixteenths of the side."""
    model, w, x = run.model, core.leaves(state), frames(batch)
    vq = model.form == "vq"
    before = 2 if vq else 3
    at = windows_of(batch, before, 1)
    past, target = cut(x, at, 1 - before, 0), cut(x, at, 1, 1)
    z = encoded(w, "inverse.encoder.", cut(x, at, 1 - before, 1))
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    if vq:
        z, losses["commitment"], metrics["codes/perplexity"] = quantised(state, z, model)
    guess = unet(state, w, past, z) if vq else 0.5 * torch.tanh(residual_forward(w, past, z))
    losses["image"] = ((guess - target) ** 2).mean()
    metrics["image/of_copy"] = losses["image"].detach() / ((past[:, -3:] - target) ** 2).mean()
    if model.flow_weight > 0:
        flow = cut(batch["flow"].double().movedim(-1, 2), at, 1, 1) / (x.shape[-1] / 16)
        losses["flow"] = ((residual_forward(w, past, z, "flow.") - flow) ** 2).mean()
    lr = linear_rate(run, state.update, model.warmup)
    parts = ["inverse.", "dynamics.", "flow."]
    return learned(state, w, losses, metrics, parts, lr, run, {"flow": model.flow_weight})


def lapo_clone(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """E |pi(o_t) - IDM(...)|^2, before quantisation."""
    w, x, vq = core.leaves(state), frames(batch), run.model.form == "vq"
    before, seen = (2, 1) if vq else (3, 3)
    at = windows_of(batch, before, 1)
    target = encoded(state.weights, "inverse.encoder.", cut(x, at, 1 - before, 1))
    found = encoded(w, "policy.", cut(x, at, 1 - seen, 0))
    loss = ((found - target) ** 2).mean()
    lr = linear_rate(run, state.update, run.model.clone_warmup)
    return learned(state, w, {"latent": loss}, {"latent/r2": shared(found.detach(), target)}, ["policy."], lr, run)


def decode(seen: int, rate: Callable[[Any, int], float]) -> Any:
    """The decoder's update: steps within an episode whose ``seen`` frames are of that episode."""

    def update(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
        w, x = core.leaves(state), frames(batch)
        begins = batch["is_first"]
        at = [(b, t) for b, t in windows_of(batch, seen, 1) if not begins[b, t + 2 - seen : t + 2].any()]
        hidden = encoded(state.weights, "policy.", cut(x, at, 1 - seen, 0))
        layers = len(counted(w, "head.net."))
        for layer in range(layers):
            hidden = core.linear(w, f"head.net.{2 * layer + 1}", relu(hidden))
        true = torch.stack([batch["action"][b, t + 1] for b, t in at]).clamp(-1, 1)
        loss = ((hidden - true) ** 2).mean()
        metrics = {"action/r2": shared(hidden.detach(), true)}
        return learned(state, w, {"action": loss}, metrics, ["head."], rate(run, state.update), run)

    return update


def lapo_rate(run: Any, update: int) -> float:
    settings = run.online
    return float(settings.lr * (settings.updates - update) / settings.updates)


def masklam_rate(run: Any, update: int) -> float:
    return cosine_rate(run.online, update)


# 5. MaskLAM -------------------------------------------------------------------------------------------------------------------


def masks_of(batch: Mapping[str, Tensor], grow: int) -> Tensor:
    """(B, T, S, S): the mask, or the pixels within ``grow`` pixels of it in both directions; below 0 those of the background grow."""
    mask = batch["mask"]
    pad = abs(grow)
    background = grow < 0
    x = F.pad((~mask if background else mask).double(), [pad] * 4, value=float(background))
    side = mask.shape[-1]
    near = torch.stack([x[..., i : i + side, j : j + side] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]).amax(0)
    return 1 - near if background else near


def masked_inputs(x: Tensor, mask: Tensor, model: Any) -> Tensor:
    mask = mask[:, :, None]
    x = x * mask if model.input_mask else x
    return torch.cat([x, mask], 2) if model.mask_channel else x


def masklam_pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """The reconstruction weighed by floor + (1 - floor) M_{t+1}; the second stack ends k frames later, k uniform in 1..offset."""
    model, w, x = run.model, core.leaves(state), frames(batch)
    mask = masks_of(batch, model.mask_grow)
    if model.mask_dropout > 0:
        mask = torch.where((noise.uniform(mask.shape[:2]) < model.mask_dropout)[:, :, None, None], 1.0, mask)
    seen = masked_inputs(x, mask, model)
    at = windows_of(batch, 3, model.offset)
    rows = batch["image"].shape[0]
    k = 1 + noise.integers(model.offset, (rows, len(at) // rows)).flatten()
    later = torch.cat([cut(seen, [(b, t + int(step))], -2, 0) for (b, t), step in zip(at, k, strict=True)])
    past, target, agent = cut(seen, at, -2, 0), cut(x, at, 1, 1), cut(mask[:, :, None], at, 1, 1)
    z = encoded(w, "inverse.encoder.", torch.cat([past, later], 1))
    guess = unet(state, w, past, z) if model.forward_model == "unet" else 0.5 * torch.tanh(residual_forward(w, past, z))
    weight = model.floor + (1 - model.floor) * agent if model.loss_mask else torch.ones_like(agent)

    def error(picture: Tensor) -> Tensor:
        return (weight * (picture - target) ** 2).sum() / (3 * weight.sum())

    loss = error(guess)
    metrics = {"image/of_copy": loss.detach() / error(cut(x, at, 0, 0)), "mask/share": agent.mean()}
    lr = cosine_rate(run.pretrain, state.update)
    return learned(state, w, {"image": loss}, metrics, ["inverse.", "dynamics."], lr, run)


def masklam_clone(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """E |pi(o_{t-2..t}) - IDM(x_{t-2..t}, x_{t-1..t+1})|^2; the policy sees colours alone."""
    model, w, x = run.model, core.leaves(state), frames(batch)
    seen = masked_inputs(x, masks_of(batch, model.mask_grow), model)
    at = windows_of(batch, 3, 1)
    target = encoded(state.weights, "inverse.encoder.", torch.cat([cut(seen, at, -2, 0), cut(seen, at, -1, 1)], 1))
    found = encoded(w, "policy.", cut(x, at, -2, 0))
    loss = ((found - target) ** 2).mean()
    lr = cosine_rate(run.pretrain, state.update)
    return learned(state, w, {"latent": loss}, {"latent/r2": shared(found.detach(), target)}, ["policy."], lr, run)


# 6. LAOM ----------------------------------------------------------------------------------------------------------------------


def relu6(x: Tensor) -> Tensor:
    return torch.minimum(relu(x), torch.full_like(x, 6.0))


def strided(w: Weights, prefix: str, x: Tensor) -> Tensor:
    """Convolutions with stride 2, each with two residual blocks with ReLU6."""
    for stage in counted(w, f"{prefix}stages."):
        at = f"{prefix}stages.{stage}."
        x = F.conv2d(x, w[f"{at}0.weight"], w[f"{at}0.bias"], stride=2, padding=1)
        for block in (1, 2):
            x = x + conv(w, f"{at}{block}.second", relu6(conv(w, f"{at}{block}.first", relu6(x))))
    return x


def head_of(w: Weights, prefix: str, x: Tensor, again: Tensor) -> Tensor:
    """LayerNorm(x + W2 ReLU6(W1 x)) three times; ``again`` is put beside x before the second and the third."""
    for block in range(3):
        x = core.linear(w, f"{prefix}project.{block}", torch.cat([x, again], 1) if block else x)
        inner = core.linear(w, f"{prefix}down.{block}", relu6(core.linear(w, f"{prefix}up.{block}", x)))
        x = core.layer_norm(x + inner, w[f"{prefix}norm.{block}.weight"], w[f"{prefix}norm.{block}.bias"], 1e-5)
    return core.linear(w, f"{prefix}out", x)


def laom_latent(w: Weights, now: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    code = strided(w, "encoder.", now).flatten(1)
    both = torch.cat([code, strided(w, "encoder.", later).flatten(1)], 1)
    return code, head_of(w, "inverse.", both, both)


def ahead(x: Tensor, at: Sequence[tuple[int, int]], k: Tensor) -> Tensor:
    """The stacks that end k frames after each window's t."""
    return torch.cat([cut(x, [(b, t + int(step))], -2, 0) for (b, t), step in zip(at, k, strict=True)])


def laom_pretrain(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """E |g(sg(x_t), z) - E'(o_{t-1..t+1})|^2, without augmentation; with labels the error of their actions."""
    model, w, x = run.model, core.leaves(state), 2 * frames(batch)
    at, rows = windows_of(batch, 3, model.offset), batch["image"].shape[0]

    def distances() -> Tensor:
        return 1 + noise.integers(model.offset, (rows, len(at) // rows)).flatten()

    code, z = laom_latent(w, cut(x, at, -2, 0), ahead(x, at, distances()))
    target = strided(state.weights, "target.", cut(x, at, -1, 1)).flatten(1)
    found = head_of(w, "dynamics.", torch.cat([code.detach(), z], 1), z)
    losses = {"code": ((found - target) ** 2).mean()}
    metrics = {"code/r2": shared(found.detach(), target)}
    if model.supervised:
        y, begins = 2 * frames({"image": batch["labelled_image"]}), batch["labelled_is_first"]
        k = distances()
        kept = [n for n, (b, t) in enumerate(at) if not begins[b, t - 1 : t + int(k[n]) + 1].any()]
        chosen = [at[n] for n in kept]
        _, z = laom_latent(w, cut(y, chosen, -2, 0), ahead(y, chosen, k[kept]))
        true = torch.stack([batch["labelled_action"][b, t + 1] for b, t in chosen]).clamp(-1, 1)
        found = core.linear(w, "labels", z)[:, : true.shape[1]]
        losses["action"], metrics["action/r2"] = ((found - true) ** 2).mean(), shared(found.detach(), true)
    lr = linear_rate(run, state.update, model.warmup)
    parts = ["encoder.", "inverse.", "dynamics.", "labels."]
    out = learned(state, w, losses, metrics, parts, lr, run, {"action": model.action_weight}, decay=0.0)
    for name in core.named(state, "target."):
        fast = state.weights[name.replace("target.", "encoder.", 1)]
        state.weights[name] = (1 - model.tau) * state.weights[name] + model.tau * fast
    return out


def pooled(w: Weights, x: Tensor) -> Tensor:
    return core.linear(w, "policy.project", relu6(strided(w, "policy.encoder.", x).mean((2, 3))))


def laom_clone(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    w, x, at = core.leaves(state), 2 * frames(batch), windows_of(batch, 3, 1)
    _, target = laom_latent(state.weights, cut(x, at, -2, 0), cut(x, at, -1, 1))
    found = pooled(w, cut(x, at, -2, 0))
    loss, metrics = ((found - target) ** 2).mean(), {"latent/r2": shared(found.detach(), target)}
    return learned(state, w, {"latent": loss}, metrics, ["policy."], linear_rate(run, state.update, 0), run, decay=0.01)


def laom_decode(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    w, x, begins = core.leaves(state), 2 * frames(batch), batch["is_first"]
    at = [(b, t) for b, t in windows_of(batch, 3, 1) if not begins[b, t - 1 : t + 2].any()]
    hidden, layers = pooled(state.weights, cut(x, at, -2, 0)), len(counted(w, "head.net."))
    for layer in range(layers):
        hidden = core.linear(w, f"head.net.{2 * layer}", relu6(hidden) if layer else hidden)
    true = torch.stack([batch["action"][b, t + 1] for b, t in at]).clamp(-1, 1)
    loss, metrics = ((hidden - true) ** 2).mean(), {"action/r2": shared(hidden.detach(), true)}
    return learned(state, w, {"action": loss}, metrics, ["head."], lapo_rate(run, state.update), run, decay=0.01)


# 7. Baselines from labels alone -----------------------------------------------------------------------------------------------


def chosen(w: Weights, stack: Tensor, form: str) -> Tensor:
    """The policy's actions: LAOM's policy, or MaskLAM's policy and head."""
    if form == "pooled":
        return pooled(w, stack)
    hidden = encoded(w, "policy.0.", stack)
    for layer in range(len(counted(w, "policy.1.net."))):
        hidden = core.linear(w, f"policy.1.net.{2 * layer + 1}", relu(hidden))
    return hidden


def bc(state: Any, batch: Mapping[str, Tensor], noise: Any, run: Any) -> dict[str, Tensor]:
    """The policy learns the labels; with `relabel` an inverse model does, and the policy learns its labels of all video."""
    model, w, x = run.model, core.leaves(state), 2 * frames(batch)
    begins, rate = batch["is_first"], lapo_rate(run, state.update)
    at = [(b, t) for b, t in windows_of(batch, 3, 1) if not begins[b, t - 1 : t + 2].any()]
    true = torch.stack([batch["action"][b, t + 1] for b, t in at]).clamp(-1, 1)
    if not model.relabel:
        found = chosen(w, cut(x, at, -2, 0), model.policy)
        losses, metrics = {"action": ((found - true) ** 2).mean()}, {"action/r2": shared(found.detach(), true)}
        return only(state, w, losses, metrics, ["policy."], rate, run, "policy", 0.01)
    found = laom_latent(w, cut(x, at, -2, 0), cut(x, at, -1, 1))[1]
    losses, metrics = {"label": ((found - true) ** 2).mean()}, {"label/r2": shared(found.detach(), true)}
    out = only(state, w, losses, metrics, ["encoder.", "inverse."], rate, run, "inverse", 0.0)
    w, y = core.leaves(state), 2 * frames({"image": batch["video_image"]})
    every = windows_of(batch, 3, 1)
    now = cut(y, every, -2, 0)
    given = laom_latent(state.weights, now, cut(y, every, -1, 1))[1].clamp(-1, 1)
    found = chosen(w, now, model.policy)
    losses, metrics = {"action": ((found - given) ** 2).mean()}, {"action/r2": shared(found.detach(), given)}
    held = 0.0 if state.update < model.head_start else rate
    return {**out, **only(state, w, losses, metrics, ["policy."], held, run, "policy", 0.01)}


def only(
    state: Any, w: Weights, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor], parts: Sequence[str], lr: float, run: Any,
    group: str, decay: float,
) -> dict[str, Tensor]:  # fmt: skip
    """A step of one of several optimisers."""
    (loss,) = losses.values()
    norm = adamw_step(state, w, loss, core.named(state, *parts), lr, run, decay)
    return core.report(losses, metrics, {group: norm})
