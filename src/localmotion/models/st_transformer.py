"""Spatial-temporal Transformer over the tokens of frames.

A frame is its N tokens and one global token. A block lets the tokens of a frame attend to each other, then each cell to itself at other
times, then applies an MLP, with a residual connection around each and LayerNorm in front. It has about 16 d^2 weights. With T frames of
C = N + 1 tokens a block multiplies 16 d^2 T C + 2 d T C (C + T) numbers: attention over all T C tokens at once would take 2 d (T C)^2.

Paper: PVDR arXiv 2411.03169 names such blocks; their form here is that of TimeSformer (arXiv 2102.05095), space before time.

Shapes: R rows (sequences, or sequences times plans), T frames, N cells, C = N + 1 tokens of a frame, M remembered frames, H heads,
d width, h = d / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.errors import ConfigError


class Memory(NamedTuple):
    """Keys and values of earlier frames in one block's attention over time, (R, C, H, M, h) each."""

    key: Tensor
    value: Tensor

    def expand(self, plans: int) -> Memory:
        """The same memory for each of ``plans`` rows: (R * plans, C, H, M, h)."""
        return Memory(*(x.unsqueeze(1).expand(-1, plans, *x.shape[1:]).flatten(0, 1) for x in self))


def table(rows: int, dim: int) -> nn.Parameter:
    """A learned table (rows, dim). Its vectors begin with a length near 1."""
    return nn.Parameter(torch.randn(rows, dim) * dim**-0.5)


class TokenEmbedding(nn.Module):
    """Tokens of frames to vectors: token table + place table + time table; and a global token a frame: a vector + time table."""

    def __init__(self, codes: int, cells: int, frames: int, dim: int) -> None:
        super().__init__()
        self.token, self.place, self.time = table(codes, dim), table(cells, dim), table(frames, dim)
        self.whole = table(1, dim)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens (R, T, N) of the frames ``first`` to ``first`` + T - 1 -> (R, T, N + 1, d). The global token is the last of a frame."""
        return self.placed(self.of(tokens), self.whole.expand(*tokens.shape[:2], 1, -1), first)

    def of(self, tokens: Tensor) -> Tensor:
        """Tokens (..., N) -> their vectors (..., N, d), without place and time."""
        return F.embedding(tokens, self.token)

    def placed(self, content: Tensor, whole: Tensor, first: int) -> Tensor:
        """Places and times added to contents (R, T, N, d) and global tokens (R, T, 1, d): (R, T, N + 1, d)."""
        time = self.time[first : first + content.shape[1], None]  # (T, 1, d)
        return torch.cat([content + self.place, whole], 2) + time


class Attention(nn.Module):
    """Multi-head attention over the last but one dimension."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, past: Memory | None = None, causal: bool = False) -> tuple[Tensor, Memory]:
        """x (R, C, T, d) attends over T, and to ``past``. ``causal``: not to later positions of x. Returns keys and values, too."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)  # (R, C, H, T, h) each
        if past is not None:
            k, v = torch.cat([past.key, k], 3), torch.cat([past.value, v], 3)  # (R, C, H, M + T, h)
        mask = None
        if causal and x.shape[2] > 1:
            mask = torch.ones(x.shape[2], k.shape[3], dtype=torch.bool, device=x.device).tril(k.shape[3] - x.shape[2])
        shape = q.shape
        q, keys, values = (part.flatten(0, 1) for part in (q, k, v))
        found = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).view(shape)
        out: Tensor = self.out(found.transpose(2, 3).flatten(-2))
        return out, Memory(k, v)


class STBlock(nn.Module):
    """Spatial attention, temporal attention, MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.space, self.time = Attention(dim, heads), Attention(dim, heads)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, past: Memory | None = None, causal: bool = False) -> tuple[Tensor, Memory]:
        """x (R, T, C, d) -> the same shape, and the memory of ``past`` and these frames. See `Attention`."""
        x = x + self.space(self.norms[0](x))[0]
        found, memory = self.time(self.norms[1](x).transpose(1, 2), past, causal)  # over T at each cell
        x = x + found.transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norms[2](x)))), memory


class STTransformer(nn.Module):
    """Blocks one after the other."""

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        """Raises ConfigError unless ``dim`` is a multiple of ``heads``."""
        super().__init__()
        if heads < 1 or dim % heads:
            raise ConfigError(f"dim={dim} is not a multiple of heads={heads}")
        self.blocks = nn.ModuleList(STBlock(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, past: Sequence[Memory] | None = None, causal: bool = False) -> tuple[Tensor, list[Memory]]:
        """x (R, T, C, d) after all blocks, and the memory of each. ``past``: that of earlier frames, which x attends to."""
        memories = []
        for index, block in enumerate(self.blocks):
            x, memory = block(x, past[index] if past else None, causal)
            memories.append(memory)
        return x, memories
