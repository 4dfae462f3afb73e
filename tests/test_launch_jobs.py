"""Jobs of submitit, with its local executor and with stand-ins for Slurm's commands: signals, requeue, what a second call finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("submitit")
from submitit import SlurmJob

from localmotion.errors import ConfigError
from localmotion.files import write_json
from localmotion.launch import Command, Launch, Outcome, carry_out, job
from localmotion.launch.job import Job
from localmotion.launch.submitit import Jobs
from test_launch import Stops, command

LOCAL = {"cluster": "local"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a job's process ends shortly after its outcome
def test_jobs_of_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two commands share a job, a third has its own. Each has its own outcome."""
    commands = [command(name, "", "--version", folder=tmp_path) for name in ("one", "two")]
    commands.append(command("bad", "", "scan", "nowhere", folder=tmp_path))
    engine = Launch("submitit", pack=2, options=LOCAL).engine(tmp_path / "launch")
    failed = carry_out(engine, commands, pack=2, stop=Stops())
    assert list(failed) == ["bad"]
    assert failed["bad"].startswith("nowhere")
    assert failed["bad"].endswith(f"(exit code 2; full output in {tmp_path / 'bad.log'})")
    said = capfd.readouterr().out
    assert "given   one, two: job " in said
    assert " of local\n" in said
    assert "these jobs go on" not in said
    with pytest.raises(ConfigError, match="submitit refuses it: Unknown argument 'partitions' for executor 'slurm'"):
        Launch("submitit", options={"slurm_partitions": "gpu"}).engine(tmp_path / "launch")


# -- what a job does ----------------------------------------------------------------------------------------------------


class Ends:
    """In place of `Processes`: commands end as ``codes`` say."""

    codes: dict[str, int] = {}
    started: list[str] = []
    stopped = 0
    look: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.running: dict[str, Command] = {}

    def start(self, one: Command, cores: int | None) -> None:
        self.running[one.name] = one
        Ends.started.append(one.name)

    def ended(self) -> Iterator[tuple[Command, Outcome]]:
        Ends.look()
        for name in [name for name in self.running if name in Ends.codes]:
            yield self.running.pop(name), Outcome(Ends.codes[name], "words")

    def stop(self) -> None:
        Ends.stopped += 1
        self.running.clear()


class RequeuedError(Exception):
    pass


@pytest.fixture
def requeues(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The signals for which submitit's handler was called. As in a job, it handles SIGUSR2 alone."""
    signals: list[int] = []

    def requeue(number: int, frame: object) -> None:
        signals.append(number)
        raise RequeuedError

    monkeypatch.setattr(job, "Processes", Ends)
    monkeypatch.setattr(job, "POLL", 0.0)
    for name, value in {"codes": {}, "started": [], "stopped": 0, "look": staticmethod(lambda: None)}.items():
        monkeypatch.setattr(Ends, name, value)
    before = {number: signal.getsignal(number) for number in job.ASKED}
    signal.signal(signal.SIGUSR2, requeue)
    yield signals
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", job.ASKED)
@pytest.mark.parametrize("to_all", [False, True])  # Slurm may send a signal to all processes of a job
def test_a_warning_saves_and_queues_again(number: int, to_all: bool, tmp_path: Path, requeues: list[int]) -> None:
    Ends.codes = {"over": 0}
    if to_all:
        Ends.codes["runs"] = 128 + number
    else:
        Ends.look = staticmethod(lambda: Ends.started and signal.raise_signal(number))
    this = Job([command("over"), command("runs")], tmp_path)
    with pytest.raises(RequeuedError):
        this()
    assert requeues == [number]
    assert Ends.stopped == 1
    assert job.outcome(tmp_path, "over") == Outcome(0, "words")
    assert job.outcome(tmp_path, "runs") is None
    # The next time, only what is not over runs.
    Ends.codes, Ends.started, Ends.look = {"runs": 0}, [], staticmethod(lambda: None)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    again = this.checkpoint()
    again.function(*again.args)
    assert Ends.started == ["runs"]
    assert job.outcome(tmp_path, "runs") == Outcome(0, "words")


def test_what_failed_is_tried_again_and_sigterm_has_an_outcome_late(
    tmp_path: Path, requeues: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    Ends.codes = {"bad": 2, "asked": 143}
    this = Job([command("bad"), command("asked")], tmp_path)
    this()
    assert requeues == []
    assert job.outcome(tmp_path, "bad") == Outcome(2, "words")
    assert job.GRACE in slept
    Ends.started = []
    this()
    assert Ends.started == ["bad", "asked"]


def test_an_outcome_that_is_damaged_is_none(tmp_path: Path) -> None:
    for text in ("", "{}", '{"code": "x", "words": ""}', "[]"):
        (tmp_path / "one.json").write_text(text)
        assert job.outcome(tmp_path, "one") is None


# -- Slurm ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands. sbatch keeps the file; sacct says what the file `states` says."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {
        "srun": "exit 1",
        "sbatch": f"cp $1 {folder}/batch; echo Submitted batch job 17",
        "sacct": f"cat {folder}/states",
    }
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def states(slurm: Path, first: str, second: str) -> None:
    (slurm / "states").write_text(f"JobID|State|NodeList\n17_0|{first}|n1\n17_0.batch|{first}|n1\n17_1|{second}|n1\n")


def test_an_array_of_slurm_and_what_a_second_call_finds(slurm: Path, tmp_path: Path) -> None:
    commands = [command(name, "", "--version", folder=tmp_path) for name in ("one", "two", "three")]
    options = {"slurm_partition": "gpu", "cpus_per_task": 2}
    first = Launch("submitit", options=options).engine(tmp_path / "launch")
    assert isinstance(first, Jobs)
    assert first.executor.cluster == "slurm"  # found by its srun
    write_json(first.outcomes / "one.json", {"code": 0, "words": "of an earlier job"})
    first.start([commands[:2], commands[2:]])
    batch = (slurm / "batch").read_text()
    for line in ("--array=0-1%2", "--partition=gpu", "--cpus-per-task=2", "--requeue", "--signal=USR2@180", "--time=240"):
        assert f"#SBATCH {line}\n" in batch
    states(slurm, "RUNNING", "PENDING")
    assert first.ended() == []
    # The first command line has ended. The second one finds its jobs, and waits for them.
    states(slurm, "RUNNING", "CANCELLED")
    second = Launch("submitit").engine(tmp_path / "launch")
    assert isinstance(second, Jobs)
    SlurmJob.watcher.clear()
    assert second.adopt(commands) == {"one", "two"}
    assert second.ended() == []
    write_json(tmp_path / "launch" / "outcomes" / "two.json", {"code": 0, "words": "good"})
    assert second.ended() == [("two", Outcome(0, "good"))]
    states(slurm, "NODE_FAIL", "CANCELLED")
    SlurmJob.watcher.clear()
    ((name, outcome),) = second.ended()
    assert name == "one"
    assert outcome.words.startswith("job 17_0 ended without an outcome (NODE_FAIL); its output is ")


@pytest.mark.parametrize("number", ["1; rm x", "", "-1", "../x", "17_0 jobs-b/.."])
def test_a_job_number_from_a_file_is_a_number(number: str, slurm: Path, tmp_path: Path) -> None:
    states(slurm, "RUNNING", "RUNNING")
    engine = Launch("submitit").engine(tmp_path)
    write_json(tmp_path / "jobs.json", {"two": "slurm 17_0 jobs-a", "one": f"slurm {number} jobs-a"})
    assert engine.adopt([command("two")]) == {"two"}
    engine = Launch("submitit").engine(tmp_path)
    assert engine.adopt([command("one")]) == set()
