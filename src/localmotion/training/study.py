"""A study: a grid of runs (variants x tasks x seeds) from one file (`training.study_file`), several at a time, resumable.

Each run is a command (`localmotion pretrain | finetune | train`, or another stage) with its own directory below OUT/runs, which
an engine of `launch` runs. Its output goes to OUT/console. Seed 0 of all variants comes before seed 1, so a study that is
stopped early still compares all variants. If the command is repeated, it skips finished runs and continues stopped ones. A
failed run is reported and does not stop the others, except those that start from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from localmotion import methods
from localmotion.console import say
from localmotion.errors import ConfigError, LocalmotionError, did_you_mean
from localmotion.files import links_trusted, read_json, write_json
from localmotion.launch import Command, Launch, carry_out
from localmotion.machine import cores
from localmotion.runs.rundir import begun, claimed
from localmotion.runs.sharing import is_shared, resolve
from localmotion.training.interrupt import StopRequest
from localmotion.training.study_file import Job, load_study, read_study, settings_of, slug
from localmotion.training.tracking import check_trackers
from localmotion.video.remote import is_remote


class RunsFailedError(LocalmotionError):
    """Some runs of a study failed. The others have finished."""


def run_study(path: Path, out: Path, launch: Launch = Launch(), *, track: Sequence[str] = ()) -> None:  # noqa: B008
    """Run the unfinished runs of the study below ``out``/runs.

    ``launch``: the engine, and how many runs at a time. By default one process for each core of this machine.
    ``track``: experiment trackers of each run (`tracking.NAMES`).

    Raises ConfigError as `study_file.read_study` and `Launch.engine` do, if a store or checkpoint does not exist, and if ``out`` holds
    another study. Raises CheckpointError if a study is already running there or if nothing can be written. At the end, raises
    RunsFailedError with the names of the failed runs.
    """
    todo, _, _, entries = read_study(path)
    check_trackers(track)
    launch.check()
    _check_places(path, out, todo, entries)
    with claimed(out, "study"):
        _same_study(path, out, todo)
        done = [job.name for job in todo if state(out / "runs" / job.name) == "finished"]
        if launch.name == "local":
            launch = launch._replace(jobs=launch.jobs or cores())
        limit = f", {launch.jobs} at a time" if launch.jobs else ""
        say(f"{len(todo)} runs in {out}: {len(done)} finished, {len(todo) - len(done)} to do{limit}")
        if len(done) == len(todo):
            return
        (out / "console").mkdir(exist_ok=True)
        starts = _starts(out, todo)
        failed = carry_out(
            launch.engine(out / "launch"),
            [_command(job, out, starts, track) for job in todo],
            done=done,
            jobs=launch.jobs,
            pack=launch.pack,
            stop=StopRequest(),
            finished=lambda name: state(out / "runs" / name) == "finished",
        )
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


class Found(NamedTuple):
    """What the folder of a study holds."""

    runs: list[Path]
    """Runs of the study file that have logged something, sorted by name."""
    missing: list[str]
    """Its other runs, with their states."""
    left_out: list[str]
    """Names of runs in the folder that are not in the study file."""


def runs_of(out: Path, jobs: Sequence[Job]) -> Found:
    """The runs below ``out``/runs that belong to ``jobs``. Others stay on disk, for example those of a variant that was renamed."""
    there = {path.parent for name in ("config.json", "metrics.jsonl") for path in (out / "runs").glob(f"*/{name}")}
    known = {out / "runs" / job.name: job for job in jobs}
    runs = sorted(path for path in known if (path / "metrics.jsonl").is_file())
    begun = set(runs)
    missing = [f"{job.name} ({_unlogged(path)})" for path, job in known.items() if path not in begun]
    return Found(runs, missing, sorted(path.name for path in there - set(known)))


def _unlogged(path: Path) -> str:
    """The state of a run without metrics.jsonl, in words."""
    found = state(path)
    return "finished, but its metrics.jsonl is missing" if found == "finished" else found or "not begun"


def _starts(out: Path, todo: Sequence[Job]) -> dict[str, str]:
    """Checkpoints of the Hub that a study names, with their commits of today; a study that goes on keeps its first ones."""
    kept = out / "starts.json"
    starts: dict[str, str] = read_json(kept, ConfigError, "choose another --out") if kept.exists() else {}
    named = {text.partition("=")[2] for job in todo for text in job.settings if text.startswith("checkpoint=")}
    if new := {name: resolve(name)[1] for name in sorted(named - set(starts)) if is_shared(name)}:
        starts |= new
        write_json(kept, starts)
    return starts


def _check_places(path: Path, out: Path, jobs: Sequence[Job], entries: Sequence[str]) -> None:
    """Raise ConfigError for an unfinished run whose store or checkpoint does not exist and is not a run of this study.

    ``entries``: names under `pretrain`, which a misspelt checkpoint may mean.
    """
    made: set[Path] = set()  # by the jobs before this one
    for job in jobs:
        made.add((out / "runs" / job.name).resolve())
        if state(out / "runs" / job.name) == "finished":
            continue
        run = settings_of(job)
        for name, data in (("data", run.data), ("rehearsal.data", run.rehearsal.data)):
            if data and not is_remote(data) and not (Path(data) / "store.json").exists():
                near = did_you_mean(data, _beside(data, "store.json"))
                raise ConfigError(f"{path}: {job.name}: {name}: {data}: no clip store there (no store.json){near}")
        start = run.checkpoint
        if not start or is_shared(start) or Path(start).resolve() in made or (Path(start) / "config.json").exists():
            continue
        known = f"; the file's are {', '.join(entries)}" if entries else ""
        raise ConfigError(
            f"{path}: {job.name}: checkpoint {start!r} is no pre-training of this file{known}, and no run on disk"
            f"{did_you_mean(start, [*entries, *_beside(start, 'config.json')])}"
        )


def _beside(place: str, holds: str) -> list[str]:
    """Folders beside a path that have the file ``holds``, written as the path is."""
    parent = Path(place).parent
    try:
        return sorted(str(parent / entry.name) for entry in parent.iterdir() if (entry / holds).exists())
    except OSError:
        return []


def _command(job: Job, out: Path, starts: Mapping[str, str], track: Sequence[str]) -> Command:
    arguments = job.arguments(out)
    named = next((text.partition("=")[2] for text in job.settings if text.startswith("checkpoint=")), "")
    if named in starts:
        arguments += ["--set", f"checkpoint={starts[named]}"]
    if links_trusted():
        arguments += ["--follow-links"]
    arguments += [part for text in methods.plugged_in() for part in ("--plugin", text)]
    arguments += [part for name in track for part in ("--track", name)]
    share = () if any(text.startswith("threads=") for text in job.settings) else ("--set", "threads={}")
    log = (out / "console" / f"{job.name}.log").resolve()
    return Command(job.name, tuple(arguments), str(log), str(Path.cwd()), job.after, share)


def _same_study(path: Path, out: Path, jobs: Sequence[Job]) -> None:
    """Write the study beside its runs. A study may gain runs and change those that have not begun.

    Raises ConfigError if another run has changed.
    """
    kept = out / "study.json"
    now = {job.name: [job.stage, job.method, job.preset, *job.settings, job.after] for job in jobs}
    if kept.exists():
        before = read_json(kept, ConfigError, "choose another --out")
        for name in before:
            run = out / "runs" / name
            if before[name] != now.get(name, before[name]) and (begun(run) or state(run) == "running"):
                differ = _differences(before[name], now[name])
                raise ConfigError(
                    f"{out}: holds {name} with other settings than {path} says: {differ}; choose another --out, or rename the variant"
                )
        now = before | now
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(json.dumps(now, indent=1) + "\n")
    os.replace(temporary, kept)


def _differences(before: Sequence[str], now: Sequence[str]) -> str:
    """What differs between two entries of study.json, with both values."""

    def named(entry: Sequence[str]) -> dict[str, str]:
        settings = (text.partition("=") for text in entry[3:-1])
        return {
            **dict(zip(("stage", "method", "preset"), entry[:3], strict=True)),
            **{k: v for k, _, v in settings},
            "starts from": entry[-1],
        }

    there, here = named(before), named(now)
    differ = [
        f"{key} ({there.get(key, 'not set')} there, {here.get(key, 'not set')} now)"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]
    return ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "") or "their order"


__all__ = ["RunsFailedError", "load_study", "run_study", "runs_of", "slug", "state"]
