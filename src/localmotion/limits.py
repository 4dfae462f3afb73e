"""Limits of settings: the least and the greatest value of a number, beside the settings that have them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from localmotion.errors import ConfigError
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


def wanted(value: float, low: float, high: float) -> str:
    """Limits in words. A large one is only there because larger numbers cannot be stored; it is said to who is beyond it."""
    if value > high >= 2.0**31:
        return f"at most {high:g}"
    if 0 < low < 1e-300:
        return "above 0" if high >= 2.0**31 else f"above 0 and at most {high:g}"
    return f"at least {low:g}" if high >= 2.0**31 else f"in {low:g}..{high:g}"


def check_limits(config: Any) -> None:
    """Raise ConfigError for a number of a nested configuration beyond its limits."""
    for name, (low, high) in limits(config):
        value = attrgetter(name)(config)
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ConfigError(f"setting {name}={value} must be {wanted(value, low, high)}")
