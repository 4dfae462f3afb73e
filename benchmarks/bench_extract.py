"""Clips written to a store per second (including decoding) and windows read from it per second, on videos rendered here."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.bench_machine import best
from localmotion.envs.bodies import render_videos
from localmotion.perception.extract import extract_folder
from localmotion.recipe import Recipe
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore


def run(clips: int = 32, frames: int = 50) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        render_videos(videos, clips=clips, frames=frames, size=128, seed=0, bodies=("cheetah", "hopper", "finger", "fish"))
        for percept in (64, 128):
            for workers in (1, 2):
                out = Path(folder) / f"store{percept}_{workers}"
                began = time.perf_counter()
                extract_folder(videos, out, Recipe(percept_size=percept), workers=workers, shard_clips=8)
                seconds = time.perf_counter() - began
                rate = clips * frames / seconds
                rows.append(
                    {
                        "what": f"extract at {percept} px",
                        "workers": workers,
                        "frames/s": rate,
                        "25-frame clips/s": rate / 25,
                        "windows/s": "",
                    }
                )
        sampler = WindowSampler(ClipStore(out), 25, 16, 0, split="all", prefetch=False)
        numbers = iter(range(10**6))
        seconds = best(lambda: sampler.batch(next(numbers)), 20)
        rows.append(
            {"what": "sample 16 x 25", "workers": 1, "frames/s": 400 / seconds, "25-frame clips/s": "", "windows/s": 16 / seconds}
        )
    return rows
