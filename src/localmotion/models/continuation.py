"""Whether an episode goes on after a state: the discount predictor of DreamerV2 (arXiv 2010.02193, section 2), as a setting of a method.

A record holds the reward that led to its state, and whether the task ended there (`is_terminal`). So the head's probability at a state is
about what comes after that state, and its own reward counts in full. The head learns 1 - is_terminal; the constant gamma stays a factor
beside it. The release knows at the states where imagination starts whether they are ends; here the head's probability counts there, too.

Shapes: B sequences, T positions, F features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from localmotion.config import BehaviourConfig
from localmotion.models.heads import MLP


class Continuation(MLP):
    """Head that predicts from features (..., F) whether the episode goes on after their state."""

    def __init__(self, feat_dim: int, *, units: int, layers: int) -> None:
        super().__init__(feat_dim, 1, units=units, layers=layers)

    def logits(self, feat: Tensor) -> Tensor:
        """(..., F) -> (...)."""
        return self(feat).squeeze(-1).float()

    def probability(self, feat: Tensor) -> Tensor:
        """c in 0..1: (..., F) -> (...)."""
        return torch.sigmoid(self.logits(feat))

    def loss(self, feat: Tensor, is_terminal: Tensor) -> Tensor:
        """-ln p(1 - is_terminal), mean over all positions. feat (B, T, F), is_terminal (B, T)."""
        return F.binary_cross_entropy_with_logits(self.logits(feat), (~is_terminal).float())


def make_continuation(behaviour: BehaviourConfig, feat_dim: int, *, units: int, layers: int) -> Continuation | None:
    """The head, None without `BehaviourConfig.continuation`."""
    return Continuation(feat_dim, units=units, layers=layers) if behaviour.continuation else None


def continuation_losses(head: Continuation | None, feat: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss "continue" of features (B, T, F), which also trains the states. {} without a head."""
    return {} if head is None else {"continue": head.loss(feat, batch["is_terminal"])}


def continuation_scales(behaviour: BehaviourConfig) -> dict[str, float]:
    """Weight of `continuation_losses`."""
    return {"continue": 1.0} if behaviour.continuation else {}
