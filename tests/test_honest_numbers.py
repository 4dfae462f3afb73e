"""Numbers that are reported are honest: a planted leak or a planted answer is seen.

Probes fit, scale and choose without the tested episodes. Held-out figures are those of clips that were not trained on, against the best
predictor that needs no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from localmotion.evaluation import probe_fits
from localmotion.evaluation.heldout import open_loop_errors, reconstruction_errors, trivial_reconstructions
from localmotion.evaluation.probe_data import Episodes
from localmotion.evaluation.probe_fits import idm, mlp, ridge
from localmotion.methods.base import Method
from localmotion.methods.ipv import IPV
from localmotion.models.dae import Motion
from localmotion.runs.settings import compose
from localmotion.training import pretrain as pretraining
from localmotion.training.update import Updater
from localmotion.video.sample import WindowSampler, is_heldout
from localmotion.video.store import ClipStore
from method_batches import CPU

Floats = NDArray[np.float32]
Probe = Callable[[Any, Floats, Episodes], float]

# -------------------------------------------------------------------------------------------------------------- probes

COUNT, FRAMES = 20, 12


def made_episodes() -> Episodes:
    episode = np.repeat(np.arange(COUNT), FRAMES)
    return Episodes("made", episode, {}, None, episode >= COUNT - 5)


def code_and_target(kind: str) -> tuple[Any, Floats]:
    """A weak linear relation under noise, so that the penalty and the moment of stopping matter."""
    rng = np.random.default_rng(3)
    n = COUNT * FRAMES
    y = rng.normal(size=(n, 2)).astype(np.float32)
    if kind == "idm":
        pictures = rng.integers(0, 256, (n, 2, 16, 16, 3), dtype=np.uint8)
        pictures[:, 1, :, :, 0] = np.clip(128 + 40 * y[:, :1, None], 0, 255).astype(np.uint8)
        return pictures, y
    x = rng.normal(size=(n, 60)).astype(np.float32) * 3 + 5
    x[:, :2] += 2 * y
    return x, y


PROBES: dict[str, Probe] = {
    "ridge": ridge,
    "mlp": lambda x, y, data: mlp(x, y, data, updates=40),
    "idm": lambda x, y, data: idm(x, y, data, updates=10),
}


def scored(monkeypatch: pytest.MonkeyPatch, fit: Probe, *given: Any) -> tuple[list[tuple[Floats, Floats]], float]:
    """Every (predicted, true) that a probe scores while it fits and chooses, and its answer."""
    calls: list[tuple[Floats, Floats]] = []
    score = probe_fits.r_squared

    def recorded(predicted: Floats, true: Floats) -> float:
        calls.append((predicted, true))
        return score(predicted, true)

    with monkeypatch.context() as patch:
        patch.setattr(probe_fits, "r_squared", recorded)
        return calls, fit(*given)


def same(one: Floats, other: Floats) -> bool:
    return one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_is_fitted_scaled_and_chosen_without_the_tested_episodes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisoned targets of the tested episodes change no prediction; poisoned codes change only those of the tested episodes. To the bit."""
    data, (x, y) = made_episodes(), code_and_target(kind)
    tested = int(data.tested.sum())
    clean, answer = scored(monkeypatch, PROBES[kind], x, y, data)
    choosing = [predicted for predicted, _ in clean if len(predicted) != tested]
    assert len(choosing) == (len(probe_fits.LAMBDAS) if kind == "ridge" else 10)
    assert {len(predicted) for predicted in choosing} == {int(probe_fits._folds(data)[1].sum())}
    assert answer in [probe_fits.r_squared(p, t) for p, t in clean if len(p) == tested]

    bad_y = y.copy()
    bad_y[data.tested] = np.random.default_rng(4).normal(size=(tested, 2)) * 50 + 1000
    poisoned, worse = scored(monkeypatch, PROBES[kind], x, bad_y, data)
    assert [len(p) for p, _ in poisoned] == [len(p) for p, _ in clean]
    assert all(same(p, q) for (p, _), (q, _) in zip(poisoned, clean, strict=True))
    assert worse < -1 < answer

    bad_x = x.copy()
    bad_x[data.tested] = 255 if kind == "idm" else 1e4
    poisoned, _ = scored(monkeypatch, PROBES[kind], bad_x, y, data)
    assert all(same(p, q) for p, q in zip([p for p, _ in poisoned if len(p) != tested], choosing, strict=True))
    # The tested codes are now all alike, so their predictions are: nothing is drawn while testing.
    for predicted in (p for p, _ in poisoned if len(p) == tested):
        np.testing.assert_allclose(predicted, np.broadcast_to(predicted[:1], predicted.shape), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", PROBES)
def test_the_answer_is_that_of_the_choice_on_other_episodes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where choosing and tested episodes disagree, the choosing ones decide, and the answer is as bad as it is."""
    data, (x, y) = made_episodes(), code_and_target(kind)
    tested = int(data.tested.sum())
    calls, answer = scored(monkeypatch, PROBES[kind], x, y, data)
    marks = [(len(p) == tested, probe_fits.r_squared(p, t)) for p, t in calls]
    if kind == "ridge":
        assert [is_tested for is_tested, _ in marks] == [False] * len(probe_fits.LAMBDAS) + [True]
        fit, check = probe_fits._folds(data)
        z = ((x - x[fit].mean(0)) / x[fit].std(0)).astype(np.float64)
        middle = y[fit].mean(0).astype(np.float64)
        written = {}
        for penalty in probe_fits.LAMBDAS:
            weights = np.linalg.solve(z[fit].T @ z[fit] + penalty * fit.sum() * np.eye(60), z[fit].T @ (y[fit] - middle))
            written[penalty] = [
                probe_fits.r_squared((z[rows] @ weights + middle).astype(np.float32), y[rows]) for rows in (check, data.tested)
            ]
        best = max(written.values(), key=lambda scores: scores[0])
        assert answer == pytest.approx(best[1], abs=1e-4)
        assert abs(best[1] - written[1e-4][1]) > 0.02  # the choice matters here
        return
    best_check, kept = -math.inf, math.nan
    for (is_tested, score), following in zip(marks, [*marks[1:], (False, 0.0)], strict=True):
        if not is_tested and score > best_check:
            best_check, kept = score, following[1]
            assert following[0]  # the tested episodes are scored with the same weights
    assert answer == kept


@pytest.mark.parametrize("kind", PROBES)
def test_random_labels_are_not_found(kind: str) -> None:
    rng, data = np.random.default_rng(7), made_episodes()
    x, _ = code_and_target(kind)
    noise = rng.normal(size=(len(x), 3)).astype(np.float32)
    drift = rng.normal(size=(COUNT, 3)).astype(np.float32)[data.episode] + 0.3 * noise  # an episode's frames resemble each other
    for labels in (noise, drift):
        assert PROBES[kind](x, labels, data) < 0.06


@pytest.mark.parametrize("first", range(0, COUNT, 3))
def test_episodes_not_frames_are_split(first: int) -> None:
    """Each episode is fitted, chosen with or tested, whichever are tested."""
    data = made_episodes()
    data = replace(data, tested=(data.episode - first) % COUNT < 5)
    fit, check = probe_fits._folds(data)
    sides = [set(data.episode[rows].tolist()) for rows in (fit, check, data.tested)]
    assert all(sides)
    assert sum(map(len, sides)) == COUNT
    assert set.union(*sides) == set(range(COUNT))
    assert (fit.astype(int) + check + data.tested == 1).all()


# ------------------------------------------------------------------------------------------- held-out clips of a store


class Memoriser:
    """Stands for the updates of a run: keeps every frame that it trains on."""

    def __init__(self, method: Method, *arguments: Any, **options: Any) -> None:
        self.inner = Updater(method, *arguments, **options)
        method.memory = set()  # type: ignore[assignment]
        self.method, self.update, self.healthy, self.compute = method, 0, True, self.inner.compute
        SEEN.append(self)
        self.clips: set[int] = set()

    def learn(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.clips |= set(batch["clip"].tolist())
        self.method.memory |= {frame.numpy().tobytes() for frame in batch["image"].flatten(0, 1)}  # type: ignore[operator]
        self.update += 1
        return {}

    def check(self) -> int:
        return 0

    def state(self) -> dict[str, torch.Tensor]:
        return self.inner.state()


SEEN: list[Memoriser] = []


def recalled(method: Any, batch: dict[str, torch.Tensor], context: int) -> dict[str, torch.Tensor]:
    """The true frame where it was trained on, black elsewhere."""
    known = torch.tensor([[frame.numpy().tobytes() in method.memory for frame in clip] for clip in batch["image"]])
    truth = batch["image"].permute(0, 1, 4, 2, 3) / 255.0 - 0.5
    return {"prior": torch.where(known[..., None, None, None], truth, -0.5)}


@pytest.mark.parametrize("fraction", [0.4, 0.6])
def test_training_and_held_out_figures_share_no_clip(
    fraction: float, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that only memorises what it is trained on is perfect on that and scores badly on held-out clips."""
    SEEN.clear()
    measured: list[tuple[Any, WindowSampler]] = []
    measure = pretraining.measure_heldout
    monkeypatch.setattr(pretraining, "Updater", Memoriser)
    monkeypatch.setattr(IPV, "open_loop", recalled)
    monkeypatch.setattr(
        pretraining,
        "measure_heldout",
        lambda method, sampler, *rest: measured.append((method, sampler)) or measure(method, sampler, *rest),
    )
    flags = {"precision": "fp32", "device": "cpu", "data": str(store), "threads": 1}
    settings = ("updates=60", "log_every=60", "eval_every=60", "batch_size=4", "eval_batches=2", f"heldout_fraction={fraction}")
    run = compose("ipv", "pretrain", preset="debug", flags=flags, settings=tuple(f"pretrain.{x}" for x in settings))
    path = pretraining.pretrain(run, tmp_path / "run")

    clips = ClipStore(store)
    held = {number for number, name in enumerate(clips.ids) if is_heldout(name, fraction)}
    assert 0 < len(held) < len(clips)
    assert SEEN[0].clips == set(range(len(clips))) - held
    ((method, sampler),) = measured
    assert set(sampler.clips.tolist()) == held
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == "heldout"]
    assert line["psnr/prior"] < 20
    assert line["psnr/last_frame"] > 20
    train = WindowSampler(clips, run.pretrain.length, 4, 0, split="train", heldout_fraction=fraction, prefetch=False)
    on_train = pretraining.measure_heldout(method, train, 2, CPU, None, "pretrain")
    assert on_train["psnr/prior"] > 50


