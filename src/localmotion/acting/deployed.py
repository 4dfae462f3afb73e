"""A trained agent for a robot: pictures of a camera in, actions out, without an environment (docs/deployment.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from localmotion import methods
from localmotion.acting.episodes import episode_seed
from localmotion.acting.observer import wants_goal
from localmotion.acting.policy import MethodPolicy
from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.envs.base import area_average
from localmotion.envs.spaces import Actions, actions_of, fit, read_actions
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError
from localmotion.methods.base import MOTION, Method
from localmotion.models.distributions import likeliest
from localmotion.perception.stream import StreamingExtractor
from localmotion.recipe import Recipe
from localmotion.runs.load import Which, load_run
from localmotion.runs.rundir import read_environment
from localmotion.runs.settings import read_config
from localmotion.runs.sharing import local_run

SMALLEST = 8
"""Smallest side of a camera's picture, in pixels."""


class DeployedPolicy:
    """A trained method with everything between a camera's picture and an action: resizing, perception, state, the range of actions.

    `load_policy` makes it. It plays one episode at a time: `reset`, then `act` once for each agent step.

    Attributes:
        observation_space: Dict of what `act` takes. ``image`` (P, P, 3) uint8 if the method sees pictures: P is the side to which a
            picture is resized first. ``vector`` (V,) float32 if it learned from vectors; ``goal`` (S, S, 3) uint8 if it acts towards a
            goal picture.
        action_space: that of the environment where it learned. Box(-1, 1) for built-in environments, and for runs that do not know.
        deterministic: no draw is random where the method draws latents or actions, see `load_policy`.
        run: settings of the run.
    """

    def __init__(
        self, run: RunConfig, method: Method, compute: Compute, actions: Actions, recipe: Recipe | None, *, deterministic: bool
    ) -> None:
        self.run, self.deterministic = run, deterministic
        self._method, self._compute, self._actions, self._recipe = method, compute, actions, recipe
        self._size = method.image_size
        side = recipe.percept_size if recipe else self._size
        boxes: dict[str, spaces.Space[Any]] = {}
        if getattr(run.model, "pixels", True):
            boxes["image"] = spaces.Box(0, 255, (side, side, 3), np.uint8)
        if length := getattr(run.model, "vector_dim", 0):
            boxes["vector"] = spaces.Box(-np.inf, np.inf, (length,), np.float32)
        if wants_goal(run):
            boxes["goal"] = spaces.Box(0, 255, (self._size, self._size, 3), np.uint8)
        self.observation_space = spaces.Dict(boxes)
        self.action_space = actions.space
        self._policy: MethodPolicy | None = None
        self._extractor: StreamingExtractor | None = None
        self._random: list[torch.Tensor] = []
        self._last: NDArray[np.float32] | None = None  # None: the episode begins with the next observation

    def reset(self, seed: int = 0) -> None:
        """Begin an episode: forget everything seen, and start the random numbers again.

        With the frames of ``localmotion evaluate RUN --episodes 1 --seed SEED`` the actions are those of that evaluation, to the bit
        (on a CPU, unless ``deterministic``).
        """
        self._policy = MethodPolicy(self._method, self._compute, explore=False, window=self.run.online.length)
        if self._recipe:
            self._extractor = StreamingExtractor(self._recipe, episode_seed(seed, "eval", 0))
        self._last = None
        with self._compute.own_randomness():
            torch.manual_seed(episode_seed(seed, "policy", 0))
            self._random = self._random_state()

    def act(self, obs: NDArray[np.uint8] | Mapping[str, NDArray[Any]]) -> Any:
        """The action for the newest observation, in ``action_space``: a float array, or an int for choices.

        Args:
            obs: a picture (H, W, 3) uint8 RGB of any size, or a dict with the keys of ``observation_space``. Pictures are averaged over
                areas to the side that the method saw in training; others than squares are squeezed.

        Raises LocalmotionError before the first `reset`, for a missing key, and for another shape or type.
        """
        if self._policy is None:
            raise LocalmotionError("policy: act before reset; call reset() where an episode begins")
        record, first = self._record(obs), self._last is None
        with self._own_randomness(), likeliest() if self.deterministic else nullcontext():
            self._last = self._policy([record], first)[0]
        return self._actions.given(self._last.astype(np.float64))

    def _record(self, obs: Any) -> dict[str, Any]:
        """The observation as an `Observer` records it."""
        wanted = list(self.observation_space.spaces)
        seen = obs if isinstance(obs, Mapping) else {"image": obs}
        if missing := [key for key in wanted if key not in seen]:
            raise LocalmotionError(f"policy: the observation lacks {', '.join(missing)}; give a dict with {', '.join(wanted)}")
        last = np.zeros(self._actions.count, np.float32) if self._last is None else self._last
        record: dict[str, Any] = {"action": last}
        if "goal" in wanted:
            record["goal"] = fit(checked_picture("goal", seen["goal"]), self._size)
        if "vector" in wanted:
            record["vector"] = self._vector(seen["vector"])
        if "image" not in wanted:
            return record
        picture = checked_picture("image", seen["image"])
        if self._recipe is None or self._extractor is None:
            return record | {"image": fit(picture, self._size)}
        frame = fit(picture, self._recipe.percept_size)
        motion = self._extractor.reset(frame) if self._last is None else self._extractor.step(frame)
        image = frame if len(frame) == self._size else area_average(frame, self._size)
        return record | {"image": image} | vars(motion)

    def _vector(self, value: Any) -> NDArray[np.float32]:
        (length,) = self.observation_space["vector"].shape or ()
        vector = np.asarray(value)
        if vector.shape != (length,) or vector.dtype.kind not in "fiu" or not np.isfinite(vector).all():
            raise LocalmotionError(f"policy: vector is {vector.dtype} {vector.shape}; it takes ({length},) finite numbers")
        return vector.astype(np.float32)

    def _random_state(self) -> list[torch.Tensor]:
        """States of torch's generators that the method draws from."""
        device = self._compute.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Context with the episode's random numbers; the caller's do not change."""
        with self._compute.own_randomness():
            torch.set_rng_state(self._random[0])
            for state in self._random[1:]:
                torch.cuda.set_rng_state(state, self._compute.device)
            yield
            self._random = self._random_state()


def checked_picture(key: str, value: Any) -> NDArray[np.uint8]:
    """A camera's picture. Raises LocalmotionError unless it is (H, W, 3) uint8 with sides of at least `SMALLEST` pixels."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3:
        what = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise LocalmotionError(f"policy: {key} is {what}; it takes an RGB picture (H, W, 3) uint8, 0 to 255")
    if min(value.shape[:2]) < SMALLEST:
        raise LocalmotionError(f"policy: {key} is {value.shape}; its sides must have at least {SMALLEST} pixels")
    return value


