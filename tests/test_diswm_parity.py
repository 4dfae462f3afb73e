"""DisWM's world model and acting against its release, qiwang067/DisWM (studies/parity/diswm.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import diswm_parity as parity
import ipv_parity as rules

# The release's numbers in float64, on the weights, batches and noise of diswm_parity.py (studies/parity/diswm_reference.py writes them).
# Largest relative difference seen when both were run side by side: 6e-15.
REFERENCE = json.loads((Path(__file__).parent / "diswm_reference.json").read_text())["cases"]


@pytest.fixture(autouse=True)
def _rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dtype = torch.get_default_dtype()
    rules.float64(monkeypatch)
    parity.fix_noise(monkeypatch)
    yield
    torch.set_default_dtype(dtype)


def test_every_case_has_numbers_of_the_release() -> None:
    assert set(REFERENCE) == set(parity.CASES)
    assert all(len(case["updates"]) == parity.UPDATES for case in REFERENCE.values())


@pytest.mark.parametrize("case", parity.CASES)
def test_three_updates_and_actions_agree_with_the_release(case: str) -> None:
    """Losses of the world model, their gradients before clipping, changes of the weights after all updates, and acting."""
    there, newest = REFERENCE[case], None
    for newest, update in zip(parity.updates(case), there["updates"], strict=True):
        losses = {key: loss for key, loss in newest.losses.items() if key not in ("actor", "critic")}
        assert losses == pytest.approx(update["losses"], rel=1e-8)
        assert rules.norms(newest.gradients, parity.PARTS) == pytest.approx(update["gradient norms"], rel=1e-8)
    assert newest is not None
    changes = parity.changes(case, newest.model)
    assert changes == pytest.approx(there["changes of weights"], rel=1e-8)
    if newest.model.acts:
        torch.testing.assert_close(parity.act(case, newest.model), torch.tensor(there["actions"]), atol=1e-8, rtol=0)


def test_the_teacher_is_not_trained_as_it_is_in_the_release() -> None:
    assert REFERENCE["fine-tuning"]["as released"]["gradient norm, teacher"] > 0
    *_, newest = parity.updates("fine-tuning")
    start = parity.build("fine-tuning")[1].teacher.state_dict()
    assert all(torch.equal(x, start[name]) for name, x in newest.model.teacher.state_dict().items())
    assert not any(name.startswith("teacher.") for name in newest.gradients)