# --------------------------------------------------------------------------------------------------- trivial predictors


def planted(best: str, masked_share: float = 0.5, seed: int = 0) -> tuple[Motion, torch.Tensor]:
    """Motion on which the named predictor is nearly exact and the others are not: (B, T, K) = (2, 6, 4), patches of 4 x 4."""
    g = torch.Generator().manual_seed(seed)
    shape = (2, 6, 4)
    masked = torch.rand(shape, generator=g) < masked_share
    noise = 0.01 * torch.randn(*shape, 4, 4, 2, generator=g)
    if best == "zero":
        loud = torch.randn(*shape, 4, 4, 2, generator=g) * ~masked[..., None, None, None]
        patches = loud + noise
    elif best == "frame_mean":  # all points of a frame move alike, and frames differ
        patches = torch.randn(2, 6, 1, 1, 1, 2, generator=g).expand(*shape, 4, 4, 2) + noise
    else:  # each point keeps its own motion
        patches = torch.randn(2, 1, 4, 4, 4, 2, generator=g).expand(*shape, 4, 4, 2) + noise
    masked[:, 0] = False
    track = torch.arange(4).expand(shape).contiguous()
    return Motion(patches, torch.zeros(*shape, 2), torch.ones(shape, dtype=torch.bool), track), masked


