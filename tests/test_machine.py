"""What the machine gives: cores under every kind of limit, free cores, how threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from localmotion import machine

SRC = Path(__file__).parent.parent / "src" / "localmotion"


def python(code: str, **env: str) -> str:
    """What a fresh Python prints, without the variables by which a user chooses cores and waiting."""
    drop = {*machine.WAITING, "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID"}
    clean = {name: value for name, value in os.environ.items() if name not in drop}
    clean["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 cores, all of them this process's."""
    monkeypatch.setattr(machine, "_cpus", lambda: list(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def system(root: Path, files: dict[str, str]) -> Path:
    """A root folder of system files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu,cpuacct"
LIMITS = {
    "no control groups": ({}, 16),
    "version 2, no quota": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 16),
    "version 2, rounded up": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 3),
    "version 2, below one": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "10000 100000\n"}, 1),
    "version 2, above the machine's": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "9900000 100000\n"}, 16),
    "version 2, a parent's": (
        {
            "proc/self/cgroup": "0::/user.slice/run.scope\n",
            "sys/fs/cgroup/user.slice/run.scope/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "400000 100000\n",
        },
        4,
    ),
    "version 2, a container's own root": ({"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "version 2 in a folder of its own": (
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/unified/a/cpu.max": "200000 100000\n"},
        2,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/a\n1:name=systemd:/b\n",
            f"{V1}/a/cpu.cfs_quota_us": "500000",
            f"{V1}/a/cpu.cfs_period_us": "100000",
        },
        5,
    ),
    "version 1, no quota": (
        {"proc/self/cgroup": "4:cpu,cpuacct:/\n", f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"},
        16,
    ),
    "version 1, the host's path in a container": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/1f\n",
            f"{V1}/cpu.cfs_quota_us": "300000",
            f"{V1}/cpu.cfs_period_us": "100000",
        },
        3,
    ),
    "nonsense": ({"proc/self/cgroup": "what\n0::/a\n", "sys/fs/cgroup/a/cpu.max": "all of them\n"}, 16),
}


@pytest.mark.parametrize("name", LIMITS)
def test_cores_keep_to_the_quota_of_control_groups(name: str, tmp_path: Path, sixteen: None) -> None:
    files, expected = LIMITS[name]
    assert machine.cores(system(tmp_path, files)) == expected


def test_cores_keep_to_slurm_where_it_sets_no_affinity(tmp_path: Path, sixteen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert machine.cores(tmp_path) == 16  # no job: a variable left behind
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert machine.cores(tmp_path) == 4
    monkeypatch.setattr(machine, "_cpus", lambda: list(range(8)))
    assert machine.cores(tmp_path) == 8  # Slurm gave four cores of two hardware threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_cores_are_those_of_the_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from localmotion.machine import cores; print(cores())"
    assert python(code) == "1"


def test_no_other_file_counts_cores() -> None:
    """Each such count would forget taskset, containers and Slurm."""
    for path in SRC.rglob("*.py"):
        if path.name not in ("machine.py", "info.py"):
            text = path.read_text()
            assert "cpu_count" not in text, path
            assert "sched_getaffinity" not in text, path


STAT = "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 {} {} 100 500 50 10 10 {} 7 7\ncpu1 300 0 0 400 0 0 0 0 0 0\ncpu10 9 9 9 9 9 9 9 9 9 9\nintr 5\n"


def test_the_load_is_that_of_our_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User, system, interrupts and what the host took are busy; idle, waiting for disks and low priority are not."""
    monkeypatch.setattr(machine, "_cpus", lambda: [0])
    monkeypatch.setattr(os, "nice", lambda _: 0)
    root = system(
        tmp_path, {"proc/stat": STAT.format(200, 400, 30), "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"}
    )
    system(tmp_path, {"sys/fs/cgroup/cpu.stat": "usage_usec 2500000\nuser_usec 1\n"})
    found = machine.load(root)
    assert found is not None
    assert found.busy == (200 + 100 + 10 + 10 + 30) / os.sysconf("SC_CLK_TCK")
    assert found.group == 2.5
    monkeypatch.setattr(os, "nice", lambda _: 10)
    lower = machine.load(root)
    assert lower is not None
    assert lower.busy == found.busy + 400 / os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(machine, "_cpus", lambda: [0, 5])
    assert machine.load(root) is None  # a CPU without counters


def test_free_cores_are_what_others_leave(tmp_path: Path, sixteen: None) -> None:
    before = machine.Load(0.0, 0.0, 0.0, None)
    assert machine.free_cores(before, machine.Load(10.0, 0.0, 0.0, None), tmp_path) == 16
    assert machine.free_cores(before, machine.Load(10.0, 40.0, 40.0, None), tmp_path) == 16  # all of it our own
    assert machine.free_cores(before, machine.Load(10.0, 40.0, 100.0, None), tmp_path) == 10
    assert machine.free_cores(before, machine.Load(10.0, 0.0, 900.0, None), tmp_path) == 0


def test_a_quota_is_shared_by_its_group_alone(tmp_path: Path, sixteen: None) -> None:
    """Six cores of quota, two of them used by others of the group, on a machine with five free cores, then one."""
    root = system(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "600000 100000"})
    before = machine.Load(0.0, 0.0, 0.0, 0.0)
    assert machine.free_cores(before, machine.Load(10.0, 10.0, 120.0, 30.0), root) == 4
    assert machine.free_cores(before, machine.Load(10.0, 10.0, 160.0, 30.0), root) == 1


def test_an_unknown_load_leaves_all_cores_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load", lambda: None)
    assert machine.measure_free_cores(0) == machine.cores()


def test_threads_spin_for_a_moment_and_sleep_and_torch_is_not_yet_loaded() -> None:
    """By the first import of the package, so for the command line, for workers and for a library's user; a user's word stands."""
    show = "import os, sys; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    assert python(f"import localmotion.cli; {show}") == "passive 2000 False"
    assert python(f"import localmotion; {show}", OMP_WAIT_POLICY="active") == "active None False"
    assert python(f"import localmotion; {show}", GOMP_SPINCOUNT="7") == "None 7 False"
    late = (
        "import sys, types; sys.modules['torch'] = types.ModuleType('torch'); import localmotion; from localmotion import machine"
    )
    assert python(f"{late}; print(machine.waiting())").startswith("spinning: torch was loaded first")
