"""The documentation site, checked without mkdocs: every page is in the navigation, and every link and anchor leads somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools import site_hooks

from localmotion import methods
from localmotion.config import leaves
from localmotion.runs.settings import compose

ROOT = site_hooks.ROOT
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])]
BOOKS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.ipynb"))]


def _in_nav(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, dict):
            for below in entry.values():
                yield from _in_nav(below if isinstance(below, list) else [below])
        else:
            yield entry


NAV = list(_in_nav(site_hooks._with_folders(CONFIG["nav"])))


def test_every_page_and_notebook_is_in_the_navigation_once() -> None:
    shown = [*(page for page in PAGES if page.startswith("docs/")), *site_hooks.TOP, *BOOKS]
    assert {site_hooks.site_path(page) for page in shown} <= set(NAV)
    assert len(NAV) == len(set(NAV))


def test_every_entry_of_the_navigation_is_a_file() -> None:
    for entry in NAV:
        path = entry.removeprefix("repository/") if entry.startswith("repository/") else f"docs/{entry}"
        book, folder = ROOT / path.replace(".md", ".ipynb"), (ROOT / path).parent
        assert (ROOT / path).is_file() or book.is_file() or (path.endswith("README.md") and folder.is_dir()), entry


@pytest.mark.parametrize("page", [*PAGES, *BOOKS])
def test_links_and_anchors_of_a_page_lead_somewhere(page: str) -> None:
    content = site_hooks.content_of(page)
    for found in site_hooks.links(content or ""):
        path, anchor = site_hooks.target_of(page, found["target"])
        assert (ROOT / path).exists(), f"{page}: {found['target']}"
        if anchor:
            assert anchor in site_hooks.anchors((ROOT / path).read_text()), f"{page}: {found['target']}"


def test_nothing_is_loaded_from_another_server() -> None:
    assert CONFIG["theme"]["font"] is False
    styles = [path.read_text() for path in (ROOT / "docs").rglob("*.css")]
    drawings = [path.read_text().replace("http://www.w3.org/2000/svg", "") for path in (ROOT / "docs").rglob("*.svg")]
    pages = [re.sub(site_hooks.CODE, "", path.read_text()) for path in (ROOT / "docs").rglob("*.md")]
    assert not [text[:80] for text in [*styles, *drawings] if "http" in text]
    assert not [text[:80] for text in pages if re.search(r"!\[[^\]]*\]\(http|<(script|iframe|link)\b", text)]
    assert not CONFIG.get("extra_javascript")
    assert not any("mermaid" in text for text in pages)  # the theme would load it from another server


@pytest.mark.parametrize("name", sorted(methods.names()))
def test_each_method_has_a_page_and_its_settings_exist(name: str) -> None:
    page = (ROOT / "docs/methods" / f"{name}.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## Paper", "## Commands", "## Settings that matter", "## Results here", "## When to use it"]
    stage = next(iter(methods.get(name).stages))
    known = {setting for setting, _ in leaves(compose(name, stage, env="toy:reach", flags={"data": "store"}))}
    rows = page.split("## Settings that matter")[1].split("##")[0].split("|---|")[1]
    cells = re.findall(r"^\| (.+?) \|", rows, re.MULTILINE)
    for setting in re.findall(r"`([\w.]+)`", " ".join(cells)):
        assert any(full == setting or full.endswith(f".{setting}") for full in known), setting
    commands = re.findall(r"^ {4}localmotion ([a-z]+) +--method ([\w]+)", page, re.MULTILINE)
    assert {command for command, _ in commands} <= {*methods.get(name).stages}
    assert {method for _, method in commands} == {name}
    assert name in (ROOT / "docs/which_method.md").read_text()


def test_messages_in_troubleshooting_are_those_of_the_source() -> None:
    sources = "\n".join(path.read_text() for path in [*(ROOT / "src").rglob("*.py"), ROOT / "tools/install_torch.py"])
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that go on in the next line
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^ {4,6}(?:error: |warning: |note: )?(\S.*)$", page, re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        parts = [part.strip(" .:;'()") for part in message.split("…") if "did you mean" not in message]
        for part in (part for part in parts if len(part) > 8):
            assert part in joined, message


def test_links_out_of_docs_are_rewritten_and_those_in_code_are_not() -> None:
    text = "[a](../../METHODS.md#drp) [b](../videos.md) `[c](../../no.md)` [d](#here) [e](https://x.org/)\n\n```\n[f](../../no.md)\n```\n"
    assert site_hooks.relinked(text, "docs/methods/drp.md") == text.replace("../../METHODS.md", "../repository/METHODS.md")
    assert (
        site_hooks.relinked("[a](docs/videos.md) ![b](docs/pictures/x.png)", "README.md")
        == "[a](../videos.md) ![b](../pictures/x.png)"
    )
    assert site_hooks.relinked("[a](../examples/lamps.py)", "docs/own.md") == "[a](repository/examples/lamps.py.md)"
    assert site_hooks.relinked("[a](docs/decisions)", "README.md") == "[a](../decisions/README.md)"


def test_anchors_are_those_of_code_hosts() -> None:
    found = site_hooks.anchors("# DRP: equations in the code\n\n## What `--env` does, and [why](x.md)\n\n```\n# not one\n```\n")
    assert found == {"drp-equations-in-the-code", "what---env-does-and-why"}


def test_pages_that_are_linked_from_linked_pages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies/x").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("[x](../studies/x/README.md)")
    (tmp_path / "studies/x/README.md").write_text("[rows](rows.json) ![picture](p.jpg) [gone](gone.json)")
    (tmp_path / "studies/x/rows.json").write_text("{}")
    (tmp_path / "studies/x/p.jpg").write_bytes(b"")
    monkeypatch.setattr(site_hooks, "ROOT", tmp_path)
    assert site_hooks.linked(["docs/a.md"]) == {"studies/x/README.md", "studies/x/rows.json", "studies/x/p.jpg"}


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = {"output_type": "stream", "name": "stdout", "text": ["1 < 2\n"]}
    picture = {"output_type": "display_data", "data": {"image/png": "iVBO\n", "text/plain": ["<Figure>"]}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": ["print('1 < 2')"], "outputs": [stream, picture]},
    ]
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(site_hooks, "ROOT", tmp_path)
    page = site_hooks.notebook_page("x.ipynb")
    assert page.startswith("# Title\n\n")
    assert "```python\nprint('1 < 2')\n```" in page
    assert '<pre class="output">1 &lt; 2</pre>' in page
    assert "data:image/png;base64,iVBO" in page
    assert "&lt;Figure" not in page


def test_lists_are_widened_for_python_markdown() -> None:
    text = "Text:\n* one\n  more\n\n* two\n\n2. Do:\n\n       code\n\n   Text.\n\nEnd.\n\n    code\n"
    wide = "Text:\n\n* one\n    more\n\n* two\n\n2. Do:\n\n        code\n\n    Text.\n\nEnd.\n\n    code\n"
    assert site_hooks.widened(text) == wide
    assert site_hooks.widened("```\nx\n* y\n```\n\n* a\n") == "```\nx\n* y\n```\n\n* a\n"
