"""Tasks of a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmotion.launch import Launch, carry_out
from test_launch import Stops, command
from waiting import holds

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes; the second one has a resource that the first lacks."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=2, resources={"second": 1})
    yield cluster.address
    cluster.shutdown()


def test_tasks_of_two_nodes(address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = [command(name, "", "--version", folder=tmp_path) for name in ("one", "two")]
    commands.append(command("bad", "", "scan", "nowhere", folder=tmp_path, share=("--workers", "{}")))
    engine = Launch("ray", options={"address": address, "num_cpus": 2, "resources": {"second": 0.1}}).engine(tmp_path)
    failed = carry_out(engine, commands, pack=2, stop=Stops())
    assert list(failed) == ["bad"]
    assert failed["bad"].startswith("nowhere")
    said = capfd.readouterr().out
    assert "Ray: 2 nodes, 3 CPUs, 0 GPUs" in said
    assert "given   one, two: task " in said


def test_the_end_of_the_command_stops_its_tasks(address: str, tmp_path: Path) -> None:
    engine = Launch("ray", options={"address": address}).engine(tmp_path)
    engine.start([[command("watch", "", "watch", "nothing", folder=tmp_path)]])
    while not holds(tmp_path / "watch.log", "http"):
        assert engine.ended() == []
        time.sleep(0.5)
    assert watching(tmp_path)
    engine.close()
    assert not watching(tmp_path)


def watching(folder: Path) -> list[Path]:
    """Processes that run in ``folder`` and are `localmotion watch`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"\0watch\0" in (process / "cmdline").read_bytes() and (process / "cwd").resolve() == folder.resolve():
                found.append(process)
        except OSError:
            continue
    return found
