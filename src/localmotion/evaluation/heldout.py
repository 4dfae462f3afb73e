"""Held-out figures of a pre-trained model: masked reconstruction and open-loop prediction, and trivial predictors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmotion.compute import Compute
from localmotion.evaluation.metrics import psnr, ssim
from localmotion.methods.base import Batch, Method, images
from localmotion.models.dae import Motion, masked_loss
from localmotion.video.sample import WindowSampler

CONTEXT_FRAMES = 5
WALKED = torch.linspace(-3, 3, 7)
"""Values of one number of a code in the picture of a traversal. A beta-VAE's codes are near N(0, I)."""


def trivial_reconstructions(motion: Motion, masked: Tensor) -> dict[str, Tensor]:
    """Three predictors without a model, each (B,T,K,P,P,2) in scaled flow.

    zero: no motion.
    frame_mean: the mean of the visible, unmasked patches of the same frame, or zero if there is none.
    nearest_time: the patch of the same track at the nearest time at which it is visible and unmasked; of two equally
    near times the earlier one; frame_mean if there is none.
    """
    patches = motion.patches.float()  # (B, T, K, P, P, 2)
    seen = motion.visible & ~masked  # (B, T, K)
    weight = seen.float()[..., None, None, None]  # (B, T, K, 1, 1, 1)
    mean = (patches * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1.0)  # (B, T, 1, P, P, 2)
    mean = mean.expand_as(patches)  # (B, T, K, P, P, 2)
    time = torch.arange(patches.shape[1], device=patches.device)
    distance = (time[:, None] - time[None, :]).abs() * 2 + (time[None, :] > time[:, None])  # (T, T'): earlier wins a tie
    track = motion.track.transpose(1, 2)  # (B, K, T)
    usable = seen.transpose(1, 2)[:, :, None] & (track[..., None] == track[:, :, None])  # (B, K, T, T')
    cost = torch.where(usable, distance, torch.iinfo(torch.int64).max)  # (B, K, T, T')
    found, index = cost.min(-1)  # (B, K, T)
    by_part = patches.transpose(1, 2)  # (B, K, T, P, P, 2)
    picked = torch.gather(by_part, 2, index[..., None, None, None].expand_as(by_part))  # (B, K, T, P, P, 2)
    picked = picked.transpose(1, 2)  # (B, T, K, P, P, 2)
    has = (found < torch.iinfo(torch.int64).max).transpose(1, 2)[..., None, None, None]  # (B, T, K, 1, 1, 1)
    return {"zero": torch.zeros_like(patches), "frame_mean": mean, "nearest_time": torch.where(has, picked, mean)}


