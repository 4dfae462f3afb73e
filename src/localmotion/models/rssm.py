"""Recurrent state-space model with categorical latents (DreamerV2; IPV's sizes), with as little work as possible inside the recurrence.

Shapes: B sequences, T positions, S categoricals, C classes, D deter, H hidden, E embedding, A action columns, F = S*C + D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion import ranks
from localmotion.config import WorldModelConfig
from localmotion.models.distributions import categorical_entropy, categorical_kl, gumbel, straight_through


class RSSMState(NamedTuple):
    """logits (..., S, C) of the latent's distribution, stoch (..., S, C) one-hot sample, deter (..., D).

    `GaussianRSSM` has mean and deviation (..., S, 2) in the place of logits, and samples (..., S, 1).
    """

    logits: Tensor
    stoch: Tensor
    deter: Tensor

    def starts(self) -> RSSMState:
        """Where imagination starts: states (B, T, ...) -> (B*T, ...), without gradient."""
        return RSSMState(*(x.detach().flatten(0, 1) for x in self))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def kl_loss(post: Tensor, prior: Tensor, balance: float = 0.8, free: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Balanced KL of (B,T,S,C) logits, summed over S, in fp32 (DreamerV2, section 2.1).

    (1 - balance) max(KL(post || sg prior), free) + balance max(KL(sg post || prior), free). The first term trains the posterior, the
    second the prior. Each KL is a mean over the batch, and free nats apply to this mean. Metrics: ``kl`` and ``post_entropy`` in nats.
    """
    # Both terms share two log-softmaxes, so the gradient is stopped after these.
    log_p, log_q = F.log_softmax(post.float(), -1), F.log_softmax(prior.float(), -1)  # (B, T, S, C)
    to_post = ranks.mean(categorical_kl(log_p, log_q.detach()).mean())  # (B, T) -> ()
    to_prior = ranks.mean(categorical_kl(log_p.detach(), log_q).mean())  # (B, T) -> ()
    loss = (1 - balance) * to_post.clamp(min=free) + balance * to_prior.clamp(min=free)
    return loss, {"kl": to_prior.detach(), "post_entropy": categorical_entropy(log_p.detach()).mean()}


