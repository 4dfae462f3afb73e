"""One process at a time: the lock of a run or of a shard."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from localmotion.errors import StoreError
from localmotion.files import Lock, locked

HOLD = """
import sys, time
from pathlib import Path
from localmotion.files import Lock
lock = Lock(Path(sys.argv[1]))
print(lock.taken, flush=True)
time.sleep(600)
"""


def free(path: Path) -> bool:
    lock = Lock(path)
    taken = lock.taken
    lock.release()
    return taken


def test_a_second_holder_is_refused_and_reads_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = f"busy .process {os.getpid()} on {socket.gethostname()}"
    with locked(path, "busy", StoreError), pytest.raises(StoreError, match=holder), locked(path, "busy", StoreError):
        pass
    assert free(path)


def test_a_killed_process_leaves_the_lock_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == "True\n"
            lock = Lock(path)
            assert not lock.taken
            assert f"process {child.pid} on" in lock.holder()
            lock.release()
        finally:
            child.kill()
    assert free(path)
