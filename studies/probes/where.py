"""Where in DRP's encoder motion is lost: the probe's R^2 of the simulator's velocities, from codes along the way.

    python studies/probes/where.py RUN DATA [DATA ...] --out where.json

RUN: a DRP pre-training run; DATA: collections (`localmotion collect --store`). Codes: flow on grids; the K patches' mean flow placed on a
grid by their points (what the keypoints see at all); the local tokens' mean, and the tokens placed on a 4x4 grid; a^agg, the [MAT] row.
Each of the trained encoder and of the same one untrained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from localmotion import methods
from localmotion.evaluation.probes import _Data, grid_flow, mlp, ridge
from localmotion.methods.base import Batch
from localmotion.methods.drp import DRP
from localmotion.models.dae import Motion
from localmotion.runs.load import load_run


def on_grid(motion: Motion, x: Tensor, cells: int) -> Tensor:
    """Tokens (B,T,K,d) averaged with Gaussian weights around the cells of a grid: (B,T,cells^2 d)."""
    centre = torch.linspace(-1 + 1 / cells, 1 - 1 / cells, cells)
    across, down = (torch.exp(-0.5 * ((motion.coords[..., i : i + 1] - centre) * cells) ** 2) for i in (0, 1))
    weight = (down[..., :, None] * across[..., None, :]).flatten(-2) * motion.visible[..., None]  # (B,T,K,G)
    weight = weight / (weight.sum(2, keepdim=True) + 0.1)
    return torch.einsum("btkg,btkd->btgd", weight, x).flatten(2)


def mean_of(motion: Motion, x: Tensor) -> Tensor:
    """Mean over the visible parts."""
    return (x * motion.visible[..., None]).sum(2) / motion.visible.sum(2, keepdim=True).clamp(min=1)


def codes_of(model: DRP) -> dict[str, Callable[[Batch], Tensor]]:
    """Codes of one encoder."""

    def encoded(batch: Batch) -> tuple[Motion, Tensor, Tensor]:
        motion = model._atomic_actions(batch)
        return motion, *model.motion.encode(motion, batch["is_first"].cumsum(1))  # type: ignore[union-attr, operator]

    def local_mean(batch: Batch) -> Tensor:
        motion, _, local = encoded(batch)
        return mean_of(motion, local)

    def local_grid(batch: Batch) -> Tensor:
        motion, _, local = encoded(batch)
        return on_grid(motion, local, 4)

    return {"a^agg": lambda batch: encoded(batch)[1], "local tokens, mean": local_mean, "local tokens, 4x4 grid": local_grid}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run, trained, _ = load_run(args.run, device="cpu", threads=1)
    torch.manual_seed(0)
    fresh = methods.get(run.method)(run.model, image_size=trained.image_size, action_dim=None).eval()
    assert isinstance(trained, DRP)
    assert isinstance(fresh, DRP)

    def patches(batch: Batch) -> Tensor:
        motion = trained._atomic_actions(batch)
        return on_grid(motion, motion.patches.mean((-3, -2)), 8)

    codes: dict[str, Callable[[Batch], Tensor]] = {
        "flow, 8x8 grid": grid_flow,
        "flow, 4x4 grid": lambda batch: grid_flow(batch, 4),
        "patches' mean flow, 8x8 grid": patches,
        **{f"{name}, trained": code for name, code in codes_of(trained).items()},
        **{f"{name}, untrained": code for name, code in codes_of(fresh).items()},
    }
    rows = []
    for path in args.data:
        data = _Data(path, 25)
        for name, code in codes.items():
            with torch.inference_mode():
                x = data.code(code)
            y = data.episodes.targets["velocities"]
            row = {"data": data.episodes.name, "code": name, "width": x.shape[1]}
            rows.append({**row, "ridge": round(ridge(x, y, data.episodes), 4), "mlp": round(mlp(x, y, data.episodes), 4)})
            print(rows[-1], flush=True)
    args.out.write_text(json.dumps({"run": run.label or args.run.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
