"""Checks before a run starts: they refuse settings with which the run could never make an update."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np

from localmotion import methods
from localmotion.acting.observer import make_observer
from localmotion.config import BehaviourConfig, RunConfig
from localmotion.envs import check_env, is_own
from localmotion.envs.goals import check_goals
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError, SimulationError
from localmotion.machine import launched
from localmotion.methods.base import GOAL, LABELS, MASK, MOTION, Method, Source
from localmotion.training.rehearsal import STAGE


def check_video_stage(method: type[Method], run: RunConfig) -> None:
    """Raise ConfigError for settings with which a stage that learns from video cannot begin."""
    if method.stages.get(run.stage) is not Source.CLIPS:
        raise ConfigError(f"method {run.method} has no pre-training stage; use localmotion {_first_acting(method)}")
    if not run.data:
        raise ConfigError(f"{run.stage}: give the clips with --data STORE (made by localmotion extract VIDEOS --out STORE)")
    check_length(method, run)
    check_begins(method, run)
    if run.rehearsal.data:
        check_rehearsal(method, run)
    if run.pretrain.updates < (least := method.least_updates(run.model, run.stage)):
        raise ConfigError(
            f"pretrain.updates={run.pretrain.updates}: with its settings {run.stage} of {run.method} needs at least {least}, because a"
            " part of the model begins late; give more, or let that part begin earlier"
        )


def _first_acting(method: type[Method]) -> str:
    """The stage in which a method without pre-training begins."""
    return "train" if "train" in method.stages else next(iter(method.stages))


def check_acting_stage(method: type[Method], run: RunConfig) -> None:
    """Raise ConfigError for settings with which a stage that learns from actions cannot begin."""
    source = method.stages[run.stage]
    check_begins(method, run)
    check_decay(method, run)
    if source is Source.LOGGED and not run.data:
        raise ConfigError(
            f"{run.stage}: give the logged episodes with --data STORE (made by localmotion collect ENV --out STORE --store)"
        )
    if not run.env and not run.data:
        raise ConfigError(
            f"{run.stage}: give an environment with --env, e.g. dmc:walker_walk or metaworld:reach, or logged episodes with --data"
        )
    first = next(iter(method.stages)) if source is Source.LOGGED else ""
    if run.stage not in ("train", first) and not run.checkpoint and (source is Source.LOGGED or not run.data):
        raise ConfigError(f"{run.stage} needs --checkpoint; to learn without pre-training use localmotion train")
    if run.load and not run.checkpoint:
        raise ConfigError(f"load={run.load} needs --checkpoint, the pre-trained run to load from")
    if run.checkpoint and not any(
        stage is not source and stage in (Source.CLIPS, Source.LOGGED) for stage in method.stages.values()
    ):
        raise ConfigError(f"method {run.method} has no pre-training stage; use localmotion {run.stage} without --checkpoint")
    if run.motion != "recipe" and not (method.needs(run.model, run.stage) & MOTION and run.env):
        reason = f"{run.method} perceives no motion" if run.env else "nothing is perceived without --env"
        raise ConfigError(f"motion={run.motion}: {reason}; leave it out")
    if run.env:
        check_env(run.env, run.env_options)
        if method.needs(run.model, run.stage) & GOAL:
            check_goals(run.env)
    if source is Source.ROLLOUT and not run.data:
        check_rollout(method, run)
    check_length(method, run)
    if run.rehearsal.data:
        check_rehearsal(method, run)


def check_start(method: type[Method], run: RunConfig, source: str, theirs: type[Method], stage: str) -> None:
    """Raise CheckpointError if ``run`` cannot start from ``source``, a run of the method ``theirs`` in the stage ``stage``."""
    foreign = theirs.name != method.name
    if foreign and not run.load:
        raise CheckpointError(
            f"{source}: was pre-trained with method {theirs.name}, this run is {run.method}; give a {run.method} checkpoint,"
            f" or name the parts to take over with --load ({', '.join(method.transfers)})"
        )
    if theirs.stages.get(stage) not in (Source.CLIPS, Source.LOGGED) or (not foreign and stage == run.stage):
        raise CheckpointError(f"{source}: is a {stage} run, not a pre-training run")
    before = method.origins(run.model, run.stage)
    if before and not foreign and stage not in before:
        raise CheckpointError(f"{source}: is a {stage} run; {run.stage} of {run.method} starts from a {' or '.join(before)} run")


def check_length(method: type[Method], run: RunConfig) -> None:
    """Raise ConfigError for a sequence length that the method's losses cannot take."""
    source = method.stages.get(run.stage)
    low, high = method.lengths(run.model, run.stage)
    if source is Source.ROLLOUT and not run.data:  # T = steps + 1
        if run.rollout.steps + 1 < low:
            raise ConfigError(f"rollout.steps={run.rollout.steps}: {run.method} learns from rollouts of at least {low - 1} steps")
        return
    clips = source is Source.CLIPS
    part = "pretrain" if clips else "online"
    length = run.pretrain.length if clips else run.online.length
    if length < low or (high is not None and length > high):
        least_most = f"at least {low}" if high is None else f"{low} to {high}"
        raise ConfigError(f"{part}.length={length}: {run.method} learns from sequences of {least_most} positions")


