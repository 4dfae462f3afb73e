"""Recurrent state-space model with categorical latents (DreamerV2; IPV spec 0.2-0.3), written so that little is left inside the recurrence.

Shapes: B sequences, T positions, S categoricals, C classes, D deter, H hidden, E embedding, A action columns, F = S*C + D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RSSMState(NamedTuple):
    """logits (..., S, C) of the latent's distribution, stoch (..., S, C) one-hot sample, deter (..., D)."""

    logits: Tensor
    stoch: Tensor
    deter: Tensor


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def gumbel(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard Gumbel noise in fp32."""
    uniform = torch.rand(shape, device=like.device, dtype=torch.float32)
    return -torch.log(-torch.log(uniform.clamp_(1e-20, 1.0 - 1e-7)))


def straight_through(logits: Tensor, noise: Tensor | None) -> Tensor:
    """One-hot sample (Gumbel-argmax) or mode (noise None) of (..., S, C) logits with the gradient of the probabilities."""
    logits = logits.float()
    index = (logits if noise is None else logits + noise).argmax(-1, keepdim=True)
    one_hot = torch.zeros_like(logits).scatter_(-1, index, 1.0)
    if not logits.requires_grad:
        return one_hot
    probs = F.softmax(logits, -1)
    return one_hot + probs - probs.detach()


def kl_loss(post: Tensor, prior: Tensor, balance: float = 0.8, free: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Balanced KL of (B,T,S,C) logits: ``balance`` trains the prior, the rest the posterior; free nats on the batch mean (IPV 0.3)."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(p.float(), -1), F.log_softmax(q.float(), -1)
        return (log_p.exp() * (log_p - log_q)).sum((-2, -1)).mean()

    to_post, to_prior = kl(post, prior.detach()), kl(post.detach(), prior)
    loss = (1 - balance) * to_post.clamp(min=free) + balance * to_prior.clamp(min=free)
    log_p = F.log_softmax(post.detach().float(), -1)
    return loss, {"kl": to_prior.detach(), "post_entropy": -(log_p.exp() * log_p).sum((-2, -1)).mean()}


class RSSM(nn.Module):
    """h_t = GRU(h_{t-1}, z_{t-1}, a_t), prior p(z_t | h_t), posterior q(z_t | h_t, e_t).

    The GRU has LayerNorm (eps 1e-3) and an update bias of -1; activations are ELU. ``action_pad`` widens the action input with
    zero columns (IPV pads to 50).
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        action_dim: int,
        deter: int = 1024,
        hidden: int = 1024,
        stoch: int = 32,
        classes: int = 32,
        action_pad: int | None = None,
    ) -> None:
        super().__init__()
        self.deter, self.stoch, self.classes, self.action_dim = deter, stoch, classes, action_dim
        columns = action_dim if action_pad is None else action_pad
        if columns < action_dim:
            raise ValueError(f"action_pad={action_pad} is smaller than action_dim={action_dim}")
        flat = stoch * classes
        self.flat, self.columns = flat, columns
        self.img_in = _linear(flat + columns, hidden)
        self.gru = nn.Linear(hidden + deter, 3 * deter)
        self.gru_norm = nn.LayerNorm(3 * deter, eps=1e-3)
        self.prior_in, self.prior_out = _linear(deter, hidden), _linear(hidden, flat)
        self.post_in, self.post_out = _linear(deter + embed_dim, hidden), _linear(hidden, flat)

    @property
    def feat_dim(self) -> int:
        """S*C + D."""
        return self.flat + self.deter

    def initial(self, batch: int) -> RSSMState:
        """All zeros."""
        weight = self.gru.weight
        zeros = weight.new_zeros(batch, self.stoch, self.classes)
        return RSSMState(zeros, zeros, weight.new_zeros(batch, self.deter))

    def feat(self, state: RSSMState) -> Tensor:
        """(..., F): latent first, then deter."""
        return torch.cat([state.stoch.flatten(-2), state.deter.to(state.stoch.dtype)], -1)

    def _action_part(self, action: Tensor) -> Tensor:
        """Contribution of actions (..., A) to the first layer; the recurrence adds the latent's."""
        return F.linear(action, self.img_in.weight[:, self.flat : self.flat + self.action_dim], self.img_in.bias)

    def _recur(self, stoch: Tensor, deter: Tensor, action_part: Tensor) -> Tensor:
        """New deter (B, D) from the flat latent (B, S*C), deter and the action's contribution."""
        u = F.elu(F.linear(stoch, self.img_in.weight[:, : self.flat]) + action_part)
        parts = self.gru_norm(self.gru(torch.cat([u, deter.to(u.dtype)], -1)))
        reset, cand, update = parts.chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return torch.lerp(deter.to(cand.dtype), cand, torch.sigmoid(update - 1.0))

    def _shape(self, logits: Tensor) -> Tensor:
        return logits.float().unflatten(-1, (self.stoch, self.classes))

    def prior(self, deter: Tensor) -> Tensor:
        """Prior logits (..., S, C) of deter (..., D)."""
        return self._shape(self.prior_out(F.elu(self.prior_in(deter))))

    def img_step(self, state: RSSMState, action: Tensor, sample: bool = True) -> RSSMState:
        """One step of the prior."""
        deter = self._recur(state.stoch.flatten(-2), state.deter, self._action_part(action))
        logits = self.prior(deter)
        return RSSMState(logits, straight_through(logits, gumbel(logits.shape, logits) if sample else None), deter)

    def obs_step(self, state: RSSMState, action: Tensor, embed: Tensor, is_first: Tensor, sample: bool = True) -> RSSMState:
        """One step of the posterior; state and action are zeroed where ``is_first`` (B,)."""
        keep = (~is_first).to(state.deter.dtype).unsqueeze(-1)
        action_part = self._action_part(action * keep)
        deter = self._recur(state.stoch.flatten(-2) * keep, state.deter * keep, action_part)
        logits = self._shape(self.post_out(F.elu(self.post_in(torch.cat([deter, embed.to(deter.dtype)], -1)))))
        return RSSMState(logits, straight_through(logits, gumbel(logits.shape, logits) if sample else None), deter)

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, state: RSSMState | None = None, sample: bool = True
    ) -> tuple[RSSMState, Tensor]:
        """Posterior over a sequence: embed (B,T,E), action (B,T,A), is_first (B,T) -> states (B,T,...) and prior logits (B,T,S,C).

        Outside the recurrence, each as one product over B*T: the action's part of the first layer, the embedding's part of the
        posterior's first layer, and all prior logits.
        """
        batch, time = is_first.shape
        state = self.initial(batch) if state is None else state
        keep = (~is_first).to(action.dtype).unsqueeze(-1)  # (B, T, 1)
        action_part = self._action_part(action * keep).unbind(1)
        embed_part = F.linear(embed, self.post_in.weight[:, self.deter :], self.post_in.bias).unbind(1)
        deter_weight = self.post_in.weight[:, : self.deter]
        noise = gumbel((time, batch, self.stoch, self.classes), embed).unbind(0) if sample else (None,) * time
        # Only the positions where some sequence starts pay for the reset.
        reset = is_first.any(0).tolist()
        stoch, deter = state.stoch.flatten(-2), state.deter
        logits, stochs, deters = [], [], []
        for t in range(time):
            if reset[t]:
                stoch, deter = stoch * keep[:, t], deter * keep[:, t]
            deter = self._recur(stoch, deter, action_part[t])
            post = self._shape(self.post_out(F.elu(F.linear(deter, deter_weight) + embed_part[t])))
            one_hot = straight_through(post, noise[t])
            stoch = one_hot.flatten(-2)
            logits.append(post)
            stochs.append(one_hot)
            deters.append(deter)
        deter_all = torch.stack(deters, 1)
        states = RSSMState(torch.stack(logits, 1), torch.stack(stochs, 1), deter_all)
        return states, self.prior(deter_all)

    def imagine(self, state: RSSMState, action: Tensor, sample: bool = True) -> RSSMState:
        """Prior rolled out along given actions (B, T, A): states (B, T, ...)."""
        out = []
        for step in action.unbind(1):
            state = self.img_step(state, step, sample)
            out.append(state)
        return RSSMState(*(torch.stack(x, 1) for x in zip(*out, strict=True)))
