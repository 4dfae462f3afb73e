"""The four interfaces of perception (flow, segment, track, mask), their registry, the recipe, and the results of extraction.

Conventions, everywhere in this package:

* frames are uint8 RGB arrays (H, W, 3); points are float32 (x, y) in pixels, the centre of the top-left pixel is (0, 0);
* flow is float32 (H, W, 2), x then y, in pixels of the picture it was computed on: ``flow[y, x]`` is the motion of that pixel;
* backends return results at the resolution of their input; internally they may use another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import unknown_name
from localmotion.recipe import EXACT, Recipe

Frame = NDArray[np.uint8]  # (H, W, 3) RGB
Flow = NDArray[np.float32]  # (H, W, 2) x, y in pixels
Points = NDArray[np.float32]  # (N, 2) x, y in pixels


@runtime_checkable
class FlowBackend(Protocol):
    """Dense optical flow between pairs of frames."""

    name: ClassVar[str]
    licence: ClassVar[str]

    def flow(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Flow of a batch of pairs: (N, H, W, 3) uint8 twice -> (N, H, W, 2) float32 pixels."""
        ...


@runtime_checkable
class SegmentBackend(Protocol):
    """Finds moving objects: returns a sampling weight, not a hard mask. Points are drawn from it (docs/decisions/0003)."""

    name: ClassVar[str]
    licence: ClassVar[str]
    uses_motion: ClassVar[bool]
    """Whether the weight comes from motion (cheap, computed for each draw of points) or from the picture (computed once per segment)."""

    def weight(
        self, frames: NDArray[np.uint8], flows: NDArray[np.float32] | Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Foreground weight in [0, 1] for the FIRST frame.

        ``frames`` (n, H, W, 3), n >= 1, the first frame and a few later ones (streaming: earlier ones, newest first);
        ``flows`` (n, H, W, 2), an array or a list of fields of recent or coming motion (may be empty). Returns (H, W) float32.
        """
        ...


@runtime_checkable
class TrackBackend(Protocol):
    """Point tracks. `step` is the streaming form; `track` the clip form. A causal backend's `track` is `step` repeated."""

    name: ClassVar[str]
    licence: ClassVar[str]
    causal: ClassVar[bool]

    def track(self, frames: NDArray[np.uint8], points: Points, start: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Follow (N, 2) ``points`` given in frame ``start`` through (T, H, W, 3): (T, N, 2) positions and (T, N) visibility.

        Positions before ``start`` equal the starting points and are invisible.
        """
        ...

    def step(self, previous: Frame, current: Frame, points: Points) -> tuple[Points, NDArray[np.bool_]]:
        """Advance (N, 2) points from ``previous`` to ``current``: new (N, 2) positions and (N,) visibility."""
        ...


@runtime_checkable
class ManySegment(SegmentBackend, Protocol):
    """A segmenter that processes many clips at once."""

    def weights(
        self, asked: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32] | Sequence[NDArray[np.float32]]]]
    ) -> list[NDArray[np.float32]]:
        """`weight` of each."""
        ...


@runtime_checkable
class ManyTrack(TrackBackend, Protocol):
    """A tracker that processes many clips at once."""

    def tracks(self, asked: Sequence[tuple[NDArray[np.uint8], Points]]) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """`track` of each, from its first frame."""
        ...


@runtime_checkable
class MaskBackend(Protocol):
    """Masks of the agent in all frames of a clip. Methods weight losses by them (MaskLAM, arXiv 2602.02259)."""

    name: ClassVar[str]
    licence: ClassVar[str]

    def masks(
        self, frames: NDArray[np.uint8], flows: NDArray[np.float32], cuts: NDArray[np.bool_], size: int
    ) -> NDArray[np.bool_]:
        """Masks (T, size, size) of (T, H, H, 3) uint8 frames.

        ``flows`` (T, H, H, 2): motion that led to each frame from the one before, zero for the first frame of a scene; ``cuts`` (T,): the
        frame begins a new scene. ``size`` is at most H. A frame in which nothing is found has an empty mask.
        """
        ...


@dataclass(frozen=True)
class ClipMotion:
    """Motion of a clip of T frames, in pixels of the stored `size`.

    flow     (T, S, S, 2) float16   ``flow[t]``: motion from frame t to t+1; the last one is zero
    tracks   (T, N, 2)    float32   (x, y) of each track slot in frame t
    visible  (T, N)       bool      the point is visible in frame t and was found again in frame t+1, so ``flow[t]`` at ``tracks[t]`` is
                                    its motion; the last one is False. Independent of the point in the slot in frame t+1
    track_id (T, N)       int32     changes when a slot gets a new point: history before the change belongs to another track
    info     JSON-able dict: how the points were found (salient or not, redraws, camera motion, scene cuts, flow quantiles)
    mask     (T, S, ceil(S/8)) uint8  bits of the agent's pixels (`localmotion.video.bits`), if the recipe has a mask backend
    """

    flow: NDArray[np.float16]
    tracks: NDArray[np.float32]
    visible: NDArray[np.bool_]
    track_id: NDArray[np.int32]
    info: dict[str, Any]
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class StepMotion:
    """Motion that led to the newest frame of a stream, in pixels of `size`, as stored in the replay.

    flow     (S, S, 2) float16   from the previous frame to this one; zeros right after a reset
    tracks   (N, 2)    float32   the points in the PREVIOUS frame, where the flow is cropped
    visible  (N,)      bool      valid for this motion (visible in the previous frame and not just redrawn); all False after reset
    track_id (N,)      int32     identity of each slot's track
    """

    flow: NDArray[np.float16]
    tracks: NDArray[np.float32]
    visible: NDArray[np.bool_]
    track_id: NDArray[np.int32]


_REGISTRY: dict[tuple[str, str], Callable[..., Any]] = {}
_LAZY: dict[tuple[str, str], Callable[[], None]] = {}
KINDS = ("flow", "segment", "track", "mask")


def register(kind: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Class decorator: register a backend under ``kind`` (one of `KINDS`) and ``name``."""
    assert kind in KINDS, kind

    def add(factory: Callable[..., Any]) -> Callable[..., Any]:
        _REGISTRY[kind, name] = factory
        return factory

    return add


def register_lazily(kind: str, name: str, load: Callable[[], None]) -> None:
    """Register a backend lazily: ``load`` imports its module on first use, and the module registers it."""
    assert kind in KINDS, kind
    _LAZY[kind, name] = load


def _factory(kind: str, name: str) -> Callable[..., Any] | None:
    if (kind, name) not in _REGISTRY and (kind, name) in _LAZY:
        _LAZY[kind, name]()
    return _REGISTRY.get((kind, name))


def backends(kind: str) -> list[str]:
    """Names of the registered backends of one kind."""
    import localmotion.perception  # noqa: F401  (registers all backends)

    return sorted({name for k, name in (*_REGISTRY, *_LAZY) if k == kind})


def make_backend(kind: str, name: str, **options: Any) -> Any:
    """Build a backend. Raises ConfigError for an unknown name, MissingExtraError if its packages are missing."""
    known = backends(kind)
    if name not in known:
        raise unknown_name(f"{kind} backend", name, known)
    factory = _factory(kind, name)
    assert factory, name
    accepted = inspect.signature(factory).parameters
    for option in options:
        if option not in accepted:
            raise unknown_name(f"option of {kind} backend {name}", option, accepted)
    return factory(**options)


def recipe_backends(recipe: Recipe, exact: Any = None) -> tuple[Any, Any, Any]:
    """Flow, segment and track backends of a recipe, with its options; a segmenter that takes a prompt gets the recipe's.

    ``exact`` stands for the backends of that name (`localmotion.perception.exact.Exact`). Raises ConfigError if the recipe asks for one and
    there is none.
    """
    flow, segment, track = (
        exact if exact is not None and name == EXACT else make_backend(kind, name, **_options(recipe, kind, name))
        for kind, name in (("flow", recipe.flow), ("segment", recipe.segment), ("track", recipe.track))
    )
    return flow, segment, track


def mask_backend(recipe: Recipe) -> MaskBackend | None:
    """The mask backend of a recipe with its options, None if it has none. Raises what `make_backend` raises."""
    if not recipe.mask:
        return None
    backend: MaskBackend = make_backend("mask", recipe.mask, **_options(recipe, "mask", recipe.mask))
    return backend


def _options(recipe: Recipe, kind: str, name: str) -> dict[str, Any]:
    """Options of one backend of a recipe. Raises ConfigError if the recipe has options of a backend that it does not name.

    A segmenter and a mask backend of one name share their options. Each gets those that it accepts, and an option that neither accepts is
    passed on, so that `make_backend` refuses it.
    """
    named = {kind: getattr(recipe, kind) for kind in KINDS if getattr(recipe, kind)}
    for key in recipe.backend_options:
        if key not in named.values():
            raise unknown_name("backend in backend_options", key, tuple(named.values()))
    accepts = {other: _accepted(other, name) for other in KINDS if named.get(other) == name}
    elsewhere = {option for other, options in accepts.items() if other != kind for option in options}
    own = accepts.get(kind, set())
    options = {key: value for key, value in recipe.backend_options.get(name, {}).items() if key in own or key not in elsewhere}
    if "prompt" in own:
        options.setdefault("prompt", recipe.prompt)
    if kind == "segment" and name == "saliency" and recipe.algorithm < 2:
        options.setdefault("change", 0.0)
    return options


def _accepted(kind: str, name: str) -> set[str]:
    """Names of the options of a backend; none for an unknown name, which `make_backend` refuses."""
    factory = _factory(kind, name)
    return set(inspect.signature(factory).parameters) if factory else set()


def works_on_gpu(recipe: Recipe) -> bool:
    """Whether a backend of the recipe is a network that would run on a GPU of this machine. Builds no backend."""
    for kind in KINDS:
        name = getattr(recipe, kind)
        factory = _factory(kind, name)
        if factory is not None and "device" in inspect.signature(factory).parameters:
            from localmotion.perception._neural import pick_device  # imports torch, which the embedded backends do not need

            if pick_device(recipe.backend_options.get(name, {}).get("device", "auto")).type == "cuda":
                return True
    return False
