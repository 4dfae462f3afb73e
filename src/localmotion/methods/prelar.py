"""PreLAR: a world model is pre-trained on videos with actions that it infers itself; fine-tuning maps real actions to them.

Paper: "PreLAR: World Model Pre-training with Learnable Action Representation", ECCV 2024. Its release (zhanglixuan0720/PreLAR) grew out
of APV and IPV. All sizes, weights and rates are the release's; "release" also marks what only that code says about the method.

    pre-training    inverse dynamics q(a_t | o_{t-1}, o_t), a latent action of 64 numbers;
                    one RSSM: q(z_t | z_{t-1}, a_t, o_t), p(z_t | z_{t-1}, a_t); image from z_t;
                    E[ -ln p(o_t | z_t) + KL_z + KL(q(a_t) || N(0, 1)) + consistency ]
    fine-tuning     the inverse model is dropped; a mapping network gives the same RSSM a_t = A(real action);
                    E[ -ln p(o_t | z_t) + KL_z - ln p(r_t + lambda r_int_t | z_t) - ln p'(r_t | z_t) ]

* KL(q(a_t)) is a bottleneck: without it the latent action could carry the whole next frame.
* The consistency loss (models/consistency.py): two latent actions that change the predicted state more should lie further apart.
* The mapping network has no loss of its own; the world model's losses train it. The actor's gradient flows through it.
* There are two reward heads, as in IPV: the behavioural one learns reward and bonus, the other (release: aux reward) the reward. The bonus
  is of APV, over windows of image embeddings (release) instead of features of z.
* In fine-tuning, encoder and RSSM are frozen for `online.freeze_updates` updates, then all learn at one rate (release).

Where the released code does not do what it means to do, the default is what is meant and a setting gives the code's:

* `consistency=sign`: the released loss has a gradient of zero, so the released pre-training is the ablation "w/o CL". The default form,
  a correlation of ranks, has a gradient and was chosen by measurement (docs/decisions/0016). In the release such a form raises an error.
* `action_prior_std=1.2449`: the release passes the prior's deviation 1 through 2 sigmoid(s / 2).
* `online.freeze_updates=99`: the release counts an update before the weights are loaded as the first of the 100 frozen ones.
* `free_latent=true`: the RSSM is not frozen (release: finetune_rssm).

Left out: the release's update on random weights before the checkpoint is loaded, half precision, and the mapping networks that no
command of it uses (with noise; over several actions).

The ablations: w/o CL `consistency=none`; w/o AL & CL `action_output=deterministic consistency=none`.

Shapes: B sequences, T positions, E embedding, S categoricals, C classes, F features of z, Z numbers of a latent action, A actions.
A state of the RSSM is (B, T, S, C) logits, (B, T, S, C) sample and (B, T, D) deter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.config import BehaviourConfig, WorldModelConfig
from localmotion.limits import Limits, above_zero, at_least
from localmotion.methods.base import (
    FROM_VIDEO,
    MOTION,
    Batch,
    Counters,
    Group,
    Method,
    Pass,
    Rates,
    behaviour_groups,
    imagination_passes,
    same,
    stacked_groups,
    video_pass,
)
from localmotion.methods.sizes import presets
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.bonus import WINDOW, IntrinsicBonus, dual_reward_losses
from localmotion.models.consistency import Form, consistency_loss, distances
from localmotion.models.continuation import continuation_losses, continuation_scales, make_continuation
from localmotion.models.encoders import xavier_all_
from localmotion.models.heads import MLP
from localmotion.models.image import ImageModel
from localmotion.models.latent_windows import futures
from localmotion.models.learned_actions import ActionMapping, Code, CodeShape, InverseDynamics, MappedDynamics
from localmotion.models.rssm import RSSM, Carry, RSSMState, beginning, kl_loss
from localmotion.suites import DMC_SUITES, ENDS


@dataclass(frozen=True)
class PreLARConfig:
    """Settings of PreLAR. Defaults are those of the release's commands, without its defects."""

    world: WorldModelConfig = field(default_factory=lambda: WorldModelConfig(context=False))
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    action_input: Literal["concat", "diff", "flow", "catdiff"] = "concat"
    """What the inverse model sees: both frames, their difference, the flow between them, or frames and difference."""
    action_output: Literal["gaussian", "discrete", "deterministic"] = "gaussian"
    """Latent action: Gaussian, one-hot codes, or numbers without noise and without bottleneck (the ablation "w/o AL")."""
    action_width: int = 64
    """Numbers of a Gaussian or deterministic latent action."""
    action_codes: int = 32
    """Number of one-hot codes of a discrete latent action (release)."""
    action_classes: int = 32
    """Classes of each of them (release)."""
    action_hidden: int = 1024
    """Width of the hidden layer of the inverse model and of the mapping network."""
    action_prior_std: float = 1.0
    """Standard deviation of the Gaussian latent action's prior; 1.2449 in the released code."""
    beta_action: float = 1.0
    """Weight of the latent action's KL. With 0 discrete codes learn as in the release, whose term has no gradient."""
    consistency: Form = "pearson"
    """Form of the action-state consistency loss; sign is the released one, which has no gradient; none: the ablation "w/o CL"."""
    consistency_weight: float = 1.0
    """Weight of the consistency loss."""
    consistency_sharpness: float = 1.0
    """How sharply the consistency loss tells distances of latent actions apart, in units of their standard deviation."""
    beta: float = 1.0
    """Weight of the state's KL."""
    beta_r: float = 1.0
    """Weight of the reward head that learns the reward without the bonus."""
    intrinsic_weight: float = 1.0
    """Weight lambda of the bonus: 1.0 Meta-World; 0: no bonus (the release's naive fine-tuning)."""
    free_nats: float = 0.0
    """Free nats of the state's KL in fine-tuning: 0 Meta-World."""
    free_latent: bool = False
    """The RSSM learns from the first update of fine-tuning on; off: it is frozen as long as the encoder."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "action_width", "action_codes", "action_classes", "action_hidden"),
        **at_least(
            0, "beta_action", "consistency_weight", "consistency_sharpness", "beta", "beta_r", "intrinsic_weight", "free_nats"
        ),
        **above_zero("action_prior_std"),
    }


class PreLAR(Method):
    """World model pre-training with learnable action representation."""

    name = "prelar"
    paper = "ECCV 2024"
    Config = PreLARConfig
    stages = FROM_VIDEO
    wants = MOTION
    transfers = same("image", "latent")
    # On Meta-World, where the release was tried, 100 updates are frozen. Elsewhere the mapping network begins as untrained, too.
    SUITES = {**ENDS, **{suite: {"online": {"freeze_updates": 100}} for suite in (*DMC_SUITES, "toy")}}
    # In a few hundred updates the paper's weight of the latent action's KL leaves it nearly empty (docs/decisions/0016).
    PRESETS = presets(
        paper={"online": {"pretrained_lr_factor": 1.0}},
        world={"context": False},
        own={
            "small": {"action_width": 32, "action_hidden": 256, "action_codes": 8, "action_classes": 8, "beta_action": 0.1},
            "tiny": {"action_width": 16, "action_hidden": 128, "action_codes": 4, "action_classes": 8, "beta_action": 0.1},
            "debug": {"action_width": 8, "action_hidden": 32, "action_codes": 4, "action_classes": 4},
        },
        online={"pretrained_lr_factor": 1.0},
    )

    def __init__(self, config: PreLARConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        world, hidden = config.world, config.action_hidden
        shape = CodeShape(config.action_output, config.action_width, config.action_codes, config.action_classes)
        self.image = ImageModel(world, image_size=image_size)
        self.latent = RSSM.configured(world, embed_dim=self.image.embed_dim, action_dim=shape.width)
        if action_dim is None:
            self.inverse = InverseDynamics(world, shape, given=config.action_input, hidden=hidden, image_size=image_size)
            xavier_all_(self)
            return
        feat = self.latent.feat_dim
        self.mapping = ActionMapping(action_dim, shape, hidden=hidden)
        self.reward = MLP(feat, 1, units=world.units, layers=world.layers)  # behavioural: r + lambda r_int
        self.reward_representative = MLP(feat, 1, units=world.units, layers=world.layers)  # r
        self.bonus = IntrinsicBonus(self.image.embed_dim)
        self.behaviour = ActorCritic.configured(feat, action_dim, world, config.behaviour)
        xavier_all_(self)
        self.behaviour.slow_critic.load_state_dict(self.behaviour.critic.state_dict())
        self.continuation = make_continuation(config.behaviour, feat, units=world.units, layers=world.layers)

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        return (2 if stage == "pretrain" else WINDOW), None

    @classmethod
    def needs(cls, config: Any, stage: str) -> frozenset[str]:
        return MOTION if stage == "pretrain" and config.action_input == "flow" else frozenset()

    # 1. Pre-training on videos ------------------------------------------------------------------------------------------------

    def pretrain_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of the objective above on video segments."""
        config = self.config
        truth = self.image.pixels(batch["image"])  # (B*T, ...)
        embed, context = self.image.encode(truth, batch["image"])  # (B, T, E)
        code = self._code(batch, truth)  # (B, T - 1, ...)
        action = _from_first(code.sample())  # (B, T, Z)
        post, prior = self.latent.observe(embed, action, batch["is_first"])  # state, (B, T, S, C)
        kl, metrics = kl_loss(post.logits, prior, balance=config.world.kl_balance)
        losses = {"image": self.image.losses([self.latent.feat(post)], context, truth)[0], "kl": kl}
        metrics = {f"latent/{key}": value for key, value in metrics.items()} | {"action/std": action[:, 1:].detach().std()}
        bottleneck = code.from_prior(config.action_prior_std)  # (B, T - 1)
        if bottleneck is not None:
            losses["action_kl"] = bottleneck.mean()
        if config.consistency != "none":
            of_state, of_action = distances(self.latent, post, prior, code, action)  # (B * (T - 1),)
            losses["consistency"], metrics["action/agreement"] = consistency_loss(
                config.consistency, of_state, of_action, config.consistency_sharpness
            )
        return losses, metrics

    def _code(self, batch: Batch, truth: Tensor) -> Code:
        """Latent actions (B, T - 1, ...) that led to frames 1 to T - 1. ``truth``: the pixels of all frames, (B*T, ...)."""
        pixels = truth.unflatten(0, batch["is_first"].shape)  # (B, T, ...)
        code: Code = self.inverse(pixels, batch["flow"] if self.config.action_input == "flow" else None)
        return code

    # 2. Fine-tuning in the environment ----------------------------------------------------------------------------------------

    def world_model_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], RSSMState]:
        """Losses of the objective above, metrics, and the posterior states (B*T, ...)."""
        config, is_first = self.config, batch["is_first"]
        truth = self.image.pixels(batch["image"])  # (B*T, ...)
        embed, context = self.image.encode(truth, batch["image"])  # (B, T, E)
        state, prior = self.latent.observe(embed, self.mapping(batch["action"]), is_first)  # state, (B, T, S, C)
        feat = self.latent.feat(state)  # (B, T, F)
        kl, metrics = kl_loss(state.logits, prior, balance=config.world.kl_balance, free=config.free_nats)
        # Without a bonus no window ends the targets, so the reward is learnt at all positions (release).
        bonus = self.bonus(embed.detach().float(), is_first) if config.intrinsic_weight else torch.zeros_like(batch["reward"])
        behavioural = self.reward(feat).squeeze(-1)  # (B, T)
        representative = self.reward_representative(feat).squeeze(-1)  # (B, T)
        losses = {
            "image": self.image.losses([feat], context, truth)[0],
            "kl": kl,
            **dual_reward_losses(behavioural, representative, batch, bonus, weight=config.intrinsic_weight),
            **continuation_losses(self.continuation, feat, batch),
        }
        metrics = {f"latent/{key}": value for key, value in metrics.items()} | {"bonus/mean": bonus.mean()}
        return losses, metrics, state.starts()

    def behaviour_losses(self, start: RSSMState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        dynamics = MappedDynamics(self.latent, self.mapping)
        return self.behaviour.losses(start, dynamics, lambda feat: self.reward(feat).squeeze(-1), self.continuation)

    def loss_scales(self, stage: str) -> dict[str, float]:
        config, world = self.config, self.config.world
        scales = {"image": world.image_weight, "kl": config.beta}
        if stage != "pretrain":
            scales |= {"reward": world.reward_weight, "reward_representative": config.beta_r * world.reward_weight}
            return scales | continuation_scales(config.behaviour)
        if config.action_output != "deterministic":
            scales["action_kl"] = config.beta_action
        if config.consistency != "none":
            scales["consistency"] = config.consistency_weight
        return scales

    def passes(self, stage: str) -> tuple[Pass, ...]:
        if stage == "pretrain":
            return video_pass(self, self.loss_scales(stage))
        return imagination_passes(self, self.loss_scales(stage), ("encoder", "model"))

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        if stage == "pretrain":
            return [Group("model", list(self.parameters()), rates.lr)]
        new: list[nn.Module | None] = [self.mapping, self.reward, self.reward_representative, self.continuation]
        held: nn.Module = self.latent
        if self.config.free_latent:
            held, new = nn.Module(), [self.latent, *new]
        return [*stacked_groups(self.image, held, new, rates), *behaviour_groups(self.behaviour, rates)]

    def after_update(self, counters: Counters) -> None:
        if counters.stage in self.acts_after:
            self.behaviour.after_update()

    # 3. Acting and looking ----------------------------------------------------------------------------------------------------

    def initial_carry(self, batch_size: int) -> Carry:
        return beginning(self.latent, batch_size, self.action_dim)

    def act(self, obs: Batch, carry: Carry, *, explore: bool, window: int = 0) -> tuple[Tensor, Carry]:
        """One agent step. Latents are sampled, also in evaluation."""
        embed = self.image.embed(obs["image"])
        state = self.latent.obs_step(carry.state, self.mapping(carry.action), embed, obs["is_first"][:, 0])
        action = self.behaviour.act(self.latent.feat(state), explore=explore)
        return action, Carry(state, action)

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Prior rolled out after ``context`` frames, given latent actions: the rows of `futures`. After fine-tuning `action`, with the
        real actions."""
        embed, maps = self.image.encode(self.image.pixels(batch["image"]), batch["image"], frame=context - 1)
        true = self.mapping(batch["action"]) if self.acts else self.motion_code(batch)  # (B, T, Z)
        assert true is not None
        post, _ = self.latent.observe(embed[:, :context], true[:, :context], batch["is_first"][:, :context])
        rows = {"action": true} if self.acts else futures(true, context)
        return {
            name: self.image.pictures(self.latent.open_loop(post, actions[:, context:]), maps) for name, actions in rows.items()
        }

    def motion_code(self, batch: Batch) -> Tensor | None:
        """The latent action's mean (of one-hot codes: the most likely classes), (B,T,Z), zero at the first frame.

        None after fine-tuning, which has no inverse model.
        """
        return None if self.acts else _from_first(self._code(batch, self.image.pixels(batch["image"])).mode())


def _from_first(action: Tensor) -> Tensor:
    """(B, T - 1, Z) -> (B, T, Z): nothing led to the first frame."""
    return F.pad(action, (0, 0, 1, 0))
