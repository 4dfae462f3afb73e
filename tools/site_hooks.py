"""Hooks of the documentation site (mkdocs.yml): it shows the Markdown, the sources and the notebooks of the repository without copies.

A page of the site is a page of `docs/`, or a file of the repository to which a page links. Links stay as they are on a code host, and
are rewritten while the site is built:

    docs/videos.md              videos.md                         a page
    studies/probes/README.md    repository/studies/probes/...     a page
    examples/lamps.py           repository/examples/lamps.py.md   a page that shows the source
    docs/notebooks/x.ipynb      notebooks/x.md                    a page made of the cells
    studies/x/rows.json         repository/studies/x/rows.json    a file
    docs/decisions              decisions/README.md               a list, where a folder has no README

Nothing here needs mkdocs but the events at the end, so that tests/test_site.py checks links without it.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOP = ("README.md", "METHODS.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")  # shown also if no page links to them
SOURCES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".toml": "toml"}
LINK = re.compile(r"(?<!\\)\]\((?P<target>[^()\s]+)\)")
CODE = re.compile(
    r"^(?P<fence> *(?:```+|~~~+)).*?^(?P=fence)[^\n]*$|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)", re.MULTILINE | re.DOTALL
)
FAR = re.compile(r"[a-z][a-z0-9+.-]*:|//|#$", re.IGNORECASE)


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as code hosts make it: lower case, without punctuation, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def anchors(markdown: str) -> set[str]:
    """All anchors of a page: those of its headings, and the ids of its own HTML."""
    without = CODE.sub(lambda found: found[0] if found["ticks"] else "", markdown)
    headings = re.findall(r"^#{1,6} +(.+?)\s*$", without, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {slug(heading) for heading in plain} | set(re.findall(r'\bid="([^"]+)"', without))


def links(markdown: str) -> Iterator[re.Match[str]]:
    """The links and pictures of a page that lead into the repository; those in code are left out. Group "target" has the target."""
    code = [found.span() for found in CODE.finditer(markdown)]
    for found in LINK.finditer(markdown):
        if not FAR.match(found["target"]) and not any(start <= found.start() < end for start, end in code):
            yield found


def target_of(page: str, target: str) -> tuple[str, str]:
    """Path in the repository and anchor of a link's target on a page. Both paths are relative to the repository."""
    path, _, anchor = target.partition("#")
    return (posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page), anchor


def site_path(path: str) -> str:
    """Where the site has a file or folder of the repository: its `src_uri`."""
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    elif path.endswith(".ipynb"):
        path = path.removesuffix(".ipynb") + ".md"
    elif Path(path).suffix in SOURCES or Path(path).name == "Makefile":
        path += ".md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def relinked(markdown: str, page: str) -> str:
    """The page with its links as they are on the site."""
    here, parts, end = posixpath.dirname(site_path(page)), [], 0
    for found in links(markdown):
        path, anchor = target_of(page, found["target"])
        new = posixpath.relpath(site_path(path), here or ".") + (f"#{anchor}" if anchor else "")
        parts += [markdown[end : found.start("target")], new if found["target"][0] != "#" else found["target"]]
        end = found.end("target")
    return "".join([*parts, markdown[end:]])


def widened(markdown: str) -> str:
    """The page with the lists that Python-Markdown needs: items are indented by 4, and a list begins after a blank line."""
    out: list[str] = []
    width, fenced = 0, False
    for line in markdown.split("\n"):
        fenced ^= bool(re.match(r" {0,3}(```|~~~)", line)) and not width
        item = None if fenced else re.match(r"([*-]|\d+\.) +(?=\S)", line)
        if item:
            if not width and out and out[-1].strip():
                out.append("")
            width = item.end()
        elif width and line.startswith(" " * width):
            line = " " * (4 - width) + line
        elif line.strip() and (not out or not out[-1].strip() or line.startswith("#")):
            width = 0  # an unindented line after a blank one ends the list; after text it goes on with it
        out.append(line)
    return "\n".join(out)


