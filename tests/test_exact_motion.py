"""Exact motion in place of perceived motion: in streams, in collected clips, and as a setting of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmotion.acting.observer import Observer, streaming_recipe
from localmotion.cli import main
from localmotion.config import RunConfig
from localmotion.envs import make_env
from localmotion.envs.truth import motion_truth
from localmotion.errors import ConfigError
from localmotion.perception.clips import ClipExtractor, seed_of
from localmotion.perception.stream import StreamingExtractor, shrink_flow
from localmotion.recipe import Recipe
from localmotion.recording.collect import collect
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.video.store import ClipStore

SEEN = Recipe(size=16, percept_size=32, tracks=8, redraw_rounds=0)
EXACT = SEEN.with_motion("exact")
WALKER = "planar:walker_run"


def observer(recipe: Recipe, env: str = WALKER, **options: Any) -> Observer:
    return Observer(make_env(env, size=recipe.size, percept_size=recipe.percept_size, **options), recipe)


def actions(count: int, dim: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, dim)).astype(np.float32)


def test_a_recipe_says_which_motion_it_is() -> None:
    assert (EXACT.flow, EXACT.segment, EXACT.track, EXACT.redraw_rounds) == ("exact", "exact", "exact", 0)
    assert EXACT.exact
    assert not SEEN.exact
    assert replace(SEEN, track="exact").exact
    assert EXACT.hash() != SEEN.hash()
    assert EXACT.with_motion("perceived") == SEEN.with_motion("perceived") == SEEN == SEEN.with_motion("recipe")
    assert EXACT.with_motion("recipe") == EXACT == streaming_recipe(Recipe(size=16, percept_size=32, tracks=8), "exact")
    other = replace(SEEN, flow="sea_raft", track="exact")
    assert other.with_motion("perceived") == replace(SEEN, flow="sea_raft")
    with pytest.raises(ConfigError, match="redraw_rounds=0"):
        replace(EXACT, redraw_rounds=1)


def test_a_stream_has_the_flow_of_the_simulator() -> None:
    watched = observer(EXACT)
    env: Any = watched.env
    first = watched.reset(1)
    assert not first["flow"].any()
    assert not first["visible"].any()
    moved = 0
    for action in actions(6, 6):
        record = watched.step(action)[0]
        np.testing.assert_array_equal(record["flow"], shrink_flow(env.exact_flow(), 2))
        moved += record["flow"].any()
    assert moved == 6
    watched.reset(2)  # the last episode's pictures are forgotten
    record = watched.step(actions(1, 6)[0])[0]
    np.testing.assert_array_equal(record["flow"], shrink_flow(env.exact_flow(), 2))


def test_points_begin_on_the_body_and_stay_on_their_part() -> None:
    watched = observer(EXACT)
    env: Any = watched.env
    watched.reset(3)
    truth = motion_truth(env)
    states: list[Any] = [truth.snapshot(32)]
    begun: dict[int, tuple[int, np.ndarray]] = {}  # when and where each track began
    followed = 0
    for t, action in enumerate(actions(25, 6)):
        on_agent = env.agent_mask(32)
        record = watched.step(action)[0]
        states.append(truth.snapshot(32))
        points = record["tracks"] * 2 + 0.5  # in pixels of the picture at which motion is known
        for track, point, seen in zip(record["track_id"].tolist(), points, record["visible"], strict=True):
            if track not in begun:
                column, row = np.floor(point + 0.5).astype(int)
                assert on_agent[row, column]
                begun[track] = t, point
            first, start = begun[track]
            true, visible = truth.tracks(states[first:], start[None])
            np.testing.assert_allclose(point, true[t - first, 0], atol=1e-3)
            assert seen == visible[-1, 0]
            followed += t - first > 5
    assert followed > 50


def test_flow_over_several_steps_is_the_motion_between_their_ends() -> None:
    watched = observer(replace(EXACT, flow_span=3))
    truth = motion_truth(watched.env)  # type: ignore[arg-type]
    watched.reset(1)
    states = [truth.snapshot(32)]
    for action in actions(5, 6):
        record = watched.step(action)[0]
        states = [*states, truth.snapshot(32)][-4:]
        np.testing.assert_array_equal(record["flow"], shrink_flow(truth.flow(states[0], states[-1])[0], 2))


def test_an_episode_begins_without_the_last_ones_pictures() -> None:
    env: Any = make_env("toy:block", size=16, percept_size=32)
    stream = StreamingExtractor(replace(EXACT, flow_span=3), 0, env)
    push = np.ones(env.action_space.shape, np.float32)
    fields = []
    for seed in (0, 1, 0):
        stream.reset(env.reset(seed=seed)[0]["percept"])
        fields.append([stream.step(env.step(push)[0]["percept"]).flow for _ in range(2)])
    np.testing.assert_array_equal(fields[2], fields[0])


def test_a_jump_of_the_picture_is_no_cut() -> None:
    """Perceived motion guesses cuts; a simulator's pictures have none."""
    env: Any = make_env("toy:block", size=16, percept_size=32)
    stream = StreamingExtractor(EXACT, 0, env)
    picture = env.reset(seed=0)[0]["percept"]
    stream.reset(picture)
    env.step(np.ones(env.action_space.shape, np.float32))
    moved = stream.step(255 - picture)
    assert moved.flow.any()
    assert moved.visible.any()


