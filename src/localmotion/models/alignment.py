"""From a representation of visual dynamics to actions: the choice of a plan, the alignment module, its critic and its rewards.

Used by PVDR (arXiv 2411.03169). Its critic is the alignment module's network with another last layer (the paper's second footnote).
Sizes, weights and schedules are ours, because the paper's could not be read.

Shapes: R rows, B environments, T positions, K plans, n frames of a plan, Z numbers of z, C numbers of the context feature, N cells of a
picture, D numbers of a cell's features, A actions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from localmotion.errors import ConfigError
from localmotion.limits import Limits, at_least, shares
from localmotion.models.latent_windows import r_squared
from localmotion.models.plan_cvae import sample
from localmotion.models.planning import GoalDistance, Metric, RunningDeviation, nearest_plan, plan_rewards
from localmotion.models.ppo import clipped_log_prob, weighted_mean

STATIC = 1e-3
"""A plan is static if its first frame is nearer than this to the frame from which it was made."""
MIN_LOG_STD, MAX_LOG_STD = -5.0, 1.0


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of acting with plans, and of learning to."""

    plans: int = 16
    """Plans K drawn for each agent step while learning. 1: no planning."""
    plans_eval: int = 32
    """The same in evaluation."""
    random_plan: float = 0.05
    """Share of the steps while learning in which a random plan is taken."""
    compared: Literal["last", "nearest"] = "nearest"
    """Which frame of a plan is compared with the goal: its last one, or the one nearest to the goal."""
    metric: Metric = "cosine"
    """How two pictures' features are compared (`models.planning.GoalDistance`)."""
    blur: float = 1.0
    """Cells over which features are averaged before they are compared, as a standard deviation. 0: none."""
    width: int = 256
    """Width of the alignment module and of the critic."""
    log_std: float = -0.5
    """Logarithm of the standard deviation of actions, at the start. It is learned."""
    hold: int = 1
    """Agent steps for which exploration keeps its noise, until the alignment learns by reward. z names all frames of a plan, its label is
    the first action, and with new noise at each step the two agree little. Later, noise is new at each step, because PPO needs the
    probability of each action. 1: always new."""
    follow: Literal["distance", "gain"] = "distance"
    """What following a plan is worth. distance: minus the next frame's distance from the plan's first frame. gain: by how much the step
    shortened that distance, as progress is measured. Then standing still pays nothing; by distance it pays as much as a poor attempt."""
    follow_weight: float = 1.0
    """Weight of the reward for following the plan."""
    progress_weight: float = 1.0
    """Weight of the reward for progress to the goal."""
    reward_weight: float = 0.0
    """Weight of the environment's own reward, which has no part in the method as its summaries describe it."""
    centred: bool = False
    """Whether each reward counts from its running mean (reward centering, arXiv 2405.09999). All values share the part
    mean / (1 - discount). It says nothing about actions, but the critic has to learn it first, and minus a distance has a large mean. For
    episodes of fixed length: where a step can end one, the mean decides whether it should."""
    supervised: float = 1.0
    """Weight of the error of actions, given the z of what happened, at the start. 0: the alignment learns by reward alone."""
    supervised_end: float = 0.1
    """The same at the end. It falls linearly."""
    reward_from: float = 0.1
    """Share of the run after which the alignment learns by reward, too. Before, it would learn from plans it cannot follow. 1: never."""
    plans_learn: bool = True
    """Whether prior, decoder and the posterior's last layer learn online. false: they stay as `pretrain` left them. An agent that cannot
    act yet may see too little, and too unlike the videos, to improve them."""
    windows: int = 32
    """Windows that an update takes from the rollout into the memory, and draws from the memory to learn the representation."""
    pairs: int = 256
    """Windows of the memory whose codes and actions an update learns the alignment from."""
    memory: int = 20_000
    """Windows in the memory. It holds the newest ones of all rollouts: what an action led to stays true while the policy changes."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "plans", "plans_eval", "width", "hold", "windows", "pairs", "memory"),
        **at_least(0, "blur", "follow_weight", "progress_weight", "reward_weight", "supervised", "supervised_end"),
        **shares("random_plan", "reward_from"),
    }


class PlanCarry(NamedTuple):
    """What acting keeps: the newest frames' tokens (B, m, N), the plans made for the newest one (B, K, n, N), the chosen one (B,), the
    features of the episode's goal (B, N, D), the noise of the newest action (B, A), and for how many steps it was in use (B,)."""

    tokens: Tensor
    plans: Tensor
    chosen: Tensor
    goal: Tensor
    noise: Tensor
    used: Tensor


