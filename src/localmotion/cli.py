"""The command line: parses, calls, prints. No logic.

Exit codes: 0 done, 2 a LocalmotionError (one line on stderr), 130 Ctrl-C (what was done is saved where the command saves).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from localmotion import __version__
from localmotion.errors import ConfigError, LocalmotionError, unknown_name

if TYPE_CHECKING:
    from localmotion.perception.base import Recipe


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="localmotion",
        description="Unlabeled video in, a world model that knows motion out, and an agent that learns.",
    )
    parser.add_argument("--version", action="version", version=f"localmotion {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, text: str, call: Callable[..., Any]) -> _Parser:
        sub: _Parser = commands.add_parser(name, help=text, description=text, add_help=name not in TRAINING)
        sub.set_defaults(call=call)
        return sub

    sub = add("info", "Versions, device, threads, bf16, GL backend actually tested, extras found.", info)

    sub = add("scan", "What is in a folder of videos, what is unusable and why.", scan)
    _videos(sub)
    sub.add_argument("--manifest", type=Path, help="write the findings here, one JSON line a video")

    sub = add(
        "extract",
        "Atomic Actions of a folder of videos into a clip store. The same command goes on where it stopped.",
        extract,
    )
    _videos(sub)
    sub.add_argument("--out", type=Path, required=True, help="the clip store, a directory")
    _recipe(sub)

    sub = add("inspect", "Draw a clip with its tracks, flow and patches, as a picture (.png) or film (.mp4).", inspect)
    sub.add_argument("store", type=Path, help="clip store")
    sub.add_argument("--out", type=Path, required=True, help="picture.png or film.mp4")
    sub.add_argument("--clip", help="clip id or number; default: one with much motion")

    for name, text in TRAINING.items():
        sub = add(name, text, train)
        sub.add_argument("--method", help="registry name of the method, e.g. drp")
        sub.add_argument("--preset", default="small", help="paper, small or debug")
        sub.add_argument("--run", type=Path, help="run directory; an existing one of the same settings is continued")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="change any setting (short names where unique)",
        )
        sub.add_argument("-h", "--help", action="store_true", help="show this help and every setting")

    sub = add("study", "Run a grid of methods, tasks, seeds and settings, several at a time, and report it.", study)
    sub.add_argument("file", type=Path, help="the study, .yaml (docs/studies.md)")
    sub.add_argument("--out", type=Path, required=True, help="where its runs, its page and its table go")
    sub.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: one a core")

    sub = add("evaluate", "Play evaluation episodes with a trained agent.", evaluate)
    sub.add_argument("run", type=Path, help="run directory")
    sub.add_argument("--episodes", type=int, default=10, help="episodes (paper: 10)")
    sub.add_argument("--seed", type=int, help="seed of the evaluation episodes; default: the run's")
    sub.add_argument("--video", type=Path, help="film of the first episode, .mp4")
    sub.add_argument("--policy", choices=("agent", "random"), default="agent", help="random gives the floor")
    sub.add_argument("--device", default="auto")

    sub = add("collect", "Record unlabeled videos of an environment, as mp4 files or into a clip store.", collect)
    sub.add_argument("env", help="environment, e.g. dmc:walker_walk")
    sub.add_argument("--out", type=Path, required=True, help="folder of mp4 files, or with --store a clip store")
    sub.add_argument("--store", action="store_true", help="perceive and write a clip store instead of mp4 files")
    sub.add_argument(
        "--policy", default="smooth", help="random, smooth (random, changing smoothly), expert (Meta-World), or a run directory"
    )
    sub.add_argument("--episodes", type=int, default=16)
    sub.add_argument("--steps", type=int, default=0, help="agent steps a video at most; 0 for whole episodes")
    sub.add_argument("--noise", type=float, default=0.0, help="standard deviation of noise added to the actions")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--action-repeat", type=int, help="env steps per agent step; default: the suite's")
    sub.add_argument("--quality", choices=("auto", "fast", "reference"), default="auto")
    sub.add_argument("--pixels", type=int, default=128, help="side of the mp4's pictures")
    _recipe(sub, without=("seed",))

    sub = add("predict", "Open-loop prediction of clips, runs side by side: truth, prediction, error; PSNR and SSIM.", predict)
    sub.add_argument("--checkpoint", type=Path, required=True, nargs="+", help="pre-training runs")
    sub.add_argument("--data", type=Path, required=True, help="clip store, video file, or folder of videos")
    sub.add_argument("--out", type=Path, required=True, help="strips, .png; the scores go beside it, .json")
    sub.add_argument("--clips", type=int, default=4, help="windows drawn")
    sub.add_argument("--windows", type=int, default=32, help="windows scored")
    sub.add_argument("--split", choices=("heldout", "train", "all"), default="heldout")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="auto")

    sub = add("probe", "What motion codes know of true velocities and actions, by ridge regression and a small network.", probe)
    sub.add_argument("runs", type=Path, nargs="*", help="run directories of methods with a motion code")
    sub.add_argument(
        "--data", type=Path, action="append", required=True, help="collection (localmotion collect --store), repeatable"
    )
    sub.add_argument("--length", type=int, default=25, help="frames of a window, as in pre-training (default 25)")
    sub.add_argument("--no-untrained", action="store_true", help="leave out each method's network with fresh weights")
    sub.add_argument("--no-ceilings", action="store_true", help="leave out the networks trained on the targets themselves")
    sub.add_argument("--out", type=Path, help="write the numbers here, .json")
    sub.add_argument("--device", default="auto")

    sub = add(
        "perception-report",
        "How good flow, foreground and tracks are, against the exact motion of environments and of warped pictures.",
        perception_report,
    )
    sub.add_argument(
        "--env", action="append", dest="envs", metavar="NAME", help="environment, repeatable; default: ten of all suites"
    )
    sub.add_argument(
        "--percept", action="append", type=int, dest="percepts", help="side perception works at, repeatable; default: 64, 128"
    )
    sub.add_argument("--quality", action="append", dest="qualities", help="fast, reference or auto, repeatable; default: fast")
    sub.add_argument("--supersample", type=int, help="draw pictures at n times their side and average them (default 1)")
    sub.add_argument(
        "--backend", action="append", dest="backends", help="name, embedded (default) or all that are installed; repeatable"
    )
    sub.add_argument("--policy", help="random (default) or smooth")
    sub.add_argument("--episodes", type=int, help="episodes an environment (default 2)")
    sub.add_argument("--frames", type=int, help="frames an episode (default 26)")
    sub.add_argument("--seed", type=int, help="seed of episodes, actions and points (default 0)")
    sub.add_argument(
        "--pictures", type=Path, help="video or folder of videos whose frames are warped; default: procedural pictures"
    )
    sub.add_argument("--out", type=Path, help="write all numbers here, .json")
    sub.add_argument("--draw", type=Path, help="directory for pictures of true and found flow, one an environment and size")

    sub = add("report", "One self-contained HTML page of one or more runs.", report)
    sub.add_argument("runs", type=Path, nargs="+", help="run directories")
    sub.add_argument("--out", type=Path, required=True, help="page.html")

    sub = add("demo", "The whole chain on this machine, from videos to a report. Needs no data and no network.", demo)
    sub.add_argument("--run", type=Path, default=Path("demo_run"), help="where everything goes")
    sub.add_argument("--videos", type=Path, help="your own folder of videos instead of rendered ones")
    return parser


TRAINING = {
    "pretrain": "Pre-train a method on a clip store. The same command with the same run directory resumes.",
    "finetune": "Fine-tune a pre-trained method in an environment. The same command with the same run directory resumes.",
    "train": "Learn in an environment from scratch. The same command with the same run directory resumes.",
}


def _videos(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("videos", type=Path, help="folder of mp4/webm/mkv/avi/mov/gif files or of frame folders")
    sub.add_argument("--list", type=Path, dest="list_file", help="list file in SSV2's layout: id frames label a line")
    sub.add_argument("--min-frames", type=int, default=25, help="shorter videos are rejected (paper: 25)")
    sub.add_argument("--workers", type=int, help="processes; default: one a core")


def _recipe(sub: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    from dataclasses import fields

    from localmotion.config import field_docs
    from localmotion.perception.base import Recipe

    docs = field_docs(Recipe)
    for item in fields(Recipe):
        if item.name not in ("backend_options", *without):
            kind = {"int": int, "float": float}.get(str(item.type), str)
            sub.add_argument(
                f"--{item.name.replace('_', '-')}",
                dest=f"recipe_{item.name}",
                type=kind,
                help=f"{docs[item.name]} (default {item.default})".replace("%", "%%"),
            )
    sub.add_argument(
        "--backend-options", dest="recipe_backend_options", type=json.loads, help=docs["backend_options"].replace("%", "%%")
    )


def _recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags of `_recipe` describe."""
    from dataclasses import fields

    from localmotion.perception.base import Recipe

    given: dict[str, Any] = {f.name: getattr(args, f"recipe_{f.name}", None) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    if "size" in given and "percept_size" not in given:
        given["percept_size"] = max(128, given["size"]) if max(128, given["size"]) % given["size"] == 0 else given["size"]
    return Recipe(**given)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    from localmotion.console import errors

    try:
        args, rest = _parser().parse_known_args(argv)
        if rest and args.command not in TRAINING:
            known = [s for a in _parser()._subparsers._group_actions[0].choices[args.command]._actions for s in a.option_strings]  # type: ignore[union-attr,index]
            raise unknown_name(f"option of {args.command}", rest[0], known)
        args.rest = rest
        args.call(args)
    except LocalmotionError as error:
        errors.print(f"error: {error}", markup=False, style="red")
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted; what was finished is kept, and the same command goes on from there", style="yellow")
        sys.exit(130)


def _settings(rest: list[str]) -> list[str]:
    """Typed flags ``--name value`` or ``--name=value`` as name=value texts."""
    out, items = [], list(rest)
    while items:
        flag = items.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}; settings are written --name value")
        name = flag[2:].replace("-", "_") if "=" not in flag else flag[2:].partition("=")[0].replace("-", "_")
        if "=" in flag:
            out.append(f"{name}={flag.partition('=')[2]}")
        elif items:
            out.append(f"{name}={items.pop(0)}")
        else:
            raise ConfigError(f"setting {flag} lacks its value")
    return out


