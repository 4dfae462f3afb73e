"""The commands of the command line. Each function gets parsed arguments, calls the library and prints. No logic."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from localmotion.data_commands import recipe_of
from localmotion.errors import ConfigError, Typed
from localmotion.files import check_output
from localmotion.foreign import trust_env
from localmotion.machine import launched

if TYPE_CHECKING:
    pass


def _settings(rest: list[str]) -> list[Typed]:
    """Flags ``--name value`` or ``--name=value`` as name=value texts."""
    out: list[Typed] = []
    items = list(rest)
    while items:
        flag = items.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}; settings are written --name value")
        name = flag[2:].replace("-", "_") if "=" not in flag else flag[2:].partition("=")[0].replace("-", "_")
        if "=" in flag:
            out.append(Typed(f"{name}={flag.partition('=')[2]}", flag))
        elif items:
            value = items.pop(0)
            out.append(Typed(f"{name}={value}", f"{flag} {value!r}"))
        else:
            raise ConfigError(f"setting {flag} lacks its value")
    return out


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The value of --env-options."""
    if not isinstance(args.env_options, dict):
        raise ConfigError('--env-options is a JSON object of options by name, e.g. {"look": "textured"}')
    return args.env_options


def info(args: argparse.Namespace) -> None:
    """`localmotion info`"""
    from localmotion.console import say
    from localmotion.info import report_lines

    for line in report_lines():
        say(line)


def train(args: argparse.Namespace) -> None:
    """`localmotion pretrain | finetune | train`, and further stages of a method by their names"""
    from localmotion import methods
    from localmotion.methods.base import Source
    from localmotion.runs.settings import check_read, compose, named_file, read_settings

    asked = {"method": args.method, "stage": args.command, "preset": args.preset}
    given = read_settings(args.config, **asked) if args.config else {}
    args.method, preset = args.method or given.get("method"), args.preset or given.get("preset", "small")
    if not args.method:
        if not args.help:
            raise ConfigError(f"{args.command}: give a --method; registered: {', '.join(methods.names())}")
        args.method = "drp"
    rest = [item for item in args.rest if item not in ("-h", "--help")]
    own = _settings(rest)
    texts: list[str] = [*own, *(Typed(text, f"--set {text!r}") for text in args.set)]
    named = next((t.partition("=")[2] for t in texts if t.startswith("env=")), "")
    env = named or given.get("env", "")
    with named_file(args.config, args.method, args.command, preset, env, given):
        run = compose(args.method, args.command, preset=preset, env=env, flags=given, settings=texts)
    check_read(run, own)  # not --set: studies and scripts give it settings that several stages share
    if named:  # not by a file
        trust_env(run.env)  # only this command line has named it
    if args.help:
        _show_settings(args.command, run)
        return
    if not args.run:
        raise ConfigError(f"{args.command}: give the run directory with --run DIRECTORY")
    from localmotion.training.tracking import tracked

    if methods.get(args.method).stages.get(args.command, Source.CLIPS) is Source.CLIPS:
        from localmotion.training.pretrain import pretrain as learn
    else:
        from localmotion.training.finetune import finetune as learn
    with tracked(args.run, args.track if launched()[0] == 0 else []):
        learn(run, args.run)


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


def evaluate(args: argparse.Namespace) -> None:
    """`localmotion evaluate`"""
    from localmotion.acting.episodes import EvaluationError
    from localmotion.console import say
    from localmotion.evaluation.evaluate import evaluate_run
    from localmotion.runs.sharing import local_run

    trust_env(args.env)
    try:
        result = evaluate_run(
            local_run(args.run),
            episodes=args.episodes,
            seed=args.seed,
            video=args.video,
            device=args.device,
            policy=args.policy,
            which=args.which,
            env=args.env,
            env_options=_options(args),
        )
    except EvaluationError as error:
        if error.measured:
            say(json.dumps(error.measured))
        raise
    say(json.dumps(result))
    if args.video:
        say(f"film: {args.video}")


def export(args: argparse.Namespace) -> None:
    """`localmotion export`"""
    from localmotion.acting.export import ABOUT, export_run
    from localmotion.console import say

    found = export_run(args.run, args.out, args.format, which=args.which)
    for name, part in found["programs"].items():
        say(f"{name}: {args.out / part['file']}, differs from the method by at most {part['difference']:.1g}")
    say(f"names, shapes, range of actions: {args.out / ABOUT}")


