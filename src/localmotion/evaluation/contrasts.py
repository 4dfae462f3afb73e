"""Comparisons of variants: performance profiles, probability of improvement, paired tests, intervals over nested scores.

Scores of several tasks need a common scale, except for the probability of improvement. Every function raises ValueError
for empty and non-finite input, and for input that is not paired where it has to be. Sources:

* Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021, arXiv 2108.13264), whose
  definitions the library rliable computes; tests compare with rliable 1.2.0.
* Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979).
* Saravanan et al., "Application of the hierarchical bootstrap to multi-level data in neuroscience" (2020, arXiv 2007.07797).
* Owen, "The pigeonhole bootstrap" (2007, arXiv 0712.1111).
* Phipson and Smyth, "Permutation P-values Should Never Be Zero" (2010, arXiv 1603.05766).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from localmotion.evaluation.statistics import Floats, Interval, finite_scores, percentiles

Verdict = Literal["confirmed", "refuted", "undecided"]
EXACT_SIGNS = 20
"""Most differences for which `sign_flip_test` tries every pattern of signs."""
_PATTERNS = 100_000  # random patterns of signs for more differences


class Contrast(NamedTuple):
    """A comparison that a study names before its runs: is variant ``of`` better than ``against``?"""

    of: str
    against: str
    tasks: tuple[str, ...]
    """Tasks of both."""
    seeds: tuple[int, ...]
    """Seeds of either. A seed counts once both have a finished run of it in every task."""


class Contrasts(NamedTuple):
    """A family of contrasts, and the smallest effect of interest in units of the score (None: no verdicts)."""

    pairs: tuple[Contrast, ...]
    smallest: float | None = None


@dataclass(frozen=True, eq=False)
class Profile:
    """Share of runs with a score above each threshold, (G,) each, and the ends of its pointwise interval."""

    thresholds: Floats
    share: Floats
    low: Floats
    high: Floats
    level: float


def performance_profile(
    tasks: Sequence[ArrayLike], thresholds: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Profile:
    """Run-score distribution with pointwise bootstrap bands (Agarwal et al. 2021, section 4.2).

        share(tau) = mean over tasks m of the share of m's runs with a score above tau

    ``tasks`` holds one (n_task,) array of scores for each task; ``thresholds`` (G,). Each resample draws n_task runs with
    replacement within each task.
    """
    strata, taus = _strata(tasks), finite_scores(thresholds).ravel()
    above = [(scores[:, None] > taus).astype(np.float64) for scores in strata]  # (n_task, G) each

    def draw(rng: np.random.Generator) -> Floats:
        """A resample is a number of times for each run, so it is one product with the (n_task, G) table."""
        return np.mean([_times(rng, resamples, len(table)) @ table / len(table) for table in above], axis=0)  # (R, G)

    low, high = percentiles(draw, level, resamples, seed)
    return Profile(taus, np.mean([table.mean(0) for table in above], axis=0), low, high, level)


def probability_of_improvement(
    xs: Sequence[ArrayLike], ys: Sequence[ArrayLike], *, level: float = 0.95, resamples: int = 5000, seed: int = 0
) -> Interval:
    """How probable it is that a run of X is better than a run of Y on a random task (Agarwal et al. 2021, section 4.3).

        P(X > Y) = mean over tasks of the mean over pairs of runs of (1 if x > y, 0.5 if x = y, else 0)

    ``xs`` and ``ys`` hold one array of scores for each task, in the same order; numbers of runs may differ. It needs no common
    scale of the tasks. Each resample draws the runs of X and of Y independently, within each task.
    """
    first, second = _strata(xs), _strata(ys)
    if len(first) != len(second):
        raise ValueError(f"needs the same tasks for both, not {len(first)} and {len(second)}")
    wins = [(x[:, None] > y) + 0.5 * (x[:, None] == y) for x, y in zip(first, second, strict=True)]  # (n_x, n_y) each

    def draw(rng: np.random.Generator) -> Floats:
        shares = []
        for table in wins:
            n, m = table.shape
            shares.append(((_times(rng, resamples, n) @ table) * _times(rng, resamples, m)).sum(1) / (n * m))  # (R,)
        return np.mean(shares, axis=0)

    low, high = percentiles(draw, level, resamples, seed)
    return Interval(float(np.mean([table.mean() for table in wins])), float(low), float(high), level)


def optimality_gap(values: ArrayLike, axis: int = -1) -> Any:
    """By how much scores miss 1 on average, 1 - mean(min(score, 1)) (Agarwal et al. 2021, section 4.3). Lower is better."""
    return 1 - np.minimum(finite_scores(values), 1.0).mean(axis=axis)


def _strata(tasks: Sequence[ArrayLike]) -> list[Floats]:
    if not len(tasks):
        raise ValueError("no scores")
    return [finite_scores(scores).ravel() for scores in tasks]


def _times(rng: np.random.Generator, resamples: int, runs: int) -> Floats:
    """How often each of ``runs`` is drawn in each resample of ``runs`` draws with replacement, (R, runs)."""
    return rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples).astype(np.float64)


# --- paired differences -----------------------------------------------------------------------------------------------


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p of a paired sign-flip test: are (n,) differences symmetric around 0?

    p is the share of the 2^n patterns of signs whose mean is at least as far from 0 as the observed one. It cannot fall below
    2 / 2^n: 0.0625 for 5 differences, 0.0078 for 8. For n up to 20 all patterns are tried. For more, 100,000 random ones
    are, with a fixed seed and p = (1 + found) / (1 + tried) (Phipson and Smyth 2010).
    """
    values = finite_scores(differences).ravel()
    enough = abs(values.sum()) - 1e-9 * np.abs(values).sum()  # sums in another order differ by rounding
    if len(values) <= EXACT_SIGNS:
        sums = values[:1]  # a pattern and its opposite are equally far from 0, so the first sign can stay
        for value in values[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= enough).mean())
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        signs = rng.integers(0, 2, size=(_PATTERNS // 100, len(values))) * 2 - 1
        found += int((np.abs(signs @ values) >= enough).sum())
    return (1 + found) / (1 + _PATTERNS)


def holm(p_values: ArrayLike) -> Floats:
    """Adjusted p values, (m,), of a family of m tests (Holm 1979): the chance of any false rejection stays below alpha.

    adjusted of the i-th smallest p (i from 1) = max over j <= i of min((m - j + 1) p_j, 1)
    """
    p = finite_scores(p_values).ravel()
    if ((p < 0) | (p > 1)).any():
        raise ValueError("p values lie between 0 and 1")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(len(p), 0, -1), 1.0))
    return adjusted


