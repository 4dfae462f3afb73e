"""A run of a study as a job: through the end of its command and two warnings of Slurm, to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from localmotion.training.study import state
from test_resume import assert_same
from test_study import STUDY, write
from waiting import holds, wait_until


@pytest.mark.slow
def test_a_study_survives_signals_to_its_job_and_the_end_of_its_command(tmp_path: Path) -> None:
    """The command is killed. Its job gets SIGUSR2, later SIGUSR1, and is queued again. The command is given again, and waits for the job.

    The run has the bytes of one that was never stopped.
    """
    pytest.importorskip("submitit")
    text = STUDY[: STUDY.index("  entropy")].replace("[0, 1]", "[0]").replace("env_steps: 160", "env_steps: 600")
    path, out = write(tmp_path, text), tmp_path / "out"
    line = [sys.executable, "-m", "localmotion", "study", str(path), "--out"]
    assert subprocess.run([*line, str(tmp_path / "plain")], stdout=subprocess.DEVNULL).returncode == 0

    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*line, str(out), "--launch", "submitit", "--launch-option", "cluster=local"], stdout=said)
    run, log = out / "runs" / "DreamerV2-toy_dot-0", out / "console" / "DreamerV2-toy_dot-0.log"
    try:
        wait_until(lambda: holds(run / "metrics.jsonl", '"train"'), process)
        controller = int((tmp_path / "said").read_text().split("job ")[1].split()[0])
    finally:
        process.kill()
        process.wait()
    second = subprocess.Popen([*line, str(out), "--launch", "submitit"], stdout=subprocess.PIPE, text=True)
    for count, number in enumerate((signal.SIGUSR2, signal.SIGUSR1), start=1):
        wait_until(lambda: state(run) == "running", second)
        (inside,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        os.kill(int(inside), number)
        wait_until(lambda count=count: log.read_text().count("saved; the same command goes on") == count, second)  # type: ignore[misc]
    said_by_second, _ = second.communicate()
    assert second.returncode == 0
    assert f"found   DreamerV2-toy_dot-0: job {controller} of local" in said_by_second
    assert "given" not in said_by_second
    assert (run / "command.txt").read_text().count("\n") == 3
    assert_same(run, tmp_path / "plain" / "runs" / "DreamerV2-toy_dot-0")
