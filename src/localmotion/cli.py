"""The command line: parses arguments, calls a command, prints errors. No logic.

Exit codes: 0 success, 2 a LocalmotionError (one line on stderr), 130 Ctrl-C (commands that save keep finished work). A
training run that is stopped by a signal saves first and exits with 128 + the signal: 130 SIGINT, 143 SIGTERM, 138
SIGUSR1, 140 SIGUSR2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from localmotion import __version__, commands, data_commands, launch_commands
from localmotion.errors import ConfigError, LocalmotionError, unknown_name
from localmotion.files import told, trust_links
from localmotion.foreign import trust_env
from localmotion.machine import launched
from localmotion.video.remote import place_of


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, as for all other errors.

    Flags cannot be shortened: `--follow` is a setting, not `--follow-links`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r:.80} is not JSON; write it as \'{{"look": "textured"}}\'') from error


def _parser(stage: str = "") -> _Parser:
    """The parser of all commands. ``stage``: an additional command, for a stage that only some methods have."""
    parser = _Parser(
        prog="localmotion",
        description="Pre-trains world models on unlabeled video and fine-tunes them into agents.",
        epilog="A stage that only some methods have is a command too: localmotion decode --method ...",
    )
    parser.add_argument("--version", action="version", version=f"localmotion {__version__}")
    group = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, text: str, call: Callable[..., Any]) -> _Parser:
        sub: _Parser = group.add_parser(name, help=text, description=text, add_help=name not in (*TRAINING, stage))
        sub.add_argument(
            "--follow-links", action="store_true", help="accept links that lead out of stores and runs, if they are your own"
        )
        if name in (*WITH_METHODS, stage):
            sub.add_argument(
                "--plugin",
                action="append",
                default=[],
                metavar="MODULE:CLASS",
                help="import a method from outside the package (docs/add_a_method.md); repeatable",
            )
            sub.add_argument(
                "--trust-env",
                action="append",
                default=[],
                metavar="NAME",
                help="import this environment of your own (docs/own_environments.md) where a run or study names it; repeatable",
            )
        sub.set_defaults(call=call)
        return sub

    sub = add("info", "Versions, device, threads, bf16, tested GL backend, installed extras.", commands.info)

    sub = add("scan", "List the usable videos of a folder, and the reasons for the rejected ones.", data_commands.scan)
    _videos(sub)
    sub.add_argument("--manifest", type=Path, help="write the results here, one JSON line per video; extract --manifest reads it")
    sub.add_argument(
        "--no-decode", dest="decode", action="store_false", help="only list the videos in the manifest, without looking into them"
    )
    sub.add_argument("--max-frames", type=int, default=300, help="frames of a clip, for extract --manifest (default 300)")
    sub.add_argument("--max-clips", type=int, help="maximum number of clips per video, for extract --manifest; default: all")

    sub = add(
        "extract",
        "Write Atomic Actions of a folder of videos to a clip store. The same command continues where it stopped.",
        data_commands.extract,
    )
    _videos(sub, optional=True)
    sub.add_argument(
        "--out",
        type=place_of,
        required=True,
        help="the clip store, a directory; with --manifest also an address, e.g. s3://bucket/store",
    )
    sub.add_argument("--max-frames", type=int, help="frames of a clip; a longer video becomes several (default 300)")
    sub.add_argument("--max-clips", type=int, help="maximum number of clips per video, from its beginning; default: all")
    sub.add_argument(
        "--together",
        type=int,
        help="videos per worker and batch of the networks; default: 16 with a network on a GPU, else 1",
    )
    sub.add_argument("--manifest", type=Path, help="extract the videos of this manifest of scan; no folder is walked")
    sub.add_argument("--part", type=int, default=0, help="with --manifest: number of this part, from 0 (default 0)")
    sub.add_argument("--parts", type=int, default=1, help="with --manifest: number of parts (default 1)")
    sub.add_argument(
        "--shard-clips",
        type=int,
        help="videos of a shard (default 32; with --manifest those of the store, and for a new one above 320,000 videos 1,024)",
    )
    launch_commands.add_launch(sub, "all parts")
    _recipe(sub)

    sub = add(
        "store", "finish: check a store of several parts and write its index. show: what a store holds.", data_commands.store
    )
    sub.add_argument("action", choices=("finish", "show"))
    sub.add_argument("store", type=place_of, help="clip store, a directory or an address, e.g. s3://bucket/store")
    sub.add_argument("--partial", action="store_true", help="finish a store of which shards are missing")
    sub.add_argument("--workers", type=int, help="processes that read shards; default: one per core")

    sub = add(
        "inspect",
        "Draw a clip with its tracks, flow, patches and mask, as a picture (.png) or film (.mp4).",
        data_commands.inspect,
    )
    sub.add_argument("store", type=Path, help="clip store")
    sub.add_argument("--out", type=Path, required=True, help="picture.png or film.mp4")
    sub.add_argument("--clip", help="clip id or number; default: one with much motion")

    own = {stage: f"Run the stage {stage} of a method. The same command with the same run directory resumes."} if stage else {}
    for name, text in (TRAINING | own).items():
        sub = add(name, text, commands.train)
        sub.add_argument("--method", help="registry name of the method, e.g. drp")
        sub.add_argument("--preset", help="paper, small (default), tiny or debug")
        sub.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="settings from a file: a run's config.json, or YAML of its form; flags win",
        )
        sub.add_argument("--run", type=Path, help="run directory; an existing one with the same settings is continued")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="change any setting (the last parts of its name where they are unique), also one that this stage does not read",
        )
        _track(sub)
        sub.add_argument("-h", "--help", action="store_true", help="show this help and every setting")

    sub = add(
        "study", "Run a grid of methods, tasks, seeds and settings, several at a time, and report it.", launch_commands.study
    )
    sub.add_argument("file", type=Path, help="the study, .yaml (docs/studies.md)")
    sub.add_argument("--out", type=Path, required=True, help="folder for its runs, page and table")
    launch_commands.add_launch(sub, "runs", "local")
    _track(sub)

    sub = add("evaluate", "Play evaluation episodes with a trained agent.", commands.evaluate)
    sub.add_argument("run", help="run directory, hf:owner/name[@revision] or shelf:NAME")
    sub.add_argument("--episodes", type=int, default=10, help="episodes (paper: 10)")
    sub.add_argument(
        "--seed", type=int, help="seed of the evaluation episodes; default: the run's, for --which best the next one"
    )
    sub.add_argument("--video", type=Path, help="film of the first episode, .mp4")
    sub.add_argument("--policy", choices=("agent", "random"), default="agent", help="random gives the floor")
    sub.add_argument(
        "--which", choices=("newest", "best"), default="newest", help="weights: the newest, or of the best evaluation"
    )
    sub.add_argument("--device", default="auto")
    sub.add_argument("--env", default="", help="where to play an agent that learned from logged episodes without an environment")
    sub.add_argument(
        "--env-options",
        type=_json,
        default={},
        help='options of the environment that differ from the run\'s, as JSON, e.g. {"split": "val"}: backgrounds not shown in training',
    )

    sub = add(
        "export",
        "Write the encoder and the agent step of a run as programs that run without localmotion (docs/deployment.md).",
        commands.export,
    )
    sub.add_argument("run", help="run directory, hf:owner/name[@revision] or shelf:NAME")
    sub.add_argument("--format", choices=("torch", "onnx"), default="torch", help="torch: .pt2 of torch.export; onnx: .onnx")
    sub.add_argument("--out", type=Path, required=True, help="folder for the programs and export.json")
    sub.add_argument("--which", choices=("newest", "best"), default="newest", help="weights, as in evaluate")

    sub = add(
        "check-env",
        "Try an environment of your own, and say what fits, what does not, and which methods can use it.",
        commands.check_env,
    )
    sub.add_argument("env", help="gym:ID, gym:MODULE:ID or MODULE:CALLABLE (docs/own_environments.md)")
    sub.add_argument(
        "--env-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the environment, or time_limit; repeatable",
    )
    sub.add_argument("--steps", type=int, default=200, help="env steps of random actions (default 200)")
    sub.add_argument("--size", type=int, default=64, help="side of the agent's pictures (default 64)")
    sub.add_argument("--json", action="store_true", help="print everything as JSON")

    sub = add(
        "expert",
        "Train an expert on a task's state vector, for videos that show the task (collect --policy expert:DIRECTORY). Minutes on one core.",
        commands.expert,
    )
    sub.add_argument(
        "env", help="environment, e.g. planar:walker_run; its expert also acts in dmc:walker_run and suites built on it"
    )
    sub.add_argument("--out", type=Path, required=True, help="folder for expert.safetensors and expert.json")
    sub.add_argument("--env-steps", type=int, default=400_000, help="env steps to play (default 400,000)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--episodes", type=int, default=10, help="episodes played at the end, for its return (default 10)")

    sub = add("collect", "Record unlabeled videos of an environment, as mp4 files or into a clip store.", commands.collect)
    sub.add_argument("env", help="environment, e.g. dmc:walker_walk")
    sub.add_argument("--out", type=Path, required=True, help="folder of mp4 files, or with --store a clip store")
    sub.add_argument("--store", action="store_true", help="run perception and write a clip store instead of mp4 files")
    sub.add_argument(
        "--policy",
        default="smooth",
        help="random, smooth (random, changing smoothly), expert (Meta-World's scripts), expert:PATH (of localmotion expert), or a run"
        " (directory, hf:owner/name[@revision] or shelf:NAME)",
    )
    sub.add_argument("--episodes", type=int, default=16, help="videos to record (default 16)")
    sub.add_argument("--steps", type=int, default=0, help="maximum agent steps per video (default 0: whole episodes)")
    sub.add_argument("--noise", type=float, default=0.0, help="standard deviation of noise added to the actions (default 0)")
    sub.add_argument("--seed", type=int, default=0, help="seed of episodes and actions (default 0)")
    sub.add_argument("--action-repeat", type=int, help="env steps per agent step; default: the suite's")
    sub.add_argument("--quality", choices=("auto", "fast", "reference"), default="auto")
    sub.add_argument("--pixels", type=int, default=128, help="side of the mp4's pictures")
    sub.add_argument(
        "--motion",
        choices=("perceived", "exact"),
        help="motion of a clip store: perceived in the pictures (the default), or exact from the simulator's state; sets flow, segment"
        " and track",
    )
    sub.add_argument(
        "--env-options", type=_json, default={}, help='options of the environment as JSON, e.g. {"look": "textured"}'
    )
    _recipe(sub, without=("seed",))

    sub = add(
        "predict", "Open-loop prediction of clips, runs side by side: truth, prediction, error; PSNR and SSIM.", commands.predict
    )
    sub.add_argument(
        "--checkpoint", required=True, nargs="+", help="pre-training runs: directories, hf:owner/name[@revision] or shelf:NAME"
    )
    sub.add_argument("--data", type=Path, required=True, help="clip store, video file, or folder of videos")
    sub.add_argument("--out", type=Path, required=True, help="strips, .png; the scores are written beside it, .json")
    sub.add_argument("--clips", type=int, help="windows drawn; default: 4, or as many as fit in 6,000 pixels of height")
    sub.add_argument("--no-errors", dest="errors", action="store_false", help="draw no rows of errors: half the height")
    sub.add_argument("--windows", type=int, default=32, help="windows scored")
    sub.add_argument(
        "--split",
        choices=("heldout", "train", "all"),
        default="heldout",
        help="clips that are scored: those that the first run held out (default), those that it learned from, or all; of videos always all",
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="auto")

    sub = add(
        "probe", "Predict true motion and actions from motion codes, by ridge regression and a small network.", commands.probe
    )
    sub.add_argument("runs", nargs="*", help="runs of methods with a motion code: directories, hf:owner/name or shelf:NAME")
    sub.add_argument(
        "--data", type=Path, action="append", required=True, help="collection (localmotion collect --store), repeatable"
    )
    sub.add_argument(
        "--test-data",
        type=Path,
        action="append",
        default=[],
        help="score on this collection instead of a fifth of the episodes, e.g. one with other backgrounds; one for each --data",
    )
    sub.add_argument("--length", type=int, default=25, help="frames of a window, as in pre-training (default 25)")
    sub.add_argument("--no-untrained", action="store_true", help="leave out each method's network with fresh weights")
    sub.add_argument("--no-ceilings", action="store_true", help="leave out the networks trained on the targets themselves")
    sub.add_argument("--ridge-only", action="store_true", help="ridge regression only: seconds instead of minutes")
    sub.add_argument("--out", type=Path, help="write the numbers here, .json")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1; 0: one per free core)")

    sub = add(
        "perception-report",
        "Measure flow, foreground and tracks against the exact motion of environments and of warped pictures.",
        commands.perception_report,
    )
    sub.add_argument(
        "--env", action="append", dest="envs", metavar="NAME", help="environment, repeatable; default: ten of all suites"
    )
    sub.add_argument(
        "--percept",
        action="append",
        type=int,
        dest="percepts",
        help="side of the perceived pictures, repeatable; default: 64, 128",
    )
    sub.add_argument("--quality", action="append", dest="qualities", help="fast, reference or auto, repeatable; default: fast")
    sub.add_argument("--supersample", type=int, help="draw pictures at n times their side and average them (default 1)")
    sub.add_argument(
        "--backend", action="append", dest="backends", help="name, embedded (default) or all that are installed; repeatable"
    )
    sub.add_argument("--policy", help="random (default) or smooth")
    sub.add_argument("--episodes", type=int, help="episodes per environment (default 2)")
    sub.add_argument("--frames", type=int, help="frames per episode (default 26)")
    sub.add_argument("--seed", type=int, help="seed of episodes, actions and points (default 0)")
    sub.add_argument(
        "--pictures", type=Path, help="video or folder of videos whose frames are warped; default: procedural pictures"
    )
    sub.add_argument(
        "--masks",
        type=Path,
        help="masks of a video segmentation data set such as DAVIS: a folder for each video, with the frames beside (docs/perception.md)",
    )
    sub.add_argument("--out", type=Path, help="write all numbers here, .json")
    sub.add_argument("--draw", type=Path, help="directory for pictures of true and estimated flow, one per environment and size")

    sub = add("report", "One self-contained HTML page of one or more runs.", commands.report)
    sub.add_argument("runs", type=Path, nargs="+", help="run directories")
    sub.add_argument("--out", type=Path, required=True, help="page.html")

    sub = add("watch", "Serve the report of running runs on this machine, with what is new as it comes.", commands.watch)
    sub.add_argument("runs", nargs="+", help="run directories, folders of runs, or patterns of these; runs may begin later")
    sub.add_argument("--port", type=int, help="port; default: 8600, or the next one that is free")
    sub.add_argument("--host", default="127.0.0.1", help="address to serve at (default 127.0.0.1: only this machine)")
    sub.add_argument("--every", type=float, default=5.0, help="seconds between two looks for something new (default 5)")

    sub = add(
        "push",
        "Share the weights of a run: to a repository of the Hugging Face Hub, to the weights shelf, or to a folder.",
        commands.push,
    )
    sub.add_argument("run", type=Path, help="run directory; its newest weights are shared")
    sub.add_argument(
        "target", help="hf:owner/name (a repository of the Hub), shelf:NAME (weights/NAME of a source checkout), or a new folder"
    )
    sub.add_argument("--license", default="", help="license of the weights, e.g. mit or cc-by-4.0; default: the card names none")
    sub.add_argument("--public", action="store_true", help="a new repository is public; default: private")
    sub.add_argument("--dry-run", action="store_true", help="write the folder RUN/shared and stop")

    sub = add("shelf", "List the weights shelf: name, method, preset, data, MB and scores of each entry.", commands.shelf)

    sub = add(
        "completion",
        'Print completion for a shell. bash: eval "$(localmotion completion bash)"; zsh: write it to a file _localmotion of $fpath.',
        commands.completion,
    )
    sub.add_argument("shell", choices=("bash", "zsh"))

    sub = add("demo", "The whole chain on this machine, from videos to a report. Needs no data and no network.", commands.demo)
    sub.add_argument("--run", type=Path, default=Path("demo_run"), help="where everything goes")
    sub.add_argument("--videos", type=Path, help="your own folder of videos instead of rendered ones")
    sub.add_argument("--seed", type=int, default=0, help="seed of videos, training runs and last evaluation")
    return parser


TRAINING = {
    "pretrain": "Pre-train a method on a clip store. The same command with the same run directory resumes.",
    "finetune": "Fine-tune a pre-trained method in an environment. The same command with the same run directory resumes.",
    "train": "Learn in an environment from scratch. The same command with the same run directory resumes.",
}
WITH_METHODS = {*TRAINING, "study", "evaluate", "collect", "predict", "probe", "report", "watch", "push", "export"}
"""Commands that take a method or read a run."""


def _track(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="TRACKER",
        help="send what the run logs to tensorboard, wandb or trackio (docs/tracking.md); repeatable",
    )


def _videos(sub: argparse.ArgumentParser, optional: bool = False) -> None:
    sub.add_argument(
        "videos",
        type=Path,
        nargs="?" if optional else None,
        help="folder of mp4/webm/mkv/avi/mov/gif files or of frame folders; lerobot:PATH or lerobot:owner/name[@revision] for a"
        " LeRobot data set",
    )
    sub.add_argument("--camera", default="", metavar="KEY", help="camera of a LeRobot data set; default: the only one")
    sub.add_argument(
        "--list",
        type=Path,
        dest="list_file",
        help="use only these videos: one id per line, `id n_frames class_id`, CSV or JSON, e.g. SSV2's lists",
    )
    sub.add_argument(
        "--min-frames", type=int, default=None if optional else 25, help="shorter videos are rejected (default and paper: 25)"
    )
    sub.add_argument(
        "--workers",
        type=int,
        help="processes that decode; default: one per core. 0: decode in this process, without the two limits",
    )
    sub.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="maximum seconds per video (for extract, per clip) before it is rejected (default 600)",
    )
    sub.add_argument(
        "--memory",
        type=float,
        default=4.0,
        help="maximum GiB for decoding one video before it is rejected (default 4; 0: no limit)",
    )


def _recipe(sub: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    from dataclasses import fields

    from localmotion.config import field_docs
    from localmotion.recipe import Recipe

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
        "--backend-options", dest="recipe_backend_options", type=_json, help=docs["backend_options"].replace("%", "%%")
    )


def _own_stage(argv: Sequence[str]) -> str:
    """The command, if it is not built in and the arguments name a method. It is then a stage of that method.

    Else "". Raises ConfigError for such a stage without a method.
    """
    command = argv[0] if argv else ""
    if not command or command.startswith("-"):
        return ""
    known = _parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    if command in (known or ()):
        return ""
    if any(text.partition("=")[0] == "--method" for text in argv):
        return command
    from localmotion import methods

    if of := [name for name in methods.names() if command in methods.get(name).stages]:
        raise ConfigError(
            f"{command} is a stage of {', '.join(of)}: name the method, e.g. localmotion {command} --method {of[-1]} --help"
        )
    return ""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    from localmotion.console import errors

    rank, count = launched()
    try:
        stage = _own_stage(sys.argv[1:] if argv is None else argv)
        args, rest = _parser(stage).parse_known_args(argv)
        if rest and args.command not in (*TRAINING, stage):
            known = [s for a in _parser()._subparsers._group_actions[0].choices[args.command]._actions for s in a.option_strings]  # type: ignore[union-attr,index]
            raise unknown_name(f"option of {args.command}", rest[0], known)
        args.rest, args.line = rest, list(sys.argv[1:] if argv is None else argv)
        trust_links(args.follow_links)
        for name in getattr(args, "trust_env", []):
            trust_env(name)
        if plugins := getattr(args, "plugin", []):
            from localmotion import methods

            for text in plugins:
                methods.plug_in(text)
        if count > 1 and args.command not in (*TRAINING, stage):
            raise ConfigError(f"{args.command} runs in one process, and torchrun started {count}; start it without torchrun")
        args.call(args)
    except (LocalmotionError, OSError) as error:
        errors.print(f"{f'rank {rank}: ' if count > 1 else ''}error: {told(error)}", markup=False, style="red")
        sys.exit(2)
    except KeyboardInterrupt as interruption:
        errors.print("interrupted; finished work is kept, and the same command goes on from there", style="yellow")
        sys.exit(getattr(interruption, "code", 130))


if __name__ == "__main__":
    main()