def loaded(path: Path, *, device: str, which: Which) -> tuple[RunConfig, Method, Compute]:
    """`load_run` without the run's environment, and with the caller's number of torch threads."""
    threads = torch.get_num_threads()
    try:
        return load_run(path, device=device, threads=1, which=which, plays=False)
    finally:
        torch.set_num_threads(threads)  # a step takes one thread in any case (`Compute.acting`)


def known_actions(path: Path, count: int, discrete: bool) -> Actions:
    """The actions of the environment where the run in ``path`` learned, as far as it is recorded; else A numbers in [-1, 1], or choices.

    Raises ConfigError if what is recorded cannot be read, or is not of ``count`` numbers.
    """
    env = read_environment(path).get("env")
    if isinstance(env, dict) and "actions" in env:
        found = actions_of(env["actions"])
        if (found.count, found.discrete) != (count, discrete):
            raise ConfigError(f"{path / 'environment.json'}: its action space {found.space} is not that of the weights")
        return found
    return read_actions(spaces.Discrete(count) if discrete else spaces.Box(-1.0, 1.0, (count,), np.float32))


def load_policy(
    run: str | Path,
    *,
    which: Which = "newest",
    device: str = "auto",
    deterministic: bool = False,
    action_space: spaces.Space[Any] | None = None,
) -> DeployedPolicy:
    """Load a trained agent to act on a robot. It needs no environment.

    Args:
        run: run directory, ``hf:owner/name[@revision]`` or ``shelf:NAME``; also of a stage that learned from logged episodes.
        which: "newest" weights, or "best" for those of the best evaluation during training.
        device: as `--device`.
        deterministic: False: act as `localmotion evaluate`. World models then sample their latent state, and some methods (DreamerV3)
            their actions, from random numbers that `DeployedPolicy.reset` seeds. True: take the likeliest latent state and action
            instead, as `localmotion export` does.
        action_space: of the robot, Box or Discrete, if the run does not know it: actions in [-1, 1] are then mapped linearly to its bounds.

    Raises:
        CheckpointError: a run that is missing, incomplete or damaged, or whose stage gives no actor.
        ConfigError: settings that do not fit this version; exact motion, which only a simulator has; an action space that does not fit.
        MissingExtraError: a package of its perception, or of the Hub, is missing.
    """
    path = local_run(run)
    asked = read_config(path)
    if asked.stage not in methods.get(asked.method).acts_after:
        raise CheckpointError(f"{run}: is a run of stage {asked.stage} and has no actor; fine-tune it first")
    config, method, compute = loaded(path, device=device, which=which)
    recipe = config.recipe if method.needs(config.model, config.stage) & MOTION else None
    if recipe and recipe.exact:
        raise ConfigError(
            f"{run}: learned with exact motion, which comes from a simulator's state; fine-tune it with --motion perceived to act"
            " from pictures"
        )
    discrete = bool(getattr(config.model, "discrete", False))
    actions = known_actions(path, method.action_dim, discrete) if action_space is None else read_actions(action_space)
    if (actions.count, actions.discrete) != (method.action_dim, discrete):
        what = f"chooses one of {method.action_dim}" if discrete else f"gives {method.action_dim} numbers"
        raise ConfigError(f"action space {actions.space} does not fit {run}, which {what}")
    return DeployedPolicy(config, method, compute, actions, recipe, deterministic=deterministic)
