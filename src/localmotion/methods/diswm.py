"""DisWM: a disentangled code is learned from distracting videos; its encoder teaches the encoder of a world model of another task.

Paper: "Disentangled World Models: Learning to Transfer Semantic Knowledge from Distracting Videos for Reinforcement Learning", ICCV 2025,
arXiv 2503.08751. "Release" marks what only the authors' code says. z is the code of a frame (20 numbers), s the state.

    code            q(z_t | o_t) = N(m, sigma^2) by a beta-VAE encoder; z_t is always sampled, also while acting
    pre-training    Gaussian RSSM without actions: q(s_t | s_{t-1}, z_t), p(s_t | s_{t-1});
                    E[ -ln p(o_t | s_t) + beta KL_s + beta_code KL(q(z_t | o_t) || N(0, I)) ]
    fine-tuning     a world model with actions from scratch; the pre-trained encoder is a frozen teacher:
                    E[ -ln p(o_t | s_t) - w ln p(r_t | s_t) + beta KL_s + beta_code KL(q(z_t | o_t) || N(0, I))
                       + eta(n) KL(softmax(z^teacher_t) || softmax(z_t)) ]
    train           the same without a teacher

* Nothing but the teacher's codes is transferred. The student sees the same frame as its teacher.
* eta(n) = 0.1 max(1 - n / 50000, 0.1) after n agent steps. With ``cross_domain`` it is 0 until n = 50000, then
  0.1 max(2 - n / 50000, 0.1). The weight of an update uses the agent steps at the update before. Without an environment (`--data`)
  an update counts as 5 agent steps. The short presets count n from the first update on (`distillation_after_random`): their random
  steps at the beginning are a large share of the run, and the weight would have fallen before anything is learned.
* The release sums the distillation's KL over the T = 50 frames of a sequence and averages it over sequences. Here it is the mean over
  frames times ``distillation_frames`` = 50: the same at T = 50, and independent of T.
* The videos of a model are of one source task: the choice of clips is that of the clip store.

Where the released code does not do what it means to do, the default is what is meant and a setting gives the code's:

* ``distillation=0.095 distillation_steps=0``: the release's schedule reads a counter that stays at the 2,500 steps of the prefill.
  With ``cross_domain`` this counter never reaches 50,000, so there is no distillation at all: ``distillation=0``.
* The release's teacher is trained by the distillation loss. Here it is frozen.
* The release's lambda-returns come out in reversed order. Here they are in the right order, and actor and critic are those of the other
  methods here (models/actor_critic.py): a truncated normal, and 15 imagined transitions instead of 14.
* ``diswm:`` repeats an action twice; its option ``reference_repeat`` is the release's double repeat.
* The release pre-trains with the posterior's mean as the state: ``pretrain_means``. In fine-tuning states are sampled.

The paper's length of pre-training is not clear: 20,000 updates in the release, about 100,000 by the paper's table of costs.
Left out: the GRU without LayerNorm (DrawerWorld), and a random share of the episodes in pre-training.

The ablations: w/o distillation ``distillation=0``, w/o disentanglement ``beta_code=0`` in both stages.

Shapes: B sequences, T positions, Z numbers of a code, S latents, D deter, F = S + D features, A actions.
A state is (B, T, S, 2) mean and deviation, (B, T, S, 1) sample and (B, T, D) deter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from localmotion.config import BehaviourConfig
from localmotion.errors import ConfigError
from localmotion.limits import Limits, at_least, shares
from localmotion.methods.base import (
    FROM_VIDEO,
    HELD_RATES,
    Batch,
    Counters,
    Group,
    Method,
    Pass,
    Rates,
    behaviour_groups,
    images,
    imagination_passes,
    video_pass,
)
from localmotion.methods.sizes import BEHAVIOUR, budgets
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.beta_vae import BetaVAEDecoder, BetaVAEEncoder
from localmotion.models.continuation import continuation_losses, continuation_scales, make_continuation
from localmotion.models.distributions import categorical_kl
from localmotion.models.heads import MLP, begin_as_torch_
from localmotion.models.image import image_losses
from localmotion.models.rssm import Carry, RSSMState, beginning
from localmotion.models.rssm_gaussian import GaussianRSSM, gaussian_kl_loss
from localmotion.suites import DMC_SUITES, ENDS

STEPS_PER_UPDATE = 5
"""Agent steps that an update stands for where there is no environment: one update every 5 agent steps (release)."""
LEAST_SHARE = 0.1
"""The distillation's weight falls to this share."""


