"""Extraction by shards with a decoder that costs nothing: what a clip costs beside decoding and perception.

`python -m benchmarks shards` runs 64 parts on the cores of this machine, and writes, finishes and opens a store. `python -m
benchmarks.bench_shards --videos 10000000` does it for a manifest of that many videos, with shards of which only the index is written; it
needs 10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.machine import cores
from localmotion.perception import extract
from localmotion.perception.part_shards import extract_shards
from localmotion.perception.unfinished import VideoDone
from localmotion.recipe import Recipe
from localmotion.video.finish import finish_store
from localmotion.video.growing import GrowingShard
from localmotion.video.history import Limits
from localmotion.video.manifest import Manifest, write_manifest
from localmotion.video.manifest_store import keep_manifest
from localmotion.video.refs import VideoRef
from localmotion.video.store import Clip, ClipStore, ClipStoreWriter
from localmotion.video.writer import ClipStoreWriter as Writer

RECIPE = Recipe(percept_size=64)
FRAMES = 25
LIMITS = Limits(25, 300)


@cache
def arrays() -> dict[str, Any]:
    """The arrays of a clip, noise: (25, 64, 64, ...)."""
    rng = np.random.default_rng(0)
    flow = rng.normal(size=(FRAMES, RECIPE.size, RECIPE.size, 2)).astype(np.float16)
    flow[-1] = 0
    slots = (FRAMES, RECIPE.tracks)
    return {
        "frames": rng.integers(0, 256, (FRAMES, RECIPE.size, RECIPE.size, 3), dtype=np.uint8),
        "flow": flow,
        "tracks": rng.uniform(0, RECIPE.size, (*slots, 2)).astype(np.float32),
        "visible": np.ones(slots, bool),
        "track_id": np.zeros(slots, np.int32),
    }


INFO = {"cut_short": False, "cuts": [], "fps": 25.0, "vfr": False, "flow": {"p50": 0.1, "p90": 1.0, "p99": 3.0}, "tracks": 24}


def fake(tasks: Any, **_: Any) -> Iterator[Any]:
    """Instead of `extract_many`: the same clip for every video."""
    found: list[Any] = []
    for task in tasks:
        name = task.ref.id
        found.append(Clip(name, **arrays(), source={"video": name, "start": 0, "stop": FRAMES}, info=INFO))
        found.append(VideoDone(name, None, FRAMES, 0, False, "0" * 32))
    return found
    yield


def names(videos: int) -> list[VideoRef]:
    return [VideoRef(f"{n // 1000:06d}/video_{n:09d}.mp4", Path("/videos") / f"{n}", "file") for n in range(videos)]


def part(manifest: str, out: str, number: int, parts: int) -> None:
    """One part in this process; prints its CPU seconds without imports."""
    extract.extract_many = fake  # type: ignore[assignment]
    began = time.process_time()
    found = extract_shards(Path(manifest), out, RECIPE, number, parts, workers=0)
    print(json.dumps({"clips": found.clips, "seconds": time.process_time() - began, "wall": found.seconds}))


def run(videos: int = 8192, parts: int = 64) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def row(what: str, clips: int, seconds: float) -> None:
        rows.append({"what": what, "clips": clips, "seconds": seconds, "ms/clip": 1000 * seconds / clips})

    with tempfile.TemporaryDirectory() as folder:
        manifest, out = Path(folder) / "m.jsonl", Path(folder) / "store"
        refs = names(videos)
        began = time.process_time()
        write_manifest(manifest, "/videos", refs, LIMITS)
        row("manifest of listed names", videos, time.process_time() - began)
        began = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.bench_shards", "--part", str(manifest), str(out)]

        def one(number: int) -> dict[str, Any]:
            done = subprocess.run([*command, str(number), str(parts)], stdout=subprocess.PIPE, check=True)
            return dict(json.loads(done.stdout))

        with ThreadPoolExecutor(parts) as pool:
            found = list(pool.map(one, range(parts)))
        row(f"{parts} parts at once, wall clock with starts", videos, time.perf_counter() - began)
        assert sum(each["clips"] for each in found) == videos
        row("CPU of the parts: read manifest, append, hash, publish", videos, sum(each["seconds"] for each in found))
        began = time.process_time()
        finish_store(out)
        row("finish", videos, time.process_time() - began)
        row("coordinator: manifest and finish", videos, float(str(rows[0]["seconds"])) + float(str(rows[-1]["seconds"])))
    return rows


# --- ten million -----------------------------------------------------------------------------------------------------------


def peak() -> float:
    """Largest memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def large(folder: Path, videos: int, stage: str) -> None:
    """One stage of the simulation, in a process of its own so that its memory is known."""
    manifest, out = folder / "m.jsonl", folder / "store"
    began = time.perf_counter()
    if stage == "manifest":
        write_manifest(manifest, "/videos", names(videos), LIMITS)
    elif stage == "part 7 of 64":
        found = Manifest(manifest)
        for index in range(7, -(-videos // 1024), 64):
            found.listed(index * 1024, index * 1024 + 1024)
    elif stage == "claims":
        claims(manifest, out)
    elif stage == "finish":
        finish_store(out, workers=cores())
    elif stage == "open":
        store = ClipStore(out)
        assert len(store) == videos
        print(f"  opened in {time.perf_counter() - began:.2f} s; first and last: {store.ids[0]}, {store.ids[-1]}")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    print(f"{stage}: {time.perf_counter() - began:.1f} s, {cpu:.1f} CPU seconds, {peak():.0f} MB", flush=True)


def claims(path: Path, out: Path) -> None:
    """Every shard made and published, without waiting for the disk; its arrays are holes of the right size."""
    os.fsync = lambda handle: None
    manifest = Manifest(path)
    writer = ClipStoreWriter.open(out, RECIPE.size, RECIPE.to_json(), RECIPE.hash(), RECIPE.tracks, 1024)
    keep_manifest(out, manifest, 1024)
    taken = 0.0
    for index in range(-(-manifest.videos // 1024)):
        listed = manifest.listed(index * 1024, index * 1024 + 1024)
        taken += _holes(writer, index, [item.ref.id for item in listed])
    print(f"  of these, writing the index and the rename: {1000 * taken / (index + 1):.2f} ms a shard")


def _holes(writer: Writer, index: int, ids: list[str]) -> float:
    with GrowingShard(writer, index, ids) as shard:
        for name in ids:
            source = {"video": name, "start": 0, "stop": FRAMES}
            entry = {"id": name, "label": None, "frames": FRAMES, "source": source, "info": INFO}
            shard._files.append(entry, {})
            record = {"id": name, "frames": FRAMES, "left_out": 0, "more": False, "content": "0" * 32, "bytes": 1, "mtime_ns": 1}
            shard.results.append({"record": record | {"label": None, **LIMITS.to_json()}, "rejected": None})
        for name, spec in writer.specs.items():
            shard._files._files[name].truncate(shard.frames * spec.frame_bytes)
        began = time.perf_counter()
        shard.publish()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_shards")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--videos", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the simulated store goes; it is removed at the end")
    given = parser.parse_args()
    if given.part:
        part(given.part[0], given.part[1], int(given.part[2]), int(given.part[3]))
        return
    if given.stage:
        large(given.folder, given.videos, given.stage)
        return
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    command = [sys.executable, "-m", "benchmarks.bench_shards", "--videos", str(given.videos), "--folder", str(folder)]
    try:
        for stage in ("manifest", "part 7 of 64", "claims", "finish", "open"):
            subprocess.run([*command, "--stage", stage], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