def predict(args: argparse.Namespace) -> None:
    """`localmotion predict`"""
    from localmotion.console import progress, say, show_table
    from localmotion.evaluation.predict import predict as run_prediction
    from localmotion.report.strips import HIGH, HIGHEST, clips_that_fit, save_strips
    from localmotion.runs.sharing import local_run

    scores = args.out.with_suffix(".json")
    check_output(args.out, ConfigError, suffixes=(".png",))
    check_output(scores, ConfigError)
    options = {name: getattr(args, name) for name in ("windows", "split", "seed", "device")}
    options["clips"] = 4 if args.clips is None else args.clips
    runs = [local_run(name) for name in args.checkpoint]
    with progress("predict", 1, "windows") as advance:
        found = run_prediction(runs, args.data, **options, progress=advance)
    for reason in found.rejected:
        say(f"left out, {reason}")
    high, count = HIGH if args.clips is None else HIGHEST, len(found.pictures["truth"])
    drawn = clips_that_fit(found.pictures, high, context=found.context, errors=args.errors)
    if drawn < count:
        more = f"; --clips {count} draws all" if args.clips is None else ", the most that a picture can have"
        say(f"strips: {drawn} of {count} windows; with more the picture would be higher than {high:,} pixels{more}")
    save_strips({k: x[:drawn] for k, x in found.pictures.items()}, args.out, context=found.context, errors=args.errors)
    scores.write_text(json.dumps({"windows": found.windows, "scores": found.scores}, indent=1) + "\n")
    for kind, title in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        show_table(f"{title}: mean of {found.windows} windows, by frames ahead", *found.table(kind), width=120)
    say(f"strips: {args.out}, scores: {scores}")


def probe(args: argparse.Namespace) -> None:
    """`localmotion probe`"""
    from localmotion.console import progress, say, show_table
    from localmotion.evaluation.probes import probe as measure
    from localmotion.evaluation.probes import save_probes, score_tables
    from localmotion.runs.sharing import local_run

    if args.out:
        check_output(args.out, ConfigError, suffixes=(".json",))
    runs = [local_run(name) for name in args.runs]
    with progress("probe", 1, "codes") as advance:
        rows = measure(
            runs,
            args.data,
            tests=args.test_data,
            length=args.length,
            untrained=not args.no_untrained,
            ceilings=not args.no_ceilings,
            networks=not args.ridge_only,
            device=args.device,
            threads=args.threads,
            progress=advance,
        )
    for title, columns, cells in score_tables(rows):
        show_table(f"{title}: R^2 on test episodes (share of exact flow), nmse: error / variance", columns, cells, width=160)
    if args.out:
        save_probes(rows, args.out)
        say(f"wrote {args.out}")


def perception_report(args: argparse.Namespace) -> None:
    """`localmotion perception-report`"""
    import cv2

    from localmotion.console import progress, say, show_table
    from localmotion.perception_eval.report import ReportSettings, draw_report, save_report, tables
    from localmotion.perception_eval.report import perception_report as measure

    cv2.setNumThreads(1)  # times per pair of frames are for one core
    names = (
        "envs",
        "percepts",
        "qualities",
        "supersample",
        "backends",
        "policy",
        "episodes",
        "frames",
        "seed",
        "pictures",
        "masks",
    )
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in chosen.items()}
    settings = ReportSettings(**given)
    if args.out:
        check_output(args.out, ConfigError, suffixes=(".json",))
    if args.draw:
        check_output(args.draw, ConfigError, folder=True)
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
    from localmotion.report.build import report as make_report

    check_output(args.out, ConfigError, suffixes=(".html", ".htm"))
    say(f"report: {make_report(args.runs, args.out)}")