class Rebuilds(IPV):
    """Rebuilds planted motion with a known error; predicts nothing."""

    def plant(self, *batches: tuple[Motion, torch.Tensor], error: float) -> None:
        self.batches, self.error = list(batches), error

    def masked_reconstruction(self, batch: Any, generator: torch.Generator) -> tuple[Motion, torch.Tensor, torch.Tensor]:
        motion, masked = self.batches.pop(0)
        # Wrong where nothing is masked: that must not count.
        return motion, masked, motion.patches + torch.where(masked[..., None, None, None], self.error, 100.0)

    open_loop = Method.open_loop


def rebuilds(*batches: tuple[Motion, torch.Tensor], error: float) -> Rebuilds:
    run = compose("ipv", "pretrain", preset="debug")
    method = Rebuilds(run.model, image_size=64, action_dim=None)
    method.plant(*batches, error=error)
    return method


class Batches:
    """As many empty batches as wanted."""

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": torch.zeros(1, 6, 8, 8, 3, dtype=torch.uint8)}


def written_out(motion: Motion, masked: torch.Tensor, guess: torch.Tensor) -> tuple[float, int]:
    """Sum of squared errors over the masked tokens, and their number (Eq. 5 before the division)."""
    error = ((guess - motion.patches).numpy() ** 2).sum((-3, -2, -1))
    return float(error[masked.numpy()].sum()), int(masked.sum())


