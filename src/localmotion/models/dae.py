"""Dual-Attention Encoder (DAE): local motion representations from Atomic Actions, and their masked autoencoding.

Paper: "Local Motion Matters" (arXiv 2607.00808), sections 4.2.2 and 9, Eqs. 5 and 13-19. Shapes: B sequences, T positions, K parts,
P patch side, d token width, M [MAT] tokens (1 in the paper). The first M rows are [MAT], the K rows after them the Atomic Actions.

The paper leaves these choices open:

* `heads`, `attention_norm`: Eqs. 13-19 show one head and no normalisation in front of attention. `heads=1, attention_norm="none"` is
  that literal form. The default is 4 heads with pre-LayerNorm, which trains stably at 3e-4 without warm-up.
* `mat_inter`, `mat_temporal`: [MAT] takes part in inter-frame attention as a separate part and carries the temporal embedding.
* CoordEmb is a two-layer MLP on coordinates in [-1, 1], TempEmb a learned table, PatchProj one linear layer on the flattened patch.
* `decoder_causal`: the reconstruction decoder attends in both directions of time. A causal decoder could not use future positions,
  which the trivial predictor "same part at the nearest visible time" does use.

A token that is masked, invisible, or of another track or episode is never a key or a value, so it has no influence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from localmotion import ranks
from localmotion.limits import Limits, above_zero, at_least, shares
from localmotion.models.running_rms import RunningRMS


@dataclass(frozen=True)
class DAEConfig:
    """Settings of the Dual-Attention Encoder and the masked autoencoding."""

    keypoints: int = 16
    """Number of tracked keypoints K."""
    patch: int = 16
    """Local optical flow patch size P, pixels of the 64x64 frame."""
    mask_ratio: float = 0.5
    """Mask ratio rho of the masked autoencoding."""
    blocks: int = 6
    """Number of Dual Attention Blocks L."""
    dim: int = 256
    """Token width d (open in the paper)."""
    heads: int = 4
    """Attention heads. 1 is the paper's literal form."""
    attention_norm: Literal["pre", "none"] = "pre"
    """pre: LayerNorm in front of both attentions. none: the paper's literal form (Eqs. 17-18)."""
    mlp_ratio: int = 4
    """Width of the block's MLP, as a multiple of d."""
    intra: bool = True
    """Intra-frame attention. Off: the paper's ablation w/o Intra-Atten."""
    inter: bool = True
    """Inter-frame attention. Off: the paper's ablation w/o Inter-Atten."""
    coord: bool = True
    """Coordinate embedding. Off: the paper's ablation w/o Coord. Emb."""
    temporal: bool = True
    """Temporal embedding. Off: the paper's ablation w/o Temp. Emb."""
    mat_temporal: bool = True
    """[MAT] carries the temporal embedding, too."""
    mat_inter: bool = True
    """[MAT] takes part in inter-frame attention as a separate part."""
    flow_scale: float = 1.0
    """The input is flow divided by this many pixels, so typical values of moving parts are about 1."""
    flow_norm: bool = False
    """Flow is also divided by its root mean square at the visible points, a running statistic of the batches. Then slow and fast videos
    give inputs of one size. Not in the paper."""
    flow_clip: float = 16.0
    """Flow is clipped at this many pixels, so a wrong match does not dominate the squared error."""
    decoder_blocks: int = 1
    """Dual-attention blocks of the reconstruction decoder."""
    decoder_causal: bool = False
    """Whether the reconstruction decoder attends only to the past."""
    max_length: int = 64
    """Rows of the temporal embedding table: the maximum sequence length."""
    agg_dim: int = 0
    """Width of a^agg after a projection; 0: no projection, width mats * d."""
    mats: int = 1
    """Number of [MAT] tokens (1 in the paper). a^agg is their concatenation."""
    mats_placed: bool = False
    """Each [MAT] token belongs to a cell of a square grid over the frame. Like a part at that position it gets the coordinate embedding
    of the cell's centre. Not in the paper."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "keypoints", "patch", "dim", "heads", "mlp_ratio", "max_length", "mats"),
        **at_least(0, "blocks", "flow_clip", "decoder_blocks", "agg_dim"),
        **above_zero("flow_scale"),
        **shares("mask_ratio"),
    }

    @property
    def code_dim(self) -> int:
        """Width of a^agg."""
        return self.agg_dim or self.mats * self.dim


class Motion(NamedTuple):
    """Atomic Actions of a batch: patches (B,T,K,P,P,2) scaled flow, coords (B,T,K,2) in [-1,1], visible (B,T,K), track (B,T,K)."""

    patches: Tensor
    coords: Tensor
    visible: Tensor
    track: Tensor


def crop_patches(flow: Tensor, points: Tensor, patch: int) -> Tensor:
    """Crop P x P flow patches centred at points, with zeros beyond the border (DRP, section 4.2.1). One gather serves the whole batch.

    flow (..., H, W, 2), points (..., K, 2) in pixels -> (..., K, P, P, 2). The centre of an even patch lies between pixels: the patch
    covers [x - P/2, x + P/2) around the rounded position.
    """
    *lead, height, width, _ = flow.shape
    count = points.shape[-2]
    flat = flow.reshape(-1, height * width, 2)  # (N, HW, 2)
    centre = torch.floor(points.reshape(-1, count, 2).float() + 0.5).long()  # (N, K, 2)
    offset = torch.arange(patch, device=flow.device) - patch // 2
    xs = centre[..., 0:1] + offset  # (N, K, P)
    ys = centre[..., 1:2] + offset
    inside = ((ys >= 0) & (ys < height)).unsqueeze(-1) & ((xs >= 0) & (xs < width)).unsqueeze(-2)  # (N, K, P, P)
    index = ys.clamp(0, height - 1).unsqueeze(-1) * width + xs.clamp(0, width - 1).unsqueeze(-2)  # (N, K, P, P)
    picked = torch.gather(flat, 1, index.reshape(flat.shape[0], -1, 1).expand(-1, -1, 2))  # (N, K*P*P, 2)
    picked = picked.reshape(-1, count, patch, patch, 2) * inside.unsqueeze(-1).to(flow.dtype)
    return picked.reshape(*lead, count, patch, patch, 2)


def atomic_actions(flow: Tensor, tracks: Tensor, visible: Tensor, track_id: Tensor, config: DAEConfig) -> Motion:
    """Atomic Actions of a batch in the convention of docs/decisions/0001 (motion that led to each frame).

    flow (B,T,S,S,2) pixels, tracks (B,T,N,2) pixels of S, visible (B,T,N) bool, track_id (B,T,N); the first K slots are used.
    """
    keep = config.keypoints
    if tracks.shape[-2] < keep:
        raise ValueError(f"keypoints={keep} but the data holds {tracks.shape[-2]} tracks per clip")
    points, seen, track = tracks[..., :keep, :], visible[..., :keep], track_id[..., :keep]
    patches = crop_patches(flow, points, config.patch).float()  # (B, T, K, P, P, 2)
    patches = patches.clamp(-config.flow_clip, config.flow_clip) / config.flow_scale
    coords = (points.float() + 0.5) * (2.0 / flow.shape[-2]) - 1.0
    return Motion(patches, coords.clamp(-1.5, 1.5), seen, track)


def random_mask(visible: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """The masked set M: a random share ``ratio`` of the visible (t, k) tokens of each sequence. (B,T,K) bool -> (B,T,K) bool."""
    shape = visible.shape
    noise = torch.rand(shape[0], shape[1] * shape[2], device=visible.device, generator=generator)  # (B, T*K)
    noise = noise.masked_fill(~visible.reshape(shape[0], -1), 2.0)
    rank = noise.argsort(1).argsort(1)  # (B, T*K)
    count = (visible.reshape(shape[0], -1).sum(1, keepdim=True).float() * ratio).round()  # (B, 1)
    return (rank < count).reshape(shape) & visible


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, (N, heads, L, d) -> same. ``mask`` is True where a key may be attended to, at least once in each row.

    Written out, because at these lengths (17 parts, 25-50 positions) the backward pass of torch's fused CPU kernel is ten times slower.
    """
    scores = (q @ k.transpose(-2, -1)).float() * (q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(v.dtype) @ v


class DualAttentionBlock(nn.Module):
    """One block, Eqs. 17-19: intra-frame attention, inter-frame attention, MLP, each with a residual connection."""

    feed_forward = True  # --compile compiles it

    def __init__(self, config: DAEConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        if dim % self.heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={self.heads}")
        self.use_intra, self.use_inter = config.intra, config.inter
        norm = config.attention_norm == "pre"
        self.intra_norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.inter_norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.intra_qkv = nn.Linear(dim, 3 * dim, bias=False)  # Eq. 13
        self.inter_qkv = nn.Linear(dim, 3 * dim, bias=False)  # Eq. 15
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, config.mlp_ratio * dim), nn.GELU(), nn.Linear(config.mlp_ratio * dim, dim))
        self.intra_out: nn.Module = nn.Linear(dim, dim) if self.heads > 1 else nn.Identity()
        self.inter_out: nn.Module = nn.Linear(dim, dim) if self.heads > 1 else nn.Identity()

    def _attend(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d_head)) V over the second-last axis. qkv (N, L, 3d), mask (N, 1, L or 1, L) bool -> (N, L, d)."""
        rows, length, _ = qkv.shape
        q, k, v = qkv.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = masked_attention(q, k, v, mask)
        return out.transpose(1, 2).reshape(rows, length, -1)

    def forward(self, z: Tensor, intra_mask: Tensor, inter_mask: Tensor) -> Tensor:
        """z (B,T,M+K,d); intra_mask (B*T,1,1,M+K) and inter_mask (B*(M+K),1,T,T): True where a key may be attended to."""
        batch, time, parts, dim = z.shape
        if self.use_intra:
            qkv = self.intra_qkv(self.intra_norm(z)).reshape(batch * time, parts, 3 * dim)
            z = z + self.intra_out(self._attend(qkv, intra_mask)).view(batch, time, parts, dim)  # Eq. 17
        if self.use_inter:
            qkv = self.inter_qkv(self.inter_norm(z)).transpose(1, 2).reshape(batch * parts, time, 3 * dim)
            out = self.inter_out(self._attend(qkv, inter_mask))
            z = z + out.view(batch, parts, time, dim).transpose(1, 2)  # Eq. 18
        return z + self.mlp(self.mlp_norm(z))  # Eq. 19

    def step(self, z: Tensor, cache: Tensor, intra_mask: Tensor, inter_mask: Tensor) -> tuple[Tensor, Tensor]:
        """One new position with cached inter-frame keys and values, for acting.

        z (B,1,M+K,d); cache (B*(M+K), t, 2d) of the positions before; inter_mask (B*(M+K),1,1,t+1). Returns the block's output at the
        new position and the cache with this position added.
        """
        batch, _, parts, dim = z.shape
        if self.use_intra:
            qkv = self.intra_qkv(self.intra_norm(z)).reshape(batch, parts, 3 * dim)
            z = z + self.intra_out(self._attend(qkv, intra_mask)).view(batch, 1, parts, dim)
        if self.use_inter:
            qkv = self.inter_qkv(self.inter_norm(z)).transpose(1, 2).reshape(batch * parts, 1, 3 * dim)
            cache = torch.cat([cache, qkv[..., dim:].to(cache.dtype)], 1)
            q, k, v = qkv[..., :dim], cache[..., :dim].to(qkv.dtype), cache[..., dim:].to(qkv.dtype)
            split = [x.reshape(batch * parts, -1, self.heads, dim // self.heads).transpose(1, 2) for x in (q, k, v)]
            out = masked_attention(split[0], split[1], split[2], inter_mask)
            out = self.inter_out(out.transpose(1, 2).reshape(batch * parts, 1, dim))
            z = z + out.view(batch, parts, 1, dim).transpose(1, 2)
        return z + self.mlp(self.mlp_norm(z)), cache


class DAECache(NamedTuple):
    """What acting keeps of the window's positions: their Atomic Actions, to encode them again, and the inter-frame keys and values."""

    motion: Motion  # of the positions so far, (B, t, K, ...)
    blocks: tuple[Tensor, ...]  # per block (B*(M+K), t, 2d)


