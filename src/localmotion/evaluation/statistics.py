"""Statistics over seeds and tasks: mean, standard deviations, IQM, bootstrap intervals, learning curves on one grid.

A score is one number for one run (one seed on one task). Every statistic raises ValueError for empty and non-finite
input. Code that reads a run must handle a NaN before it comes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[..., Any]
"""A function that reduces (..., n) scores to (...) with ``axis=-1``: `mean`, `iqm`, numpy.median."""


def finite_scores(values: ArrayLike) -> Floats:
    """Scores as float64. Raises ValueError for empty and non-finite ones."""
    scores = np.asarray(values, dtype=np.float64)
    if scores.size == 0:
        raise ValueError("no scores")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are not finite")
    return scores


def mean(values: ArrayLike, axis: int = -1) -> Any:
    """Arithmetic mean along ``axis``."""
    return finite_scores(values).mean(axis=axis)


def population_std(values: ArrayLike, axis: int = -1) -> Any:
    """Standard deviation with divisor n. The papers of this field print it after "+-". One score gives 0."""
    return finite_scores(values).std(axis=axis)


def iqm(values: ArrayLike, axis: int = -1) -> Any:
    """Interquartile mean: the mean without the floor(n / 4) lowest and the floor(n / 4) highest scores.

    Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021); the number of removed
    scores is that of its released code (a 25 % trimmed mean). The IQM of fewer than four scores is their mean.
    """
    scores = np.sort(finite_scores(values), axis=axis)
    n = scores.shape[axis]
    cut = n // 4
    return np.take(scores, np.arange(cut, n - cut), axis=axis).mean(axis=axis)


@dataclass(frozen=True)
class Interval:
    """A two-sided interval around a point estimate; ``level`` is its nominal coverage, e.g. 0.95."""

    point: float
    low: float
    high: float
    level: float


def bootstrap_interval(
    groups: Sequence[ArrayLike],
    statistic: Statistic = iqm,
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Stratified percentile bootstrap of a statistic of pooled scores (Agarwal et al. 2021).

    ``groups`` holds one (n_task,) array of scores for each task. Several tasks must have a common scale, e.g. success
    rates. Each resample draws n_task scores with replacement within each task, pools them and takes ``statistic``
    over axis -1. The same ``seed`` gives the same interval. Raises ValueError for empty or non-finite scores, or a
    level outside (0, 1).
    """
    strata = [finite_scores(g).ravel() for g in groups]
    if not strata:
        raise ValueError("no scores")

    def draw(rng: np.random.Generator) -> Floats:
        drawn = np.concatenate([s[rng.integers(len(s), size=(resamples, len(s)))] for s in strata], axis=-1)  # (R, N)
        return np.asarray(statistic(drawn, axis=-1))

    low, high = percentiles(draw, level, resamples, seed)
    return Interval(float(statistic(np.concatenate(strata), axis=-1)), float(low), float(high), level)


def percentiles(draw: Callable[[np.random.Generator], Floats], level: float, resamples: int, seed: int) -> Floats:
    """The two ends, (2, ...), of a percentile bootstrap: ``draw`` gives (resamples, ...) values of the statistic.

    Raises ValueError for a level outside (0, 1) and without resamples.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must lie in (0, 1) and resamples be positive: {level}, {resamples}")
    rng = np.random.default_rng(seed)
    return np.quantile(draw(rng), [(1 - level) / 2, (1 + level) / 2], axis=0)


@dataclass(frozen=True, eq=False)
class Curve:
    """One run's score against env steps: strictly increasing (n,) ``env_steps`` and (n,) finite ``values``, n >= 1."""

    env_steps: Floats
    values: Floats

    def __post_init__(self) -> None:
        steps, values = finite_scores(self.env_steps), finite_scores(self.values)
        if steps.ndim != 1 or steps.shape != values.shape:
            raise ValueError(f"a curve needs two vectors of one length, not {steps.shape} and {values.shape}")
        if (np.diff(steps) <= 0).any():
            raise ValueError("the env steps of a curve must increase strictly")
        object.__setattr__(self, "env_steps", steps)
        object.__setattr__(self, "values", values)

    def at(self, grid: ArrayLike) -> Floats:
        """Values at (G,) env steps: linear between neighbouring points, NaN outside the first and last point."""
        return np.interp(np.asarray(grid, dtype=np.float64), self.env_steps, self.values, left=np.nan, right=np.nan)


@dataclass(frozen=True, eq=False)
class CurveBand:
    """Several seeds on one grid of env steps.

    env_steps (G,)    the grid
    values    (S, G)  each seed's value, NaN outside the seed's own range
    count     (G,)    number of seeds with a value, at least 1
    mean, std (G,)    over the seeds that have a value (population standard deviation)
    """

    env_steps: Floats
    values: Floats
    count: NDArray[np.int64]
    mean: Floats
    std: Floats

    @property
    def complete(self) -> NDArray[np.bool_]:
        """(G,) True where every seed has a value. Only there does the mean cover the same runs."""
        return self.count == len(self.values)


def aggregate_curves(curves: Sequence[Curve], grid: ArrayLike | None = None) -> CurveBand:
    """Put the curves of several seeds on a common grid.

    The default grid is the union of all seeds' env steps. Between two points of a seed, its value is interpolated
    linearly. Before its first and after its last point a seed has no value, so a run that stopped early does not count
    after its end. Grid points without any seed are dropped. Raises ValueError without curves, or if no grid point
    remains.
    """
    if not curves:
        raise ValueError("no curves to aggregate")
    points = np.concatenate([c.env_steps for c in curves]) if grid is None else finite_scores(grid).ravel()
    points = np.unique(points)
    values = np.stack([c.at(points) for c in curves])
    present = np.isfinite(values)
    count = present.sum(axis=0)
    keep = count > 0
    if not keep.any():
        raise ValueError("no grid point lies inside any curve")
    points, values, present, count = points[keep], values[:, keep], present[:, keep], count[keep]
    average = np.where(present, values, 0.0).sum(axis=0) / count
    spread = np.sqrt(np.square(np.where(present, values - average, 0.0)).sum(axis=0) / count)
    return CurveBand(points, values, count, average, spread)


def final_scores(curves: Sequence[Curve], last: int = 1) -> Floats:
    """One final score for each seed, (S,): the mean of its last ``last`` evaluations, or of all if there are fewer."""
    if last < 1:
        raise ValueError(f"last must be at least 1, not {last}")
    if not curves:
        raise ValueError("no curves")
    return np.array([c.values[-last:].mean() for c in curves])


@dataclass(frozen=True)
class Summary:
    """Statistics of one group of seeds for a table of results. ``interval`` is None for a single seed."""

    scores: tuple[float, ...]
    mean: float
    std: float
    iqm: float
    interval: Interval | None


def summarise(scores: ArrayLike, *, level: float = 0.95, seed: int = 0) -> Summary:
    """Mean, population standard deviation, IQM and the bootstrap interval of the IQM of one task's (S,) scores."""
    flat = finite_scores(scores).ravel()
    interval = bootstrap_interval([flat], iqm, level=level, seed=seed) if len(flat) > 1 else None
    return Summary(tuple(flat.tolist()), float(mean(flat)), float(population_std(flat)), float(iqm(flat)), interval)
