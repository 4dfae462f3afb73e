"""Several copies of one environment in worker processes, with pictures in shared memory.

Rendering takes most of an environment's time and uses one core, so each worker process has its own OpenGL context. Only commands pass
through pipes; observations, rewards and flags are in shared memory. E environments, A actions.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from localmotion.envs.returned import finite_reward
from localmotion.errors import ConfigError, EnvError, LocalmotionError, SimulationError
from localmotion.foreign import FAULTS, shut, trust_env, trusted_envs
from localmotion.machine import cores

_FLAGS = ("reward", "terminated", "truncated", "env_steps", "success")


def env_seed(seed: int, index: int, life: int = 0) -> int:
    """Seed of environment ``index``: a pure function, so results do not depend on the number of workers.

    ``life`` counts restarts: an environment made again after a crash does not repeat its past episodes.
    """
    return int(np.random.SeedSequence([seed, index, life]).generate_state(1)[0] >> 1)


class VectorEnv(gymnasium.vector.VectorEnv):
    """``count`` environments ``name`` stepped together; reset only on request (`AutoresetMode.DISABLED`).

    If an environment fails (its simulator raises an error, or a number is not finite), its episode ends: it is returned truncated, with
    its last picture and no reward, and a new instance waits for the reset. If a worker dies or hangs, that happens to all its environments.
    ``info["crashed"]`` (E,) bool says where, and ``info["faults"]`` why: a dict of texts by environment. The same happens in a reset:
    what failed there waits for the next one.

    Args:
        name: as for `make_env`, which also takes ``settings``.
        count: E.
        seed: environment i is made with `env_seed(seed, first + i)`.
        first: number of the first environment, if other processes have those before it.
        workers: processes; None for one per core, at most E.
        restarts: times a worker is replaced before its death is an error.
        timeout: a worker counts as dead after this many seconds without an answer; ten times that where environments are made.

    Raises:
        ConfigError: the errors of `make_env`, and counts below 1.
        EnvError: a worker that died too often; an environment that cannot draw or was misused (the message has its number).
    """

    def __init__(
        self,
        name: str,
        count: int,
        *,
        seed: int = 0,
        first: int = 0,
        workers: int | None = None,
        restarts: int = 1,
        timeout: float = 60.0,
        **settings: Any,
    ) -> None:
        self._workers: list[_Worker] = []
        if count < 1 or (workers is not None and workers < 1):
            raise ConfigError(f"count={count}, workers={workers}: both must be at least 1")
        self.name, self.num_envs, self.seed, self.first = name, count, seed, first
        self._restarts, self._timeout, self._settings = restarts, timeout, settings
        workers = min(count, workers or cores())
        self._slots = [tuple(int(i) for i in part) for part in np.array_split(np.arange(count), workers)]
        self._context = multiprocessing.get_context("spawn")
        self._lives = [0] * workers

        picture, action, describe, self.metadata = self._probe()
        self.single_observation_space, self.single_action_space, self._keys = picture, action, tuple(picture.spaces)
        self.observation_space, self.action_space = batch_space(picture, count), batch_space(action, count)
        self.description: dict[str, Any] = describe
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self._shared, self._views = _buffers(self._context, count, picture, action)
        for index in range(workers):
            self._workers.append(self._start(index))
        self._running = np.zeros(count, bool)
        self._crashed = np.zeros(count, bool)
        self._reasons: dict[int, str] = {}  # of the environments that failed in this call
        self._gone: set[int] = set()  # environments that are made again at their next reset
        self._pending: list[list[int]] = []
        self._last = self._observations()

    # -- gymnasium ------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Start episodes, in all environments or in those of ``options["reset_mask"]`` (E,) bool. -> observations (E, ...), infos.

        ``seed``: one number (environment i gets `env_seed` of it), one per environment, or None for each one's next episode.
        """
        mask = np.ones(self.num_envs, bool)
        if options and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"], bool)
            if mask.shape != (self.num_envs,):
                raise EnvError(f"{self.name}: reset_mask has shape {mask.shape}, expected ({self.num_envs},)")
        if isinstance(seed, (int, np.integer)):
            seeds: list[int | None] = [env_seed(int(seed), index) for index in range(self.num_envs)]
        else:
            seeds = list(seed) if seed is not None else [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise EnvError(f"{self.name}: {len(seeds)} seeds for {self.num_envs} environments; give one each, or one number")
        self._crashed &= ~mask
        self._running |= mask
        self._reasons = {}
        asked = [[(i, seeds[i]) for i in slots if mask[i]] for slots in self._slots]
        for worker, part in zip(self._workers, asked, strict=True):
            if part:
                worker.send("reset", part, 10 if self._gone & {i for i, _ in part} else 1)
        self._gone -= set(np.flatnonzero(mask).tolist())
        self._answered(index for index, part in enumerate(asked) if part)
        return self._finish()

    def step(self, actions: NDArray[np.float32]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One agent step in all environments whose episode runs. -> observations, rewards, terminated, truncated (E,), infos.

        Environments whose episode is over do not change, with reward 0 and their flags set, until they are reset.
        """
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Send the actions (E, A) and return at once; the workers step in parallel with the caller."""
        if self._pending:
            raise EnvError(f"{self.name}: a step is under way; call step_wait() first")
        given = np.asarray(actions, np.float32)
        if given.shape != self._views["action"].shape:
            raise EnvError(f"{self.name}: actions have shape {given.shape}, expected {self._views['action'].shape}")
        if not self._running.any():
            raise EnvError(f"{self.name}: no episode is running, call reset() before step()")
        self._views["action"][:] = given
        for key in ("reward", "env_steps"):
            self._views[key][:] = 0
        self._pending = [[i for i in slots if self._running[i]] for slots in self._slots]
        for worker, part in zip(self._workers, self._pending, strict=True):
            if part:
                worker.send("step", part)

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """The result of `step_async`."""
        if not self._pending:
            raise EnvError(f"{self.name}: no step is under way; call step_async() first")
        pending, self._pending, self._reasons = self._pending, [], {}
        self._answered(index for index, part in enumerate(pending) if part)
        observations, info = self._finish()
        terminated, truncated = self._views["terminated"] > 0, self._views["truncated"] > 0
        self._running &= ~(terminated | truncated)
        return observations, self._views["reward"].copy(), terminated, truncated, info

    @property
    def running(self) -> NDArray[np.bool_]:
        """Environments whose episode runs, (E,)."""
        return self._running.copy()

    def close(self, **kwargs: Any) -> None:
        """End the workers. Safe to call twice."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor failed, so nothing was made
            self.close()

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _probe(self) -> tuple[spaces.Dict, spaces.Box, dict[str, Any], dict[str, Any]]:
        """Spaces of one environment, made in a child process, so this process needs no OpenGL."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_describe, args=(theirs, self.name, self._settings, trusted_envs()), daemon=True)
        process.start()
        theirs.close()
        try:
            kind, value = ours.recv()
        except EOFError:
            process.join()
            raise EnvError(f"{self.name}: the process that made it {_death(process.exitcode)}") from None
        finally:
            process.join()
            ours.close()
        if kind != "ready":
            raise value
        found: tuple[spaces.Dict, spaces.Box, dict[str, Any], dict[str, Any]] = value
        return found

    def _start(self, index: int) -> _Worker:
        slots = self._slots[index]
        seeds = [env_seed(self.seed, self.first + slot, self._lives[index]) for slot in slots]
        arguments = (self.name, self._settings, slots, seeds, self._shared, self.first, trusted_envs())
        return _Worker(self._context, arguments, self._timeout * 10)

    def _answered(self, asked: Iterable[int]) -> None:
        """Wait for the answers of workers. Cuts the episodes of the environments that failed, and of all those of a worker that died."""
        self._collect(asked)
        self._gone |= set(self._reasons)
        for slot in self._reasons:
            self._views["truncated"][slot], self._views["terminated"][slot] = 1, 0
            self._views["reward"][slot] = 0.0
            self._crashed[slot], self._running[slot] = True, False

    def _collect(self, asked: Iterable[int]) -> None:
        errors = []
        waiting = {self._workers[index].pipe: index for index in asked}
        while waiting:
            deadline = min(self._workers[index].deadline for index in waiting.values())
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            late = [pipe for pipe, index in waiting.items() if self._workers[index].deadline <= time.monotonic()]
            for pipe in {*ready, *(late if not ready else ())}:
                index = waiting.pop(pipe)
                worker = self._workers[index]
                try:
                    if pipe not in ready:
                        raise TimeoutError
                    kind, value = worker.pipe.recv()
                    worker.limit = self._timeout
                    if kind == "error":
                        errors.append(value)
                    else:
                        self._reasons |= value
                except (EOFError, OSError) as error:
                    hung = isinstance(error, TimeoutError)
                    self._replace(index, f"gave no answer in {worker.patience:g} seconds" if hung else None)
        if errors:
            raise errors[0]

    def _replace(self, index: int, reason: str | None) -> None:
        code = self._workers[index].stop()
        self._lives[index] += 1
        which = ", ".join(str(self.first + slot) for slot in self._slots[index])
        why = f"{self.name}: the worker of environments {which} {reason or _death(code)}"
        if self._lives[index] > self._restarts:
            raise EnvError(
                f"{why}, {self._lives[index]} times now; step one make_env() environment in the main process to see why"
            )
        self._workers[index] = self._start(index)
        self._reasons |= {slot: why for slot in self._slots[index] if self._running[slot]}

    def _observations(self) -> dict[str, NDArray[Any]]:
        return {key: self._views[key].copy() for key in self._keys}

    def _finish(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Observations and infos as copies; crashed environments keep their last observation, because the new one may be incomplete."""
        now = self._observations()
        for key, value in now.items():
            value[self._crashed] = self._last[key][self._crashed]
        self._last = now
        steps = self._views["env_steps"].astype(np.int64)
        info: dict[str, Any] = {
            "env_steps": steps,
            "crashed": self._crashed.copy(),
            "faults": dict(sorted(self._reasons.items())),
        }
        if not np.isnan(self._views["success"]).all():
            info["success"] = self._views["success"].copy()
        return {key: value.copy() for key, value in now.items()}, info


class _Worker:
    """One child process and its pipe."""

    def __init__(self, context: Any, arguments: tuple[Any, ...], limit: float) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.limit, self.patience, self.deadline = limit, limit, float("inf")

    def send(self, command: str, payload: Any, times: float = 1) -> None:
        """Send a command. Its answer may take ``times`` as long as usual."""
        self.patience = self.limit * times
        self.deadline = time.monotonic() + self.patience
        with contextlib.suppress(ConnectionError):  # its death is detected where its answer is awaited
            self.pipe.send((command, payload))

    def stop(self) -> int | None:
        """Ask the child to exit and kill it if it does not; returns its exit code."""
        if self.process.is_alive():
            with contextlib.suppress(ConnectionError, OSError):
                self.pipe.send(("close", None))
            self.process.join(0.5)
            self.process.kill()
        self.process.join()
        self.pipe.close()
        code: int | None = self.process.exitcode
        return code


def _buffers(
    context: Any, count: int, picture: spaces.Dict, action: spaces.Box
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Shared arrays by name as (raw memory, shape, dtype), and this process's views of them."""
    layout: dict[str, tuple[tuple[int, ...], Any]] = {"action": ((count, *action.shape), action.dtype)}
    for key, box in picture.spaces.items():
        layout[key] = ((count, *(box.shape or ())), box.dtype)
    for key in _FLAGS:
        layout[key] = ((count,), np.dtype(np.float64))
    shared = {}
    for key, (shape, dtype) in layout.items():
        shared[key] = (context.RawArray("b", int(np.prod(shape)) * np.dtype(dtype).itemsize), shape, np.dtype(dtype).str)
    views = _views(shared)
    views["success"][:] = np.nan
    return shared, views


def _views(shared: dict[str, Any]) -> dict[str, NDArray[Any]]:
    return {key: np.frombuffer(raw, dtype).reshape(shape) for key, (raw, shape, dtype) in shared.items()}


def _describe(pipe: Connection, name: str, settings: dict[str, Any], trusted: Sequence[str]) -> None:
    """Main function of the child that only describes the environment."""
    from localmotion.envs import make_env

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for own in trusted:
            trust_env(own)
        env = make_env(name, **settings)
        pipe.send(("ready", (env.observation_space, env.action_space, env.describe(), env.metadata)))
        env.close()
    except Exception as error:
        pipe.send(("error", _portable(error)))


def _serve(
    pipe: Connection,
    name: str,
    settings: dict[str, Any],
    slots: tuple[int, ...],
    seeds: list[int],
    shared: dict[str, Any],
    first: int,
    trusted: Sequence[str],
) -> None:
    """Main loop of a worker: make the environments, then execute commands until told to exit. The parent handles interrupts.

    An answer is ("done", texts by environment that failed) or ("error", exception). An environment that failed is made again at its next
    reset; if that fails, it has failed once more.
    """
    from localmotion.envs import make_env

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for own in trusted:
        trust_env(own)
    views = _views(shared)
    made: dict[int, Any] = {}
    begun, lives = False, dict.fromkeys(slots, 0)
    while True:
        try:
            command, payload = pipe.recv()
        except (EOFError, OSError):
            return
        if command == "close":
            for env in made.values():
                env.close()
            return
        index, failed = slots[0], dict[int, str]()
        try:
            if not begun:
                made = {slot: make_env(name, seed=seed, **settings) for slot, seed in zip(slots, seeds, strict=True)}
                begun = True
            for item in payload:
                index, seed = item if command == "reset" else (item, None)
                try:
                    if command == "reset":
                        if index not in made:
                            lives[index] += 1
                            made[index] = make_env(
                                name, seed=env_seed(seeds[slots.index(index)], index, lives[index]), **settings
                            )
                        picture, info = made[index].reset(seed=seed)
                        result = [0.0, False, False]
                    else:
                        picture, *result, info = made[index].step(views["action"][index].copy())
                        finite_reward(name, result[0])
                except FAULTS as error:
                    if isinstance(error, LocalmotionError) and not isinstance(error, SimulationError) and index in made:
                        raise  # misuse
                    failed[index] = (
                        str(error) if isinstance(error, LocalmotionError) else f"{name}: {type(error).__name__}: {error}"
                    )
                    shut(made.pop(index, None))
                    continue
                for key, value in picture.items():
                    views[key][index] = value
                for key, flag in zip(_FLAGS, (*result, info["env_steps"], info.get("success", np.nan)), strict=True):
                    views[key][index] = flag
            answer: tuple[str, Any] = ("done", failed)
        except Exception as error:
            answer = ("error", _portable(error, f"environment {first + index}: "))
        try:
            pipe.send(answer)
        except ConnectionError:  # the parent has died
            return


def _portable(error: Exception, where: str = "") -> Exception:
    """An exception that can be pickled and names its origin. Our own keep their class, others become EnvError."""
    kind = type(error) if isinstance(error, (ConfigError, EnvError)) else EnvError
    text = str(error) if kind is type(error) else f"{type(error).__name__}: {error}"
    return kind(f"{where}{text}")


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"died of signal {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
