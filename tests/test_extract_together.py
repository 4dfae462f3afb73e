"""Extraction of several clips at once: networks are asked for all together, and each clip comes out as it does alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError
from localmotion.perception import Recipe, _neural, extract
from localmotion.perception.base import ClipMotion, works_on_gpu
from localmotion.perception.clips import ClipExtractor
from localmotion.perception.extract import extract_folder, results_of
from localmotion.perception.unfinished import Task, VideoDone
from localmotion.video.listing import VideoRef
from localmotion.video.workers import Lost
from localmotion.video.write import write_video
from perception_scenes import SIDE, scene
from waiting import jump_when_hanging
from worker_acts import act_on_tasks

RECIPE = Recipe(percept_size=SIDE, tracks=12, segment_frames=8)
SMALL = Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=1, segment_frames=8)


def clips() -> list[tuple[NDArray[np.uint8], str]]:
    """Of different lengths; one is cut, one stands still, one is black."""
    made = [scene(frames=length, velocity=(3.0, 1.0 + length / 9))[0] for length in (17, 9, 2)]
    cut = np.concatenate([made[1], 255 - made[0][:7]])
    return [(frames, f"clip {i}") for i, frames in enumerate([*made, cut, made[0][:1].repeat(9, 0), made[1] * 0])]


def assert_same(one: ClipMotion, other: ClipMotion) -> None:
    for name in ("flow", "tracks", "visible", "track_id"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.info == other.info


@pytest.mark.parametrize(
    "recipe", [RECIPE, Recipe(percept_size=SIDE, tracks=5, redraw_rounds=0), Recipe(percept_size=SIDE, flow_span=3)]
)
def test_together_as_alone(recipe: Recipe) -> None:
    extractor = ClipExtractor(recipe)
    for motion, clip in zip(extractor.extract_many(clips()), clips(), strict=True):
        assert_same(motion, extractor.extract(*clip))
    assert extractor.extract_many([]) == []


class Networks:
    """Flow, segmenter and tracker in one, that count how often they are asked; what they say depends on the pictures alone."""

    name, licence, uses_motion, causal = "counting", "none", False, False

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def flow(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.asked.append(("flow", len(first)))
        return (second.astype(np.float32) - first)[..., :2] / 64

    def weights(self, asked: Sequence[tuple[NDArray[np.uint8], Any]]) -> list[NDArray[np.float32]]:
        self.asked.append(("segment", len(asked)))
        assert all(len(frames) == 1 for frames, _ in asked)  # no flow is made for what does not look at it
        return [frames[0, ..., 0] / np.float32(255) for frames, _ in asked]

    def weight(self, frames: NDArray[np.uint8], flows: Any) -> NDArray[np.float32]:
        return self.weights([(frames[:1], flows)])[0]

    def tracks(self, asked: Sequence[tuple[NDArray[np.uint8], Any]]) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        self.asked.append(("track", len(asked)))
        return [self._follow(*each) for each in asked]

    def track(self, frames: NDArray[np.uint8], points: NDArray[np.float32], start: int = 0) -> tuple[NDArray, NDArray]:
        return self.tracks([(frames, points)])[0]

    def _follow(self, frames: NDArray[np.uint8], points: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
        """Every other point moves with the brightness, so some are weak and drawn again."""
        shift = (
            frames.mean((1, 2, 3), dtype=np.float32)[:, None, None] / 40 + np.arange(len(frames), dtype=np.float32)[:, None, None]
        )
        moves = (np.round(points[:, 0]) % 2)[None, :, None]
        return points[None] + shift * moves, np.ones((len(frames), len(points)), bool)

    def step(
        self, previous: NDArray[np.uint8], current: NDArray[np.uint8], points: NDArray[np.float32]
    ) -> tuple[NDArray, NDArray]:
        return points, np.ones(len(points), bool)


def with_networks(recipe: Recipe = RECIPE) -> tuple[ClipExtractor, Networks]:
    extractor, networks = ClipExtractor(recipe), Networks()
    extractor.flow = extractor.segment = extractor.track = networks
    return extractor, networks


def test_networks_are_asked_for_all_clips_at_once() -> None:
    extractor, networks = with_networks()
    several = [(scene(frames=17, velocity=(1.0 + i, 2.0))[0], f"clip {i}") for i in range(4)]
    motions = extractor.extract_many(several)
    assert networks.asked[:2] == [
        ("flow", 4 * 16),
        ("segment", 4 * 2),
    ]  # two segments; the frame left over is too few for a third
    tracks = networks.asked[2:]
    assert tracks[0] == ("track", 4)
    assert {kind for kind, _ in tracks} == {"track"}
    assert 2 <= len(tracks) <= 2 * (1 + RECIPE.redraw_rounds)
    together, networks.asked = len(networks.asked), []
    for motion, clip in zip(motions, several, strict=True):
        assert_same(motion, extractor.extract(*clip))
    assert len(networks.asked) >= 3 * together


def store_bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "shards").rglob("*")) if path.is_file()}


def folder(path: Path) -> Path:
    for i, length in enumerate((12, 10, 3, 26, 11, 12, 9)):
        write_video(path / f"{i}.mp4", scene(frames=length, velocity=(1.0 + i / 2, 1.0))[0], fps=12)
    (path / "4.mp4").write_bytes((path / "4.mp4").read_bytes()[:300])
    return path


def test_a_folder_taken_in_groups_gives_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = folder(tmp_path / "in")
    settings: dict[str, Any] = {"min_frames": 5, "shard_clips": 4}
    one = extract_folder(videos, tmp_path / "one", SMALL, **settings)
    groups = extract_folder(videos, tmp_path / "groups", SMALL, together=3, **settings)
    assert store_bytes(tmp_path / "one") == store_bytes(tmp_path / "groups")
    assert one.rejected == groups.rejected
    assert sum(one.rejected.values()) == 2
    looked: list[int] = []
    original = ClipExtractor.extract_many

    def watch(self: ClipExtractor, asked: Sequence[Any]) -> list[ClipMotion]:
        looked.append(len(asked))
        return original(self, asked)

    monkeypatch.setattr(ClipExtractor, "extract_many", watch)
    monkeypatch.setattr(extract, "TOGETHER_FRAMES", 30)
    extract_folder(videos, tmp_path / "here", SMALL, together=7, workers=0, **settings)
    assert store_bytes(tmp_path / "one") == store_bytes(tmp_path / "here")
    assert looked == [3, 2]  # 12 + 10 + 26 frames, then the rest
    with pytest.raises(ConfigError, match="together=0"):
        extract_folder(videos, tmp_path / "no", SMALL, together=0)


def test_what_fails_together_is_done_alone_and_the_error_names_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the frames of all do not fit into a GPU."""
    videos = folder(tmp_path / "in")
    extract_folder(videos, tmp_path / "one", SMALL, min_frames=5)
    original = ClipExtractor.extract_many

    def narrow(self: ClipExtractor, asked: Sequence[Any]) -> list[ClipMotion]:
        if len(asked) > 1 or asked[0][1] == bad:
            raise LocalmotionError("out of GPU memory")
        return original(self, asked)

    bad = ""
    monkeypatch.setattr(ClipExtractor, "extract_many", narrow)
    extract_folder(videos, tmp_path / "narrow", SMALL, min_frames=5, together=4, workers=0)
    assert store_bytes(tmp_path / "one") == store_bytes(tmp_path / "narrow")
    bad = "5.mp4"
    with pytest.raises(LocalmotionError, match=r"in/5\.mp4: out of GPU memory"):
        extract_folder(videos, tmp_path / "bad", SMALL, min_frames=5, together=4, workers=0)
    bad = ""
    extract_folder(videos, tmp_path / "bad", SMALL, min_frames=5, workers=0)
    assert store_bytes(tmp_path / "one") == store_bytes(tmp_path / "bad")


