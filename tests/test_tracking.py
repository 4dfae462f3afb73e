"""Experiment trackers read what a run writes: each point once, whatever the run or the tracker meets, and the run notices nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import torch

from localmotion.cli import main
from localmotion.errors import CheckpointError, ConfigError, MissingExtraError
from localmotion.report import follow, trackers
from localmotion.report.follow import Follower
from localmotion.report.trackers import Point, Start
from localmotion.runs import checkpoint
from localmotion.runs.settings import compose
from localmotion.training import tracking
from localmotion.training.pretrain import pretrain
from localmotion.training.tracking import tracked
from localmotion.video.write import write_video


class Recorder:
    """A tracker that notes what it gets, as JSON lines in a file."""

    rewinds: ClassVar[bool] = False
    got: ClassVar[list[Any]] = []
    starts: ClassVar[list[Start]] = []

    def __init__(self, start: Start) -> None:
        self.starts.append(start)

    def log(self, point: Point) -> None:
        self.got += [(name, point.step, value) for name, value in point.values.items()]

    def picture(self, number: int, step: int, name: str, file: Path) -> None:
        self.got.append((name, step, file.read_bytes()[:4]))

    def film(self, number: int, step: int, name: str, file: Path) -> None:
        self.got.append((name, step, file.name))

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def clean() -> None:
    Recorder.got.clear()
    Recorder.starts.clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "some_run"
    (path / "media").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"method": "drp", "model": {"deter": 8}, "seed": 3}))
    return path


def write(run: Path, *lines: dict[str, Any]) -> int:
    """Append lines; returns the length of the file after them."""
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        return file.tell()


def update(number: int, value: float = 0.0) -> dict[str, Any]:
    return {"kind": "pretrain", "update": number, "wall": 1.0, "loss/a": value}


def steps(name: str = "pretrain/loss/a") -> list[int]:
    return [step for key, step, _ in Recorder.got if key == name]


def session(run: Path) -> Follower:
    return Follower(run, Recorder, "x")


# -- each point once ----------------------------------------------------------------------------------------------------


def test_lines_become_points_with_names_by_kind_on_the_axis_of_the_run(run: Path) -> None:
    place = {"update": 2, "agent_step": 5, "env_step": 10, "episode": 1}
    lines = [
        {"kind": "episode", **place, "wall": 1, "return": 3.0, "random": True},
        {"kind": "train", **place, "wall": 1, "loss/a": 1.5, "text": "x", "skipped": 0},
        {"kind": "eval", **place, "wall": 1, "return_mean": 7.0, "final": False, "seed": 0, "returns": [1, 2]},
    ]
    write(run, *lines)
    session(run).catch_up()
    expected = [("prefill/return", 3.0), ("train/loss/a", 1.5), ("train/skipped", 0.0), ("eval/return_mean", 7.0)]
    assert Recorder.got == [(name, 10, value) for name, value in expected]
    (start,) = Recorder.starts
    assert (start.run.name, start.axis, start.again) == ("some_run", "env_step", None)
    assert start.config == {"method": "drp", "model.deter": 8, "seed": 3}


def test_what_a_resumed_run_writes_again_is_sent_once(run: Path) -> None:
    kept = write(run, *map(update, (1, 2, 3)))
    first = session(run)
    first.catch_up()
    write(run, update(4), update(5))
    first.catch_up()  # and the run is killed
    os.truncate(run / "metrics.jsonl", kept)
    write(run, update(4))
    second = session(run)
    second.catch_up()
    write(run, update(5), update(6))
    second.catch_up()
    assert steps() == [1, 2, 3, 4, 5, 6]
    assert Recorder.starts[0].id == Recorder.starts[1].id


def test_what_was_not_sent_before_a_kill_is_sent_later(run: Path) -> None:
    write(run, update(1))
    session(run).catch_up()
    write(run, update(2), update(3))  # nobody looked any more
    session(run).catch_up()
    assert steps() == [1, 2, 3]


def test_lines_with_equal_counters_are_told_apart_by_their_number(run: Path) -> None:
    """Two episodes of a rollout may end at one agent step."""
    one = {"kind": "episode", "update": 1, "env_step": 8, "episode": 2}
    kept = write(run, {**one, "return": 1.0})
    first = session(run)
    first.catch_up()
    os.truncate(run / "metrics.jsonl", kept)
    write(run, {**one, "return": 2.0}, {**one, "return": 3.0})
    session(run).catch_up()
    session(run).catch_up()
    assert [value for *_, value in Recorder.got] == [1.0, 2.0, 3.0]


def test_a_line_that_is_being_written_waits_and_a_damaged_one_is_left_out(run: Path) -> None:
    write(run, update(1))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"kind": "pretrain", "update": 2, ')
    follower = session(run)
    follower.catch_up()
    assert steps() == [1]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('"loss/a": 1}\n')
    follower.catch_up()
    assert steps() == [1, 2]


def test_a_damaged_state_is_refused(run: Path) -> None:
    write(run, update(1))
    (run / "tracking").mkdir()
    for text in ('{"id": "../../x"}', '{"sent": {"a": 3}}', "["):
        (run / "tracking/x.json").write_text(text)
        with pytest.raises(CheckpointError, match="remove it to begin a new curve"):
            session(run)
    assert not Recorder.got


# -- films and pictures ---------------------------------------------------------------------------------------------------


def test_films_and_pictures_are_sent_once_for_each_step(run: Path) -> None:
    film = np.zeros((3, 8, 8, 3), np.uint8)
    write_video(run / "media/eval_000000100.mp4", film, fps=25)
    picture = {"truth": np.zeros((1, 4, 8, 8, 3), np.uint8), "prediction": np.zeros((1, 4, 8, 8, 3), np.uint8), "context": 1}
    np.savez(run / "media/openloop_heldout.npz", **picture)
    write(run, update(1))
    follower = session(run)
    follower.catch_up()
    assert steps("media/eval") == [100]
    assert steps("media/openloop_heldout") == []  # the line of these figures comes
    write(run, {"kind": "heldout", "update": 1, "psnr/motion": 20.0})
    follower.catch_up()
    np.savez(run / "media/openloop_heldout.npz", **picture)  # by a run that resumed, at the same place
    os.utime(run / "media/openloop_heldout.npz", ns=(1, 1))
    write_video(run / "media/eval_000000100.mp4", film, fps=25)
    again = session(run)
    again.catch_up()
    assert (steps("media/eval"), steps("media/openloop_heldout")) == ([100], [1])
    assert tuple(value for name, _, value in Recorder.got if name == "media/openloop_heldout") == (b"\x89PNG",)
    write(run, {"kind": "heldout", "update": 2, "psnr/motion": 20.0})
    os.utime(run / "media/openloop_heldout.npz", ns=(2, 2))
    (run / "media/masked_x.npz").write_bytes(b"cut")  # never shown, and no harm
    again.catch_up()
    assert steps("media/openloop_heldout") == [1, 2]


@pytest.mark.parametrize("rate", [5, 25, 50, 80])
def test_a_gif_has_the_speed_of_its_film(rate: int, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4 * rate, 16, 16, 3)).astype(np.uint8)
    write_video(tmp_path / "film.mp4", frames, fps=rate)
    done, found = cv2.imdecodeanimation(np.frombuffer(trackers.gif(tmp_path / "film.mp4"), np.uint8))
    assert done
    assert sum(found.durations) == pytest.approx(4000, rel=0.1)  # GIFs count in hundredths of a second
    assert min(found.durations) >= 50  # browsers slow down what is faster than 20 ms


# -- TensorBoard ------------------------------------------------------------------------------------------------------------


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_shows_what_metrics_hold_after_a_resume(run: Path) -> None:
    pytest.importorskip("tensorboard")

    def begin() -> Follower:
        return Follower(run, trackers.TensorBoard, "tensorboard", rewinds=True)

    kept = write(run, update(1, 1.0), {"kind": "heldout", "update": 2, "psnr/motion": 20.0}, update(2, 2.0))
    write(run, update(3, 3.0), update(4, 4.0))
    write_video(run / "media/eval_000000004.mp4", np.zeros((4, 8, 8, 3), np.uint8), fps=25)
    first = begin()
    first.catch_up()
    first.close()
    assert curves(run)["pretrain/loss/a"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    os.truncate(run / "metrics.jsonl", kept)
    write(run, update(3, 3.5))  # as on a GPU, other numbers
    second = begin()
    second.catch_up()
    write(run, update(4, 4.5), update(5, 5.5))
    second.catch_up()
    second.close()
    found = curves(run)
    assert found["pretrain/loss/a"] == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert found["heldout/psnr/motion"] == [(2, 20.0)]


def test_tensorboard_is_sent_again_what_a_killed_tracker_did_not_note(run: Path) -> None:
    pytest.importorskip("tensorboard")
    write(run, update(1, 1.0), update(2, 2.0))
    first = Follower(run, trackers.TensorBoard, "tensorboard", rewinds=True)
    first._open()
    assert first.tracker is not None
    first.tracker.log(Point(0, 1, {"pretrain/loss/a": 1.0}, {}))
    first.tracker.flush()  # and killed, before it noted this
    second = Follower(run, trackers.TensorBoard, "tensorboard", rewinds=True)
    second.catch_up()
    second.close()
    first.close()
    assert curves(run)["pretrain/loss/a"] == [(1, 1.0), (2, 2.0)]


# -- failures of a tracker --------------------------------------------------------------------------------------------------


class Parent:
    """A run that ends after some looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def ended(self, seconds: float) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_failing_tracker_warns_once_and_is_tried_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Recorder):
        left = 3

        def log(self, point: Point) -> None:
            if point.step == 2 and Failing.left:
                Failing.left -= 1
                raise OSError(28, "No space left on device")
            super().log(point)

    monkeypatch.setitem(follow.TRACKERS, "wandb", Failing)
    write(run, update(1), update(2), update(3))
    warnings: list[str] = []
    follow.follow(run, "wandb", Parent(6), warnings.append)  # type: ignore[arg-type]
    assert len(warnings) == 1
    assert "tracker wandb: [Errno 28] No space left on device; the run goes on" in warnings[0]
    assert steps() == [1, 2, 3]


