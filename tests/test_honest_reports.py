"""What is printed is what was measured: statistics and metrics against a second source, evaluation and tables with planted answers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import report_runs
from localmotion.acting.episodes import episode_seed, run_episodes
from localmotion.config import RunConfig
from localmotion.envs import make_env
from localmotion.evaluation import evaluate as evaluation
from localmotion.evaluation import metrics, probes, statistics
from localmotion.evaluation.predict import _spread
from localmotion.evaluation.probe_data import TARGETS, Episodes
from localmotion.evaluation.probe_fits import Fit, mlp, ridge
from localmotion.evaluation.statistics import Curve, bootstrap_interval, final_scores, iqm, summarise
from localmotion.report.table import write_table
from localmotion.runs.read import read_run
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from method_batches import CPU

# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", range(1, 14))
def test_the_interquartile_mean_is_scipys_trimmed_mean(n: int) -> None:
    """Agarwal et al. 2021 compute it as `scipy.stats.trim_mean(scores, 0.25)`; also along either axis, and with ties."""
    rng = np.random.default_rng(n)
    runs = rng.normal(size=(n, 5)) * 100
    runs[:, 0] = np.round(runs[:, 0] / 100)  # ties
    np.testing.assert_allclose(iqm(runs, axis=0), scipy.stats.trim_mean(runs, 0.25, axis=0), rtol=1e-12)
    np.testing.assert_allclose(iqm(runs.T), scipy.stats.trim_mean(runs, 0.25, axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.population_std(runs, axis=0), np.std(runs, axis=0), rtol=1e-12)


def test_the_interval_is_the_quantiles_of_all_resamples() -> None:
    """Five scores have 3125 ordered resamples: their exact quantiles, and those of scipy's percentile bootstrap of the same statistic."""
    scores = np.array([3.0, 10.0, 11.0, 40.0, 100.0])
    every = np.array(list(itertools.product(scores, repeat=5)))
    exact = scipy.stats.trim_mean(every, 0.25, axis=1)
    for level in (0.4, 0.8, 0.95):
        low, high = np.quantile(exact, [(1 - level) / 2, (1 + level) / 2])
        found = bootstrap_interval([scores], level=level, resamples=20_000)
        assert (found.low, found.high) == (pytest.approx(low, abs=1.5), pytest.approx(high, abs=1.5))
        assert found.level == level
        assert found.point == pytest.approx(scipy.stats.trim_mean(scores, 0.25))
    # Of two scores half of all resamples are mixed: 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4.
    for level, ends in ((0.4, (0.5, 0.5)), (0.6, (0.0, 1.0))):
        found = bootstrap_interval([[0.0, 1.0]], statistics.mean, level=level)
        assert (found.low, found.high) == ends
    other = scipy.stats.bootstrap((scores,), iqm, n_resamples=5000, method="percentile", random_state=0).confidence_interval
    found = bootstrap_interval([scores])
    assert (found.low, found.high) == (pytest.approx(other.low, abs=1.5), pytest.approx(other.high, abs=1.5))