def info(args: argparse.Namespace) -> None:
    """`localmotion info`"""
    from localmotion.console import say
    from localmotion.info import report_lines

    for line in report_lines():
        say(line)


def scan(args: argparse.Namespace) -> None:
    """`localmotion scan`"""
    from localmotion.console import progress, say
    from localmotion.video.scan import scan as scan_videos

    with progress("scan", 1, "videos") as advance:
        found = scan_videos(
            args.videos,
            min_frames=args.min_frames,
            list_file=args.list_file,
            workers=args.workers or 0,
            progress=advance,
        )
    for line in found.table():
        say(line)
    if args.manifest:
        found.save(args.manifest)
        say(f"manifest: {args.manifest}")


def extract(args: argparse.Namespace) -> None:
    """`localmotion extract`"""
    import os

    from localmotion.console import progress, say
    from localmotion.perception.extract import extract_folder

    with progress("extract", 1, "videos") as advance:
        summary = extract_folder(
            args.videos,
            args.out,
            _recipe_of(args),
            list_file=args.list_file,
            min_frames=args.min_frames,
            workers=args.workers if args.workers is not None else (os.cpu_count() or 1),
            progress=advance,
        )
    for line in summary.lines():
        say(line)


def inspect(args: argparse.Namespace) -> None:
    """`localmotion inspect`"""
    from localmotion.console import say
    from localmotion.perception.draw import inspect as draw
    from localmotion.video.store import ClipStore

    clip = int(args.clip) if args.clip and args.clip.isdigit() else args.clip
    draw(ClipStore(args.store), args.out, clip)
    say(f"wrote {args.out}")


