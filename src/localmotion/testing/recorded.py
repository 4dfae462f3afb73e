"""A CUDA graph's rules on a CPU: device operations are taken down once and repeated on the same memory, without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Each waits for the device or has a shape that depends on values: no CUDA graph can hold it.
FORBIDDEN = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
UNDECLARED = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4)}
"""Operations that write into arguments (by number) without saying so in their schema: the running mean and variance."""


class RecordedGraph(TorchDispatchMode):
    """`training.graphs.Graph` for a CPU, exact: what was recorded is repeated, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def warm(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> Any:
        """Work is done here, and undone: a CPU cannot record without doing."""
        random = torch.get_rng_state()
        with self:
            found = work()
        for storage, copy in self._before.values():
            storage.copy_(copy)
        torch.set_rng_state(random)
        return found

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for operation, args, kwargs, out in self.operations:
                fresh = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in FORBIDDEN:
            raise RuntimeError(f"{func} cannot be part of a CUDA graph")
        undeclared = UNDECLARED.get(func.overloadpacket.__name__, ())
        for index, argument in enumerate(func._schema.arguments):
            if index in undeclared or (argument.alias_info is not None and argument.alias_info.is_write):
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                    storage = tensor.untyped_storage()
                    self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out
