"""Commands of `localmotion` as units of work: start them, see how they end, stop them so that they save.

A command is idempotent: given again, it continues, and does nothing if it is done. So an engine may lose a command, and repeat it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from localmotion.console import say

PATIENCE = 120.0
"""Seconds that interrupted commands have to save."""
POLL = 0.2
"""Seconds between two looks at the processes of a machine."""


class Command(NamedTuple):
    """One command line of `localmotion`. It holds text only, so that an engine can send it to another machine."""

    name: str
    """Name in messages and of files."""
    arguments: tuple[str, ...]
    log: str
    """File that its output is appended to, an absolute path."""
    folder: str
    """Folder in which it runs: relative paths begin there."""
    after: str = ""
    """Name of the command that must have finished before."""
    share: tuple[str, ...] = ()
    """Further arguments for commands that share a machine. {} is the number of cores that each of them gets."""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """Exit code, or minus the signal that ended it. `LOST` if no exit code is known."""
    words: str
    """The last line of its output, or what else is known."""


LOST = 999
"""No exit code is known."""


class Engine(Protocol):
    """Runs commands."""

    poll: float
    """Seconds between two calls of `ended`."""

    def adopt(self, commands: Sequence[Command]) -> set[str]:
        """Names of the commands that run already, from an earlier call. `ended` will report them."""
        ...

    def start(self, groups: Sequence[Sequence[Command]]) -> None:
        """Start or queue groups of commands. Those of a group run side by side, in one job."""
        ...

    def ended(self) -> list[tuple[str, Outcome]]:
        """Names and outcomes of the commands that have ended since the last call."""
        ...

    def close(self) -> None:
        """The end. Commands of this machine are stopped, and save first; jobs of a cluster go on."""
        ...


class Stop(Protocol):
    """Requests to stop: `training.interrupt.StopRequest`."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a request."""
        ...


class Processes:
    """Child processes, one a command. ``session``: out of reach of the terminal's Ctrl-C, which `stop` then passes on."""

    def __init__(self, *, session: bool = False) -> None:
        self.session = session
        self.running: dict[subprocess.Popen[bytes], Command] = {}
        self._failed: list[tuple[Command, Outcome]] = []

    def start(self, command: Command, cores: int | None = None) -> None:
        """Start a command. ``cores``: what it gets of the machine, if it shares the machine."""
        shared = [text.replace("{}", str(max(cores, 1))) for text in command.share] if cores is not None else []
        line = [sys.executable, "-m", "localmotion", *command.arguments, *shared]
        try:
            with open(command.log, "ab") as log:
                process = subprocess.Popen(
                    line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=command.folder, start_new_session=self.session
                )
        except OSError as error:  # no such folder on this machine, for example
            self._failed.append((command, Outcome(LOST, f"cannot be started in {command.folder}: {error}")))
        else:
            self.running[process] = command

    def ended(self) -> Iterator[tuple[Command, Outcome]]:
        """Commands that have ended since the last call."""
        failed, self._failed = self._failed, []
        yield from failed
        for process in [process for process in self.running if process.poll() is not None]:
            command = self.running.pop(process)
            yield command, Outcome(process.returncode, last_words(command.log))

    def stop(self) -> None:
        """Ask all to save and exit, and wait for them."""
        for process in self.running:
            process.send_signal(signal.SIGTERM)  # not SIGINT: a shell makes its background jobs ignore that
        until = time.monotonic() + PATIENCE
        for process in self.running:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()


def last_words(log: str) -> str:
    """The last line that a command printed."""
    with open(log, "rb") as file:
        file.seek(max(Path(log).stat().st_size - 4000, 0))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else "no output").removeprefix("error: ")[:300]


def carry_out(
    engine: Engine,
    commands: Sequence[Command],
    *,
    done: Sequence[str] = (),
    jobs: int = 0,
    pack: int = 1,
    stop: Stop,
    finished: Callable[[str], bool] = lambda name: True,
) -> dict[str, str]:
    """Run commands until all have ended, and close the engine. Returns the names of those that failed, and why.

    A failed command does not stop the others, but for those that come after it.

    Args:
        done: names that need not run; commands may come after them.
        jobs: most commands at a time, 0 for no limit.
        pack: commands of a group. A group is not filled up by waiting.
        stop: entered when the engine is there, which may handle signals itself. What its `check` raises ends the work.
        finished: whether a command of this name, which exited with 0, has done its work.
    """
    over, failed, total = set(done), dict[str, str](), len(set(done) | {command.name for command in commands})
    waiting = [command for command in commands if command.name not in over]
    logs = {command.name: command.log for command in waiting}
    try:
        with stop:
            running = dict.fromkeys(engine.adopt(waiting), time.monotonic())
            waiting = [command for command in waiting if command.name not in running]
            while waiting or running:
                stop.check()
                for command in [command for command in waiting if command.after in failed]:
                    failed[command.name] = f"needs {command.after}, which failed"
                    waiting.remove(command)
                ready = [command for command in waiting if not command.after or command.after in over]
                ready = ready[: max(jobs - len(running), 0)] if jobs else ready
                if ready:
                    engine.start([ready[at : at + pack] for at in range(0, len(ready), pack)])
                    waiting = [command for command in waiting if command not in ready]
                    running |= dict.fromkeys((command.name for command in ready), time.monotonic())
                time.sleep(engine.poll)
                for name, outcome in engine.ended():
                    minutes = (time.monotonic() - running.pop(name)) / 60
                    if outcome.code == 0 and finished(name):
                        over.add(name)
                        say(f"ended   {name}, {minutes:.1f} min; {len(over)} of {total}")
                    else:
                        failed[name] = _why(outcome, logs[name])
                        say(f"FAILED  {name}: {failed[name]}")
    finally:
        engine.close()
    return failed


def _why(outcome: Outcome, log: str) -> str:
    if outcome.code == LOST:
        return outcome.words
    cause = f"signal {-outcome.code}" if outcome.code < 0 else f"exit code {outcome.code}"
    return f"{outcome.words} ({cause}; full output in {log})"


__all__ = ["Command", "Engine", "Outcome", "Processes", "Stop", "carry_out"]
