"""Run a function over many items in worker processes that may die: a decoder crash loses one item, not the run.

If a worker dies, a pool of the standard library fails as a whole and does not know the cause. Here every worker has its
own pipe, so a crash or a hang is assigned to the item of that worker, and a new worker replaces it. This contains
crashes. It is not a sandbox: a video that makes a decoder run foreign code runs it with the user's rights.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from localmotion.errors import LocalmotionError

Item = TypeVar("Item")
Result = TypeVar("Result")
Results = Generator[Result, None, Result]


TIME_LIMIT = 600.0
"""Seconds a worker may take for one video before it is killed ("decoder_timeout")."""
MEMORY_LIMIT = 4 * 2**30
"""Bytes that decoding one video may add to its worker ("decoder_memory"). Measured with one thread: 4K H.264 takes 200 MiB,
8K H.264 534, 8K 10-bit H.265 906, 8K VP9 162, 8K Motion JPEG 143. The largest accepted pictures (`decode.MAX_PIXELS`),
at 10 bits and with the maximum of 16 reference pictures, would take 3.2 GiB."""


@dataclass(frozen=True)
class Lost:
    """Replaces the result of an item whose worker was lost."""

    reason: Literal["decoder_crash", "decoder_timeout", "decoder_memory"]
    detail: str


@contextmanager
def limited_memory(growth: int | None) -> Iterator[None]:
    """Context in which this process may allocate `growth` bytes more than it holds at the start (None: no limit).

    Larger allocations fail with MemoryError, or with the library's own error, before memory is touched. The limit is on
    private writable memory (RLIMIT_DATA). Mapped files and reserved address space do not count; GPU libraries reserve
    terabytes. The limit applies to all threads of the process, so it is meant for workers, not for a program with other
    work. Linux only; on other systems there is no limit.
    """
    if growth is None or sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [held_memory() + growth, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def held_memory() -> int:
    """Bytes of private writable memory of this process; 0 if the system does not report it."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))


class _Worker(Generic[Item]):
    """One child process and its current item."""

    def __init__(self, context: Any, function: Callable[[Item], Results[Any]], first: tuple[int, Item]) -> None:
        self.next: tuple[int, Item] | None = first
        """The item to send when the process is ready."""
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: tuple[int, Item] | None = None
        self.since = 0.0

    def give(self, task: tuple[int, Item] | None) -> None:
        self.task, self.next, self.since = task, None, time.monotonic()
        if task is not None:
            with contextlib.suppress(ConnectionError):  # a worker that just died is detected where its answer is awaited
                self.pipe.send(task[1])

    def stop(self) -> int | None:
        """Kill the child if it is alive; returns its exit code."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def map_isolated(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, timeout: float = TIME_LIMIT
) -> Iterator[tuple[int, Result | Lost]]:
    """Yield (index of the item, result) from `workers` spawned processes, in the order in which results arrive.

    `function` must be importable (module level), and so must the main module. Items are taken from their iterable when
    a worker is free. An item whose worker dies yields Lost "decoder_crash". An item that takes more than `timeout`
    seconds yields Lost "decoder_timeout". An item that runs out of memory (MemoryError, or SIGKILL, which the system
    sends if memory is short) yields Lost "decoder_memory". Any other exception in `function` is a bug and is raised here
    as RuntimeError. If workers cannot start at all, LocalmotionError is raised.
    """
    yield from _run(partial(_one, function), items, workers, timeout)


def stream_isolated(
    function: Callable[[Item], Results[Result]], items: Iterable[Item], workers: int, timeout: float = TIME_LIMIT
) -> Iterator[tuple[int, Result | Lost]]:
    """As `map_isolated` for a generator `function`: the yielded values and the return value are results.

    Each result is sent at once, so neither process holds all of them, and `timeout` applies to each. Lost may follow
    results of the same item.
    """
    yield from _run(function, items, workers, timeout)


def _one(function: Callable[[Item], Result], item: Item) -> Results[Result]:
    return function(item)
    yield  # a generator that yields nothing


def _run(
    function: Callable[[Item], Results[Any]], items: Iterable[Item], workers: int, timeout: float
) -> Iterator[tuple[int, Any]]:
    context = multiprocessing.get_context("spawn")
    waiting = enumerate(items)
    pool: list[_Worker[Item]] = []
    try:
        for _ in range(workers):
            if (first := next(waiting, None)) is None:
                break
            pool.append(_Worker(context, function, first))
        while any(worker.task or worker.next for worker in pool):
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
                    pool.remove(worker)
                    if (following := next(waiting, None)) is not None:
                        pool.append(_Worker(context, function, following))
                    if task is not None:
                        yield task[0], _lost(code)
                    continue
                if kind == "memory":
                    value = Lost("decoder_memory", value)
                if kind == "error":
                    raise RuntimeError(f"worker failed on {task and task[1]!r}:\n{value}")
                if kind == "part":
                    worker.since = time.monotonic()
                else:
                    worker.ready = True
                    worker.give(worker.next or next(waiting, None))
                if task is not None:
                    yield task[0], value
            for worker in list(pool):
                if worker.task is not None and time.monotonic() - worker.since > timeout:
                    task = worker.task
                    worker.stop()
                    pool.remove(worker)
                    if (following := next(waiting, None)) is not None:
                        pool.append(_Worker(context, function, following))
                    yield task[0], Lost("decoder_timeout", f"decoding took more than {timeout:g} seconds")
    finally:
        for worker in pool:
            worker.stop()


def _serve(pipe: Connection, function: Callable[[Any], Results[Any]]) -> None:
    """Main loop of a worker: send "ready", then answer items until the pipe closes. The parent handles interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(("ready", None))
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        for answer in _answers(function, item):
            try:
                pipe.send(answer)
            except ConnectionError:  # the parent has died
                return


def _answers(function: Callable[[Item], Results[Any]], item: Item) -> Iterator[tuple[str, Any]]:
    """Messages of a worker for an item: any number of parts, then one final message of another kind."""
    import traceback

    results = function(item)
    while True:
        try:
            answer = ("part", next(results))
        except StopIteration as end:
            answer = ("last", end.value)
        except MemoryError as error:
            cause = str(error).splitlines()[0] if str(error) else "no more to be had"
            answer = ("memory", f"needs more memory than available ({cause})")
        except Exception:  # the parent raises any exception with this traceback; the worker must not die
            answer = ("error", traceback.format_exc())
        yield answer
        if answer[0] != "part":
            return


def _lost(code: int | None) -> Lost:
    """Meaning of the exit code of a dead worker."""
    if code == -signal.SIGKILL:  # not sent by us, because that would be a time limit
        return Lost("decoder_memory", "the decoding process was killed (SIGKILL), which systems do when memory runs out")
    if code is not None and code < 0:
        return Lost("decoder_crash", f"the decoding process died of signal {signal.Signals(-code).name}")
    return Lost("decoder_crash", f"the decoding process ended with exit code {code}")
