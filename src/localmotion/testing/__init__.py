"""The conformance suite: what every method must do, inside the package or outside. docs/add_a_method.md has the rules.

from localmotion.testing import check_method

check_method(MyMethod)
"""

from __future__ import annotations

from localmotion.testing.batches import ACTIONS, SIZE, BatchMaker, full_batch, random_batch
from localmotion.testing.recorded import RecordedGraph
from localmotion.testing.rules import BrokenRuleError, Check, Rule, Subject, name_of, sentence_of
from localmotion.testing.suite import (
    CAPABILITIES,
    RULES,
    check_acts,
    check_decodes,
    check_learns,
    check_method,
    check_plans,
    check_predicts,
    checks_of,
)
from localmotion.testing.written import Case, Noise, Written, check_update, fill_

__all__ = [
    "ACTIONS",
    "CAPABILITIES",
    "RULES",
    "SIZE",
    "BatchMaker",
    "BrokenRuleError",
    "Case",
    "Check",
    "Noise",
    "RecordedGraph",
    "Rule",
    "Subject",
    "Written",
    "check_acts",
    "check_decodes",
    "check_learns",
    "check_method",
    "check_plans",
    "check_predicts",
    "check_update",
    "checks_of",
    "fill_",
    "full_batch",
    "name_of",
    "random_batch",
    "sentence_of",
]
