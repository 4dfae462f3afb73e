"""Pure-video evaluation: several runs on the same windows, from stores and from videos, with scores by horizon."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from localmotion.cli import main
from localmotion.errors import CheckpointError, ConfigError, StoreError, VideoError
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.evaluation.predict import predict
from localmotion.perception.extract import extract_folder
from localmotion.recipe import Recipe
from localmotion.report import strips
from localmotion.runs import load
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain
from video_files import encode, moving_square


def pretrained(method: str, store: Path, out: Path, *texts: str) -> Path:
    flags = {"precision": "fp32", "device": "cpu", "data": str(store), "threads": 1}
    settings = ("pretrain.updates=2", "heldout_fraction=0.4", *texts)
    return pretrain(compose(method, "pretrain", preset="debug", flags=flags, settings=settings), out)


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: pretrained(name, store, folder / name) for name in ("drp", "ipv", "apv")}


def test_runs_stand_side_by_side_on_the_same_windows(runs: dict[str, Path], store: Path) -> None:
    together = predict(list(runs.values()), store, clips=3, windows=11, split="all")
    rows = ["drp: motion", "drp: zero_motion", "ipv: prior", "apv: prior", "last_frame"]
    assert list(together.pictures) == ["truth", *rows]
    assert list(together.scores) == rows
    alone = predict([runs["ipv"]], store, clips=3, windows=11, split="all")
    assert list(alone.pictures) == ["truth", "prior", "last_frame"]
    np.testing.assert_array_equal(alone.pictures["truth"], together.pictures["truth"])
    np.testing.assert_array_equal(alone.pictures["prior"], together.pictures["ipv: prior"])
    assert alone.scores["prior"] == together.scores["ipv: prior"]
    assert alone.scores["last_frame"] == together.scores["last_frame"]
    assert together.windows == 11
    assert all(len(together.scores[row][kind]) == together.length - 5 for row in rows for kind in ("psnr", "ssim"))


def test_scores_are_those_of_the_pictures(runs: dict[str, Path], store: Path) -> None:
    """PSNR by horizon, recomputed from the uint8 pictures of all windows."""
    found = predict([runs["drp"]], store, clips=9, windows=9, split="all")
    truth = found.pictures["truth"].astype(np.float64) / 255
    assert len({x.tobytes() for x in found.pictures["truth"]}) == 9  # no window twice
    for row in ("motion", "last_frame"):
        error = ((found.pictures[row] / 255.0 - truth)[:, found.context :] ** 2).mean((2, 3, 4))
        expected = np.minimum(-10 * np.log10(np.maximum(error, 1e-12)), 60).mean(0)
        np.testing.assert_allclose(found.scores[row]["psnr"], expected, atol=0.15)
    head, cells = found.table("psnr")
    assert head == ["", "1 ahead", "2 ahead", "3 ahead", "mean"]
    assert cells[-1][0] == "last_frame"
    assert float(cells[-1][-1]) == pytest.approx(np.mean(found.scores["last_frame"]["psnr"]), abs=0.006)


def test_videos_are_predicted_without_a_store(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for seed in range(3):
        encode(folder / f"{seed}.mp4", moving_square(20, seed=seed))
    (folder / "text.mp4").write_text("no video")
    (folder / "short.gif").write_bytes(encode(tmp_path / "short.gif", moving_square(3)).read_bytes())
    found = predict([runs["drp"], runs["ipv"]], folder, clips=8, windows=3)
    assert found.windows == 3
    assert {reason.split(": ")[0] for reason in found.rejected} == {"text.mp4", "short.gif"}
    assert found.pictures["truth"].shape == (3, 8, 64, 64, 3)
    one = predict([runs["drp"]], folder / "1.mp4", windows=4)
    assert one.windows == 4
    assert min(min(scores["psnr"]) for scores in one.scores.values()) > 3
    with pytest.raises(VideoError, match="none of 1 videos"):
        predict([runs["drp"]], folder / "text.mp4")


def test_the_command_draws_and_writes_scores(runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "strips.png"
    both = [str(runs["drp"]), str(runs["ipv"])]
    main(
        [
            "predict",
            "--checkpoint",
            *both,
            "--data",
            str(store),
            "--out",
            str(out),
            "--clips",
            "2",
            "--windows",
            "4",
            "--split",
            "all",
        ]
    )
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["windows"] == 4
    assert set(written["scores"]) == {"drp: motion", "drp: zero_motion", "ipv: prior", "last_frame"}


def test_a_part_without_clips_names_the_option(runs: dict[str, Path], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmotion.video.sample.is_heldout", lambda *_: False)
    with pytest.raises(StoreError, match="is in the heldout part; add clips, or score all clips with --split all"):
        predict([runs["drp"]], store, windows=2)


def test_a_picture_that_would_be_too_high_says_what_it_leaves_out(
    runs: dict[str, Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(strips, "HIGH", 1_700)
    command = ["predict", "--checkpoint", str(runs["ipv"]), "--data", str(store), "--windows", "4", "--split", "all", "--out"]
    heights = []
    for name, more in (("few.png", []), ("all.png", ["--clips", "4"])):
        main([*command, str(tmp_path / name), *more])
        said = " ".join(capsys.readouterr().out.split())
        left_out = "strips: 1 of 4 windows; with more the picture would be higher than 1,700 pixels; --clips 4 draws all"
        assert (left_out in said) == (not more)
        heights.append(cv2.imread(str(tmp_path / name)).shape[0])
    assert heights[0] <= 1_700 < heights[1]


def test_a_folder_without_videos_is_noticed_before_runs_are_loaded(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("localmotion.evaluation.predict.load_run", None)
    with pytest.raises(VideoError, match="empty"):
        predict([next(iter(runs.values()))], tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such run"):
        predict([tmp_path / "nowhere"], tmp_path / "empty")


def test_what_cannot_be_compared_is_refused(runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoints=0 must be at least 1"):
        predict([], store)
    # A run that says it saw every second frame cannot share windows with one that saw all.
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "environment.json"):
        (other / name).write_text((runs["ipv"] / name).read_text())
    (other / "checkpoints").symlink_to(runs["ipv"] / "checkpoints")
    environment = json.loads((other / "environment.json").read_text())
    environment["recipe"]["frame_stride"] = 2
    (other / "environment.json").write_text(json.dumps(environment))
    predict([runs["drp"], other], store, windows=2, split="all")  # one store: the same frames for all
    video = encode(tmp_path / "long.mp4", moving_square(30))
    with pytest.raises(ConfigError, match="make different clips"):
        predict([runs["drp"], other], video)


@pytest.mark.parametrize("method", ["drp", "ipv"])
def test_runs_on_larger_pictures_go_all_the_way(
    method: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of side 128: pre-training, prediction, fine-tuning and evaluation all work at that size; another size is told."""
    encode(tmp_path / "a.mp4", moving_square(20, 128, 128))
    encode(tmp_path / "b.mp4", moving_square(20, 128, 128, seed=1))
    large = tmp_path / "large"
    extract_folder(tmp_path, large, Recipe(size=128, percept_size=128, tracks=8), min_frames=8)
    pre = pretrained(method, large, tmp_path / "pre", "pretrain.batch_size=1", "pretrain.heldout_fraction=0")
    assert predict([pre], large, clips=1, windows=1, split="all").pictures["truth"].shape == (1, 8, 128, 128, 3)
    with pytest.raises(ConfigError, match="clips of side 64, but pre was pre-trained on 128"):
        predict([pre], store, split="all")
    flags = {"precision": "fp32", "device": "cpu", "checkpoint": str(pre), "threads": 1}
    few = ("env_steps=110", "prefill=60", "online.eval_every=1000")
    fine = finetune(compose(method, "finetune", preset="debug", env="toy:dot", flags=flags, settings=few), tmp_path / "fine")
    assert len(evaluate_run(fine, episodes=1)["returns"]) == 1
    monkeypatch.setattr(load, "check_env", lambda *_: pytest.fail("no environment is needed"))
    with pytest.raises(ConfigError, match="predicts from actions; give the pre-training run"):
        predict([fine], large)
