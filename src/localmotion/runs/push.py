"""Write a run as a folder that others can load: settings, weights and a model card, without anything of the user's machine.

    FOLDER/README.md                  the model card (`card`)
    FOLDER/config.json                settings
    FOLDER/environment.json           recipe, precision and versions of the run
    FOLDER/checkpoints/N/             weights.safetensors, state.json, COMPLETE
    FOLDER/curve.svg                  learning curve, if one is given
    FOLDER/shared.json                size and SHA-256 of each file that is loaded, and the scores

The folder is a run directory: every command that reads a run reads it. Optimisers, replay and random states stay behind.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from localmotion.config import to_dict
from localmotion.console import say
from localmotion.errors import CheckpointError, ConfigError
from localmotion.files import check_output
from localmotion.runs import checkpoint, hub
from localmotion.runs.card import CURVE, model_card
from localmotion.runs.load import load_run
from localmotion.runs.read import RunData, number, read_run
from localmotion.runs.rundir import read_environment, write_json
from localmotion.runs.settings import read_config
from localmotion.runs.sharing import HUB, MANIFEST, SHELF, digest, is_shared, shelf_path

_STATE = ("update", "stage", "action_dim", "agent_step", "env_step")
"""What is kept of a checkpoint's state.json. Loading needs `action_dim`; the counts say how long the run learned."""
_ENVIRONMENT = ("recipe", "device", "precision", "parameters", "commit", "lerobot")
_PLACE = re.compile(r"(?<![\w.~/\\-])(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)?[\\/](?:[^\s\"',;=\[\]{}()]*[\\/])?")
"""The folders of a path in a text: all of it but its last part. A relative path such as runs/drp is none of them."""


DRY_RUN = "shared"
"""Folder in the run directory that a dry run writes."""


def push(
    run_dir: Path, target: str, *, license: str = "", curve: bytes = b"", public: bool = False, dry_run: bool = False
) -> str:
    """Share the newest weights of a run. Returns a line for the console; says where and how much before it uploads.

    Args:
        target: hf:owner/name (a repository of the Hub), shelf:NAME, or a new folder.
        license, curve: as in `write_shared`.
        public: whether a new repository is public.
        dry_run: write the folder RUN/shared, and upload nothing.

    Raises as `write_shared`; ConfigError also for a repository whose visibility is another one; CheckpointError and
    MissingExtraError if the Hub cannot be written.
    """
    repo = target.removeprefix(HUB) if target.startswith(HUB) else ""
    if repo:
        hub.check_names(repo)
    elif public:
        raise ConfigError("--public is for a repository of the Hub, hf:owner/name")
    if dry_run:
        size = write_shared(run_dir, run_dir / DRY_RUN, name=target, license=license, curve=curve)
        return f"wrote {size:.1f} MB to {run_dir / DRY_RUN}, for {target}; nothing was uploaded"
    if not repo:
        out = shelf_path(target) if target.startswith(SHELF) else Path(target)
        size = write_shared(run_dir, out, name=target, license=license, curve=curve)
        return f"wrote {size:.1f} MB to {out}; nothing was uploaded"
    now, wanted = hub.visibility(repo), "public" if public else "private"
    if now not in ("", wanted):
        fix = "give --public if all may see these weights" if now == "public" else "leave out --public"
        raise ConfigError(f"{target}: is a {now} repository; {fix}, or choose another one")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / DRY_RUN
        size = write_shared(run_dir, folder, name=target, license=license, curve=curve)
        say(f"uploading {size:.1f} MB to {target}, a {wanted} repository{'' if now else ' that is made now'}")
        commit = hub.upload(folder, repo, private=not public, stale=("checkpoints/", CURVE))
    return f"uploaded {target}@{commit}"


