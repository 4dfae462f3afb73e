"""DRP's motion encoder written out: Atomic Actions, Dual-Attention Encoder, masked decoder, and the global code of its ablation.

Written from arXiv 2607.00808 (4.2, section 9, Eqs. 5 and 13-19) and from what each weight means, in float64, with no function of the
product. Attention is computed for each query over the list of keys that it may see: nothing is masked.

Weights are a dict of names without the module's prefix. B sequences, T positions, K parts, P patch side, d token width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Index = list[tuple[int, int, int]]
Queries = list[tuple[Index, Index]]


def under(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights of a child, their names without ``prefix.``."""
    return {name[len(prefix) + 1 :]: value for name, value in weights.items() if name.startswith(prefix + ".")}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b; b is optional."""
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def layer_norm(weights: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias; x itself where the layer has no weights."""
    if f"{name}.weight" not in weights:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """x Phi(x)."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def two_layers(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Linear, GELU, linear."""
    return linear(weights, f"{name}.2", gelu(linear(weights, f"{name}.0", x)))


# Atomic Actions (4.2.1) ---------------------------------------------------------------------------------------------------------


@dataclass
class Motion:
    """Atomic Actions: patch (B,T,K,P,P,2), where (B,T,K,2), seen (B,T,K), track (B,T,K), episode (B,T)."""

    patch: Tensor
    where: Tensor
    seen: Tensor
    track: Tensor
    episode: Tensor


def crop(field: Tensor, x: float, y: float, side: int) -> Tensor:
    """The flow around a point, (side, side, 2): rows go down, columns go right, zeros outside of the field (S, S, 2)."""
    column, row = math.floor(x + 0.5), math.floor(y + 0.5)  # the nearest pixel
    out = torch.zeros(side, side, 2, dtype=torch.float64)
    for i, j in itertools.product(range(side), range(side)):
        r, c = row - side // 2 + i, column - side // 2 + j
        if 0 <= r < field.shape[0] and 0 <= c < field.shape[1]:
            out[i, j] = field[r, c]
    return out


def atomic_actions(batch: Mapping[str, Tensor], dae: Any) -> Motion:
    """The first K tracks' patches, clipped and scaled, and their positions as a share of the picture from -1 to 1."""
    flow, points = batch["flow"].double(), batch["tracks"].double()
    batch_size, time, side = flow.shape[:3]
    rows = []
    for b, t, k in itertools.product(range(batch_size), range(time), range(dae.keypoints)):
        rows.append(crop(flow[b, t], float(points[b, t, k, 0]), float(points[b, t, k, 1]), dae.patch))
    patch = torch.stack(rows).reshape(batch_size, time, dae.keypoints, dae.patch, dae.patch, 2)
    patch = patch.clamp(-dae.flow_clip, dae.flow_clip) / dae.flow_scale
    # Pixel 0 covers [0, 1) of the picture's side: its centre is at 0.5.
    where = (2 * (points[:, :, : dae.keypoints] + 0.5) / side - 1).clamp(-1.5, 1.5)
    episode = batch["is_first"].long().cumsum(1)
    return Motion(patch, where, batch["visible"][:, :, : dae.keypoints], batch["track_id"][:, :, : dae.keypoints], episode)


