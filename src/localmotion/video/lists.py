"""List files: which videos are used, with their class and length.

Formats:

- text with one video per line: `id n_frames class_id` separated by white space (Something-Something V2 in the layout of IPV's release,
  thuml/ContextWM), or only an id, or `path.avi class` (UCF101);
- tables with a header and commas, semicolons or tabs (Kinetics: `label,youtube_id,time_start,time_end,split`), or without a
  header and with two or three columns: id, class or id, n_frames, class;
- JSON: a list of ids or of objects (`id`, `label`, `template`; Something-Something V2's own files), an object of id -> class or
  id -> object (Kinetics), one object per line.

The text is UTF-8, with or without a byte order mark, or UTF-16 with one, with line endings of any system. An id names a file (with
or without its extension and folders) or a frame folder; a path may be absolute, or begin with the name of the searched folder. Accents
may be composed or decomposed. A listed video that does not exist is a row with the fault "missing".
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from localmotion.errors import VideoError
from localmotion.files import one_line, parse_json, read_bytes
from localmotion.video.refs import VIDEO_SUFFIXES, VideoRef, shown

MAX_LIST = 256 << 20
"""Largest list file, bytes. Something-Something V2's largest has 45 MB, Kinetics 700's 25 MB."""

ID_COLUMNS = ("path", "video_path", "file_path", "filepath", "file", "file_name", "filename", "video", "video_id", "clip", "clip_id", "id",
              "youtube_id", "name")  # fmt: skip
LABEL_COLUMNS = ("template", "label", "class", "class_id", "label_id", "class_name", "category", "action")
FRAME_COLUMNS = ("n_frames", "num_frames", "frame_count", "nframes", "frames")
_HOLDERS = ("videos", "database", "data", "clips", "items")  # keys that may hold the list of a JSON file
_SPACED = re.compile(r"(.*\S)\s+([0-9]{1,18})\s+(\S+)")
_EXPECTED = "expected one id per line, `id n_frames class_id`, a table with a header (id, label), or JSON"

Find = Callable[[str], Sequence[VideoRef]]


@dataclass(frozen=True)
class _Row:
    place: str
    """Its place in the list, for messages."""
    names: tuple[str, ...]
    """Possible spellings of the id; the first that exists is used."""
    label: int | str | None = None
    frames: int | None = None


def select(root: Path, refs: Sequence[VideoRef], list_file: Path) -> list[VideoRef]:
    """The videos of `refs` that a list file names, with label and promised length, sorted by id; "missing" ones with a fault.

    Raises VideoError: "missing" (no such list), "empty" (it names nothing), "bad_list" (it cannot be read or parsed, an id matches
    several videos or is listed twice, or none of its videos exists).
    """
    find = _finder(root, refs)
    chosen: dict[str, VideoRef] = {}
    missing: list[_Row] = []
    seen: set[str] = set()
    for row in _rows(list_file, find):
        matches = next(filter(None, map(find, row.names)), ())
        if len(matches) > 1:
            detail = (
                f"{row.place}: {row.names[-1]!r} fits {matches[0].id} and {matches[1].id}; write the id with folder and extension"
            )
            raise VideoError(list_file, "bad_list", shown(detail))
        key = matches[0].id if matches else "/" + row.names[0]
        if key in seen:
            detail = f"{row.place}: {row.names[-1]!r} is listed twice; remove one of the lines"
            raise VideoError(list_file, "bad_list", shown(detail))
        seen.add(key)
        if matches:
            chosen[key] = _listed(matches[0], row)
        else:
            missing.append(row)
    if not seen:
        raise VideoError(list_file, "empty", f"lists no video; {_EXPECTED}")
    if not chosen:
        some = ", ".join(repr(one_line(row.names[-1], 60)) for row in missing[:3])
        what = f"{len(missing)} of {len(missing)} listed videos are not below {root}, first {some}"
        raise VideoError(list_file, "bad_list", shown(f"{what}; correct the list or the folder"))
    taken = {ref.id for ref in refs}
    for row in missing:
        name = _plain(row.names[-1]) or row.place
        name = f"{name} ({row.place})" if name in taken else name
        taken.add(name)
        fault = "missing", shown(f"{row.place} of {list_file.name}: not below {root}{_near(row, find)}")
        chosen[name] = VideoRef(name, root / name, "file", row.label, row.frames, fault)
    return [chosen[name] for name in sorted(chosen)]


def _listed(ref: VideoRef, row: _Row) -> VideoRef:
    """A found video with the data of the list. A shadowed video is used, because the list selects it."""
    fault = None if ref.fault and ref.fault[0] == "shadowed" else ref.fault
    return replace(ref, label=row.label, frames_hint=ref.frames_hint if row.frames is None else row.frames, fault=fault)


def _plain(name: str) -> str:
    """A relative name without `..`, like an id, for a video that does not exist."""
    return "/".join(part for part in name.replace("\0", "").split("/") if part not in ("", ".", ".."))


def _near(row: _Row, find: Find) -> str:
    """A hint if the same name exists with another extension."""
    path = PurePath(row.names[-1])
    other = find(path.stem) if path.suffix.lower() in VIDEO_SUFFIXES else ()
    return f"; {other[0].id} exists; if you mean that file, list it instead" if other else ""


# ------------------------------------------------------------------------------------------------------ from id to video


def _finder(root: Path, refs: Sequence[VideoRef]) -> Find:
    """A function from an id, as written in a list, to the matching videos: none, one, or several."""
    tables: list[dict[str, list[VideoRef]]] = [{}, {}, {}, {}]  # ids, composed ids, other spellings, composed other spellings
    for ref in refs:
        path = PurePath(ref.id)
        shorter = {path.name, path.with_suffix("").as_posix(), path.stem} if ref.kind == "file" else {path.name}
        for table, names in ((0, {ref.id}), (2, shorter)):
            for name in names:
                tables[table].setdefault(name, []).append(ref)
            for name in {unicodedata.normalize("NFC", name) for name in names}:
                tables[table + 1].setdefault(name, []).append(ref)
    bases = dict.fromkeys(f"{base.as_posix().rstrip('/')}/" for base in (root.absolute(), root.resolve()))
    bases[f"{root.resolve().name}/"] = None

    def spellings(name: str) -> Iterator[str]:
        yield name
        tidy = name.replace("\\", "/").rstrip("/")
        tidy = tidy.removeprefix("./")
        yield tidy
        for base in bases:
            if tidy.startswith(base):
                yield tidy.removeprefix(base)

    def find(name: str) -> Sequence[VideoRef]:
        for spelling in spellings(name):
            for at, table in enumerate(tables):
                found = table.get(unicodedata.normalize("NFC", spelling) if at % 2 else spelling)
                if found:
                    usable = [ref for ref in found if ref.fault is None or ref.fault[0] == "shadowed"]
                    return usable if len(usable) == 1 else found
        return ()

    return find


# -------------------------------------------------------------------------------------------------------- from file to ids


def _rows(list_file: Path, find: Find) -> list[_Row]:
    try:
        data = read_bytes(list_file, MAX_LIST)
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise VideoError(list_file, "missing", f"cannot read the list of videos: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise VideoError(list_file, "bad_list", f"is not text in UTF-8; {_EXPECTED}") from error
    except ValueError as error:
        raise VideoError(list_file, "bad_list", f"{one_line(error)}; {_EXPECTED}") from error
    try:
        if text.lstrip()[:1] in ("[", "{") and (value := _json(text, list_file)) is not None:
            rows = _entries(value)
        else:
            rows = list(_lines(text, find))
        return _numbered(rows, list_file)
    except (ValueError, csv.Error) as error:
        raise VideoError(list_file, "bad_list", shown(one_line(error))) from error


def _json(text: str, list_file: Path) -> Any:
    """The value of a JSON file, also with one value per line; None if it is text that only begins like JSON."""
    try:
        return parse_json(text)
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [parse_json(line) for line in lines]
        except ValueError:
            if list_file.suffix.lower() in (".json", ".jsonl", ".ndjson"):
                raise ValueError(f"is not JSON ({one_line(error)}); {_EXPECTED}") from error
            return None


def _entries(value: Any) -> list[_Row]:
    """Rows of a JSON value. Raises ValueError."""
    if isinstance(value, dict):
        inner = next((value[key] for key in _HOLDERS if isinstance(value.get(key), (dict, list))), None)
        value = value if inner is None else inner
    if isinstance(value, dict):
        items = [(f"entry {name!r:.80}", name, inner) for name, inner in value.items()]
    else:
        items = [(f"entry {number}", None, inner) for number, inner in enumerate(value, 1)]
    rows = []
    for place, name, inner in items:
        if isinstance(inner, dict):
            fields = {str(key).lower(): field for key, field in inner.items()}
            if isinstance(fields.get("annotations"), dict):
                fields |= {str(key).lower(): field for key, field in fields["annotations"].items()}
            if isinstance(fields.get("template"), str):  # Something-Something: "Holding [something]"; its "label" is a caption
                fields["template"] = _unbracketed(fields["template"])
            rows.append(_row(place, fields, name))
        elif name is not None:
            rows.append(_Row(place, (name,), _label(inner, place)))
        elif isinstance(inner, str | int) and not isinstance(inner, bool):
            rows.append(_Row(place, (str(inner),)))
        else:
            raise ValueError(f"{place} is neither an id nor an object with one")
    return rows


def _numbered(rows: list[_Row], list_file: Path) -> list[_Row]:
    """Rows with the numbers of their classes, if a labels file beside the list has them: `...-labels.json` or `labels.json`, an
    object of class -> number, as in Something-Something. Raises ValueError if it has only some of the classes."""
    texts = {row.label: row.place for row in rows if isinstance(row.label, str)}
    for name in dict.fromkeys((re.sub(r"[A-Za-z]+$", "labels", list_file.stem) + ".json", "labels.json")):
        path = list_file.with_name(name)
        if not texts or path == list_file or not path.is_file():
            continue
        try:
            value = parse_json(read_bytes(path, MAX_LIST))
        except (OSError, ValueError) as error:
            raise ValueError(f"the labels beside it, {name}, cannot be read ({one_line(error)})") from error
        items = value.items() if isinstance(value, dict) else ()
        numbers = {_unbracketed(key): _label(number) for key, number in items if isinstance(number, str | int)}
        lacking = [text for text in texts if not isinstance(numbers.get(text), int)]
        if len(lacking) == len(texts):  # the file is about something else
            continue
        if lacking:
            raise ValueError(f"{texts[lacking[0]]}: the class {lacking[0]!r} is not in {name} beside the list")
        return [replace(row, label=numbers[row.label]) if isinstance(row.label, str) else row for row in rows]
    return rows


def _unbracketed(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _lines(text: str, find: Find) -> Iterable[_Row]:
    """Rows of a text file or table. Raises ValueError and csv.Error."""
    lines = [(number, line.strip()) for number, line in enumerate(re.split("\r\n|\n|\r", text), 1) if line.strip()]
    if not lines:
        return []
    known = [bool(find(line)) for _, line in lines]
    for mark in ("\t", ";", ","):
        cells = [_column(cell) for cell in next(csv.reader([lines[0][1]], delimiter=mark))]
        named = set(cells) & {*ID_COLUMNS} and not any(cell.isdecimal() for cell in cells)
        if named and (len(cells) > 1 or not known[0]):
            return _table(text, mark, cells)
    if not any(known):
        spaced = [_SPACED.fullmatch(line) for _, line in lines]
        if all(spaced):
            return [_spaced(number, match) for (number, _), match in zip(lines, spaced, strict=True) if match]
        for mark in ("\t", ";", ","):
            counts = {len(row) for row in csv.reader((line for _, line in lines), delimiter=mark)}
            if len(counts) == 1 and counts != {1}:
                return _bare_table(text, mark)
    return [_line(number, line, find, whole) for (number, line), whole in zip(lines, known, strict=True)]


def _spaced(number: int, match: re.Match[str]) -> _Row:
    return _Row(f"line {number}", (match[1].strip(),), _label(match[3]), int(match[2]))


def _line(number: int, line: str, find: Find, known: bool) -> _Row:
    """One line of a list that mixes kinds of lines, or has only ids."""
    place = f"line {number}"
    spaced = _SPACED.fullmatch(line)
    if spaced and (find(spaced[1]) or not known):
        return _spaced(number, spaced)
    head, _, last = line.rpartition(" ")
    if not known and head and PurePath(head.strip()).suffix.lower() in VIDEO_SUFFIXES:
        return _Row(place, (head.strip(),), _label(last))
    if not known and any(find(part) for part in {line.split()[0], line.rsplit(None, 1)[0], line.rsplit(None, 2)[0]}):
        raise ValueError(f"{place} is neither an id nor `id n_frames class_id`: {line[:80]!r}")
    return _Row(place, (line,))


def _table(text: str, mark: str, header: Sequence[str]) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    begun = False
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if not begun:
            begun = True
            continue
        if len(cells) > len(header):
            raise ValueError(f"line {reader.line_num} has {len(cells)} columns, the header {len(header)}")
        yield _row(f"line {reader.line_num}", dict(zip(header, (cell.strip() for cell in cells), strict=False)))


def _bare_table(text: str, mark: str) -> Iterator[_Row]:
    """A table without header: id, class, or id, n_frames, class."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        place = f"line {reader.line_num}"
        if len(cells) > 3 or (len(cells) == 3 and _count(cells[1].strip()) is None):
            raise ValueError(
                f"{place} has {len(cells)} columns; write a header as first line that names them (id, label, n_frames)"
            )
        name, *frames, label = (cell.strip() for cell in cells)
        if not name:
            raise ValueError(f"{place} has no id")
        yield _Row(place, (name,), _label(label), _count(frames[0]) if frames else None)


