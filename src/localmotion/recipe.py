"""The recipe of perception: everything that decides the bytes of a clip store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from localmotion.errors import ConfigError, unknown_name

ALGORITHM = 3
"""Newest version of the embedded algorithms of perception, see `Recipe.algorithm`."""
EXACT = "exact"
"""Name of the backends that read a simulator's state (`localmotion.perception.exact`)."""
Motion = Literal["recipe", "exact", "perceived"]
_LATER = {"fps": 0.0, "mask": ""}  # settings newer than stores without `algorithm` or with algorithm 2, and their value there


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the bytes of a clip store. Streaming perception in fine-tuning uses the same recipe."""

    size: int = 64
    """Side of the stored square frames and flow fields, in pixels (paper: 64). The picture is squeezed to a square, as in IPV's release."""
    percept_size: int = 128
    """Side at which flow and tracks are computed; the field is then area-averaged to `size` and divided by the ratio."""
    flow: str = "dis"
    """Flow backend: dis (embedded), sea_raft (paper), exact (the simulator's)."""
    segment: str = "saliency"
    """Foreground backend: saliency (embedded), grounded_sam (paper), exact (the simulator's)."""
    track: str = "lk"
    """Track backend: lk (embedded), cotracker3 (paper), exact (the simulator's)."""
    tracks: int = 32
    """Tracks stored per clip, 1..32; the model's K is chosen later, so K needs no re-extraction."""
    segment_frames: int = 25
    """Frames between two draws of all points (paper: once per 25-frame clip)."""
    frame_stride: int = 1
    """Keep every n-th frame (with fps: of the resampled frames). Changes the duration of one time step of the model."""
    flow_span: int = 1
    """Flow over n stored frames (from t+1-n to t+1) instead of one, for very slow motion."""
    redraw_rounds: int = 2
    """How many times points of low motion variance are replaced and tracked again (paper, section 4.2.1); 0: causal, as in streaming."""
    min_motion: float = 0.05
    """Points whose positions deviate less than this over a segment (standard deviation, pixels of `size`) are redrawn."""
    prompt: str = "person. hand. robot arm."
    """Prompt of the text-prompted detector (paper: "individuals"). Unused by the embedded segmenter."""
    seed: int = 0
    """Seed of the point draw. Seed and clip id determine every random choice."""
    backend_options: dict[str, Any] = field(default_factory=dict)
    """Options of the backends, by backend name, e.g. {"sea_raft": {"checkpoint": "things"}}."""
    algorithm: int = ALGORITHM
    """Version of the embedded algorithms. 1: foreground from flow only; 2: also from changes of the picture; 3: also decoding with
    chroma at full width, deinterlacing, HDR mapped to standard range, transparent pictures over grey. Old runs keep their version."""
    fps: float = 0.0
    """Videos are resampled to this many frames per second, so one time step is the same time in all videos; 0: frames as recorded."""
    mask: str = ""
    """Mask backend, one bit a pixel: motion (embedded), grounded_sam, exact (the simulator's). Empty: none, but collect still
    stores the simulator's mask where the environment knows the agent."""

    def __post_init__(self) -> None:
        if type(self.fps) is int:  # so 30 and 30.0 are the same recipe
            object.__setattr__(self, "fps", float(self.fps))
        checks = {
            "size": 8 <= self.size <= 1024,
            "percept_size": self.percept_size >= self.size and self.percept_size % self.size == 0,
            "tracks": 1 <= self.tracks <= 32,
            "segment_frames": self.segment_frames >= 2,
            "frame_stride": self.frame_stride >= 1,
            "flow_span": self.flow_span >= 1,
            "redraw_rounds": self.redraw_rounds >= 0,
            "min_motion": self.min_motion >= 0,
            "fps": self.fps == 0 or 0.01 <= self.fps <= 1000,
            "algorithm": 1 <= self.algorithm <= ALGORITHM,
        }
        for name, good in checks.items():
            if not good:
                extra = " (a multiple of size)" if name == "percept_size" else ""
                raise ConfigError(f"recipe setting {name}={getattr(self, name)!r} is out of range{extra}")
        if self.exact and self.redraw_rounds:
            raise ConfigError(f"redraw_rounds={self.redraw_rounds}: exact motion has no look-ahead; set redraw_rounds=0")

    @property
    def exact(self) -> bool:
        """Whether flow, foreground or tracks come from a simulator's state."""
        return EXACT in (self.flow, self.segment, self.track)

    def with_motion(self, motion: Motion) -> Recipe:
        """This recipe with all motion exact, or with the embedded backends in place of exact ones; "recipe" changes nothing."""
        if motion == "exact":
            return replace(self, flow=EXACT, segment=EXACT, track=EXACT, redraw_rounds=0)
        plain = {kind: getattr(Recipe, kind) for kind in ("flow", "segment", "track") if getattr(self, kind) == EXACT}
        return replace(self, **plain) if motion == "perceived" else self

    @property
    def ratio(self) -> int:
        """percept_size / size."""
        return self.percept_size // self.size

    @property
    def legacy_decoding(self) -> bool:
        """Whether videos are decoded as before algorithm 3, see `localmotion.video.iter_frames`."""
        return self.algorithm < 3

    def to_json(self) -> dict[str, Any]:
        """The settings. Newer settings are left out at their default, so older stores keep their hash."""
        values = asdict(self)
        return {key: value for key, value in values.items() if (key, value) not in _LATER.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        known = set(cls.__dataclass_fields__)
        for key in values:
            if key not in known:
                raise unknown_name("recipe setting", key, known)
        if set(values) == known - {
            "algorithm",
            *_LATER,
        }:  # complete settings without `algorithm` are from an old store; a user's few settings mean the newest version
            values = {**values, "algorithm": 1}
        return cls(**values)

    def hash(self) -> str:
        """Twelve hex digits that name this recipe."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]


_MOST = {"percept_size": 4096, "redraw_rounds": 100}  # beyond, a recipe asks for more work than anybody can want


def read_recipe(values: Any, base: Recipe | None = None) -> Recipe | None:
    """A recipe out of a mapping of settings, as files and flags have it; settings that are not named keep those of ``base``.

    Nothing, or an empty mapping, gives ``base``. Raises ConfigError for unknown names, wrong types and ranges.
    `perception.trust.check_recipe` says whether it may be followed.
    """
    if isinstance(values, Recipe) or not (values or isinstance(values, Mapping)):
        return values or base
    if not isinstance(values, Mapping):
        raise ConfigError(f"recipe {values!r:.80}: a recipe is a mapping of settings")
    plain = asdict(Recipe())
    for key, value in values.items():
        kinds = (int, float) if isinstance(plain.get(key), float) else (type(plain.get(key)),)
        if key in plain and (type(value) not in kinds or not -(2.0**53) < (value if int in kinds else 0) < 2.0**53):
            raise ConfigError(f"recipe setting {key}={value!r:.80} must be {kinds[-1].__name__}")
        if key in _MOST and value > _MOST[key]:
            raise ConfigError(f"recipe setting {key}={value} must be at most {_MOST[key]}")
    if not values:
        return base
    return Recipe.from_json({**(base.to_json() if base else {}), **values})
