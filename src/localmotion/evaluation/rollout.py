"""Environment and streaming perception together, and the evaluation protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.errors import CheckpointError, LocalmotionError, SimulationError
from localmotion.files import read_json
from localmotion.methods.base import Method
from localmotion.perception.base import Recipe
from localmotion.training.compiled import uncompiled
from localmotion.training.rundir import check_recipe

if TYPE_CHECKING:
    from localmotion.perception.stream import StreamingExtractor


def episode_seed(seed: int, stream: str, episode: int) -> int:
    """Seed of one episode: a pure function of the run's seed, the stream (train, eval, ...) and the episode's number.

    Training and evaluation never share random numbers, and a resumed run meets the same episodes.
    """
    mixed = np.random.SeedSequence([seed, {"train": 0, "eval": 1, "prefill": 2, "collect": 3, "policy": 4}[stream], episode])
    return int(mixed.generate_state(1)[0] >> 1)


SHOWN = ("image", "vector")
"""Parts of an observation that the agent is shown and the replay keeps."""


class Observer:
    """One environment with its stream of Atomic Actions: what the agent sees and what the replay stores.

    Args:
        env: a localmotion environment whose observation has "image" or "vector", and "percept" when the recipe perceives at another size.
        recipe: perception recipe, or None for methods without motion.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], recipe: Recipe | None) -> None:
        self.env, self.recipe = env, recipe
        self.seconds = {"env": 0.0, "perception": 0.0}
        self.extractor: StreamingExtractor | None = None

    @property
    def action_dim(self) -> int:
        """Number of action dimensions."""
        shape = self.env.action_space.shape
        assert shape is not None
        return int(shape[0])

    def spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of a replay record."""
        boxes: dict[str, Any] = self.env.observation_space.spaces  # type: ignore[attr-defined]
        spec: dict[str, tuple[tuple[int, ...], str]] = {
            **{key: (tuple(boxes[key].shape), boxes[key].dtype.name) for key in SHOWN if key in boxes},
            "action": ((self.action_dim,), "float32"),
            "reward": ((), "float32"),
            "is_terminal": ((), "bool"),
        }
        if self.recipe:
            size, count = self.recipe.size, self.recipe.tracks
            spec |= {
                "flow": ((size, size, 2), "float16"),
                "tracks": ((count, 2), "float32"),
                "visible": ((count,), "bool"),
                "track_id": ((count,), "int32"),
            }
        return spec

    def reset(self, seed: int) -> dict[str, Any]:
        """Start an episode: record 0, with a zero action and no motion. Raises SimulationError as `step`."""
        obs, _ = self._ask(lambda: self.env.reset(seed=seed))
        if self.recipe:
            from localmotion.perception.stream import StreamingExtractor

            self.extractor = StreamingExtractor(self.recipe, seed)
        zeros = np.zeros(self.action_dim, np.float32)
        return self._record(obs, zeros, 0.0, False, first=True)

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], bool, dict[str, Any]]:
        """One agent step: the record, whether the episode is over, and the environment's info.

        Raises SimulationError when the simulator fails or gives a reward that is not finite.
        """
        obs, reward, terminated, truncated, info = self._ask(lambda: self.env.step(action))
        if not np.isfinite(reward):
            raise SimulationError(f"{self._name}: reward {reward} is not finite; the simulation has diverged")
        return self._record(obs, action, float(reward), terminated, first=False), terminated or truncated, info

    @property
    def _name(self) -> str:
        return str(getattr(self.env, "name", type(self.env).__name__))

    def _ask(self, ask: Callable[[], Any]) -> Any:
        """What the environment answers. Simulators raise what they like; misuse (of wrong actions, say) keeps its own error."""
        began = time.perf_counter()
        try:
            return ask()
        except LocalmotionError:
            raise
        except Exception as error:
            raise SimulationError(f"{self._name}: {type(error).__name__}: {error}") from error
        finally:
            self.seconds["env"] += time.perf_counter() - began

    def _record(
        self, obs: dict[str, Any], action: NDArray[np.float32], reward: float, terminal: bool, *, first: bool
    ) -> dict[str, Any]:
        record = {**{key: obs[key] for key in SHOWN if key in obs}, "action": action, "reward": reward, "is_terminal": terminal}
        if self.recipe and self.extractor:
            began = time.perf_counter()
            frame = obs.get("percept", obs["image"])
            motion = self.extractor.reset(frame) if first else self.extractor.step(frame)
            record |= {
                "flow": motion.flow,
                "tracks": motion.tracks,
                "visible": motion.visible,
                "track_id": motion.track_id,
            }
            self.seconds["perception"] += time.perf_counter() - began
        return record


def make_observer(run: RunConfig, recipe: Recipe | None, *, size: int = 64) -> Observer:
    """The environment of a run with the perception it uses. The picture is rendered once, at the size perception wants.

    ``size`` is the side of "image" for methods without motion; with a recipe it is the recipe's.
    """
    from localmotion.envs import make_env

    if recipe:
        size = recipe.size
    percept = recipe.percept_size if recipe and recipe.percept_size != size else None
    env = make_env(
        run.env,
        seed=run.seed,
        size=size,
        percept_size=percept,
        quality=run.quality,
        action_repeat=run.action_repeat or None,
        supersample=run.supersample,
        observed=run.observed,
        **run.env_options,
    )
    return Observer(env, recipe)


def stored_recipe(run: RunConfig, path: Path) -> Recipe | None:
    """The recipe of a run in ``path``: its settings', else the one it began with (pre-training: of its clips), else its checkpoint's.

    Raises ConfigError for one that cannot be followed, CheckpointError for a file that cannot be read.
    """
    if run.recipe:
        return check_recipe(run.recipe, path / "config.json")
    places = [
        path / "config.json",
        path / "environment.json",
        *([Path(run.checkpoint) / "environment.json"] if run.checkpoint else []),
    ]
    for place in places:
        if place.exists() and (
            found := read_json(place, CheckpointError, "restore it from where the run was made").get("recipe")
        ):
            return check_recipe(found, place)
    return None


def streaming_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a clip store as the streaming side uses it: no look-ahead, every environment frame."""
    return replace(recipe, redraw_rounds=0, frame_stride=1, fps=0.0)


