"""What every mutation of the fuzz corpus works with, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soak.sources import Source


@dataclass
class Bench:
    """What a mutation works with: its own random numbers, the sources, where to write."""

    rng: np.random.Generator
    sources: list[Source]
    root: Path
    stem: str
    size: int

    def source(self, *suffixes: str, family: str | None = None) -> Source:
        fit = [s for s in self.sources if (not suffixes or s.path.suffix in suffixes) and family in (None, s.family)]
        return fit[self.rng.integers(len(fit))]

    def pick(self, values: tuple[int, ...]) -> int:
        return values[self.rng.integers(len(values))]


@dataclass(frozen=True)
class Made:
    """What was written: ids it should be listed under, and what must come of it where that is certain."""

    kind: str
    ids: tuple[str, ...]
    source: str = ""
    accept: str | None = None
    """Digest that the extracted frames must have; the file must be accepted."""
    reject: bool = False
    """It must be rejected."""


Mutation = Callable[[Bench], Made]


def write(bench: Bench, data: bytes, suffix: str, kind: str, source: str = "", *, reject: bool = False) -> Made:
    name = f"{bench.stem}{suffix}"
    (bench.root / name).write_bytes(data)
    return Made(kind, (name,), source, reject=reject)
