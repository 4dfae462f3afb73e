"""Charts and pictures: what they must show, what they refuse, and that they leave no trace in matplotlib."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from localmotion.evaluation.contrasts import performance_profile
from localmotion.evaluation.statistics import Curve, summarise
from localmotion.report import arrays, plots, strips, style
from report_runs import moving_clip

finite = st.floats(-5, 5)


def svg(data: bytes) -> ElementTree.Element:
    root = ElementTree.fromstring(data)
    assert root.tag.endswith("svg")
    return root


def pixels(data: bytes) -> NDArray[np.uint8]:
    return (imread(io.BytesIO(data)) * 255).round().astype(np.uint8)


def count(data: bytes, colour: tuple[int, int, int]) -> int:
    """Pixels of exactly this colour."""
    return int((pixels(data)[..., :3] == np.array(colour)).all(-1).sum())


# --- flow as colour ---------------------------------------------------------------------------------------------------


def test_flow_colours_golden() -> None:
    yellow = 2 * math.pi * 15 / 55
    flow = [[0, 0], [2, 0], [9, 0], [1, 0], [2 * math.cos(yellow), 2 * math.sin(yellow)], [-2, 0], [math.nan, 1]]
    found = strips.flow_to_rgb(np.array(flow, dtype=np.float32), 2.0)
    assert found.dtype == np.uint8
    assert found[0].tolist() == [255, 255, 255]
    assert found[1].tolist() == found[2].tolist() == [255, 0, 0]  # right; longer than the maximum looks the same
    assert found[3].tolist() == [255, 128, 128]  # half the maximum: half way to white
    assert found[4].tolist() == [255, 255, 0]
    assert found[5].tolist() == [0, round(255 * (1 - 2.5 / 11)), 255]  # left: 2.5 of 11 steps from cyan to blue
    assert found[6].tolist() == list(arrays.HIDDEN)


@given(finite, finite, st.floats(1.01, 3))
def test_longer_flow_is_never_paler_and_direction_alone_decides_the_hue(x: float, y: float, factor: float) -> None:
    short, long = strips.flow_to_rgb(np.array([[x, y], [x * factor, y * factor]]), 4.0).astype(int)
    assert (long <= short).all()
    strength = [min(math.hypot(x, y) * f / 4, 1) for f in (1, factor)]
    if strength[0] > 0.05:
        np.testing.assert_allclose((255 - short) / strength[0], (255 - long) / strength[1], atol=1 / strength[0] + 1)


def test_flow_to_rgb_keeps_leading_shape_and_refuses_others() -> None:
    assert strips.flow_to_rgb(np.zeros((2, 3, 4, 2)), 1).shape == (2, 3, 4, 3)
    with pytest.raises(ValueError, match=r"\(\.\.\., 2\)"):
        strips.flow_to_rgb(np.zeros((4, 3)), 1)
    with pytest.raises(ValueError, match="positive"):
        strips.flow_to_rgb(np.zeros((4, 2)), 0)


# --- pictures ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 60), st.integers(4, 14))
def test_strips_show_the_last_observed_and_the_last_imagined_frame(frames: int, context: int, columns: int) -> None:
    context = min(context, frames)
    times = strips.strip_times(frames, context, columns)
    assert times == sorted(set(times))
    assert 1 <= len(times) <= columns
    assert times[0] >= 0
    assert times[-1] == frames - 1
    if 0 < context < frames:
        assert context - 1 in times
        assert context in times


def test_strip_frames_are_framed_green_then_red_and_perfect_prediction_is_exact() -> None:
    truth = moving_clip(8, 16)[None]
    wrong = moving_clip(8, 16, drift=0.05)[None]
    both = strips.prediction_strips(truth, {"prediction": truth, "zero motion": wrong}, context=3)
    green, red = count(both, strips.OBSERVED), count(both, strips.IMAGINED)
    assert green > 1000
    assert red / green == pytest.approx(5 / 3, rel=0.05)  # 3 observed and 5 imagined frames, equally framed
    # The error of the perfect prediction is black, the other one's is not: less black than with two perfect ones.
    perfect = strips.prediction_strips(truth, {"prediction": truth, "zero motion": truth}, context=3)
    black = (0, 0, 4)  # the darkest colour of the error map
    assert count(perfect, black) > count(both, black) > 0.4 * count(perfect, black)
    assert pixels(strips.prediction_strips(truth, {"p": wrong}, context=3, transparent=True))[0, 0, 3] == 0
    assert pixels(both)[0, 0].tolist() == [255, 255, 255, 255]


@pytest.mark.parametrize("context", [0, 8])
def test_strips_of_all_imagined_or_all_observed_frames(context: int) -> None:
    clip = moving_clip(8, 16)[None]
    data = strips.prediction_strips(clip, {"prediction": clip}, context=context)
    colours = (strips.OBSERVED, strips.IMAGINED)
    assert [count(data, c) > 0 for c in colours] == [context > 0, context < 8]


def test_saved_strips_name_the_rows_and_make_the_folder(tmp_path: Path) -> None:
    clip = moving_clip(8, 16)[None]
    out = strips.save_strips({"truth": clip, "motion": clip, "last_frame": clip}, tmp_path / "new" / "strips.png", context=3)
    rows = {"prediction": clip, "last frame, copied": clip}
    assert out.read_bytes() == strips.prediction_strips(clip, rows, context=3)


@pytest.mark.parametrize("errors", [True, False])
def test_as_many_clips_are_drawn_as_fit(errors: bool) -> None:
    clip = np.stack([moving_clip(8, 16)] * 6)
    arrays = {"truth": clip, "motion": clip, "prior": clip}

    def height(clips: int) -> int:
        rows = dict.fromkeys(("motion", "prior"), clip[:clips])
        return pixels(strips.prediction_strips(clip[:clips], rows, context=3, errors=errors)).shape[0]

    heights = [height(clips) for clips in (1, 2, 3)]
    for clips in (1, 2):
        for room in (heights[clips - 1] + 2, heights[clips] - 2):  # just enough, and just too little for one more
            assert strips.clips_that_fit(arrays, room, context=3, errors=errors) == clips
    assert strips.clips_that_fit(arrays, 10, context=3, errors=errors) == 1
    assert strips.clips_that_fit(arrays, 10**6, context=3, errors=errors) == 6


def test_strips_without_errors_have_their_rows_alone() -> None:
    clip = moving_clip(8, 16)[None]
    rows = {"prediction": clip, "zero motion": clip}
    full, plain = (strips.prediction_strips(clip, rows, context=3, errors=errors) for errors in (True, False))
    assert count(full, (0, 0, 4)) > 1000 > count(plain, (0, 0, 4))  # errors of 0 are black
    framed = [count(x, strips.IMAGINED) for x in (full, plain)]
    assert framed[1] / framed[0] == pytest.approx(3 / 5, rel=0.05)
    assert pixels(plain).shape[0] < 0.75 * pixels(full).shape[0]


def test_long_names_of_rows_stay_in_the_picture() -> None:
    clip = moving_clip(8, 16)[None]
    for name in ("prelar: swapped action", "prelar: latent action", "a_run_with_a_long_name: zero motion"):
        shown = pixels(strips.prediction_strips(clip, {name: clip}, context=3))
        assert (shown[:, :2] == 255).all()  # no letter touches the edge
        assert (shown[:, :140, :3] < 200).any()
    assert strips.in_lines("ipv_pre: prior") == "ipv_pre:\nprior"
    assert strips.in_lines("last frame, copied") == "last frame,\ncopied"


def test_strips_refuse_what_is_no_video() -> None:
    clip = moving_clip(8, 16)[None]
    for truth, predictions, context, message in (
        (clip, {"p": clip[:, :4]}, 3, "one shape"),
        (clip[0], {"p": clip[0]}, 3, "one shape"),
        (clip, {}, 3, "one shape"),
        (clip[:0], {"p": clip[:0]}, 3, "one shape"),
        (clip, {"p": clip.astype(np.float32)}, 3, "uint8"),
        (clip, {"p": clip}, 9, "context"),
    ):
        with pytest.raises(ValueError, match=message):
            strips.prediction_strips(truth, predictions, context=context)


def patches(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(number, 6, 6, 2)).astype(np.float32)


def test_masked_patches_are_hidden_in_grey_and_the_row_goes_when_all_are_hidden() -> None:
    truth = patches(4)
    seen = truth.copy()
    seen[0], seen[1] = 0, np.nan  # both ways to say "hidden"
    some = strips.masked_reconstruction(truth, seen, truth)
    seen[2] = np.nan
    more = strips.masked_reconstruction(truth, seen, truth)
    assert count(more, arrays.HIDDEN) / count(some, arrays.HIDDEN) == pytest.approx(1.5, rel=0.05)
    none = strips.masked_reconstruction(truth, np.zeros_like(truth), truth)
    assert count(none, arrays.HIDDEN) < 0.1 * count(some, arrays.HIDDEN)
    assert pixels(none).shape[0] < pixels(some).shape[0]


def test_masked_reconstruction_edges() -> None:
    still = np.zeros((2, 6, 6, 2), dtype=np.float32)
    assert strips.masked_reconstruction(still, still, still).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="patches"):
        strips.masked_reconstruction(patches(2), patches(3), patches(2))
    with pytest.raises(ValueError, match="finite"):
        strips.masked_reconstruction(patches(2), patches(2), patches(2) * np.nan)


# --- charts -----------------------------------------------------------------------------------------------------------


def curves(number: int) -> tuple[Curve, ...]:
    return tuple(Curve(np.arange(5) * 100.0, np.arange(5) * 10.0 + s) for s in range(number))


def draw_all(label: str) -> dict[str, bytes]:
    """Every chart once, with ``label`` wherever a text of the user's is drawn."""
    three, rng = curves(3), np.random.default_rng(0)
    group = plots.CurveGroup(label, three, summarise([40.0, 41.0, 42.0]))
    xy = rng.normal(size=(30, 2))
    return {
        "curves": plots.learning_curves([group], title=label, random_policy=3.0),
        "budgets": plots.budget_curves(
            {label: {50: summarise([1.0, 2]), 200: summarise([3.0])}, "b": {50: summarise([0.0])}}, title=label
        ),
        "profiles": plots.profile_curves(
            {label: performance_profile([[0.2, 0.6]], [0.0, 0.5, 1.0]), "b": performance_profile([[0.1]], [0.0, 0.5, 1.0])},
            title=label,
            xlabel="score",
        ),
        "losses": plots.loss_curves({label: [(label, np.arange(900), np.geomspace(1, 1e-3, 900))], "b": [("y", [1], [-2])]}),
        "scatter": plots.tsne_scatter(xy, [label, "b"] * 15, title=label),
        "angles": plots.tsne_scatter(xy, ["b"] * 30, title=label, angles=np.linspace(0, 6, 30)),
        "shares": plots.share_bars({label: {"update": 3, label: 1, "other": 1}, "run": {"update": 1}}, title=label),
        "flow": plots.flow_histogram({label: rng.lognormal(size=500), "b": np.zeros(4)}, title=label),
        "bars": plots.comparison_bars({label: 0.4, "b": 1.3}, reference=1.0, reference_label=label, target=0.6),
        "horizon": plots.horizon_curves({label: [30, 28, 27], "b": [29, 26, 26.9]}, title=label),
    }


