"""The loop of an online stage: the agent plays episodes into a replay and learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from localmotion import methods, ranks
from localmotion.acting.episodes import FAULTS, episode_seed
from localmotion.acting.observer import Observer, make_observer
from localmotion.acting.policy import MethodPolicy, Policy, random_policy
from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.errors import CheckpointError, ConfigError, EnvError, SimulationError
from localmotion.foreign import shut
from localmotion.methods.base import Method
from localmotion.perception.companding import Companding
from localmotion.replay import Replay
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.training.checks import about_ends, never_learned
from localmotion.training.loop import ActingLoop
from localmotion.training.pace import Pace, updates_due
from localmotion.training.playing import Playing
from localmotion.training.storage import choose_storage, device_memory, records_needed
from localmotion.training.update import Updater


def next_phase(env: Any) -> None:
    """Episodes from the next reset on are of the next phase. For environments that `checks.check_phases` has let pass."""
    env.set_phase(env.phase + 1)


def _recorded(run: RunConfig, described: Mapping[str, Any]) -> list[str]:
    """A line about the numbers that the environment shows beside its pictures, if the agent does not learn from them."""
    kept = described.get("recorded")
    if not kept or run.observed != "pixels":
        return []
    way = "set --observed both to learn from them" if methods.get(run.method).vectors else "it learns from pictures only"
    return [f"the replay also records {', '.join(kept)}; {run.method} does not use them: {way}"]


class OnlineLoop(ActingLoop):
    """Prefill the replay with random episodes, make the warm-up updates, then act and learn.

    While the agent acts, an update follows every few agent steps. A count is an agent step. Evaluations happen only
    during an episode that the agent plays. Scheduled checkpoints are written only after such an episode. A stop signal
    saves between any two agent steps.
    """

    steady = False

    def __init__(self, run: RunConfig, out: RunDir, observer: Observer, method: Method, updater: Updater, repeat: int) -> None:
        online = run.online
        super().__init__(run, out, method, updater, repeat, self._fresh)
        self.observer = observer
        limit: int = observer.env.describe()["time_limit"]  # type: ignore[attr-defined]
        self.longest = -(-limit // repeat)  # agent steps of an episode that ends at its time limit
        # Each rank has an equal part of the replay, in a folder of its own.
        part = online if ranks.alone() else replace(online, replay_capacity=-(-online.replay_capacity // ranks.world()))
        budget = -(-self.total // ranks.world())
        folder = out.path / ("replay" if ranks.leads() else f"replay-{ranks.rank()}")
        recipe = observer.recipe if online.replay_flow == "int8" else None
        if both := set(observer.spec()) & set(method.extras):
            raise ConfigError(f"{run.env}: records {', '.join(sorted(both))}, a name that {run.method} uses too; rename it there")
        self.replay = Replay(
            observer.spec() | {name: (shape, "float32") for name, shape in method.extras.items()},
            capacity=records_needed(part, budget, self.longest),
            length=online.length,
            prioritize_ends=online.prioritize_ends,
            seed=run.seed if ranks.leads() else episode_seed(run.seed, "replay", ranks.rank()),
            coders={"flow": Companding(recipe.size)} if recipe else None,
            folder=folder,
        )
        device, size = self.compute.device, self.replay.bytes_per_record
        free = device_memory(device)
        storage, self.replay_note = choose_storage(part, budget, size, folder, free, self.longest)
        self.replay.place(storage, max(self.replay.capacity, self.longest + 1), device)
        self.ahead = free is not None and storage != "device"  # prepare the next batch while the device works
        self.episode = 0
        self.playing: Playing | None = None
        self.phase = 0  # number of changes to the next phase so far
        self.learned = False  # whether the agent (not the random policy) played the last complete episode
        self.faults = 0
        self.ends = about_ends(run)  # to be said at the first end by the task's rules
        self.spent |= {"act": 0.0, "replay": 0.0}
        self.pace = Pace(self.total, online)

    @property
    def over(self) -> bool:
        return self.agent_step >= self.total and self.playing is None

    @property
    def last(self) -> bool:
        online = self.run.online
        warm = self.updater.update >= online.warmup_updates
        return warm and self.agent_step // online.train_every >= self.played // online.train_every

    @property
    def may_evaluate(self) -> bool:
        return self.playing is not None and self.playing.learning

    @property
    def may_save(self) -> bool:
        return self.playing is None and self.learned

    @property
    def episodes_begun(self) -> int:
        return self.episode

    def lines(self) -> list[str]:
        online, described = self.run.online, self.observer.env.describe()  # type: ignore[attr-defined]
        gl = described.get("gl")
        prefill = -(-online.prefill // self.repeat)
        updates = updates_due(online, self.total, prefill, self.longest * ranks.world())
        drawn = f", {gl['message']}" if isinstance(gl, dict) else ""
        return [
            f"{self.run.method} on {self.run.env}: {self.compute.note}",
            f"rendering {described.get('quality')}{drawn}; action repeat {self.repeat}",
            self.replay_note,
            *_recorded(self.run, described),
            f"{self.total:,} agent steps = {self.total * self.repeat:,} env steps, one update per {online.train_every} agent steps"
            f" ({online.batch_size} x {online.length}) after {prefill:,} random ones: about {updates:,} updates",
        ]

    def record(self) -> dict[str, Any]:
        recipe = self.observer.recipe
        env = self.observer.env.describe()  # type: ignore[attr-defined]
        return {"env": env, "recipe": recipe.to_json() if recipe else None}

    # Playing and learning ---------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Begin an episode, or make one agent step of it."""
        try:
            if self.playing is None:
                self._begin()
            else:
                self._step(self.playing)
        except SimulationError as error:
            self._broken(error)

    def _begin(self) -> None:
        """Start a training episode: with random actions during the prefill, with the policy after it."""
        online = self.run.online
        if online.phase_at is not None and not self.phase and self.agent_step >= online.phase_at * self.total:
            self._change_phase()
        learning = self.may_learn
        if learning:
            self._warm_up()
        self.playing = self._open(learning)

    @property
    def may_learn(self) -> bool:
        """Whether the next episode is one that the agent plays."""
        return self.agent_step * self.repeat >= self.run.online.prefill and bool(self.replay.episodes)

    def _warm_up(self) -> None:
        while self.updater.update < self.run.online.warmup_updates:
            self.stop.check()
            self._update()

    def _change_phase(self) -> None:
        """From now on episodes are of the next phase, those of evaluations too."""
        self.phase = 1
        for observer in (self.observer, *self.trials.observers):
            next_phase(observer.env)
        self.out.log("phase", **self.counters(), phase=self.observer.env.phase)  # type: ignore[attr-defined]
        say(f"agent step {self.agent_step:,}: {self.run.env} changes to phase {self.observer.env.phase}")  # type: ignore[attr-defined]

    def _open(self, learning: bool) -> Playing:
        number = self.episode * ranks.world() + ranks.rank()
        if learning:
            policy: Policy = MethodPolicy(self.method, self.compute, explore=True, window=self.run.online.length)
        else:
            policy = random_policy(
                self.observer.action_dim, episode_seed(self.run.seed, "prefill", number), discrete=self.observer.discrete
            )
        seed = episode_seed(self.run.seed, "train", number)
        playing = Playing(self.observer, policy, seed, learning=learning, extras=self.method.extras)
        self.replay.add(playing.record, last=False)
        return playing

    def _step(self, playing: Playing) -> None:
        """One agent step, and the update if one is due (every `train_every` agent steps)."""
        with self.timed("act"):
            if self.method.training:  # the check saves time: eval() visits every module
                self.method.eval()
            action = playing.choose()
        done = playing.take(action)
        self.agent_step += 1
        playing.cut = not done and (self.agent_step >= self.total or self._prefilled(playing))
        done = done or playing.cut
        self.replay.add(playing.record, last=done)
        if playing.learning and self.agent_step % self.run.online.train_every == 0:
            self._update()
        if playing.learning and (text := self.pace.forecast(self.agent_step, self.spent["eval"], self.evaluations)):
            say(text)
        if done:
            self._end(playing)

    def _end(self, playing: Playing) -> None:
        self.playing, self.learned = None, playing.learning
        self.episode += 1
        self.faults = 0
        if self.ends and playing.record["is_terminal"]:
            say(self.ends)
            self.ends = ""
        self._log_episode(playing.total, len(playing.actions), not playing.learning, playing.success, playing.cut)

    def _log_episode(self, total: float, length: int, random: bool, success: float | None, cut: bool) -> None:
        values = {
            "return": total,
            "length": length,
            "random": random,
            "cut": cut,
            **({} if success is None else {"success": success}),
        }
        self.out.log("episode", **self.counters(), **values)

    def _prefilled(self, playing: Playing) -> bool:
        """Whether to cut a random episode here.

        True if the prefill is complete and the episode could last to the end of the run. Without the cut, the agent
        would never play and the run would make no update.
        """
        began = self.agent_step - ranks.world() * len(playing.actions)
        reached = self.agent_step * self.repeat >= self.run.online.prefill
        return not playing.learning and reached and began + ranks.world() * self.longest >= self.total

    def _update(self) -> None:
        size = self.run.online.batch_size // ranks.world()
        with self.timed("replay"):
            batch = self.compute.to_device(self.replay.sample(size))
        self.learn(batch)
        if self.ahead:
            with self.timed("replay"):
                self.replay.prepare(size, self.compute.to_device)

    def _fresh(self) -> Observer:
        """An environment of the run in its present phase, with its perception."""
        observer = make_observer(self.run, self.observer.recipe, size=self.method.image_size)
        if self.phase:
            next_phase(observer.env)
        return observer

    def _broken(self, error: SimulationError) -> None:
        """Handle a failed environment: end its episode as a time limit would, and make a fresh environment.

        The fault is logged. After `FAULTS` faults without a complete episode between them, the run saves and stops.
        """
        self.faults += 1
        self.replay.cut()
        self.playing = None
        self.learned = False
        self.episode += 1
        self.out.log("fault", **self.counters(), error=str(error), dropped=self.replay.dropped)
        if self.faults >= FAULTS:
            saved = "; saved at this point" if ranks.alone() else ""
            raise EnvError(f"{error} ({self.faults} failures without a complete episode between them{saved})") from error
        say(f"{error}; the episode ends at agent step {self.agent_step:,} and a fresh environment goes on")
        shut(self.observer.env)
        self.observer.env = self._fresh().env

    # Measuring --------------------------------------------------------------------------------------------------------------

    def seconds(self) -> dict[str, float]:
        return {**self.spent, **self.observer.seconds}

    def extra(self) -> dict[str, Any]:
        if not self.observer.extractor:
            return {}
        return {f"flow/{k}": v for k, v in self.observer.extractor.magnitudes.quantiles().items()}

    def finish(self) -> None:
        if not self.updater.update:
            self.save()
            raise never_learned(self.run)
        if ranks.leads():
            self._keep_flow()
        super().finish()

    def _keep_flow(self) -> None:
        """Save flow magnitudes of the newest episodes.

        The report compares them with those of the pre-training videos.
        """
        if "flow" not in self.replay.spec or not self.replay.episodes:
            return
        newest = self.replay.newest("flow", 10)
        some = [np.linalg.norm(flow[1::8, ::4, ::4].astype(np.float32), axis=-1).ravel() for flow in newest]
        np.savez_compressed(self.out.path / "media" / "flow_downstream.npz", magnitudes=np.concatenate(some), name=self.run.env)

    # Saving -----------------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
        values = {
            **super().state()[0],
            "episode": self.episode,
            "phase": self.phase,
            "playing": {"learning": self.playing.learning} if self.playing else None,
            "replay": self.replay.state(),
        }
        return values, {"episode": self.playing.saved() if self.playing else {}}

    def save(self, *, last: bool = False) -> bool:
        """Save checkpoint and replay, then delete the files of episodes that no kept checkpoint needs."""
        if last or self.updater.healthy:
            self.replay.save()
        if not super().save(last=last):
            return False
        kept = checkpoint.complete(self.out.path / "checkpoints")
        self.replay.prune({serial for path in kept for serial in self._episodes_in(path)})
        return True

    def _episodes_in(self, path: Path) -> list[int]:
        """Serial numbers of the episodes that a checkpoint needs."""
        found: list[int] = checkpoint.read_state(path)["replay"]["episodes"]
        return found

    def start(self) -> None:
        self.replay.load(self.replay.state())  # removes episode files of a run that died before its first checkpoint

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        super().restore(state, folder)
        if (before := int(state.get("ranks", 1))) != ranks.world():
            raise CheckpointError(
                f"{folder}: was saved by {before} process(es), and each has a replay of its own; go on with {before}, not {ranks.world()}"
            )
        self.episode = int(state["episode"])
        self.phase = int(state.get("phase", 0))
        if self.phase:
            next_phase(self.observer.env)
        self.replay.load(state["replay"])
        if state.get("playing"):
            try:
                self.playing = self._open(bool(state["playing"]["learning"]))
                self.playing.replay(
                    checkpoint.read_of_rank(folder, "episode"), lambda record: self.replay.add(record, last=False)
                )
            except SimulationError as error:
                self._broken(error)
