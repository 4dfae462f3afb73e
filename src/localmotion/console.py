"""Console output. Long work shows a bar with rate and ETA on a terminal, else a plain line at intervals."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)
errors = Console(highlight=False, soft_wrap=True, stderr=True)


class Advance(Protocol):
    """Progress callback."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


def say(text: str) -> None:
    """Print one line about a decision or result."""
    console.print(text, markup=False)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = 180) -> None:
    """Print a table; ``width`` characters wide in a file or pipe."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    (console if console.is_terminal else Console(width=width, highlight=False)).print(table, markup=False)


FORECAST = 5.0
"""Seconds of work after which `progress` prints the expected total time."""


def duration(seconds: float) -> str:
    """A duration for people: 40 s, 3 minutes, 2.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


@contextmanager
def progress(label: str, total: int, unit: str, start: int = 0, every: float = 30.0, forecast: bool = True) -> Iterator[Advance]:
    """Show progress of ``total`` units; the yielded callback takes the number of finished units and a short note.

    On a terminal it is a bar; else a line with rate and ETA at most every ``every`` seconds. With ``forecast`` another line prints the
    expected total time after `FORECAST` seconds, for work whose units take about the same time.
    """
    began = time.monotonic()
    base: tuple[int, float] | None = None  # units done at the first report: resumed work starts above 0
    waiting = forecast

    def foresee(done: int, total: int, now: float) -> None:
        nonlocal base, waiting
        base = base or (done, now)
        if waiting and now - base[1] >= FORECAST and base[0] < done < total:
            waiting = False
            each = (now - base[1]) / (done - base[0])
            say(f"{label}: about {duration(each * (total - done))} more on this machine ({each:.3g} s for each of the {unit})")

    if sys.stdout.isatty():
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        with bar:
            task = bar.add_task(label, total=total, completed=start, rate="", note="")
            whole = total

            def advance(done: int, total: int | None = None, note: str = "") -> None:
                nonlocal whole
                whole = total or whole
                now = time.monotonic()
                foresee(done, whole, now)
                rate = (done - start) / max(now - began, 1e-6)
                bar.update(task, completed=done, total=total, rate=f"{rate:.2f} {unit}/s", note=note)

            yield advance
        return
    last = began

    end = total

    def line(done: int, total: int | None = None, note: str = "") -> None:
        nonlocal last, end
        end = total or end
        now = time.monotonic()
        foresee(done, end, now)
        if now - last < every and done < end:
            return
        last = now
        rate = (done - start) / max(now - began, 1e-6)
        left = max(end - done, 0) / rate if rate > 0 else float("inf")  # whole rollouts may end past the total
        eta = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}" if left < 1e7 else "?"
        say(f"{label} {done:,}/{end:,} {unit}  {rate:.2f}/s  ETA {eta}  {note}".rstrip())

    yield line
