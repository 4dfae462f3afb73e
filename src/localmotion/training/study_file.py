"""The file of a study: which runs it describes, and which run each of them starts from (docs/studies.md).

    name: return against labels
    preset: tiny
    settings: {data: logs}                       # of every run
    tasks: [planar:walker_run]
    seeds: [0, 1]
    pretrain:                                    # runs that others start from
      latent: {method: lapo, per_seed: true}     # one run for each seed
      policy: {method: lapo, stage: clone, checkpoint: latent, per_seed: true}
    variants:                                    # a line of the table each
      LAPO: {method: lapo, stage: decode, checkpoint: policy, sweep: {labels: [50, 200, 1000]}}   # one variant for each value
    reference: LAPO, labels 1000                 # the table then has returns as shares of that variant's
    contrasts: {of: "LAPO, labels 1000", against: ["LAPO, labels 50"], smallest: 0.1}     # differences over paired seeds

A run is known by its entry, its seed and the values of its sweep. It starts from the run of its checkpoint's entry with the
same seed and the same values. Values that only the checkpoint's entry sweeps pass on: there is one run for each of them. A
run gets the values of its own sweep as settings, and of the others those of the model, which both runs share.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from localmotion import methods
from localmotion.config import RunConfig, Stage, leaves
from localmotion.errors import CheckpointError, ConfigError, StoreError, unknown_name
from localmotion.evaluation.contrasts import Contrast, Contrasts
from localmotion.files import check_tree, one_line, read_bytes
from localmotion.methods.base import Source
from localmotion.recording.logs import label_set
from localmotion.runs.settings import compose
from localmotion.training.checks import check_acting_stage, check_budget, check_learns, check_start, check_video_stage
from localmotion.video.store import ClipStore

_STUDY = {"name", "preset", "settings", "tasks", "seeds", "pretrain", "variants", "reference", "contrasts"}
_VARIANT = {"method", "preset", "settings", "stage", "checkpoint", "sweep", "tasks", "seeds"}
_CONTRASTS = {"of", "against", "smallest"}
_PRETRAIN = {"method", "preset", "settings", "stage", "checkpoint", "sweep", "seed", "per_seed"}
MAX_STUDY, MAX_RUNS = 1 << 20, 10_000  # most bytes (and values) of a study file, and most runs that it may describe
Values = Mapping[str, Any]
"""Values of a sweep by the names of their settings."""


@dataclass(frozen=True)
class Job:
    """One run: the name of its directory, the arguments of `localmotion`, and the run that must finish before it."""

    name: str
    stage: Stage
    method: str
    preset: str
    settings: tuple[str, ...]
    after: str = ""

    def arguments(self, out: Path) -> list[str]:
        """Command line of this run in a study at ``out``."""
        checkpoint = ["--checkpoint", str(out / "runs" / self.after)] if self.after else []
        sets = [part for text in self.settings for part in ("--set", text)]
        head = [self.stage, "--method", self.method, "--preset", self.preset, "--run", str(out / "runs" / self.name)]
        return [*head, *checkpoint, *sets]


class Study(NamedTuple):
    """What a study file says."""

    jobs: list[Job]
    """The runs in the order in which they start."""
    reference: str | float | dict[str, float | tuple[float, float]] | None
    """What returns are divided by: a variant, a return, or for each task a return or the returns that count as 0 and as 1."""
    contrasts: Contrasts | None = None
    entries: tuple[str, ...] = ()
    """Names under `pretrain`."""


@dataclass
class _Entry:
    """An entry of `pretrain`, and what is known of its runs."""

    name: str
    given: dict[str, Any]
    method: str
    stage: Stage
    combinations: list[Values]
    seeds: list[Any] = field(default_factory=list)
    """Seeds of its runs, if it is made once per seed: those of all runs that start from it."""

    @property
    def per_seed(self) -> bool:
        return bool(self.given.get("per_seed", False))

    def place(self, values: Values, seed: Any) -> str:
        """Directory of the run with these values, of which the entry may know only some."""
        known = next((known for known in self.combinations if known.items() <= values.items()), {})
        return slug(labelled(self.name, known)) + (f"-{seed}" if self.per_seed else "")


def load_study(path: Path) -> list[Job]:
    """The runs of a study file, in the order in which they start. Errors: `read_study`."""
    return read_study(path).jobs


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Raises ConfigError if the file cannot be read, if it has unknown keys, names or settings, if two runs would share
    a directory, or if a run could not begin: with the settings of all runs everything is checked that can be checked before
    the first run starts. Labels are counted if the store of logged episodes exists.
    """
    try:
        study = yaml.safe_load(read_bytes(path, MAX_STUDY))
        check_tree(study, values=MAX_STUDY)  # YAML aliases can expand a few lines to more values than memory holds
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: also a date such as 2026-13-45
        raise ConfigError(f"{path}: cannot be read as a study ({one_line(error)}); see docs/studies.md") from error
    if not isinstance(study, dict):
        raise ConfigError(f"{path}: a study is a mapping with the keys {', '.join(sorted(_STUDY))}")
    _known(path, "study", study, _STUDY)
    common, preset = _pairs(path, study.get("settings")), str(study.get("preset", "small"))
    _apart(path, "the study", study, ("env", "seed", "label"))
    entries = _entries(path, _table(path, study, "pretrain"))
    variants = _table(path, study, "variants")
    if not variants and not entries:
        raise ConfigError(f"{path}: a study needs variants, e.g. variants: {{DRP: {{method: drp}}}}, or pretrain alone")
    jobs: list[Job] = []
    grid: dict[str, tuple[list[Any], list[Any]]] = {}  # tasks and seeds of each variant
    for name, given in variants.items():
        _known(path, f"variant {name!r}", given, _VARIANT)
        _apart(path, f"variant {name!r}", given, ("env", "seed", "label"))
        method, checkpoint = _method(path, given), str(given.get("checkpoint") or "")
        stage = _stage(path, name, given, method, "finetune" if checkpoint else "train", acts=True)
        source = entries.get(checkpoint)
        own = _own(path, common, given, source)
        tasks, seeds = _list(path, given, study, "tasks"), _list(path, given, study, "seeds")
        combinations = _combinations(path, name, given, source, len(jobs) + len(tasks) * len(seeds))
        if source:
            source.seeds += [seed for seed in seeds if seed not in source.seeds]
        for values in combinations:
            grid[label := labelled(name, values)] = tasks, seeds
            extra = _texts(path, given, method, values)
            for task, seed in itertools.product(tasks, seeds):
                after = source.place(values, seed) if source else ""
                texts = [f"env={task}", f"seed={seed}", f"label={json.dumps(label)}", *own, *extra]
                place = f"{slug(label)}-{slug(str(task))}-{seed}"
                jobs.append(Job(place, stage, method, str(given.get("preset", preset)), tuple(texts), after))
    shared, made = _first(path, entries, study, common, preset)
    jobs = [*made, *jobs]
    if wrong := next((job for job in [*shared, *jobs] if not _value(job, "seed").isdecimal()), None):
        raise ConfigError(f"{path}: {wrong.name}: seeds are whole numbers from 0 on")
    jobs.sort(key=lambda job: int(_value(job, "seed")))  # stable: entries, variants and tasks keep their order
    every = [*shared, *jobs]
    if twice := next((name for name, count in Counter(job.name for job in every).items() if count > 1), None):
        raise ConfigError(f"{path}: two runs would be called {twice!r}; give variants other names, and name seeds and tasks once")
    _check(path, every)
    return Study(every, _reference(path, study, list(grid)), _contrasts(path, study, grid), tuple(entries))