def test_a_worker_that_dies_or_hangs_costs_one_video_of_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = f"hang {jump_when_hanging(monkeypatch, tmp_path)}"
    tasks = [Task(VideoRef(name, Path(name), "file")) for name in ("a", "segfault", "b", hangs)]
    found = {task.ref.id: message for task, message in results_of(act_on_tasks, tasks, 1, 1.0, 2)}
    assert {name: value.frames for name, value in found.items() if isinstance(value, VideoDone)} == {"a": 7, "b": 7}
    assert {name: value.reason for name, value in found.items() if isinstance(value, Lost)} == {
        "segfault": "decoder_crash",
        hangs: "decoder_timeout",
    }


@pytest.mark.parametrize(
    ("gpu", "workers", "asked", "together"),
    [(True, 2, None, 3), (True, 0, None, 7), (True, 9, None, 1), (False, 1, None, 1), (False, 2, 5, 5)],
)
def test_groups_leave_no_worker_without_videos(
    gpu: bool, workers: int, asked: int | None, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def results(call: Any, refs: Any, workers: int, timeout: float, together: int) -> Any:
        taken.append(together)
        yield from results_of(call, refs, 0, timeout, together)

    monkeypatch.setattr(extract, "works_on_gpu", lambda recipe: gpu)
    monkeypatch.setattr(extract, "results_of", results)
    extract_folder(folder(tmp_path / "in"), tmp_path / "out", SMALL, min_frames=5, workers=workers, together=asked)
    assert taken == [together]


def test_groups_are_for_networks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    neural = Recipe(flow="sea_raft")
    assert not works_on_gpu(neural) or torch.cuda.is_available()
    monkeypatch.setattr(_neural, "pick_device", lambda device: torch.device("cuda" if device == "auto" else device))
    assert works_on_gpu(neural)
    assert works_on_gpu(Recipe(segment="grounded_sam"))
    assert not works_on_gpu(Recipe())
    assert not works_on_gpu(Recipe(flow="sea_raft", backend_options={"sea_raft": {"device": "cpu"}}))
    assert not works_on_gpu(Recipe(flow="no such"))  # told where it is built
