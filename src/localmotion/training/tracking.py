"""Experiment trackers beside a run. Each is a separate process that reads the run directory (`report.follow`).

So no tracker can slow the run, stop it, or change its numbers, and none is imported in the process that trains.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from localmotion.console import errors
from localmotion.errors import MissingExtraError, unknown_name
from localmotion.files import one_line

NAMES = ("tensorboard", "wandb", "trackio")
"""Trackers; each needs the package and the extra of its name."""
GRACE = 10.0
"""Seconds that trackers have to send what is left when a run has ended."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown tracker, MissingExtraError for one whose package is not installed. Imports nothing."""
    for name in names:
        if name not in NAMES:
            raise unknown_name("tracker", name, NAMES)
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without an origin it is a folder of that name, such as wandb makes
            raise MissingExtraError(
                f"--track {name}: {name} is not installed; install it with: pip install 'localmotion[{name}]'"
            )


@contextlib.contextmanager
def tracked(path: Path, names: Sequence[str]) -> Iterator[None]:
    """Send the run that begins in the directory ``path`` inside this context to the trackers ``names``.

    At the end trackers have `GRACE` seconds to finish. Nothing of a tracker can raise here, except as in `check_trackers`, which
    comes first.
    """
    names = list(dict.fromkeys(names))
    check_trackers(names)
    status = path / "status.json"
    stamp = status.stat().st_mtime_ns if status.exists() else 0
    running: dict[str, subprocess.Popen[bytes]] = {}
    for name in names:
        command = [sys.executable, "-m", "localmotion.report.follow", str(path), name, str(stamp)]
        try:  # a session of its own: Ctrl-C reaches the run only
            running[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            errors.print(f"warning: tracker {name}: cannot be started ({one_line(error)}); the run goes on", markup=False)
    try:
        yield
    finally:
        try:
            _finish(running)
        finally:  # also after Ctrl-C
            for process in running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with what its library has started
                    process.wait()


def _finish(running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Wait for the trackers to send what is left, until `GRACE` is over."""
    for process in running.values():
        assert process.stdin is not None
        process.stdin.close()
    until = time.monotonic() + GRACE
    for name, process in running.items():
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            errors.print(
                f"warning: tracker {name}: not finished after {GRACE:.0f} s, ended; the same command sends what is missing",
                markup=False,
            )
