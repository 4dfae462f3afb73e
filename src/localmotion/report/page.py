"""One self-contained HTML5 page: inline CSS, pictures and videos as data URIs, no scripts, nothing fetched.

A page is a list of sections, a section a list of blocks. Every text is escaped here and only here; blocks hold plain
text.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmotion.report.style import dark_variant
from localmotion.runs.read import flatten


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notice:
    """One sentence about something missing, left out, or uncertain."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A figure with its caption: PNG, JPEG, GIF or SVG bytes (an SVG chart automatically gets a dark version)."""

    data: bytes
    caption: str
    alt: str = ""


@dataclass(frozen=True)
class Video:
    """An mp4 with an optional still picture shown before it plays. ``wide``: it is not square and has a line of its own."""

    data: bytes
    caption: str
    poster: bytes | None = None
    wide: bool = False


class Age(str):
    """Text of a table's cell: how long ago ``at`` (seconds since 1970) was. A live page counts on."""

    at: float

    def __new__(cls, at: float, now: float) -> Age:
        age = super().__new__(cls, ago(now - at))
        age.at = at
        return age


@dataclass(frozen=True)
class Table:
    """A table of text cells; columns that contain only numbers are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Settings:
    """A nested dict as a table of dotted names."""

    title: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Fold:
    """Blocks hidden under a title until it is opened; ``note`` is shown beside the title."""

    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Text to copy, unchanged."""

    text: str


@dataclass(frozen=True)
class Tiles:
    """A few key numbers: (value, description)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Row:
    """Blocks side by side where the page is wide enough."""

    blocks: Sequence[Block]


Block = Text | Notice | Picture | Video | Table | Settings | Fold | Code | Tiles | Row


@dataclass(frozen=True)
class Section:
    """A heading of the page and of its table of contents, with its blocks."""

    title: str
    blocks: Sequence[Block]


_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
)
_NUMBER = re.compile(r"[-−+]?[\d.,]+ ?(%|s|h|min|ms|[KMB]|dB|px|GB)?( ± [\d.,]+ ?[%KMB]?)?( to [\d.,]+[KMB]?)?|[–—]|\[.*\]|")


def image_type(data: bytes) -> str:
    """MIME type of picture bytes by their first bytes. Raises ValueError for anything but PNG, JPEG, GIF and SVG."""
    for magic, mime in _MAGIC:
        if data.startswith(magic):
            return mime
    if b"<svg" in data[:2000]:
        return "image/svg+xml"
    raise ValueError("not a PNG, JPEG, GIF or SVG picture")


Uri = Callable[[bytes, str], str]
"""The address of a picture or video on the page, from its bytes and MIME type."""


def data_uri(data: bytes, mime: str) -> str:
    """An address that holds the bytes themselves."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _esc(text: object) -> str:
    # Control characters are invalid in HTML; a lone surrogate (from a damaged file name) cannot be encoded.
    clean = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))
    return html.escape(clean, quote=True)


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _picture(block: Picture, uri: Uri) -> str:
    mime = image_type(block.data)
    image = f'<img src="{uri(block.data, mime)}" alt="{_esc(block.alt or block.caption)}" class="{mime[6:9]}">'
    if mime == "image/svg+xml":
        dark = uri(dark_variant(block.data), mime)
        source = f'<source srcset="{dark}" media="screen and (prefers-color-scheme: dark)">'
        image = f"<picture>{source}{image}</picture>"
    return f"<figure>{image}{_caption(block.caption)}</figure>"


def _caption(text: str) -> str:
    return f"<figcaption>{_esc(text)}</figcaption>" if text else ""


def _video(block: Video, uri: Uri) -> str:
    poster = f' poster="{uri(block.poster, image_type(block.poster))}"' if block.poster else ""
    video = f'<video controls loop muted playsinline{poster} src="{uri(block.data, "video/mp4")}"></video>'
    figure = '<figure class="wide">' if block.wide else "<figure>"
    return f"{figure}{video}{_caption(block.caption)}</figure>"


