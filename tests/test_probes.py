"""Probes: they find what is there, do not find what is not, and never by having seen the tested episodes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from localmotion.cli import main
from localmotion.envs import make_env
from localmotion.errors import ConfigError
from localmotion.evaluation import probe_data, probe_fits, probes
from localmotion.evaluation.probe_data import Episodes, ProbeData
from localmotion.evaluation.probe_fits import Fit, idm, mlp, mlp_fit, mutual_information_gap, r_squared, ridge, ridge_fit
from localmotion.evaluation.probes import grid_flow, probe, save_probes
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from method_batches import CPU, make, make_batch


def episodes(count: int = 20, frames: int = 40) -> Episodes:
    episode = np.repeat(np.arange(count), frames)
    return Episodes("made", episode, {}, None, episode >= count - 4)


def test_r_squared_by_hand() -> None:
    true = np.array([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]], np.float32)  # the second dimension does not vary and does not count
    assert r_squared(true, true) == 1
    assert r_squared(np.full_like(true, 2.0), true) == 0
    assert r_squared(true + np.array([1.0, 9.0], np.float32), true) == pytest.approx(1 - 1 / (8 / 3))
    assert r_squared(true, np.ones_like(true)) == 0


def test_a_tenth_of_the_fitted_episodes_chooses() -> None:
    for count, chosen in ((20, 1), (44, 4), (9, 1)):
        data = episodes(count, 2)  # the last four are tested
        fit, check = probe_fits._folds(data)
        expected = np.random.default_rng(1).permutation(count - 4)[:chosen]
        np.testing.assert_array_equal(check, np.isin(data.episode, expected))
        np.testing.assert_array_equal(fit, ~check & ~data.tested)


def test_linear_content_is_found_by_both_and_noise_by_none() -> None:
    rng, data = np.random.default_rng(0), episodes()
    x = rng.normal(size=(800, 12)).astype(np.float32)
    linear = (x @ rng.normal(size=(12, 3)) * 7 + np.array([100, -50, 0])).astype(np.float32)
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


def test_the_gap_is_near_1_for_a_number_a_factor_and_near_0_for_numbers_that_share_them() -> None:
    rng = np.random.default_rng(4)
    factors = rng.uniform(-1, 1, (4000, 2)).astype(np.float32)
    noise = rng.normal(size=(4000, 3)).astype(np.float32)
    perfect = np.concatenate([noise, 3 - 5 * factors[:, ::-1]], 1)  # any order, sign and scale
    assert mutual_information_gap(perfect, factors).min() > 0.9
    assert mutual_information_gap(factors, factors).min() > 0.95
    turned = factors @ (np.array([[1, 1], [-1, 1]], np.float32) / np.sqrt(2).astype(np.float32))
    assert mutual_information_gap(turned, factors).max() < 0.05
    assert mutual_information_gap(np.concatenate([factors, factors], 1), factors).max() == pytest.approx(0, abs=1e-9)
    assert mutual_information_gap(noise, factors).max() < 0.03


def test_the_gap_by_hand() -> None:
    """Two fair bits. Number 0 of the code is the first bit, number 1 is it in half of the rows. Number 2 never varies."""
    bit = np.array([0, 0, 1, 1] * 2, np.float32)
    half = np.array([0, 0, 1, 1, 0, 0, 0, 0], np.float32)
    code, factors = np.stack([bit, half, half * 0], 1), np.stack([bit, bit * 0 + 3], 1)
    h = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))  # entropy of half
    shared = h - 0.5 * np.log(2)  # H(half) - H(half | bit)
    gaps = mutual_information_gap(code, factors)
    assert gaps[0] == pytest.approx((np.log(2) - shared) / np.log(2))
    assert np.isnan(gaps[1])
    assert mutual_information_gap(code[:, 1:2], factors)[0] == pytest.approx(shared / np.log(2))


def test_colours_and_pose_stand_in_tables_of_their_own(tmp_path: Path) -> None:
    store = tmp_path / "store"
    collect("diswm:cheetah_run", store, policy="random", episodes=10, steps=14, recipe=Recipe(size=16, percept_size=32, tracks=4))
    rows = probe([], [store], length=8, networks=False)
    assert [row["code"] for row in rows] == ["pose alone", "picture, 8x8 grid", "flow, 8x8 grid"]
    assert rows[1]["width"] == 192
    data = ProbeData(store, 8)
    kept = [np.load(store / kind / f"{data.sampler.store.ids[0]}.npy") for kind in ("colours", "links")]
    np.testing.assert_array_equal(data.episodes.targets["colours"][:4], kept[0][4:8].reshape(4, 6))
    names = json.loads((store / "collection.json").read_text())["links"]["names"]
    assert data.episodes.pose is not None
    assert data.episodes.targets["pose"].shape[1] <= 4 * len(names)
    np.testing.assert_allclose(data.episodes.targets["pose"][0, 0], kept[1][4, 0, 0], rtol=1e-6)
    picture, flow = rows[1:]
    assert picture["ridge colours"] > 0.7 > flow["ridge colours"]
    assert picture["mig colours"] < 0.2
    for name, mean in (("ridge", "ridge colours"), ("mig", "mig colours")):
        each = picture["by colour"][name]
        assert list(each) == [f"{material} {channel}" for material in ("grid", "self") for channel in ("red", "green", "blue")]
        assert np.mean(list(each.values())) == pytest.approx(picture[mean], abs=1e-3)
    tables = {title: (columns, cells) for title, columns, cells in probes.score_tables(rows)}
    for title in ("Colours of the materials", "Pose of the links"):
        columns, cells = tables[title]
        assert columns == ["data", "code", "width", "ridge", "mig"]
        assert [cell[1] for cell in cells] == ["picture, 8x8 grid", "flow, 8x8 grid"]


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
    main(["probe", "--data", str(store), "--length", "12", "--ridge-only", "--out", str(out)])
    text = capsys.readouterr().out
    assert "flow, 8x8 grid" in text
    assert "Velocities of the links in the picture" in text
    rows = json.loads(out.read_text())
    assert [row["code"] for row in rows] == ["pose alone", "flow, 8x8 grid"]
    kinds = ("links", "velocities", "actions")
    keys = {f"ridge {kind}{ending}" for kind in kinds for ending in ("", " + pose")} | {"ridge actions nmse"}
    assert set(rows[1]) - {"data", "code", "width", "frames"} == keys
    data = ProbeData(store, 8)
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


def standard(x: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """By mean and deviation of the fitted rows; what does not vary there is only moved."""
    std = x[fit].std(0)
    std[std == 0] = 1
    return ((x - x[fit].mean(0)) / std).astype(np.float32)


def fitted(net: nn.Module, x: Tensor, y: np.ndarray, data: Episodes, updates: int, seed: int, batch: int) -> float:
    """AdamW at 1e-3 with a decay of 1e-4 and a cosine to zero; ten times on the way a look at the choosing episodes."""
    known = np.unique(data.episode[~data.tested])
    chosen = np.random.default_rng(1).permutation(known)[: max(len(known) // 10, 1)]
    check = np.isin(data.episode, chosen)
    fit = ~data.tested & ~check
    t = torch.from_numpy(standard(y, fit))
    weights = list(net.parameters())
    means, squares = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    draw, rows = np.random.default_rng(seed), np.flatnonzero(fit)
    best, answer = -np.inf, 0.0
    for update in range(1, updates + 1):
        index = torch.from_numpy(draw.choice(rows, min(batch, len(rows)), replace=False))
        loss = (net(x[index]) - t[index]).square().mean()
        rate = 1e-3 * (1 + np.cos(np.pi * (update - 1) / updates)) / 2
        with torch.no_grad():
            for p, g, m, v in zip(weights, torch.autograd.grad(loss, weights), means, squares, strict=True):
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                p.sub_(rate * 1e-4 * p)
                p.sub_(rate * (m / (1 - 0.9**update)) / ((v / (1 - 0.999**update)).sqrt() + 1e-8))
        if update % max(updates // 10, 1) == 0:
            net.eval()
            with torch.no_grad():
                found = net(x).numpy()
            scores = [1 - ((found - t.numpy())[part] ** 2).mean(0) / t.numpy()[part].var(0) for part in (check, data.tested)]
            if scores[0].mean() > best:
                best, answer = scores[0].mean(), float(scores[1].mean())
            net.train()
    return answer


def noisy_and_far(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of five dimensions, one of which varies in tested episodes alone, and targets of two that they tell a part of."""
    rng = np.random.default_rng(5)
    y = (rng.normal(size=(n, 2)) * 3 + 7).astype(np.float32)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    x[:, :2] += (y - 7) / 3
    x[:, 4] = 2
    x[-20:, 4] = 5
    return x, y


