"""Recurrent state-space model of DreamerV3: block GRU, RMSNorm, categorical latents with a share of the uniform distribution.

Source: danijar/dreamerv3, commit e3f0224, dreamerv3/rssm.py. As little work as possible is inside the recurrence. The deterministic
state is fp32 also when products are bf16, unlike in the reference, so small changes accumulate.

Shapes: B sequences, T positions, S categoricals, C classes, D deter, G blocks, H hidden, E embedding, A actions, F = S*C + D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmotion.models.blocks import BlockLinear, NormMLP, NormSiLU, linear, spans
from localmotion.models.distributions import categorical_kl, gumbel, straight_through
from localmotion.models.rssm import RecurrentProduct


class State(NamedTuple):
    """logits (..., S, C): normalised log-probabilities of the latent; stoch (..., S, C) one-hot sample; deter (..., D) fp32."""

    logits: Tensor
    stoch: Tensor
    deter: Tensor


def kl_losses(post: Tensor, prior: Tensor, free: float = 1.0) -> tuple[Tensor, Tensor]:
    """(dyn, rep), each (...), of log-probabilities (..., S, C): max(free, KL(sg post || prior)) and max(free, KL(post || sg prior)).

    The KL is summed over S, in nats. Free nats apply at each position, before any mean, so a position below them has no gradient.
    """
    dyn = categorical_kl(post.detach(), prior).clamp(min=free)  # (...)
    rep = categorical_kl(post, prior.detach()).clamp(min=free)  # (...)
    return dyn, rep


class _DeferredBlocks(torch.autograd.Function):
    """As `models.rssm._DeferredWeight`, for a kernel (G, I, O): the term is (T, G, B, O), the inputs are (G, B, I)."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, kernel: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.dtype = inputs, kernel.dtype
        return term.view_as(term)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        kernel = None
        if ctx.needs_input_grad[1]:
            rows = grad.transpose(0, 1).flatten(1, 2)  # (G, T*B, O)
            kernel = torch.bmm(torch.cat(ctx.inputs, 1).to(rows.dtype).transpose(1, 2), rows).to(ctx.dtype)
        return grad, kernel, None


