"""The source of localmotion that runs here: its checkout, if it is one, and its commit."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path


def checkout() -> Path | None:
    """The folder of the source checkout that this package is imported from. None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "localmotion").is_dir() else None


@cache
def commit() -> str:
    """Git commit of this source: 40 hex digits, with "-dirty" if tracked files have changed. "" if it is not known."""
    root = checkout()
    if root is None:
        return _installed_commit()
    call = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=40"]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a copy without its history
        return ""


def _installed_commit() -> str:
    """The commit that pip recorded for a package that was installed from a git repository."""
    try:
        text = metadata.distribution("localmotion").read_text("direct_url.json")
        return str(json.loads(text or "{}").get("vcs_info", {}).get("commit_id", ""))
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return ""
