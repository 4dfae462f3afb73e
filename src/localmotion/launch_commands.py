"""The commands that give work to an engine of `launch`: `study`, and `extract --launch`. Their flags, and no logic."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from localmotion.errors import ConfigError

if TYPE_CHECKING:
    from localmotion.launch import Launch


def add_launch(sub: argparse.ArgumentParser, what: str, default: str = "") -> None:
    """Add the flags of a command that can be launched."""
    sub.add_argument(
        "--launch",
        default=default,
        metavar="ENGINE",
        help=f"give {what} to an engine. local: processes of this machine; submitit: jobs of Slurm; ray: tasks of a Ray cluster"
        " (docs/scale.md)" + (f"; default: {default}" if default else ""),
    )
    sub.add_argument("--jobs", type=int, default=0, help=f"{what} at a time; 0: one per core of this machine, no limit elsewhere")
    sub.add_argument("--pack", type=int, default=1, metavar="K", help="how many run side by side in one job (default 1)")
    sub.add_argument(
        "--launch-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the engine, e.g. slurm_partition=gpu or num_gpus=1; repeatable",
    )


def _launch_of(args: argparse.Namespace) -> Launch:
    """What the flags of `add_launch` say."""
    from localmotion.launch import Launch, launch_options

    return Launch(args.launch, args.jobs, args.pack, launch_options(args.launch_option))


def without_launch(line: Sequence[str]) -> list[str]:
    """The arguments of a command without the flags of `add_launch`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_launch(parser, "")
    return parser.parse_known_args(line)[1]


def launch_extract(args: argparse.Namespace) -> None:
    """`localmotion extract --launch`. Raises ConfigError for arguments that do not go together."""
    from localmotion.console import say
    from localmotion.launch.extraction import extract_parts
    from localmotion.training.interrupt import StopRequest

    if not args.launch:
        raise ConfigError("extract: --jobs, --pack and --launch-option need --launch ENGINE")
    if not args.manifest or args.part:
        raise ConfigError("extract --launch: give --manifest FILE and --parts N, and no --part: all parts are launched")
    found = extract_parts(without_launch(args.line), args.out, args.parts, _launch_of(args), StopRequest())
    for line in found.lines():
        say(line)


def study(args: argparse.Namespace) -> None:
    """`localmotion study`"""
    from localmotion.console import say
    from localmotion.report.build import report
    from localmotion.report.table import write_table
    from localmotion.training.study import RunsFailedError, run_study, runs_of
    from localmotion.training.study_file import read_study

    given = read_study(args.file)  # before the runs: a file that is edited meanwhile must not lose the report
    failed: RunsFailedError | None = None
    try:
        run_study(args.file, args.out, _launch_of(args), track=args.track)
    except RunsFailedError as error:  # raised again below, after the report of the other runs
        failed = error
    runs, missing, left_out = runs_of(args.out, given.jobs)
    for line in write_table(runs, args.out, given.reference, given.contrasts, missing, left_out):
        say(line)
    if runs:
        page = report(runs, args.out / "report.html", given.reference, given.contrasts, missing, left_out)
        say(f"wrote {page}")
    if failed:
        raise failed
