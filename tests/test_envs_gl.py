"""Choosing OpenGL: what is found is said, and what does not work is an error with a mend, never a hang or a black picture."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from localmotion.envs import gl
from localmotion.errors import EnvError


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The process has not chosen yet."""
    monkeypatch.setattr(gl, "_INFO", None)
    return monkeypatch


def test_the_choice_is_drawn_looked_at_and_kept() -> None:
    info = gl.choose_gl()
    assert info.tested
    assert os.environ["MUJOCO_GL"] == info.backend
    assert info.renderer in info.message
    assert info.software == any(word in info.renderer.lower() for word in ("llvmpipe", "softpipe", "swrast"))
    assert gl.choose_gl() is info
    assert gl.GLInfo(**info.to_json()) == info


def test_a_driver_that_hangs_is_given_up(forgotten: pytest.MonkeyPatch) -> None:
    forgotten.setenv("MUJOCO_GL", "egl")
    with pytest.raises(EnvError, match=r"egl: no picture within 0.01 s.*libegl1"):
        gl.choose_gl(timeout=0.01)


@pytest.mark.parametrize(("value", "said"), [("vulkan", "not a backend"), ("off", "switches rendering off")])
def test_impossible_values_of_mujoco_gl(forgotten: pytest.MonkeyPatch, value: str, said: str) -> None:
    forgotten.setenv("MUJOCO_GL", value)
    if sys.platform != "linux" and value == "vulkan":
        pytest.skip("other systems have one backend")
    with pytest.raises(EnvError, match=said):
        gl.choose_gl()


@pytest.mark.skipif(sys.platform != "linux", reason="EGL and OSMesa are Linux's")
def test_without_a_wish_egl_comes_before_osmesa_and_all_causes_are_told(forgotten: pytest.MonkeyPatch) -> None:
    forgotten.delenv("MUJOCO_GL", raising=False)
    forgotten.setattr(gl, "_candidates", lambda: ["egl", "osmesa"])
    tried = []

    def fail(backend: str, timeout: float) -> tuple[None, str]:
        tried.append(backend)
        return None, f"no {backend} here"

    forgotten.setattr(gl, "_try", fail)
    with pytest.raises(EnvError, match=r"egl: no egl here.*libegl1.*osmesa: no osmesa here.*libosmesa6"):
        gl.choose_gl()
    assert tried == ["egl", "osmesa"]
    assert "MUJOCO_GL" not in os.environ


def _fake_interpreter(path: object, body: str) -> str:
    script = f"{path}/python"
    with open(script, "w") as file:
        file.write(f"#!/bin/sh\n{body}\n")
    os.chmod(script, 0o755)
    return script


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('echo \'{"ok": false, "middle": [0, 0, 0], "renderer": "Dark", "vendor": "V"}\'', r"RGB \[0, 0, 0\].* on Dark"),
        ("kill -SEGV $$", "crashed with signal 11"),
        ("echo first >&2; echo 'ImportError: no libEGL' >&2; exit 1", "egl: ImportError: no libEGL"),
        ("exit 3", "ended with code 3"),
    ],
)
def test_black_pictures_and_crashes_are_seen(forgotten: pytest.MonkeyPatch, tmp_path: object, body: str, said: str) -> None:
    forgotten.setenv("MUJOCO_GL", "egl")
    forgotten.setattr(sys, "executable", _fake_interpreter(tmp_path, body))
    with pytest.raises(EnvError, match=said):
        gl.choose_gl()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(("renderer", "software"), [("llvmpipe (LLVM 15)", True), ("NVIDIA H200/PCIe/SSE2", False)])
def test_software_and_hardware_are_told_apart(
    forgotten: pytest.MonkeyPatch, tmp_path: object, renderer: str, software: bool
) -> None:
    forgotten.setenv("MUJOCO_GL", "egl")
    line = f'{{"ok": true, "middle": [99, 0, 0], "renderer": "{renderer}", "vendor": "V"}}'
    forgotten.setattr(sys, "executable", _fake_interpreter(tmp_path, f"echo '{line}'"))
    info = gl.choose_gl()
    assert (info.software, info.backend, info.vendor) == (software, "egl", "V")


STAND_IN = """
maps = open("/proc/self/maps").read()
assert "libLLVM" not in maps and "_dri.so" not in maps, "OpenGL's driver was loaded first"
print("triton", flush=True)
__version__ = "99"
"""
USER = """
import sys
import localmotion.envs
env = localmotion.envs.make_env("dmc:cartpole_balance", quality="fast")
env.reset(seed=0)
assert env.render_frame(32).any()
print("drawn", "libLLVM" in open("/proc/self/maps").read())
{more}
"""
OPTIMISER = """
import torch
weight = torch.nn.Parameter(torch.ones(2))
optimiser = torch.optim.Adam([weight])
weight.sum().backward()
optimiser.step()
print("stepped", "triton" in sys.modules)
"""


def drawing(more: str, *folders: Path) -> list[str]:
    """Words printed by a fresh process of a library's user who draws; ``folders`` come first on its path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), *(path for path in sys.path if path)])}
    code = USER.format(more=more)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return done.stdout.split()


def fake_triton(folder: Path, text: str) -> Path:
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text(text)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="triton and Mesa meet on Linux")
def test_triton_is_loaded_before_the_first_opengl_driver(tmp_path: Path) -> None:
    """In the other order its LLVM meets Mesa's and the process dies, see `gl.load_triton`."""
    assert drawing("", fake_triton(tmp_path, STAND_IN))[:2] == ["triton", "drawn"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: CUDA builds of torch bring it")
def test_torchs_optimisers_survive_opengl_beside_the_real_triton() -> None:
    assert drawing(OPTIMISER)[-2:] == ["stepped", "True"]


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has neither loaded triton nor drawn."""
    monkeypatch.setattr(gl, "_TRITON", None)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(gl, "_mapped", lambda: "")
    return monkeypatch


def test_a_triton_that_cannot_be_loaded_stops_nobody(without_triton: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_triton.syspath_prepend(str(fake_triton(tmp_path, "raise RuntimeError('0 active drivers\\nhere')")))
    assert gl.load_triton() == "cannot be loaded: RuntimeError: 0 active drivers here"
    assert gl.load_triton() == "cannot be loaded: RuntimeError: 0 active drivers here"  # not tried again


def test_without_triton_nothing_is_loaded(without_triton: pytest.MonkeyPatch) -> None:
    without_triton.setattr(importlib.util, "find_spec", lambda name: None)
    without_triton.setattr(gl, "_mapped", lambda: "libLLVM-15.so")
    assert gl.load_triton() == "not installed"
    assert "triton" not in sys.modules


def test_triton_after_another_parts_driver_is_an_error_and_no_crash(without_triton: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_triton.syspath_prepend(str(fake_triton(tmp_path, STAND_IN)))
    without_triton.setattr(gl, "_mapped", lambda: "7f-8f r-xp /usr/lib/libLLVM-15.so.1")
    without_triton.setattr(gl, "_INFO", None)
    with pytest.raises(EnvError, match="import triton at its start"):
        gl.choose_gl()
    assert "triton" not in sys.modules
