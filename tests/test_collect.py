"""Collecting videos: files and stores, experts, what is kept apart, and going on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from localmotion.acting.episodes import episode_seed
from localmotion.cli import main
from localmotion.envs import make_env
from localmotion.envs.metaworld import MT10
from localmotion.errors import CheckpointError, ConfigError
from localmotion.perception.extract import extract_folder
from localmotion.recipe import Recipe
from localmotion.recording import collect as module
from localmotion.recording.collect import collect
from localmotion.runs.rundir import claimed
from localmotion.video.bits import unpack
from localmotion.video.store import ClipStore

SMALL = Recipe(size=32, percept_size=32, tracks=8)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_files_show_what_the_actions_did(tmp_path: Path) -> None:
    """Replaying the kept actions from the kept seed gives the pictures of the file (but for the codec)."""
    found = collect("toy:dot", tmp_path, policy="random", episodes=2, seed=3, size=64, time_limit=12)
    assert [entry["frames"] for entry in found.episodes] == [13, 13]
    entry = found.episodes[1]
    assert entry["seed"] == episode_seed(3, "collect", 1)
    actions = np.load(tmp_path / "actions" / f"{entry['id']}.npy")
    assert actions.shape == (13, 2)
    assert not actions[0].any()
    env = make_env("toy:dot", size=64, time_limit=12)
    observed, total = [env.reset(seed=entry["seed"])[0]["image"]], 0.0
    for action in actions[1:]:
        picture, reward, *_ = env.step(action)
        observed.append(picture["image"])
        total += reward
    assert total == pytest.approx(entry["return"])
    shown = frames_of(tmp_path / f"{entry['id']}.mp4").astype(float)
    assert np.abs(shown - np.stack(observed)).mean() < 12
    assert np.abs(shown - np.stack(observed[::-1])).mean() > np.abs(shown - np.stack(observed)).mean()


@pytest.mark.parametrize("recipe", [None, Recipe(size=16, percept_size=32, tracks=4)])
def test_links_and_exact_flow_are_the_environments_in_pixels_of_the_stored_pictures(
    tmp_path: Path, recipe: Recipe | None
) -> None:
    found = collect("planar:hopper_hop", tmp_path, policy="random", episodes=1, steps=4, size=32, recipe=recipe)
    side = recipe.size if recipe else 32
    entry = found.episodes[0]
    actions, links, grid = (np.load(tmp_path / kind / f"{entry['id']}.npy") for kind in ("actions", "links", "exact_grid"))
    env: Any = make_env("planar:hopper_hop", size=32)
    env.reset(seed=entry["seed"])
    assert links.shape == (5, len(env.link_names), 3)
    assert grid.shape == (5, 8, 8, 2)
    assert {links.dtype, grid.dtype} == {np.dtype(np.float32)}
    assert not grid[0].any()
    for t in range(1, 5):
        env.step(actions[t])
        np.testing.assert_allclose(links[t], env.link_places(side), rtol=1e-6)
        mean = env.exact_flow().reshape(8, 4, 8, 4, 2).mean((1, 3)) * side / 32
        np.testing.assert_allclose(grid[t], mean, atol=1e-5)
    assert np.abs(grid).max() > 0.1
    kept = json.loads((tmp_path / "collection.json").read_text())
    assert kept["links"] == {"names": list(env.link_names), "size": side}


@pytest.mark.parametrize(
    ("env", "options"),
    [
        ("planar:reacher_easy", {"background": "leaky"}),
        ("planar:walker_run", {}),
        ("masklam:reacher_easy", {"motion": "leaky"}),
        ("masklam:reacher_easy", {"motion": "video"}),
    ],
)
def test_shifts_of_the_background_are_the_environments_in_pixels_of_the_stored_pictures(
    tmp_path: Path, env: str, options: dict[str, Any]
) -> None:
    recipe = Recipe(size=16, percept_size=32, tracks=4)
    found = collect(env, tmp_path, policy="random", episodes=1, steps=3, recipe=recipe, **options)
    entry = found.episodes[0]
    file = tmp_path / "background" / f"{entry['id']}.npy"
    if "leaky" not in options.values():  # nothing moves, or a video plays
        assert not file.exists()
        return
    actions, shifts = np.load(tmp_path / "actions" / f"{entry['id']}.npy"), np.load(file)
    made: Any = make_env(env, size=16, percept_size=32, **options)
    made.reset(seed=entry["seed"])
    backdrop = made.backdrop if env.startswith("masklam") else made._moving._backdrop
    for t, action in enumerate(actions):
        if t:
            made.step(action)
        np.testing.assert_allclose(shifts[t], backdrop.offset / 2, rtol=1e-6)
    assert shifts[3].any()
    made.close()


def test_colours_are_those_that_the_pictures_are_drawn_with(tmp_path: Path) -> None:
    """A scene painted with the kept colours, and all other materials in green, gives the stored pictures."""
    collect("diswm:reacher_easy", tmp_path, policy="random", episodes=1, steps=3, recipe=SMALL)
    kept = json.loads((tmp_path / "collection.json").read_text())
    entry, names = kept["episodes"][0], kept["colours"]["names"]
    colours, actions = (np.load(tmp_path / kind / f"{entry['id']}.npy") for kind in ("colours", "actions"))
    assert names == ["grid", "self", "effector", "decoration", "target"]
    assert colours.shape == (4, 5, 3)
    assert colours.dtype == np.float32
    stored = ClipStore(tmp_path).clip(0).frames
    env: Any = make_env("diswm:reacher_easy", size=32)
    env.reset(seed=entry["seed"])
    painted = env.physics.model.ptr.mat_rgba
    for t in range(4):
        if t:
            env.step(actions[t])
        now = painted[:, :3].copy()
        painted[:, :3] = (0, 1, 0)
        for name, colour in zip(names, colours[t], strict=True):
            painted[env.physics.model.ptr.material(name).id, :3] = colour
        np.testing.assert_array_equal(env._draw(32), stored[t])
        painted[:, :3] = now
    assert np.abs(np.diff(colours, axis=0)).min(0).max() > 0.01
    env.close()


def test_a_collection_of_an_earlier_version_goes_on_without_links(tmp_path: Path) -> None:
    settings: Any = {"policy": "random", "steps": 2, "size": 32}
    collect("planar:hopper_hop", tmp_path, episodes=1, **settings)
    for kind in ("links", "exact_grid"):
        shutil.rmtree(tmp_path / kind)
    assert collect("planar:hopper_hop", tmp_path, episodes=2, **settings).new == 1
    assert not (tmp_path / "links").exists()
    assert not (tmp_path / "exact_grid").exists()
    assert len(list((tmp_path / "velocities").iterdir())) == 2
    assert "links" not in json.loads((tmp_path / "collection.json").read_text())


def test_the_videos_can_be_extracted(tmp_path: Path) -> None:
    collect("toy:dot", tmp_path / "videos", policy="smooth", episodes=2, size=32)
    summary = extract_folder(tmp_path / "videos", tmp_path / "store", SMALL, min_frames=10)
    assert summary.clips == 2
    assert not summary.rejected


def test_store_is_what_extraction_of_the_same_frames_gives_and_can_be_extended(tmp_path: Path) -> None:
    from localmotion.perception.clips import ClipExtractor

    first = collect("toy:dot", tmp_path / "a", policy="smooth", episodes=1, steps=8, recipe=SMALL)
    again = collect("toy:dot", tmp_path / "a", policy="smooth", episodes=3, steps=8, recipe=SMALL)
    assert (first.new, again.new, len(again.episodes)) == (1, 2, 3)
    whole = collect("toy:dot", tmp_path / "b", policy="smooth", episodes=3, steps=8, recipe=SMALL)
    a, b = ClipStore(tmp_path / "a"), ClipStore(tmp_path / "b")
    assert not (tmp_path / "a" / "unfinished").exists()
    assert len(a) == len(b) == 3
    by_id = {a.clip(i).id: a.clip(i) for i in range(3)}
    for index in range(3):
        clip = b.clip(index)
        np.testing.assert_array_equal(clip.frames, by_id[clip.id].frames)
        np.testing.assert_array_equal(clip.tracks, by_id[clip.id].tracks)
    clip = b.clip(0)
    motion = ClipExtractor(SMALL).extract(np.ascontiguousarray(clip.frames), clip.id)
    np.testing.assert_array_equal(motion.flow, clip.flow)
    np.testing.assert_array_equal(motion.track_id, clip.track_id)
    assert [entry["id"] for entry in whole.episodes] == [entry["id"] for entry in again.episodes]


def test_an_interruption_costs_the_episode_in_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, played = module._Player.play, []

    def stops(self: module._Player, seed: int, number: int, steps: int, noise: float, attempt: int) -> object:
        if number == 2 and len(played) == 2:
            raise KeyboardInterrupt
        played.append(number)
        return original(self, seed, number, steps, noise, attempt)

    monkeypatch.setattr(module._Player, "play", stops)
    arguments = {"policy": "random", "episodes": 4, "steps": 6, "recipe": SMALL}
    with pytest.raises(KeyboardInterrupt):
        collect("toy:dot", tmp_path / "a", **arguments)
    played.append(-1)
    found = collect("toy:dot", tmp_path / "a", **arguments)
    assert played == [0, 1, -1, 2, 3]
    assert found.new == 2
    monkeypatch.undo()
    collect("toy:dot", tmp_path / "b", **arguments)
    for name in ("frames.u8", "flow.f16", "tracks.f32"):
        pair = [next((tmp_path / x / "shards").glob(f"*/{name}")).read_bytes() for x in "ab"]
        assert pair[0] == pair[1]


def test_expert_succeeds_where_random_does_not(tmp_path: Path) -> None:
    """Meta-World's own scripted policy, through our environment: reach is solved in well under 100 steps."""
    expert = collect("metaworld:reach", tmp_path / "e", policy="expert", episodes=2, steps=100, size=32, quality="fast")
    assert [entry["success"] for entry in expert.episodes] == [1.0, 1.0]
    other = collect("metaworld:reach", tmp_path / "r", policy="random", episodes=1, steps=60, size=32, quality="fast")
    assert other.episodes[0]["return"] / 60 < min(entry["return"] for entry in expert.episodes) / 100


