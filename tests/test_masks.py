"""Masks of the agent: the embedded backend, the array in stores, and damage done to masks on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import localmotion.perception.extract as extract_module
from localmotion.cli import main
from localmotion.envs import make_env
from localmotion.errors import ConfigError, StoreError
from localmotion.models.mask_corruption import dilate, drop, erode, grow, occlude
from localmotion.perception.base import MaskBackend, make_backend, mask_backend, recipe_backends
from localmotion.perception.clips import ClipExtractor
from localmotion.perception.draw import OUTLINE, inspect
from localmotion.perception.exact import ExactMask
from localmotion.perception.extract import extract_folder
from localmotion.perception.motion_mask import MotionMask
from localmotion.perception.trust import check_recipe
from localmotion.recipe import Recipe, read_recipe
from localmotion.recording.collect import collect
from localmotion.recording.logs import EpisodeSampler
from localmotion.video.bits import mask_layout, pack, unpack
from localmotion.video.store import ClipStore
from perception_scenes import scene, texture
from video_files import encode

PLAIN = Recipe(size=32, percept_size=64, tracks=4, redraw_rounds=0)
MASKED = replace(PLAIN, mask="motion")


def iou(found: np.ndarray, true: np.ndarray) -> float:
    return float((found & true).sum() / (found | true).sum())


def masks_of(frames: np.ndarray, size: int = 0, cuts: tuple[int, ...] = (), **options: Any) -> np.ndarray:
    """Masks of the embedded backend with the embedded flow, at the frames' size unless another is given."""
    flows = np.zeros((*frames.shape[:3], 2), np.float32)
    flows[1:] = make_backend("flow", "dis").flow(frames[:-1], frames[1:])
    flows[list(cuts)] = 0
    first = np.isin(np.arange(len(frames)), cuts)
    return MotionMask(**options).masks(frames, flows, first, size or frames.shape[1])


