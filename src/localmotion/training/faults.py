"""What is left behind when a run cannot go on, so that the cause can be looked for."""

from __future__ import annotations

from pathlib import Path

from localmotion.errors import LocalmotionError
from localmotion.methods.base import Method
from localmotion.runs import checkpoint
from localmotion.training.update import DivergedError

DUMP = "diverged"


def dump(path: Path, method: Method, error: DivergedError) -> LocalmotionError:
    """Write RUN/diverged: the batch, the weights, the states of the generators, and every loss and gradient norm. Returns what to raise.

    ``checkpoint.read(RUN / "diverged", "batch")`` and the method's passes repeat the failure.
    """
    state = {"update": error.update, "first": error.first, "terms": {name: repr(value) for name, value in error.terms.items()}}
    tensors = {"batch": error.batch, "weights": method.state_dict(), "rng": checkpoint.rng_state()}
    checkpoint.write(path / DUMP, tensors, state)
    return LocalmotionError(f"{error}; the batch, the weights and all terms are in {path / DUMP}, the last good checkpoint stays")