def check_rehearsal(method: type[Method], run: RunConfig) -> None:
    """Raise ConfigError if the run's stage cannot rehearse, or not with sequences of this length."""
    text = f"rehearsal.data={run.rehearsal.data}"
    if method.stages[run.stage] is Source.CLIPS:
        raise ConfigError(f"{text}: {run.stage} learns from clips in any case (--data); leave it out")
    if run.stage not in method.rehearses:
        raise ConfigError(f"{text}: {run.stage} of {method.name} learns no model of videos; leave it out")
    check_length(method, replace(run, stage=STAGE))


def check_begins(method: type[Method], run: RunConfig) -> None:
    """Raise ConfigError for a stage without the checkpoint that it starts from, and for labels that nothing reads."""
    before = method.origins(run.model, run.stage)
    if before and not run.checkpoint:
        raise ConfigError(f"{run.stage} of {run.method} starts from a {' or '.join(before)} run: give it with --checkpoint RUN")
    video = method.stages.get(run.stage) is Source.CLIPS
    if run.labels and (not run.data or (video and not method.needs(run.model, run.stage) & LABELS)):
        raise ConfigError(f"labels={run.labels}: {run.stage} reads no labels; they are a part of logged episodes, --data STORE")


def check_rollout(method: type[Method], run: RunConfig) -> None:
    """Raise ConfigError for settings that need what a rollout does not have: motion, vectors, masks, more environments."""
    rollout, needed = run.rollout, method.needs(run.model, run.stage)
    if run.online.phase_at is not None:
        raise ConfigError(f"online.phase_at={run.online.phase_at:g}: rollouts stay in one phase; set it to null")
    if rollout.minibatches > rollout.environments:
        raise ConfigError(f"rollout.minibatches={rollout.minibatches} is more than rollout.environments={rollout.environments}")
    if needed & MOTION or run.motion != "recipe" or run.observed != "pixels":
        raise ConfigError(f"{run.method}: learns on-policy from pictures only; neither motion nor vectors are perceived there")
    if needed & MASK:
        raise ConfigError(
            f"{run.stage} of {run.method}: with these settings it needs masks of the agent, and a rollout has none; use settings that"
            " need no masks (docs/latent_actions.md)"
        )


def check_decay(method: type[Method], run: RunConfig) -> None:
    """Raise ConfigError for a decay of the learning rate in a stage that plays or may play, where its end is not known."""
    if run.online.lr_decay and method.stages[run.stage] is not Source.LOGGED:
        raise ConfigError(
            f"online.lr_decay={run.online.lr_decay:g}: {run.stage} of {run.method} keeps its learning rate; only stages of logged"
            " episodes alone let it fall. Leave it out"
        )


def check_ranks(run: RunConfig) -> None:
    """Raise ConfigError for settings that several processes (torchrun) cannot run with. Nothing is refused in a single process."""
    count = launched()[1]
    if count == 1:
        return
    if run.cuda_graph or run.compile:
        raise ConfigError(f"cuda_graph and compile are for a run of one process, and torchrun started {count}; leave them out")
    if ":" in run.device:
        raise ConfigError(
            f"device={run.device}: each of the {count} processes takes a GPU of its own; use --device cuda, cpu or auto"
        )
    source = methods.get(run.method).stages[run.stage]
    if source is Source.REPLAY and not run.data and run.online.replay_capacity < count * run.online.length:
        raise ConfigError(
            f"online.replay_capacity={run.online.replay_capacity}: each of {count} processes has a part of it, less than one sequence of"
            f" online.length={run.online.length}; raise the capacity"
        )
    parts = (
        {"rollout.environments": run.rollout.environments}
        if source is Source.ROLLOUT and not run.data
        else {"batch_size": run.pretrain.batch_size if source is Source.CLIPS else run.online.batch_size}
    )
    for name, value in parts.items():
        if value % count:
            raise ConfigError(f"{name}={value}: {count} processes cannot share it equally; choose a multiple of {count}")
    share = run.rollout.environments // count
    if "rollout.environments" in parts and run.rollout.minibatches > share:
        raise ConfigError(f"rollout.minibatches={run.rollout.minibatches} is more than the {share} environments of each process")


