"""Probes: how well a method's motion code predicts the true motion of a body (docs/studies.md).

The probed network is frozen. Ridge regression (linear) and a small MLP (nonlinear) predict three targets from the code of
each frame:

    links         velocities of the agent's links in the picture, pixels per agent step
    velocities    the simulator's velocities
    actions       the action that led to the frame

Training and test use different episodes. The score is R^2 on the test episodes, averaged over the dimensions of the
target that vary. 1 is a perfect prediction; 0 is no better than the mean of the target.

Each score is given twice: from the code alone, and from the code with the true pose of the links in the frame ("+ pose").
A code may say how parts move without saying where they are; the pose makes up for that.

References stand beside the methods:

    flow, 8x8 grid          floor: the flow field averaged on a grid, which is what perception alone gives
    exact flow, 8x8 grid    ceiling of motion: the same of exact flow, if the environment knows it
    pose alone              floor of the scores with the pose
    NAME, untrained         floor: the method's network with new random weights
    idm                     ceiling: a convolutional network trained on the pictures of the same episodes and the target
    true velocities         ceiling for actions: an MLP on the velocities before and after (motion shows torque only weakly)

"share of exact" is a score divided by the score of exact flow for the same probe and target.
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
from localmotion.methods.base import MASK, Batch, Method
from localmotion.runs.load import at_least, load_run
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

Floats = NDArray[np.float32]
LAMBDAS = tuple(10.0**k for k in range(-4, 5))
"""Candidate ridge penalties, as factors on the number of samples. A tenth of the training episodes selects one."""
SKIP = 4  # first positions of a window to leave out: a code that uses past frames has too little history there
TARGETS = ("links", "velocities", "actions")
WITH_POSE = " + pose"
"""Ending of the names of scores of a code with the pose."""
EXACT, POSE = "exact flow, 8x8 grid", "pose alone"
SHARE = "share of exact"
LEAST_EXACT = 0.1
"""No share is given where exact flow itself scores less than this."""
OF_MOTION = ("links", "velocities")
"""Targets with shares of exact flow. For actions it is no ceiling."""
LEAST_MOTION = 1e-3
"""Pixels per step. Components of the links' velocities with a smaller standard deviation are left out."""
FILES = ("velocities", "actions", "links", "exact_grid")


@dataclass(frozen=True)
class Episodes:
    """Targets of a collection, one row for each frame. ``episode`` (n,) is the clip of each row."""

    name: str
    episode: NDArray[np.int64]
    targets: dict[str, Floats]
    """`velocities` (n, nv), `actions` (n, A) and `links` (n, up to 2L), if the collection has them."""
    before: Floats | None
    """Velocities one frame earlier, (n, nv)."""
    tested: NDArray[np.bool_]
    """(n,) rows of the test episodes, a fifth of all episodes."""
    pose: Floats | None = None
    """(n, 4L) pose of the links in the frame: all x, all y in pixels, then the cosines and the sines of their angles."""
    exact: Floats | None = None
    """(n, 128) exact flow that led to the frame, averaged on an 8x8 grid, in pixels."""
    perceived_exactly: bool = False
    """The clips' own flow is exact."""


class _Data:
    """Windows that cover a collection's clips, in batches, and the targets of their frames after the first `SKIP`."""

    def __init__(self, path: Path, length: int, batch_size: int = 16, *, mask: bool = False) -> None:
        store = ClipStore(path)
        self.sampler = WindowSampler(store, length, batch_size, 0, split="all", prefetch=False, mask=mask)
        self.length, self.batch_size = length, batch_size
        places = [(int(c), s) for c in self.sampler.clips for s in range(0, int(store.lengths[c]) - length + 1, length - SKIP)]
        self.clips, self.starts = (np.array(x, np.int64) for x in zip(*places, strict=True))
        found: dict[str, list[Floats]] = {}
        before: dict[str, list[Floats]] = {}
        episode = []
        for clip, start in places:
            first, stop = start + SKIP, start + length
            episode.append(np.full(length - SKIP, clip))
            for kind in FILES:
                array = _load(path / kind / f"{store.ids[clip]}.npy", int(store.lengths[clip]))
                if array is None:
                    continue
                found.setdefault(kind, []).append(array[first:stop].astype(np.float32))
                if kind in ("velocities", "links"):
                    before.setdefault(kind, []).append(array[first - 1 : stop - 1].astype(np.float32))
        if found.keys().isdisjoint(TARGETS):
            raise ConfigError(f"{path}: no actions/ and velocities/ beside the clips; make it with localmotion collect --store")
        if any(len(x) != len(places) for x in found.values()):
            raise ConfigError(f"{path}: some clips lack their actions, velocities or links; collect it again")
        chosen = np.unique(self.clips)
        if len(chosen) < 10:
            raise ConfigError(f"{path}: {len(chosen)} clips are too few to split by episode; collect at least 10")
        rng = np.random.default_rng(0)
        held = rng.permutation(chosen)[: max(len(chosen) // 5, 2)]
        ids = np.concatenate(episode)
        joined = {kind: np.concatenate(x) for kind, x in found.items()}
        earlier = {kind: np.concatenate(x) for kind, x in before.items()}
        exact = joined.pop("exact_grid", None)
        pose = None
        if "links" in joined:
            joined["links"], pose = _moved(earlier["links"], joined["links"])
            if not joined["links"].shape[1]:
                del joined["links"]
        self.episodes = Episodes(
            path.name,
            ids,
            {kind: joined[kind] for kind in TARGETS if kind in joined},
            earlier.get("velocities"),
            np.isin(ids, held),
            pose,
            None if exact is None else exact.reshape(len(ids), -1),
            store.recipe["flow"] == "exact",
        )

    def code(self, of: Callable[[Batch], Tensor]) -> Floats:
        """Codes (n, d) of all frames after the first `SKIP` of a window.

        ``of`` returns the codes (B, T, d) of a batch.
        """
        out = []
        for at in range(0, len(self.clips), self.batch_size):
            batch = self.sampler.windows(self.clips[at : at + self.batch_size], self.starts[at : at + self.batch_size])
            out.append(of(batch)[:, SKIP:].float().cpu().flatten(0, 1).numpy())  # (B (T - SKIP), d)
        return np.concatenate(out)


def _load(file: Path, frames: int) -> NDArray[Any] | None:
    """Array with one row for each of a clip's frames, or None if there is no file."""
    if not file.exists():
        return None
    try:
        found: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)  # mmap fails if the header claims too much
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); collect it again") from error
    if len(found) != frames:
        raise ConfigError(f"{file}: has {len(found)} rows for a clip of {frames} frames; collect it again")
    return found


