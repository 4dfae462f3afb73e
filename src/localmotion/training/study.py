"""A study: a grid of runs (variants x tasks x seeds) from one file, several at a time, resumable.

    name: small on walker
    preset: small
    settings: {threads: 1}                      # of every run
    tasks: [dmc:walker_walk]
    seeds: [0, 1]
    pretrain:                                   # made first, once; a variant names one as its checkpoint
      clips: {method: drp, settings: {data: store}}
    variants:                                   # a line of the table each
      DRP: {method: drp, checkpoint: clips}
      DRP w/o pre: {method: drp}
      DRP w/o dyn.: {method: drp, checkpoint: clips, settings: {load: "motion,image"}}
      DRP, K: {method: drp, checkpoint: clips, sweep: {keypoints: [8, 16, 32]}}    # one variant for each value
      DreamerV2: {method: dreamer_v2}

Each run is a separate process (`localmotion pretrain | finetune | train`) with its own directory below OUT/runs. Its
output goes to OUT/console. Seed 0 of all variants comes before seed 1, so a study that is stopped early still compares
all variants. If the command is repeated, it skips finished runs and continues stopped ones. A failed run is reported
and does not stop the others.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from localmotion import methods
from localmotion.config import Stage
from localmotion.console import say
from localmotion.envs import check_env
from localmotion.errors import ConfigError, LocalmotionError, unknown_name
from localmotion.files import check_tree, links_trusted, one_line, read_bytes, read_json
from localmotion.machine import cores
from localmotion.runs.rundir import claimed
from localmotion.runs.settings import compose
from localmotion.training.checks import check_learns, check_length
from localmotion.training.interrupt import StopRequest

_STUDY = {"name", "preset", "settings", "tasks", "seeds", "pretrain", "variants"}
_VARIANT = {"method", "preset", "settings", "checkpoint", "sweep", "tasks", "seeds"}
_PRETRAIN = {"method", "preset", "settings", "seed"}
MAX_STUDY, MAX_RUNS = 1 << 20, 10_000  # most bytes (and values) of a study file, and most runs that it may describe
PATIENCE = 120.0  # seconds that interrupted runs have to save


class RunsFailedError(LocalmotionError):
    """Some runs of a study failed. The others have finished."""


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


def load_study(path: Path) -> list[Job]:
    """The runs of a study file, in the order in which they start.

    Raises ConfigError if the file cannot be read, if it has unknown keys, names or settings, or if two runs would share
    a directory. The settings of all runs are checked before the first run starts.
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
    jobs: list[Job] = []
    sources: dict[str, Job] = {}
    for name, given in _table(path, study, "pretrain").items():
        _known(path, f"pre-training {name!r}", given, _PRETRAIN)
        texts = [f"seed={given.get('seed', 0)}", *common, *_pairs(path, given.get("settings"))]
        sources[name] = Job(slug(name), "pretrain", _method(path, given), str(given.get("preset", preset)), tuple(texts))
    variants = _table(path, study, "variants")
    if not variants:
        raise ConfigError(f"{path}: a study needs variants, e.g. variants: {{DRP: {{method: drp}}}}")
    for name, given in variants.items():
        _known(path, f"variant {name!r}", given, _VARIANT)
        method, checkpoint = _method(path, given), str(given.get("checkpoint") or "")
        own = [*common, *_pairs(path, given.get("settings"))]
        stage: Stage = "finetune" if checkpoint else "train"
        after = ""
        if checkpoint in sources:
            after = sources[checkpoint].name
        elif checkpoint:  # a run outside this study
            own.append(f"checkpoint={_resolved(path, checkpoint)}")
        tasks, seeds, swept = _list(path, given, study, "tasks"), _list(path, given, study, "seeds"), _sweep(path, given)
        if len(jobs) + len(tasks) * len(seeds) * math.prod(len(values) for _, values in swept) > MAX_RUNS:
            raise ConfigError(f"{path}: more than {MAX_RUNS:,} runs; make it several studies")
        for label, extra in _swept(name, swept):
            for task, seed in itertools.product(tasks, seeds):
                texts = [f"env={task}", f"seed={seed}", f"label={json.dumps(label)}", *own, *extra]
                place = f"{slug(label)}-{slug(str(task))}-{seed}"
                jobs.append(Job(place, stage, method, str(given.get("preset", preset)), tuple(texts), after))
    if wrong := next((job for job in jobs if not _value(job, "seed").isdecimal()), None):
        raise ConfigError(f"{path}: {wrong.name}: seeds are whole numbers from 0 on")
    jobs.sort(key=lambda job: int(_value(job, "seed")))  # stable: variants and tasks keep their order
    every = [*sources.values(), *jobs]
    for job in every:
        try:
            run = compose(job.method, job.stage, preset=job.preset, env=_value(job, "env"), settings=list(job.settings))
            check_length(methods.get(run.method), run)
            if run.stage != "pretrain":
                check_env(run.env, run.env_options)
                check_learns(run, run.action_repeat or 1)
        except ConfigError as error:
            raise ConfigError(f"{path}: {job.name}: {error}") from error
    if twice := next((name for name, count in Counter(job.name for job in every).items() if count > 1), None):
        raise ConfigError(f"{path}: two runs would be called {twice!r}; give variants other names, and name seeds and tasks once")
    return every


def run_study(path: Path, out: Path, *, jobs: int = 0) -> None:
    """Run the unfinished runs of the study below ``out``/runs, ``jobs`` processes at a time (0: one for each core).

    Raises ConfigError as `load_study` does, and if ``out`` holds another study. Raises CheckpointError if a study is
    already running there or if nothing can be written. At the end, raises RunsFailedError with the names of the failed
    runs.
    """
    todo = load_study(path)
    with claimed(out, "study"):
        _run_study(path, out, todo, jobs)


