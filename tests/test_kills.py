"""The short form of `make soak`: a few kills at random moments of each kind of work, and its own readers against damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from soak.kills import check_run
from soak.memory import slope

from localmotion.replay import Replay


def test_work_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    few = ["--kills", "2", "--seed", "1", "--length", "24", "--videos", "5"]
    command = [sys.executable, "-m", "soak.kills", "--out", str(tmp_path), *few]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())["stages"]
    assert {name: stage["kills"] for name, stage in found.items()} == {"extract": 2, "pretrain": 2, "finetune": 2}
    assert all(stage["finished"] >= 1 and not stage["broken"] for stage in found.values())


def test_damage_would_be_seen(tmp_path: Path) -> None:
    """The check that says "nothing broken" must be able to say otherwise."""
    folder = tmp_path / "checkpoints" / "0000000001"
    folder.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("")
    replay = Replay({"reward": ((), "float32")}, capacity=10, length=2).state() | {"episodes": [3], "serial": 4}
    (folder / "state.json").write_text(json.dumps({"format": 1, "update": 1, "metrics_offset": 0, "replay": replay}))
    (folder / "COMPLETE").write_text("")
    with pytest.raises(Exception, match="episode_0000003"):
        check_run(tmp_path)
    (folder / "weights.safetensors").write_bytes(b"half a file")
    with pytest.raises(Exception, match="weights"):
        check_run(tmp_path)


def test_slope_is_an_hour_and_leaves_out_the_beginning() -> None:
    seconds = [float(s) for s in range(0, 7200, 60)]
    values = [500.0 if s < 600 else 1000.0 + 7 * s / 3600 for s in seconds]
    assert slope(seconds, values) == pytest.approx(7.0)
