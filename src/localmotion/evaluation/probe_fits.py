"""How probes are fitted: ridge regression, a small network on codes, and a convolutional network on pictures (docs/studies.md).

`mutual_information_gap` needs no fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from localmotion.compute import PLAIN, Compute
from localmotion.evaluation.probe_data import Episodes, Floats

LAMBDAS = tuple(10.0**k for k in range(-4, 5))
"""Candidate ridge penalties, as factors on the number of samples. A tenth of the training episodes selects one."""

LEAST_SPREAD = 1e-10
"""A dimension of a target with a smaller variance does not vary."""
BINS = 20
"""Bins of the histograms of the mutual information gap."""


def r_squared(predicted: Floats, true: Floats) -> float:
    """Mean of `explained` over the dimensions that vary; 0 if none varies."""
    varies = true.astype(np.float64).var(0) > LEAST_SPREAD
    return float(explained(predicted[:, varies], true[:, varies]).mean()) if varies.any() else 0.0


def explained(predicted: Floats, true: Floats) -> NDArray[np.float64]:
    """R^2 of each dimension of two arrays (n, d), (d,): 1 - squared error / variance. NaN for a dimension that does not vary."""
    spread = true.astype(np.float64).var(0)
    error = ((predicted.astype(np.float64) - true) ** 2).mean(0)
    found: NDArray[np.float64] = 1 - error / np.where(spread > LEAST_SPREAD, spread, np.nan)
    return found


@dataclass(frozen=True)
class Fit:
    """What a probe predicts for the test rows, and its R^2."""

    score: float
    answer: Floats | None
    """(test rows, k) in the units of the target. None if no fit was possible."""

    def nmse(self, true: Floats, data: Episodes) -> float:
        """Mean squared error on the test rows divided by the variance of ``true`` (n, k) on the other rows, both averaged over dimensions.

        As in the MaskLAM study (arXiv 2602.02259). 1 for a probe that knows nothing, 0 for a target that does not vary.
        """
        spread = float(true[~data.tested].astype(np.float64).var(0).mean())
        if spread < 1e-10:
            return 0.0
        if self.answer is None:
            return 1.0
        return float(((self.answer.astype(np.float64) - true[data.tested]) ** 2).mean() / spread)


def _standard(x: Floats, fit: NDArray[np.bool_]) -> Floats:
    mean, std = x[fit].mean(0), x[fit].std(0)
    scaled: Floats = ((x - mean) / np.where(std > 1e-6, std, 1.0)).astype(np.float32)
    return scaled


def _folds(data: Episodes) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows for training, and rows of other episodes for choosing the penalty and the time to stop."""
    known = np.unique(data.episode[~data.tested])
    chosen = np.random.default_rng(1).permutation(known)[: max(len(known) // 10, 1)]
    check = np.isin(data.episode, chosen)
    return ~data.tested & ~check, check


def ridge(x: Floats, y: Floats, data: Episodes) -> float:
    """R^2 of `ridge_fit`."""
    return ridge_fit(x, y, data).score


def ridge_fit(x: Floats, y: Floats, data: Episodes) -> Fit:
    """Ridge regression from (n, d) to (n, k), scored on the test episodes. Other episodes choose the penalty."""
    fit, check = _folds(data)
    z = _standard(x, fit).astype(np.float64)
    mean = y[fit].mean(0).astype(np.float64)
    values, vectors = np.linalg.eigh(z[fit].T @ z[fit])  # (d,), (d, d)
    moment = vectors.T @ (z[fit].T @ (y[fit] - mean))  # (d, k)

    def answer(penalty: float, rows: NDArray[np.bool_]) -> Floats:
        weights = vectors @ (moment / (np.maximum(values, 0) + penalty * fit.sum())[:, None])  # (d, k)
        return (z[rows] @ weights + mean).astype(np.float32)

    best = max(LAMBDAS, key=lambda penalty: r_squared(answer(penalty, check), y[check]))
    found = answer(best, data.tested)
    return Fit(r_squared(found, y[data.tested]), found)


def mutual_information_gap(code: Floats, factors: Floats) -> NDArray[np.float64]:
    """(k,) mutual information gap of each factor (n, k) for a code (n, d).

    The difference of the two largest mutual informations between the factor and one number of the code, divided by the factor's
    entropy. 1: one number says all of the factor and no other says anything. 0: no number says more than another one. NaN for a factor
    that does not vary. A code of one number is compared with 0.

    Source: Chen et al. 2018 (arXiv 1802.04942), section 4. Probabilities are those of histograms of `BINS` bins of equal width between the
    least and the largest value. With few rows this overestimates every mutual information. The bias is about the same for all numbers.
    """
    codes, wanted = (np.stack([_binned(column) for column in x.T]) for x in (code, factors))  # (d, n), (k, n)
    gaps = np.full(len(wanted), np.nan)
    for j, factor in enumerate(wanted):
        whole = _entropy(np.bincount(factor))
        if whole > 0:
            known = sorted((_information(number, factor) for number in codes), reverse=True)
            gaps[j] = (known[0] - [*known, 0.0][1]) / whole
    return gaps


def _binned(x: Floats) -> NDArray[np.int64]:
    """Bins 0 .. `BINS` - 1 of (n,) values; all 0 if they are equal."""
    low, high = float(x.min()), float(x.max())
    if high <= low:
        return np.zeros(len(x), np.int64)
    bins: NDArray[np.int64] = ((x.astype(np.float64) - low) / (high - low) * BINS).astype(np.int64)
    return bins.clip(max=BINS - 1)


def _entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the shares of counts."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _information(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Mutual information in nats of two arrays (n,) of bins."""
    return _entropy(np.bincount(a)) + _entropy(np.bincount(b)) - _entropy(np.bincount(a * BINS + b))


def mlp(x: Floats, y: Floats, data: Episodes, *, updates: int = 1500, seed: int = 0) -> float:
    """R^2 of `mlp_fit`."""
    return mlp_fit(x, y, data, updates=updates, seed=seed).score


def mlp_fit(x: Floats, y: Floats, data: Episodes, *, updates: int = 1500, seed: int = 0) -> Fit:
    """An MLP with two hidden layers (width 256, dropout 0.1), scored on the test episodes.

    Other episodes choose when to stop.
    """
    fit, check = _folds(data)
    z, t = _standard(x, fit), _standard(y, fit)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(z.shape[1], 256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(256, t.shape[1]),
    )
    whole = torch.from_numpy(z)
    score, found = _best(net, lambda rows: whole[torch.from_numpy(rows)], t, data, fit, check, updates, seed)
    mean, std = y[fit].mean(0), y[fit].std(0)
    return Fit(score, None if found is None else (found * np.where(std > 1e-6, std, 1.0) + mean).astype(np.float32))


def idm(
    pictures: NDArray[np.uint8],
    y: Floats,
    data: Episodes,
    *,
    updates: int = 1000,
    seed: int = 0,
    compute: Compute = PLAIN,
) -> float:
    """R^2 of a small convolutional network that predicts ``y`` from the frames before and after, (n, 2, S, S, 3)."""
    fit, check = _folds(data)
    torch.manual_seed(seed)
    widths = (6, 32, 64, 64, 64)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()]
    side = -(-pictures.shape[2] // 16)
    net = nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * side * side, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, y.shape[1])
    )

    def inputs(rows: NDArray[np.int64]) -> Tensor:
        both = torch.from_numpy(pictures[rows]).to(compute.device).permute(0, 1, 4, 2, 3).flatten(1, 2)  # (n, 6, S, S)
        return both.float().div_(255.0).sub_(0.5).contiguous(memory_format=torch.channels_last)

    return _best(net.to(compute.device), inputs, _standard(y, fit), data, fit, check, updates, seed, compute, batch_size=64)[0]


