"""The papers' settings for a suite of environments, for every method of the family (IPV's release, DRP Table 5)."""

from __future__ import annotations

from typing import Any

SUITES: dict[str, dict[str, Any]] = {
    "metaworld": {
        "online": {
            "env_steps": 255_000,
            "batch_size": 50,
            "prefill": 5_000,
            "freeze_updates": 100,
            "prioritize_ends": True,
        },
        "model": {"intrinsic_weight": 1.0, "free_nats": 0.0, "context_erasing": True},
    },
    "dmc": {
        "online": {"env_steps": 1_020_000, "batch_size": 16, "prefill": 1_000, "freeze_updates": 0},
        "model": {"intrinsic_weight": 0.1, "free_nats": 1.0, "context_erasing": False},
    },
}
DMC_SUITES = ("dmc", "dmcr", "distracting", "diswm", "masklam", "planar")
"""The suites based on DeepMind Control."""
SUITES |= dict.fromkeys(DMC_SUITES, SUITES["dmc"]) | {"dmw": SUITES["metaworld"]}
SUITES["toy"] = {
    "online": {"env_steps": 10_000, "batch_size": 16, "prefill": 500, "freeze_updates": 0},
    "model": {"intrinsic_weight": 0.0, "free_nats": 0.0, "context_erasing": False},
}
"""By suite. `model` keys that a method does not have are dropped for it. DreamerV2, for example, has no intrinsic weight."""
OWN = "own"
"""Key, in the place of a suite, of all environments outside the package."""
SUITES[OWN] = {}
ENDS: dict[str, dict[str, Any]] = {OWN: {"model": {"behaviour": {"continuation": True}}}}
"""For `SUITES` of a method with a continuation head: it is on where episodes may end by the task's rules. Those of the built-in suites end
by time limits (but lqr's of DeepMind Control, and Meta-World's with `end_on_success`)."""
