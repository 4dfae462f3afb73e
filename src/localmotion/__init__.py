"""localmotion: unlabeled video in, a world model that knows motion out, and an agent that learns from few interactions."""

from typing import TYPE_CHECKING, Any

from localmotion import machine

if TYPE_CHECKING:
    from localmotion.acting.deployed import load_policy

__all__ = ["__version__", "load_policy"]
__version__ = "0.1.0"

machine.wait_passively()  # here, because every other module may import torch


def __getattr__(name: str) -> Any:
    if name == "load_policy":  # not before it is asked for: it imports torch
        from localmotion.acting.deployed import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
