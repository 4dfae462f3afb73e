"""Learning in an environment: fine-tuning from a pre-trained run, or training from scratch. A page of named clocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmotion import methods
from localmotion.acting.episodes import Rollout, episode_seed, evaluate
from localmotion.acting.observer import Observer, make_observer, streaming_recipe
from localmotion.acting.policy import MethodPolicy, Policy, random_policy
from localmotion.compute import choose
from localmotion.config import RunConfig
from localmotion.console import progress, say
from localmotion.envs import check_env
from localmotion.errors import ConfigError, EnvError, SimulationError
from localmotion.methods.base import MOTION, Method
from localmotion.perception.companding import Companding
from localmotion.recipe import Recipe
from localmotion.replay import Replay
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir, claimed, read_environment
from localmotion.runs.settings import with_recipe
from localmotion.training import graphs
from localmotion.training.checks import check_learns, check_length, never_learned
from localmotion.training.endings import recorded
from localmotion.training.interrupt import StopRequest
from localmotion.training.pace import Pace
from localmotion.training.pretrain import to_device
from localmotion.training.storage import choose_storage, device_memory, records_needed
from localmotion.training.transfer import load_pretrained
from localmotion.training.trees import leaves_of, with_leaves
from localmotion.training.update import Updater, to_floats
from localmotion.video.write import write_video

FAULTS = 3
"""Failures of the environment without a complete episode between them after which a run stops."""


def finetune(run: RunConfig, path: Path) -> Path:
    """Learn ``run.env`` with ``run.method`` in the run directory ``path``; continues where a run of the same settings stopped.

    Raises LocalmotionError with the cause and the fix, also at the end of a run in which no update was made; when a signal asks it to stop,
    it saves and raises Interrupted.
    """
    cls = methods.get(run.method)
    if not run.env:
        raise ConfigError(f"{run.stage}: say which --env, e.g. dmc:walker_walk or metaworld:reach")
    if run.stage == "finetune" and not run.checkpoint:
        raise ConfigError("finetune needs --checkpoint; to learn without pre-training use localmotion train")
    if run.load and not run.checkpoint:
        raise ConfigError(f"load={run.load} needs --checkpoint, the pre-trained run to load from")
    if run.checkpoint and "pretrain" not in cls.stages:
        raise ConfigError(f"method {run.method} has no pre-training stage; use localmotion train without --checkpoint")
    check_env(run.env, run.env_options)
    check_length(cls, run)
    with claimed(path):
        return _finetune(run, path, cls)


def _finetune(run: RunConfig, path: Path, cls: type[Method]) -> Path:
    perception = streaming_recipe(with_recipe(run, path).recipe or Recipe())
    run = replace(run, recipe=perception)
    observer = make_observer(run, perception if bool(cls.wants & MOTION) else None, size=perception.size)
    if run.observed != "pixels":
        run = _shown(run, observer)
    repeat = int(observer.env.describe()["action_repeat"])  # type: ignore[attr-defined]
    check_learns(run, repeat)
    compute = choose(run, read_environment(path))
    torch.manual_seed(run.seed)
    method = cls(run.model, image_size=perception.size, action_dim=observer.action_dim).to(compute.device)
    if run.checkpoint:
        say(load_pretrained(method, run).line())
    out = RunDir(path, run)
    updater = Updater(method, run, compute, pretrained=bool(run.checkpoint), graph=graphs.wanted(run))
    learner = _Learner(run, out, observer, method, updater, repeat)

    def where() -> dict[str, int]:
        return {"agent_step": learner.agent_step}

    def save() -> bool:
        return learner.began and learner.save()

    with recorded(out, method, where, save) as learner.stop:
        learner.learn()
    out.status("finished", agent_step=learner.agent_step, env_step=learner.agent_step * repeat)
    return path


def _shown(run: RunConfig, observer: Observer) -> RunConfig:
    """The run with a model for vectors of the environment's length. Raises ConfigError for a method that sees pictures only."""
    if not methods.get(run.method).vectors:
        able = ", ".join(name for name in methods.names() if methods.get(name).vectors)
        raise ConfigError(f"observed={run.observed}: {run.method} learns from pictures only; methods that take vectors: {able}")
    (length,) = observer.spec()["vector"][0]
    return replace(run, model=replace(run.model, pixels=run.observed == "both", vector_dim=length))