def title_of(path: Path) -> str:
    """The first heading of a page, or its file name."""
    found = re.search(r"^# +(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.suffix == ".md" else None
    return found[1] if found else path.name


def listing(folder: str) -> str:
    """A page that lists a folder without README. Its links are relative to that README."""
    inside = sorted(
        entry for entry in (ROOT / folder).iterdir() if entry.name != "__pycache__" and not entry.name.startswith(".")
    )
    rows = [f"* [{title_of(entry)}]({entry.name})" if entry.is_file() else f"* {entry.name}/" for entry in inside]
    return "\n".join([f"# {'Decisions' if folder == 'docs/decisions' else folder}", "", *rows, ""])


def source_page(path: str) -> str:
    """A page that shows a source file."""
    text, fence = (ROOT / path).read_text(encoding="utf-8"), "~" * 12
    return f'# {Path(path).name}\n\n`{path}`\n\n{fence}{SOURCES.get(Path(path).suffix, "make")} linenums="1"\n{text}\n{fence}\n'


def notebook_page(path: str) -> str:
    """A page made of a notebook's cells: text as it is, code as code, printed text and PNG pictures below it."""
    parts = []
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            parts += _output(output)
    name = Path(path).name
    parts.insert(1, f'*This page is the notebook <a href="{name}" download>{name}</a>.*')
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> list[str]:
    data = output.get("data", {})
    if picture := data.get("image/png"):
        return [f'<img alt="picture that the cell above made" src="data:image/png;base64,{"".join(picture).strip()}">']
    text = "".join(output.get("text", data.get("text/plain", [])))
    return [f'<pre class="output">{html.escape(text.rstrip())}</pre>'] if text.strip() else []


def content_of(path: str) -> str | None:
    """What the site's page of a file or folder says, before its links are rewritten; None: the file is copied as it is."""
    whole = ROOT / path
    if whole.is_dir():
        readme = whole / "README.md"
        return readme.read_text(encoding="utf-8") if readme.exists() else listing(path)
    if whole.suffix == ".ipynb":
        return notebook_page(path)
    if whole.suffix == ".md":
        return whole.read_text(encoding="utf-8")
    return source_page(path) if site_path(path).endswith(".md") else None


def linked(pages: list[str]) -> set[str]:
    """Files and folders outside `docs/`, and folders in it, to which these pages lead, also by way of each other."""
    found: set[str] = set()
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        content = content_of(page) if page.endswith((".md", ".ipynb")) or (ROOT / page).is_dir() else None
        base = posixpath.join(page, "README.md") if (ROOT / page).is_dir() else page
        for match in links(content or ""):
            path, _ = target_of(base, match["target"])
            new = (ROOT / path).is_dir() or not path.startswith("docs/")
            if new and path not in found and (ROOT / path).exists():
                found.add(path)
                waiting.append(path)
    return found


# Events of mkdocs. ---------------------------------------------------------------------------------------------------------------


def _with_folders(entries: list[Any]) -> list[Any]:
    """The navigation, with "decisions/" replaced by all pages of the folder."""
    out: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            entry = {name: _with_folders(below) if isinstance(below, list) else below for name, below in entry.items()}
        if isinstance(entry, str) and entry.endswith("/"):
            names = sorted(path.name for path in (ROOT / "docs" / entry).glob("*.md"))
            out += [f"{entry}README.md", *(f"{entry}{name}" for name in names)]
        else:
            out.append(entry)
    return out


def on_config(config: Any) -> Any:
    config["nav"] = _with_folders(config["nav"])
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slug
    return config


def _make(config: Any, path: str) -> Any:
    from mkdocs.structure.files import File, InclusionLevel

    content, where = content_of(path), site_path(path)
    if content is None:
        return File.generated(config, where, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV)
    return File.generated(config, where, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def on_files(files: Any, config: Any) -> Any:
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    books = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".ipynb")]
    for path in sorted({*TOP, *books, *linked([*pages, *books, *TOP])}):
        file = _make(config, path)
        _REPOSITORY[file.src_uri] = posixpath.join(path, "README.md") if (ROOT / path).is_dir() else path
        if file.src_uri not in files.src_uris:
            files.append(file)
    return files


_REPOSITORY: dict[str, str] = {}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    path = _REPOSITORY.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return widened(relinked(markdown, path)) if path.endswith((".md", ".ipynb")) else markdown
