"""Films and pictures of plans: what a method expected, beside what followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from localmotion import methods
from localmotion.acting.episodes import Planned, Rollout, run_episodes
from localmotion.acting.observer import Observer
from localmotion.acting.policy import MethodPolicy, Plan
from localmotion.compute import PLAIN
from localmotion.envs import make_env
from localmotion.envs.toy import LayeredEnv
from localmotion.errors import LocalmotionError
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.evaluation.films import CHOSEN, GAP, LINE, MOST, SIDE, film, panel, save_plans
from localmotion.report import media, strips
from localmotion.report.build import report
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.video.decode import iter_frames, probe
from localmotion.video.listing import VideoRef
from small_planner import AHEAD, CANDIDATES, Planner, PlannerConfig

FLAGS: dict[str, Any] = {"precision": "fp32", "device": "cpu", "threads": 1, "recipe": {"size": 32, "percept_size": 32}}
FEW = ("env_steps=24", "prefill=12", "warmup_updates=1", "eval_episodes=1", "online.batch_size=2", "online.length=6")


def plain(level: int, *shape: int) -> np.ndarray:
    return np.full((*shape, 16, 16, 3), level, np.uint8)


def counted(steps: int, frames: int, goal: bool = True) -> Planned:
    """An episode whose picture t has the level 5 t, and plans that expect just that."""
    plans = [Plan(np.stack([plain(5 * (t + k)) for k in range(1, frames + 1)]), plain(7, 3), t % 3) for t in range(steps)]
    return Planned(np.stack([plain(5 * t) for t in range(steps + 1)]), plain(250) if goal else None, plans)


def player(steps: int = 8, size: int = 32) -> tuple[Observer, MethodPolicy]:
    method = Planner(PlannerConfig(), image_size=size, action_dim=2)
    observer = Observer(make_env("toy:block", size=size, time_limit=steps, goal=True), None)
    return observer, MethodPolicy(method, PLAIN, explore=False, window=4)


def test_an_episodes_plans_belong_to_its_pictures() -> None:
    """The first expected picture is what the environment shows next: the small planner knows it, except at walls and in rounding."""
    torch.manual_seed(0)
    observer, policy = player(20, 64)
    shorter = player(3, 64)[0]
    rollout = run_episodes([observer, shorter], [1, 2], policy, keep_frames=True)
    found = rollout.plans
    assert found is not None
    assert found.goal is not None
    assert len(found.seen) == len(found.plans) + 1 == 21
    np.testing.assert_array_equal(found.goal, observer.reset(1)["goal"])
    errors = np.array(
        [[np.abs(plan.frames[0].astype(float) - found.seen[t + k]).mean() for k in (0, 1)] for t, plan in enumerate(found.plans)]
    )
    assert np.median(errors[:, 1]) < 2 < np.median(errors[:, 0])
    for plan in found.plans:
        assert plan.frames.shape == (AHEAD, 64, 64, 3)
        assert plan.ends.shape == (CANDIDATES, 64, 64, 3)
        np.testing.assert_array_equal(plan.ends[plan.chosen], plan.frames[-1])
    first = run_episodes([shorter, observer], [1, 2], policy, keep_frames=True).plans
    assert first is not None
    assert len(first.plans) == 3


def test_plans_are_only_looked_at_for_films_and_do_not_change_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    panels = Planner.panels

    def counting(self: Planner, carry: Any) -> Any:
        looked.append(len(carry[0]))
        torch.rand(5)  # decoding may draw random numbers
        return panels(self, carry)

    monkeypatch.setattr(Planner, "panels", counting)
    found = []
    for keep in (False, True):
        torch.manual_seed(3)
        observer, policy = player()
        found.append(run_episodes([observer, player()[0]], [0, 1], policy, keep_frames=keep))
        assert looked == ([1] * 8 if keep else [])  # one row of the carry: a film shows one episode
    assert found[0].returns == found[1].returns
    assert found[0].plans is None


def test_a_panel_has_each_picture_in_its_place() -> None:
    plan = Plan(np.stack([plain(50), plain(60), plain(70)]), np.stack([plain(100 + k) for k in range(4)]), 2)
    shown = panel(plain(20), plain(250), plan)
    assert shown.shape[0] % 2 == shown.shape[1] % 2 == 0
    middle = GAP + LINE + SIDE // 2
    levels = [shown[middle, GAP + column * (SIDE + GAP) + SIDE // 2].tolist() for column in range(2)]
    assert levels == [[20] * 3, [250] * 3]
    corner, cell = np.array([GAP + LINE, GAP + 2 * (SIDE + GAP)]), SIDE // 2
    for k in range(4):
        y, x = corner + np.array([k // 2, k % 2]) * cell
        assert shown[y + cell // 2, x + cell // 2].tolist() == [100 + k] * 3
        assert (shown[y + cell // 2, x + 1].tolist() == list(CHOSEN)) == (k == 2)
    below = GAP + LINE + SIDE + GAP + LINE + SIDE // 2
    assert [shown[below, GAP + k * (SIDE + GAP) + SIDE // 2, 0] for k in range(3)] == [50, 60, 70]


@pytest.mark.parametrize(("frames", "candidates", "chosen"), [(1, 1, 0), (2, 40, 39), (12, 17, 1), (30, 200, 118), (8, 17, 8)])
def test_films_show_a_part_of_many_frames_and_candidates_and_always_the_chosen_one(
    frames: int, candidates: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    from localmotion.evaluation import films

    grid = films._grid
    monkeypatch.setattr(films, "_grid", lambda pictures, place: shown.append((pictures, place)) or grid(pictures, place))
    ends = np.stack([plain(k) for k in range(candidates)])
    for goal in (None, plain(3)):
        assert panel(plain(9), goal, Plan(plain(4, frames), ends, chosen)).shape[1] == GAP + (2 + (goal is not None)) * (
            SIDE + GAP
        )
    pictures, place = shown[0]
    assert len(pictures) == min(candidates, MOST)
    assert pictures[place, 0, 0, 0] == chosen
    assert {0, candidates - 1} <= set(pictures[:, 0, 0, 0].tolist())


def test_a_film_without_plans_is_that_of_the_pictures() -> None:
    frames = plain(5, 4)
    assert film(Rollout([0.0], [3], frames=frames)) is frames
    long = list(film(Rollout([0.0], [3], frames=plain(5, 4), plans=counted(3, 2))))
    assert len(long) == 4  # after the last action the last plan stays
    middle = GAP + LINE + SIDE + GAP + LINE + SIDE // 2
    assert [frame[middle, GAP + SIDE // 2, 0] for frame in long] == [5, 10, 15, 15]


@pytest.mark.parametrize(("steps", "frames"), [(30, 3), (30, 20), (5, 5), (3, 9), (1, 1)])
def test_what_followed_a_plan_is_saved_beside_it(tmp_path: Path, steps: int, frames: int) -> None:
    """Here every plan came true, so both are equal."""
    save_plans(counted(steps, frames), tmp_path / "media" / "plans_a.npz", "env step 7")
    found = np.load(tmp_path / "media" / "plans_a.npz")
    np.testing.assert_array_equal(found["plan"], found["followed"])
    np.testing.assert_array_equal(found["observed"][:, 0, 0, 0], found["steps"] * 5)
    assert found["ahead"][-1] == min(frames, steps)
    assert (np.diff(found["steps"]) > 0).all()
    assert found["steps"][-1] + found["ahead"][-1] == steps  # up to the end
    np.testing.assert_array_equal(found["goal"], plain(250))
    shown = media.plans(tmp_path / "media" / "plans_a.npz", "one")
    assert shown.data.startswith(b"\x89PNG")
    assert shown.caption.startswith("one, evaluation at env step 7: ")


def test_files_of_plans_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_plans(counted(6, 2, goal=False), tmp_path / "plans_a.npz", "")
    arrays = dict(np.load(tmp_path / "plans_a.npz"))
    assert "goal" not in arrays
    assert media.plans(tmp_path / "plans_a.npz", "one").data
    for change in (
        {"followed": arrays["followed"][:, :1]},
        {"steps": np.zeros(2)},
        {"ahead": np.array(["a", "b"])},
        {"plan": arrays["plan"].astype(float)},
        {
            "observed": arrays["observed"][:0],
            "plan": arrays["plan"][:0],
            "followed": arrays["followed"][:0],
            "steps": np.zeros(0),
        },
        {"goal": np.zeros((4, 4))},
    ):
        np.savez(tmp_path / "plans_b.npz", **(arrays | change))
        with pytest.raises(LocalmotionError, match=r"^plans_b\.npz: "):
            media.plans(tmp_path / "plans_b.npz", "one")
    with pytest.raises(ValueError, match="plans must be"):
        strips.plan_strips(plain(0), plain(0, 1, 2), plain(0, 1, 2), steps=[0], ahead=[1, 2])


def test_a_run_that_plans_has_films_and_a_page_with_its_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    methods.register("planner", "small_planner", "Planner")
    monkeypatch.setattr(LayeredEnv, "metadata", {"render_modes": ["rgb_array"], "render_fps": 9})
    options = {**FLAGS, "env_options": {"time_limit": 7}}
    path = finetune(compose("planner", "train", preset="debug", env="toy:block", flags=options, settings=FEW), tmp_path / "run")
    with_film = evaluate_run(path, episodes=2, video=tmp_path / "film.mp4")
    assert with_film["returns"] == evaluate_run(path, episodes=2)["returns"]
    for file in (tmp_path / "film.mp4", sorted((path / "media").glob("eval_*.mp4"))[-1]):
        frames = list(iter_frames(VideoRef("film", file, "file"), None))
        assert len(frames) == 8
        assert probe(VideoRef("film", file, "file")).fps == pytest.approx(9)
        assert frames[0].shape == (448, 608, 3)
    newest = [row for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "eval"][-1]
    assert str(np.load(path / "media" / "plans_eval.npz")["when"]) == f"env step {newest['env_step']}"
    page = report([path], tmp_path / "page.html").read_text()
    assert ">Plans<" in page
    assert page.count('<figure class="wide"><video') == len(list((path / "media").glob("eval_*.mp4"))) == 2
    assert "what the agent expected from an agent step on" in page