class _DeferredWeight(torch.autograd.Function):
    """Identity on a term (T, B, O) whose slices are added to products x_t W^T. Computes W's gradient in one product at the end.

    If a recurrence multiplies by W at each position, autograd computes and adds a gradient of the size of W at each position. At small
    B this takes most of the time of a backward pass. The gradient of the added term equals that of the product, so W's gradient is
    ``grad^T x`` over all T*B rows at once. The recurrence appends each x_t to `inputs`.
    """

    @staticmethod
    def forward(ctx: Any, term: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.dtype = inputs, weight.dtype
        return term.view_as(term)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        rows = grad.flatten(0, 1)  # (T*B, O)
        weight = rows.t().mm(torch.cat(ctx.inputs).to(rows.dtype)).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad, weight, None


class RecurrentProduct:
    """x_t W^T + term_t inside a recurrence: W is cast once, and its gradient is computed once."""

    def __init__(self, weight: Tensor, term: Tensor) -> None:
        """``weight`` (O, I); ``term`` (T, B, O), in the precision to compute in."""
        self.weight = weight.detach().to(term.dtype).t()
        self.inputs: list[Tensor] = []
        self.learns = torch.is_grad_enabled() and weight.requires_grad
        self.terms = (_DeferredWeight.apply(term, weight, self.inputs) if self.learns else term).unbind(0)

    def __call__(self, t: int, x: Tensor) -> Tensor:
        if self.learns:
            self.inputs.append(x.detach())
        return torch.addmm(self.terms[t], x, self.weight)


class Carry(NamedTuple):
    """What acting with one RSSM keeps between agent steps."""

    state: RSSMState
    action: Tensor  # (B, A), the one that leads to the next frame


class RSSM(nn.Module):
    """h_t = GRU(h_{t-1}, z_{t-1}, a_t), prior p(z_t | h_t), posterior q(z_t | h_t, e_t).

    The GRU has LayerNorm (eps 1e-3) and an update bias of -1. Activations are ELU. ``action_pad`` widens the action input with zero
    columns (IPV pads to 50). ``action_free`` replaces every action, also None, by zeros. ``unimix`` is the share of the uniform
    distribution in every latent distribution (DreamerV3; 0 in IPV).
    """

    recurrent = True  # --compile does not change it

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
        action_free: bool = False,
        unimix: float = 0.0,
    ) -> None:
        super().__init__()
        self.deter, self.stoch, self.classes, self.action_dim = deter, stoch, classes, action_dim
        columns = action_dim if action_pad is None else action_pad
        if columns < action_dim:
            raise ValueError(f"action_pad={action_pad} is smaller than action_dim={action_dim}")
        flat = stoch * classes
        self.flat, self.columns, self.action_free, self.unimix = flat, columns, action_free, unimix
        self.img_in = _linear(flat + columns, hidden)
        self.gru = nn.Linear(hidden + deter, 3 * deter)
        self.gru_norm = nn.LayerNorm(3 * deter, eps=1e-3)
        self.prior_in, self.prior_out = _linear(deter, hidden), _linear(hidden, flat)
        self.post_in, self.post_out = _linear(deter + embed_dim, hidden), _linear(hidden, flat)

    @classmethod
    def configured(
        cls, world: WorldModelConfig, *, embed_dim: int, action_dim: int, action_pad: int | None = None, action_free: bool = False
    ) -> RSSM:
        """Build with the sizes of a method's settings."""
        return cls(
            embed_dim=embed_dim,
            action_dim=action_dim,
            deter=world.deter,
            hidden=world.hidden,
            stoch=world.stoch,
            classes=world.classes,
            action_pad=action_pad,
            action_free=action_free,
        )

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

    def _action_part(self, action: Tensor | None) -> Tensor:
        """Part (..., H) of the first layer that comes from actions (..., A). The recurrence adds the latent's part."""
        if self.action_free or action is None:
            if not self.action_free:
                raise ValueError("this RSSM is conditioned on actions, but none were given")
            return self.img_in.bias
        return F.linear(action, self.img_in.weight[:, self.flat : self.flat + self.action_dim], self.img_in.bias)

    def _gates(self, parts: Tensor, deter: Tensor) -> Tensor:
        """New deter (B, D) from the GRU's linear output (B, 3D). Normalisation, gates and state are fp32, so small changes accumulate."""
        norm = self.gru_norm
        with torch.autocast(parts.device.type, enabled=False):
            parts = F.layer_norm(parts.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            reset, cand, update = parts.chunk(3, -1)  # (B, D) each
            cand = torch.tanh(torch.sigmoid(reset) * cand)
            return torch.lerp(deter.float(), cand, torch.sigmoid(update - 1.0))

    def _recur(self, stoch: Tensor, deter: Tensor, action_part: Tensor) -> Tensor:
        """New deter (B, D) from the flat latent (B, S*C), deter (B, D) and the action's part (B, H)."""
        u = F.elu(F.linear(stoch, self.img_in.weight[:, : self.flat]) + action_part)
        return self._gates(self.gru(torch.cat([u, deter.to(u.dtype)], -1)), deter)

    def _logits(self, out: Tensor) -> Tensor:
        """(..., S*C) -> fp32 (..., S, C)."""
        logits = out.float().unflatten(-1, (self.stoch, self.classes))
        if self.unimix:
            probs = (1 - self.unimix) * F.softmax(logits, -1) + self.unimix / self.classes
            logits = probs.log()
        return logits

    def _noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """What samples of ``shape`` latents are drawn with, (*shape, S, C)."""
        return gumbel((*shape, self.stoch, self.classes), like, generator)

    def _draw(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Sample (..., S, C), or without noise the most likely latent."""
        return straight_through(logits, noise)

    def _sample(self, logits: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        return self._draw(logits, self._noise(tuple(logits.shape[:-2]), logits, generator) if sample else None)

    def prior(self, deter: Tensor) -> Tensor:
        """Prior logits (..., S, C) of deter (..., D)."""
        return self._logits(self.prior_out(F.elu(self.prior_in(deter))))

    def img_step(
        self, state: RSSMState, action: Tensor | None, sample: bool = True, generator: torch.Generator | None = None
    ) -> RSSMState:
        """One step of the prior; ``sample=False`` takes the most likely class."""
        deter = self._recur(state.stoch.flatten(-2), state.deter, self._action_part(action))
        logits = self.prior(deter)
        return RSSMState(logits, self._sample(logits, sample, generator), deter)

    def obs_step(
        self,
        state: RSSMState,
        action: Tensor | None,
        embed: Tensor,
        is_first: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> RSSMState:
        """One step of the posterior; state and action are zeroed where ``is_first`` (B,)."""
        keep = (~is_first).to(state.deter.dtype).unsqueeze(-1)  # (B, 1)
        action_part = self._action_part(None if action is None else action * keep)
        deter = self._recur(state.stoch.flatten(-2) * keep, state.deter * keep, action_part)
        logits = self._logits(self.post_out(F.elu(self.post_in(torch.cat([deter, embed.to(deter.dtype)], -1)))))
        return RSSMState(logits, self._sample(logits, sample, generator), deter)

    def observe(
        self,
        embed: Tensor,
        action: Tensor | None,
        is_first: Tensor,
        state: RSSMState | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[RSSMState, Tensor]:
        """Posterior over a sequence: embed (B,T,E), action (B,T,A), is_first (B,T) -> states (B,T,...) and prior logits (B,T,S,C).

        One product over B*T outside the recurrence computes each of these: the action's part of the first layer, the embedding's part of
        the posterior's first layer, all prior logits, and in the backward pass the gradient of each weight.
        """
        batch, time = is_first.shape
        state = self.initial(batch) if state is None else state
        keep = (~is_first).t().unsqueeze(-1).float()  # (T, B, 1)
        action_part = self._action_part(None if action is None or self.action_free else action.transpose(0, 1) * keep)
        embed_part = F.linear(embed.transpose(0, 1), self.post_in.weight[:, self.deter :], self.post_in.bias)  # (T, B, H)
        low = embed_part.dtype  # the precision of products: bf16 under autocast
        rows = (time, batch, -1)
        # (T, B, ...) terms, to which the recurrence adds its products
        first = RecurrentProduct(self.img_in.weight[:, : self.flat], action_part.to(low).expand(rows))
        gru = RecurrentProduct(self.gru.weight, self.gru.bias.to(low).expand(rows))
        post_in = RecurrentProduct(self.post_in.weight[:, : self.deter], embed_part)
        post_out = RecurrentProduct(self.post_out.weight, self.post_out.bias.to(low).expand(rows))
        noise = self._noise((time, batch), embed, generator).unbind(0) if sample else (None,) * time
        # On a CPU only positions where an episode starts are reset. On a GPU all are, because reading their list would make the host wait.
        reset = is_first.any(0).tolist() if is_first.device.type == "cpu" else [True] * time
        stoch, deter = state.stoch.flatten(-2), state.deter.float()
        logits, stochs, deters = [], [], []
        for t in range(time):
            if reset[t]:
                stoch, deter = stoch * keep[t], deter * keep[t]
            u = F.elu(first(t, stoch.to(low)))  # (B, H)
            deter = self._gates(gru(t, torch.cat([u, deter.to(low)], -1)), deter)  # (B, D)
            post = self._logits(post_out(t, F.elu(post_in(t, deter.to(low)))))  # (B, S, C)
            one_hot = self._draw(post, noise[t])
            stoch = one_hot.flatten(-2)  # (B, S*C)
            logits.append(post)
            stochs.append(one_hot)
            deters.append(deter)
        deter_all = torch.stack(deters, 1)  # (B, T, D)
        states = RSSMState(torch.stack(logits, 1), torch.stack(stochs, 1), deter_all)
        return states, self.prior(deter_all)

    def imagine(
        self,
        state: RSSMState,
        action: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> RSSMState:
        """Prior rolled out from ``state`` (B, ...) along actions (B, T, A): states (B, T, ...)."""
        out = []
        for t in range(action.shape[1]):
            state = self.img_step(state, action[:, t], sample, generator)
            out.append(state)
        return RSSMState(*(torch.stack(x, 1) for x in zip(*out, strict=True)))

    def open_loop(self, post: RSSMState, action: Tensor, sample: bool = True) -> Tensor:
        """Features (B, C+H, F) of posterior states (B, C, ...) and of the prior that continues the last one along actions (B, H, A)."""
        prior = self.imagine(RSSMState(*(x[:, -1] for x in post)), action, sample)
        return torch.cat([self.feat(post), self.feat(prior)], 1)


def beginning(model: RSSM, batch: int, actions: int) -> Carry:
    """The carry before the first frame: the initial state, and zeros for A = ``actions`` numbers of an action."""
    state = model.initial(batch)
    return Carry(state, state.deter.new_zeros(batch, actions))
