"""What an update costs, in counts that do not depend on the machine: operations and FLOPs. Seconds are `make bench`."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.bench_floor import measure
from benchmarks.bench_loop import shares
from benchmarks.bench_scaling import AXES, ENCODER, UPDATE, Axis, Curve, exponent, flops_of, growth, steps_along
from benchmarks.bench_update import setup
from benchmarks.goals import against_goals
from benchmarks.recorder import Recorder, allocations
from benchmarks.scaling_picture import draw

ROOT = Path(__file__).parent.parent


def counted(*case: str) -> tuple[Recorder, float]:
    """Operations of one update in fp32, the second one (the first makes the optimisers' moments), and its GFLOP."""
    updater, batch = setup(*case, "precision=fp32")
    step = updater.learn
    step(batch)
    recorder = Recorder()
    with recorder:
        step(batch)
    return recorder, recorder.flops / 1e9


# (operations other than views, matrix products and convolutions, GFLOP) of one update, the allocations in it and how much it holds at most,
# MB. More than this needs a reason in the commit.
LIMITS = {
    ("dreamer_v3", "train", "debug"): (2897, 278, 0.56516, 4221, 4.25),
    ("dreamer_v2", "train", "debug"): (1585, 223, 0.24159, 2419, 4.46),
    ("drp", "pretrain", "debug"): (885, 248, 0.30979, 1820, 8.14),
    ("drp", "finetune", "debug"): (2576, 512, 0.54766, 4379, 15.2),
    ("ipv", "finetune", "debug"): (2151, 340, 0.30593, 3346, 10.9),
}


@pytest.mark.parametrize("case", LIMITS, ids=" ".join)
def test_an_update_launches_no_more_than_it_did(case: tuple[str, ...]) -> None:
    recorder, flops = counted(*case)
    products, others = sum(recorder.products.values()), sum(recorder.others.values())
    most_others, most_products, most_flops, _, _ = LIMITS[case]
    assert others <= 1.02 * most_others, recorder.others.most_common(12)
    assert products <= most_products
    assert flops == pytest.approx(most_flops, rel=0.01)
    # Each of these was measured to be many times slower on a CPU than what is used in its place.
    slow = {"max_pool2d_with_indices", "_scaled_dot_product_flash_attention_for_cpu"}
    assert not recorder.others.keys() & slow


@pytest.mark.parametrize("case", LIMITS, ids=" ".join)
def test_an_update_takes_no_more_memory_than_it_did(case: tuple[str, ...]) -> None:
    updater, batch = setup(*case, "precision=fp32")
    step = updater.learn
    step(batch)
    found = allocations(lambda: step(batch))
    *_, most_allocations, most_held = LIMITS[case]
    assert found.count <= 1.02 * most_allocations
    assert found.peak <= 1.02e6 * most_held
    assert found.peak < found.total


def test_allocations_are_counted() -> None:
    def work() -> None:
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8)  # freed before the next one
        kept = [torch.empty(1 << 21, dtype=torch.uint8) for _ in range(2)]
        kept.clear()

    assert allocations(work) == (5, 7 << 20, 4 << 20)


def test_the_floor_is_made_of_the_updates_own_products() -> None:
    """Products recorded by layout and run again alone have the FLOPs that were counted in the update."""
    updater, batch = setup("dreamer_v3", "train", "debug", "precision=fp32")
    with Recorder() as whole:
        updater.learn(batch)
    _, kinds, others = measure(lambda: updater.learn(batch), repeats=1, alone=0)
    assert sum(kind["GFLOP"] for kind in kinds) == pytest.approx(whole.flops / 1e9, rel=1e-3)
    assert all(kind["alone ms"] > 0 for kind in kinds)
    assert others["copy_"] > 0


def test_benchmarks_say_what_they_know() -> None:
    def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)

    wrong = bench("no-such-part")
    assert wrong.returncode == 2
    assert "no-such-part" in wrong.stderr
    assert "floor" in wrong.stderr
    assert "--r2dreamer" in bench("--help").stdout


def test_pieces_of_a_batch_are_counted_apart() -> None:
    recorder = Recorder()
    with recorder, torch.no_grad():
        a, b = torch.ones(2, 3), torch.ones(3, 4)
        a @ b, a @ b, a.t() @ a, (a + 1).view(6)
    assert sorted(recorder.products.values()) == [1, 2]
    assert recorder.others["add"] == 1
    assert "view" not in recorder.others


