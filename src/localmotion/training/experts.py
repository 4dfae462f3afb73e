"""Train an expert: soft actor-critic on a task's state vector, without pictures, in minutes on one CPU core.

Source: Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications (arXiv 1812.05905), with a learned temperature. Changes for
few updates: returns of `Settings.steps` steps, normalised state vectors, and layer normalisation in the critics (as in arXiv 2302.02948).

Work of one update with batch B, width D and few inputs: a product with D x D weights costs 2 B D^2 operations. There are 16: 1 for the next
action, 2 for its values, 2 + 4 for the critics' loss (forward, backward), 3 for the actor and 2 + 2 for the values of its actions. With
B = 128 and D = 256 they cost 0.27 GFLOP, 3 ms of a core that does 95 GFLOP/s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from localmotion.acting.episodes import FAULTS, EvaluationError, Rollout, episode_seed, evaluate
from localmotion.acting.expert import NAME, Expert, save_expert
from localmotion.acting.observer import Observer
from localmotion.console import progress, say
from localmotion.envs import make_env
from localmotion.errors import ConfigError, EnvError, LocalmotionError, SimulationError
from localmotion.files import check_output
from localmotion.foreign import shut
from localmotion.runs.load import at_least
from localmotion.runs.rundir import versions
from localmotion.training.interrupt import Interrupted, StopRequest


@dataclass(frozen=True)
class Settings:
    """Settings of `train_expert`."""

    width: int = 256
    """Width of the two hidden layers of actor and critics."""
    batch: int = 128
    """Transitions of an update."""
    rate: float = 5e-4
    """Learning rate of Adam, for actor, critics and temperature."""
    discount: float = 0.99
    """Discount of an agent step."""
    steps: int = 3
    """Rewards that are summed before the critics' value."""
    slow: float = 0.005
    """Share of the critics that their slow copies take over at an update."""
    envs: int = 8
    """Environments that are played in lockstep."""
    every: int = 4
    """Agent steps between two updates."""
    begin: int = 4000
    """Agent steps with random actions before the first update."""