class DualAttentionEncoder(nn.Module):
    """The DAE: tokens and [MAT] through L dual-attention blocks.

    Invariants (tested): the output at position t does not change when anything after t changes; permuting the parts permutes the
    local outputs and leaves a^agg unchanged; a masked or invisible token has no influence.
    """

    def __init__(self, config: DAEConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_proj = nn.Linear(config.patch * config.patch * 2, dim)
        self.coord_embed = nn.Sequential(nn.Linear(2, dim), nn.GELU(), nn.Linear(dim, dim))
        self.time_embed = nn.Parameter(torch.randn(config.max_length, dim) * 0.02)
        if config.mats < 1:
            raise ValueError(f"mats={config.mats}: at least one [MAT] token is needed, because a^agg consists of them")
        side = math.isqrt(config.mats)
        if config.mats_placed and side**2 != config.mats:
            raise ValueError(f"mats={config.mats} do not form a square grid (mats_placed); use 4, 9 or 16")
        self.mat = nn.Parameter(torch.randn((config.mats, dim) if config.mats > 1 else (dim,)) * 0.02)
        centres = (torch.arange(side) + 0.5) * (2.0 / side) - 1.0
        self.register_buffer("places", torch.cartesian_prod(centres, centres).flip(-1), persistent=False)  # (M, 2): x, y
        self.blocks = nn.ModuleList(DualAttentionBlock(config) for _ in range(config.blocks))
        self.project: nn.Module = nn.Linear(config.mats * dim, config.agg_dim) if config.agg_dim else nn.Identity()
        self.out_norm: nn.Module = nn.LayerNorm(dim) if config.attention_norm == "pre" else nn.Identity()

    def tokens(self, motion: Motion, start: int = 0) -> Tensor:
        """tau = PatchProj(u) + CoordEmb(p) + TempEmb(t), with [MAT] in front: (B, T, M+K, d)."""
        batch, time = motion.visible.shape[:2]
        config = self.config
        if start + time > config.max_length:
            raise ValueError(f"a sequence of {start + time} positions is longer than dae.max_length={config.max_length}")
        tau = self.patch_proj(motion.patches.flatten(-3))
        if config.coord:
            tau = tau + self.coord_embed(motion.coords)
        when = self.time_embed[start : start + time]  # (T, d)
        if config.temporal:
            tau = tau + when[None, :, None]
        mat = self.mat + self.coord_embed(self.places) if config.mats_placed else self.mat
        mat = mat.expand(batch, time, config.mats, -1)
        if config.temporal and config.mat_temporal:
            mat = mat + when[None, :, None]
        return torch.cat([mat.to(tau.dtype), tau], 2)

    def masks(self, visible: Tensor, track: Tensor, episode: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
        """Attention masks; True where a token may be a key. visible, track (B,T,K); episode (B,T) -> (B*T,1,1,M+K), (B*(M+K),1,T,T)."""
        batch, time, parts = visible.shape
        rows = self.config.mats + parts
        always = torch.ones(batch, time, self.config.mats, dtype=torch.bool, device=visible.device)
        keys = torch.cat([always, visible], 2)  # (B, T, M+K); [MAT] is always a key
        intra = keys.reshape(batch * time, 1, 1, rows)
        same = (episode[:, :, None] == episode[:, None, :])[:, None]  # (B, 1, T, T)
        eye = torch.eye(time, dtype=torch.bool, device=visible.device)
        allowed = same.tril() if causal else same
        per_track = track.transpose(1, 2)  # (B, K, T)
        part = allowed & visible.transpose(1, 2).unsqueeze(2) & (per_track.unsqueeze(3) == per_track.unsqueeze(2))
        mat = allowed if self.config.mat_inter else eye.expand(batch, 1, time, time)
        # An invisible query attends only to itself, so no row is empty; its output is not used.
        inter = torch.cat([mat.expand(-1, self.config.mats, -1, -1), part | eye], 1)  # (B, M+K, T, T)
        return intra, inter.reshape(batch * rows, 1, time, time)

    def forward(self, motion: Motion, episode: Tensor) -> tuple[Tensor, Tensor]:
        """a^agg (B,T,code_dim) and local motion representations (B,T,K,d).

        ``episode`` (B,T) integers: positions of different episodes never attend to each other (cumulative sum of is_first).
        """
        z = self.tokens(motion)
        intra, inter = self.masks(motion.visible, motion.track, episode)
        for block in self.blocks:
            z = block(z, intra, inter)
        agg, local = self.split(self.out_norm(z))
        return self.project(agg), local

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Split rows (B,T,M+K,d) into concatenated [MAT] (B,T,M*d) and local representations (B,T,K,d)."""
        return z[:, :, : self.config.mats].flatten(2), z[:, :, self.config.mats :]

    # Acting ---------------------------------------------------------------------------------------------------------------

    def start(self, batch: int, device: torch.device) -> DAECache:
        """An empty window."""
        config = self.config
        k, p = config.keypoints, config.patch
        motion = Motion(
            torch.zeros(batch, 0, k, p, p, 2, device=device),
            torch.zeros(batch, 0, k, 2, device=device),
            torch.zeros(batch, 0, k, dtype=torch.bool, device=device),
            torch.zeros(batch, 0, k, dtype=torch.int32, device=device),
        )
        return DAECache(
            motion, tuple(torch.zeros(batch * (config.mats + k), 0, 2 * config.dim, device=device) for _ in self.blocks)
        )

    def step(self, cache: DAECache, motion: Motion, window: int) -> tuple[Tensor, DAECache]:
        """a^agg (B, code_dim) of one new position; motion has T=1. All positions of a window belong to one episode.

        When the window is full (``window`` positions, the training length), its newer half is encoded again from position 0 and the
        window continues after it. So the temporal embedding never leaves the positions of training.
        """
        config = self.config
        time = cache.motion.visible.shape[1]
        if time >= window:
            recent = Motion(*(x[:, time - window // 2 :] for x in cache.motion))
            cache = self._encode_window(recent)
            time = window // 2
        joined = Motion(*(torch.cat([old, new], 1) for old, new in zip(cache.motion, motion, strict=True)))
        batch, _, parts = motion.visible.shape
        rows = config.mats + parts
        always = torch.ones(batch, 1, config.mats, dtype=torch.bool, device=motion.visible.device)
        intra = torch.cat([always, motion.visible], 2).reshape(batch, 1, 1, rows)
        seen = joined.visible & (joined.track == motion.track)  # (B, t+1, K)
        seen[:, -1] = True
        mat = torch.ones(batch, time + 1, config.mats, dtype=torch.bool, device=seen.device)
        if not config.mat_inter:
            mat[:, :-1] = False
        inter = torch.cat([mat, seen], 2).transpose(1, 2).reshape(batch * rows, 1, 1, time + 1)
        z = self.tokens(motion, start=time)
        blocks = []
        for block, old in zip(self.blocks, cache.blocks, strict=True):
            assert isinstance(block, DualAttentionBlock)
            z, new = block.step(z, old, intra, inter)
            blocks.append(new)
        return self.project(self.split(self.out_norm(z))[0][:, 0]), DAECache(joined, tuple(blocks))

    def _encode_window(self, motion: Motion) -> DAECache:
        """Keys and values of a whole window at once."""
        batch, time, parts = motion.visible.shape
        rows = self.config.mats + parts
        episode = torch.zeros(batch, time, dtype=torch.long, device=motion.visible.device)
        intra, inter = self.masks(motion.visible, motion.track, episode)
        z = self.tokens(motion)
        blocks = []
        for block in self.blocks:
            assert isinstance(block, DualAttentionBlock)
            y = z
            if block.use_intra:
                qkv = block.intra_qkv(block.intra_norm(y)).reshape(batch * time, rows, -1)
                y = y + block.intra_out(block._attend(qkv, intra)).view(batch, time, rows, -1)
            kv = block.inter_qkv(block.inter_norm(y))[..., self.config.dim :]
            blocks.append(kv.transpose(1, 2).reshape(batch * rows, time, -1).float())
            z = block(z, intra, inter)
        return DAECache(motion, tuple(blocks))


class MotionDecoder(nn.Module):
    """The light decoder of the masked autoencoding: patches from mask tokens with their coordinate and temporal embeddings."""

    def __init__(self, config: DAEConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_token = nn.Parameter(torch.randn(config.dim) * 0.02)
        self.embed = nn.Linear(config.dim, config.dim)
        self.blocks = nn.ModuleList(DualAttentionBlock(config) for _ in range(config.decoder_blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.patch * config.patch * 2)

    def forward(
        self, encoder: DualAttentionEncoder, agg: Tensor, local: Tensor, motion: Motion, masked: Tensor, episode: Tensor
    ) -> Tensor:
        """Reconstructed patches (B,T,K,P,P,2) in scaled flow, from encodings without the ``masked`` (B,T,K) tokens.

        ``agg`` (B,T,M*d) are the encoder's [MAT] rows before projection, ``local`` (B,T,K,d) its other rows. ``motion`` gives the
        coordinates and the visibility: an invisible token is not a key here either.
        """
        batch, time, parts = masked.shape
        config = self.config
        hidden: Tensor = self.mask_token
        if config.coord:
            hidden = hidden + encoder.coord_embed(motion.coords)
        if config.temporal:
            hidden = hidden + encoder.time_embed[:time][None, :, None]
        hidden = hidden.expand(batch, time, parts, config.dim).to(local.dtype)
        z = torch.where(masked.unsqueeze(-1), hidden, self.embed(local))  # (B, T, K, d)
        z = torch.cat([self.embed(agg.unflatten(-1, (config.mats, config.dim))).to(z.dtype), z], 2)  # (B, T, M+K, d)
        intra, inter = encoder.masks(motion.visible, motion.track, episode, causal=config.decoder_causal)
        for block in self.blocks:
            z = block(z, intra, inter)
        out = self.out(self.norm(z[:, :, config.mats :]))  # (B, T, K, 2*P*P)
        return out.view(batch, time, parts, config.patch, config.patch, 2)


class MaskedMotion(nn.Module):
    """The DAE and its reconstruction decoder: a^agg of the full motion and the masked autoencoding loss (Eq. 5) in one batched pass."""

    def __init__(self, config: DAEConfig, *, from_code: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = DualAttentionEncoder(config)
        self.decoder = MotionDecoder(config)
        if config.flow_norm:
            self.rms = RunningRMS()
        if from_code:
            width = 2 * config.dim
            out = nn.Linear(width, config.patch * config.patch * 2)
            self.code_decoder = nn.Sequential(nn.Linear(config.code_dim + config.dim, width), nn.GELU(), out)

    def scaled(self, motion: Motion) -> Motion:
        """The Atomic Actions as the encoder takes them: with `flow_norm` over their running root mean square."""
        return motion._replace(patches=self.rms(motion.patches, motion.visible)) if self.config.flow_norm else motion

    def loss_from_code(self, agg: Tensor, motion: Motion) -> Tensor:
        """Squared error (as Eq. 5) of all visible patches, reconstructed from a^agg (B,T,code_dim) and coordinates. Not in the paper."""
        where = self.encoder.coord_embed(motion.coords)  # (B, T, K, d)
        code = agg.unsqueeze(2).expand(*where.shape[:-1], -1).to(where.dtype)  # (B, T, K, code_dim)
        rebuilt = self.code_decoder(torch.cat([code, where], -1)).view(motion.patches.shape)
        return masked_loss(rebuilt, motion.patches, motion.visible)

    def encode(self, motion: Motion, episode: Tensor) -> tuple[Tensor, Tensor]:
        """a^agg (B,T,code_dim) and local representations (B,T,K,d), with nothing masked."""
        agg, local = self.encoder(motion, episode)
        return agg, local

    def reconstruct(self, motion: Motion, masked: Tensor, episode: Tensor) -> Tensor:
        """Patches reconstructed without the ``masked`` tokens in the encoder's input: (B,T,K,P,P,2)."""
        hidden = motion._replace(visible=motion.visible & ~masked)
        z_mat, local = self._encode_raw(hidden, episode)
        return self.decoder(self.encoder, z_mat, local, motion, masked, episode)

    def _encode_raw(self, motion: Motion, episode: Tensor) -> tuple[Tensor, Tensor]:
        """[MAT] rows (B,T,M*d) before projection and local representations (B,T,K,d)."""
        encoder = self.encoder
        z = encoder.tokens(motion)
        intra, inter = encoder.masks(motion.visible, motion.track, episode)
        for block in encoder.blocks:
            z = block(z, intra, inter)
        return encoder.split(encoder.out_norm(z))

    def forward(self, motion: Motion, episode: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """a^agg (B,T,code_dim) of the unmasked motion, local representations (B,T,K,d), and the masked autoencoding loss (scalar, Eq. 5).

        The masked and the unmasked pass are one batch of 2B in the encoder.
        """
        masked = random_mask(motion.visible, self.config.mask_ratio, generator)  # (B, T, K)
        twice = Motion(  # (2B, T, K, ...)
            torch.cat([motion.patches] * 2),
            torch.cat([motion.coords] * 2),
            torch.cat([motion.visible, motion.visible & ~masked]),
            torch.cat([motion.track] * 2),
        )
        z_mat, local = self._encode_raw(twice, torch.cat([episode] * 2))  # (2B, T, M*d), (2B, T, K, d)
        full_mat, hidden_mat = z_mat.chunk(2)
        full_local, hidden_local = local.chunk(2)
        rebuilt = self.decoder(self.encoder, hidden_mat, hidden_local, motion, masked, episode)  # (B, T, K, P, P, 2)
        loss = masked_loss(rebuilt, motion.patches, masked)
        return self.encoder.project(full_mat), full_local, loss


def masked_loss(rebuilt: Tensor, patches: Tensor, masked: Tensor) -> Tensor:
    """Eq. 5: squared error of a whole patch, mean over the masked set (B,T,K). Zero if nothing is masked."""
    error = (rebuilt.float() - patches.float()).square().flatten(-3).sum(-1)  # (B, T, K)
    weight = masked.to(error.dtype)
    return (error * weight).sum() / ranks.weighed(weight)
