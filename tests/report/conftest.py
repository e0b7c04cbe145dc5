"""A browser for the tests of pages, and the figures for those of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpo.common import figures as style
from tests.report import browser


@pytest.fixture(scope="session")
def started_chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    reason = browser.missing()
    if reason:
        pytest.skip(reason)
    with browser.start(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def chromium(started_chromium: browser.Browser) -> browser.Browser:
    """The browser as it starts: of its own size and colours, on an empty page, with nothing in its logs."""
    started_chromium.reset()
    return started_chromium


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, so that a test can look at what was drawn."""
    saved: list[Any] = []
    real = style.save

    def save(figure: Any, path: Any) -> Path:
        saved.append(figure)
        return real(figure, path)

    monkeypatch.setattr(style, "save", save)
    return saved
