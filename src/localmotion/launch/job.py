"""What a job of submitit runs, on its own machine: commands of `localmotion`, and the signals of Slurm.

A signal before the end of the job's time, or because the job is preempted (SIGUSR2, or SIGUSR1), lets the commands save. The job is
then queued again, and continues them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from submitit import LocalJob
from submitit.helpers import Checkpointable, DelayedSubmission

from localmotion.errors import LocalmotionError
from localmotion.files import read_json, write_json
from localmotion.launch.work import POLL, Command, Outcome, Processes
from localmotion.machine import cores

ASKED = (signal.SIGUSR1, signal.SIGUSR2)
GRACE = 60.0
"""Seconds that Slurm has to end a job whose commands it has asked to exit (SIGTERM: preempted, or scancel)."""


class Job(Checkpointable):
    """What a job runs: commands side by side. ``folder`` gets the outcome of each."""

    def __init__(self, commands: Sequence[Command], folder: Path) -> None:
        self.commands, self.folder = commands, folder

    def __call__(self) -> None:
        requeue = next((signal.getsignal(number) for number in ASKED if callable(signal.getsignal(number))), None)
        asked: list[int] = []
        for number in ASKED:  # submitit itself handles one of them
            signal.signal(number, lambda number, frame: asked.append(number))
        processes = Processes()
        todo = [command for command in self.commands if (found := outcome(self.folder, command.name)) is None or found.code]
        for command in todo:
            processes.start(command, cores() // len(self.commands) if len(self.commands) > 1 else None)
        while processes.running:
            time.sleep(POLL)
            for command, found in processes.ended():
                if sent := [number for number in ASKED if found.code in (-number, 128 + number)]:
                    asked += sent  # Slurm sends it to all processes of a job
                    continue
                if found.code in (-signal.SIGTERM, 128 + signal.SIGTERM):
                    time.sleep(GRACE)  # no outcome yet: a preempted job runs again
                write_json(self.folder / f"{command.name}.json", found._asdict())
            if asked:
                processes.stop()
                if callable(requeue):
                    requeue(asked[0], None)  # calls `checkpoint`, and does not return

    def checkpoint(self) -> DelayedSubmission:
        """What the job runs when it is queued again."""
        return DelayedSubmission(Job(self.commands, self.folder))


def outcome(folder: Path, name: str) -> Outcome | None:
    """How a command ended. None: it has not."""
    try:
        found = read_json(folder / f"{name}.json", LocalmotionError, "")
        return Outcome(int(found["code"]), str(found["words"]))
    except (LocalmotionError, KeyError, TypeError, ValueError):
        return None


def runs(job: Any) -> bool:
    """Whether a job is queued or runs. A local job of an earlier call is known by its process alone."""
    over = job.done()
    if isinstance(job, LocalJob):
        with suppress(OSError):
            return os.fsencode(job.paths.folder) in Path(f"/proc/{job.job_id}/cmdline").read_bytes()
        return False
    return not over
