"""Devices, and threads that follow the load of the machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import bench_floor, bench_update
from benchmarks.goals import against_goals

from localmotion import compute, machine
from localmotion.compute import Compute, Threads, choose, devices, find_device
from localmotion.errors import ConfigError
from localmotion.runs.settings import compose
from localmotion.training.finetune import finetune
from localmotion.training.pretrain import pretrain

RUN = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags={"precision": "fp32", "device": "cpu"})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A machine of four cores; the list's only item is how many are free. The clock and the counters are the test's."""
    cores = [4.0]
    monkeypatch.setattr(compute, "_SET", None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "measure_free_cores", lambda: cores[0])
    monkeypatch.setattr(machine, "free_cores", lambda before, after: cores[0])
    monkeypatch.setattr(compute, "LOOK_EVERY", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield cores
    torch.set_num_threads(before)


def test_as_many_threads_as_cores_are_free(free: list[float]) -> None:
    for cores, threads in ((2.4, 2), (0.0, 1), (4.0, 4), (1.6, 2)):  # what one run chose does not bound the next
        free[0] = cores
        chosen = choose(RUN)
        assert (chosen.threads, torch.get_num_threads()) == (threads, threads)
        assert f"{threads} thread(s) ({cores:.1f} of 4 cores are free)" in chosen.note


def test_the_number_of_threads_follows_the_load(free: list[float]) -> None:
    chosen = choose(RUN)
    for cores, threads in ((3.6, 4), (3.4, 3), (3.6, 3), (2.6, 3), (1.2, 1), (1.6, 1), (1.8, 2), (4.0, 4), (0.0, 1)):
        free[0] = cores
        before = torch.get_num_threads()
        line = chosen.look_again()
        assert torch.get_num_threads() == threads, cores
        assert line == (
            f"{cores:.1f} of 4 cores were free for this run: {threads} thread(s) from now on, {before} before"
            if threads != before
            else ""
        )


def test_the_load_is_looked_at_now_and_then(free: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "LOOK_EVERY", 1e6)
    chosen = choose(RUN)
    free[0] = 1.0
    assert chosen.look_again() == ""
    assert torch.get_num_threads() == 4


def test_threads_that_the_user_set_stay(free: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    free[0] = 1.0
    for run in (replace(RUN, threads=3), replace(RUN, compile=True)):
        chosen = choose(run)
        assert (chosen.adaptive, chosen.threads) == (None, run.threads or 4)
        assert chosen.look_again() == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert choose(RUN).threads == 4


def test_no_more_threads_than_torch_has_of_its_own(free: list[float]) -> None:
    torch.set_num_threads(2)
    assert choose(RUN).threads == 2
    torch.set_num_threads(1)
    assert choose(RUN).adaptive is None


def test_a_policy_acts_on_one_thread(free: list[float]) -> None:
    place = Compute(torch.device("cpu"), False, 4, "")
    for environments, threads in ((1, 1), (16, 1), (17, 4)):
        with place.acting(environments):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 4
    with pytest.raises(RuntimeError, match="broken"), place.acting():
        raise RuntimeError("broken")
    assert torch.get_num_threads() == 4


class Falling(Threads):
    """Loses a thread at each look."""

    def look(self) -> str:
        if self.now == 1:
            return ""
        self.now -= 1
        torch.set_num_threads(self.now)
        return f"{self.now} now"


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_a_run_logs_each_change(
    stage: str,
    free: list[float],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free[0] = 3.0
    monkeypatch.setattr(compute, "Threads", Falling)
    flags = {"precision": "fp32", "device": "cpu"}
    if stage == "pretrain":
        run = compose("ipv", "pretrain", preset="debug", flags=flags, settings=[f"data={store}", "updates=3"])
        pretrain(run, tmp_path / "run")
    else:
        few = ("env_steps=110", "prefill=60", "warmup_updates=3", "eval_episodes=1")
        finetune(compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags=flags, settings=few), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["update"], line["threads"]) for line in lines if line["kind"] == "threads"] == [(1, 2), (2, 1)]
    assert "\n1 now\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["mps", "xpu", "gpu", "cuda:99", "cuda", "cpu:3", "meta", "", "cuda:", "cuda:-1", "tpu", "vulkan"]
)
def test_a_device_that_is_not_here_is_one_line(name: str) -> None:
    if name in devices() or (name == "cuda" and torch.cuda.is_available()):
        pytest.skip(f"{name} is here")
    with pytest.raises(ConfigError, match=r"cannot be used here .*; devices here: cpu") as caught:
        choose(replace(RUN, device=name))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_devices_that_are_here() -> None:
    assert find_device("cpu") == find_device("cpu:0") == torch.device("cpu")
    for name in devices():
        assert str(find_device(name)) == name
    assert find_device("auto").type in ("cpu", "cuda")


def test_shares_are_of_the_peak_of_the_precision_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which bf16 is slow runs in fp32, and its bf16 peak bounds nothing."""
    peaks = {torch.float32: 100e9, torch.bfloat16: 1e9}
    cases = (("dreamer_v2", "train", "debug"),)
    for bf16, top in ((False, 100e9), (True, 1e9)):
        monkeypatch.setattr(compute, "bf16_speedup", lambda bf16=bf16: (2e9, 1e9) if bf16 else (1e9, 2e9))
        for module in (bench_update, bench_floor):
            monkeypatch.setattr(module, "peak", peaks.__getitem__)
        (row,) = bench_update.run(cases, repeats=1)
        assert row["precision"] == ("bf16" if bf16 else "fp32")
        assert row["of its peak"] == pytest.approx(1e9 * row["GFLOP/s"] / top)  # type: ignore[operator]
    monkeypatch.setattr(
        bench_floor, "measure", lambda step: (2.0, [{"kind": "matmul", "alone ms": 1e3, "GFLOP": 50.0, "calls": 1}], {})
    )
    monkeypatch.setattr(compute, "bf16_speedup", lambda: (1e9, 2e9))
    *_, whole = bench_floor.run(cases)
    assert whole["precision"] == "fp32"
    assert "4.00 peak floors" in str(whole["kind"])


def test_peers_are_compared_in_the_faster_precision() -> None:
    rows = [
        {"peer": "r2dreamer, eager", "precision": p, "ours s": s, "ratio": r}
        for p, s, r in (("bf16", 9.0, 7.0), ("fp32", 5.0, 3.0))
    ]
    found = {str(row["goal"]): row["measured"] for row in against_goals({"peers": [*rows, {"update": "another cannot be run"}]})}
    assert found["DreamerV3 12M, 16 x 64: r2dreamer's time over ours"] == 3.0
    assert found["the same, r2dreamer with our allocator setting"] == "not here"
