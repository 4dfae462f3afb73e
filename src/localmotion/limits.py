"""Limits of settings: the least and the greatest value of a number, beside the settings that have them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from localmotion.recipe import Recipe

Limits = Mapping[str, tuple[float, float]]
"""Least and greatest value of settings by name. A class of settings has them as ``LIMITS``; numbers without any are not limited."""


def at_least(low: float, *names: str) -> dict[str, tuple[float, float]]:
    """Limits of settings that are ``low`` or more."""
    return dict.fromkeys(names, (low, math.inf))


def above_zero(*names: str) -> dict[str, tuple[float, float]]:
    """Limits of settings that are above 0."""
    return at_least(math.nextafter(0, 1), *names)


def shares(*names: str) -> dict[str, tuple[float, float]]:
    """Limits of settings in 0..1."""
    return dict.fromkeys(names, (0.0, 1.0))


def limits(config: Any, prefix: str = "") -> Iterator[tuple[str, tuple[float, float]]]:
    """Dotted names of the settings of a nested configuration that have limits, and these."""
    for name, ends in getattr(config, "LIMITS", {}).items():
        yield f"{prefix}{name}", ends
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Recipe):
            yield from limits(value, f"{prefix}{item.name}.")
