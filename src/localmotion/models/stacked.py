"""Two world models, one on top of the other: z follows a video without actions, s observes phi = feat(z) and is given the actions.

Paper: APV (arXiv 2203.13880), section 4; IPV (arXiv 2305.18499) adds a context frame. Both RSSMs have the same sizes.

Shapes: B sequences, T positions, C context positions, E embedding, F features of z or s, A actions, S side of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from localmotion.models.image import ImageModel
from localmotion.models.rssm import RSSM, RSSMState, kl_loss


class Carry(NamedTuple):
    """What acting keeps between agent steps."""

    latent: RSSMState  # z
    state: RSSMState  # s
    action: Tensor  # (B, A), the one that leads to the next frame


def initial(latent: RSSM, dynamics: RSSM, batch_size: int) -> Carry:
    """The carry before the first frame of an episode: all zeros."""
    action = torch.zeros(batch_size, dynamics.action_dim, device=dynamics.gru.weight.device)
    return Carry(latent.initial(batch_size), dynamics.initial(batch_size), action)


def observed(embed: Tensor, phi: Tensor, embed_input: bool) -> Tensor:
    """What s observes: phi (..., F), or with ``embed_input`` the embedding (..., E) before it, (..., E + F)."""
    return torch.cat([embed.to(phi.dtype), phi], -1) if embed_input else phi


def video_losses(
    image: ImageModel, latent: RSSM, batch: Mapping[str, Tensor], *, balance: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of z on a video segment, "image" and "kl" with its ``balance``, and metrics.

    -ln p(o_t | z_t, c) + KL[q(z_t | z_{t-1}, o_t) || p(z_t | z_{t-1})], c the context frame where the image model has one.
    """
    truth = image.pixels(batch["image"])  # (B*T, ...)
    embed, context = image.encode(truth, batch["image"])  # (B, T, E)
    post, prior = latent.observe(embed, None, batch["is_first"])  # (B, T, ...) and logits (B, T, S, C)
    (picture,) = image.losses([latent.feat(post)], context, truth)
    kl, metrics = kl_loss(post.logits, prior, balance=balance)
    return {"image": picture, "kl": kl}, {f"latent/{key}": value for key, value in metrics.items()}


def video_code(image: ImageModel, latent: RSSM, batch: Mapping[str, Tensor]) -> Tensor:
    """Feature of z at each frame, (B, T, F)."""
    embed = image.embed(batch["image"]).unflatten(0, batch["is_first"].shape)  # (B, T, E)
    return latent.feat(latent.observe(embed, None, batch["is_first"])[0])


def open_loop(
    image: ImageModel,
    latent: RSSM,
    batch: Mapping[str, Tensor],
    context: int,
    dynamics: RSSM | None = None,
    embed_input: bool = False,
) -> Tensor:
    """Pictures (B, T, 3, S, S) in [-0.5, 0.5]; after ``context`` frames the prior goes on.

    Without ``dynamics`` it is the prior of z, which knows nothing but those frames; with it, the prior of s, given the real actions.
    """
    embed, maps = image.encode(image.pixels(batch["image"]), batch["image"], frame=context - 1)
    model, seen, first = latent, embed[:, :context], batch["is_first"][:, :context]  # (B, C, ...)
    actions = embed.new_zeros(*embed.shape[:2], 0)  # (B, T, 0)
    post, _ = model.observe(seen, None, first)
    if dynamics is not None:
        model, actions = dynamics, batch["action"]
        post, _ = model.observe(observed(seen, latent.feat(post), embed_input), actions[:, :context], first)
    return image.pictures(model.open_loop(post, actions[:, context:]), maps)