def test_ridge_regression_is_the_written_out_one_of_codes_that_are_nearly_alike() -> None:
    data, rng = episodes(frames=20), np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400))
    x = np.stack([a, a + 0.01 * b], 1).astype(np.float32)
    y = np.stack([a, b + 0.3 * rng.normal(size=400)], 1).astype(np.float32) + np.array([10, -10], np.float32)
    fit, check = probe_fits._folds(data)
    z, mean = standard(x, fit).astype(np.float64), y[fit].mean(0)
    scores = []
    for power in range(-4, 5):
        normal = z[fit].T @ z[fit] + 10.0**power * fit.sum() * np.eye(2)
        found = (z @ np.linalg.solve(normal, z[fit].T @ (y[fit] - mean)) + mean).astype(np.float32)
        scores.append([r_squared(found[rows], y[rows]) for rows in (check, data.tested)])
    assert ridge(x, y, data) == pytest.approx(max(scores)[1], abs=1e-4)
    assert max(scores)[1] > 0.55  # the difference of the two dimensions is used


def test_a_code_that_is_no_number_tells_nothing() -> None:
    data = episodes(frames=10)
    x, y = noisy_and_far(200)
    found = mlp_fit(np.full_like(x, np.nan), y, data, updates=3)
    assert found.score == 0
    assert found.nmse(y, data) == 1