@pytest.mark.parametrize("label", ["drp", r"$\frac{$ & <b> ]]> _x \n", "_hidden", "\x00\x07\ud800", "a" * 300])
def test_charts_are_well_formed_whatever_the_labels_say(label: str) -> None:
    for name, data in draw_all(label).items():
        root = svg(data)
        assert float(root.attrib["width"].removesuffix("pt")) <= style.WIDTH * 72 + 1, name
        assert b"<script" not in data


def test_charts_are_reproducible_and_leave_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    first = draw_all("drp")
    assert dict(mpl.rcParams) == before
    assert draw_all("drp") == first


def test_pyplot_is_never_imported() -> None:
    code = "import sys, localmotion.report.build; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dark_variant_exchanges_every_colour_of_the_light_palette() -> None:
    for name, data in draw_all("drp").items():
        dark = style.dark_variant(data)
        svg(dark)
        for colour in (style.INK, style.MUTED, style.GRID, *style.PALETTE):
            assert colour.encode() not in dark, (name, colour)
        assert len(dark) == len(data)


def luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_read_on_their_ground() -> None:
    light = [style.GROUND, style.INK, style.MUTED, *style.PALETTE]
    dark = dict(zip(light, style.dark_variant(" ".join(light).encode()).decode().split(), strict=True))
    for colour in style.PALETTE:  # WCAG: 3 for graphics, 4.5 for text
        assert contrast(colour, style.GROUND) >= 2.9
        assert contrast(dark[colour], dark[style.GROUND]) >= 4.5
    for text in (style.INK, style.MUTED):
        assert contrast(text, style.GROUND) >= 4.5
        assert contrast(dark[text], dark[style.GROUND]) >= 4.5
    assert min(contrast(strips.GREY, g) for g in (style.GROUND, dark[style.GROUND])) >= 3.5