class AlignmentNet(nn.Module):
    """Three layers [Linear, LayerNorm, ELU] and a linear output that begins small: (R, inputs) -> (R, outputs)."""

    feed_forward = True  # --compile compiles it

    def __init__(self, inputs: int, outputs: int, width: int, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise((inputs, *[width] * layers)):
            parts += [nn.Linear(a, b), nn.LayerNorm(b), nn.ELU()]
        self.body = nn.Sequential(*parts)
        self.last = nn.Linear(width, outputs)
        nn.init.orthogonal_(self.last.weight, 0.01)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.body(x)).float()
        return out


class Alignment(nn.Module):
    """Normal distribution of actions, given z and the context feature. Its deviation is one learned number for each dimension.

    The mean is not squashed. Samples are clipped to [-1, 1], and their probability is that of the clipped action (`models.ppo`).
    """

    def __init__(self, latent: int, context: int, actions: int, width: int, log_std: float) -> None:
        super().__init__()
        self.net = AlignmentNet(latent + context, actions, width)
        self.spread = nn.Parameter(torch.full((actions,), log_std))

    @property
    def log_std(self) -> Tensor:
        """(A,) logarithm of the deviation, in -5..1."""
        return self.spread.clamp(MIN_LOG_STD, MAX_LOG_STD)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """Mean actions (R, A) of z (R, Z) and context features (R, C)."""
        out: Tensor = self.net(torch.cat([z, context], -1))
        return out

    def act(self, z: Tensor, context: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (R, A) in [-1, 1] and their log-probabilities (R,), with standard normal ``noise`` (R, A); with zeros the mean."""
        mean, log_std = self(z, context), self.log_std
        action = (mean + log_std.exp() * noise).clamp(-1, 1)
        return action, clipped_log_prob(action, mean, log_std)


class Critic(nn.Module):
    """Value of a plan's z in its context.

    It also sees the goal, as ``goal_units`` numbers that are linear in its features. The paper's critic has the inputs of the alignment
    module, but the value of a z depends on the goal where goals vary.
    """

    def __init__(self, latent: int, context: int, goal: int, width: int, goal_units: int = 64) -> None:
        super().__init__()
        self.goal = nn.Linear(goal, goal_units)
        self.net = AlignmentNet(latent + context + goal_units, 1, width)

    def forward(self, z: Tensor, context: Tensor, goal: Tensor) -> Tensor:
        """Values (R,) of z (R, Z), context features (R, C) and the goal's features (R, N, D)."""
        out: Tensor = self.net(torch.cat([z, context, self.goal(goal.flatten(1))], -1)).squeeze(-1)
        return out


class Aligner(nn.Module):
    """Chooses a plan, acts on it, and rewards what came of it."""

    reinforcing: Tensor
    supervising: Tensor
    renewing: Tensor

    def __init__(self, config: AlignmentConfig, *, latent: int, context: int, side: int, features: int, actions: int) -> None:
        """Raises ConfigError for a memory of fewer windows than an update takes."""
        super().__init__()
        if config.memory < config.windows:
            raise ConfigError(f"memory={config.memory}: it holds at least the windows={config.windows} that an update takes")
        self.config = config
        self.actor = Alignment(latent, context, actions, config.width, config.log_std)
        self.critic = Critic(latent, context, side * side * features, config.width)
        self.distance = GoalDistance(side, config.metric, config.blur)
        self.following, self.progress = RunningDeviation(config.centred), RunningDeviation(config.centred)
        self.own = RunningDeviation(centred=True, scaled=False) if config.centred else None
        self.register_buffer("reinforcing", torch.zeros(()))  # 1 while the alignment learns by reward
        if config.hold > 1:  # the share of the run from which noise is new at each step; 2: not yet
            self.register_buffer("renewing", torch.tensor(2.0))
        self.register_buffer("supervising", torch.tensor(config.supervised))  # weight of the error of actions

    def count(self, progress: float) -> None:
        """Set what the alignment learns from, at this share of the run."""
        config = self.config
        due = config.reward_from < 1 and progress >= config.reward_from
        self.reinforcing.fill_(float(due))
        if config.hold > 1:  # what was played with noise that was held is no sample of the policy: PPO begins one rollout later
            now = torch.full_like(self.renewing, progress)
            self.renewing.copy_(torch.minimum(self.renewing, now) if due else self.renewing)
            self.reinforcing.copy_(self.renewing < now)
        self.supervising.fill_(config.supervised + (config.supervised_end - config.supervised) * progress)

    def noise(self, last: Tensor, used: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal noise (B, A) for an agent step, and for how many steps it has been in use, (B,).

        ``last`` (B, A) and ``used`` (B,) are those of the step before; ``first`` (B,): an episode begins.
        """
        new, renewed = torch.randn_like(last), first | (used >= self.config.hold)
        if self.config.hold > 1:
            renewed = renewed | (self.renewing <= 1)
        return torch.where(renewed.unsqueeze(-1), new, last), torch.where(renewed, 1, used + 1)

    def choose(self, plans: Tensor, goal: Tensor, explore: bool) -> Tensor:
        """Index (B,) of a plan among ``plans`` (B, K, n, N, D), for the goal's features (B, N, D)."""
        frames = plans[:, :, -1:] if self.config.compared == "last" else plans
        far = self.distance(frames, goal[:, None, None]).amin(2)  # (B, K)
        return nearest_plan(far, self.config.random_plan if explore else 0.0)

    def rewards(
        self, seen: Tensor, codes: Tensor, goal: Tensor, plan: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards (B, T - 1) of the steps of a rollout, and metrics.

        ``seen``, ``goal`` and ``plan`` as in `plan_rewards`; ``codes`` (B, T, N, D): the frames after quantisation. The metric
        "plan/static" is the share of plans whose first frame is the frame from which they were made. To follow these, do nothing.
        """
        inside = ~batch["is_first"][:, 1:]
        share = inside.float()
        follow, progress = plan_rewards(self.distance, seen, goal, plan, batch["is_first"], self.config.follow == "gain")
        metrics = {
            "reward/follow": weighted_mean(follow, share),
            "reward/progress": weighted_mean(progress, share),
            "plan/static": weighted_mean((self.distance(codes[:, :-1], plan[:, 1:]) < STATIC).float(), share),
            "goal/distance": self.distance(seen, goal).mean(),
        }
        config = self.config
        reward = config.follow_weight * self.following(follow, inside) + config.progress_weight * self.progress(progress, inside)
        own = batch["reward"][:, 1:].float()
        return reward + config.reward_weight * (self.own(own, inside) if self.own else own), metrics

    def action_error(
        self, mean: Tensor, log_variance: Tensor, context: Tensor, action: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of actions (R, A) given the posterior of what they led to, times its present weight, and R^2 of the mean.

        z is the posterior's ``mean`` (R, Z) for every other window and a sample for the rest, because acting has samples (of the prior).
        ``known`` (R,): which windows count. The deviation of actions gets no gradient: what it learned here would end exploration.
        """
        even = (torch.arange(len(action), device=action.device) % 2 == 0).unsqueeze(-1)
        z = torch.where(even, mean, sample(mean, log_variance))
        found = self.actor(z, context)
        surprise = -clipped_log_prob(action.clamp(-1, 1), found, self.actor.log_std.detach())
        return self.supervising * weighted_mean(surprise, known.float()), r_squared(found, action, known.float())
