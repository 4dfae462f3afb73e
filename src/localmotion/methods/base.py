"""The interface between a method and the training loops: one class with the members below.

Batches follow the time convention of docs/decisions/0001. B sequences, T positions, S side, N tracks, V vector, A actions:

    image (B,T,S,S,3) uint8      is_first (B,T) bool         vector (B,T,V) float32           (if the run observes vectors)
    action (B,T,A) float32       reward (B,T) float32       is_terminal (B,T) bool            (from a replay or logged episodes)
    flow (B,T,S,S,2) float16     tracks (B,T,N,2) float32   visible (B,T,N) bool   track_id (B,T,N) int32   (if the method wants them)
    mask (B,T,S,S) bool                                               (clips and logged episodes, if the method wants it)
    goal (B,T,S,S,3) uint8                                            (from all but clips, if the method wants it)

`is_first` is true at the start of every sequence. In a replay it is also true within a sequence, where a new episode follows one shorter
than T (docs/decisions/0011). Nothing may be carried, averaged or bootstrapped across it. Action and motion are zero there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from localmotion.limits import check_limits
from localmotion.models.actor_critic import ActorCritic
from localmotion.models.dae import Motion
from localmotion.models.image import ImageModel

Batch = Mapping[str, Tensor]
Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]
MOTION = frozenset({"flow", "tracks"})
"""`Method.wants` of a method that learns from Atomic Actions or flow. Perception then runs with the environment."""
MASK = frozenset({"mask"})
"""`Method.wants` of a method that learns from the pixels of the agent. Its clip store needs the array `mask`."""

GOAL = frozenset({"goal"})
"""`Method.wants` of a method that acts towards a picture. Observations, and batches of all sources but clips, then have `goal`
(B,T,S,S,3) uint8, constant in an episode: a picture of this episode's task solved (docs/environments.md). In logged episodes, which do not
hold it, it is the episode's last picture."""

LABELS = frozenset({"labelled_image", "labelled_action", "labelled_is_first"})
"""`Method.wants` of a method that learns from clips and from a few labelled transitions at once. The clip store then holds logged
episodes, and a batch has a second batch of these with its keys image, action and is_first under other names."""

VIDEO = frozenset({"video_image"})
"""`Method.wants` of a method that learns from logged episodes and from video without actions at once. A batch of `Source.LOGGED` then has
pictures of any clips of the store, also those without labels: video_image (B,T,S,S,3) uint8."""


class Source(Enum):
    """Where the batches of a stage come from. Each source has one training loop."""

    CLIPS = "clips"
    """Video segments of a clip store, without actions."""
    LOGGED = "logged"
    """Sequences of recorded episodes in a clip store, with actions and rewards."""
    REPLAY = "replay"
    """Sequences of the episodes that the agent plays while it learns. With a store of logged episodes (``data``) such a stage learns from
    that store instead; the keys of a batch are the same."""
    ROLLOUT = "rollout"
    """The newest steps of the agent, used once."""


FROM_VIDEO: Mapping[str, Source] = {"pretrain": Source.CLIPS, "finetune": Source.REPLAY, "train": Source.REPLAY}
"""Stages of a method that learns from video first. `train` is `finetune` without a checkpoint."""
AGENT_RATES = frozenset({"online.actor_lr", "online.critic_lr"})
HELD_RATES = frozenset({"online.pretrained_lr_factor", "online.freeze_updates"})
"""Settings of learning rates that some methods do not use, for `Method.unread`."""
FROM_SCRATCH: Mapping[str, Source] = {"finetune": Source.REPLAY, "train": Source.REPLAY}
"""Stages of a method that learns only in an environment."""
LATENT_ACTIONS: Mapping[str, Source] = {
    "pretrain": Source.CLIPS,
    "clone": Source.CLIPS,
    "decode": Source.LOGGED,
    "finetune": Source.ROLLOUT,
}
"""Stages of a latent action model: latent actions from video, a policy over them, a decoder to actions that labels train, and learning by
reward. `methods.latent_stages` has what their methods share."""
NO_AGENT_RATES: Mapping[str, frozenset[str]] = {"decode": AGENT_RATES | HELD_RATES, "finetune": AGENT_RATES}
"""`Method.unread` of a latent action model."""


def same(*names: str) -> dict[str, str]:
    """`Method.transfers` for child modules that keep their names."""
    return {name: name for name in names}


