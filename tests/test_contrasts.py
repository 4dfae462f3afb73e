"""Comparisons of variants: values of rliable, counts and p values by hand, intervals against closed forms and on simulated data."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmotion.evaluation.contrasts import (
    crossed_bootstrap,
    hierarchical_bootstrap,
    holm,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sign_flip_test,
    verdict,
)
from localmotion.evaluation.statistics import Interval, bootstrap_interval, iqm, mean
from property_examples import examples

# Scores of five and of four runs (rows) on three tasks (columns).
X = np.array([[0.62, 0.10, 0.93], [0.71, 0.35, 0.88], [0.55, 0.40, 1.10], [0.80, 0.22, 0.97], [0.66, 0.35, 0.75]])
Y = np.array([[0.60, 0.35, 0.70], [0.50, 0.12, 0.97], [0.66, 0.05, 0.81], [0.45, 0.30, 0.64]])
TAUS = [0.0, 0.35, 0.5, 0.66, 0.97, 1.1]

scores = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=6)


# --- rliable ----------------------------------------------------------------------------------------------------------
# What rliable 1.2.0 (github.com/google-research/rliable, 3ccd9f4; arch 7.2.0, scipy 1.17.1) returns for X and Y: aggregate_iqm,
# aggregate_optimality_gap, score_distributions and probability_of_improvement, and its 95 % intervals of 20,000, 4,000 (profile) and
# 5,000 (probability) resamples after numpy.random.seed(0). Intervals are of other random numbers, so they agree within a tolerance.


def test_aggregates_and_their_intervals_are_those_of_rliable() -> None:
    known = [
        (X, iqm, 0.6355555555555555, 0.58666667, 0.68888889),
        (Y, iqm, 0.5333333333333333, 0.47333333, 0.58833333),
        (X, optimality_gap, 0.3806666666666667, 0.334, 0.43),
        (Y, optimality_gap, 0.4875, 0.42333333, 0.55),
    ]
    for runs, statistic, point, low, high in known:
        found = bootstrap_interval(runs.T, statistic)
        assert found.point == pytest.approx(point, abs=1e-12)
        assert (found.low, found.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


def test_profiles_and_their_bands_are_those_of_rliable() -> None:
    for runs, share, low, high in (
        (X, [15, 11, 10, 7, 1, 0], [15, 10, 10, 5, 0, 0], [15, 13, 10, 9, 3, 0]),
        (Y, [12, 8, 6, 3, 0, 0], [12, 8, 4, 1, 0, 0], [12, 8, 8, 4, 0, 0]),  # a share of exactly 0 or 1 of a task never changes
    ):
        found = performance_profile(runs.T, TAUS)
        np.testing.assert_allclose(found.share, np.array(share) / runs.size, atol=1e-12)
        np.testing.assert_allclose(found.low, np.array(low) / runs.size, atol=1e-12)
        np.testing.assert_allclose(found.high, np.array(high) / runs.size, atol=1e-12)


def test_probability_of_improvement_is_that_of_rliable() -> None:
    found = probability_of_improvement(X.T, Y.T)
    assert found.point == pytest.approx(0.7666666666666666, abs=1e-12)
    assert (found.low, found.high) == (pytest.approx(0.56666667, abs=0.02), pytest.approx(0.925, abs=0.02))


# --- profiles and improvement -----------------------------------------------------------------------------------------


@given(st.lists(scores, min_size=1, max_size=4), st.integers(0, 100))
@examples(30)
def test_a_profile_counts_and_falls(tasks: list[list[float]], seed: int) -> None:
    taus = np.array([-2.0, -1.0, 0.0, 0.4, 1.0, 2.9, 3.0])
    found = performance_profile(tasks, taus, resamples=50, seed=seed)
    counted = [np.mean([sum(score > tau for score in task) / len(task) for task in tasks]) for tau in taus]
    np.testing.assert_allclose(found.share, counted)
    for line in (found.share, found.low, found.high):
        assert (np.diff(line) <= 1e-12).all()
    assert (found.share[0], found.share[-1]) == (1, 0)  # all lie above -2, and none above the highest score
    assert (found.low <= found.high).all()


def test_a_task_counts_once_however_many_runs_it_has() -> None:
    assert performance_profile([[1.0], [0.0] * 9], [0.5]).share.tolist() == [0.5]
    assert probability_of_improvement([[1.0], [0.0] * 9], [[0.0], [1.0] * 3]).point == 0.5


def test_bands_resample_within_each_task() -> None:
    found = performance_profile([[1.0] * 5, [0.0] * 5], [0.5])
    assert (found.low.tolist(), found.high.tolist()) == ([0.5], [0.5])
    mixed = performance_profile([[0.0, 1.0] * 200], [0.5], resamples=4000)
    assert mixed.high[0] - mixed.low[0] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 400), rel=0.06)


def test_ties_are_half_an_improvement() -> None:
    assert probability_of_improvement([[1.0, 2.0]], [[1.0, 2.0]]).point == 0.5
    assert probability_of_improvement([[1.0, 2.0]], [[1.0]]).point == 0.75
    # Task by task, so scales do not matter: better in one, worse in the other.
    assert probability_of_improvement([[900.0, 901.0], [0.1]], [[1.0], [0.2]]).point == 0.5
    sure = probability_of_improvement([[2.0, 3.0]], [[0.0, 1.0]])
    assert (sure.low, sure.point, sure.high) == (1, 1, 1)


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=3))
@examples(30)
def test_improvement_of_either_is_one_in_all(tasks: list[tuple[list[float], list[float]]]) -> None:
    xs, ys = [x for x, _ in tasks], [y for _, y in tasks]
    there, back = (probability_of_improvement(a, b, resamples=20) for a, b in ((xs, ys), (ys, xs)))
    assert there.point + back.point == pytest.approx(1)
    pairs = [np.mean([(x > y) + 0.5 * (x == y) for x in one for y in other]) for one, other in tasks]
    assert there.point == pytest.approx(np.mean(pairs))
    assert -1e-12 <= there.low <= there.high <= 1 + 1e-12


def test_both_sides_of_an_improvement_are_resampled() -> None:
    for x, y in (([[0.0, 2.0]], [[1.0]]), ([[1.0]], [[0.0, 2.0]])):
        found = probability_of_improvement(x, y)
        assert (found.low, found.point, found.high) == (0, 0.5, 1)


# --- paired tests -----------------------------------------------------------------------------------------------------


def test_smallest_p_values_of_a_sign_flip_test() -> None:
    assert sign_flip_test([0.3, 0.1, 0.2, 0.5, 0.1]) == 0.0625
    assert sign_flip_test([-1.0] * 8) == 0.0078125
    assert sign_flip_test([0.7]) == 1
    assert sign_flip_test([0.0, 0.0, 0.0]) == 1
    assert sign_flip_test([0.1] * 25) == 1 / 100_001  # 2 patterns in 2^25: none of the random ones


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7))
@examples(40)
def test_sign_flips_are_all_patterns(values: list[float]) -> None:
    x = np.array(values)
    sums = [abs(np.dot(signs, x)) for signs in itertools.product((-1, 1), repeat=len(x))]
    assert sign_flip_test(x) == np.mean(np.array(sums) >= abs(x.sum()) - 1e-9 * np.abs(x).sum())
    assert sign_flip_test(-x) == sign_flip_test(x) == sign_flip_test(3 * x)


def test_many_differences_are_tested_with_random_signs() -> None:
    x = np.array([*range(1, 15), *range(-8, 0)])  # 22 whole numbers: the distribution of their sum is a product of polynomials
    ways = np.ones(1)
    for value in np.abs(x):
        ways = np.convolve(ways, [1.0, *[0.0] * (2 * value - 1), 1.0])
    sums = np.arange(len(ways)) - np.abs(x).sum()
    exact = ways[np.abs(sums) >= x.sum()].sum() / 2.0 ** len(x)
    assert exact == pytest.approx(0.0498, abs=1e-4)
    assert sign_flip_test(x) == pytest.approx(exact, abs=0.003)
    assert sign_flip_test(x) == sign_flip_test(x)


def test_holm_by_hand() -> None:
    # Smallest first: 4 x .005, 3 x .01, 2 x .03, 1 x .04, and no value below the one before it.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.0078, 0.2, 0.6]), [0.0234, 0.4, 0.6])
    assert holm([0.5, 0.9]).tolist() == [1, 1]
    assert holm([0.04]).tolist() == [0.04]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_lowers(values: list[float]) -> None:
    p = np.array(values)
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(p * len(p), 1)).all()  # Bonferroni
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


# --- nested scores ----------------------------------------------------------------------------------------------------


def test_one_level_is_the_bootstrap_over_seeds() -> None:
    x = np.random.default_rng(0).normal(size=9)
    found, known = hierarchical_bootstrap(x), bootstrap_interval([x], mean)
    assert found.point == pytest.approx(known.point)
    assert (found.low, found.high) == (pytest.approx(known.low, abs=0.03), pytest.approx(known.high, abs=0.03))


def test_the_width_has_the_variance_between_seeds_and_that_within_them() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (40, 1, 1)) + rng.normal(0, 2, (40, 3, 1)) + rng.normal(0, 1, (40, 3, 4))
    tasks = x.mean(2)
    variance = tasks.mean(1).var() / 40 + tasks.var(1).mean() / (40 * 3) + x.var(2).mean() / (40 * 3 * 4)
    found = hierarchical_bootstrap(x, resamples=3000)
    assert found.point == pytest.approx(x.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)


def test_seeds_count_once_whatever_is_in_them() -> None:
    assert hierarchical_bootstrap([[1.0], [[0.0, 0.0, 0.0], [4.0]]]).point == 1.5
    still = hierarchical_bootstrap([[2.0, 2.0], [2.0]])
    assert (still.low, still.point, still.high) == (2, 2, 2)
    assert hierarchical_bootstrap([[0.0, 1.0]], seed=3) == hierarchical_bootstrap(np.array([[0.0, 1.0]]), seed=3)


def test_coverage_where_seeds_differ() -> None:
    """Eight seeds with an effect of their own on all four tasks: pooled scores would look four times as many as they are."""
    rng = np.random.default_rng(0)
    nested = pooled = wider = 0
    for trial in range(100):
        x = 0.1 + rng.normal(0, 0.1, (8, 1)) + rng.normal(0, 0.1, (8, 4))
        found = hierarchical_bootstrap(x, resamples=300, seed=trial)
        flat = bootstrap_interval([x.ravel()], mean, resamples=300, seed=trial)
        nested += found.low <= 0.1 <= found.high
        pooled += flat.low <= 0.1 <= flat.high
        wider += found.high - found.low > flat.high - flat.low
    assert 88 <= nested <= 99
    assert pooled <= 80
    assert wider >= 98


def test_the_width_of_a_crossed_interval_has_the_variance_of_tasks_that_all_seeds_share() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (30, 1)) + rng.normal(0, 2, 20) + rng.normal(0, 1, (30, 20))
    seeds, tasks = x.mean(1).var() / 30, x.mean(0).var() / 20
    rest = (x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()).var() / 600
    found = crossed_bootstrap(x)
    assert found.point == pytest.approx(x.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(seeds + tasks + rest), rel=0.05)
    assert hierarchical_bootstrap(x).high - hierarchical_bootstrap(x).low < 0.6 * (found.high - found.low)


def test_coverage_where_tasks_differ() -> None:
    """Eight tasks, the same for eight seeds, each with an effect of its own: only the crossed interval speaks of other tasks."""
    rng = np.random.default_rng(0)
    crossed = nested = 0
    for trial in range(200):
        x = 0.1 + rng.normal(0, 0.05, (8, 1)) + rng.normal(0, 0.2, 8) + rng.normal(0, 0.1, (8, 8))
        found = crossed_bootstrap(x, resamples=300, seed=trial), hierarchical_bootstrap(x, resamples=300, seed=trial)
        crossed += found[0].low <= 0.1 <= found[0].high
        nested += found[1].low <= 0.1 <= found[1].high
    assert 176 <= crossed <= 198
    assert nested <= 140


def test_one_task_crossed_is_the_bootstrap_over_seeds() -> None:
    x = np.random.default_rng(0).normal(size=9)
    found, known = crossed_bootstrap(x[:, None]), bootstrap_interval([x], mean)
    assert (found.low, found.high) == (pytest.approx(known.low, abs=0.03), pytest.approx(known.high, abs=0.03))
    with pytest.raises(ValueError, match="scores are an array"):
        crossed_bootstrap(x)


def test_the_interval_of_one_task_and_five_seeds_is_too_narrow() -> None:
    """docs/studies.md says so: it contains the true value in about 83 of 100 studies, not in 95."""
    rng = np.random.default_rng(0)
    found = [hierarchical_bootstrap(rng.normal(0, 1, 5), resamples=300, seed=trial) for trial in range(400)]
    assert np.mean([x.low <= 0 <= x.high for x in found]) == pytest.approx(0.83, abs=0.04)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.021, 0.3, "confirmed"),
        (0.02, 0.3, "undecided"),
        (-0.1, 0.02, "undecided"),
        (0.001, 0.019, "refuted"),  # above 0, but too small to matter
        (-0.3, -0.1, "refuted"),
    ],
)
def test_verdicts(low: float, high: float, expected: str) -> None:
    assert verdict(Interval(low, low, high, 0.95), 0.02) == expected


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[], [math.nan, 1.0], [math.inf]])
def test_empty_and_non_finite_scores_are_refused(bad: list[float]) -> None:
    one: list[Any] = [[1.0]]
    for call in (
        lambda: performance_profile([[1.0], bad], [0.5]),
        lambda: performance_profile([], [0.5]),
        lambda: performance_profile(one, bad),
        lambda: probability_of_improvement([bad], one),
        lambda: probability_of_improvement(one, [bad]),
        lambda: probability_of_improvement([], []),
        lambda: optimality_gap(bad),
        lambda: sign_flip_test(bad),
        lambda: holm(bad),
        lambda: hierarchical_bootstrap(bad),
        lambda: crossed_bootstrap([bad]),
        lambda: hierarchical_bootstrap([[1.0], bad]),
    ):
        with pytest.raises(ValueError, match="score"):
            call()


def test_what_is_not_a_comparison_is_refused() -> None:
    with pytest.raises(ValueError, match="same tasks for both, not 2 and 1"):
        probability_of_improvement([[1.0], [2.0]], [[1.0]])
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, 1.2])
    for smallest in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            verdict(Interval(0, 0, 1, 0.95), smallest)
    for call in (lambda: performance_profile([[1.0]], [0.5], level=1.0), lambda: hierarchical_bootstrap([1.0], resamples=0)):
        with pytest.raises(ValueError, match="level must lie"):
            call()
