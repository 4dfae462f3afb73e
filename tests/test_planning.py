"""Distances to a goal, the choice of a plan, its rewards, and windows of a rollout (`localmotion.models.planning`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localmotion.models.planning import (
    GoalDistance,
    RunningDeviation,
    WindowMemory,
    blur_kernel,
    choose_windows,
    nearest_plan,
    plan_rewards,
)


def spot(place: int, side: int = 4) -> Tensor:
    """Features (N, 2) of a grid with one cell that differs from the others."""
    features = torch.zeros(side * side, 2)
    features[:, 0] = 1.0
    features[place] = torch.tensor([0.0, 1.0])
    return features


@pytest.mark.parametrize("metric", ["cosine", "squared"])
@pytest.mark.parametrize("blur", [0.0, 1.5])
def test_the_distance_is_zero_to_itself_and_symmetric(metric: str, blur: float) -> None:
    distance = GoalDistance(4, metric, blur)  # type: ignore[arg-type]
    u, v = torch.randn(2, 3, 16, 5)
    assert torch.allclose(distance(u, u), torch.zeros(3), atol=1e-6)
    assert torch.allclose(distance(u, v), distance(v, u))
    assert bool((distance(u, v) > 0).all())


def test_the_distances_are_means_over_cells() -> None:
    u, v = torch.randn(2, 16, 5)
    cosine = sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(u, v, strict=True)) / 16
    assert float(GoalDistance(4, "cosine", 0)(u, v)) == pytest.approx(cosine, abs=1e-5)
    assert float(GoalDistance(4, "squared", 0)(u, v)) == pytest.approx(float(((u - v) ** 2).mean()), rel=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "squared"])
def test_only_with_blur_does_an_object_that_shares_no_cell_come_nearer(metric: str) -> None:
    row = [spot(place) for place in range(4)]  # the object is 3, 2, 1 and 0 cells from the goal
    plain = [float(GoalDistance(4, metric, 0)(each, row[3])) for each in row]  # type: ignore[arg-type]
    blurred = [float(GoalDistance(4, metric, 1.0)(each, row[3])) for each in row]  # type: ignore[arg-type]
    assert plain[:2] == pytest.approx(plain[1:3], abs=1e-6)
    assert blurred[0] > blurred[1] > blurred[2] > blurred[3]


def test_a_blur_is_an_average_that_reaches_both_ways() -> None:
    kernel = blur_kernel(3, 1.0)
    assert torch.allclose(kernel.sum(1), torch.ones(9))
    assert kernel[4].argmax() == 4
    assert float(kernel[4, 1]) == pytest.approx(float(kernel[4, 3]))
    assert torch.equal(kernel[0].reshape(3, 3), kernel[0].reshape(3, 3).T)


def test_the_nearest_plan_is_chosen_but_for_the_share_of_random_ones() -> None:
    torch.manual_seed(0)
    far = torch.rand(4_000, 5)
    assert torch.equal(nearest_plan(far, 0.0), far.argmin(1))
    same = (nearest_plan(far, 0.5) == far.argmin(1)).float().mean()
    assert float(same) == pytest.approx(0.6, abs=0.05)  # half of them, and a fifth of the random ones
    assert float((nearest_plan(far, 1.0) == far.argmin(1)).float().mean()) == pytest.approx(0.2, abs=0.04)


def test_progress_telescopes_and_neither_reward_crosses_an_episode() -> None:
    distance = GoalDistance(2, "squared", 0)
    seen, plan = torch.randn(2, 3, 7, 4, 6)
    is_first = torch.zeros(3, 7, dtype=torch.bool)
    is_first[:, 0] = is_first[1, 4] = True
    goal = torch.randn(3, 1, 4, 6).repeat(1, 7, 1, 1)
    goal[1, 4:] = torch.randn(4, 6)
    follow, progress = plan_rewards(distance, seen, goal, plan, is_first)
    far = distance(seen, goal)
    assert torch.allclose(progress[0].sum(), far[0, 0] - far[0, 6])
    assert torch.allclose(progress[1, :3].sum(), far[1, 0] - far[1, 3])
    assert torch.allclose(progress[1, 4:].sum(), far[1, 4] - far[1, 6])
    assert float(progress[1, 3]) == float(follow[1, 3]) == 0
    assert torch.allclose(follow[0, 2], -distance(seen[0, 3], plan[0, 3]))


def test_following_by_gain_pays_what_a_step_came_nearer_to_the_plan() -> None:
    distance = GoalDistance(2, "squared", 0)
    seen, plan, goal = torch.randn(3, 2, 5, 4, 6)
    seen[:, 2] = seen[:, 1]  # stands still
    seen[0, 4] = plan[0, 4]  # arrives
    is_first = torch.zeros(2, 5, dtype=torch.bool)
    is_first[1, 3] = True
    follow, progress = plan_rewards(distance, seen, goal, plan, is_first, gain=True)
    assert follow[:, 1].tolist() == [0, 0]
    torch.testing.assert_close(follow[0, 3], distance(seen[0, 3], plan[0, 4]))
    torch.testing.assert_close(follow[1, 0], distance(seen[1, 0], plan[1, 1]) - distance(seen[1, 1], plan[1, 1]))
    assert float(follow[1, 2]) == 0  # an episode begins
    assert torch.equal(progress, plan_rewards(distance, seen, goal, plan, is_first)[1])


def test_a_reward_is_divided_by_the_deviation_so_far() -> None:
    torch.manual_seed(0)
    size = RunningDeviation()
    for _ in range(300):
        reward = 5 + 3 * torch.randn(64)
        size(reward, torch.ones(64, dtype=torch.bool))
    assert float(size.deviation()) == pytest.approx(3.0, rel=0.05)
    before = size.deviation()
    size(torch.full((8,), 1e6), torch.zeros(8, dtype=torch.bool))  # nothing of it counts
    size.eval()(torch.full((8,), 1e6), torch.ones(8, dtype=torch.bool))
    assert torch.equal(size.deviation(), before)
    assert torch.equal(RunningDeviation().eval()(reward, torch.ones(64, dtype=torch.bool)), reward)


def test_windows_lie_inside_an_episode_and_all_of_them_are_drawn() -> None:
    torch.manual_seed(0)
    is_first = torch.zeros(2, 8, dtype=torch.bool)
    is_first[1, 4] = True  # the first episode of both rows began before
    row, place, known = choose_windows(is_first, 3, 2, 400)
    assert bool(known.all())
    found = {(int(r), *p) for r, p in zip(row, place.tolist(), strict=True)}
    within = {(0, *range(f, f + 5)) for f in range(4)}
    assert found == within | {
        (1, 4, 4, 4, 5, 6),
        (1, 4, 4, 5, 6, 7),
    }  # with copies of the frame that the second episode begins with


def test_without_a_whole_window_none_is_known() -> None:
    is_first = torch.ones(2, 5, dtype=torch.bool)
    row, place, known = choose_windows(is_first, 2, 1, 6)
    assert not known.any()
    assert int(row.max()) < 2
    assert 0 <= int(place.min()) <= int(place.max()) < 5


def test_the_memory_has_the_newest_windows_and_draws_only_these() -> None:
    torch.manual_seed(0)
    memory = WindowMemory(5, 3, 2, 1, 4)
    assert not memory.draw(4)[1].any()
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    for number in range(1, 5):  # windows 1, 1, 2, 2, .. of which the last five stay
        memory.add(torch.full((2, 3, 2), number), torch.full((2, 1), number / 10), torch.full((2, 4), number / 100), yes)
        memory.add(torch.full((2, 3, 2), 99), torch.full((2, 1), 9.9), torch.full((2, 4), 0.99), no)
        place, known = memory.draw(200)
        assert known.all()
        tokens = memory.tokens[place].long()
        assert torch.allclose(tokens[:, 0, 0] / 10, memory.action[place][:, 0])
        assert torch.allclose(tokens[:, 0, 0] / 100, memory.kept[place][:, 3])
        newest = [old for old in range(1, number + 1) for _ in range(2)][-5:]
        assert set(tokens.unique().tolist()) == set(newest)
