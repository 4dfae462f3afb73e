"""The engine `submitit`: jobs of Slurm, or processes of this machine where there is no Slurm.

submitit pickles a job into a new folder, and only the job reads that file. How a command ended is a JSON file. This engine reads no
pickle, so a folder from somebody else cannot run code here.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit import AutoExecutor, LocalJob, SlurmJob

from localmotion.console import say
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.files import one_line, read_json, write_json
from localmotion.launch.job import Job, outcome, runs
from localmotion.launch.work import LOST, Command, Outcome

if TYPE_CHECKING:
    from localmotion.launch import Launch

DEFAULTS = {
    "timeout_min": 240,
    "name": "localmotion",
    "slurm_signal_delay_s": 180,
    "slurm_additional_parameters": {"requeue": True},
}
MOST = {"slurm_max_num_timeout": 1000, "local_max_num_timeout": 1000}  # how often a job may reach its time limit


class Jobs:
    """Gives groups of commands to submitit. FOLDER/jobs-* has its files, FOLDER/outcomes how commands ended, jobs.json who runs what."""

    poll = 1.0

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.outcomes, self.kept = folder, folder / "outcomes", folder / "jobs.json"
        self.outcomes.mkdir(parents=True, exist_ok=True)
        try:
            self.executor = AutoExecutor(tempfile.mkdtemp("", "jobs-", folder), cluster=options.pop("cluster", None), **MOST)
            self.executor.update_parameters(**DEFAULTS | options)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"--launch-option: submitit refuses it: {one_line(error)}") from error
        self.running: dict[str, Any] = {}

    def adopt(self, commands: Sequence[Command]) -> set[str]:
        known = read_json(self.kept, LocalmotionError, "remove it") if self.kept.exists() else {}
        for name in [command.name for command in commands if command.name in known]:
            if entry := re.fullmatch(rf"{self.executor.cluster} (\d+(?:_\d+)?) (jobs-\w+)", str(known[name])):
                job = (SlurmJob if self.executor.cluster == "slurm" else LocalJob)(self.folder / entry[2], entry[1])
                if runs(job):
                    self.running[name] = job
                    say(f"found   {name}: job {job.job_id} of {self.executor.cluster}")
        return set(self.running)

    def start(self, groups: Sequence[Sequence[Command]]) -> None:
        for command in (command for group in groups for command in group):
            (self.outcomes / f"{command.name}.json").unlink(missing_ok=True)
        with self.executor.batch():
            jobs = [self.executor.submit(Job(group, self.outcomes)) for group in groups]
        for job, group in zip(jobs, groups, strict=True):
            self.running |= {command.name: job for command in group}
            say(f"given   {', '.join(command.name for command in group)}: job {job.job_id} of {self.executor.cluster}")
        kept = {name: f"{self.executor.cluster} {job.job_id} {job.paths.folder.name}" for name, job in self.running.items()}
        write_json(self.kept, kept)

    def ended(self) -> list[tuple[str, Outcome]]:
        lost = [name for name, job in self.running.items() if not runs(job)]
        there = set(os.listdir(self.outcomes))  # of a network file system, newer than what `open` finds
        over = {name: self.running[name] for name in self.running if name in lost or f"{name}.json" in there}
        self.running = {name: job for name, job in self.running.items() if name not in over}
        words = "job {0.job_id} ended without an outcome ({0.state}); its output is {0.paths.stderr}"
        return [(name, outcome(self.outcomes, name) or Outcome(LOST, words.format(job))) for name, job in over.items()]

    def close(self) -> None:
        if self.running:
            ids = " ".join(sorted({str(job.job_id) for job in self.running.values()}))
            say(f"these jobs go on: {ids}; the same command waits for them, and scancel ends them (without Slurm: kill)")


def make(folder: Path, launch: Launch) -> Jobs:
    """The engine; `Launch.options` are those of submitit's AutoExecutor, and ``cluster``: slurm, or local for this machine."""
    return Jobs(folder, dict(launch.options))