# -- runs that others start from ----------------------------------------------------------------------------------------


def _entries(path: Path, table: Mapping[str, dict[str, Any]]) -> dict[str, _Entry]:
    """Entries of `pretrain`, each after the one that it starts from."""
    found: dict[str, _Entry] = {}

    def add(name: str, users: tuple[str, ...]) -> None:
        if name in found:
            return
        if name in users:
            raise ConfigError(f"{path}: pre-training {name!r} would start from itself, through {', '.join(users)}")
        given = table[name]
        _known(path, f"pre-training {name!r}", given, _PRETRAIN)
        _apart(path, f"pre-training {name!r}", given, ("seed",))
        checkpoint = str(given.get("checkpoint") or "")
        if checkpoint in table:
            add(checkpoint, (*users, name))
        source = found.get(checkpoint)
        method = _method(path, given)
        stage = _stage(path, name, given, method, "pretrain", acts=False)
        entry = _Entry(name, given, method, stage, _combinations(path, name, given, source, 1))
        if entry.per_seed and "seed" in given:
            raise ConfigError(f"{path}: pre-training {name!r}: per_seed takes the study's seeds; leave seed out")
        if source and source.per_seed and not entry.per_seed:
            raise ConfigError(
                f"{path}: pre-training {name!r} starts from {checkpoint!r}, which has a run per seed: add per_seed: true"
            )
        found[name] = entry

    for name in table:
        add(name, ())
    return found