def test_an_interval_is_a_function_of_its_seed_and_refuses_impossible_levels() -> None:
    scores = np.random.default_rng(0).normal(size=7)
    few = {"resamples": 50}
    assert bootstrap_interval([scores], **few) == bootstrap_interval([scores], seed=0, **few)
    assert bootstrap_interval([scores], **few) != bootstrap_interval([scores], seed=1, **few)
    assert bootstrap_interval([scores]) == bootstrap_interval([scores], resamples=5000)
    one = bootstrap_interval([scores], resamples=1)
    assert one.low == one.high
    for bad in ({"level": 0.0}, {"level": 1.0}, {"level": 1.5}, {"level": 0.0, "resamples": 0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="level must lie"):
            bootstrap_interval([scores], **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_interval([])


def test_a_summary_holds_the_scores_and_their_statistics() -> None:
    scores = [1.0, 5.0, 2.0, 100.0, 3.0]
    found = summarise(scores, level=0.9, seed=3)
    assert found.scores == tuple(scores)
    assert (found.mean, found.std) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    assert found.iqm == pytest.approx(10 / 3)
    assert found.interval == bootstrap_interval([scores], iqm, level=0.9, seed=3)
    assert found.interval is not None
    assert found.interval.point == found.iqm
    assert summarise(scores) == summarise(scores, level=0.95, seed=0)
    many = np.random.default_rng(1).normal(size=11)  # enough for the seed to show
    assert summarise(many, seed=3).interval == bootstrap_interval([many], iqm, seed=3) != bootstrap_interval([many], iqm, seed=4)
    two, one = summarise([1.0, 3.0]), summarise([4.0])
    assert two.interval == bootstrap_interval([[1.0, 3.0]])
    assert one == statistics.Summary((4.0,), 4.0, 0.0, 4.0, None)


def test_statistics_count_whole_numbers_as_they_are_and_name_what_is_not_finite() -> None:
    assert iqm(np.array([250, 250, 250, 255], np.uint8)) == 250  # no sum in eight bits
    assert statistics.mean(np.array([16777216.0, 1.0, 1.0], np.float32)) == pytest.approx(5592406.0, abs=1e-6)
    with pytest.raises(ValueError, match="2 of 3 scores are not finite"):
        statistics.mean([np.nan, 1.0, np.inf])
    assert final_scores([Curve([0, 1, 2], [9.0, 5.0, 1.0])], last=3).tolist() == [5]
    with pytest.raises(ValueError, match="last must be"):
        final_scores([Curve([0], [1.0])], last=0)
    assert Curve([0, 2], [0, 1]).env_steps.dtype == np.float64


# ------------------------------------------------------------------------------------------------------------ pictures


def test_ssim_and_psnr_are_scikit_images() -> None:
    """Made with scikit-image 0.26: `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255,
    channel_axis=2)` and `peak_signal_noise_ratio`."""
    i, j, c = np.meshgrid(np.arange(16), np.arange(20), np.arange(3), indexing="ij")
    one = (i * 37 + j * 11 + c * 53 + i * j * c) % 256
    other = (one * 7 // 8 + (i * 13 + j * 29) % 31) % 256
    a, b = (torch.from_numpy(x.astype(np.uint8)).permute(2, 0, 1) for x in (one, other))
    assert metrics.ssim(a, b).item() == pytest.approx(0.9817277995299495, abs=1e-9)
    assert metrics.psnr(a, b).item() == pytest.approx(25.816134253167363, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------- evaluation


class Counts:
    """An environment whose reward is known: ``scale`` times the step's number and the action; success once, in the middle."""

    action_dim = 2
    frame_rate = None

    def __init__(self, length: int, scale: float) -> None:
        self.length, self.scale, self.seeds = length, scale, list[int]()

    def reset(self, seed: int) -> dict[str, Any]:
        self.seeds.append(seed)
        self.time = 0
        return {"image": np.zeros((64, 64, 3), np.uint8), "reward": 1000.0}

    def step(self, action: Any) -> tuple[dict[str, Any], bool, dict[str, Any]]:
        self.time += 1
        record = {"image": np.full((64, 64, 3), self.time, np.uint8), "reward": self.scale * self.time * float(action[0])}
        return record, self.time == self.length, {"success": float(self.time == 2 and self.scale > 1)}


def test_returns_are_sums_of_rewards_as_they_are() -> None:
    """Not scaled, not clipped, not discounted; an episode that has ended waits for the others and counts no more."""
    envs = [Counts(3, 1.0), Counts(5, 50.0)]
    found = run_episodes(envs, [7, 8], lambda records, first: np.full((2, 2), 0.5), keep_frames=True)  # type: ignore[arg-type]
    assert found.returns == [0.5 * 6, 0.5 * 50 * 15]
    assert found.lengths == [3, 5]
    assert found.successes == [0.0, 1.0]
    assert found.frames is not None
    assert found.frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    line = found.summary()
    assert line["return_mean"] == np.mean(found.returns)
    assert line["return_std"] == np.std(found.returns)
    assert (line["success_rate"], line["length_mean"], line["episodes"]) == (0.5, 4.0, 2)
    assert [env.seeds for env in envs] == [[7], [8]]


@pytest.mark.parametrize("repeat", [1, 3])
def test_the_random_floor_plays_the_runs_own_environment(repeat: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same action repeat, same episodes as the agent's evaluation, uniform actions, rewards summed as they are."""
    flags = {"device": "cpu", "threads": 1, "seed": 4, "action_repeat": repeat}
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags=flags)
    method = type("NoMethod", (), {"needs": lambda self, config, stage: frozenset(), "image_size": 64})()
    monkeypatch.setattr(evaluation, "load_run", lambda path, **options: (run, method, CPU))
    monkeypatch.setattr(evaluation, "read_config", lambda path: run)
    result = evaluation.random_floor(tmp_path, episodes=7)
    written = json.loads((tmp_path / "random.json").read_text())
    assert written == result

    envs = [make_env("toy:dot", seed=4, size=16, action_repeat=repeat) for _ in range(5)]
    returns: list[float] = []
    for group, begin in enumerate((0, 5)):
        here = envs[: 7 - begin]
        rng = np.random.default_rng(4 * 1000 + group)
        for index, env in enumerate(here):
            env.reset(seed=episode_seed(4, "eval", begin + index))
        sums, done = np.zeros(len(here)), np.zeros(len(here), bool)
        while not done.all():
            actions = rng.uniform(-1, 1, (len(here), 2)).astype(np.float32)
            for k in np.flatnonzero(~done):
                _, reward, terminated, truncated, _ = here[k].step(actions[k])
                sums[k] += float(reward)
                done[k] = terminated or truncated
        returns += sums.tolist()
    np.testing.assert_allclose(result["returns"], returns, atol=1e-4)
    assert result["return_mean"] == pytest.approx(np.mean(returns), abs=1e-4)
    assert (result["policy"], result["episodes"], result["env"]) == ("random", 7, "toy:dot")
    assert evaluation.random_floor(tmp_path, episodes=5) == written  # measured already, on more episodes
    if repeat == 3:
        assert evaluation.random_floor(tmp_path, episodes=8)["returns"][:5] == written["returns"][:5]
        assert json.loads((tmp_path / "random.json").read_text())["episodes"] == 8  # measured on too few: again


def test_best_weights_are_not_scored_on_the_episodes_that_chose_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags={"device": "cpu", "seed": 4})
    asked: list[Any] = []

    def loaded(path: Path, **options: Any) -> tuple[RunConfig, Any, Any]:
        asked.append(options["which"])
        return run, type("NoMethod", (), {"needs": lambda self, config, stage: frozenset(), "image_size": 64})(), CPU

    monkeypatch.setattr(evaluation, "load_run", loaded)
    monkeypatch.setattr(evaluation, "read_config", lambda path: run)
    seeds: list[int] = []
    monkeypatch.setattr(evaluation, "evaluate", lambda policy, make, *, seed, **rest: seeds.append(seed) or evaluation_rollout())
    for which, seed, expected in (("newest", None, 4), ("best", None, 5), ("newest", 9, 9), ("best", 4, 4)):
        assert evaluation.evaluate_run(tmp_path, which=which, seed=seed, policy="random")["seed"] == expected  # type: ignore[arg-type]
    assert asked == ["newest", "best", "newest", "best"]
    assert seeds == [4, 5, 9, 4]


def test_the_agent_is_evaluated_without_exploring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags={"device": "cpu"})
    method = type("NoMethod", (), {"needs": lambda self, config, stage: frozenset(), "image_size": 64})()
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluation, "load_run", lambda path, **options: (run, method, CPU))
    monkeypatch.setattr(evaluation, "read_config", lambda path: run)
    monkeypatch.setattr(evaluation, "MethodPolicy", lambda agent, compute, **options: made.append(options))
    monkeypatch.setattr(evaluation, "evaluate", lambda policy, make, **rest: policy() or evaluation_rollout())
    assert evaluation.evaluate_run(tmp_path)["policy"] == "agent"
    assert made == [{"explore": False, "window": run.online.length}]


def test_predicted_windows_are_spread_over_clips_and_none_comes_twice() -> None:
    sampler: Any = type("Sampler", (), {"clips": np.array([3, 5, 6]), "starts": np.array([4, 2, 1])})()
    for seed in range(4):
        clips, starts = _spread(sampler, 99, seed)
        places = list(zip(clips.tolist(), starts.tolist(), strict=True))
        assert sorted(places) == [(3, 0), (3, 1), (3, 2), (3, 3), (5, 0), (5, 1), (6, 0)]
        assert {clip for clip, _ in places[:3]} == {3, 5, 6}
        few, _ = _spread(sampler, 3, seed)
        assert few.tolist() == clips[:3].tolist()


def evaluation_rollout() -> Any:
    from localmotion.acting.episodes import Rollout

    return Rollout([1.0], [1], [])


# -------------------------------------------------------------------------------------------------------------- probes


def test_an_untrained_network_stands_beside_the_trained_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose("drp", "pretrain", preset="debug")
    method = probes.methods.get("drp")(run.model, image_size=64, action_dim=None)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.fill_(0.5)
    episode = np.repeat(np.arange(10), 4)
    rng = np.random.default_rng(0)
    targets = {kind: rng.normal(size=(40, 2)).astype(np.float32) for kind in TARGETS if kind != "colours"}

    class Data:
        episodes = Episodes("made", episode, targets, None, episode > 7)

        def __init__(self, *arguments: Any, **options: Any) -> None: ...

        def code(self, of: Any) -> Any:
            return targets["actions"]

    models: list[Any] = []
    monkeypatch.setattr(probes, "ProbeData", Data)
    monkeypatch.setattr(probes, "load_run", lambda path, **options: (run, method, CPU))
    monkeypatch.setattr(probes, "_code_of", lambda model, place: models.append(model))
    monkeypatch.setattr(probes, "mlp_fit", lambda *given, **options: Fit(0.25, None))
    rows = probes.probe([Path("walk")], [Path("data")], ceilings=False, device="cpu")
    assert [row["code"] for row in rows] == ["flow, 8x8 grid", "drp, walk", "drp, walk, untrained"]
    assert all(row["ridge actions"] > 0.9 > 0.1 > row["ridge velocities"] for row in rows)  # the planted code is the action
    assert models[0] is method
    fresh = [parameter for parameter in models[1].parameters() if parameter.dim() > 1]
    assert all(not bool((parameter == 0.5).all()) for parameter in fresh)


def test_ceilings_see_the_frame_before_and_the_frame_and_the_true_velocities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of windows; frame t of clip c has the grey value 20 c + t, and its targets say which frame they are of."""
    length, clips, starts = 7, np.array([0, 1, 2]), np.array([0, 2, 4])
    skip = probes.SKIP
    frames = np.concatenate([20 * c + np.arange(s + skip, s + length) for c, s in zip(clips, starts, strict=True)]).astype(
        np.float32
    )
    targets = {"velocities": np.stack([frames, -frames], 1), "actions": frames[:, None] / 2}
    before = targets["velocities"] - np.array([1, -1], np.float32)

    class Data:
        episodes = Episodes("made", np.repeat(clips, length - skip), targets, before, np.repeat(clips, length - skip) > 1)

        class sampler:  # noqa: N801
            class store:  # noqa: N801
                size = 8

        @staticmethod
        def batches() -> Iterator[dict[str, torch.Tensor]]:
            for clip, start in ((clips[:2], starts[:2]), (clips[2:], starts[2:])):
                grey = torch.from_numpy(20 * clip + start)[:, None] + torch.arange(length)
                yield {"image": grey.to(torch.uint8)[..., None, None, None].expand(-1, -1, 8, 8, 3).contiguous()}

    data: Any = Data()
    asked: dict[str, Any] = {}

    def seen(kind: str) -> Any:
        def fit(x: Any, y: Any, episodes: Episodes, **options: Any) -> float:
            assert episodes is data.episodes
            assert options == ({"compute": CPU} if kind == "idm" else {})
            asked[f"{kind} {y.shape[1]}"] = x, y
            return 0.123456

        return fit

    monkeypatch.setattr(probes, "idm", seen("idm"))
    monkeypatch.setattr(probes, "mlp", seen("mlp"))
    rows = probes._ceilings(data, CPU)
    assert sorted(asked) == ["idm 1", "idm 2", "mlp 1"]
    for kind, name in (("idm 2", "velocities"), ("idm 1", "actions")):
        pictures, target = asked[kind]
        assert pictures.shape == (9, 2, 8, 8, 3)
        assert (pictures == pictures[:, :, :1, :1, :1]).all()
        np.testing.assert_array_equal(pictures[:, 1, 0, 0, 0], frames)
        np.testing.assert_array_equal(pictures[:, 0, 0, 0, 0], frames - 1)
        np.testing.assert_array_equal(target, targets[name])
    known, target = asked["mlp 1"]
    np.testing.assert_array_equal(known, np.stack([frames - 1, 1 - frames, frames, -frames], 1))
    np.testing.assert_array_equal(target, targets["actions"])
    shared = {"data": "made", "frames": 9}
    assert rows == [
        {**shared, "code": "idm, trained on the target", "width": 0, "mlp velocities": 0.1235, "mlp actions": 0.1235},
        {**shared, "code": "true velocities, before and after", "width": 4, "mlp actions": 0.1235},
    ]
    for left in (
        replace(data.episodes, targets={"actions": targets["actions"]}, before=None),
        replace(data.episodes, targets={"velocities": targets["velocities"]}),
    ):
        data.episodes = left  # an inverse model needs both, velocities and actions
        assert [row["code"] for row in probes._ceilings(data, CPU)] == ["idm, trained on the target"]


@pytest.mark.parametrize("fit", [ridge, lambda x, y, data: mlp(x, y, data, updates=30)], ids=["ridge", "mlp"])
def test_a_probe_does_not_mind_the_scale_of_a_code(fit: Any) -> None:
    episode = np.repeat(np.arange(20), 10)
    data = Episodes("made", episode, {}, None, episode > 15)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    y = (x[:, :2] + 0.3 * rng.normal(size=(200, 2))).astype(np.float32)
    scale = np.array([1e-3, 1e3, 1, 1, 1, 1], np.float32)
    found = fit(x, y, data)
    assert 0.3 < found < 1
    assert fit(x * scale + 2 * scale, y, data) == pytest.approx(found, abs=0.01)
    still = np.concatenate([x, np.full((200, 1), 3.0, np.float32)], 1)  # a dimension that does not vary says nothing
    assert ridge(still, y, data) == pytest.approx(ridge(x, y, data), abs=1e-4)


# -------------------------------------------------------------------------------------------------------------- tables


def planted(path: Path, seed: int, values: list[float], **line: Any) -> Path:
    """A run whose evaluations are known, the last one at env step 10,000; training episodes that must not be read as evaluations."""
    report_runs.online_run(path, seed=seed, env_steps=10_000, media=False)
    lines = [
        {"kind": "eval", "env_step": step, "return_mean": value, "returns": [value], "episodes": 1, **line}
        for step, value in zip(np.linspace(0, 10_000, len(values)).astype(int).tolist(), values, strict=True)
    ]
    lines += [{"kind": "episode", "env_step": 10_000, "return": 5000.0, "random": False}]
    report_runs.write_lines(path / "metrics.jsonl", lines)
    return path


def test_the_table_shows_each_seeds_last_evaluation(tmp_path: Path) -> None:
    """Neither the best evaluation nor a training episode: seeds ended at 100, 300, 400, 420 and 990 after better ones."""
    ends = [100.0, 300.0, 400.0, 420.0, 990.0]
    runs = [planted(tmp_path / f"r{seed}", seed, [10.0, 995.0, end]) for seed, end in enumerate(ends)]
    rows = write_table(runs, tmp_path)
    cells = [cell.strip() for cell in rows[2].strip("| ").split("|")]
    interval = bootstrap_interval([ends])
    assert cells[2:8] == [
        "5",
        "10,000",
        "return_mean",
        f"{np.mean(ends):.0f}",
        f"{np.std(ends):.0f}",
        f"{(300 + 400 + 420) / 3:.0f}",
    ]
    assert cells[8] == f"{interval.low:.0f} to {interval.high:.0f}"
    assert rows[3] == "| dmc:walker_walk | random policy, 50 episodes | - | - | return_mean | 38.0 | - | - | - |"
    assert (tmp_path / "table.md").read_text() == "\n".join(rows) + "\n"
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert [(curve["seed"], curve["xs"], curve["ys"]) for curve in curves] == [
        (seed, [0, 5000, 10_000], [10.0, 995.0, end]) for seed, end in enumerate(ends)
    ]


def test_success_is_shown_in_per_cent_where_it_was_measured(tmp_path: Path) -> None:
    runs = [planted(tmp_path / f"r{seed}", seed, [0.0, 1.0], success_rate=rate) for seed, rate in enumerate((0.5, 0.8))]
    cells = [cell.strip() for cell in write_table(runs, tmp_path)[2].strip("| ").split("|")]
    assert cells[4:8] == ["success_rate", "65 %", "15 %", "65 %"]


def test_the_random_policy_has_the_score_of_its_column(tmp_path: Path) -> None:
    """Its success rate beside success rates, from the whole episodes of the prefill; where it is not known, no row."""

    def table(name: str, *successes: float | None) -> list[str]:
        path = planted(tmp_path / name, 0, [0.0, 1.0], success_rate=0.5)
        (path / "random.json").unlink()
        whole = {"kind": "episode", "env_step": 10, "return": 4.48, "random": True, "cut": False}
        lines = [whole if success is None else whole | {"success": success} for success in successes]
        known = {"success": 1.0} if any(success is not None for success in successes) else {}
        cut = whole | known | {"cut": True}  # not counted
        evaluated = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
        report_runs.write_lines(path / "metrics.jsonl", [*lines, cut, whole | known | {"random": False}, *evaluated])
        return write_table([path], tmp_path)[3:]

    assert table("a", 1.0, 0.0, 0.0, 0.0) == [
        "| dmc:walker_walk | random policy, 4 episodes | - | - | success_rate | 25 % | - | - | - |"
    ]
    assert "| success_rate | 25 % |" in table("c", 1.0, None, None, None)[0]  # said only where it is true
    assert table("b", None, None) == ["", "No row of the random policy in dmc:walker_walk: its success was not recorded."]


def test_the_page_shows_the_numbers_that_the_run_wrote(tmp_path: Path) -> None:
    from localmotion.report import build, results

    ends = [100.0, 300.0, 440.0]
    runs = [read_run(planted(tmp_path / f"r{seed}", seed, [995.0, end])) for seed, end in enumerate(ends)]
    gathered = results.Gathered(runs)
    (group,) = gathered.groups
    assert results.random_score(runs, "return_mean") == 38
    blocks, tiles = results.results(gathered, "dmc:walker_walk", [group])
    tables = [block for block in blocks if isinstance(block, results.Table)]
    (row, floor) = tables[0].rows
    assert list(row)[1:7] == ["3", "10K", "3", "280", "140", "280"]
    assert list(floor)[:5] == ["random policy", "–", "–", "30", "38.0"]
    assert tiles[0][0] == "280 ± 140"
    assert "random policy 38.0" in tiles[0][1]

    pre = read_run(report_runs.pretrain_run(tmp_path / "pre", media=False))
    line = pre.lines["heldout"][-1]
    assert line["masked/ratio_best"] == line["masked/model"] / 0.48
    _, tiles = build._heldout(results.Gathered([pre]))
    assert tiles[0][0] == f"{line['masked/ratio_best']:.2f}"
    assert tiles[1][0] == f"{line['psnr/motion']:.1f} dB"
    assert f"{line['psnr/zero_motion']:.1f}" in tiles[1][1]


def test_runs_are_grouped_by_task_and_origin_and_the_best_group_heads_the_page(tmp_path: Path) -> None:
    from localmotion.report import results

    kinds = [("dmc:walker_walk", ""), ("dmc:walker_walk", "pre"), ("dmc:cheetah_run", ""), ("dmc:walker_walk", "pre")]
    runs = []
    for number, (env, checkpoint) in enumerate(kinds):
        path = report_runs.online_run(tmp_path / f"r{number}", seed=number, env=env, checkpoint=checkpoint, media=False)
        value = 100.0 * (1 + number)
        report_runs.write_lines(path / "metrics.jsonl", [{"kind": "eval", "env_step": 0, "return_mean": value, "episodes": 1}])
        runs.append(read_run(path))
    gathered = results.Gathered(runs)
    assert [(group.env, group.label, [run.seed for run in group.runs]) for group in gathered.groups] == [
        ("dmc:walker_walk", "drp, from scratch", [0]),
        ("dmc:walker_walk", "drp, pre-trained", [1, 3]),
        ("dmc:cheetah_run", "drp, from scratch", [2]),
    ]
    _, tiles = results.results(gathered, "dmc:walker_walk", gathered.groups[:2])
    assert tiles[0][0] == "300 ± 100"
    assert "drp, pre-trained; drp, from scratch 100;" in tiles[0][1]


def test_the_training_curve_is_of_every_episode_also_of_those_that_end_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parallel environments end several episodes at one env step. Before, only the last of them counted."""
    from localmotion.report import plots, results

    path = planted(tmp_path / "r", 0, [1.0, 2.0])
    few = [(10, 1.0), (10, 3.0), (20, 5.0), (20, math.inf)]
    report_runs.write_lines(
        path / "metrics.jsonl", [{"kind": "episode", "env_step": x, "return": y, "random": False} for x, y in few]
    )
    drawn: list[plots.CurveGroup] = []
    monkeypatch.setattr(plots, "learning_curves", lambda groups, **_: drawn.extend(groups) or b"<svg></svg>")
    gathered = results.Gathered([read_run(path)])
    results.results(gathered, "dmc:walker_walk", gathered.groups)
    (curve,) = drawn[-1].curves
    assert (curve.env_steps.tolist(), curve.values.tolist()) == ([10, 20], [2, 5])
    assert "r: 1 returns of training episodes are not finite and left out." in gathered.missing

    rng = np.random.default_rng(0)
    xs = np.repeat(np.arange(25.0), rng.integers(1, 9, 25))  # more episodes than bins
    ys = rng.normal(size=len(xs))
    curve = results.binned(xs, ys, bins=10)
    assert len(curve.values) <= 10
    np.testing.assert_allclose(results.binned(xs, ys, bins=1000).values, [ys[xs == x].mean() for x in range(25)])
    one = results.binned(np.full(100, 7.0), np.arange(100.0))  # all episodes end at once
    assert (one.env_steps.tolist(), one.values.tolist()) == ([7], [49.5])
    assert results.binned(np.arange(80.0), np.arange(80.0)).values.tolist() == [2 * i + 0.5 for i in range(40)]


def test_without_a_measured_floor_the_random_episodes_count_and_no_others(tmp_path: Path) -> None:
    from localmotion.report import results

    path = planted(tmp_path / "r", 0, [1.0, 2.0])
    (path / "random.json").unlink()
    lines = [{"kind": "episode", "env_step": 10 * n, "return": value, "random": random, "cut": False} for n, (value, random) in
             enumerate([(10.0, True), (20.0, True), (900.0, False), (800.0, None)])]  # fmt: skip
    report_runs.write_lines(path / "metrics.jsonl", lines)
    runs = [read_run(path)]
    assert results.random_score(runs, "return_mean") == 15
    assert results.random_score(runs, "success_rate") is None


def test_a_random_episode_that_the_prefill_cut_is_no_measurement(tmp_path: Path) -> None:
    from localmotion.report import results

    def measured(*episodes: dict[str, Any], limit: int | None = 1000) -> float | None:
        path = planted(tmp_path / f"r{len(list(tmp_path.iterdir()))}", 0, [1.0, 2.0])
        (path / "random.json").unlink()
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"online": {"prefill": 2000}}))
        if limit:
            (path / "environment.json").write_text(json.dumps({"env": {"time_limit": limit, "action_repeat": 2}}))
        report_runs.write_lines(path / "metrics.jsonl", [{"kind": "episode", "random": True, **episode} for episode in episodes])
        return results.random_score([read_run(path)], "return_mean")

    marked = {"env_step": 2120, "return": 4.0, "length": 60}
    assert measured(marked | {"cut": True}) is None
    assert measured(marked | {"cut": False}) == 4  # it is short because the environment ended it
    assert measured(marked | {"cut": True}, {"env_step": 1000, "return": 30.0, "length": 500, "cut": False}) == 30
    # Lines of earlier versions have no mark: what ended within the prefill is whole, and what is as long as an episode may be.
    assert measured(marked) is None
    assert measured({"env_step": 120, "return": 8.0, "length": 60}) == 8
    assert measured({"env_step": 2400, "return": 9.0, "length": 500}) == 9
    assert measured({"env_step": 2400, "return": 9.0, "length": 500}, limit=None) is None


def test_a_run_marks_the_episodes_that_it_cut(tmp_path: Path) -> None:
    few = ("env_steps=60", "prefill=24", "warmup_updates=1", "online.batch_size=2", "online.length=4", "online.eval_every=100000")
    for limit, cut in ((60, [True, True]), (20, [False, False, False])):
        settings = (*few, "eval_episodes=1", "device=cpu", "precision=fp32", f"env_options={{time_limit: {limit}}}")
        out = finetune(compose("dreamer_v2", "train", preset="debug", env="toy:dot", settings=settings), tmp_path / f"{limit}")
        assert [line["cut"] for line in read_run(out).lines["episode"]] == cut
