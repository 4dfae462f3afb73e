"""The registry of methods: name -> module and class. No other code mentions a method's name.

A method outside the package is added by the entry point of an installed package, by ``--plugin`` on the command line (`plug_in`), or
by `register`. A file that is read can only name a method; it cannot cause the import of one that is not registered.
"""

from __future__ import annotations

import importlib

from localmotion.errors import ConfigError, unknown_name
from localmotion.foreign import see_working_folder
from localmotion.methods import plugins
from localmotion.methods.base import Batch, Group, Method

_METHODS = {
    "apv": ("localmotion.methods.apv", "APV"),
    "bc": ("localmotion.methods.bc", "BC"),
    "diswm": ("localmotion.methods.diswm", "DisWM"),
    "drp": ("localmotion.methods.drp", "DRP"),
    "dreamer_v2": ("localmotion.methods.dreamer_v2", "DreamerV2"),
    "dreamer_v3": ("localmotion.methods.dreamer_v3", "DreamerV3"),
    "ipv": ("localmotion.methods.ipv", "IPV"),
    "laom": ("localmotion.methods.laom", "LAOM"),
    "lapo": ("localmotion.methods.lapo", "LAPO"),
    "masklam": ("localmotion.methods.masklam", "MaskLAM"),
    "prelar": ("localmotion.methods.prelar", "PreLAR"),
    "pvdr": ("localmotion.methods.pvdr", "PVDR"),
}
_PLUGGED_IN: list[str] = []


def names() -> list[str]:
    """All known methods: built in, registered, and those of installed packages."""
    return sorted({*_METHODS, *plugins.installed()})


def register(name: str, module: str, cls: str) -> None:
    """Register your own method: class ``cls`` of ``module``, which is imported on first use.

    In this process every function that takes a method's name then accepts it: `compose`, `pretrain`, `finetune`, `localmotion.cli.main`.
    Raises ConfigError if another class has the name.
    """
    if _METHODS.setdefault(name, (module, cls)) != (module, cls):
        raise ConfigError(f"method {name!r} is {'.'.join(_METHODS[name])}; register {module}.{cls} by another name")


def plug_in(text: str) -> type[Method]:
    """Import and register the method that ``--plugin MODULE:CLASS`` names, by the class's own `name`.

    Modules are also looked for in the working folder. For texts that the user typed, never for those of a file: importing runs code.

    Raises ConfigError for a text of another form, a module or class that cannot be imported, a class that is not a method, and a name
    that another class has.
    """
    module, cls = plugins.parse(text)
    see_working_folder()
    who = f"--plugin {text}"
    found = plugins.import_class(module, cls, who)
    taken = [".".join(_METHODS[found.name])] if found.name in _METHODS else []
    taken += [f"{point.module}.{point.attr}" for point in plugins.installed().get(found.name, [])]
    if other := next((place for place in taken if place != f"{module}.{cls}"), None):
        raise ConfigError(f"{who}: the name {found.name!r} belongs to {other}; give {cls} another `name`")
    register(found.name, module, cls)
    if text not in _PLUGGED_IN:
        _PLUGGED_IN.append(text)
    return found


def plugged_in() -> tuple[str, ...]:
    """The texts that `plug_in` was given, for code that starts further processes of this program."""
    return tuple(_PLUGGED_IN)


def get(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError naming the nearest ones for an unknown name, or for a class that cannot be imported."""
    if name not in _METHODS:
        return _get_installed(name)
    module, cls = _METHODS[name]
    try:
        found: type[Method] = getattr(importlib.import_module(module), cls)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"method {name!r} is registered as {module}.{cls}, which cannot be imported: {error}") from error
    return found


def _get_installed(name: str) -> type[Method]:
    """The method that an entry point has under this name."""
    points = plugins.installed().get(name, [])
    if not points:
        raise unknown(name)
    told = [f"{point.value} ({point.dist.name if point.dist else 'no package'})" for point in points]
    if len(points) > 1:
        raise ConfigError(f"method {name!r} is an entry point of several packages: {', '.join(told)}; uninstall all but one")
    found = plugins.import_class(points[0].module, points[0].attr, f"method {name!r}, entry point {told[0]}")
    if found.name != name:
        raise ConfigError(f"entry point {name!r} = {told[0]} has the method {found.name!r}; both names must be the same")
    return found


def unknown(name: str) -> ConfigError:
    """The error for a name that no method has."""
    return ConfigError(f"{unknown_name('method', name, names())}; a method outside the package needs --plugin MODULE:CLASS")


__all__ = ["Batch", "Group", "Method", "get", "names", "plug_in", "plugged_in", "register", "unknown"]
