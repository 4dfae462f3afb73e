"""Install torch into the environment of this Python: a CPU build without an NVIDIA GPU, else the CUDA build.

    .venv/bin/python tools/install_torch.py 2.13.0

This script uses only the standard library. The wheel of torch on pypi.org for Linux is the CUDA build. With its
libraries it has several GB, and a machine without an NVIDIA GPU cannot use them. CPU builds have a separate index.
``TORCH_INDEX=URL`` sets another index. With an empty ``TORCH_INDEX=``, pip's own configuration decides
(``PIP_INDEX_URL``, ``PIP_FIND_LINKS``, pip.conf). It also decides if the index cannot be reached.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
QUICK = ("--retries", "1", "--timeout", "10")
"""pip options that limit the wait for an index that cannot be reached to seconds."""


class Choice(NamedTuple):
    """``index`` for torch ("" for pip's own configuration), and the reason for this choice."""

    index: str
    why: str


def has_gpu() -> bool:
    """Whether an NVIDIA driver runs here."""
    if not shutil.which("nvidia-smi"):
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def choose(given: str | None, gpu: bool, system: str) -> Choice:
    """Choose the index. ``given``: ``TORCH_INDEX`` or None. ``gpu``: an NVIDIA GPU is present.

    ``system``: `platform.system`.
    """
    if given is not None:
        return Choice(given, f"TORCH_INDEX={given}")
    if gpu:
        return Choice("", "nvidia-smi finds a GPU: the CUDA build of pip's own index")
    if system != "Linux":
        return Choice("", f"the wheel of pip's own index needs no CUDA on {system}")
    return Choice(CPU_INDEX, "no NVIDIA GPU (nvidia-smi): a CPU build")


def pip(*arguments: str) -> tuple[int, str]:
    """Exit code and messages of `pip install`."""
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def install(version: str, choice: Choice) -> int:
    """Install torch of ``version``; returns pip's exit code."""
    wanted = f"torch=={version}"
    if choice.index:
        print(f"torch {version}, {choice.why}; asking {choice.index}", flush=True)
        # Without dependencies: `pip install -e .` installs them from pip's own index, where they are the same.
        code, said = pip("--no-deps", "--index-url", choice.index, *QUICK, wanted)
        if code == 0:
            return 0
        if "Downloading" in said:  # only the download failed, so do not install another build
            code, said = pip("--no-deps", "--index-url", choice.index, wanted)
            if code:
                print(
                    f"{said}error: torch cannot be installed from {choice.index}; set TORCH_INDEX to another index",
                    file=sys.stderr,
                )
            return code
        print(
            f"{choice.index} cannot be reached, or has no torch {version} for this Python. Asking pip's own index instead;",
            flush=True,
        )
        print("on pypi.org that is the CUDA build for Linux, several GB, which also computes on a CPU.", flush=True)
    else:
        print(f"torch {version}, {choice.why}", flush=True)
    code, said = pip(wanted)
    if code:
        print(f"{said}error: torch {version} cannot be installed; see pip's message above", file=sys.stderr)
    return code


def built_for() -> str:
    """CUDA version of the installed torch, "" for a CPU build.

    torch itself is not imported, because its dependencies are not installed yet.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("pip installed torch, but this Python does not find it")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] or ""


def main(version: str) -> int:
    gpu = has_gpu()
    code = install(version, choose(os.environ.get("TORCH_INDEX"), gpu, platform.system()))
    if code:
        return code
    importlib.invalidate_caches()
    cuda = built_for()
    print(
        f"installed torch {importlib.metadata.version('torch')}: {f'built for CUDA {cuda}' if cuda else 'a build without CUDA'}"
    )
    if gpu and not cuda:
        print("warning: there is a GPU that this build cannot use; set TORCH_INDEX, e.g. https://download.pytorch.org/whl/cu130")
    elif cuda and not gpu:
        print("note: a CUDA build on a machine without an NVIDIA GPU; it computes on the CPU and takes several GB of disk")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
