"""Small exact environments without MuJoCo, for smoke tests of learning, continuous integration and teaching.

Their pictures are flat layers at known positions, so flow, masks and tracks are exact up to rounding: ``true_flow``, ``true_mask`` and
`localmotion.envs.truth.motion_truth`, the same interface as for MuJoCo environments.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import Observation, PixelEnv
from localmotion.envs.truth import Layers, LayerTruth
from localmotion.errors import ConfigError, EnvError, unknown_name

Source = Literal["independent", "lagged", "twin", "leaky"]
SOURCES: tuple[Source, ...] = get_args(Source)
TASKS = ("dot", "block", "reach", "moving_background", *(f"moving_background_{source}" for source in SOURCES[1:]), "pairs")
SPEED = 0.06
"""Arena widths per env step at full action."""
PATCH = 1 / 8
"""Side of the agent's and the goal's patch in arena widths."""
TEXTURES = 8
ACTION_REPEAT, TIME_LIMIT = 1, 50
AGENT_LAST = np.array([False, False, True])
BACKGROUND_DECAY, BACKGROUND_STEP = 0.9, 2.0
MIXING = np.array([[0.6, 0.8], [0.8, -0.6]])
"""W of `MovingBackgroundEnv`: unit rows."""
RANDOM_RETURN, OPTIMAL_RETURN = 23.5, 47.8
"""Mean return in `DotEnv` of uniform random actions and of `optimal_action`, over 2,000 episodes of the default length each."""
BLOCK_RANDOM, BLOCK_OPTIMAL = 15.0, 49.3
"""The same for `BlockEnv`."""
REACH_RANDOM, REACH_OPTIMAL = 10.4, 48.2
"""The same for `ReachEnv`."""


def make_toy(task: str, *, camera: str | int | None = None, quality: str = "auto", **settings: Any) -> LayeredEnv:
    """The toy environment ``task``; ``settings`` are those of its class. Raises ConfigError for an unknown task, or for a camera,
    because toys have none."""
    if task not in TASKS:
        raise unknown_name("toy environment", task, TASKS)
    if camera is not None:
        raise ConfigError(f"camera={camera!r}: toy environments have no cameras; leave it out")
    from localmotion.envs.render import QUALITIES

    if quality not in QUALITIES:
        raise unknown_name("rendering quality", quality, QUALITIES)
    if task == "dot":
        return DotEnv(**settings)
    if task in ("block", "reach"):
        return BlockEnv(**settings) if task == "block" else ReachEnv(**settings)
    if task == "pairs":
        return PairsEnv(**settings)
    source: Source = next((name for name in SOURCES if task.endswith(f"_{name}")), "independent")
    return MovingBackgroundEnv(source=source, **settings)


class LayeredEnv(PixelEnv):
    """An environment whose picture consists of flat layers at known positions: exact flow, masks and tracks."""

    _layers_before: Layers

    def layers(self, size: int) -> Layers:
        """The layers of the current picture drawn at ``size``, background first."""
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """As `PixelEnv.reset`."""
        result = super().reset(seed=seed, options=options)
        self._layers_before = self.layers(self.draw_size)
        return result

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """As `PixelEnv.step`; also stores the previous layers, for ``true_flow``."""
        if self._begun:
            self._layers_before = self.layers(self.draw_size)
        return super().step(action)

    def true_flow(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Flow (S, S, 2) from the picture before the last ``step`` to the current one, in pixels of the drawn size S, and (S, S) where
        the moving surface is visible in both pictures. Zero after a reset. Raises EnvError before the first reset.
        """
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before true_flow()")
        return LayerTruth(self).flow(self._layers_before, self.layers(self.draw_size))

    @property
    def link_names(self) -> tuple[str, ...]:
        """One link, the agent's layer."""
        return ("agent",)

    def link_places(self, size: int | None = None) -> NDArray[np.float64]:
        """(1, 3) x, y of the top-left corner of the agent's layer in the current picture, in pixels; the angle is zero. The side of the
        picture is ``size`` or that of the drawing.

        Raises:
            EnvError: before the first reset.
        """
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before link_places()")
        layers = self.layers(size or self.draw_size)
        return np.pad(layers.origin[layers.moving], ((0, 0), (0, 1)))

    def true_mask(self) -> NDArray[np.bool_]:
        """(S, S) pixels of the current picture, at the drawn size, that show any part of the agent."""
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        return {"camera": None, "quality": "exact", "gl": None, "versions": {"numpy": np.__version__}}