def half(masks: np.ndarray) -> np.ndarray:
    """Masks at half their size."""
    length, side, _ = masks.shape
    return masks.reshape(length, side // 2, 2, side // 2, 2).mean((2, 4)) > 0.5


# --------------------------------------------------------------------------------------------------- the embedded backend


def disc(moves: np.ndarray, ground: np.ndarray, colour: tuple[int, int, int] = (220, 40, 40)) -> tuple[Any, Any]:
    """A plain disc at (n, 2) places over a ground, one picture or n; frames and masks."""
    frames = np.broadcast_to(ground, (len(moves), *ground.shape[-3:])).copy(order="C")
    masks = np.zeros(frames.shape[:3], np.uint8)
    for frame, mask, (x, y) in zip(frames, masks, moves.round().astype(int).tolist(), strict=True):
        cv2.circle(frame, (x, y), 12, colour, -1)
        cv2.circle(mask, (x, y), 12, 1, -1)
    return frames, masks > 0


@pytest.mark.parametrize("camera", [0, 2], ids=["still", "panning"])
def test_motion_marks_what_moves_and_not_the_ground(camera: int) -> None:
    large = texture(3, 256) // 2
    ground = np.stack([large[:128, camera * t : camera * t + 128] for t in range(16)])
    frames, true = disc(np.stack([30 + 4.0 * np.arange(16), 60 + 10 * np.sin(np.arange(16))], 1), ground)
    found = masks_of(frames)
    assert found.shape == true.shape
    assert found.dtype == np.bool_
    assert min(iou(a, b) for a, b in zip(found, true, strict=True)) > 0.9
    assert iou(masks_of(frames, size=64), half(true)) > 0.85


@pytest.mark.parametrize(("camera", "floor"), [((0.0, 0.0), 0.7), ((1.5, -0.5), 0.55)], ids=["still", "panning"])
def test_motion_alone_tells_a_square_from_a_ground_of_the_same_colours(camera: tuple[float, float], floor: float) -> None:
    frames, true = scene(20, velocity=(3.0, 1.0), camera=camera)
    assert iou(masks_of(frames), true) > floor


def test_a_part_that_rests_for_most_of_the_clip_is_known_by_its_colour() -> None:
    """It is in the median of the frames, so that the background alone would hide it."""
    places = np.full((24, 2), 30.0)
    places[16:, 0] = 30 + 8 * np.arange(8)  # where it rested, the ground then differs from the median
    frames, true = disc(places, texture(3) // 3)
    found = masks_of(frames)
    assert min(iou(a, b) for a, b in zip(found, true, strict=True)) > 0.8


def test_a_floor_that_passes_under_a_still_sky_is_background() -> None:
    ground = np.full((128, 128, 3), (150, 180, 220), np.uint8)
    frames, true = disc(np.stack([30 + 2.0 * np.arange(20), 50 + 10 * np.sin(np.arange(20))], 1), ground)
    floor = texture(5, 256)[:32]
    for t, frame in enumerate(frames):
        frame[96:] = floor[:, 3 * t : 3 * t + 128]
    found = masks_of(frames)
    assert iou(found, true) > 0.8
    assert found[:, 98:].mean() < 0.02


def test_nothing_moves_nothing_is_marked() -> None:
    frames = np.repeat(texture(1)[None], 6, 0)
    assert not masks_of(frames).any()
    noisy = frames.astype(int) + np.random.default_rng(0).integers(-3, 4, frames.shape)
    assert not masks_of(noisy.clip(0, 255).astype(np.uint8)).any()


def test_masks_are_a_pure_function_of_frames_and_flow() -> None:
    frames, _ = scene(8)
    found = masks_of(frames, size=64)
    shifted = np.empty(frames.size + 1, np.uint8)[1:].reshape(frames.shape)  # another alignment in memory
    shifted[:] = frames
    np.testing.assert_array_equal(masks_of(shifted, size=64), found)
    assert isinstance(MotionMask(), MaskBackend)


def test_scenes_are_masked_by_themselves_and_very_short_ones_not_at_all() -> None:
    one, _ = scene(6, side=64)
    other = scene(7, velocity=(-2.0, 0.0), side=64)[0][:, ::-1, :, ::-1].copy()
    short = one[:2, :, ::-1].copy()
    both = masks_of(np.concatenate([one, other, short]), cuts=(6, 13))
    np.testing.assert_array_equal(both[:6], masks_of(one))
    np.testing.assert_array_equal(both[6:13], masks_of(other))
    assert both[:13].any()
    assert not both[13:].any()


def test_a_higher_tolerance_marks_no_faint_things() -> None:
    places = np.stack([30 + 3.0 * np.arange(12), np.full(12, 60.0)], 1)
    frames, true = disc(places, np.full((128, 128, 3), 100, np.uint8), (130, 130, 130))
    assert iou(masks_of(frames), true) > 0.8
    assert not masks_of(frames, tolerance=60.0).any()


def test_small_parts_and_holes_are_removed() -> None:
    places = np.stack([40 + 3.0 * np.arange(12), np.full(12, 60.0)], 1)
    frames, true = disc(places, np.full((128, 128, 3), 60, np.uint8))
    for t, frame in enumerate(frames):
        frame[100:103, 10 + 5 * t : 13 + 5 * t] = (220, 40, 40)
    found = masks_of(frames)
    assert not found[:, 95:].any()
    assert masks_of(frames, least_part=0.0)[:, 95:].any()
    assert iou(found, true) > 0.8


def test_masks_of_a_planar_walker_agree_with_the_simulator() -> None:
    env: Any = make_env("planar:walker_run", size=64, percept_size=64)
    truth = ExactMask(env, 64)
    frames = [env.reset(seed=0)[0]["image"]]
    truth.begin()
    rng = np.random.default_rng(0)
    for _ in range(24):
        frames.append(env.step(rng.uniform(-1, 1, 6).astype(np.float32))[0]["image"])
        truth.advance()
    assert iou(masks_of(np.stack(frames)), np.stack(truth.shown)) > 0.75


# ------------------------------------------------------------------------------------------------------------- in stores


@given(st.integers(1, 40), st.integers(0, 1000))
def test_packed_masks_come_back(size: int, seed: int) -> None:
    masks = np.random.default_rng(seed).random((3, size, size)) < 0.5
    packed = pack(masks)
    (dtype, shape) = mask_layout(size)["mask"]
    assert packed.dtype == np.dtype(dtype)
    assert packed.shape == (3, *shape)
    np.testing.assert_array_equal(unpack(packed, size), masks)


def test_the_first_column_is_in_the_highest_bit() -> None:
    mask = np.zeros((1, 1, 10), bool)
    mask[0, 0, [0, 9]] = True
    assert pack(mask).tolist() == [[[0b10000000, 0b01000000]]]


def test_recipes_without_masks_keep_their_hash() -> None:
    assert "mask" not in Recipe().to_json()
    assert Recipe().hash() == "74e855b42873"
    assert MASKED.to_json()["mask"] == "motion"
    assert MASKED.hash() != PLAIN.hash()
    assert Recipe.from_json(MASKED.to_json()) == MASKED
    assert Recipe.from_json(PLAIN.to_json()) == PLAIN
    old = {key: value for key, value in Recipe().to_json().items() if key != "algorithm"}
    assert Recipe.from_json(old).algorithm == 1
    assert not replace(PLAIN, mask="exact").exact


def test_a_recipe_names_its_mask_backend_and_its_options() -> None:
    assert mask_backend(PLAIN) is None
    check_recipe(PLAIN)
    check_recipe(MASKED)
    tuned = read_recipe({"mask": "motion", "backend_options": {"motion": {"tolerance": 20.0}}})
    assert tuned is not None
    assert mask_backend(tuned).tolerance == 20
    recipe_backends(tuned)
    with pytest.raises(ConfigError, match="mask backend 'moton'"):
        check_recipe(replace(PLAIN, mask="moton"))
    with pytest.raises(ConfigError, match="flow backend ''"):
        check_recipe(replace(PLAIN, flow=""))
    with pytest.raises(ConfigError, match="option of mask backend motion 'tolerence'"):
        mask_backend(replace(MASKED, backend_options={"motion": {"tolerence": 1.0}}))
    with pytest.raises(ConfigError, match="backend in backend_options 'motion'"):
        recipe_backends(replace(PLAIN, backend_options={"motion": {}}))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("a", "b", "c")):
        encode(folder / f"{name}.mp4", scene(9, velocity=(2.0 + number, 1.0), side=64)[0])
    return folder


def shards(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "shards").rglob("*")) if path.is_file()}