def write_shared(run_dir: Path, out: Path, *, name: str, license: str = "", curve: bytes = b"") -> float:
    """Write the newest weights of a run to the new folder ``out``. Returns its megabytes.

    Args:
        name: where others will find it (hf:owner/name, shelf:NAME or a folder); the card shows it.
        license: the license of the weights, as the Hub names them (mit, cc-by-4.0, ...). Empty: the card names none.
        curve: a learning curve, SVG.

    The folder is loaded once before it gets its name. Raises CheckpointError if ``out`` exists, if the run has no complete
    checkpoint, or if it does not load without the files of this machine; ConfigError as `load_run` does.
    """
    check_output(out, CheckpointError, folder=True)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; remove it, or choose another folder")
    run = read_run(run_dir)
    found = checkpoint.newest(run_dir)
    weights, state = checkpoint.read(found, "weights"), checkpoint.read_state(found)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    target = temporary / "checkpoints" / found.name
    try:
        target.mkdir(parents=True)
        save_file(dict(weights), target / "weights.safetensors")
        kept = {key: state[key] for key in _STATE if key in state}
        (target / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, **kept}) + "\n")
        (target / "COMPLETE").write_text("")
        (target / "weights.safetensors").chmod((target / "COMPLETE").stat().st_mode)  # safetensors lets only its owner read it
        config = _config(run_dir)
        environment = _environment(read_environment(run_dir))
        write_json(temporary / "config.json", config)
        write_json(temporary / "environment.json", environment)
        try:
            load_run(temporary, device="cpu")
        except CheckpointError as error:
            raise CheckpointError(f"{run_dir}: does not load without the files of this machine: {error}") from error
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        names = {path.relative_to(temporary).as_posix(): path for path in files}
        scores = scores_of(run)
        known = {file: {"bytes": path.stat().st_size, "sha256": digest(path)} for file, path in names.items()}
        write_json(temporary / MANIFEST, {"files": known, "scores": scores})
        if curve:
            (temporary / CURVE).write_bytes(curve)
        commands = [command_line(line) for line in dict.fromkeys(run.command.splitlines())]
        card = model_card(config, environment, kept, scores, name=name, license=license, commands=commands, curve=bool(curve))
        (temporary / "README.md").write_text(card)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return megabytes(out)


def megabytes(folder: Path) -> float:
    """Size of all files of a folder, in 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def scores_of(run: RunData) -> dict[str, Any]:
    """The numbers of a run's last evaluation and of its last held-out clips. Empty if it has none."""
    found: dict[str, Any] = {}
    if line := run.last("eval"):
        keys = ("return_mean", "return_std", "success_rate", "episodes", "env_step", "update")
        found["eval"] = {key: value for key in keys if (value := number(line, key)) is not None}
        found["eval"]["env"] = run.env
    if line := run.last("heldout"):
        names = [key for key in line if key == "update" or key.startswith(("psnr/", "masked/ratio_best", "figure/"))]
        found["heldout"] = {key: value for key in names if (value := number(line, key)) is not None}
    return found


def _config(run_dir: Path) -> dict[str, Any]:
    """Settings of the run, with its recipe, without places."""
    config = json.loads(json.dumps(to_dict(read_config(run_dir)), default=str))
    for key in ("data", "checkpoint"):
        if not is_shared(config[key]):
            config[key] = _last(config[key])
    cleaned: dict[str, Any] = without_places(config)
    return cleaned


def _environment(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: values[key] for key in _ENVIRONMENT if key in values}
    env = values.get("env")
    if isinstance(env, dict) and "actions" in env:  # the range that actions are given in, of an environment of the user's own
        kept["env"] = {"actions": env["actions"]}
    versions = values.get("versions")
    kept["versions"] = {k: v for k, v in versions.items() if k != "platform"} if isinstance(versions, dict) else {}
    cleaned: dict[str, Any] = without_places(kept)
    return cleaned


def without_places(value: Any) -> Any:
    """A value of JSON; of each path of this machine in its texts (absolute, or from ~ or ..) only the last part is left."""
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if not isinstance(value, str) or is_shared(value):
        return value
    if re.match(r"[\\/]|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]", value):  # also a path with spaces
        return _last(value)
    return _PLACE.sub("", value)


def command_line(text: str) -> str:
    """A command with the last parts of its paths only."""
    try:
        words = shlex.split(text)
    except ValueError:  # an open quotation mark
        return str(without_places(text))
    return shlex.join(_word(word) for word in words)


def _word(word: str) -> str:
    head, equals, value = word.partition("=")
    name, text = (f"{head}=", value) if equals else ("", word)
    try:
        parsed = json.loads(text)
    except ValueError:
        return name + str(without_places(text))
    return name + (json.dumps(without_places(parsed)) if isinstance(parsed, (dict, list, str)) else text)


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
