"""torch.compile of a method's feed-forward parts: encoders, decoders, attention blocks, heads.

On a GPU, compilation turns a chain of elementwise operations into one kernel. Recurrent parts are not compiled, because
Dynamo would unroll them position by position. On a CPU, compilation saves nothing and takes most of a minute
(docs/performance.md).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from localmotion.methods.base import Method

BACKEND: Any = "inductor"


def feed_forward(module: nn.Module) -> list[nn.Module]:
    """The outermost children whose class sets ``feed_forward = True``.

    Children that set ``recurrent = True`` are not searched.
    """
    found: list[nn.Module] = []
    for child in module.children():
        if getattr(child, "feed_forward", False):
            found.append(child)
        elif not getattr(child, "recurrent", False):
            found += feed_forward(child)
    return found


def compile_parts(method: Method, *, whole: bool = False) -> int:
    """Compile the `feed_forward` parts of a method in place. Parameter names do not change.

    Returns the number of parts. A part is compiled at its first call, once for each set of shapes. ``whole``: raise an
    error if Dynamo would break a part's graph or has recompiled it too often. The default then runs the part without
    compilation.
    """
    parts = feed_forward(method)
    for part in parts:
        part.compile(backend=BACKEND, dynamic=False, fullgraph=whole)
    method.compiled = True
    return len(parts)