def train(args: argparse.Namespace) -> None:
    """`localmotion pretrain | finetune | train`"""
    from localmotion import methods
    from localmotion.config import compose

    if not args.method:
        if not args.help:
            raise ConfigError(f"{args.command}: say which --method; registered: {', '.join(methods.names())}")
        args.method = "drp"
    rest = [item for item in args.rest if item not in ("-h", "--help")]
    texts = _settings(rest) + args.set
    env = next((t.partition("=")[2] for t in texts if t.startswith("env=")), "")
    run = compose(args.method, args.command, preset=args.preset, env=env, settings=texts)
    if args.help:
        _show_settings(args.command, run)
        return
    if not args.run:
        raise ConfigError(f"{args.command}: say where with --run DIRECTORY")
    if args.command == "pretrain":
        from localmotion.training.pretrain import pretrain

        pretrain(run, args.run)
    else:
        from localmotion.training.finetune import finetune

        finetune(run, args.run)


def _show_settings(command: str, run: Any) -> None:
    from rich.table import Table

    from localmotion.config import all_docs, leaves
    from localmotion.console import console

    docs = all_docs(run)
    table = Table(
        "setting",
        "value",
        "meaning",
        title=f"localmotion {command}: settings of {run.method}, preset {run.preset}",
        show_lines=False,
    )
    for name, value in leaves(run):
        table.add_row(f"--{name}", str(value), docs.get(name, ""))
    console.print(table, markup=False)


def study(args: argparse.Namespace) -> None:
    """`localmotion study`"""
    from localmotion.console import say
    from localmotion.report.collect import report
    from localmotion.report.table import write_table
    from localmotion.training.study import RunsFailedError, run_study

    failed: RunsFailedError | None = None
    try:
        run_study(args.file, args.out, jobs=args.jobs)
    except RunsFailedError as error:  # the others are reported
        failed = error
    runs = sorted(path.parent for path in (args.out / "runs").glob("*/metrics.jsonl"))
    if runs:
        for line in write_table(runs, args.out):
            say(line)
        say(f"wrote {report(runs, args.out / 'report.html')}")
    if failed:
        raise failed


