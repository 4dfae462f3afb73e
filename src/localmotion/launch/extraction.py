"""An extraction in parts, through an engine: the parts of a manifest that have missing shards, then the end of the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localmotion.console import say
from localmotion.errors import ConfigError, LocalmotionError, StoreError
from localmotion.files import LOCK, locked
from localmotion.launch import Command, Launch, carry_out
from localmotion.launch.work import Stop
from localmotion.machine import cores
from localmotion.video.finish import Finished, finish_store
from localmotion.video.manifest_store import planned_shards
from localmotion.video.remote import Remote, is_remote
from localmotion.video.shards import shard_indices


def extract_parts(line: Sequence[str], out: Path | str, parts: int, launch: Launch, stop: Stop) -> Finished:
    """Give each part of ``line``, arguments of `localmotion`, that has missing shards in ``out``. Then finish the store.

    Files of the engine and outputs of the parts go to the folder OUT.launch: beside the store, or for an address of object storage
    (`video.remote`) in the working folder.

    Args:
        parts: number of parts. The same number continues an extraction best, but any number does.
        stop: requests to stop.

    Raises ConfigError as `Launch.engine`, LocalmotionError with the parts that failed, and StoreError as `finish_store` and if the
    same is launched already.
    """
    if parts < 1:
        raise ConfigError(f"--parts {parts}: at least 1")
    launch.check()
    if launch.name == "local":
        launch = launch._replace(jobs=min(launch.jobs or cores(), parts))
    beside = Path(Path(out).name) if is_remote(out) else Path(out)
    folder = beside.with_name(f"{beside.name}.launch").resolve()
    (folder / "console").mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"{out}: its parts are launched already; wait for that command", StoreError):
        names = [f"part-{part}" for part in range(parts)]
        done = sorted(set(names) - {names[part] for part in _missing(out, parts)})
        say(f"{parts} parts of {out}: {len(done)} finished, {parts - len(done)} to do")
        share = () if any(text.partition("=")[0] == "--workers" for text in line) else ("--workers", "{}")
        work = [
            Command(name, (*line, "--part", str(part)), str(folder / "console" / f"{name}.log"), str(Path.cwd()), share=share)
            for part, name in enumerate(names)
        ]
        if len(done) < parts:
            failed = carry_out(launch.engine(folder), work, done=done, jobs=launch.jobs, pack=launch.pack, stop=stop)
            if failed:
                first = next(iter(failed))
                raise LocalmotionError(
                    f"{out}: {len(failed)} of {parts} parts failed, first {first}: {failed[first]}; the same command gives them again"
                )
        return finish_store(out, workers=cores())


def _missing(out: Path | str, parts: int) -> set[int]:
    """The parts that have missing shards: all, before the store is begun."""
    remote = Remote(str(out)) if is_remote(out) else None
    planned = planned_shards(remote.making() if remote else Path(out))
    if planned is None:
        return set(range(parts))
    return {index % parts for index in set(range(planned)) - set(remote.shards() if remote else shard_indices(Path(out)))}