class Critics(nn.Module):
    """Two critics in one: values (2, B) of normalised vectors (B, V) and actions (B, A)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        sizes = [inputs, width, width, 1]
        bounds = [1 / np.sqrt(size) for size in sizes[:-1]]
        pairs = list(zip(sizes[:-1], sizes[1:], bounds, strict=True))
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(2, i, o).uniform_(-b, b)) for i, o, b in pairs])
        self.biases = nn.ParameterList([nn.Parameter(torch.empty(2, 1, o).uniform_(-b, b)) for i, o, b in pairs])

    def forward(self, vector: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([vector, action], -1).expand(2, -1, -1)  # (2, B, V + A)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)  # (2, B, D)
            if number < 2:
                x = F.relu(F.layer_norm(x, x.shape[-1:]))
        return x[..., 0]


class Memory:
    """The newest agent steps of E environments, all that are played."""

    def __init__(self, rows: int, envs: int, inputs: int, actions: int) -> None:
        self.vector, self.after = (np.zeros((rows, envs, inputs), np.float32) for _ in range(2))
        self.action = np.zeros((rows, envs, actions), np.float32)
        self.reward = np.zeros((rows, envs), np.float32)
        self.terminal, self.ended = (np.zeros((rows, envs), bool) for _ in range(2))
        self.count = 0

    def add(self, **row: NDArray[Any]) -> None:
        """One agent step of all environments."""
        for name, value in row.items():
            getattr(self, name)[self.count] = value
        self.count += 1

    def cut(self, env: int) -> None:
        """The newest step of an environment is the last of its episode."""
        if self.count:
            self.ended[self.count - 1, env] = True

    def sample(self, rng: np.random.Generator, batch: int, steps: int, discount: float) -> tuple[Tensor, ...]:
        """B windows of ``steps`` agent steps, shorter where an episode ends.

        Returns vectors (B, V) and actions (B, A) of the first step, the discounted sum of rewards (B,), the vectors after the last step
        (B, V), and the discount (B,) of the value there: 0 after a terminal step.
        """
        envs = self.reward.shape[1]
        first = rng.integers(self.count - steps + 1, size=batch)
        env = rng.integers(envs, size=batch)
        total, factor = np.zeros(batch, np.float32), np.ones(batch, np.float32)
        last, alive = first.copy(), np.ones(batch, bool)
        for step in range(steps):
            row = first + step
            last[alive] = row[alive]
            total += np.where(alive, factor * self.reward[row, env], 0)
            factor[alive] *= discount
            alive &= ~self.ended[row, env]
        factor *= ~self.terminal[last, env]
        picked = self.vector[first, env], self.action[first, env], total, self.after[last, env], factor
        return tuple(torch.from_numpy(x) for x in picked)


class Learner:
    """Actor, critics, their slow copies, temperature, and the optimisers."""

    def __init__(self, inputs: int, actions: int, settings: Settings) -> None:
        self.settings = settings
        self.actor = Expert(inputs, actions, settings.width)
        self.critics, self.slow = (Critics(inputs + actions, settings.width) for _ in range(2))
        self.slow.load_state_dict(self.critics.state_dict())
        self.log_temperature = torch.tensor(np.log(0.1), dtype=torch.float32, requires_grad=True)
        self.target_entropy = -actions / 2
        self.actor_step, self.critic_step, self.temperature_step = (
            torch.optim.Adam(parameters, lr=settings.rate, fused=True)
            for parameters in (list(self.actor.parameters()), list(self.critics.parameters()), [self.log_temperature])
        )
        self._pairs: tuple[list[Tensor], list[Tensor]] = list(self.critics.parameters()), list(self.slow.parameters())
        self._sums = np.zeros((2, inputs))  # of vectors and their squares
        self._seen = 0

    def saw(self, vectors: NDArray[np.float32]) -> None:
        """Include vectors (E, V) in the normalisation."""
        self._sums += vectors.sum(0), (vectors.astype(np.float64) ** 2).sum(0)
        self._seen += len(vectors)

    def normalise(self) -> None:
        """Normalise by all vectors seen so far."""
        mean = self._sums[0] / self._seen
        deviation = np.sqrt(np.maximum(self._sums[1] / self._seen - mean**2, 1e-4))
        self.actor.mean.copy_(torch.from_numpy(mean))
        self.actor.scale.copy_(torch.from_numpy(1 / deviation))

    def sampled(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled actions (B, A) for normalised vectors (B, V) and their log-probabilities (B,)."""
        mean, log_std = self.actor(normal)
        noise = torch.randn_like(mean)
        before = mean + log_std.exp() * noise
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x)), exact for large x.
        inner = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
        log = inner - 2 * (np.log(2) - before - F.softplus(-2 * before))
        return torch.tanh(before), log.sum(-1)

    def update(self, vector: Tensor, action: Tensor, reward: Tensor, after: Tensor, discount: Tensor) -> None:
        """One update of everything from the batch of `Memory.sample`."""
        vector, after = self.actor.normal(vector), self.actor.normal(after)
        temperature = self.log_temperature.detach().exp()
        with torch.no_grad():
            following, log = self.sampled(after)
            target = reward + discount * (self.slow(after, following).amin(0) - temperature * log)  # (B,)
        self.critic_step.zero_grad()
        (self.critics(vector, action) - target).square().mean(-1).sum().backward()
        self.critic_step.step()
        for parameter in self._pairs[0]:
            parameter.requires_grad_(False)
        self.actor_step.zero_grad()
        chosen, log = self.sampled(vector)
        (temperature * log - self.critics(vector, chosen).amin(0)).mean().backward()
        self.actor_step.step()
        for parameter in self._pairs[0]:
            parameter.requires_grad_(True)
        self.temperature_step.zero_grad()
        (-self.log_temperature * (log.detach() + self.target_entropy).mean()).backward()
        self.temperature_step.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._pairs[1], self._pairs[0], self.settings.slow)


