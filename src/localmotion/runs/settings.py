"""Settings of a run: composed from a command, or read from a file. Only this module parses and checks a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from localmotion import methods
from localmotion.config import PRESETS, RunConfig, Stage, assign, full_name, leaves, update
from localmotion.envs import is_own
from localmotion.errors import CheckpointError, ConfigError, unknown_name
from localmotion.files import MAX_TEXT, check_tree, one_line, read_bytes, read_json, refuse_links
from localmotion.limits import limits, wanted
from localmotion.methods.base import VIDEO, Source
from localmotion.perception.trust import check_recipe
from localmotion.recipe import Recipe, read_recipe
from localmotion.suites import OWN, SUITES


def compose(
    method: str | type[methods.Method],
    stage: Stage,
    *,
    preset: str = "small",
    env: str = "",
    flags: Mapping[str, Any] | None = None,
    settings: tuple[str, ...] | list[str] = (),
) -> RunConfig:
    """Settings of a run: defaults, then suite, then preset, then ``flags`` (nested), then ``settings`` (name=value texts).

    The entry ``stages`` of a preset has settings of single stages, by their names.

    ``method`` is a registry name or the class itself.

    Raises ConfigError for unknown names, wrong types and ranges, for a setting that names another method, stage or preset, and
    for a recipe that cannot be used here.
    """
    cls = methods.get(method) if isinstance(method, str) else method
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    _check_stage(cls, stage)
    sizes = dict(cls.PRESETS[preset])
    own = sizes.pop("stages", {}).get(stage, {})
    recipe = sizes.pop("recipe", {})
    config = _layers(cls, stage, preset, env, (sizes, own, flags or {}), settings)
    if recipe and not _from_video(cls, stage) and not config.checkpoint:  # otherwise the existing clips determine it
        config = _layers(cls, stage, preset, env, ({**sizes, "recipe": recipe}, own, flags or {}), settings)
    _check_choice(config, method=cls.name, stage=stage, preset=preset)
    _check_ranges(config)
    if config.recipe:
        check_recipe(config.recipe)
    return config


def _check_choice(config: RunConfig, **asked: str) -> None:
    """Raise ConfigError where a setting names another method, stage or preset than the one whose settings were composed."""
    for name, text in asked.items():
        if getattr(config, name) != text:
            how = f"run the command localmotion {config.stage}" if name == "stage" else f"write --{name} {getattr(config, name)}"
            raise ConfigError(f"setting {name}={getattr(config, name)}: all other settings are those of {name} {text}; {how}")


def _layers(
    cls: type[methods.Method],
    stage: Stage,
    preset: str,
    env: str,
    layers: tuple[Mapping[str, Any], ...],
    settings: tuple[str, ...] | list[str],
) -> RunConfig:
    config = RunConfig(method=cls.name, stage=stage, model=cls.Config(), preset=preset, env=env)
    suite = OWN if is_own(env) else env.partition(":")[0]
    if suite in SUITES:
        config = update(config, SUITES[suite], ignore_unknown=True)
    for name in (suite, env.removesuffix("-v3")):
        if name in cls.SUITES:
            config = update(config, cls.SUITES[name])
    for values in layers:
        config = update(config, values)
    for text in settings:
        config = assign(config, text, _from_video(cls, stage))
    return config


_OF_EPISODES = {"prefill", "warmup_updates", "train_every", "replay_capacity", "replay_storage", "replay_flow"}
# Settings of `online` that the loop of a stage does not read.
_UNREAD = {
    "rollout": {*_OF_EPISODES, "updates", "lr_decay", "batch_size", "prioritize_ends"},
    "replay": {"updates", "lr_decay"},
    "logged": {*_OF_EPISODES, "env_steps"},
}


def check_read(config: RunConfig, settings: Iterable[str]) -> None:
    """Raise ConfigError for one of ``settings`` (name=value texts) that the loop of the run's stage, or its method, does not read.

    Video stages read `pretrain`, all others `online` and `rehearsal`, and stages that learn from rollouts `rollout`, too. A stage on
    logged episodes that also learns from their clips leaves out what pretrain.heldout_fraction holds out. Rehearsal makes its batches by
    `pretrain`.
    """
    cls = methods.get(config.method)
    source = cls.stages.get(config.stage)
    loop = "rollout" if source is Source.ROLLOUT else "logged" if config.data or source is Source.LOGGED else "replay"
    unread = {f"online.{name}" for name in _UNREAD[loop]} | cls.unread.get(config.stage, frozenset())
    if source is not Source.LOGGED:
        unread.add("online.lr_decay")
    video, rollout = _from_video(cls, config.stage), cls.stages.get(config.stage) is Source.ROLLOUT
    clips = video or bool(config.rehearsal.data)
    held = bool(cls.needs(config.model, config.stage) & VIDEO)
    read = {"pretrain": clips, "online": not video, "rehearsal": not video, "rollout": rollout}
    for text in settings:
        name = full_name(config, text.partition("=")[0].strip(), video)
        group, _, last = name.partition(".")
        idle = not video and name in unread
        if idle or (not read.get(group, True) and not (held and name == "pretrain.heldout_fraction")):
            own = f"{'pretrain' if video else 'online'}.{last}"
            instead = f"; its own setting is {own}" if own != name and own in dict(leaves(config)) else ""
            raise ConfigError(f"setting {name} does nothing in the stage {config.stage} of {config.method}{instead}")


def _from_video(cls: type[methods.Method], stage: Stage) -> bool:
    return cls.stages.get(stage) is Source.CLIPS


def _check_stage(cls: type[methods.Method], stage: Any) -> None:
    """Raise ConfigError for a stage that the method does not have.

    `pretrain` itself reports a missing pre-training stage.
    """
    if stage != "pretrain" and (not isinstance(stage, str) or stage not in cls.stages):
        raise ConfigError(
            f"method {cls.name} has no stage {stage!r:.40}; it has {', '.join(cls.stages)}: begin with"
            f" localmotion {next(iter(cls.stages))} --method {cls.name}"
        )


# Counts of the training loops that may be zero; all others are at least 1.
_MAY_BE_ZERO = {
    "env_steps",
    "prefill",
    "warmup_updates",
    "freeze_updates",
    "seed",
    "threads",
    "action_repeat",
    "workers",
    "labels",
}


def _check_ranges(config: RunConfig) -> None:
    """Raise ConfigError for an invalid number. A clock must not be zero, for example, and a share is in 0..1."""
    own = dict(limits(config.model, "model."))
    for name, value in leaves(config):
        last = name.rsplit(".", 1)[-1]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name.startswith("model."):  # what one setting has to do with another the model checks itself
            low, high = own.get(name, (-(2.0**31), 2.0**31))
            high = min(high, 2.0**31)
        else:
            low = 1 if isinstance(value, int) and last not in _MAY_BE_ZERO else 0
            high = {"heldout_fraction": math.nextafter(1, 0), "lr_decay": 1.0, "phase_at": 1.0}.get(last, 2.0**53)
        if not low <= value <= high:
            raise ConfigError(f"setting {name}={value} must be {wanted(value, low, high)}")


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of a saved config.json. Raises ConfigError for unknown keys and methods, wrong types and ranges.

    Also raises ConfigError for a recipe that runs code which the user has not trusted, because the file may come from
    somebody else.
    """
    values = dict(values)
    for key in ("method", "stage", "model"):
        if key not in values:
            raise ConfigError(f"configuration lacks {key!r}")
    cls = methods.get(str(values["method"])[:80])
    _check_stage(cls, values["stage"])
    config: RunConfig = update(RunConfig(method=values["method"], stage=values["stage"], model=cls.Config()), values)
    if type(config.model) is not cls.Config:
        raise ConfigError(f"setting model={values['model']!r:.80}: expected a mapping of settings")
    _check_ranges(config)
    if config.recipe:
        check_recipe(config.recipe)
    return config


