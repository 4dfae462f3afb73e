"""DisWM's colour distractors: the colours of all materials flicker within a narrow box around one colour.

Source: DisWM (ICCV 2025), section 4 and its released environments. Every material starts uniformly in base +- 0.2 per channel and moves by
Gaussian steps of 0.2 per env step, clipped to the box. With steps as large as the box, colours nearly flicker. The base changes from phase
1 to phase 2 half way through DisWM's training (setting `online.phase_at`). DisWM did not seed its random numbers; here the reset's seed
does.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import Observation
from localmotion.envs.distracting import ColourWalk
from localmotion.envs.dmc import ACTION_REPEAT, DMCEnv
from localmotion.envs.visuals import drawn_materials, in_range
from localmotion.errors import ConfigError, EnvError

PALETTES: dict[int, tuple[float, float, float]] = {1: (0.7, 0.3, 0.5), 2: (0.5, 0.7, 0.3)}
"""Base colour of all materials in each phase."""
DELTA, STD = 0.2, 0.2


class DisWMEnv(DMCEnv):
    """A task of the suite in DisWM's colours; physics is that of ``dmc:``, bit for bit.

    Args:
        phase: 1 or 2, the palette. `set_phase` changes it for later episodes.
        reference_repeat: DisWM's released environment repeats an action twice ``action_repeat`` times (4 env steps with the usual 2). The
            reward is twice the sum over the second half; the first half is dropped. Off by default: with it scores are comparable with
            DisWM's tables, but not with other suites.

    Raises:
        ConfigError: another phase.
    """

    suite_name: ClassVar[str] = "diswm"
    phases: ClassVar[int] = len(PALETTES)

    def __init__(
        self,
        task: str,
        *,
        phase: int = 1,
        reference_repeat: bool = False,
        action_repeat: int | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(reference_repeat, bool):
            raise ConfigError(f"reference_repeat={reference_repeat!r} must be true or false")
        self.reference_repeat = reference_repeat
        self.set_phase(phase)
        nominal = ACTION_REPEAT if action_repeat is None else action_repeat
        super().__init__(task, action_repeat=2 * nominal if reference_repeat else nominal, **settings)
        self._within = 0
        self._colours: ColourWalk | None = None

    def set_phase(self, phase: int) -> None:
        """Use a palette from the next reset on."""
        self.phase = int(in_range("phase", phase, 1, self.phases, whole=True))

    def _begin(self, episode_seed: int) -> None:
        super()._begin(episode_seed)
        model = self.physics.model.ptr
        base = np.tile(np.array(PALETTES[self.phase]), (model.nmat, 1))
        rng = np.random.default_rng([episode_seed, 0xD15])
        self._colours = ColourWalk(model, base - DELTA, base + DELTA, STD, rng)

    @cached_property
    def _drawn(self) -> NDArray[np.int64]:
        return drawn_materials(self.physics.model.ptr)

    @property
    def colour_names(self) -> tuple[str, ...]:
        """Names of the M materials of the scene. A part of it can be outside the picture."""
        return tuple(self.physics.model.ptr.material(int(i)).name for i in self._drawn)

    def colours(self) -> NDArray[np.float32]:
        """(M, 3) red, green and blue of these materials in the current picture, in 0..1.

        A light or a texture changes what a pixel shows of them.

        Raises:
            EnvError: before the first reset.
        """
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before colours()")
        shown: NDArray[np.float32] = self.physics.model.ptr.mat_rgba[self._drawn, :3].copy()
        return shown

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """As `PixelEnv.step`, with the reference's reward if ``reference_repeat``."""
        self._within = 0
        return super().step(action)

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        reward, ended = super()._control(action)
        if self._colours is not None:
            self._colours.advance()
        self._within += 1
        if self.reference_repeat:
            reward = 2 * reward if 2 * self._within > self.action_repeat else 0.0
        return reward, ended

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"phase": self.phase, "reference_repeat": self.reference_repeat}
