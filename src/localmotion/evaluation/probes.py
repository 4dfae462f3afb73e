"""Probes: how well a method's motion code predicts the true motion of a body (docs/studies.md).

The probed network is frozen. Ridge regression (linear) and a small MLP (nonlinear) predict up to six targets from the code of
each frame:

    links         velocities of the agent's links in the picture, pixels per agent step
    velocities    the simulator's velocities
    actions       the action that led to the frame
    background    the motion of a moving background, pixels per agent step: a nuisance, which a code of the agent leaves out
    colours       red, green and blue of the materials in the frame
    pose          places and angles of the links in the frame, beside colours: both are what a single frame shows

Training and test use different episodes, or different collections. The score is R^2 on the test episodes, averaged over
the dimensions of the target that vary. 1 is a perfect prediction; 0 is no better than the mean of the target. For actions
the normalized squared error (`nmse`) stands beside it: 0 is a perfect prediction, 1 says nothing.

Of colours and pose, the mutual information gap (`mig`) says whether single numbers of the code stand for single factors.

Each other score is given twice: from the code alone, and from the code with the true pose of the links in the frame ("+ pose").
A code may say how parts move without saying where they are; the pose makes up for that.

References stand beside the methods:

    flow, 8x8 grid          floor: the flow field averaged on a grid, which is what perception alone gives
    exact flow, 8x8 grid    ceiling of motion: the same of exact flow, if the environment knows it
    picture, 8x8 grid       the picture averaged on a grid, beside colours
    pose alone              floor of the scores with the pose
    NAME, untrained         floor: the method's network with new random weights
    idm                     ceiling: a convolutional network trained on the pictures of the same episodes and the target
    true velocities         ceiling for actions: an MLP on the velocities before and after (motion shows torque only weakly)

"share of exact" is a score divided by the score of exact flow for the same probe and target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from localmotion import methods
from localmotion.compute import PLAIN, Compute
from localmotion.errors import ConfigError
from localmotion.evaluation.probe_data import SKIP, Episodes, Floats, ProbeData
from localmotion.evaluation.probe_fits import explained, idm, mlp, mlp_fit, mutual_information_gap, ridge_fit
from localmotion.methods.base import MASK, Batch, Method
from localmotion.runs.load import at_least, load_run
from localmotion.runs.sharing import run_label

WITH_POSE, NMSE = " + pose", " nmse"
"""Endings of the names of scores: of a code with the pose, and of the normalized squared error."""
MIG = "mig"
"""Beginning of the names of mutual information gaps."""
EXACT, POSE, PICTURE = "exact flow, 8x8 grid", "pose alone", "picture, 8x8 grid"
SHARE, BY_COLOUR = "share of exact", "by colour"
LEAST_EXACT = 0.1
"""No share is given where exact flow itself scores less than this."""
OF_MOTION = ("links", "velocities")
"""Targets with shares of exact flow. For actions it is no ceiling."""
OF_A_FRAME = ("colours", "pose")
"""Targets that one frame shows. They have mutual information gaps and no scores with the pose."""


def grid_flow(batch: Batch, cells: int = 8) -> Tensor:
    """Flow averaged on a grid, (B, T, 2 cells^2), in pixels. It is the floor: what perception alone gives."""
    return _on_grid(batch["flow"], cells)


def grid_picture(batch: Batch, cells: int = 8) -> Tensor:
    """Pictures averaged on a grid, (B, T, 3 cells^2), in 0..255."""
    return _on_grid(batch["image"], cells)


def _on_grid(x: Tensor, cells: int) -> Tensor:
    """(B, T, S, S, C) -> (B, T, C cells^2)"""
    moved = x.float().permute(0, 1, 4, 2, 3)  # (B, T, C, S, S)
    pooled = F.adaptive_avg_pool2d(moved.flatten(0, 1), cells)  # (B T, C, cells, cells)
    return pooled.flatten(1).unflatten(0, moved.shape[:2])  # (B, T, C cells^2)


@torch.random.fork_rng(devices=[])  # probes seed torch's generator; the caller's state must not change
def probe(
    runs: Sequence[Path],
    collections: Sequence[Path],
    *,
    tests: Sequence[Path] = (),
    length: int = 25,
    untrained: bool = True,
    ceilings: bool = True,
    networks: bool = True,
    device: str = "auto",
    threads: int = 1,
    progress: Callable[[int, int | None, str], Any] | None = None,
) -> list[dict[str, Any]]:
    """Probe the motion code of each run on each collection (made by `localmotion collect --store`).

    Args:
        runs: run directories.
        collections: clip stores with actions/, velocities/ or links/.
        tests: for each collection the one that probes are scored on, e.g. with other backgrounds; () to keep a fifth of the
            episodes of each for that.
        length: frames of a window.
        untrained: also probe each run's network with new random weights.
        ceilings: also train networks on the targets directly.
        networks: False: ridge regression only, which takes seconds; no MLP and no ceilings.
        device: as `--device`.
        threads: CPU threads of torch, 0 for torch's own choice. The default is 1, because the small networks of the
            probes are many tiny products, and more threads mostly wait for each other.
        progress: called with (rows done, rows in total, name).

    Returns rows {data, code, width, frames, "ridge links", "ridge links + pose", "mlp links", "mlp links + pose", and the
    same for velocities, actions and background; "ridge actions nmse", "mlp actions nmse"}. Scores are R^2, except nmse (`Fit.nmse`).
    The background has no scores with the pose. A row lacks the scores of targets that the collection does not have. Colours and pose
    have "mig colours" and "mig pose": means over their dimensions of `mutual_information_gap` on the test episodes. "by colour" has the
    ridge regression's R^2 and the gap of each channel of a material: {"ridge": {"self red": 0.5, ...}, "mig": {...}}.
    If the collection has exact flow, "share of exact" is a dict of the scores for links and velocities divided by those of
    exact flow, where exact flow itself scores at least `LEAST_EXACT`.

    Raises ConfigError for a run whose method has no motion code, for collections without targets or with too few clips, and
    for another number of ``tests`` than of collections, or tests in another task.
    """
    at_least(length=(length, SKIP + 1), threads=(threads, 0))
    if tests and len(tests) != len(collections):
        raise ConfigError(f"{len(tests)} test collections for {len(collections)} collections; give one for each, or none")
    sources: list[tuple[str, Method | None, Compute]] = [("flow, 8x8 grid", None, PLAIN)]
    compute, masks = PLAIN, False
    if threads:
        torch.set_num_threads(threads)
    for path in runs:
        run, method, compute = load_run(path, device=device, threads=threads)
        if type(method).motion_code is Method.motion_code:
            raise ConfigError(f"{path}: method {run.method} has no motion code to probe")
        sources.append((f"{run.method}, {run_label(path)}", method, compute))
        masks = masks or bool(method.wants & MASK)
        if untrained:
            torch.manual_seed(0)
            dim = method.action_dim if method.acts else None
            fresh = methods.get(run.method)(run.model, image_size=method.image_size, action_dim=dim)
            sources.append((f"{run.method}, {run_label(path)}, untrained", fresh.to(compute.device).eval(), compute))
    rows: list[dict[str, Any]] = []
    ceilings = ceilings and networks
    total = len(collections) * (len(sources) + (2 if ceilings else 0))

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if progress:
            progress(len(rows), total, row["code"])

    for number, path in enumerate(collections):
        other: dict[str, Any] = {"test": tests[number]} if tests else {}
        data, begin = ProbeData(path, length, mask=masks, **other), len(rows)
        known = data.episodes
        total += (known.exact is not None) + (known.pose is not None) + ("colours" in known.targets)
        if known.exact is not None:
            add({**_row(data, EXACT, known.exact.shape[1]), **_scores(known.exact, known, networks)})
        if known.pose is not None:
            add({**_row(data, POSE, 0), **_scores(None, known, networks)})
        if "colours" in known.targets:
            code = data.code(grid_picture)
            add({**_row(data, PICTURE, code.shape[1]), **_scores(code, known, networks)})
        for name, model, place in sources:
            with place.own_randomness():
                torch.manual_seed(0)  # some codes are sampled
                code = data.code(grid_flow if model is None else _code_of(model, place))
            add({**_row(data, name, code.shape[1]), **_scores(code, known, networks)})
        if ceilings:
            rows += _ceilings(data, compute)
            if progress:
                progress(len(rows), total, "ceilings")
        # Exact flow that the clips have themselves is the row of the flow.
        exact = EXACT if known.exact is not None else sources[0][0] if known.perceived_exactly else None
        _add_shares(rows[begin:], exact)
    return rows


def _add_shares(rows: Sequence[dict[str, Any]], exact: str | None) -> None:
    """Add "share of exact" to the rows of a collection; ``exact`` is the code of the row that they are compared with."""
    best = next((row for row in rows if row["code"] == exact), {})
    of_motion = tuple(f"{probe} {kind}" for probe in ("ridge", "mlp") for kind in OF_MOTION)
    known = {key: value for key, value in best.items() if key.startswith(of_motion) and value >= LEAST_EXACT}
    for row in rows:
        shares = {key: round(row[key] / value, 3) for key, value in known.items() if key in row}
        if shares:
            row[SHARE] = shares


def _code_of(method: Method, compute: Any) -> Callable[[Batch], Tensor]:
    @torch.no_grad()
    def of(batch: Batch) -> Tensor:
        moved = {key: value.to(compute.device) for key, value in batch.items()}
        with compute.autocast():
            code = method.motion_code(moved)
        assert code is not None
        return code

    return of


def _row(data: ProbeData, name: str, width: int) -> dict[str, Any]:
    return {"data": data.episodes.name, "code": name, "width": width, "frames": len(data.episodes.episode)}


def _scores(code: Floats | None, data: Episodes, networks: bool = True) -> dict[str, Any]:
    """Scores of a code (n, d) with and without the pose. ``code`` None: of the pose alone."""
    inputs = {} if code is None else {"": code}
    if data.pose is not None:
        inputs[WITH_POSE] = data.pose if code is None else np.concatenate([code, data.pose], 1)
    out: dict[str, Any] = {}
    for kind, target in data.targets.items():
        for ending, x in inputs.items():
            if ending and kind in ("background", *OF_A_FRAME):  # the pose of the agent is no part of it, or all
                continue
            for name, fit in {"ridge": ridge_fit, **({"mlp": mlp_fit} if networks else {})}.items():
                found = fit(x, target, data)
                out[f"{name} {kind}{ending}"] = round(found.score, 4)
                if kind == "colours" and name == "ridge" and found.answer is not None:
                    out[BY_COLOUR] = {name: _named(data.colours, explained(found.answer, target[data.tested]))}
                if kind == "actions" and not ending:
                    out[f"{name} {kind}{NMSE}"] = round(found.nmse(target, data), 4)
        if code is not None and kind in OF_A_FRAME:
            gaps = mutual_information_gap(code[data.tested], target[data.tested])
            if kind == "colours":
                out.setdefault(BY_COLOUR, {})[MIG] = _named(data.colours, gaps)
            if (varies := np.isfinite(gaps)).any():
                out[f"{MIG} {kind}"] = round(float(gaps[varies].mean()), 4)
    return out


def _named(names: Sequence[str], values: NDArray[np.float64]) -> dict[str, float]:
    """Those of the values that are numbers, by name."""
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True) if np.isfinite(value)}


def _ceilings(data: ProbeData, compute: Compute) -> list[dict[str, Any]]:
    def both(batch: Batch) -> Tensor:
        image = batch["image"]
        return torch.stack([torch.cat([image[:, :1], image[:, :-1]], 1), image], 2).flatten(2)  # (B, T, 2 S S 3)

    episodes, side = data.episodes, data.sampler.store.size
    out = [both(batch)[:, SKIP:].flatten(0, 1).numpy() for batch in data.batches()]
    pictures = np.concatenate(out).reshape(-1, 2, side, side, 3)
    supervised = {
        f"mlp {kind}": round(idm(pictures, target, episodes, compute=compute), 4) for kind, target in episodes.targets.items()
    }
    rows = [{**_row(data, "idm, trained on the target", 0), **supervised}]
    if episodes.before is not None and "actions" in episodes.targets:
        known = np.concatenate([episodes.before, episodes.targets["velocities"]], 1)
        score = {"mlp actions": round(mlp(known, episodes.targets["actions"], episodes), 4)}
        rows.append({**_row(data, "true velocities, before and after", known.shape[1]), **score})
    return rows


def score_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and cells of one table for each target. Shares of exact flow are in brackets."""
    titles = {
        "links": "Velocities of the links in the picture",
        "velocities": "Velocities of the simulator",
        "actions": "Actions",
        "background": "Motion of the background, a nuisance",
        "colours": "Colours of the materials",
        "pose": "Pose of the links",
    }
    found = []
    for kind, title in titles.items():
        keys = [f"{probe} {kind}{ending}" for probe in ("ridge", "mlp", MIG) for ending in ("", NMSE, WITH_POSE)]
        keys = [key for key in keys if any(key in row for row in rows)]
        shown = [row for row in rows if any(key in row for key in keys)]
        cells = [[r["data"], r["code"], str(r["width"] or "–"), *(_cell(r, key) for key in keys)] for r in shown]
        if keys:
            found.append((title, ["data", "code", "width", *(key.replace(f" {kind}", "") for key in keys)], cells))
    return found


def _cell(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "–"
    share = row.get(SHARE, {}).get(key)
    return f"{row[key]:.3f}" + ("" if share is None else f" ({share:.0%})")


def save_probes(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the rows as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(list(rows), indent=1) + "\n")