def test_the_normalized_error_is_one_ratio_of_all_dimensions() -> None:
    """By hand: errors of the test rows over the variance of the other rows, each averaged over dimensions before dividing."""
    data = Episodes("made", np.arange(4), {}, None, np.array([False, False, True, True]))
    y = np.array([[0.0, 0], [2, 20], [1, 10], [3, 10]], np.float32)  # variances 1 and 100 of the first two
    assert Fit(0.0, y[2:]).nmse(y, data) == 0
    assert Fit(0.0, y[2:] + np.array([1, 0], np.float32)).nmse(y, data) == pytest.approx((1 / 2) / (101 / 2))
    assert Fit(0.0, y[2:] + np.array([0, 2], np.float32)).nmse(y, data) == pytest.approx(4 / 101)
    assert Fit(0.0, None).nmse(np.ones_like(y), data) == 0


@pytest.mark.parametrize("fit", [ridge_fit, lambda x, y, data: mlp_fit(x, y, data, updates=60)], ids=["ridge", "mlp"])
def test_what_a_probe_answers_has_its_score(fit: Any) -> None:
    """In the units of the target, for the tested rows."""
    data = episodes(frames=20)
    x, y = noisy_and_far(400)
    x[:, 4] = 0
    found = fit(x, y, data)
    assert found.answer.shape == (80, 2)
    assert 0.2 < found.score < 1
    assert found.score == pytest.approx(r_squared(found.answer, y[data.tested]), abs=1e-4)


@pytest.mark.parametrize("updates", [5, 36])
def test_the_network_of_a_code_is_the_written_out_one(updates: int) -> None:
    data = episodes(frames=10)
    x, y = noisy_and_far(200)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1))
    net.append(nn.Linear(256, 2))
    fit = ~data.tested & ~np.isin(data.episode, np.random.default_rng(1).permutation(16)[:1])
    wanted = fitted(net, torch.from_numpy(standard(x, fit)), y, data, updates, 3, 128)
    assert mlp(x, y, data, updates=updates, seed=3) == pytest.approx(wanted, abs=3e-6)  # a decay of 1e-2 moves it by 2e-5
    torch.manual_seed(3)
    assert abs(mlp(x, y, data, updates=updates, seed=4) - wanted) > 1e-3


def test_the_network_of_pictures_is_the_written_out_one() -> None:
    data = episodes(frames=10)
    _, y = noisy_and_far(200)
    pictures = np.random.default_rng(0).integers(0, 256, (200, 2, 24, 24, 3), dtype=np.uint8)
    pictures[:, 1, :12] = np.clip(128 + 20 * (y[:, :1, None, None] - 7), 0, 255).astype(np.uint8)
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for inside, outside in ((6, 32), (32, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 2))
    x = torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).reshape(200, 6, 24, 24) / 255 - 0.5
    wanted = fitted(net, x, y, data, 20, 3, 64)
    assert wanted > 0.2
    assert idm(pictures, y, data, updates=20, seed=3) == pytest.approx(wanted, abs=1e-3)


