"""How many examples a property test draws."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def examples(number: int, *suppress: HealthCheck) -> settings:
    """``number`` examples in `make test`; in `make test-slow` more, by the factor between the two profiles of conftest.py."""
    usual = settings.get_profile("quick").max_examples
    checks = [HealthCheck.too_slow, *suppress]
    return settings(max_examples=max(number * settings().max_examples // usual, 1), suppress_health_check=checks)