@dataclass(frozen=True)
class Group:
    """Parameters of one optimiser."""

    name: str
    parameters: list[nn.Parameter]
    lr: float
    freeze_updates: int = 0
    """The learning rate is zero for this many first updates. Statistics and moments change during them, as in IPV's release."""
    optimizer: str = "adam"
    """Registry name in `training.optimizers`."""
    warmup: int = 0
    """The learning rate rises linearly from zero over this many first updates."""
    decay: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls to zero over the stage's last share `lr_decay`."""
    weight_decay: float | None = None
    """None: `OptimConfig.weight_decay`. Adam adds it to the gradient; AdamW subtracts it from the weights, times the learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the two moments of Adam and AdamW."""
    agc: float = 0.0
    """Above 0: each gradient is clipped to this share of its parameter's norm, instead of the group's global norm."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of a stage, and how it treats the parts of a checkpoint."""

    lr: float
    actor_lr: float = 0.0
    critic_lr: float = 0.0
    slow: float = 1.0
    """Factor on the learning rate of parts from a checkpoint that should change slowly."""
    freeze_updates: int = 0
    """Number of first updates in which parts from a checkpoint do not change."""
    load: str = ""
    """Names of the parts to take from a checkpoint, separated by commas; empty: all that the method transfers."""

    def loads(self, part: str) -> bool:
        """Whether this part is one of those to take from a checkpoint."""
        return not self.load or part in (name.strip() for name in self.load.split(","))


class Counters(NamedTuple):
    """Progress of a run, for schedules."""

    stage: str
    update: int
    """Number of updates made."""
    progress: float
    """Completed share of the stage, 0 to 1."""
    agent_step: int | None = None
    """Number of agent steps made at this update; None in a stage without an environment to learn in."""


class Pass(NamedTuple):
    """One backward pass of an update. The passes of an update run in order."""

    losses: Callable[[Batch, Any], tuple[Losses, Metrics, Any]]
    """(batch, third result of the pass before or None) -> losses, metrics, and an object for the next pass."""
    scales: Mapping[str, float]
    """Weight of each loss. The set of losses must equal the set of scales."""
    groups: tuple[str, ...]
    """Groups that this pass steps. No other gradients are computed. It may name a group that a run leaves empty."""
    every: int = 1
    """The pass runs once in this many updates."""
    until: float = inf
    """The pass runs while the completed share of the stage, in [0, 1], is below this."""


def trained(method: nn.Module, *parts: str) -> list[nn.Parameter]:
    """Parameters of the child modules ``parts``. All other parameters of ``method`` are frozen.

    For `Method.groups` of a method whose stages train different parts of one model.
    """
    for name, child in method.named_children():
        child.requires_grad_(name in parts)
    return [parameter for part in parts for parameter in method.get_submodule(part).parameters()]


class LearnsFromVideo(Protocol):
    """A method with losses of video segments."""

    def pretrain_losses(self, batch: Batch) -> tuple[Losses, Metrics]: ...


class LearnsInImagination(Protocol):
    """A method with a world model and a behaviour that is learned in it."""

    def world_model_losses(self, batch: Batch) -> tuple[Losses, Metrics, Any]: ...

    def behaviour_losses(self, start: Any) -> tuple[Losses, Metrics]: ...


def video_pass(method: LearnsFromVideo, scales: Mapping[str, float], groups: tuple[str, ...] = ("model",)) -> tuple[Pass]:
    """The only pass of a stage that learns from video segments."""
    return (Pass(lambda batch, _: (*method.pretrain_losses(batch), None), scales, groups),)


def imagination_passes(method: LearnsInImagination, scales: Mapping[str, float], groups: tuple[str, ...]) -> tuple[Pass, Pass]:
    """The two passes of a Dreamer: the world model, then actor and critic in the updated model, from the posterior states.

    ``scales`` and ``groups`` are those of the world model. Actor and critic share no parameter, so their losses need no weights.
    """
    return (
        Pass(lambda batch, _: method.world_model_losses(batch), scales, groups),
        Pass(lambda _, start: (*method.behaviour_losses(start), None), {"actor": 1.0, "critic": 1.0}, ("actor", "critic")),
    )


def behaviour_groups(behaviour: ActorCritic, rates: Rates) -> list[Group]:
    """The groups "actor" and "critic", which the second of `imagination_passes` steps."""
    return [
        Group("actor", list(behaviour.actor.parameters()), rates.actor_lr),
        Group("critic", list(behaviour.critic.parameters()), rates.critic_lr),
    ]