def _row(place: str, fields: Mapping[str, Any], name: str | None = None) -> _Row:
    """A row from named fields; `name`: the id if no field has one. Raises ValueError if there is none."""

    def first(columns: Iterable[str]) -> Any:
        return next((fields[key] for key in columns if fields.get(key) not in (None, "")), None)

    found = first(ID_COLUMNS if name is None else ID_COLUMNS[: ID_COLUMNS.index("video")])
    found = name if found is None else found
    if isinstance(found, bool) or not isinstance(found, str | int) or not str(found).strip():
        raise ValueError(f"{place} has no id; name it {', '.join(ID_COLUMNS[:3])}, id or video")
    names = [str(found).strip()]
    start, end = (_seconds(fields.get(key)) for key in ("time_start", "time_end"))
    if start is not None and end is not None:  # Kinetics: the file's name contains the times of the clip within its film
        names.insert(0, f"{names[0]}_{start:06d}_{end:06d}")
    return _Row(place, tuple(names), _label(first(LABEL_COLUMNS), place), _count(first(FRAME_COLUMNS)))


def _column(cell: str) -> str:
    return re.sub(r"[\s-]+", "_", cell.strip().lower())


def _label(value: Any, place: str = "") -> int | str | None:
    """A class: a number if it is one, else text; None if empty. Raises ValueError for a list or object."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{place}: the label is neither text nor a number: {one_line(value, 80)}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _count(value: Any) -> int | None:
    text = str(value)
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _seconds(value: Any) -> int | None:
    match = re.fullmatch(r"([0-9]{1,9})(\.[0-9]*)?", str(value))
    return int(match[1]) if match else None
