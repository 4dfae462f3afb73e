"""Rules of acting, and of acting towards a goal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localmotion.acting.trees import leaves_of, with_leaves
from localmotion.methods.base import acted, planned
from localmotion.testing.batches import ACTIONS
from localmotion.testing.rules import Rule, Subject, require, rule

Batch = dict[str, Tensor]


def acts(subject: Subject) -> bool:
    """Whether the stage is one of `acts_after`."""
    return subject.acts


def plans(subject: Subject) -> bool:
    """Whether the method acts towards a goal."""
    return subject.acts and "goal" in subject.method.wants


def observation(subject: Subject, batch: Batch, t: int, action: Tensor | None, first: bool) -> Batch:
    """Position t of a batch as acting sees it, with the agent's own last action."""
    unseen = {"reward", "is_terminal", "action", "labelled", *subject.method.extras}
    obs = {key: value[:, t : t + 1] for key, value in batch.items() if key not in unseen}
    obs["is_first"] = torch.full_like(obs["is_first"], first)
    rows = len(obs["is_first"])
    return obs | {"action": torch.zeros(rows, 1, ACTIONS) if action is None else action[:, None]}


def _step(subject: Subject, method: Any, batch: Batch, t: int, action: Tensor | None, carry: Any, explore: bool) -> Any:
    obs = observation(subject, batch, t, action, action is None)
    return acted(method, obs, carry, explore=explore, window=subject.time)


def play(subject: Subject, method: Any, batch: Batch, *, explore: bool = False, seed: int = 0) -> Tensor:
    """Actions (B, T, A) of an agent that is shown the batch's pictures, whatever it does."""
    torch.manual_seed(seed)
    carry, action, actions = method.initial_carry(len(batch["image"])), None, []
    with torch.no_grad():
        for t in range(batch["image"].shape[1]):
            action, carry, _ = _step(subject, method, batch, t, action, carry, explore)
            actions.append(action)
    return torch.stack(actions, 1)


@rule
def actions_are_in_range(subject: Subject) -> None:
    """`act` returns actions (B, A) in [-1, 1], for one environment and for several, and its declared `extras`."""
    method, batch = subject.build().eval(), subject.data()
    for rows in (2, 1):
        shown = {key: value[:rows] for key, value in batch.items()}
        for explore in (False, True):
            actions = play(subject, method, shown, explore=explore)
            wanted = (rows, subject.time, ACTIONS)
            require(tuple(actions.shape) == wanted, f"{rows} rows give actions {tuple(actions.shape)}", f"make them {wanted}")
            require(bool(actions.abs().max() <= 1), f"an action is {float(actions.abs().max()):.3f}", "clamp actions to [-1, 1]")


@rule
def actions_are_reproducible(subject: Subject) -> None:
    """The same seed gives the same actions; with `explore=True` another seed gives others."""
    method, batch = subject.build().eval(), subject.data()
    for explore in (False, True):
        first, again = (play(subject, method, batch, explore=explore) for _ in range(2))
        require(torch.equal(first, again), "the same seed gives other actions", "keep the agent's state in `carry` alone")
    other = play(subject, method, batch, explore=True, seed=1)
    require(not torch.equal(first, other), "explore=True gives the same actions for two seeds", "sample the action")


@rule
def a_first_step_forgets(subject: Subject) -> None:
    """Where `is_first` is true, acting forgets the episode before."""
    method, batch = subject.build().eval(), subject.data()
    found: list[Tensor] = []
    for used in (0, 3):
        carry: Any = method.initial_carry(2)
        action: Tensor | None = None
        torch.manual_seed(1)
        with torch.no_grad():
            for t in range(used):
                action, carry, _ = _step(subject, method, batch, t, action, carry, True)
            torch.manual_seed(0)
            action = None  # an episode begins
            for t in range(-2, 0):
                at = batch["image"].shape[1] + t
                action, carry, _ = _step(subject, method, batch, at, action, carry, False)
        assert action is not None
        found.append(action)
    same = torch.allclose(found[0], found[1], rtol=1.3e-6, atol=1e-5)
    require(same, "actions depend on the episode before", "start the carry anew in the rows where is_first is true")


@rule
def agents_act_as_if_alone(subject: Subject) -> None:
    """Agents in one batch do not see each other: evaluation steps many environments at once."""
    method, batch, other = subject.build().eval(), subject.data(), subject.data(1)
    together = play(subject, method, batch)
    beside = play(subject, method, {key: torch.cat([value[:1], other[key][1:]]) for key, value in batch.items()})
    fix = "compute nothing across the first dimension"
    same = torch.allclose(together[0], beside[0], atol=1e-5, rtol=1e-4)
    require(same, "the action of one environment depends on the observation of another", fix)
    if torch.equal(together, play(subject, method, batch, seed=1)):  # no noise: a batch of one must give the same numbers
        alone = torch.cat([play(subject, method, {k: v[row : row + 1] for k, v in batch.items()}) for row in range(2)])
        same = torch.allclose(together, alone, atol=1e-5, rtol=1e-4)
        require(same, "an environment alone gets other actions than beside another", fix)


@rule
def the_carry_can_be_saved(subject: Subject) -> None:
    """The carry is None, a tensor or a (named) tuple of these, so a checkpoint in the middle of an episode can hold it."""
    method, batch = subject.build().eval(), subject.data()
    carry, action = method.initial_carry(2), None
    with torch.no_grad():
        for t in range(2):
            action, carry, _ = _step(subject, method, batch, t, action, carry, False)
        require(_is_tree(carry), f"the carry is {type(carry).__name__}", "use None, tensors and (named) tuples of them")
        again = with_leaves(method.initial_carry(2), [leaf.clone() for leaf in leaves_of(carry)])
        found = []
        for each in (carry, again):
            torch.manual_seed(0)
            found.append(_step(subject, method, batch, 1, action, each, False)[0])
    require(torch.equal(*found), "a carry that was saved and loaded gives another action", "keep all of the state in the carry")


def _is_tree(carry: Any) -> bool:
    return carry is None or isinstance(carry, Tensor) or (isinstance(carry, tuple) and all(map(_is_tree, carry)))


ACTS: tuple[Rule, ...] = (
    actions_are_in_range,
    actions_are_reproducible,
    a_first_step_forgets,
    agents_act_as_if_alone,
    the_carry_can_be_saved,
)


@rule
def actions_depend_on_the_goal(subject: Subject) -> None:
    """A method that wants `goal` acts otherwise for another goal."""
    method, batch = subject.awake().eval(), subject.data()
    other = batch | {"goal": 255 - batch["goal"]}
    same = torch.equal(play(subject, method, batch), play(subject, method, other))
    require(not same, "two goals give the same actions", "use obs['goal'] in act, or take it out of `wants`")


@rule
def panels_show_the_plan(subject: Subject) -> None:
    """`panels` is None, or has pictures of the plan (B,n,3,S,S), the last frames of all plans (B,K,3,S,S), and which is chosen (B,)."""
    method, batch = subject.build().eval(), subject.data()
    with torch.no_grad():
        _, carry, _ = _step(subject, method, batch, 0, None, method.initial_carry(2), False)
        found = planned(method, carry)
    if found is not None:
        chosen = found["ends"][torch.arange(2), found["chosen"]]
        fix = "return the frames of the chosen plan; the last one is ends[chosen]"
        require(torch.allclose(chosen, found["plan"][:, -1], atol=1e-5), "the plan does not end as the chosen one does", fix)


PLANS: tuple[Rule, ...] = (actions_depend_on_the_goal, panels_show_the_plan)
