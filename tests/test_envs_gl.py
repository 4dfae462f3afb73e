"""Choosing OpenGL: what is found is said, and what does not work is an error with a mend, never a hang or a black picture."""

from __future__ import annotations

import os
import sys

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
