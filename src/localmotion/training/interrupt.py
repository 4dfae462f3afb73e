"""Stop signals: the run finishes its current update or agent step, saves, and exits with a code that names the signal.

SIGINT (Ctrl-C), SIGTERM (a scheduler, `kill`), SIGUSR1 and SIGUSR2 (Slurm's warning, ``--signal=USR1@120``) request a stop.
Loops check for a request between two updates or agent steps, because the state is complete there. The process then
exits with 128 + the signal's number: 130, 143, 138, 140. A second SIGINT stops the run immediately, without saving; the
previous checkpoint stays.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def code(self) -> int:
        """Exit status: 128 + the signal's number, as shells count."""
        return 128 + self.signum


class StopRequest:
    """Inside ``with StopRequest() as stop``, signals become requests.

    After a request, ``stop.check()`` raises Interrupted. Outside the main thread Python cannot handle signals, so
    ``check`` never raises there. A signal that was ignored before stays ignored (a shell ignores SIGINT for its
    background jobs).
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in REQUESTS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: the handler was not set from Python, so it cannot be restored
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signum and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = number

    def check(self) -> None:
        """Raise Interrupted if a signal requested a stop."""
        if self.signum:
            raise Interrupted(self.signum)