def _run_study(path: Path, out: Path, todo: Sequence[Job], jobs: int) -> None:
    _same_study(path, out, todo)
    jobs = jobs or cores()
    done = {job.name for job in todo if state(out / "runs" / job.name) == "finished"}
    waiting = [job for job in todo if job.name not in done]
    say(f"{len(todo)} runs in {out}: {len(done)} finished, {len(waiting)} to do, {jobs} at a time")
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    failed: dict[str, str] = {}
    (out / "console").mkdir(exist_ok=True)
    try:
        with StopRequest() as stop:
            while waiting or running:
                stop.check()
                for job in [job for job in waiting if job.after in failed]:
                    failed[job.name] = f"needs {job.after}, which failed"
                    waiting.remove(job)
                ready = [job for job in waiting if not job.after or job.after in done]
                for job in ready[: max(jobs - len(running), 0)]:
                    waiting.remove(job)
                    running[_start(job, out, jobs)] = (job, time.monotonic())
                    say(f"begins  {job.name}")
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    job, began = running.pop(process)
                    minutes = (time.monotonic() - began) / 60
                    if process.returncode == 0 and state(out / "runs" / job.name) == "finished":
                        done.add(job.name)
                        say(f"ended   {job.name}, {minutes:.1f} min; {len(done)} of {len(todo)}")
                    else:
                        failed[job.name] = _last_words(out, job, process.returncode)
                        say(f"FAILED  {job.name}: {failed[job.name]}")
    except KeyboardInterrupt:
        _stop(list(running))
        raise
    if failed:
        first = next(iter(failed))
        raise RunsFailedError(
            f"{out}: {len(failed)} of {len(todo)} runs failed, first {first}: {failed[first]}; the same command tries again"
        )


def state(run: Path) -> str:
    """The run's last status: running, finished, interrupted or failed. "" if it has not begun."""
    try:
        return str(read_json(run / "status.json", LocalmotionError, "").get("state", ""))
    except LocalmotionError:  # the file is missing or incomplete: the run begins or continues
        return ""


def slug(text: str) -> str:
    """A label as the name of a directory."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text.replace("w/o", "without")).strip("._") or "run"


def _start(job: Job, out: Path, jobs: int) -> subprocess.Popen[bytes]:
    arguments = job.arguments(out)
    if jobs > 1 and not any(text.startswith("threads=") for text in job.settings):
        arguments += ["--set", f"threads={max(cores() // jobs, 1)}"]
    if links_trusted():
        arguments += ["--follow-links"]
    arguments += [part for text in methods.plugged_in() for part in ("--plugin", text)]
    # A new session: otherwise Ctrl-C would reach the run twice, from the terminal and from `_stop`.
    with (out / "console" / f"{job.name}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "localmotion", *arguments], stdout=log, stderr=log, start_new_session=True)


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the runs to save and exit, and wait for them."""
    for process in running:
        process.send_signal(signal.SIGTERM)  # not SIGINT: a shell makes its background jobs ignore that
    until = time.monotonic() + PATIENCE
    for process in running:
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()


def _last_words(out: Path, job: Job, code: int) -> str:
    """The last line that a failed run printed, and how it ended."""
    log = out / "console" / f"{job.name}.log"
    lines = [line.strip() for line in log.read_bytes()[-4000:].decode(errors="replace").splitlines() if line.strip()]
    cause = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{(lines[-1] if lines else 'no output').removeprefix('error: ')[:300]} ({cause}; full output in {log})"


def _same_study(path: Path, out: Path, jobs: Sequence[Job]) -> None:
    """Write the study beside its runs. A study may gain runs. Raises ConfigError if an existing run has changed."""
    kept = out / "study.json"
    now = {job.name: [job.stage, job.method, job.preset, *job.settings, job.after] for job in jobs}
    if kept.exists():
        before = read_json(kept, ConfigError, "choose another --out")
        if changed := [name for name in before if name in now and before[name] != now[name]]:
            raise ConfigError(
                f"{out}: holds {changed[0]} with other settings than {path} says; choose another --out, or rename the variant"
            )
        now = before | now
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(json.dumps(now, indent=1) + "\n")
    os.replace(temporary, kept)


# -- reading the file ---------------------------------------------------------------------------------------------------


def _known(path: Path, what: str, given: Mapping[str, Any], keys: set[str]) -> None:
    for key in given:
        if key not in keys:
            raise ConfigError(f"{path}: {unknown_name(f'key of {what}', str(key), keys)}")


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


def _pairs(path: Path, settings: Any) -> list[str]:
    """Settings as name=value texts. A nested mapping is written with dots."""
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: settings are a mapping of names to values")
    out = []
    for name, value in settings.items():
        if isinstance(value, dict) and name != "env_options":
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
    """Names and values of a variant's sweep."""
    sweep = given.get("sweep") or {}
    if not isinstance(sweep, dict):
        raise ConfigError(f"{path}: sweep is a mapping of names to lists, e.g. sweep: {{keypoints: [8, 16]}}")
    found = [(str(key), values if isinstance(values, list) else [values]) for key, values in sweep.items()]
    for _, values in found:
        _json(path, values)
    return found


def _swept(name: str, sweep: Sequence[tuple[str, list[Any]]]) -> list[tuple[str, list[str]]]:
    """Labels and settings of a variant's sweep, one for each combination of the values."""
    out = []
    for combination in itertools.product(*([(key, value) for value in values] for key, values in sweep)):
        label = ", ".join([name, *(f"{key} {value}" for key, value in combination)])
        out.append((label, [f"{key}={json.dumps(value)}" for key, value in combination]))
    return out


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
