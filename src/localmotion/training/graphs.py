"""Record the work of an update once and replay it: one GPU launch instead of thousands.

The models here are small, so launching their operations takes longer than running them. A CUDA graph repeats the
recorded operations on the same memory without Python. It has four conditions: shapes are fixed, no value is read from
the device, no Python state changes between updates, and results are written in place. `Updater` meets them: learning
rates are tensors, and slow copies and clocks are outside the recorded work.
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
"""Updates before recording.

They run normally, so that optimisers create their moments and libraries choose their kernels.
"""


class Graph(Protocol):
    """Records device work and replays it."""

    def warm(self, work: Callable[[], Any]) -> Any:
        """Run work in the way that recording requires."""

    def record(self, work: Callable[[], Any]) -> Any:
        """Record work without running it. Returns the tensors that work returns; `replay` fills them."""

    def replay(self) -> None:
        """Run the recorded work on the same memory."""


class CudaGraph:
    """`Graph` with torch.cuda.CUDAGraph. Each replay draws new random numbers from the default generator."""

    def __init__(self) -> None:
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm(self, work: Callable[[], Any]) -> Any:
        """Run work on a separate stream. torch requires that recorded work does not depend on the default stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            found = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return found

    def record(self, work: Callable[[], Any]) -> Any:
        # thread_local: another thread reads the next batch and may allocate pinned memory during the recording.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self.graph.replay()


class Replayed:
    """Runs the work of an update: first `WARMUP` times normally, then it records the work and replays it.

    If a batch has other shapes than the recorded one, its work runs normally.

    Args:
        graph: records and replays.
        warmup: number of normal runs before recording.
    """

    def __init__(self, graph: Graph, warmup: int = WARMUP) -> None:
        self.graph, self.warmup = graph, warmup
        self.replays = 0
        self._seen = 0
        self._key: object = None
        self._batch: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def __call__(self, work: Work, batch: Batch) -> dict[str, Tensor]:
        """Return what ``work(batch)`` returns. A replay returns the same tensors each time, with new values.

        Raises LocalmotionError if the work cannot be recorded.
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
    """A `Replayed` if the run sets `cuda_graph`, else None. `compute.choose` has verified the GPU."""
    return Replayed(CudaGraph()) if run.cuda_graph else None
