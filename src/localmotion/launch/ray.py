"""The engine `ray`: tasks of a Ray cluster, for clouds with machines of several kinds.

A group of commands is one task. Ray itself repeats a task whose machine is lost. The folders of the commands and the files that they
name have to be there on every machine (a shared disk).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from localmotion.console import say
from localmotion.errors import ConfigError
from localmotion.files import one_line
from localmotion.launch.work import LOST, PATIENCE, POLL, Command, Outcome, Processes

if TYPE_CHECKING:
    from localmotion.launch import Launch

OF_CLUSTER = ("address", "runtime_env", "namespace")
"""Options of `ray.init`; all others are of a task."""


def perform(commands: Sequence[Command], cores: int) -> list[tuple[str, Outcome]]:
    """Run commands side by side on ``cores`` cores. In a worker of Ray. Cancelling it stops them, and they save."""
    processes, found = Processes(), list[tuple[str, Outcome]]()
    try:
        for command in commands:
            processes.start(command, cores // len(commands))
        while len(found) < len(commands):
            time.sleep(POLL)
            found += [(command.name, outcome) for command, outcome in processes.ended()]
    finally:
        processes.stop()
    return found


class Tasks:
    """Gives groups of commands to Ray."""

    poll = 1.0

    def __init__(self, options: dict[str, Any]) -> None:
        of_cluster = {name: options.pop(name) for name in OF_CLUSTER if name in options}
        options = {"num_cpus": 1} | options
        self.cores = max(int(options["num_cpus"]), 1)
        try:
            self.task = ray.remote(perform).options(**options)
            ray.init(log_to_driver=False, **of_cluster)
        except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"--launch-option: Ray refuses it: {one_line(error)}") from error
        nodes, have = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
        say(f"Ray: {nodes} nodes, {have.get('CPU', 0):.0f} CPUs, {have.get('GPU', 0):.0f} GPUs")
        self.running: dict[Any, Sequence[Command]] = {}

    def adopt(self, commands: Sequence[Command]) -> set[str]:
        return set()  # Ray ends the tasks of a driver that is gone

    def start(self, groups: Sequence[Sequence[Command]]) -> None:
        for group in groups:
            self.running[task := self.task.remote(list(group), self.cores)] = group
            say(f"given   {', '.join(command.name for command in group)}: task {task.task_id().hex()[:16]} of Ray")

    def ended(self) -> list[tuple[str, Outcome]]:
        found: list[tuple[str, Outcome]] = []
        for task in ray.wait(list(self.running), num_returns=len(self.running), timeout=0)[0] if self.running else ():
            group = self.running.pop(task)
            try:
                found += ray.get(task)
            except ray.exceptions.RayError as error:  # its machine is gone, and Ray has repeated it often enough
                found += [(command.name, Outcome(LOST, one_line(error))) for command in group]
        return found

    def close(self) -> None:
        for task in self.running:
            ray.cancel(task)
        if self.running:  # they save
            ray.wait(list(self.running), num_returns=len(self.running), timeout=PATIENCE)
        ray.shutdown()


def make(folder: Path, launch: Launch) -> Tasks:
    """The engine; `Launch.options` are those of a task (num_cpus, num_gpus, resources, max_retries) and `OF_CLUSTER`."""
    return Tasks(dict(launch.options))
