"""The perception report: its numbers are right where the answer is known, and the command runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from localmotion.cli import main
from localmotion.envs import make_env
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.perception.base import _REGISTRY
from localmotion.perception.dis import DISFlow
from localmotion.perception.stream import shrink_flow
from localmotion.perception_eval.agent_masks import read_set
from localmotion.perception_eval.report import (
    EMBEDDED,
    POLICIES,
    ReportSettings,
    build_tools,
    draw_clip,
    mask_rows,
    perception_report,
    record,
    save_report,
    score_env,
    tables,
)
from localmotion.perception_eval.scores import FlowScore, MaskScore, OverlapScore, SlotScore, TrackScore, stored
from localmotion.perception_eval.warps import WARPS, load_pictures, score_warps, warp_pair
from localmotion.video.write import write_video


def test_flow_numbers_of_a_known_error() -> None:
    score = FlowScore(ratio=2)
    true = np.zeros((8, 8, 2), np.float32)
    true[:, 4:, 0] = 4.0
    body = true[..., 0] > 0
    valid = np.ones((8, 8), bool)
    valid[0] = False
    found = true.copy()
    found[:, 4:, 1] += 3.0
    score.add(found, true, valid, body)
    numbers = score.numbers()
    assert numbers["percept"]["body"] == {
        "pixels": 28,
        "mean": 3.0,
        "median": 3.0,
        "outliers": 1.0,
        "still": 4.0,
        "explained": 0.4375,
    }
    assert numbers["percept"]["ground"]["mean"] == 0.0
    # Half the size, half the pixels of error; a block with an invalid pixel does not count.
    assert numbers["stored"]["body"] == {
        "pixels": 6,
        "mean": 1.5,
        "median": 1.5,
        "outliers": 1.0,
        "still": 2.0,
        "explained": 0.4375,
    }
    assert [b["pixels"] for b in numbers["bins"]] == [0, 0, 0, 0, 0, 0, 6, 0]


def test_stored_is_what_the_clip_store_keeps() -> None:
    flow = np.random.default_rng(0).normal(0, 3, (2, 16, 16, 2)).astype(np.float32)
    np.testing.assert_allclose(stored(flow, 2), shrink_flow(flow, 2), atol=2e-3)
    np.testing.assert_array_equal(stored(flow, 1), flow)


def test_masks_tracks_and_slots_of_known_answers() -> None:
    mask, weight = np.zeros((8, 8), bool), np.zeros((8, 8), np.float32)
    mask[:4], weight[2:6] = True, 0.5
    masks = MaskScore()
    masks.add(weight, {"body": mask})
    masks.add(np.zeros((8, 8), np.float32), {"body": mask})  # nothing found: no share, an empty intersection
    assert masks.numbers() == {"body": {"iou": 0.2, "share": 0.5, "area": 0.5}}

    true = np.zeros((2, 4, 2), np.float32)
    true[1, :, 0] = 4.0
    found = true + np.array([[[0, 0]], [[0, 1]]], np.float32)
    found[1, 0, 1] = 6.0
    tracks = TrackScore(ratio=2)
    tracks.add(found, np.array([[1, 1, 1, 1], [1, 1, 0, 1]], bool), true, np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool))
    assert tracks.numbers() == {
        "1": {"points": 3, "kept": 0.6667, "error": 1.75, "right": 0.3333, "ghosts": 1.0, "moved": 2.0},
    }

    slots = SlotScore()
    motion = np.full((8, 8, 2), 1.0, np.float32)
    points = np.array([[1, 1], [6, 1], [1, 6], [3, 3]], np.float32)
    slots.add(points, np.array([True, True, True, False]), 0.5 * motion, motion, np.ones((8, 8), bool), mask)
    numbers = slots.numbers()
    assert (numbers["used"], numbers["body"], numbers["explained"]) == (0.75, 0.6667, 0.75)


class Oracle:
    """A flow backend that knows the answer, or its opposite."""

    uses_motion, causal, name = True, True, "oracle"

    def __init__(self, answers: list[np.ndarray], sign: float = 1.0) -> None:
        self.answers, self.sign = answers, sign

    def flow(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return self.sign * np.stack(self.answers[: len(first)])


def test_a_backend_that_knows_the_truth_is_scored_as_perfect() -> None:
    env = make_env("toy:moving_background", size=32, percept_size=64)
    settings = ReportSettings(size=32, percepts=(64,), frames=5, episodes=1)
    clip = record(env, 5, settings.seed, "random")
    answers = [clip.truth.flow(a, b)[0] for a, b in zip(clip.snapshots[:-1], clip.snapshots[1:], strict=True)]
    tools = build_tools(("embedded",))[0]
    tools["flow"] = {"oracle": Oracle(answers), "wrong": Oracle(answers, -1.0), **tools["flow"]}
    flow = score_env(env, tools, settings)["flow"]
    assert flow["oracle"]["stored"]["all"]["mean"] < 1e-5
    assert flow["oracle"]["percept"]["body"]["explained"] == 1.0
    assert flow["wrong"]["percept"]["all"]["explained"] == pytest.approx(-3.0, abs=1e-3)
    assert flow["oracle"]["stored"]["all"]["mean"] < flow["dis"]["stored"]["all"]["mean"] < flow["wrong"]["stored"]["all"]["mean"]


@pytest.mark.parametrize(("kind", "amount"), [("shift", 3.0), ("turn", 6.0), ("zoom", 1.08)])
def test_warped_pairs_move_as_they_say(kind: str, amount: float) -> None:
    picture = load_pictures(None, count=1)[0]
    first, second, flow, valid = warp_pair(picture, 64, kind, amount, direction=0.5)
    ys, xs = np.indices((64, 64), np.float32)
    back = cv2.remap(second, xs + flow[..., 0], ys + flow[..., 1], cv2.INTER_CUBIC).astype(float)
    still, warped = np.abs(second.astype(float) - first)[valid].mean(), np.abs(back - first)[valid].mean()
    assert warped < (0.35 if kind == "zoom" else 0.2) * still  # zooming also changes sharpness
    assert 0.8 < valid.mean() < 1.0 or kind == "zoom"
    if kind == "shift":
        np.testing.assert_allclose(flow[5, 5], 3.0 * np.array([np.cos(0.5), np.sin(0.5)]), rtol=1e-5)
    if kind == "turn":
        assert np.linalg.norm(flow, axis=-1).max() == pytest.approx(2 * np.sin(np.radians(3)) * np.hypot(31.5, 31.5), rel=1e-3)


def test_numbers_of_warps_are_in_pixels_of_the_stored_picture() -> None:
    tools = build_tools(("dis",))[0]
    pictures = load_pictures(None, count=2)
    scores = [score_warps(pictures, tools, percept, 64, seed=0) for percept in (64, 128)]
    for score in scores:
        assert list(score) == list(WARPS)
        part = score["shift 1"]["flow"]["dis"]["stored"]["all"]
        assert part["still"] == pytest.approx(1.0, abs=1e-3)
        assert part["mean"] < 0.2
        assert score["shift 1"]["track"]["lk"]["1"]["error"] < 0.2
        assert score["shift 4"]["flow"]["dis"]["stored"]["all"]["explained"] > 0.95


def test_pictures_come_from_videos(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=12)
    pictures = load_pictures(tmp_path, count=2, side=96)
    assert [p.shape for p in pictures] == [(96, 96, 3)] * 2
    assert np.abs(pictures[0].astype(float) - pictures[1]).mean() > 10
    with pytest.raises(LocalmotionError, match="no such folder"):
        load_pictures(tmp_path / "none")


def test_recording_is_a_function_of_the_seed() -> None:
    env = make_env("toy:dot", percept_size=64)
    first, other, again = (record(env, 4, seed, "smooth") for seed in (1, 2, 1))
    np.testing.assert_array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)
    assert len(record(make_env("toy:dot", time_limit=3), 10, 0, "random").frames) == 4
    steps = np.stack([a for a, _ in zip(POLICIES["smooth"](np.random.default_rng(0), 2), range(200), strict=False)])
    assert np.abs(steps).max() <= 1.0
    assert (
        np.abs(np.diff(steps, axis=0)).mean()
        < 0.6 * np.abs(np.diff(np.random.default_rng(0).uniform(-1, 1, (200, 2)), axis=0)).mean()
    )


def test_backends_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {kind: list(found) for kind, found in build_tools(("embedded",))[0].items()} == {
        "flow": ["dis"],
        "segment": ["saliency"],
        "track": ["lk"],
        "mask": ["motion"],
    }
    with pytest.raises(ConfigError, match="dis"):
        build_tools(("diss",))
    made: Any = SimpleNamespace(name="made")

    def make(kind: str, name: str) -> Any:
        if name in ("dis", "saliency", "lk", "motion"):
            return made
        raise LocalmotionError(f"{name} is not installed")

    monkeypatch.setattr("localmotion.perception_eval.report.make_backend", make)
    tools, skipped = build_tools(("all",))
    assert list(tools["flow"]) == ["dis"]
    assert any(line.startswith("sea_raft: sea_raft is not installed") for line in skipped)
    with pytest.raises(LocalmotionError, match="sea_raft is not installed"):
        build_tools(("embedded", "sea_raft"))


def test_overlap_of_known_masks() -> None:
    score = OverlapScore()
    true, found = np.zeros((3, 4, 4), bool), np.zeros((3, 4, 4), bool)
    true[0, :2] = True  # 8 pixels, 4 of them found
    true[1, 0, :2] = True  # found exactly
    found[0, 0] = found[0, 3] = True
    found[1, 0, :2] = found[2, 1, 1] = True
    score.add(found[:2], true[:2])
    score.add(found[2:], true[2:])
    expected = {"iou": 6 / 15, "frames": (4 / 12 + 1) / 2, "precision": 6 / 11, "recall": 0.6, "found": 11 / 48, "area": 10 / 48}
    assert score.numbers() == pytest.approx(expected, rel=1e-3)
    nothing = OverlapScore()
    nothing.add(found[2:] & False, true[2:])
    assert nothing.numbers()["area"] == 0
    assert np.isnan(nothing.numbers()["frames"])


class Everything:
    """A mask backend that marks all pixels, and remembers the flow."""

    def masks(self, frames: Any, flows: Any, cuts: Any, size: int) -> Any:
        self.flows = flows
        return np.ones((len(frames), size, size), bool)


def test_masks_are_scored_in_environments_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmotion.perception_eval.report.MASK_ENVS", (("planar:walker_run", {"background": "independent"}),))
    backend = Everything()
    monkeypatch.setitem(EMBEDDED, "mask", "motion")
    monkeypatch.setattr("localmotion.perception.base._REGISTRY", {**_REGISTRY, ("mask", "motion"): lambda: backend})
    tools, _ = build_tools(("embedded",))
    (row,) = mask_rows(ReportSettings(percepts=(64,), frames=3, episodes=2, policy="smooth"), tools)
    numbers = row["mask"]["motion"]
    assert (row["env"], row["options"]) == ("planar:walker_run", {"background": "independent"})
    assert (numbers["found"], numbers["recall"]) == (1, 1)
    assert numbers["iou"] == numbers["precision"] == numbers["area"]
    assert 0.02 < numbers["area"] < 0.1
    assert not backend.flows[0].any()
    assert np.abs(backend.flows[1:]).mean((1, 2, 3)).min() > 0.1  # the whole background moves


def davis(root: Path, frames: str = "JPEGImages/480p", masks: str = "Annotations/480p") -> Path:
    """A data set of one video, whose object is the right half of the picture."""
    shown, marked = root / frames / "dog", root / masks / "dog"
    shown.mkdir(parents=True)
    marked.mkdir(parents=True)
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 2
    for t in range(4):
        cv2.imwrite(str(shown / f"{t:05d}.jpg"), np.full((30, 40, 3), (0, 0, 250), np.uint8))
        cv2.imwrite(str(marked / f"{t:05d}.png"), mask)
    (marked.parent / "alone").mkdir()
    return marked.parent


def test_masks_of_a_data_set_are_read_with_the_frames_beside(tmp_path: Path) -> None:
    masks = davis(tmp_path / "a")
    ((name, clip),) = read_set(masks, 32, 16)
    assert name == "dog"
    assert clip.frames.shape == (4, 32, 32, 3)
    assert clip.frames[0, 0, 0].argmax() == 0  # red, not blue
    np.testing.assert_array_equal(clip.masks, np.broadcast_to(np.arange(16) >= 8, (4, 16, 16)))
    plain = davis(tmp_path / "b", "frames", "masks")
    assert len(list(read_set(plain, 32, 16))) == 1
    (plain / "dog" / "00003.png").unlink()
    (tmp_path / "b" / "frames" / "dog" / "00001.jpg").unlink()
    assert len(next(read_set(plain, 32, 16))[1].masks) == 2
    settings = ReportSettings(envs=("toy:dot",), percepts=(64,), frames=3, episodes=1, masks=masks)
    rows = list(mask_rows(settings, {"flow": {"dis": DISFlow()}, "mask": {"all": Everything()}}))
    assert [row["env"] for row in rows] == ["toy:dot", "dog"]
    assert rows[1]["mask"]["all"]["precision"] == 0.5


def test_data_sets_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    masks = davis(tmp_path / "a")
    (masks / "dog" / "00001.png").write_text("not a picture")
    with pytest.raises(LocalmotionError, match=r"00001\.png: cannot be read"):
        list(read_set(masks, 32, 16))
    with pytest.raises(ConfigError, match="is not a folder"):
        list(read_set(tmp_path / "absent", 32, 16))
    with pytest.raises(ConfigError, match="no frames beside"):
        list(read_set(davis(tmp_path / "b", "elsewhere", "masks"), 32, 16))
    with pytest.raises(ConfigError, match="no video has two masks"):
        list(read_set(tmp_path / "a" / "Annotations", 32, 16))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "rndom"}, "random"),
        ({"frames": 2}, "frames=2"),
        ({"percepts": (100,)}, "multiple of size"),
        ({"episodes": 0}, "episodes=0"),
    ],
)
def test_impossible_settings_are_errors(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ReportSettings(**changes)


def test_the_command_prints_tables_and_writes_numbers_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, drawn = tmp_path / "sub" / "report.json", tmp_path / "drawn"
    command = ["perception-report", "--env", "toy:moving_background", "--env", "dmc:cartpole_swingup", "--percept", "64"]
    main([*command, "--frames", "7", "--episodes", "1", "--out", str(out), "--draw", str(drawn)])
    printed = capsys.readouterr().out
    assert "Flow on the moving body" in printed
    assert "dmc:cartpole_swingup" in printed
    result = json.loads(out.read_text())
    assert [(row["env"], row["quality"], row["percept"]) for row in result["rows"]] == [
        ("toy:moving_background", "exact", 64),
        ("dmc:cartpole_swingup", "fast", 64),
    ]
    for row in result["rows"]:
        assert row["flow"]["dis"]["stored"]["body"]["pixels"] > 50
        assert set(row["track"]["lk"]) == {"1", "5"}
        assert 0 <= row["slots"]["used"] <= 1
    assert [(row["env"], row["percept"]) for row in result["masks"]] == [
        ("toy:moving_background", 64),
        ("dmc:cartpole_swingup", 64),
    ]
    assert set(result["masks"][0]["mask"]["motion"]) == {"iou", "frames", "precision", "recall", "found", "area"}
    assert "Masks of the agent" in printed
    assert len(result["warps"][0]["warps"]) == len(WARPS)
    assert {title for title, _, _ in tables(result)} == {title for title, _, _ in tables(json.loads(json.dumps(result)))}
    pictures = sorted(drawn.glob("*.png"))
    assert [p.name for p in pictures] == ["dmc_cartpole_swingup_fast_64.png", "toy_moving_background_exact_64.png"]
    assert cv2.imread(str(pictures[0])).shape == (4 * 256, 5 * 256, 3)


def test_errors_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["perception-report", "--env", "dmc:walker_wlak"])
    assert left.value.code == 2
    assert "dmc:walker_walk" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(LocalmotionError, match="give another --out"):
        save_report({}, blocked / "report.json")


def test_sheets_show_frame_truth_found_error_and_validity() -> None:
    clip = record(make_env("toy:dot", percept_size=64), 4, 0, "random")
    answers = [clip.truth.flow(a, b)[0] for a, b in zip(clip.snapshots[:-1], clip.snapshots[1:], strict=True)]
    sheet = draw_clip(clip, Oracle(answers), [0], scale=1)
    assert sheet.shape == (64, 5 * 64, 3)
    np.testing.assert_array_equal(sheet[:, :64], clip.frames[0])
    np.testing.assert_array_equal(sheet[:, 64:128], sheet[:, 128:192])
    assert (sheet[:, 192:256] == 255).all()


def test_reports_of_one_seed_agree() -> None:
    settings = ReportSettings(envs=("toy:dot",), percepts=(64,), frames=4, episodes=1)
    reports = [perception_report(settings) for _ in range(2)]
    for report in reports:
        report["seconds"] = report["rows"][0]["flow"]["dis"]["ms"] = 0
        for warp in report["warps"][0]["warps"].values():
            warp["flow"]["dis"]["ms"] = 0
    assert reports[0] == reports[1]
