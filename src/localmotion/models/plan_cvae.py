"""A conditional VAE of plans: the next n frames of tokens, given m frames and a latent z of the motion between them.

    posterior E   q(z | X, Y)     X the m frames up to now, Y the n frames that follow
    prior P       p(z | X)        and c, a feature of the context
    decoder D     P(Y | X, z)

Source: PVDR arXiv 2411.03169. Its authors' review and abstract name the three networks and their inputs; the forms are ours, and
`methods.pvdr` gives the reasons.

Shapes: B sequences, K plans, m frames of context, n frames of a plan, N cells, C = N + 1 tokens of a frame, V codes, Z numbers of z,
d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from localmotion import ranks
from localmotion.limits import Limits, at_least
from localmotion.models.distributions import normal
from localmotion.models.st_transformer import Memory, STTransformer, TokenEmbedding, table

LOG_VARIANCE = (-8.0, 4.0)
"""Range of log variances."""


@dataclass(frozen=True)
class PlanConfig:
    """Settings of the three networks."""

    context: int = 4
    """Frames m that a plan follows."""
    horizon: int = 8
    """Frames n of a plan."""
    latent: int = 32
    """Numbers Z of z."""
    dim: int = 256
    """Width d of the Transformers."""
    heads: int = 8
    """Attention heads."""
    posterior_layers: int = 6
    """Blocks of the posterior."""
    prior_layers: int = 4
    """Blocks of the prior."""
    decoder_layers: int = 6
    """Blocks of the decoder."""
    decode: Literal["parallel", "frame_ar"] = "parallel"
    """parallel: all frames of a plan at once. frame_ar: one after the other, each given the tokens of the one before; all tokens of a frame
    at once."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "context", "horizon", "latent", "dim", "heads"),
        **at_least(0, "posterior_layers", "prior_layers", "decoder_layers"),
    }


def _gaussian(out: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2Z) -> mean and clamped log variance (..., Z), float32."""
    mean, log_variance = out.float().chunk(2, -1)
    return mean, log_variance.clamp(*LOG_VARIANCE)


def sample(mean: Tensor, log_variance: Tensor, *, always: bool = False) -> Tensor:
    """Reparameterised sample (..., Z). ``always``: also where draws are the likeliest, because a choice between plans needs several."""
    noise = torch.randn(mean.shape, device=mean.device) if always else normal(mean)
    return mean + torch.exp(0.5 * log_variance) * noise


def divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL in nats of N(mean, var) from N(other_mean, other_var), for each number: (..., Z)."""
    ratio = torch.exp(log_variance - other_log_variance)
    shift = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + shift - 1)


def balanced(
    posterior: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor], share: float, free_nats: float
) -> tuple[Tensor, Tensor]:
    """The KL (), summed over numbers of z, as it is learned, and the KL of each number without a gradient, (Z,): means over sequences.

    Each distribution is a mean and a log variance (B, Z). Above 0, ``share`` of the gradient trains the prior, the rest the posterior.
    The mean KL of a number counts as ``free_nats`` at least.
    """
    each = divergence(*posterior, *prior)  # (B, Z)
    if share > 0:
        (mean_q, log_q), (mean_p, log_p) = posterior, prior
        to_prior = divergence(mean_q.detach(), log_q.detach(), mean_p, log_p)
        each = share * to_prior + (1 - share) * divergence(mean_q, log_q, mean_p.detach(), log_p.detach())
    mean = ranks.mean(each.mean(0))
    return mean.clamp(min=free_nats).sum(), mean.detach()


class Coded(NamedTuple):
    """Windows with their posterior: mean and log variance of z (R, Z), and the context feature (R, d)."""

    mean: Tensor
    log_variance: Tensor
    context: Tensor