def _best(
    net: nn.Module,
    inputs: Callable[[NDArray[np.int64]], Tensor],
    t: Floats,
    data: Episodes,
    fit: NDArray[np.bool_],
    check: NDArray[np.bool_],
    updates: int,
    seed: int,
    compute: Compute = PLAIN,
    batch_size: int = 128,
) -> tuple[float, Floats | None]:
    """Train ``net``. Returns R^2 and predictions on the test rows at the update with the best R^2 on the check rows.

    ``t`` holds standardized targets; R^2 does not depend on their scale.
    """
    rng, rows = np.random.default_rng(seed), np.flatnonzero(fit)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    best, kept, answer = -np.inf, 0.0, None

    @torch.no_grad()
    def predict(where: NDArray[np.bool_]) -> Floats:
        index = np.flatnonzero(where)
        with compute.autocast():
            found = [net(inputs(part)) for part in np.array_split(index, max(len(index) // 512, 1))]
        return torch.cat(found).float().cpu().numpy()

    for update in range(updates):
        batch = rng.choice(rows, min(batch_size, len(rows)), replace=False)
        with compute.autocast():
            found = net(inputs(batch))
        loss = F.mse_loss(found.float(), torch.from_numpy(t[batch]).to(compute.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (update + 1) % max(updates // 10, 1) == 0:
            net.eval()
            score = r_squared(predict(check), t[check])
            if score > best:
                best, answer = score, predict(data.tested)
                kept = r_squared(answer, t[data.tested])
            net.train()
    return kept, answer
