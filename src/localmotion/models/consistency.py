"""Action-state consistency: pairs of latent actions that lead to more different states should lie further apart (PreLAR, ECCV 2024).

The latent action of a step is replaced by that of another video at the same position. For step i

    D^s_i = KL[p(z | s_i, a_i) || p(z | s_i, a'_i)]    how much the predicted state changes; a target, without a gradient
    D^a_i = KL[q(a_i) || q(a'_i)]                       how much the latent action changes; it learns

and the order of D^a over all pairs of steps should be that of D^s. The release compares signs,

    1/N^2 sum_ij [sign(D^s_i - D^s_j) - sign(D^a_i - D^a_j)]^2

whose gradient is zero everywhere. The other forms here have a gradient; docs/decisions/0016 compares them. They compare d = ln(1 + D^a),
which has the same order: a KL of Gaussians without a floor of the deviation has no bound, and a few large ones would hide the others. d is
divided by its standard deviation over the batch (without a gradient), so ``sharpness`` 1 fits any scale.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from localmotion.models.distributions import categorical_kl
from localmotion.models.learned_actions import Code, swapped
from localmotion.models.rssm import RSSM, RSSMState

Form = Literal["none", "sign", "tanh", "logistic", "pearson"]
"""none: no loss. sign: the release. tanh: the release's with tanh for the sign of D^a. logistic: ln(1 + exp(-s d)) for each pair in the
state's order s. pearson: 1 - correlation of the ranks of D^s and the soft ranks of D^a."""


def distances(latent: RSSM, post: RSSMState, prior: Tensor, code: Code, action: Tensor) -> tuple[Tensor, Tensor]:
    """D^s and D^a, (B * (T - 1),) each, with the latent actions of another video, or by chance of the same one.

    ``post``: posterior states (B, T, ...). ``prior``: logits (B, T, S, C) of the prior with the videos' own latent actions ``action``
    (B, T, Z). ``code``: (B, T - 1, ...), what the latent actions from position 1 on were drawn from.
    """
    order = torch.rand(len(action), device=action.device).argsort()  # the same for all positions; a video may stay in its place
    given = action[order, 1:]  # (B, T - 1, Z)
    moved = (given != action[:, 1:]).any(-1)  # elsewhere D^s is 0, and not the rounding of two ways to compute it
    with torch.no_grad():
        before = RSSMState(*(part[:, :-1].flatten(0, 1) for part in post))
        other = latent.img_step(before, given.flatten(0, 1), sample=False).logits
        own = prior[:, 1:].flatten(0, 1)
        change = categorical_kl(F.log_softmax(own, -1), F.log_softmax(other, -1)) * moved.flatten()
    return change, code.divergence(swapped(code, order)).flatten()


def consistency_loss(form: Form, state: Tensor, action: Tensor, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """The loss of distances D^s and D^a (N,), and the agreement of their orders in [-1, 1] (Kendall's, over pairs that D^s orders).

    sign and tanh lie in [0, 4], pearson in [0, 2], logistic is positive. Raises ValueError for another form.
    """
    action = action.log1p()
    size = action.detach().std().clamp(min=1e-8)
    wanted = (state.unsqueeze(1) - state).sign()  # (N, N), target
    found = (action.unsqueeze(1) - action) * (sharpness / size)  # (N, N)
    ordered = wanted.abs().sum().clamp(min=1.0)
    agreement = (wanted * found.detach().sign()).sum() / ordered
    if form == "sign":
        loss = (wanted - found.sign()).square().mean()
    elif form == "tanh":
        loss = (wanted - found.tanh()).square().mean()
    elif form == "logistic":
        loss = (wanted.abs() * F.softplus(-wanted * found)).sum() / ordered
    elif form == "pearson":
        loss = 1 - _correlation(wanted.mean(1), found.sigmoid().mean(1))
    else:
        raise ValueError(f"no consistency loss {form!r}")
    return loss, agreement


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's, of (N,); 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)).clamp(min=1e-8)
