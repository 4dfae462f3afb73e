"""`make mutants`: wrong edits that the tests must notice, made one at a time in a copy of this tree.

The edits are lists in `tests/mutants/*.yaml`; tests/README.md explains an entry. Each edit runs in a separate process.
It is forked from a process that has loaded torch and pytest, but nothing of localmotion, so that a run takes little
more time than its tests.

Exit codes: 0 every edit is caught, 1 an edit survived or could not be tried, 2 an entry is wrong.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import hashlib
import importlib
import json
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("runs/mutants.json")
KEYS = {"what", "file", "old", "new", "tests", "equivalent"}
# Modules that most tests load and that are safe to fork: no GPU, no graphics, no threads. Missing modules are skipped.
PRELOAD = (
    "pytest,numpy,yaml,torch,torch._dynamo,cv2,hypothesis,jaxtyping,beartype,safetensors.torch,rich.console"
    ",scipy.stats,sklearn.manifold,matplotlib.pyplot,av"
)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PATIENCE = (60.0, 5.0)  # time limit: these seconds, plus this factor times the seconds without an edit

CAUGHT, TIMEOUT, SURVIVED, BROKEN = "caught", "caught by the time limit", "SURVIVED", "BROKEN"


class Mutant(NamedTuple):
    """One wrong edit: `old` becomes `new` in `file`.

    Either one of `tests` must fail, or `equivalent` says why none can.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str
    listed: str  # name of the list that holds it

    @property
    def name(self) -> str:
        return f"{self.listed}: {self.what}"


# ------------------------------------------------------------------------------------------------------------ entries


def load(root: Path) -> tuple[list[Mutant], list[str]]:
    """Every entry of `tests/mutants/*.yaml`, and the errors of entries that cannot be read."""
    mutants, wrong = [], []
    for path in sorted((root / "tests" / "mutants").glob("*.yaml")):
        entries = yaml.safe_load(path.read_text())
        if not isinstance(entries, list):
            wrong.append(f"{path.name}: is not a list of entries")
            continue
        for number, entry in enumerate(entries, 1):
            problem = misread(entry)
            if problem:
                wrong.append(f"{path.name}: entry {number}: {problem}")
                continue
            mutants.append(
                Mutant(
                    " ".join(entry["what"].split()),
                    entry["file"],
                    *(entry[key].removesuffix("\n") for key in ("old", "new")),
                    tuple(entry.get("tests", ())),
                    entry.get("equivalent", ""),
                    path.stem,
                )
            )
    return mutants, wrong


def misread(entry: Any) -> str:
    """The reason why an entry cannot be read, or ""."""
    if not isinstance(entry, dict):
        return "is not a mapping"
    if unknown := set(entry) - KEYS:
        return f"unknown keys {sorted(unknown)}"
    for key in ("what", "file", "old", "new"):
        if not isinstance(entry.get(key), str) or not (entry[key].strip() or key == "new"):
            return f"{key!r} is missing or not text"
    tests, reason = entry.get("tests", []), entry.get("equivalent", "")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests) or not isinstance(reason, str):
        return "'tests' is a list of texts, 'equivalent' a text"
    if bool(tests) == bool(reason.strip()):
        return "has either 'tests' or 'equivalent' with the reason"
    return ""


def validate(root: Path, mutants: Iterable[Mutant]) -> list[str]:
    """Errors of readable entries, one line each."""
    wrong = []
    seen: dict[tuple[str, str, str], str] = {}
    for mutant in mutants:
        problems = [misplaced(root, mutant), *(unknown_test(root, test) for test in mutant.tests)]
        edit = (mutant.file, mutant.old, mutant.new)
        if edit in seen:
            problems.append(f"is the same edit as {seen[edit]!r}")
        seen[edit] = mutant.name
        wrong += [f"{mutant.name}: {problem}" for problem in problems if problem]
    return wrong


def misplaced(root: Path, mutant: Mutant) -> str:
    path = root / mutant.file
    if not path.is_file():
        return f"there is no file {mutant.file}"
    text = path.read_text()
    count = text.count(mutant.old)
    if count != 1:
        return f"'old' occurs {count} times in {mutant.file}"
    edited = text.replace(mutant.old, mutant.new)
    try:
        tree = ast.parse(edited)
    except SyntaxError as error:
        return f"the edited {mutant.file} is not Python: {error.msg}, line {error.lineno}"
    # Comparing syntax trees takes time, and is needed only if the edit may change nothing but spaces and comments.
    alike = "".join(mutant.old.split()) == "".join(mutant.new.split()) or "#" in mutant.old + mutant.new
    return "'new' is the same code as 'old'" if alike and ast.dump(tree) == ast.dump(ast.parse(text)) else ""


def unknown_test(root: Path, test: str) -> str:
    file, *names = test.split("::")
    if not (root / file).is_file():
        return f"there is no test file {file}"
    text = (root / file).read_text()
    for name in names:
        bare = name.split("[")[0]
        if not re.search(rf"^\s*(def|class) {re.escape(bare)}\b", text, re.MULTILINE):
            return f"there is no {bare} in {file}"
    return ""