class DotEnv(LayeredEnv):
    """A patch that moves with a 2-d velocity (x right, y down) over a textured background to a goal patch.

    The agent's position is in [0, 1]^2 and stops at the walls. Reward of an env step: max(0, 1 - distance to the goal) in
    arena widths, in 0..1; never terminated. Agent, goal and background texture are drawn at every reset. Agent and goal are at
    whole pixels, so the motion of the agent's patch between two pictures is exact: ``true_motion``.
    """

    task: ClassVar[str] = "dot"
    patch: ClassVar[float] = PATCH
    speed: ClassVar[float] = SPEED

    def __init__(
        self,
        *,
        seed: int = 0,
        size: int = 64,
        percept_size: int | None = None,
        action_repeat: int | None = None,
        time_limit: int | None = None,
    ) -> None:
        super().__init__(
            f"toy:{self.task}",
            seed=seed,
            size=size,
            percept_size=percept_size,
            action_dim=2,
            action_repeat=ACTION_REPEAT if action_repeat is None else action_repeat,
            time_limit=TIME_LIMIT if time_limit is None else time_limit,
        )
        self.agent = self.goal = np.zeros(2)  # (x, y) of the centres' range, in [0, 1]
        self._before = self.agent
        self._texture = 0

    def _begin(self, episode_seed: int) -> None:
        rng = np.random.default_rng(episode_seed)
        self.agent, self.goal = rng.uniform(0, 1, 2), rng.uniform(0, 1, 2)
        self._texture = int(rng.integers(TEXTURES))
        self._before = self.agent

    @property
    def has_goals(self) -> bool:
        """Goal pictures show the agent at its goal."""
        return True

    def _solve(self, episode_seed: int) -> bool:
        self.agent = self.goal
        return True

    def step(self, action: NDArray[np.float32]) -> Any:
        """As `PixelEnv.step`; also stores the agent's previous position, for ``true_motion``."""
        self._before = self.agent
        return super().step(action)

    def layers(self, size: int) -> Layers:
        """Background, goal, agent."""
        side = self._side(size)
        corners = [self._corner(position, size) for position in (self.goal, self.agent)]
        ident = np.zeros((size, size), np.int32)
        for number, (x, y) in enumerate(corners, 1):
            ident[y : y + side, x : x + side] = number
        return Layers(ident, np.array([(0, 0), *corners], np.float64), AGENT_LAST)

    def true_mask(self) -> NDArray[np.bool_]:
        """(S, S) pixels of the agent's patch."""
        return self.layers(self.draw_size).ident == 2

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        self.agent = np.minimum(np.maximum(self.agent + self.speed * action, 0.0), 1.0)
        x, y = self.goal - self.agent
        return self._reward(float(np.hypot(x, y))), False

    def _reward(self, distance: float) -> float:
        return max(0.0, 1.0 - distance)

    def _side(self, size: int) -> int:
        """Pixels of the agent's and the goal's side."""
        return max(2, round(self.patch * size))

    def true_motion(self) -> NDArray[np.float32]:
        """(x, y) displacement of the agent's patch in the last ``step``, pixels of ``image``; zeros after a reset. Exact."""
        moved = self._corner(self.agent, self.draw_size) - self._corner(self._before, self.draw_size)
        return (moved * (self.size / self.draw_size)).astype(np.float32)

    def agent_box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom (exclusive) of the agent's patch in the drawn picture, pixels of ``draw_size``."""
        x, y = (int(v) for v in self._corner(self.agent, self.draw_size))
        side = self._side(self.draw_size)
        return x, y, x + side, y + side

    def state(self) -> NDArray[np.float64]:
        """Agent, goal and texture number."""
        return np.array([*self.agent, *self.goal, self._texture])

    def _corner(self, position: NDArray[np.float64], size: int) -> NDArray[np.int64]:
        return np.rint(position * (size - self._side(size))).astype(np.int64)

    def _draw(self, size: int) -> NDArray[np.uint8]:
        backgrounds, agent, goal = _art(size, self._side(size))
        picture = backgrounds[self._texture].copy()
        side = self._side(size)
        for position, patch in ((self.goal, goal), (self.agent, agent)):
            x, y = self._corner(position, size)
            picture[y : y + side, x : x + side] = patch
        return picture


