"""How good are PVDR's plans on real robot clips: one sample, the best of 16, the mean of the prior, a copy of the last frame.

    localmotion extract videos/robot --out robots --size 32 --percept-size 64 --frame-stride 4 --mask motion
    size="--set model.tokenizer.widths=[24,64] --set model.tokenizer.codes=512"
    loss="--mse_weight 0.5 --mae_weight 1"
    localmotion tokenize --method pvdr --data robots --preset tiny --run tokens --updates 3000 --quantise_from 500 $size $loss
    localmotion pretrain --method pvdr --checkpoint tokens --data robots --preset tiny --run plans --updates 2000 --length 6 $size
    python studies/pvdr/robots.py plans robots --strips robots.png

All figures are PSNR in dB of held-out windows, one a clip, the mean over windows, by frames ahead. "Best of 16" is the sample whose
whole plan is nearest to what followed: it is chosen with the truth. "Tokens" are the true frames, coded and decoded: no plan can be better
by much. "Posterior" has seen what followed. "Last frame, coded" is the last frame's tokens, decoded: a plan that expects no motion.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localmotion.methods.base import images
from localmotion.methods.pvdr import PVDR
from localmotion.models.plan_cvae import sample
from localmotion.report.strips import prediction_strips
from localmotion.runs.load import load_run
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

SAMPLES = 16


def quality(found: Tensor, truth: Tensor) -> Tensor:
    """PSNR (..., n) of pictures (..., n, 3, S, S) in [-0.5, 0.5], at most 60 dB."""
    error = (found.clamp(-0.5, 0.5) - truth).square().flatten(-3).mean(-1)
    return (-10 * error.clamp(min=1e-6).log10()).double()


@torch.no_grad()
def measured(method: PVDR, image: Tensor) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """PSNR by frames ahead, and pictures (B, m + n, 3, S, S), of windows (B, m + n, S, S, 3)."""
    before, ahead = method.before, method.ahead
    tokens, true = method.tokens(image), images({"image": image}).unflatten(0, image.shape[:2])
    past, future = tokens.split([before, ahead], 1)
    mean, log_variance = method.prior(past)[:2]

    def drawn(z: Tensor) -> Tensor:
        return method.drawn(method.plans(past, z.unsqueeze(1)).squeeze(1))  # (B, n, 3, S, S)

    samples = torch.stack([drawn(sample(mean, log_variance)) for _ in range(SAMPLES)])  # (K, B, n, 3, S, S)
    truth = true[:, before:]
    best = (samples - truth).square().flatten(2).mean(-1).argmin(0)  # (B,)
    found = {
        "tokens": method.drawn(future),
        "posterior": drawn(method.posterior(tokens)[0]),
        "best of 16": samples[best, torch.arange(len(best))],
        "one sample": samples[0],
        "mean of the prior": drawn(mean),
        "last frame, coded": method.drawn(past[:, -1:]).expand_as(truth),
        "last frame, copied": true[:, before - 1 : before].expand_as(truth),
    }
    scores = {name: quality(pictures, truth).mean(0).tolist() for name, pictures in found.items()}
    scores["one sample"] = quality(samples, truth).mean((0, 1)).tolist()  # the mean over 16: with less noise
    moved = (truth[:, -1] - true[:, before - 1]).abs().flatten(1).mean(1)
    few = moved.argsort(descending=True)[:2]  # the windows in which most changes
    shown = {"truth": true, **{name: torch.cat([true[:, :before], x], 1) for name, x in found.items() if name != "tokens"}}
    return scores, {name: x[few] for name, x in shown.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--strips", type=Path, help="PNG of two windows with much change")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run, method, _ = load_run(args.run, device="cpu", threads=1)
    assert isinstance(method, PVDR)
    frames = method.before + method.ahead
    sampler = WindowSampler(ClipStore(args.store), frames, 64, 0, split="heldout", prefetch=False)
    first = np.array([(int(sampler.store.lengths[clip]) - frames) // 2 for clip in sampler.clips])  # the middle of each clip
    scores, pictures = measured(method.eval(), sampler.windows(np.array(sampler.clips), first)["image"])
    row = {
        "seed": run.seed,
        "windows": len(first),
        "psnr": {name: [round(x, 2) for x in values] for name, values in scores.items()},
    }
    print(json.dumps(row))
    if args.strips:
        shown = {name: x.add(0.5).clamp(0, 1).mul(255).round().byte().movedim(2, -1).numpy() for name, x in pictures.items()}
        args.strips.write_bytes(prediction_strips(shown.pop("truth"), shown, context=method.before, errors=False))


if __name__ == "__main__":
    main()