def test_the_band_is_drawn_only_for_several_seeds() -> None:
    one = plots.learning_curves([plots.CurveGroup("a", curves(1))], title="t")
    three = plots.learning_curves([plots.CurveGroup("a", curves(3))], title="t")
    assert b"opacity: 0.15" in three
    assert b"opacity: 0.15" not in one


def test_a_seed_that_stopped_early_makes_the_mean_dashed() -> None:
    long, short = curves(1)[0], Curve([0, 100, 200], [0, 10, 20])
    dashed = b"stroke-dasharray: 3.2,3.2"
    assert dashed in plots.learning_curves([plots.CurveGroup("a", (long, short))], title="t")
    assert dashed not in plots.learning_curves([plots.CurveGroup("a", (long, long))], title="t")


def test_the_curve_of_an_unfinished_run_ends_in_an_open_circle_and_the_legend_counts_it() -> None:
    two = curves(2)
    final = summarise([40.0])

    def texts(group: plots.CurveGroup) -> tuple[list[str], int]:
        figure = plots.learning_curves.__wrapped__.__wrapped__([group], title="t")  # type: ignore[attr-defined]
        circles = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
        for circle, at in zip(circles, sorted(group.unfinished), strict=True):
            assert (circle.get_xdata()[0], circle.get_ydata()[0]) == (two[at].env_steps[-1], two[at].values[-1])
        return [text.get_text() for text in figure.texts][:-1], len(circles)  # without the title

    assert texts(plots.CurveGroup("a", two, final)) == (["a", "final 40.0, 2 seeds"], 0)
    assert texts(plots.CurveGroup("a", two, final, frozenset({1}))) == (["a", "final 40.0, 1 of 2 seeds"], 1)
    assert texts(plots.CurveGroup("a", two, None, frozenset({0, 1}))) == (["a", "2 seeds, 2 unfinished"], 2)


