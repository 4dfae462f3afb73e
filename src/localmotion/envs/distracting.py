"""The Distracting Control Suite: background video, camera and colours that move, on any task of the DeepMind Control Suite.

Source: Stone, Ramirez, Konolige and Jonschkowski 2021 (arXiv 2101.02722), as LAOM and MaskLAM use it. Each of the three distractions has
its own random generator, seeded by the reset: switching one off does not change the others. All move once per env step.

The background is the sky's texture, sent to OpenGL again for every drawn picture. A camera sees about 0.4 of the side of a sky face, so
clips of twice the picture's side are as sharp as the picture (`SIDE_PER_PIXEL`; figures in docs/environments.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.backgrounds import Playback, find_backgrounds
from localmotion.envs.camera_walk import CameraWalk
from localmotion.envs.dmc import TASKS, DMCEnv
from localmotion.envs.masks import moving_parts, segment
from localmotion.envs.visuals import SkyStream, TextureSlot, chosen, in_range, named, sky_texture
from localmotion.errors import ConfigError, unknown_name

DISTRACTIONS = ("background", "camera", "colour")
SIDE_PER_PIXEL = 2


@dataclass(frozen=True)
class Difficulty:
    """scale: of camera and colour, 0..1; videos: number of clips, 0 for none, None for all."""

    scale: float
    videos: int | None


DIFFICULTIES: dict[str, Difficulty] = {
    "vanilla": Difficulty(0.0, 0),
    "low": Difficulty(0.0, None),
    "easy": Difficulty(0.1, 4),
    "medium": Difficulty(0.2, 8),
    "hard": Difficulty(0.3, None),
    "scale_easy_video_hard": Difficulty(0.1, None),
}
"""easy, medium and hard are the suite's; scale_easy_video_hard is LAOM's (and MaskLAM's "hard"), low is MaskLAM's."""
OPAQUE_GROUND = ("walker", "cheetah", "hopper")


class ColourWalk:
    """RGB of every material: starts uniformly in a box and moves by Gaussian steps, clipped to the box.

    Args:
        model: mujoco.MjModel.
        low, high: the box, (M, 3) in 0..1.
        std: of a step.
        rng: draws start and steps.
    """

    def __init__(
        self, model: Any, low: NDArray[np.float64], high: NDArray[np.float64], std: float, rng: np.random.Generator
    ) -> None:
        self._model, self._low, self._high, self._std, self._rng = model, low, high, std, rng
        self._now = low + (high - low) * rng.random(low.shape)
        model.mat_rgba[:, :3] = self._now

    def advance(self) -> None:
        """Advance by one env step."""
        if self._std:
            step = self._std * self._rng.standard_normal(self._now.shape)
            self._now = np.clip(self._now + step, self._low, self._high)
            self._model.mat_rgba[:, :3] = self._now


class DistractingEnv(DMCEnv):
    """A task of the suite with distractions; physics and rewards are those of ``dmc:``, bit for bit.

    Args:
        difficulty: a name of `DIFFICULTIES`.
        distractions: names of `DISTRACTIONS` that are on, a list or text with commas, "all" or "none".
        scale: of camera and colour; None: the difficulty's.
        num_videos: clips in use; None: the difficulty's.
        videos: folder of videos, or "procedural"; None: the folder in LOCALMOTION_BACKGROUNDS, else procedural.
        split: "train", "val" (held out) or "all" of the videos.
        dynamic: False: nothing moves within an episode.

    Raises:
        ConfigError: an unknown name or a number out of range; a folder without videos.
    """

    suite_name: ClassVar[str] = "distracting"

    def __init__(
        self,
        task: str,
        *,
        difficulty: str = "easy",
        distractions: str | Iterable[str] = "all",
        scale: float | None = None,
        num_videos: int | None = None,
        videos: str | Path | None = None,
        split: str = "train",
        dynamic: bool = True,
        **settings: Any,
    ) -> None:
        if difficulty not in DIFFICULTIES:
            raise unknown_name("difficulty", difficulty, DIFFICULTIES)
        if not isinstance(dynamic, bool):
            raise ConfigError(f"dynamic={dynamic!r} must be true or false")
        level = DIFFICULTIES[difficulty]
        self.difficulty, self.dynamic, self.split = difficulty, dynamic, split
        self.distractions = chosen("distraction", distractions, DISTRACTIONS)
        self.scale = level.scale if scale is None else in_range("scale", scale, 0, 1)
        self._videos, self._limit = videos, level.videos if num_videos is None else num_videos
        self._find(64)  # wrong options raise before the model is built
        super().__init__(task, **settings)

    def _find(self, side: int) -> Any:
        """The clips, or None if the difficulty has none. Decodes nothing yet."""
        if "background" not in self.distractions or self._limit == 0:
            return None
        return find_backgrounds(self._videos, split=self.split, limit=self._limit, side=side)

    def _prepare(self, model: Any) -> None:
        domain = TASKS[self.name.partition(":")[2]][0]
        side = min(SIDE_PER_PIXEL * self.draw_size, 800)
        self._backgrounds = self._find(side)
        sky = sky_texture(model)
        self._slot = None if self._backgrounds is None or sky is None else TextureSlot(model, sky, side)
        grid = named(model, "material", "grid")
        if self._slot is not None and grid is not None:
            model.mat_rgba[grid, 3] = 1.0 if domain in OPAQUE_GROUND else 0.0 if domain == "reacher" else 0.3
        colours = np.array(model.mat_rgba[:, :3], np.float64)
        self._low, self._high = np.clip(colours - self.scale, 0, 1), np.clip(colours + self.scale, 0, 1)
        self._domain = domain
        self._playback: Playback | None = None
        self._walk: CameraWalk | None = None
        self._colours: ColourWalk | None = None
        self._sky: SkyStream | None = None
        self._sent: tuple[int, int] | None = None

    def _begin(self, episode_seed: int) -> None:
        super()._begin(episode_seed)
        model = self.physics.model.ptr
        streams = [np.random.default_rng([episode_seed, number]) for number in range(1, 4)]
        if self._slot is not None:
            self._playback = Playback(self._backgrounds, streams[0], dynamic=self.dynamic)
        if "camera" in self.distractions and self.scale > 0:
            self._walk = CameraWalk(
                model, self.physics.data.ptr, self.camera, self.scale, streams[1], dynamic=self.dynamic, domain=self._domain
            )
        if "colour" in self.distractions and self.scale > 0:
            std = 0.03 * self.scale if self.dynamic else 0.0
            self._colours = ColourWalk(model, self._low, self._high, std, streams[2])

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        result = super()._control(action)
        if self._playback is not None:
            self._playback.advance()
        if self._walk is not None:
            self._walk.advance()
        if self._colours is not None:
            self._colours.advance()
        return result

    def _solve(self, episode_seed: int) -> bool:
        solved = super()._solve(episode_seed)
        if self._walk is not None:
            self._walk.aim()
        return solved

    def _draw(self, size: int) -> NDArray[np.uint8]:
        if self._playback is not None and self._slot is not None:
            showing = self._playback.number, self._playback.index
            if showing != self._sent:
                if self._sky is None:
                    self._sky = SkyStream(self._renderer, self._slot)
                self._sky.show(self._playback.frame())
                self._sent = showing
        return super()._draw(size)

    def painted_mask(self, size: int) -> NDArray[np.bool_]:
        """(S, S) pixels of the current picture that show the background video, for ground truth of motion."""
        if self._slot is None:
            return np.zeros((size, size), bool)
        model = self.physics.model.ptr
        return segment(self._renderer, model, self.physics.data.ptr, moving_parts(model), size).sky

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {
            "difficulty": self.difficulty,
            "distractions": list(self.distractions),
            "scale": self.scale,
            "dynamic": self.dynamic,
            "backgrounds": None if self._slot is None else self._backgrounds.describe(),
        }