def _first(
    path: Path, entries: Mapping[str, _Entry], study: Mapping[str, Any], common: list[str], preset: str
) -> tuple[list[Job], list[Job]]:
    """Runs of the entries: those made once, and those made once per seed."""
    for entry in reversed(list(entries.values())):  # what starts from an entry comes after it
        source = entries.get(str(entry.given.get("checkpoint") or ""))
        if entry.per_seed and not entry.seeds:
            entry.seeds = list(_list(path, {}, study, "seeds"))
        if source and entry.per_seed:
            source.seeds += [seed for seed in entry.seeds if seed not in source.seeds]
    once: list[Job] = []
    each: list[Job] = []
    for entry in entries.values():
        given, source = entry.given, entries.get(str(entry.given.get("checkpoint") or ""))
        own = _own(path, common, given, source)
        seeds = entry.seeds if entry.per_seed else [given.get("seed", 0)]
        if len(once) + len(each) + len(seeds) * len(entry.combinations) > MAX_RUNS:
            raise ConfigError(f"{path}: more than {MAX_RUNS:,} runs; make it several studies")
        for values, seed in itertools.product(entry.combinations, seeds):
            texts = (f"seed={seed}", *own, *_texts(path, given, entry.method, values))
            after = source.place(values, seed) if source else ""
            job = Job(entry.place(values, seed), entry.stage, entry.method, str(given.get("preset", preset)), texts, after)
            (each if entry.per_seed else once).append(job)
    return once, each


def _combinations(path: Path, name: str, given: Mapping[str, Any], source: _Entry | None, runs: int) -> list[Values]:
    """The values of each run of an entry. ``runs``: number of runs for each of them."""
    sweep = _sweep(path, given)
    before: list[Values] = source.combinations if source else [{}]
    count = len(before) * math.prod(len(values) for _, values in sweep)
    if not count:
        raise ConfigError(f"{path}: {name!r}: a sweep has no values")
    if runs * count > MAX_RUNS:
        raise ConfigError(f"{path}: more than {MAX_RUNS:,} runs; make it several studies")
    out: list[Values] = []
    for pairs in itertools.product(*([(key, value) for value in values] for key, values in sweep)):
        own = dict(pairs)
        joined = [{**known, **own} for known in before if all(own.get(key, value) == value for key, value in known.items())]
        if not joined:
            wanted = labelled("", own).removeprefix(", ")
            raise ConfigError(f"{path}: {name!r} starts from {source.name if source else ''!r}, which has no run with {wanted}")
        out += joined
    return out


def labelled(name: str, values: Values) -> str:
    """An entry's name with the values of its sweep, e.g. "LAPO, labels 50"."""
    return ", ".join([name, *(f"{key} {value}" for key, value in values.items())])


def _own(path: Path, common: list[str], given: Mapping[str, Any], source: _Entry | None) -> list[str]:
    """Settings of an entry's runs: the study's and its own, and the checkpoint if it is a run outside this study."""
    own, checkpoint = [*common, *_pairs(path, given.get("settings"))], given.get("checkpoint")
    return [*own, f"checkpoint={_resolved(path, str(checkpoint))}"] if checkpoint and not source else own


def _texts(path: Path, given: Mapping[str, Any], method: str, values: Values) -> list[str]:
    """The values of a run that are settings of it: those of its entry's own sweep, and those of the model."""
    own = {key for key, _ in _sweep(path, given)}
    model = {name for name, _ in leaves(methods.get(method).Config())}
    model |= {name.rpartition(".")[2] for name in model}
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if key in own or key.removeprefix("model.") in model]


# -- checks -------------------------------------------------------------------------------------------------------------


