"""The batches of pre-training are read while the one before is learned from."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch

from localmotion.config import RunConfig
from localmotion.errors import StoreError
from localmotion.runs.settings import compose
from localmotion.training.pretrain import _heldout, _sampler, pretrain
from localmotion.video import ClipStore, WindowSampler
from localmotion.video.sample import Split


def test_pretraining_reads_its_batches_ahead_and_in_order(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, str]] = []
    real = WindowSampler.batch

    def batch(self: WindowSampler, index: int) -> dict[str, torch.Tensor]:
        read.append((index, threading.current_thread().name.partition("_")[0]))
        return real(self, index)

    monkeypatch.setattr(WindowSampler, "batch", batch)
    flags = {"device": "cpu", "precision": "fp32", "threads": 1, "data": str(store)}
    few = ("heldout_fraction=0.0", "pretrain.updates=2")
    pretrain(compose("ipv", "pretrain", preset="debug", flags=flags, settings=few), tmp_path / "run")
    assert read == [(0, "windows"), (1, "windows"), (2, "windows")]
    assert not any(thread.name.startswith("windows") for thread in threading.enumerate())


@pytest.mark.parametrize(("split", "fraction"), [("heldout", 0.01), ("train", 0.999)])
def test_a_part_without_clips_names_a_fraction_that_gives_it_some(
    split: Split, fraction: float, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = ClipStore(store)

    def run_at(share: float) -> RunConfig:
        return compose("ipv", "pretrain", preset="debug", settings=(f"pretrain.heldout_fraction={share}",))

    with pytest.raises(
        StoreError, match=r"part; add clips, or set --pretrain\.heldout_fraction 0\.[1-9] in a new run$"
    ) as caught:
        _sampler(clips, run_at(fraction), split)
    named = re.search(r"heldout_fraction (0\.\d)", str(caught.value))
    assert named
    for part in ("train", "heldout"):
        _sampler(clips, run_at(float(named[1])), part).close()
    if split == "heldout":
        assert _heldout(clips, run_at(fraction)) is None
        assert f"no held-out figures: {caught.value}" in " ".join(capsys.readouterr().out.split())