def hierarchical_bootstrap(scores: Any, *, level: float = 0.95, resamples: int = 5000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of nested scores (Saravanan et al. 2020).

    ``scores`` is a nested sequence: seeds, in each seed tasks or bodies, in each of them episodes, to any depth, e.g. an array
    (seeds, tasks). The point is the mean of the seeds' means, each the mean of the means in it. A resample draws as
    many seeds as there are, with replacement, then within each drawn seed as many of its tasks, and so on. With one score for
    each seed it is the bootstrap over seeds. Drawing the tasks too adds to the width: the variance of a resample is that of the
    seeds' means over n seeds, plus the mean variance within a seed over n seeds x m tasks.

    The interval shows how much the mean would change with other seeds. Of other tasks it speaks only where each seed has tasks of
    its own. Where all seeds have the same ones, what a task adds to all seeds counts as if it were drawn anew for each, so the
    interval is too narrow for a claim about other tasks: see `crossed_bootstrap`.
    """

    def draw(rng: np.random.Generator) -> Floats:
        return _nested_draws(scores, resamples, rng)

    point = _nested_mean(scores)
    low, high = percentiles(draw, level, resamples, seed)
    return Interval(point, float(low), float(high), level)


def _nested_mean(node: Any) -> float:
    if np.isscalar(node):
        return float(finite_scores(node))
    if not len(node):
        raise ValueError("no scores")
    return float(np.mean([_nested_mean(child) for child in node]))


def _nested_draws(node: Any, count: int, rng: np.random.Generator) -> Floats:
    """``count`` resampled means of a node, (count,). A child that is drawn twice is resampled twice."""
    if np.isscalar(node):
        return np.full(count, node, dtype=np.float64)
    picks = rng.integers(len(node), size=(count, len(node)))
    values = np.empty(picks.shape)
    for i, child in enumerate(node):
        here = picks == i
        values[here] = _nested_draws(child, int(here.sum()), rng)
    return values.mean(axis=1)


def crossed_bootstrap(scores: ArrayLike, *, level: float = 0.95, resamples: int = 5000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of scores (n seeds, m tasks), for claims about other seeds and other such tasks.

    All seeds have the same tasks, so a resample draws seeds and tasks each once, with replacement, and takes the mean of the drawn
    rows and columns (the pigeonhole bootstrap, Owen 2007). The variance of a resample counts what a seed adds to all tasks over n,
    what a task adds to all seeds over m, and the rest over n m, but three times, so it is slightly too wide. With one task it is
    the bootstrap over seeds. Few tasks say little about others: with two, half of the resamples have one of them only, twice.
    """
    table = finite_scores(scores)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"scores are an array (seeds, tasks), not of shape {table.shape}")
    n, m = table.shape

    def draw(rng: np.random.Generator) -> Floats:
        rows = rng.multinomial(n, np.full(n, 1 / n), resamples) / n  # (R, n) shares
        columns = rng.multinomial(m, np.full(m, 1 / m), resamples) / m
        found: Floats = np.einsum("rn,nm,rm->r", rows, table, columns)
        return found

    low, high = percentiles(draw, level, resamples, seed)
    return Interval(float(table.mean()), float(low), float(high), level)


def verdict(interval: Interval, smallest: float) -> Verdict:
    """What an interval of a difference says about ``smallest``, the smallest effect of interest, above 0.

    "confirmed": the whole interval lies above it. "refuted": the whole interval lies below it, so the effect is absent or too
    small to matter. "undecided": the interval contains it.
    """
    if not 0 < smallest < np.inf:
        raise ValueError(f"the smallest effect of interest is above 0, not {smallest}")
    if interval.low > smallest:
        return "confirmed"
    return "refuted" if interval.high < smallest else "undecided"
