"""Methods outside the package: classes that the command line names, and entry points of installed packages.

An entry point is how a package says that it has a method; in its pyproject.toml:

    [project.entry-points."localmotion.methods"]
    mine = "my_package.my_method:Mine"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint

from localmotion.errors import ConfigError
from localmotion.foreign import entries, import_named
from localmotion.methods.base import Method

GROUP = "localmotion.methods"
"""Group of the entry points. The name of each is the `name` of its method."""


def installed() -> dict[str, list[EntryPoint]]:
    """Entry points of installed packages by method's name; nothing is imported. A name has several where packages disagree."""
    return entries(GROUP)


def import_class(module: str, cls: str, who: str) -> type[Method]:
    """Class ``cls`` of ``module``; ``who`` names it in errors.

    Raises ConfigError, with the fix, for a module that is not there or cannot be imported, a class that it does not have, and a class
    that is not a `Method` with a name.
    """
    found = import_named(module, who)
    methods = [name for name, value in vars(found).items() if _is_method(value) and value.__module__ == module]
    known = f"its methods are {', '.join(methods)}" if methods else "it has no method"
    if not hasattr(found, cls):
        raise ConfigError(f"{who}: module {module} has no class {cls!r}; {known}")
    method: type[Method] = getattr(found, cls)
    if not _is_method(method):
        raise ConfigError(f"{who}: {cls} is not a subclass of localmotion.methods.Method; {known}")
    if not isinstance(getattr(method, "name", None), str) or not method.name:
        raise ConfigError(f'{who}: {cls} has no name; write `name = "..."` in the class')
    return method


def _is_method(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and value is not Method


def parse(text: str) -> tuple[str, str]:
    """Module and class of a ``--plugin`` text. Raises ConfigError for another form."""
    module, _, cls = text.partition(":")
    if not cls.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"--plugin {text!r:.200}: write it as MODULE:CLASS, e.g. --plugin my_method:MyMethod")
    return module, cls
