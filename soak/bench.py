"""Input and output of every mutation of the fuzz corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soak.sources import Source


@dataclass
class Bench:
    """Input of a mutation: its random generator, the sources, and where to write."""

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
    """Output of a mutation: the ids under which the file must be listed, and the result, if only one is correct."""

    kind: str
    ids: tuple[str, ...]
    source: str = ""
    accept: str | None = None
    """Digest of the extracted frames. If set, the file must be accepted."""
    reject: bool = False
    """Whether the file must be rejected."""


Mutation = Callable[[Bench], Made]


def write(bench: Bench, data: bytes, suffix: str, kind: str, source: str = "", *, reject: bool = False) -> Made:
    name = f"{bench.stem}{suffix}"
    (bench.root / name).write_bytes(data)
    return Made(kind, (name,), source, reject=reject)