def test_extract_stores_a_bit_a_pixel(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [
        "--size",
        "32",
        "--percept-size",
        "64",
        "--tracks",
        "4",
        "--redraw-rounds",
        "0",
        "--workers",
        "0",
        "--min-frames",
        "5",
    ]
    main(["extract", str(videos), "--out", str(out), "--mask", "motion", *flags])
    store = ClipStore(out)
    store.verify()
    assert store.extra == {"mask": ("|u1", (32, 4))}
    assert store.recipe["mask"] == "motion"
    clip = store.clip(1)
    masks = unpack(clip.extra["mask"], 32)
    true = half(scene(9, velocity=(3.0, 1.0), side=64)[1])
    assert iou(masks, true) > 0.7
    assert clip.info["mask"] == {"area": round(float(masks.mean()), 4), "empty": 0}
    plain = tmp_path / "plain"
    main(["extract", str(videos), "--out", str(plain), *flags])
    assert not ClipStore(plain).extra
    for name in ("frames", "flow", "tracks", "visible"):
        np.testing.assert_array_equal(ClipStore(plain).clip(1).array(name), clip.array(name))
    with pytest.raises(StoreError, match="recipe"):
        extract_folder(videos, plain, MASKED, workers=0, min_frames=5)


def test_an_interrupted_extraction_ends_with_the_same_masks(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"workers": 0, "min_frames": 5, "shard_clips": 3}
    extract_folder(videos, tmp_path / "whole", MASKED, **options)
    read = extract_module._spans
    seen: list[str] = []

    def stop(ref: Any, *rest: Any) -> Any:
        seen.append(ref.id)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(ref, *rest)

    monkeypatch.setattr(extract_module, "_spans", stop)
    with pytest.raises(KeyboardInterrupt):
        extract_folder(videos, tmp_path / "parts", MASKED, **options)
    assert not (tmp_path / "parts" / "shards" / "00000").exists()
    extract_folder(videos, tmp_path / "parts", MASKED, **options)
    assert seen == ["a.mp4", "b.mp4", "c.mp4", "c.mp4"]
    whole, parts = shards(tmp_path / "whole"), shards(tmp_path / "parts")
    assert whole["shards/00000/mask.u8"] == parts["shards/00000/mask.u8"]
    assert any(whole["shards/00000/mask.u8"])


def test_videos_have_no_exact_masks(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["extract", str(videos), "--out", str(tmp_path / "out"), "--mask", "exact", "--workers", "0"])
    assert "use --mask motion" in " ".join(capsys.readouterr().err.split())


def test_the_backend_gets_the_flow_from_frame_to_frame() -> None:
    """Also if the recipe stores flow over several frames."""
    frames, _ = scene(6, side=64)
    frames = np.concatenate([frames, 255 - frames[:3]])
    given: list[tuple[Any, ...]] = []

    class Watched(MotionMask):
        def masks(self, *arguments: Any) -> np.ndarray:
            given.append(arguments)
            return super().masks(*arguments)

    for span in (1, 2):
        extractor = ClipExtractor(replace(MASKED, flow_span=span))
        extractor.mask = Watched()
        extractor.extract(frames, "clip")
    (_, flows, cuts, size), (_, same, *_) = given
    assert np.flatnonzero(cuts).tolist() == [6]
    assert size == 32
    assert not flows[[0, 6]].any()
    np.testing.assert_array_equal(flows, same)
    np.testing.assert_array_equal(flows[3], make_backend("flow", "dis").flow(frames[2:3], frames[3:4])[0])


# ------------------------------------------------------------------------------------------------------------ collecting


def collected(out: Path, env: str, recipe: Recipe) -> Any:
    collect(env, out, policy="random", episodes=1, steps=10, recipe=recipe)
    return ClipStore(out).clip(0)


def test_collect_stores_the_simulators_mask_or_a_perceived_one(tmp_path: Path) -> None:
    env = "planar:walker_run"
    plain = collected(tmp_path / "plain", env, PLAIN)
    exact = collected(tmp_path / "exact", env, replace(PLAIN, mask="exact"))
    np.testing.assert_array_equal(plain.extra["mask"], exact.extra["mask"])
    seen = collected(tmp_path / "seen", env, MASKED)
    assert 0.4 < iou(unpack(seen.extra["mask"], 32), unpack(plain.extra["mask"], 32)) < 1
    np.testing.assert_array_equal(seen.extra["action"], plain.extra["action"])
    moved = collected(tmp_path / "moved", env, MASKED.with_motion("exact"))
    np.testing.assert_array_equal(moved.extra["mask"], seen.extra["mask"])
    assert not np.array_equal(moved.flow, seen.flow)
    batch = EpisodeSampler(ClipStore(tmp_path / "seen"), 11, 1, 0, mask=True).batch(0)
    np.testing.assert_array_equal(batch["mask"][0].numpy(), unpack(seen.extra["mask"], 32))


def test_without_a_mask_of_the_agent_the_exact_one_is_what_can_move(tmp_path: Path) -> None:
    assert "mask" not in collected(tmp_path / "plain", "toy:block", PLAIN).extra
    found = unpack(collected(tmp_path / "exact", "toy:block", replace(PLAIN, mask="exact")).extra["mask"], 32)
    assert (found.sum((1, 2)) == found[0].sum()).all()
    assert 0.03 < found.mean() < 0.1
    assert (found[0] != found[-1]).any()


# --------------------------------------------------------------------------------------------------------------- drawing


def test_inspect_draws_the_outline(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    films: list[np.ndarray] = []
    monkeypatch.setattr("localmotion.perception.draw.write_video", lambda path, film, fps: films.append(film))
    marked = np.array(OUTLINE)
    for name, recipe in (("plain", PLAIN), ("masked", MASKED)):
        extract_folder(videos, tmp_path / name, recipe, workers=0, min_frames=5)
        inspect(ClipStore(tmp_path / name), tmp_path / "film.mp4", 1)
        inspect(ClipStore(tmp_path / name), tmp_path / f"{name}.png", 1)
    with_mask = [(film == marked).all(-1).any((1, 2)) for film in films]
    assert not with_mask[0].any()
    assert with_mask[1].all()
    pictures = [cv2.imread(str(tmp_path / f"{name}.png")) for name in ("plain", "masked")]
    counts = [int((np.abs(picture.astype(int) - marked[::-1]).max(-1) < 30).sum()) for picture in pictures]
    assert counts[1] > counts[0] + 100


# ------------------------------------------------------------------------------------------------------------ corruption


def blobs(seed: int = 0) -> torch.Tensor:
    """(2, 3, 20, 24) masks with parts at the edge."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.avg_pool2d(torch.rand(2, 3, 20, 24, generator=generator), 5, 1, 2) > 0.52


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_dilation_and_erosion_are_those_of_a_square(radius: int) -> None:
    mask = blobs()
    kernel = np.ones((2 * radius + 1,) * 2, np.uint8)
    flat = mask.flatten(0, 1).numpy().astype(np.uint8)
    for name, ours in (("dilate", dilate), ("erode", erode)):
        expected = np.stack([getattr(cv2, name)(one, kernel) for one in flat]) > 0
        np.testing.assert_array_equal(ours(mask, radius).flatten(0, 1).numpy(), expected)
    assert (erode(mask, radius) <= mask).all()
    torch.testing.assert_close(grow(mask, radius), dilate(mask, radius))
    torch.testing.assert_close(grow(mask, -radius), erode(mask, radius))
    full = torch.ones(4, 4, dtype=torch.bool)
    assert erode(full, radius).all()
    with pytest.raises(ValueError, match="radius"):
        erode(mask, -1)


def test_dropped_masks_are_full() -> None:
    mask = blobs().repeat(200, 1, 1, 1)
    lost = drop(mask, 0.3, seed=1)
    full = lost.all((-1, -2))
    assert 0.25 < full.float().mean() < 0.35
    torch.testing.assert_close(lost[~full], mask[~full])
    torch.testing.assert_close(drop(mask, 0.3, seed=1), lost)
    assert (drop(mask, 0.3, seed=2) != lost).any()
    assert drop(mask, 1.0, 0).all()
    torch.testing.assert_close(drop(mask, 0.0, 0), mask)
    with pytest.raises(ValueError, match="share"):
        drop(mask, 1.5, 0)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_an_occlusion_covers_a_share_of_the_agents_box(share: float) -> None:
    mask = torch.zeros(6, 3, 64, 64, dtype=torch.bool)
    mask[:5, :2, 10:40, 20:60] = True
    mask[:5, 2, 30:50, 20:60] = True
    image = torch.full((6, 3, 64, 64, 3), 9, dtype=torch.uint8)
    shown, left = occlude(image, mask, share, seed=3)
    covered = (shown == 0).all(-1)
    torch.testing.assert_close(covered[:, 0], covered[:, 2])
    assert not covered[5].any()
    box = covered[:5, 0, 10:50, 20:60]
    assert covered[:5, 0].sum() == box.sum()
    assert (box.float().mean((1, 2)) - share).abs().max() < 0.05
    torch.testing.assert_close(left, mask & ~covered)
    sides = {(int(one.any(1).sum()), int(one.any(0).sum())) for one in box}
    assert len(sides) > 1
    assert all(height * width == int(one.sum()) for (height, width), one in zip(map(_sides, box), box, strict=True))
    again = occlude(image, mask, share, seed=3)
    torch.testing.assert_close(again[0], shown)
    assert (occlude(image, mask, share, seed=4)[0] != shown).any()
    assert (image == 9).all()
    with pytest.raises(ValueError, match="share"):
        occlude(image, mask, -0.1, 0)


def _sides(box: torch.Tensor) -> tuple[int, int]:
    return int(box.any(1).sum()), int(box.any(0).sum())
