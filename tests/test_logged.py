"""Logged episodes: what `collect --store` keeps for each frame, the sequences drawn from it, and learning from them alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from localmotion.acting.episodes import Rollout
from localmotion.cli import main
from localmotion.config import RunConfig
from localmotion.envs import make_env
from localmotion.envs.toy import BLOCK_OPTIMAL
from localmotion.errors import ConfigError, StoreError
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.recipe import Recipe
from localmotion.recording import collect as collecting
from localmotion.recording.collect import collect
from localmotion.recording.logs import EpisodeSampler
from localmotion.replay import Replay
from localmotion.report.build import report
from localmotion.runs import checkpoint
from localmotion.runs.settings import compose
from localmotion.training import trials
from localmotion.training.finetune import finetune
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore
from test_resume import Stops, assert_same, in_pieces

TINY = Recipe(size=32, percept_size=32, tracks=8)
FLAGS: dict[str, Any] = {"precision": "fp32", "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / "store"
    collect("toy:block", path, policy="random", episodes=6, seed=1, recipe=TINY, time_limit=18)
    return path


def settings(store: Path, *texts: str, name: str = "dreamer_v2", env: str = "toy:block") -> RunConfig:
    flags = {**FLAGS, "data": str(store), "env_options": {"time_limit": 18} if env else {}}
    return compose(name, "finetune", preset="debug", env=env, flags=flags, settings=("eval_episodes=1", *texts))


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_store_keeps_what_led_to_each_frame(store: Path) -> None:
    """Played again in the environment, the stored actions give the stored rewards and pictures."""
    clips, entries = ClipStore(store), json.loads((store / "collection.json").read_text())["episodes"]
    assert set(clips.extra) == {"action", "reward", "is_terminal"}
    env = make_env("toy:block", size=32, time_limit=18)
    clip = clips.clip(2)
    obs, _ = env.reset(seed=next(entry["seed"] for entry in entries if entry["id"] == clip.id))
    np.testing.assert_array_equal(obs["image"], clip.frames[0])
    assert not clip.extra["action"][0].any()
    assert clip.extra["reward"][0] == 0
    for t in range(1, len(clip.frames)):
        obs, reward, *_ = env.step(clip.extra["action"][t])
        np.testing.assert_array_equal(obs["image"], clip.frames[t])
        assert clip.extra["reward"][t] == pytest.approx(reward, abs=1e-6)
    assert not clip.extra["is_terminal"].any()  # a time limit is no end by the task's rules


def test_an_end_by_the_tasks_rules_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = type(make_env("toy:block"))
    step = env.step
    monkeypatch.setattr(env, "step", lambda self, action: (*step(self, action)[:2], True, *step(self, action)[3:]))
    collect("toy:block", tmp_path, policy="random", episodes=2, recipe=TINY)
    assert ClipStore(tmp_path).clip(0).extra["is_terminal"].tolist() == [0, 1]


def test_masks_are_those_of_the_environment(tmp_path: Path) -> None:
    collect("dmc:cartpole_balance", tmp_path, policy="random", episodes=1, steps=3, recipe=Recipe(size=36, percept_size=36))
    batch = EpisodeSampler(ClipStore(tmp_path), 4, 1, 0, mask=True).batch(0)
    entry = json.loads((tmp_path / "collection.json").read_text())["episodes"][0]
    env: Any = make_env("dmc:cartpole_balance", size=36)
    env.reset(seed=entry["seed"])
    for t in range(4):
        if t:
            env.step(np.load(tmp_path / "actions" / f"{entry['id']}.npy")[t])
        truth = env.agent_mask(36)
        assert 0 < truth.sum() < truth.size / 2
        np.testing.assert_array_equal(batch["mask"][0, t].numpy(), truth)


def test_an_interrupted_collection_ends_with_the_same_bytes(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play, left = collecting._Player.play, [4]

    def stopped(self: Any, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return play(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(collecting._Player, "play", stopped)
        with pytest.raises(KeyboardInterrupt):
            collect("toy:block", tmp_path, policy="random", episodes=6, seed=1, recipe=TINY, time_limit=18)
    collect("toy:block", tmp_path, policy="random", episodes=6, seed=1, recipe=TINY, time_limit=18)
    files = [file.relative_to(store) for file in sorted((store / "shards").rglob("*")) if file.is_file()]
    assert {file.name for file in files} >= {"action.f32", "reward.f32", "is_terminal.u8"}
    for file in files:
        assert (tmp_path / file).read_bytes() == (store / file).read_bytes(), file


def test_a_store_without_these_arrays_is_not_added_to(tmp_path: Path) -> None:
    plain = collecting.ClipStoreWriter.open(tmp_path, 32, TINY.to_json(), TINY.hash(), 8, collecting.SHARD_CLIPS)
    assert ClipStore(plain.path).extra == {}
    with pytest.raises(StoreError, match="further arrays none, this command writes action, is_terminal, reward; use another"):
        collecting.ClipStoreWriter.open(
            tmp_path, 32, TINY.to_json(), TINY.hash(), 8, collecting.SHARD_CLIPS, collecting.logged(2)
        )


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("../up", {"file": "../up.f32", "dtype": "<f4", "shape": []}),
        ("reward", {"file": "../reward.f32", "dtype": "<f4", "shape": []}),
        ("reward", {"file": "reward.f32", "dtype": "|O", "shape": []}),
        ("reward", {"file": "reward.f32", "dtype": "<f4", "shape": [0]}),
        ("reward", {"file": "reward.f32", "dtype": "<f4", "shape": [1 << 20, 1 << 20]}),
    ],
)
def test_a_header_with_other_arrays_is_refused(store: Path, tmp_path: Path, name: str, entry: Any) -> None:
    shutil.copytree(store, tmp_path / "store")
    header = json.loads((store / "store.json").read_text())
    header["arrays"][name] = entry
    (tmp_path / "store" / "store.json").write_text(json.dumps(header))
    with pytest.raises(StoreError, match="is damaged"):
        ClipStore(tmp_path / "store")


# --- sequences --------------------------------------------------------------------------------------------------------


def test_sequences_are_those_of_a_replay(store: Path) -> None:
    """Each is a window of one episode, with the keys, types and first positions that `Replay` gives."""
    clips = ClipStore(store)
    sampler = EpisodeSampler(clips, 7, 5, 0, motion=True)
    spec = {"image": ((32, 32, 3), "uint8"), "action": ((2,), "float32"), "reward": ((), "float32"), "is_terminal": ((), "bool")}
    spec |= {
        "flow": ((32, 32, 2), "float16"),
        "tracks": ((8, 2), "float32"),
        "visible": ((8,), "bool"),
        "track_id": ((8,), "int32"),
    }
    replay = Replay(spec, capacity=100, length=7)
    for t in range(9):
        replay.add({key: np.zeros(shape, dtype) for key, (shape, dtype) in spec.items()}, last=t == 8)
    like = replay.sample(5)
    windows = WindowSampler(clips, 7, 1, 0, split="all", prefetch=False)
    for index in range(6):
        batch = sampler.batch(index)
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in like.items()}
        for row in range(5):
            (place,) = [
                (clip, start)
                for clip in range(6)
                for start in range(13)
                if np.array_equal(clips.window("frames", clip, start, start + 7), batch["image"][row].numpy())
            ]
            clip, start = place
            assert batch["is_first"][row].tolist() == [True] + [False] * 6
            np.testing.assert_array_equal(batch["action"][row, 1:], clips.window("action", clip, start + 1, start + 7))
            assert not batch["action"][row, 0].any()
            np.testing.assert_array_equal(batch["reward"][row], clips.window("reward", clip, start, start + 7))
            (window,) = [windows.windows(np.array([clip]), np.array([start]))]
            for key in ("flow", "tracks", "visible", "track_id"):
                assert torch.equal(batch[key][row], window[key][0]), key


def test_short_episodes_follow_each_other(store: Path) -> None:
    """19 frames a clip: a sequence of 50 is two whole episodes and a window of a third, each from its own first frame on."""
    batch = EpisodeSampler(ClipStore(store), 50, 3, 0).batch(0)
    for row in range(3):
        assert torch.nonzero(batch["is_first"][row]).flatten().tolist() == [0, 19, 38]
        assert not batch["action"][row, [0, 19, 38]].any()


def test_episodes_may_begin_with_copies_of_their_first_frame(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies have no action and no reward. A piece of 7 with a lead of 2 has four steps, so the first and the last of 15 pieces are
    drawn four times as often as the others."""
    clips = ClipStore(store)
    sampler = EpisodeSampler(clips, 7, 50, 0, lead=2, motion=True)
    drawn: list[Any] = []
    draw = sampler._pieces
    monkeypatch.setattr(sampler, "_pieces", lambda rng: (drawn.append(draw(rng)), drawn[-1])[1])
    for index in range(6):
        drawn.clear()
        batch = sampler.batch(index)
        for row, ((_, clip, begin, _),) in enumerate(drawn):
            copies, start = max(-begin, 0), max(begin, 0)
            frames = batch["image"][row].numpy()
            assert (frames[:copies] == frames[copies]).all()
            assert np.array_equal(clips.window("frames", clip, start, start + 7 - copies), frames[copies:])
            assert batch["is_first"][row].tolist() == [True] + [False] * 6
            assert not batch["action"][row, : copies + 1].any()
            np.testing.assert_array_equal(
                batch["action"][row, copies + 1 :], clips.window("action", clip, start + 1, start + 7 - copies)
            )
            np.testing.assert_array_equal(batch["reward"][row, copies:], clips.window("reward", clip, start, start + 7 - copies))
            assert not batch["reward"][row, :copies].any()
    starts = np.array([draw(np.random.default_rng(number))[0].start for number in range(6000)])
    each = 6000 / 21 * np.array([4, *[1] * 13, 4])
    assert (abs(np.bincount(starts + 2, minlength=15) - each) < 5 * each**0.5).all()  # five standard deviations
    # Two whole episodes with their copies, and eight positions of a third.
    short = EpisodeSampler(clips, 50, 30, 0, lead=2).batch(0)
    assert all({0, 21, 42} == set(torch.nonzero(row).flatten().tolist()) for row in short["is_first"])
    # One position is left for a second episode: a frame, and no copy before it.
    tiny = EpisodeSampler(clips, 22, 200, 0, lead=2).batch(0)
    assert all(torch.nonzero(row).flatten().tolist() == [0, 21] for row in tiny["is_first"])


