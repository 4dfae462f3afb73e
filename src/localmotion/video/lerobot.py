"""LeRobot data sets, versions 2.0, 2.1 and 3.0, as a source of videos with actions. Read with pyarrow, not with the lerobot package.

The layout is that of `lerobot.datasets` (github.com/huggingface/lerobot): meta/info.json names the features and the files. In version 2
an episode is one table and one mp4 a camera; in version 3 a table or an mp4 holds many episodes, and meta/episodes names the span of
each. Pictures may also lie in the tables (features of dtype "image").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError, StoreError, unknown_name
from localmotion.files import MAX_TEXT, one_line, parse_json, read_json
from localmotion.video.lerobot_rows import ACTION, PREFIX, STATE, UNREADABLE, EpisodeRows, Logged, Range, parquet
from localmotion.video.refs import Part, VideoRef
from localmotion.video.shards import write_atomic, write_error

ABOUT = "lerobot.json"
"""File of a store with the data set that it was made from and the ranges of its actions."""
VERSIONS = ("v2.0", "v2.1", "v3.0")
REWARD = "next.reward"
ENDS = ("next.terminated", "next.done")
"""Features that say that an episode ended, the first is used that exists."""
_FIX = "give the folder of a LeRobot data set, which has meta/info.json"
_MAX_WIDTH = 4096  # numbers of an action or state


@dataclass(frozen=True)
class DataSet:
    """A data set, seen through one camera."""

    root: Path
    info: Mapping[str, Any]
    camera: str
    logged: Logged
    refs: list[VideoRef]
    """The episodes, sorted. An id is `episode_` and the six digits of the episode's index; the label has its tasks."""
    notes: list[str] = field(default_factory=list)

    def about(self, stride: int) -> dict[str, Any]:
        """What `ABOUT` says: JSON-able."""
        action: dict[str, Any] | None = None
        if self.logged.action:
            low, high = (list(side) for side in zip(*self.logged.action, strict=True))
            action = {"names": _names(self.info["features"][ACTION]), "min": low, "max": high, "commands": stride}
        state = {"names": _names(self.info["features"][STATE])} if action and self.logged.state else None
        reward, ends = self.logged.reward or None, self.logged.ends or None
        known = {"version": self.info["codebase_version"], "fps": self.info["fps"], "camera": self.camera, "frame_stride": stride}
        return {"data_set": _named(self.root), **known, "action": action, "state": state, "reward": reward, "is_terminal": ends}


def is_lerobot(videos: str | Path) -> bool:
    """Whether a source of videos is a LeRobot data set, `lerobot:PATH`."""
    return str(videos).startswith(PREFIX)


def read_data_set(videos: str | Path, camera: str = "") -> DataSet:
    """The data set in a folder, `lerobot:PATH` or PATH.

    ``camera``: key of the feature with the pictures; the only one by default. An episode that cannot be used gets a `fault`: "missing" (a
    file does not exist) or "wrong_length" (its span of the video has another length than its table). Raises ConfigError for a folder that
    is no data set, another version, or a camera that is unknown or must be chosen; MissingExtraError without pyarrow.
    """
    root = Path(str(videos).removeprefix(PREFIX))
    parquet()
    info = read_info(root)
    camera = camera_of(info, root, camera)
    logged, notes = _logged(root, info)
    refs = sorted(_episodes(root, info, camera, logged), key=lambda ref: ref.id)
    if not refs:
        raise ConfigError(f"{root}: lists no episode; fetch it again")
    if info.get("total_episodes", len(refs)) != len(refs):
        notes.append(f"meta/info.json promises {one_line(info['total_episodes'], 20)} episodes, {len(refs)} are listed")
    return DataSet(root, info, camera, logged, refs, notes)


def camera_of(info: Mapping[str, Any], root: Path, camera: str = "") -> str:
    """The key of a camera. Raises ConfigError if it is unknown, or not given and there are several."""
    kinds = {key: entry["dtype"] for key, entry in info["features"].items() if entry["dtype"] in ("video", "image")}
    if camera and camera not in kinds:
        raise ConfigError(f"{root}: {unknown_name('camera', camera, kinds)}")
    if not camera and len(kinds) != 1:
        text = f"has the cameras {', '.join(sorted(kinds))}; choose one with --camera KEY" if kinds else "has no camera"
        raise ConfigError(f"{root}: {text}")
    return camera or next(iter(kinds))