class BlockEnv(DotEnv):
    """The easiest task from pictures, for learning tests: move a large block to the middle of a plain ground.

    The block's side is a quarter of the picture's. Its start is random at every reset; the goal is always the middle and not visible.
    Reward of an env step: 1 within 0.1 of the goal, falling to 0 at a distance of 0.5, like DeepMind Control's tolerances; never
    terminated.
    """

    task = "block"
    patch = 1 / 4
    speed = 0.1

    def _begin(self, episode_seed: int) -> None:
        super()._begin(episode_seed)
        self.goal = np.array([0.5, 0.5])

    def _reward(self, distance: float) -> float:
        return min(1.0, max(0.0, 1.25 - 2.5 * distance))

    def layers(self, size: int) -> Layers:
        """Ground and block."""
        side, (x, y) = self._side(size), self._corner(self.agent, size)
        ident = np.zeros((size, size), np.int32)
        ident[y : y + side, x : x + side] = 1
        return Layers(ident, np.array([(0, 0), (x, y)], np.float64), AGENT_LAST[1:])

    def true_mask(self) -> NDArray[np.bool_]:
        """(S, S) pixels of the block."""
        return self.layers(self.draw_size).ident == 1

    def _draw(self, size: int) -> NDArray[np.uint8]:
        side, (x, y) = self._side(size), self._corner(self.agent, size)
        picture = np.full((size, size, 3), (50, 55, 60), np.uint8)
        picture[y : y + side, x : x + side] = _art(size, side)[1]
        return picture


class ReachEnv(BlockEnv):
    """`BlockEnv` with another goal in every episode. The observation does not show it, so an agent needs the goal picture (`show_goal`).

    ``success`` is 1 while the block is within 0.1 of the goal.
    """

    task = "reach"
    has_success = True

    def _begin(self, episode_seed: int) -> None:
        super()._begin(episode_seed)
        self.goal = np.random.default_rng([episode_seed, 1]).uniform(0, 1, 2)

    def _success(self) -> float:
        return float(np.hypot(*(self.goal - self.agent)) <= 0.1)


