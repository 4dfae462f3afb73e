"""Recurrent state-space model with Gaussian latents (PlaNet; DisWM's sizes). All but the latent is that of `RSSM`.

Shapes: S latents, D deter, H hidden, E embedding, A action columns, F = S + D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from localmotion import ranks
from localmotion.models.distributions import gaussian_entropy, gaussian_kl, normal
from localmotion.models.rssm import RSSM, RSSMState

LEAST_STD = 0.1


class GaussianRSSM(RSSM):
    """h_t = GRU(h_{t-1}, s_{t-1}, a_t), prior p(s_t | h_t), posterior q(s_t | h_t, e_t), both N(mean, std^2) with independent numbers.

    std = 2 sigmoid(raw / 2) + 0.1. The mode is the mean. The GRU's LayerNorm has PyTorch's eps 1e-5, and all layers begin as
    PyTorch's (DisWM's release). A state is (..., S, 2) mean and deviation, (..., S, 1) sample, (..., D) deter.
    """

    def __init__(
        self, *, embed_dim: int, action_dim: int, deter: int = 200, hidden: int = 200, stoch: int = 50, action_free: bool = False
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            action_dim=action_dim,
            deter=deter,
            hidden=hidden,
            stoch=stoch,
            classes=1,
            action_free=action_free,
        )
        self.gru_norm = nn.LayerNorm(3 * deter)
        self.prior_out, self.post_out = nn.Linear(hidden, 2 * stoch), nn.Linear(hidden, 2 * stoch)
        for layer in (self.img_in, self.prior_in, self.post_in):
            layer.reset_parameters()

    def initial(self, batch: int) -> RSSMState:
        """All zeros."""
        weight = self.gru.weight
        zeros = weight.new_zeros(batch, self.stoch, 2)
        return RSSMState(zeros, zeros[..., :1], weight.new_zeros(batch, self.deter))

    def _logits(self, out: Tensor) -> Tensor:
        """(..., 2S) -> mean and deviation, fp32 (..., S, 2)."""
        mean, raw = out.float().chunk(2, -1)
        return torch.stack([mean, 2 * torch.sigmoid(raw / 2) + LEAST_STD], -1)

    def _noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        return normal(like.new_empty((*shape, self.stoch, 1)), generator)

    def _draw(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Reparameterised sample, or without noise the mean: (..., S, 1)."""
        mean, std = logits.split(1, -1)
        return mean if noise is None else mean + std * noise


def gaussian_kl_loss(post: Tensor, prior: Tensor, balance: float = 0.8, free: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Balanced KL of (B,T,S,2) means and deviations, summed over S. Balance, free nats and metrics are those of `rssm.kl_loss`."""
    (mean, std), (other, spread) = post.unbind(-1), prior.unbind(-1)  # (B, T, S) each
    to_post = ranks.mean(gaussian_kl(mean, std, other.detach(), spread.detach()).mean())
    to_prior = ranks.mean(gaussian_kl(mean.detach(), std.detach(), other, spread).mean())
    loss = (1 - balance) * to_post.clamp(min=free) + balance * to_prior.clamp(min=free)
    return loss, {"kl": to_prior.detach(), "post_entropy": gaussian_entropy(std.detach()).mean()}
