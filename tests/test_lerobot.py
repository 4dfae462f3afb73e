"""LeRobot data sets as videos with actions. Those of tests/lerobot_data were written by the lerobot package itself."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lerobot_files import ACTION, CAMERAS, DATA, FPS, LENGTHS, TASKS, picture, read_picture, row
from localmotion.cli import main
from localmotion.errors import ConfigError, MissingExtraError, StoreError, VideoError
from localmotion.perception import extract_shards
from localmotion.perception.extract import extract_folder
from localmotion.recipe import Recipe
from localmotion.recording.logs import EpisodeSampler, action_dim
from localmotion.video.decode import iter_frames, probe
from localmotion.video.history import Limits
from localmotion.video.lerobot import ABOUT, commands, read_data_set
from localmotion.video.refs import Part, VideoRef
from localmotion.video.scan import scan
from localmotion.video.store import ClipStore
from video_files import encode

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed: pip install 'localmotion[lerobot]'"
)
RECIPE = Recipe(size=16, percept_size=32, tracks=4, redraw_rounds=0)


def names(frames: Any) -> list[tuple[int, int, int]]:
    return [read_picture(frame) for frame in frames]


def extracted(out: Path, data: Path = DATA / "v30", camera: str = CAMERAS[0], recipe: Recipe = RECIPE, **more: Any) -> ClipStore:
    extract_folder(Path(f"lerobot:{data}"), out, recipe, camera=camera, workers=0, **{"min_frames": 5, **more})
    return ClipStore(out)


def copied(tmp_path: Path, version: str = "v30") -> Path:
    return Path(shutil.copytree(DATA / version, tmp_path / version))


def change_info(data: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    info = json.loads((path := data / "meta/info.json").read_text())
    change(info)
    path.write_text(json.dumps(info))


def change_table(path: Path, column: str, change: Callable[[list[Any]], Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    change(values)
    pq.write_table(
        table.set_column(table.column_names.index(column), column, pa.array(values, table.schema.field(column).type)), path
    )


def faults(data: Path, camera: str = CAMERAS[0]) -> dict[str, str]:
    """Reasons of the rejected episodes, by id."""
    found = scan(Path(f"lerobot:{data}"), camera=camera, min_frames=5, workers=0)
    return {video.id: video.reason for video in found.rejected}


@pytest.mark.parametrize("camera", [0, 1])
@pytest.mark.parametrize("version", ["v21", "v30"])
def test_an_episode_has_its_own_frames_and_no_other(version: str, camera: int) -> None:
    data = read_data_set(f"lerobot:{DATA / version}", CAMERAS[camera])
    assert [ref.id for ref in data.refs] == ["episode_000000", "episode_000001", "episode_000002"]
    assert [ref.label for ref in data.refs] == [TASKS[0], TASKS[1], TASKS[0]]
    for episode, ref in enumerate(data.refs):
        assert names(iter_frames(ref, None)) == [(episode, frame, camera) for frame in range(LENGTHS[episode])]
        assert names(iter_frames(ref, 48, 3, start=1)) == [(episode, frame, camera) for frame in range(1, LENGTHS[episode], 3)]
        info = probe(ref)
        assert (info.frames, info.width, info.height, info.fps) == (LENGTHS[episode], 96, 64, FPS)


def test_pictures_in_the_table_are_read() -> None:
    data = read_data_set(DATA / "v30_images")  # the only camera needs no name
    assert data.camera == CAMERAS[0]
    for episode, ref in enumerate(data.refs):
        frames = list(iter_frames(ref, None))
        np.testing.assert_array_equal(frames, [picture(episode, frame, 0) for frame in range(LENGTHS[episode])])
        assert names(iter_frames(ref, 48, 4, max_frames=2)) == [(episode, 0, 0), (episode, 4, 0)]
        assert probe(ref).frames == LENGTHS[episode]
    assert faults(DATA / "v30_images", "") == {}


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_a_row_has_what_led_to_its_frame(version: str) -> None:
    """LeRobot's action t is the command given at frame t, so it belongs to frame t + 1."""
    data = read_data_set(DATA / version, CAMERAS[0])
    ranges = np.array(data.logged.action)
    np.testing.assert_array_equal(ranges, [(-4, 12), (0, 208), (7, 7)])
    for episode, ref in enumerate(data.refs):
        assert ref.rows
        found, table = ref.rows.read(1), [row(episode, frame) for frame in range(LENGTHS[episode])]
        assert {name: array.dtype.str for name, array in found.items()} == {
            name: dtype for name, (dtype, _) in data.logged.layout(1).items()
        }
        assert not found["action"][0].any()
        for t in range(1, LENGTHS[episode]):
            low, high = ranges.T
            np.testing.assert_allclose(
                (found["action"][t] + 1) / 2 * (high - low) + low, [*table[t - 1]["action"][:2], 7], rtol=1e-5
            )
        assert not found["action"][:, 2].any()  # the gripper never moves
        rewards = np.concatenate([line["next.reward"] for line in table])
        # There is no frame after the last one, so what the last command led to is kept with it.
        np.testing.assert_allclose(found["reward"], [0, *rewards[:-2], rewards[-2] + rewards[-1]])
        np.testing.assert_array_equal(found["is_terminal"], [0] * (LENGTHS[episode] - 1) + [1])
        np.testing.assert_array_equal(found["state"], [line["observation.state"] for line in table])