class _Players:
    """E environments in lockstep, each with its next episode when one ends.

    An environment that fails ends its own episode as a time limit would, and a fresh one begins another. `FAULTS` failures of one
    environment without a complete episode between them are an EnvError.
    """

    def __init__(self, make: Callable[[], Observer], count: int, seed: int) -> None:
        self.make, self.seed, self.episodes = make, seed, 0
        self.observers = [make() for _ in range(count)]
        self.faults, self.failures = 0, [0] * count  # all, and by environment since its last complete episode
        self.vectors = np.stack([self._begin(number) for number in range(count)])
        self.totals, self.returns = np.zeros(count), list[float]()

    def _begin(self, number: int) -> NDArray[np.float32]:
        """Begin the next episode of an environment. Returns its state vector (V,)."""
        while True:
            self.episodes += 1
            seed = episode_seed(self.seed, "train", self.episodes - 1)
            try:
                vector: NDArray[np.float32] = self.observers[number].reset(seed)["vector"]
                return vector
            except SimulationError as error:
                self._failed(number, error)

    def _failed(self, number: int, error: SimulationError) -> None:
        """Count a failure of an environment and make a fresh one. Raises EnvError if there were too many."""
        self.faults += 1
        self.failures[number] += 1
        if self.failures[number] >= FAULTS:
            raise EnvError(
                f"{error} ({FAULTS} failures of one environment without a complete episode between them); fix the environment"
            ) from error
        say(f"{error}; the episode ends, and a fresh environment begins another")
        shut(self.observers[number].env)
        self.observers[number] = self.make()

    def _step(self, number: int, action: NDArray[np.float32], memory: Memory) -> tuple[dict[str, Any], bool, dict[str, Any]]:
        """`Observer.step` of an environment. If it fails, the action is the first of its next episode instead."""
        while True:
            try:
                return self.observers[number].step(action)
            except SimulationError as error:
                memory.cut(number)
                self._failed(number, error)
                self.totals[number], self.vectors[number] = 0.0, self._begin(number)

    def step(self, actions: NDArray[np.float32], memory: Memory) -> int:
        """One agent step (E, A) of all, kept in ``memory``. Returns env steps. Raises EnvError if an environment keeps failing."""
        found = [self._step(number, action, memory) for number, action in enumerate(actions)]
        after = np.stack([record["vector"] for record, *_ in found])
        reward, terminal = (np.array([record[name] for record, *_ in found]) for name in ("reward", "is_terminal"))
        ended = np.array([done for _, done, _ in found])
        memory.add(vector=self.vectors, action=actions, reward=reward, after=after, terminal=terminal, ended=ended)
        self.totals += reward
        self.vectors = after.copy()
        for number in np.flatnonzero(ended).tolist():
            self.returns.append(float(self.totals[number]))
            self.failures[number] = 0
            self.totals[number], self.vectors[number] = 0.0, self._begin(number)
        return sum(info["env_steps"] for *_, info in found)


