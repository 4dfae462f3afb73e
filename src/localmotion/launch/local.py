"""The engine `local`: processes of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from localmotion.console import say
from localmotion.launch.work import POLL, Command, Outcome, Processes
from localmotion.machine import cores

if TYPE_CHECKING:
    from localmotion.launch import Launch


class Local:
    """Each command is a process of its own. If several run at a time, each gets an equal share of the cores."""

    poll = POLL

    def __init__(self, jobs: int) -> None:
        self.processes = Processes(session=True)
        self.cores = cores() // jobs if jobs > 1 else None

    def adopt(self, commands: Sequence[Command]) -> set[str]:
        return set()

    def start(self, groups: Sequence[Sequence[Command]]) -> None:
        for group in groups:
            for command in group:
                self.processes.start(command, self.cores)
                say(f"begins  {command.name}")

    def ended(self) -> list[tuple[str, Outcome]]:
        return [(command.name, outcome) for command, outcome in self.processes.ended()]

    def close(self) -> None:
        self.processes.stop()


def make(folder: Path, launch: Launch) -> Local:
    """The engine for at most ``launch.jobs`` processes at a time."""
    return Local(launch.jobs)
