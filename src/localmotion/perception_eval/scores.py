"""Numbers that compare perception with the truth: flow, foreground and tracks. Arrays in, JSON-able numbers out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, float("inf"))
"""Edges of the bins of true motion, in pixels of the stored picture."""
AGES = (1, 5, 10, 25)
"""Frames after which tracks are judged."""
STRONG = 0.2
"""Foreground weight that counts as found: the one above which a still point is left where it is."""


def block_mean(field_: NDArray[np.floating[Any]], ratio: int) -> NDArray[np.float32]:
    """(..., H, W) averaged over ratio x ratio blocks."""
    *rest, height, width = field_.shape
    blocks = field_.reshape(*rest, height // ratio, ratio, width // ratio, ratio)
    return np.asarray(blocks.mean((-3, -1)), np.float32)


def stored(flow: NDArray[np.floating[Any]], ratio: int) -> NDArray[np.float32]:
    """(..., H, W, 2) flow as the clip store keeps it: averaged over blocks, in the smaller picture's pixels."""
    return np.moveaxis(block_mean(np.moveaxis(np.asarray(flow, np.float32), -1, -3), ratio), -3, -1) / np.float32(ratio)


def flow_numbers(error: NDArray[np.float32], motion: NDArray[np.float32]) -> dict[str, float]:
    """End-point errors (n,) and true magnitudes (n,) as numbers.

    mean, median: end-point error; outliers: share above one pixel; still: mean of the true motion, which is the error of answering zero;
    explained: 1 - sum of squared errors / sum of squared motion, 1 is exact, 0 is as good as zero flow.
    """
    if not len(error):
        return {"pixels": 0}
    power = float((motion.astype(np.float64) ** 2).sum())
    return {
        "pixels": len(error),
        "mean": _short(error.mean(dtype=np.float64)),
        "median": _short(np.median(error)),
        "outliers": _short((error > 1.0).mean()),
        "still": _short(motion.mean(dtype=np.float64)),
        "explained": _short(1.0 - float((error.astype(np.float64) ** 2).sum()) / power) if power > 1e-9 else float("nan"),
    }


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")


@dataclass
class FlowScore:
    """Collects fields of one backend against the truth."""

    ratio: int
    _parts: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]] = field(default_factory=list)
    _small: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]] = field(default_factory=list)
    seconds: float = 0.0
    pairs: int = 0

    def add(
        self,
        found: NDArray[np.float32],
        true: NDArray[np.float32],
        valid: NDArray[np.bool_],
        body: NDArray[np.bool_],
    ) -> None:
        """One field: found and true (H, W, 2), where the truth is valid and where the moving body is (H, W)."""
        self.pairs += 1
        error, motion = np.linalg.norm(found - true, axis=-1), np.linalg.norm(true, axis=-1)
        self._parts.append((error[valid], motion[valid], body[valid]))
        small_found, small_true = stored(found, self.ratio), stored(true, self.ratio)
        small_valid = block_mean(valid.astype(np.float32), self.ratio) > 0.999
        small_body = block_mean(body.astype(np.float32), self.ratio) >= 0.5
        error, motion = np.linalg.norm(small_found - small_true, axis=-1), np.linalg.norm(small_true, axis=-1)
        self._small.append((error[small_valid], motion[small_valid], small_body[small_valid]))

    def numbers(self) -> dict[str, Any]:
        """``percept`` (pixels of the perceived picture) and ``stored`` (pixels of the stored one): all, body, ground; ``bins`` of the
        true magnitude at stored size, body only; milliseconds a pair.
        """
        out: dict[str, Any] = {"ms": _short(1e3 * self.seconds / max(self.pairs, 1))}
        for name, parts in (("percept", self._parts), ("stored", self._small)):
            error, motion, body = (np.concatenate(x) for x in zip(*parts, strict=True))
            out[name] = {
                "all": flow_numbers(error, motion),
                "body": flow_numbers(error[body], motion[body]),
                "ground": flow_numbers(error[~body], motion[~body]),
            }
        where = np.digitize(motion[body], BINS[1:-1])
        out["bins"] = [
            {"from": BINS[k], "to": BINS[k + 1] if np.isfinite(BINS[k + 1]) else None}
            | flow_numbers(error[body][where == k], motion[body][where == k])
            for k in range(len(BINS) - 1)
        ]
        return out


@dataclass
class MaskScore:
    """Collects foreground weights against the pixels of bodies that can move and of those that do."""

    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, weight: NDArray[np.float32], truth: dict[str, NDArray[np.bool_]]) -> None:
        """One frame: weight (H, W) and, by name, the true masks (H, W)."""
        found, total = weight >= STRONG, float(weight.sum(dtype=np.float64))
        for name, mask in truth.items():
            share = float(weight[mask].sum(dtype=np.float64)) / total if total > 0 else 0.0
            row = [(found & mask).sum(), (found | mask).sum(), share * (total > 0), float(total > 0), mask.mean(), 1.0]
            self.counts[name] = self.counts.get(name, np.zeros(6)) + np.array(row, np.float64)

    def numbers(self) -> dict[str, dict[str, float]]:
        """By mask: iou of weight >= `STRONG`; share of the weight on it, over frames in which anything was found; its area."""
        return {
            name: {
                "iou": _short(both / either) if either else float("nan"),
                "share": _short(share / found) if found else float("nan"),
                "area": _short(area / frames),
            }
            for name, (both, either, share, found, area, frames) in self.counts.items()
        }


