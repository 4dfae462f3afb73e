"""Learnable actions: what led from one frame to the next, as the action of a world model (PreLAR, ECCV 2024).

    pre-training    `InverseDynamics`: a code of two adjacent frames, a distribution in a space of Z numbers
    fine-tuning     `ActionMapping`: a real action to the same Z numbers; `MappedDynamics` imagines with it

The kinds of code are those of PreLAR's release: Gaussian (the method), one-hot, and plain numbers (its ablation).

Shapes: N pairs of frames, Z numbers of a latent action, S one-hots, C classes, A actions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.config import WorldModelConfig
from localmotion.models.distributions import categorical_entropy, categorical_kl, gaussian_kl, gumbel, straight_through
from localmotion.models.encoders import CNNEncoder, ResNetEncoder
from localmotion.models.heads import MLP
from localmotion.models.rssm import RSSM, RSSMState

FLOW_SCALE = 1 / 16
"""Flow is an input in units of this share of a picture's side, about the largest motion of a frame."""
COLOURS = {"concat": 6, "diff": 3, "flow": 2, "catdiff": 9}
"""Values of a pixel in each input of the inverse model."""


# 1. Codes ---------------------------------------------------------------------------------------------------------------------


class GaussianCode(NamedTuple):
    """Normal with independent numbers: mean (..., Z), std (..., Z) in (0, 2). fp32."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, out: Tensor) -> GaussianCode:
        """From a network's (..., 2Z): mean m, deviation 2 sigmoid(s / 2), without a floor (release)."""
        mean, raw = out.float().chunk(2, -1)
        return cls(mean, 2 * torch.sigmoid(raw / 2))

    def sample(self) -> Tensor:
        """Reparameterised sample (..., Z)."""
        return self.mean + self.std * torch.randn(self.mean.shape, device=self.mean.device, dtype=torch.float32)

    def mode(self) -> Tensor:
        """(..., Z)."""
        return self.mean

    def divergence(self, other: GaussianCode) -> Tensor:
        """KL(self || other) in nats, summed over Z: (...)."""
        return gaussian_kl(self.mean, self.std, other.mean, other.std)

    def from_prior(self, deviation: float) -> Tensor:
        """KL(self || N(0, deviation^2)) in nats, summed over Z: (...)."""
        return self.divergence(GaussianCode(torch.zeros_like(self.mean), torch.full_like(self.std, deviation)))


class OneHotCode(NamedTuple):
    """S categoricals of C classes: logits (..., S, C). fp32. Z is S * C."""

    logits: Tensor

    def sample(self) -> Tensor:
        """One-hot sample (..., Z) with the gradient of the probabilities."""
        return straight_through(self.logits, gumbel(self.logits.shape, self.logits)).flatten(-2)

    def mode(self) -> Tensor:
        """The most likely classes, (..., Z), with the gradient of the probabilities."""
        return straight_through(self.logits, None).flatten(-2)

    def divergence(self, other: OneHotCode) -> Tensor:
        """KL(self || other) in nats, summed over S: (...)."""
        return categorical_kl(F.log_softmax(self.logits, -1), F.log_softmax(other.logits, -1))

    def from_prior(self, deviation: float) -> Tensor:
        """KL(self || uniform) in nats, summed over S: (...). The release has the constant ln C in its place, without a gradient."""
        count, classes = self.logits.shape[-2:]
        return count * math.log(classes) - categorical_entropy(F.log_softmax(self.logits, -1))


class PlainCode(NamedTuple):
    """Z numbers without noise, (..., Z). fp32. Distances are those of normals of deviation 1 around them."""

    mean: Tensor

    def sample(self) -> Tensor:
        """The numbers."""
        return self.mean

    def mode(self) -> Tensor:
        """The numbers."""
        return self.mean

    def divergence(self, other: PlainCode) -> Tensor:
        """Half the squared distance: (...)."""
        return 0.5 * (self.mean - other.mean).square().sum(-1)

    def from_prior(self, deviation: float) -> None:
        """No bottleneck."""
        return


Code = GaussianCode | OneHotCode | PlainCode


def swapped(code: Code, order: Tensor) -> Any:
    """The codes (B, ...) of other sequences, by ``order`` (B,): a code of the same kind."""
    return type(code)(*(part[order] for part in code))


