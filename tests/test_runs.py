"""Whole runs, in seconds: pre-train, fine-tune, evaluate, predict, report; resume gives the same run; bad input is told."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from localmotion import methods
from localmotion.cli import main
from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.errors import CheckpointError, ConfigError
from localmotion.evaluation.evaluate import evaluate_run, random_floor
from localmotion.evaluation.motion_media import motion_media
from localmotion.evaluation.predict import predict
from localmotion.report.build import report
from localmotion.runs import checkpoint
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain
from localmotion.training.update import Updater
from method_batches import make_batch

TOY = "toy:dot"
SHORT = ("env_steps=210", "prefill=60")


def settings(stage: str, *texts: str, **flags: str) -> RunConfig:
    """A debug run on one thread in fp32, so that runs can be compared bit by bit."""
    flags = {"precision": "fp32", "device": "cpu", **flags}
    return compose("drp", stage, preset="debug", env=flags.get("env", ""), flags=flags, settings=texts)  # type: ignore[arg-type]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.newest(run), "weights")


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured in seconds."""
    out = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(text)
        out.append({k: v for k, v in row.items() if k != "wall" and not k.startswith("seconds/") and k != "updates_per_second"})
    return out


@pytest.fixture(scope="module")
def pretrained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(settings("pretrain", "heldout_fraction=0.4", data=str(store)), tmp_path_factory.mktemp("pre") / "run")


def test_pretraining_writes_a_run_that_describes_itself(pretrained: Path) -> None:
    assert json.loads((pretrained / "status.json").read_text())["state"] == "finished"
    kinds = [row["kind"] for row in lines(pretrained)]
    assert kinds.count("pretrain") == 4
    assert kinds.count("heldout") == 2
    last = [row for row in lines(pretrained) if row["kind"] == "heldout"][-1]
    assert last["masked/ratio_best"] > 0
    assert len(last["psnr/motion_horizon"]) == 3
    environment = json.loads((pretrained / "environment.json").read_text())
    assert environment["versions"]["torch"] == version("torch")  # without "+cu130", which torch.__version__ has
    assert environment["recipe"]["percept_size"] == 64


class Interrupted:
    """Raises Ctrl-C at the n-th call of a function."""

    def __init__(self, function: Any, after: int) -> None:
        self.function, self.left = function, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


