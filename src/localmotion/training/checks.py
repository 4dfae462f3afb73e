"""Checks before a run starts: they refuse settings with which the run could never make an update."""

from __future__ import annotations

from localmotion.config import RunConfig
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.methods.base import LABELS, MASK, MOTION, Method, Source


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


def never_learned(run: RunConfig) -> LocalmotionError:
    """Return the error for a run that ended without an update."""
    online = run.online
    return LocalmotionError(
        f"{run.env}: no update was made in {online.env_steps:,} env steps; learning begins with the first episode that starts after"
        f" online.prefill={online.prefill:,} env steps, then one update every {online.train_every} agent steps; raise online.env_steps"
        " (the same command goes on), or start a new run with a lower prefill or shorter episodes"
    )
