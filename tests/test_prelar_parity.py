"""PreLAR as a whole against its release, zhanglixuan0720/PreLAR (studies/parity/prelar.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ipv_parity as rules
import prelar_parity as parity

# The release's numbers in float64, on the weights, batches and noise of prelar_parity.py (studies/parity/prelar_reference.py writes
# them). Largest relative difference seen when both were run side by side: 4e-8, as in test_ipv_parity.py; 2e-10 before imagination.
REFERENCE = json.loads((Path(__file__).parent / "prelar_reference.json").read_text())["cases"]


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
    """Losses, gradients before clipping, changes of the weights after all updates, and what the model then does."""
    there, newest = REFERENCE[case], None
    for newest, update in zip(parity.updates(case), there["updates"], strict=True):
        assert {key: newest.losses[key] for key in update["losses"]} == pytest.approx(update["losses"], rel=1e-6)
        norms = rules.norms(newest.gradients, parity.PARTS)
        assert {key: norms[key] for key in update["gradient norms"]} == pytest.approx(update["gradient norms"], rel=1e-6)
        # Losses that the release lacks, or whose gradient it lacks, have no weight here either.
        assert {key for key, loss in newest.losses.items() if key not in update["losses"]} <= {
            "action_kl",
            "reward_representative",
        }
        assert all(norms[key] == 0 for key in norms.keys() - update["gradient norms"].keys())
    assert newest is not None
    changes = parity.changes(case, newest.model)
    assert {key: changes[key] for key in there["changes of weights"]} == pytest.approx(there["changes of weights"], rel=1e-6)
    if newest.model.acts:
        for explore, name in ((False, "actions"), (True, "actions, explore")):
            torch.testing.assert_close(rules.act(newest.model, explore, parity.B), torch.tensor(there[name]), atol=1e-6, rtol=0)
