"""The Hugging Face Hub: fetch a shared run or a data set, upload a run.

Only this file imports huggingface_hub, and only when it is asked to.

Fetched files lie in the Hub's own cache (HF_HOME, HF_HUB_CACHE). The environment variables of huggingface_hub apply:
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from localmotion.errors import CheckpointError, ConfigError, LocalmotionError, MissingExtraError
from localmotion.files import accept_links, one_line

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A full commit hash."""
_NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_REPO, _REVISION = re.compile(rf"{_NAME}/{_NAME}", re.ASCII), re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)
PREFIXES = {"model": "hf:", "dataset": "lerobot:"}
"""How a user writes a repository, by its kind."""


def check_names(repo: str, revision: str = "", kind: str = "model") -> None:
    """Raise ConfigError unless these can be a repository, owner/name, and a branch, tag or commit ("": the default branch).

    Both become parts of file names in the cache.
    """
    name = PREFIXES[kind]
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ConfigError(f"{name}{repo:.100}: a repository of the Hub is written {name}owner/name or {name}owner/name@revision")
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ConfigError(f"{name}{repo}@{revision:.100}: is no branch, tag or commit")


def fetch(repo: str, revision: str, patterns: Sequence[str], folder: str = "", kind: str = "model") -> tuple[Path, str]:
    """Fetch the files of ``folder`` in ``repo`` that match ``patterns``.

    ``kind`` of the repository: "model" or "dataset". Returns the folder in the Hub's cache, and the commit. Raises MissingExtraError
    without huggingface_hub, ConfigError for names that no repository has, else CheckpointError with the cause and the fix.
    """
    check_names(repo, revision, kind)
    name = PREFIXES[kind] + repo
    library = _library(name)
    wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
    with _explained(name, revision):
        given = {"revision": revision or None, "allow_patterns": wanted, "library_name": "localmotion", "repo_type": kind}
        found = Path(library.snapshot_download(repo, **given))
    return _linked(found, folder), found.name


def cached(repo: str, commit: str, patterns: Sequence[str], folder: str = "") -> Path | None:
    """The folder that `fetch` would return for a commit, without any connection. It may be incomplete. None if there is none."""
    check_names(repo, commit)
    library = _library(f"hf:{repo}")
    wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
    try:
        found = library.snapshot_download(repo, revision=commit, allow_patterns=wanted, local_files_only=True)
    except library.errors.LocalEntryNotFoundError:
        return None
    return _linked(Path(found), folder)


def _linked(snapshot: Path, folder: str) -> Path:
    """A folder of the cache. There the files of a commit are links to files that all commits share."""
    accept_links(snapshot / folder, snapshot.parent.parent / "blobs")
    return snapshot / folder


def visibility(repo: str) -> str:
    """Whether a repository is "public" or "private". "" if it does not exist, or if the user may not see it."""
    check_names(repo)
    library = _library(f"hf:{repo}")
    with _explained(f"hf:{repo}"), contextlib.suppress(library.errors.RepositoryNotFoundError):
        return "private" if library.HfApi().repo_info(repo).private else "public"
    return ""


def upload(folder: Path, repo: str, *, private: bool, stale: Sequence[str] = ()) -> str:
    """Upload a folder as one commit, to a repository that is made if there is none. Returns the commit.

    ``stale``: beginnings of the names of files that are removed from the repository unless ``folder`` has them.
    """
    check_names(repo)
    library = _library(f"hf:{repo}")
    api = library.HfApi(library_name="localmotion")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with _explained(f"hf:{repo}", doing="upload"):
        api.create_repo(repo, private=private, exist_ok=True)
        old = [name for name in api.list_repo_files(repo) if name.startswith(tuple(stale)) and name not in names]
        operations = [library.CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [library.CommitOperationDelete(name) for name in old]
        done = api.create_commit(repo, operations, commit_message="Upload weights with localmotion push")
    return str(done.oid)


def _library(what: str) -> Any:
    """huggingface_hub. Raises MissingExtraError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingExtraError(
            f"{what}: needs huggingface_hub, which cannot be imported ({one_line(error)}); install it with:"
            " pip install 'localmotion[hub]'"
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _explained(name: str, revision: str = "", doing: str = "fetch") -> Iterator[None]:
    """Turn the errors of huggingface_hub and of the network into one line each."""
    errors = _library(name).errors
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except LocalmotionError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{name}: asks you to accept its conditions; do so on its page, then {login}") from error
    except errors.RepositoryNotFoundError as error:
        if doing != "fetch":
            raise CheckpointError(f"{name}: cannot be written with your token; {login} as one who may") from error
        raise CheckpointError(f"{name}: no such repository, or it is private; check the name, or {login}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: has no branch, tag or commit {revision!r}; its page lists them") from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        offline = isinstance(cause, errors.OfflineModeIsEnabled) or "HF_HUB_OFFLINE" in str(error)
        fix = "it is not in the cache and HF_HUB_OFFLINE is set" if offline else "connect and try again"
        raise CheckpointError(f"{name}: the Hub cannot be reached ({one_line(cause, 200)}); {fix}") from error
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(f"{name}: HF_HUB_OFFLINE is set; unset it to {doing}") from error
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", 0)
        fix = f"{login} as one who may" if code in (401, 403) else "try again later"
        raise CheckpointError(f"{name}: {doing} failed ({one_line(error, 300)}); {fix}") from error
    except Exception as error:  # of the network, the disk, or a damaged answer: many libraries raise here
        cause = f"{error}: {error.__cause__}" if error.__cause__ else error
        raise CheckpointError(f"{name}: {doing} failed ({one_line(cause, 300)}); try the same command again") from error
