"""The work of an update recorded once and replayed: on a GPU one launch in place of thousands.

The models here are small: launching their operations takes a GPU longer than running them. A CUDA graph repeats the recorded operations on
the same memory without Python. What holds for it: fixed shapes, no value read from the device, no Python state that changes between
updates, results written in place. `Updater` keeps to that; learning rates are tensors, slow copies and clocks stay outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from localmotion.config import RunConfig
from localmotion.errors import LocalmotionError
from localmotion.methods.base import Batch

Work = Callable[[Batch], dict[str, Tensor]]
WARMUP = 3
"""Updates launched one operation at a time before recording: optimisers make their moments, libraries choose their kernels."""


class Graph(Protocol):
    """What records device work and repeats it."""

    def warm(self, work: Callable[[], Any]) -> Any:
        """Run work as it must run before it can be recorded."""

    def record(self, work: Callable[[], Any]) -> Any:
        """Take down what work would do, without doing it; returns what it returns, tensors that `replay` fills."""

    def replay(self) -> None:
        """Do what was recorded, on the same memory."""


class CudaGraph:
    """`Graph` by torch.cuda.CUDAGraph. Random numbers of the default generator are new in each replay."""

    def __init__(self) -> None:
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm(self, work: Callable[[], Any]) -> Any:
        """On a stream of its own, as torch asks: what is recorded must not depend on work of the default stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            found = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return found

    def record(self, work: Callable[[], Any]) -> Any:
        # thread_local: the thread that reads the next batch may allocate pinned memory meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self.graph.replay()


class Replayed:
    """Runs an update's work: `WARMUP` times as it is, then recorded, then replayed.

    Work on a batch of other shapes than the recorded one is run as it is.

    Args:
        graph: records and replays.
        warmup: runs before recording.
    """

    def __init__(self, graph: Graph, warmup: int = WARMUP) -> None:
        self.graph, self.warmup = graph, warmup
        self.replays = 0
        self._seen = 0
        self._key: object = None
        self._batch: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def __call__(self, work: Work, batch: Batch) -> dict[str, Tensor]:
        """What ``work(batch)`` returns; from the recording on the same tensors each time, filled anew.

        Raises LocalmotionError when the work cannot be recorded.
        """
        key = (work, tuple((name, value.shape, value.dtype) for name, value in batch.items()))
        if self._key is None:
            self._seen += 1
            if self._seen <= self.warmup:
                return dict(self.graph.warm(lambda: work(batch)))
            self._record(work, batch)
            self._key = key
        elif self._key != key:
            return work(batch)
        for name, value in batch.items():
            self._batch[name].copy_(value)
        self.graph.replay()
        self.replays += 1
        return self._found

    def _record(self, work: Work, batch: Batch) -> None:
        self._batch = {name: value.clone() for name, value in batch.items()}
        try:
            self._found = self.graph.record(lambda: work(self._batch))
        except RuntimeError as error:
            raise LocalmotionError(
                f"this update cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); run it with --cuda_graph false: the run"
                " goes on from its checkpoint"
            ) from error


def wanted(run: RunConfig) -> Replayed | None:
    """What the run's `cuda_graph` asks for; that there is a GPU was made sure by `compute.choose`."""
    return Replayed(CudaGraph()) if run.cuda_graph else None