@given(st.lists(st.one_of(st.floats(-10, 10), st.just(math.nan)), min_size=1, max_size=400), st.integers(1, 50))
def test_thinning_keeps_the_mean_and_the_gaps(values: list[float], points: int) -> None:
    x, y = plots.thin(np.arange(len(values)), values, points)
    assert len(x) == len(y) == min(len(values), max(points, min(len(values), points)))
    assert (np.diff(x) > 0).all()
    good = np.isfinite(values)
    assert np.isfinite(y).any() == good.any()
    if len(values) % len(x) == 0 and good.all():  # equal bins: their means average to the mean of all
        assert y.mean() == pytest.approx(np.mean(values), abs=1e-9)
    if good.any():
        assert np.nanmin(values) - 1e-9 <= np.nanmin(y) <= np.nanmax(y) <= np.nanmax(values) + 1e-9


def test_charts_refuse_emptiness() -> None:
    for draw in (
        lambda: plots.learning_curves([], title=""),
        lambda: plots.learning_curves([plots.CurveGroup("a", ())], title=""),
        lambda: plots.budget_curves({"a": {}}, title=""),
        lambda: plots.profile_curves({}, title="", xlabel=""),
        lambda: plots.loss_curves({}),
        lambda: plots.share_bars({"run": {"update": 0.0}}),
        lambda: plots.flow_histogram({"a": [math.nan]}),
        lambda: plots.comparison_bars({"a": math.nan}),
        lambda: plots.horizon_curves({"a": []}),
        lambda: plots.tsne_scatter(np.zeros((3, 2)), ["a"]),
        lambda: plots.tsne_scatter(np.full((1, 2), math.nan), ["a"]),
    ):
        with pytest.raises(ValueError):
            draw()


