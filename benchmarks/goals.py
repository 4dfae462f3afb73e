"""Compares measurements with goals: one row per goal, from the results of the parts that were run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Results = Mapping[str, Sequence[Row]]


class Goal(NamedTuple):
    """A figure that a part of the benchmarks measures."""

    what: str
    part: str
    wanted: float
    unit: str
    more: bool
    """Whether more is better."""
    find: Callable[[Sequence[Row]], Any]
    """The figure in the part's rows; raises StopIteration or KeyError if it was not measured."""


def one(rows: Sequence[Row], column: str, **where: Any) -> Any:
    """``column`` of the first row whose columns match ``where`` (a text matches by its beginning)."""

    def fits(row: Row) -> bool:
        return all(
            str(row[key]).startswith(value) if isinstance(value, str) else row[key] == value for key, value in where.items()
        )

    return next(row for row in rows if fits(row))[column]


def _floors(case: str) -> Callable[[Sequence[Row]], Any]:
    return lambda rows: 1 / one(rows, "of update", case=case, kind="whole")


def _peer(name: str) -> Callable[[Sequence[Row]], Any]:
    """For the faster precision on this machine, which a run would choose."""

    def find(rows: Sequence[Row]) -> Any:
        return one(sorted((row for row in rows if "peer" in row), key=lambda row: row["ours s"]), "ratio", peer=name)

    return find


def _extract(percept: int) -> Callable[[Sequence[Row]], Any]:
    return lambda rows: one(rows, "25-frame clips/s", what=f"extract at {percept} px", workers=2)


def _acting(percept: int) -> Callable[[Sequence[Row]], Any]:
    return lambda rows: one(rows, "median ms", what=f"drp small, perception at {percept} px and")


def _gpu(case: str) -> Callable[[Sequence[Row]], Any]:
    return lambda rows: one(rows, "median ms", update=case, how="CUDA graph")


def _eager(case: str) -> Callable[[Sequence[Row]], Any]:
    return lambda rows: one(rows, "median ms", update=case, how="eager") / _gpu(case)(rows)


def _planar(name: str, column: str) -> Callable[[Sequence[Row]], Any]:
    return lambda rows: one(rows, column, env=f"planar:{name}")


_V3, _DRP = "DreamerV3 12M", "DRP paper, fine-tuning"
GOALS = (
    Goal("DreamerV3 12M, 16 x 64: r2dreamer's time over ours", "peers", 4.0, "times", True, _peer("r2dreamer, eager")),
    Goal("the same, r2dreamer with our allocator setting", "peers", 4.0, "times", True, _peer("the same")),
    Goal("DreamerV3 12M, over its floor", "floor", 1.5, "floors", False, _floors("dreamer_v3 train paper")),
    Goal("DreamerV3 small, over its floor", "floor", 1.5, "floors", False, _floors("dreamer_v3 train small")),
    Goal("DreamerV2 small, over its floor", "floor", 1.5, "floors", False, _floors("dreamer_v2 train small")),
    Goal("DRP small, pre-training, over its floor", "floor", 1.5, "floors", False, _floors("drp pretrain small")),
    Goal("DRP small, fine-tuning, over its floor", "floor", 1.5, "floors", False, _floors("drp finetune small")),
    Goal("DreamerV3 12M, 16 x 64, on a GPU", "gpu", 25.0, "ms", False, _gpu(_V3)),
    Goal("DRP paper, 50 x 50, on a GPU", "gpu", 60.0, "ms", False, _gpu(_DRP)),
    Goal("DreamerV3 12M on a GPU: eager over recorded", "gpu", 10.0, "times", True, _eager(_V3)),
    Goal(
        "share of the update in a run on Meta-World",
        "loop",
        0.85,
        "of the time",
        True,
        lambda rows: one(rows, "share", part="update"),
    ),
    *(
        Goal(
            f"planar:{name}, 64 px, with exact motion", "planar", wanted, "agent steps/s", True, _planar(name, "steps/s, motion")
        )
        for name, wanted in (("walker_run", 3_000.0), ("hopper_hop", 5_000.0), ("cheetah_run", 5_000.0))
    ),
    Goal(
        "drawing planar:walker_run, 64 px, parts and flow",
        "planar",
        10_000.0,
        "frames/s",
        True,
        _planar("walker_run", "frames/s"),
    ),
    Goal("extraction at 64 px, two workers", "extract", 60.0, "clips/s", True, _extract(64)),
    Goal("extraction at 128 px, two workers", "extract", 20.0, "clips/s", True, _extract(128)),
    Goal("windows out of a store", "extract", 15_000.0, "windows/s", True, lambda rows: one(rows, "windows/s", what="sample")),
    Goal("perception at 64 px and policy step of DRP small", "acting", 8.0, "ms", False, _acting(64)),
    Goal("perception at 128 px and policy step of DRP small", "acting", 8.0, "ms", False, _acting(128)),
    Goal(
        "eight plans of PVDR tiny decoded",
        "acting",
        30.0,
        "ms",
        False,
        lambda rows: one(rows, "median ms", what="pvdr tiny, eight"),
    ),
)


def against_goals(results: Results) -> list[dict[str, object]]:
    """Rows for the goals whose part was run; "reached" is a ratio, 1 or more if the goal is met."""
    rows: list[dict[str, object]] = []
    for goal in GOALS:
        if goal.part not in results:
            continue
        row: dict[str, object] = {"goal": goal.what, "wanted": goal.wanted, "unit": goal.unit}
        try:
            found = float(goal.find(results[goal.part]))
        except (StopIteration, KeyError):
            rows.append({**row, "measured": "not here", "reached": "", "part": goal.part})
            continue
        ratio = found / goal.wanted if goal.more else goal.wanted / found
        rows.append({**row, "measured": found, "reached": ratio, "part": goal.part})
    return rows
