"""The dump of a run that diverged: what is needed to find the cause."""

from __future__ import annotations

from pathlib import Path

from localmotion import ranks
from localmotion.errors import LocalmotionError
from localmotion.methods.base import Method
from localmotion.runs import checkpoint
from localmotion.training.update import DivergedError

DUMP = "diverged"


def dump(path: Path, method: Method, error: DivergedError) -> LocalmotionError:
    """Write RUN/diverged and return the error to raise.

    The dump holds the batch, the weights, the generator states, and every loss and gradient norm. To repeat the
    failure, run the method's passes on ``checkpoint.read(RUN / "diverged", "batch")``. With several ranks each writes its own:
    RUN/diverged, RUN/diverged-1, ...
    """
    state = {"update": error.update, "first": error.first, "terms": {name: repr(value) for name, value in error.terms.items()}}
    tensors = {"batch": error.batch, "weights": method.state_dict(), "rng": checkpoint.rng_state()}
    target = path / (DUMP if ranks.leads() else f"{DUMP}-{ranks.rank()}")
    checkpoint.write(target, tensors, state)
    stays = checkpoint.what_stays(path / "checkpoints")
    return LocalmotionError(f"{error}; the batch, the weights and all terms are in {target}; {stays}")
