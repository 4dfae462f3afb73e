"""The registry of methods: name -> module and class. Nothing else in the code asks for a method by name."""

from __future__ import annotations

import importlib

from localmotion.errors import ConfigError, unknown_name
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


def register(name: str, module: str, cls: str) -> None:
    """Add a method of your own: class ``cls`` of ``module``, imported when it is first asked for.

    After this the name works wherever a method's name does, in this process: `compose`, `pretrain`, `finetune`, `localmotion.cli.main`.
    docs/add_a_method.md has an example. Raises ConfigError for a name that another class has.
    """
    if _METHODS.setdefault(name, (module, cls)) != (module, cls):
        raise ConfigError(f"method {name!r} is {'.'.join(_METHODS[name])}; register {module}.{cls} by another name")


def get(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError naming the nearest ones for an unknown name, or for a class that cannot be imported."""
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    module, cls = _METHODS[name]
    try:
        found: type[Method] = getattr(importlib.import_module(module), cls)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"method {name!r} is registered as {module}.{cls}, which cannot be imported: {error}") from error
    return found


__all__ = ["Batch", "Group", "Method", "get", "names", "register"]
