"""Extraction by shards of a manifest: the same bytes for any number of parts, with any kills."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import cv2
import pytest

from lerobot_files import CAMERAS, DATA
from localmotion.cli import main
from localmotion.errors import ConfigError, StoreError
from localmotion.perception import Recipe, extract, extract_folder, extract_shards
from localmotion.video import ClipStore
from localmotion.video.finish import finish_store
from localmotion.video.history import Limits
from localmotion.video.manifest import Manifest, write_manifest
from localmotion.video.scan import scan
from localmotion.video.sources import open_videos
from refusals import fails
from video_files import encode, moving_square

FAST = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0)
LIMITS = Limits(5, 10)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "in"
    (folder / "deep").mkdir(parents=True)
    for number in range(7):
        encode(folder / "deep" / f"{number}.mp4", moving_square(12 if number % 3 else 25, seed=number))
    (folder / "x.mp4").write_text("no video")
    (folder / "films.zip").write_bytes(b"PK")
    good = encode(folder / "film.mp4", moving_square(44))
    good.write_bytes(good.read_bytes()[:-300])
    (folder / "frames").mkdir()
    for number, picture in enumerate(moving_square(30)):
        cv2.imwrite(str(folder / "frames" / f"{number}.png"), picture)
    (folder / "frames/23.png").write_text("no picture")  # damaged behind its first clips
    return folder


@pytest.fixture(scope="module")
def manifest(videos: Path) -> Path:
    path = videos.parent / "m.jsonl"
    write_manifest(path, videos, open_videos(videos)[0], LIMITS)
    return path


@pytest.fixture(scope="module")
def plain(videos: Path) -> dict[str, bytes]:
    """The store of `extract_folder`."""
    out = videos.parent / "plain"
    extract_folder(videos, out, FAST, workers=0, min_frames=5, max_frames=10, shard_clips=3)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {
        name: data for name, data in found.items() if name not in ("manifest.json", "flow.json", "index.bin", "statistics.json")
    }


def part(manifest: Path, out: Path, part: int = 0, parts: int = 1, **options: Any) -> Any:
    return extract_shards(manifest, out, FAST, part, parts, **({"workers": 0, "shard_clips": 3} | options))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_any_number_of_parts_gives_the_bytes_of_one_extraction(
    parts: int, manifest: Path, tmp_path: Path, plain: dict[str, bytes]
) -> None:
    found = [part(manifest, tmp_path / "s", number, parts) for number in reversed(range(parts))]
    assert files(tmp_path / "s") == plain
    assert sum(summary.clips for summary in found) == sum(summary.new for summary in found) == 13
    assert sum(summary.shards for summary in found) == 4


def test_two_lanes_of_workers_give_the_same_bytes(manifest: Path, tmp_path: Path, plain: dict[str, bytes]) -> None:
    """Four shards, two workers: each takes a shard of its own. With three workers for one shard results come out of turn."""
    assert part(manifest, tmp_path / "s", workers=2).shards == 4
    assert files(tmp_path / "s") == plain


def test_results_that_come_out_of_turn_wait(
    manifest: Path, tmp_path: Path, plain: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a video that is made again after its first clips have arrived."""

    def backwards(call: Any, tasks: Any, workers: int, timeout: float, together: int) -> Iterator[Any]:
        every = list(tasks)
        messages = [(task, list(extract.in_this_process(call([task])))) for task in every]
        yield from ((task, found[0]) for task, found in messages if len(found) > 1)  # the group is lost behind these clips
        for task, found in reversed(messages):
            yield from ((task, message) for message in found)

    monkeypatch.setattr(extract, "results_of", backwards)
    assert part(manifest, tmp_path / "s").clips == 13
    assert files(tmp_path / "s") == plain


CHILD = """
import sys
from pathlib import Path
from localmotion.perception import Recipe, extract_shards

def progress(*at):
    print(*at, flush=True)
    if at[0] == int(sys.argv[3]):
        sys.stdin.readline()

extract_shards(Path(sys.argv[1]), Path(sys.argv[2]), Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0), 0, 1, workers=0,
               shard_clips=3, progress=progress)
"""


