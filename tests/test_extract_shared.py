"""Several processes that extract into one store: they share the work, survive each other's death, and refuse what does not fit."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localmotion.errors import StoreError
from localmotion.perception import Recipe
from localmotion.perception.extract import ExtractSummary, extract_folder
from localmotion.video import ClipStore
from localmotion.video.claims import shared_work
from video_files import encode, moving_square

FAST = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0)
OPTIONS: dict[str, Any] = {"workers": 0, "min_frames": 5, "shard_clips": 2, "max_frames": 10}

OTHER = f"""
import sys
from pathlib import Path
from localmotion.perception import Recipe
from localmotion.perception.extract import extract_folder

def progress(done, total, note):
    print(done, flush=True)
    sys.stdin.readline()

found = extract_folder(Path(sys.argv[1]), Path(sys.argv[2]), Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0),
                       progress=progress, **{OPTIONS!r})
print("end", found.new, len(found.elsewhere), found.clips, flush=True)
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "in"
    folder.mkdir()
    for number in range(5):
        encode(folder / f"{number}.mp4", moving_square(12 if number else 25, seed=number))
    (folder / "x.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def alone(videos: Path) -> dict[str, bytes]:
    run(videos, videos.parent / "alone")
    return files(videos.parent / "alone")


def run(videos: Path, out: Path, **options: Any) -> ExtractSummary:
    return extract_folder(videos, out, FAST, **(OPTIONS | options))


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


class Other:
    """A second process; it stops after each video and waits for the word to go on."""

    def __init__(self, videos: Path, out: Path) -> None:
        command = [sys.executable, "-c", OTHER, str(videos), str(out)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ends(self) -> str:
        """Let it run to its end; its last line."""
        assert self.process.stdin
        self.process.stdin.close()
        line = "?"
        while line and not line.startswith("end"):
            line = self.says()
        assert self.process.wait() == 0
        return line


@contextlib.contextmanager
def other_process(videos: Path, out: Path, until: int) -> Iterator[Other]:
    """A process that has done ``until`` videos and waits."""
    other = Other(videos, out)
    try:
        for done in range(until + 1):
            assert other.says() == str(done)
            if done < until:
                other.go_on()
        yield other
    finally:
        other.process.kill()
        with other.process:  # waits, and closes the pipes
            pass


def test_two_processes_share_the_shards(videos: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    out = tmp_path / "s"
    with other_process(videos, out, 1) as other:  # one video of shard 0 is done
        summary = run(videos, out)
        assert (summary.elsewhere, summary.new) == ([0], 3)
        assert any("1 shards are still being written by other processes" in line for line in summary.lines())
        assert sorted(os.listdir(out / "shards")) == ["00001", "00002"]
        assert run(videos, out).new == 0  # a third one finds nothing to do, and deletes nothing
        assert other.ends() == "end 4 0 7"
    assert files(out) == alone


def test_a_killed_process_costs_what_it_had_in_work(videos: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    out = tmp_path / "s"
    with other_process(videos, out, 3) as other:  # shard 0 and half of shard 1
        other.process.kill()
        other.process.wait()
        summary = run(videos, out)
    assert (summary.elsewhere, summary.new) == ([], 2)
    assert files(out) == alone


def test_a_process_that_dies_beside_another_leaves_its_shard_to_be_claimed(
    videos: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    out = tmp_path / "s"
    killed = False
    with other_process(videos, out, 1) as other:

        def kill(done: int, total: int | None, note: str) -> None:
            nonlocal killed
            if done and not killed:  # this process has begun with its first shard
                killed = True
                other.process.kill()
                other.process.wait()

        summary = run(videos, out, progress=kill)
    assert killed
    assert (summary.elsewhere, summary.new) == ([], 4)
    assert files(out) == alone


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"min_frames": 7}, "with min_frames 5, this command has 7"),
        ({"max_clips": 1}, "with max_clips None, this command has 1"),
        ({"videos": "elsewhere"}, r"with videos .*/in, this command has .*/elsewhere"),
        ({"recipe": Recipe(size=32, percept_size=32, tracks=5)}, "holds a store of recipe"),
    ],
)
def test_a_second_process_with_other_work_is_refused(change: dict[str, Any], told: str, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    (tmp_path / "elsewhere").mkdir()
    encode(tmp_path / "elsewhere" / "0.mp4", moving_square(9))
    folder, recipe = tmp_path / change.pop("videos", videos), change.pop("recipe", FAST)
    busy: list[str] = []

    def second(done: int, total: int | None, note: str) -> None:
        if not busy:
            with pytest.raises(StoreError, match=told) as caught:
                extract_folder(folder, out, recipe, **(OPTIONS | change))
            busy.append(str(caught.value))

    run(videos, out, progress=second)
    if "recipe" not in told:
        assert f"{out}: process {os.getpid()} on {socket.gethostname()} is extracting into it" in busy[0]
    assert len(ClipStore(out)) == 7


def test_videos_that_come_while_others_are_at_work_wait_for_the_next_call(videos: Path, tmp_path: Path) -> None:
    for path in videos.iterdir():
        os.link(path, tmp_path / path.name)
    out = tmp_path / ".s"
    added: list[ExtractSummary] = []

    def second(done: int, total: int | None, note: str) -> None:
        if done == 1 and not added:
            encode(tmp_path / "00.mp4", moving_square(9))  # would come first
            (tmp_path / "4.mp4").unlink()
            added.append(run(tmp_path, out))

    run(tmp_path, out, progress=second)
    assert added[0].new == 2
    assert {entry["id"]: entry["reason"] for entry in ClipStore(out).rejected} == {"4.mp4": "missing", "x.mp4": "unreadable"}
    assert run(tmp_path, out).new == 1
    assert set(ClipStore(out).videos) == {"00.mp4", "0.mp4", "1.mp4", "2.mp4", "3.mp4"}


def test_joining_and_leaving_never_gives_two_plans(tmp_path: Path) -> None:
    """Threads stand for processes: each opens the files itself, and the kernel's locks hold between openings."""
    active: dict[str, int] = {}
    faults: list[str] = []
    guard = threading.Lock()

    def worker(seed: int) -> None:
        rng = random.Random(seed)
        for turn in range(12):
            with shared_work(tmp_path, {"same": True}, lambda turn=turn: {"name": f"{seed} {turn}"}) as work:
                name = work.plan["name"]
                with guard:
                    active[name] = active.get(name, 0) + 1
                    if len(active) > 1:
                        faults.append(f"{sorted(active)}")
                if work.claim(0):
                    work.done(0)
                time.sleep(rng.random() / 500)
                work.finished = rng.random() < 0.5
                with guard:
                    active[name] -= 1
                    if not active[name]:
                        del active[name]

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert os.listdir(tmp_path) == []


def test_one_holder_of_a_claim(tmp_path: Path) -> None:
    with shared_work(tmp_path, {}, dict) as one, shared_work(tmp_path, {}, dict) as two:
        assert one.claim(3)
        assert not two.claim(3)
        assert two.claim(4)
        one.leave()
        assert two.claim(3)
    assert os.listdir(tmp_path) == []
