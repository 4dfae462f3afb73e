"""What a method's motion code knows of true motion: probes on the simulator's velocities and actions (docs/studies.md).

The code of each frame, frozen, is asked by ridge regression (is it there, linearly?) and by a small MLP (is it there at all?) for the
velocities and for the action that led to the frame. Episodes are split, so no frame of a tested episode is seen in fitting. The score is
R^2 on the tested episodes, averaged over the target's dimensions that vary: 1 is all of it, 0 no more than its mean.

Floors and ceilings beside the methods: `flow`, the flow field averaged on an 8x8 grid (what perception alone gives); NAME `untrained`, the
same network as a method's with fresh weights; `idm`, a convolutional network trained on the same episodes' pictures and the target itself;
`true velocities`, an MLP on the velocities before and after, for actions: torque is only weakly visible in motion.
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
"""Ridge penalties tried, times the number of samples; chosen on a tenth of the fitted episodes."""
SKIP = 4  # first positions of a window: too little history for a code that looks back
TARGETS = ("velocities", "actions")


@dataclass(frozen=True)
class Episodes:
    """A collection's targets by frame: rows belong together, ``episode`` (n,) says which clip."""

    name: str
    episode: NDArray[np.int64]
    targets: dict[str, Floats]
    """velocities (n, nv) and actions (n, A), what is there"""
    before: Floats | None
    """velocities one frame earlier (n, nv)"""
    tested: NDArray[np.bool_]
    """rows of the tested episodes, a fifth of them"""


class _Data:
    """Windows that tile a collection's clips, in batches, and the targets of the frames that count."""

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
                    found = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: a claim beyond the file's end is refused
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
        """(n, d) codes of the frames that count; ``of`` gives (B, T, d) of a batch."""
        out = []
        for at in range(0, len(self.clips), self.batch_size):
            batch = self.sampler.windows(self.clips[at : at + self.batch_size], self.starts[at : at + self.batch_size])
            out.append(of(batch)[:, SKIP:].float().cpu().flatten(0, 1).numpy())
        return np.concatenate(out)


def grid_flow(batch: Batch, cells: int = 8) -> Tensor:
    """Flow averaged on a grid, (B, T, 2 cells^2) pixels: the floor that perception alone gives."""
    flow = batch["flow"].float().permute(0, 1, 4, 2, 3)
    return F.adaptive_avg_pool2d(flow.flatten(0, 1), cells).flatten(1).unflatten(0, flow.shape[:2])


def r_squared(predicted: Floats, true: Floats) -> float:
    """1 - squared error / variance on the same rows, mean over the dimensions of (n, d) that vary. 0 if none does."""
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
    """Rows to fit on, and rows of other episodes to choose penalties and stopping on."""
    known = np.unique(data.episode[~data.tested])
    chosen = np.random.default_rng(1).permutation(known)[: max(len(known) // 10, 1)]
    check = np.isin(data.episode, chosen)
    return ~data.tested & ~check, check


def ridge(x: Floats, y: Floats, data: Episodes) -> float:
    """R^2 of ridge regression from (n, d) to (n, k) on the tested episodes, penalty chosen on others."""
    fit, check = _folds(data)
    z = _standard(x, fit).astype(np.float64)
    mean = y[fit].mean(0).astype(np.float64)
    values, vectors = np.linalg.eigh(z[fit].T @ z[fit])
    moment = vectors.T @ (z[fit].T @ (y[fit] - mean))

    def answer(penalty: float, rows: NDArray[np.bool_]) -> Floats:
        weights = vectors @ (moment / (np.maximum(values, 0) + penalty * fit.sum())[:, None])
        return (z[rows] @ weights + mean).astype(np.float32)

    best = max(LAMBDAS, key=lambda penalty: r_squared(answer(penalty, check), y[check]))
    return r_squared(answer(best, data.tested), y[data.tested])


def mlp(x: Floats, y: Floats, data: Episodes, *, updates: int = 1500, seed: int = 0) -> float:
    """R^2 of a two-layer network (256 wide, dropout 0.1), stopped where other episodes are predicted best."""
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
    """R^2 of a small convolutional network on pictures (n, 2, S, S, 3), the frames before and after, trained for this target."""
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
        both = torch.from_numpy(pictures[rows]).to(compute.device).permute(0, 1, 4, 2, 3).flatten(1, 2)
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
    """Fit, keep the R^2 on tested rows of the moment at which the check rows were predicted best. R^2 does not mind standard units."""
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


@torch.random.fork_rng(devices=[])  # the networks of the probes are seeded, and the caller's generator is left as it was
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
    """Probe the motion code of each run on each collection (`localmotion collect --store`).

    Rows: {data, code, width, frames, "ridge velocities", "mlp velocities", "ridge actions", "mlp actions"}; scores are R^2, absent where a
    collection lacks the target. ``untrained`` adds each run's network with fresh weights, ``ceilings`` those trained on the target.
    ``threads`` of torch (0: its own choice): the small networks are many tiny products, for which threads mostly wait for each other.
    Raises ConfigError for a run whose method has no motion code, and for collections without targets or with too few clips.
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
        return torch.stack([torch.cat([image[:, :1], image[:, :-1]], 1), image], 2).flatten(2)

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
