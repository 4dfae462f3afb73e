"""Learning smoke tests: the parts that learn do learn, on problems whose answer is known. Seconds each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localmotion import methods
from localmotion.acting.observer import make_observer
from localmotion.acting.policy import random_policy
from localmotion.compute import Compute
from localmotion.methods.base import total
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.rssm import RSSMState
from localmotion.recipe import Recipe
from localmotion.replay import Replay
from localmotion.runs.settings import compose
from localmotion.training.update import Updater


class Line:
    """A known "world model": a point x on a line, moved by 0.2 times the action; the feature is x, |x| <= 2."""

    def feat(self, state: RSSMState) -> Tensor:
        return state.deter

    def img_step(self, state: RSSMState, action: Tensor) -> RSSMState:
        return RSSMState(state.logits, state.stoch, (state.deter + 0.2 * action).clamp(-2, 2))


def test_actor_critic_walks_to_the_reward() -> None:
    """Reward 1 - |x|: from either side the policy must go to 0 and stay, and the critic must know what that is worth."""
    torch.manual_seed(0)
    agent = ActorCritic(1, 1, units=32, layers=2, horizon=10, discount=0.9, slow_every=20)
    actor = torch.optim.Adam(agent.actor.parameters(), lr=3e-3)
    critic = torch.optim.Adam(agent.critic.parameters(), lr=3e-3)
    none = torch.zeros(64, 0, 0)
    for _ in range(250):
        start = RSSMState(none, none, torch.rand(64, 1) * 2 - 1)
        losses, _ = agent.losses(start, Line(), lambda feat: 1 - feat.squeeze(-1).abs())  # type: ignore[arg-type]
        actor.zero_grad()
        critic.zero_grad()
        (losses["actor"] + losses["critic"]).backward()
        actor.step()
        critic.step()
        agent.after_update()
    x = torch.tensor([[-0.8], [0.8]])
    for _ in range(10):
        x = x + 0.2 * agent.policy(x).mode
    assert x.abs().max() < 0.15
    values = agent.critic(torch.tensor([[0.0], [0.8]])).squeeze(-1)
    # At rest on the reward 1 / (1 - 0.9) = 10 for ever; from 0.8 at best 10 - (0.8 + 0.6 * 0.9 + 0.4 * 0.81 + 0.2 * 0.729) = 8.2.
    assert values.tolist() == pytest.approx([10.0, 8.2], abs=1.0)


@pytest.mark.parametrize("name", ["drp", "dreamer_v2"])
def test_world_model_learns_a_batch(name: str) -> None:
    """Pictures and rewards of one batch become predictable: most of their variance over the batch is explained."""
    # The whole picture is drawn: where all but a small patch can be copied, the latent takes far longer to start (decision 0004).
    sizes = ("model.world.depth=16", "deter=64", "hidden=64", "stoch=8", "classes=8", "context_copy=false")
    run = compose(name, "train", preset="debug", env="toy:dot", settings=("online.lr=3e-3", *sizes))
    observer = make_observer(run, Recipe(percept_size=64, tracks=8) if name == "drp" else None)
    replay = Replay(observer.spec(), capacity=1000, length=6, seed=0)
    policy = random_policy(2, 0)
    for episode in range(4):
        record, done = observer.reset(episode), False
        replay.add(record, last=False)
        while not done:
            record, done, _ = observer.step(policy([record], False)[0])
            replay.add(record, last=done)
    batch = replay.sample(3)
    truth = batch["image"].flatten(0, 1).float() / 255
    variance = {"image": 0.5 * truth.var(0).sum(), "reward": 0.5 * batch["reward"].var()}
    torch.manual_seed(0)
    model = methods.get(name)(run.model, image_size=64, action_dim=2)
    updater = Updater(model, run, Compute(torch.device("cpu"), False, 1, "test"))
    world = [group.name for group in updater.groups if group.name not in ("actor", "critic")]
    for _ in range(400):
        losses, _, _ = model.world_model_losses(batch)
        total(losses, updater.passes[0].scales).backward()
        updater.step(world)
        if all(losses[key] < 0.3 * variance[key] for key in variance):
            break
    assert losses["image"] < 0.3 * variance["image"]
    assert losses["reward"] < 0.3 * variance["reward"]
