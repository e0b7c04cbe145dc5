"""Where the marks of the page's charts stand; the templates draw them as SVG that takes its colours from the page.

Places are given in per cent of the picture, sizes in pixels, so that a telephone shows the same marks closer together
instead of smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import linear_regression
from typing import Any

from mpo.common.figures import round_ticks
from mpo.common.words import ARROW
from mpo.report.build import GapAgainstAttack
from mpo.report.measurement import GAP, SHARE, Cell, Measurement, Unit, shown_language
from mpo.report.tables import bare


class Scale:
    """From numbers to per cent."""

    def __init__(self, unit: Unit, low: float, high: float, start: float = 3, end: float = 97) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end
        found = round_ticks(low * unit.scale, high * unit.scale, unit.signed)
        self.ticks = [(self(value / unit.scale), label) for value, label in found]

    def __call__(self, value: float) -> float:
        """The place of a number; one outside the scale stands at its end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def scale(measurement: Measurement) -> Scale:
    """The scale that holds all values of a measurement, their intervals and its reference."""
    unit = measurement.unit
    if measurement.axis is not None:
        return Scale(unit, *measurement.axis)
    found = [cell.value for row in measurement.rows for cell in row.cells if cell is not None]
    values = [v for value in found for v in (value.value, value.low, value.high) if v is not None]
    values += [measurement.reference[0]] if measurement.reference is not None else []
    values += [0.0] if unit.signed else []
    margin = 0.04 * ((max(values) - min(values)) or abs(max(values)) or 1.0)
    return Scale(unit, min(values) - margin, max(values) + margin)


def from_to(cells: Iterable[Cell | None], unit: Unit) -> str:
    """The cells' values without their unit."""
    return f" {ARROW} ".join(bare(unit.write(None if cell is None else cell.value.value)) for cell in cells)


def bars(counts: Mapping[str, int], total: int) -> list[tuple[str, int, float]]:
    """Horizontal bars: ``(label, count, length)``, the longest being 100 per cent long unless ``total`` is larger."""
    longest = max([total, *counts.values(), 1])
    return [(label, count, round(100 * count / longest, 2)) for label, count in counts.items()]


def scatter(series: Sequence[GapAgainstAttack], models: Sequence[str]) -> dict[str, Any]:
    """Languages by reward gap and attack success, a mark per model, with the least-squares line of each.

    Args:
        series: ``(model, [(language code, reward gap, attack success)], correlation)``.
        models: All models of the page, for their colours.

    Returns:
        The scales ``across`` and ``up``, the lines ``fits`` as ``(model, x, y, x, y)``, and ``marks`` as ``(model, x, y,
        place of the label, label, title)``, the place as ``(pixels to the right, pixels down, SVG's text-anchor)``.
    """
    every = [x for _, points, _ in series for _, x, _ in points]
    margin = 0.12 * ((max(every) - min(every)) or 1.0)
    across, up = Scale(GAP, min(every) - margin, max(every) + margin, 0, 100), Scale(SHARE, 0, 1, 90, 5)
    fits, marks = [], []
    for name, points, found in series:
        model = models.index(name)
        if found.pearson is not None:
            xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
            slope, start = linear_regression(xs, ys)
            ends = [(across(x), up(start + slope * x)) for x in (min(xs), max(xs))]
            fits.append((model, *ends[0], *ends[1]))
        for language, x, y in sorted(points, key=lambda point: point[1]):
            title = f"{shown_language(language)}, {name}: {GAP.write(x)}, {SHARE.write(y)}"
            marks.append((model, across(x), up(y), language, title))
    places = _label_places([mark[1:3] for mark in marks], [len(mark[3]) for mark in marks])
    return {
        "across": across,
        "up": up,
        "fits": fits,
        "marks": [(*mark[:3], place, *mark[3:]) for mark, place in zip(marks, places, strict=True)],
    }


_Box = tuple[float, float, float, float]  # left, top, right, bottom
_LABEL_PLACES = ((0, -10, "middle"), (0, 19, "middle"), (9, 4, "start"), (-9, 4, "end"))
_NARROW, _HEIGHT = 350, 340  # pixels of the picture; a wide one has more room
_LETTER, _LINE = 8, 13


def _label_places(marks: Sequence[tuple[float, float]], letters: Sequence[int]) -> list[tuple[int, int, str]]:
    """Where each mark's label stands so that it covers no other mark or label and not the axis, as far as there is room."""
    centres = [(_NARROW * x / 100, _HEIGHT * y / 100) for x, y in marks]
    taken: list[_Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    taken.append((0, 0.9 * _HEIGHT + 2, _NARROW, _HEIGHT))  # the numbers of the axis
    chosen = []
    for number, ((x, y), count) in enumerate(zip(centres, letters, strict=True)):
        others = taken[:number] + taken[number + 1 :]

        def box(place: tuple[int, int, str], x: float = x, y: float = y, count: int = count) -> _Box:
            right, down, anchor = place
            left = x + right - _LETTER * count * {"middle": 0.5, "start": 0, "end": 1}[anchor]
            return left, y + down - _LINE + 2, left + _LETTER * count, y + down + 2

        def covered(place: tuple[int, int, str], others: Sequence[_Box] = others) -> float:
            left, top, right, bottom = box(place)
            outside = max(0.0, -left) + max(0.0, right - _NARROW)
            return outside + sum(
                max(0.0, min(right, x1) - max(left, x0)) * max(0.0, min(bottom, y1) - max(top, y0))
                for x0, y0, x1, y1 in others
            )

        best = min(_LABEL_PLACES, key=covered)
        taken.append(box(best))
        chosen.append(best)
    return chosen
