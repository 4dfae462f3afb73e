"""Record unlabeled videos of an environment with a policy, as mp4 files or directly into a clip store.

Pre-training reads only the videos. Actions, rewards and velocities are stored too, for probes and offline stages.
Episode i is a pure function of (environment, policy, seed, i), so the same command continues where it stopped, and a
larger ``episodes`` adds episodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from localmotion import methods
from localmotion.acting.episodes import FAULTS, episode_seed
from localmotion.acting.expert import PREFIX, load_expert
from localmotion.acting.observer import Observer, make_observer
from localmotion.acting.policy import MethodPolicy, Policy
from localmotion.compute import PLAIN
from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.envs import check_env, make_env
from localmotion.errors import ConfigError, EnvError, LocalmotionError, SimulationError
from localmotion.files import check_output
from localmotion.foreign import shut
from localmotion.methods.base import MOTION
from localmotion.perception.base import ClipMotion
from localmotion.perception.exact import ExactMask
from localmotion.perception.stream import StreamingExtractor
from localmotion.recipe import EXACT, Recipe
from localmotion.recording.logs import REQUIRED, logged
from localmotion.runs.load import at_least, load_run
from localmotion.runs.rundir import claimed
from localmotion.video.bits import pack
from localmotion.video.shards import Extra
from localmotion.video.store import Clip, ClipStoreWriter, write_error
from localmotion.video.write import write_video

POLICIES = ("random", "smooth", "expert")
SHARD_CLIPS = 32
CELLS = 8
"""Cells of the grid of exact flow along each side."""
LATER = ("links", "exact_grid", "background", "colours")
"""Files that collections of earlier versions do not have. An episode that is added to such a collection has none, too."""


@dataclass
class Collected:
    """Contents of a collection."""

    path: Path
    episodes: list[dict[str, Any]] = field(default_factory=list)
    new: int = 0

    def lines(self) -> list[str]:
        """Lines for the console."""
        returns = np.array([episode["return"] for episode in self.episodes])
        frames = sum(episode["frames"] for episode in self.episodes)
        out = [f"{len(self.episodes)} videos, {frames:,} frames in {self.path} ({self.new} new)"]
        text = f"return {returns.mean():.1f} +- {returns.std():.1f}"
        met = [episode.get("success", 0.0) for episode in self.episodes]  # some environments say it only where it is true
        return [*out, f"{text}, success {np.mean(met):.0%}" if any("success" in episode for episode in self.episodes) else text]


def collect(
    env: str,
    out: Path,
    *,
    policy: str = "smooth",
    episodes: int = 16,
    seed: int = 0,
    steps: int = 0,
    size: int = 128,
    recipe: Recipe | None = None,
    noise: float = 0.0,
    progress: Callable[[int, int | None, str], Any] | None = None,
    **settings: Any,
) -> Collected:
    """Record ``episodes`` episodes of ``env``.

    Args:
        env: environment name; ``settings`` go to `make_env` (action_repeat, quality, camera, ...).
        out: folder of mp4 files, or with a ``recipe`` a clip store.
        policy: "random" (uniform), "smooth" (random, changing smoothly), "expert" (Meta-World's scripted policies),
            "expert:PATH" (an expert of `localmotion.training.experts`, its mean action), or a run directory, whose
            agent then acts as in training.
        seed: with the episode's number it decides everything random.
        steps: most agent steps of a video; 0 for whole episodes.
        size: side of the mp4's pictures, in pixels.
        recipe: write a clip store with this recipe. Pictures are then rendered at its percept_size. Exact motion
            (`Recipe.with_motion`) is that of the simulator.
        noise: standard deviation of Gaussian noise added to each action (clipped to [-1, 1]).
        progress: called with (episodes done, episodes in total, "").

    Files beside the videos:

        actions/ID.npy       (T, A) float32; row t is the action that led to frame t, row 0 is zero
        velocities/ID.npy    (T, n) float32; row t holds the simulator's velocities in frame t, if it has any
        links/ID.npy         (T, L, 3) float32; row t holds x, y in pixels and angle in radians of the agent's links in
                             frame t, if the environment has ``link_places`` (`localmotion.envs.links`)
        exact_grid/ID.npy    (T, 8, 8, 2) float32; exact flow from frame t-1 to t, x then y in pixels, averaged over the
                             cells of an 8x8 grid (row, column), if the environment has ``exact_flow``; row 0 is zero
        background/ID.npy    (T, 2) float32; row t holds the shift x, y of a moving background in frame t, in pixels, if the
                             environment has ``background_place`` and its background moves by shifts
        colours/ID.npy       (T, M, 3) float32; row t holds red, green and blue in 0..1 of the materials in frame t, if the
                             environment has ``colours`` (`diswm:`)
        collection.json      settings, names of the links and of the materials, and one entry for each episode

    Pixels are those of the stored pictures: of the recipe's ``size``, or of the mp4's ``size``.

    A clip store has further arrays for each frame: action, reward, is_terminal, and the agent's mask if the environment
    knows it or the recipe has a mask backend (`recording.logs`). Offline stages learn from these arrays; pre-training does not read them.

    Raises:
        ConfigError: unknown policy or environment, no expert for this environment, numbers out of range, or ``out``
            holds a collection with other settings.
        CheckpointError, EnvError, LocalmotionError: loading, simulating or writing failed. CheckpointError also if
            another process collects into ``out``. An episode in which the environment fails is played again with another
            seed; the third failure is an EnvError.
    """
    at_least(episodes=(episodes, 1), steps=(steps, 0), noise=(noise, 0), seed=(seed, 0))
    check_output(out, ConfigError, folder=True)
    for name, plain in (("frame_stride", 1), ("fps", 0)):
        if recipe is not None and getattr(recipe, name) != plain:
            raise ConfigError(
                f"{name}={getattr(recipe, name):g}: a collected video has every agent step; use action_repeat instead"
            )
    if steps and recipe is not None and steps < 2:
        raise ConfigError(f"steps={steps} is too short for motion; at least 2")
    side = recipe.percept_size if recipe else size
    player = _Player(env, policy, side, settings, recipe)
    if noise and player.observer.discrete:
        raise ConfigError(f"noise={noise:g}: the actions of {env} are choices, to which no noise can be added; leave it out")
    label = policy if policy in POLICIES else "expert" if policy.startswith(PREFIX) else "agent"
    header = {
        "env": player.env.describe(),  # type: ignore[attr-defined]
        "policy": player.named or (policy if policy in POLICIES else str(Path(policy).resolve().name)),
        "seed": seed,
        "steps": steps,
        "noise": noise,
        "recipe": recipe.to_json() if recipe else None,
    }
    header["env"].pop("gl", None)
    with claimed(out, "collection"):
        kept = _open(out, header)
        absent = {kind for kind in LATER if kept and not (out / kind).exists()}
        names_of = {kind: found for kind, found in player.names.items() if kind not in absent}
        names = [f"{env.replace(':', '_').replace('/', '_')}-{label}-{seed}-{number:06d}" for number in range(episodes)]
        sink = _Store(out, recipe, names, player.extra) if recipe else _Files(out, player.fps)
        result = Collected(out)
        for number, name in enumerate(names):
            if name not in kept or not sink.has(name):
                for attempt in range(1, FAULTS + 1):
                    try:
                        played = player.play(seed, number, steps, noise, attempt)
                        break
                    except SimulationError as error:
                        if attempt == FAULTS:
                            raise EnvError(
                                f"{error} ({FAULTS} failures of video {name}; the {number} before it are kept)"
                            ) from error
                        say(f"{error}; {name} is played again, with another seed in a fresh environment")
                        shut(player.env)
                        player = _Player(env, policy, side, settings, recipe)
                for kind, array in played.beside.items():
                    if kind not in absent:
                        _save_array(out / kind / f"{name}.npy", array)
                kept[name] = {"id": name, **played.entry}
                sink.put(name, played)
                _save(out, header, names_of, kept)
                result.new += 1
            if progress:
                progress(number + 1, episodes, "")
        sink.close()
    result.episodes = [kept[name] for name in names]
    return result


@dataclass(frozen=True)
class _Played:
    """One episode of T frames."""

    entry: dict[str, Any]
    """Its entry in collection.json."""
    pictures: NDArray[np.uint8]
    """(T, S, S, 3)"""
    extra: dict[str, NDArray[Any]]
    """Arrays of `logged` by name."""
    beside: dict[str, NDArray[np.float32]]
    """Arrays in the folders beside the videos, by folder."""
    motion: ClipMotion | None
    """For recipes with exact motion."""


class _Player:
    """An environment with a policy and a camera. ``stored``: recipe of a clip store, if there is one."""

    def __init__(self, env: str, policy: str, side: int, settings: dict[str, Any], stored: Recipe | None) -> None:
        self.policy, self.side = policy, side
        self.act: Policy | None = None
        self.named = ""
        """Name of an expert in collection.json."""
        self.compute = PLAIN
        self.drawn = policy in POLICIES or policy.startswith(PREFIX)
        """Whether observations are drawn at the size of the collection."""
        if self.drawn:
            self.observer = Observer(make_env(env, size=side, **settings), None)
            if policy.startswith(PREFIX):
                self._load_expert(env, Path(policy.removeprefix(PREFIX)))
            if policy == "expert" and not hasattr(self.observer.env, "expert_action"):
                raise ConfigError(
                    f"{env}: has no scripted expert; Meta-World tasks have one. Train one: localmotion expert {env}"
                )
        elif Path(policy).is_dir():
            run, method, compute = load_run(Path(policy))
            if run.stage not in methods.get(run.method).acts_after:
                raise ConfigError(f"{policy}: is a pre-training run and has no policy; give a fine-tuned or trained run")
            if run.env != env:
                raise ConfigError(f"{policy}: was trained in {run.env}, not in {env}")
            run = _changed(run, settings)
            if run.observed == "vectors":
                run = replace(run, observed="both")  # as in training, and pictures for the collection
            recipe = run.recipe if bool(method.needs(run.model, run.stage) & MOTION) else None
            self.observer = make_observer(run, recipe, size=method.image_size)
            self.act, self.compute = MethodPolicy(method, compute, explore=True, window=run.online.length), compute
        else:
            raise ConfigError(f"policy {policy!r}: is neither a run directory nor one of {', '.join(POLICIES)}, expert:PATH")
        self.env = self.observer.env
        self.fps = float(self.env.metadata.get("render_fps", 20))
        self.mask: ExactMask | None = None
        if stored and (stored.mask == EXACT or (not stored.mask and hasattr(self.env, "agent_mask"))):
            self.mask = ExactMask(self.env, stored.size)
        masked = stored.size if stored and (stored.mask or self.mask) else 0
        self.exact = stored if stored and stored.exact else None
        self.extra = logged(self.observer.action_dim, masked)
        self.pixels = stored.size if stored else side
        """Side of the pictures in whose pixels links and flow are given."""
        names: tuple[str, ...] | None = getattr(self.env, "link_names", None)
        self.names: dict[str, dict[str, Any]] = {}
        """Names of the rows of the files beside the videos, by folder."""
        if names is not None:
            self.names["links"] = {"names": list(names), "size": self.pixels}
        painted: tuple[str, ...] | None = getattr(self.env, "colour_names", None)
        if painted is not None:
            self.names["colours"] = {"names": list(painted)}

    def _load_expert(self, env: str, path: Path) -> None:
        inner: Any = self.observer.env
        inner.reset(seed=0)  # some tasks have no state vector before their first episode
        expert = load_expert(path, env, len(inner.vector()), self.observer.action_dim)
        self.named = f"{PREFIX}{expert.digest()}"
        self.act = lambda records, first: expert.act(inner.vector()[None])

    def play(self, seed: int, number: int, steps: int, noise: float, attempt: int = 1) -> _Played:
        """Play one episode. Raises SimulationError if the environment fails; another ``attempt`` has another seed."""
        begin = episode_seed(seed, "collect", number, attempt)
        with self.compute.own_randomness():
            torch.manual_seed(begin)
            return self._play(begin, steps, noise)

    def _play(self, begin: int, steps: int, noise: float) -> _Played:
        from localmotion.envs.bodies import smooth_actions

        rng = np.random.default_rng(begin)
        dim = self.observer.action_dim
        record, done = self.observer.reset(begin), False
        pictures, rows, known = [self._picture(record)], [self._row(record)], [self._known()]
        if self.mask:
            self.mask.begin()
        stream = StreamingExtractor(self.exact, begin, self.env) if self.exact else None
        moves = [stream.reset(pictures[0])] if stream else []
        total, success, signals = 0.0, 0.0, False
        waves = smooth_actions(rng, 2048, dim) if self.policy == "smooth" else np.zeros((1, dim))
        while not done and (not steps or len(pictures) < steps + 1):
            if self.act is not None:
                action = self.act([record], len(pictures) == 1)[0]
            elif self.policy == "expert":
                action = self.env.expert_action()  # type: ignore[attr-defined]
            elif self.policy == "smooth":
                action = waves[(len(pictures) - 1) % len(waves)]
            else:
                action = rng.uniform(-1, 1, dim)
            if self.observer.discrete and self.act is None:
                action = np.eye(dim)[np.argmax(action)]  # the largest of random numbers, or of smooth waves, is chosen
            if noise:
                action = np.clip(action + rng.normal(0, noise, dim), -1, 1)
            action = np.asarray(action, np.float32)
            record, done, info = self.observer.step(action)
            total, success = total + record["reward"], max(success, float(info.get("success", 0)))
            signals = signals or "success" in info
            pictures.append(self._picture(record))
            if stream:
                moves.append(stream.step(pictures[-1]))
            rows.append(self._row(record))
            if self.mask:
                self.mask.advance()
            known.append(self._known())
        entry = {"seed": begin, "frames": len(pictures), "return": total}
        if signals:
            entry["success"] = success
        extra = {name: np.stack([row[name] for row in rows]) for name in REQUIRED}
        if self.mask:
            extra["mask"] = pack(np.stack(self.mask.shown))
        motion = stream.clip(moves) if stream else None
        beside = {name: np.stack([row[name] for row in known]).astype(np.float32) for name in known[0]}
        beside = {name: array for name, array in beside.items() if array.size}
        return _Played(entry, np.stack(pictures), extra, {"actions": extra["action"], **beside}, motion)

    def _row(self, record: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """The arrays of `REQUIRED` of a record."""
        return {name: np.asarray(record[name], np.dtype(dtype)) for name, dtype in REQUIRED.items()}

    def _known(self) -> dict[str, NDArray[Any]]:
        """What the environment knows of the current frame and of its motion, by folder."""
        env: Any = self.env
        found: dict[str, NDArray[Any]] = {}
        if hasattr(env, "velocities"):
            found["velocities"] = env.velocities()
        if "links" in self.names:
            found["links"] = env.link_places(self.pixels)
        if hasattr(env, "background_place") and (place := env.background_place(self.pixels)) is not None:
            found["background"] = place
        if "colours" in self.names:
            found["colours"] = env.colours()
        if hasattr(env, "exact_flow"):
            flow = torch.from_numpy(env.exact_flow()).permute(2, 0, 1)  # (2, S, S)
            cells = F.adaptive_avg_pool2d(flow, CELLS) * (self.pixels / flow.shape[-1])
            found["exact_grid"] = cells.permute(1, 2, 0).numpy()  # (CELLS, CELLS, 2)
        return found

    def _picture(self, record: dict[str, Any]) -> NDArray[np.uint8]:
        if self.drawn:
            picture: NDArray[np.uint8] = record["image"]
            return picture
        return self.observer.drawn(self.side)


def _changed(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The run with the given settings of `make_env`. Other settings stay as in training. Raises ConfigError."""
    given = {name: value for name, value in settings.items() if value not in (None, "auto")}
    own = {name: given.pop(name) for name in ("action_repeat", "quality", "supersample") if name in given}
    check_env(run.env, given)
    return replace(run, **own, env_options={**run.env_options, **given})


class _Files:
    """A folder of mp4 files."""

    def __init__(self, out: Path, fps: float) -> None:
        self.out, self.fps = out, fps

    def has(self, name: str) -> bool:
        return (self.out / f"{name}.mp4").exists()

    def put(self, name: str, played: _Played) -> None:
        write_video(self.out / f"{name}.mp4", played.pictures, self.fps, crf=12)

    def close(self) -> None:
        """Nothing to do: each file is complete when it is written."""


class _Store:
    """A clip store. Finished clips are kept on disk until their shard is complete."""

    def __init__(self, out: Path, recipe: Recipe, names: list[str], extra: Extra) -> None:
        from localmotion.perception.clips import ClipExtractor
        from localmotion.video.spool import Spool

        self.recipe = recipe
        mask = "" if recipe.mask == EXACT else recipe.mask
        # Beside exact motion, only the masks of the extractor are used.
        perceived = replace(recipe, mask=mask).with_motion("perceived")
        self.extractor = ClipExtractor(perceived) if mask or not recipe.exact else None
        self.writer = ClipStoreWriter.open(out, recipe.size, recipe.to_json(), recipe.hash(), recipe.tracks, SHARD_CLIPS, extra)
        self.spool = Spool(out)
        self.done = self.writer.done_ids()
        self.shards = self.writer.pending(names)
        self.close()

    def has(self, name: str) -> bool:
        return name in self.done or self.spool.get(name) is not None

    def put(self, name: str, played: _Played) -> None:
        from localmotion.perception.extract import clip_of, clip_with

        if played.motion is None:
            assert self.extractor is not None
            clip = clip_of(played.pictures, name, self.extractor)
        else:
            mask = self.extractor.extract(played.pictures, name).mask if self.extractor else None
            clip = clip_with(played.pictures, replace(played.motion, mask=mask), self.recipe, name)
        self.spool.put(name, replace(clip, extra={**clip.extra, **played.extra}))
        if any(members[-1] == name for _, members in self.shards):
            self.close()

    def close(self) -> None:
        """Write the shards that have all their clips."""
        for index, members in self.shards:
            clips = [clip for clip in map(self.spool.get, members) if isinstance(clip, Clip)]
            if len(clips) == len(members):
                self.writer.write_shard(index, clips)
                self.done |= set(members)
                self.spool.drop(members)
        self.shards = [(index, members) for index, members in self.shards if not self.done.issuperset(members)]
        if not self.shards:
            self.spool.clear()


def _open(out: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Episodes of an earlier call with the same settings, by id. Raises ConfigError if the settings differ."""
    path = out / "collection.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        before, episodes = found["settings"], {entry["id"]: entry for entry in found["episodes"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LocalmotionError(f"{path}: cannot be read ({error}); delete the folder and collect again") from error
    now = json.loads(json.dumps(header))
    for key, value in now.items():
        if before.get(key) != value:
            differ = _differences(key, before.get(key), value)
            shown = ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
            raise ConfigError(f"{out}: was collected with {shown}; give a new folder")
    return episodes


def _differences(key: str, before: Any, now: Any) -> list[str]:
    """What differs between two values of a setting, by dotted names."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [f"{key} {before}, now {now}"] if before != now else []
    found = (_differences(f"{key}.{name}", before.get(name), now.get(name)) for name in {**before, **now})
    return [text for part in found for text in part]


def _save(out: Path, header: dict[str, Any], names: dict[str, dict[str, Any]], episodes: dict[str, dict[str, Any]]) -> None:
    about = {"settings": header, **names}
    text = json.dumps({**about, "episodes": list(episodes.values())}, indent=1)
    _write(out / "collection.json", lambda file: file.write(text.encode()))


def _save_array(path: Path, array: NDArray[np.float32]) -> None:
    _write(path, lambda file: np.save(file, array, allow_pickle=False))


def _write(path: Path, fill: Callable[[Any], Any]) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            fill(file)
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path.parent, path.name, error) from error
    finally:
        partial.unlink(missing_ok=True)
