"""Extraction by shards of a manifest: the same bytes for any number of parts, with any kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localmotion.perception import Recipe, extract_folder, extract_shards
from localmotion.video.history import Limits
from localmotion.video.manifest import write_manifest
from localmotion.video.sources import open_videos
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
    good.write_bytes(good.read_bytes()[:-300])  # damaged behind its first clips
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