def test_scores_have_four_digits_and_a_name_for_each_probe_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of actions stands beside their score, without the pose; the background has no score with the pose."""
    tested = np.array([False, False, True])
    answer = np.array([[0.25]], np.float32)
    monkeypatch.setattr(probes, "ridge_fit", lambda code, target, data: Fit(float(target[0, 0]) / 3, answer))
    monkeypatch.setattr(probes, "mlp_fit", lambda code, target, data: Fit(float(target[0, 0]) / 7, answer * code.shape[1]))
    targets = {
        kind: np.array([[first], [1.0], [0.0]], np.float32)
        for kind, first in (("velocities", 1), ("actions", 2), ("background", 3))
    }
    data = Episodes("made", np.zeros(3, np.int64), targets, None, tested, pose=np.zeros((3, 4), np.float32))
    found = probes._scores(np.zeros((3, 1), np.float32), data)
    scores = {"velocities": (0.3333, 0.1429), "actions": (0.6667, 0.2857), "background": (1.0, 0.4286)}
    wanted = {f"{name} {kind}": pair[n] for kind, pair in scores.items() for n, name in enumerate(("ridge", "mlp"))}
    wanted |= {f"{key} + pose": value for key, value in wanted.items() if "background" not in key}
    assert found == {**wanted, "ridge actions nmse": 0.25, "mlp actions nmse": 0.25}


def test_scores_are_written_where_there_is_no_folder_yet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"data": "made", "width": 3}]
    for _ in range(2):
        save_probes(rows, tmp_path / "of a run" / "probes" / "all.json")
    assert json.loads((tmp_path / "of a run" / "probes" / "all.json").read_text()) == rows


LENGTHS = np.array([13, 9, 5, *[6] * 20, 4])


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 clips of which all but the last are long enough for windows of 5 frames; each number of a target names clip and frame."""

    class Sampler:
        def __init__(
            self, store: Any, length: int, batch_size: int, seed: int, *, split: str, prefetch: bool, mask: bool
        ) -> None:
            assert split == "all"
            assert not prefetch
            assert not mask
            self.store, self.clips, self.length = store, np.arange(23), length
            self.asked: list[tuple[list[int], list[int]]] = []

        def windows(self, clips: Any, starts: Any) -> dict[str, Tensor]:
            self.asked.append((clips.tolist(), starts.tolist()))
            frames = torch.from_numpy(starts)[:, None] + torch.arange(self.length)
            return {"name": torch.stack([torch.from_numpy(clips)[:, None].expand(frames.shape), frames], -1)}

    class Store:
        def __init__(self, path: Path) -> None:
            self.lengths, self.ids, self.recipe, self.size = LENGTHS, [f"clip{n}" for n in range(24)], {"flow": "dis"}, 16

    monkeypatch.setattr(probe_data, "ClipStore", Store)
    monkeypatch.setattr(probe_data, "WindowSampler", Sampler)
    for kind, sign in (("velocities", 1), ("actions", -1e-4)):  # actions are within [-1, 1]
        (tmp_path / kind).mkdir()
        for clip, frames in enumerate(LENGTHS):
            np.save(tmp_path / kind / f"clip{clip}.npy", sign * np.array([[100.0 * clip + t, 0.5] for t in range(frames)]))
    return tmp_path


def test_windows_tile_the_clips_and_their_targets_are_of_their_frames(collection: Path) -> None:
    """Windows of 6 begin every 2 frames, because the first 4 have too little history; each frame from 4 on counts once."""
    data = ProbeData(collection, 6)
    places = [(0, start) for start in (0, 2, 4, 6)] + [(1, 0), (1, 2)] + [(clip, 0) for clip in range(3, 23)]
    assert list(zip(data.clips.tolist(), data.starts.tolist(), strict=True)) == places
    frames = np.array([(clip, start + t) for clip, start in places for t in (4, 5)])
    found = data.episodes
    named = (100.0 * frames[:, 0] + frames[:, 1])[:, None]
    half = np.full_like(named, 0.5)
    np.testing.assert_array_equal(found.episode, frames[:, 0])
    np.testing.assert_array_equal(found.targets["velocities"], np.concatenate([named, half], 1))
    np.testing.assert_allclose(found.targets["actions"], -1e-4 * np.concatenate([named, half], 1), rtol=1e-6)
    assert found.before is not None
    np.testing.assert_array_equal(found.before, np.concatenate([named - 1, half], 1))
    assert {x.dtype for x in (*found.targets.values(), found.before)} == {np.dtype(np.float32)}
    assert found.name == collection.name
    chosen = np.array([0, 1, *range(3, 23)])  # a fifth of 22 clips, drawn once for all runs
    np.testing.assert_array_equal(found.tested, np.isin(found.episode, np.random.default_rng(0).permutation(chosen)[:4]))
    codes = data.code(lambda batch: batch["name"].double())
    np.testing.assert_array_equal(codes, frames)
    assert codes.dtype == np.float32
    assert data.sampler.asked == [tuple(map(list, zip(*part, strict=True))) for part in (places[:16], places[16:])]  # type: ignore[attr-defined]


