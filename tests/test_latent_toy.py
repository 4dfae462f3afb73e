"""Masked reconstruction keeps a moving background out of the latent action (studies/latent_actions/toy.py, with fewer updates)."""

from __future__ import annotations

import pytest
from studies.latent_actions.toy import probed


@pytest.mark.slow
def test_the_mask_keeps_the_background_out() -> None:
    """Measured: 0.26 and 0.58 with the mask, 0.53 and 0.09 without, in 100 CPU seconds."""
    masked, plain = probed(0.0), probed(1.0)
    assert masked[0] < 0.5
    assert masked[0] < 0.6 * plain[0]
    assert plain[1] < 0.3 < masked[1]