def _table(block: Table) -> str:
    columns = [[row[i] for row in block.rows] for i in range(len(block.header))]
    right = [bool(cells) and all(_NUMBER.fullmatch(c) for c in cells) for cells in columns]
    cls = [' class="n"' if r else "" for r in right]
    head = "".join(f'<th scope="col"{c}>{_esc(h)}</th>' for h, c in zip(block.header, cls, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{_cell(cell)}</td>" for cell, c in zip(row, cls, strict=True)) + "</tr>" for row in block.rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<figure><div class="scroll">{table}</div>{_caption(block.caption)}</figure>'


def _cell(cell: str) -> str:
    return f'<time data-at="{cell.at:.0f}">{_esc(cell)}</time>' if isinstance(cell, Age) else _esc(cell)


def ago(seconds: float) -> str:
    """75 -> "1 min ago". A live page's script says the same."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds / size)} {unit} ago"
    return f"{max(int(seconds), 0)} s ago"


def _settings(block: Settings) -> str:
    flat = flatten(block.values)
    rows = "".join(f"<tr><td><code>{_esc(k)}</code></td><td>{_esc(_value(v))}</td></tr>" for k, v in flat.items())
    head = f'<thead><tr><th scope="col" colspan="2">{_esc(block.title)}</th></tr></thead>'
    return f'<div class="scroll"><table class="settings">{head}<tbody>{rows}</tbody></table></div>'


def _block(block: Block, uri: Uri) -> str:
    match block:
        case Text(text):
            return f"<p>{_esc(text)}</p>"
        case Notice(text):
            return f'<p class="notice">{_esc(text)}</p>'
        case Picture():
            return _picture(block, uri)
        case Video():
            return _video(block, uri)
        case Table():
            return _table(block)
        case Settings():
            return _settings(block)
        case Fold(title, blocks, note):
            summary = f"<summary>{_esc(title)} <small>{_esc(note)}</small></summary>"
            return f"<details>{summary}{''.join(_block(b, uri) for b in blocks)}</details>"
        case Code(text):
            return f'<pre class="scroll"><code>{_esc(text)}</code></pre>'
        case Tiles(items):
            tiles = "".join(f"<div><strong>{_esc(v)}</strong><span>{_esc(what)}</span></div>" for v, what in items)
            return f'<div class="tiles">{tiles}</div>'
        case Row(blocks):
            return f'<div class="row">{"".join(_block(b, uri) for b in blocks)}</div>'


_CSS = """
:root { color-scheme: light dark; --bg: #ffffff; --ink: #1c2330; --muted: #5b6575; --line: #e3e7ee; --soft: #f5f7fa;
  --accent: #0067a8; --note: #8a5a00; --note-bg: #fdf6e6; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171d; --ink: #e7eaf0; --muted: #98a2b3; --line: #2c323d;
  --soft: #1b2028; --accent: #4aa8e8; --note: #e8b339; --note-bg: #2a2415; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink); line-height: 1.55;
  font: 15.5px/1.55 Inter, "Helvetica Neue", Helvetica, Arial, "Liberation Sans", "Noto Sans", sans-serif; }
main, header, footer { max-width: 970px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 44px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 6px; text-wrap: balance; }
header > p { color: var(--muted); margin: 0 0 18px; }
nav { border-block: 1px solid var(--line); padding: 10px 0; margin-bottom: 8px; }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0; padding: 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
nav a { font-size: 14px; }
section { padding: 26px 0 10px; scroll-margin-top: 8px; }
section + section { border-top: 1px solid var(--line); }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 0 0 12px; }
p { margin: 10px 0; max-width: 76ch; }
figure { margin: 18px 0 24px; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; } figure img:not(.svg) { width: 100%; }
.row figure img:not(.svg) { width: auto; }
@media screen and (max-width: 640px) { figure:has(> picture) { overflow-x: auto; } picture img.svg { width: 620px; max-width: none; } }
figcaption { color: var(--muted); font-size: 13.5px; line-height: 1.45; margin-top: 8px; max-width: 88ch; }
video { display: block; width: 100%; max-width: 360px; aspect-ratio: 1; background: #000; border-radius: 8px; }
figure.wide { grid-column: 1 / -1; } figure.wide video { max-width: 640px; aspect-ratio: auto; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 0 22px; align-items: start; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: 14px; margin: 6px 0 20px; }
.tiles div { background: var(--soft); border: 1px solid var(--line); border-radius: 10px; padding: 13px 16px; }
.tiles strong { display: block; font-size: 23px; line-height: 1.25; letter-spacing: -0.015em; }
.tiles span { display: block; color: var(--muted); font-size: 13px; line-height: 1.4; margin-top: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px; white-space: nowrap; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.n { text-align: right; white-space: nowrap; } td:last-child, th:last-child { padding-right: 0; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 8px 0; }
.notice { color: var(--note); background: var(--note-bg); border-radius: 8px; padding: 8px 14px; font-size: 14px; }
.notice { overflow-wrap: anywhere; max-width: none; }
details { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; margin: 8px 0; }
small { font-size: 13px; }
summary { cursor: pointer; font-weight: 600; }
summary small { color: var(--muted); font-weight: 400; margin-left: 6px; }
tr:has(time) td { white-space: nowrap; }
table.settings td:first-child { white-space: nowrap; width: 1%; padding-right: 26px; }
table.settings td { overflow-wrap: anywhere; padding-block: 4px; }
table.settings { margin: 8px 0 16px; }
footer { color: var(--muted); font-size: 13px; padding-block: 18px 50px; }
@media print { nav { display: none; } header { padding-top: 0; } section { break-inside: auto; padding-top: 14px; }
  h2 { break-after: avoid; } body { font-size: 11pt; } pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

# Nothing may be fetched or run, for any text on the page.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def build_page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    footer: str = "",
    uri: Uri = data_uri,
    policy: str = _POLICY,
    script: str = "",
) -> str:
    """The whole page as one string of HTML5 that opens offline.

    Pictures and videos become data URIs (or what ``uri`` makes of them), SVG charts have a dark version, the table of
    contents links every section.
    ``script`` runs on the page if ``policy`` lets it. Raises ValueError for picture bytes of an unknown format, or a
    table row with another length than its header.
    """
    links = "".join(f'<li><a href="#s{i}">{_esc(s.title)}</a></li>' for i, s in enumerate(sections, 1))
    body = "\n".join(
        f'<section id="s{i}"><h2>{_esc(s.title)}</h2>\n' + "\n".join(_block(b, uri) for b in s.blocks) + "</section>"
        for i, s in enumerate(sections, 1)
    )
    below = f"<p>{_esc(subtitle)}</p>" if subtitle else ""
    run = f"<script>{script}</script>\n" if script else ""
    foot = f"<footer>{_esc(footer)}</footer>" if footer else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_esc(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f'<header><h1>{_esc(title)}</h1>{below}<nav aria-label="Contents"><ol>{links}</ol></nav></header>\n'
        f"<main>\n{body}\n</main>\n{foot}\n{run}</body>\n</html>\n"
    )