def test_a_batch_is_a_function_of_seed_and_index(store: Path) -> None:
    clips = ClipStore(store)
    one, other = EpisodeSampler(clips, 6, 4, 3), EpisodeSampler(clips, 6, 4, 3)
    one.batch(0)
    assert all(torch.equal(a, b) for a, b in zip(one.batch(5).values(), other.batch(5).values(), strict=True))
    for changed in (other.batch(6), EpisodeSampler(clips, 6, 4, 4).batch(5)):
        assert not torch.equal(one.batch(5)["image"], changed["image"])


def test_episodes_and_starts_are_uniform_and_ends_can_be_drawn_more_often(store: Path) -> None:
    clips = ClipStore(store)
    counts = []
    for ends in (False, True):
        sampler = EpisodeSampler(clips, 10, 1, 0, prioritize_ends=ends)
        pieces = [sampler._pieces(np.random.default_rng(i))[0] for i in range(6000)]
        drawn = np.bincount([piece.clip for piece in pieces], minlength=6)
        assert abs(drawn - 1000).max() < 5 * 29  # five standard deviations
        counts.append(np.bincount([piece.start for piece in pieces], minlength=10))
    assert abs(counts[0] - 600).max() < 5 * 24
    assert counts[1][9] > 3000  # eleven of twenty draws lie at or behind the last start
    assert abs(counts[1][:9] - 300).max() < 5 * 17


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dreamer_v2", "drp"])
def test_a_run_from_logs_in_pieces_is_the_whole_run(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(store, "updates=12", "log_every=4", "online.eval_every=5", "online.save_every=3", name=name)
    whole = finetune(run, tmp_path / "whole")
    rows = [json.loads(text) for text in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows if row["kind"] == "eval"] == [5, 10, 12]
    assert [row["update"] for row in rows if row["kind"] == "train"] == [4, 8, 12]
    assert "episode" not in {row["kind"] for row in rows}  # it never plays to learn
    Stops(monkeypatch, 24, 50, 400)
    assert in_pieces(finetune, run, tmp_path / "pieces") >= 2
    assert_same(whole, tmp_path / "pieces")
    again = evaluate_run(whole, episodes=2)
    assert again == evaluate_run(whole, episodes=2)
    page = report([whole], tmp_path / "page.html").read_text()
    for text in (
        "Results in toy:block, from logged episodes",
        "Learning from logged episodes",
        "after 12 updates",
    ):
        assert text in page, text
    assert "env steps." not in page


def test_a_resumed_run_keeps_its_best_evaluation(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(trials, "evaluate", lambda *_, **__: Rollout([next(scores)], [1]))
    run = settings(store, "updates=12", "online.eval_every=5", "online.save_every=3")
    Stops(monkeypatch, 8, 100)
    assert in_pieces(finetune, run, tmp_path) == 1
    assert checkpoint.read_state(checkpoint.best(tmp_path))["update"] == 5


def test_without_an_environment_it_is_judged_where_one_says(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--method", "dreamer_v2", "--data", str(store), "--preset", "debug", "--run", str(tmp_path / "run")]
    main([*command, "--updates", "3"])
    told = capsys.readouterr().out
    assert "6 episodes, 114 frames" in told
    assert "not evaluated: no --env" in told
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run"), "--episodes", "1"])
    assert "give the environment with --env" in capsys.readouterr().err
    main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--env", "toy:block"])
    assert '"env": "toy:block"' in capsys.readouterr().out


def test_the_environment_that_judges_acts_at_the_rate_of_the_logs(tmp_path: Path) -> None:
    collect("toy:block", tmp_path / "logs", policy="random", episodes=2, recipe=TINY, time_limit=18, action_repeat=3)
    run = finetune(settings(tmp_path / "logs", "updates=2", "online.length=5"), tmp_path / "run")
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["length_mean"] for row in rows if row["kind"] == "eval"] == [6]


def test_what_cannot_be_learned_from_is_refused_before_the_work(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="logged with 2 action dimensions, dmc:cartpole_balance has 1"):
        finetune(
            compose("dreamer_v2", "finetune", preset="debug", env="dmc:cartpole_balance", flags={**FLAGS, "data": str(store)}),
            tmp_path,
        )
    with pytest.raises(ConfigError, match=r"action_repeat=4: .* was logged with 1; leave it out"):
        finetune(settings(store, "action_repeat=4"), tmp_path)
    with pytest.raises(ConfigError, match="logged episodes have pictures only"):
        finetune(settings(store, "observed=vectors", name="dreamer_v3"), tmp_path)
    with pytest.raises(ConfigError, match="or logged episodes with --data"):
        finetune(compose("dreamer_v2", "train", preset="debug"), tmp_path)
    plain = tmp_path / "plain"
    collecting.ClipStoreWriter.open(plain, 32, TINY.to_json(), TINY.hash(), 8)
    with pytest.raises(StoreError, match=r"no action, reward, is_terminal for each frame.*collect ENV --out DIR --store"):
        finetune(settings(plain), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dreamer_v2", "dreamer_v3"])
def test_a_method_learns_the_block_from_logged_random_transitions(name: str, tmp_path: Path) -> None:
    """4,000 transitions of random actions, 90 % of the optimum, mean of ten episodes of starts that were not logged."""
    from test_learning_toy import DREAMERS, OWN, QUICK

    path = tmp_path / "store"
    found = collect("toy:block", path, policy="random", episodes=80, seed=5, recipe=TINY)
    assert sum(episode["frames"] - 1 for episode in found.episodes) == 4000
    texts = {text.partition("=")[0].rpartition(".")[2]: text for text in (*OWN.get(name, DREAMERS), *QUICK)}
    if name == "dreamer_v3":
        texts["depth"] = "model.depth=8"
    reached = []
    for updates in (300, 600, 1200):
        own = (*(text for key, text in texts.items() if key not in ("prefill", "warmup_updates")), f"updates={updates}")
        flags = {**FLAGS, "data": str(path)}
        finetune(compose(name, "finetune", preset="debug", env="toy:block", flags=flags, settings=own), tmp_path / "run")
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        final = [row for row in rows if row["kind"] == "eval"][-1]
        assert (final["episodes"], final["update"]) == (10, updates)
        reached.append(final["return_mean"])
        if reached[-1] > 0.9 * BLOCK_OPTIMAL:
            break
    assert reached[-1] > 0.9 * BLOCK_OPTIMAL, reached