# ----------------------------------------------------------------------------------------------------- the one process


def preload(names: str) -> None:
    """Load the modules that every test run needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in filter(None, names.split(",")):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    loaded = [name for name in sys.modules if name.split(".")[0] == "localmotion"]
    assert not loaded, f"the edited package is loaded before the edit: {loaded}"


def start(tree: Path, tests: Iterable[str], log: Path) -> int:
    """Fork a process that runs pytest on `tests` in `tree` and exits with pytest's exit code.

    Returns the process id, which is also the id of its process group.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the child may already have done this, or have ended
            os.setpgid(pid, pid)
        return pid
    code = 3  # pytest's own for an internal error
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        os.chdir(tree)
        # The copy takes precedence over an installed localmotion, here and in every process that a test starts.
        os.environ |= {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[:] = [str(tree / "src"), *(entry for entry in sys.path if entry not in ("", str(ROOT), str(ROOT / "tools")))]
        sys.dont_write_bytecode = True
        import pytest

        loaded = "ignore::pytest.PytestAssertRewriteWarning"  # plugins that were loaded before
        where = f"--basetemp={tree.parent / 'tmp'}"
        code = int(pytest.main(["-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "-W", loaded, where, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def copies(root: Path, count: int, into: Path) -> list[Path]:
    """Make `count` copies of the files that git lists in `root`, or of all files if `root` is no checkout.

    Source is compiled once. Python checks a compiled file by the content of its source, because an edit may keep the
    file's size and its time in seconds.
    """
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-coz", "--exclude-standard", "."], capture_output=True, text=True, check=False
    )
    first = into / "0" / "tree"
    if listed.returncode == 0:
        for name in filter(None, listed.stdout.split("\0")):
            if (root / name).is_file():
                (first / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, first / name)
    else:
        shutil.copytree(root, first, ignore=shutil.ignore_patterns(".venv*", "__pycache__", "runs", ".git"))
    compileall.compile_dir(first / "src", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    for number in range(1, count):
        shutil.copytree(first, into / str(number) / "tree")
    return [into / str(number) / "tree" for number in range(count)]


# --------------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    """Tests to run, with or without an edit."""

    tests: tuple[str, ...]
    limit: float  # seconds
    mutant: Mutant | None = None
    tree: Path = Path()
    pid: int = 0
    started: float = 0.0


class Done(NamedTuple):
    job: Job
    code: int | None  # pytest's; None: over the limit
    seconds: float
    tail: str  # the end of pytest's output


def run(jobs: list[Job], trees: list[Path]) -> Iterator[Done]:
    """Run the jobs, at most one in each tree at a time. Yields each job after its end; its tree is then restored."""
    waiting, free, running = list(jobs), list(trees), list[Job]()
    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                job.tree = free.pop()
                write(job, edited=True)
                job.started = time.monotonic()
                job.pid = start(job.tree, job.tests, job.tree.parent / "log")
                running.append(job)
            time.sleep(0.02)
            for job in list(running):
                seconds = time.monotonic() - job.started
                pid, status = os.waitpid(job.pid, os.WNOHANG)
                if not pid and seconds < job.limit:
                    continue
                stop(job, ended=bool(pid))
                running.remove(job)
                write(job, edited=False)
                free.append(job.tree)
                tail = (job.tree.parent / "log").read_text(errors="replace")[-2000:]
                yield Done(job, os.waitstatus_to_exitcode(status) if pid else None, seconds, tail)
    finally:
        for job in running:
            stop(job, ended=False)


def write(job: Job, *, edited: bool) -> None:
    if job.mutant:
        path, pair = job.tree / job.mutant.file, (job.mutant.old, job.mutant.new)
        text = path.read_text()
        # Restore the saved text. Replacing `new` by `old` would be wrong if `new` also occurs elsewhere in the file.
        saved = job.tree.parent / "saved"
        if edited:
            saved.write_text(text)
        path.write_text(text.replace(*pair) if edited else saved.read_text())


def stop(job: Job, *, ended: bool) -> None:
    """End the job's process, unless it has ended, and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    if not ended:
        os.waitpid(job.pid, 0)


def digest(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return whole.hexdigest()[:24]


def files_of(tests: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({test.split("::")[0] for test in tests}))


def key(root: Path, mutant: Mutant) -> str:
    """Key of a result.

    The result is valid while the edit, its file, its tests and the shared test files do not change.
    """
    shared = [path for path in sorted((root / "tests").rglob("*.py")) if not path.name.startswith("test_")]
    own = [root / file for file in (mutant.file, *files_of(mutant.tests))]
    texts = [path.read_bytes() for path in (*own, *shared)]
    return digest(mutant.old, mutant.new, *mutant.tests, *texts)


def tests_per_file(mutants: Iterable[Mutant]) -> dict[str, tuple[str, ...]]:
    """The tests that the entries name, by file. If an entry names a whole file, the file alone."""
    named: dict[str, set[str]] = {}
    for test in (test for mutant in mutants for test in mutant.tests):
        named.setdefault(test.split("::")[0], set()).add(test)
    return {file: (file,) if file in tests else tuple(sorted(tests)) for file, tests in sorted(named.items())}


class Results:
    """Results of earlier runs, in a JSON file that is written after each result."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        if path.is_file() and not fresh:
            with contextlib.suppress(ValueError):
                self.known = json.loads(path.read_text())

    def add(self, key: str, **values: Any) -> None:
        self.known[key] = values
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.known, indent=1))
        part.replace(self.path)


# --------------------------------------------------------------------------------------------------------------- main


def without_edits(root: Path, mutants: list[Mutant], trees: list[Path], results: Results) -> dict[str, float]:
    """Seconds of each test file's named tests without an edit. Negative if they fail."""
    source = digest(*(path.read_bytes() for path in sorted((root / "src").rglob("*.py"))))
    wanted = {
        file: (tests, digest(source, (root / file).read_bytes(), *tests)) for file, tests in tests_per_file(mutants).items()
    }
    seconds = {file: results.known[mark]["seconds"] for file, (_, mark) in wanted.items() if mark in results.known}
    jobs = [Job(tests, limit=1800.0) for file, (tests, _) in wanted.items() if file not in seconds]
    for done in run(jobs, trees):
        file = done.job.tests[0].split("::")[0]
        seconds[file] = done.seconds if done.code == 0 else -1.0
        if done.code == 0:
            results.add(wanted[file][1], what=f"without an edit: {file}", seconds=round(done.seconds, 1))
        else:
            print(f"{file} fails without an edit:\n{done.tail}", flush=True)
    return seconds


def verdict(done: Done) -> str:
    if done.code is None:
        return TIMEOUT
    if done.code < 0:  # a signal: the edit crashed the process
        return CAUGHT
    return {0: SURVIVED, 1: CAUGHT}.get(done.code, BROKEN)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make each wrong edit of tests/mutants in a copy of the tree and run its tests.")
    parser.add_argument("-j", type=int, default=2, metavar="N", help="processes at a time (default: 2)")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="entries whose list, sentence, file or tests match this regular expression"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--check", action="store_true", help="check the entries and run nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree (default: this one)")
    parser.add_argument("--preload", default=PRELOAD, metavar="MODULES", help="modules loaded once, comma-separated")
    options = parser.parse_args(arguments)
    root = options.root.resolve()

    mutants, wrong = load(root)
    if wrong := wrong + validate(root, mutants):
        print("\n".join(wrong))
        return 2
    if options.check:
        print(f"{len(mutants)} entries are well-formed.")
        return 0
    mutants = [m for m in mutants if re.search(options.only, " ".join((m.listed, m.what, m.file, *m.tests)))]
    tried = sorted((m for m in mutants if m.tests), key=lambda m: (m.tests, m.file))
    results = Results(root / RESULTS, options.fresh)
    found: dict[Mutant, str] = {}
    # The keys are computed now, like the copies, because the user may edit files during the run.
    marks = {mutant: key(root, mutant) for mutant in tried}
    for mutant in tried:
        if marks[mutant] in results.known:
            found[mutant] = results.known[marks[mutant]]["result"]
    left = [mutant for mutant in tried if mutant not in found]
    print(f"{len(mutants)} wrong edits: {len(found)} known from before, {len(left)} to try.", flush=True)

    begin = time.monotonic()
    if left:
        os.environ |= ONE_THREAD
        preload(options.preload)
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            trees = copies(root, max(1, min(options.j, len(left))), Path(folder))
            seconds = without_edits(root, left, trees, results)
            jobs = []
            for mutant in left:
                usual = [seconds[file] for file in files_of(mutant.tests)]
                if min(usual) < 0:
                    found[mutant] = BROKEN
                else:
                    jobs.append(Job(mutant.tests, PATIENCE[0] + PATIENCE[1] * sum(usual), mutant))
            for number, done in enumerate(run(jobs, trees), 1):
                assert done.job.mutant
                result = found[done.job.mutant] = verdict(done)
                print(f"{number:4d}/{len(jobs)} {done.seconds:6.1f} s  {result}: {done.job.mutant.name}", flush=True)
                if result == BROKEN:
                    print(f"pytest did not get to run the tests:\n{done.tail}", flush=True)
                else:
                    results.add(marks[done.job.mutant], what=done.job.mutant.name, result=result, seconds=round(done.seconds, 1))

    counts = Counter(found.values())
    equivalent = len(mutants) - len(tried)
    print(
        f"{len(mutants)} wrong edits in {(time.monotonic() - begin) / 60:.1f} minutes: {counts[CAUGHT] + counts[TIMEOUT]} caught"
        f" ({counts[TIMEOUT]} by the time limit), {counts[SURVIVED]} survived, {equivalent} equivalent, {counts[BROKEN]} broken."
    )
    for mutant, result in found.items():
        if result in (SURVIVED, BROKEN):
            print(f"{result}: {mutant.name}\n    {mutant.file}: {mutant.old!r} -> {mutant.new!r}\n    {' '.join(mutant.tests)}")
    return int(bool(counts[SURVIVED] or counts[BROKEN]))


if __name__ == "__main__":
    sys.exit(main())
