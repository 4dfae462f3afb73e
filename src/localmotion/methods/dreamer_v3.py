"""DreamerV3: a world model learned from scratch in the environment, with one set of settings for every domain and scale.

Paper: "Mastering diverse control tasks through world models" (Nature 640, 2025; arXiv 2301.04104). This file follows the current
reference implementation (danijar/dreamerv3, commit e3f0224), which is newer than the paper's text in places: the GRU has blocks, REINFORCE
trains the actor on imagined trajectories, imagined and replayed trajectories train the critic, and one optimiser makes one update of all.

It differs from the reference in four places. A training sequence starts from the zero state; the reference stores latents in its replay.
The deterministic state is fp32 under bf16. `act` clips actions to [-1, 1], as the dynamics does. Adaptive clipping treats the layer of
the policy's mean and deviation as one tensor; the reference has two. NM512/r2dreamer, a PyTorch version, differs from the reference in
the KL (no unimix), the continuation (no discount), evaluation (mean action) and the first learning rate (not zero); this file does not.

Shapes: B sequences, T positions, K the last positions of a sequence, N start states, H imagined steps, S categoricals, C classes, D deter,
E embedding, F features, A actions. A state is (..., S, C) log-probabilities, (..., S, C) sample and (..., D) deter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.errors import ConfigError
from localmotion.limits import Limits, at_least, shares
from localmotion.methods.base import AGENT_RATES, FROM_SCRATCH, HELD_RATES, Batch, Counters, Group, Method, Pass, Rates
from localmotion.methods.sizes import ONLINE, RECIPE
from localmotion.models.blocks import NormMLP
from localmotion.models.observations import ObservationModel
from localmotion.models.policies import BoundedNormal, OneHotPolicy
from localmotion.models.rssm_block import BlockRSSM, State, kl_losses
from localmotion.models.values import ReturnRange, TwoHot, bootstrapped_return, follow, symexp_bins

Size = Literal["size1m", "size12m", "size25m", "size50m", "size100m", "size200m", "size400m"]


class Widths(NamedTuple):
    """Widths of a model size."""

    deter: int
    hidden: int
    classes: int
    depth: int
    units: int


SIZES: dict[str, Widths] = {
    "size1m": Widths(512, 64, 4, 4, 64),
    "size12m": Widths(2048, 256, 16, 16, 256),
    "size25m": Widths(3072, 384, 24, 24, 384),
    "size50m": Widths(4096, 512, 32, 32, 512),
    "size100m": Widths(6144, 768, 48, 48, 768),
    "size200m": Widths(8192, 1024, 64, 64, 1024),
    "size400m": Widths(12288, 1536, 96, 96, 1536),
}


@dataclass(frozen=True)
class Scales:
    """Weight of each loss."""

    dyn: float = 1.0
    """KL that trains the prior."""
    rep: float = 0.1
    """KL that trains the posterior."""
    recon: float = 1.0
    """Reconstruction of pictures and vectors."""
    reward: float = 1.0
    """Reward prediction."""
    cont: float = 1.0
    """Prediction that the episode goes on."""
    policy: float = 1.0
    """Actor, on imagined trajectories."""
    value: float = 1.0
    """Critic, on imagined trajectories."""
    repval: float = 0.3
    """Critic, on replayed trajectories."""
    LIMITS: ClassVar[Limits] = {**at_least(0, "dyn", "rep", "recon", "reward", "cont", "policy", "value", "repval")}


@dataclass(frozen=True)
class DreamerV3Config:
    """Settings of DreamerV3. Defaults are the reference's (configs.yaml)."""

    size: Size = "size200m"
    """Model size. The settings deter, hidden, classes, depth and units each override one of its widths."""
    deter: int | None = None
    """Width of the deterministic state; none: that of the size."""
    hidden: int | None = None
    """Width of the hidden layers of the dynamics; none: that of the size."""
    classes: int | None = None
    """Classes of each categorical latent; none: that of the size."""
    depth: int | None = None
    """Unit of the widths of encoder and decoder stages; none: that of the size."""
    units: int | None = None
    """Width of the heads' layers; none: that of the size."""
    stoch: int = 32
    """Number of categorical latents."""
    blocks: int = 8
    """Blocks of the GRU, and of the layer from the state to the decoder's map."""
    stem: Literal["pool", "blocks"] = "pool"
    """pool: the reference's four stages. blocks: 4x4 pixels become channels, which replaces the first two stages; for CPUs."""
    pixels: bool = True
    """Observe pictures."""
    vector_dim: int = 0
    """Length of the vector observation; 0 for none."""
    discrete: bool = False
    """Actions are one-hot vectors instead of numbers in [-1, 1]. The environment decides; set it for logged episodes without one."""
    unimix: float = 0.01
    """Share of the uniform distribution in every latent, and in a policy of discrete actions."""
    kl_free: float = 1.0
    """Free nats of each KL, per position. The name differs from DreamerV2's because suites set that one."""
    horizon: int = 333
    """Discount horizon: the discount is 1 - 1 / horizon."""
    contdisc: bool = True
    """The continuation head predicts the discount too."""
    imag_length: int = 15
    """Imagined steps."""
    imag_last: int = 0
    """Number of last positions of a sequence to imagine from; 0: all."""
    lambda_: float = 0.95
    """lambda of the returns."""
    entropy: float = 3e-4
    """Weight of the policy's entropy."""
    slow_reg: float = 1.0
    """Weight of the critic's pull towards the slow critic's prediction."""
    slow_rate: float = 0.02
    """Share of the distance to the critic that the slow critic moves in each update."""
    evaluate_mode: bool = False
    """Evaluate with the policy's mode instead of samples (the reference samples)."""
    agc: float = 0.3
    """Adaptive gradient clipping."""
    warmup: int = 1000
    """Updates over which the learning rate rises."""
    scales: Scales = field(default_factory=Scales)
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "stoch", "horizon", "imag_length"),
        **at_least(0, "blocks", "vector_dim", "kl_free", "imag_last", "entropy", "slow_reg", "agc", "warmup"),
        **shares("unimix", "lambda_", "slow_rate"),
    }