def evaluate(args: argparse.Namespace) -> None:
    """`localmotion evaluate`"""
    from localmotion.console import say
    from localmotion.evaluation.evaluate import evaluate_run

    result = evaluate_run(
        args.run, episodes=args.episodes, seed=args.seed, video=args.video, device=args.device, policy=args.policy
    )
    say(json.dumps(result))
    if args.video:
        say(f"film: {args.video}")


def predict(args: argparse.Namespace) -> None:
    """`localmotion predict`"""
    from localmotion.console import progress, say, show_table
    from localmotion.evaluation.predict import predict as run_prediction
    from localmotion.report.pictures import save_strips

    options = {name: getattr(args, name) for name in ("clips", "windows", "split", "seed", "device")}
    with progress("predict", 1, "windows") as advance:
        found = run_prediction(args.checkpoint, args.data, **options, progress=advance)
    save_strips(found.pictures, args.out, context=found.context)
    args.out.with_suffix(".json").write_text(json.dumps({"windows": found.windows, "scores": found.scores}, indent=1) + "\n")
    for kind, title in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        show_table(f"{title}: mean of {found.windows} windows, by frames ahead", *found.table(kind), width=120)
    say(f"strips: {args.out}, scores: {args.out.with_suffix('.json')}")


def probe(args: argparse.Namespace) -> None:
    """`localmotion probe`"""
    from localmotion.console import progress, say, show_table
    from localmotion.evaluation.probes import probe as measure
    from localmotion.evaluation.probes import save_probes

    with progress("probe", 1, "codes") as advance:
        rows = measure(
            args.runs,
            args.data,
            length=args.length,
            untrained=not args.no_untrained,
            ceilings=not args.no_ceilings,
            device=args.device,
            progress=advance,
        )
    scores = [
        key for key in ("ridge velocities", "mlp velocities", "ridge actions", "mlp actions") if any(key in r for r in rows)
    ]
    cells = [[r["data"], r["code"], str(r["width"] or "–"), *(f"{r[k]:.3f}" if k in r else "–" for k in scores)] for r in rows]
    title = "R^2 on episodes not fitted to: 1 all of it, 0 no more than the mean"
    show_table(title, ["data", "code", "width", *scores], cells, width=160)
    if args.out:
        save_probes(rows, args.out)
        say(f"wrote {args.out}")


def perception_report(args: argparse.Namespace) -> None:
    """`localmotion perception-report`"""
    import cv2

    from localmotion.console import progress, say, show_table
    from localmotion.evaluation.perception_report import ReportSettings, draw_report, save_report, tables
    from localmotion.evaluation.perception_report import perception_report as measure

    cv2.setNumThreads(1)  # the times a pair are those of one core
    names = ("envs", "percepts", "qualities", "supersample", "backends", "policy", "episodes", "frames", "seed", "pictures")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in chosen.items()}
    settings = ReportSettings(**given)
    with progress("perception", 1, "parts") as advance:
        result = measure(settings, advance)
    for title, columns, rows in tables(result):
        show_table(title, columns, rows)
    for line in result["skipped"]:
        say(f"not measured: {line}")
    say(f"lengths in pixels of a picture of side {settings.size}; {result['seconds']:.0f} s")
    if args.out:
        save_report(result, args.out)
        say(f"numbers: {args.out}")
    if args.draw:
        for path in draw_report(settings, args.draw):
            say(f"picture: {path}")


def report(args: argparse.Namespace) -> None:
    """`localmotion report`"""
    from localmotion.console import say
    from localmotion.report.collect import report as make_report

    say(f"report: {make_report(args.runs, args.out)}")


def collect(args: argparse.Namespace) -> None:
    """`localmotion collect`"""
    from localmotion.console import progress, say
    from localmotion.evaluation.collect import collect as record

    settings = {"quality": args.quality, "action_repeat": args.action_repeat}
    with progress("collect", args.episodes, "videos") as advance:
        found = record(
            args.env,
            args.out,
            policy=args.policy,
            episodes=args.episodes,
            seed=args.seed,
            steps=args.steps,
            size=args.pixels,
            recipe=_recipe_of(args) if args.store else None,
            noise=args.noise,
            progress=advance,
            **settings,
        )
    for line in found.lines():
        say(line)


def demo(args: argparse.Namespace) -> None:
    """`localmotion demo`"""
    from localmotion.demo import demo as run_demo

    run_demo(args.run, videos=args.videos)


if __name__ == "__main__":
    main()
