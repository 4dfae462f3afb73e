"""Names of runs: a folder, a repository of the Hugging Face Hub, or an entry of the weights shelf (docs/sharing.md).

    runs/drp                a run directory, or a folder that `localmotion push` wrote
    hf:owner/name           a repository of the Hub; hf:owner/name@REVISION is a branch, tag or commit of it
    shelf:NAME              weights/NAME of a source checkout

Only a name that begins with hf: makes a connection (and shelf: without a checkout, once the shelf is on the Hub). A new run
records the commit that it got, so that it resumes from the same weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from localmotion.config import RunConfig
from localmotion.console import say
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError, unknown_name
from localmotion.files import one_line, read_json
from localmotion.runs import hub
from localmotion.runs.source import checkout

HUB, SHELF = "hf:", "shelf:"
MANIFEST = "shared.json"
"""Names, sizes and SHA-256 of the files of a shared run, and its scores."""
FILES = (
    "README.md",
    "config.json",
    "environment.json",
    MANIFEST,
    "checkpoints/*/weights.safetensors",
    "checkpoints/*/state.json",
    "checkpoints/*/COMPLETE",
)
"""What is fetched of a repository. Anything else in it stays there."""
SHELF_FOLDER = "weights"
SHELF_REPOSITORY = ""
"""Repository of the Hub with a folder for each entry of the shelf. Empty until it exists: a name that is not ours yet could be
taken by anybody."""
_CHECKED = re.compile(r"(config|environment)\.json|checkpoints/\d+/(weights\.safetensors|state\.json|COMPLETE)")
_ENTRY = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_COUNTS = ("update", "env_step", "episodes")
_FETCH_AGAIN = "it is incomplete or damaged; remove it and fetch it again"


def is_shared(name: str) -> bool:
    """Whether a name is one of the Hub or of the shelf, not a path."""
    return name.startswith((HUB, SHELF))


def local_run(name: str | Path) -> Path:
    """The folder of a run. Fetches a run of the Hub.

    Raises CheckpointError if there is no such run or its files are not those that were pushed, ConfigError for a name that
    cannot be one, MissingExtraError if hf: is asked for without huggingface_hub.
    """
    return resolve(name)[0]


def resolve(name: str | Path) -> tuple[Path, str]:
    """The folder of a run, and the name that gives the same weights again (with the commit). Raises as `local_run`."""
    text = str(name)
    if text.startswith(SHELF):
        return _of_shelf(text)
    if not text.startswith(HUB):
        return Path(text), text
    repo, _, revision = text.removeprefix(HUB).partition("@")
    return _fetched(text, repo, revision, "")


def pinned(run: RunConfig, path: Path | None) -> RunConfig:
    """``run``, its checkpoint with the commit that the Hub has now. The files are fetched.

    A run that continues in ``path`` keeps the commit that it began with, unless another one is asked for by its hash. ``path`` is None for
    a new run. Raises as `local_run`.
    """
    asked = run.checkpoint
    if not is_shared(asked):
        return run
    before = ""
    if path and (file := path / "config.json").exists():
        before = str(read_json(file, CheckpointError, "choose another --run").get("checkpoint", ""))
    (source, _, revision), (began, _, commit) = asked.partition("@"), before.partition("@")
    if began == source and commit and not hub.COMMIT.fullmatch(revision):
        asked = before
    return replace(run, checkpoint=resolve(asked)[1])


def _fetched(name: str, repo: str, revision: str, folder: str) -> tuple[Path, str]:
    if hub.COMMIT.fullmatch(revision) and (known := hub.cached(repo, revision, FILES, folder)):
        with contextlib.suppress(CheckpointError):  # incomplete: the rest is fetched below
            check_shared(known, name)
            return known, name
    found, commit = hub.fetch(repo, revision, FILES, folder)
    if commit != revision:
        say(f"{name}: commit {commit}")
    if not (found / MANIFEST).is_file():
        raise CheckpointError(f"{name}: holds no run that localmotion push wrote ({MANIFEST} is missing)")
    check_shared(found, name)
    return found, f"{name.partition('@')[0]}@{commit}"


def check_shared(folder: Path, name: str) -> dict[str, Any]:
    """Compare the files of a shared run with its manifest, and return that.

    Raises CheckpointError for a file that is missing or is not as long or not the same as the one that was pushed.
    """
    manifest = read_json(folder / MANIFEST, CheckpointError, _FETCH_AGAIN)
    files = manifest.get("files")
    if not isinstance(files, dict) or not any(str(file).endswith("weights.safetensors") for file in files):
        raise CheckpointError(f"{name}: {folder / MANIFEST} names no weights; {_FETCH_AGAIN}")
    for file, known in files.items():
        if not _CHECKED.fullmatch(file) or not isinstance(known, dict):
            raise CheckpointError(f"{name}: {MANIFEST} names {file!r:.80}, which is no file of a shared run")
        path = folder / file
        size = path.stat().st_size if path.is_file() else -1
        if size != known.get("bytes"):
            has = "is missing" if size < 0 else f"has {size:,} bytes, {known.get('bytes')!r:.20} were pushed"
            raise CheckpointError(f"{name}: {path} {has}; {_FETCH_AGAIN}")
        if digest(path) != known.get("sha256"):
            raise CheckpointError(f"{name}: {path} is not the file that was pushed (SHA-256 differs); {_FETCH_AGAIN}")
    return manifest


def run_label(path: Path) -> str:
    """Name of a run's folder; owner/name for a run in the Hub's cache, whose folder is called after its commit."""
    repo = path.parent.parent.name
    return "/".join(repo.split("--")[1:]) if path.parent.name == "snapshots" and repo.startswith("models--") else path.name


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the shelf ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """An entry of the shelf."""

    name: str
    config: Mapping[str, Any]
    megabytes: float
    scores: Mapping[str, Any]


def shelf_folder() -> Path | None:
    """The folder of the shelf. None without a source checkout."""
    root = checkout()
    return root / SHELF_FOLDER if root else None


def shelf_path(name: str) -> Path:
    """Where the entry ``shelf:NAME`` is written. Raises ConfigError without a source checkout and for a bad name."""
    entry, folder = _entry(name), shelf_folder()
    if folder is None:
        raise ConfigError(f"{name}: the shelf is the folder {SHELF_FOLDER} of a source checkout of localmotion; this is none")
    return folder / entry


def entries() -> list[Entry]:
    """The entries of the shelf, by name. Raises CheckpointError for a damaged one."""
    folder = shelf_folder()
    found = []
    for path in sorted(folder.glob(f"*/{MANIFEST}")) if folder else []:
        manifest = check_shared(path.parent, f"{SHELF}{path.parent.name}")
        config = read_json(path.parent / "config.json", CheckpointError, _FETCH_AGAIN)
        size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        scores = manifest.get("scores")
        found.append(Entry(path.parent.name, config, size / 1e6, scores if isinstance(scores, dict) else {}))
    return found


def shelf_lines() -> tuple[list[str], list[list[str]]] | None:
    """Columns and rows of a table of the shelf, None if it is empty. Raises as `entries`."""
    rows = []
    for entry in entries():
        lines = [line for line in entry.scores.values() if isinstance(line, dict)]
        shown = [(key, value) for line in lines for key, value in line.items() if key not in _COUNTS and isinstance(value, float)]
        values = (entry.config.get(key) for key in ("method", "stage", "preset"))
        cells = [*values, entry.config.get("env") or entry.config.get("data")]
        text = ", ".join(f"{key} {value:.3g}" for key, value in shown)
        rows.append([entry.name, *(one_line(cell or "", 60) for cell in cells), f"{entry.megabytes:.1f}", one_line(text)])
    return (["name", "method", "stage", "preset", "data", "MB", "scores"], rows) if rows else None


def _entry(name: str) -> str:
    entry = name.removeprefix(SHELF)
    if not _ENTRY.fullmatch(entry):
        raise ConfigError(f"{name:.100}: an entry of the shelf is written shelf:NAME, with letters, digits, dots and dashes")
    return entry


def _of_shelf(name: str) -> tuple[Path, str]:
    text, _, commit = name.partition("@")
    entry, folder = _entry(text), shelf_folder()
    if folder and not commit and (folder / entry / MANIFEST).is_file():
        check_shared(folder / entry, name)
        return folder / entry, name
    if SHELF_REPOSITORY:
        return _fetched(name, SHELF_REPOSITORY, commit, entry)
    if folder is None:
        raise CheckpointError(
            f"{name}: the shelf is not on the Hub yet, it is a part of the source; clone localmotion's repository and install it"
            " with: pip install -e ."
        )
    known = [path.parent.name for path in folder.glob(f"*/{MANIFEST}")]
    error: LocalmotionError = unknown_name("entry of the shelf", entry, known)
    raise CheckpointError(f"{error}; localmotion shelf lists them") from None