def places(frames: int, clip: int) -> np.ndarray:
    """(T, 4, 3) of links: one that moves by a known law, one at rest, one that is behind the camera in one clip, one at rest in y."""
    t = np.arange(frames)
    law = np.stack([10 * clip + t**2, -3.0 * clip + 0.5 * t**3, 0.1 * t + clip], 1)
    behind = law * [1, 1, 0] + ([np.nan, np.nan, 0] if clip == 4 else 0)
    return np.stack([law, np.full_like(law, 7), behind, law * [2, 0, 1]], 1)


def test_links_give_velocities_from_frame_to_frame_and_the_pose_in_the_frame(collection: Path) -> None:
    (collection / "links").mkdir()
    (collection / "exact_grid").mkdir()
    for clip, frames in enumerate(LENGTHS):
        np.save(collection / "links" / f"clip{clip}.npy", places(frames, clip).astype(np.float32))
        grid = 1000 * clip + 100 * np.arange(frames)[:, None, None, None] + np.arange(128).reshape(8, 8, 2) / 10
        np.save(collection / "exact_grid" / f"clip{clip}.npy", grid.astype(np.float32))
    found = ProbeData(collection, 6).episodes
    assert list(found.targets) == ["links", "velocities", "actions"]
    clip, frame = np.divmod(found.targets["velocities"][:, 0], 100)
    # The link at rest and the one without a place are left out, and so is the y of the last one, which is constant.
    moved = np.stack([2 * frame - 1, 2 * (2 * frame - 1), 0.5 * (frame**3 - (frame - 1) ** 3)], 1)
    np.testing.assert_allclose(found.targets["links"], moved, rtol=1e-5)
    x, y, angle = 10 * clip + frame**2, -3 * clip + 0.5 * frame**3, 0.1 * frame + clip
    seven, nought = np.full_like(x, 7), np.zeros_like(x)
    turned = [f(a) for f in (np.cos, np.sin) for a in (angle, seven, angle)]
    assert found.pose is not None
    assert found.exact is not None
    np.testing.assert_allclose(found.pose, np.stack([x, seven, 2 * x, y, seven, nought, *turned], 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.exact, (1000 * clip + 100 * frame)[:, None] + np.arange(128) / 10, rtol=1e-6)
    assert not found.perceived_exactly
    (collection / "exact_grid" / "clip3.npy").unlink()
    with pytest.raises(ConfigError, match="some clips lack"):
        ProbeData(collection, 6)


def test_the_background_moves_from_frame_to_frame_and_actions_are_clipped(collection: Path) -> None:
    (collection / "background").mkdir()
    for clip, frames in enumerate(LENGTHS):
        t = np.arange(frames, dtype=np.float32)
        np.save(collection / "background" / f"clip{clip}.npy", np.stack([100 * clip + t**2, -3 * t], 1))
        np.save(collection / "actions" / f"clip{clip}.npy", np.stack([2 - t, 0.05 * t], 1))
    found = ProbeData(collection, 6).episodes
    assert list(found.targets) == ["velocities", "actions", "background"]
    frame = found.targets["velocities"][:, 0] % 100
    np.testing.assert_allclose(found.targets["background"], np.stack([2 * frame - 1, np.full_like(frame, -3)], 1))
    np.testing.assert_allclose(found.targets["actions"], np.stack([(2 - frame).clip(-1, 1), 0.05 * frame], 1), rtol=1e-6)


def test_another_collection_can_be_the_test(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All episodes of the first are fitted, all of the second are tested, and no episode has the number of another."""
    second = tmp_path_factory.mktemp("other")
    for kind in ("velocities", "actions"):
        shutil.copytree(collection / kind, second / kind)
        for path in (second / kind).iterdir():
            np.save(path, np.load(path) / 2)
    data = ProbeData(collection, 6, test=second)
    alone, found = ProbeData(collection, 6), data.episodes
    n = len(alone.episodes.episode)
    assert found.name == f"{collection.name}, tested on {second.name}"
    np.testing.assert_array_equal(found.tested, np.arange(2 * n) >= n)
    np.testing.assert_array_equal(found.episode, [*alone.episodes.episode, *(alone.episodes.episode + 24)])
    for kind, whole in alone.episodes.targets.items():
        np.testing.assert_array_equal(found.targets[kind][:n], whole)
    np.testing.assert_array_equal(found.targets["velocities"][n:], alone.episodes.targets["velocities"] / 2)
    codes = data.code(lambda batch: batch["name"].double())
    np.testing.assert_array_equal(codes[:n], codes[n:])
    np.save(second / "actions" / "clip0.npy", np.zeros((13, 3)))
    for path in (second / "actions").iterdir():
        np.save(path, np.zeros((len(np.load(path)), 3)))
    with pytest.raises(ConfigError, match="actions differ from those of"):
        ProbeData(collection, 6, test=second)
    with pytest.raises(ConfigError, match="2 test collections for 1 collections"):
        probe([], [collection], tests=[second, second])


def test_a_code_of_the_background_is_found_out_on_other_backgrounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--store", "--size", "16", "--percept-size", "16", "--tracks", "4", "--motion", "exact", "--steps", "14"]
    moves = ["--env-options", '{"background": "independent"}']
    for seed, name in enumerate(("fit", "test")):
        path = ["--out", str(tmp_path / name), "--seed", str(seed), "--episodes", "10"]
        main(["collect", "planar:reacher_easy", *path, *sizes, *moves])
    pair = ["--data", str(tmp_path / "fit"), "--test-data", str(tmp_path / "test")]
    main(["probe", *pair, "--length", "12", "--ridge-only", "--out", str(tmp_path / "x.json")])
    assert "Motion of the background" in capsys.readouterr().out
    rows = {row["code"]: row for row in json.loads((tmp_path / "x.json").read_text())}
    assert rows["flow, 8x8 grid"]["data"] == "fit, tested on test"
    assert rows["flow, 8x8 grid"]["ridge background"] > 0.9  # exact flow shows it
    assert "ridge background + pose" not in rows["flow, 8x8 grid"]
    assert rows["flow, 8x8 grid"]["ridge actions nmse"] > 0.3  # independent of it


def moving(seed: int = 6, count: int = 20, frames: int = 40) -> Episodes:
    """Links whose velocities do not depend on their pose; exact flow has half of the velocities' variance, and noise."""
    rng, n = np.random.default_rng(seed), count * frames
    pose, moved = rng.normal(size=(n, 8)).astype(np.float32), rng.normal(size=(n, 4)).astype(np.float32)
    flow = np.concatenate([moved + rng.normal(size=(n, 4)), rng.normal(size=(n, 4))], 1).astype(np.float32)
    episode = np.repeat(np.arange(count), frames)
    return Episodes("made", episode, {"links": moved}, None, episode >= count - 4, pose, flow)


def test_velocities_are_found_and_neither_noise_nor_the_pose_are_taken_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data, quick = moving(), mlp_fit
    monkeypatch.setattr(probes, "mlp_fit", lambda *given: quick(*given, updates=160))
    noise = np.random.default_rng(1).normal(size=(800, 6)).astype(np.float32)
    codes = {"planted": data.targets["links"], "noise": noise, "exact": data.exact, "pose": None}
    rows = [{"code": name, **probes._scores(code, data)} for name, code in codes.items()]
    probes._add_shares(rows, "exact")
    planted, random, exact, pose = rows
    keys = [f"{kind} links{ending}" for kind in ("ridge", "mlp") for ending in ("", " + pose")]
    for key, least in zip(keys, (0.99, 0.99, 0.9, 0.85), strict=True):
        assert planted[key] > least
        assert abs(random[key]) < 0.1
        assert 0.35 < exact[key] < 0.55
        assert exact["share of exact"][key] == 1
        assert planted["share of exact"][key] == pytest.approx(planted[key] / exact[key], abs=1e-3)
        assert planted["share of exact"][key] > 1.5
    assert set(pose) == {"code", "ridge links + pose", "mlp links + pose", "share of exact"}
    assert abs(pose["ridge links + pose"]) < 0.05
    assert abs(pose["mlp links + pose"]) < 0.1


def test_random_labels_are_found_with_no_pose(monkeypatch: pytest.MonkeyPatch) -> None:
    data, rng = moving(), np.random.default_rng(2)
    labels = rng.permutation(data.targets["links"])
    shuffled = replace(data, targets={"links": labels})
    quick = mlp_fit
    monkeypatch.setattr(probes, "mlp_fit", lambda *given: quick(*given, updates=150))
    scores = probes._scores(data.exact, shuffled)
    assert len(scores) == 4
    assert max(abs(score) for score in scores.values()) < 0.1


def test_a_code_that_tells_motion_only_together_with_the_pose_gets_its_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is the speed along the link; the angle says where along is."""
    rng, data = np.random.default_rng(3), moving()
    quick = mlp_fit
    monkeypatch.setattr(probes, "mlp_fit", lambda *given: quick(*given, updates=250))
    n = len(data.episode)
    angle, speed = rng.uniform(-np.pi, np.pi, n), rng.normal(size=n)
    pose = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    data = replace(data, targets={"links": (speed[:, None] * pose).astype(np.float32)}, pose=pose)
    scores = probes._scores(speed[:, None].astype(np.float32), data)
    assert scores["mlp links + pose"] > 0.9
    assert all(abs(scores[key]) < 0.1 for key in ("ridge links", "mlp links", "ridge links + pose"))


def test_no_share_of_what_exact_flow_does_not_predict() -> None:
    rows: list[dict[str, Any]] = [
        {"code": "best", "width": 9, "ridge links": 0.4, "mlp links": 0.08, "mlp actions": 0.5},
        {"code": "other", "width": 3, "ridge links": 0.1, "mlp links": 0.02, "mlp actions": 0.1, "ridge actions": 0.3},
        {"code": "third", "width": 3, "mlp links": 0.02},
    ]
    probes._add_shares(rows, "best")
    assert [row.get("share of exact") for row in rows] == [{"ridge links": 1.0}, {"ridge links": 0.25}, None]
    title, columns, cells = probes.score_tables([{"data": "made", **row} for row in rows])[0]
    assert title == "Velocities of the links in the picture"
    assert columns == ["data", "code", "width", "ridge", "mlp"]
    assert cells[1:] == [["made", "other", "3", "0.100 (25%)", "0.020"], ["made", "third", "3", "–", "0.020"]]


@pytest.mark.parametrize("own", [False, True])
def test_shares_are_of_the_grid_beside_the_clips_or_of_their_own_exact_flow(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    known = replace(moving(), perceived_exactly=own, pose=None, **({"exact": None} if own else {}))

    class Data:
        def __init__(self, path: Path, length: int, *, mask: bool) -> None:
            self.episodes = known

        def code(self, of: Any) -> np.ndarray:
            return known.targets["links"][:, :2]

    monkeypatch.setattr(probes, "ProbeData", Data)
    said: list[Any] = []
    rows = probe([], [Path("data/made")], networks=False, progress=lambda *what: said.append(what))
    assert [row["code"] for row in rows] == ["exact flow, 8x8 grid", "flow, 8x8 grid"][own:]
    assert [row["share of exact"]["ridge links"] == 1 for row in rows] == ([True] if own else [True, False])
    assert [what[:2] for what in said] == [(n + 1, len(rows)) for n in range(len(rows))]


def test_a_collection_needs_targets_for_all_clips_and_enough_of_them(collection: Path) -> None:
    velocities, actions = collection / "velocities", collection / "actions"
    with pytest.raises(ConfigError, match="1 clips are too few"):
        ProbeData(collection, 13)
    for broken, why in ((b"no array", "cannot be read"), (b"", "cannot be read")):
        (velocities / "clip5.npy").write_bytes(broken)
        with pytest.raises(ConfigError, match=rf"velocities/clip5\.npy: {why}.*collect it again"):
            ProbeData(collection, 6)
    with (velocities / "clip5.npy").open("wb") as file:  # a claim of 16 terabytes, which must not be believed
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 2)})
    with pytest.raises(ConfigError, match="cannot be read"):
        ProbeData(collection, 6)
    np.save(velocities / "clip5.npy", np.array([None, "object"]), allow_pickle=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        ProbeData(collection, 6)
    np.save(velocities / "clip5.npy", np.zeros((5, 2)))
    with pytest.raises(ConfigError, match="has 5 rows for a clip of 6 frames"):
        ProbeData(collection, 6)
    (velocities / "clip5.npy").unlink()
    with pytest.raises(ConfigError, match="some clips lack"):
        ProbeData(collection, 6)
    for path in velocities.iterdir():
        path.unlink()
    data = ProbeData(collection, 6)
    assert list(data.episodes.targets) == ["actions"]
    assert data.episodes.before is None
    for path in actions.iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="localmotion collect --store"):
        ProbeData(collection, 6)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_each_source_is_asked_on_each_collection_in_turn(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow, the method, the same with fresh weights, and what was trained on the target; each with the same random numbers."""
    run, method = make("drp", stage)
    threads: list[int] = []
    opened: list[tuple[str, int]] = []
    asked: list[Any] = []

    class Data:
        def __init__(self, path: Path, length: int, *, mask: bool) -> None:
            self.episodes = Episodes(path.name, np.zeros(3, np.int64), {}, None, np.zeros(3, bool))
            opened.append((path.name, length))

        def code(self, of: Any) -> np.ndarray:
            asked.append((of, float(torch.rand(()))))
            return np.zeros((3, 7), np.float32)

    def load(path: Path, *, device: str, threads: int) -> tuple[Any, Any, Any]:
        assert (path, device, threads) == (Path("runs/walk"), "cpu", 2)
        return run, method, CPU

    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(probes, "ProbeData", Data)
    monkeypatch.setattr(probes, "load_run", load)
    monkeypatch.setattr(probes, "_code_of", lambda model, place: (model, place))
    monkeypatch.setattr(probes, "_ceilings", lambda data, place: [{"code": "ceiling"}, {"code": "another"}])
    said: list[Any] = []
    before = torch.get_rng_state()
    collections = [Path("data/one"), Path("data/other")]
    rows = probe([Path("runs/walk")], collections, length=9, device="cpu", threads=2, progress=lambda *what: said.append(what))
    assert torch.equal(torch.get_rng_state(), before)
    assert threads == [2]
    assert opened == [("one", 9), ("other", 9)]
    names = ["flow, 8x8 grid", "drp, walk", "drp, walk, untrained"]
    assert [row["code"] for row in rows] == [*names, "ceiling", "another"] * 2
    assert rows[:3] == [{"data": "one", "code": name, "width": 7, "frames": 3} for name in names]
    assert said == [(n, 10, name) for n, name in zip((1, 2, 3, 5, 6, 7, 8, 10), [*names, "ceilings"] * 2, strict=True)]
    assert [asked[n][0] for n in (0, 3)] == [grid_flow] * 2
    assert asked[1][0] == asked[4][0] == (method, CPU)
    fresh = asked[2][0][0]
    assert fresh.acts == method.acts
    assert not fresh.training
    torch.manual_seed(0)
    for name, value in type(method)(run.model, image_size=64, action_dim=method.action_dim or None).state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    torch.manual_seed(0)
    assert {number for _, number in asked} == {float(torch.rand(()))}
    plain = probe([Path("runs/walk")], collections[:1], untrained=False, ceilings=False, device="cpu", threads=2)
    assert [row["code"] for row in plain] == names[:2]
    assert opened[2:] == [("one", 25)]


def test_a_probe_refuses_what_it_cannot_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "load_run", lambda path, **options: (*make("dreamer_v3", "train"), CPU))
    with pytest.raises(ConfigError, match=r"runs/walk: method dreamer_v3 has no motion code to probe"):
        probe([Path("runs/walk")], [])
    assert probe([], [], length=5, threads=0) == []
    for wrong, least in (({"length": 4}, 5), ({"threads": -1}, 0)):
        with pytest.raises(ConfigError, match=f"at least {least}"):
            probe([], [], **wrong)  # type: ignore[arg-type]


def test_the_code_of_a_method_is_computed_without_a_gradient_where_the_method_is() -> None:
    _, method = make("drp", "pretrain")
    batch = make_batch(batch=1, time=3)
    code = probes._code_of(method, CPU)(batch)
    assert not code.requires_grad
    torch.testing.assert_close(code, method.motion_code(batch).detach())
    asked: list[Any] = []

    def motion_code(moved: Any) -> Tensor:
        asked.append(({value.device.type for value in moved.values()}, sorted(moved), torch.is_autocast_enabled("cpu")))
        return torch.zeros(1)

    place: Any = SimpleNamespace(device=torch.device("meta"), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    probes._code_of(SimpleNamespace(motion_code=motion_code), place)(batch)  # type: ignore[arg-type]
    assert asked == [({"meta"}, sorted(batch), True)]