class _TimesKernel(torch.autograd.Function):
    """term + x K whose backward pass uses a prepared transposed kernel; that of `baddbmm` would copy one at each position."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, x: Tensor, kernel: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return torch.baddbmm(term, x, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grads[0], torch.bmm(grads[0], ctx.transposed), None, None


class _BlockProduct:
    """x_t K + term_t inside a recurrence, x_t (G, B, I): K is cast once, and its gradient is computed once."""

    def __init__(self, kernel: Tensor, term: Tensor) -> None:
        self.kernel = kernel.detach().to(term.dtype)
        self.inputs: list[Tensor] = []
        self.learns = torch.is_grad_enabled() and kernel.requires_grad
        self.terms = (_DeferredBlocks.apply(term, kernel, self.inputs) if self.learns else term).unbind(0)
        if self.learns:
            self.transposed = self.kernel.transpose(1, 2).contiguous()

    def __call__(self, t: int, x: Tensor) -> Tensor:
        if not self.learns:
            return torch.baddbmm(self.terms[t], x, self.kernel)
        self.inputs.append(x.detach())
        out: Tensor = _TimesKernel.apply(self.terms[t], x, self.kernel, self.transposed)
        return out


class Weights(NamedTuple):
    """The core's and the GRU's weights arranged for single steps; computed once per rollout."""

    own: Tensor  # (G, D/G, D/G), from a block of the state to itself
    shared: Tensor  # (D, 3H), from the shared inputs of all blocks
    gru: Tensor  # (G, D/G, 3D/G)
    bias: Tensor  # (G, 1, 3D/G)


class BlockRSSM(nn.Module):
    """h_t = block GRU(h_{t-1}, z_{t-1}, a_t), prior p(z_t | h_t), posterior q(z_t | h_t, e_t).

    One layer each reads state, latent and action. The three results and a block of the state are the input of that block of the GRU.
    A share ``unimix`` of every latent distribution is uniform. Actions beyond [-1, 1] are clipped: a / max(1, |a|).
    """

    recurrent = True  # --compile does not change it

    def __init__(
        self,
        *,
        embed_dim: int,
        action_dim: int,
        deter: int,
        hidden: int,
        stoch: int = 32,
        classes: int = 32,
        blocks: int = 8,
        unimix: float = 0.01,
    ) -> None:
        """Raises ValueError if ``deter`` is not divisible by ``blocks``."""
        super().__init__()
        self.deter, self.stoch, self.classes, self.blocks, self.unimix = deter, stoch, classes, blocks, unimix
        flat = stoch * classes
        self.flat = flat
        self.in_deter, self.in_stoch, self.in_action = linear(deter, hidden), linear(flat, hidden), linear(action_dim, hidden)
        self.in_norms = nn.ModuleList(NormSiLU(hidden) for _ in range(3))
        self.core = BlockLinear(deter + 3 * hidden * blocks, deter, blocks)
        self.core_norm = NormSiLU(deter)
        self.gru = BlockLinear(deter, 3 * deter, blocks)
        self.prior_net = NormMLP(deter, flat, units=hidden, layers=2)
        self.post_in, self.post_norm, self.post_out = linear(deter + embed_dim, hidden), NormSiLU(hidden), linear(hidden, flat)

    @property
    def feat_dim(self) -> int:
        """D + S*C."""
        return self.deter + self.flat

    def initial(self, batch: int) -> State:
        """All zeros."""
        weight = self.in_deter.weight
        zeros = weight.new_zeros(batch, self.stoch, self.classes)
        return State(zeros, zeros, weight.new_zeros(batch, self.deter))

    def feat(self, state: State) -> Tensor:
        """(..., F): deter first, then the latent."""
        return torch.cat([state.deter, state.stoch.flatten(-2)], -1)

    # Pieces -----------------------------------------------------------------------------------------------------------------

    def _action(self, action: Tensor) -> Tensor:
        """The action's input (..., H) to the core."""
        out: Tensor = self.in_norms[2](self.in_action(action / action.abs().clamp(min=1.0).detach()))
        return out

    def _split(self) -> tuple[Tensor, Tensor]:
        """The core's kernel as (G, D/G, D/G) for the state, and (D, 3H) for the three shared inputs of all blocks."""
        width = self.deter // self.blocks
        return self.core.kernel[:, :width], self.core.kernel[:, width:].transpose(1, 2).flatten(0, 1)

    def _in_blocks(self, x: Tensor) -> Tensor:
        """(B, D') -> (G, B, D'/G), a view."""
        return x.unflatten(-1, (self.blocks, -1)).transpose(0, 1)

    def _gates(self, parts: Tensor, deter: Tensor) -> Tensor:
        """New deter (B, D) from the GRU's linear output (G, B, 3D/G), in fp32."""
        reset, cand, update = parts.float().transpose(0, 1).chunk(3, -1)  # (B, G, D/G)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return torch.lerp(deter.float(), cand.flatten(1), torch.sigmoid(update - 1.0).flatten(1))

    def _logits(self, out: Tensor) -> Tensor:
        """Normalised log-probabilities (..., S, C), fp32, of a network's output (..., S*C)."""
        logits = F.log_softmax(out.float().unflatten(-1, (self.stoch, self.classes)), -1)
        if self.unimix:
            logits = logits.exp().mul(1 - self.unimix).add(self.unimix / self.classes).log()
        return logits

    def weights(self) -> Weights:
        """Weights for single steps, in the precision of products."""
        device = self.gru.kernel.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.gru.kernel.dtype
        own, shared = self._split()
        bias = self._in_blocks(self.gru.bias.unsqueeze(0))
        return Weights(own.to(low), shared.to(low), self.gru.kernel.to(low), bias.to(low))

    def _recur(self, stoch: Tensor, deter: Tensor, action_part: Tensor, weights: Weights | None) -> Tensor:
        """New deter (B, D) from the flat latent (B, S*C), deter and `_action`'s part (B, H)."""
        own, shared, gru, bias = weights if weights is not None else self.weights()
        inputs = torch.cat([self.in_norms[0](self.in_deter(deter)), self.in_norms[1](self.in_stoch(stoch)), action_part], -1)
        x = F.linear(inputs, shared, self.core.bias)
        x = x + torch.bmm(self._in_blocks(deter.to(own.dtype)), own).transpose(0, 1).flatten(1)
        x = self._in_blocks(self.core_norm(x))
        if torch.is_grad_enabled() or gru.dtype == torch.float32:
            return self._gates(torch.baddbmm(bias, x, gru), deter)
        return self._gates_in_pieces(torch.bmm(x, gru), self._in_blocks(self.gru.bias.unsqueeze(0)), deter)

    def _gates_in_pieces(self, parts: Tensor, bias: Tensor, deter: Tensor) -> Tensor:
        """`_gates` of parts + bias without gradient. It works in place and in pieces, which stay in the cache of a CPU.

        tanh x is computed as 2 sigmoid(2x) - 1. On a CPU this is six times as fast, and it differs by 1e-7, far below the rounding of
        bf16 products.
        """
        out = torch.empty_like(deter, dtype=torch.float32)
        old, new = self._in_blocks(deter.float()), self._in_blocks(out)
        for span in spans(parts, 1, times=4):
            reset, cand, update = torch.add(parts[:, span].float(), bias).chunk(3, -1)  # (G, b, D/G)
            cand = reset.sigmoid_().mul_(cand).mul_(2).sigmoid_().mul_(2).sub_(1)
            torch.lerp(old[:, span], cand, update.sub_(1).sigmoid_(), out=new[:, span])
        return out

    def prior(self, deter: Tensor) -> Tensor:
        """Prior's log-probabilities (..., S, C) of deter (..., D)."""
        return self._logits(self.prior_net(deter))

    def _sample(self, logits: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        return straight_through(logits, gumbel(logits.shape, logits, generator) if sample else None)

    # Steps and sequences ----------------------------------------------------------------------------------------------------

    def img_step(
        self,
        state: State,
        action: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
        weights: Weights | None = None,
    ) -> State:
        """One step of the prior; ``sample=False`` takes the most likely class. A rollout computes `weights` once and passes them."""
        deter = self._recur(state.stoch.flatten(-2), state.deter, self._action(action), weights)
        logits = self.prior(deter)
        return State(logits, self._sample(logits, sample, generator), deter)

    def obs_step(
        self,
        state: State,
        action: Tensor,
        embed: Tensor,
        is_first: Tensor,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> State:
        """One step of the posterior; state and action are zeroed where ``is_first`` (B,)."""
        keep = (~is_first).to(state.deter.dtype).unsqueeze(-1)
        deter = self._recur(state.stoch.flatten(-2) * keep, state.deter * keep, self._action(action * keep), None)
        hidden = self.post_norm(self.post_in(torch.cat([deter, embed.to(deter.dtype)], -1)))
        logits = self._logits(self.post_out(hidden))
        return State(logits, self._sample(logits, sample, generator), deter)

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        state: State | None = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[State, Tensor]:
        """Posterior over a sequence: embed (B,T,E), action (B,T,A), is_first (B,T) -> states (B,T,...) and prior logits (B,T,S,C).

        One product over B*T outside the recurrence computes each of these: the action's and the embedding's parts, all prior logits, and
        in the backward pass the gradient of each weight.
        """
        batch, time = is_first.shape
        state = self.initial(batch) if state is None else state
        keep = (~is_first).t().unsqueeze(-1).float()  # (T, B, 1)
        action_part = self._action(action.transpose(0, 1) * keep)  # (T, B, H)
        embed_part = F.linear(embed.transpose(0, 1), self.post_in.weight[:, self.deter :], self.post_in.bias)  # (T, B, H)
        low, hidden = embed_part.dtype, action_part.shape[-1]  # the precision of products: bf16 under autocast
        own, shared = self._split()
        core_part = F.linear(action_part, shared[:, 2 * hidden :], self.core.bias)  # (T, B, D)

        def bias(x: Tensor) -> Tensor:
            return x.to(low).expand(time, batch, -1)

        in_deter = RecurrentProduct(self.in_deter.weight, bias(self.in_deter.bias))
        in_stoch = RecurrentProduct(self.in_stoch.weight, bias(self.in_stoch.bias))
        core_in = RecurrentProduct(shared[:, : 2 * hidden], core_part)
        core_own = _BlockProduct(own, core_part.new_zeros(()).expand(time, self.blocks, batch, self.deter // self.blocks))
        gru_bias = self.gru.bias.to(low).view(1, self.blocks, 1, -1).expand(time, -1, batch, -1)
        gru = _BlockProduct(self.gru.kernel, gru_bias)
        post_in = RecurrentProduct(self.post_in.weight[:, : self.deter], embed_part)
        post_out = RecurrentProduct(self.post_out.weight, bias(self.post_out.bias))
        noise = gumbel((time, batch, self.stoch, self.classes), embed, generator).unbind(0) if sample else (None,) * time
        # On a CPU only positions where an episode starts are reset. On a GPU all are, because reading their list would make the host wait.
        reset = is_first.any(0).tolist() if is_first.device.type == "cpu" else [True] * time
        stoch, deter = state.stoch.flatten(-2), state.deter.float()
        logits, stochs, deters = [], [], []
        for t in range(time):
            if reset[t]:
                stoch, deter = stoch * keep[t], deter * keep[t]
            before = deter.to(low)
            inputs = torch.cat([self.in_norms[0](in_deter(t, before)), self.in_norms[1](in_stoch(t, stoch.to(low)))], -1)
            x = core_in(t, inputs) + core_own(t, self._in_blocks(before)).transpose(0, 1).flatten(1)  # (B, D)
            deter = self._gates(gru(t, self._in_blocks(self.core_norm(x))), deter)
            post = self._logits(post_out(t, self.post_norm(post_in(t, deter.to(low)))))  # (B, S, C)
            one_hot = straight_through(post, noise[t])
            stoch = one_hot.flatten(-2)
            logits.append(post)
            stochs.append(one_hot)
            deters.append(deter)
        deter_all = torch.stack(deters, 1)  # (B, T, D)
        states = State(torch.stack(logits, 1), torch.stack(stochs, 1), deter_all)
        return states, self.prior(deter_all)

    def imagine(self, state: State, action: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> State:
        """Prior rolled out from ``state`` (B, ...) along actions (B, T, A): states (B, T, ...)."""
        out, weights = [], self.weights()
        for t in range(action.shape[1]):
            state = self.img_step(state, action[:, t], sample, generator, weights)
            out.append(state)
        return State(*(torch.stack(x, 1) for x in zip(*out, strict=True)))
