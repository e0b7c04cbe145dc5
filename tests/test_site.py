"""The documentation site: it builds without a warning, every link in it leads somewhere, and it loads nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]


class _Page(HTMLParser):
    """The anchors of a page, where its links lead, and what a browser would load for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("MkDocs is not installed; `pip install '.[docs]'`")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    lost, elsewhere = defaultdict(list), []
    for path, page in pages.items():
        if path.name == "404.html":  # its links count from wherever it is shown
            continue
        elsewhere += [address for address in page.loaded if urlsplit(address).netloc]
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = target in pages and parts.fragment and parts.fragment != "__skip"
            if not target.exists() or (known and unquote(parts.fragment) not in pages[target].anchors):
                lost[str(path.relative_to(site))].append(link)
    assert not lost
    assert not elsewhere
    assert len(pages) > 40


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    import mpo

    anchors = {
        anchor for path in (site / "api").glob("*.html") for anchor in _Page(path.read_text("utf-8")).anchors
    }
    assert {f"mpo.{name}" for name in mpo.__all__ if not name.startswith("_")} <= anchors


def test_the_search_finds_pages_and_leaves_out_the_texts_of_files(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    assert any(e["location"] == "method.html#collapse" and "both" in e["text"] for e in index)
    assert not any(entry["location"].startswith("source/") for entry in index)


def test_a_link_to_a_file_of_the_repository_leads_to_its_text(site: Path) -> None:
    assert "source/mpo/modeling/loss.py.html" in (site / "method.html").read_text(encoding="utf-8")
    assert "def" in (site / "source" / "mpo" / "modeling" / "loss.py.html").read_text(encoding="utf-8")
    assert "docs/" not in [link[:5] for link in _Page((site / "index.html").read_text("utf-8")).links]