def test_interrupted_pretraining_resumes_to_the_same_run(
    store: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    run = settings("pretrain", "heldout_fraction=0.4", data=str(store))
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "learn", Interrupted(Updater.learn, 13))
        # a plain function is no method: bind the updater by hand
        interrupted = Updater.learn
        patch.setattr(Updater, "learn", lambda self, batch: interrupted(self, batch))
        with pytest.raises(KeyboardInterrupt):
            pretrain(run, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
    pretrain(run, tmp_path / "run")
    expected = weights(pretrained)
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name
    assert lines(tmp_path / "run") == lines(pretrained)


@pytest.fixture(scope="module")
def finetuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = settings("finetune", *SHORT, env=TOY, checkpoint=str(pretrained))
    return finetune(run, tmp_path_factory.mktemp("fine") / "run")


def test_finetuning_learns_from_the_checkpoint_and_is_reported(
    store: Path, pretrained: Path, finetuned: Path, tmp_path: Path
) -> None:
    rows = lines(finetuned)
    assert {row["kind"] for row in rows} == {"episode", "train", "eval"}
    assert rows[-1]["final"] is True
    assert rows[-1]["episodes"] == 10
    assert json.loads((finetuned / "config.json").read_text())["recipe"]["redraw_rounds"] == 0
    assert json.loads((finetuned / "environment.json").read_text())["recipe"]["percept_size"] == 64
    result = evaluate_run(finetuned, episodes=2, video=tmp_path / "film.mp4")
    assert len(result["returns"]) == 2
    assert (tmp_path / "film.mp4").stat().st_size > 1000
    assert result["policy"] == "agent"
    other = evaluate_run(finetuned, episodes=1, policy="random", env_options={"time_limit": 7})
    assert (other["length_mean"], other["env_options"]) == (7, {"time_limit": 7})
    assert "env_options" not in result
    with pytest.raises(ConfigError, match="split"):
        evaluate_run(finetuned, env_options={"split": "val"})
    random_floor(finetuned, episodes=2)
    found = predict([pretrained], store, clips=2, split="all")
    assert list(found.pictures) == ["truth", "motion", "zero_motion", "last_frame"]
    assert np.mean(found.scores["last_frame"]["psnr"]) > 5
    motion_media(pretrained, store, windows=32)
    with np.load(finetuned / "media" / "flow_downstream.npz") as kept:
        assert str(kept["name"]) == TOY
        assert kept["magnitudes"].max() > 1.0  # the dot moves by up to 3.4 pixels a step
    page = report([pretrained, finetuned], tmp_path / "report.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_interrupted_finetuning_resumes_to_the_same_weights(
    pretrained: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right after a checkpoint (taken at an episode's end), as after kill -9."""
    from localmotion.training.online import OnlineLoop

    run = settings("finetune", *SHORT, env=TOY, checkpoint=str(pretrained))
    saved = OnlineLoop.save
    calls = {"left": 2}

    def stop(self: Any, **_: Any) -> None:
        if calls["left"] == 0:
            raise SystemExit
        calls["left"] -= 1
        saved(self)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineLoop, "save", stop)
        with pytest.raises(SystemExit):
            finetune(run, tmp_path / "run")
    finetune(run, tmp_path / "run")
    expected = weights(finetuned)
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name


def test_checkpoint_of_another_kind_is_refused(pretrained: Path, finetuned: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a pre-training run"):
        finetune(settings("finetune", env=TOY, checkpoint=str(finetuned)), tmp_path / "a")
    with pytest.raises(CheckpointError, match="other shapes"):
        finetune(settings("finetune", "deter=64", env=TOY, checkpoint=str(pretrained)), tmp_path / "b")
    text = "was trained on pictures of 64 pixels, and this run's have 32; give a store made with --size 64, or a checkpoint"
    smaller = 'recipe={"size": 32, "percept_size": 32}'
    with pytest.raises(CheckpointError, match=text):
        finetune(settings("finetune", smaller, env=TOY, checkpoint=str(pretrained)), tmp_path / "f")
    with pytest.raises(CheckpointError, match="no such run"):
        finetune(settings("finetune", env=TOY, checkpoint=str(tmp_path / "nowhere")), tmp_path / "c")
    with pytest.raises(ConfigError, match="needs --checkpoint"):
        finetune(settings("finetune", env=TOY), tmp_path / "d")
    other = compose("dreamer_v2", "train", preset="debug", env=TOY, flags={"checkpoint": str(pretrained)})
    with pytest.raises(ConfigError, match="no pre-training stage"):
        finetune(other, tmp_path / "e")
    with pytest.raises(ConfigError, match="other settings"):
        finetune(settings("finetune", "entropy=0.1", *SHORT, env=TOY, checkpoint=str(pretrained)), finetuned)


def test_full_disk_keeps_the_previous_checkpoint(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"metrics_offset": 0}
    first = checkpoint.save(tmp_path, 1, tensors={"weights": {"a": torch.ones(3)}, "optimizer": {}}, state=state)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoint.save(tmp_path, 2, tensors={"weights": {"a": torch.zeros(3)}, "optimizer": {}}, state=state)
    assert checkpoint.complete(tmp_path) == [first]
    assert not list(tmp_path.glob(".*tmp"))


def test_damaged_checkpoints_are_named(pretrained: Path, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, tensors={"weights": {"a": torch.ones(300)}, "optimizer": {}}, state={})
    (path / "weights.safetensors").write_bytes((path / "weights.safetensors").read_bytes()[:50])
    with pytest.raises(CheckpointError, match="weights"):
        checkpoint.read(path, "weights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "{tmp}/nowhere"], "nowhere"),
        (["extract", "{tmp}/nowhere", "--out", "{tmp}/o"], "nowhere"),
        (["extract", "{tmp}", "--out", "{tmp}/o"], "no video found"),
        (["extract", "{tmp}", "--out", "{tmp}/o", "--sise", "64"], "--size"),
        (["pretrain", "--method", "drp", "--data", "{tmp}/nostore", "--run", "{tmp}/r"], "no clip store"),
        (["pretrain", "--method", "drp", "--preset", "smal", "--run", "{tmp}/r"], "small"),
        (["pretrain", "--method", "dpr", "--run", "{tmp}/r"], "drp"),
        (["pretrain", "--method", "drp", "--run", "{tmp}/r", "--keypiont", "3"], "keypoints"),
        (["pretrain", "--method", "drp", "--run", "{tmp}/r", "--set", "mask_ratio=lots"], "expected float"),
        (["train", "--method", "drp", "--env", "toy:dto", "--preset", "debug", "--run", "{tmp}/r"], "toy:dot"),
        (["train", "--method", "drp", "--preset", "debug", "--run", "{tmp}/r"], "--env"),
        (["evaluate", "{tmp}/norun"], "no such run"),
        (["report", "{tmp}/norun", "--out", "{tmp}/x.html"], "norun"),
        (["predict", "--checkpoint", "{tmp}/norun", "--data", "{tmp}", "--out", "{tmp}/x.png"], "no such run"),
        (["inspect", "{tmp}/nostore", "--out", "{tmp}/x.png"], "no clip store"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([a.replace("{tmp}", str(tmp_path)) for a in arguments])
    text = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert text.startswith("error: ")
    assert message in text
    assert len(text.splitlines()) == 1


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain", "--help"])
    text = capsys.readouterr().out
    assert "--model.dae.keypoints" in text
    assert "mask_ratio" in text


def test_commands_run_end_to_end(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["scan", str(videos), "--manifest", str(tmp_path / "manifest.jsonl")])
    main(["extract", str(videos), "--out", str(tmp_path / "s"), "--percept-size", "64", "--tracks", "4", "--workers", "1"])
    main(["inspect", str(tmp_path / "s"), "--out", str(tmp_path / "x.png")])
    text = capsys.readouterr().out
    assert "8 clips" in text
    assert "flow magnitude" in text
    assert (tmp_path / "manifest.jsonl").exists()
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("deferred", [False, True])
def test_pretraining_rate_falls_at_the_end_only(deferred: bool) -> None:
    run = compose("drp", "pretrain", preset="debug", settings=("updates=8", "lr_decay=0.5", "pretrain.lr=1e-4"))
    method = methods.get("drp")(run.model, image_size=64, action_dim=None)
    updater = Updater(method, run, Compute(torch.device("cpu"), False, 1, "test"), deferred=deferred)
    found = []
    for _ in range(8):
        updater.learn(make_batch())
        found.append(float(updater.optimisers["model"].param_groups[0]["lr"]))
    assert found == pytest.approx([1e-4] * 5 + [0.75e-4, 0.5e-4, 0.25e-4])


def test_a_run_goes_on_with_the_recipe_it_began_with(tmp_path: Path) -> None:
    """Also with one of before the foreground's gate, whatever today's default or its checkpoint's is."""
    from localmotion.perception import Recipe
    from localmotion.runs.settings import with_recipe

    run = compose("drp", "finetune", preset="debug", env="toy:dot", flags={"checkpoint": str(tmp_path / "pre")})
    old = {key: value for key, value in Recipe(tracks=7).to_json().items() if key != "algorithm"}
    (tmp_path / "pre").mkdir()
    (tmp_path / "pre" / "environment.json").write_text(json.dumps({"recipe": Recipe(tracks=9).to_json()}))
    assert with_recipe(run, tmp_path / "run").recipe == Recipe(tracks=9)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"recipe": old}))
    found = with_recipe(run, tmp_path / "run").recipe
    assert found
    assert (found.tracks, found.algorithm) == (7, 1)