@pytest.mark.parametrize("env", ["toy:block", "toy:moving_background"])
def test_motion_alone_is_that_of_flow(env: str) -> None:
    made: Any = make_env(env, size=32)
    made.reset(seed=0)
    truth = motion_truth(made)
    a = truth.snapshot()
    made.step(np.ones(made.action_space.shape, np.float32))
    b = truth.snapshot()
    flow = truth.motion(a, b)
    assert flow.any()
    np.testing.assert_array_equal(flow, truth.flow(a, b)[0])


def test_a_streams_episode_is_the_clip_that_extraction_makes() -> None:
    watched = observer(SEEN)
    env: Any = watched.env
    frames = [env.reset(seed=0)[0]["percept"]]
    frames += [env.step(action)[0]["percept"] for action in actions(12, 6)]
    clip = ClipExtractor(SEEN).extract(np.stack(frames), "a")
    stream = StreamingExtractor(SEEN, seed_of("a", SEEN.seed))
    made = stream.clip([stream.reset(frames[0]), *(stream.step(frame) for frame in frames[1:])])
    for name in ("flow", "tracks", "visible", "track_id"):
        np.testing.assert_array_equal(getattr(made, name), getattr(clip, name), err_msg=name)
    assert made.info["flow"] == clip.info["flow"]
    assert made.info["followed"] == clip.info["followed"]


def test_a_collection_has_the_simulators_motion(tmp_path: Path) -> None:
    out = tmp_path / "store"
    main(["collect", WALKER, "--out", str(out), "--store", "--motion", "exact", "--episodes", "2", "--steps", "6",
          "--size", "16", "--percept-size", "32", "--tracks", "8", "--env-options", '{"look": "textured"}'])  # fmt: skip
    store = ClipStore(out)
    assert store.recipe == EXACT.to_json()
    env: Any = make_env(WALKER, size=16, percept_size=32, look="textured")
    entry = json.loads((out / "collection.json").read_text())["episodes"][1]
    clip = store.clip(1)
    picture = env.reset(seed=entry["seed"])[0]["image"]
    for t in range(6):
        np.testing.assert_array_equal(clip.frames[t], picture)
        picture = env.step(clip.extra["action"][t + 1])[0]["image"]
        np.testing.assert_array_equal(clip.flow[t], shrink_flow(env.exact_flow(), 2))
    assert not clip.flow[-1].any()
    assert not clip.visible[-1].any()
    assert clip.visible[:-1].mean() > 0.5
    before = out.stat().st_mtime_ns, len(store.ids)
    again = collect(WALKER, out, episodes=2, steps=6, recipe=EXACT, look="textured")
    assert again.new == 0
    assert before[1] == 2


def test_pictures_alone_have_no_exact_motion() -> None:
    for make in (lambda: ClipExtractor(EXACT), lambda: StreamingExtractor(EXACT, 0)):
        with pytest.raises(ConfigError, match=r"simulator's state.*collect --store"):
            make()
    with pytest.raises(SystemExit):
        main(["collect", WALKER, "--out", "unused", "--motion", "exact"])
    assert not Path("unused").exists()


@pytest.mark.parametrize("given", [["--flow", "exact"], ["--redraw-rounds", "2"]])
def test_what_motion_chooses_is_not_chosen_twice(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that a flag names is neither replaced nor ignored."""
    command = ["collect", "toy:block", "--out", str(tmp_path / "store"), "--store", "--episodes", "1", "--steps", "2"]
    with pytest.raises(SystemExit):
        main([*command, "--motion", "exact", *given])
    assert "chooses" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_exact_backends_by_name_are_exact_motion(tmp_path: Path) -> None:
    sizes = ["--size", "16", "--percept-size", "32", "--tracks", "8", "--episodes", "1", "--steps", "2"]
    names = ["--flow", "exact", "--segment", "exact", "--track", "exact", "--redraw-rounds", "0"]
    main(["collect", "toy:block", "--out", str(tmp_path / "store"), "--store", *sizes, *names])
    assert ClipStore(tmp_path / "store").recipe == EXACT.to_json()


def settings(method: str = "drp", *given: str) -> RunConfig:
    flags = {"device": "cpu", "recipe": SEEN.to_json(), "online": {"env_steps": 60, "prefill": 40, "updates": 2}}
    return compose(method, "train", preset="debug", env="toy:block", flags=flags, settings=given)


def test_the_motion_of_a_run_is_a_setting(tmp_path: Path) -> None:
    for motion in ("exact", "recipe"):
        path = finetune(settings("drp", f"motion={motion}"), tmp_path / motion)
        kept = json.loads((path / "environment.json").read_text())["recipe"]
        assert kept["flow"] == ("exact" if motion == "exact" else "dis")
    with pytest.raises(ConfigError, match="ipv perceives no motion"):
        finetune(settings("ipv", "motion=exact"), tmp_path / "ipv")
