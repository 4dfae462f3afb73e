"""Find a working OpenGL: EGL, then OSMesa, each tried in a subprocess before this process uses it.

A broken driver can hang, crash or draw black. So a backend first draws a small coloured scene in a subprocess, with a time limit, and
the picture is checked. Only then is ``MUJOCO_GL`` set, which MuJoCo reads once, when its own OpenGL parts are imported.

Every environment that draws calls `choose_gl` before its first OpenGL context, so it also calls `load_triton`.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from localmotion.errors import EnvError
from localmotion.files import one_line
from localmotion.foreign import needs

MENDS = {
    "egl": "EGL needs a GPU driver with EGL, or Mesa: apt-get install libegl1 libgl1-mesa-dri libopengl0",
    "osmesa": "OSMesa needs: apt-get install libosmesa6",
    "glfw": "GLFW needs a display; without one unset MUJOCO_GL",
}
_OFF = ("disable", "disabled", "off", "false", "0")
_ON = ("", "enable", "enabled", "on", "true", "1")
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software rasterizer", "osmesa", "swiftshader")
_SCENE = """<mujoco><visual><global offwidth="32" offheight="32"/><quality shadowsize="0" offsamples="0"/></visual><worldbody>
<light pos="0 0 3"/><geom type="box" size=".5 .5 .1" rgba="1 0 0 1"/></worldbody></mujoco>"""


@dataclass(frozen=True)
class GLInfo:
    """Which OpenGL draws the environments.

    backend   egl, osmesa, glfw or cgl: the value of ``MUJOCO_GL``
    renderer  OpenGL's own name of the device, e.g. "llvmpipe (LLVM 15.0.6, 256 bits)" or "NVIDIA H200/PCIe/SSE2"
    vendor    OpenGL's vendor string
    software  drawn by the CPU
    tested    a scene was drawn in a subprocess and checked
    message   one line for people
    """

    backend: str
    renderer: str
    vendor: str
    software: bool
    tested: bool
    message: str

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


_INFO: GLInfo | None = None
_CONTEXTS: dict[tuple[int, int], Any] = {}  # (process, thread) -> the GL context all renderers of that thread share


class _Closes(Protocol):
    def close(self) -> None: ...


_OPEN: weakref.WeakSet[_Closes] = weakref.WeakSet()


def register(renderer: _Closes) -> None:
    """Remember a renderer, so it is closed before its GL context when the process ends."""
    _OPEN.add(renderer)
    # Exit handlers run newest first. MuJoCo and dm_control each end the EGL display in one of theirs; ours must run before both.
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    """At exit: close the renderers. The contexts end with the process; nothing may use them after the display has ended."""
    for renderer in list(_OPEN):
        renderer.close()
    for context in _CONTEXTS.values():
        context._context = None
    _CONTEXTS.clear()


_TRITON: str | None = None  # result of `load_triton`


def load_triton() -> str:
    """Load triton, if installed, before this process makes its first OpenGL context. Later calls return the same result.

    CUDA builds of torch install triton, and torch's optimisers import it, also on a CPU. Mesa's OpenGL drivers load their own LLVM with
    global symbols. If triton is loaded later, its LLVM calls into Mesa's LLVM of another version, and the process crashes with a
    segmentation fault. In the other order each uses its own. Loading takes 0.1 s and 110 MB, most of it shared with the file.

    Returns:
        "not installed", its version, or why it cannot be loaded; training continues without it.

    Raises:
        EnvError: triton is installed, and another part of this program has already loaded Mesa's driver.
    """
    global _TRITON
    if _TRITON is None:
        _TRITON = _load_triton()
    return _TRITON


def _load_triton() -> str:
    if "triton" not in sys.modules:
        if importlib.util.find_spec("triton") is None:
            return "not installed"
        if "libLLVM" in _mapped():
            raise EnvError(
                "this program loaded an OpenGL driver before triton, so torch's first optimiser would crash; import triton at its start"
            )
    try:
        module = importlib.import_module("triton")
    except Exception as error:  # third-party errors of any type; triton is needed only if torch compiles
        return f"cannot be loaded: {type(error).__name__}: {one_line(error, 200)}"
    return str(getattr(module, "__version__", "of unknown version"))


def _mapped() -> str:
    """The files mapped into this process, "" if the system does not report them."""
    try:
        with open("/proc/self/maps") as file:
            return file.read()
    except OSError:
        return ""


def _candidates() -> list[str]:
    """Backends to try, best first: that of ``MUJOCO_GL``, else the one fixed by an earlier import, else all."""
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    if wanted in _OFF:
        raise EnvError(f"MUJOCO_GL={wanted} switches rendering off; unset it, or set it to egl or osmesa")
    if platform.system() != "Linux":
        return ["cgl" if platform.system() == "Darwin" else "glfw"]
    if wanted not in _ON:
        known = {"egl": "egl", "osmesa": "osmesa", "glfw": "glfw", "glx": "glfw"}
        if wanted not in known:
            raise EnvError(f"MUJOCO_GL={wanted} is not a backend; unset it, or set it to egl or osmesa")
        return [known[wanted]]
    fixed = os.environ.get("PYOPENGL_PLATFORM", "").lower()
    if "OpenGL" in sys.modules and fixed in ("egl", "osmesa"):
        return [fixed]  # PyOpenGL is loaded for one platform and cannot change
    return ["egl", "osmesa"]


def choose_gl(timeout: float = 60.0) -> GLInfo:
    """Choose the OpenGL backend of this process once; later calls return the same result.

    Uses ``MUJOCO_GL`` (and ``MUJOCO_EGL_DEVICE_ID``), else tries EGL, then OSMesa. Sets ``MUJOCO_GL`` to the one found, and
    ``LP_NUM_THREADS`` (threads of Mesa's software drawing) to 0 unless it is set.

    Args:
        timeout: seconds one backend may take to import MuJoCo and draw.

    Raises:
        EnvError: no backend works; the message has the cause for each and the packages to install. Also the errors of `load_triton`.
        MissingExtraError: MuJoCo is not installed.
    """
    global _INFO
    if _INFO is not None:
        return _INFO
    needs("dmc", "mujoco", who="drawing with OpenGL")
    load_triton()
    # Pictures of 64 pixels are too small for Mesa's rasteriser threads: passing work to them takes a third of a DMC frame on an idle
    # machine, and several times the frame while the cores are busy with learning. Zero draws in the calling thread, the same picture.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    causes = []
    for backend in _candidates():
        found, cause = _try(backend, timeout)
        if found is not None:
            os.environ["MUJOCO_GL"] = backend
            _INFO = found
            return found
        causes.append(f"{backend}: {cause}. {MENDS.get(backend, 'Install the graphics driver')}")
    raise EnvError("no OpenGL to draw with. " + "; ".join(causes))


def _try(backend: str, timeout: float) -> tuple[GLInfo | None, str]:
    """Draw with ``backend`` in a subprocess. Returns the result, or None and the cause in one line."""
    env = dict(os.environ, MUJOCO_GL=backend, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    env.pop("PYOPENGL_PLATFORM", None)
    command = [sys.executable, "-m", "localmotion.envs.gl", backend]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no picture within {timeout:g} s (the driver hangs)"
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        if done.returncode < 0:
            return None, f"crashed with signal {-done.returncode}"
        errors = done.stderr.strip().splitlines()
        return None, errors[-1][:200] if errors else f"ended with code {done.returncode}"
    seen = json.loads(lines[-1])
    if not seen["ok"]:
        return None, f"drew a wrong picture (a red box came out as RGB {seen['middle']}) on {seen['renderer']}"
    software = any(word in seen["renderer"].lower() for word in _SOFTWARE) or backend == "osmesa"
    kind = "software" if software else "hardware"
    message = f"{backend} on {seen['renderer']} ({kind}); drawn and looked at"
    return GLInfo(backend, seen["renderer"], seen["vendor"], software, True, message), ""


def _new_context(backend: str) -> Any:
    """A GL context of ``backend``, imported directly, because MuJoCo chose its own at its first import."""
    if backend == "egl":
        from mujoco.egl import GLContext
    elif backend == "osmesa":
        from mujoco.osmesa import GLContext
    elif backend == "cgl":
        from mujoco.cgl import GLContext
    else:
        from mujoco.glfw import GLContext
    # The size only matters for OSMesa's and GLFW's window buffer; pictures are drawn into off-screen buffers.
    return GLContext(64, 64)


def current_context() -> Any:
    """The GL context of this thread, made on first use and shared by all its renderers, so no switching is needed.

    Raises:
        EnvError: no backend works, or the context cannot be made.
    """
    key = (os.getpid(), threading.get_ident())
    context = _CONTEXTS.get(key)
    if context is None:
        info = choose_gl()
        try:
            context = _new_context(info.backend)
        except (ImportError, RuntimeError) as error:
            raise EnvError(f"{info.backend} drew in a subprocess but not here: {error}; start a fresh process") from error
        _CONTEXTS[key] = context
    context.make_current()
    return context


def _probe(backend: str) -> None:
    """Subprocess: draw a red box; print OpenGL's description and the colour of the box as one JSON line."""
    import mujoco
    import numpy as np

    _new_context_kept = _new_context(backend)
    _new_context_kept.make_current()
    model = mujoco.MjModel.from_xml_string(_SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    scene, camera = mujoco.MjvScene(model, 10), mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, camera)
    context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
    rect, picture = mujoco.MjrRect(0, 0, 32, 32), np.zeros((32, 32, 3), np.uint8)
    mujoco.mjr_render(rect, scene, context)
    mujoco.mjr_readPixels(picture, None, rect, context)
    from OpenGL import GL  # type: ignore[import-untyped]

    middle = [int(x) for x in picture[16, 16]]
    corner = [int(x) for x in picture[0, 0]]
    names = {key: GL.glGetString(which).decode() for key, which in (("renderer", GL.GL_RENDERER), ("vendor", GL.GL_VENDOR))}
    good = middle[0] > 60 and middle[0] > 2 * max(middle[1], middle[2]) and corner != middle
    print(json.dumps(names | {"ok": good, "middle": middle}), flush=True)
    context.free()


if __name__ == "__main__":
    _probe(sys.argv[1])
