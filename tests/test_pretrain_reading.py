"""The batches of pre-training are read while the one before is learned from."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from localmotion.runs.settings import compose
from localmotion.training.pretrain import pretrain
from localmotion.video import WindowSampler


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