@pytest.mark.parametrize("best", ["zero", "frame_mean", "nearest_time"])
def test_the_ratio_is_to_the_best_predictor_over_all_masked_tokens(best: str) -> None:
    """Two batches with different numbers of masked tokens: each token counts once."""
    batches = [planted(best, 0.2, seed=1), planted(best, 0.8, seed=2)]
    error = 0.05
    found = pretraining.measure_heldout(rebuilds(*batches, error=error), Batches(), 2, CPU, None, "pretrain")  # type: ignore[arg-type]
    model = error**2 * 32
    means = {}
    for name in ("zero", "frame_mean", "nearest_time"):
        parts = [written_out(motion, masked, trivial_reconstructions(motion, masked)[name]) for motion, masked in batches]
        means[name] = sum(x for x, _ in parts) / sum(n for _, n in parts)
        assert found[f"masked/{name}"] == pytest.approx(means[name], rel=1e-5)
        assert found[f"masked/ratio_{name}"] == pytest.approx(model / means[name], rel=1e-4)
    assert min(means, key=lambda name: means[name]) == best
    assert found["masked/model"] == pytest.approx(model, rel=1e-5)
    assert found["masked/ratio_best"] == pytest.approx(model / means[best], rel=1e-4)
    assert found["masked/ratio_best"] == max(value for name, value in found.items() if "/ratio_" in name)


def test_trivial_predictors_see_neither_what_is_masked_nor_what_is_not_visible() -> None:
    motion, masked = planted("frame_mean")
    g = torch.Generator().manual_seed(5)
    visible = torch.rand(masked.shape, generator=g) < 0.7
    motion = motion._replace(visible=visible, track=torch.randint(0, 3, masked.shape, generator=g))
    hidden = (masked | ~visible)[..., None, None, None]
    poisoned = motion._replace(patches=torch.where(hidden, 1e6, motion.patches))
    clean, other = trivial_reconstructions(motion, masked), trivial_reconstructions(poisoned, masked)
    for name in ("zero", "frame_mean", "nearest_time"):
        # The sum over visible patches multiplies the hidden ones by zero.
        torch.testing.assert_close(clean[name], other[name], rtol=0, atol=0)
    # Written out: the nearest time at which the same track is usable, the earlier on a tie; else the frame's mean.
    usable = (~hidden[..., 0, 0, 0]).tolist()
    for b, t, k in np.ndindex(*masked.shape):
        track = motion.track
        times = [s for s in range(masked.shape[1]) if usable[b][s][k] and track[b, s, k] == track[b, t, k]]
        expected = clean["frame_mean"][b, t, k]
        if times:
            expected = motion.patches[b, min(times, key=lambda s: (abs(s - t), s)), k]
        torch.testing.assert_close(clean["nearest_time"][b, t, k], expected, rtol=0, atol=0)
        seen = [j for j in range(masked.shape[2]) if usable[b][t][j]]
        mean = motion.patches[b, t, seen].mean(0) if seen else torch.zeros(4, 4, 2)
        torch.testing.assert_close(clean["frame_mean"][b, t, k], mean, rtol=1e-5, atol=1e-6)


