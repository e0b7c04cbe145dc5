"""Numbers and settings as they are written for people."""

from __future__ import annotations

from enum import Enum

import pytest
from transformers import SchedulerType

from mpo.common.words import counted, listed, magnitude, plain, rough_duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 seconds"),
        (89, "89 seconds"),
        (91, "2 minutes"),
        (5399, "90 minutes"),
        (5400, "1.5 hours"),
        (90_000, "25.0 hours"),
    ],
)
def test_an_estimate_has_as_many_digits_as_it_deserves(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text


def test_a_setting_is_written_as_in_a_recipe() -> None:
    class Kind(Enum):
        FIRST = "first"

    assert plain(Kind.FIRST) == plain("first") == "first"
    assert plain(SchedulerType.COSINE) == "cosine"
    assert plain(0.5) == "0.5"


def test_amounts_are_written_with_their_units() -> None:
    assert [counted(n, "group") for n in (0, 1, 1200)] == ["0 groups", "1 group", "1,200 groups"]
    assert [listed(names) for names in ([], ["a"], ["a", "b"], "abc")] == ["", "a", "a and b", "a, b and c"]
    assert [size(n) for n in (5, 1234, 2e12)] == ["5 B", "1.23 kB", "2 TB"]
    assert [magnitude(n) for n in (5, 135e6, 8.03e9)] == ["5", "135M", "8.03B"]
