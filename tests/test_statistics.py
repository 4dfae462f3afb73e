"""Picture metrics against brute force, statistics over seeds against closed forms, embeddings on known clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from localmotion.evaluation import embedding, metrics, statistics
from localmotion.evaluation.statistics import Curve, aggregate_curves, bootstrap_interval, final_scores, iqm
from property_examples import examples

torch.set_num_threads(1)

scores = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=24)


# --- pictures ---------------------------------------------------------------------------------------------------------


def brute_ssim(x: NDArray[np.float64], y: NDArray[np.float64], span: float) -> float:
    """Wang et al. 2004 on one channel, window by window, the window built straight from its two-dimensional formula."""
    window = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)])
    window /= window.sum()
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(found))


def pictures(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(*shape, generator=g, dtype=torch.float64)
    return a, (a + 0.2 * torch.randn(*shape, generator=g, dtype=torch.float64)).clamp(0, 1)


def test_ssim_equals_a_window_by_window_computation() -> None:
    a, b = pictures(0, 2, 2, 3, 14, 17)
    expected = [
        [np.mean([brute_ssim(a[i, j, c].numpy(), b[i, j, c].numpy(), 1.0) for c in range(3)]) for j in range(2)] for i in range(2)
    ]
    torch.testing.assert_close(metrics.ssim(a, b), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_ssim_of_constant_pictures_is_the_luminance_term() -> None:
    a, b = torch.full((1, 16, 16), 0.25), torch.full((1, 16, 16), 0.75)
    c1 = 0.01**2
    expected = (2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1)  # variances vanish, so the second factor is c2 / c2
    assert metrics.ssim(a, b).item() == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 10_000))
@examples(15)
def test_metrics_are_symmetric_bounded_and_perfect_on_equal_pictures(seed: int) -> None:
    a, b = pictures(seed, 3, 12, 12)
    assert metrics.ssim(a, b).item() == pytest.approx(metrics.ssim(b, a).item(), abs=1e-12)
    assert -1 <= metrics.ssim(a, b).item() < 1
    assert metrics.ssim(a, a).item() == pytest.approx(1, abs=1e-12)
    assert math.isinf(metrics.psnr(a, a).item())
    assert metrics.psnr(a, b).item() == metrics.psnr(b, a).item()


def test_psnr_closed_forms_and_shapes() -> None:
    black = torch.zeros(5, 2, 3, 4, 4)
    offset = torch.full_like(black, 0.1)
    assert metrics.psnr(black, offset).shape == (5, 2)
    torch.testing.assert_close(metrics.psnr(black, offset), torch.full((5, 2), 20.0, dtype=torch.float64), rtol=1e-6, atol=0)
    one_off = torch.zeros(3, 4, 4, dtype=torch.uint8)
    one_off[0, 0, 0] = 255
    assert metrics.psnr(one_off, torch.zeros_like(one_off)).item() == pytest.approx(10 * math.log10(48))


def test_uint8_and_float_pictures_agree() -> None:
    a, b = pictures(3, 3, 16, 16)
    a8, b8 = (a * 255).round().to(torch.uint8), (b * 255).round().to(torch.uint8)
    for measure in (metrics.psnr, metrics.ssim):
        torch.testing.assert_close(measure(a8, b8), measure(a8 / 255.0, b8 / 255.0), rtol=1e-5, atol=1e-6)


def test_metrics_refuse_what_they_cannot_measure() -> None:
    a = torch.zeros(3, 16, 16)
    with pytest.raises(ValueError, match="shape"):
        metrics.psnr(a, a[:, :8])
    with pytest.raises(ValueError, match="dtype"):
        metrics.psnr(a, a.to(torch.uint8))
    with pytest.raises(ValueError, match="data_range"):
        metrics.psnr(a.to(torch.int32), a.to(torch.int32))
    with pytest.raises(ValueError, match="positive"):
        metrics.psnr(a, a, data_range=0.0)
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(a[:, :10], a[:, :10])


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_golden_values() -> None:
    runs = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 99.0]
    assert statistics.mean(runs) == 15
    assert iqm(runs) == 3.5  # 2, 3, 4, 5
    assert iqm([1.0, 2.0, 30.0]) == 11  # fewer than four: nothing is cut
    assert iqm([0.0, 4.0, 5.0, 6.0, 100.0]) == 5  # floor(5 / 4) = 1 at either end
    assert statistics.population_std([2.0, 4.0]) == 1
    assert statistics.population_std([7.0]) == 0


@given(scores, st.floats(0.1, 10), st.floats(-100, 100))
def test_location_and_spread_are_equivariant(values: list[float], scale: float, shift: float) -> None:
    x = np.array(values)
    for centre in (statistics.mean, iqm):
        assert min(values) - 1e-9 <= centre(x) <= max(values) + 1e-9
        assert centre(scale * x + shift) == pytest.approx(scale * centre(x) + shift, abs=1e-6)
        assert centre(x[::-1]) == pytest.approx(centre(x), abs=1e-9)
    assert statistics.population_std(scale * x + shift) == pytest.approx(scale * statistics.population_std(x), abs=1e-6)


@given(scores)
def test_iqm_ignores_how_far_an_outlier_lies(values: list[float]) -> None:
    x = np.array([*values, 2e3, 2e3, 2e3])
    far = x.copy()
    far[-1] = 1e9
    if len(x) // 4 >= 1:
        assert iqm(far) == pytest.approx(iqm(x))


@given(st.lists(scores, min_size=1, max_size=4), st.integers(0, 1000))
@examples(30)
def test_bootstrap_interval_is_seeded_and_inside_the_data(groups: list[list[float]], seed: int) -> None:
    first = bootstrap_interval(groups, resamples=200, seed=seed)
    assert first == bootstrap_interval(groups, resamples=200, seed=seed)
    flat = [v for g in groups for v in g]
    assert min(flat) - 1e-9 <= first.low <= first.high <= max(flat) + 1e-9
    assert first.point == pytest.approx(iqm(flat))
    wide = bootstrap_interval(groups, resamples=200, seed=seed, level=0.99)
    assert wide.low <= first.low + 1e-12
    assert first.high <= wide.high + 1e-12


def test_bootstrap_resamples_within_each_task() -> None:
    # Two tasks without any spread inside: pooled resampling would mix them and give a wide interval, stratified gives
    # none.
    result = bootstrap_interval([[0.0] * 5, [1.0] * 5], statistics.mean)
    assert (result.low, result.point, result.high) == (0.5, 0.5, 0.5)


def test_bootstrap_of_the_mean_matches_the_normal_interval() -> None:
    x = np.random.default_rng(0).normal(10, 2, 400)
    found = bootstrap_interval([x], statistics.mean, resamples=4000)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert found.low == pytest.approx(x.mean() - half, abs=0.03)
    assert found.high == pytest.approx(x.mean() + half, abs=0.03)


def test_bootstrap_of_any_statistic_along_the_last_axis_with_five_thousand_resamples() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 9))
    found = bootstrap_interval([first, second[:6]], np.median)
    draw = np.random.default_rng(0)
    drawn = [x[draw.integers(len(x), size=(5000, len(x)))] for x in (first, second[:6])]
    low, high = np.quantile(np.median(np.concatenate(drawn, 1), 1), [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    asked: list[tuple[tuple[int, ...], int]] = []

    def recorded(values: NDArray[np.float64], *, axis: int) -> NDArray[np.float64]:
        asked.append((values.shape, axis))
        return values.mean(axis)

    bootstrap_interval([first, second], recorded)
    assert asked == [((5000, 18), -1), ((18,), -1)]


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_statistics_refuse_empty_and_non_finite(bad: list[float]) -> None:
    for statistic in (statistics.mean, statistics.population_std, iqm, statistics.summarise):
        with pytest.raises(ValueError, match="score"):
            statistic(bad)
    with pytest.raises(ValueError, match="score"):
        bootstrap_interval([[1.0], bad])


# --- learning curves --------------------------------------------------------------------------------------------------


def test_curves_are_interpolated_but_never_extrapolated() -> None:
    short, long = Curve([0, 100], [0, 10]), Curve([50, 150, 250], [20, 40, 60])
    band = aggregate_curves([short, long])
    assert band.env_steps.tolist() == [0, 50, 100, 150, 250]
    np.testing.assert_array_equal(band.values, [[0, 5, 10, np.nan, np.nan], [np.nan, 20, 30, 40, 60]])
    assert band.count.tolist() == [1, 2, 2, 1, 1]
    assert band.complete.tolist() == [False, True, True, False, False]
    assert band.mean.tolist() == [0, 12.5, 20, 40, 60]
    assert band.std.tolist() == [0, 7.5, 10, 0, 0]
    assert final_scores([short, long]).tolist() == [10, 60]
    assert final_scores([short, long], last=2).tolist() == [5, 50]


curves = st.lists(st.tuples(st.integers(0, 1000), st.floats(-100, 100)), min_size=1, max_size=12, unique_by=lambda p: p[0]).map(
    lambda points: Curve(*np.array(sorted(points), dtype=float).T)
)


@given(st.lists(curves, min_size=1, max_size=5))
def test_band_lies_between_its_seeds_and_covers_no_more_than_they_do(seeds: list[Curve]) -> None:
    band = aggregate_curves(seeds)
    for row, seed in zip(band.values, seeds, strict=True):
        inside = (band.env_steps >= seed.env_steps[0]) & (band.env_steps <= seed.env_steps[-1])
        np.testing.assert_array_equal(np.isfinite(row), inside)
        np.testing.assert_allclose(row[np.isin(band.env_steps, seed.env_steps)], seed.values)  # own points are kept exactly
    assert (band.mean >= np.nanmin(band.values, axis=0) - 1e-9).all()
    assert (band.mean <= np.nanmax(band.values, axis=0) + 1e-9).all()
    np.testing.assert_allclose(band.std, np.nanstd(band.values, axis=0), atol=1e-9)
    shuffled = aggregate_curves(seeds[::-1])
    np.testing.assert_allclose(shuffled.mean, band.mean, atol=1e-9)


def test_curves_refuse_disorder() -> None:
    with pytest.raises(ValueError, match="increase"):
        Curve([0, 0], [1, 2])
    with pytest.raises(ValueError, match="length"):
        Curve([0, 1], [1])
    with pytest.raises(ValueError, match="finite"):
        Curve([0, 1], [1, math.nan])
    with pytest.raises(ValueError, match="no curves"):
        aggregate_curves([])
    with pytest.raises(ValueError, match="grid point"):
        aggregate_curves([Curve([0, 1], [0, 0])], grid=[5])


def test_summary_of_one_seed_has_no_interval() -> None:
    assert statistics.summarise([3.0]).interval is None
    four = statistics.summarise([1.0, 2.0, 3.0, 10.0])
    assert (four.mean, four.iqm) == (4.0, 2.5)
    assert four.interval is not None
    assert 1 <= four.interval.low < 2.5 < four.interval.high <= 10


# --- embeddings -------------------------------------------------------------------------------------------------------


def clusters(gap: float, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    rng = np.random.default_rng(seed)
    centres = np.eye(3, 8) * gap
    return np.concatenate([c + rng.normal(size=(20, 8)) for c in centres]), np.repeat(np.array(["left", "push", "turn"]), 20)


def test_separate_classes_are_found_and_mixed_ones_are_not() -> None:
    far, labels = clusters(30.0)
    assert embedding.knn_accuracy(far, labels) == 1
    assert embedding.silhouette(far, labels) > 0.8
    mixed, _ = clusters(0.0)
    assert embedding.knn_accuracy(mixed, labels) < 0.6
    assert embedding.silhouette(mixed, labels) < 0.05


def test_knn_counts_votes_breaks_ties_by_the_nearest_and_skips_the_own_group() -> None:
    line = np.array([[0.0], [1.0], [2.1], [10.0]])
    assert embedding.knn_accuracy(line, ["a", "a", "b", "b"], k=1) == 0.75  # 2.1 is nearest to 1.0, an "a"
    # k = 2 at 0.0 sees a, b: one vote each, the nearer one decides.
    assert embedding.knn_accuracy(np.array([[0.0], [1.0], [1.5]]), ["b", "b", "a"], k=2) == pytest.approx(1 / 3)
    # Windows of one clip lie together; without their own clip nothing of that label is left.
    pairs = np.array([[0.0], [0.1], [5.0], [5.1]])
    names = ["a", "a", "b", "b"]
    assert embedding.knn_accuracy(pairs, names, k=1) == 1
    assert embedding.knn_accuracy(pairs, names, k=1, groups=[0, 0, 1, 1]) == 0


def test_tsne_is_reproducible_and_keeps_clusters_apart() -> None:
    x, labels = clusters(30.0)
    first = embedding.tsne(x)
    assert first.shape == (60, 2)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, embedding.tsne(x))
    assert embedding.knn_accuracy(first, labels) == 1


@pytest.mark.parametrize("shape", [(4, 3), (12, 1), (120, 64)])
def test_tsne_takes_few_vectors_one_dimension_and_many_dimensions(shape: tuple[int, int]) -> None:
    xy = embedding.tsne(np.random.default_rng(0).normal(size=shape))
    assert xy.shape == (shape[0], 2)
    assert np.isfinite(xy).all()


def test_embedding_edges() -> None:
    assert (embedding.tsne(np.ones((6, 3))) == 0).all()
    with pytest.raises(ValueError, match="4 vectors"):
        embedding.tsne(np.ones((3, 3)))
    with pytest.raises(ValueError, match="finite"):
        embedding.tsne(np.full((8, 2), np.nan))
    with pytest.raises(ValueError, match="label"):
        embedding.knn_accuracy(np.ones((4, 2)), ["a"])
    with pytest.raises(ValueError, match="2\\.\\.3 labels"):
        embedding.silhouette(np.ones((4, 2)), ["a"] * 4)