def keep_about(data: DataSet, store: Path, stride: int) -> None:
    """Write `ABOUT` into a store. Raises StoreError if the store was made from another camera or with other ranges."""
    now = json.loads(json.dumps(data.about(stride)))
    if (path := store / ABOUT).exists():
        before = read_json(path, StoreError, "extract into a new folder")
        for key in now.keys() - {"data_set"}:
            if before.get(key) != now[key]:
                old, new = (one_line(value, 120) for value in (before.get(key), now[key]))
                raise StoreError(f"{store}: was extracted with {key} {old}, this data set has {new}; use another folder")
        return
    try:
        write_atomic(path, json.dumps(now, indent=1) + "\n")
    except OSError as error:
        raise write_error(store, ABOUT, error) from error


def about_of(folder: Path) -> dict[str, Any] | None:
    """What `ABOUT` says of a store; also of a run that learned from it, in `environment.json`. None if there is nothing."""
    if (path := folder / ABOUT).exists():
        return read_json(path, StoreError, "extract into a new folder")
    if (path := folder / "environment.json").exists():
        found = read_json(path, StoreError, "use another run").get("lerobot")
        return found if isinstance(found, dict) else None
    return None


def commands(folder: Path, action: NDArray[Any]) -> NDArray[np.float32]:
    """Commands for the robot: undoes the scaling of the actions.

    ``folder``: a store, or a run that learned from it. ``action``: (..., A) in [-1, 1]. Returns (..., n, A / n) in the units of the data
    set: n commands to give one after the other, n being the frame_stride of the extraction. Raises StoreError for a folder that knows no
    ranges of actions, ValueError for another A.
    """
    about = (about_of(folder) or {}).get("action")
    if about is None:
        raise StoreError(
            f"{folder}: knows no ranges of actions; give a store of a LeRobot data set with actions, or a run on one"
        )
    low, high = np.array([about["min"], about["max"]], np.float64)
    shaped = np.asarray(action, np.float64).reshape(*np.shape(action)[:-1], about["commands"], len(low))
    return np.asarray(low + (np.clip(shaped, -1, 1) + 1) / 2 * (high - low), np.float32)


# ------------------------------------------------------------------------------------------------- the whole data set


def read_info(root: Path) -> dict[str, Any]:
    """meta/info.json. Raises ConfigError."""
    info = read_json(root / "meta" / "info.json", ConfigError, _FIX)
    version, features, fps = info.get("codebase_version"), info.get("features"), info.get("fps")
    if version not in VERSIONS:
        raise ConfigError(
            f"{root}: is of version {one_line(version, 20)}, read are {', '.join(VERSIONS)}; convert it with lerobot's scripts"
        )
    kinds = isinstance(features, dict) and all(isinstance(entry, dict) and "dtype" in entry for entry in features.values())
    if not kinds or isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 10_000:
        raise ConfigError(f"{root}: meta/info.json lacks features or fps; {_FIX}")
    return info


def _logged(root: Path, info: Mapping[str, Any]) -> tuple[Logged, list[str]]:
    """What can be kept beside the pictures, and what a user should know about it."""
    features = info["features"]
    width = _width(features.get(ACTION))
    if not width:
        why = f"its dtype is {one_line(features[ACTION]['dtype'], 20)}" if ACTION in features else "there are none"
        return Logged((), 0, "", ""), [f"pictures only, without actions: {why}"]
    reward = REWARD if _width(features.get(REWARD)) == 1 else ""
    ends = next((name for name in ENDS if _width(features.get(name)) == 1), "")
    logged = Logged(_ranges(root, width), _width(features.get(STATE)), reward, ends)
    notes = [f"actions of {width} numbers, scaled to [-1, 1] by their ranges in the data set ({ABOUT})"]
    if not reward:
        notes.append(
            f"the data set has no rewards ({REWARD}): zeros are stored, and only stages that read no rewards can learn from them"
        )
    return logged, notes


def _width(feature: Mapping[str, Any] | None) -> int:
    """How many numbers a feature has for a frame; 0 if it is none of numbers in one row."""
    if feature is None or not re.fullmatch(r"bool|u?int\d+|float\d+", str(feature.get("dtype"))):
        return 0
    shape = feature.get("shape")
    fits = isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and 1 <= shape[0] <= _MAX_WIDTH
    return shape[0] if fits and isinstance(shape, list) else 0


