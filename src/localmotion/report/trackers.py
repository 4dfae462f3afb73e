"""Experiment trackers: each shows points, pictures and films of a run in its own way. `report.follow` feeds them.

A tracker's package is imported in the class's `__init__` only, in a process of its own that `--track` has started.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from localmotion.video.decode import iter_frames, probe
from localmotion.video.listing import VideoRef

PROJECT = "localmotion"
"""Project of wandb and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""


class Start(NamedTuple):
    """What a tracker is opened with."""

    run: Path
    """The run directory."""
    id: str
    """The tracker's id of this run, the same in all sessions."""
    config: dict[str, Any]
    axis: str
    """What points count: "env_step" or "update"."""
    again: int | None
    """First step that is sent again (`Tracker.rewinds`). None: nothing was sent before."""


class Point(NamedTuple):
    """A line of metrics.jsonl. ``number`` counts everything that was sent, ``step`` is on the run's axis."""

    number: int
    step: int
    values: Mapping[str, float]
    counters: Mapping[str, int]


class Tracker(Protocol):
    """One curve in one tracker. All methods may raise any error."""

    rewinds: ClassVar[bool]
    """Whether points from a step on can be replaced. If not, what was sent once stays."""

    def __init__(self, start: Start) -> None: ...

    def log(self, point: Point) -> None: ...

    def picture(self, number: int, step: int, name: str, file: Path) -> None:
        """``file``: a PNG."""

    def film(self, number: int, step: int, name: str, file: Path) -> None:
        """``file``: an mp4."""

    def flush(self) -> None:
        """Returns when what was sent survives the end of this process."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard. A restart is marked (SessionLog.START), which makes TensorBoard drop the points from there on."""

    rewinds: ClassVar[bool] = True

    def __init__(self, start: Start) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        folder = start.run / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if start.again is not None:
            self._write(step=start.again, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        rows = "".join(f"|{key}|{value}|\n" for key, value in start.config.items())
        text = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            string_val=[f"|setting|value|\n|---|---|\n{rows}".encode()],
            tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]),
        )
        kind = summary_pb2.SummaryMetadata(plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text"))
        self._write(step=start.again or 0, summary=self._value(tag="settings", metadata=kind, tensor=text))

    def _write(self, **event: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **event).SerializeToString())

    def _value(self, **value: Any) -> Any:
        return self._summary.Summary(value=[self._summary.Summary.Value(**value)])

    def log(self, point: Point) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
        self._write(step=point.step, summary=self._summary.Summary(value=values))

    def picture(self, number: int, step: int, name: str, file: Path) -> None:
        self._image(step, name, file.read_bytes())

    def film(self, number: int, step: int, name: str, file: Path) -> None:
        self._image(step, name, gif(file))

    def _image(self, step: int, name: str, data: bytes) -> None:
        import cv2

        decoded: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        height, width = decoded.shape[:2]
        image = self._summary.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._write(step=step, summary=self._value(tag=name, image=image))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Wandb:
    """A run of Weights & Biases, online or (WANDB_MODE=offline) in files. Its own settings and environment variables apply."""

    rewinds: ClassVar[bool] = False

    def __init__(self, start: Start) -> None:
        import wandb

        self._wandb, self._axis = wandb, start.axis
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=start.id,
            name=start.run.name,
            config=start.config,
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric(start.axis, hidden=True)
        self._run.define_metric("*", step_metric=start.axis)

    def log(self, point: Point) -> None:
        self._run.log({**point.values, **point.counters}, step=point.number)

    def picture(self, number: int, step: int, name: str, file: Path) -> None:
        self._run.log({name: self._wandb.Image(str(file)), self._axis: step}, step=number)

    def film(self, number: int, step: int, name: str, file: Path) -> None:
        self._run.log({name: self._wandb.Video(str(file), format="mp4"), self._axis: step}, step=number)

    def flush(self) -> None:
        pass  # wandb's own process has it

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio: a local database, or what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names."""

    rewinds: ClassVar[bool] = False

    def __init__(self, start: Start) -> None:
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{start.run.name} {start.id[:6]}",  # trackio knows a run by its name
            config=start.config,
            resume="allow",
            embed=False,
        )

    def log(self, point: Point) -> None:
        self._run.log({**point.values, **point.counters}, step=point.step)

    def picture(self, number: int, step: int, name: str, file: Path) -> None:
        self._run.log({name: self._trackio.Image(str(file))}, step=step)

    def film(self, number: int, step: int, name: str, file: Path) -> None:
        self._run.log({name: self._trackio.Video(str(file))}, step=step)

    def flush(self) -> None:
        pass  # a thread of trackio writes within a second

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def gif(film: Path, frames: int = 250) -> bytes:
    """An animated GIF of a film at its speed, at most ``frames`` with about 80 ms each: TensorBoard shows no videos."""
    import cv2

    animation: Any = cv2.Animation()
    ref = VideoRef(film.name, film, "file")
    rate = probe(ref).fps or 25.0
    stride = max(1, round(0.08 * rate))
    pictures = iter_frames(ref, None, stride=stride, max_frames=frames)
    animation.frames = [np.ascontiguousarray(picture[..., ::-1]) for picture in pictures]
    animation.durations = np.full(len(animation.frames), round(1000 * stride / rate))  # ms
    done, data = cv2.imencodeanimation(".gif", animation)
    if not done:
        raise ValueError(f"{film.name}: cannot be written as GIF")
    return bytes(data)
