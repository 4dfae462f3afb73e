"""What the methods of runs could have saved, and what they say about their figures."""

from __future__ import annotations

from localmotion import methods
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.evaluation.heldout import predicts
from localmotion.methods.base import MOTION, Method, Source
from localmotion.runs.read import RunData
from localmotion.runs.settings import read_config


def _method(run: RunData) -> type[Method] | None:
    try:
        return methods.get(run.method)
    except ConfigError:
        return None


def could_save(run: RunData, media: str) -> bool:
    """Whether the method of a run can save files ``media`` ("openloop", "masked", "traversal", ...). True if it is not known."""
    cls = _method(run)
    if cls is None:
        return True
    perceives = bool(cls.wants & MOTION)
    clips = cls.stages.get(run.stage) is Source.CLIPS
    return {
        "openloop": clips and predicts(cls, run.stage),
        "traversal": clips and cls.traversal is not Method.traversal,
        "masked": clips and cls.masked_reconstruction is not Method.masked_reconstruction,
        "embedding": perceives and cls.motion_code is not Method.motion_code,
        "atomic": perceives,
        "flow": perceives,
    }[media]


def about_open_loop(run: RunData) -> str:
    """What the method says about its open-loop figures, "" if nothing or if the run's settings cannot be read."""
    cls = _method(run)
    if cls is None:
        return ""
    try:
        return cls.about_open_loop(read_config(run.path).model)
    except (LocalmotionError, OSError):
        return ""
