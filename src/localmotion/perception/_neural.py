"""Shared by the neural backends: lazy imports, device and precision, construction without side effects."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError, MissingExtraError

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GUIDE = "docs/perception.md"
_NOT_WEIGHTS = "download the file again from the authors; a file that holds more than tensors is not opened further"


def optional_import(module: str, backend: str, command: str) -> ModuleType:
    """Import ``module`` or raise a MissingExtraError that gives ``command``.

    A binary package that does not fit the installed torch (usually torchvision) fails with RuntimeError or OSError instead of
    ImportError, so these count as missing, too. The message contains the cause, because the fix is different then.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        raise missing(backend, module, command, error) from error


def missing(backend: str, package: str, command: str, error: Exception) -> MissingExtraError:
    """The one-line error for a backend whose package is absent or does not load."""
    cause = _one_line(error)
    fix = f"install it with: {command}"
    absent = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("torchvision")
    if "torchvision" in cause and not absent:
        fix = f"its torchvision does not fit torch {torch.__version__}: pip install {matching_torchvision()}, or remove it"
    return MissingExtraError(f"backend {backend} needs {package}, which cannot be imported ({cause}); {fix}")


def matching_torchvision() -> str:
    """Requirement for the torchvision that fits the installed torch: 2.8 needs 0.23, 2.13 needs 0.28."""
    return f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*"


def _one_line(error: BaseException) -> str:
    """Text of an error and of its cause on one line (transformers reports a broken torchvision only as the cause)."""
    texts = [" ".join(str(error).split()) or type(error).__name__]
    inner = error.__cause__ or error.__context__
    if inner is not None and str(inner) and str(inner) not in texts[0]:
        texts.append(" ".join(str(inner).split()))
    return "; caused by: ".join(texts)[:400]


def failure(backend: str, doing: str, error: Exception, fix: str) -> LocalmotionError:
    """The one-line error for weights or code that could not be read or fetched."""
    return LocalmotionError(f"{backend}: {doing} failed ({_one_line(error)}); {fix}")


def pick_device(device: str) -> torch.device:
    """``auto`` is the first CUDA device if there is one, else the CPU; anything else is a torch device string.

    Raises ConfigError for a string that torch does not know and for a CUDA device that does not exist.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not a torch device; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ConfigError(f"device={device!r} does not exist ({count} CUDA devices); use auto or cpu")
    return chosen


def check_options(backend: str, **checks: bool) -> None:
    """Raise a ConfigError naming the first option whose check is False."""
    for name, good in checks.items():
        if not good:
            raise ConfigError(f"{backend} option {name} is out of range; see {GUIDE}")


def pick_precision(backend: str, precision: str, device: torch.device) -> torch.dtype:
    """Working precision of the network: float32, or autocast to bfloat16 or float16 (float16 on CUDA only)."""
    if precision not in PRECISIONS:
        raise ConfigError(f"{backend} option precision={precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type == "cpu":
        raise ConfigError(f"{backend} option precision=float16 is for CUDA; use bfloat16 or float32 on the CPU")
    return PRECISIONS[precision]


@contextlib.contextmanager
def inference(backend: str, device: torch.device, dtype: torch.dtype, load: str, fix: str) -> Iterator[None]:
    """Inference mode with autocast when ``dtype`` is a half precision; out of GPU memory becomes a LocalmotionError."""
    half = dtype is not torch.float32
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype if half else None, enabled=half):
            yield
    except torch.OutOfMemoryError as error:
        raise LocalmotionError(f"{backend}: out of GPU memory on {load}; {fix}") from error


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Build third-party code without side effects on ours.

    Random initialisation (and CoTracker's ``torch.manual_seed(0)`` at import) would change the generators of a run, so they
    are restored. Deprecation warnings of third-party packages are hidden here, because the user cannot fix them.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


_networks: WeakValueDictionary[tuple[Any, ...], torch.nn.Module] = WeakValueDictionary()


def shared_network(key: tuple[Any, ...], device: torch.device, build: Callable[[], Any]) -> Any:
    """The frozen network of ``key`` on ``device``: built once, shared by all backends of this process that use it.

    Every environment has its own backend. Their networks are equal and hold no state, so one copy is enough. It is freed
    with the last backend.
    """
    key = (*key, str(device))
    network = _networks.get(key)
    if network is None:
        with building():
            network = build().eval().requires_grad_(False).to(device)
        _networks[key] = network
    return network


def read_state_dict(backend: str, path: Path, sha256: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a local weight file (.safetensors, or a torch file): the only function that opens a foreign .pt or .pth.

    A torch file is a pickle. It is read with ``weights_only``, which creates only tensors and runs no other code. Its parts must be
    stored uncompressed, as torch writes them, so a small file cannot expand to a large one.

    Raises LocalmotionError if the file is missing, has another hash than ``sha256``, or holds more than tensors.
    """
    if not path.is_file():
        raise LocalmotionError(f"{backend}: weight file {path} does not exist; give the path of the downloaded file")
    if sha256:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(sha256.lower()):
            raise LocalmotionError(f"{backend}: {path} has SHA-256 {found}, not {sha256}; download it again")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("its parts are compressed, which torch never writes")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of zip, pickle and safetensors have different error types
        raise failure(backend, f"reading weights {path}", error, _NOT_WEIGHTS) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict):
        raise LocalmotionError(f"{backend}: {path} holds a {type(loaded).__name__}, not a state dict of tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise LocalmotionError(f"{backend}: {path} holds a {type(value).__name__} under {name!r:.60}, not a tensor")
    return loaded


def check_frames(frames: NDArray[np.uint8], what: str) -> None:
    """Frames must be uint8 (N, H, W, 3)."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"{what} must be uint8 (N, H, W, 3), not {frames.dtype} {frames.shape}")
