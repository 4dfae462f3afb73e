"""Backgrounds painted behind the agent or in the sky, with the simulator's own mask: MaskLAM's environments.

``masklam:`` are the tasks of the DeepMind Control Suite with a background instead of the scenery, which moves with the actions
(docs/environments.md). ``dmw:`` is Distracting Meta-World of MaskLAM (arXiv 2602.02259): sky pixels of the segmentation show a video. Both
accept all options of `Backdrop`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs.backgrounds import MOTIONS, ActionShift, Backgrounds, Playback, find_backgrounds, shifted
from localmotion.envs.base import PixelEnv
from localmotion.envs.bodies import smooth_actions
from localmotion.envs.dmc import DMCEnv
from localmotion.envs.masks import AgentParts, moving_parts, segment, subtree_parts
from localmotion.envs.metaworld import MetaWorldEnv
from localmotion.envs.visuals import in_range
from localmotion.errors import ConfigError, unknown_name

REGIONS = ("sky", "scenery", "rest")
_TWIN_LENGTH = 500


class Backdrop:
    """The painted background and its current position.

    Args:
        motion: "video" plays a clip forwards and backwards; "independent", "lagged", "twin", "leaky" shift one of its frames
            (`ActionShift`).
        region: "sky": pixels that show nothing of the scene; "scenery": the sky and everything fixed to the world except targets;
            "rest": everything except the agent, which also hides targets and objects of the task.
        correlation: c, the share of the actions in the shift.
        lag: env steps between an action and its effect (lagged).
        rank: of the fixed mixing of actions, 1 or 2.
        speed: s in pixels of a picture of 64; larger pictures move in proportion.
        twin_actions: .npy file or array (N, A) with the actions of another episode of the same policy; None: smooth random actions, drawn
            at every reset.
        videos, split, num_videos: as in `localmotion.envs.backgrounds.find_backgrounds`.

    Raises:
        ConfigError: an unknown name, a number out of range, a file that is not such an array.
    """

    def __init__(
        self,
        *,
        motion: str,
        region: str,
        correlation: float = 0.7,
        lag: int = 3,
        rank: int = 2,
        speed: float = 2.0,
        twin_actions: str | Path | NDArray[np.floating[Any]] | None = None,
        videos: str | Path | None = None,
        split: str = "train",
        num_videos: int | None = None,
    ) -> None:
        if motion not in MOTIONS:
            raise unknown_name("motion of the background", motion, MOTIONS)
        if region not in REGIONS:
            raise unknown_name("region of the background", region, REGIONS)
        self.motion, self.region = motion, region
        self.correlation = in_range("correlation", correlation, 0, 1)
        self.lag = int(in_range("lag", lag, 1, 100, whole=True))
        self.rank = int(in_range("rank", rank, 1, 2, whole=True))
        self.speed = in_range("speed", speed, 0, 100)
        self._videos, self._split, self._limit = videos, split, num_videos
        self._twin = None if twin_actions is None else _read_actions(twin_actions)
        self.twin_given = self._twin is not None
        self._find(64)  # wrong options raise before a model is built

    def _find(self, side: int) -> Backgrounds:
        return find_backgrounds(self._videos, split=self._split, limit=self._limit, side=side)

    def open(self, side: int, dims: int) -> None:
        """Fix the picture's size and the number of actions."""
        if self._twin is not None and self._twin.shape[1] != dims:
            raise ConfigError(f"twin_actions: {self._twin.shape[1]} actions a row, the environment has {dims}")
        self._clips, self._side, self._dims = self._find(side), side, dims

    def begin(self, episode_seed: int) -> None:
        """A new episode: clip, start and all noise follow from its seed."""
        rng = np.random.default_rng([episode_seed, 0xBD])
        self._playback = Playback(self._clips, rng)
        twin = self._twin
        if self.motion == "twin" and twin is None:
            twin = smooth_actions(rng, _TWIN_LENGTH, self._dims)
        self._shift = ActionShift(
            self.motion,
            correlation=self.correlation,
            lag=self.lag,
            rank=self.rank,
            dims=self._dims,
            rng=rng,
            twin=twin,
            speed=self.speed * self._side / 64,
        )

    def advance(self, action: NDArray[np.float64]) -> None:
        """One env step with ``action`` (A,)."""
        if self.motion == "video":
            self._playback.advance()
        else:
            self._shift.advance(action)

    @property
    def offset(self) -> NDArray[np.float64]:
        """(2,) shift x, y in pixels of the drawn picture; zero for videos."""
        return self._shift.offset.copy()

    @property
    def texture(self) -> NDArray[np.uint8]:
        """(S, S, 3) the current frame of the clip, not shifted. Must not be modified."""
        return self._playback.frame()

    def paint(self, picture: NDArray[np.uint8], where: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """``picture`` (S, S, 3) with the background in the pixels ``where`` (S, S)."""
        frame = self.texture
        if self.motion != "video":
            frame = shifted(frame, self._shift.offset)
        side = picture.shape[0]
        if frame.shape[0] != side:
            frame = np.asarray(cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
        return np.where(where[..., None], frame, picture)

    def describe(self) -> dict[str, Any]:
        """All options, JSON-able."""
        names = ("motion", "region", "correlation", "lag", "rank", "speed", "twin_given")
        return {name: getattr(self, name) for name in names} | {"clips": self._clips.describe()}


def _read_actions(given: str | Path | NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    if isinstance(given, (str, Path)):
        try:
            given = np.load(given, mmap_mode="r", allow_pickle=False)  # mapped, so a shape beyond the file's end is refused
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"twin_actions: {given} cannot be read ({error}); save an array (N, A) with numpy.save") from error
    actions = np.asarray(given, np.float64)
    if actions.ndim != 2 or not len(actions) or not np.isfinite(actions).all() or np.abs(actions).max() > 1:
        raise ConfigError(f"twin_actions: shape {actions.shape}; must be (N, A) finite numbers in [-1, 1]")
    return actions


class Painted(PixelEnv):
    """Shared by both suites: the scene is drawn as usual, then the background is painted over part of it."""

    BACKDROP: ClassVar[tuple[str, ...]] = tuple(inspect.signature(Backdrop).parameters)
    OPTIONS: ClassVar[tuple[str, ...]] = BACKDROP
    """Options of a suite."""
    DEFAULTS: ClassVar[dict[str, Any]]
    _renderer: Any

    def __init__(self, task: str, **settings: Any) -> None:
        given = {name: settings.pop(name) for name in self.BACKDROP if name in settings}
        self.backdrop = Backdrop(**{**self.DEFAULTS, **given})
        super().__init__(task, **settings)
        self._model, self._data, self._parts = self._scene()
        self.backdrop.open(self.draw_size, int(np.prod(self.action_space.shape or ())))

    def _scene(self) -> tuple[Any, Any, AgentParts]:
        """mujoco.MjModel, mujoco.MjData, and which of the model's parts are the agent."""
        raise NotImplementedError

    def _begin(self, episode_seed: int) -> None:
        super()._begin(episode_seed)
        self.backdrop.begin(episode_seed)

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        result = super()._control(action)
        self.backdrop.advance(action)
        return result

    def painted_mask(self, size: int) -> NDArray[np.bool_]:
        """(S, S) pixels of the current picture that show the background, for ground truth of motion."""
        layers = segment(self._renderer, self._model, self._data, self._parts, size)
        return {"sky": layers.sky, "scenery": layers.scenery, "rest": ~layers.agent}[self.backdrop.region]

    def background_place(self, size: int | None = None) -> NDArray[np.float64] | None:
        """(2,) x, y in pixels by which the background is shifted. None for videos. The side of the picture is ``size`` or that of the
        drawing."""
        if self.backdrop.motion == "video":
            return None
        return self.backdrop.offset * ((size or self.draw_size) / self.draw_size)

    def _draw(self, size: int) -> NDArray[np.uint8]:
        where = self.painted_mask(size)
        return self.backdrop.paint(super()._draw(size), where)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"background": self.backdrop.describe()}


class CompositeDMCEnv(Painted, DMCEnv):
    """A task of the suite in front of a painted background; physics and rewards are those of ``dmc:``, bit for bit. Options: `Backdrop`."""

    suite_name: ClassVar[str] = "masklam"
    DEFAULTS: ClassVar[dict[str, Any]] = {"motion": "lagged", "region": "scenery"}

    def _scene(self) -> tuple[Any, Any, AgentParts]:
        model = self.physics.model.ptr
        return model, self.physics.data.ptr, moving_parts(model)


class CompositeMetaWorldEnv(Painted, MetaWorldEnv):
    """A Meta-World task in front of a painted background; by default Distracting Meta-World: videos in the sky. Options: `Backdrop`, and
    those of `MetaWorldEnv`.
    """

    suite_name: ClassVar[str] = "dmw"
    OPTIONS: ClassVar[tuple[str, ...]] = (*Painted.BACKDROP, "end_on_success")
    DEFAULTS: ClassVar[dict[str, Any]] = {"motion": "video", "region": "sky"}

    def _scene(self) -> tuple[Any, Any, AgentParts]:
        return self.inner.model, self.inner.data, subtree_parts(self.inner.model)
