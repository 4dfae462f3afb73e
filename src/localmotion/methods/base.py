"""What a method is to the training loops: one class, these members. A method file reads from first to last line.

Batches follow the house time convention (docs/decisions/0001), legend B sequences, T positions, S side, N tracks, A actions:

    image (B,T,S,S,3) uint8      is_first (B,T) bool         vector (B,T,V) float32           (where the run observes vectors)
    action (B,T,A) float32       reward (B,T) float32       is_terminal (B,T) bool            (online only)
    flow (B,T,S,S,2) float16     tracks (B,T,N,2) float32   visible (B,T,N) bool   track_id (B,T,N) int32   (wants_motion only)

`is_first` is true at the start of every sequence, and online also within one where an episode shorter than T ended (docs/decisions/0011):
nothing may be carried, averaged or bootstrapped across it. Action and motion are zero there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from localmotion.config import RunConfig
from localmotion.models.dae import Motion

Batch = Mapping[str, Tensor]


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
    agc: float = 0.0
    """Above 0: each gradient is clipped to this share of its parameter's norm, in place of the clipping of the group's global norm."""


class Method(nn.Module):
    """Base of all methods. Losses are pure: tensors in, dicts of scalar losses and metrics out."""

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type]
    PRESETS: ClassVar[dict[str, dict[str, Any]]]
    """Settings of the presets paper, small and debug; `methods/sizes.py` has what small and debug share."""
    SUITES: ClassVar[dict[str, dict[str, Any]]] = {}
    """What the method's own paper sets for a suite (`dmc`) or an environment (`metaworld:drawer-open`), on top of `config.SUITES`."""
    wants_motion: ClassVar[bool] = False
    can_pretrain: ClassVar[bool] = False
    transfers: ClassVar[tuple[str, ...]] = ()
    """Names of the child modules that pre-training makes and fine-tuning loads."""
    vectors: ClassVar[bool] = False
    """Can learn from vectors in place of pictures or beside them; then its Config has ``pixels`` and ``vector_dim``."""
    joint_update: ClassVar[bool] = False
    """`world_model_losses` gives the behaviour's losses too: one backward pass, then every group is stepped once."""

    @abstractmethod
    def __init__(self, config: Any, *, image_size: int, action_dim: int | None) -> None:
        """``action_dim`` None builds the pre-training modules only."""
        super().__init__()
        self.image_size = image_size
        self.compiled = False
        """Whether parts of it are compiled (`training.compiled`)."""

    @classmethod
    def lengths(cls, config: Any, stage: str) -> tuple[int, int | None]:
        """Shortest and longest sequence T (None: any) that the losses of a stage can take, with the method's settings."""
        return 2, None

    # Learning ---------------------------------------------------------------------------------------------------------------

    def pretrain_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and metrics of a batch of video segments."""
        raise NotImplementedError(f"{self.name} does not pre-train")

    @abstractmethod
    def world_model_losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
        """Losses, metrics, and the states from which imagination starts."""

    @abstractmethod
    def behaviour_losses(self, start: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses "actor" and "critic" of imagined trajectories, and metrics. Not called with `joint_update`."""

    @abstractmethod
    def loss_scales(self, stage: str) -> dict[str, float]:
        """Weight of each loss; the set of losses must equal the set of scales (checked by the trainer)."""

    @abstractmethod
    def groups(self, run: RunConfig, pretrained: bool) -> list[Group]:
        """Optimisers of a stage. Names "actor" and "critic" are stepped on the behaviour losses, all others on the world model's."""

    def after_update(self) -> None:
        """Called once an update, after all optimisers: slow copies."""

    # Acting -----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def initial_carry(self, batch_size: int) -> Any:
        """Recurrent state before the first observation of an episode."""

    @abstractmethod
    def act(self, obs: Batch, carry: Any, *, explore: bool, window: int) -> tuple[Tensor, Any]:
        """Actions (B, A) for the newest frames; ``obs`` holds one position (B, 1, ...) with the keys of a batch but reward.

        ``window`` is the sequence length of training, for methods that attend over time.
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

    # Transfer ---------------------------------------------------------------------------------------------------------------

    def pretrained_state(self) -> dict[str, Tensor]:
        """Weights that fine-tuning takes over."""
        prefixes = tuple(f"{name}." for name in self.transfers)
        return {key: value for key, value in self.state_dict().items() if key.startswith(prefixes)}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per child module."""
        return {name: sum(p.numel() for p in child.parameters()) for name, child in self.named_children()}


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
