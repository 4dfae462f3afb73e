"""Probes: they find what is there, do not find what is not, and never by having seen the tested episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from localmotion.cli import main
from localmotion.envs import make_env
from localmotion.errors import ConfigError
from localmotion.evaluation.probes import Episodes, _Data, grid_flow, idm, mlp, probe, r_squared, ridge


def episodes(count: int = 20, frames: int = 40) -> Episodes:
    episode = np.repeat(np.arange(count), frames)
    return Episodes("made", episode, {}, None, episode >= count - 4)


def test_r_squared_by_hand() -> None:
    true = np.array([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]], np.float32)  # the second dimension does not vary and does not count
    assert r_squared(true, true) == 1
    assert r_squared(np.full_like(true, 2.0), true) == 0
    assert r_squared(true + np.array([1.0, 9.0], np.float32), true) == pytest.approx(1 - 1 / (8 / 3))
    assert r_squared(true, np.ones_like(true)) == 0


def test_linear_content_is_found_by_both_and_noise_by_none() -> None:
    rng, data = np.random.default_rng(0), episodes()
    x = rng.normal(size=(800, 12)).astype(np.float32)
    linear = (x @ rng.normal(size=(12, 3)) * 7 + 100).astype(np.float32)
    assert ridge(x, linear, data) > 0.99
    assert mlp(x, linear, data, updates=400) > 0.9
    noise = rng.normal(size=(800, 3)).astype(np.float32)
    assert ridge(x, noise, data) < 0.05
    assert mlp(x, noise, data, updates=200) < 0.1


def test_what_is_not_linear_is_found_by_the_network_alone() -> None:
    rng, data = np.random.default_rng(1), episodes(frames=100)
    x = rng.uniform(-1, 1, (2000, 2)).astype(np.float32)
    product = x[:, :1] * x[:, 1:]
    assert ridge(x, product, data) < 0.1
    assert mlp(x, product, data, updates=600) > 0.8


def test_what_names_the_episode_does_not_help_on_another() -> None:
    """A code that tells which episode a frame is of, and a target that is constant within each."""
    rng, data = np.random.default_rng(2), episodes()
    x = np.eye(20, dtype=np.float32)[data.episode]
    target = rng.normal(size=(20, 2)).astype(np.float32)[data.episode]
    assert ridge(x, target, data) < 0.05
    assert mlp(x, target, data, updates=200) < 0.2


def test_pictures_before_and_after_tell_a_displacement() -> None:
    rng, data = np.random.default_rng(3), episodes(count=20, frames=30)
    place, moved = rng.integers(4, 8, (600, 2)), rng.integers(-3, 4, (600, 2))
    pictures = np.zeros((600, 2, 16, 16, 3), np.uint8)
    for n in range(600):
        for k, (y, x) in enumerate((place[n], place[n] + moved[n])):
            pictures[n, k, y : y + 4, x : x + 4] = 255
    assert idm(pictures, moved.astype(np.float32), data, updates=500) > 0.8


def test_velocities_are_the_simulators() -> None:
    walker = make_env("dmc:walker_walk", size=16)
    walker.reset(seed=0)
    shape = walker.action_space.shape
    assert shape is not None
    walker.step(np.ones(shape, np.float32))
    np.testing.assert_array_equal(walker.velocities(), walker.physics.data.qvel)  # type: ignore[attr-defined]
    walker.close()
    arm = make_env("metaworld:reach", size=16)
    arm.reset(seed=0)
    inner = arm.inner  # type: ignore[attr-defined]
    for _ in range(10):
        before = np.array(inner.tcp_center)
        arm.step(np.array([1, 0, 0, 0], np.float32))
    found, mean = arm.velocities(), (np.array(inner.tcp_center) - before) / inner.dt  # type: ignore[attr-defined]
    assert found.shape == (3 + inner.model.nv,)
    np.testing.assert_allclose(found[:3], mean, atol=0.1)
    assert np.abs(mean).max() > 0.2
    arm.close()


def test_collect_then_probe_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = tmp_path / "dots", tmp_path / "probes.json"
    sizes = ["--size", "32", "--percept-size", "32", "--tracks", "4"]
    main(["collect", "dmc:reacher_easy", "--out", str(store), "--store", "--episodes", "10", "--steps", "12", *sizes])
    main(["probe", "--data", str(store), "--length", "12", "--no-ceilings", "--out", str(out)])
    text = capsys.readouterr().out
    assert "flow, 8x8 grid" in text
    assert "ridge velocities" in out.read_text()
    data = _Data(store, 8)
    actions = data.episodes.targets["actions"]
    kept = np.load(store / "actions" / f"{data.sampler.store.ids[0]}.npy")
    np.testing.assert_array_equal(actions[:4], kept[4:8])  # the first window's positions 4 to 7
    assert data.episodes.before is not None
    np.testing.assert_array_equal(data.episodes.before[1], data.episodes.targets["velocities"][0])
    tested, others = (set(data.episodes.episode[rows].tolist()) for rows in (data.episodes.tested, ~data.episodes.tested))
    assert len(tested) == 2
    assert not tested & others
    # The rows of codes are those of the targets: frames 4 to 7 of the first window, 8 to 11 of the second.
    frames = data.code(lambda batch: (batch["start"][:, None] + torch.arange(8))[..., None])[:, 0]
    assert frames[:8].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    np.testing.assert_array_equal(actions[:8], kept[4:12])
    signed = grid_flow({"flow": torch.full((1, 2, 16, 16, 2), -1.5)})
    assert signed.shape == (1, 2, 128)
    assert (signed == -1.5).all()
    (store / "actions" / f"{data.sampler.store.ids[3]}.npy").unlink()
    with pytest.raises(ConfigError, match="some clips lack"):
        probe([], [store], length=8)