@dataclass(frozen=True)
class DisWMConfig:
    """Settings of DisWM. Defaults are those of the paper and, where it is silent, of the release."""

    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    code: int = 20
    """Numbers Z of the code, and of the narrowest layer of the decoder."""
    depth: int = 32
    """Channels of the first convolution."""
    deter: int = 200
    """Deterministic state width."""
    hidden: int = 200
    """Width of the RSSM's hidden layers."""
    stoch: int = 50
    """Number of Gaussian latents."""
    units: int = 400
    """Width of the heads' layers (reward, actor, critic)."""
    layers: int = 4
    """Layers of the actor."""
    critic_layers: int = 3
    """Layers of the critic."""
    reward_layers: int = 2
    """Layers of the reward head."""
    image_weight: float = 1.0
    """Weight of the image loss. A picture of 32 pixels has a quarter of the values of 64: weight 4 keeps the balance with the KLs."""
    reward_weight: float = 1.0
    """Weight of the reward loss: 2 in the suites of DeepMind Control, else 1."""
    beta: float = 1.0
    """Weight of the state's KL."""
    kl_balance: float = 0.8
    """Share of this KL that trains the prior."""
    kl_free: float = 1.0
    """Free nats of this KL, applied to its mean over the batch: 1 in all suites."""
    beta_code: float = 0.015
    """Weight of the code's KL from N(0, I) in both stages; 0: the ablation without disentanglement."""
    pretrain_means: bool = True
    """The state of pre-training is the posterior's mean (release); off: a sample."""
    distillation: float = 0.1
    """Weight of the distillation at first; 0: no teacher."""
    distillation_steps: int = 50_000
    """The weight falls linearly to a tenth; it would be zero after this many agent steps. 0: one weight for the whole run."""
    distillation_after_random: bool = False
    """Agent steps count from the first update on, without the random steps before it."""
    distillation_frames: float = 50.0
    """Factor on the distillation's mean over frames. The release sums over sequences of 50 frames."""
    cross_domain: bool = False
    """Distillation begins after `distillation_steps` agent steps, and its weight falls from then on (Pusher, DrawerWorld)."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "code", "depth", "deter", "hidden", "stoch", "units"),
        **at_least(
            0,
            "layers",
            "critic_layers",
            "reward_layers",
            "image_weight",
            "reward_weight",
            "beta",
            "kl_free",
            "beta_code",
            "distillation",
            "distillation_steps",
            "distillation_frames",
        ),
        **shares("kl_balance"),
    }


def _presets() -> dict[str, dict[str, Any]]:
    own: dict[str, dict[str, Any]] = {
        "small": {"depth": 16, "stoch": 32, "units": 200, "layers": 3, "distillation_steps": 2_500},
        "tiny": {
            "depth": 16,
            "deter": 128,
            "hidden": 128,
            "stoch": 16,
            "units": 96,
            "layers": 2,
            "critic_layers": 2,
            "image_weight": 4.0,
            "reward_weight": 100.0,
            "distillation_steps": 2_000,
        },
        "debug": {
            "code": 6,
            "depth": 4,
            "deter": 32,
            "hidden": 32,
            "stoch": 8,
            "units": 32,
            "layers": 2,
            "critic_layers": 2,
            "distillation_steps": 200,
        },
    }
    short = {"distillation_after_random": True}
    found = budgets(own={name: {**values, **short, "behaviour": dict(BEHAVIOUR[name])} for name, values in own.items()})
    found["paper"] = {
        "optim": {"weight_decay": 0.0},
        "pretrain": {"updates": 20_000, "batch_size": 50, "length": 50},
        "online": {"batch_size": 50, "freeze_updates": 0},
    }
    for values in found.values():
        values["stages"] = {"train": {"model": {"distillation": 0.0}}}  # there is no teacher
    return found


class DisWM(Method):
    """Disentangled world models: a frozen encoder from distracting videos teaches a new one."""

    name = "diswm"
    paper = "arXiv 2503.08751"
    Config = DisWMConfig
    stages = FROM_VIDEO
    unread = {"finetune": HELD_RATES, "train": HELD_RATES}
    begins = {"finetune": "pretrain"}
    transfers = {"encoder": "teacher"}
    PRESETS = _presets()
    # 500,000 agent steps of 2 env steps, 2,500 of them random. Windows are drawn uniformly in all suites. The palette changes half-way.
    SUITES = {
        **ENDS,
        **{s: {"online": {"prioritize_ends": False}} for s in ("metaworld", "dmw")},
        **{s: {"online": {"env_steps": 1_000_000, "prefill": 5_000}, "model": {"reward_weight": 2.0}} for s in DMC_SUITES},
        "diswm": {"online": {"env_steps": 1_000_000, "prefill": 5_000, "phase_at": 0.5}, "model": {"reward_weight": 2.0}},
    }

    agent_steps: Tensor
    """Agent steps that the distillation's schedule has counted."""
    random_steps: Tensor
    """Agent steps at the first update, which it leaves out (`distillation_after_random`)."""

    def __init__(self, config: DisWMConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        shape = {"depth": config.depth, "image_size": image_size}
        self.encoder = BetaVAEEncoder(config.code, **shape)
        self.dynamics = GaussianRSSM(
            embed_dim=config.code,
            action_dim=action_dim or 0,
            deter=config.deter,
            hidden=config.hidden,
            stoch=config.stoch,
            action_free=action_dim is None,
        )
        feat = self.dynamics.feat_dim
        self.decoder = BetaVAEDecoder(feat, config.code, **shape)
        self.teacher: BetaVAEEncoder | None = None
        if action_dim is None:
            return
        self.reward = MLP(feat, 1, units=config.units, layers=config.reward_layers)
        behaviour = config.behaviour
        self.behaviour = ActorCritic(
            feat,
            action_dim,
            units=config.units,
            layers=config.layers,
            critic_layers=config.critic_layers,
            horizon=behaviour.horizon,
            discount=behaviour.discount,
            lambda_=behaviour.lambda_,
            entropy=behaviour.entropy,
            slow_every=behaviour.slow_critic_every,
        )
        begin_as_torch_(self.reward)
        begin_as_torch_(self.behaviour)
        self.behaviour.slow_critic.load_state_dict(self.behaviour.critic.state_dict())
        self.continuation = make_continuation(behaviour, feat, units=config.units, layers=config.reward_layers)
        if self.continuation:
            begin_as_torch_(self.continuation)
        if config.distillation > 0:
            self.teacher = BetaVAEEncoder(config.code, **shape).requires_grad_(False).eval()
        self.register_buffer("agent_steps", torch.zeros((), dtype=torch.long))
        if config.distillation_after_random:
            self.register_buffer("random_steps", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> DisWM:
        """As of `nn.Module`; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    # 1. Learning --------------------------------------------------------------------------------------------------------------

    def _observed(
        self, batch: Batch, truth: Tensor, action: Tensor | None, sample: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], RSSMState, Tensor]:
        """Losses and metrics of both stages, posterior states (B, T, ...), sampled codes (B, T, Z). ``truth``: pictures (B*T, 3, S, S)."""
        config, is_first = self.config, batch["is_first"]
        code = self.encoder(truth)  # (B*T, Z)
        drawn = code.sample().unflatten(0, is_first.shape)  # (B, T, Z)
        state, prior = self.dynamics.observe(drawn, action, is_first, sample=sample)  # state, (B, T, S, 2)
        kl, metrics = gaussian_kl_loss(state.logits, prior, balance=config.kl_balance, free=config.kl_free)
        pictures = self.decoder(self.dynamics.feat(state).flatten(0, 1))  # (B*T, 3, S, S)
        losses = {"image": image_losses(pictures, truth)[0], "kl": kl, "code_kl": code.kl().mean()}
        found = {f"dynamics/{key}": value for key, value in metrics.items()}
        return losses, found | {"code/std": code.std.detach().mean()}, state, drawn

    def pretrain_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of the objective above on video segments."""
        return self._observed(batch, images(batch), None, sample=not self.config.pretrain_means)[:2]

    def world_model_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], RSSMState]:
        """Losses of the objective above, metrics, and the posterior states (B*T, ...)."""
        truth = images(batch)  # (B*T, 3, S, S)
        losses, metrics, state, code = self._observed(batch, truth, batch["action"], sample=True)
        feat = self.dynamics.feat(state)  # (B, T, F)
        reward = self.reward(feat).squeeze(-1).float()  # (B, T)
        losses["reward"] = 0.5 * (reward - batch["reward"]).square().mean()
        losses |= continuation_losses(self.continuation, feat, batch)
        if self.teacher is not None:
            distance, weight = self._distance(truth, code.flatten(0, 1)), self.distillation_weight()
            losses["distillation"] = weight * self.config.distillation_frames * distance
            metrics |= {"distillation/kl": distance.detach(), "distillation/weight": weight}
        return losses, metrics, state.starts()

    def _distance(self, truth: Tensor, code: Tensor) -> Tensor:
        """KL(softmax(teacher's code) || softmax(code)) over the Z numbers, mean over frames. Both codes are samples, (B*T, Z)."""
        assert self.teacher is not None
        with torch.no_grad():
            wanted = self.teacher(truth).sample()  # (B*T, Z)
        log_p, log_q = F.log_softmax(wanted, -1), F.log_softmax(code, -1)
        return categorical_kl(log_p.unsqueeze(-2), log_q.unsqueeze(-2)).mean()

    def distillation_weight(self) -> Tensor:
        """eta at the agent steps that `after_update` counted last."""
        config, steps = self.config, self.agent_steps.float()
        if not config.distillation_steps:
            return torch.full_like(steps, config.distillation)
        share = steps / config.distillation_steps
        if config.cross_domain:
            return config.distillation * (2 - share).clamp(min=LEAST_SHARE) * (share >= 1)
        return config.distillation * (1 - share).clamp(min=LEAST_SHARE)

    def behaviour_losses(self, start: RSSMState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.behaviour.losses(start, self.dynamics, lambda feat: self.reward(feat).squeeze(-1), self.continuation)

    def loss_scales(self, stage: str) -> dict[str, float]:
        config = self.config
        scales = {"image": config.image_weight, "kl": config.beta, "code_kl": config.beta_code}
        if stage == "pretrain":
            return scales
        scales |= {"reward": config.reward_weight} | continuation_scales(config.behaviour)
        return scales if self.teacher is None else scales | {"distillation": 1.0}

    def passes(self, stage: str) -> tuple[Pass, ...]:
        """Raises ConfigError for a distillation in a stage without a teacher."""
        if stage == "pretrain":
            return video_pass(self, self.loss_scales(stage))
        if stage == "train" and self.teacher is not None:
            raise ConfigError(f"distillation={self.config.distillation:g}: train has no teacher; set it to 0")
        return imagination_passes(self, self.loss_scales(stage), ("model",))

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        heads = () if stage == "pretrain" else (self.reward, self.continuation)
        parts = (self.encoder, self.dynamics, self.decoder, *heads)
        model = Group("model", [p for part in parts if part for p in part.parameters()], rates.lr)
        return [model] if stage == "pretrain" else [model, *behaviour_groups(self.behaviour, rates)]

    def after_update(self, counters: Counters) -> None:
        if counters.stage in self.acts_after:
            self.behaviour.after_update()
            steps = counters.agent_step
            self.agent_steps.fill_(STEPS_PER_UPDATE * counters.update if steps is None else steps)
            if self.config.distillation_after_random and steps is not None:
                if counters.update == 1:
                    self.random_steps.copy_(self.agent_steps)
                self.agent_steps -= self.random_steps

    # 2. Acting and looking ----------------------------------------------------------------------------------------------------

    def initial_carry(self, batch_size: int) -> Carry:
        return beginning(self.dynamics, batch_size, self.action_dim)

    def act(self, obs: Batch, carry: Carry, *, explore: bool, window: int = 0) -> tuple[Tensor, Carry]:
        """One agent step. Codes and states are sampled, also in evaluation."""
        code = self.encoder(images(obs)).sample()  # (B, Z)
        state = self.dynamics.obs_step(carry.state, carry.action, code, obs["is_first"][:, 0])
        action = self.behaviour.act(self.dynamics.feat(state), explore=explore)
        return action, Carry(state, action)

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Prior rolled out after ``context`` frames; after fine-tuning with the real actions."""
        sample = self.acts or not self.config.pretrain_means
        is_first = batch["is_first"]
        action = batch["action"] if self.acts else torch.zeros(*is_first.shape, 0, device=is_first.device)
        code = self.encoder(images({"image": batch["image"][:, :context]})).sample()  # (B*C, Z)
        post, _ = self.dynamics.observe(
            code.unflatten(0, (-1, context)), action[:, :context], is_first[:, :context], sample=sample
        )
        feat = self.dynamics.open_loop(post, action[:, context:], sample)  # (B, T, F)
        return {"action" if self.acts else "prior": self.decoder(feat.flatten(0, 1)).unflatten(0, is_first.shape)}

    def motion_code(self, batch: Batch) -> Tensor:
        """The mean of each frame's code, (B, T, Z). It says what a frame shows, not how it moves."""
        return self.encoder(images(batch)).mean.unflatten(0, batch["is_first"].shape)

    def traversal(self, batch: Batch, values: Tensor) -> Tensor:
        """Each number of the first frame's code set to each of K values: pictures (B, Z, K, 3, S, S)."""
        code = self.encoder(images({"image": batch["image"][:, :1]})).mean  # (B, Z)
        numbers, count = code.shape[1], len(values)
        own = torch.eye(numbers, device=code.device, dtype=torch.bool).unsqueeze(1)  # (Z, 1, Z)
        walked = torch.where(own, values.to(code).view(1, count, 1), code.view(-1, 1, 1, numbers))  # (B, Z, K, Z)
        rows = walked.flatten(0, -2)  # (B*Z*K, Z)
        start = torch.ones(len(rows), device=code.device, dtype=torch.bool)
        action = torch.zeros(len(rows), self.action_dim, device=code.device)
        state = self.dynamics.obs_step(self.dynamics.initial(len(rows)), action, rows, start, sample=False)
        return self.decoder(self.dynamics.feat(state)).unflatten(0, walked.shape[:3])
