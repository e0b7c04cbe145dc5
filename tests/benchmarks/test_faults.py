"""Hostile inputs, fifty of each kind that is quick to try: every one ends in a clear error or in what it should."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from benchmarks.faults import measure
from benchmarks.hostile.cases import EITHER, REFUSED, SAME, Case, altered, try_all
from mpo.errors import DataError


@pytest.mark.parametrize(("kind", "number"), [("data", 50), ("recipes", 50), ("results", 25)])
def test_no_hostile_input_ends_in_a_traceback_or_is_accepted_in_silence(
    kind: str, number: int, tmp_path: Path
) -> None:
    tally = measure(kind, 5, number, tmp_path)
    assert tally.tried == number and tally.wrong == []
    assert tally.refused >= (number // 3 if kind != "results" else 0)
    assert len(tally.by_name) > 10


def test_what_is_wrong_is_counted() -> None:
    def fails() -> None:
        raise KeyError("x")

    def refuses() -> None:
        raise DataError("no such row")

    def says_much() -> None:
        raise DataError("x" * 10_000)

    def hangs() -> None:
        time.sleep(30)

    tally = try_all(
        [
            Case("a", REFUSED, refuses),
            Case("b", REFUSED, lambda: None),
            Case("c", SAME, refuses),
            Case("d", EITHER, fails),
            Case("e", EITHER, says_much),
            Case("f", SAME, lambda: "another result"),
            Case("g", EITHER, lambda: None),
            Case("h", EITHER, hangs),
        ],
        seconds=0.1,
    )
    assert tally.tried == 8 and tally.refused == 3
    assert [sentence[0] for sentence in tally.wrong] == list("bcdefh")
    assert "KeyError at test_faults.py" in tally.wrong[2]


def test_what_only_waits_for_a_busy_machine_does_not_hang() -> None:
    def waits() -> None:
        time.sleep(0.5)

    def works() -> None:
        while True:
            pass

    tally = try_all([Case("a", EITHER, waits), Case("b", EITHER, works)], seconds=0.2)
    assert [sentence[:15] for sentence in tally.wrong] == ["b: TimeoutError"]


def test_every_altered_document_is_another() -> None:
    draw = random.Random(0)
    first = json.dumps({"a": [1, {"b": "text"}], "c": {"d": 2.5}})
    for _ in range(200):
        document = json.loads(first)
        altered(document, draw)
        assert json.dumps(document) != first  # in which `true` is not 1
