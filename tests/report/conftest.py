"""A browser for the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