@dataclass
class OverlapScore:
    """Collects masks against true ones."""

    _rows: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, found: NDArray[np.bool_], true: NDArray[np.bool_]) -> None:
        """Masks (T, S, S) of one clip."""
        sums = [(found & true), (found | true), found, true]
        self._rows.append(np.stack([x.sum((1, 2)) for x in sums] + [np.full(len(true), true[0].size)], 1).astype(np.float64))

    def numbers(self) -> dict[str, float]:
        """iou: of all pixels of all frames together; frames: mean IoU of the frames that show the agent; precision, recall; found, area:
        share of the picture in the found and in the true mask.
        """
        rows = np.concatenate(self._rows)
        both, either, found, true, pixels = rows.sum(0)
        shown = rows[rows[:, 3] > 0]
        return {
            "iou": _ratio(both, either),
            "frames": _short((shown[:, 0] / shown[:, 1]).mean()) if len(shown) else float("nan"),
            "precision": _ratio(both, found),
            "recall": _ratio(both, true),
            "found": _ratio(found, pixels),
            "area": _ratio(true, pixels),
        }


@dataclass
class TrackScore:
    """Collects tracks against true ones, by age."""

    ratio: int
    _rows: dict[int, list[NDArray[np.float64]]] = field(default_factory=dict)

    def add(
        self,
        found: NDArray[np.float32],
        kept: NDArray[np.bool_],
        true: NDArray[np.float32],
        seen: NDArray[np.bool_],
    ) -> None:
        """Tracks (T, N, 2) and visibility (T, N), found and true, of points that begin in frame 0."""
        error = np.linalg.norm(found - true, axis=-1) / self.ratio
        moved = np.linalg.norm(true - true[:1], axis=-1) / self.ratio
        for age in AGES:
            if age < len(found):
                self._rows.setdefault(age, []).append(np.stack([error[age], kept[age], seen[age], moved[age]]))

    def numbers(self) -> dict[str, dict[str, float]]:
        """By age in frames: kept, share of the points still seen that are still followed; error, their median distance from the truth
        in pixels of the stored picture; right, share of the points still seen that are followed to within one such pixel;
        ghosts, share of the points no longer seen that are followed nevertheless; moved, median distance from the start.
        """
        out = {}
        for age, rows in self._rows.items():
            error, kept, seen, moved = np.concatenate(rows, 1)
            kept, seen = kept > 0, seen > 0
            both = kept & seen
            out[str(age)] = {
                "points": int(seen.sum()),
                "kept": _ratio(both.sum(), seen.sum()),
                "error": _short(np.median(error[both])) if both.any() else float("nan"),
                "right": _ratio((both & (error <= 1.0)).sum(), seen.sum()),
                "ghosts": _ratio((kept & ~seen).sum(), (~seen).sum()),
                "moved": _short(np.median(moved[seen])) if seen.any() else float("nan"),
            }
        return out


def _ratio(part: Any, whole: Any) -> float:
    return _short(part / whole) if whole else float("nan")


@dataclass
class SlotScore:
    """Collects what an agent's stream of Atomic Actions holds: flow at the tracked points, against the truth there."""

    _rows: list[NDArray[np.float64]] = field(default_factory=list)
    slots: int = 0

    def add(
        self,
        points: NDArray[np.float32],
        visible: NDArray[np.bool_],
        found: NDArray[np.floating[Any]],
        true: NDArray[np.float32],
        valid: NDArray[np.bool_],
        body: NDArray[np.bool_],
    ) -> None:
        """One agent step at stored size S: points (N, 2), usable (N,), flow found and true (S, S, 2), truth valid and body (S, S)."""
        self.slots += len(points)
        x, y = np.clip(np.round(points[visible]), 0, len(body) - 1).astype(int).T
        error = np.linalg.norm(found[y, x].astype(np.float64) - true[y, x], axis=-1)
        motion = np.linalg.norm(true[y, x].astype(np.float64), axis=-1)
        self._rows.append(np.stack([error, motion, body[y, x], valid[y, x]]))

    def numbers(self) -> dict[str, float]:
        """used: share of slots with usable motion; body: share of those on the moving body; at them, `flow_numbers`."""
        error, motion, body, valid = np.concatenate(self._rows, 1)
        good = valid > 0
        numbers = flow_numbers(error[good].astype(np.float32), motion[good].astype(np.float32))
        return {"used": _ratio(len(error), self.slots), "body": _ratio(body.sum(), len(body)), **numbers}