@torch.no_grad()
def reconstruction_errors(
    method: Method, batch: Batch, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """The error of DRP's Eq. 5 on one batch, for the model and the trivial predictors, and example patches.

    Returns (errors, examples), or None if the method has no masked reconstruction. Errors are scalars by name, means
    over "count" masked tokens. Examples are "truth" and "reconstruction", (M,P,P,2) in scaled flow.
    """
    found = method.masked_reconstruction(batch, generator)
    if found is None:
        return None
    motion, masked, rebuilt = found
    errors = {"model": masked_loss(rebuilt, motion.patches, masked), "count": masked.sum()}
    for name, guess in trivial_reconstructions(motion, masked).items():
        errors[name] = masked_loss(guess, motion.patches, masked)
    energy = motion.patches.square().flatten(-3).sum(-1).masked_fill(~masked, -1.0).flatten()  # (B T K,)
    best = energy.topk(min(64, energy.numel())).indices[::4]  # (M,), every fourth of the patches with most motion
    best = best[energy[best] > 0]
    return errors, {"truth": motion.patches.flatten(0, 2)[best], "reconstruction": rebuilt.float().flatten(0, 2)[best]}


def predicts(method: type[Method], stage: str) -> bool:
    """Whether the result of a stage predicts video: the method overrides `Method.open_loop`, and `Method.predicts_after` allows it."""
    after = method.predicts_after
    return method.open_loop is not Method.open_loop and (after is None or stage in after)


@torch.no_grad()
def open_loop_errors(method: Method, batch: Batch, context: int = CONTEXT_FRAMES) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns (scores, pictures) of the method's open-loop predictions and of a copy of the last observed frame.

    Scores are PSNR and SSIM, (T - context,): one number for each frame after the context. Pictures are (B,T,3,S,S) in
    [0, 1].
    """
    shape = batch["image"].shape
    truth = images(batch).view(shape[0], shape[1], 3, *shape[2:4]) + 0.5  # (B, T, 3, S, S)
    guesses = {name: (x.float() + 0.5).clamp(0, 1) for name, x in method.open_loop(batch, context).items()}
    guesses["last_frame"] = truth[:, context - 1 : context].expand_as(truth)  # (B, T, 3, S, S)
    scores: dict[str, Tensor] = {}
    for name, guess in guesses.items():
        # The copy of a still clip has no error and infinite PSNR. At most 60 dB count, so that a mean stays finite.
        scores[f"psnr/{name}"] = psnr(guess[:, context:], truth[:, context:]).clamp(max=60.0).mean(0)  # (T - context,)
        scores[f"ssim/{name}"] = ssim(guess[:, context:], truth[:, context:]).mean(0)  # (T - context,)
    return scores, {"truth": truth, **guesses}


@torch.no_grad()
def traversal(method: Method, batch: Batch) -> dict[str, NDArray[Any]] | None:
    """Arrays of a traversal of the first sequence's code: frame (S,S,3) and pictures (D,K,S,S,3) uint8, values (K,).

    None for a method without a code to traverse.
    """
    found = method.traversal({key: value[:1] for key, value in batch.items()}, WALKED.to(batch["image"].device))
    if found is None:
        return None
    pictures = (found[0].float() + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 1, 3, 4, 2)  # (D, K, S, S, 3)
    return {"frame": batch["image"][0, 0].cpu().numpy(), "pictures": pictures.cpu().numpy(), "values": WALKED.numpy()}


def measure_heldout(
    method: Method, sampler: WindowSampler, batches: int, compute: Compute, media: Path | None, stage: str
) -> dict[str, Any]:
    """Measure masked reconstruction against trivial predictors, PSNR and SSIM of open-loop prediction, and `Method.heldout`.

    Every call uses the same clips and masks. The random state of training does not change, so measuring does not change
    the run. ``media``: folder for examples, or None.
    """
    with compute.own_randomness():
        torch.manual_seed(1234)
        return _measure_heldout(method, sampler, batches, compute, media, stage)


def _measure_heldout(
    method: Method, sampler: WindowSampler, batches: int, compute: Compute, media: Path | None, stage: str
) -> dict[str, Any]:
    generator = torch.Generator(device=compute.device).manual_seed(1234)
    method.eval()
    sums: dict[str, float] = {}
    weight = 0.0
    scores: dict[str, list[Tensor]] = {}
    figures: dict[str, list[float]] = {}
    for index in range(batches):
        batch = compute.to_device(sampler.batch(index))
        with compute.autocast():
            found = reconstruction_errors(method, batch, generator)
            errors, pictures = open_loop_errors(method, batch) if predicts(type(method), stage) else ({}, {})
            for name, value in method.heldout(stage, batch).items():
                figures.setdefault(name, []).append(float(value))
        for name, value in errors.items():
            scores.setdefault(name, []).append(value)
        if found:
            count = float(found[0].pop("count"))
            weight += count
            for name, value in found[0].items():
                sums[name] = sums.get(name, 0.0) + float(value) * count
        if index == 0 and media:
            keep = {k: (v[:6] * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy() for k, v in pictures.items()}
            rolled = [k for k in keep if k not in ("truth", "last_frame")]
            if rolled:
                arrays = {"truth": keep["truth"], "prediction": keep[rolled[0]], "context": np.array(CONTEXT_FRAMES)}
                arrays["predictor"] = np.array(rolled[0])
                if len(rolled) > 1:
                    arrays[f"prediction_{rolled[1]}"] = keep[rolled[1]]
                np.savez_compressed(media / "openloop_heldout.npz", allow_pickle=False, **arrays)
            with compute.autocast():
                walked = traversal(method, batch)
            if walked:
                np.savez_compressed(media / "traversal_heldout.npz", allow_pickle=False, **walked)
            if found:
                truth, rebuilt = (x.cpu().numpy() for x in found[1].values())
                np.savez_compressed(
                    media / "masked_heldout.npz", truth=truth, masked=np.zeros_like(truth), reconstruction=rebuilt
                )
    method.train()
    result: dict[str, Any] = {}
    if weight:
        means = {name: value / weight for name, value in sums.items()}
        trivial = {name: value for name, value in means.items() if name != "model"}
        result = {f"masked/{name}": value for name, value in means.items()}
        result["masked/ratio_best"] = means["model"] / min(trivial.values())
        result |= {f"masked/ratio_{name}": means["model"] / value for name, value in trivial.items()}
    for name, values in scores.items():
        horizon = torch.stack(values).mean(0)
        result[name] = float(horizon.mean())
        result[f"{name}_horizon"] = [round(x, 4) for x in horizon.tolist()]
    return result | {f"figure/{name}": float(np.mean(values)) for name, values in figures.items()}