class PosteriorBody(nn.Module):
    """All of the posterior but its last layer: the mean of the global tokens of the n later frames, normalised."""

    feed_forward = True  # --compile compiles it

    def __init__(self, config: PlanConfig, codes: int, cells: int) -> None:
        super().__init__()
        self.context = config.context
        self.embedding = TokenEmbedding(codes, cells, config.context + config.horizon, config.dim)
        self.transformer = STTransformer(config.dim, config.heads, config.posterior_layers)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, m + n, N) -> (B, d). All frames attend to all."""
        x, _ = self.transformer(self.embedding(tokens))  # (B, m + n, C, d)
        found: Tensor = self.norm(x[:, self.context :, -1].mean(1))
        return found


class Posterior(nn.Module):
    """E. Online, only `last` is trained (PVDR, footnote 1)."""

    def __init__(self, config: PlanConfig, codes: int, cells: int) -> None:
        super().__init__()
        self.body = PosteriorBody(config, codes, cells)
        self.last = nn.Linear(config.dim, 2 * config.latent)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, m + n, N) -> mean and log variance of z, (B, Z) each."""
        return self.of(self.body(tokens))

    def of(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the body (B, d) -> mean and log variance of z, (B, Z) each."""
        return _gaussian(self.last(feature))


class Prior(nn.Module):
    """P. Frames attend to themselves and earlier ones. The context feature is the newest frame's global token, normalised."""

    feed_forward = True  # --compile compiles it

    def __init__(self, config: PlanConfig, codes: int, cells: int) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(codes, cells, config.context, config.dim)
        self.transformer = STTransformer(config.dim, config.heads, config.prior_layers)
        self.norm = nn.LayerNorm(config.dim)
        self.last = nn.Linear(config.dim, 2 * config.latent)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, m, N) -> mean and log variance of z, (B, Z) each, and the context feature c (B, d)."""
        x, _ = self.transformer(self.embedding(tokens), causal=True)
        feature = self.norm(x[:, -1, -1])
        return *_gaussian(self.last(feature)), feature.float()


class PlanDecoder(nn.Module):
    """D. Queries, one for each token of the plan, attend to the context and to each other; the context does not attend to queries.

    So the context's keys and values are the same for all K plans of a sequence, and are computed once. With w = 16 d^2 weights a block,
    L blocks and multiplication and addition counted apart, the matrix products of the blocks take

        2 L w C (m + K n)      instead of 2 L w C K (m + n),   and the output 2 K n N d V.

    At d = 256, L = 6, m = 4, n = 8, N = 64, K = 32: 213 GFLOP instead of 314. Attention itself adds 4 d K n C (C + m + n) a block, 8 GFLOP
    in all, and the output 9 GFLOP.

    z enters as a linear function: added to all queries of a token, and as the global token of all frames of the plan. What else a query
    holds is one learned vector (`decode=parallel`), or the token of the frame before in its cell (`decode=frame_ar`), and place and time.
    """

    feed_forward = True  # --compile compiles it

    def __init__(self, config: PlanConfig, codes: int, cells: int) -> None:
        super().__init__()
        self.context, self.horizon, self.autoregressive = config.context, config.horizon, config.decode == "frame_ar"
        self.embedding = TokenEmbedding(codes, cells, config.context + config.horizon, config.dim)
        if not self.autoregressive:
            self.query = table(1, config.dim)
        self.from_z = nn.Linear(config.latent, config.dim)
        self.transformer = STTransformer(config.dim, config.heads, config.decoder_layers)
        self.norm, self.out = nn.LayerNorm(config.dim), nn.Linear(config.dim, codes)

    def forward(self, tokens: Tensor, z: Tensor, future: Tensor | None = None) -> Tensor:
        """Context (B, m, N) and latents (B, K, Z) -> logits (B, K, n, N, V).

        ``future`` (B, n, N): the true tokens, which `frame_ar` takes as those of the frame before (for training). Without them it takes
        its own most likely ones. Parallel decoding ignores them.
        """
        batch, plans = z.shape[:2]
        _, once = self.transformer(self.embedding(tokens))
        past = [memory.expand(plans) for memory in once]
        held = self.from_z(z.flatten(0, 1))[:, None, None]  # (B K, 1, 1, d)
        if not self.autoregressive:
            content = (self.query + held).expand(-1, self.horizon, self.embedding.place.shape[0], -1)
            logits = self._answer(content, held, past, 0)[0]
        elif future is not None:
            before = torch.cat([tokens[:, -1:], future[:, :-1]], 1).repeat_interleave(plans, 0)  # (B K, n, N)
            logits = self._answer(self.embedding.of(before) + held, held, past, 0)[0]
        else:
            logits = self._one_by_one(tokens[:, -1:].repeat_interleave(plans, 0), held, past)
        return logits.view(batch, plans, *logits.shape[1:])

    def _answer(self, content: Tensor, held: Tensor, past: list[Memory], first: int) -> tuple[Tensor, list[Memory]]:
        """Logits (B K, T, N, V) of contents (B K, T, N, d) of the plan's frames ``first`` and later, and the memory with these frames."""
        whole = held.expand(-1, content.shape[1], -1, -1)
        x, memory = self.transformer(self.embedding.placed(content, whole, self.context + first), past, self.autoregressive)
        return self.out(self.norm(x[:, :, :-1])).float(), memory

    def _one_by_one(self, before: Tensor, held: Tensor, past: list[Memory]) -> Tensor:
        """Logits (B K, n, N, V), each frame from the most likely tokens of the one before; ``before`` (B K, 1, N): the newest frame."""
        found = []
        for frame in range(self.horizon):
            logits, past = self._answer(self.embedding.of(before) + held, held, past, frame)
            found.append(logits)
            before = logits.argmax(-1)
        return torch.cat(found, 1)


Latent = Callable[[Tensor, int], Tensor]
"""(the newest frames' tokens (B, m, N), position of the next frame) -> z (B, Z)."""


def continued(tokens: Tensor, length: int, context: int, latent: Latent, plans: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Tokens (B, T, N) and plans after them, (B, length, N), of ``plans``: context and z (B, 1, Z) -> tokens (B, 1, n, N).

    A context of fewer than ``context`` frames begins with copies of its first.
    """
    while (known := tokens.shape[1]) < length:
        newest = torch.arange(known - context, known, device=tokens.device).clamp(min=0)
        past = tokens[:, newest]
        plan = plans(past, latent(past, known).unsqueeze(1)).squeeze(1)
        tokens = torch.cat([tokens, plan], 1)
    return tokens[:, :length]