def check_learns(run: RunConfig, repeat: int = 1) -> None:
    """Raise ConfigError if an online run with these settings could never make an update.

    ``repeat``: env steps per agent step.
    """
    online = run.online
    steps = -(-online.env_steps // repeat)  # agent steps
    if online.replay_capacity < online.length:
        raise ConfigError(
            f"online.replay_capacity={online.replay_capacity} is less than one sequence, online.length={online.length};"
            " raise the capacity"
        )
    if online.prefill >= online.env_steps:
        raise ConfigError(
            f"online.prefill={online.prefill} env steps of random exploration leave nothing of online.env_steps={online.env_steps}"
            " to learn in; lower prefill or raise env_steps"
        )
    last = steps // online.train_every * online.train_every  # agent step of the last update that is due while acting
    if not online.warmup_updates and last * repeat <= online.prefill:
        raise ConfigError(
            f"online.train_every={online.train_every}: no update falls between prefill={online.prefill} and"
            f" env_steps={online.env_steps}; lower train_every or raise env_steps"
        )


def check_plays(run: RunConfig) -> None:
    """Raise EnvError if the user's own environment breaks gymnasium's API at its first reset or env step.

    Plays in an instance of its own, so that the run's episodes stay as they are. What fails by chance (SimulationError) may
    also fail in a run, which goes on with a fresh environment.
    """
    if not run.env or not is_own(run.env):
        return
    observer = make_observer(run, None)
    middle = np.zeros(observer.action_dim, np.float32)
    if observer.discrete:
        middle[0] = 1.0
    with contextlib.suppress(SimulationError):
        observer.reset(run.seed)
        observer.step(middle)
    with contextlib.suppress(SimulationError):
        observer.env.close()


def check_budget(run: RunConfig, repeat: int = 1) -> None:
    """Raise ConfigError if the budget of a run that learns from rollouts is less than one rollout.

    ``repeat``: env steps per agent step.
    """
    rollout, whole = run.rollout, run.rollout.agent_steps * repeat
    if run.online.env_steps < whole:
        times = f" x {repeat} env steps" if repeat > 1 else ""
        raise ConfigError(
            f"online.env_steps={run.online.env_steps} is less than one rollout: {rollout.environments} environments x {rollout.steps} agent"
            f" steps{times} = {whole}; raise env_steps, or lower rollout.environments or rollout.steps"
        )


def check_phases(run: RunConfig, env: object) -> None:
    """Raise ConfigError if the run changes to a phase that its environment does not have."""
    if run.online.phase_at is None:
        return
    phase, count = getattr(env, "phase", 0), getattr(env, "phases", 0)
    if phase >= count:
        reason = f"begins with its last phase, {phase}" if count else "has no phases"
        raise ConfigError(f"online.phase_at={run.online.phase_at:g}: {run.env} {reason}; set it to null")


def about_ends(run: RunConfig) -> str:
    """What to say where an episode ends by the task's rules, for a run whose method then still expects reward. "": it does not."""
    behaviour = getattr(run.model, "behaviour", None)
    if not isinstance(behaviour, BehaviourConfig) or behaviour.continuation:
        return ""
    return (
        f"{run.data or run.env}: an episode ended by the task's rules (terminated), and {run.method} expects reward after such an end;"
        " set model.behaviour.continuation=true in a new run to learn that none follows"
    )


def never_learned(run: RunConfig) -> LocalmotionError:
    """Return the error for a run that ended without an update."""
    online = run.online
    return LocalmotionError(
        f"{run.env}: no update was made in {online.env_steps:,} env steps; learning begins with the first episode that starts after"
        f" online.prefill={online.prefill:,} env steps, then one update every {online.train_every} agent steps; raise online.env_steps"
        " (the same command goes on), or start a new run with a lower prefill or shorter episodes"
    )
