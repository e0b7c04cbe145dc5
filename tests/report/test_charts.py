"""Marks and labels of the page's charts do not cover each other."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from mpo.report.charts import _HEIGHT, _LETTER, _LINE, _NARROW, _label_places


def boxes(marks: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Where labels of two letters are drawn, by the meaning of SVG's attributes."""
    found = []
    for (x, y), (dx, dy, anchor) in zip(marks, _label_places(marks, [2] * len(marks)), strict=True):
        start = _NARROW * x / 100 + dx - {"start": 0, "middle": _LETTER, "end": 2 * _LETTER}[anchor]
        base = _HEIGHT * y / 100 + dy
        found.append((start, base - _LINE + 2, start + 2 * _LETTER, base + 2))
    return found


def overlap(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return all(min(first[i + 2], second[i + 2]) - max(first[i], second[i]) > 0 for i in (0, 1))


def test_two_marks_that_nearly_touch_have_labels_apart() -> None:
    for first, second in combinations(boxes([(50.0, 60.0), (51.5, 62.0)]), 2):
        assert not overlap(first, second)


def test_the_label_of_a_mark_on_the_axis_stands_above_its_numbers() -> None:
    ((_, _, _, bottom),) = boxes([(50.0, 90.0)])
    assert bottom <= 0.9 * _HEIGHT


@pytest.mark.parametrize("seed", range(20))
def test_seven_languages_of_two_models_are_told_apart(seed: int) -> None:
    numbers = random.Random(seed)
    marks = [(numbers.uniform(5, 95), numbers.uniform(5, 90)) for _ in range(14)]
    placed = boxes(marks)
    # Labels are chosen one after the other, so a crowd may leave no free place; a few may touch, not many.
    assert sum(overlap(first, second) for first, second in combinations(placed, 2)) <= 2


def test_a_mark_at_the_edge_keeps_its_label_in_the_picture() -> None:
    for left, _, right, _ in boxes([(0.5, 50.0), (99.5, 50.0)]):
        assert left >= 0 and right <= _NARROW
