"""Learning in an environment: fine-tuning from a pre-trained run, or training from scratch. A page of named clocks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmotion import methods
from localmotion.compute import choose
from localmotion.config import RunConfig
from localmotion.console import progress, say
from localmotion.errors import ConfigError
from localmotion.evaluation.rollout import (
    Observer,
    episode_seed,
    evaluate,
    make_observer,
    method_policy,
    random_policy,
    stored_recipe,
    streaming_recipe,
)
from localmotion.methods.base import Method
from localmotion.perception.base import Recipe
from localmotion.replay import Replay
from localmotion.training import checkpoint
from localmotion.training.pretrain import to_device
from localmotion.training.rundir import RunDir
from localmotion.training.transfer import load_pretrained
from localmotion.training.update import Updater, to_floats
from localmotion.video.write import write_video


def finetune(run: RunConfig, path: Path) -> Path:
    """Learn ``run.env`` with ``run.method`` in the run directory ``path``; continues where a run of the same settings stopped."""
    cls = methods.get(run.method)
    if not run.env:
        raise ConfigError(f"{run.stage}: say which --env, e.g. dmc:walker_walk or metaworld:reach")
    if run.stage == "finetune" and not run.checkpoint:
        raise ConfigError("finetune needs --checkpoint; to learn without pre-training use localmotion train")
    if run.load and not run.checkpoint:
        raise ConfigError(f"load={run.load} needs --checkpoint, the pre-trained run to load from")
    if run.checkpoint and not cls.can_pretrain:
        raise ConfigError(f"method {run.method} has no pre-training stage; use localmotion train without --checkpoint")
    perception = streaming_recipe(stored_recipe(run, path) or Recipe())
    recipe = perception if cls.wants_motion else None
    if recipe:
        run = replace(run, recipe=recipe.to_json())
    observer = make_observer(run, recipe, size=perception.size)
    if run.observed != "pixels":
        run = _shown(run, observer)
    repeat = int(observer.env.describe()["action_repeat"])  # type: ignore[attr-defined]
    compute = choose(run)
    torch.manual_seed(run.seed)
    method = cls(run.model, image_size=perception.size, action_dim=observer.action_dim).to(compute.device)
    if run.checkpoint:
        say(load_pretrained(method, run).line())
    out = RunDir(path, run)
    learner = _Learner(run, out, observer, method, Updater(method, run, compute, pretrained=bool(run.checkpoint)), repeat)
    try:
        learner.learn()
    except KeyboardInterrupt:
        learner.save(interrupted=True)
        out.status("interrupted", agent_step=learner.agent_step)
        say(f"interrupted at agent step {learner.agent_step}, saved; the same command goes on from there")
        raise
    except BaseException as error:
        out.status("failed", agent_step=learner.agent_step, error=str(error))
        raise
    out.status("finished", agent_step=learner.agent_step, env_step=learner.agent_step * repeat)
    return path


def _shown(run: RunConfig, observer: Observer) -> RunConfig:
    """The run with a model for vectors of the environment's length. Raises ConfigError for a method that sees pictures only."""
    if not methods.get(run.method).vectors:
        able = ", ".join(name for name in methods.names() if methods.get(name).vectors)
        raise ConfigError(f"observed={run.observed}: {run.method} learns from pictures only; methods that take vectors: {able}")
    (length,) = observer.spec()["vector"][0]
    return replace(run, model=replace(run.model, pixels=run.observed == "both", vector_dim=length))


