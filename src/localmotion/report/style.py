"""Common style of charts and pictures of a report: palette, fonts, number and label formats, light and dark."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.ticker import FuncFormatter

from localmotion.report.memory import recalled

P = ParamSpec("P")
R = TypeVar("R")

GROUND, INK, MUTED, GRID = "#ffffff", "#1c2330", "#667085", "#dfe3ea"
PALETTE = ("#0067a8", "#d55e00", "#00875f", "#b0488a", "#b07a00", "#3d9fd8", "#5b4bb5", "#7a6a55")
_DARK = {
    GROUND: "#14171d",
    INK: "#e7eaf0",
    MUTED: "#98a2b3",
    GRID: "#2c323d",
    "#0067a8": "#4aa8e8",
    "#d55e00": "#ff8a4c",
    "#00875f": "#35c796",
    "#b0488a": "#e58cc3",
    "#b07a00": "#e8b339",
    "#3d9fd8": "#8ecdf2",
    "#5b4bb5": "#a79bf0",
    "#7a6a55": "#c2b29a",
}
WIDTH = 9.6
"""Width of a full-page chart in inches: 96 CSS pixels each, so charts are not scaled on the page."""
_FONTS = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "Noto Sans")


@functools.cache
def font() -> list[str]:
    """The first of the page's font families on this machine, and matplotlib's own for missing characters."""
    known = set(font_manager.get_font_names())
    return [next((f for f in _FONTS if f in known), "DejaVu Sans"), "DejaVu Sans"]


def plain(text: object, limit: int = 60) -> str:
    """Text safe to draw: no control characters, cut in the middle to ``limit`` characters, not hidden by a leading "_"."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    if len(shown) > limit:
        shown = shown[: limit // 2] + "…" + shown[len(shown) - (limit - 1 - limit // 2) :]
    return " " + shown if shown.startswith("_") else shown


def distinct(texts: Iterable[str], limit: int) -> dict[str, str]:
    """`plain` of each text. Texts that would look equal get a number at their end."""
    found: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        shown, count = plain(text, limit), 1
        while shown in found.values():
            count += 1
            shown = f"{plain(text, limit - len(str(count)) - 3)} ({count})"
        found[text] = shown
    return found


def short(number: float, digits: int = 3) -> str:
    """A number for an axis or label: 12500 -> "12.5K", 1000000 -> "1M", 0.031 -> "0.031"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


def score(mean: float, std: float | None = None, *, percent: bool = False) -> str:
    """A score with its spread, with digits that depend on the size of the mean: "646 ± 23", "3.20 ± 0.41", "87 ± 4 %"."""
    scale, unit = (100.0, " %") if percent else (1.0, "")
    size = abs(mean * scale)
    digits = 0 if percent or size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    spread = "" if std is None else f" ± {std * scale:.{digits}f}"
    return f"{mean * scale:.{digits}f}{spread}{unit}"


class ShortTicks(FuncFormatter):
    """Axis labels as `short` writes them, with as many digits as different ticks need to look different."""

    def __init__(self) -> None:
        super().__init__(lambda x, _: short(x))

    def format_ticks(self, values: Iterable[float]) -> list[str]:
        ticks = [float(value) for value in values]
        texts: list[str] = []
        for digits in range(3, 13):
            texts = [short(tick, digits) for tick in ticks]
            if len(set(texts)) == len(set(ticks)):
                break
        return texts


def short_ticks() -> FuncFormatter:
    """A new `ShortTicks` each time, because a formatter belongs to one axis."""
    return ShortTicks()


def _settings() -> Any:
    return {
        "font.family": font(),
        "font.size": 9.5,
        "figure.titlesize": 10.5,
        "figure.titleweight": "bold",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "text.parse_math": False,  # a "$" in a run's name is a dollar
        "svg.fonttype": "path",
        "svg.hashsalt": "localmotion",
    }


def dark_variant(svg: bytes) -> bytes:
    """A chart for a dark page: replaces every colour of the light palette in an SVG by its dark counterpart."""
    text = svg.decode("utf-8")
    for light, dark in _DARK.items():
        text = text.replace(light, dark)
    return text.encode("utf-8")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run a drawing function in the report's style; the caller's matplotlib settings are restored."""

    @functools.wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        def drawn() -> R:
            with mpl.rc_context(_settings()):
                return draw(*args, **kwargs)

        return recalled((draw.__module__, draw.__qualname__, args, kwargs), drawn)

    return run