def test_numbers_are_written_short() -> None:
    found = [style.short(x) for x in (0, 0.031, 38, 12_500, 1_000_000, 2.5e9, -4200)]
    assert found == ["0", "0.031", "38", "12.5K", "1M", "2.5B", "-4.2K"]
    assert style.score(646.3, 22.7) == "646 ± 23"
    assert style.score(3.2, 0.414) == "3.20 ± 0.41"
    assert style.score(0.873, 0.04, percent=True) == "87 ± 4 %"
    assert style.score(0.0312) == "0.031"


@pytest.mark.parametrize("count", [2, 20])
def test_no_profile_is_known_by_its_colour_alone(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure: figures.append(figure) or b"")
    plots.profile_curves({f"v{n}": performance_profile([[0.5, 0.7]], [0.0, 0.6]) for n in range(count)}, title="", xlabel="")
    lines = figures[0].axes[0].lines
    assert [line.get_ydata()[1] for line in lines] == [0.5] * count
    assert len({(line.get_color(), line.get_linestyle(), str(line._dash_pattern)) for line in lines}) == count  # type: ignore[attr-defined]
    assert len({str(line._dash_pattern) for line in lines}) == min(count, len(plots.DASHES))  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [2, 5, 14])
def test_the_legend_of_many_groups_stays_in_the_figure(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure: figures.append(figure) or b"")
    curve = Curve(np.array([0.0, 10]), np.array([1.0, 2]))
    groups = [plots.CurveGroup(f"group {n}", (curve,), summarise([1.0])) for n in range(count)]
    plots.learning_curves(groups, title="", random_policy=0.5)
    places = [text.get_position()[1] for text in figures[0].texts]
    assert len(places) == 2 * count + 1
    markers = [line.get_marker() for line in figures[0].axes[0].lines[:count]]
    assert len(set(markers)) == min(count, len(style.PALETTE))  # no curve is known by its colour alone
    assert min(places) > 0
    assert max(places) < 1
    assert figures[0].get_figheight() == pytest.approx(3.9 if count < 5 else 3.9 * 0.16 * (count + 1) / 0.92)


def test_ticks_that_differ_look_different() -> None:
    assert style.short_ticks().format_ticks([12.0, 12.002, 12.004]) == ["12", "12.002", "12.004"]
    assert style.short_ticks().format_ticks([0.0, 12_500.0]) == ["0", "12.5K"]


def test_lines_of_a_legend_never_have_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure: figures.append(figure) or b"")
    names = ["with the latent actions of the true frames", "with the latent actions of another clip"]
    plots.horizon_curves({name: [20.0, 19.0] for name in names})
    assert [text.get_text() for text in figures[0].axes[0].texts] == [f"{name}  19.0" for name in names]
    alike = ["a" * 30 + middle + "b" * 30 for middle in "xyz"]
    shown = list(style.distinct(alike, 38).values())
    assert len(set(shown)) == 3
    assert max(map(len, shown)) <= 38