def test_with_a_stride_all_commands_between_two_kept_frames_are_kept() -> None:
    data = read_data_set(DATA / "v30", CAMERAS[0])
    rows = data.refs[1].rows
    assert rows
    one, three = rows.read(1), rows.read(3)  # 17 frames: 0, 3, ..., 15; the command at 16 led to no kept frame
    assert data.logged.layout(3)["action"] == ("<f4", (9,))
    assert three["action"].shape == (6, 9)
    for k in range(1, 6):
        np.testing.assert_array_equal(three["action"][k], one["action"][3 * k - 2 : 3 * k + 1].ravel())
        expected = sum(row(1, t)["next.reward"][0] for t in (range(3 * k - 3, 3 * k) if k < 5 else range(12, 17)))
        assert three["reward"][k] == pytest.approx(expected)
    np.testing.assert_array_equal(three["is_terminal"], [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(three["state"][:, 0], range(0, 17, 3))


def test_a_store_of_a_data_set_is_one_of_logged_episodes(tmp_path: Path) -> None:
    store = extracted(tmp_path / "store", max_frames=10)
    assert store.ids == ["episode_000000", "episode_000001", "episode_000001#000010-000017", "episode_000002"]
    assert store.labels[1:3] == [TASKS[1]] * 2
    assert store.lengths.tolist() == [12, 10, 7, 9]  # two frames are too few for a clip of their own
    assert action_dim(store) == len(ACTION)
    whole = read_data_set(DATA / "v30", CAMERAS[0]).refs[1].rows.read(1)  # type: ignore[union-attr]
    for name, array in whole.items():  # a later clip begins with what led to its first frame
        np.testing.assert_array_equal(np.concatenate([store.window(name, 1), store.window(name, 2)]), array)
    batch = EpisodeSampler(store, 6, 4, 0).batch(0)
    assert batch["action"].shape == (4, 6, 3)
    about = json.loads((tmp_path / "store" / ABOUT).read_text())
    assert (about["data_set"], about["camera"], about["fps"]) == ("v30", CAMERAS[0], FPS)
    given = commands(tmp_path / "store", store.window("action", 2))
    np.testing.assert_allclose(given[:, 0], [row(1, t)["action"] for t in range(9, 16)], atol=1e-4)
    np.testing.assert_array_equal(commands(tmp_path / "store", np.array([9, -9, 0])), [[12, 0, 7]])  # never beyond the data set


@pytest.mark.parametrize(("least", "most"), [(5, 8), (2, 4), (8, 8), (7, 10), (5, 300)])
def test_no_reward_and_no_end_of_an_episode_is_lost(tmp_path: Path, least: int, most: int) -> None:
    store = extracted(tmp_path / "store", min_frames=least, max_frames=most)
    refs = read_data_set(DATA / "v30", CAMERAS[0]).refs
    for ref, frames in zip(refs, LENGTHS, strict=True):
        mine = [at for at, name in enumerate(store.ids) if name.partition("#")[0] == ref.id]
        assert sum(store.lengths[mine]) == frames
        assert min(store.lengths[mine]) >= least
        for name, array in ref.rows.read(1).items():  # type: ignore[union-attr]
            np.testing.assert_array_equal(np.concatenate([store.window(name, at) for at in mine]), array)
    scan(Path(f"lerobot:{DATA / 'v30'}"), camera=CAMERAS[0], min_frames=least, workers=0).save(
        tmp_path / "m.jsonl", max_frames=most
    )
    extract_shards(tmp_path / "m.jsonl", tmp_path / "parts", RECIPE, 0, 1, workers=0)
    parts = ClipStore(tmp_path / "parts")
    assert (parts.ids, parts.lengths.tolist()) == (store.ids, store.lengths.tolist())


def test_the_goal_of_a_clip_is_the_end_of_its_episode(tmp_path: Path) -> None:
    store = extracted(tmp_path / "store", min_frames=5, max_frames=6)
    sampler = EpisodeSampler(store, 4, 32, 0, goal=True)
    batch, seen = sampler.batch(0), set()
    for image, goal in zip(batch["image"].numpy()[:, 0], batch["goal"].numpy(), strict=True):
        clip = next(at for at in range(len(store)) if (store.window("frames", at) == image).all((1, 2, 3)).any())
        last = max(at for at in range(len(store)) if store.videos[at] == store.videos[clip])
        assert (goal == store.window("frames", last)[-1]).all()
        seen.add(clip != last)
    assert seen == {False, True}


def test_episodes_that_lost_their_rest_are_extracted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as earlier versions cut them
        patch.setattr(Limits, "keep_rest", property(lambda self: False, lambda self, value: None), raising=False)
        assert extracted(tmp_path / "store", max_frames=10).lengths.tolist() == [10, 10, 7, 9]
    assert sorted(extracted(tmp_path / "store", max_frames=10).lengths.tolist()) == [7, 9, 10, 12]


def test_a_stride_cuts_actions_as_it_cuts_frames(tmp_path: Path) -> None:
    recipe = Recipe(size=16, percept_size=32, tracks=4, redraw_rounds=0, frame_stride=2)
    store = extracted(tmp_path / "store", recipe=recipe, min_frames=4)
    assert store.lengths.tolist() == [6, 9, 5]
    given = commands(tmp_path / "store", store.window("action", 0)[1:])
    assert given.shape == (5, 2, 3)
    np.testing.assert_allclose(given.reshape(10, 3), [row(0, t)["action"] for t in range(10)], atol=1e-4)
    with pytest.raises(ConfigError, match="fps=5: the data set has 10 frames a second; use frame_stride"):
        extracted(tmp_path / "other", recipe=Recipe(size=16, percept_size=32, fps=5))


def test_both_versions_give_the_same_store(tmp_path: Path) -> None:
    new, old = extracted(tmp_path / "new"), extracted(tmp_path / "old", DATA / "v21")
    assert new.ids == old.ids
    for name in (*new.extra, "frames"):
        for clip in range(len(new)):
            error = np.abs(new.window(name, clip).astype(float) - old.window(name, clip))
            assert error.max() == 0 if name != "frames" else error.mean() < 3  # two encoders


def test_a_store_keeps_its_camera(tmp_path: Path) -> None:
    extracted(tmp_path / "store")
    extracted(tmp_path / "store")
    with pytest.raises(StoreError, match=r"was extracted with camera observation.images.top, this data set has"):
        extracted(tmp_path / "store", camera=CAMERAS[1])
    data = copied(tmp_path)
    stats = json.loads((data / "meta/stats.json").read_text())
    stats["action"]["max"][0] = 20
    (data / "meta/stats.json").write_text(json.dumps(stats))
    with pytest.raises(StoreError, match="was extracted with action"):
        extracted(tmp_path / "store", data)


def test_changed_actions_are_extracted_again(tmp_path: Path) -> None:
    data = copied(tmp_path, "v21")
    extracted(tmp_path / "store", data)
    path = data / "data/chunk-000/episode_000002.parquet"
    change_table(path, "action", lambda rows: rows[3].__setitem__(0, 5))
    store = extracted(tmp_path / "store", data)
    (clip,) = (at for at, name in enumerate(store.ids) if name == "episode_000002")
    assert commands(tmp_path / "store", store.window("action", clip)[4])[0, 0] == 5


# ------------------------------------------------------------------------------------------------- parts of a video


def film(path: Path, frames: int, **options: Any) -> Path:
    """One video of many frames, whose pictures have their number; with pictures that are stored out of order, as H.264 does."""
    shown = np.stack([picture(t // 64, t % 64, 0) for t in range(frames)])
    return encode(path, shown, options={"bf": "3", "g": "30", "crf": "12"} | options)


def part(path: Path, start: float, frames: int, alone: bool = False) -> VideoRef:
    return VideoRef("part", path, "file", part=Part(start, frames, FPS, alone))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("long") / "long.mp4", 150)


@pytest.mark.parametrize(("first", "frames"), [(0, 1), (7, 20), (59, 3), (60, 64), (101, 49), (149, 1)])
def test_a_part_of_a_video_is_found_exactly(long: Path, first: int, frames: int) -> None:
    # Times are rounded in the metadata; less than half a frame makes no difference.
    for shift in (-0.03, 0, 0.03):
        found = names(iter_frames(part(long, first / FPS + shift, frames), None))
        assert found == [(t // 64, t % 64, 0) for t in range(first, first + frames)]


def test_frames_before_a_part_are_not_all_decoded(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[iter_frames.__module__]
    asked: list[int] = []
    real = module._decode_packet
    monkeypatch.setattr(module, "_decode_packet", lambda *given: asked.append(1) or real(*given))
    next(iter_frames(part(long, 14, 10), None))
    assert len(asked) < 80


def test_a_part_that_is_not_as_promised_is_rejected(long: Path, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"has 10 pictures from 14.0000 s on, its table 20 rows") as found:
        list(iter_frames(part(long, 14, 20), None))
    assert found.value.reason == "wrong_length"
    with pytest.raises(VideoError, match="more than the 140 pictures") as found:
        list(iter_frames(part(long, 0, 140, alone=True), None))
    assert found.value.reason == "wrong_length"
    times = [t + (t >= 8) for t in range(20)]
    gap = encode(tmp_path / "gap.mp4", np.stack([picture(0, t, 0) for t in range(20)]), times=times)
    with pytest.raises(VideoError, match=r"picture 8 of 15, at 0.8000 s, must be; the next is at 0.9000 s") as found:
        list(iter_frames(part(gap, 0, 15), None))
    assert found.value.reason == "odd_times"
    assert names(iter_frames(part(gap, 0, 8), None))[-1] == (0, 7, 0)


# ------------------------------------------------------------------------------------------------------- wrong data


def test_the_user_chooses_a_camera() -> None:
    with pytest.raises(
        ConfigError, match=r"has the cameras observation.images.side, observation.images.top; choose one with --camera"
    ):
        read_data_set(DATA / "v30")
    with pytest.raises(ConfigError, match=r"unknown camera 'top'; known: observation.images.side, obs"):
        read_data_set(DATA / "v30", "top")
    with pytest.raises(ConfigError, match="--camera top: only a LeRobot data set has cameras"):
        scan(DATA, camera="top", workers=0)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the folder of a LeRobot data set"):
        read_data_set(tmp_path)
    data = copied(tmp_path)
    for change, match in (
        (lambda info: info.update(codebase_version="v1.6"), r"is of version v1.6, read are v2.0, v2.1, v3.0"),
        (lambda info: info.update(codebase_version="v3.0", fps=0), "lacks features or fps"),
        (lambda info: info.update(fps=FPS, video_path="../{video_key}.mp4"), "is no path below the data set"),
        (lambda info: info.update(video_path="{video_key.__class__}.mp4"), "is no path below the data set"),
        (lambda info: info.update(video_path="/{video_key}.mp4"), "is no path below the data set"),
    ):
        change_info(data, change)
        with pytest.raises(ConfigError, match=match):
            read_data_set(data, CAMERAS[0])


def test_episodes_that_cannot_be_used_are_rejected_with_reasons(tmp_path: Path) -> None:
    data = copied(tmp_path, "v21")
    (data / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4").unlink()
    change_table(data / "data/chunk-000/episode_000001.parquet", "action", lambda rows: rows[2].__setitem__(1, 300))
    shutil.copy(data / "data/chunk-000/episode_000001.parquet", data / "data/chunk-000/episode_000002.parquet")
    assert faults(data) == {"episode_000000": "missing", "episode_000001": "bad_table", "episode_000002": "wrong_length"}
    with pytest.raises(VideoError, match="action 1 of frame 2 is 300; by the data set's statistics it is 0 to 208"):
        read_data_set(data, CAMERAS[0]).refs[1].rows.read(1)  # type: ignore[union-attr]
    with pytest.raises(VideoError, match=r"none of 3 videos is usable: 1 missing: .*1 bad_table: .*1 wrong_length: "):
        extracted(tmp_path / "store", data)


@pytest.mark.parametrize(
    ("column", "change", "reason"),
    [
        ("frame_index", lambda values: values.__setitem__(13, 0), "odd_times"),
        ("timestamp", lambda values: values.__setitem__(13, 0.35), "odd_times"),
        ("next.reward", lambda values: values.__setitem__(13, None), "bad_table"),
        ("observation.state", lambda values: values[13].__setitem__(0, float("nan")), "bad_table"),
        ("episode_index", lambda values: values.__setitem__(13, 2), "wrong_length"),
    ],
)
def test_a_table_that_does_not_fit_is_rejected(tmp_path: Path, column: str, change: Callable[[Any], Any], reason: str) -> None:
    data = copied(tmp_path)
    change_table(data / "data/chunk-000/file-000.parquet", column, change)  # row 13 is frame 1 of episode 1
    assert faults(data)["episode_000001"] == reason
    assert "episode_000000" not in faults(data)


def test_a_span_of_another_length_is_rejected(tmp_path: Path) -> None:
    data = copied(tmp_path)
    column = f"videos/{CAMERAS[0]}/to_timestamp"
    change_table(data / "meta/episodes/chunk-000/file-000.parquet", column, lambda values: values.__setitem__(1, 3.0))
    assert faults(data) == {"episode_000001": "wrong_length"}
    assert faults(data, CAMERAS[1]) == {}


def test_a_damaged_table_is_rejected(tmp_path: Path) -> None:
    data = copied(tmp_path, "v21")
    path = data / "data/chunk-000/episode_000001.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    assert faults(data) == {"episode_000001": "unreadable"}


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = copied(tmp_path)
    change_info(data, lambda info: info["features"].pop("next.reward"))
    change_info(data, lambda info: info["features"].pop("next.done"))
    change_info(data, lambda info: info["features"].pop("observation.state"))
    store = extracted(tmp_path / "store", data)
    assert set(store.extra) == {"action", "reward", "is_terminal"}
    assert not store.window("reward", 0).any()
    assert not store.window("is_terminal", 0).any()
    assert any("has no rewards (next.reward): zeros are stored" in note for note in read_data_set(data, CAMERAS[0]).notes)
    change_info(data, lambda info: info["features"]["action"].update(dtype="string"))
    change_info(data, lambda info: info.update(total_episodes=5))
    main(
        [
            "extract",
            f"lerobot:{data}",
            "--camera",
            CAMERAS[0],
            "--out",
            str(tmp_path / "plain"),
            "--min-frames",
            "5",
            "--workers",
            "0",
        ]
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "pictures only, without actions: its dtype is string" in said
    assert "promises 5 episodes, 3 are listed" in said
    assert not ClipStore(tmp_path / "plain").extra
    with pytest.raises(StoreError, match="knows no ranges of actions"):
        commands(tmp_path / "plain", np.zeros(3))


def test_statistics_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    data = copied(tmp_path)
    (data / "meta/stats.json").write_text('{"action": {"min": [0, 0], "max": [1, 1]}}')
    with pytest.raises(ConfigError, match="its statistics of action cannot be used"):
        read_data_set(data, CAMERAS[0])


def test_without_pyarrow_the_message_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"needs pyarrow.*pip install 'localmotion\[lerobot\]'"):
        read_data_set(DATA / "v30", CAMERAS[0])


def test_a_list_chooses_episodes(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("episode_000002\n")
    store = extracted(tmp_path / "store", list_file=tmp_path / "list.txt")
    assert store.ids == ["episode_000002"]


def test_behaviour_is_cloned_from_a_data_set_without_an_environment(tmp_path: Path) -> None:
    extracted(tmp_path / "store", recipe=Recipe(size=32, percept_size=32, tracks=4, redraw_rounds=0))
    common = ["--data", str(tmp_path / "store"), "--preset", "debug", "--threads", "1", "--device", "cpu"]
    run = tmp_path / "run"
    main(["decode", "--method", "bc", *common, "--run", str(run), "--set", "online.updates=2", "--set", "labels=0"])
    np.testing.assert_allclose(commands(run, np.ones(3)), [[12, 208, 7]])  # a run knows what its actions mean