def to_batch(records: Sequence[dict[str, Any]], *, first: bool, device: torch.device) -> dict[str, Tensor]:
    """Records of several environments at one time as a batch (B, 1, ...)."""
    keys = [key for key in records[0] if key not in ("reward", "is_terminal")]
    batch = {key: torch.from_numpy(np.stack([np.asarray(r[key]) for r in records])[:, None]).to(device) for key in keys}
    batch["is_first"] = torch.full((len(records), 1), first, device=device)
    return batch


@dataclass
class Rollout:
    """Finished evaluation episodes."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    successes: list[float] = field(default_factory=list)
    """1.0 where success was signalled at any step; empty for suites without a success signal."""
    frames: NDArray[np.uint8] | None = None
    """(T, S, S, 3) of the first episode."""

    def summary(self) -> dict[str, Any]:
        """Fields of an "eval" line."""
        out: dict[str, Any] = {
            "returns": [round(x, 4) for x in self.returns],
            "return_mean": float(np.mean(self.returns)),
            "return_std": float(np.std(self.returns)),
            "episodes": len(self.returns),
            "length_mean": float(np.mean(self.lengths)),
        }
        if self.successes:
            out["success_rate"] = float(np.mean(self.successes))
        return out


Policy = Callable[[list[dict[str, Any]], bool], NDArray[np.float32]]


def run_episodes(observers: Sequence[Observer], seeds: Sequence[int], policy: Policy, *, keep_frames: bool = False) -> Rollout:
    """One episode in each environment, in lockstep; ``policy(records, first)`` gives the actions (E, A) of all at once."""
    records = [observer.reset(seed) for observer, seed in zip(observers, seeds, strict=True)]
    count = len(observers)
    returns, lengths, success = np.zeros(count), np.zeros(count, int), np.zeros(count)
    alive, has_success = np.ones(count, bool), False
    frames = [_picture(observers[0], records[0])] if keep_frames else []
    first = True
    while alive.any():
        actions = policy(records, first)
        first = False
        for index in np.flatnonzero(alive).tolist():
            records[index], done, info = observers[index].step(actions[index])
            returns[index] += records[index]["reward"]
            lengths[index] += 1
            if "success" in info:
                has_success = True
                success[index] = max(success[index], float(info["success"]))
            alive[index] = not done
        if keep_frames and lengths[0] == len(frames):
            frames.append(_picture(observers[0], records[0]))
    return Rollout(
        returns.tolist(),
        lengths.tolist(),
        success.tolist() if has_success else [],
        np.stack(frames) if keep_frames else None,
    )


SMALLEST_FILM = 64
"""Pixels a side from which people can tell what a picture shows."""


def _picture(observer: Observer, record: dict[str, Any]) -> NDArray[np.uint8]:
    """What a film shows of a record: what the agent saw. If that is small or no picture, the scene is drawn for the film."""
    seen: NDArray[np.uint8] | None = record.get("image")
    if seen is not None and len(seen) >= SMALLEST_FILM:
        return seen
    drawn: NDArray[np.uint8] = observer.env.render_frame(2 * SMALLEST_FILM)  # type: ignore[attr-defined]
    return drawn


class MethodPolicy:
    """A trained method as a policy with its own recurrent state, ``carry``, for environments stepped in lockstep."""

    def __init__(self, method: Method, compute: Compute, *, explore: bool, window: int) -> None:
        self.method, self.compute, self.explore, self.window = method, compute, explore, window
        self.carry: Any = None

    @torch.inference_mode()
    def __call__(self, records: list[dict[str, Any]], first: bool) -> NDArray[np.float32]:
        """Actions (E, A) for the newest record of each environment; ``first``: the first of an episode."""
        if first:
            self.carry = self.method.initial_carry(len(records))
        batch = to_batch(records, first=first, device=self.compute.device)
        with self.compute.acting(len(records)), uncompiled(self.method):
            action, self.carry = self.method.act(batch, self.carry, explore=self.explore, window=self.window)
        result: NDArray[np.float32] = action.float().clamp(-1, 1).cpu().numpy()
        return result


def random_policy(action_dim: int, seed: int) -> Policy:
    """Uniform random actions."""
    rng = np.random.default_rng(seed)
    return lambda records, first: rng.uniform(-1, 1, (len(records), action_dim)).astype(np.float32)


def evaluate(
    policy_for: Callable[[], Policy],
    make: Callable[[], Observer],
    *,
    seed: int,
    episodes: int,
    at_once: int = 5,
    observers: list[Observer] | None = None,
    keep_frames: bool = False,
) -> Rollout:
    """The evaluation protocol: ``episodes`` episodes with seeds of the eval stream, a few environments in lockstep.

    ``observers`` (if given) is filled once and reused by later evaluations.
    """
    pool = observers if observers is not None else []
    while len(pool) < min(at_once, episodes):
        pool.append(make())
    out = Rollout()
    for begin in range(0, episodes, len(pool)):
        wanted = range(begin, min(begin + len(pool), episodes))
        seeds = [episode_seed(seed, "eval", index) for index in wanted]
        part = run_episodes(pool[: len(seeds)], seeds, policy_for(), keep_frames=keep_frames and begin == 0)
        out.returns += part.returns
        out.lengths += part.lengths
        out.successes += part.successes
        out.frames = out.frames if out.frames is not None else part.frames
    return out
