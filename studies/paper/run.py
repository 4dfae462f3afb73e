"""Make one table or figure of "Local Motion Matters" (arXiv 2607.00808) at a scale, from clips to the picture (README.md).

    python studies/paper/run.py fig6 --scale tiny --out paper_tiny --jobs 2

A file of this folder, with `common.yaml`, becomes a study file (docs/studies.md): OUT/fig6/study.yaml. Its runs are in OUT/runs, which
all tables and figures share, so a run that two of them have is made once. The result is in OUT/fig6. The same command continues.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import drawing
import yaml

from localmotion.cli import main as localmotion
from localmotion.console import errors, say
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.launch import Launch
from localmotion.report.build import report
from localmotion.report.table import write_table
from localmotion.training.study import RunsFailedError, run_study, runs_of
from localmotion.training.study_file import load_study

HERE = Path(__file__).resolve().parent
SCALES = ("paper", "tiny", "debug")
NAMES = sorted(
    (path.stem for path in HERE.glob("*.yaml") if path.stem != "common"),
    key=lambda name: (name[0], int("".join(filter(str.isdigit, name))), name),
)


def at_scale(value: Any, scale: str) -> Any:
    """``value`` with each mapping of the three scales replaced by its value at ``scale``."""
    if isinstance(value, dict):
        if set(value) == set(SCALES):
            return at_scale(value[scale], scale)
        return {key: at_scale(inner, scale) for key, inner in value.items()}
    return [at_scale(inner, scale) for inner in value] if isinstance(value, list) else value


@functools.cache
def parsed(name: str) -> Any:
    """A file of this folder. Do not change it."""
    return yaml.safe_load((HERE / f"{name}.yaml").read_text())


def read(name: str, scale: str) -> dict[str, Any]:
    """A file of this folder at a scale."""
    return at_scale(parsed(name), scale)


def study_of(name: str, scale: str, data: Path) -> dict[str, Any]:
    """The study of a table or figure: only the pre-trainings that it needs, only the tasks that the scale has. {} without runs."""
    figure, common = read(name, scale), read("common", scale)
    variants = {key: dict(given or common["variants"][key]) for key, given in figure.get("variants", {}).items()}
    known = common["pretrain"] | figure.get("pretrain", {})
    needed = {given.get("checkpoint") for given in variants.values()} | {figure.get("run")}
    needed |= {run for run, _ in figure.get("rows", {}).values()} if figure["shows"] == "strips" else set()
    pretrain = {key: dict(given) for key, given in known.items() if key in needed}
    if not variants and not pretrain:
        return {}
    for given in pretrain.values():
        given["settings"] = {"data": str(data / "store"), **given.get("settings", {})}
    for given in variants.values():
        if "checkpoint" not in given:  # a checkpoint brings the recipe of its clips
            given["settings"] = {"recipe": common["recipe"], **given.get("settings", {})}
    study = {"name": f"{name} at {scale}", **{key: common[key] for key in ("preset", "seeds", "settings")}}
    if variants:
        study["tasks"] = [common["tasks"][task] for task in figure["tasks"] if task in common["tasks"]]
    return {**study, "pretrain": pretrain, **({"variants": variants} if variants else {})}


def clips_of(name: str, scale: str) -> list[str]:
    """Folders of clips that a table or figure needs."""
    figure = read(name, scale)
    shown = [part["clips"] for part in figure.get("parts", {}).values()]
    shown += [figure["clips"]] if figure["shows"] == "embedding" else []
    return list(dict.fromkeys([*(["store"] if study_of(name, scale, Path()) else []), *shown]))


def commands_for(part: str, scale: str, data: Path) -> list[str]:
    """The commands that make a folder of clips."""
    common = read("common", scale)
    recipe = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in common["recipe"].items())
    places = {"data": shlex.quote(str(data)), "recipe": recipe, "studies": shlex.quote(str(HERE.parent))}
    return [line.format(**places) for line in common["clips"][part]]


def provide(name: str, scale: str, data: Path) -> None:
    """Make the clips, or say with which commands the user can. Raises ConfigError if the paper's clips are not there."""
    for part in clips_of(name, scale):
        if (data / part / "store.json").exists() and (scale == "paper" or (data / part / "COMPLETE").exists()):
            continue
        lines = commands_for(part, scale, data)
        if scale == "paper":
            raise ConfigError(
                f"{name} needs clips in {data / part}; make them (docs/videos.md, docs/perception.md): {'; '.join(lines)}"
            )
        for line in lines:
            say(line)
            localmotion(shlex.split(line)[1:])
        (data / part / "COMPLETE").touch()


def make(name: str, scale: str, out: Path, data: Path, jobs: int) -> None:
    """Make one table or figure in ``out``/``name``. Raises RunsFailedError at the end if runs failed; the others are shown."""
    figure, study, here = read(name, scale), study_of(name, scale, data), out / name
    here.mkdir(parents=True, exist_ok=True)
    provide(name, scale, data)
    failed: RunsFailedError | None = None
    runs: list[Path] = []
    missing: list[str] = []
    if study:
        (here / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False, allow_unicode=True))
        try:
            run_study(here / "study.yaml", out, Launch(jobs=jobs))
        except RunsFailedError as error:  # raised again below
            failed = error
        runs, missing, _ = runs_of(out, load_study(here / "study.yaml"))  # other runs there are of other figures
    if runs:
        if "variants" in study:
            write_table(runs, here, missing=missing)
        say(f"page: {report(runs, here / 'report.html', missing=missing)}")
    tasks: Mapping[str, str] = read("common", scale)["tasks"]
    if failed is None or figure["shows"] in ("curves", "table"):
        for path in drawing.SHOW[figure["shows"]](figure, here, out / "runs", data, tasks):
            say(f"{name}: {path}")
    if failed:
        raise failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*NAMES, "all"), help="a table or figure, or all of them")
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results; one for each scale")
    parser.add_argument("--data", type=Path, help="folder with the clips (default: OUT/data)")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: one for each core")
    args = parser.parse_args(argv)
    try:
        for name in NAMES if args.name == "all" else [args.name]:
            make(name, args.scale, args.out, args.data or args.out / "data", args.jobs)
    except LocalmotionError as error:
        errors.print(f"error: {error}", markup=False, style="red")
        sys.exit(2)


if __name__ == "__main__":
    main()
