"""Run a function over many items in worker processes that may die: a decoder crash costs one item, not the run.

A pool of the standard library gives up as a whole when a worker dies and cannot tell whose fault it was. Here every
worker has a pipe of its own, so a death or a hang is charged to the item the worker had, and a new worker takes its
place. This contains accidents. It is no sandbox: whoever can make a decoder run his code can do what the user can.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from localmotion.errors import LocalmotionError

Item = TypeVar("Item")
Result = TypeVar("Result")


TIME_LIMIT = 600.0
"""Seconds a worker may take for one video before it is killed ("decoder_timeout")."""
MEMORY_LIMIT = 4 * 2**30
"""Bytes that decoding one video may add to its worker ("decoder_memory"). Measured with one thread: 4K H.264 takes 200 MiB,
8K H.264 534, 8K 10-bit H.265 906, 8K VP9 162, 8K Motion JPEG 143. The largest pictures that are let in (`decode.MAX_PIXELS`),
at 10 bits and with all 16 reference pictures that a stream may keep, would take 3.2 GiB."""


@dataclass(frozen=True)
class Lost:
    """Takes the place of a result that never came."""

    reason: Literal["decoder_crash", "decoder_timeout", "decoder_memory"]
    detail: str


@contextmanager
def limited_memory(growth: int | None) -> Iterator[None]:
    """Within, this process may take `growth` bytes more than it holds at the start (None: as many as there are).

    What goes beyond fails as MemoryError, or as the library's own error, before memory is touched. The limit is on
    private writable memory (RLIMIT_DATA), which files that are mapped and address space that is only reserved, as GPU
    libraries do by the terabyte, do not count for. It holds for all threads of the process: for workers, not for a
    program with other work. Linux only; elsewhere nothing is limited.
    """
    if growth is None or sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    bounds = [held * 1024 + growth, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _Worker(Generic[Item]):
    """One child process and what it works on."""

    def __init__(self, context: Any, function: Callable[[Item], Any]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: int | None = None
        self.since = 0.0

    def give(self, task: int, item: Item) -> None:
        self.task, self.since = task, time.monotonic()
        with contextlib.suppress(ConnectionError):  # a worker that died just now is noticed where its answer is awaited
            self.pipe.send(item)

    def stop(self) -> int | None:
        """Kill the child if it still lives; its exit code."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def map_isolated(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, timeout: float = TIME_LIMIT
) -> Iterator[tuple[int, Result | Lost]]:
    """Yield (index of the item, result) in the order in which results come, from `workers` spawned processes.

    `function` must be importable (module level) and so must be the main module. An item whose worker dies yields Lost
    "decoder_crash"; one that takes more than `timeout` seconds Lost "decoder_timeout"; one that runs out of memory
    (MemoryError, or SIGKILL as the system sends it when memory is short) Lost "decoder_memory". Any other exception
    raised by `function` is a defect of it and is raised here as RuntimeError; LocalmotionError when workers cannot
    start at all.
    """
    context = multiprocessing.get_context("spawn")
    pool = [_Worker(context, function) for _ in range(min(workers, len(items)))]
    waiting = iter(range(len(items)))
    open_tasks = len(items)
    try:
        while open_tasks:
            pipes: dict[Any, _Worker[Item]] = {worker.pipe: worker for worker in pool}
            for pipe in wait(list(pipes), timeout=min(1.0, timeout / 4)):
                worker = pipes[pipe]
                task = worker.task
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, ConnectionError) as error:
                    code = worker.stop()
                    if not worker.ready:
                        message = (
                            f"a worker process could not start (exit code {code}); in a script, call this below "
                            "`if __name__ == '__main__':`, or use workers=0, which decodes in the calling process"
                        )
                        raise LocalmotionError(message) from error
                    pool[pool.index(worker)] = _Worker(context, function)
                    if task is not None:
                        open_tasks -= 1
                        yield task, _lost(code)
                    continue
                if kind == "memory":
                    value = Lost("decoder_memory", value)
                if kind == "error":
                    raise RuntimeError(f"worker failed on {items[task or 0]!r}:\n{value}")
                worker.ready, worker.task = True, None
                following = next(waiting, None)
                if following is not None:
                    worker.give(following, items[following])
                if task is not None:
                    open_tasks -= 1
                    yield task, value
            for number, worker in enumerate(pool):
                if worker.task is not None and time.monotonic() - worker.since > timeout:
                    task = worker.task
                    worker.stop()
                    pool[number] = _Worker(context, function)
                    open_tasks -= 1
                    yield task, Lost("decoder_timeout", f"decoding took more than {timeout:g} seconds")
    finally:
        for worker in pool:
            worker.stop()


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Life of a worker: say "ready", then answer items until the pipe closes. Interrupts are the parent's business."""
    import traceback

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(("ready", None))
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("result", function(item))
        except MemoryError as error:
            answer = (
                "memory",
                f"wants more memory than there is ({str(error).splitlines()[0] if str(error) else 'no more to be had'})",
            )
        except Exception:  # whatever it is, the parent raises it with this traceback: a worker must not die of its item
            answer = ("error", traceback.format_exc())
        try:
            pipe.send(answer)
        except ConnectionError:  # the parent has died: nobody to tell
            return


def _lost(code: int | None) -> Lost:
    """What the exit code of a worker that died says."""
    if code == -signal.SIGKILL:  # not from here: that would be a time limit
        return Lost("decoder_memory", "the process that decoded it was killed (SIGKILL), as systems do when memory runs out")
    if code is not None and code < 0:
        return Lost("decoder_crash", f"the process that decoded it died of signal {signal.Signals(-code).name}")
    return Lost("decoder_crash", f"the process that decoded it ended with exit code {code}")
