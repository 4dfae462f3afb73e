"""What stands between the two dynamics models of IPV and DRP, written out: the adapters of z, and APV's intrinsic bonus.

Written from arXiv 2607.00808 (4.4 and Fig. 13) and arXiv 2203.13880 (section 4.2: the bonus is the distance of a window's mean feature to
its nearest neighbours) and from what each weight means, in float64, with no function of the product.

Weights are a dict of names without the module's prefix. N rows, B sequences, T positions, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from written_out.motion import Weights, layer_norm, linear, two_layers

HEADS = 4
WINDOW = 5
NEIGHBOURS = 16


def adapt(weights: Weights, kind: str, feat: Tensor, *, stoch: int, classes: int) -> Tensor:
    """Adapter of features (..., S*C + D): a linear map, two layers, or learned queries that attend to the parts of z."""
    if kind == "linear":
        return feat @ weights["weight"].T + weights["bias"]
    if kind == "mlp":
        hidden = linear(weights, "0", feat)
        return linear(weights, "2", torch.where(hidden > 0, hidden, hidden.exp() - 1))
    rows = [_attended(weights, row, stoch, classes) for row in feat.flatten(0, -2)]
    return torch.stack(rows).view(*feat.shape[:-1], -1)


def _attended(weights: Weights, feat: Tensor, stoch: int, classes: int) -> Tensor:
    """The attention adapter of one feature: linear map plus gate times what the queries found."""
    flat = stoch * classes
    slices = len(weights["position"]) - stoch
    categoricals = linear(weights, "stoch_embed", feat[:flat].view(stoch, classes))
    deterministic = linear(weights, "deter_embed", feat[flat:].view(slices, -1))
    parts = layer_norm(weights, "key_norm", torch.cat([categoricals, deterministic]) + weights["position"])
    x = weights["query"]
    for layer in range(sum(name.startswith("to_query.") and name.endswith(".weight") for name in weights)):
        query = linear(weights, f"to_query.{layer}", layer_norm(weights, f"norms.{2 * layer}", x))
        key, value = linear(weights, f"to_key_value.{layer}", parts).chunk(2, 1)
        found = []
        for q, k, v in zip(query.chunk(HEADS, 1), key.chunk(HEADS, 1), value.chunk(HEADS, 1), strict=True):
            found.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v)
        x = x + linear(weights, f"to_out.{layer}", torch.cat(found, 1))
        x = x + two_layers(weights, f"mlps.{layer}", layer_norm(weights, f"norms.{2 * layer + 1}", x))
    return linear(weights, "linear", feat) + weights["gate"] * linear(weights, "project", x.flatten())


def bonus(buffers: Mapping[str, Tensor], feat: Tensor, is_first: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Bonus (B, T - 4) of features (B,T,F), and the buffers afterwards.

    A window's mean goes no further than its first frame's episode. The windows join the queue first, newest in front, and are compared
    with all that is in it; the mean distance to the nearest 16 is divided by its running mean, which is updated first.
    """
    batch, time, _ = feat.shape
    points = []
    for b in range(batch):
        for start in range(time - WINDOW + 1):
            end = start + 1
            while end < start + WINDOW and not is_first[b, end]:
                end += 1
            points.append(feat[b, start:end].mean(0) @ buffers["projection"])
    size = len(buffers["queue"])
    queue = torch.cat([torch.stack(points), buffers["queue"]])[:size]
    filled = min(int(buffers["filled"]) + len(points), size)
    raw = []
    for point in points:
        distances = sorted(float((point - other).square().sum().sqrt()) for other in queue[:filled])
        raw.append(sum(distances[:NEIGHBOURS]) / NEIGHBOURS)
    mean = 0.99 * float(buffers["mean"]) + 0.01 * sum(raw) / len(raw)
    after = {"queue": queue, "filled": torch.tensor(filled), "mean": torch.tensor(mean, dtype=torch.float64)}
    return torch.tensor(raw, dtype=torch.float64).view(batch, -1) / (mean + 1e-8), after