def hidden_set(seen: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """The set M (B,T,K): of each sequence's visible tokens the share ``ratio`` that drew the smallest noise (B, T*K)."""
    out = torch.zeros_like(seen).flatten(1)
    for b, row in enumerate(seen.flatten(1).tolist()):
        tokens = sorted((float(noise[b, i]), i) for i, there in enumerate(row) if there)
        for _, i in tokens[: round(len(tokens) * ratio)]:
            out[b, i] = True
    return out.view_as(seen)


# Dual-attention blocks (Eqs. 13-19) ---------------------------------------------------------------------------------------------


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of queries (Q, d) over L keys (L, d), each head with its own part of d."""
    out = []
    for q, k, v in zip(query.chunk(heads, 1), keys.chunk(heads, 1), values.chunk(heads, 1), strict=True):
        score = (q @ k.T / math.sqrt(q.shape[1])).exp()
        out.append(score / score.sum(1, keepdim=True) @ v)
    return torch.cat(out, 1)


def attention(weights: Weights, name: str, z: Tensor, heads: int, queries: Sequence[tuple[Index, Index]]) -> Tensor:
    """z plus attention ``name``; of each pair the first are tokens (b, t, row) that ask, the second the tokens that they see."""
    q, k, v = linear(weights, f"{name}_qkv", layer_norm(weights, f"{name}_norm", z)).chunk(3, -1)
    change = torch.zeros_like(z)
    for asking, seen in queries:
        change = change.index_put(at(asking), attend(q[at(asking)], k[at(seen)], v[at(seen)], heads))
    return z + (linear(weights, f"{name}_out", change) if f"{name}_out.weight" in weights else change)


def at(tokens: Index) -> tuple[Tensor, ...]:
    """The index of tokens (b, t, row)."""
    return tuple(torch.tensor(tokens).unbind(1))


def block(weights: Weights, z: Tensor, sight: tuple[Queries, Queries], dae: Any) -> Tensor:
    """One block on z (B,T,R,d): within each frame (Eq. 17), then along time for each row (Eq. 18), then the MLP (Eq. 19)."""
    within, along = sight
    if dae.intra:
        z = attention(weights, "intra", z, dae.heads, within)
    if dae.inter:
        z = attention(weights, "inter", z, dae.heads, along)
    return z + two_layers(weights, "mlp", layer_norm(weights, "mlp_norm", z))


def sight(motion: Motion, seen: Tensor, dae: Any, *, causal: bool) -> tuple[Queries, Queries]:
    """Who sees whom, within frames and along time. The first M rows are [MAT], then come the parts; only ``seen`` parts are seen by others.

    Along time a part sees the earlier positions (all, unless ``causal``) of the same episode and the same track, and itself. [MAT] sees
    those of the same episode, or itself alone without ``mat_inter``.
    """
    batch, time, parts = seen.shape
    mats = dae.mats
    there, track, episode = seen.tolist(), motion.track.tolist(), motion.episode.tolist()
    within, along = [], []
    for b, t in itertools.product(range(batch), range(time)):
        keys = [(b, t, row) for row in range(mats)] + [(b, t, mats + k) for k in range(parts) if there[b][t][k]]
        within.append(([(b, t, row) for row in range(mats + parts)], keys))
        for row in range(mats + parts):
            keys = []
            for when in range(t + 1 if causal else time):
                k, same = row - mats, episode[b][when] == episode[b][t]
                meets = dae.mat_inter if row < mats else there[b][when][k] and track[b][when][k] == track[b][t][k]
                if when == t or (same and meets):
                    keys.append((b, when, row))
            along.append(([(b, t, row)], keys))
    return within, along


def encode(weights: Weights, motion: Motion, seen: Tensor, dae: Any) -> Tensor:
    """Rows (B,T,M+K,d): [MAT] and the parts' local motion representations, from the ``seen`` tokens alone."""
    batch, time = seen.shape[:2]
    when = weights["time_embed"][:time]
    token = linear(weights, "patch_proj", motion.patch.flatten(3))
    if dae.coord:
        token = token + two_layers(weights, "coord_embed", motion.where)
    if dae.temporal:
        token = token + when[None, :, None]
    mats = []
    for index, mat in enumerate(weights["mat"].view(dae.mats, dae.dim)):
        row = mat.expand(time, dae.dim)
        if dae.mats_placed:  # the centres of the cells of a square grid, from left to right, then down
            side = math.isqrt(dae.mats)
            centre = [(2 * cell + 1) / side - 1 for cell in (index % side, index // side)]
            row = row + two_layers(weights, "coord_embed", torch.tensor(centre, dtype=torch.float64))
        mats.append(row + when if dae.temporal and dae.mat_temporal else row)
    z = torch.cat([torch.stack(mats, 1).expand(batch, time, dae.mats, dae.dim), token], 2)
    for index in range(dae.blocks):
        z = block(under(weights, f"blocks.{index}"), z, sight(motion, seen, dae, causal=True), dae)
    return layer_norm(weights, "out_norm", z)


def rebuild(weights: Weights, encoder: Weights, rows: Tensor, motion: Motion, hidden: Tensor, dae: Any) -> Tensor:
    """Patches (B,T,K,P,P,2): hidden tokens become the mask token with their place and time, the others are as encoded."""
    batch, time, parts = hidden.shape
    mask = weights["mask_token"].expand(batch, time, parts, dae.dim)
    if dae.coord:
        mask = mask + two_layers(encoder, "coord_embed", motion.where)
    if dae.temporal:
        mask = mask + encoder["time_embed"][:time][None, :, None]
    known = linear(weights, "embed", rows)
    z = torch.cat([known[:, :, : dae.mats], torch.where(hidden[..., None], mask, known[:, :, dae.mats :])], 2)
    for index in range(dae.decoder_blocks):
        z = block(under(weights, f"blocks.{index}"), z, sight(motion, motion.seen, dae, causal=dae.decoder_causal), dae)
    return linear(weights, "out", layer_norm(weights, "norm", z[:, :, dae.mats :])).view_as(motion.patch)


def patch_error(rebuilt: Tensor, truth: Tensor, chosen: Tensor) -> Tensor:
    """Eq. 5: 1/|M| sum over M of the squared norm of the error."""
    errors = [(rebuilt[i] - truth[i]).square().sum() for i in map(tuple, chosen.nonzero().tolist())]
    return torch.stack(errors).sum() / len(errors)


def recompose(
    weights: Weights, batch: Mapping[str, Tensor], noise: Tensor, dae: Any, *, from_code: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """a^agg (B,T,d) of all visible tokens, the loss of Eq. 5 and, with ``from_code``, the loss of rebuilding from a^agg alone."""
    motion = atomic_actions(batch, dae)
    encoder = under(weights, "encoder")
    agg = encode(encoder, motion, motion.seen, dae)[:, :, : dae.mats].flatten(2)
    if "project.weight" in encoder:
        agg = linear(encoder, "project", agg)
    hidden = hidden_set(motion.seen, noise, dae.mask_ratio)
    rows = encode(encoder, motion, motion.seen & ~hidden, dae)
    losses = {"masked": patch_error(rebuild(under(weights, "decoder"), encoder, rows, motion, hidden, dae), motion.patch, hidden)}
    if from_code:
        place = two_layers(encoder, "coord_embed", motion.where)
        known = torch.cat([agg[:, :, None].expand(*place.shape[:3], agg.shape[-1]), place], -1)
        losses["recompose"] = patch_error(
            two_layers(weights, "code_decoder", known).view_as(motion.patch), motion.patch, motion.seen
        )
    return agg, losses


# The ablation of Fig. 5b --------------------------------------------------------------------------------------------------------


def resampled(x: Tensor, size: int) -> Tensor:
    """The last dimension of x brought to ``size`` values: straight lines between the centres of the old ones, constant beyond the ends."""
    old = x.shape[-1]
    out = []
    for i in range(size):
        place = min(max((i + 0.5) * old / size - 0.5, 0.0), old - 1.0)
        left = min(int(place), old - 2)
        out.append((left + 1 - place) * x[..., left] + (place - left) * x[..., left + 1])
    return torch.stack(out, -1)


def global_code(weights: Weights, flow: Tensor, dae: Any) -> Tensor:
    """One code (B,T,d) of the whole field (B,T,S,S,2) at 64 pixels, by means or straight lines, through four convolutions."""
    x = flow.double().flatten(0, 1).permute(0, 3, 1, 2).clamp(-dae.flow_clip, dae.flow_clip) / dae.flow_scale
    share = x.shape[-1] // 64
    if share > 1:
        x = x.unflatten(3, (64, share)).mean(4).unflatten(2, (64, share)).mean(3)
    elif not share:
        x = resampled(resampled(x, 64).transpose(2, 3), 64).transpose(2, 3)
    for index in range(4):
        weight = weights[f"convolutions.{index}.weight"]
        windows = x.unfold(2, 4, 2).unfold(3, 4, 2)  # (N, C, h, w, 4, 4)
        x = torch.einsum("nchwij,ocij->nohw", windows, weight) + weights[f"convolutions.{index}.bias"][:, None, None]
        x = x / (1 + (-x).exp())
    code = layer_norm(weights, "out.1", linear(weights, "out.0", x.flatten(1)))
    if "project.weight" in weights:
        code = linear(weights, "project", code)
    return code.unflatten(0, flow.shape[:2])