def _moved(before: Floats, now: Floats) -> tuple[Floats, Floats]:
    """Velocities (n, up to 2L) and poses (n, 4L) of links with places (n, L, 3) one frame earlier and now.

    Links that are behind the camera in any frame are left out. Their places are not finite.
    """
    seen = np.isfinite(before).all((0, 2)) & np.isfinite(now).all((0, 2))
    before, now = before[:, seen], now[:, seen]
    moved = np.concatenate([now[..., 0] - before[..., 0], now[..., 1] - before[..., 1]], 1)
    pose = np.concatenate([now[..., 0], now[..., 1], np.cos(now[..., 2]), np.sin(now[..., 2])], 1)
    return moved[:, moved.std(0) > LEAST_MOTION], pose


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
    networks: bool = True,
    device: str = "auto",
    threads: int = 1,
    progress: Callable[[int, int | None, str], Any] | None = None,
) -> list[dict[str, Any]]:
    """Probe the motion code of each run on each collection (made by `localmotion collect --store`).

    Args:
        runs: run directories.
        collections: clip stores with actions/, velocities/ or links/.
        length: frames of a window.
        untrained: also probe each run's network with new random weights.
        ceilings: also train networks on the targets directly.
        networks: False: ridge regression only, which takes seconds; no MLP and no ceilings.
        device: as `--device`.
        threads: CPU threads of torch, 0 for torch's own choice. The default is 1, because the small networks of the
            probes are many tiny products, and more threads mostly wait for each other.
        progress: called with (rows done, rows in total, name).

    Returns rows {data, code, width, frames, "ridge links", "ridge links + pose", "mlp links", "mlp links + pose", and the
    same for velocities and actions}. Scores are R^2. A row lacks the scores of targets that the collection does not have.
    If the collection has exact flow, "share of exact" is a dict of the scores for links and velocities divided by those of
    exact flow, where exact flow itself scores at least `LEAST_EXACT`.

    Raises ConfigError for a run whose method has no motion code, and for collections without targets or with too few
    clips.
    """
    at_least(length=(length, SKIP + 1), threads=(threads, 0))
    sources: list[tuple[str, Method | None, Compute]] = [("flow, 8x8 grid", None, PLAIN)]
    compute, masks = PLAIN, False
    if threads:
        torch.set_num_threads(threads)
    for path in runs:
        run, method, compute = load_run(path, device=device, threads=threads)
        if type(method).motion_code is Method.motion_code:
            raise ConfigError(f"{path}: method {run.method} has no motion code to probe")
        sources.append((f"{run.method}, {path.name}", method, compute))
        masks = masks or bool(method.wants & MASK)
        if untrained:
            torch.manual_seed(0)
            dim = method.action_dim if method.acts else None
            fresh = methods.get(run.method)(run.model, image_size=method.image_size, action_dim=dim)
            sources.append((f"{run.method}, {path.name}, untrained", fresh.to(compute.device).eval(), compute))
    rows: list[dict[str, Any]] = []
    ceilings = ceilings and networks
    total = len(collections) * (len(sources) + (2 if ceilings else 0))

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if progress:
            progress(len(rows), total, row["code"])

    for path in collections:
        data, begin = _Data(path, length, mask=masks), len(rows)
        known = data.episodes
        total += (known.exact is not None) + (known.pose is not None)
        if known.exact is not None:
            add({**_row(data, EXACT, known.exact.shape[1]), **_scores(known.exact, known, networks)})
        if known.pose is not None:
            add({**_row(data, POSE, 0), **_scores(None, known, networks)})
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


def _row(data: _Data, name: str, width: int) -> dict[str, Any]:
    return {"data": data.episodes.name, "code": name, "width": width, "frames": len(data.episodes.episode)}


def _scores(code: Floats | None, data: Episodes, networks: bool = True) -> dict[str, float]:
    """Scores of a code (n, d) with and without the pose. ``code`` None: of the pose alone."""
    inputs = {} if code is None else {"": code}
    if data.pose is not None:
        inputs[WITH_POSE] = data.pose if code is None else np.concatenate([code, data.pose], 1)
    out = {}
    for kind, target in data.targets.items():
        for ending, x in inputs.items():
            out[f"ridge {kind}{ending}"] = round(ridge(x, target, data), 4)
            if networks:
                out[f"mlp {kind}{ending}"] = round(mlp(x, target, data), 4)
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


def score_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and cells of one table for each target. Shares of exact flow are in brackets."""
    titles = {
        "links": "Velocities of the links in the picture",
        "velocities": "Velocities of the simulator",
        "actions": "Actions",
    }
    found = []
    for kind, title in titles.items():
        keys = [f"{probe} {kind}{ending}" for probe in ("ridge", "mlp") for ending in ("", WITH_POSE)]
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
