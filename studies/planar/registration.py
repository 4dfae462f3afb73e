"""Whether a registration is in force: its page is no draft, and the page and the scripts are committed as they stand.

tier1.py has a copy of its own, because its registration binds it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def registered(files: Sequence[str]) -> str:
    """The commit that registered ``files``, the page first. Exits with the reason if they are not in force."""
    page = HERE / files[0]
    if not page.exists() or "draft" in page.read_text().partition("\n")[0].lower():
        raise SystemExit(f"{files[0]} is not in force; the tasks wait for it")
    git, paths = ["git", "-C", str(HERE)], [str(HERE / name) for name in files]
    found = subprocess.run(
        [*git, "log", "-1", "--format=%h", "--", *paths], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True, check=True).stdout
    if changed or not found:
        raise SystemExit("the registration is not committed as it stands; the tasks wait for it:\n" + changed)
    return found