def stacked_groups(image: ImageModel, latent: nn.Module, new: Iterable[nn.Module | None], rates: Rates) -> list[Group]:
    """The groups of a fine-tuned world model: "encoder" holds encoder and latent model, "model" holds the decoder and ``new``,
    in which a module that a setting leaves out is None.

    If a checkpoint gives the encoder, "encoder" is frozen first and then learns at the slow rate. A latent model that no checkpoint
    gives belongs to "model".
    """
    encoder, model = image.encoder_parameters(), image.decoder_parameters()
    (encoder if rates.loads("latent") else model).extend(latent.parameters())
    for module in new:
        model.extend(module.parameters() if module else ())
    held = rates.loads("image")
    rate = rates.lr * (rates.slow if held else 1.0)
    return [Group("encoder", encoder, rate, rates.freeze_updates if held else 0), Group("model", model, rates.lr)]


class Method(nn.Module):
    """Base of all methods. Losses are pure: tensors in, dicts of scalar losses and metrics out."""

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type]
    PRESETS: ClassVar[dict[str, dict[str, Any]]]
    """Settings of the presets paper, small, tiny and debug. `methods/sizes.py` has the sizes that methods share."""
    SUITES: ClassVar[dict[str, dict[str, Any]]] = {}
    """Settings of the method's own paper for a suite (`dmc`) or an environment (`metaworld:drawer-open`), on top of `suites.SUITES`.
    `suites.OWN` is the key of all environments outside the package."""
    stages: ClassVar[Mapping[str, Source]]
    """Names of the stages, which are also commands, and the source of their batches."""
    unread: ClassVar[Mapping[str, frozenset[str]]] = {}
    """By stage, settings of `online` and `optim` that its groups do not use. The command line refuses them there."""
    acts_after: ClassVar[frozenset[str]] = frozenset({"finetune", "train"})
    """Stages whose result can act. Their models are built with the number of actions."""
    wants: ClassVar[frozenset[str]] = frozenset()
    """Batch keys it may need besides pictures, actions and rewards, e.g. `MOTION`, `MASK` or `GOAL`. `needs` says when."""
    predicts_after: ClassVar[frozenset[str] | None] = None
    """Stages whose result predicts video, for a method with an `open_loop`. None: all."""
    begins: ClassVar[Mapping[str, str]] = {}
    """Stages that start from a checkpoint and cannot do without: name of the stage -> name of the stage that made the checkpoint, or of
    the nearest one if there are several (`origins`)."""
    transfers: ClassVar[Mapping[str, str]] = {}
    """Weights that a later stage takes over: name of the child module in the checkpoint -> name of the child module that gets them."""
    extras: Mapping[str, tuple[int, ...]] = {}
    """Names and shapes of what `act` returns for each agent step besides action and carry, e.g. {"value": ()}. The loop stores them. An
    instance may add those whose shapes depend on its settings."""
    encodes: ClassVar[frozenset[str]] = frozenset()
    """Batch keys in whose place the updates of a rollout get what frozen parts make of them (`encoded`)."""
    rehearses: ClassVar[frozenset[str]] = frozenset()
    """Stages whose first pass trains what the stage `pretrain` trained, so that its losses on clips can go on there (rehearsal)."""
    vectors: ClassVar[bool] = False
    """Whether it can learn from vectors, with or without pictures. Its Config then has ``pixels`` and ``vector_dim``."""
    discrete: ClassVar[bool] = False
    """Whether it can choose one of A actions, as a one-hot vector. Its Config then has ``discrete``, which the environment sets."""

    @abstractmethod
    def __init__(self, config: Any, *, image_size: int, action_dim: int | None) -> None:
        """``action_dim`` None: build only the modules that learn from video, without an actor.

        Raises ConfigError for a number of ``config`` beyond its `LIMITS`.
        """
        super().__init__()
        check_limits(config)
        self.image_size = image_size
        self.acts = action_dim is not None
        """Whether it has an actor, because its stage is one of `acts_after`."""
        self.action_dim = action_dim or 0
        self.compiled = False
        """Whether `training.compiled` has compiled parts of it."""

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        """Minimum and maximum sequence length T (None: no maximum) for the losses of a stage, with the method's settings."""
        return 2, None

    @classmethod
    def lead(cls, config: Any, stage: str) -> int:
        """Copies of the first frame that may stand before an episode or a clip in the sequences of a stage on clips or logged episodes.

        For a method that sees a stack of the newest frames. While it acts, an episode begins with a stack of copies. Without them in its
        sequences it would never learn what to do at the start. A copy has no motion, action and reward, and `is_first` is true at the first
        copy only. So no loss may count a step into the first ``lead`` positions of a piece, nor the action at the position after them. At
        most the minimum of `lengths` less 2.
        """
        return 0

    @classmethod
    def needs(cls, config: Any, stage: str) -> frozenset[str]:
        """The keys of `wants` that the losses of a stage need with the method's settings."""
        return cls.wants

    @classmethod
    def origins(cls, config: Any, stage: str) -> tuple[str, ...]:
        """The stages whose runs a stage may start from, with the method's settings. Empty: it is not in `begins`."""
        return (cls.begins[stage],) if stage in cls.begins else ()

    @classmethod
    def about_open_loop(cls, config: Any) -> str:
        """A sentence for readers of the PSNR and SSIM of its `open_loop`, with the method's settings. "": these figures need none."""
        return ""

    @classmethod
    def least_updates(cls, config: Any, stage: str) -> int:
        """Updates that a stage on clips needs at least, so that every part of its model takes part in the end."""
        return 1

    # Learning ---------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def passes(self, stage: str) -> tuple[Pass, ...]:
        """The backward passes of an update of ``stage``."""

    @abstractmethod
    def groups(self, stage: str, rates: Rates) -> list[Group]:
        """Optimisers of a stage. Every trained parameter is in one of them; all others are frozen (`trained`)."""

    def after_update(self, counters: Counters) -> None:
        """Called once per update, after all passes: slow copies, schedules. It changes only buffers and parameters, in place."""

    def encoded(self, batch: Batch) -> dict[str, Tensor]:
        """What frozen parts make of the keys `encodes`, (B, T, ...) each, without a gradient. ``batch`` has these keys and is_first.

        All updates of a rollout see the same frames. So a rollout is encoded once, not in each of them. For a method with `encodes`. Its
        losses also take batches with the keys as they are.
        """
        raise NotImplementedError(f"{self.name} encodes no keys")

    # Acting -----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def initial_carry(self, batch_size: int) -> Any:
        """Recurrent state before the first observation of an episode."""

    @abstractmethod
    def act(
        self, obs: Batch, carry: Any, *, explore: bool, window: int
    ) -> tuple[Tensor, Any] | tuple[Tensor, Any, Mapping[str, Tensor]]:
        """Actions (B, A) in [-1, 1] for the newest frames, and the new carry. A method that declares `extras` returns them third.

        ``obs`` holds one position (B, 1, ...) with the keys of a batch except reward and is_terminal. ``carry`` is None, a tensor, or a
        (named) tuple of those. ``window`` is the sequence length of training, for methods that attend over time. Each extra is a float
        tensor (B, *shape), with the shape that `extras` declares. `acted` calls this and gives both forms as one.
        """

    # Looking ----------------------------------------------------------------------------------------------------------------

    def open_loop(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Predicted images (B,T,3,S,S) in [-0.5, 0.5] by name; the first ``context`` frames are reconstructions."""
        raise NotImplementedError(f"{self.name} does not predict video")

    def heldout(self, stage: str, batch: Batch) -> dict[str, Tensor]:
        """Held-out figures of its own, scalars by name: means over a batch of clips that are never trained on. {}: it has none."""
        return {}

    @classmethod
    def about_heldout(cls, figures: Mapping[str, float]) -> str:
        """A warning for the user, where held-out figures at the end of a stage show that it failed. "": none.

        ``figures``: those of the stage's line in metrics.jsonl; `heldout`'s begin with "figure/".
        """
        return ""

    def masked_reconstruction(self, batch: Batch, generator: torch.Generator) -> tuple[Motion, Tensor, Tensor] | None:
        """Atomic Actions of a batch, the masked set (B,T,K), and the patches (B,T,K,P,P,2) rebuilt without it.

        None for a method without masked autoencoding.
        """
        return None

    def motion_code(self, batch: Batch) -> Tensor | None:
        """The method's code of the motion that led to each frame, (B,T,d). None for a method without one."""
        return None

    def traversal(self, batch: Batch, values: Tensor) -> Tensor | None:
        """Pictures (B,D,K,3,S,S) in [-0.5, 0.5]: a frame of each sequence, decoded with each of the D numbers of its code set to each of
        the K ``values``. None for a method without a code of few numbers."""
        return None

    def panels(self, carry: Any) -> Mapping[str, Tensor] | None:
        """Pictures in [-0.5, 0.5] of what was planned for the newest actions, from the carry that `act` returned with them.

        "plan" (B,n,3,S,S): the n frames that the chosen plan expects from this action on, one an agent step. "ends" (B,K,3,S,S): the last
        frames of all plans that it was chosen from. "chosen" (B,) int64: the plan's number among them. None for a method that does not
        plan in pictures. Only called where a film is made, through `planned`, with the first environment's row of each tensor of the carry.
        """
        return None

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per child module."""
        return {name: sum(p.numel() for p in child.parameters()) for name, child in self.named_children()}


def acted(method: Method, obs: Batch, carry: Any, *, explore: bool, window: int) -> tuple[Tensor, Any, Mapping[str, Tensor]]:
    """One agent step: action (B, A), carry, and the declared extras, {} for a method without.

    Raises AssertionError where what `Method.act` returns does not match `Method.extras`: names, shapes or float type.
    """
    found = method.act(obs, carry, explore=explore, window=window)
    if len(found) != (3 if method.extras else 2):
        wanted = "(action, carry, extras)" if method.extras else "(action, carry); declare `extras` to return more"
        raise AssertionError(f"{method.name}: act returned {len(found)} values, expected {wanted}")
    action, carry, *rest = found
    extras: Mapping[str, Tensor] = rest[0] if rest else {}
    if set(extras) != set(method.extras):
        raise AssertionError(f"{method.name}: act returned the extras {sorted(extras)}, declared are {sorted(method.extras)}")
    for name, shape in method.extras.items():
        value = extras[name]
        if tuple(value.shape) != (len(action), *shape) or not value.is_floating_point():
            raise AssertionError(
                f"{method.name}: extra {name!r} is {value.dtype} {tuple(value.shape)}, declared is a float ({len(action)}, *{shape})"
            )
    return action, carry, extras


def planned(method: Method, carry: Any) -> Mapping[str, Tensor] | None:
    """`Method.panels`. Raises AssertionError where its names, shapes or types are not those that it documents."""
    found = method.panels(carry)
    if found is None:
        return None
    if set(found) != {"plan", "ends", "chosen"}:
        raise AssertionError(f"{method.name}: panels returned {sorted(found)}, expected plan, ends and chosen")
    plan, ends, side = tuple(found["plan"].shape), tuple(found["ends"].shape), method.image_size
    (rows, frames), count = plan[:2] if len(plan) == 5 else (0, 0), ends[1] if len(ends) == 5 else 0
    wanted = {"ends": (rows, count, 3, side, side), "plan": (rows, frames, 3, side, side), "chosen": (rows,)}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if shapes != wanted or 0 in (rows, frames, count):
        raise AssertionError(
            f"{method.name}: panels returned {shapes}; plan must be (B, n, 3, {side}, {side}), ends (B, K, ...), chosen (B,)"
        )
    if not all(found[name].is_floating_point() and bool(found[name].isfinite().all()) for name in ("plan", "ends")):
        raise AssertionError(f"{method.name}: panels must be finite floats in [-0.5, 0.5]")
    if not bool(((found["chosen"] >= 0) & (found["chosen"] < count)).all()):
        raise AssertionError(f"{method.name}: chosen is {found['chosen'].tolist()}, of {count} plans")
    return found


def images(batch: Batch) -> Tensor:
    """(B,T,S,S,3) uint8 -> (B*T,3,S,S) float in [-0.5, 0.5], channels last in memory (Table 5: linear rescaling)."""
    image = batch["image"].flatten(0, 1).permute(0, 3, 1, 2)  # a view: already channels last
    return image.float().mul_(1.0 / 255.0).sub_(0.5)


def check_scales(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
    """Raises AssertionError unless the set of losses equals the set of loss scales, so no term is forgotten."""
    if set(losses) != set(scales):
        raise AssertionError(f"losses {sorted(losses)} do not match loss scales {sorted(scales)}")


def total(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """Weighted sum of the losses."""
    check_scales(losses, scales)
    return torch.stack([losses[key].float() * scales[key] for key in scales]).sum()
