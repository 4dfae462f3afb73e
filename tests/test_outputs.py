"""Where results go is checked before the work: places that cannot be written, kinds that are not written, runs that are running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localmotion.cli import main
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.files import LOCK, Lock, check_output, locked
from localmotion.report.build import report
from localmotion.runs.rundir import RunDir, claimed
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain
from localmotion.training.study import run_study

TRAIN = ["train", "--method", "dreamer_v2", "--preset", "debug", "--env", "toy:dot", "--device", "cpu", "--threads", "1"]


def said_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


COMMANDS = {
    "report": ["report", "{run}", "--out", "{out}.html"],
    "inspect": ["inspect", "{store}", "--out", "{out}.png"],
    "predict": ["predict", "--checkpoint", "{run}", "--data", "{store}", "--out", "{out}.png"],
    "collect": ["collect", "toy:dot", "--out", "{out}", "--episodes", "1"],
    "collect to a store": ["collect", "toy:dot", "--store", "--out", "{out}", "--episodes", "1"],
    "evaluate": ["evaluate", "{run}", "--video", "{out}.mp4"],
    "probe": ["probe", "{run}", "--data", "{store}", "--out", "{out}.json"],
    "perception-report": ["perception-report", "--env", "toy:dot", "--frames", "3", "--out", "{out}.json"],
    "perception-report, pictures": ["perception-report", "--env", "toy:dot", "--frames", "3", "--draw", "{out}"],
    "scan": ["scan", "{store}", "--manifest", "{out}.jsonl"],
    "study": ["study", "{study}", "--out", "{out}"],
    "train": [*TRAIN, "--run", "{out}"],
    "demo": ["demo", "--run", "{out}"],
}
STUDY = "preset: debug\ntasks: [toy:dot]\nseeds: [0]\nvariants: {A: {method: dreamer_v2}}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_below_a_file_is_one_line_before_the_work(
    command: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "study.yaml").write_text(STUDY)
    RunDir(tmp_path / "run", compose("dreamer_v2", "train", preset="debug", env="toy:dot"))
    places = {"run": tmp_path / "run", "store": store, "study": tmp_path / "study.yaml", "out": tmp_path / "file" / "deep" / "x"}
    line = said_in_one_line([part.format(**places) for part in COMMANDS[command]], capsys)
    assert f"{tmp_path / 'file'} is not a folder; choose another place" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "{tmp}/run", "--video", "{tmp}/x.gif"], "must end in .mp4"),
        (["evaluate", "{tmp}/run", "--video", "{tmp}/x"], "must end in .mp4"),
        (["predict", "--checkpoint", "{tmp}/run", "--data", "{tmp}", "--out", "{tmp}/x.json"], "must end in .png"),
        (["predict", "--checkpoint", "{tmp}/run", "--data", "{tmp}", "--out", "{tmp}/x"], "must end in .png"),
        (["inspect", "{tmp}", "--out", "{tmp}/x.jpg"], "must end in .png or .mp4"),
        (["report", "{tmp}/run", "--out", "{tmp}/x.pdf"], "must end in .html or .htm"),
        (["report", "{tmp}/run", "--out", "{tmp}/folder.html"], "is a folder; give the name of a file"),
        (["probe", "--data", "{tmp}", "--out", "{tmp}/x.png"], "must end in .json"),
        (["collect", "toy:dot", "--out", "{tmp}/file"], "file: is not a folder"),
        (["collect", "toy:dot", "--out", "{tmp}/link"], "link: is a link that leads nowhere"),
        (["report", "{tmp}/run", "--out", "{tmp}/" + 300 * "x" + ".html"], "File name too long"),
        ([*TRAIN, "--run", "{tmp}/file"], "file: is not a folder"),
        ([*TRAIN, "--run", "/proc/run"], "/proc/run: cannot be"),
    ],
)
def test_a_kind_that_is_not_written_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "/proc/run" in arguments and not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    assert said in said_in_one_line([part.replace("{tmp}", str(tmp_path)) for part in arguments], capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_found_out_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "a" / "b.html", ConfigError, suffixes=(".html",))
    check_output(tmp_path, ConfigError, folder=True)
    assert not list(tmp_path.iterdir())

    def refused(**settings: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("localmotion.files.tempfile.TemporaryFile", refused)
    for path, folder in ((tmp_path / "a" / "b.html", False), (tmp_path / "a", True)):
        with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\); choose another place"):
            check_output(path, ConfigError, folder=folder)


# --- one process a run --------------------------------------------------------------------------------------------------

HOLD = "import sys, time; from localmotion.files import Lock; Lock(__import__('pathlib').Path(sys.argv[1])); print(); time.sleep(600)"


@pytest.mark.parametrize("stage", ["train", "pretrain", "study"])
def test_what_is_running_already_is_refused_and_a_kill_releases_it(stage: str, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out / LOCK)], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()

    def begin() -> None:
        if stage == "study":
            (tmp_path / "study.yaml").write_text(STUDY)
            run_study(tmp_path / "study.yaml", out)
        elif stage == "train":
            finetune(compose("dreamer_v2", "train", preset="debug", env="toy:dot"), out)
        else:
            pretrain(compose("drp", "pretrain", preset="debug", flags={"data": str(store)}), out)

    try:
        what = "study" if stage == "study" else "run"
        with pytest.raises(CheckpointError, match=rf"this {what} is running already.*process {process.pid} on "):
            begin()
        assert [path.name for path in out.iterdir()] == [LOCK]  # nothing was written
    finally:
        process.kill()
        process.communicate()
    with claimed(out):
        pass


def test_a_run_that_is_running_can_be_looked_at(tmp_path: Path) -> None:
    few = (
        "env_steps=60",
        "prefill=30",
        "online.eval_every=100000",
        "precision=fp32",
        "device=cpu",
        "env_options={time_limit: 6}",
    )
    out = finetune(compose("dreamer_v2", "train", preset="debug", env="toy:dot", settings=few), tmp_path / "run")
    with claimed(out):
        assert evaluate_run(out, episodes=1, device="cpu")["length_mean"] == 6
        assert report([out], tmp_path / "page.html").stat().st_size > 1000
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    """A run directory from somebody else must not empty one of our files."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(mine)
    with pytest.raises(CheckpointError, match="cannot be opened as a lock"), claimed(tmp_path / "run"):
        pass
    assert mine.read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LocalmotionError, match="not a regular file"), locked(tmp_path / "pipe", "held", LocalmotionError):
        pass
    lock = Lock(tmp_path / "fine")
    lock.release()
    (tmp_path / "fine").unlink()
    assert Lock(tmp_path / "fine").taken


def test_a_directory_in_which_nothing_was_written_is_removed_again(tmp_path: Path) -> None:
    run = compose("dreamer_v2", "train", preset="debug", env="dmc:cartpole_balance", settings=("env_options={camera: 99}",))
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(ConfigError, match="camera 99"):
            finetune(run, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
