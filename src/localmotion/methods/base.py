"""What a method is to the training loops: one class, these members. A method file reads from first to last line.

Batches follow the house time convention (docs/decisions/0001), legend B sequences, T positions, S side, N tracks, A actions:

    image (B,T,S,S,3) uint8      is_first (B,T) bool         vector (B,T,V) float32           (where the run observes vectors)
    action (B,T,A) float32       reward (B,T) float32       is_terminal (B,T) bool            (from a replay or logged episodes)
    flow (B,T,S,S,2) float16     tracks (B,T,N,2) float32   visible (B,T,N) bool   track_id (B,T,N) int32   (where wanted)
    mask (B,T,S,S) bool                                                               (logged episodes, where wanted)

`is_first` is true at the start of every sequence, and online also within one where an episode shorter than T ended (docs/decisions/0011):
nothing may be carried, averaged or bootstrapped across it. Action and motion are zero there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from localmotion.models.actor_critic import ActorCritic
from localmotion.models.dae import Motion
from localmotion.models.image import ImageModel

Batch = Mapping[str, Tensor]
Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]
MOTION = frozenset({"flow", "tracks"})
"""What a method wants that learns from Atomic Actions or flow: then perception runs beside the environment."""


class Source(Enum):
    """Where the batches of a stage come from; there is one training loop for each."""

    CLIPS = "clips"
    """Video segments of a clip store, without actions."""
    LOGGED = "logged"
    """Sequences of episodes that others played, with actions and rewards, out of a clip store."""
    REPLAY = "replay"
    """Sequences of the agent's own episodes, which it goes on to play. With a store of logged episodes (``data``) such a stage learns from
    these: the keys of a batch are the same."""
    ROLLOUT = "rollout"
    """The newest steps of the agent, used once."""


FROM_VIDEO: Mapping[str, Source] = {"pretrain": Source.CLIPS, "finetune": Source.REPLAY, "train": Source.REPLAY}
"""Stages of a method that learns from video first; `train` is `finetune` from scratch."""
FROM_SCRATCH: Mapping[str, Source] = {"finetune": Source.REPLAY, "train": Source.REPLAY}
"""Stages of a method that learns in an environment alone."""


def same(*names: str) -> dict[str, str]:
    """`Method.transfers` of child modules that keep their names."""
    return {name: name for name in names}


@dataclass(frozen=True)
class Group:
    """Parameters of one optimiser."""

    name: str
    parameters: list[nn.Parameter]
    lr: float
    freeze_updates: int = 0
    """Learning rate is zero for this many first updates (statistics and moments move on, as in IPV's release)."""
    optimizer: str = "adam"
    """Registry name in `training.optimizers`."""
    warmup: int = 0
    """Over this many first updates the learning rate rises from zero in equal parts."""
    decay: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls to zero in the last part of a stage, where the stage's `lr_decay` asks for it."""
    weight_decay: float | None = None
    """None: `OptimConfig.weight_decay`. Adam adds it to the gradient; AdamW takes it off the weights, times the learning rate."""
    agc: float = 0.0
    """Above 0: each gradient is clipped to this share of its parameter's norm, in place of the clipping of the group's global norm."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of a stage, and how the parts of a checkpoint are treated."""

    lr: float
    actor_lr: float = 0.0
    critic_lr: float = 0.0
    slow: float = 1.0
    """Factor on the rate of what a checkpoint gave and what shall change slowly."""
    freeze_updates: int = 0
    """Updates for which what a checkpoint gave is held."""
    load: str = ""
    """Parts that are taken from a checkpoint, with commas; empty: all that the method transfers."""

    def loads(self, part: str) -> bool:
        """Whether a checkpoint would give this part."""
        return not self.load or part in (name.strip() for name in self.load.split(","))


class Counters(NamedTuple):
    """Where a run stands, for schedules."""

    stage: str
    update: int
    """Updates made."""
    progress: float
    """Share of the stage that is over, 0 to 1."""


class Pass(NamedTuple):
    """One backward pass of an update. The passes of an update run in order."""

    losses: Callable[[Batch, Any], tuple[Losses, Metrics, Any]]
    """(batch, what the pass before handed on or None) -> losses, metrics, and what the next pass gets."""
    scales: Mapping[str, float]
    """Weight of each loss. The set of losses must equal the set of scales."""
    groups: tuple[str, ...]
    """Groups that are stepped on this pass; gradients of others are not computed. A group that a run leaves empty may be named."""
    every: int = 1
    """Updates between two of it."""


class LearnsFromVideo(Protocol):
    """A method with losses of video segments."""

    def pretrain_losses(self, batch: Batch) -> tuple[Losses, Metrics]: ...


class LearnsInImagination(Protocol):
    """A method with a world model and a behaviour that is learned in it."""

    def world_model_losses(self, batch: Batch) -> tuple[Losses, Metrics, Any]: ...

    def behaviour_losses(self, start: Any) -> tuple[Losses, Metrics]: ...


def video_pass(method: LearnsFromVideo, scales: Mapping[str, float], groups: tuple[str, ...] = ("model",)) -> tuple[Pass]:
    """The one pass of a stage on video segments."""
    return (Pass(lambda batch, _: (*method.pretrain_losses(batch), None), scales, groups),)


def imagination_passes(method: LearnsInImagination, scales: Mapping[str, float], groups: tuple[str, ...]) -> tuple[Pass, Pass]:
    """The two passes of a Dreamer: the world model, then actor and critic in the updated model, from the states it hands on.

    ``scales`` and ``groups`` are those of the world model. Actor and critic share no parameter, so their losses need no weights.
    """
    return (
        Pass(lambda batch, _: method.world_model_losses(batch), scales, groups),
        Pass(lambda _, start: (*method.behaviour_losses(start), None), {"actor": 1.0, "critic": 1.0}, ("actor", "critic")),
    )


def behaviour_groups(behaviour: ActorCritic, rates: Rates) -> list[Group]:
    """The groups "actor" and "critic" that `imagination_passes` steps."""
    return [
        Group("actor", list(behaviour.actor.parameters()), rates.actor_lr),
        Group("critic", list(behaviour.critic.parameters()), rates.critic_lr),
    ]


def stacked_groups(image: ImageModel, latent: nn.Module, new: Iterable[nn.Module], rates: Rates) -> list[Group]:
    """The groups of a world model whose encoder and latent model come from videos: "encoder" has these, "model" the decoder and ``new``.

    "encoder" learns at the slow rate, after its frozen updates, if a checkpoint gives the encoder. A latent model that no checkpoint
    gives is new.
    """
    encoder, model = image.encoder_parameters(), image.decoder_parameters()
    (encoder if rates.loads("latent") else model).extend(latent.parameters())
    for module in new:
        model.extend(module.parameters())
    held = rates.loads("image")
    rate = rates.lr * (rates.slow if held else 1.0)
    return [Group("encoder", encoder, rate, rates.freeze_updates if held else 0), Group("model", model, rates.lr)]


class Method(nn.Module):
    """Base of all methods. Losses are pure: tensors in, dicts of scalar losses and metrics out."""

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type]
    PRESETS: ClassVar[dict[str, dict[str, Any]]]
    """Settings of the presets paper, small and debug; `methods/sizes.py` has what small and debug share."""
    SUITES: ClassVar[dict[str, dict[str, Any]]] = {}
    """What the method's own paper sets for a suite (`dmc`) or an environment (`metaworld:drawer-open`), on top of `config.SUITES`."""
    stages: ClassVar[Mapping[str, Source]]
    """Names of the stages, which are commands, and where their batches come from."""
    acts_after: ClassVar[frozenset[str]] = frozenset({"finetune", "train"})
    """Stages whose result can act. Their models know the number of actions."""
    wants: ClassVar[frozenset[str]] = frozenset()
    """Keys of a batch that the method needs beside pictures, actions and rewards, e.g. `MOTION`."""
    transfers: ClassVar[Mapping[str, str]] = {}
    """What a later stage takes over: name of the child module in the checkpoint -> name of the child module that gets its weights."""
    extras: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """Names and shapes of what `act` returns for each agent step besides action and carry, e.g. {"value": ()}. The loop stores them."""
    vectors: ClassVar[bool] = False
    """Can learn from vectors in place of pictures or beside them; then its Config has ``pixels`` and ``vector_dim``."""

    @abstractmethod
    def __init__(self, config: Any, *, image_size: int, action_dim: int | None) -> None:
        """``action_dim`` None builds what learns from video alone, without actor."""
        super().__init__()
        self.image_size = image_size
        self.acts = action_dim is not None
        """Whether it has an actor: its stage is one of `acts_after`."""
        self.action_dim = action_dim or 0
        self.compiled = False
        """Whether parts of it are compiled (`training.compiled`)."""

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        """Shortest and longest sequence T (None: any) that the losses of a stage can take, with the method's settings."""
        return 2, None

    # Learning ---------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def passes(self, stage: str) -> tuple[Pass, ...]:
        """The backward passes of an update of ``stage``."""

    @abstractmethod
    def groups(self, stage: str, rates: Rates) -> list[Group]:
        """Optimisers of a stage. Every trained parameter is in one of them."""

    def after_update(self, counters: Counters) -> None:
        """Called once an update, after all passes: slow copies, schedules. What it changes are buffers and parameters, in place."""

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

    def masked_reconstruction(self, batch: Batch, generator: torch.Generator) -> tuple[Motion, Tensor, Tensor] | None:
        """Atomic Actions of a batch, the masked set (B,T,K), and the patches rebuilt without it; None without masked autoencoding."""
        return None

    def motion_code(self, batch: Batch) -> Tensor | None:
        """The method's code of the motion that led to each frame, (B,T,d); None where it has none."""
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


def images(batch: Batch) -> Tensor:
    """(B,T,S,S,3) uint8 -> (B*T,3,S,S) float in [-0.5, 0.5], channels last in memory (Table 5: linear rescaling)."""
    image = batch["image"].flatten(0, 1).permute(0, 3, 1, 2)  # a view: already channels last
    return image.float().mul_(1.0 / 255.0).sub_(0.5)


def check_scales(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
    """The set of losses must equal the set of loss scales: a forgotten term fails here."""
    if set(losses) != set(scales):
        raise AssertionError(f"losses {sorted(losses)} do not match loss scales {sorted(scales)}")


def total(losses: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """Weighted sum of the losses."""
    check_scales(losses, scales)
    return torch.stack([losses[key].float() * scales[key] for key in scales]).sum()
