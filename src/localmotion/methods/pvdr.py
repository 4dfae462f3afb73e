"""PVDR: a model of plans learned from video without actions, for planning and learning in an environment.

Paper: "Pre-trained Visual Dynamics Representations for Efficient Policy Learning", arXiv 2411.03169 (ECCV 2024).

**This is a reconstruction.** We could not read the body of the paper. We know its abstract, two footnotes (one says what stays frozen
online) and public summaries: a VQGAN makes tokens of frames; spatial-temporal Transformers predict the next n frames from m frames as a
conditional VAE with posterior E, prior P and decoder D, whose latent z is the visual dynamics representation; it learns from BAIR robot
pushing. They give no size, weight or schedule. What follows is ours where no source is named, and results say nothing about the paper's.

    tokenize   s_t = tokens of o_t                                              (`models.tokenizer`)
    pretrain   X = s_{t-m+1..t},  Y = s_{t+1..t+n},  z ~ q = E(X, Y),  p = P(X)    (`models.plan_cvae`)
               mean over frames and cells of -log D(Y | X, z)  +  beta / (n N) KL(q || p)

Open choices, all settings unless "fixed" stands there:

* Tokens: 8x8 of 1024 codes for 64 pixels. L1 + MSE; VQGAN's losses are off: `perceptual` needs foreign weights, `adversarial` is unstable
  on small data (its weight is fixed here, not scaled by gradients). Features have the codes' width: plans and pictures share a space.
* z: one Gaussian of 32 numbers for a whole plan (footnote 1 names mean and variance). E averages the global tokens of the n later frames.
* D answers all frames at once (`decode`): planning decodes many plans for each step of the environment.
* E, P and D share no weights (fixed), so that online each can be frozen or trained by itself.
* beta: 1 is the bound on the likelihood, because "tokens" is a mean over n N tokens and the KL a sum over z. The default is half of
  that, because collapse is the larger risk. It rises from 0.
* Windows: one random window of m + n frames of each sequence (fixed). Windows that overlap cost as much as others and say less. Sequences
  are longer than windows only so that held-out predictions go beyond one plan.
* Adam's betas are VQGAN's (0.5, 0.9) for the tokenizer and (0.9, 0.95), usual for Transformers, after it (fixed). Norms, biases and
  embeddings have no weight decay (fixed). Gradients of the two groups, with and without decay, are clipped separately.
* `pretrain` loads the tokenizer alone (setting `load` of the presets): runs with several sizes or seeds can share one.
* Online: prior and decoder learn, the tokenizer does not. The distance to the goal compares features cell by cell; an object that shares no
  cell with its goal is then never nearer, so `blur` can average over cells (`models.planning`). PPO for the critic of footnote 2. The
  critic also sees the goal. Pairs of z and action come from all rollouts, because they are true whatever the policy was (`WindowMemory`).
  PPO begins after `reward_from` of the run: before, it would learn from plans that the alignment cannot follow.

Shapes: B sequences, T positions, S side, K plans, m context, n horizon, N cells, V codes, Z numbers of z, D numbers of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.errors import ConfigError
from localmotion.limits import Limits, at_least, shares
from localmotion.methods.base import (
    GOAL,
    Batch,
    Counters,
    Group,
    Losses,
    Method,
    Metrics,
    Pass,
    Rates,
    Source,
    images,
    same,
    trained,
)
from localmotion.methods.sizes import plan_presets
from localmotion.models.alignment import Aligner, AlignmentConfig, PlanCarry
from localmotion.models.latent_windows import every, stacks, starts
from localmotion.models.plan_cvae import Coded, PlanConfig, PlanDecoder, Posterior, Prior, balanced, continued, sample
from localmotion.models.plan_figures import ACTIVE, about_tokens, plan_figures, token_figures
from localmotion.models.planning import WindowMemory, choose_windows
from localmotion.models.ppo import EXTRAS, PPOConfig, step_losses
from localmotion.models.tokenizer import Tokenizer, TokenizerConfig
from localmotion.models.vqgan_losses import PatchDiscriminator, Perceptual, hinge

PROBED = 4
"""Sequences of a batch for the metric of shuffled latents."""
AT_ONCE = 256
"""Windows that are coded at once."""


@dataclass(frozen=True)
class PVDRConfig:
    """Settings of PVDR. None of the defaults is known to be the paper's."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The model of plans."""
    beta: float = 0.5
    """Weight of the KL. 1: that of the bound on the likelihood."""
    beta_warmup: int = 10_000
    """Updates over which that weight rises from 0; 0: none."""
    kl_balance: float = 0.0
    """Above 0: this share of the KL's gradient trains the prior, the rest the posterior. 0: the KL as it is."""
    free_nats_each: float = 0.0
    """The mean KL of each number of z counts as this at least."""
    warmup: int = 2_000
    """Updates over which the learning rate of `pretrain` rises."""
    decay: float = 0.01
    """Weight decay of `pretrain`."""
    pretrained: bool = True
    """Whether `finetune` starts from a `pretrain` run. false: from a `tokenize` run, with a model of plans that has learned nothing and all
    of which learns online (an ablation)."""
    align: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Acting with plans, and learning to, in `finetune`."""
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(discount=0.99, entropy=1e-3))
    """PPO in `finetune`."""
    LIMITS: ClassVar[Limits] = {**at_least(0, "beta", "beta_warmup", "free_nats_each", "warmup", "decay"), **shares("kl_balance")}


class PVDR(Method):
    """Visual dynamics representations: tokens of frames, a conditional VAE of plans, and actions aligned with it."""

    name = "pvdr"
    paper = "arXiv 2411.03169"
    Config = PVDRConfig
    PRESETS = plan_presets()
    stages = {"tokenize": Source.CLIPS, "pretrain": Source.CLIPS, "finetune": Source.ROLLOUT}
    unread = {"finetune": frozenset({"online.freeze_updates"})}
    acts_after, predicts_after = frozenset({"finetune"}), frozenset({"pretrain"})
    begins = {"pretrain": "tokenize", "finetune": "pretrain"}
    wants = GOAL
    encodes, rehearses = frozenset({"image", "goal"}), frozenset({"finetune"})
    extras = EXTRAS
    transfers = same("tokenizer", "posterior", "prior", "decoder")

    warm: Tensor
    awake: Tensor

    def __init__(self, config: PVDRConfig, *, image_size: int, action_dim: int | None) -> None:
        super().__init__(config, image_size=image_size, action_dim=action_dim)
        self.config = config
        if not (config.pretrained or config.align.plans_learn):
            raise ConfigError("pretrained=false, plans_learn=false: plans that have learned nothing would stay so")
        self.before, self.ahead = config.plan.context, config.plan.horizon
        self.tokenizer = Tokenizer(config.tokenizer, image_size)
        sizes = self.tokenizer.codes, self.tokenizer.cells
        self.posterior = Posterior(config.plan, *sizes)
        self.prior = Prior(config.plan, *sizes)
        self.decoder = PlanDecoder(config.plan, *sizes)
        self.register_buffer("warm", torch.tensor(float(config.beta_warmup == 0)))  # share of beta that counts now
        self.vgg: Perceptual | None = None  # read when `tokenize` begins
        if config.tokenizer.adversarial > 0:
            self.discriminator = PatchDiscriminator(config.tokenizer.widths[0])
            self.register_buffer("awake", torch.tensor(float(config.tokenizer.adversarial_from == 0)))
        if action_dim is not None:
            cells, code_dim, latent, context = self.tokenizer.cells, self.tokenizer.dim, config.plan.latent, config.plan.dim
            shape = {"side": self.tokenizer.side, "features": code_dim, "actions": action_dim}
            self.aligner = Aligner(config.align, latent=latent, context=context, **shape)
            kept = self.before + self.ahead, cells, action_dim, context if config.pretrained else 0
            self.memory = WindowMemory(config.align.memory, *kept)
            # Of the plan, acting stores the codes of its first frame.
            self.extras = {**EXTRAS, "z": (latent,), "context": (context,), "plan": (cells, code_dim)}

    @classmethod
    def needs(cls, config: Any, stage: str) -> frozenset[str]:
        return cls.wants if stage == "finetune" else frozenset()

    @classmethod
    def origins(cls, config: Any, stage: str) -> tuple[str, ...]:
        start = "pretrain" if config.pretrained else "tokenize"
        return {"pretrain": ("tokenize",), "finetune": (start,)}.get(stage, ())

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        return (1 if stage == "tokenize" else config.plan.context + config.plan.horizon), None

    @classmethod
    def lead(cls, config: Any, stage: str) -> int:
        return config.plan.context - 1 if stage == "pretrain" else 0

    @classmethod
    def least_updates(cls, config: Any, stage: str) -> int:
        late = (config.tokenizer.quantise_from, config.tokenizer.adversarial_from if config.tokenizer.adversarial > 0 else 0)
        return max(late) + 1 if stage == "tokenize" else 1

    # 1. Tokens ------------------------------------------------------------------------------------------------------------------

    def tokenize_losses(self, batch: Batch) -> tuple[Losses, Metrics, tuple[Tensor, Tensor]]:
        """Losses of the tokenizer on all frames, metrics, and the frames with their reconstructions."""
        true, config = images(batch), self.config.tokenizer
        found, losses, metrics = self.tokenizer.learn(true)
        if config.perceptual:
            losses["perceptual"] = self._vgg()(found, true)
        if config.adversarial > 0:
            losses["adversarial"] = -self.awake * self.discriminator(found).float().mean()
        return losses, metrics, (true, found.detach())

    def discriminator_losses(self, both: tuple[Tensor, Tensor]) -> tuple[Losses, Metrics]:
        """The discriminator's hinge loss of true and decoded frames, from the update on where it begins."""
        true, found = (self.discriminator(image) for image in both)
        return {"discriminator": self.awake * hinge(true, found)}, {}

    def _vgg(self) -> Perceptual:
        """The network of the perceptual loss, on the device of the model. Raises ConfigError if its file does not fit."""
        if self.vgg is None:
            self.vgg = Perceptual(Path(self.config.tokenizer.perceptual)).to(self.warm.device)
        return self.vgg

    @torch.no_grad()
    def tokens(self, image: Tensor) -> Tensor:
        """Pictures (B, T, S, S, 3) uint8 -> tokens (B, T, N)."""
        return self.tokenizer.tokens(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        """Pictures (B, T, S, S, 3) uint8 -> features (B, T, N, D), before quantisation."""
        return self.tokenizer.features(images({"image": image})).unflatten(0, image.shape[:2])

    @torch.no_grad()
    def drawn(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, N) -> pictures (B, T, 3, S, S) in [-0.5, 0.5]."""
        image = self.tokenizer.decode(self.tokenizer.embed(tokens.flatten(0, 1)))
        return image.clamp(-0.5, 0.5).unflatten(0, tokens.shape[:2])

    # 2. Plans -------------------------------------------------------------------------------------------------------------------

    def pretrain_losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """Losses of the model of plans, on one random window of m + n frames of each sequence."""
        image, count = batch["image"], self.before + self.ahead
        start = torch.randint(image.shape[1] - count + 1, (len(image), 1), device=image.device)
        rows = torch.arange(len(image), device=image.device)[:, None]
        return self.plan_losses(self.tokens(image[rows, start + torch.arange(count, device=image.device)]))[:2]

    def plan_losses(self, tokens: Tensor) -> tuple[Losses, Metrics, Coded]:
        """The losses "tokens" and "kl" of windows (B, m + n, N), metrics, and the windows' codes without a gradient."""
        past, future = tokens.split([self.before, self.ahead], 1)
        posterior, (*prior, context) = self.posterior(tokens), self.prior(past)
        z = sample(*posterior)  # (B, Z)
        kl, each = balanced(posterior, (prior[0], prior[1]), self.config.kl_balance, self.config.free_nats_each)
        losses = {"tokens": self.surprise(past, future, z.unsqueeze(1))[0], "kl": self.warm * kl}
        with torch.no_grad():
            few = z[:PROBED]
            own, other = self.surprise(past[:PROBED], future[:PROBED], torch.stack([few, few.roll(1, 0)], 1))
        active = (each > ACTIVE).float().sum()
        metrics = {"kl/nats": each.sum(), "kl/active": active, "tokens/shuffled": other - own}
        return losses, metrics, Coded(*(x.detach() for x in (*posterior, context)))

    def surprise(self, past: Tensor, future: Tensor, z: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the future's tokens (B, n, N), given the context (B, m, N) and latents (B, K, Z): (K,)."""
        logits = self.decoder(past, z, future)  # (B, K, n, N, V)
        target = future.unsqueeze(1).expand(logits.shape[:-1])
        return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape).mean((0, 2, 3))

    @torch.no_grad()
    def plans(self, past: Tensor, z: Tensor) -> Tensor:
        """Most likely tokens (B, K, n, N) of plans, from the context (B, m, N) and latents (B, K, Z)."""
        found: Tensor = self.decoder(past, z).argmax(-1)
        return found

    # 3. Acting ------------------------------------------------------------------------------------------------------------------

    def initial_carry(self, batch_size: int) -> PlanCarry:
        device, cells = self.warm.device, self.tokenizer.cells
        shapes = (self.before, cells), (self.config.align.plans, self.ahead, cells), ()
        tokens, plans, chosen = (torch.zeros(batch_size, *shape, dtype=torch.int64, device=device) for shape in shapes)
        goal, noise = (torch.zeros(batch_size, *s, device=device) for s in ((cells, self.tokenizer.dim), (self.action_dim,)))
        return PlanCarry(tokens, plans, chosen, goal, noise, torch.zeros_like(chosen))

    def act(self, obs: Batch, carry: PlanCarry, *, explore: bool, window: int) -> tuple[Tensor, PlanCarry, dict[str, Tensor]]:
        """K plans from the prior; the one nearest to the goal; the action for its z."""
        now = self.tokens(obs["image"])  # (B, 1, N)
        past = torch.where(obs["is_first"].unsqueeze(-1), now.expand_as(carry.tokens), torch.cat([carry.tokens[:, 1:], now], 1))
        first, goal = obs["is_first"].squeeze(1), carry.goal  # (B,), (B, N, D)
        if bool(first.any()):  # a goal stays the same in its episode
            goal = goal.index_put((first,), self.features(obs["goal"][first]).squeeze(1))
        mean, log_variance, context = self.prior(past)
        count = self.config.align.plans if explore else self.config.align.plans_eval
        z = sample(*(x.unsqueeze(1).expand(-1, count, -1) for x in (mean, log_variance)), always=True)  # (B, K, Z)
        plans = self.plans(past, z)  # (B, K, n, N)
        codes = self.tokenizer.embed(plans)  # (B, K, n, N, D)
        chosen = self.aligner.choose(codes, goal, explore)  # (B,)
        rows = torch.arange(len(chosen), device=chosen.device)
        stored = {"z": z[rows, chosen], "context": context, "plan": codes[rows, chosen, 0]}
        noise, used = torch.zeros_like(carry.noise), carry.used
        if explore:
            noise, used = self.aligner.noise(carry.noise, used, first)
        action, log_prob = self.aligner.actor.act(stored["z"], context, noise)
        value = self.aligner.critic(stored["z"], context, goal)
        return action, PlanCarry(past, plans, chosen, goal, noise, used), {"log_prob": log_prob, "value": value, **stored}

    @torch.no_grad()
    def panels(self, carry: PlanCarry) -> dict[str, Tensor]:
        """The newest plans as pictures: "plan" (B, n, 3, S, S), the last frames of all plans "ends" (B, K, 3, S, S), "chosen" (B,)."""
        rows = torch.arange(len(carry.chosen), device=carry.chosen.device)
        plan, ends = self.drawn(carry.plans[rows, carry.chosen]), self.drawn(carry.plans[:, :, -1])
        return {"plan": plan, "ends": ends, "chosen": carry.chosen}

    # 4. Learning in the environment ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encoded(self, batch: Batch) -> dict[str, Tensor]:
        """Features of the frames and of their goals (B, T, N, D), and the frames' tokens (B, T, N). A goal is encoded once an episode."""
        begins = batch["is_first"].clone()
        begins[:, 0] = True
        goals = self.features(batch["goal"][begins].unsqueeze(1)).squeeze(1)  # (episodes, N, D)
        goal = goals[(begins.flatten().cumsum(0) - 1).view_as(begins)]
        seen = self.features(batch["image"])
        return {"seen": seen, "wanted": goal, "tokens": self.tokenizer.tokens(seen)}

    def dynamics_losses(self, batch: Batch) -> tuple[Losses, Metrics, tuple[Coded, Tensor, Tensor]]:
        """The losses of `pretrain` on windows of this and earlier rollouts. Handed on: codes, actions a_t (R, A), and known (R,).

        Random windows of the rollout go into the memory, and others are drawn from it. In evaluation mode the first ones are used.
        """
        tokens, action, known = self._windows(batch)
        if not self.training:
            losses, metrics, codes = self.plan_losses(tokens)
            pairs = codes, action, known
        else:
            self._remember(tokens, action, known)
            chosen, known = self.memory.draw(self.config.align.windows)
            (losses, metrics, _), pairs = self.plan_losses(self.memory.tokens[chosen].long()), self._pairs()
        counts = known.any().float()  # without a whole window in an episode there is nothing to learn
        return {name: loss * counts for name, loss in losses.items()}, metrics, pairs

    def experience(self, batch: Batch) -> tuple[Coded, Tensor, Tensor]:
        """What `dynamics_losses` hands on, where plans do not learn."""
        tokens, action, known = self._windows(batch)
        if not self.training:
            return self.coded(tokens), action, known
        self._remember(tokens, action, known)
        return self._pairs()

    def _windows(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (R, m + n, N) of random windows of a rollout, their actions a_t (R, A), and known (R,)."""
        row, place, known = choose_windows(batch["is_first"], self.before, self.ahead, self.config.align.windows)
        at = row.unsqueeze(-1), place  # (R, 1), (R, m + n)
        tokens = batch["tokens"][at] if "tokens" in batch else self.tokens(batch["image"][at])
        return tokens, batch["action"][row, place[:, self.before]].float(), known  # it led to the first of the later frames

    @torch.no_grad()
    def coded(self, tokens: Tensor) -> Coded:
        """The codes of windows (R, m + n, N)."""
        mean, log_variance = self.posterior(tokens)
        return Coded(mean, log_variance, self.prior(tokens[:, : self.before])[2])

    @torch.no_grad()
    def _pairs(self) -> tuple[Coded, Tensor, Tensor]:
        """Codes, actions and known of random windows of the memory. Earlier codes would not fit the plans of now (decision 0020)."""
        place, known = self.memory.draw(self.config.align.pairs)
        tokens = self.memory.tokens[place].long()
        mean, log_variance = self.posterior.of(self.memory.kept[place]) if self.config.pretrained else self.posterior(tokens)
        return Coded(mean, log_variance, self.prior(tokens[:, : self.before])[2]), self.memory.action[place], known

    @torch.no_grad()
    def _remember(self, tokens: Tensor, action: Tensor, known: Tensor) -> None:
        self.memory.add(tokens, action, self.posterior.body(tokens).float() if self.config.pretrained else action[:, :0], known)

    def align_losses(self, batch: Batch, found: tuple[Coded, Tensor, Tensor]) -> tuple[Losses, Metrics]:
        """PPO with the rewards of plans, and the error of the actions a_t that led to what z describes.

        The stored z and context are inputs: how the model changes within a rollout does not count. The last frames, on which nothing acted,
        have the value of the prior's mean.
        """
        aligner, (rows, time) = self.aligner, batch["is_first"].shape
        with torch.no_grad():
            if "seen" in batch:
                seen, goal, tokens = batch["seen"], batch["wanted"], batch["tokens"]
            else:
                seen, goal = self.features(batch["image"]), self.features(batch["goal"])
                tokens = self.tokenizer.tokens(seen)
            past = stacks(tokens, every(tokens, 0, time - 1), self.before, starts(batch["is_first"]))  # (B T, m N)
            mean, _, context = self.prior(past.unflatten(1, (self.before, -1)))
            now = aligner.critic(mean, context, goal.flatten(0, 1)).unflatten(0, (rows, time))
            reward, metrics = aligner.rewards(seen, self.tokenizer.embed(tokens), goal, batch["plan"], batch)
        z, context = (batch[key][:, 1:].flatten(0, 1).float() for key in ("z", "context"))
        value = aligner.critic(z, context, goal[:, :-1].flatten(0, 1)).unflatten(0, (rows, time - 1))
        means = aligner.actor(z, context).unflatten(0, (rows, time - 1))
        known = torch.ones_like(reward, dtype=torch.bool)
        losses, more = step_losses(means, aligner.actor.log_std, value, now, reward, batch, known, self.config.ppo)
        for name in ("policy", "entropy"):
            losses[name] = losses[name] * aligner.reinforcing
        codes, action, of_window = found
        losses["action"], r2 = aligner.action_error(*codes, action, of_window)
        return losses, {**metrics, **more, "action/r2": r2}

    def after_update(self, counters: Counters) -> None:
        if counters.stage == "pretrain" and self.config.beta_warmup > 0:
            self.warm.fill_(min(1.0, counters.update / self.config.beta_warmup))
        if counters.stage == "tokenize":
            self.tokenizer.quantising.fill_(float(counters.update >= self.config.tokenizer.quantise_from))
        if counters.stage == "tokenize" and self.config.tokenizer.adversarial > 0:
            self.awake.fill_(float(counters.update >= self.config.tokenizer.adversarial_from))
        if counters.stage == "finetune":
            self.aligner.count(counters.progress)

    # Stages ---------------------------------------------------------------------------------------------------------------------

    def loss_scales(self, stage: str) -> dict[str, float]:
        if stage == "tokenize":
            config = self.config.tokenizer
            scales = {"image": 1.0, "commitment": config.commitment}
            scales |= {"perceptual": config.perceptual_weight} if config.perceptual else {}
            return scales | ({"adversarial": config.adversarial} if config.adversarial > 0 else {})
        plans = {"tokens": 1.0, "kl": self.config.beta / (self.ahead * self.tokenizer.cells)}  # "tokens" is a mean over n N
        ppo = {"policy": 1.0, "value": self.config.ppo.value_weight, "entropy": self.config.ppo.entropy, "action": 1.0}
        return plans if stage == "pretrain" else {**(plans if self.config.align.plans_learn else {}), **ppo}

    def passes(self, stage: str) -> tuple[Pass, ...]:
        scales = self.loss_scales(stage)
        if stage == "tokenize":
            first = Pass(lambda batch, _: self.tokenize_losses(batch), scales, ("tokenizer",))
            second = Pass(lambda _, both: (*self.discriminator_losses(both), None), {"discriminator": 1.0}, ("discriminator",))
            return (first, second) if "adversarial" in scales else (first,)
        if stage == "pretrain":
            return (Pass(lambda batch, _: (*self.pretrain_losses(batch), None), scales, ("decayed", "plain")),)
        heads = ("actor", "critic")
        if not self.config.align.plans_learn:
            return (Pass(lambda batch, _: (*self.align_losses(batch, self.experience(batch)), None), scales, heads),)
        plans = {name: scales.pop(name) for name in ("tokens", "kl")}
        return (
            Pass(lambda batch, _: self.dynamics_losses(batch), plans, ("decayed", "plain")),
            Pass(lambda batch, found: (*self.align_losses(batch, found), None), scales, heads),
        )

    def groups(self, stage: str, rates: Rates) -> list[Group]:
        if stage == "tokenize":
            if self.config.tokenizer.perceptual:
                self._vgg()
            parts = ("tokenizer", "discriminator") if self.config.tokenizer.adversarial > 0 else ("tokenizer",)
            trained(self, *parts)
            owned = {name: list(self.get_submodule(name).parameters()) for name in parts}
            return [Group(name, own, rates.lr, weight_decay=0.0, betas=(0.5, 0.9)) for name, own in owned.items()]
        online = stage == "finetune"
        learning = ("posterior", "prior", "decoder") if not online or self.config.align.plans_learn else ()
        parameters = trained(self, *learning, *(("aligner",) if online else ()))
        rate, warmup = rates.lr, self.config.warmup
        if online:
            self.warm.fill_(1.0)
            warmup = 0
            parameters = [p for part in learning for p in self.get_submodule(part).parameters()]
            if self.config.pretrained:  # footnote 1: of the posterior, only the last layer learns
                self.posterior.body.requires_grad_(False)
                parameters = [p for p in parameters if p.requires_grad]
                rate = rate * rates.slow
        matrices = {id(module.weight) for module in self.modules() if isinstance(module, nn.Linear)}
        groups = []
        for name, decay in (("decayed", self.config.decay), ("plain", 0.0)) if learning else ():
            own = [p for p in parameters if (id(p) in matrices) == (name == "decayed")]
            shared: dict[str, Any] = {"warmup": warmup, "decay": "cosine", "betas": (0.9, 0.95)}
            groups.append(Group(name, own, rate, optimizer="adamw", weight_decay=decay, **shared))
        if online:
            for name, module, lr in (
                ("actor", self.aligner.actor, rates.actor_lr),
                ("critic", self.aligner.critic, rates.critic_lr),
            ):
                groups.append(Group(name, list(module.parameters()), lr, weight_decay=0.0))
        return groups

    # Looking --------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def motion_code(self, batch: Batch) -> Tensor:
        """The mean of q(z | X, Y) of the window whose plan begins with each frame, (B, T, Z): so it also knows the n - 1 frames after it.

        Windows that reach beyond an episode, or the sequence, have copies of its first or last frame there.
        """
        tokens, begin = self.tokens(batch["image"]), starts(batch["is_first"])
        length = tokens.shape[1]
        end = length - 1 - starts(batch["is_first"].roll(-1, 1).flip(1)).flip(1)  # last position of each episode
        now = torch.arange(length, device=tokens.device)[:, None]
        index = now + torch.arange(-self.before, self.ahead, device=tokens.device)  # (T, m + n)
        index = torch.minimum(torch.maximum(index, begin.unsqueeze(-1)), end.unsqueeze(-1))  # (B, T, m + n)
        windows = tokens[torch.arange(len(tokens), device=tokens.device)[:, None, None], index].flatten(0, 1)
        codes = torch.cat([self.posterior(part)[0] for part in windows.split(AT_ONCE)])
        return codes.unflatten(0, tokens.shape[:2])

    @torch.no_grad()
    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Plans after the observed frames, and plans after these. `prior`: with the prior's mean; `prior_sample`: with a sample of it;
        `latent_action`: with the posterior's mean of the true frames, which is what z holds."""
        image = batch["image"]
        truth, length = self.tokens(image), image.shape[1]

        def mean(past: Tensor, at: int) -> Tensor:
            found: Tensor = self.prior(past)[0]
            return found

        def drawn(past: Tensor, at: int) -> Tensor:
            return sample(*self.prior(past)[:2])

        def true(past: Tensor, at: int) -> Tensor:
            now = torch.arange(at - self.before, at + self.ahead, device=truth.device).clamp(0, length - 1)
            found: Tensor = self.posterior(truth[:, now])[0]
            return found

        rows = {"prior": mean, "prior_sample": drawn, "latent_action": true}
        known = truth[:, :context]
        return {name: self.drawn(continued(known, length, self.before, z, self.plans)) for name, z in rows.items()}

    @torch.no_grad()
    def heldout(self, stage: str, batch: Batch) -> dict[str, Tensor]:
        """`tokenize`: the figures of tokens that `models.plan_figures` lists. `pretrain`: those of plans, too."""
        tokens = self.tokens(batch["image"])
        truth = images(batch).unflatten(0, tokens.shape[:2])
        out = token_figures(self.tokenizer, truth, self.drawn(tokens), tokens)
        return out if stage == "tokenize" else out | plan_figures(self, truth, tokens)

    @classmethod
    def about_heldout(cls, figures: Mapping[str, float]) -> str:
        return about_tokens(figures)
