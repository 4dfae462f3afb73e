"""Probes: how well a method's motion code predicts the simulator's velocities and actions (docs/studies.md).

The probed network is frozen. Ridge regression (linear) and a small MLP (nonlinear) predict two targets from the code of
each frame: the velocities, and the action that led to the frame. Training and test use different episodes. The score is
R^2 on the test episodes, averaged over the dimensions of the target that vary. 1 is a perfect prediction; 0 is no
better than the mean of the target.

Four references stand beside the methods:

    flow, 8x8 grid     floor: the flow field averaged on a grid, which is what perception alone gives
    NAME, untrained    floor: the method's network with new random weights
    idm                ceiling: a convolutional network trained on the pictures of the same episodes and the target
    true velocities    ceiling for actions: an MLP on the velocities before and after (motion shows torque only weakly)
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from localmotion import methods
from localmotion.compute import PLAIN, Compute
from localmotion.errors import ConfigError
from localmotion.methods.base import Batch, Method
from localmotion.runs.load import at_least, load_run
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

Floats = NDArray[np.float32]
LAMBDAS = tuple(10.0**k for k in range(-4, 5))
"""Candidate ridge penalties, as factors on the number of samples. A tenth of the training episodes selects one."""
SKIP = 4  # first positions of a window to leave out: a code that uses past frames has too little history there
TARGETS = ("velocities", "actions")


@dataclass(frozen=True)
class Episodes:
    """Targets of a collection, one row for each frame. ``episode`` (n,) is the clip of each row."""

    name: str
    episode: NDArray[np.int64]
    targets: dict[str, Floats]
    """`velocities` (n, nv) and `actions` (n, A), if the collection has them."""
    before: Floats | None
    """Velocities one frame earlier, (n, nv)."""
    tested: NDArray[np.bool_]
    """(n,) rows of the test episodes, a fifth of all episodes."""


class _Data:
    """Windows that cover a collection's clips, in batches, and the targets of their frames after the first `SKIP`."""

    def __init__(self, path: Path, length: int, batch_size: int = 16) -> None:
        store = ClipStore(path)
        self.sampler = WindowSampler(store, length, batch_size, 0, split="all", prefetch=False)
        self.length, self.batch_size = length, batch_size
        places = [(int(c), s) for c in self.sampler.clips for s in range(0, int(store.lengths[c]) - length + 1, length - SKIP)]
        self.clips, self.starts = (np.array(x, np.int64) for x in zip(*places, strict=True))
        targets: dict[str, list[Floats]] = {}
        before, episode = [], []
        for clip, start in places:
            rows = slice(start + SKIP, start + length)
            episode.append(np.full(length - SKIP, clip))
            for kind in TARGETS:
                file = path / kind / f"{store.ids[clip]}.npy"
                if not file.exists():
                    continue
                try:
                    found = np.load(file, mmap_mode="r", allow_pickle=False)  # mmap fails if the header claims too much
                except (OSError, ValueError, EOFError) as error:
                    raise ConfigError(f"{file}: cannot be read ({error}); collect it again") from error
                if len(found) != store.lengths[clip]:
                    raise ConfigError(
                        f"{file}: has {len(found)} rows for a clip of {store.lengths[clip]} frames; collect it again"
                    )
                targets.setdefault(kind, []).append(found[rows].astype(np.float32))
                if kind == "velocities":
                    before.append(found[rows.start - 1 : rows.stop - 1].astype(np.float32))
        if not targets:
            raise ConfigError(f"{path}: no actions/ and velocities/ beside the clips; make it with localmotion collect --store")
        if any(len(x) != len(places) for x in targets.values()):
            raise ConfigError(f"{path}: some clips lack their actions or velocities; collect it again")
        chosen = np.unique(self.clips)
        if len(chosen) < 10:
            raise ConfigError(f"{path}: {len(chosen)} clips are too few to split by episode; collect at least 10")
        rng = np.random.default_rng(0)
        held = rng.permutation(chosen)[: max(len(chosen) // 5, 2)]
        ids = np.concatenate(episode)
        joined = {kind: np.concatenate(x) for kind, x in targets.items()}
        earlier = np.concatenate(before) if before else None
        self.episodes = Episodes(path.name, ids, joined, earlier, np.isin(ids, held))

    def code(self, of: Callable[[Batch], Tensor]) -> Floats:
        """Codes (n, d) of all frames after the first `SKIP` of a window.

        ``of`` returns the codes (B, T, d) of a batch.
        """
        out = []
        for at in range(0, len(self.clips), self.batch_size):
            batch = self.sampler.windows(self.clips[at : at + self.batch_size], self.starts[at : at + self.batch_size])
            out.append(of(batch)[:, SKIP:].float().cpu().flatten(0, 1).numpy())  # (B (T - SKIP), d)
        return np.concatenate(out)


def grid_flow(batch: Batch, cells: int = 8) -> Tensor:
    """Flow averaged on a grid, (B, T, 2 cells^2), in pixels. It is the floor: what perception alone gives."""
    flow = batch["flow"].float().permute(0, 1, 4, 2, 3)  # (B, T, 2, S, S)
    pooled = F.adaptive_avg_pool2d(flow.flatten(0, 1), cells)  # (B T, 2, cells, cells)
    return pooled.flatten(1).unflatten(0, flow.shape[:2])  # (B, T, 2 cells^2)


def r_squared(predicted: Floats, true: Floats) -> float:
    """R^2 of two arrays (n, d): 1 - squared error / variance, averaged over the dimensions that vary.

    0 if none varies.
    """
    spread = true.astype(np.float64).var(0)
    varies = spread > 1e-10
    if not varies.any():
        return 0.0
    error = ((predicted.astype(np.float64) - true) ** 2).mean(0)
    return float((1 - error[varies] / spread[varies]).mean())


def _standard(x: Floats, fit: NDArray[np.bool_]) -> Floats:
    mean, std = x[fit].mean(0), x[fit].std(0)
    scaled: Floats = ((x - mean) / np.where(std > 1e-6, std, 1.0)).astype(np.float32)
    return scaled


def _folds(data: Episodes) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows for training, and rows of other episodes for choosing the penalty and the time to stop."""
    known = np.unique(data.episode[~data.tested])
    chosen = np.random.default_rng(1).permutation(known)[: max(len(known) // 10, 1)]
    check = np.isin(data.episode, chosen)
    return ~data.tested & ~check, check


def ridge(x: Floats, y: Floats, data: Episodes) -> float:
    """R^2 of ridge regression from (n, d) to (n, k) on the test episodes. Other episodes choose the penalty."""
    fit, check = _folds(data)
    z = _standard(x, fit).astype(np.float64)
    mean = y[fit].mean(0).astype(np.float64)
    values, vectors = np.linalg.eigh(z[fit].T @ z[fit])  # (d,), (d, d)
    moment = vectors.T @ (z[fit].T @ (y[fit] - mean))  # (d, k)

    def answer(penalty: float, rows: NDArray[np.bool_]) -> Floats:
        weights = vectors @ (moment / (np.maximum(values, 0) + penalty * fit.sum())[:, None])  # (d, k)
        return (z[rows] @ weights + mean).astype(np.float32)

    best = max(LAMBDAS, key=lambda penalty: r_squared(answer(penalty, check), y[check]))
    return r_squared(answer(best, data.tested), y[data.tested])


def mlp(x: Floats, y: Floats, data: Episodes, *, updates: int = 1500, seed: int = 0) -> float:
    """R^2 of an MLP with two hidden layers (width 256, dropout 0.1) on the test episodes.

    Other episodes choose when to stop.
    """
    fit, check = _folds(data)
    z, t = _standard(x, fit), _standard(y, fit)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(z.shape[1], 256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(256, t.shape[1]),
    )
    whole = torch.from_numpy(z)
    return _best(net, lambda rows: whole[torch.from_numpy(rows)], t, data, fit, check, updates, seed)


def idm(
    pictures: NDArray[np.uint8],
    y: Floats,
    data: Episodes,
    *,
    updates: int = 1000,
    seed: int = 0,
    compute: Compute = PLAIN,
) -> float:
    """R^2 of a small convolutional network that predicts ``y`` from the frames before and after, (n, 2, S, S, 3)."""
    fit, check = _folds(data)
    torch.manual_seed(seed)
    widths = (6, 32, 64, 64, 64)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()]
    side = -(-pictures.shape[2] // 16)
    net = nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * side * side, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, y.shape[1])
    )

    def inputs(rows: NDArray[np.int64]) -> Tensor:
        both = torch.from_numpy(pictures[rows]).to(compute.device).permute(0, 1, 4, 2, 3).flatten(1, 2)  # (n, 6, S, S)
        return both.float().div_(255.0).sub_(0.5).contiguous(memory_format=torch.channels_last)

    return _best(net.to(compute.device), inputs, _standard(y, fit), data, fit, check, updates, seed, compute, batch_size=64)


def _best(
    net: nn.Module,
    inputs: Callable[[NDArray[np.int64]], Tensor],
    t: Floats,
    data: Episodes,
    fit: NDArray[np.bool_],
    check: NDArray[np.bool_],
    updates: int,
    seed: int,
    compute: Compute = PLAIN,
    batch_size: int = 128,
) -> float:
    """Train ``net``. Returns the R^2 on the test rows at the update with the best R^2 on the check rows.

    ``t`` holds standardized targets; R^2 does not depend on their scale.
    """
    rng, rows = np.random.default_rng(seed), np.flatnonzero(fit)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    best, kept = -np.inf, 0.0

    @torch.no_grad()
    def predict(where: NDArray[np.bool_]) -> Floats:
        index = np.flatnonzero(where)
        with compute.autocast():
            found = [net(inputs(part)) for part in np.array_split(index, max(len(index) // 512, 1))]
        return torch.cat(found).float().cpu().numpy()

    for update in range(updates):
        batch = rng.choice(rows, min(batch_size, len(rows)), replace=False)
        with compute.autocast():
            answer = net(inputs(batch))
        loss = F.mse_loss(answer.float(), torch.from_numpy(t[batch]).to(compute.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (update + 1) % max(updates // 10, 1) == 0:
            net.eval()
            score = r_squared(predict(check), t[check])
            if score > best:
                best, kept = score, r_squared(predict(data.tested), t[data.tested])
            net.train()
    return kept


@torch.random.fork_rng(devices=[])  # probes seed torch's generator; the caller's state must not change
def probe(
    runs: Sequence[Path],
    collections: Sequence[Path],
    *,
    length: int = 25,
    untrained: bool = True,
    ceilings: bool = True,
    device: str = "auto",
    threads: int = 1,
    progress: Callable[[int, int | None, str], Any] | None = None,
) -> list[dict[str, Any]]:
    """Probe the motion code of each run on each collection (made by `localmotion collect --store`).

    Args:
        runs: run directories.
        collections: clip stores with actions/ or velocities/.
        length: frames of a window.
        untrained: also probe each run's network with new random weights.
        ceilings: also train networks on the targets directly.
        device: as `--device`.
        threads: CPU threads of torch, 0 for torch's own choice. The default is 1, because the small networks of the
            probes are many tiny products, and more threads mostly wait for each other.
        progress: called with (rows done, rows in total, name).

    Returns rows {data, code, width, frames, "ridge velocities", "mlp velocities", "ridge actions", "mlp actions"}.
    Scores are R^2. A row lacks the scores of targets that the collection does not have.

    Raises ConfigError for a run whose method has no motion code, and for collections without targets or with too few
    clips.
    """
    at_least(length=(length, SKIP + 1), threads=(threads, 0))
    sources: list[tuple[str, Method | None, Compute]] = [("flow, 8x8 grid", None, PLAIN)]
    compute = PLAIN
    if threads:
        torch.set_num_threads(threads)
    for path in runs:
        run, method, compute = load_run(path, device=device, threads=threads)
        if type(method).motion_code is Method.motion_code:
            raise ConfigError(f"{path}: method {run.method} has no motion code to probe")
        sources.append((f"{run.method}, {path.name}", method, compute))
        if untrained:
            torch.manual_seed(0)
            dim = method.action_dim if method.acts else None
            fresh = methods.get(run.method)(run.model, image_size=method.image_size, action_dim=dim)
            sources.append((f"{run.method}, {path.name}, untrained", fresh.to(compute.device).eval(), compute))
    rows: list[dict[str, Any]] = []
    total = len(collections) * (len(sources) + (2 if ceilings else 0))
    for path in collections:
        data = _Data(path, length)
        for name, model, place in sources:
            with place.own_randomness():
                torch.manual_seed(0)  # some codes are sampled
                code = data.code(grid_flow if model is None else _code_of(model, place))
            rows.append({**_row(data, name, code.shape[1]), **_scores(code, data.episodes)})
            if progress:
                progress(len(rows), total, name)
        if ceilings:
            rows += _ceilings(data, compute)
            if progress:
                progress(len(rows), total, "ceilings")
    return rows


def _code_of(method: Method, compute: Any) -> Callable[[Batch], Tensor]:
    @torch.no_grad()
    def of(batch: Batch) -> Tensor:
        moved = {key: value.to(compute.device) for key, value in batch.items()}
        with compute.autocast():
            code = method.motion_code(moved)
        assert code is not None
        return code

    return of


def _row(data: _Data, name: str, width: int) -> dict[str, Any]:
    return {"data": data.episodes.name, "code": name, "width": width, "frames": len(data.episodes.episode)}


def _scores(code: Floats, data: Episodes) -> dict[str, float]:
    out = {}
    for kind, target in data.targets.items():
        out[f"ridge {kind}"], out[f"mlp {kind}"] = round(ridge(code, target, data), 4), round(mlp(code, target, data), 4)
    return out


def _ceilings(data: _Data, compute: Compute) -> list[dict[str, Any]]:
    def both(batch: Batch) -> Tensor:
        image = batch["image"]
        return torch.stack([torch.cat([image[:, :1], image[:, :-1]], 1), image], 2).flatten(2)  # (B, T, 2 S S 3)

    episodes, side = data.episodes, data.sampler.store.size
    out = []
    for at in range(0, len(data.clips), data.batch_size):
        batch = data.sampler.windows(data.clips[at : at + data.batch_size], data.starts[at : at + data.batch_size])
        out.append(both(batch)[:, SKIP:].flatten(0, 1).numpy())
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


def save_probes(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the rows as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(list(rows), indent=1) + "\n")