def _check(path: Path, jobs: Sequence[Job]) -> None:
    """Raise ConfigError for a run that could not begin."""
    by_name = {job.name: job for job in jobs}
    counted: set[tuple[str, int, int]] = set()
    for job in jobs:
        try:
            cls = methods.get(job.method)
            run = settings_of(job)
            run = replace(run, checkpoint=job.after) if job.after else run
            if cls.stages.get(run.stage, Source.CLIPS) is Source.CLIPS:
                check_video_stage(cls, run)
            else:
                check_acting_stage(cls, run)
                if not run.data and cls.stages[run.stage] is Source.REPLAY:
                    check_learns(run, run.action_repeat or 1)
                elif not run.data and cls.stages[run.stage] is Source.ROLLOUT:
                    check_budget(run, run.action_repeat or 1)
            if job.after:
                before = by_name[job.after]
                check_start(cls, run, before.name, methods.get(before.method), before.stage)
            if run.labels and (key := (run.data, run.labels, run.seed)) not in counted:
                counted.add(key)
                _count_labels(run)
        except (ConfigError, CheckpointError, StoreError) as error:
            raise ConfigError(f"{path}: {job.name}: {error}") from error


def settings_of(job: Job) -> RunConfig:
    """Settings of a run, without the checkpoint that is a run of the study. Raises ConfigError as `compose` does."""
    return compose(job.method, job.stage, preset=job.preset, env=_value(job, "env"), settings=list(job.settings))


def _count_labels(run: RunConfig) -> None:
    """Raise StoreError if the store of logged episodes exists and has fewer transitions than ``run.labels``."""
    if Path(run.data).exists():
        label_set(ClipStore(Path(run.data)), run.labels, run.seed)


def _reference(
    path: Path, study: Mapping[str, Any], labels: Sequence[str]
) -> str | float | dict[str, float | tuple[float, float]] | None:
    """What returns are divided by. Raises ConfigError for an unknown variant and for a return that is not above 0."""
    given = study.get("reference")
    if given is None:
        return None
    if isinstance(given, str):
        if given not in labels:
            raise ConfigError(f"{path}: reference: {unknown_name('variant', given, labels)}")
        return given
    found: dict[str, float | tuple[float, float]] = {}
    for task, value in (given if isinstance(given, dict) else {"": given}).items():
        ends = value if isinstance(value, list) and isinstance(given, dict) else [0, value]
        if len(ends) != 2 or not all(map(_finite, ends)) or ends[0] >= ends[1]:
            raise ConfigError(
                f"{path}: reference is a variant, a return above 0, or a mapping of tasks to returns above 0 or to pairs"
                " [return of the random policy, return above it]"
            )
        found[str(task)] = (float(ends[0]), float(ends[1])) if ends is value else float(value)
    return found if isinstance(given, dict) else found[""]  # type: ignore[return-value]


def _contrasts(path: Path, study: Mapping[str, Any], grid: Mapping[str, tuple[list[Any], list[Any]]]) -> Contrasts | None:
    """The family of contrasts. Raises ConfigError for an unknown variant and for two that share no task or no seed."""
    given = study.get("contrasts")
    if given is None:
        return None
    if not isinstance(given, dict) or not {"of", "against"} <= set(given):
        raise ConfigError(f"{path}: contrasts is a mapping, e.g. contrasts: {{of: DRP, against: [IPV, APV], smallest: 0.02}}")
    _known(path, "contrasts", given, _CONTRASTS)
    of, against = str(given["of"]), given["against"]
    against = [str(name) for name in (against if isinstance(against, list) else [against])]
    if unknown := next((name for name in [of, *against] if name not in grid), None):
        raise ConfigError(f"{path}: contrasts: {unknown_name('variant', unknown, grid)}")
    if not against or len({of, *against}) <= len(against):
        raise ConfigError(f"{path}: contrasts: name each variant once")
    smallest = given.get("smallest")
    if smallest is not None and not (_finite(smallest) and smallest > 0):
        raise ConfigError(f"{path}: contrasts: smallest is the smallest difference that matters, a number above 0")
    pairs = []
    for name in against:
        tasks = tuple(str(task) for task in grid[of][0] if task in grid[name][0])
        seeds, others = ({int(seed) for seed in grid[variant][1]} for variant in (of, name))
        if not tasks or not seeds & others:
            raise ConfigError(f"{path}: contrasts: {of!r} and {name!r} share no {'seed' if tasks else 'task'}")
        pairs.append(Contrast(of, name, tasks, tuple(sorted(seeds | others))))
    return Contrasts(tuple(pairs), None if smallest is None else float(smallest))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -- reading values -----------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    """A label as the name of a directory."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text.replace("w/o", "without")).strip("._") or "run"


def _known(path: Path, what: str, given: Mapping[str, Any], keys: set[str]) -> None:
    for key in given:
        if key not in keys:
            raise ConfigError(f"{path}: {unknown_name(f'key of {what}', str(key), keys)}")


def _apart(path: Path, what: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ConfigError for a setting that says what tells runs apart: runs of several seeds or tasks would be copies of one."""
    settings = given.get("settings")
    for name in names:
        if name in (settings if isinstance(settings, dict) else {}) or name in dict(_sweep(path, given)):
            own = {"env": "tasks", "seed": "seeds", "label": "the names of variants"}[name]
            if what.startswith("pre-training"):
                own = "seed or per_seed of the entry"
            raise ConfigError(f"{path}: {what}: {name} is not a setting here, it tells runs apart; use {own}")