@dataclass
class _Playing:
    """The training episode that is played."""

    learning: bool
    policy: Policy
    record: dict[str, Any]
    actions: list[NDArray[np.float32]] = field(default_factory=list)
    total: float = 0.0
    success: float | None = None


class _Learner:
    """State and clocks of an online run."""

    def __init__(self, run: RunConfig, out: RunDir, observer: Observer, method: Method, updater: Updater, repeat: int) -> None:
        self.run, self.out, self.observer, self.method = run, out, observer, method
        self.updater, self.repeat, self.stop = updater, repeat, StopRequest()
        self.compute = updater.compute
        online = run.online
        limit: int = observer.env.describe()["time_limit"]  # type: ignore[attr-defined]
        self.longest = -(-limit // repeat)  # agent steps of an episode that its time limit ends
        recipe = observer.recipe if online.replay_flow == "int8" else None
        self.replay = Replay(
            observer.spec(),
            capacity=records_needed(online, self.budget, self.longest),
            length=online.length,
            prioritize_ends=online.prioritize_ends,
            seed=run.seed,
            coders={"flow": Companding(recipe.size)} if recipe else None,
            folder=out.path / "replay",
        )
        device, size = self.compute.device, self.replay.bytes_per_record
        free = device_memory(device)
        storage, self.replay_note = choose_storage(online, self.budget, size, out.path / "replay", free, self.longest)
        self.replay.place(storage, max(self.replay.capacity, self.longest + 1), device)
        self.ahead = free is not None and storage != "device"  # make the next batch while the device is at work
        self.agent_step = self.episode = self.last_save = self.next_eval = 0
        self.playing: _Playing | None = None
        self.faults, self.began = 0, False
        self.best: list[float] | None = None
        self.final: int | None = None  # agent step of the final evaluation
        self.evaluators: list[Observer] = []
        self.spent = {"update": 0.0, "act": 0.0, "replay": 0.0, "eval": 0.0}
        self.spent_before: dict[str, float] = {}
        self.clock = time.perf_counter()
        self.pace = Pace(self.budget, online)

    @property
    def budget(self) -> int:
        """Agent steps in all."""
        return -(-self.run.online.env_steps // self.repeat)

    def learn(self) -> None:
        """Prefill, warm up, then act, update, evaluate and save by their clocks."""
        self._resume()
        self.began = True
        self._announce()
        self.out.status("running", agent_step=self.agent_step)
        with progress(
            f"{self.run.method} {self.run.env}", self.budget, "agent steps", self.agent_step, forecast=False
        ) as advance:
            while self.agent_step < self.budget or self.playing:
                self.stop.check()
                if self.playing and self.playing.learning and self.agent_step >= self.next_eval:
                    self._evaluate()
                try:
                    if self.playing is None:
                        self._begin()
                    else:
                        self._step()
                except SimulationError as error:
                    self._broken(error)
                advance(self.agent_step)
            if not self.updater.update:
                self.save()
                raise never_learned(self.run)
            if self.final != self.agent_step:  # else only the word "finished" was missing
                self._evaluate(final=True)
        self._keep_flow()
        self.save()

    def _begin(self) -> None:
        """Start a training episode: at random while the replay is prefilled, from then on with the policy."""
        online = self.run.online
        learning = self.agent_step * self.repeat >= online.prefill and bool(self.replay.episodes)
        while learning and self.updater.update < online.warmup_updates:
            self.stop.check()
            self._update()
        self._open(learning)

    def _open(self, learning: bool) -> None:
        if learning:
            policy: Policy = MethodPolicy(self.method, self.compute, explore=True, window=self.run.online.length)
        else:
            policy = random_policy(self.observer.action_dim, episode_seed(self.run.seed, "prefill", self.episode))
        record = self.observer.reset(episode_seed(self.run.seed, "train", self.episode))
        self.replay.add(record, last=False)
        self.playing = _Playing(learning, policy, record)

    def _step(self) -> None:
        """One agent step of the episode that is played; updates are made between agent steps, `train_every` apart."""
        online, playing = self.run.online, self.playing
        assert playing
        began = time.perf_counter()
        if self.method.training:  # not at every step: it visits every module
            self.method.eval()
        action = playing.policy([playing.record], not playing.actions)[0]
        self.spent["act"] += time.perf_counter() - began
        done = self._advance(playing, action)
        self.agent_step += 1
        done = done or self.agent_step >= self.budget or self._prefilled(playing)
        self.replay.add(playing.record, last=done)
        if playing.learning and self.agent_step % online.train_every == 0:
            self._update()
        if playing.learning and (text := self.pace.forecast(self.agent_step, self.spent["eval"])):
            say(text)
        if done:
            self.playing = None
            self.episode += 1
            self.faults = 0
            extra = {} if playing.success is None else {"success": playing.success}
            length, random = len(playing.actions), not playing.learning
            self.out.log("episode", **self.counters(), **{"return": playing.total}, length=length, random=random, **extra)
            if playing.learning and self.agent_step - self.last_save >= online.save_every:
                self.save()

    def _prefilled(self, playing: _Playing) -> bool:
        """Whether a random episode ends here: the prefill is over, and it would last to the end of the run, so nothing would be learned."""
        began = self.agent_step - len(playing.actions)
        return (
            not playing.learning
            and began + self.longest >= self.budget
            and self.agent_step * self.repeat >= self.run.online.prefill
        )

    def _broken(self, error: SimulationError) -> None:
        """The environment failed: its episode ends there, as by a time limit, and a fresh environment begins the next one.

        Nothing is dropped in silence: the fault is logged, and after `FAULTS` without a complete episode between them the run stops, saved.
        """
        self.faults += 1
        self.replay.cut()
        self.playing = None
        self.episode += 1
        self.out.log("fault", **self.counters(), error=str(error), dropped=self.replay.dropped)
        if self.faults >= FAULTS:
            raise EnvError(
                f"{error} ({self.faults} failures without a complete episode between them; saved at this point)"
            ) from error
        say(f"{error}; the episode ends at agent step {self.agent_step:,} and a fresh environment goes on")
        with contextlib.suppress(Exception):  # it is broken: whatever closing it raises says nothing new
            self.observer.env.close()
        self.observer.env = make_observer(self.run, self.observer.recipe, size=self.method.image_size).env

    def _advance(self, playing: _Playing, action: NDArray[np.float32]) -> bool:
        """Take ``action`` in the environment: whether the episode is over."""
        playing.record, done, info = self.observer.step(action)
        playing.actions.append(action)
        playing.total += playing.record["reward"]
        if "success" in info:
            playing.success = max(playing.success or 0.0, float(info["success"]))
        return done

    def counters(self) -> dict[str, int]:
        """Where the run stands, in every unit."""
        return {
            "update": self.updater.update,
            "agent_step": self.agent_step,
            "env_step": self.agent_step * self.repeat,
            "episode": self.episode,
        }

    def _update(self) -> None:
        began = time.perf_counter()
        batch = to_device(self.replay.sample(self.run.online.batch_size), self.compute)
        self.spent["replay"] += time.perf_counter() - began
        began = time.perf_counter()
        self.method.train()
        self.updater.progress = self.agent_step / self.budget
        metrics = self.updater.learn(batch)
        self.spent["update"] += time.perf_counter() - began
        if line := self.compute.look_again():
            self.out.log("threads", **self.counters(), threads=torch.get_num_threads())
            say(line)
        if self.ahead:
            began = time.perf_counter()
            self.replay.prepare(self.run.online.batch_size, partial(to_device, compute=self.compute))
            self.spent["replay"] += time.perf_counter() - began
        if self.updater.update % self.run.online.log_every == 0:
            now = {**self.spent, **self.observer.seconds}
            wall = time.perf_counter() - self.clock
            seconds = {f"seconds/{k}": v - self.spent_before.get(k, 0.0) for k, v in now.items()}
            self.spent_before, self.clock = now, time.perf_counter()
            extra: dict[str, float] = {"seconds/all": wall, "skipped": self.updater.check()}
            if self.observer.extractor:
                extra |= {f"flow/{k}": v for k, v in self.observer.extractor.magnitudes.quantiles().items()}
            self.out.log("train", **self.counters(), **to_floats(metrics), **seconds, **extra)

    def _evaluate(self, final: bool = False) -> None:
        """Evaluation on environments of their own, with seeds of their own stream."""
        run, online = self.run, self.run.online
        began = time.perf_counter()
        self.method.eval()
        recipe = self.observer.recipe

        def policy() -> Policy:
            chosen = MethodPolicy(self.method, self.compute, explore=False, window=online.length)

            def act(records: list[dict[str, Any]], first: bool) -> NDArray[np.float32]:
                self.stop.check()  # an evaluation may take minutes; it is made again
                return chosen(records, first)

            return act

        def measure() -> Rollout:
            return evaluate(
                policy,
                lambda: make_observer(run, recipe, size=self.method.image_size),
                seed=run.seed,
                episodes=max(10, online.eval_episodes) if final else online.eval_episodes,
                observers=self.evaluators,
                keep_frames=True,
            )

        try:
            with self.compute.own_randomness():
                torch.manual_seed(run.seed + self.agent_step)
                try:
                    result = measure()
                except SimulationError as error:
                    say(f"{error}; the evaluation is made again with fresh environments")
                    self.evaluators.clear()
                    torch.manual_seed(run.seed + self.agent_step)
                    result = measure()
        finally:
            self.method.train()
        self.next_eval = (self.agent_step // online.eval_every + 1) * online.eval_every
        self.spent["eval"] += time.perf_counter() - began
        self.out.log("eval", **self.counters(), **result.summary(), seed=run.seed, final=final)
        self.final = self.agent_step if final else self.final
        if result.frames is not None:
            write_video(self.out.path / "media" / f"eval_{self.agent_step * self.repeat:09d}.mp4", result.frames, fps=25)
        found = [float(np.mean(result.successes or [0.0])), float(np.mean(result.returns))]
        if self.best is None or found >= self.best:
            self.best = found
            state = {"stage": run.stage, "action_dim": self.observer.action_dim, **self.counters(), "score": found}
            checkpoint.save_best(self.out.path / "checkpoints", self.method.state_dict(), state)
        score = f"success {np.mean(result.successes):.2f} " if result.successes else ""
        say(
            f"env step {self.agent_step * self.repeat:,}: {score}return {np.mean(result.returns):.1f} +- {np.std(result.returns):.1f}"
        )

    def _keep_flow(self) -> None:
        """Flow magnitudes of the newest episodes for the report, to be held against those of pre-training."""
        if "flow" not in self.replay.spec or not self.replay.episodes:
            return
        newest = self.replay.newest("flow", 10)
        some = [np.linalg.norm(flow[1::8, ::4, ::4].astype(np.float32), axis=-1).ravel() for flow in newest]
        np.savez_compressed(self.out.path / "media" / "flow_downstream.npz", magnitudes=np.concatenate(some), name=self.run.env)

    # Saving -----------------------------------------------------------------------------------------------------------------

    def save(self) -> bool:
        """Checkpoint with replay, between any two agent steps; False (told) where the newest update was not finite.

        Of the episode that is played its actions and the policy's carry are kept: environment, perception and records follow from the
        actions and the episode's seed, bit for bit.
        """
        if not self.updater.healthy:
            say("not saved: the newest update was not finite; the checkpoint before stays")
            return False
        self.last_save = self.agent_step
        self.replay.save()
        playing: dict[str, Any] | None = None
        episode: dict[str, Tensor] = {}
        if self.playing:
            playing = {"learning": self.playing.learning}
            episode["actions"] = torch.from_numpy(np.array(self.playing.actions, np.float32))
            if isinstance(self.playing.policy, MethodPolicy):
                episode |= {f"carry.{i:03d}": leaf for i, leaf in enumerate(leaves_of(self.playing.policy.carry))}
        state = {
            "stage": self.run.stage,
            "metrics_offset": self.out.metrics_offset(),
            "action_dim": self.observer.action_dim,
            "agent_step": self.agent_step,
            "episode": self.episode,
            "next_eval": self.next_eval,
            "best": self.best,
            "final": self.final,
            "skipped": self.updater.check(),
            "playing": playing,
            "replay": self.replay.state(),
        }
        tensors = {"weights": self.method.state_dict(), "optimizer": self.updater.state(), "episode": episode}
        checkpoint.save(self.out.path / "checkpoints", self.updater.update, tensors=tensors, state=state)
        kept = checkpoint.complete(self.out.path / "checkpoints")
        self.replay.prune({s for p in kept for s in checkpoint.read_state(p)["replay"]["episodes"]})
        return True

    def _resume(self) -> None:
        found = checkpoint.complete(self.out.path / "checkpoints")
        if not found:
            self.out.truncate_metrics(0)
            self.replay.load(self.replay.state())  # what a run filed that died before its first checkpoint
            return
        state = checkpoint.read_state(found[-1])
        checkpoint.load_weights(self.method, checkpoint.read(found[-1], "weights"), str(found[-1]))
        self.updater.load_state(checkpoint.read(found[-1], "optimizer"))
        self.updater.resume(int(state["update"]), int(state.get("skipped", 0)))
        self.agent_step, self.episode = int(state["agent_step"]), int(state["episode"])
        self.next_eval, self.last_save, self.best = int(state["next_eval"]), self.agent_step, state.get("best")
        self.final = state.get("final")
        self.replay.load(state["replay"])
        self.out.truncate_metrics(int(state["metrics_offset"]))
        if state.get("playing"):
            try:
                self._play_again(bool(state["playing"]["learning"]), checkpoint.read(found[-1], "episode"))
            except SimulationError as error:
                self._broken(error)
        checkpoint.set_rng_state(checkpoint.read(found[-1], "rng"))
        say(f"continuing from agent step {self.agent_step:,} ({found[-1]})")

    def _play_again(self, learning: bool, saved: Mapping[str, Tensor]) -> None:
        """Bring the open episode back to where it was saved: its actions again, then the policy's carry."""
        self._open(learning)
        playing = self.playing
        assert playing
        for action in saved["actions"].numpy():
            if not isinstance(playing.policy, MethodPolicy):
                playing.policy([playing.record], False)  # its generator moves on
            self._advance(playing, action)
            self.replay.add(playing.record, last=False)
        if isinstance(playing.policy, MethodPolicy) and playing.actions:
            leaves = [saved[key].to(self.compute.device) for key in sorted(saved) if key.startswith("carry.")]
            playing.policy.carry = with_leaves(self.method.initial_carry(1), leaves)

    def _announce(self) -> None:
        run, online, counts = self.run, self.run.online, self.method.parameter_counts()
        described = self.observer.env.describe()  # type: ignore[attr-defined]
        recipe = self.observer.recipe.to_json() if self.observer.recipe else None
        self.out.environment({**self.compute.record(), "parameters": counts, "env": described, "recipe": recipe})
        say(f"{run.method} on {run.env}: {self.compute.note}")
        gl = described.get("gl")
        drawn = f", {gl['message']}" if isinstance(gl, dict) else ""
        say(f"rendering {described.get('quality')}{drawn}; action repeat {self.repeat}")
        say("parameters " + ", ".join(f"{k} {v / 1e6:.2f}M" for k, v in counts.items()))
        say(self.replay_note)
        say(
            f"{self.budget:,} agent steps = {self.budget * self.repeat:,} env steps, one update per {online.train_every} agent steps"
            f" ({online.batch_size} x {online.length}): {self.budget // online.train_every:,} updates"
        )
