"""Check a release before it is published: versions, changelog, and the built package in an environment of its own.

    .venv/bin/python tools/release_check.py                   # installs everything from the package index
    .venv/bin/python tools/release_check.py --packages DIR    # takes the dependencies from a site-packages folder: a minute

It builds wheel and sdist, installs each in a fresh environment in a temporary folder outside of the checkout, and runs `localmotion
info`, a debug training run, its evaluation, its report and its export there. It publishes nothing. docs/releasing.md has the whole list.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    "--method",
    "dreamer_v2",
    "--preset",
    "debug",
    "--env",
    "toy:dot",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--threads",
    "1",
]
SHORT = ["--env_steps", "120", "--prefill", "60", "--warmup_updates", "1", "--eval_episodes", "1", "--train_every", "30"]
WALK = [
    ["--version"],
    ["info"],
    ["train", *RUN, *SHORT, "--run", "run"],
    ["evaluate", "run", "--episodes", "1", "--device", "cpu"],
    ["report", "run", "--out", "page.html"],
    ["export", "run", "--out", "programs"],
]
"""Commands that the installed package has to run, in an empty folder."""
QUICK = [["--version"], ["train", *RUN, *SHORT, "--run", "run"]]
"""The same for --quick."""
MADE = {"report": ("page.html",), "export": ("programs/step.pt2",), "train": ("run/config.json",)}
"""Files that a command has to write."""
LEFT_OUT = ("tests/", "weights/", "runs/", "studies/")
"""Folders of a checkout that a wheel must not have."""


class FailedError(Exception):
    """A check failed; the message says what to do."""


def version_of(root: Path) -> str:
    """The version. Raises FailedError unless pyproject.toml, the package and CITATION.cff have the same."""
    found = {"pyproject.toml": str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])}
    for name, pattern in (("src/localmotion/__init__.py", r'^__version__ = "(.+)"$'), ("CITATION.cff", r"^version: (\S+)$")):
        match = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        found[name] = match.group(1) if match else "none"
    if len(set(found.values())) != 1:
        raise FailedError("versions differ: " + ", ".join(f"{name} {version}" for name, version in found.items()))
    return found["pyproject.toml"]


def check_changelog(root: Path, version: str) -> None:
    """Raise FailedError unless the newest section of CHANGELOG.md is this version's, with a date and with lines."""
    sections = re.split(r"^## ", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    if sections and sections[0].startswith("[Unreleased]"):
        if sections[0].partition("\n")[2].strip():
            raise FailedError(f"CHANGELOG.md: [Unreleased] has lines; give them the heading ## [{version}] - YYYY-MM-DD")
        sections = sections[1:]
    head, _, text = sections[0].partition("\n") if sections else ("nothing", "", "")
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", head.strip()) or not text.strip():
        raise FailedError(f"CHANGELOG.md: its newest section is {head!r}; expected [{version}] - YYYY-MM-DD, and lines below")


def run(command: list[str | Path], folder: Path) -> str:
    """The output of a command. Raises FailedError with its end if it fails."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(x) for x in command], cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise FailedError(f"{' '.join(str(x) for x in command)}: ended with {done.returncode}\n{end}")
    return done.stdout


def environment(folder: Path, packages: Path | None) -> Path:
    """A fresh environment in ``folder``; its Python. ``packages``: a folder whose packages it sees behind its own."""
    without = ["--without-pip"] if packages else []  # it sees theirs
    run([sys.executable, "-m", "venv", *without, folder], folder.parent)
    if packages:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(f"{packages.resolve()}\n")
    return folder / "bin" / "python"


def build(root: Path, out: Path, python: Path, *, fresh: bool) -> tuple[Path, Path]:
    """Wheel and sdist of ``root``. ``fresh``: install what builds them; else ``python`` has it, and no network is needed.

    Raises FailedError if one is not made or holds what it must not.
    """
    if fresh:
        run([python, "-m", "pip", "install", "--quiet", "build"], out)
    run([python, "-m", "build", *([] if fresh else ["--no-isolation"]), "--outdir", out, root], out)
    (wheel,), (source,) = list(out.glob("*.whl")), list(out.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    if wrong := [name for name in names if name.startswith(LEFT_OUT)]:
        raise FailedError(f"{wheel.name} holds {wrong[0]}")
    if "localmotion/py.typed" not in names or not any(name.endswith("licenses/LICENSE") for name in names):
        raise FailedError(f"{wheel.name} lacks py.typed or LICENSE")
    with tarfile.open(source) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    if missing := {"pyproject.toml", "README.md", "LICENSE", "src/localmotion/__init__.py", "tests/conftest.py"} - inside:
        raise FailedError(f"{source.name} lacks {', '.join(sorted(missing))}")
    return wheel, source


def walk(python: Path, package: Path, folder: Path, version: str, packages: Path | None, commands: list[list[str]]) -> None:
    """Install a package and run ``commands`` with it in an empty folder. Raises FailedError."""
    dependencies = ["--no-deps"] if packages else []
    run([python, "-m", "pip", "install", "--quiet", *dependencies, package], folder)
    where = run([python, "-c", "import localmotion; print(localmotion.__file__)"], folder).strip()
    if not Path(where).is_relative_to(python.parent.parent):
        raise FailedError(f"{package.name}: localmotion is imported from {where}, not from its environment")
    for arguments in commands:
        out = run([python, "-m", "localmotion", *arguments], folder)
        if arguments == ["--version"] and version not in out:
            raise FailedError(f"{package.name}: --version says {out.strip()}, not {version}")
        for name in MADE.get(arguments[0], ()):
            if not (folder / name).is_file() or not (folder / name).stat().st_size:
                raise FailedError(f"{package.name}: {name} is missing or empty")


def main(arguments: list[str] | None = None) -> int:
    """Make all checks. Returns 0, or 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--packages", type=Path, help="site-packages folder with the dependencies; default: install them")
    parser.add_argument("--no-changelog", action="store_true", help="do not check CHANGELOG.md (between releases)")
    parser.add_argument(
        "--quick", action="store_true", help="only the wheel, which is built from the sdist, and a debug training run"
    )
    args = parser.parse_args(arguments)
    commands = QUICK if args.quick else WALK
    try:
        version = version_of(ROOT)
        print(f"version {version} everywhere")
        if not args.no_changelog:
            check_changelog(ROOT, version)
            print("changelog: its newest section is this version's")
        with tempfile.TemporaryDirectory(prefix="localmotion_release_") as scratch:
            top = Path(scratch)
            (top / "dist").mkdir()
            built = build(ROOT, top / "dist", environment(top / "builder", args.packages), fresh=args.packages is None)
            for package in built[:1] if args.quick else built:
                folder = top / f"work_{package.suffix[1:]}"
                folder.mkdir()
                python = environment(top / f"env_{package.suffix[1:]}", args.packages)
                walk(python, package, folder, version, args.packages, commands)
                print(
                    f"{package.name}: {package.stat().st_size / 1e6:.1f} MB, installed, ran {', '.join(x[0] for x in commands)}"
                )
    except FailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print("all checks passed; nothing was published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
