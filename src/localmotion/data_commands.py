"""The commands of the command line that make and show data: scan, extract, store, inspect. No logic."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmotion import launch_commands
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.files import check_output

if TYPE_CHECKING:
    from localmotion.recipe import Recipe


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags of `_recipe` describe."""
    from dataclasses import fields

    from localmotion.recipe import Recipe, read_recipe

    given: dict[str, Any] = {f.name: getattr(args, f"recipe_{f.name}", None) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    if "size" in given and "percept_size" not in given:
        given["percept_size"] = max(128, given["size"]) if max(128, given["size"]) % given["size"] == 0 else given["size"]
    return read_recipe(given) or Recipe()


def limits_of(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory limits for one video in its worker."""
    if not (args.timeout > 0 and 0 <= args.memory < 2**20):
        raise ConfigError("--timeout takes seconds above 0, and --memory GiB, 0 for no limit")
    return {"timeout": args.timeout, "memory": int(args.memory * 2**30) or None}


def scan(args: argparse.Namespace) -> None:
    """`localmotion scan`"""
    from localmotion.console import progress, say
    from localmotion.machine import cores
    from localmotion.runs.datasets import local_videos
    from localmotion.video.scan import manifest_path
    from localmotion.video.scan import scan as scan_videos

    path = manifest_path(args.manifest) if args.manifest else None
    if path:
        check_output(path, ConfigError)
    videos = local_videos(args.videos, args.camera)
    if not args.decode:
        _list_only(args, videos, path)
        return
    journal = path and path.with_name(f"{path.name}.scanned")
    with progress("scan", 1, "videos") as advance:
        found = scan_videos(
            videos,
            camera=args.camera,
            min_frames=args.min_frames,
            list_file=args.list_file,
            workers=args.workers if args.workers is not None else cores(),
            progress=advance,
            journal=journal,
            **limits_of(args),
        )
    for line in found.table():
        say(line)
    if path and journal:
        found.save(path, max_frames=args.max_frames, max_clips=args.max_clips)
        journal.unlink()
        say(f"manifest: {path}")
    if (message := found.nothing_usable()) is not None:
        raise LocalmotionError(message)


def _list_only(args: argparse.Namespace, videos: Path, path: Path | None) -> None:
    """`localmotion scan --no-decode`"""
    from localmotion.console import progress, say
    from localmotion.video.history import Limits
    from localmotion.video.manifest import list_videos

    if path is None:
        raise ConfigError("--no-decode: only lists the videos; give the list to write with --manifest FILE")
    limits = Limits(args.min_frames, args.max_frames, args.max_clips)
    with progress("list", 1, "videos") as advance:
        lines = list_videos(path, videos, limits, list_file=args.list_file, camera=args.camera, progress=advance)
    for line in lines:
        say(line)


def extract(args: argparse.Namespace) -> None:
    """`localmotion extract`"""
    from localmotion.console import progress, say
    from localmotion.machine import cores
    from localmotion.perception.extract import extract_folder
    from localmotion.runs.datasets import local_videos

    if args.shard_clips is not None and args.shard_clips < 1:
        raise ConfigError(f"--shard-clips {args.shard_clips}: at least one video in a shard")
    if args.launch or args.jobs or args.pack != 1 or args.launch_option:
        launch_commands.launch_extract(args)
        return
    if args.manifest:
        _extract_part(args)
        return
    if isinstance(args.out, str):
        raise ConfigError(f"extract --out {args.out}: object storage needs a --manifest, which localmotion scan writes")
    if args.videos is None:
        raise ConfigError("extract: give the folder of videos, or a --manifest of localmotion scan")
    if (args.part, args.parts) != (0, 1):
        raise ConfigError("extract: --part and --parts need a --manifest, which localmotion scan writes")
    videos = local_videos(args.videos, args.camera)
    with progress("extract", 1, "videos") as advance:
        summary = extract_folder(
            videos,
            args.out,
            recipe_of(args),
            camera=args.camera,
            list_file=args.list_file,
            min_frames=25 if args.min_frames is None else args.min_frames,
            max_frames=300 if args.max_frames is None else args.max_frames,
            max_clips=args.max_clips,
            workers=args.workers if args.workers is not None else cores(),
            shard_clips=32 if args.shard_clips is None else args.shard_clips,
            progress=advance,
            together=args.together,
            **limits_of(args),
        )
    for line in summary.lines():
        say(line)


def _extract_part(args: argparse.Namespace) -> None:
    """`localmotion extract --manifest`"""
    from localmotion.console import progress, say
    from localmotion.machine import cores
    from localmotion.perception import extract_shards
    from localmotion.video.scan import manifest_path

    fixed = ("videos", "list_file", "camera", "min_frames", "max_frames", "max_clips")
    if given := [name for name in fixed if getattr(args, name) not in (None, "")]:
        raise ConfigError(f"extract --manifest: {given[0]} is a part of the manifest; give it to localmotion scan --manifest")
    with progress("extract", 1, "videos") as advance:
        summary = extract_shards(
            manifest_path(args.manifest),
            args.out,
            recipe_of(args),
            args.part,
            args.parts,
            workers=args.workers if args.workers is not None else cores(),
            shard_clips=args.shard_clips,
            progress=advance,
            together=args.together,
            **limits_of(args),
        )
    for line in summary.lines():
        say(line)


def store(args: argparse.Namespace) -> None:
    """`localmotion store`"""
    from localmotion.console import progress, say
    from localmotion.machine import cores
    from localmotion.video.finish import finish_store, store_lines

    if args.action == "finish":
        with progress("finish", 1, "shards") as advance:
            workers = args.workers if args.workers is not None else cores()
            found = finish_store(args.store, partial_store=args.partial, workers=workers, progress=advance)
        lines = found.lines()
    else:
        lines = store_lines(args.store)
    for line in lines:
        say(line)


def inspect(args: argparse.Namespace) -> None:
    """`localmotion inspect`"""
    from localmotion.console import say
    from localmotion.perception.draw import inspect as draw
    from localmotion.video.store import ClipStore

    check_output(args.out, ConfigError, suffixes=(".png", ".mp4"))
    store = ClipStore(args.store)
    number = args.clip and args.clip.isdigit() and args.clip not in store.ids
    draw(store, args.out, int(args.clip) if number else args.clip)
    say(f"wrote {args.out}")