def read_settings(path: Path, **asked: str | None) -> dict[str, Any]:
    """The settings in a file for a command: a run's config.json, or YAML of the same form with any of its keys.

    ``asked``: method, stage and preset of the command line, None where it names none. Those that the file names must be the same, because
    the other settings of the file are meant for them.

    Raises ConfigError for a file that cannot be read, or is for another method, stage or preset. `compose` checks all other settings.
    """
    try:
        values = yaml.safe_load(read_bytes(path, MAX_TEXT))
        check_tree(values)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read as settings ({one_line(error)}); give a config.json, or YAML of its form"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: settings are a mapping of names to values, as in a run's config.json")
    for name in {*asked, "env"} & set(values):
        if not isinstance(values[name], str):
            raise ConfigError(f"{path}: {name}={values[name]!r:.80} must be a name")
    for name, text in asked.items():
        if text is not None and values.get(name, text) != text:
            raise ConfigError(
                f"{path}: its {name} is {values[name]!r:.80}, the command's is {text}; leave it out in one of the two"
            )
    return values


@contextmanager
def named_file(path: Path | None, method: str, stage: Stage, preset: str, env: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Compose settings inside this context. A ConfigError that comes from ``values``, those of the file ``path``, names the file."""
    try:
        yield
    except ConfigError as error:
        if path is None or not _composes(method, stage, preset, env, {}) or _composes(method, stage, preset, env, values):
            raise
        raise ConfigError(f"{path}: {error}") from error


def _composes(method: str, stage: Stage, preset: str, env: str, flags: Mapping[str, Any]) -> bool:
    try:
        compose(method, stage, preset=preset, env=env, flags=flags)
    except ConfigError:
        return False
    return True


def read_config(path: Path) -> RunConfig:
    """Settings of the run in ``path``, with its perception recipe.

    The recipe is None if the run needs none, or if it began without clips. The recipe comes from the settings, else
    from the start of the run (pre-training: from its clips), else from its checkpoint.

    Raises CheckpointError if there are no settings or the run has links out of its folder, ConfigError if the settings
    do not fit this version.
    """
    file = path / "config.json"
    if not file.exists():
        raise CheckpointError(f"{path}: no such run (no config.json)")
    refuse_links(path, CheckpointError, folders=False)  # linked folders are accepted: weights may be on another disk
    values = read_json(file, CheckpointError, "give a run directory as localmotion wrote it")
    try:
        run = from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return with_recipe(run, path)


def with_recipe(run: RunConfig, path: Path | None, start: Path | None = None) -> RunConfig:
    """``run`` with a recipe.

    If its settings have none, it comes from the run directory ``path`` (None: of no run), else from its checkpoint. ``start``: the folder
    of a checkpoint that is no path (hf:, shelf:); without it such a checkpoint is not looked at, because a file from
    somebody else must not make a connection. Raises ConfigError for a recipe that cannot be used here, CheckpointError
    for a file that cannot be read.
    """
    if run.recipe:
        return run
    places = [path / "config.json", path / "environment.json"] if path else []
    places += [(start or Path(run.checkpoint)) / "environment.json"] if run.checkpoint else []
    for place in places:
        if place.exists():
            values = read_json(place, CheckpointError, "restore it from where the run was made").get("recipe")
            if values:
                return replace(run, recipe=recipe_of(values, place))
    return run


def recipe_of(values: Any, where: Path | str) -> Recipe:
    """The recipe from a file. Raises ConfigError with ``where`` if it cannot be read or used."""
    try:
        recipe = read_recipe(values) or Recipe()
        check_recipe(recipe)
    except ConfigError as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error
    return recipe