class _Learner:
    """State and clocks of an online run."""

    def __init__(self, run: RunConfig, out: RunDir, observer: Observer, method: Method, updater: Updater, repeat: int) -> None:
        self.run, self.out, self.observer, self.method, self.updater, self.repeat = (
            run,
            out,
            observer,
            method,
            updater,
            repeat,
        )
        self.compute = updater.compute
        online = run.online
        self.replay = Replay(
            observer.spec(),
            capacity=online.replay_capacity,
            length=online.length,
            prioritize_ends=online.prioritize_ends,
            seed=run.seed,
        )
        self.agent_step = self.episode = self.updates_due = self.last_save = 0
        self.next_eval = 0
        self.evaluators: list[Observer] = []
        self.spent = {"update": 0.0, "act": 0.0, "replay": 0.0, "eval": 0.0}
        self.spent_before: dict[str, float] = {}
        self.clock = time.perf_counter()

    @property
    def budget(self) -> int:
        """Agent steps in all."""
        return -(-self.run.online.env_steps // self.repeat)

    def learn(self) -> None:
        """Prefill, warm up, then act, update, evaluate and save by their clocks."""
        online = self.run.online
        self._resume()
        self._announce()
        self.out.status("running", agent_step=self.agent_step)
        dim = self.observer.action_dim
        with progress(f"{self.run.method} {self.run.env}", self.budget, "agent steps", self.agent_step) as advance:
            self.advance = advance
            while self.agent_step * self.repeat < online.prefill or not self.replay.episodes:
                self._episode(random_policy(dim, episode_seed(self.run.seed, "prefill", self.episode)), learning=False)
            if self.updater.update == 0:
                for _ in range(online.warmup_updates):
                    self._update()
            policy = method_policy(self.method, self.compute, explore=True, window=online.length)
            while self.agent_step < self.budget:
                self._episode(policy, learning=True)
                if self.agent_step - self.last_save >= online.save_every:
                    self.save()
            self._evaluate(final=True)
        self._keep_flow()
        self.save()

    def _episode(self, policy: Any, *, learning: bool) -> None:
        """One training episode; updates are made between agent steps, `train_every` apart."""
        online, record = self.run.online, self.observer.reset(episode_seed(self.run.seed, "train", self.episode))
        self.replay.add(record, last=False)
        total, success, length, done, first, has_success = 0.0, 0.0, 0, False, True, False
        while not done:
            if learning and self.agent_step >= self.next_eval:
                self._evaluate()
            began = time.perf_counter()
            self.method.eval()
            action = policy([record], first)[0]
            self.method.train()
            self.spent["act"] += time.perf_counter() - began
            record, done, info = self.observer.step(action)
            self.agent_step, length, first = self.agent_step + 1, length + 1, False
            done = done or self.agent_step >= self.budget
            self.replay.add(record, last=done)
            total += record["reward"]
            if "success" in info:
                success, has_success = max(success, float(info["success"])), True
            if learning and self.agent_step % online.train_every == 0:
                self._update()
            self.advance(self.agent_step)
        self.episode += 1
        extra = {"success": success} if has_success else {}
        self.out.log("episode", **self.counters(), **{"return": total}, length=length, random=not learning, **extra)

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
        metrics = self.updater.online(batch)
        self.spent["update"] += time.perf_counter() - began
        if self.updater.update % self.run.online.log_every == 0:
            now = {**self.spent, **self.observer.seconds}
            wall = time.perf_counter() - self.clock
            seconds = {f"seconds/{k}": v - self.spent_before.get(k, 0.0) for k, v in now.items()}
            self.spent_before, self.clock = now, time.perf_counter()
            extra: dict[str, float] = {"seconds/all": wall}
            if self.observer.extractor:
                extra |= {f"flow/{k}": v for k, v in self.observer.extractor.magnitudes.quantiles().items()}
            self.out.log("train", **self.counters(), **to_floats(metrics), **seconds, **extra)

    def _evaluate(self, final: bool = False) -> None:
        """Evaluation on environments of their own, with seeds of their own stream."""
        run, online = self.run, self.run.online
        self.next_eval = (self.agent_step // online.eval_every + 1) * online.eval_every
        began = time.perf_counter()
        before = torch.get_rng_state()
        torch.manual_seed(run.seed + self.agent_step)
        self.method.eval()
        recipe = self.observer.recipe
        result = evaluate(
            lambda: method_policy(self.method, self.compute, explore=False, window=online.length),
            lambda: make_observer(run, recipe, size=self.method.image_size),
            seed=run.seed,
            episodes=max(10, online.eval_episodes) if final else online.eval_episodes,
            observers=self.evaluators,
            keep_frames=True,
        )
        self.method.train()
        torch.set_rng_state(before)
        self.spent["eval"] += time.perf_counter() - began
        self.out.log("eval", **self.counters(), **result.summary(), seed=run.seed, final=final)
        if result.frames is not None:
            write_video(self.out.path / "media" / f"eval_{self.agent_step * self.repeat:09d}.mp4", result.frames, fps=25)
        score = f"success {np.mean(result.successes):.2f} " if result.successes else ""
        say(
            f"env step {self.agent_step * self.repeat:,}: {score}return {np.mean(result.returns):.1f} +- {np.std(result.returns):.1f}"
        )

    def _keep_flow(self) -> None:
        """Flow magnitudes of the newest episodes for the report, to be held against those of pre-training."""
        if "flow" not in self.replay.spec or not self.replay.episodes:
            return
        newest = list(self.replay.episodes)[-10:]
        some = [np.linalg.norm(arrays["flow"][1::8, ::4, ::4].astype(np.float32), axis=-1).ravel() for _, arrays in newest]
        np.savez_compressed(self.out.path / "media" / "flow_downstream.npz", magnitudes=np.concatenate(some), name=self.run.env)

    # Saving -----------------------------------------------------------------------------------------------------------------

    def save(self, interrupted: bool = False) -> None:
        """Checkpoint with replay. Taken at an episode's end; an interruption drops the open episode and says so."""
        if interrupted and (lost := self.replay.abandon()):
            say(f"the open episode of {lost} records is not kept; it will be played again")
        self.last_save = self.agent_step
        folder = self.out.path / "replay"
        self.replay.save(folder)
        state = {
            "stage": self.run.stage,
            "metrics_offset": self.out.metrics_offset(),
            "action_dim": self.observer.action_dim,
            "agent_step": self.agent_step,
            "episode": self.episode,
            "next_eval": self.next_eval,
            "replay": self.replay.state(),
        }
        checkpoint.save(
            self.out.path / "checkpoints",
            self.updater.update,
            weights=self.method.state_dict(),
            optimizer=self.updater.state(),
            state=state,
        )
        kept = checkpoint.complete(self.out.path / "checkpoints")
        self.replay.prune(folder, {s for p in kept for s in checkpoint.read_state(p)["replay"]["episodes"]})

    def _resume(self) -> None:
        found = checkpoint.complete(self.out.path / "checkpoints")
        if not found:
            self.out.truncate_metrics(0)
            return
        state = checkpoint.read_state(found[-1])
        checkpoint.load_weights(self.method, checkpoint.read(found[-1], "weights"), str(found[-1]))
        self.updater.load_state(checkpoint.read(found[-1], "optimizer"))
        self.updater.update = int(state["update"])
        self.agent_step, self.episode = int(state["agent_step"]), int(state["episode"])
        self.next_eval, self.last_save = int(state["next_eval"]), self.agent_step
        self.replay.load(self.out.path / "replay", state["replay"])
        checkpoint.set_rng_state(checkpoint.read(found[-1], "rng"))
        self.out.truncate_metrics(int(state["metrics_offset"]))
        say(f"continuing from agent step {self.agent_step:,} ({found[-1]})")

    def _announce(self) -> None:
        run, online, counts = self.run, self.run.online, self.method.parameter_counts()
        described = self.observer.env.describe()  # type: ignore[attr-defined]
        recipe = self.observer.recipe.to_json() if self.observer.recipe else None
        self.out.environment({"compute": self.compute.note, "parameters": counts, "env": described, "recipe": recipe})
        say(f"{run.method} on {run.env}: {self.compute.note}")
        gl = described.get("gl")
        drawn = f", {gl['message']}" if isinstance(gl, dict) else ""
        say(f"rendering {described.get('quality')}{drawn}; action repeat {self.repeat}")
        say("parameters " + ", ".join(f"{k} {v / 1e6:.2f}M" for k, v in counts.items()))
        say(self.replay.describe())
        say(
            f"{self.budget:,} agent steps = {self.budget * self.repeat:,} env steps, one update per {online.train_every} agent steps"
            f" ({online.batch_size} x {online.length}): {self.budget // online.train_every:,} updates"
        )