class MovingBackgroundEnv(DotEnv):
    """`DotEnv` in front of a background with its own exact motion, correlated with actions or not (docs/environments.md).

    The background is an endless texture, displaced by an offset u in pixels of a 64-pixel picture (x right, y down). At each env step:

        u' = 0.9 u + 2 (c W tanh(sqrt(3) b) + sqrt(1 - c^2) n),    n ~ N(0, 1)^2, W fixed with unit rows

    Agent and background have sub-pixel positions and are drawn with antialiased edges. The task, its reward and its returns are `DotEnv`'s.

    Args:
        source: of b. "independent": b is not used, c is 0. "lagged": the action of ``lag`` env steps ago. "twin": the action of another
            agent: uniform from the episode's own generator, or the row of ``twin_actions`` for this env step. "leaky": the present action.
        correlation: c in [0, 1]; None for 0.7 (0 if independent).
        lag: env steps, for "lagged".

    Attributes:
        twin_actions: (T, 2) actions of another episode that move the background, set by the user; repeated after the end.
        offset: u.

    Raises:
        ConfigError: an unknown source, c or the lag out of range, or c not 0 with "independent".
    """

    def __init__(
        self, *, source: Source = "independent", correlation: float | None = None, lag: int = 3, **settings: Any
    ) -> None:
        if source not in SOURCES:
            raise unknown_name("source of the background's motion", source, SOURCES)
        independent = source == "independent"
        chosen = (0.0 if independent else 0.7) if correlation is None else float(correlation)
        if not 0.0 <= chosen <= 1.0 or (independent and chosen):
            where = "0 when it is independent of the action" if independent else "from 0 to 1"
            raise ConfigError(f"correlation={correlation} of the moving background must be {where}")
        if lag < 1:
            raise ConfigError(f"lag={lag} of the moving background must be at least 1")
        super().__init__(**settings)
        self.name = "toy:moving_background" + ("" if independent else f"_{source}")
        self.source, self.correlation, self.lag = source, chosen, lag
        self.offset = np.zeros(2)
        self.twin_actions: NDArray[np.floating[Any]] | None = None
        self._noise = np.random.default_rng(0)
        self._past: list[NDArray[np.float64]] = []

    def _begin(self, episode_seed: int) -> None:
        super()._begin(episode_seed)
        self._noise = np.random.default_rng([episode_seed, 1])
        self.offset = self._noise.normal(0, BACKGROUND_STEP / np.sqrt(1 - BACKGROUND_DECAY**2), 2)
        self._past = []

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        noise, other = (
            self._noise.normal(0, 1, 2),
            self._noise.uniform(-1, 1, 2),
        )  # drawn for every source, so episodes stay comparable
        if self.source == "leaky":
            other = action
        elif self.source == "lagged":
            other = self._past[-self.lag] if len(self._past) >= self.lag else np.zeros(2)
        elif self.source == "twin" and self.twin_actions is not None:
            other = np.asarray(self.twin_actions[len(self._past) % len(self.twin_actions)], np.float64)
        self._past.append(action)
        c = self.correlation
        push = c * (MIXING @ np.tanh(np.sqrt(3.0) * other)) + np.sqrt(1 - c * c) * noise
        self.offset = BACKGROUND_DECAY * self.offset + BACKGROUND_STEP * push
        return super()._control(action)

    def true_motion(self) -> NDArray[np.float32]:
        """(x, y) displacement of the agent's patch in the last ``step``, pixels of ``image``, exact."""
        reach = (1 - self._side(self.draw_size) / self.draw_size) * self.size
        return ((self.agent - self._before) * reach).astype(np.float32)

    def layers(self, size: int) -> Layers:
        """Background, goal, agent; a pixel belongs to the layer that covers at least half of it."""
        side = self._side(size)
        origin = np.stack([self.offset * (size / 64), *(p * (size - side) for p in (self.goal, self.agent))])
        ident = np.zeros((size, size), np.int32)
        for number in (1, 2):
            ident[_coverage(origin[number], side, size) >= 0.5] = number
        return Layers(ident, origin, AGENT_LAST)

    def true_mask(self) -> NDArray[np.bool_]:
        """(S, S) pixels that the agent covers, fully or partly."""
        side = self._side(self.draw_size)
        return _coverage(self.agent * (self.draw_size - side), side, self.draw_size) > 0

    def state(self) -> NDArray[np.float64]:
        """`DotEnv`'s and the background's offset."""
        return np.concatenate([super().state(), self.offset])

    def _draw(self, size: int) -> NDArray[np.uint8]:
        # The torus has 32 x 32 random cells of 4 pixels (of 64), twice the picture's side.
        cells = 16 / size
        x, y = ((np.arange(size) + 0.5) * cells - 0.5 - shift / 4 for shift in self.offset)
        picture = _torus(_cells()[self._texture], x, y)
        side = self._side(size)
        _, agent, goal = _art(size, self._side(size))
        for position, patch in ((self.goal, goal), (self.agent, agent)):
            corner = position * (size - side)
            cover = _coverage(corner, side, size)[..., None]
            within = [np.clip(np.arange(size) - start, 0, side - 1) for start in corner]
            picture = picture * (1 - cover) + _torus(patch.astype(np.float64), *within) * cover
        return np.rint(picture).astype(np.uint8)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"source": self.source, "correlation": self.correlation, "lag": self.lag}


