"""Which build of torch `make setup` installs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import install_torch
from tools.install_torch import CPU_INDEX, choose

GONE = "WARNING: Retrying\nERROR: No matching distribution found for torch==2.13.0\n"
BROKE = "Downloading torch-2.13.0%2Bcpu-cp311.whl (190 MB)\nERROR: incomplete-download\n"


def test_the_index_is_that_of_the_machine_unless_set() -> None:
    assert choose(None, False, "Linux").index == CPU_INDEX
    assert choose(None, True, "Linux").index == ""
    assert choose(None, False, "Darwin").index == ""
    assert choose("https://mirror/cu130", False, "Linux") == ("https://mirror/cu130", "TORCH_INDEX=https://mirror/cu130")
    assert choose("", False, "Linux").index == ""


class Pip:
    """Answers in turn and remembers what it was asked."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, *arguments: str) -> tuple[int, str]:
        self.asked.append(arguments)
        return self.answers.pop(0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(install_torch, "has_gpu", lambda: False)
    monkeypatch.setattr(install_torch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install_torch, "built_for", lambda: "")
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    return monkeypatch


def test_an_index_out_of_reach_costs_seconds(machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One quick question, then pip as its user configured it, whose wheel may be any build."""
    pip = Pip((1, GONE), (0, ""))
    machine.setattr(install_torch, "pip", pip)
    machine.setattr(install_torch, "built_for", lambda: "13.0")
    assert install_torch.main("2.13.0") == 0
    first, second = pip.asked
    assert first[:3] == ("--no-deps", "--index-url", CPU_INDEX)
    assert {"--retries", "--timeout"} <= set(first)
    assert second == ("torch==2.13.0",)
    told = capsys.readouterr().out
    assert "no NVIDIA GPU" in told
    assert f"{CPU_INDEX} cannot be reached" in told
    assert "built for CUDA 13.0" in told
    assert "note: a CUDA build on a machine without an NVIDIA GPU" in told


def test_a_download_that_breaks_is_tried_again_and_never_becomes_another_build(
    machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = Pip((1, BROKE), (0, ""))
    machine.setattr(install_torch, "pip", pip)
    assert install_torch.main("2.13.0") == 0
    assert [CPU_INDEX in asked for asked in pip.asked] == [True, True]
    assert "a build without CUDA" in capsys.readouterr().out
    machine.setattr(install_torch, "pip", Pip((1, BROKE), (1, "ERROR: no space left\n")))
    assert install_torch.main("2.13.0") == 1
    assert "no space left" in capsys.readouterr().err


def test_with_a_gpu_pip_is_asked_for_its_own_build(machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pip = Pip((0, ""))
    machine.setattr(install_torch, "pip", pip)
    machine.setattr(install_torch, "has_gpu", lambda: True)
    assert install_torch.main("2.13.0") == 0
    assert pip.asked == [("torch==2.13.0",)]
    assert "warning: there is a GPU that this build cannot use" in capsys.readouterr().out


def test_a_gpu_is_what_nvidia_smi_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is installed and does not run is none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install_torch.has_gpu()
    tool = tmp_path / "nvidia-smi"
    for code in (0, 9):
        tool.write_text(f"#!/bin/sh\nexit {code}\n")
        tool.chmod(0o755)
        assert install_torch.has_gpu() == (code == 0)


def test_the_build_is_read_without_importing_torch() -> None:
    import torch

    assert install_torch.built_for() == (torch.version.cuda or "")
