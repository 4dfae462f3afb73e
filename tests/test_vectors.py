"""Observations without pictures: the suites' own vectors, in environments, runs, films and collections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmotion.envs import make_env
from localmotion.envs.base import PixelEnv
from localmotion.errors import ConfigError
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.recording.collect import collect
from localmotion.runs.load import load_run
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune


def nothing_drawn(monkeypatch: pytest.MonkeyPatch, env: PixelEnv) -> None:
    def refuse(size: int) -> Any:
        raise AssertionError("a picture was drawn")

    monkeypatch.setattr(env, "_draw", refuse)


def test_dmc_vectors_are_dm_controls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    env: Any = make_env("dmc:walker_walk", observed="vectors")
    nothing_drawn(monkeypatch, env)
    first, _ = env.reset(seed=3)
    assert set(first) == {"vector"}
    assert first["vector"].shape == env.observation_space["vector"].shape == (24,)
    obs, *_ = env.step(np.full(6, 0.3, np.float32))
    assert env.observation_space.contains(obs)
    physics = env.physics
    own = np.concatenate([physics.orientations(), [physics.torso_height()], physics.velocity()])
    np.testing.assert_array_equal(obs["vector"], own.astype(np.float32))
    again, _ = env.reset(seed=3)
    np.testing.assert_array_equal(again["vector"], first["vector"])


@pytest.mark.parametrize(("name", "length"), [("metaworld:reach", 39), ("dmcr:cheetah_run", 17), ("toy:dot", 5)])
def test_both_are_shown_together(name: str, length: int) -> None:
    """Beside the vector stands the very picture that is shown without it."""
    both, plain = make_env(name, observed="both"), make_env(name)
    seen, pictures = both.reset(seed=1)[0], plain.reset(seed=1)[0]
    assert seen["vector"].shape == (length,)
    assert seen["vector"].dtype == np.float32
    np.testing.assert_array_equal(seen["image"], pictures["image"])
    assert both.observation_space.contains(seen)
    assert both.describe()["observed"] == "both"
    both.show("vectors")
    assert set(both.observation_space.spaces) == set(both.reset(seed=1)[0]) == {"vector"}
    both.show("pixels")
    assert both.observation_space == plain.observation_space
    np.testing.assert_array_equal(both.reset(seed=1)[0]["image"], pictures["image"])


def test_unknown_kinds_name_the_known() -> None:
    with pytest.raises(ConfigError, match="vectors"):
        make_env("toy:dot", observed="vector")  # type: ignore[arg-type]


@pytest.mark.parametrize("observed", ["vectors", "both"])
def test_a_run_on_vectors_goes_all_the_way(observed: str, tmp_path: Path) -> None:
    """It learns, resumes, is evaluated and filmed, and can be the policy of a collection of pictures."""
    flags = {"precision": "fp32", "device": "cpu", "threads": 1, "observed": observed}
    few = ("env_steps=130", "online.eval_every=1000", "online.prefill=60")
    run = compose("dreamer_v3", "train", preset="debug", env="toy:dot", flags=flags, settings=few)
    out = finetune(run, tmp_path / "run")
    kept = json.loads((out / "config.json").read_text())["model"]
    assert (kept["pixels"], kept["vector_dim"]) == (observed == "both", 5)
    finetune(run, out)  # the same settings: nothing left to do
    _, method, _ = load_run(out)
    names = {name for name, _ in method.named_parameters()}
    assert any("vector_encoder" in name for name in names)
    assert any("image" in name for name in names) == (observed == "both")
    result = evaluate_run(out, episodes=1, video=tmp_path / "film.mp4")
    assert len(result["returns"]) == 1
    assert (tmp_path / "film.mp4").stat().st_size > 500
    collect("toy:dot", tmp_path / "videos", policy=str(out), episodes=1, steps=5)
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1


def test_methods_of_pictures_refuse_vectors(tmp_path: Path) -> None:
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags={"observed": "vectors"})
    with pytest.raises(ConfigError, match="dreamer_v2 learns from pictures only; methods that take vectors: dreamer_v3"):
        finetune(run, tmp_path / "run")