def check_env(args: argparse.Namespace) -> None:
    """`localmotion check-env`. Exits with 1 if nothing can be trained on the environment."""
    import yaml

    from localmotion.acting.env_check import inspect_env
    from localmotion.console import say

    options = {}
    for text in args.env_option:
        name, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--env-option {text!r:.80}: write it as name=value")
        try:
            options[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--env-option {text!r:.80}: the value cannot be read") from error
    trust_env(args.env)
    found = inspect_env(args.env, options, steps=args.steps, size=args.size)
    for line in [json.dumps(found.to_json(), indent=1)] if args.json else found.lines():
        say(line)
    if not found.usable:
        raise SystemExit(1)


def watch(args: argparse.Namespace) -> None:
    """`localmotion watch`"""
    from localmotion.report.watch import watch as serve

    serve(args.runs, host=args.host, port=args.port, every=args.every)
    sys.stdout.flush()
    os._exit(0)  # at once: a thread that draws a chart has nothing to save, and Python's end would run into it


def expert(args: argparse.Namespace) -> None:
    """`localmotion expert`"""
    from localmotion.console import say
    from localmotion.training.experts import train_expert
    from localmotion.training.interrupt import Interrupted

    trust_env(args.env)
    try:
        found = train_expert(args.env, args.out, env_steps=args.env_steps, seed=args.seed, episodes=args.episodes)
    except Interrupted as stopped:  # unlike a run, the same command does not go on
        say(f"stopped early; {args.out} has the expert of this moment")
        raise SystemExit(stopped.code) from stopped
    score = f"return {found['return_mean']:.1f} +- {found['return_std']:.1f} in {found['episodes']} episodes"
    say(
        f"{args.env}: {score} after {found['env_steps']:,} env steps, {found['updates']:,} updates, {found['cpu_seconds']:.0f} CPU s"
    )
    if not found["updates"]:
        begin = found["settings"]["begin"] * found["action_repeat"]
        say(f"warning: it learned nothing; the first {begin:,} env steps are random. Raise --env-steps and choose another folder")
        return
    say(f"videos of it: localmotion collect {args.env} --policy expert:{args.out} --out FOLDER")


def collect(args: argparse.Namespace) -> None:
    """`localmotion collect`"""
    from localmotion.console import progress, say
    from localmotion.envs import check_env
    from localmotion.recording.collect import collect as record
    from localmotion.runs.sharing import local_run

    settings = {"quality": args.quality, "action_repeat": args.action_repeat}
    trust_env(args.env)
    check_env(args.env, _options(args))
    if args.motion == "exact" and not args.store:
        raise ConfigError("--motion exact: mp4 files have no motion; write a clip store with --store")
    own = [name for name in ("flow", "segment", "track", "redraw_rounds") if getattr(args, f"recipe_{name}") is not None]
    if args.motion and own:
        raise ConfigError(f"--motion {args.motion}: chooses {', '.join(own)} itself; leave out one or the other")
    with progress("collect", args.episodes, "videos") as advance:
        found = record(
            args.env,
            args.out,
            policy=str(local_run(args.policy)),
            episodes=args.episodes,
            seed=args.seed,
            steps=args.steps,
            size=args.pixels,
            recipe=recipe_of(args).with_motion(args.motion or "recipe") if args.store else None,
            noise=args.noise,
            progress=advance,
            **settings,
            **args.env_options,
        )
    for line in found.lines():
        say(line)


def push(args: argparse.Namespace) -> None:
    """`localmotion push`"""
    from localmotion.console import say
    from localmotion.report.curve import learning_curve
    from localmotion.runs.push import push as push_run

    curve = learning_curve(args.run)
    say(push_run(args.run, args.target, license=args.license, curve=curve, public=args.public, dry_run=args.dry_run))


def shelf(args: argparse.Namespace) -> None:
    """`localmotion shelf`"""
    from localmotion.console import say, show_table
    from localmotion.runs.sharing import shelf_lines

    found = shelf_lines()
    if found:
        show_table("The weights shelf: --checkpoint shelf:NAME", *found, width=160)
    else:
        say("the weights shelf is empty here; it is the folder weights of a source checkout of localmotion (docs/sharing.md)")


def completion(args: argparse.Namespace) -> None:
    """`localmotion completion`"""
    from localmotion.cli import _parser
    from localmotion.foreign import needs

    needs("completion", "shtab", who="completion")
    import shtab

    print(shtab.complete(_parser(), args.shell))


def demo(args: argparse.Namespace) -> None:
    """`localmotion demo`"""
    from localmotion.demo import demo as run_demo

    check_output(args.run, ConfigError, folder=True)
    run_demo(args.run, videos=args.videos, seed=args.seed)
