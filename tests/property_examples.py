"""What property tests draw: in `make test` the same examples every time, in `make test-slow` new ones and many more.

No deadline and no health check looks at the clock: a busy machine is not a fault.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

QUICK, LONG = "quick", "long"  # profiles, --hypothesis-profile
_USUAL, _MANY = 100, 5000
_CLOCKLESS: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile(QUICK, max_examples=_USUAL, derandomize=True, database=None, **_CLOCKLESS)
settings.register_profile(LONG, max_examples=_MANY, print_blob=True, **_CLOCKLESS)


def examples(number: int, *suppress: HealthCheck) -> settings:
    """``number`` examples in the quick profile, in another one as many more as it has of all; ``suppress`` health checks."""
    count = max(number * settings().max_examples // _USUAL, 1)
    return settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow, *suppress])
