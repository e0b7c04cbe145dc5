"""What MkDocs does not know of these pages: that they are read on GitHub, too.

Three pages of the site lie outside docs/, and many links lead from a page to a file of the repository. The hooks below
add the first to the site and make a page of each such file, so that every link leads somewhere, on GitHub and here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINES_SHOWN = 400

_FENCE_OR_LINK = re.compile(
    r"^(`{3,}).*?^\1$|\]\((?P<path>[^)\s#:]+)(?P<rest>#[^)\s]*)?\)", re.MULTILINE | re.DOTALL
)
_LEXERS = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, and a page for each file or folder that any page links to."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    linked = {
        path
        for file in files.documentation_pages()
        for path in _links(file.content_string, _origin(file.src_uri))
        if _in_site(path).startswith("source/")
    }
    for path in sorted(linked):
        files.append(File.generated(config, _in_site(path), content=_source(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that hold in the repository into those that hold in the site."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def rewritten(found: re.Match[str]) -> str:
        if not found["path"]:
            return found[0]
        target = _in_site(_resolved(found["path"], _origin(here)))
        return f"]({os.path.relpath(target, PurePosixPath(here).parent)}{found['rest'] or ''})"

    return _FENCE_OR_LINK.sub(rewritten, markdown)


def _origin(name: str) -> str:
    """Where in the repository a page of the site lies."""
    return next((path for path, page in PAGES.items() if page == name), f"docs/{name}")


def _resolved(link: str, origin: str) -> str:
    return os.path.normpath(PurePosixPath(origin).parent / link)


def _links(markdown: str, origin: str) -> list[str]:
    found = _FENCE_OR_LINK.finditer(markdown)
    paths = [_resolved(link["path"], origin) for link in found if link["path"]]
    return [path for path in paths if (ROOT / path).exists()]  # MkDocs names those that are not there


def _in_site(path: str) -> str:
    """The page or file of the site that shows a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _source(path: str) -> str:
    """The page of a file, with its text, or of a folder, with the names in it."""
    place = ROOT / path
    head = f"---\ntitle: {path}\nsearch: {{exclude: true}}\nhide: [navigation]\n---\n\n# `{path}`\n\n"
    if place.is_dir():
        names = sorted(f"{item.name}/" if item.is_dir() else item.name for item in place.iterdir())
        return head + "".join(f"- `{name}`\n" for name in names if not name.startswith(("__pycache__", ".")))
    lines = place.read_text(encoding="utf-8").splitlines()
    more = f"\nThe first {LINES_SHOWN} of {len(lines)} lines.\n" if len(lines) > LINES_SHOWN else ""
    text = "\n".join(lines[:LINES_SHOWN])
    return f"{head}`````{_LEXERS.get(place.suffix, 'text')}\n{text}\n`````\n{more}"


class PlainRoles(griffe.Extension):
    """Shows what Sphinx calls roles (a name behind ``:class:``) as the name alone, and no instructions to doctest."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(
                r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE
            )  # Google's name for them
            obj.docstring.value = re.sub(r" *# doctest: \S+", "", text)