class PairsEnv(LayeredEnv):
    """A small benchmark for latent-action models such as MaskLAM (arXiv 2602.02259): two pictures, an action and a nuisance between them.

    Geometry in units of 1/16 of the picture: a square of side 5 starts at p ~ U[4, 7]^2 and moves by 3.5 a; a smooth texture on a
    torus of side 32, seen through a window at u ~ U[0, 2]^2, moves by -4 b, b ~ U[-1, 1]^2 independent of the action (``nuisance``). At
    ``size=16`` a unit is one pixel. An episode with ``time_limit=1`` is one pair; the default is two pairs, because gymnasium's checker
    refuses environments that end with their first step. The square stops at the border. There is no reward.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        size: int = 16,
        percept_size: int | None = None,
        action_repeat: int | None = None,
        time_limit: int | None = None,
    ) -> None:
        super().__init__(
            "toy:pairs",
            seed=seed,
            size=size,
            percept_size=percept_size,
            action_dim=2,
            action_repeat=1 if action_repeat is None else action_repeat,
            time_limit=2 if time_limit is None else time_limit,
        )
        self.place = self.window = self.nuisance = np.zeros(2)
        self._noise = np.random.default_rng(0)

    def _begin(self, episode_seed: int) -> None:
        self._noise = np.random.default_rng(episode_seed)
        self.place, self.window, self.nuisance = self._noise.uniform(4, 7, 2), self._noise.uniform(0, 2, 2), np.zeros(2)

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        self.nuisance = self._noise.uniform(-1, 1, 2)
        self.place = np.clip(self.place + 3.5 * action, 0.0, 11.0)
        self.window = self.window + 4.0 * self.nuisance
        return 0.0, False

    def layers(self, size: int) -> Layers:
        """Background and square; a pixel belongs to the square if the square covers at least half of it."""
        scale = size / 16
        ident = (_coverage(self.place * scale, 5 * scale, size) >= 0.5).astype(np.int32)
        return Layers(ident, np.stack([-self.window, self.place]) * scale, AGENT_LAST[1:])

    def true_mask(self) -> NDArray[np.bool_]:
        """(S, S) pixels that the square covers, fully or partly."""
        scale = self.draw_size / 16
        return _coverage(self.place * scale, 5 * scale, self.draw_size) > 0

    def state(self) -> NDArray[np.float64]:
        """Position of the square and of the window."""
        return np.concatenate([self.place, self.window])

    def _draw(self, size: int) -> NDArray[np.uint8]:
        scale = size / 16
        x, y = ((np.arange(size) + 0.5) / scale - 0.5 + shift for shift in self.window)
        cover = _coverage(self.place * scale, 5 * scale, size)[..., None]
        picture = _torus(_waves(), x, y) * (1 - cover) + np.array([0.25, -0.25, 0.25]) * cover
        return np.rint((picture + 0.5) * 255).astype(np.uint8)


def optimal_action(env: DotEnv) -> NDArray[np.float32]:
    """The optimal action: straight to the goal on each axis at the maximum speed. The axes are independent, so no policy is better."""
    return np.clip((env.goal - env.agent) / env.speed, -1.0, 1.0).astype(np.float32)


@lru_cache(maxsize=8)
def _art(size: int, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Backgrounds (TEXTURES, S, S, 3), agent patch and goal patch (s, s, 3): the same on every machine."""
    rng = np.random.default_rng(20)
    coarse = rng.integers(40, 140, (TEXTURES, 16, 16, 3))
    fine = np.linspace(0, 16, size, endpoint=False).astype(np.int64)
    backgrounds = np.ascontiguousarray(coarse[:, fine][:, :, fine]).astype(np.uint8)
    rows, columns = np.indices((side, side))
    checks = ((rows * 4 // side + columns * 4 // side) % 2)[..., None]
    agent = np.where(checks, (255, 200, 40), (230, 70, 20)).astype(np.uint8)
    rim = (np.minimum(rows, columns) < side / 4) | (np.maximum(rows, columns) >= side - side / 4)
    goal = np.where(rim[..., None], (30, 230, 90), (10, 90, 40)).astype(np.uint8)
    return backgrounds, agent, goal


def _coverage(corner: NDArray[np.float64], side: float, size: int) -> NDArray[np.float64]:
    """(S, S) share of each pixel inside the square of ``side`` pixels whose top left edge is at ``corner`` (x, y) from the picture's."""
    start = np.arange(size)
    x, y = (np.clip(np.minimum(start + 1, edge + side) - np.maximum(start, edge), 0.0, 1.0) for edge in corner)
    return np.asarray(y[:, None] * x)


def _torus(texture: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bilinear samples (len(y), len(x), 3) of a (n, n, 3) texture that repeats; integers are centres of cells."""
    period = len(texture)
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right, down = (x - left)[None, :, None], (y - top)[:, None, None]
    upper, lower = texture[top % period], texture[(top + 1) % period]
    mixed = upper * (1 - down) + lower * down
    return np.asarray(mixed[:, left % period] * (1 - right) + mixed[:, (left + 1) % period] * right)


@lru_cache(maxsize=1)
def _cells() -> NDArray[np.float64]:
    """Textures of the moving background: (TEXTURES, 32, 32, 3) grey levels, the same on every machine."""
    return np.random.default_rng(21).integers(40, 140, (TEXTURES, 32, 32, 3)).astype(np.float64)


@lru_cache(maxsize=1)
def _waves() -> NDArray[np.float64]:
    """The texture of `PairsEnv`: (32, 32, 3) in [-0.5, 0.5], per channel six sinusoids of whole wave numbers -3..3."""
    rng = np.random.default_rng(22)
    number, phase = rng.integers(-3, 4, (3, 6, 2)), rng.uniform(0, 2 * np.pi, (3, 6))
    ys, xs = np.indices((32, 32)) / 32
    angle = 2 * np.pi * (xs[..., None, None] * number[..., 0] + ys[..., None, None] * number[..., 1]) + phase
    return np.asarray(0.5 * np.clip(np.sin(angle).sum(-1) / 2, -1, 1))
