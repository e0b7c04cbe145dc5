"""A browser for the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.report import browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    reason = browser.missing()
    if reason:
        pytest.skip(reason)
    with browser.start(tmp_path_factory.mktemp("profile")) as started:
        started.call("/url", {"url": "about:blank"})
        started.console(), started.requests()
        yield started