def test_a_package_that_is_missing_is_an_error_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tracking, "NAMES", ("surely_missing", "wandb"))
    (tmp_path / "surely_missing").mkdir()  # such a folder is left by a tracker where it ran
    for call in (lambda: tracking.check_trackers(["surely_missing"]), lambda: tracked(tmp_path, ["surely_missing"]).__enter__()):
        with pytest.raises(MissingExtraError, match=r"pip install 'localmotion\[surely_missing\]'"):
            call()
    with pytest.raises(ConfigError, match="unknown tracker 'wandbb'; did you mean wandb"):
        tracking.check_trackers(["wandbb"])


@pytest.mark.parametrize("command", ["pretrain --method drp --data nowhere --run r", "study nowhere.yaml --out r"])
def test_commands_that_train_take_trackers(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if "study" in command:
        text = "preset: debug\nseeds: [0]\ntasks: [toy:dot]\nvariants:\n  a: {method: dreamer_v2}\n"
        Path("nowhere.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main([*command.split(), "--track", "tensorbord"])
    assert "unknown tracker 'tensorbord'; did you mean tensorboard?" in capsys.readouterr().err
    assert not Path("r").exists()


def test_the_log_is_read_once_the_run_has_begun(run: Path) -> None:
    status = run / "status.json"
    status.write_text("{}")  # of an earlier session, whose log this one will cut
    stamp = status.stat().st_mtime_ns

    class Short(Parent):
        def ended(self, seconds: float) -> bool:
            os.utime(status, ns=(stamp + 1, stamp + 1))  # it begins and ends within one look
            return True

    assert follow.wait_for(status, stamp, Parent(2)) is False  # type: ignore[arg-type]
    assert follow.wait_for(status, stamp, Short(0)) is True  # type: ignore[arg-type]
    assert follow.wait_for(run / "none", 0, Parent(2)) is False  # type: ignore[arg-type]


# -- beside a run -----------------------------------------------------------------------------------------------------------

STAND_IN = """
import json, os, time
out = open(os.environ["SENT"], "a")
def note(*what):
    out.write(json.dumps(what) + "\\n"); out.flush()
class Run:
    def define_metric(self, *a, **k): pass
    def log(self, values, step=None): note("log", step, {k: v for k, v in values.items() if not hasattr(v, "path")})
    def finish(self): time.sleep(float(os.environ.get("SLOW", 0))); note("finish")
def Settings(**k): return k
def init(**k):
    print("words of the library"); note("init", {key: k.get(key) for key in ("project", "name", "id", "resume")}); return Run()
class Image:
    def __init__(self, path): self.path = path
Video = Image
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """wandb and trackio are modules that write what they get to a file; the result reads it."""
    for name in ("wandb", "trackio"):
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / f"{name}.py").write_text(STAND_IN)
    source = Path(tracking.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path / "modules", source))))
    monkeypatch.setenv("SENT", str(tmp_path / "sent"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return lambda: [json.loads(line) for line in (tmp_path / "sent").read_text().splitlines()]


def began(run: Path) -> None:
    (run / "status.json").write_text('{"state": "running"}')


def test_a_tracker_is_a_process_that_gets_everything_before_the_run_is_over(
    run: Path, stand_ins: Callable[[], list[Any]]
) -> None:
    (run / "status.json").write_text('{"state": "interrupted"}')
    write(run, update(1), update(2))  # of the session before; the run will cut the second
    with tracked(run, ["wandb", "wandb"]):
        time.sleep(0.3)
        os.truncate(run / "metrics.jsonl", write(run) - len(json.dumps(update(2))) - 1)
        began(run)
        write(run, update(2, 7.0))
    sent = stand_ins()
    assert sent[0] == ["init", {"project": "localmotion", "name": "some_run", "id": sent[0][1]["id"], "resume": "allow"}]
    assert [(what[1], what[2]["pretrain/loss/a"], what[2]["update"]) for what in sent if what[0] == "log"] == [
        (0, 0.0, 1),
        (1, 7.0, 2),
    ]
    assert sent[-1] == ["finish"]
    assert "words of the library" in (run / "tracking/wandb.log").read_text()


def test_a_tracker_of_a_run_that_did_not_begin_does_nothing(
    run: Path, stand_ins: Callable[[], list[Any]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError), tracked(tmp_path / "other", ["trackio"]):
        raise ConfigError("no")
    assert not (tmp_path / "sent").exists()
    assert not (tmp_path / "other").exists()


def test_a_tracker_that_hangs_is_ended(
    run: Path, stand_ins: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLOW", "600")
    monkeypatch.setattr(tracking, "GRACE", 0.0)
    write(run, update(1))
    with tracked(run, ["trackio"]):
        began(run)
        until = time.monotonic() + 60
        while not (run / "tracking/trackio.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        before = time.monotonic()
    assert time.monotonic() - before < 30
    assert "tracker trackio: not finished after 0 s, ended" in capsys.readouterr().err


def test_what_a_killed_run_wrote_is_sent_before_its_tracker_ends(run: Path, stand_ins: Callable[[], list[Any]]) -> None:
    write(run, update(1))
    script = f"""
        import os, pathlib
        from localmotion.training.tracking import tracked
        run = pathlib.Path({str(run)!r})
        with tracked(run, ["trackio"]):
            (run / "status.json").write_text("{{}}")
            os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode == -9
    until = time.monotonic() + 60
    while not (sent := run.parent / "sent").exists() or "finish" not in sent.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert [what[0] for what in stand_ins()] == ["init", "log", "finish"]


def test_a_run_with_a_tracker_is_the_same_run(store: Path, tmp_path: Path, stand_ins: Callable[[], list[Any]]) -> None:
    run = compose("drp", "pretrain", preset="debug", settings=("precision=fp32", "threads=1", f"data={store}"))
    settings = replace(run.pretrain, updates=4, length=6, batch_size=2, log_every=1, save_every=2, eval_every=2)
    run = replace(run, pretrain=settings)
    pretrain(run, tmp_path / "plain")
    with tracked(tmp_path / "seen", ["wandb", "trackio"]):
        pretrain(run, tmp_path / "seen")
    one, two = (checkpoint.complete(tmp_path / name / "checkpoints")[-1] for name in ("plain", "seen"))
    for part in ("weights", "optimizer", "rng"):
        before, after = checkpoint.read(one, part), checkpoint.read(two, part)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    logged = [what for what in stand_ins() if what[0] == "log" and "pretrain/loss/image" in what[2]]
    assert sorted(what[2]["update"] for what in logged) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert not {"wandb", "trackio"} & set(sys.modules)