@contextmanager
def child(manifest: Path, out: Path, waits_at: int = -1) -> Iterator[Callable[[], bytes]]:
    """A process that makes all shards, and is killed at the end of the context. Gives a function that reads its next line."""
    command = [sys.executable, "-c", CHILD, str(manifest), str(out), str(waits_at)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        yield process.stdout.readline
        process.kill()


def killed(manifest: Path, out: Path, videos: int) -> None:
    """A part that is killed after so many videos."""
    with child(manifest, out, videos) as line:
        for _ in range(videos):
            line()


def kill_at_random(manifest: Path, out: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        with child(manifest, out) as line:
            for _ in range(rng.randrange(3)):
                line()
            time.sleep(rng.random() * 0.05)


def test_a_killed_part_goes_on_behind_its_last_finished_video(manifest: Path, tmp_path: Path, plain: dict[str, bytes]) -> None:
    out = tmp_path / "s"
    killed(manifest, out, 2)
    (left,) = (out / "shards").iterdir()
    assert left.name.startswith("00000.making-")
    again = part(manifest, out)
    assert (again.shards, again.clips) == (4, 13)
    assert 13 - again.new in (
        4,
        5,
    )  # two or three videos, as the kill comes a little late; each of the first three has 1 or 3 clips
    assert files(out) == plain


def test_three_kills_at_random_moments(manifest: Path, tmp_path: Path, plain: dict[str, bytes]) -> None:
    kill_at_random(manifest, tmp_path / "s", 3, seed=0)
    part(manifest, tmp_path / "s")
    assert files(tmp_path / "s") == plain


@pytest.mark.slow
def test_twenty_kills_at_random_moments(manifest: Path, tmp_path: Path, plain: dict[str, bytes]) -> None:
    for round_ in range(4):  # of five kills: more would find nothing left to do
        kill_at_random(manifest, tmp_path / str(round_), 5, seed=round_)
        part(manifest, tmp_path / str(round_))
        assert files(tmp_path / str(round_)) == plain


def test_a_folder_left_behind_with_other_bytes_is_not_trusted(manifest: Path, tmp_path: Path, plain: dict[str, bytes]) -> None:
    """As a machine leaves it that failed before its pages were on the disk."""
    out = tmp_path / "s"
    killed(manifest, out, 2)
    (left,) = (out / "shards").iterdir()
    with (left / "flow.f16").open("r+b") as file:
        file.write(b"\1\1\1\1")
    part(manifest, out)
    assert files(out) == plain


def test_the_first_of_two_makers_counts(manifest: Path, tmp_path: Path, plain: dict[str, bytes]) -> None:
    """The same part twice at once: the second finds its shards published, and leaves nothing."""
    out = tmp_path / "s"
    inner: list[Any] = []

    def second(done: int, total: int | None, note: str) -> None:
        if not inner:
            inner.append(None)
            inner[0] = part(manifest, out)

    outer = part(manifest, out, progress=second)
    assert (inner[0].shards, outer.shards, outer.lost, outer.clips) == (4, 0, [0, 1, 2, 3], 13)
    assert files(out) == plain


def test_what_does_not_fit_is_refused(videos: Path, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    part(manifest, out, 0, 4)
    write_manifest(tmp_path / "m.jsonl", videos, open_videos(videos)[0], Limits(5, 12))
    with pytest.raises(StoreError, match=r"begun with another manifest, max_frames 10, .* has 12"):
        part(tmp_path / "m.jsonl", out)
    with pytest.raises(StoreError, match="shard_clips 3, this command has 4"):
        part(manifest, out, shard_clips=4)
    with pytest.raises(ConfigError, match="numbered from 0 to 1"):
        part(manifest, out, 2, 2)
    assert part(manifest, out, 1, 4, shard_clips=None).shards == 1  # takes those of the store
    extract_folder(videos, tmp_path / "plain", FAST, workers=0, min_frames=5, max_frames=10, shard_clips=3)
    with pytest.raises(StoreError, match="was extracted without a manifest"):
        part(manifest, tmp_path / "plain")


def test_a_video_of_another_size_than_listed_is_rejected(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", moving_square(12))
    write_manifest(tmp_path / "m.jsonl", tmp_path, open_videos(tmp_path)[0], LIMITS)
    encode(tmp_path / "a.mp4", moving_square(14, seed=3))
    found = part(tmp_path / "m.jsonl", tmp_path / "s")
    assert found.rejected == {"changed": 1}
    assert "scan again" in found.rejections[0]["detail"]


def test_a_folder_that_another_machine_took_over_stops_its_maker(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"

    def steal(done: int, total: int | None, note: str) -> None:
        for folder in (out / "shards").glob("*.making-*"):
            shutil.rmtree(folder)

    with pytest.raises(StoreError, match="was removed; another process makes shard 00000 now"):
        part(manifest, out, progress=steal)


@pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed: pip install 'localmotion[lerobot]'"
)
def test_episodes_of_a_data_set(tmp_path: Path) -> None:
    data, camera = Path(f"lerobot:{DATA / 'v30'}"), CAMERAS[0]
    extract_folder(data, tmp_path / "plain", FAST, camera=camera, workers=0, min_frames=2, max_frames=300, shard_clips=2)
    refs = open_videos(data, None, camera)[0]
    write_manifest(tmp_path / "m.jsonl", data, refs, Limits(2, 300), camera=camera)
    for number in (1, 0):
        part(tmp_path / "m.jsonl", tmp_path / "s", number, 2, shard_clips=2)
    assert files(tmp_path / "s") == files(tmp_path / "plain")
    assert ClipStore(tmp_path / "s").extra.keys() >= {"action", "reward"}


# --- the manifest ---------------------------------------------------------------------------------------------------------


def test_a_manifest_has_the_videos_that_a_walk_finds(videos: Path, manifest: Path) -> None:
    found = Manifest(manifest)
    refs = open_videos(videos)[0]
    assert [item.ref for item in found.listed(0, 99)] == [replace(ref, path=ref.path.resolve()) for ref in refs]
    assert [item.ref.id for item in found.listed(2, 5)] == [ref.id for ref in refs[2:5]]
    assert (found.videos, found.limits) == (len(refs), LIMITS)
    found.path.with_name("m.jsonl.offsets").unlink()
    assert [item.ref.id for item in Manifest(manifest).listed(2, 5)] == [ref.id for ref in refs[2:5]]


def test_an_unfinished_listing_is_continued(
    videos: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = open_videos(videos)[0]

    def stop(ref: Any) -> Any:
        raise KeyboardInterrupt

    path, read = tmp_path / "m.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, videos, refs, LIMITS, details=lambda ref: stop(ref) if ref == refs[4] else {}, threads=1)
    assert not path.exists()
    lines = manifest.read_bytes().splitlines(keepends=True)
    partial = path.with_name("m.jsonl.partial")
    with partial.open("r+b") as file:  # a kill leaves whole lines and a part of one
        first = file.readline()
        file.truncate(len(first))
        file.seek(len(first))
        file.write(b"".join(lines[1:4]) + lines[4][:20])

    def details(ref: Any) -> dict[str, Any]:
        read.append(ref.id)
        return {}

    write_manifest(path, videos, refs, LIMITS, details=details, threads=1)
    assert read == [ref.id for ref in refs[3:]]
    assert path.read_bytes() == manifest.read_bytes()


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"not JSON\n", b'{"format": "localmotion-manifest", "version": 2}\n', "half"])
def test_a_damaged_manifest_is_refused(damage: bytes | str, manifest: Path, tmp_path: Path) -> None:
    data = manifest.read_bytes()
    (tmp_path / "m.jsonl").write_bytes(data[: len(data) // 2] if isinstance(damage, str) else damage)
    with pytest.raises(ConfigError, match="cannot be read as a manifest"):
        Manifest(tmp_path / "m.jsonl")


def test_a_scan_that_was_interrupted_examines_the_rest(videos: Path, tmp_path: Path) -> None:
    whole = scan(videos, min_frames=5, workers=0)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(videos, min_frames=5, workers=0, journal=tmp_path / "j", progress=stop)
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"stamp": ')
    counts: list[int] = []
    assert (
        scan(videos, min_frames=5, workers=0, journal=tmp_path / "j", progress=lambda done, total: counts.append(done)) == whole
    )
    assert counts[0] == 5
    whole.save(tmp_path / "m.jsonl", max_frames=10)
    assert part(tmp_path / "m.jsonl", tmp_path / "s").clips == 13


# --- finish ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(manifest: Path, tmp_path: Path) -> Path:
    part(manifest, tmp_path / "store")
    return tmp_path / "store"


def read(store: ClipStore) -> list[Any]:
    clips = [store.clip(i) for i in range(len(store))]
    known = [(list(getattr(store, name))) for name in ("ids", "labels", "infos", "sources", "videos")]
    return [known, store.lengths.tolist(), [clip.flow.tobytes() for clip in clips], store.rejected]


def test_an_index_says_what_the_shards_say(store: Path) -> None:
    plain = read(ClipStore(store))
    found = finish_store(store)
    opened = ClipStore(store)
    assert opened.indexed
    assert read(opened) == plain
    opened.verify()
    assert (found.clips, found.videos, found.missing) == (13, 7, [])
    assert found.rejected == {"truncated": 1, "unreadable": 2, "unsupported_container": 1}
    assert finish_store(store, workers=2) == replace(found, seconds=ANY)


def test_a_store_with_missing_shards_opens_and_says_so(store: Path, manifest: Path) -> None:
    shutil.rmtree(store / "shards/00001")
    opened = ClipStore(store)
    assert opened.missing == [1]
    assert "1 of 4 shards are missing (00001)" in opened.missing_line()
    with pytest.raises(StoreError, match=r"1 of 4 shards are missing \(00001\); run their parts again"):
        finish_store(store)
    assert finish_store(store, partial_store=True).missing == [1]
    assert ClipStore(store).indexed
    part(manifest, store)
    complete = ClipStore(store)  # its index lacks the new shard, so it is not used
    assert (complete.indexed, complete.missing, len(complete)) == (False, [], 13)


def test_an_index_leaves_out_what_was_replaced(videos: Path, store: Path) -> None:
    extract_folder(videos, store, FAST, workers=0, min_frames=5, max_frames=10, max_clips=1, shard_clips=3)
    extract_folder(videos, store, FAST, workers=0, min_frames=5, max_frames=10, shard_clips=3)
    plain = read(ClipStore(store))
    finish_store(store)
    assert ClipStore(store).indexed
    assert read(ClipStore(store)) == plain


def test_with_an_index_damage_is_found_when_a_shard_is_used(store: Path) -> None:
    finish_store(store)
    (store / "shards/00000/flow.f16").write_bytes(b"12345678")
    opened = ClipStore(store)
    with pytest.raises(StoreError, match="shard 00000 is damaged"):
        opened.window("flow", 0)
    shutil.move(store / "shards/00001", store.parent / "elsewhere")
    (store / "shards/00001").symlink_to(store.parent / "elsewhere")
    opened = ClipStore(store)
    with pytest.raises(StoreError, match="is a link to a place outside"):
        opened.window("flow", next(i for i in range(len(opened)) if opened._shards[i] == 1))
    data = (store / "index.bin").read_bytes()
    (store / "index.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match=r"index.bin: is damaged .*run localmotion store finish again"):
        ClipStore(store)


def test_the_commands(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(tmp_path / "m.jsonl"), str(tmp_path / "s")
    main(["scan", str(videos), "--no-decode", "--manifest", path, "--min-frames", "5", "--max-frames", "10"])
    assert "11 videos, 10 of them to be decoded" in capsys.readouterr().out
    recipe = ["--size", "32", "--percept-size", "32", "--tracks", "4", "--redraw-rounds", "0", "--workers", "0"]
    extraction = ["extract", "--manifest", path, "--out", out, "--shard-clips", "3", "--parts", "2", *recipe]
    main([*extraction, "--part", "1"])
    assert "part 1 of 2: 2 shards made" in capsys.readouterr().out
    assert "2 of 4 shards are missing (00000, 00002)" in fails(capsys, "store", "finish", out)
    main(extraction)
    main(["store", "finish", out, "--workers", "0"])
    main(["store", "show", out])
    assert "with an index" in capsys.readouterr().out
    assert "--part and --parts need a --manifest" in fails(capsys, "extract", str(videos), "--out", out, "--part", "1")
    assert "min_frames is a part of the manifest" in fails(capsys, *extraction, "--min-frames", "7")
    assert "give the folder of videos" in fails(capsys, "extract", "--out", out)
