"""Memory of what was drawn, for pages that are built again and again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class Memory:
    """Results by what they were made of. Each holds until a whole page did not ask for it."""

    def __init__(self) -> None:
        self.kept: dict[bytes, Any] = {}
        self.asked: dict[bytes, Any] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside this context, which builds one page, `recalled` uses this memory."""
        self.asked = {}
        token = _memory.set(self)
        try:
            yield
            self.kept = self.asked
        finally:
            _memory.reset(token)


_memory: ContextVar[Memory | None] = ContextVar("memory", default=None)


def recalled(what: tuple[Any, ...], make: Callable[[], T]) -> T:
    """``make()``, or the result of an earlier call with an equal ``what``. Outside of `Memory.used` always the former."""
    memory = _memory.get()
    if memory is None:
        return make()
    key = digest(what)
    if key not in memory.asked:
        memory.asked[key] = memory.kept[key] if key in memory.kept else make()
    found: T = memory.asked[key]
    return found


def recall(make: Callable[..., T], *inputs: Any) -> T:
    """``make(*inputs)``, remembered in the same way."""
    return recalled((make.__module__, make.__qualname__, inputs), lambda: make(*inputs))


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does: its time in ns and its size. Zeros without a file."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def digest(value: Any) -> bytes:
    """SHA-256 of a value of numbers, texts, arrays, dataclasses, lists and mappings."""
    return hashlib.sha256(repr(_plain(value)).encode(errors="surrogatepass")).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, hashlib.sha256(value.tobytes()).hexdigest()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(_plain(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_plain(item) for item in value]
    return value
