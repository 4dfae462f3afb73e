"""How a run ends, and the status that its directory then holds. Every training loop runs inside `recorded`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from localmotion import ranks
from localmotion.console import say
from localmotion.errors import EnvError
from localmotion.methods.base import Method
from localmotion.runs.rundir import RunDir
from localmotion.training.faults import dump
from localmotion.training.interrupt import Interrupted, StopRequest
from localmotion.training.update import DivergedError


@contextmanager
def recorded(out: RunDir, method: Method, where: Callable[[], dict[str, int]], save: Callable[[], bool]) -> Iterator[StopRequest]:
    """Run a training loop inside this context. Yields the `StopRequest` that the loop checks.

    Raises again what ended the loop.

    =========================================  ======  ===========
    end                                        saves   status
    =========================================  ======  ===========
    a signal                                   yes     interrupted
    a second signal                            no      interrupted
    an environment that keeps failing          yes     failed
    non-finite losses (DivergedError)          no      failed
    any other error                            no      failed
    =========================================  ======  ===========

    If nothing is saved, the previous checkpoint stays. The loop itself writes "finished".

    Args:
        out: directory of the run.
        method: the method that learns. If the run diverges, its weights go into the dump.
        where: returns the run's counters for its status, e.g. {"update": 7}. The message of an interrupted run names
            the first.
        save: writes a checkpoint if there is anything to save, and returns whether it did.
    """
    with StopRequest() as stop:  # also while the end is saved: a further signal must not cut that short
        try:
            yield stop
        except Interrupted:
            try:
                saved = save()
            except BaseException as error:  # a full disk, or a second Ctrl-C
                why = {} if isinstance(error, KeyboardInterrupt) else {"error": str(error)}
                out.ended("interrupted", **where(), **why)
                raise
            out.ended("interrupted", **where())
            if saved:
                unit, count = next(iter(where().items()))
                say(f"interrupted at {unit.replace('_', ' ')} {count}, saved; the same command goes on from there")
            raise
        except KeyboardInterrupt:
            out.ended("interrupted", **where())
            raise
        except DivergedError as error:
            explained = dump(out.path, method, error)
            out.ended("failed", **where(), error=str(explained))
            raise explained from error
        except BaseException as error:
            try:
                if isinstance(error, EnvError) and ranks.alone():  # saving needs all ranks
                    save()
            finally:
                out.ended("failed", **where(), error=str(error))
            raise
