"""The learning curve of one run, for its model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from localmotion.evaluation.statistics import Curve
from localmotion.report import plots
from localmotion.runs.read import read_run


def learning_curve(path: Path) -> bytes:
    """SVG of a run's evaluations, or of its losses if it has no evaluation. Empty if it has neither."""
    run = read_run(path)
    percent = any("success_rate" in line for line in run.lines.get("eval", ()))
    steps, values = run.series("eval", "success_rate" if percent else "return_mean", x="update" if run.offline else "env_step")
    good = np.isfinite(values)
    if good.any():
        return plots.learning_curves(
            [plots.CurveGroup(run.method, (Curve(steps[good], values[good]),))],
            title=run.env,
            xlabel="updates" if run.offline else "env steps",
            ylabel="success rate" if percent else "episode return",
            percent=percent,
        )
    losses = [key for kind in ("pretrain", "train") for key in run.keys(kind) if key.startswith("loss/")]
    series = {
        key.removeprefix("loss/"): [(run.method, xs[np.isfinite(ys)], ys[np.isfinite(ys)])]
        for key in dict.fromkeys(losses)
        for xs, ys in [run.series("pretrain" if run.lines.get("pretrain") else "train", key, x="update")]
        if np.isfinite(ys).any()
    }
    return plots.loss_curves(dict(list(series.items())[:6])) if series else b""