class Carry(NamedTuple):
    """What acting keeps between agent steps."""

    state: State
    action: Tensor


class Imagined(NamedTuple):
    """Imagined trajectories from N states: features (H+1, N, F) and the actions (H, N, A) taken at all but the last."""

    feat: Tensor
    action: Tensor


class DreamerV3(Method):
    """DreamerV3 from pixels, vectors or both."""

    name = "dreamer_v3"
    paper = "arXiv 2301.04104"
    Config = DreamerV3Config
    stages = FROM_SCRATCH
    # LaProp has one rate and constants of its own.
    unread = dict.fromkeys(stages, AGENT_RATES | HELD_RATES | {"optim.eps", "optim.clip", "optim.weight_decay"})
    vectors = True
    discrete = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # Reference, block dmc_vision: batches of 16 x 64 and one update in 4 env steps (train ratio 256), 2 agent steps at action repeat 2.
        "paper": {
            "online": {
                "batch_size": 16,
                "length": 64,
                "train_every": 2,
                "prefill": 1_000,
                "warmup_updates": 0,
                "prioritize_ends": False,
                "lr": 4e-5,
            },
        },
        "small": {
            "model": {
                "deter": 512,
                "hidden": 128,
                "stoch": 16,
                "classes": 16,
                "depth": 16,
                "units": 128,
                "stem": "blocks",
                "warmup": 100,
            },
            "online": {**ONLINE["small"], "lr": 3e-4},
        },
        "tiny": {
            "model": {
                "deter": 256,
                "hidden": 64,
                "stoch": 8,
                "classes": 8,
                "depth": 8,
                "units": 64,
                "stem": "blocks",
                "imag_length": 10,
                "warmup": 100,
            },
            "online": {**ONLINE["tiny"], "lr": 5e-4},
            "recipe": dict(RECIPE["tiny"]),
        },
        "debug": {
            "model": {
                "deter": 64,
                "hidden": 32,
                "stoch": 4,
                "classes": 4,
                "depth": 4,
                "units": 32,
                "stem": "blocks",
                "imag_length": 5,
                "warmup": 10,
            },
            "online": {**ONLINE["debug"], "lr": 1e-3},
        },
    }

    def __init__(self, config: DreamerV3Config, *, image_size: int, action_dim: int | None) -> None:
        """Raises ConfigError for settings that do not fit together."""
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        if action_dim is None:
            raise NotImplementedError("dreamer_v3 has no pre-training stage")
        self.config = config
        width = SIZES[config.size]
        width = width._replace(**{k: v for k in width._fields if (v := getattr(config, k)) is not None})
        if width.deter % config.blocks:
            raise ConfigError(f"model.deter={width.deter} must be a multiple of model.blocks={config.blocks}")
        if config.imag_last == 1:
            raise ConfigError(
                "model.imag_last=1 leaves no return for the replay value loss (repval); use at least 2, or 0 for all"
            )
        self.observations = ObservationModel(
            deter=width.deter,
            latent=config.stoch * width.classes,
            image_size=image_size if config.pixels else 0,
            vector_dim=config.vector_dim,
            stem=config.stem,
            depth=width.depth,
            units=width.units,
            blocks=config.blocks,
        )
        self.dynamics = BlockRSSM(
            embed_dim=self.observations.embed_dim,
            action_dim=action_dim,
            deter=width.deter,
            hidden=width.hidden,
            stoch=config.stoch,
            classes=width.classes,
            blocks=config.blocks,
            unimix=config.unimix,
        )

        def head(outputs: int, layers: int, outscale: float) -> NormMLP:
            return NormMLP(self.dynamics.feat_dim, outputs, units=width.units, layers=layers, outscale=outscale)

        self.register_buffer("bins", symexp_bins(), persistent=False)
        self.reward = head(len(self.bins), 1, 0.0)
        self.cont = head(1, 1, 1.0)
        self.actor = head(action_dim if config.discrete else 2 * action_dim, 3, 0.01)
        self.critic = head(len(self.bins), 3, 0.0)
        self.slow_critic: nn.Module = copy.deepcopy(self.critic).requires_grad_(False)
        self.return_range = ReturnRange()

    bins: Tensor

    # 1. World model -----------------------------------------------------------------------------------------------------------

    def world_model_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], State]:
        """All losses (the behaviour's too: there is one backward pass), metrics, and the posterior states (B*T, ...)."""
        embed = self.observations.encode(batch)  # (B, T, E)
        state, prior = self.dynamics.observe(embed, batch["action"], batch["is_first"])  # state, (B, T, S, C)
        feat = self.dynamics.feat(state)  # (B, T, F)
        dyn, rep = kl_losses(state.logits, prior, self.config.kl_free)  # (B, T) each
        recon = self.observations.losses(feat, batch)  # (B, T) each
        alive = (~batch["is_terminal"]).float()  # (B, T)
        if self.config.contdisc:
            alive = alive * (1 - 1 / self.config.horizon)
        losses = {
            "dyn": dyn.mean(),
            "rep": rep.mean(),
            "recon": torch.stack(list(recon.values())).sum(0).mean(),
            "reward": TwoHot(self.reward(feat), self.bins).loss(batch["reward"]).mean(),
            "cont": F.binary_cross_entropy_with_logits(self.cont(feat).squeeze(-1).float(), alive),
        }
        entropy = -(prior.detach().exp() * prior.detach()).sum((-2, -1)).mean()
        post_entropy = -(state.logits.detach().exp() * state.logits.detach()).sum((-2, -1)).mean()
        metrics = {"dynamics/prior_entropy": entropy, "dynamics/post_entropy": post_entropy}
        metrics |= {f"recon/{key}": value.detach().mean() for key, value in recon.items()}

        last = self.config.imag_last or feat.shape[1]
        start = State(*(x.detach()[:, -last:].flatten(0, 1) for x in state))  # (N, ...), N = B*K
        behaviour, more, returns = self._actor_critic(self.imagine(start))
        losses |= behaviour
        imagined = returns[0].view(len(feat), -1)  # (N,) -> (B, K)
        losses["repval"] = self._replay_value(feat[:, -last:], batch, imagined)
        return losses, metrics | more, start

    # 2. Actor and critic ------------------------------------------------------------------------------------------------------

    def policy(self, feat: Tensor) -> BoundedNormal | OneHotPolicy:
        """Action distribution at features (..., F)."""
        out = self.actor(feat)
        return OneHotPolicy(out, self.config.unimix) if self.config.discrete else BoundedNormal(out)

    @torch.no_grad()
    def imagine(self, start: State) -> Imagined:
        """Trajectories of the policy in the prior, from states (N, ...)."""
        device = start.deter.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        # The features are the largest tensor of an update, so they are written in place, in the precision in which the heads read them.
        feat = start.deter.new_empty(self.config.imag_length + 1, len(start.deter), self.dynamics.feat_dim, dtype=low)
        feat[0] = self.dynamics.feat(start)
        state, actions, weights = start, [], self.dynamics.weights()
        for t in range(self.config.imag_length):
            actions.append(self.policy(feat[t]).sample())
            state = self.dynamics.img_step(state, actions[-1], weights=weights)
            feat[t + 1, :, : self.dynamics.deter] = state.deter
            feat[t + 1, :, self.dynamics.deter :] = state.stoch.flatten(-2)
        # Older versions of autocast keep the casts of weights that were made here without a gradient (pytorch/pytorch#165068).
        torch.clear_autocast_cache()
        return Imagined(feat, torch.stack(actions))

    def _actor_critic(self, path: Imagined) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Losses "policy" and "value", metrics, and the returns (H, N) from all but the last imagined state.

        R_t = r_{t+1} + c_{t+1} [(1 - lambda) v_{t+1} + lambda R_{t+1}],  R_H = v_H,  c the predicted (discounted) continuation
        policy: -w_t (log pi(a_t | s_t) sg[(R_t - v_t) / max(1, range)] + eta H[pi(. | s_t)])
        value:   w_t (-log p(R_t) - log p(sg slow v_t)),  w_t = product of c up to t
        """
        config, feat = self.config, path.feat
        discount = 1.0 if config.contdisc else 1 - 1 / config.horizon
        logits = self.critic(feat)  # (H+1, N, bins)
        with torch.no_grad():
            reward = TwoHot(self.reward(feat), self.bins).pred()  # (H+1, N)
            cont = torch.sigmoid(self.cont(feat).squeeze(-1).float())  # (H+1, N)
            slow = TwoHot(self.slow_critic(feat[:-1]), self.bins).pred()  # (H, N)
            value = TwoHot(logits, self.bins).pred()  # (H+1, N)
            weight = (discount * cont).cumprod(0)[:-1] / discount  # (H, N)
            zero = torch.zeros_like(cont)
            returns = bootstrapped_return(zero, 1 - cont, reward, value, discount=discount, lambda_=config.lambda_)
            low, scale = self.return_range(returns)
            advantage = (returns - value[:-1]) / scale  # (H, N)
        policy, critic = self.policy(feat[:-1]), TwoHot(logits[:-1], self.bins)
        entropy = policy.entropy()  # (H, N)
        losses = {
            "policy": -(weight * (policy.log_prob(path.action) * advantage + config.entropy * entropy)).mean(),
            "value": (weight * (critic.loss(returns) + config.slow_reg * critic.loss(slow))).mean(),
        }
        metrics = {
            "imagined/reward": reward.mean(),
            "imagined/return": returns.mean(),
            "imagined/value": value.mean(),
            "imagined/cont": cont.mean(),
            "actor/entropy": entropy.detach().mean(),
            "actor/randomness": policy.randomness().detach().mean(),
            "actor/advantage": advantage.abs().mean(),
            "return_range/low": low,
            "return_range/scale": scale,
        }
        return losses, metrics, returns

    def _replay_value(self, feat: Tensor, batch: Batch, imagined: Tensor) -> Tensor:
        """Loss of the critic on replayed trajectories. Its gradient reaches the world model through the features (B, K, F).

        ``imagined`` (B, K): returns imagined from each position, for bootstrapping.
        """
        config, count = self.config, feat.shape[1]
        # A sequence may hold several short episodes (docs/decisions/0011): the position before a first one is the last of its episode.
        last = F.pad(batch["is_first"][:, 1:], (0, 1))[:, -count:].float()  # (B, K)
        terminal, reward = batch["is_terminal"][:, -count:].float(), batch["reward"][:, -count:]
        columns = (last.t(), terminal.t(), reward.t(), imagined.t())  # (K, B) each
        returns = bootstrapped_return(*columns, discount=1 - 1 / config.horizon, lambda_=config.lambda_).t()  # (B, K-1)
        critic = TwoHot(self.critic(feat[:, :-1]), self.bins)
        with torch.no_grad():
            slow = TwoHot(self.slow_critic(feat[:, :-1]), self.bins).pred()  # (B, K-1)
        return ((1 - last[:, :-1]) * (critic.loss(returns) + config.slow_reg * critic.loss(slow))).mean()

    # 3. Optimisation ----------------------------------------------------------------------------------------------------------

    def loss_scales(self, stage: str) -> dict[str, float]:
        return dict(vars(self.config.scales))

    def passes(self, stage: str) -> tuple[Pass, ...]:
        return (Pass(lambda batch, _: self.world_model_losses(batch), self.loss_scales(stage), ("model",)),)

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            Group("model", parameters, rates.lr, optimizer="laprop", warmup=self.config.warmup, agc=self.config.agc),
        ]

    def after_update(self, counters: Counters) -> None:
        follow(self.slow_critic, self.critic, self.config.slow_rate)

    # 4. Acting and looking ----------------------------------------------------------------------------------------------------

    def initial_carry(self, batch_size: int) -> Carry:
        return Carry(self.dynamics.initial(batch_size), torch.zeros(batch_size, self.action_dim, device=self.bins.device))

    def act(self, obs: Batch, carry: Carry, *, explore: bool, window: int = 0) -> tuple[Tensor, Carry]:
        embed = self.observations.encode(obs)[:, 0]
        state = self.dynamics.obs_step(carry.state, carry.action, embed, obs["is_first"][:, 0])
        policy = self.policy(self.dynamics.feat(state))
        action = policy.mode if self.config.evaluate_mode and not explore else policy.sample()
        action = action.clamp(-1, 1)
        return action, Carry(state, action)

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Prior rolled out after ``context`` frames with the real actions. Raises ConfigError without pictures."""
        before = {key: value[:, :context] for key, value in batch.items()}
        state, _ = self.dynamics.observe(self.observations.encode(before), before["action"], before["is_first"])
        prior = self.dynamics.imagine(State(*(x[:, -1] for x in state)), batch["action"][:, context:])
        feat = torch.cat([self.dynamics.feat(state), self.dynamics.feat(prior)], 1)
        return {"action": self.observations.pictures(feat) - 0.5}