def _table(path: Path, study: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    table = study.get(key) or {}
    if not isinstance(table, dict) or not all(isinstance(value, dict) for value in table.values()):
        raise ConfigError(f"{path}: {key} is a mapping of names to mappings, e.g. {key}: {{DRP: {{method: drp}}}}")
    return {str(name): value for name, value in table.items()}


def _method(path: Path, given: Mapping[str, Any]) -> str:
    name = str(given.get("method", ""))
    if name not in methods.names():
        raise ConfigError(f"{path}: {methods.unknown(name)}")
    return name


def _stage(path: Path, name: str, given: Mapping[str, Any], method: str, usual: str, *, acts: bool) -> Stage:
    """The stage of an entry. Raises ConfigError for a variant whose result cannot act."""
    stage, cls = str(given.get("stage") or usual), methods.get(method)
    if "stage" in given and stage not in cls.stages:
        raise ConfigError(f"{path}: {name!r}: {unknown_name(f'stage of {method}', stage, cls.stages)}")
    if acts and "stage" in given and stage not in cls.acts_after:
        raise ConfigError(f"{path}: variant {name!r}: after {stage}, {method} cannot act; name it under pretrain")
    return stage


def _pairs(path: Path, settings: Any) -> list[str]:
    """Settings as name=value texts. A nested mapping is written with dots, except for the two settings that are mappings."""
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: settings are a mapping of names to values")
    out = []
    for name, value in settings.items():
        if isinstance(value, dict) and name not in ("env_options", "recipe"):
            out += [f"{name}.{text}" for text in _pairs(path, value)]
        else:
            out.append(f"{name}={_json(path, value)}")
    return out


def _json(path: Path, value: Any) -> str:
    """A YAML value as JSON. Raises ConfigError for values that JSON does not have: dates, sets, bytes."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {value!r:.60} is neither text nor a number, list or mapping; put quotes around it") from error


def _sweep(path: Path, given: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    """Names and values of an entry's sweep."""
    sweep = given.get("sweep") or {}
    if not isinstance(sweep, dict):
        raise ConfigError(f"{path}: sweep is a mapping of names to lists, e.g. sweep: {{keypoints: [8, 16]}}")
    found = [(str(key), values if isinstance(values, list) else [values]) for key, values in sweep.items()]
    for _, values in found:
        _json(path, values)
    return found


def _list(path: Path, given: Mapping[str, Any], study: Mapping[str, Any], key: str) -> list[Any]:
    values = given.get(key, study.get(key, [0] if key == "seeds" else None))
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path}: {key} is a list, e.g. {'[0, 1]' if key == 'seeds' else '[dmc:walker_walk]'}")
    return values


def _resolved(path: Path, checkpoint: str) -> Path:
    """The checkpoint's path, relative to the study file if it exists there."""
    near = path.parent / checkpoint
    return near if near.exists() else Path(checkpoint)


def _value(job: Job, key: str) -> str:
    return next((text.partition("=")[2] for text in job.settings if text.startswith(f"{key}=")), "")
