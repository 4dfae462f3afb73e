"""Whose code and which backends a recipe may use."""

from __future__ import annotations

import os

from localmotion.errors import ConfigError, unknown_name
from localmotion.perception.base import KINDS, backends
from localmotion.perception.cotracker import CODE
from localmotion.recipe import Recipe

TRUSTED = "LOCALMOTION_TRUSTED_CODE"
"""Environment variable: torch.hub repositories or folders (comma between them) whose code a recipe may run."""


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError for a recipe that cannot be followed here.

    That is: a backend that nobody has registered, or options of a backend that choose whose code runs. A repository or folder other than
    the pinned one counts only when `TRUSTED` names it, because a recipe comes in files that somebody else may have written.
    """
    for kind in KINDS:
        if (name := getattr(recipe, kind)) not in backends(kind) and (name or kind != "mask"):
            raise unknown_name(f"{kind} backend", name[:80], backends(kind))
    for backend, options in recipe.backend_options.items():
        if not isinstance(options, dict):
            raise ConfigError(f"backend_options of {backend!r:.60} are a mapping of options")
    _check_code(recipe)


def _check_code(recipe: Recipe) -> None:
    asked = {**CODE, **recipe.backend_options.get("cotracker3", {})}
    trusted = [name.strip() for name in os.environ.get(TRUSTED, "").split(",") if name.strip()]
    repository = asked["repository"]
    if any(asked[key] != value for key, value in CODE.items()) and repository not in trusted:
        raise ConfigError(
            f"its recipe runs the code of {repository!r:.120} (cotracker3); if you trust it, set {TRUSTED} to exactly this"
        )
