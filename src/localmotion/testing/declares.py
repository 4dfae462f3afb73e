"""What a class says of itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from localmotion.config import PRESETS, RunConfig, field_docs
from localmotion.errors import ConfigError
from localmotion.files import one_line
from localmotion.methods.base import Method, Source
from localmotion.runs.settings import compose
from localmotion.suites import SUITES
from localmotion.testing.batches import ACTIONS, SIZE
from localmotion.testing.rules import Found, Rule, Subject, require, rule

ENVS = ("metaworld:reach", "dmc:walker_run", "dmcr:hopper_stand", "toy:dot", "gym:Pendulum-v1")
"""One environment of each kind of suite."""


@rule
def declares_its_members(subject: Subject) -> None:
    """`name`, `paper`, `Config`, `stages` and the docstrings are there; every setting has a docstring line."""
    cls: Any = subject.method
    for name in ("name", "paper"):
        text = getattr(cls, name, None)
        require(isinstance(text, str) and bool(text), f"{name} is {text!r}", f'write `{name} = "..."` in the class')
    require(bool(cls.__doc__) and cls.__doc__ != Method.__doc__, "the class has no docstring", "say in one line what it does")
    config = getattr(cls, "Config", None)
    frozen = isinstance(config, type) and dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(frozen, f"Config is {config!r}", "make it a class with @dataclass(frozen=True)")
    lacking = [item.name for item in dataclasses.fields(cls.Config) if not _documented(cls.Config, item)]
    require(not lacking, f"the settings {lacking} have no docstring", "write a line in triple quotes under each field")
    stages = cls.stages
    require(
        bool(stages) and all(isinstance(source, Source) for source in stages.values()),
        f"stages are {stages!r}",
        'name each stage and its source, e.g. {"pretrain": Source.CLIPS}',
    )
    suites = {key.partition(":")[0] for key in cls.SUITES}
    require(
        suites <= set(SUITES), f"SUITES names {sorted(suites - set(SUITES))}", f"known suites are {', '.join(sorted(SUITES))}"
    )


def _documented(config: type, item: dataclasses.Field[Any]) -> bool:
    """Whether a setting has its line. A group of settings has lines of its own."""
    return item.name in field_docs(config) or dataclasses.is_dataclass(getattr(config(), item.name))


@rule
def presets_compose(subject: Subject) -> None:
    """All four presets compose for all stages, and no smaller preset has a larger budget than `paper`."""
    cls = subject.method
    lacking = sorted(set(PRESETS) - set(cls.PRESETS))
    require(not lacking, f"PRESETS lacks {lacking}", "use `presets` or `budgets` of localmotion.methods.sizes")
    for preset in PRESETS:
        for stage, source in cls.stages.items():
            for env in ("",) if source is Source.CLIPS else ENVS:
                run = _composed(cls, stage, preset, env)
                require(isinstance(run.model, cls.Config), f"model settings are {type(run.model).__name__}", "use Config")
                require(run.pretrain.updates > 0, f"preset {preset} makes no updates", "set pretrain.updates")
    if "train" in cls.stages:
        for preset in PRESETS:
            order = ("debug", preset, "paper")
            budgets = [_composed(cls, "train", p, "dmc:walker_run").online.env_steps for p in order]
            require(
                budgets == sorted(budgets), f"{order} have env_steps {budgets}", "lower online.env_steps of the smaller preset"
            )


def _composed(cls: type[Method], stage: str, preset: str, env: str) -> RunConfig:
    """The settings of a preset. Where they do not fit the method, the fix is in the class, not where they are composed."""
    try:
        return compose(cls, stage, preset=preset, env=env)
    except ConfigError as error:
        where = f"PRESETS or SUITES, preset {preset} of stage {stage}{f' in {env}' if env else ''}: "
        raise Found(
            where + one_line(error, 300),
            "let them set only what Config has; `presets` of localmotion.methods.sizes sets model.world and model.behaviour, `budgets` only"
            " what it is given",
        ) from error


def composes(subject: Subject) -> bool:
    """Whether the settings of the stage compose at all. Else `presets_compose` fails, and every rule that builds the method too."""
    env = "" if subject.source is Source.CLIPS else ENVS[-1]
    try:
        compose(subject.method, subject.stage, preset=subject.preset, env=env)
    except (ConfigError, KeyError):  # KeyError: the preset is lacking
        return False
    return True


@rule
def models_build_without_memory(subject: Subject) -> None:
    """`__init__` works on torch's device "meta": a run is read by building its model without memory first."""
    for stage in subject.method.stages:
        at = subject.at(stage)
        real = {key: value.shape for key, value in at.build().state_dict().items()}
        with torch.device("meta"):
            meta = subject.method(at.run.model, image_size=SIZE, action_dim=ACTIONS if at.acts else None)
        require(
            real == {key: value.shape for key, value in meta.state_dict().items()},
            f"stage {stage}: other weights on the device meta",
            "let no value of a tensor decide about a size",
        )


@rule
def transfers_fit(subject: Subject) -> None:
    """Each entry of `transfers` names a child module of an earlier stage and one of a later stage with the same weights."""
    cls = subject.method
    earlier: dict[str, dict[str, Any]] = {}  # shapes of each child of an earlier offline stage
    placed = set()
    for stage, source in cls.stages.items():
        method = subject.at(stage).build()
        shapes = {name: {k: v.shape for k, v in child.state_dict().items()} for name, child in method.named_children()}
        for theirs, ours in cls.transfers.items():
            if ours not in shapes or theirs not in earlier:
                continue
            placed.add(theirs)
            require(
                earlier[theirs] == shapes[ours] and bool(shapes[ours]),
                f"{theirs!r} of an earlier stage and {ours!r} of stage {stage} have other weights",
                "build both with the same settings",
            )
        if source in (Source.CLIPS, Source.LOGGED):
            earlier |= shapes
    lost = sorted(set(cls.transfers) - placed)
    require(not lost, f"no later stage takes over {lost}", "name child modules: in the checkpoint -> in the later stage")


DECLARES: tuple[Rule, ...] = (declares_its_members, presets_compose, models_build_without_memory, transfers_fit)
