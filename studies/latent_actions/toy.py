"""A toy for latent actions: a square that a 2-d action moves, before a texture that moves independently of the action.

    python studies/latent_actions/toy.py 2 0            # latent actions of 2 numbers, seed 0; with and without the mask

The error of the whole picture makes z code the texture. The error at the square's pixels makes it code the square. Rows go to
studies/latent_actions/toy.jsonl; those that are there are not run again. A row has the shares of the variance of the action and of the
texture's shift that ridge regression from z does not explain: 0 means that all is known, 1 nothing. Fitted on four fifths of 10,000 new
steps, tested on the rest. 2,500 updates of 128 steps, two to three CPU minutes a row.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmotion.compute import Compute
from localmotion.config import RunConfig, update
from localmotion.methods.masklam import MaskLAM
from localmotion.training.update import Updater

CPU = Compute(torch.device("cpu"), False, 1, "")
SIDE, PROBED = 16, 10_000
LOSSES = {"masked": 0.0, "everywhere": 1.0}
"""Weight of the background in the reconstruction: 1 is the loss of LAPO."""


def texture(g: torch.Generator) -> Tensor:
    """A picture (3, 32, 32) in [-0.5, 0.5] that repeats in both directions: six waves a colour."""
    line = torch.arange(32) * (2 * math.pi / 32)
    out = torch.zeros(3, 32, 32)
    for colour in range(3):
        for _ in range(6):
            fx, fy = torch.randint(-3, 4, (2,), generator=g).tolist()
            out[colour] += torch.sin(fx * line[None, :] + fy * line[:, None] + 2 * math.pi * torch.rand((), generator=g))
    return (out / 2).clamp(-1, 1) * 0.5


def shown(ground: Tensor, offset: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 16, 16) of the texture at offsets (N, 2) with a square of side 5 at places (N, 2), and masks (N, 16, 16)."""
    at = torch.arange(SIDE)
    y, x = offset[:, 1, None] + at, offset[:, 0, None] + at  # (N, 16)
    y0, x0 = y.floor().long(), x.floor().long()
    fy, fx = (y - y0)[:, None, :, None], (x - x0)[:, None, None, :]

    def pixels(dy: int, dx: int) -> Tensor:
        return ground[:, ((y0 + dy) % 32)[:, :, None], ((x0 + dx) % 32)[:, None, :]].movedim(0, 1)

    back = (1 - fy) * ((1 - fx) * pixels(0, 0) + fx * pixels(0, 1)) + fy * ((1 - fx) * pixels(1, 0) + fx * pixels(1, 1))
    covered = [
        (torch.minimum(at + 1.0, p[:, None] + 5) - torch.maximum(at * 1.0, p[:, None])).clamp(0, 1) for p in place.unbind(1)
    ]
    share = covered[1][:, :, None] * covered[0][:, None, :]  # (N, 16, 16)
    colour = torch.tensor([0.25, -0.25, 0.25])[:, None, None]
    return share[:, None] * colour + (1 - share[:, None]) * back, share > 0


def steps(ground: Tensor, count: int, g: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch of steps behind two still frames, the action (N, 2) and the shift of the texture (N, 2), both in [-1, 1]."""
    action, shift = (2 * torch.rand(count, 2, generator=g) - 1 for _ in range(2))
    place, offset = 4 + 3 * torch.rand(count, 2, generator=g), 2 * torch.rand(count, 2, generator=g)
    now, later = shown(ground, offset, place), shown(ground, offset + 4 * shift, place + 3.5 * action)
    image = torch.stack([now[0]] * 3 + [later[0]], 1)
    image = ((image + 0.5) * 255).round().byte().permute(0, 1, 3, 4, 2)
    first = torch.zeros(count, 4, dtype=torch.bool)
    first[:, 0] = True
    return {"image": image, "mask": torch.stack([now[1]] * 3 + [later[1]], 1), "is_first": first}, action, shift


def unexplained(code: Tensor, target: Tensor) -> float:
    """Error of ridge regression on the last fifth of the rows, as a share of the variance: 0 all is known, 1 nothing."""
    fit = len(code) * 4 // 5
    x = torch.cat([code, torch.ones(len(code), 1)], 1).double()
    y = target.double()
    weights = torch.linalg.solve(x[:fit].T @ x[:fit] + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype), x[:fit].T @ y[:fit])
    return float((x[fit:] @ weights - y[fit:]).square().mean() / y[fit:].var(0).mean())


def probed(floor: float, *, latent: int = 4, seed: int = 0, updates: int = 1000, batch: int = 64) -> tuple[float, float]:
    """Unexplained shares of the action and of the texture's shift after learning with this weight of the background."""
    g = torch.Generator().manual_seed(seed)
    ground = texture(g)
    model: dict[str, Any] = {"latent": latent, "widths": (16, 32), "forward_widths": (16, 32), "offset": 1, "floor": floor}
    run = RunConfig("masklam", "pretrain", update(MaskLAM.Config(), {**model, "mask_channel": False}))
    run = update(run, {"pretrain": {"updates": updates, "lr": 1e-3, "lr_decay": 1.0}, "optim": {"eps": 1e-8}})
    torch.manual_seed(seed)
    method = MaskLAM(run.model, image_size=SIDE, action_dim=None)
    updater = Updater(method, run, CPU)
    for _ in range(updates):
        updater.learn(steps(ground, batch, g)[0])
    fresh, action, shift = steps(ground, PROBED, g)
    code = torch.cat(
        [method.eval().motion_code({k: x[part] for k, x in fresh.items()})[:, 3] for part in torch.arange(PROBED).split(1000)]
    )
    return unexplained(code, action), unexplained(code, shift)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("latent", type=int)
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = Path(__file__).with_suffix(".jsonl")
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name, floor in LOSSES.items():
        row: dict[str, Any] = {"latent": args.latent, "seed": args.seed, "loss": name}
        if any(row.items() <= old.items() for old in known):
            continue
        began = time.process_time()
        action, shift = probed(floor, latent=args.latent, seed=args.seed, updates=2500, batch=128)
        row |= {"action": round(action, 4), "texture": round(shift, 4), "cpu_seconds": round(time.process_time() - began)}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
