"""`check_method`: every rule that applies to a method, for each of its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from localmotion.errors import unknown_name
from localmotion.methods.base import Method
from localmotion.testing.acts import ACTS, PLANS, acts, plans
from localmotion.testing.declares import DECLARES, composes, presets_compose
from localmotion.testing.labels import DECODES, LABELLED, decodes, knows_labels
from localmotion.testing.learns import EPISODES, LEARNS, has_episodes
from localmotion.testing.predicts import CODES, PREDICTS, has_code, predicts
from localmotion.testing.rules import Check, Rule, Subject

CAPABILITIES: Mapping[str, tuple[Callable[[Subject], bool], tuple[Rule, ...]]] = {
    "learns": (lambda subject: True, LEARNS),
    "learns from episodes": (has_episodes, EPISODES),
    "predicts video": (predicts, PREDICTS),
    "codes motion": (has_code, CODES),
    "acts": (acts, ACTS),
    "plans": (plans, PLANS),
    "decodes labels": (decodes, DECODES),
    "decodes few labels": (knows_labels, LABELLED),
}
"""Capability of a method in a stage -> whether it is declared, and its rules."""
RULES: tuple[Rule, ...] = (*DECLARES, *(rule for _, rules in CAPABILITIES.values() for rule in rules))
"""All rules."""


def checks_of(
    method: type[Method], *, stages: Sequence[str] | None = None, rules: Sequence[Rule] = RULES, **options: Any
) -> list[Check]:
    """The checks of a method, one for each rule and stage: parametrize a test with them to see each by itself.

    Where the method's settings do not compose, only those up to `presets_compose`: all others would fail for the same reason.

    Args:
        stages: names of the stages to check; default: all.
        rules: the rules to check; default: all that apply.
        options: fields of `Subject`: preset, settings (name=value texts), env, batch (a `BatchMaker`), across.

    Raises ConfigError for a stage that the method does not have.
    """
    for stage in stages or ():
        if stage not in method.stages:
            raise unknown_name(f"stage of {method.__name__}", stage, method.stages)
    subjects = [Subject(method, stage, **options) for stage in stages or method.stages]
    if presets_compose in rules and not all(map(composes, subjects)):
        rules = [each for each in DECLARES[: DECLARES.index(presets_compose) + 1] if each in rules]
    found = [Check(rule, subjects[0]) for rule in DECLARES if rule in rules]
    for subject in subjects:
        for declared, own in CAPABILITIES.values():
            if declared(subject):
                found += [Check(rule, subject) for rule in own if rule in rules]
    return found


def check_method(method: type[Method], *, stages: Sequence[str] | None = None, **options: Any) -> list[Check]:
    """Check a method against every rule of docs/add_a_method.md that applies to it; a minute at most at preset debug.

    Args and errors as in `checks_of`. Returns the checks that passed. Raises BrokenRuleError at the first broken rule, with the rule,
    what was found, and the fix.
    """
    checks = checks_of(method, stages=stages, **options)
    for check in checks:
        check()
    return checks


def _of(*capabilities: str) -> Callable[..., list[Check]]:
    rules = tuple(rule for capability in capabilities for rule in CAPABILITIES[capability][1])

    def check(method: type[Method], *, stages: Sequence[str] | None = None, **options: Any) -> list[Check]:
        return check_method(method, stages=stages, rules=rules, **options)

    check.__doc__ = f"`check_method` with the rules of: {', '.join(capabilities)}. Returns [] where no stage declares it."
    return check


check_learns = _of("learns", "learns from episodes")
check_predicts = _of("predicts video", "codes motion")
check_acts = _of("acts")
check_plans = _of("plans")
check_decodes = _of("decodes labels", "decodes few labels")