# Values for the sizes of `debug`, the last three doubling; the degree in which FLOPs may grow, and the order in which they do at these
# sizes at most: attention, which squares, is still small.
ORDERS = {
    "batch": ((2, 4, 8), 1, 1.0),
    "length T": ((6, 8, 16, 32), 2, 1.3),
    "Atomic Actions K": ((4, 8, 16, 32), 2, 1.3),
    "blocks L": ((1, 2, 4), 1, 1.0),
    "token width d": ((8, 16, 32, 64), 2, 2.0),
    "state width": ((16, 32, 64, 128), 2, 2.0),
    "picture width": ((8, 16, 32, 64), 2, 2.0),
    "horizon H": ((4, 8, 16), 1, 1.0),
}


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def test_flops_of_an_update_grow_as_they_should(axis: Axis) -> None:
    values, degree, most = ORDERS[axis.name]
    for what, steps in steps_along(axis, ("drp", "finetune", "debug", "precision=fp32"), values).items():
        flops = [flops_of(step) for step in steps]
        assert 1 - 1e-3 <= growth(flops) <= most + 1e-3, what
        # Counts have no noise: a polynomial of that degree through the first ones meets the last one, or something grows faster.
        known = values[: degree + 1]
        last = sum(y * math.prod((values[-1] - z) / (x - z) for z in known if z != x) for x, y in zip(known, flops, strict=False))
        assert flops[-1] == pytest.approx(last, rel=1e-9), what


def test_shares_of_a_loop_add_up() -> None:
    line = {
        "seconds/all": 10.0,
        "seconds/update": 8.0,
        "seconds/env": 1.0,
        "seconds/act": 0.5,
        "seconds/perception": 0.3,
        "seconds/replay": 0.1,
    }
    rows = {str(row["part"]): row for row in shares([line, line])}
    assert rows["update"]["share"] == pytest.approx(0.8)
    assert rows["everything else"]["share"] == pytest.approx(0.01)
    assert rows["whole"]["ms an update"] == pytest.approx(400)


def test_goals_are_held_against_what_was_measured() -> None:
    results: dict[str, list[dict[str, object]]] = {
        "floor": [
            {"case": "dreamer_v3 train paper", "kind": "matmul", "of update": 0.1},
            {"case": "dreamer_v3 train paper", "kind": "whole: 4 s", "of update": 0.5},
        ],
        "extract": [{"what": "extract at 64 px", "workers": n, "25-frame clips/s": 15.0 * n, "windows/s": ""} for n in (1, 2)],
        "gpu": [{"update": "no CUDA device here"}],
    }
    rows = {str(row["goal"]): row for row in against_goals(results)}
    assert {row["part"] for row in rows.values()} == set(results)
    assert rows["DreamerV3 12M, over its floor"]["measured"] == 2.0
    assert rows["DreamerV3 12M, over its floor"]["reached"] == 0.75
    assert rows["extraction at 64 px, two workers"]["reached"] == 0.5
    assert rows["extraction at 128 px, two workers"]["measured"] == "not here"
    assert rows["DRP paper, 50 x 50, on a GPU"]["measured"] == "not here"


def test_growth_is_told_from_what_is_fixed() -> None:
    values = (1, 2, 4, 8)
    assert growth([7 + 3 * x**2 for x in values]) == pytest.approx(2)
    assert exponent(values, [5 * x**1.5 for x in values]) == pytest.approx(1.5)
    squared = Curve("batch", UPDATE, values, [x**2 for x in values], (1, 1), "", [100 + x**2 for x in values])
    assert squared.row()["as expected"] == "no"


def test_scaling_draws_its_picture(tmp_path: Path) -> None:
    curves = [
        Curve("K", UPDATE, (4, 8, 16), [0.4, 0.42, 0.5], (1, 2), "", [1e9, 2e9, 4e9]),
        Curve("K", ENCODER, (4, 8, 16), [0.03, 0.05, 0.1], (1, 2), ""),
        Curve("records", "replay", (1000, 4000), [0.004, 0.004], (0, 0), ""),
    ]
    draw(curves, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
