"""torch.compile of a method's feed-forward parts: encoders, decoders, attention blocks, heads.

On a GPU an elementwise chain between two products is one kernel instead of several. Recurrences stay as they are: Dynamo would unroll
them, position by position. On a CPU it was measured to win nothing and to cost most of a minute (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from localmotion.methods.base import Method

BACKEND: Any = "inductor"


def feed_forward(module: nn.Module) -> list[nn.Module]:
    """The outermost children whose class says ``feed_forward = True``, outside of those that say ``recurrent = True``."""
    found: list[nn.Module] = []
    for child in module.children():
        if getattr(child, "feed_forward", False):
            found.append(child)
        elif not getattr(child, "recurrent", False):
            found += feed_forward(child)
    return found


def compile_parts(method: Method, *, whole: bool = False) -> int:
    """Compile the `feed_forward` parts of a method, in place; names of parameters stay. Returns how many there are.

    They are compiled when they are first called, once for each set of shapes. ``whole``: raise an error where Dynamo would break a part's
    graph, or has compiled it too often, instead of going on without.
    """
    parts = feed_forward(method)
    for part in parts:
        part.compile(backend=BACKEND, dynamic=False, fullgraph=whole)
    method.compiled = True
    return len(parts)