def _ranges(root: Path, width: int) -> tuple[Range, ...]:
    """The range of each number of the actions, from the data set's own statistics."""
    per_episode = root / "meta" / "episodes_stats.jsonl"
    try:
        if per_episode.exists():
            stats = [entry["stats"][ACTION] for entry in _lines(per_episode)]
        else:
            stats = [read_json(root / "meta" / "stats.json", ConfigError, "fetch the data set again")[ACTION]]
        low = np.min([np.asarray(entry["min"], np.float64).reshape(width) for entry in stats], axis=0)
        high = np.max([np.asarray(entry["max"], np.float64).reshape(width) for entry in stats], axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise ValueError("min and max are not finite and in order")
    except UNREADABLE as error:
        raise ConfigError(
            f"{root}: its statistics of {ACTION} cannot be used ({one_line(error)}); compute them again with lerobot"
        ) from error
    return tuple(Range(float(a), float(b)) for a, b in zip(low, high, strict=True))


def _episodes(root: Path, info: Mapping[str, Any], camera: str, logged: Logged) -> Iterator[VideoRef]:
    stored = info["features"][camera]["dtype"] == "image"
    shared = info["codebase_version"] == "v3.0"
    fps = float(info["fps"])
    seen: set[int] = set()
    for entry in _spans(root, camera, stored) if shared else _lines(root / "meta" / "episodes.jsonl"):
        try:
            index, length = _whole(entry["episode_index"]), _whole(entry["length"])
            values: dict[str, Any] = {"episode_index": index, "video_key": camera}
            values["episode_chunk"] = index // max(_whole(info.get("chunks_size", 1000)), 1)
            table = root / _filled(info.get("data_path"), values | _place(entry, "data", shared))
            path, part = table, Part(0.0, length, fps, True)
            fault: tuple[str, str] | None = None
            if not stored:
                place = f"videos/{camera}"
                path = root / _filled(info.get("video_path"), values | _place(entry, place, shared))
                if shared:
                    start, stop = (float(entry[f"{place}/{side}_timestamp"]) for side in ("from", "to"))
                    part = Part(start, length, fps, False)
                    if not abs((stop - start) * fps - length) < 0.5:
                        fault = (
                            "wrong_length",
                            f"{start:.3f} to {stop:.3f} s of the video are not the {length} frames of its table",
                        )
            fault = next(
                (("missing", f"there is no {_below(file, root)}") for file in (table, path) if not file.is_file()), fault
            )
            tasks = entry.get("tasks") or []
            label = "; ".join(sorted(map(str, tasks))) if isinstance(tasks, list) else str(tasks)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{root}: its list of episodes cannot be used ({one_line(error)}); fetch it again") from error
        if index in seen:
            raise ConfigError(f"{root}: lists episode {index} twice; fetch it again")
        seen.add(index)
        rows = EpisodeRows(table, index, length, fps, logged, camera if stored else "")
        name = f"episode_{index:06d}"
        yield VideoRef(name, path, "stored" if stored else "file", label or None, fault=fault, part=part, rows=rows)


def _spans(root: Path, camera: str, stored: bool) -> Iterator[dict[str, Any]]:
    """The episodes of a data set of version 3."""
    wanted = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    if not stored:
        wanted += [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    for path in files:
        try:
            table = parquet().read_table(path, columns=wanted, use_threads=False)
        except UNREADABLE as error:
            raise ConfigError(f"{path}: cannot be read ({one_line(error)}); fetch it again") from error
        yield from table.to_pylist()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT), b""), 1):
                if line.strip():
                    value = parse_json(line)
                    if not isinstance(value, dict):
                        raise ValueError(f"line {number} is no object")
                    yield value
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({one_line(error)}); fetch the data set again") from error


def _filled(template: Any, values: Mapping[str, Any]) -> str:
    """The path that a template of info.json names, e.g. `data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet`.

    Not with str.format, whose fields can reach any attribute. Raises ValueError, also for a path out of the data set.
    """

    def text(match: re.Match[str]) -> str:
        return format(values[match[1]], match[2] or "")

    path = re.sub(r"\{(\w+)(?::(0\d{1,2}d))?\}", text, str(template))
    if "{" in path or "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{one_line(template, 100)} is no path below the data set")
    return path


def _place(entry: Mapping[str, Any], what: str, shared: bool) -> dict[str, int]:
    return {name: _whole(entry[f"{what}/{name}"]) for name in ("chunk_index", "file_index")} if shared else {}


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise ValueError(f"{one_line(value, 40)} is no count")
    return value


def _names(feature: Mapping[str, Any]) -> list[str] | None:
    """Names of the numbers of a feature, if there is one for each."""
    names = feature.get("names")
    while isinstance(names, dict) and len(names) == 1:  # {"motors": [...]}
        (names,) = names.values()
    return [str(name) for name in names] if isinstance(names, list) and len(names) == feature["shape"][0] else None


def _below(file: Path, root: Path) -> str:
    return one_line(file.relative_to(root).as_posix(), 200)


def _named(root: Path) -> str:
    """Name of a data set: of its folder, or owner/name@commit for one in the Hub's cache."""
    repo = root.parent.parent.name
    if root.parent.name == "snapshots" and repo.startswith("datasets--"):
        return f"{'/'.join(repo.split('--')[1:])}@{root.name}"
    return root.resolve().name
