"""What evaluates, records or measures gives the same numbers for the same seed, and leaves the caller's generators alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from localmotion import methods
from localmotion.config import to_dict
from localmotion.errors import CheckpointError, ConfigError
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.evaluation.motion_media import motion_media
from localmotion.evaluation.predict import predict
from localmotion.evaluation.probes import probe
from localmotion.methods.base import MOTION
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs import checkpoint
from localmotion.runs.load import load_run
from localmotion.runs.rundir import RunDir, write_json
from localmotion.runs.settings import compose
from method_batches import AGENTS, make_batch

RECIPE = Recipe(percept_size=64, redraw_rounds=1, tracks=8)
TIME_LIMIT = 6


def untrained(name: str, stage: Any, path: Path) -> Path:
    """A run with fresh weights, as if it had trained."""
    cls = methods.get(name)
    run = compose(name, stage, preset="debug", env="" if stage == "pretrain" else "toy:dot", settings=("precision=fp32",))
    if stage != "pretrain":
        run = replace(run, recipe=RECIPE if bool(cls.wants & MOTION) else None, env_options={"time_limit": TIME_LIMIT})
    RunDir(path, run)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = cls(run.model, image_size=64, action_dim=None if stage == "pretrain" else 2)
    write_json(path / "environment.json", {"device": "cpu", "precision": "fp32", "recipe": RECIPE.to_json()})
    state = {"stage": stage, "metrics_offset": 0, **({} if stage == "pretrain" else {"action_dim": 2})}
    checkpoint.save(path / "checkpoints", 1, tensors={"weights": method.state_dict(), "optimizer": {}}, state=state)
    assert to_dict(load_run(path, device="cpu")[0])["method"] == name
    return path


def twice(call: Callable[[], Any]) -> tuple[Any, Any]:
    """Two results of a call with other states of the generators before it, which must be left as they were."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
        found.append(call())
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]
    return found[0], found[1]


@pytest.mark.parametrize("name", AGENTS)
def test_an_evaluation_of_one_seed_is_one_result(name: str, tmp_path: Path) -> None:
    run = untrained(name, "train", tmp_path / "run")
    first, second = twice(lambda: evaluate_run(run, episodes=6, seed=5, device="cpu"))
    assert first == second
    assert first["length_mean"] == TIME_LIMIT
    assert evaluate_run(run, episodes=6, seed=6, device="cpu")["returns"] != first["returns"]
    assert evaluate_run(run, episodes=5, seed=5, device="cpu")["returns"] == first["returns"][:5]


def test_a_collection_of_an_agent_is_one_result(tmp_path: Path) -> None:
    run = untrained("dreamer_v2", "train", tmp_path / "run")
    places = iter("ab")

    def record() -> list[dict[str, Any]]:
        return collect("toy:dot", tmp_path / next(places), policy=str(run), episodes=2, action_repeat=1, time_limit=5).episodes

    first, second = twice(record)
    assert first == second
    assert [episode["frames"] for episode in first] == [6, 6]
    for name in ("actions", "velocities"):
        for path in (tmp_path / "a" / name).glob("*.npy"):
            np.testing.assert_array_equal(np.load(path), np.load(tmp_path / "b" / name / path.name))


@pytest.mark.parametrize("name", [name for name in AGENTS if "pretrain" in methods.get(name).stages])
def test_a_prediction_of_one_seed_is_one_result(name: str, store: Path, tmp_path: Path) -> None:
    run = untrained(name, "pretrain", tmp_path / "run")
    first, second = twice(lambda: predict([run], store, clips=1, windows=2, split="all", device="cpu"))
    assert first.scores == second.scores
    for row, pictures in first.pictures.items():
        np.testing.assert_array_equal(pictures, second.pictures[row])


def test_measures_of_a_sampled_code_are_one_result(store: Path, tmp_path: Path) -> None:
    run = untrained("ipv", "pretrain", tmp_path / "run")

    def embed() -> Any:
        motion_media(run, store, windows=32)
        with np.load(run / "media" / "embedding_motion.npz") as found:
            return found["xy"].copy()

    first, second = twice(embed)
    np.testing.assert_array_equal(first, second)


def test_a_probe_of_a_sampled_code_is_one_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a collection: what asks for the codes stands for it."""
    run, codes = untrained("ipv", "pretrain", tmp_path / "run"), []
    monkeypatch.setattr("localmotion.evaluation.probes.ProbeData", lambda path, length, **_: Stub())
    monkeypatch.setattr("localmotion.evaluation.probes._scores", lambda code, episodes, networks: codes.append(code) or {})
    monkeypatch.setattr("localmotion.evaluation.probes._row", lambda data, name, width: {"code": name})
    twice(lambda: probe([run], [tmp_path], ceilings=False, device="cpu"))
    for one, two in zip(codes[:3], codes[3:], strict=True):
        assert torch.equal(one, two)


class Stub:
    """A collection of one batch."""

    episodes = SimpleNamespace(exact=None, pose=None, perceived_exactly=False, targets={})

    def code(self, of: Callable[..., torch.Tensor]) -> torch.Tensor:
        return of(make_batch())


@pytest.mark.parametrize(
    ("given", "said"),
    [({"episodes": 0}, "episodes=0 must be at least 1"), ({"seed": -1}, "seed=-1 must be at least 0")],
)
def test_numbers_out_of_range_are_refused_first(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        evaluate_run(tmp_path / "nowhere", **given)
    with pytest.raises(ConfigError, match=said):
        collect("toy:dot", tmp_path / "out", **given)
    with pytest.raises(ConfigError, match="seed=-1"):
        predict([tmp_path], tmp_path, seed=-1)
    with pytest.raises(ConfigError, match="length=4 must be at least 5"):
        probe([], [tmp_path], length=4)


def test_a_pretraining_run_is_told_apart_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    run = untrained("drp", "pretrain", tmp_path / "run")
    for which in ("newest", "best"):
        with pytest.raises(CheckpointError, match="pre-training run and has no actor"):
            evaluate_run(run, which=which)  # type: ignore[arg-type]