def train_expert(
    env: str,
    out: Path,
    *,
    env_steps: int = 400_000,
    seed: int = 0,
    episodes: int = 10,
    settings: Settings | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train an expert of ``env`` and write it to the folder ``out`` (`localmotion.acting.expert`).

    Ctrl-C ends the training early: the expert of that moment is played and saved, then Interrupted is raised. An environment that keeps
    failing does the same, if anything was learned, and EnvError is raised. A single failure ends its own episode; the step that failed is
    not learned from.

    Args:
        env: an environment with a state vector, e.g. planar:walker_run. Drawing is off, so its suite does not matter.
        env_steps: env steps to play in all.
        episodes: episodes of the mean action that are played at the end.
        options: of `make_env`, e.g. action_repeat.

    Returns:
        Content of the JSON file: env, seed, env_steps, updates, cpu_seconds, curve, returns, ... ``training_faults`` counts failures
        during training, ``faults`` those in the episodes at the end.

    Raises:
        ConfigError: an unknown environment or option, a number out of range, or ``out`` holds an expert.
        EnvError, CheckpointError: simulating or writing failed. The message says whether the expert is saved.
        Interrupted: a signal ended the training; the expert is saved.
    """
    settings = settings or Settings()
    at_least(env_steps=(env_steps, 1), seed=(seed, 0), episodes=(episodes, 1))
    check_output(out, ConfigError, folder=True)
    if (out / f"{NAME}.json").exists():
        raise ConfigError(f"{out}: holds an expert already; choose another folder")

    def make() -> Observer:
        return Observer(make_env(env, observed="vectors", **options), None)

    began = time.process_time()
    with _one_thread(), torch.random.fork_rng(devices=[]), StopRequest() as stop:
        torch.manual_seed(seed)
        players, rng = _Players(make, settings.envs, seed), np.random.default_rng(seed)
        observers = players.observers
        if observers[0].discrete or not players.vectors.size:
            lacks = "its actions are choices" if observers[0].discrete else "its observation has no numbers"
            raise ConfigError(f"{env}: experts act with numbers and see a state vector, but {lacks}")
        inputs, actions, repeat = players.vectors.shape[1], observers[0].action_dim, observers[0].env.action_repeat  # type: ignore[attr-defined]
        learner = Learner(inputs, actions, settings)
        memory = Memory(env_steps // settings.envs + 1, settings.envs, inputs, actions)
        done, updates, curve = 0, 0, list[tuple[int, float]]()
        stopped: Interrupted | LocalmotionError | None = None
        with progress("expert", env_steps, "env steps", forecast=False) as advance:
            while done < env_steps and not stopped:
                beyond = memory.count * settings.envs - settings.begin
                shape = settings.envs, actions
                chosen = rng.uniform(-1, 1, shape) if beyond < 0 else learner.actor.act(players.vectors, explore=True)
                learner.saw(players.vectors)
                try:
                    done += players.step(chosen.astype(np.float32), memory)
                except LocalmotionError as error:
                    if not updates:  # nothing was learned that could be lost
                        raise
                    stopped = error
                    break
                if beyond >= 0:
                    learner.normalise()
                while updates * settings.every < beyond + settings.envs and beyond >= 0:
                    learner.update(*memory.sample(rng, settings.batch, settings.steps, settings.discount))
                    updates += 1
                if len(players.returns) >= settings.envs * (len(curve) + 1):
                    curve.append((done, round(float(np.mean(players.returns[-settings.envs :])), 2)))
                advance(min(done, env_steps), note=f"return {curve[-1][1]:.0f}" if curve else "")
                try:
                    stop.check()
                except Interrupted as request:
                    stopped = request
        spent = time.process_time() - began

        def policy(records: list[dict[str, Any]], first: bool) -> NDArray[np.float32]:
            return learner.actor.act(np.stack([record["vector"] for record in records]))

        try:
            played = evaluate(lambda: policy, make, seed=seed, episodes=episodes, observers=observers)
        except LocalmotionError as error:  # a missing environment cannot be made again, e.g.
            played = error.result if isinstance(error, EvaluationError) else Rollout()
            stopped = stopped or error
        for observer in observers:
            shut(observer.env)  # an error here would lose the expert
    about = {
        "env": env,
        "action_repeat": repeat,
        "seed": seed,
        "env_steps": done,
        "updates": updates,
        "cpu_seconds": round(spent, 1),
        "training_faults": players.faults,
        **(played.summary() if played.returns else {}),
        "curve": curve,
        "settings": asdict(settings),
        "versions": versions(),
    }
    save_expert(out, learner.actor, about)
    if isinstance(stopped, LocalmotionError):
        raise EnvError(f"{stopped}; {out} has the expert of this moment") from stopped
    if stopped:
        raise stopped
    return about


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it torch uses one thread: the products are too small to split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
