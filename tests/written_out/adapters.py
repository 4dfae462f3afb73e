"""DRP's adapters of z, written out from arXiv 2607.00808 (4.4 and Fig. 13) and from what each weight means.

Weights are a dict of names without the module's prefix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from written_out.motion import Weights, layer_norm, linear, two_layers

HEADS = 4


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
