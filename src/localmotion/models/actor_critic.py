"""Actor-critic in imagination, DreamerV2 style: DRP, Eqs. 10-12, and IPV's release (thuml/ContextWM).

Shapes: N start states, H horizon, A actions, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from localmotion.config import BehaviourConfig, WorldModelConfig
from localmotion.errors import ConfigError
from localmotion.models.continuation import Continuation
from localmotion.models.distributions import TruncatedNormal
from localmotion.models.heads import MLP, actor_distribution
from localmotion.models.returns import lambda_return
from localmotion.models.rssm import RSSMState


class Dynamics(Protocol):
    """Interface of a world model for imagination. `RSSM` has it."""

    def feat(self, state: RSSMState, /) -> Tensor:
        """Input of actor, critic and reward, (..., F)."""

    def img_step(self, state: RSSMState, action: Tensor, /) -> RSSMState:
        """The imagined state after an action."""


class ActorCritic(nn.Module):
    """Actor, critic and slow critic on world-model features.

    The actor's gradient flows through the dynamics (reparameterised actions, straight-through latents). The caller must
    exclude the world model's parameters: ``backward(inputs=actor parameters)`` computes no gradient for them.
    ``critic_layers`` None: as many as the actor has.
    """

    updates: Tensor

    def __init__(
        self,
        feat_dim: int,
        action_dim: int,
        *,
        units: int = 400,
        layers: int = 4,
        critic_layers: int | None = None,
        horizon: int = 15,
        discount: float = 0.99,
        lambda_: float = 0.95,
        entropy: float = 1e-4,
        slow_every: int = 100,
    ) -> None:
        super().__init__()
        self.actor = MLP(feat_dim, 2 * action_dim, units=units, layers=layers)
        self.critic = MLP(feat_dim, 1, units=units, layers=layers if critic_layers is None else critic_layers)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.horizon, self.discount, self.lambda_, self.entropy, self.slow_every = (
            horizon,
            discount,
            lambda_,
            entropy,
            slow_every,
        )
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.continues = False
        """Whether `losses` needs a head of continuation."""
        self._updates_seen = -1  # copy of `updates` on the host, so no update waits for a GPU

    @classmethod
    def configured(cls, feat_dim: int, action_dim: int, world: WorldModelConfig, behaviour: BehaviourConfig) -> ActorCritic:
        """Build with the sizes and constants of a method's settings."""
        made = cls(
            feat_dim,
            action_dim,
            units=world.units,
            layers=world.layers,
            horizon=behaviour.horizon,
            discount=behaviour.discount,
            lambda_=behaviour.lambda_,
            entropy=behaviour.entropy,
            slow_every=behaviour.slow_critic_every,
        )
        made.continues = behaviour.continuation
        return made

    def policy(self, feat: Tensor) -> TruncatedNormal:
        """Action distribution on [-1, 1]^A at features (..., F)."""
        return actor_distribution(self.actor(feat))

    def act(self, feat: Tensor, *, explore: bool) -> Tensor:
        """Actions (..., A) at features (..., F): samples, or without ``explore`` the policy's mode."""
        policy = self.policy(feat)
        return policy.rsample() if explore else policy.mode

    def losses(
        self,
        start: RSSMState,
        rssm: Dynamics,
        reward: Callable[[Tensor], Tensor],
        continuation: Continuation | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Actor and critic losses from imagined trajectories.

        ``start``: detached states (N, ...). i = 0..H counts imagined states; reward(feat) is the behavioural head at state i. As in
        IPV's release the actor's return starts at i+1, because the reward at state i does not depend on the action taken there:

            G_i = r_i + gamma [(1 - lambda) v_{i+1} + lambda G_{i+1}],  G_H = v_H                                   (Eq. 10)
            critic: mean_i gamma^i 1/2 (v(f_i) - sg G_i)^2, i = 0..H-1                                              (Eq. 11)
            actor:  -mean_i gamma^i (G_{i+1} + eta H[pi(.|f_i)]), i = 0..H-2                                        (Eq. 12)

        With a head of ``continuation`` gamma c_i takes the place of gamma (DreamerV2, arXiv 2010.02193, Eqs. 4 to 6). c_i is the
        probability that the episode goes on after state i, so it multiplies all that follows r_i:

            G_i = r_i + gamma c_i [(1 - lambda) v_{i+1} + lambda G_{i+1}],  and w_i = sg prod_{j<i} gamma c_j in the place of gamma^i

        The actor's gradient flows through c_i. So it learns to avoid ends.

        Raises ConfigError where the settings want a head and the method has none.
        """
        if self.continues and continuation is None:
            raise ConfigError("model.behaviour.continuation=true: this method has no continuation head; set it to false")
        feats, entropies, state = [rssm.feat(start)], [], start
        for _ in range(self.horizon):
            dist = self.policy(feats[-1].detach())
            entropies.append(dist.entropy().sum(-1))  # (N, A) -> (N,)
            state = rssm.img_step(state, dist.rsample())
            feats.append(rssm.feat(state))
        feat = torch.stack(feats)  # (H+1, N, F)
        rewards = reward(feat).float()  # (H+1, N)
        values = self.slow_critic(feat).squeeze(-1).float()  # (H+1, N)
        discount: float | Tensor = self.discount
        weight = (self.discount ** torch.arange(self.horizon, device=feat.device, dtype=torch.float32)).unsqueeze(1)  # (H, 1)
        if continuation is not None:
            goes_on = continuation.probability(feat)  # (H+1, N)
            discount = self.discount * goes_on[:-1]  # (H, N)
            weight = torch.cat([torch.ones_like(discount[:1]), discount[:-1].detach()]).cumprod(0)  # (H, N)
        returns = lambda_return(rewards[:-1], values[1:], values[-1], discount=discount, lambda_=self.lambda_)  # (H, N)
        entropy = torch.stack(entropies).float()  # (H, N)
        actor = -(weight[:-1] * (returns[1:] + self.entropy * entropy[:-1])).mean()
        value = self.critic(feat[:-1].detach()).squeeze(-1).float()  # (H, N)
        critic = (weight * 0.5 * (value - returns.detach()).square()).mean()
        metrics = {
            "imagined/reward": rewards.mean().detach(),
            "imagined/return": returns.mean().detach(),
            "imagined/value": value.mean().detach(),
            "actor/entropy": entropy.mean().detach(),
        }
        if continuation is not None:
            metrics["imagined/continue"] = goes_on.mean().detach()
        return {"actor": actor, "critic": critic}, metrics

    def after_update(self) -> None:
        """Count an update. Every `slow_every` updates the slow critic becomes a copy of the critic."""
        if self._updates_seen < 0:
            self._updates_seen = int(self.updates)
        self._updates_seen += 1
        self.updates += 1
        if self._updates_seen % self.slow_every == 0:
            for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
                slow.data.copy_(fast.data)
