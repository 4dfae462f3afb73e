"""The registry of methods: name -> module and class. Nothing else in the code asks for a method by name."""

from __future__ import annotations

import importlib

from localmotion.errors import unknown_name
from localmotion.methods.base import Batch, Group, Method

_METHODS = {
    "apv": ("localmotion.methods.apv", "APV"),
    "drp": ("localmotion.methods.drp", "DRP"),
    "dreamer_v2": ("localmotion.methods.dreamer_v2", "DreamerV2"),
    "dreamer_v3": ("localmotion.methods.dreamer_v3", "DreamerV3"),
    "ipv": ("localmotion.methods.ipv", "IPV"),
}


def names() -> list[str]:
    """All registered methods."""
    return sorted(_METHODS)


def get(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError naming the nearest ones for an unknown name."""
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    module, cls = _METHODS[name]
    found: type[Method] = getattr(importlib.import_module(module), cls)
    return found


__all__ = ["Batch", "Group", "Method", "get", "names"]
