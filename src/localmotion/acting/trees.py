"""Flatten nested tuples of tensors, such as a policy's carry, and restore them. safetensors stores flat names only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def leaves_of(tree: Any) -> list[Tensor]:
    """The tensors of a nested (named) tuple, in order. Leaves are tensors or None."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for branch in tree or () for leaf in leaves_of(branch)]


def with_leaves(like: Any, leaves: Sequence[Tensor]) -> Any:
    """A tree with the structure of ``like`` and other tensors, of any shapes.

    Raises ValueError if their number differs.
    """
    rest = iter(leaves)
    tree = _filled(like, rest)
    if next(rest, None) is not None:
        raise ValueError(f"{len(leaves)} tensors are more than the structure holds")
    return tree


def _filled(like: Any, rest: Iterator[Tensor]) -> Any:
    if isinstance(like, Tensor):
        found = next(rest, None)
        if found is None:
            raise ValueError("fewer tensors than the structure holds")
        return found
    if like is None:
        return None
    branches = [_filled(branch, rest) for branch in like]
    return type(like)(*branches) if hasattr(like, "_fields") else type(like)(branches)
