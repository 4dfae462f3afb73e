"""torch.compile of a method's feed-forward parts: encoders, decoders, attention blocks, heads.

On a GPU an elementwise chain between two products is one kernel instead of several. Recurrences stay as they are: Dynamo would unroll
them, position by position. On a CPU it was measured to win nothing and to cost most of a minute (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from localmotion.methods.base import Method
from localmotion.models.adapters import AttentionAdapter
from localmotion.models.blocks import NormMLP
from localmotion.models.dae import DualAttentionBlock
from localmotion.models.decoders import CNNDecoder, ResNetDecoder
from localmotion.models.encoders import CNNEncoder, ResNetEncoder
from localmotion.models.global_flow import GlobalFlow
from localmotion.models.heads import MLP
from localmotion.models.observations import ImageDecoder, ImageEncoder
from localmotion.models.rssm import RSSM
from localmotion.models.rssm_block import BlockRSSM

PARTS = (
    AttentionAdapter,
    CNNDecoder,
    CNNEncoder,
    DualAttentionBlock,
    GlobalFlow,
    ImageDecoder,
    ImageEncoder,
    MLP,
    NormMLP,
    ResNetDecoder,
    ResNetEncoder,
)
RECURRENT = (RSSM, BlockRSSM)
BACKEND: Any = "inductor"


def feed_forward(module: nn.Module) -> list[nn.Module]:
    """The outermost `PARTS` within a module, outside of `RECURRENT` ones."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, PARTS):
            found.append(child)
        elif not isinstance(child, RECURRENT):
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
