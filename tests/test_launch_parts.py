"""extract --launch: each part that has missing shards is given once, and the store is finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmotion.cli import main
from localmotion.launch import extraction
from localmotion.launch_commands import without_launch
from refusals import fails

FAST = ["--percept-size", "64", "--redraw-rounds", "1", "--tracks", "8", "--shard-clips", "2"]


def test_parts_on_this_machine_are_one_extraction(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, out = tmp_path / "m.jsonl", tmp_path / "store"
    main(["scan", str(videos), "--no-decode", "--manifest", str(manifest)])
    line = ["extract", "--manifest", str(manifest), "--out", str(out), "--parts", "3", *FAST, "--workers", "0"]
    main([*line, "--part", "1"])
    capsys.readouterr()
    main([*line, "--launch", "local"])
    said = capsys.readouterr().out
    assert "3 parts of" in said
    assert "1 finished, 2 to do" in said
    assert said.count("begins  part-") == 2
    assert "begins  part-1" not in said
    assert "8 clips, 240 frames of 8 videos in 4 shards" in said
    assert sorted(path.name for path in (tmp_path / "store.launch" / "console").iterdir()) == ["part-0.log", "part-2.log"]
    monkeypatch.setattr(extraction, "carry_out", None)  # nothing is given any more
    main([*line, "--launch", "local"])
    assert "3 finished, 0 to do" in capsys.readouterr().out


def test_arguments_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["extract", "--out", str(tmp_path / "store")]
    manifest = ["--manifest", str(tmp_path / "m.jsonl")]
    assert "need --launch ENGINE" in fails(capsys, *line, *manifest, "--pack", "2")
    assert "give --manifest FILE and --parts N" in fails(capsys, *line, "videos", "--launch", "local")
    assert "and no --part" in fails(capsys, *line, *manifest, "--parts", "3", "--part", "1", "--launch", "local")
    assert "unknown engine 'slurm'" in fails(capsys, *line, *manifest, "--launch", "slurm")
    assert "--parts 0: at least 1" in fails(capsys, *line, *manifest, "--parts", "0", "--launch", "local")
    said = fails(capsys, *line, *manifest, "--parts", "1", "--launch", "local")
    assert "1 of 1 parts failed, first part-0: " in said
    assert "m.jsonl" in said
    assert "the same command gives them again" in said


def test_a_part_is_the_same_command_without_the_engine() -> None:
    line = [
        "extract",
        "--launch",
        "ray",
        "--manifest",
        "m",
        "--pack",
        "2",
        "--launch-option",
        "a=--out",
        "--parts",
        "3",
    ]
    assert without_launch(line) == ["extract", "--manifest", "m", "--parts", "3"]
