"""Signals that ask a run to stop: it finishes the step it is in, saves, and leaves with a status that says why.

SIGINT (Ctrl-C), SIGTERM (a scheduler, `kill`) and SIGUSR1 (Slurm's warning, ``--signal=USR1@120``) are requests; loops look at them between
two updates or agent steps, where the state is whole. The process then exits with 128 + the signal's number: 130, 143, 138. A second SIGINT
stops at once, without saving; the checkpoint before stays.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
    """Within ``with StopRequest() as stop``, signals become requests, and ``stop.check()`` raises Interrupted once there is one.

    Outside the main thread, where Python cannot handle signals, it never does. A signal that is ignored stays so (a shell ignores SIGINT
    for its background jobs).
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
            if handler is not None:  # None: not set from Python, nothing that could be given back
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signum and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = number

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.signum:
            raise Interrupted(self.signum)