def test_examples_are_masked_patches_and_their_reconstruction() -> None:
    motion, masked = planted("nearest_time")
    found = reconstruction_errors(rebuilds((motion, masked), error=0.25), {}, torch.Generator())
    assert found is not None
    errors, examples = found
    assert int(errors["count"]) == int(masked.sum())
    assert len(examples["truth"]) > 3
    torch.testing.assert_close(examples["reconstruction"], examples["truth"] + 0.25)
    hidden = {patch.numpy().tobytes() for patch in motion.patches[masked]}
    assert all(patch.numpy().tobytes() in hidden for patch in examples["truth"])


# ------------------------------------------------------------------------------------------------- open-loop prediction


class Predicts(IPV):
    """Right for ``right`` frames, then a constant offset away."""

    right = 5

    def open_loop(self, batch: dict[str, torch.Tensor], context: int) -> dict[str, torch.Tensor]:
        truth = batch["image"].permute(0, 1, 4, 2, 3) / 255.0 - 0.5
        late = torch.arange(truth.shape[1])[None, :, None, None, None] >= self.right
        return {"planted": truth + 0.1 * late, "beyond": torch.full_like(truth, 7.0)}


def test_open_loop_figures_of_a_planted_prediction() -> None:
    """Frame t has the grey value 20 t + 10 b: every figure is known. Context frames do not count; frame 2 is copied."""
    run = compose("ipv", "pretrain", preset="debug")
    method = Predicts(run.model, image_size=64, action_dim=None)
    method.right = 5
    grey = torch.tensor([[20 * t + 10 * b for t in range(7)] for b in range(2)], dtype=torch.uint8)
    batch = {"image": grey[..., None, None, None].expand(2, 7, 16, 16, 3).contiguous()}
    scores, pictures = open_loop_errors(method, batch, context=3)
    assert set(scores) == {f"{kind}/{name}" for kind in ("psnr", "ssim") for name in ("planted", "beyond", "last_frame")}
    assert all(len(score) == 4 for score in scores.values())
    torch.testing.assert_close(scores["psnr/planted"][:2].float(), torch.tensor([60.0, 60.0]))  # exact: 60 dB stand for no error
    torch.testing.assert_close(scores["psnr/planted"][2:].float(), torch.tensor([20.0, 20.0]), rtol=1e-4, atol=0)
    copied = [20 * math.log10(255 / (20 * ahead)) for ahead in range(1, 5)]
    np.testing.assert_allclose(scores["psnr/last_frame"].numpy(), copied, rtol=1e-4)
    white = [np.mean([20 * math.log10(255 / (255 - 20 * t - 10 * b)) for b in range(2)]) for t in range(3, 7)]
    np.testing.assert_allclose(scores["psnr/beyond"].numpy(), white, rtol=1e-4)  # clipped to white, as a picture is
    assert float(scores["ssim/planted"][0]) == pytest.approx(1, abs=1e-6)
    assert scores["ssim/last_frame"].tolist() == sorted(scores["ssim/last_frame"].tolist(), reverse=True)
    torch.testing.assert_close(pictures["truth"][:, :, 0, 0, 0], grey / 255.0)


def test_held_out_figures_are_means_over_batches_and_horizons(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        def batch(self, index: int) -> dict[str, torch.Tensor]:
            g = torch.Generator().manual_seed(index)
            return {"image": torch.randint(0, 256, (2, 8, 16, 16, 3), generator=g, dtype=torch.uint8)}

    run = compose("ipv", "pretrain", preset="debug")
    method = Predicts(run.model, image_size=64, action_dim=None)
    method.right = 6
    random = torch.get_rng_state()
    found = pretraining.measure_heldout(method, Two(), 2, CPU, None, "pretrain")  # type: ignore[arg-type]
    assert torch.equal(random, torch.get_rng_state())
    assert method.training
    each = [open_loop_errors(method, Two().batch(index))[0] for index in range(2)]
    for name in ("psnr/planted", "psnr/last_frame", "ssim/planted"):
        expected = torch.stack([scores[name] for scores in each]).mean(0)
        np.testing.assert_allclose(found[f"{name}_horizon"], expected.numpy(), atol=6e-5)
        assert found[name] == pytest.approx(float(expected.mean()))
