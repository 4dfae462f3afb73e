"""A study: a grid of runs (variants x tasks x seeds) from one file (`training.study_file`), several at a time, resumable.

Each run is a separate process (`localmotion pretrain | finetune | train`, or another stage) with its own directory below
OUT/runs. Its output goes to OUT/console. Seed 0 of all variants comes before seed 1, so a study that is stopped early still
compares all variants. If the command is repeated, it skips finished runs and continues stopped ones. A failed run is
reported and does not stop the others, except those that start from it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from localmotion import methods
from localmotion.console import say
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.files import links_trusted, read_json, write_json
from localmotion.machine import cores
from localmotion.runs.rundir import claimed
from localmotion.runs.sharing import is_shared, resolve
from localmotion.training.interrupt import StopRequest
from localmotion.training.study_file import Job, load_study, slug
from localmotion.training.tracking import check_trackers

PATIENCE = 120.0  # seconds that interrupted runs have to save


class RunsFailedError(LocalmotionError):
    """Some runs of a study failed. The others have finished."""


def run_study(path: Path, out: Path, *, jobs: int = 0, track: Sequence[str] = ()) -> None:
    """Run the unfinished runs of the study below ``out``/runs, ``jobs`` processes at a time (0: one for each core).

    ``track``: experiment trackers of each run (`tracking.NAMES`).

    Raises ConfigError as `study_file.read_study` does, and if ``out`` holds another study. Raises CheckpointError if a study is
    already running there or if nothing can be written. At the end, raises RunsFailedError with the names of the failed
    runs.
    """
    todo = load_study(path)
    check_trackers(track)
    with claimed(out, "study"):
        _run_study(path, out, todo, jobs, track)


def _run_study(path: Path, out: Path, todo: Sequence[Job], jobs: int, track: Sequence[str]) -> None:
    _same_study(path, out, todo)
    jobs = jobs or cores()
    done = {job.name for job in todo if state(out / "runs" / job.name) == "finished"}
    waiting = [job for job in todo if job.name not in done]
    say(f"{len(todo)} runs in {out}: {len(done)} finished, {len(waiting)} to do, {jobs} at a time")
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    failed: dict[str, str] = {}
    (out / "console").mkdir(exist_ok=True)
    starts = _starts(out, todo)
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
                    running[_start(job, out, jobs, starts, track)] = (job, time.monotonic())
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


def _starts(out: Path, todo: Sequence[Job]) -> dict[str, str]:
    """Checkpoints of the Hub that a study names, with their commits of today; a study that goes on keeps its first ones."""
    kept = out / "starts.json"
    starts: dict[str, str] = read_json(kept, ConfigError, "choose another --out") if kept.exists() else {}
    named = {text.partition("=")[2] for job in todo for text in job.settings if text.startswith("checkpoint=")}
    if new := {name: resolve(name)[1] for name in sorted(named - set(starts)) if is_shared(name)}:
        starts |= new
        write_json(kept, starts)
    return starts


def _start(job: Job, out: Path, jobs: int, starts: Mapping[str, str], track: Sequence[str]) -> subprocess.Popen[bytes]:
    arguments = job.arguments(out)
    named = next((text.partition("=")[2] for text in job.settings if text.startswith("checkpoint=")), "")
    if named in starts:
        arguments += ["--set", f"checkpoint={starts[named]}"]
    if jobs > 1 and not any(text.startswith("threads=") for text in job.settings):
        arguments += ["--set", f"threads={max(cores() // jobs, 1)}"]
    if links_trusted():
        arguments += ["--follow-links"]
    arguments += [part for text in methods.plugged_in() for part in ("--plugin", text)]
    arguments += [part for name in track for part in ("--track", name)]
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


__all__ = ["RunsFailedError", "load_study", "run_study", "slug", "state"]