@pytest.mark.slow
@pytest.mark.parametrize("task", MT10)
def test_videos_of_the_experts_of_mt10_have_masks_and_show_success(tmp_path: Path, task: str) -> None:
    options: Any = {"end_on_success": True, "quality": "fast"}
    found = collect(f"dmw:{task}", tmp_path, policy="expert", episodes=2, recipe=SMALL, **options)
    assert max(entry["success"] for entry in found.episodes) == 1.0
    assert min(entry["frames"] for entry in found.episodes) < 300
    mask = unpack(ClipStore(tmp_path).clip(0).extra["mask"], 32)
    assert (mask.mean(axis=(1, 2)) > 0.02).all()
    assert mask.mean() < 0.5


def test_errors_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no scripted expert"):
        collect("toy:dot", tmp_path, policy="expert")
    with pytest.raises(ConfigError, match="neither a run directory nor one of random, smooth, expert"):
        collect("toy:dot", tmp_path, policy="wise")
    with pytest.raises(ConfigError, match="episodes=0"):
        collect("toy:dot", tmp_path, episodes=0)
    with pytest.raises(ConfigError, match="action_repeat instead"):
        collect("toy:dot", tmp_path, recipe=Recipe(frame_stride=2))
    with pytest.raises(ConfigError, match="fps=15: a collected video has every agent step"):
        collect("toy:dot", tmp_path, recipe=Recipe(fps=15))
    collect("toy:dot", tmp_path / "x", episodes=1, steps=2, seed=1, size=32)
    with pytest.raises(ConfigError, match=r"was collected with env\.action_repeat 1, now 2; give a new folder"):
        collect("toy:dot", tmp_path / "x", episodes=1, steps=2, seed=1, size=32, action_repeat=2)
    with pytest.raises(ConfigError, match="was collected with seed 1, now 2; give a new folder"):
        collect("toy:dot", tmp_path / "x", episodes=1, steps=2, seed=2, size=32)


@pytest.mark.parametrize("recipe", [None, SMALL])
def test_a_second_process_on_one_collection_is_refused(tmp_path: Path, recipe: Recipe | None) -> None:
    collect("toy:dot", tmp_path, episodes=1, size=32, recipe=recipe, time_limit=12)
    with claimed(tmp_path), pytest.raises(CheckpointError, match="this collection is running already"):
        collect("toy:dot", tmp_path, episodes=2, size=32, recipe=recipe, time_limit=12)
    assert collect("toy:dot", tmp_path, episodes=2, size=32, recipe=recipe, time_limit=12).new == 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "s")
    main(
        ["collect", "toy:dot", "--out", out, "--store", "--size", "32", "--percept-size", "32", "--episodes", "2", "--steps", "5"]
    )
    assert "2 videos, 12 frames" in capsys.readouterr().out
    kept = json.loads((tmp_path / "s" / "collection.json").read_text())
    assert kept["settings"]["policy"] == "smooth"
    assert len(ClipStore(tmp_path / "s")) == 2
