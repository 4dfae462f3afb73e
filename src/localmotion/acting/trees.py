"""Flatten nested tuples of tensors, such as a policy's carry, and restore them. safetensors stores flat names only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from localmotion.errors import CheckpointError


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


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a carry by their names in a checkpoint."""
    return {f"carry.{number:03d}": leaf for number, leaf in enumerate(leaves_of(tree))}


def carried(like: Any, saved: Mapping[str, Tensor]) -> Any:
    """The carry that a checkpoint has under the names of `named`, with the structure of ``like`` and on its device.

    Raises CheckpointError if it has another number of tensors: the run was begun with another version of its method.
    """
    wanted, found = leaves_of(like), [saved[key] for key in sorted(saved) if key.startswith("carry.")]
    if len(wanted) != len(found):
        raise CheckpointError(
            f"the checkpoint holds {len(found)} tensors of the agent's state within an episode, this version of its method keeps "
            f"{len(wanted)}; continue the run with the version that began it, or begin a new run"
        )
    return with_leaves(like, [leaf.to(own.device) for leaf, own in zip(found, wanted, strict=True)])


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