class CodeShape(NamedTuple):
    """Form of a latent action: ``kind`` gaussian, discrete or deterministic, and its size."""

    kind: str
    numbers: int
    """Of a Gaussian or deterministic code."""
    codes: int
    classes: int

    @property
    def width(self) -> int:
        """Z."""
        return self.codes * self.classes if self.kind == "discrete" else self.numbers

    @property
    def outputs(self) -> int:
        """Outputs of the network that makes it."""
        return 2 * self.numbers if self.kind == "gaussian" else self.width

    def code(self, out: Tensor) -> Code:
        """The code of a network's (..., outputs)."""
        if self.kind == "gaussian":
            return GaussianCode.of(out)
        if self.kind == "discrete":
            return OneHotCode(out.float().unflatten(-1, (self.codes, self.classes)))
        return PlainCode(out.float())


# 2. Networks ------------------------------------------------------------------------------------------------------------------


class InverseDynamics(nn.Module):
    """Frames before and after to a code: an image encoder with weights of its own, a hidden layer with ELU, a linear layer.

    ``given``: concat, both frames side by side (the method); diff, their difference; catdiff, all three; flow, the flow field alone
    (the release gives its picture in three colours). It sees pixels only, not the state of the world model.
    """

    def __init__(self, world: WorldModelConfig, shape: CodeShape, *, given: str, hidden: int, image_size: int) -> None:
        super().__init__()
        self.given, self.shape = given, shape
        self.blocks = world.encoder == "resnet" and world.stem == "unshuffle"
        size: dict[str, int] = {"depth": world.depth, "image_size": image_size, "colours": COLOURS[given]}
        self.encoder: CNNEncoder | ResNetEncoder = (
            CNNEncoder(**size) if world.encoder == "cnn" else ResNetEncoder(**size, stem=world.stem, norm=world.norm)
        )
        self.hidden = nn.Linear(self.encoder.embed_dim, hidden)
        self.out = nn.Linear(hidden, shape.outputs)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor, flow: Tensor | None = None) -> Code:
        """Codes (B, T - 1, ...) of what led to frames 1 to T - 1.

        ``pixels`` (B, T, C, h, w) of `ImageModel.pixels`; ``flow`` (B, T, S, S, 2) in pixels, for ``given`` flow. Raises ValueError
        if that is missing.
        """
        before, after = pixels[:, :-1], pixels[:, 1:]
        if self.given == "flow":
            if flow is None:
                raise ValueError("this inverse model sees flow, but none was given")
            field = flow[:, 1:].permute(0, 1, 4, 2, 3).float() / (FLOW_SCALE * flow.shape[2])
            x = F.pixel_unshuffle(field, 4) if self.blocks else field
        elif self.given == "diff":
            x = after - before
        else:
            x = torch.cat([before, after, after - before] if self.given == "catdiff" else [before, after], 2)
        flat = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.shape.code(self.out(F.elu(self.hidden(self.encoder(flat)))).unflatten(0, x.shape[:2]))


class ActionMapping(nn.Module):
    """Real action to latent action: one hidden layer with ELU, a linear layer. No noise, and no state as input (release).

    For one-hot codes its outputs are logits, and the latent action is their most likely classes.
    """

    def __init__(self, actions: int, shape: CodeShape, *, hidden: int) -> None:
        super().__init__()
        self.shape = shape
        self.net = MLP(actions, shape.width, units=hidden, layers=1)

    def forward(self, action: Tensor) -> Tensor:
        """(..., A) -> (..., Z)."""
        out: Tensor = self.net(action)
        return self.shape.code(out).mode() if self.shape.kind == "discrete" else out


@dataclass(frozen=True)
class MappedDynamics:
    """A world model over latent actions as one over real actions, for imagination."""

    latent: RSSM
    mapping: ActionMapping

    def feat(self, state: RSSMState, /) -> Tensor:
        """(..., F)."""
        return self.latent.feat(state)

    def img_step(self, state: RSSMState, action: Tensor, /) -> RSSMState:
        """One step of the prior after actions (..., A)."""
        return self.latent.img_step(state, self.mapping(action))
